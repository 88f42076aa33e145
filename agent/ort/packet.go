package ort

// #include "packet.h"
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/dunlin/dunlin/models/tensor"
)

// The packets of a lane; packet.h describes them. Question and Answer are the
// asking process's end, the lanes are the other one.
const (
	// MaxPacket bounds a packet.
	MaxPacket = C.LANE_PACKET
	// MaxInlined is the size of the tensors, all together, up to which they are
	// sent in the packet.
	MaxInlined = C.LANE_INLINED
	// Alignment is that of a tensor's data.
	Alignment = C.LANE_ALIGNMENT
)

// QuestionKind says what a lane is asked.
type QuestionKind uint64

// The kinds of questions.
const (
	// AskRun runs a session.
	AskRun QuestionKind = C.LANE_RUN
	// AskStore follows an AnswerRoom: the outputs go into this memory.
	AskStore QuestionKind = C.LANE_STORE
	// AskDrop follows it too: nobody wants the outputs. There is no answer.
	AskDrop QuestionKind = C.LANE_DROP
)

// AnswerKind says what a lane answers.
type AnswerKind uint64

// The kinds of answers.
const (
	AnswerDone      AnswerKind = C.LANE_DONE
	AnswerFailed    AnswerKind = C.LANE_FAILED
	AnswerRefused   AnswerKind = C.LANE_REFUSED // the inputs are at fault
	AnswerCancelled AnswerKind = C.LANE_CANCELLED
	AnswerRoom      AnswerKind = C.LANE_ROOM // the outputs need Bytes of memory
)

// Place describes a tensor in a packet, and where its Size bytes of data lie.
type Place struct {
	Index int // among the model's inputs or outputs
	Type  tensor.Type
	At    uint64 // a multiple of Alignment
	Size  uint64
	Shape []int64
}

// Question is a packet that goes to a lane.
type Question struct {
	Kind              QuestionKind
	Sequence, Session uint64 // the sequence numbers of a lane grow, and begin above 0
	// The memory that the question has for itself: a part of what is shared,
	// or, where Attached, a memfd of Room bytes that is sent with the packet.
	Base, Room uint64
	Attached   bool
	From       uint64 // a multiple of Alignment: outputs may be laid from here on
	Inline     bool   // the inputs' data lies in the packet
	// An output with a type is expected to have this shape, and is to lie
	// there; those of the others' fields count that is Index.
	Outputs, Inputs []Place
}

// Size gives how many bytes Append appends.
func (q *Question) Size() uint64 {
	words := C.LANE_QUESTION_WORDS
	for _, places := range [][]Place{q.Outputs, q.Inputs} {
		for i := range places {
			words += C.LANE_TENSOR_WORDS + len(places[i].Shape)
		}
	}
	return 8 * uint64(words)
}

// Append appends the question without the data of inputs that are inline.
func (q *Question) Append(b []byte) []byte {
	var flags uint64
	if q.Attached {
		flags |= C.LANE_ATTACHED
	}
	if q.Inline {
		flags |= C.LANE_INLINE
	}
	for _, word := range [C.LANE_QUESTION_WORDS]uint64{
		uint64(q.Kind), q.Sequence, q.Session, flags, q.Base, q.Room, q.From, uint64(len(q.Outputs)), uint64(len(q.Inputs)),
	} {
		b = binary.NativeEndian.AppendUint64(b, word)
	}
	for _, places := range [2][]Place{q.Outputs, q.Inputs} {
		for i := range places {
			b = places[i].append(b)
		}
	}
	return b
}

func (p *Place) append(b []byte) []byte {
	for _, word := range [C.LANE_TENSOR_WORDS]uint64{uint64(p.Index), uint64(p.Type), p.At, p.Size, uint64(len(p.Shape))} {
		b = binary.NativeEndian.AppendUint64(b, word)
	}
	for _, d := range p.Shape {
		b = binary.NativeEndian.AppendUint64(b, uint64(d))
	}
	return b
}

// Answer is a packet that came from a lane.
type Answer struct {
	Kind         AnswerKind
	Sequence     uint64
	Began, Ended int64  // of the run, in nanoseconds of CLOCK_MONOTONIC
	Bytes        uint64 // of AnswerRoom
	Text         string // of a failure
	Inline       bool   // the outputs' data lies in the packet
	// Surprised says that an output did not have the shape that the question
	// expected.
	Surprised bool
	Outputs   []Place

	dims []int64 // of the outputs' shapes
}

// ErrPacket is the error of a packet that breaks the format.
var ErrPacket = errors.New("malformed packet")

// Read reads a packet from a lane that is not trusted. room is the size of
// the memory that the question had for its outputs. What it accepts are
// tensors of valid shapes whose data lies in the memory or the packet, and has
// the size that their type and shape need; strings are not looked at. The
// answer shares nothing with the packet, and its outputs are valid until the
// next Read.
func (a *Answer) Read(packet []byte, room uint64) error {
	w := words(packet)
	if len(w)/8 < C.LANE_ANSWER_WORDS || len(packet) > MaxPacket {
		return fmt.Errorf("%w: %d bytes", ErrPacket, len(packet))
	}
	a.Kind, a.Sequence = AnswerKind(w.next()), w.next()
	flags := w.next()
	a.Began, a.Ended = int64(w.next()), int64(w.next())
	a.Bytes = w.next()
	count := w.next()
	a.Inline, a.Surprised = flags&C.LANE_INLINE != 0, flags&C.LANE_SURPRISED != 0
	a.Text, a.Outputs, a.dims = "", a.Outputs[:0], a.dims[:0]
	switch {
	case a.Kind < AnswerDone || a.Kind > AnswerRoom:
		return fmt.Errorf("%w: kind %d", ErrPacket, a.Kind)
	case a.Kind == AnswerDone:
	case count != 0:
		return fmt.Errorf("%w: kind %d with %d outputs", ErrPacket, a.Kind, count)
	case a.Kind == AnswerRoom:
		return nil
	case a.Bytes > uint64(len(w)):
		return fmt.Errorf("%w: a text of %d bytes", ErrPacket, a.Bytes)
	default:
		a.Text = clean(string(w[:a.Bytes]))
		return nil
	}
	if a.Inline {
		room = uint64(len(packet))
	}
	for range count {
		if err := a.output(&w, room); err != nil {
			return err
		}
	}
	// The dimensions are where they will be only now.
	dims := a.dims
	for i := range a.Outputs {
		n := len(a.Outputs[i].Shape)
		a.Outputs[i].Shape, dims = dims[:n:n], dims[n:]
	}
	return nil
}

// output reads one of the outputs.
func (a *Answer) output(w *words, room uint64) error {
	if len(*w)/8 < C.LANE_TENSOR_WORDS {
		return fmt.Errorf("%w: it ends within an output", ErrPacket)
	}
	index, typ := w.next(), w.next()
	p := Place{At: w.next(), Size: w.next()}
	rank := w.next()
	if rank > C.LANE_MAX_RANK || rank > uint64(len(*w)/8) {
		return fmt.Errorf("%w: an output of rank %d", ErrPacket, rank)
	}
	start := len(a.dims)
	for range rank {
		a.dims = append(a.dims, int64(w.next()))
	}
	p.Shape = a.dims[start:]
	if index > math.MaxInt32 || typ > math.MaxInt32 || p.At > room || p.Size > room-p.At {
		return fmt.Errorf("%w: output %d of type %d has %d bytes at %d of %d", ErrPacket, index, typ, p.Size, p.At, room)
	}
	p.Index, p.Type = int(index), tensor.Type(typ)
	if p.Type == tensor.String {
		if _, err := tensor.Elements(p.Shape); err != nil {
			return fmt.Errorf("%w: output %d: %w", ErrPacket, index, err)
		}
	} else if want, err := tensor.Bytes(p.Type, p.Shape); err != nil || uint64(want) != p.Size {
		return fmt.Errorf("%w: output %d of type %d and shape %v has %d bytes", ErrPacket, index, typ, p.Shape, p.Size)
	}
	a.Outputs = append(a.Outputs, p)
	return nil
}

// words is what is left of a packet.
type words []byte

func (w *words) next() uint64 {
	v := binary.NativeEndian.Uint64(*w)
	*w = (*w)[8:]
	return v
}
