package worker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/dunlin/dunlin/models/tensor"
)

// kind says what a message is about.
type kind byte

// The kinds. The parent asks, the child answers each question but cancel
// once, with the question's sequence number.
const (
	// kindInit opens the runtime: strings = library; number = threads; limit.
	kindInit kind = iota + 1
	// kindLoad loads a model as session: strings = folder, entry.
	kindLoad
	// kindRun runs session on tensors: strings = outputs, none for all.
	kindRun
	// kindUnload closes session.
	kindUnload
	// kindCancel asks for the early end of the question with this sequence number.
	kindCancel
	// kindDone answers: init with strings = version, providers...; load with
	// inputs, outputs, number = nanoseconds; run with tensors.
	kindDone
	// kindFailed answers: strings = what went wrong.
	kindFailed
	// kindRefused is kindFailed where the request's inputs are at fault.
	kindRefused
	// kindCancelled answers a question that was cancelled.
	kindCancelled
	// kindShared says that the message with this sequence number lies in the
	// region, in slot, as long as number says.
	kindShared
	kinds // one past the last
)

// message is what parent and child send each other. Which fields count
// depends on its kind.
type message struct {
	kind            kind
	seq             uint64
	session         uint64
	number          uint64
	limit           uint64 // bytes of a message
	slot            slot   // where in the region the answer may lie
	strings         []string
	inputs, outputs []tensor.Info
	tensors         []tensor.Tensor
	size            uint64 // of its encoding; set by decode, not sent
}

// alignment of a tensor's data within an encoded message.
const alignment = 64

// Limits of what decode accepts.
const (
	maxRank = 32 // ONNX Runtime's own models stay below; ort refuses more
)

func align(n uint64) uint64 { return (n + alignment - 1) &^ (alignment - 1) }

// header encodes all of a message but its tensors' data, and gives the size
// of the whole: each tensor's data follows at the next multiple of alignment.
func (m *message) header() (header []byte, size uint64) {
	b := make([]byte, 0, 256)
	b = append(b, byte(m.kind))
	for _, n := range []uint64{m.seq, m.session, m.number, m.limit, m.slot.place, m.slot.room} {
		b = binary.AppendUvarint(b, n)
	}
	b = binary.AppendUvarint(b, uint64(len(m.strings)))
	for _, s := range m.strings {
		b = appendString(b, s)
	}
	for _, infos := range [][]tensor.Info{m.inputs, m.outputs} {
		b = binary.AppendUvarint(b, uint64(len(infos)))
		for _, i := range infos {
			b = appendInfo(b, i)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(m.tensors)))
	for _, t := range m.tensors {
		b = appendInfo(b, tensor.Info{Name: t.Name, Type: t.Type, Shape: t.Shape})
		b = binary.AppendUvarint(b, uint64(len(t.Data)))
	}
	size = uint64(len(b))
	for _, t := range m.tensors {
		size = align(size) + uint64(len(t.Data))
	}
	return b, size
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendInfo writes the rank plus one, and 0 for a shape that is nil.
func appendInfo(b []byte, i tensor.Info) []byte {
	b = appendString(b, i.Name)
	b = binary.AppendUvarint(b, uint64(i.Type))
	if i.Shape == nil {
		return binary.AppendUvarint(b, 0)
	}
	b = binary.AppendUvarint(b, uint64(len(i.Shape))+1)
	for _, d := range i.Shape {
		b = binary.AppendVarint(b, d)
	}
	return b
}

// pieces calls write with the parts of an encoded message, each with the
// place where it begins.
func (m *message) pieces(header []byte, write func(part []byte, at uint64) error) error {
	if err := write(header, 0); err != nil {
		return err
	}
	at := uint64(len(header))
	for _, t := range m.tensors {
		at = align(at)
		if err := write(t.Data, at); err != nil {
			return err
		}
		at += uint64(len(t.Data))
	}
	return nil
}

// errMalformed is the error of a message that breaks the format.
var errMalformed = errors.New("malformed message")

// decode reads a message. Its tensors' data lies in b; nothing else does.
// The tensors' sizes are not held against their shapes.
func decode(b []byte) (*message, error) {
	d := &decoder{b: b}
	m := &message{kind: kind(d.byte()), size: uint64(len(b))}
	if m.kind == 0 || m.kind >= kinds {
		return nil, fmt.Errorf("%w: kind %d", errMalformed, m.kind)
	}
	for _, n := range []*uint64{&m.seq, &m.session, &m.number, &m.limit, &m.slot.place, &m.slot.room} {
		*n = d.uvarint()
	}
	for range d.count() {
		m.strings = append(m.strings, d.string())
	}
	for range d.count() {
		m.inputs = append(m.inputs, d.info())
	}
	for range d.count() {
		m.outputs = append(m.outputs, d.info())
	}
	var sizes []uint64
	for range d.count() {
		i := d.info()
		m.tensors = append(m.tensors, tensor.Tensor{Name: i.Name, Type: i.Type, Shape: i.Shape})
		sizes = append(sizes, d.uvarint())
	}
	if d.failed {
		return nil, fmt.Errorf("%w: its %d bytes end early or hold a bad number", errMalformed, len(b))
	}
	at := uint64(d.at)
	for i, size := range sizes {
		at = align(at)
		if at > uint64(len(b)) || size > uint64(len(b))-at {
			return nil, fmt.Errorf("%w: tensor %q has %d bytes at %d, beyond the end at %d", errMalformed, m.tensors[i].Name, size, at, len(b))
		}
		m.tensors[i].Data = b[at : at+size : at+size]
		at += size
	}
	if at != uint64(len(b)) {
		return nil, fmt.Errorf("%w: %d bytes follow its end", errMalformed, uint64(len(b))-at)
	}
	return m, nil
}

// decoder reads values until one fails; from then on it gives zeros.
type decoder struct {
	b      []byte
	at     int
	failed bool
}

func (d *decoder) fail() { d.failed, d.at = true, len(d.b) }

func (d *decoder) byte() byte {
	if d.at >= len(d.b) {
		d.fail()
		return 0
	}
	d.at++
	return d.b[d.at-1]
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b[d.at:])
	if n <= 0 {
		d.fail()
		return 0
	}
	d.at += n
	return v
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.b[d.at:])
	if n <= 0 {
		d.fail()
		return 0
	}
	d.at += n
	return v
}

// count reads a number of things to come, each at least a byte long.
func (d *decoder) count() int {
	n := d.uvarint()
	if n > uint64(len(d.b)-d.at) {
		d.fail()
		return 0
	}
	return int(n)
}

func (d *decoder) string() string {
	n := d.count()
	s := string(d.b[d.at : d.at+n])
	d.at += n
	return s
}

func (d *decoder) info() tensor.Info {
	i := tensor.Info{Name: d.string()}
	typ := d.uvarint()
	if typ > math.MaxInt32 || !tensor.Type(typ).Known() {
		d.fail()
		return i
	}
	i.Type = tensor.Type(typ)
	rank := d.uvarint()
	if rank == 0 {
		return i
	}
	if rank > maxRank+1 {
		d.fail()
		return i
	}
	i.Shape = make([]int64, rank-1)
	for n := range i.Shape {
		i.Shape[n] = d.varint()
	}
	return i
}
