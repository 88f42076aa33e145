package worker

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

// lie is a question that a child answers which is not to be believed. Its
// model takes x and gives the numbers y and the strings s.
type lie struct {
	control     *socket
	lane        *net.UnixConn
	region      []byte
	seq         uint64
	place, room uint64
}

// liarInfo is what such a child says of each model.
var liarInfo = engine.Info{
	Inputs:  []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 64}}},
	Outputs: []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{-1}}, {Name: "s", Type: tensor.String, Shape: []int64{-1}}},
}

// liar is the main of such a child.
func liar(answer func(*lie)) {
	s, region, err := childSocket()
	if err != nil {
		panic(err)
	}
	for {
		m, end, err := s.receive()
		if err != nil {
			os.Exit(0)
		}
		done := &message{kind: kindDone, seq: m.seq, strings: []string{"1"}}
		switch m.kind {
		case kindLane:
			lane, err := connect(end)
			if err != nil {
				panic(err)
			}
			go func() {
				b := make([]byte, maxPacket)
				for {
					n, err := lane.Read(b)
					if err != nil {
						return
					}
					word := func(i int) uint64 { return binary.NativeEndian.Uint64(b[:n][8*i:]) }
					answer(&lie{s, lane, region, word(1), word(4), word(5)})
				}
			}()
			continue
		case kindActivate:
			done.inputs, done.outputs = liarInfo.Inputs, liarInfo.Outputs
		}
		if err := s.send(done, nil); err != nil {
			panic(err)
		}
	}
}

// Numbers of packet.h.
const (
	done, failed, cancelled, room = 1, 2, 4, 5
	inline                        = 2
)

// output is a tensor of an answer.
type output struct {
	index, typ, at, size uint64
	shape                []int64
}

// packet encodes an answer.
func packet(kind, seq, flags, size uint64, outputs ...output) []byte {
	var b []byte
	add := func(words ...uint64) {
		for _, w := range words {
			b = binary.NativeEndian.AppendUint64(b, w)
		}
	}
	add(kind, seq, flags, 0, 0, size, uint64(len(outputs)))
	for _, o := range outputs {
		add(o.index, o.typ, o.at, o.size, uint64(len(o.shape)))
		for _, d := range o.shape {
			add(uint64(d))
		}
	}
	return b
}

// The last of the lies that answer tells.
const lies = 21

// answer answers with something that is nearly right.
func (l *lie) answer(kind int) {
	const at = 8 * (7 + 2*6)
	y, s := output{0, 1, at, 4, []int64{1}}, output{1, 8, at + 8, 5, []int64{1}}
	data := []byte("1234\x00\x00\x00\x00\x01\x00\x00\x00a")
	b := append(packet(done, l.seq, inline, 0, y, s), data...)
	both := func() []byte { return append(packet(done, l.seq, inline, 0, y, s), data...) }
	switch kind {
	case 0: // another question's number
		b = append(packet(done, l.seq+1, inline, 0, y, s), data...)
	case 1: // not an answer
		b[0] = 99
	case 2: // no outputs
		b = packet(done, l.seq, inline, 0)
	case 3: // one of two
		b = append(packet(done, l.seq, inline, 0, y), data...)
	case 4: // an unknown output
		y.index = math.MaxInt32
		b = both()
	case 5: // the wrong one
		y.index, s.index = 1, 0
		b = both()
	case 6: // a wrong type
		y.typ = 6
		b = both()
	case 7: // too little data
		y.shape = []int64{2}
		b = both()
	case 8: // a shape beyond counting
		y.shape, y.size = []int64{math.MaxInt64}, 1<<64-4
		b = both()
	case 9: // a negative one
		y.shape, y.size = []int64{-1}, 1<<64-4
		b = both()
	case 10: // bytes
		b = make([]byte, 300)
		r := rand.New(rand.NewPCG(1, 1))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	case 11: // outside the packet
		y.at = 1 << 40
		b = both()
	case 12: // outside the memory
		y.at, s.at = l.room-3, 0
		b = packet(done, l.seq, 0, 0, y, s)
	case 13: // a text that is longer than the packet
		b = packet(failed, l.seq, 0, 1000)
	case 14: // nobody cancelled
		b = packet(cancelled, l.seq, 0, 0)
	case 15: // more and more room
		b = packet(room, l.seq, 0, 100)
	case 16: // more than a packet
		b = append(packet(failed, l.seq, 0, 0), make([]byte, maxPacket)...)
	case 17: // half a head
		b = b[:20]
	case 18: // strings that end early
		copy(b[at+8:], "\xff\xff\xff\xff")
	case 19: // more strings than there are
		s.shape = []int64{2}
		b = both()
	case 20: // an answer that nobody asked for
		l.control.send(&message{kind: kindDone, seq: 99}, nil)
		return
	case lies: // a lane of its own
		null, err := os.Open("/dev/null")
		if err != nil {
			panic(err)
		}
		l.control.send(&message{kind: kindLane, number: 5}, null)
		return
	}
	l.lane.Write(b)
}

// poisoned answers as the runtime does when its GPU does nothing more for it.
func (l *lie) poisoned() {
	const text = "Non-zero status code returned while running Conv node. CUDA failure 700: an illegal memory access was encountered ; GPU=0"
	l.lane.Write(append(packet(failed, l.seq, 0, uint64(len(text))), text...))
}

// late answers rightly, with all outputs in the region, but has written over
// what was there before.
func (l *lie) late() {
	const n = 10_000
	size := uint64(4*n + 5*n)
	if l.room < size {
		l.lane.Write(packet(room, l.seq, 0, size))
		return
	}
	for i := range l.region {
		l.region[i] = 0xff
	}
	memory := l.region[l.place : l.place+l.room]
	clear(memory[:4*n])
	for i := range n {
		copy(memory[4*n+5*i:], "\x01\x00\x00\x00a")
	}
	l.lane.Write(packet(done, l.seq, 0, size, output{0, 1, 0, 4 * n, []int64{n}}, output{1, 8, 4 * n, 5 * n, []int64{n}}))
}

// TestGarbage has children that answer nonsense: each run gets an error, and
// nothing stays open.
func TestGarbage(t *testing.T) {
	before := descriptors(t)
	for kind := range lies + 1 {
		for _, rows := range []int64{1, 100} {
			t.Run(fmt.Sprintf("%d/%d", kind, rows), func(t *testing.T) {
				cfg := testConfig(t, fmt.Sprint("garbage=", kind))
				cfg.Compile = func(context.Context, Runtime, engine.Spec) (Image, error) { return Image{Info: liarInfo}, nil }
				w := start(t, cfg)
				id, _ := load(t, w, "digits-size.onnx")
				_, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, rows, 64)}, nil)
				if _, died := errors.AsType[*DeathError](err); !died || !strings.Contains(err.Error(), "malformed") {
					t.Error(err)
				}
			})
		}
	}
	until(t, "descriptors to be closed", func() bool { return descriptors(t) <= before })
}

// TestLateWriter has a child that writes to what it has given: that changes
// numbers at most.
func TestLateWriter(t *testing.T) {
	cfg := testConfig(t, "late")
	cfg.SharedBytes = 4 << 20
	w := start(t, cfg)
	id, _ := load(t, w, "digits-size.onnx")
	var kept []engine.Outcome
	for range 5 {
		out, err := w.Run(t.Context(), id, [][]tensor.Tensor{{floats("x", 1, 100, 64)}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, out)
	}
	for i, out := range kept {
		y, s := out.Outputs[0][0], out.Outputs[0][1]
		if changed := y.Data[0] == 0xff; changed != (i < 4) || len(y.Data) != 40_000 {
			t.Errorf("run %d: %d bytes of numbers, written to: %t", i, len(y.Data), changed)
		}
		if !bytes.Equal(s.Data, bytes.Repeat([]byte("\x01\x00\x00\x00a"), 10_000)) {
			t.Errorf("run %d: the strings have changed", i)
		}
		out.Release()
	}
}

// TestHeldLane has a lane whose other end stays open when the child is gone,
// in another process say: the run learns of the death all the same.
func TestHeldLane(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "digits-size.onnx")
	p := child(t, w)
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	l, err := newLane(p, ours)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.lanes, p.free = append(p.lanes, l), append(p.free, l)
	p.mu.Unlock()
	finished := make(chan error)
	go func() {
		_, err := one(context.Background(), w, id, []tensor.Tensor{floats("x", 1, 1, 64)}, nil)
		finished <- err
	}()
	b := make([]byte, maxPacket)
	if _, err := unix.Read(int(theirs.Fd()), b); err != nil { // the question is there
		t.Fatal(err)
	}
	p.command.Process.Kill()
	if err := <-finished; err != nil { // it ran on the next child
		t.Error(err)
	}
}

// FuzzAnswer reads answers as a run would: what is accepted lies within what
// was shared.
func FuzzAnswer(f *testing.F) {
	y, s := output{0, 1, 64, 4, []int64{1}}, output{1, 8, 128, 5, []int64{1}}
	f.Add(packet(done, 1, 0, 0, y, s))
	f.Add(packet(done, 1, inline, 0, y, s))
	f.Add(append(packet(failed, 1, 0, 5), "wrong"...))
	f.Add(packet(room, 1, 0, 1<<40))
	memory := make([]byte, 512)
	info := engine.Info{Outputs: []tensor.Info{{Name: "y", Type: tensor.Float32}, {Name: "s", Type: tensor.String}}}
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &lane{packet: b, n: len(b)}
		if err := l.answer.Read(b, uint64(len(memory))); err != nil || l.answer.Kind != ort.AnswerDone {
			if err != nil && !errors.Is(err, ort.ErrPacket) {
				t.Errorf("error %v", err)
			}
			return
		}
		l.memory.bytes = memory
		l.plan.asked = []int{0, 1}
		l.plan.requests = make([][]tensor.Tensor, 2)
		l.plan.rows, l.plan.total = []int64{1, 2}, 3
		r := run{lane: l, version: &version{info: info}}
		l.memory.region, _ = newRegion(1)
		defer l.memory.region.close()
		if err := r.collect(); err != nil {
			if !errors.Is(err, ort.ErrPacket) {
				t.Errorf("error %v", err)
			}
			return
		}
		outputs, err := l.plan.split(&info, l.answer.Outputs, l.data)
		if err != nil {
			if !errors.Is(err, engine.ErrRows) {
				t.Errorf("error %v", err)
			}
			return
		}
		for _, request := range outputs {
			for i := range request {
				if err := request[i].Check(); err != nil {
					t.Error(err)
				}
			}
		}
	})
}
