package ort

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models/tensor"
)

const sharedBytes = 1 << 20

// shared is the lanes of this process, and their memory.
var shared = sync.OnceValues(func() (*Lanes, []byte) {
	memory, err := unix.Mmap(-1, 0, sharedBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	return NewLanes(memory), memory
})

var numbers struct {
	sync.Mutex
	lane, session uint64
}

// testLane is the asking end of a lane.
type testLane struct {
	t      testing.TB
	lanes  *Lanes
	memory []byte
	number uint64
	fd     int
	seq    uint64
	answer Answer
	packet []byte // of the answer
}

// newTestLane gives a lane of its own for a test or, of a fuzz test, for all
// of its calls.
func newTestLane(t testing.TB) *testLane {
	initialise(t)
	l := &testLane{t: t, packet: make([]byte, MaxPacket+1)}
	l.lanes, l.memory = shared()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	numbers.Lock()
	l.number = numbers.lane
	numbers.lane++
	numbers.Unlock()
	l.fd = pair[0]
	if err := l.lanes.Add(l.number, pair[1]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(l.fd) })
	return l
}

// open has a model answer to a number of its own.
func (l *testLane) open(entry string) uint64 { return l.openShrinking(entry, "") }

// openShrinking has its runs leave arenas as they found them.
func (l *testLane) openShrinking(entry, arenas string) uint64 {
	s, err := Open(l.t.Context(), "testdata", entry, Setting{})
	if err != nil {
		l.t.Fatal(err)
	}
	s.shrink = arenas
	numbers.Lock()
	numbers.session++
	n := numbers.session
	numbers.Unlock()
	l.lanes.Open(n, s)
	l.t.Cleanup(func() { l.lanes.Close(n) })
	return n
}

// question gives one about all inputs of a model, whose data lies in the
// packet, and its packet.
func (l *testLane) question(session uint64, outputs int, in ...tensor.Tensor) (*Question, []byte) {
	l.seq++
	q := &Question{Kind: AskRun, Sequence: l.seq, Session: session, Inline: true}
	for i := range outputs {
		q.Outputs = append(q.Outputs, Place{Index: i})
	}
	for i, t := range in {
		q.Inputs = append(q.Inputs, Place{Index: i, Type: t.Type, Size: uint64(len(t.Data)), Shape: t.Shape})
	}
	at := q.Size()
	var data []byte
	for i, t := range in {
		for at%Alignment != 0 {
			at++
			data = append(data, 0)
		}
		q.Inputs[i].At = at
		at += uint64(len(t.Data))
		data = append(data, t.Data...)
	}
	return q, append(q.Append(nil), data...)
}

func (l *testLane) send(packet []byte, fd int) {
	l.t.Helper()
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	if err := unix.Sendmsg(l.fd, packet, oob, nil, 0); err != nil {
		l.t.Fatal(err)
	}
}

// receive reads an answer of this kind.
func (l *testLane) receive(want AnswerKind, room uint64) *Answer {
	l.t.Helper()
	n, err := unix.Read(l.fd, l.packet[:cap(l.packet)])
	if err != nil || n == 0 {
		l.t.Fatalf("%d bytes, %v", n, err)
	}
	if err := l.answer.Read(l.packet[:n], room); err != nil {
		l.t.Fatal(err)
	}
	if l.answer.Kind != want {
		l.t.Fatalf("answer %+v instead of kind %d", l.answer, want)
	}
	return &l.answer
}

// data gives an output's.
func (l *testLane) data(i int, memory []byte) []byte {
	o := l.answer.Outputs[i]
	if l.answer.Inline {
		memory = l.packet
	}
	return memory[o.At : o.At+o.Size]
}

// ones gives a tensor of so many.
func ones(name string, shape ...int64) tensor.Tensor {
	n, _ := tensor.Elements(shape)
	return tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape, Data: bytes.Repeat([]byte{0, 0, 128, 63}, int(n))}
}

func TestLane(t *testing.T) {
	l := newTestLane(t)
	add := l.open("add.onnx")
	a, b := floats("a", []int64{3, 2}, 1, 2, 3, 4, 5, 6), floats("b", []int64{2, 2}, 1, 0, 1, 2)
	_, packet := l.question(add, 2, a, b)
	l.send(packet, -1)
	got := l.receive(AnswerDone, 0)
	sum, product := floats("", []int64{3, 2}, 5, 6, 7, 8, 9, 10), floats("", []int64{3, 2}, 3, 4, 7, 8, 11, 12)
	if got.Sequence != 1 || !got.Inline || got.Surprised || len(got.Outputs) != 2 || got.Began <= 0 || got.Ended < got.Began {
		t.Errorf("%+v", got)
	}
	for i, want := range []tensor.Tensor{sum, product} {
		if o := got.Outputs[i]; o.Index != i || o.Type != want.Type || !slices.Equal(o.Shape, want.Shape) || !bytes.Equal(l.data(i, nil), want.Data) {
			t.Errorf("output %d: %+v", i, o)
		}
	}

	// Expected outputs lie where they are expected; others behind From.
	a = ones("a", 3000, 2)
	copy(l.memory, a.Data)
	copy(l.memory[24_000:], b.Data)
	q, _ := l.question(add, 2, a, b)
	q.Inline, q.Room = false, 1<<20
	q.Inputs[0].At, q.Inputs[1].At = 0, 24_000
	q.Outputs[1] = Place{Index: 1, Type: tensor.Float32, At: 64_000, Size: 24_000, Shape: []int64{3000, 2}}
	q.From = 128_000
	l.send(q.Append(nil), -1)
	got = l.receive(AnswerDone, q.Room)
	if got.Inline || got.Surprised || got.Outputs[0].At != 128_000 || got.Outputs[1].At != 64_000 {
		t.Errorf("%+v", got)
	}
	if want := floats("", []int64{2}, 2, 2).Data; !bytes.Equal(l.data(1, l.memory), bytes.Repeat(want, 3000)) {
		t.Error("the product is wrong")
	}
	q.Outputs[1].Shape, q.Sequence = []int64{2, 3000}, q.Sequence+1
	l.send(q.Append(nil), -1)
	if got = l.receive(AnswerDone, q.Room); !got.Surprised || !reflect.DeepEqual(got.Outputs[1].Shape, []int64{3000, 2}) {
		t.Errorf("%+v", got)
	}
}

// TestLaneRoom has outputs that are too large for what the question brought,
// one of which is the input that lies in the packet.
// TestLaneArenas has a session whose runs are to leave an arena as they found
// it that there is none of: the runtime says so, of its runs and no others.
func TestLaneArenas(t *testing.T) {
	l := newTestLane(t)
	plain, shrinking := l.open("add.onnx"), l.openShrinking("add.onnx", "gpu:0")
	for range 2 {
		for _, session := range []uint64{plain, shrinking} {
			want := AnswerDone
			if session == shrinking {
				want = AnswerRefused
			}
			_, packet := l.question(session, 1, ones("a", 1, 2), ones("b", 2, 2))
			l.send(packet, -1)
			if a := l.receive(want, 0); session == shrinking && !strings.Contains(a.Text, "gpu:0") {
				t.Errorf("%q", a.Text)
			}
		}
	}
}

// TestLaneTake takes a session from its lanes and gives it back.
func TestLaneTake(t *testing.T) {
	l := newTestLane(t)
	n := l.open("add.onnx")
	ask := func(want AnswerKind) {
		t.Helper()
		_, packet := l.question(n, 1, ones("a", 1, 2), ones("b", 2, 2))
		l.send(packet, -1)
		l.receive(want, 0)
	}
	ask(AnswerDone)
	s := l.lanes.Take(n)
	ask(AnswerFailed)
	if s == nil || l.lanes.Take(n) != nil {
		t.Error("it was not there, or twice")
	}
	l.lanes.Open(n, s)
	ask(AnswerDone)
}

func TestLaneRoom(t *testing.T) {
	l := newTestLane(t)
	passthrough := l.open("passthrough.onnx")
	x := ones("x", 2000)
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 20_000); err != nil {
		t.Fatal(err)
	}
	for _, attached := range []bool{false, true} {
		_, packet := l.question(passthrough, 2, x)
		l.send(packet, -1)
		if got := l.receive(AnswerRoom, 0); got.Bytes != 16_000 {
			t.Errorf("%+v", got)
		}
		// Neither another run, nor too little, nor another sequence number is it.
		_, other := l.question(passthrough, 2, x)
		l.send(other, -1)
		l.receive(AnswerFailed, 0)
		store := Question{Kind: AskStore, Sequence: l.seq - 1, Base: 4096, Room: 15_000}
		l.send(store.Append(nil), -1)
		l.receive(AnswerRoom, 0)
		wrong := store
		wrong.Sequence--
		l.send(wrong.Append(nil), -1)
		l.receive(AnswerFailed, 0)
		memory := l.memory[4096:]
		store.Room, store.Attached = 20_000, attached
		descriptor := -1
		if attached {
			store.Base, descriptor = 0, fd
			l.send(store.Append(nil), -1)
			if got := l.receive(AnswerFailed, 0); !strings.Contains(got.Text, "not attached") {
				t.Errorf("%+v", got)
			}
		}
		l.send(store.Append(nil), descriptor)
		l.receive(AnswerDone, store.Room)
		if attached {
			memory = make([]byte, 20_000)
			if _, err := unix.Pread(fd, memory, 0); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(l.data(0, memory), x.Data) || !bytes.Equal(l.data(1, memory), bytes.Repeat([]byte{0, 0, 128, 191}, 2000)) {
			t.Error("the outputs are wrong")
		}
		_, packet = l.question(passthrough, 2, x)
		l.send(packet, -1)
		l.receive(AnswerRoom, 0)
		drop := Question{Kind: AskDrop, Sequence: l.seq}
		l.send(drop.Append(nil), -1)
		store.Sequence = l.seq
		l.send(store.Append(nil), descriptor)
		l.receive(AnswerFailed, 0)
	}
}

func TestLaneRefuses(t *testing.T) {
	l := newTestLane(t)
	add, types := l.open("add.onnx"), l.open("types.onnx")
	a, b := floats("a", []int64{1, 2}, 1, 2), floats("b", []int64{2, 2}, 1, 0, 1, 2)
	text := sample("in_BYTES", tensor.String, []int64{3})
	for name, tt := range map[string]struct {
		change func(q *Question)
		in     []tensor.Tensor
		kind   AnswerKind
		want   string
	}{
		"no session":      {func(q *Question) { q.Session = 999 }, []tensor.Tensor{a, b}, AnswerFailed, "not open"},
		"no input":        {func(*Question) {}, []tensor.Tensor{a}, AnswerFailed, "missing input"},
		"wrong rank":      {func(*Question) {}, []tensor.Tensor{a, floats("b", []int64{4}, 1, 0, 1, 2)}, AnswerRefused, "rank"},
		"unknown input":   {func(q *Question) { q.Inputs[1].Index = 2 }, []tensor.Tensor{a, b}, AnswerFailed, "no such input"},
		"unknown output":  {func(q *Question) { q.Outputs[0].Index = 2 }, []tensor.Tensor{a, b}, AnswerFailed, "no such output"},
		"short data":      {func(q *Question) { q.Inputs[1].Size-- }, []tensor.Tensor{a, b}, AnswerFailed, "malformed packet"},
		"outside":         {func(q *Question) { q.Inputs[1].At = 1 << 40 }, []tensor.Tensor{a, b}, AnswerFailed, "malformed packet"},
		"too much memory": {func(q *Question) { q.Base, q.Room = 64, sharedBytes }, []tensor.Tensor{a, b}, AnswerFailed, "malformed packet"},
		"bad strings":     {func(q *Question) { q.Session, q.Inputs[0].Index, q.Inputs[0].Size = types, 7, q.Inputs[0].Size-1 }, []tensor.Tensor{text}, AnswerFailed, "strings"},
	} {
		q, packet := l.question(add, 1, tt.in...)
		tt.change(q)
		l.send(append(q.Append(nil), packet[q.Size():]...), -1)
		if got := l.receive(tt.kind, 0); !strings.Contains(strings.ToLower(got.Text), tt.want) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	l.send(make([]byte, MaxPacket+8), -1)
	if got := l.receive(AnswerFailed, 0); !strings.Contains(got.Text, "too long") {
		t.Errorf("%+v", got)
	}
	if err := l.lanes.Add(l.number, mustDup(t)); err == nil {
		t.Error("a number was given twice")
	}
	if err := l.lanes.Add(MaxLanes, mustDup(t)); err == nil {
		t.Error("a number was too large")
	}
}

func mustDup(t *testing.T) int {
	fd, err := unix.FcntlInt(os.Stderr.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestLaneCancel cancels runs: one that goes on, one that the lane has not
// heard of, and one that is over.
func TestLaneCancel(t *testing.T) {
	l := newTestLane(t)
	chain := l.open("chain.onnx")
	x := ones("x", 500, 500)
	copy(l.memory, x.Data[:sharedBytes/2])
	ask := func() {
		q, _ := l.question(chain, 1, x)
		q.Inline, q.Room = false, sharedBytes
		q.Inputs[0].At, q.Inputs[0].Shape, q.Inputs[0].Size = 0, []int64{300, 300}, 360_000
		q.From = 524_288
		l.send(q.Append(nil), -1)
	}
	ask()
	l.lanes.Cancel(l.number, l.seq)
	l.receive(AnswerCancelled, 0)
	l.lanes.Cancel(l.number, l.seq+1)
	ask()
	l.receive(AnswerCancelled, 0)
	l.lanes.Cancel(l.number, l.seq)
	l.lanes.Cancel(l.number+1, l.seq+1)
	l.lanes.Cancel(math.MaxUint64, l.seq+1)
	ask()
	l.receive(AnswerDone, sharedBytes)
}

// TestLaneClose closes a session while lanes run it: that waits for them, and
// what comes later is refused.
func TestLaneClose(t *testing.T) {
	l := newTestLane(t)
	chain := l.open("chain.onnx")
	x := ones("x", 40, 40)
	_, packet := l.question(chain, 1, x)
	l.send(packet, -1)
	l.lanes.Close(chain)
	l.lanes.Close(chain)
	n, err := unix.Read(l.fd, l.packet)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.answer.Read(l.packet[:n], 0); err != nil || l.answer.Kind != AnswerDone && !strings.Contains(l.answer.Text, "not open") {
		t.Errorf("%+v, %v", l.answer, err)
	}
	_, packet = l.question(chain, 1, x)
	l.send(packet, -1)
	if got := l.receive(AnswerFailed, 0); !strings.Contains(got.Text, "not open") {
		t.Errorf("%+v", got)
	}
}

// FuzzLane sends packets to a lane: it answers what can be answered, stays
// within what it was given, and then runs as before.
func FuzzLane(f *testing.F) {
	l := newTestLane(f)
	types := l.open("types.onnx")
	relu := l.open("digits-size.onnx")
	text := sample("", tensor.String, []int64{5})
	q, packet := l.question(types, 14)
	f.Add(packet)
	q.Outputs = q.Outputs[7:8]
	q.Inputs = []Place{{Index: 7, Type: tensor.String, At: 256, Size: uint64(len(text.Data)), Shape: text.Shape}}
	f.Add(append(append(q.Append(nil), make([]byte, 256-q.Size())...), text.Data...))
	x := ones("x", 1, 64)
	q, packet = l.question(relu, 1, x)
	f.Add(packet)
	q.Inline, q.Room, q.From = false, 4096, 1024
	q.Outputs[0] = Place{Type: tensor.Float32, At: 1024, Size: 256, Shape: []int64{1, 64}}
	q.Inputs[0].At = 512
	f.Add(q.Append(nil))
	q.Attached = true
	f.Add(q.Append(nil))
	f.Add((&Question{Kind: AskStore, Sequence: 1, Room: 4096}).Append(nil))
	f.Add((&Question{Kind: AskDrop, Sequence: 1}).Append(nil))
	good, goodPacket := l.question(relu, 1, x)
	good.Sequence = math.MaxUint64
	goodPacket = append(good.Append(nil), goodPacket[good.Size():]...)
	drop := (&Question{Kind: AskDrop, Sequence: 1}).Append(nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return // that ends a lane
		}
		l.t = t
		l.send(b, -1)
		l.send(drop, -1)
		l.send(goodPacket, -1)
		for {
			n, err := unix.Read(l.fd, l.packet)
			if err != nil || n == 0 {
				t.Fatal(n, err)
			}
			var room uint64
			if len(b) >= 48 {
				room = binary.NativeEndian.Uint64(b[40:])
			}
			if err := l.answer.Read(l.packet[:n], room); err != nil {
				t.Fatal(err)
			}
			if l.answer.Sequence == math.MaxUint64 && l.answer.Kind == AnswerDone && bytes.Equal(l.data(0, l.memory), x.Data) {
				return
			}
		}
	})
}

// FuzzPacket reads answers that a lane never gives.
func FuzzPacket(f *testing.F) {
	word := func(words ...uint64) (b []byte) {
		for _, w := range words {
			b = binary.NativeEndian.AppendUint64(b, w)
		}
		return b
	}
	f.Add(word(1, 9, 0, 1, 2, 3, 1, 0, 1, 64, 8, 2, 1, 2))
	f.Add(word(1, 9, 2, 1, 2, 3, 2, 0, 8, 0, 0, 0, 1, 16, 0, 0, 1, 0))
	f.Add(append(word(2, 9, 0, 1, 2, 5, 0), "wrong"...))
	f.Add(word(5, 9, 0, 1, 2, 1<<40, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		const room = 4096
		var a Answer
		if err := a.Read(b, room); err != nil {
			if !strings.Contains(err.Error(), "malformed packet") {
				t.Error(err)
			}
			return
		}
		limit := uint64(room)
		if a.Inline {
			limit = uint64(len(b))
		}
		for _, o := range a.Outputs {
			elements, err := tensor.Elements(o.Shape)
			if err != nil || o.At > limit || o.Size > limit-o.At || !o.Type.Known() ||
				o.Type != tensor.String && uint64(elements)*uint64(o.Type.Size()) != o.Size {
				t.Errorf("%+v", o)
			}
		}
	})
}
