package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/dunlin/dunlin/agent/oip"
)

// chunk is how many bytes of a message are asked of the transport at a time.
const chunk = 1 << 20

// share is what a call has of the bytes that all requests may have.
type share struct {
	server *oip.Server
	bytes  int64
}

func (s *share) take(n int64) error {
	if err := s.server.Hold(n); err != nil {
		return err
	}
	s.bytes += n
	return nil
}

func (s *share) release() { _ = s.take(-s.bytes) } // giving back is never refused

// transport is a stream as grpc's transport gives it to a handler. Messages
// are read from it rather than with RecvMsg, which takes in a whole message
// before anybody can refuse it for the memory that it needs, and joins its
// parts only then.
type transport interface {
	ReadMessageHeader(header []byte) error
	Read(n int) (mem.BufferSlice, error)
	RecvCompress() string
	// WriteStatus ends the stream, also for whoever reads from it.
	WriteStatus(*status.Status) error
}

// receiver reads the messages of a stream.
type receiver struct {
	transport
	service *service
	limit   int64 // bytes of a message
	header  [5]byte
	left    int64 // of the message at hand that are not read
}

func (s *service) newReceiver(ctx context.Context, limit int64) (*receiver, error) {
	t, ok := grpc.ServerTransportStreamFromContext(ctx).(transport)
	if !ok {
		return nil, errors.New("the grpc transport does not give messages in parts")
	}
	return &receiver{transport: t, service: s, limit: limit}, nil
}

// next gives the next message, decompressed, and takes its bytes from the
// share part by part, before it reads them. Nobody else has the memory. The
// error is io.EOF where there are no more messages. One of code Unavailable
// leaves the rest of the message unread, see skip.
func (r *receiver) next(s *share) ([]byte, error) {
	if err := r.ReadMessageHeader(r.header[:]); err != nil {
		return nil, err
	}
	n := int64(binary.BigEndian.Uint32(r.header[1:]))
	r.left = n
	if n > r.limit {
		return nil, oip.Errorf(oip.TooLarge, "message has %d bytes, allowed are %d", n, r.limit)
	}
	if err := s.take(n); err != nil { // there is no room for it now
		return nil, err
	}
	_ = s.take(oip.Part(0, n) - n) // giving back is never refused
	if n > transferAbove {
		most := r.service.transferTime(n)
		late := time.AfterFunc(most, func() {
			_ = r.WriteStatus(status.Newf(codes.DeadlineExceeded, "a message of %d bytes did not arrive within %s", n, most)) // ends read
		})
		defer late.Stop()
	}
	data, err := r.read(n, s)
	if err != nil {
		return nil, err
	}
	switch r.header[0] {
	case 0:
		return data, nil
	case 1:
		data, err := decompress(r.RecvCompress(), data, r.limit, s)
		_ = s.take(-n)
		return data, err
	default:
		return nil, oip.Errorf(oip.InvalidArgument, "message has the flags %#x, allowed are 0 and 1", r.header[0])
	}
}

// read reads the n bytes of a message, of which the first oip.Part is taken.
func (r *receiver) read(n int64, s *share) ([]byte, error) {
	var data []byte
	room := oip.Part(0, n)
	for {
		part, err := r.Read(int(min(room-int64(len(data)), chunk)))
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = oip.Errorf(oip.InvalidArgument, "message ends after %d of %d bytes", len(data), n)
			}
			return nil, err
		}
		size := part.Len()
		r.left -= int64(size)
		if len(part) == 1 && int64(size) == n {
			if b, ok := part[0].(mem.SliceBuffer); ok { // which belongs to no pool
				return b, nil
			}
		}
		if int64(cap(data)) < room {
			data = append(make([]byte, 0, room), data...)
		}
		part.CopyTo(data[len(data) : len(data)+size])
		data = data[:len(data)+size]
		part.Free()
		switch have := int64(len(data)); have {
		case n:
			return data, nil
		case room:
			room = oip.Part(have, n)
			if err := s.take(room - have); err != nil {
				return nil, err
			}
		}
	}
}

// skip drops what is left of the message at hand.
func (r *receiver) skip() error {
	for r.left > 0 {
		part, err := r.Read(int(min(r.left, chunk)))
		if err != nil {
			return err
		}
		r.left -= int64(part.Len())
		part.Free()
	}
	return nil
}

// decompress gives the data that were compressed, of which it takes the bytes
// from the share as they appear.
func decompress(name string, data []byte, limit int64, s *share) ([]byte, error) {
	c := encoding.GetCompressor(name)
	if c == nil {
		return nil, oip.Errorf(oip.InvalidArgument, "message is compressed, and header grpc-encoding is %q", clip(name))
	}
	z, err := c.Decompress(bytes.NewReader(data))
	if err != nil {
		return nil, oip.Errorf(oip.InvalidArgument, "decompress message (%s): %w", name, err)
	}
	if closer, ok := z.(io.Closer); ok {
		defer func() { _ = closer.Close() }() // its data are checked when they end
	}
	b, err := io.ReadAll(&takingReader{io.LimitReader(z, limit+1), s})
	if _, ok := errors.AsType[*oip.Error](err); ok {
		return nil, err
	}
	if err != nil {
		return nil, oip.Errorf(oip.InvalidArgument, "decompress message (%s): %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, oip.Errorf(oip.TooLarge, "message has more than %d bytes when it is decompressed", limit)
	}
	return b, nil
}

// takingReader takes what it reads from a share.
type takingReader struct {
	r     io.Reader
	share *share
}

func (t *takingReader) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if full := t.share.take(int64(n)); full != nil {
		return n, full
	}
	return n, err
}

// message reads the one message of a unary call.
func (s *service) message(ctx context.Context, limit int64, in *share) ([]byte, error) {
	r, err := s.newReceiver(ctx, limit)
	if err != nil {
		return nil, err
	}
	data, err := r.next(in)
	if errors.Is(err, io.EOF) {
		return nil, oip.Errorf(oip.InvalidArgument, "call has no message")
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return data, nil
}
