package inband

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/reconcile"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// way is a simulated way to a controller that has one blob.
type way struct {
	blob  []byte
	rate  float64       // bytes a second
	delay time.Duration // there and back
	loss  float64       // part of the blocks that never come
	busy  float64       // part of the requests that are answered so
	cut   float64       // part of the blocks after which the connection is another one
	seed  uint64
}

// trip is how a blob came over it.
type trip struct {
	took, slowest time.Duration // slowest: from asking for a block to its arrival
	sent          int64         // bytes
	largest       uint32        // block among the last half
	window        int64         // the largest
}

// run reads part of the blob by a flow, and fails where what is read differs.
func (w way) run(t fataler, offset, length int64) trip {
	random := rand.New(rand.NewPCG(w.seed, 1))
	f := newFlow()
	now := time.Unix(1e9, 0)
	start := now
	f.begin(now, false)
	ref := reconcile.Ref{Model: "m", Digest: digest.FromBytes(w.blob)}
	s := f.add(ref, offset, length)
	want := w.blob[min(offset, int64(len(w.blob))):]
	if length > 0 {
		want = want[:min(length, int64(len(want)))]
	}
	type arrival struct {
		at, asked time.Time
		m         *dunlinv1.FetchData
	}
	var coming []arrival
	free := now // when the way has sent what is on it
	var r trip
	var got []byte
	buf := make([]byte, 100_000)
	for {
		f.expire(now)
		for _, m := range f.next(now) {
			if random.Float64() < w.busy {
				coming = append(coming, arrival{now.Add(w.delay), now, &dunlinv1.FetchData{Id: m.Id, Block: m.First, Error: "busy", RetryMs: 500}})
				continue
			}
			for i := range 8 * len(m.Wanted) {
				if m.Wanted[i/8]>>(i%8)&1 == 0 {
					continue
				}
				n := m.First + uint64(i)
				from := int64(n) * int64(m.BlockBytes)
				answer := &dunlinv1.FetchData{Id: m.Id, Block: n, BlobBytes: uint64(len(w.blob))}
				if from >= int64(len(w.blob)) {
					answer.Error = "unknown"
				} else {
					answer.Data = w.blob[from:min(from+int64(m.BlockBytes), int64(len(w.blob)))]
				}
				r.sent += int64(len(answer.Data))
				if len(got) >= len(want)/2 {
					r.largest = max(r.largest, m.BlockBytes)
				}
				if free.Before(now) {
					free = now
				}
				free = free.Add(time.Duration(float64(len(answer.Data)) / w.rate * float64(time.Second)))
				if random.Float64() >= w.loss {
					coming = append(coming, arrival{free.Add(w.delay), now, answer})
				}
			}
		}
		r.window = max(r.window, f.window)
		slices.SortStableFunc(coming, func(a, b arrival) int { return cmp.Compare(a.at.UnixNano(), b.at.UnixNano()) })
		at := f.wake(now)
		if len(coming) > 0 && (at.IsZero() || coming[0].at.Before(at)) {
			a := coming[0]
			coming = coming[1:]
			now = a.at
			r.slowest = max(r.slowest, now.Sub(a.asked))
			f.arrived(a.m, now)
			if random.Float64() < w.cut {
				coming = nil
				now = now.Add(time.Second)
				f.begin(now, false)
			}
		} else if at.IsZero() {
			t.Fatalf("nothing is on its way, and nothing is waited for, after %d bytes of %d", len(got), len(want))
		} else if at.After(now) {
			now = at
		}
		if s.failed != nil {
			t.Fatalf("failed: %v", s.failed)
		}
		if f.onTheWay < 0 || f.onTheWay > 2*maxWindow {
			t.Fatalf("%d bytes on the way", f.onTheWay)
		}
		for {
			n, end := s.read(buf)
			got = append(got, buf[:n]...)
			if end {
				if !bytes.Equal(got, want) {
					t.Fatalf("read %d bytes, want %d, or others", len(got), len(want))
				}
				f.remove(s)
				if f.onTheWay != 0 || len(f.asks) != 0 || len(s.parts) != 0 {
					t.Fatalf("%d bytes on the way, %d asks and %d parts are left", f.onTheWay, len(f.asks), len(s.parts))
				}
				r.took = now.Sub(start)
				return r
			}
			if n == 0 {
				break
			}
		}
		if now.Sub(start) > 100*time.Hour {
			t.Fatalf("%d bytes of %d after %s", len(got), len(want), now.Sub(start))
		}
	}
}

type fataler interface{ Fatalf(string, ...any) }

func content(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(uint64(n), 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// TestFlowOnWays holds the figures by which a flow adapts.
func TestFlowOnWays(t *testing.T) {
	for name, c := range map[string]struct {
		way
		most    time.Duration // that it may take
		waste   float64       // of what was read, sent in vain
		slowest time.Duration
		largest uint32
	}{
		"quick":         {way{blob: content(16 << 20), rate: 200e6, delay: time.Millisecond}, time.Second, 0.01, time.Second, 64 << 10},
		"far":           {way{blob: content(8 << 20), rate: 20e6, delay: 100 * time.Millisecond}, 5 * time.Second, 0.01, time.Second, 64 << 10},
		"slow":          {way{blob: content(300_000), rate: 12_500, delay: 100 * time.Millisecond}, 30 * time.Second, 0.05, 6 * time.Second, 8 << 10},
		"slower":        {way{blob: content(100_000), rate: 3_000, delay: 100 * time.Millisecond}, 60 * time.Second, 0.4, 12 * time.Second, 4 << 10},
		"blocks lost":   {way{blob: content(1 << 20), rate: 1e6, delay: 20 * time.Millisecond, loss: 0.02}, 30 * time.Second, 0.1, 3 * time.Second, 64 << 10},
		"often busy":    {way{blob: content(8 << 20), rate: 20e6, delay: 20 * time.Millisecond, busy: 0.2}, 2 * time.Minute, 0.05, 3 * time.Second, 64 << 10},
		"cut and again": {way{blob: content(4 << 20), rate: 1e6, delay: 20 * time.Millisecond, cut: 0.02}, 60 * time.Second, 0.5, 3 * time.Second, 64 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.run(t, 0, int64(len(c.blob)))
			t.Logf("%+v", r)
			if r.took > c.most {
				t.Errorf("took %s, want %s at most", r.took, c.most)
			}
			if waste := float64(r.sent)/float64(len(c.blob)) - 1; waste > c.waste {
				t.Errorf("%.2f of the bytes were sent in vain, want %.2f at most", waste, c.waste)
			}
			if r.slowest > c.slowest {
				t.Errorf("a block took %s, want %s at most", r.slowest, c.slowest)
			}
			if r.largest > c.largest {
				t.Errorf("blocks of %d bytes, want %d at most", r.largest, c.largest)
			}
		})
	}
}

// TestFlowBringsEverything reads random parts by random ways: what comes is
// what the blob has, whatever is lost.
func TestFlowBringsEverything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 400_000).Draw(t, "size")
		w := way{
			blob: content(size), rate: rapid.Float64Range(2e3, 1e8).Draw(t, "rate"),
			delay: time.Duration(rapid.IntRange(0, 500).Draw(t, "delay_ms")) * time.Millisecond,
			loss:  rapid.Float64Range(0, 0.3).Draw(t, "loss"), busy: rapid.Float64Range(0, 0.3).Draw(t, "busy"),
			cut: rapid.Float64Range(0, 0.1).Draw(t, "cut"), seed: rapid.Uint64().Draw(t, "seed"),
		}
		offset := int64(0)
		length := int64(0)
		if rapid.Bool().Draw(t, "part") {
			offset = int64(rapid.IntRange(0, size-1).Draw(t, "offset"))
			length = int64(rapid.IntRange(1, size-int(offset)).Draw(t, "length"))
		}
		w.run(t, offset, length)
	})
}

// TestFlowTwoStreams lets two streams share the window; the one that began
// first is not kept waiting.
func TestFlowTwoStreams(t *testing.T) {
	f := newFlow()
	now := time.Unix(1e9, 0)
	f.begin(now, true)
	blob := content(1 << 20)
	ref := reconcile.Ref{Model: "m", Digest: digest.FromBytes(blob)}
	a, b := f.add(ref, 0, 100_000), f.add(ref, 500_000, 100_000)
	for len(a.missing)+len(b.missing)+len(f.asks) > 0 {
		now = now.Add(time.Millisecond)
		if f.window > sharedWindow {
			t.Fatalf("a window of %d bytes beside other messages", f.window)
		}
		f.next(now)
		for id, ask := range f.asks {
			for n := range ask.out {
				from := int64(n) * int64(ask.size)
				f.arrived(&dunlinv1.FetchData{Id: id, Block: n, BlobBytes: uint64(len(blob)), Data: blob[from : from+int64(ask.size)]}, now)
			}
		}
	}
	for name, c := range map[*stream]int{a: 0, b: 500_000} {
		buf := make([]byte, 200_000)
		n, end := name.read(buf)
		if n != 100_000 || !end || !bytes.Equal(buf[:n], blob[c:c+100_000]) {
			t.Errorf("stream from %d: %d bytes, end %t", c, n, end)
		}
	}
}

// TestFlowNeighbours reads parts that lie side by side, as a download does, with
// the border within a block: none is asked for twice at a time, since the
// controller sends it once, and both parts come without waiting for a time-out.
func TestFlowNeighbours(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blob := content(rapid.IntRange(2, 500_000).Draw(t, "size"))
		border := int64(rapid.IntRange(1, len(blob)-1).Draw(t, "border"))
		f := newFlow()
		now := time.Unix(1e9, 0)
		f.begin(now, false)
		ref := reconcile.Ref{Model: "m", Digest: digest.FromBytes(blob)}
		parts := []*stream{f.add(ref, 0, border), f.add(ref, border, int64(len(blob))-border)}
		type key struct {
			size uint32
			n    uint64
		}
		line := map[key]uint64{} // the controller's: by which request it sends a block
		var order []key
		for len(parts[0].missing)+len(parts[1].missing)+len(order) > 0 {
			now = now.Add(time.Millisecond)
			for _, m := range f.next(now) {
				for i := range 8 * len(m.Wanted) {
					if m.Wanted[i/8]>>(i%8)&1 == 0 {
						continue
					}
					k := key{m.BlockBytes, m.First + uint64(i)}
					if id, twice := line[k]; twice {
						t.Fatalf("block %d of %d bytes is asked for by the requests %d and %d", k.n, k.size, id, m.Id)
					}
					line[k] = m.Id
					order = append(order, k)
				}
			}
			if len(order) == 0 {
				t.Fatalf("nothing is asked for, and %v and %v are missing", parts[0].missing, parts[1].missing)
			}
			k := order[0]
			order = order[1:]
			from := int64(k.n) * int64(k.size)
			f.arrived(&dunlinv1.FetchData{Id: line[k], Block: k.n, BlobBytes: uint64(len(blob)), Data: blob[from:min(from+int64(k.size), int64(len(blob)))]}, now)
			delete(line, k)
			if rapid.IntRange(0, 19).Draw(t, "lost") == 0 { // so blocks are asked for in other sizes
				f.begin(now, false)
				line, order = map[key]uint64{}, nil
			}
		}
		for i, want := range [][]byte{blob[:border], blob[border:]} {
			buf := make([]byte, len(blob)+1)
			if n, end := parts[i].read(buf); !end || !bytes.Equal(buf[:n], want) {
				t.Fatalf("part %d: %d bytes, end %t, want %d", i, n, end, len(want))
			}
		}
	})
}

// TestFlowBegins: the first connection begins as a quick one, and a later one
// with half of what the one before had come to.
func TestFlowBegins(t *testing.T) {
	f := newFlow()
	now := time.Unix(1e9, 0)
	f.begin(now, false)
	if f.window != firstWindow || f.threshold != maxWindow {
		t.Errorf("the first connection begins with a window of %d bytes that doubles up to %d, want %d and %d", f.window, f.threshold, firstWindow, maxWindow)
	}
	f.add(reconcile.Ref{Model: "m", Digest: digest.FromBytes(nil)}, 0, 1<<20)
	f.next(now)
	f.window = 1 << 20
	f.begin(now, false)
	if f.window != firstWindow || f.threshold != 512<<10 {
		t.Errorf("the second one begins with a window of %d bytes that doubles up to %d, want %d and %d", f.window, f.threshold, firstWindow, 512<<10)
	}
}

func FuzzArrived(f *testing.F) {
	f.Add(uint64(1), uint64(0), []byte("data"), uint64(4), "")
	f.Add(uint64(1), uint64(1<<63), []byte{}, uint64(1<<63), "unknown")
	f.Fuzz(func(t *testing.T, id, block uint64, data []byte, size uint64, answer string) {
		flow := newFlow()
		now := time.Unix(1e9, 0)
		s := flow.add(reconcile.Ref{Model: "m", Digest: digest.FromBytes(nil)}, 0, 0)
		flow.next(now)
		flow.arrived(&dunlinv1.FetchData{Id: id, Block: block, Data: data, BlobBytes: size, Error: answer}, now.Add(time.Second))
		buf := make([]byte, 1000)
		s.read(buf)
		if len(s.missing) > 2 || flow.onTheWay < 0 {
			t.Fatal(fmt.Sprint(s.missing, flow.onTheWay))
		}
	})
}
