package ort

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

// fakeDevice is one for a test, at whose end nothing may be left.
func fakeDevice(t testing.TB, capacity int64, s weights.Settings) (*weights.Fake, *weights.Device) {
	t.Helper()
	fake, err := weights.NewFake(weights.FakeConfig{Capacity: capacity})
	if err != nil {
		t.Fatal(err)
	}
	d, err := weights.Open(fake, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		c := fake.Count()
		if c.Calls, c.Copies = 0, 0; c != (weights.FakeCount{}) || fake.Breach() != "" {
			t.Errorf("left behind: %+v, %s", c, fake.Breach())
		}
		fake.Close()
	})
	return fake, d
}

// expectLedger compares the device's books with what the driver has given.
func expectLedger(t testing.TB, fake *weights.Fake, d *weights.Device) {
	t.Helper()
	l, c := d.Stats(), fake.Count()
	if l.Reserved != c.Reserved || l.Physical != c.Created || l.Mapped != c.Mapped || l.Mapped+l.Recycled != l.Physical || fake.Breach() != "" {
		t.Fatalf("ledger %+v, driver %+v, %s", l, c, fake.Breach())
	}
}

func pooled(t testing.TB, d *weights.Device, dir, entry string) (*Session, *weights.Pool) {
	t.Helper()
	initialise(t)
	p, err := d.NewPool(2 << 30)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	s, err := OpenPooled(t.Context(), dir, entry, p, Placement{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, p
}

// zooNet writes a net of the zoo and gives an input for it.
func zooNet(t testing.TB, n zoo.Net) (dir, entry string, in tensor.Tensor) {
	t.Helper()
	dir, entry = t.TempDir(), n.Name+".onnx"
	if err := n.WriteFile(filepath.Join(dir, entry)); err != nil {
		t.Fatal(err)
	}
	i := n.Input()
	shape := slices.Clone(i.Shape)
	shape[0] = 1
	size, err := tensor.Bytes(i.Type, shape)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, size)
	r := rand.New(rand.NewPCG(9, 9))
	for j := range data { // floats from 0.0078 to 1.99
		data[j] = byte(r.Uint32())
		if j%4 == 3 {
			data[j] = 0x3c + byte(r.Uint32N(4))
		}
	}
	return dir, entry, tensor.Tensor{Name: i.Name, Type: i.Type, Shape: shape, Data: data}
}

func mustRun(t testing.TB, s *Session, in tensor.Tensor) []byte {
	t.Helper()
	out, err := run(t.Context(), s, []tensor.Tensor{in}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out[0].Data
}

// expectUsed sees that a session reads its weights in its pool, which a run
// after their return would otherwise say nothing about.
func expectUsed(t testing.TB, s *Session, p *weights.Pool, in tensor.Tensor) {
	t.Helper()
	want := mustRun(t, s, in)
	data := make([]byte, min(p.Stats().Used/2, 1<<20))
	if err := p.Read(data, p.Base()); err != nil {
		t.Fatal(err)
	}
	if err := p.Write(p.Base(), make([]byte, len(data))); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(mustRun(t, s, in), want) {
		t.Error("the session does not read its weights in the pool")
	}
	if err := p.Write(p.Base(), data); err != nil {
		t.Fatal(err)
	}
}

// TestPooledNets has real nets answer the same, to the bit, after their
// weights were out, and in memory that held others' meanwhile.
func TestPooledNets(t *testing.T) {
	nets := []struct {
		zoo.Net
		pooled int64 // bytes, at least: what the CPU's kernels prepack
	}{{zoo.MLP(1), 4 * (64*64 + 64*64 + 64*10)}, {zoo.MobileNet(1), 4 * 1280 * 1000}, {zoo.Encoder(1, zoo.Tokens), 160e6}}
	// Not all of them have room, so that they take each other's memory.
	fake, d := fakeDevice(t, 176<<20, weights.Settings{Recycled: 160 << 20, Pinned: 64 << 20})
	type resident struct {
		s    *Session
		p    *weights.Pool
		in   tensor.Tensor
		want []byte
	}
	var all []resident
	for _, n := range nets {
		dir, entry, in := zooNet(t, n.Net)
		s, p := pooled(t, d, dir, entry)
		plain, err := Open(t.Context(), dir, entry, Setting{})
		if err != nil {
			t.Fatal(err)
		}
		far := mustRun(t, plain, in)
		plain.Close()
		r := resident{s, p, in, mustRun(t, s, in)}
		if !near(far, r.want) {
			t.Errorf("%s answers differently with its weights in a pool", n.Name)
		}
		expectUsed(t, s, p, in)
		expectLedger(t, fake, d)
		if err := errors.Join(p.Capture(), p.Out()); err != nil {
			t.Fatal(err)
		}
		expectLedger(t, fake, d)
		t.Logf("%s: %+v", n.Name, p.Stats())
		if used := p.Stats().Used; used < n.pooled {
			t.Errorf("%s: %d bytes in the pool, fewer than %d", n.Name, used, n.pooled)
		}
		all = append(all, r)
	}
	for range 2 {
		for _, r := range all {
			if err := r.p.In(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := mustRun(t, r.s, r.in); !bytes.Equal(got, r.want) {
				t.Error("the answer has changed")
			}
			if err := r.p.Out(); err != nil {
				t.Fatal(err)
			}
			expectLedger(t, fake, d)
		}
	}
}

// near compares FP32 values within 1 %, of the largest.
func near(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	var most, apart float64
	for i := range len(a) / 4 {
		x, y := float64(float32At(a, i)), float64(float32At(b, i))
		most, apart = max(most, math.Abs(x)), max(apart, math.Abs(x-y))
	}
	return apart <= most/100
}

// TestRunningWhatIsOut is a crash of the process that does, by the real
// runtime.
func TestRunningWhatIsOut(t *testing.T) {
	const child = "DUNLIN_TEST_RUN_OUT"
	if os.Getenv(child) != "" {
		if err := DieBySignal(); err != nil {
			t.Fatal(err)
		}
		_, d := fakeDevice(t, 64<<20, weights.Settings{})
		dir, entry, in := zooNet(t, zoo.MLP(1))
		s, p := pooled(t, d, dir, entry)
		mustRun(t, s, in)
		if err := errors.Join(p.Capture(), p.Out()); err != nil {
			t.Fatal(err)
		}
		fmt.Println("about to run")
		mustRun(t, s, in)
		os.Exit(0)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRunningWhatIsOut$")
	cmd.Env = append(os.Environ(), child+"=1")
	out, err := cmd.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || !strings.Contains(string(out), "about to run") {
		t.Fatalf("%v\n%s", err, out)
	}
	if w := exit.Sys().(syscall.WaitStatus); !w.Signaled() || w.Signal() != syscall.SIGSEGV {
		t.Errorf("ended by %v", err)
	}
}

// TestPooledOutOfMemory has a model's load fail in good order where a pool or
// the device is too small, and the next one work.
func TestPooledOutOfMemory(t *testing.T) {
	initialise(t)
	fake, d := fakeDevice(t, 4<<20, weights.Settings{Recycled: 4 << 20})
	dir, entry, in := zooNet(t, zoo.MobileNet(1))
	for _, tt := range []struct {
		reserve int64
		want    error
	}{{2 << 20, weights.ErrFull}, {1 << 30, weights.ErrOutOfMemory}} {
		p, err := d.NewPool(tt.reserve)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenPooled(t.Context(), dir, entry, p, Placement{}); !errors.Is(err, tt.want) {
			t.Errorf("%d bytes reserved: %v", tt.reserve, err)
		}
		if s := p.Stats(); s.Blocks != 0 {
			t.Errorf("left in the pool: %+v", s)
		}
		expectLedger(t, fake, d)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, roomy := fakeDevice(t, 64<<20, weights.Settings{})
	s, _ := pooled(t, roomy, dir, entry)
	mustRun(t, s, in)
}

func TestOpenPooledRefuses(t *testing.T) {
	initialise(t)
	_, d := fakeDevice(t, 16<<20, weights.Settings{})
	p, err := d.NewPool(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := OpenPooled(ctx, "testdata", "../x.onnx", p, Placement{}); err == nil {
		t.Error("an entry outside of the folder")
	}
	if _, err := OpenPooled(ctx, "testdata", "opset99.onnx", p, Placement{}); err == nil {
		t.Error("a model that cannot be opened")
	}
	// The library of the tests has no CUDA provider beside it.
	if _, err := OpenPooled(ctx, "testdata", "add.onnx", p, Placement{CUDA: true}); err == nil || !strings.Contains(err.Error(), "CUDA provider") {
		t.Errorf("on the GPU: %v", err)
	}
	cancel()
	if _, err := OpenPooled(ctx, "testdata", "add.onnx", p, Placement{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	closed, err := d.NewPool(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPooled(t.Context(), "testdata", "add.onnx", closed, Placement{}); !errors.Is(err, weights.ErrClosed) {
		t.Errorf("a closed pool: %v", err)
	}
}

// TestPooledSideBySide opens, swaps and closes sessions in many goroutines:
// what each allocates lands in its own pool.
func TestPooledSideBySide(t *testing.T) {
	initialise(t)
	fake, d := fakeDevice(t, 1<<30, weights.Settings{Recycled: 16 << 20})
	dir, entry := write(t, layers(3, 64))
	in := floats("x", []int64{1, 64}, make([]float32, 64)...)
	for i := range in.Data {
		in.Data[i] = 0x3d
	}
	plain, err := Open(t.Context(), dir, entry, Setting{})
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	var wait sync.WaitGroup
	for range 6 {
		wait.Go(func() {
			for range 8 {
				p, err := d.NewPool(64 << 20)
				if err != nil {
					t.Error(err)
					return
				}
				s, err := OpenPooled(context.Background(), dir, entry, p, Placement{})
				if err != nil {
					t.Error(err, p.Close())
					return
				}
				if used := p.Stats().Used; used < 3*64*64*4 {
					t.Errorf("%d bytes in the pool", used)
				}
				before, err := run(context.Background(), s, []tensor.Tensor{in}, nil)
				err = errors.Join(err, p.Capture(), p.Out(), p.In(context.Background()))
				after, e := run(context.Background(), s, []tensor.Tensor{in}, nil)
				if err = errors.Join(err, e); err != nil {
					t.Error(err)
				} else if !bytes.Equal(before[0].Data, after[0].Data) {
					t.Error("the answer has changed")
				}
				s.Close()
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// Sessions without a pool are opened meanwhile, and take none of theirs.
	for range 20 {
		s, err := Open(t.Context(), dir, entry, Setting{})
		if err != nil {
			t.Error(err)
			break
		}
		s.Close()
	}
	wait.Wait()
	expectLedger(t, fake, d)
}

// TestPooledSequences loads, runs, takes out and in, cancels and unloads
// sessions of a small net in random order, while the driver fails at random.
func TestPooledSequences(t *testing.T) {
	initialise(t)
	const seed, sequences, steps = 11, 40, 60
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	dir, entry := write(t, layers(3, 32))
	in := floats("x", []int64{1, 32}, make([]float32, 32)...)
	for i := range in.Data {
		in.Data[i] = 0x3d
	}
	plain, err := Open(t.Context(), dir, entry, Setting{})
	if err != nil {
		t.Fatal(err)
	}
	want := mustRun(t, plain, in)
	plain.Close()
	type tenant struct {
		s        *Session
		p        *weights.Pool
		captured bool
	}
	done := make(map[string]int)
	sequence := func() {
		fake, err := weights.NewFake(weights.FakeConfig{Capacity: 24 << 12, Granularity: 1 << 12})
		if err != nil {
			t.Fatal(err)
		}
		defer fake.Close()
		d, err := weights.Open(fake, weights.Settings{Pinned: r.Int64N(40 << 12), Recycled: r.Int64N(24 << 12), Largest: 1 << (12 + r.IntN(4))})
		if err != nil {
			t.Fatal(err)
		}
		var all []*tenant
		unload := func(x *tenant) error {
			if x.s != nil {
				x.s.Close()
				x.s = nil
			}
			return x.p.Close()
		}
		defer func() {
			fake.Fail("", 0, 0, 0)
			for _, x := range all {
				if err := unload(x); err != nil {
					t.Error(err)
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			c := fake.Count()
			if c.Calls, c.Copies = 0, 0; c != (weights.FakeCount{}) || fake.Breach() != "" {
				t.Errorf("left behind: %+v, %s", c, fake.Breach())
			}
		}()
		calls := append(fake.Calls(), "", "", "")
		for range steps {
			expectLedger(t, fake, d)
			if r.IntN(4) == 0 {
				fake.Fail(calls[r.IntN(len(calls))], 1+r.IntN(12), 1+r.IntN(3), []int{weights.CodeOutOfMemory, weights.CodeUnknown}[r.IntN(2)])
			}
			what := r.IntN(8)
			if len(all) == 0 || (what == 0 && len(all) < 5) {
				p, err := d.NewPool(1 << 20)
				if err != nil {
					continue
				}
				x := &tenant{p: p}
				all = append(all, x)
				if x.s, err = OpenPooled(t.Context(), dir, entry, p, Placement{}); err != nil {
					done["not loaded"]++
					continue // to be closed by a later step
				}
				done["loaded"]++
			}
			i := r.IntN(len(all))
			x := all[i]
			state := x.p.Stats().State
			switch {
			case what == 7 || x.s == nil:
				if unload(x) == nil {
					all = slices.Delete(all, i, i+1)
					done["unloaded"]++
				}
				continue
			case !x.captured:
				x.captured = x.p.Capture() == nil
			case what < 3 && state == weights.In:
				if x.p.Out() == nil {
					done["out"]++
				}
			case what < 6:
				ctx, cancel := context.WithCancel(t.Context())
				if r.IntN(4) == 0 {
					go cancel()
				}
				err := x.p.In(ctx)
				cancel()
				if now := x.p.Stats().State; state == weights.Out && (err == nil) != (now == weights.In) {
					t.Fatalf("%v after %v", now, err)
				}
				if err != nil {
					done["not in"]++
				} else if state == weights.Out {
					done["in"]++
				}
			}
			if x.p.Stats().State != weights.Out {
				if got := mustRun(t, x.s, in); !bytes.Equal(got, want) {
					t.Fatal("the answer has changed")
				}
				done["run"]++
			}
		}
	}
	for range sequences {
		sequence()
	}
	t.Log(done)
	for _, what := range []string{"loaded", "not loaded", "unloaded", "out", "in", "not in", "run"} {
		if done[what] < 10 {
			t.Errorf("%q came up %d times", what, done[what])
		}
	}
}

func TestProbePooling(t *testing.T) {
	initialise(t)
	fake, err := weights.NewFake(weights.FakeConfig{Capacity: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer fake.Close()
	if p := ProbePooling(t.Context()); p.Device == "" && (!p.Works || p.Reason != "") {
		t.Errorf("the runtime of the tests: %+v", p)
	}
	fake.Fail("map", 1, 1, weights.CodeOutOfMemory)
	if err := probe(t.Context(), fake, Placement{}); !errors.Is(err, weights.ErrOutOfMemory) {
		t.Errorf("on a device that fails: %v", err)
	}
	if err := probe(t.Context(), fake, Placement{CUDA: true}); err == nil || !strings.Contains(err.Error(), "CUDA provider") {
		t.Errorf("on a GPU: %v", err)
	}
	if c := fake.Count(); c.Created != 0 || c.Reserved != 0 || fake.Breach() != "" {
		t.Errorf("left behind: %+v, %s", c, fake.Breach())
	}
}
