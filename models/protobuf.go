package models

import (
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// fileWindow is how much of a file is in memory at a time.
	fileWindow = 64 << 10
	// maxFields bounds the fields that are visited in one file, and so the
	// time that a file made to be slow can take.
	maxFields = 1 << 26
)

// span is a range of bytes of the file.
type span struct{ start, end int64 }

func (s span) len() int64 { return s.end - s.start }

// field is one field of a message: a number, or the span of its content.
type field struct {
	num     protowire.Number
	wire    protowire.Type
	at      int64 // where its tag starts
	number  uint64
	content span
}

// shortError is the error of a message that ends inside a field.
type shortError string

func (e shortError) Error() string        { return notONNX + string(e) }
func (e shortError) Is(target error) bool { return target == ErrInvalid }

const notONNX = "not an ONNX model: "

func malformed(format string, args ...any) error { return invalid(notONNX+format, args...) }

// protoFile visits the fields of a protobuf message in a file without
// reading the contents that nobody asks for.
type protoFile struct {
	src    io.ReaderAt
	size   int64
	window []byte // what the file holds at from
	from   int64
	fields int
}

// bytes gives the n bytes at an offset, fewer where the file ends before
// them. They are valid until the next call; n is at most fileWindow.
func (p *protoFile) bytes(at int64, n int) ([]byte, error) {
	n = int(min(int64(n), p.size-at))
	if at < p.from || at+int64(n) > p.from+int64(len(p.window)) {
		if p.window == nil {
			p.window = make([]byte, 0, min(fileWindow, p.size))
		}
		w := p.window[:min(int64(cap(p.window)), p.size-at)]
		if got, err := p.src.ReadAt(w, at); got < len(w) {
			p.window = p.window[:0]
			if errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("file became shorter while it was read: %w", io.ErrUnexpectedEOF)
			}
			return nil, err
		}
		p.window, p.from = w, at
	}
	return p.window[at-p.from:][:n], nil
}

// each calls visit for every field of the message in s, in the file's order.
func (p *protoFile) each(s span, visit func(field) error) error {
	for at := s.start; at < s.end; {
		f, next, err := p.next(at, s.end)
		if err != nil {
			return err
		}
		if err := visit(f); err != nil {
			return err
		}
		at = next
	}
	return nil
}

func (p *protoFile) next(at, end int64) (f field, next int64, err error) {
	if p.fields++; p.fields > maxFields {
		return f, 0, invalid("more than %d fields", maxFields)
	}
	const longest = 2 * 10 // bytes of a tag and a number
	b, err := p.bytes(at, int(min(longest, end-at)))
	if err != nil {
		return f, 0, err
	}
	f.at = at
	var n, m int
	f.num, f.wire, n = protowire.ConsumeTag(b)
	if n < 0 {
		return f, 0, cut(n, "at byte %d is no field of a message", at)
	}
	switch b = b[n:]; f.wire {
	case protowire.VarintType, protowire.BytesType:
		f.number, m = protowire.ConsumeVarint(b)
	case protowire.Fixed32Type:
		var v uint32
		v, m = protowire.ConsumeFixed32(b)
		f.number = uint64(v)
	case protowire.Fixed64Type:
		f.number, m = protowire.ConsumeFixed64(b)
	default:
		return f, 0, malformed("field %d at byte %d has wire type %d, which ONNX does not use", f.num, at, f.wire)
	}
	if m < 0 {
		return f, 0, cut(m, "field %d at byte %d has no valid value", f.num, at)
	}
	next = at + int64(n+m)
	if f.wire == protowire.BytesType {
		if left := uint64(end - next); f.number > left {
			return f, 0, shortError(fmt.Sprintf("field %d at byte %d has %d bytes, only %d are left", f.num, at, f.number, left))
		}
		f.content = span{next, next + int64(f.number)}
		next = f.content.end
	}
	return f, next, nil
}

// cut makes an error of protowire's code n.
func cut(n int, format string, args ...any) error {
	if errors.Is(protowire.ParseError(n), io.ErrUnexpectedEOF) {
		return shortError(fmt.Sprintf(format, args...))
	}
	return malformed(format, args...)
}

// message gives the span of a field that is a message or bytes.
func (f field) message() (span, error) {
	if f.wire != protowire.BytesType {
		return span{}, malformed("field %d at byte %d has wire type %d instead of %d", f.num, f.at, f.wire, protowire.BytesType)
	}
	return f.content, nil
}

// integer gives the value of a field that is an integer.
func (f field) integer() (int64, error) {
	if f.wire != protowire.VarintType {
		return 0, malformed("field %d at byte %d has wire type %d instead of %d", f.num, f.at, f.wire, protowire.VarintType)
	}
	return int64(f.number), nil
}

// text gives a field that is a string which is kept and shown.
func (p *protoFile) text(f field, what string) (string, error) {
	s, err := f.message()
	if err != nil {
		return "", err
	}
	if s.len() > maxString {
		return "", invalid("%s at byte %d has %d bytes, allowed are %d", what, f.at, s.len(), maxString)
	}
	b, err := p.bytes(s.start, int(s.len()))
	if err != nil {
		return "", err
	}
	t := string(b)
	return t, checkString(what, t)
}

// varints calls visit for each value of a repeated integer, packed or not.
func (p *protoFile) varints(f field, visit func(int64) error) error {
	if f.wire == protowire.VarintType {
		return visit(int64(f.number))
	}
	s, err := f.message()
	if err != nil {
		return err
	}
	for at := s.start; at < s.end; {
		b, err := p.bytes(at, int(min(10, s.end-at)))
		if err != nil {
			return err
		}
		v, n := protowire.ConsumeVarint(b)
		if n < 0 {
			return malformed("field %d: at byte %d is no number", f.num, at)
		}
		if err := visit(int64(v)); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// fixed counts the values of a repeated field of numbers of a fixed size in
// bytes, packed or not.
func (f field) fixed(size int64) (int64, error) {
	if f.wire == protowire.Fixed32Type && size == 4 || f.wire == protowire.Fixed64Type && size == 8 {
		return 1, nil
	}
	s, err := f.message()
	if err != nil {
		return 0, err
	}
	if s.len()%size != 0 {
		return 0, malformed("field %d at byte %d has %d bytes, not a multiple of %d", f.num, f.at, s.len(), size)
	}
	return s.len() / size, nil
}
