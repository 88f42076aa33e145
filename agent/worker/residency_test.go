package worker

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

// write puts a net into a folder of its own.
func write(t testing.TB, net zoo.Net) engine.Spec {
	dir := t.TempDir()
	if err := net.WriteFile(filepath.Join(dir, "model.onnx")); err != nil {
		t.Fatal(err)
	}
	return engine.Spec{ID: engine.VersionID{Model: net.Name, Version: 1}, Dir: dir, Entry: "model.onnx"}
}

// compiling has a configuration compile the nets that are loaded, in the test's
// process, to a file model.ort in the version's folder.
func compiling(t testing.TB, cfg Config) Config {
	if err := ort.Init(cfg.RuntimeLib, 0); err != nil {
		t.Fatal(err)
	}
	plain := cfg
	cfg.Compile = func(ctx context.Context, _ Runtime, s engine.Spec) (Image, error) {
		if s.Entry != "model.onnx" {
			return Image{}, ort.ErrNotCompilable
		}
		info, err := Check(ctx, plain, s)
		if err != nil {
			return Image{}, err
		}
		file := image(s)
		if err := ort.Compile(ctx, s.Dir, s.Entry, file); err != nil {
			return Image{}, err
		}
		stat, err := os.Stat(file)
		if err != nil {
			return Image{}, err
		}
		info.Need = engine.Need{Weights: stat.Size()}
		return Image{File: file, Info: info}, nil
	}
	return cfg
}

func image(s engine.Spec) string { return filepath.Join(s.Dir, "model.ort") }

// activate loads a net and activates it.
func activate(t testing.TB, w *Worker, s engine.Spec) engine.Need {
	t.Helper()
	if _, err := w.Load(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	need, err := w.Activate(t.Context(), s.ID, engine.Setting{})
	if err != nil {
		t.Fatal(err)
	}
	return need
}

func input(net zoo.Net, seed uint64) []tensor.Tensor {
	in := net.Input()
	shape := append([]int64{1}, in.Shape[1:]...)
	return []tensor.Tensor{floats(in.Name, seed, shape...)}
}

// near says whether two outputs agree but for the order of sums.
func near(a, b []tensor.Tensor) bool {
	if len(a) != 1 || len(b) != 1 || len(a[0].Data) != len(b[0].Data) {
		return false
	}
	value := func(data []byte, i int) float64 {
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(data[i:])))
	}
	for i := 0; i < len(a[0].Data); i += 4 {
		x, y := value(a[0].Data, i), value(b[0].Data, i)
		if !(math.Abs(x-y) <= 1e-4*max(1, math.Abs(x))) {
			return false
		}
	}
	return true
}

// TestResidency has weights come in and go out, of compiled models and of
// those that are opened as they are.
func TestResidency(t *testing.T) {
	for name, compile := range map[string]bool{"plain": false, "compiled": true} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, "")
			if compile {
				cfg = compiling(t, cfg)
			}
			w := start(t, cfg)
			net := zoo.MLP(1)
			s, x := write(t, net), input(net, 1)
			want := inProcess(t, s, x, nil)
			run := func(when string) {
				t.Helper()
				if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, want) {
					t.Errorf("%s: other outputs than in-process, or %v", when, err)
				}
			}
			out := func(when string) {
				t.Helper()
				if _, err := one(t.Context(), w, s.ID, x, nil); !errors.Is(err, engine.ErrNotLoaded) {
					t.Errorf("%s: %v", when, err)
				}
			}
			if _, err := w.Activate(t.Context(), s.ID, engine.Setting{}); !errors.Is(err, engine.ErrNotLoaded) {
				t.Errorf("activated before it was loaded: %v", err)
			}
			info, err := w.Load(t.Context(), s)
			if err != nil || info.Need.Weights == 0 || len(info.Inputs) != 1 {
				t.Fatalf("loaded as %+v, %v", info, err)
			}
			out("loaded only")
			if err := w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}); !errors.Is(err, engine.ErrNotLoaded) {
				t.Errorf("prepacked while out: %v", err)
			}
			need, err := w.Activate(t.Context(), s.ID, engine.Setting{})
			if err != nil || need.Weights != info.Need.Weights || !need.Measured {
				t.Errorf("activated: %+v, %v", need, err)
			}
			run("activated")
			if _, err := w.Activate(t.Context(), s.ID, engine.Setting{}); err != nil {
				t.Errorf("activated twice: %v", err)
			}
			kill(t, w)
			run("activated, after a death")
			if err := w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}); err != nil {
				t.Error(err)
			}
			run("prepacked")
			for range 2 {
				if err := w.Deactivate(t.Context(), s.ID); err != nil {
					t.Error(err)
				}
				out("deactivated")
			}
			kill(t, w)
			out("deactivated, after a death")
			if _, err := w.Activate(t.Context(), s.ID, engine.Setting{}); err != nil {
				t.Error(err)
			}
			run("activated again")
			if err := w.Unload(t.Context(), s.ID); err != nil {
				t.Error(err)
			}
			out("unloaded")
		})
	}
}

// kill kills the child, and waits until it is dead.
func kill(t testing.TB, w *Worker) {
	p := child(t, w)
	p.command.Process.Kill()
	<-p.dead
}

// TestPrepack prepacks a version while it runs: its runs go over to the new
// session, the old one is closed, and after a death the same happens again.
func TestPrepack(t *testing.T) {
	w := start(t, compiling(t, testConfig(t, "")))
	net := zoo.MobileNet(1)
	s, x := write(t, net), input(net, 1)
	want := inProcess(t, s, x, nil)
	activate(t, w, s)
	prepacked := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		v := w.loaded[s.ID]
		return v.session != nil && v.session.set.Prepack
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, want) {
					t.Errorf("other outputs than in-process, or %v", err)
					return
				}
			}
		})
	}
	if prepacked() {
		t.Error("it is prepacked already")
	}
	file := mappings(t, w, image(s))
	if err := w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}); err != nil || !prepacked() {
		t.Errorf("prepacked: %t, %v", prepacked(), err)
	}
	if now := mappings(t, w, image(s)); file == 0 || now != file {
		t.Errorf("the child has mapped the file %d times, and %d times before it was prepacked", now, file)
	}
	kill(t, w)
	until(t, "weights to be prepacked again", prepacked)
	stop()
	wg.Wait()
	for range 10 {
		if _, err := w.Activate(t.Context(), s.ID, engine.Setting{}); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}) }()
		if err := w.Deactivate(t.Context(), s.ID); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, engine.ErrNotLoaded) {
			t.Errorf("prepacked while it goes out: %v", err)
		}
	}
	if n := mappings(t, w, image(s)); n != 0 {
		t.Errorf("the child still maps the model %d times", n)
	}
}

// mappings counts those that the child has of a file.
func mappings(t testing.TB, w *Worker, file string) int {
	b, err := os.ReadFile(procFile(t, w, "maps"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), file+"\n")
}

func procFile(t testing.TB, w *Worker, name string) string {
	return filepath.Join("/proc", fmt.Sprint(child(t, w).command.Process.Pid), name)
}

// TestMemoryComesBack has weights come in, run, be prepacked and go out a
// hundred times: the child is as large as before, and maps nothing of them.
func TestMemoryComesBack(t *testing.T) {
	for name, compile := range map[string]bool{"plain": false, "compiled": true} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, "")
			cfg.Threads = 1
			if compile {
				cfg = compiling(t, cfg)
			}
			w := start(t, cfg)
			net := zoo.MobileNet(1)
			s, x := write(t, net), input(net, 1)
			cycle := func() {
				activate(t, w, s)
				if _, err := one(t.Context(), w, s.ID, x, nil); err != nil {
					t.Fatal(err)
				}
				if err := w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}); err != nil {
					t.Fatal(err)
				}
				if err := w.Deactivate(t.Context(), s.ID); err != nil {
					t.Fatal(err)
				}
			}
			empty := resident(t, child(t, w).command.Process.Pid)
			activate(t, w, s)
			if _, err := one(t.Context(), w, s.ID, x, nil); err != nil {
				t.Fatal(err)
			}
			full := resident(t, child(t, w).command.Process.Pid)
			cycles := 100
			if raced {
				cycles = 10
			}
			for range cycles {
				cycle()
			}
			if n := mappings(t, w, image(s)); n != 0 {
				t.Errorf("the child still maps the model %d times", n)
			}
			if raced {
				return
			}
			limit := empty["Anonymous"] + max(empty["Anonymous"]/50, 8<<10)
			var after map[string]int
			began := time.Now()
			until(t, "the child to be as large as without the model", func() bool { // free workspace is kept for a moment
				after = resident(t, child(t, w).command.Process.Pid)
				return after["Anonymous"] <= limit
			})
			t.Logf("kB without it %v, with it %v, after %d cycles and %v %v", empty, full, cycles, time.Since(began).Round(time.Millisecond), after)
			if time.Since(began) > 5*time.Second {
				t.Errorf("that took %v", time.Since(began))
			}
		})
	}
}

// TestOutOfMemory has a child that may not grow run and activate what needs
// more: it says so, and lives.
func TestOutOfMemory(t *testing.T) {
	w := start(t, testConfig(t, ""))
	add, _ := load(t, w, "add.onnx")
	chain, _ := load(t, w, "chain.onnx")
	big := write(t, zoo.MobileNet(1))
	if _, err := w.Load(t.Context(), big); err != nil {
		t.Fatal(err)
	}
	small := []tensor.Tensor{floats("a", 1, 1, 2), floats("b", 1, 2, 2)}
	if _, err := one(t.Context(), w, add, small, nil); err != nil {
		t.Fatal(err)
	}
	p := child(t, w)
	pid := p.command.Process.Pid
	var before unix.Rlimit
	limit := unix.Rlimit{Cur: dataSize(t, pid) + 6<<20, Max: unix.RLIM_INFINITY}
	if err := unix.Prlimit(pid, unix.RLIMIT_DATA, &limit, &before); err != nil {
		t.Fatal(err)
	}
	if _, err := one(t.Context(), w, chain, []tensor.Tensor{floats("x", 1, 2000, 2000)}, nil); !errors.Is(err, engine.ErrOutOfMemory) {
		t.Errorf("run: %v", err)
	}
	if _, err := w.Activate(t.Context(), big.ID, engine.Setting{}); !errors.Is(err, engine.ErrOutOfMemory) {
		t.Errorf("activate: %v", err)
	}
	if _, err := one(t.Context(), w, add, small, nil); err != nil || child(t, w) != p {
		t.Errorf("after it: %v", err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_DATA, &before, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Activate(t.Context(), big.ID, engine.Setting{}); err != nil {
		t.Errorf("when there is memory again: %v", err)
	}
}

// dataSize gives what RLIMIT_DATA counts of a process.
func dataSize(t testing.TB, pid int) uint64 {
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmData:"); ok {
			var kB uint64
			if _, err := fmt.Sscan(rest, &kB); err != nil {
				t.Fatal(err)
			}
			return kB << 10
		}
	}
	t.Fatal("no VmData")
	return 0
}
