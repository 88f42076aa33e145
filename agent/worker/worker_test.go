package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

var _ engine.Runtime = (*Worker)(nil)

// types is every element type, in the order of the model types.onnx.
func types(info engine.Info) (all []tensor.Type) {
	for _, i := range info.Inputs {
		all = append(all, i.Type)
	}
	return all
}

// one runs one request, and keeps a copy of its outputs.
func one(ctx context.Context, w *Worker, id engine.VersionID, in []tensor.Tensor, outputs []string) ([]tensor.Tensor, error) {
	out, err := w.Run(ctx, id, [][]tensor.Tensor{in}, outputs)
	if err != nil {
		return nil, err
	}
	all := slices.Clone(out.Outputs[0])
	for i := range all {
		all[i].Data = bytes.Clone(all[i].Data)
	}
	if out.Release != nil {
		out.Release()
	}
	return all, nil
}

// sample gives n elements of a type.
func sample(name string, typ tensor.Type, shape []int64) tensor.Tensor {
	n, _ := tensor.Elements(shape)
	t := tensor.Tensor{Name: name, Type: typ, Shape: shape, Data: []byte{}}
	for i := range n {
		switch {
		case typ == tensor.String:
			t.Data = tensor.AppendString(t.Data, []byte([]string{"", "a\x00b", "größer", "\xff\xfe", strings.Repeat("x", 300)}[i%5]))
		case typ == tensor.Bool:
			t.Data = append(t.Data, byte(i%2))
		default:
			for b := range typ.Size() {
				t.Data = append(t.Data, byte(int(i)*31+b*7+1))
			}
		}
	}
	return t
}

// TestSameAsInProcess runs models here and in the child, with small and large
// tensors of each type.
func TestSameAsInProcess(t *testing.T) {
	w := start(t, testConfig(t, ""))
	for _, tt := range []struct {
		entry string
		shape []int64
	}{{"types.onnx", []int64{0}}, {"types.onnx", []int64{9}}, {"types.onnx", []int64{100_000}}, {"scalars.onnx", []int64{}}} {
		id, info := load(t, w, tt.entry)
		if len(types(info)) != 14 || info.LoadTime <= 0 {
			t.Fatalf("%s: %+v", tt.entry, info)
		}
		var in []tensor.Tensor
		for _, typ := range types(info) {
			in = append(in, sample("in_"+typ.String(), typ, tt.shape))
		}
		got, err := one(t.Context(), w, id, in, nil)
		if err != nil {
			t.Fatalf("%s %v: %v", tt.entry, tt.shape, err)
		}
		if want := inProcess(t, spec(t, tt.entry), in, nil); !reflect.DeepEqual(got, want) {
			t.Errorf("%s %v: the child's outputs differ from those in-process", tt.entry, tt.shape)
		}
	}
	id, _ := load(t, w, "passthrough.onnx")
	for _, n := range []int64{1, 1000, 100_000, 50_000} {
		in := []tensor.Tensor{floats("x", uint64(n), n)}
		for _, outputs := range [][]string{nil, {"y", "x"}, {"x"}} {
			got, err := one(t.Context(), w, id, in, outputs)
			if want := inProcess(t, spec(t, "passthrough.onnx"), in, outputs); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%d elements, outputs %v: the child's outputs differ from those in-process, or %v", n, outputs, err)
			}
		}
	}
	id, _ = load(t, w, "add.onnx")
	for n := range int64(20) {
		in := []tensor.Tensor{floats("a", uint64(n), 1<<n/8+1, 2), floats("b", 99, 2, 2)}
		got, err := one(t.Context(), w, id, in, []string{"product", "sum"})
		if err != nil {
			t.Fatal(err)
		}
		if want := inProcess(t, spec(t, "add.onnx"), in, []string{"product", "sum"}); !reflect.DeepEqual(got, want) {
			t.Errorf("batch of %d: the child's outputs differ from those in-process", in[0].Shape[0])
		}
	}
}

func inProcess(t testing.TB, v engine.Spec, in []tensor.Tensor, outputs []string) (all []tensor.Tensor) {
	lib, err := library()
	if err != nil {
		t.Fatal(err)
	}
	if err := ort.Init(lib, 0); err != nil {
		t.Fatal(err)
	}
	s, err := ort.Open(t.Context(), v.Dir, v.Entry, ort.Setting{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	err = s.Run(t.Context(), in, outputs, func(out []tensor.Tensor) error {
		for _, o := range out {
			o.Data = bytes.Clone(o.Data)
			all = append(all, o)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestRefuses(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.MaxBytes = 1 << 20
	w := start(t, cfg)
	for entry, want := range map[string]string{
		"opset99.onnx": "opset", "unknown-operator.onnx": "Frobnicate", "missing.onnx": "exist", "../ort.go": "leaves",
	} {
		if _, err := w.Load(t.Context(), spec(t, entry)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("load %s: %v", entry, err)
		}
	}
	add, _ := load(t, w, "add.onnx")
	any, _ := load(t, w, "any-rank.onnx")
	b := floats("b", 1, 2, 2)
	for name, tt := range map[string]struct {
		id      engine.VersionID
		in      []tensor.Tensor
		outputs []string
		want    error
	}{
		"not loaded":       {engine.VersionID{Model: "add", Version: 2}, nil, nil, engine.ErrNotLoaded},
		"missing input":    {add, []tensor.Tensor{b}, nil, engine.ErrInvalidInput},
		"wrong rank":       {add, []tensor.Tensor{b, floats("a", 1, 2)}, nil, engine.ErrInvalidInput},
		"unknown output":   {add, []tensor.Tensor{b, floats("a", 1, 1, 2)}, []string{"x"}, engine.ErrInvalidInput},
		"no output":        {add, []tensor.Tensor{b, floats("a", 1, 1, 2)}, []string{}, engine.ErrInvalidInput},
		"inputs too large": {any, []tensor.Tensor{floats("x", 1, 1<<18+1)}, nil, errTooLarge},
	} {
		if out, err := one(t.Context(), w, tt.id, tt.in, tt.outputs); !errors.Is(err, tt.want) {
			t.Errorf("%s: %d outputs, %v", name, len(out), err)
		}
	}
	// The outputs of this one are twice the size of its inputs.
	if _, err := one(t.Context(), w, add, []tensor.Tensor{b, floats("a", 1, 100_000, 2)}, nil); err == nil || !strings.Contains(err.Error(), "outputs: tensors are too large") {
		t.Errorf("outputs too large: %v", err)
	}
	// None of that harmed the child.
	if _, err := one(t.Context(), w, add, []tensor.Tensor{b, floats("a", 1, 1, 2)}, nil); err != nil {
		t.Error(err)
	}
}

// TestConcurrentRuns has answers that find their requests, with a region for
// all and with one that is too small for most.
func TestConcurrentRuns(t *testing.T) {
	for _, size := range []int{DefaultSharedBytes, 2 * slotUnit} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { testConcurrentRuns(t, size) })
	}
}

func testConcurrentRuns(t *testing.T, size int) {
	cfg := testConfig(t, "")
	cfg.SharedBytes = size
	w := start(t, cfg)
	id, _ := load(t, w, "any-rank.onnx")
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for n := range 20 {
				x := floats("x", uint64(g*100+n), int64(1+(g*n*997)%20_000))
				out, err := one(t.Context(), w, id, []tensor.Tensor{x}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				for i := range x.Data { // a float's sign is its last byte's highest bit
					if i%4 == 3 {
						x.Data[i] ^= 0x80
					}
				}
				if !bytes.Equal(out[0].Data, x.Data) {
					t.Error("another request's answer")
				}
			}
		})
	}
	wg.Wait()
}

// TestKills kills the child again and again under load, at random times, as
// often as DUNLIN_KILLS says: no run fails.
func TestKills(t *testing.T) {
	const seed = 7
	kills := 30
	if n := os.Getenv("DUNLIN_KILLS"); n != "" {
		var err error
		if kills, err = strconv.Atoi(n); err != nil {
			t.Fatalf("DUNLIN_KILLS: %v", err)
		}
	}
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	before := descriptors(t)
	var deaths atomic.Int64
	t.Run("load", func(t *testing.T) { // ends the worker before the descriptors are counted
		cfg := testConfig(t, "")
		cfg.OnDeath = func(d Death) {
			deaths.Add(1)
			if d.Err.Status != "signal: killed" {
				t.Errorf("death %+v", d)
			}
		}
		cfg.OnLost = func(id engine.VersionID, reason error) { t.Errorf("lost %s: %v", id, reason) }
		w := start(t, cfg)
		neg, _ := load(t, w, "any-rank.onnx")
		relu, _ := load(t, w, "digits-size.onnx")
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		// Of each goroutine, when the child was dead and both its runs had been
		// answered for the first time afterwards; 0 until then.
		var first [8]atomic.Int64
		began := time.Now()
		var dead atomic.Bool
		var runs atomic.Int64
		for g := range first {
			wg.Go(func() {
				small, large := floats("x", uint64(g), 1, 64), floats("x", uint64(g), 1, 50_000)
				for ctx.Err() == nil {
					after := dead.Load()
					_, err := one(t.Context(), w, relu, []tensor.Tensor{small}, nil)
					if err == nil {
						_, err = one(t.Context(), w, neg, []tensor.Tensor{large}, nil)
					}
					if err != nil {
						t.Error(err)
					}
					if runs.Add(2); after {
						first[g].CompareAndSwap(0, int64(time.Since(began)))
					}
				}
			})
		}
		var pauses []time.Duration
		for range kills {
			p := child(t, w)
			wait := time.NewTimer(time.Duration(r.IntN(20)) * time.Millisecond)
			<-wait.C
			killed := time.Since(began)
			p.command.Process.Kill()
			<-p.dead
			dead.Store(true)
			pause := time.Duration(0)
			for g := range first {
				until(t, "an answer", func() bool { return first[g].Load() > 0 || t.Failed() })
				pause = max(pause, time.Duration(first[g].Load())-killed)
			}
			dead.Store(false)
			for g := range first {
				first[g].Store(0)
			}
			pauses = append(pauses, pause)
		}
		stop()
		wg.Wait()
		for _, id := range []engine.VersionID{neg, relu} {
			if _, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 1, 64)}, nil); err != nil {
				t.Errorf("%s after the last death: %v", id, err)
			}
		}
		slices.Sort(pauses)
		t.Logf("%d runs; pauses until all callers have answers again: p50 %v, p99 %v, longest %v", runs.Load(),
			pauses[len(pauses)/2], pauses[(len(pauses)*99+99)/100-1], pauses[len(pauses)-1])
	})
	if deaths.Load() != int64(kills) {
		t.Errorf("%d deaths reported, not %d", deaths.Load(), kills)
	}
	until(t, "descriptors to be closed", func() bool { return descriptors(t) <= before })
}

func descriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestLoadThatKills loads a version that kills the child: the one that serves
// does not notice.
func TestLoadThatKills(t *testing.T) {
	cfg := testConfig(t, "kill-on-load=chain.onnx")
	cfg.OnDeath = func(d Death) { t.Errorf("death %+v", d) }
	w := start(t, cfg)
	good, _ := load(t, w, "digits-size.onnx")
	bad := spec(t, "chain.onnx")
	_, err := w.Load(t.Context(), bad)
	if _, died := errors.AsType[*DeathError](err); !died || !strings.Contains(err.Error(), "signal: killed") {
		t.Fatalf("load gave %v", err)
	}
	if _, err := one(t.Context(), w, good, []tensor.Tensor{floats("x", 1, 1, 64)}, nil); err != nil {
		t.Error(err)
	}
	if _, err := one(t.Context(), w, bad.ID, nil, nil); !errors.Is(err, engine.ErrNotLoaded) {
		t.Error(err)
	}
}

// TestReloadThatAborts has a version that is activated once and ends every
// child that activates it again: it is put into quarantine, and the worker
// goes on.
func TestReloadThatAborts(t *testing.T) {
	dir := t.TempDir()
	cfg := testConfig(t, "abort-on-later-load="+filepath.Join(dir, "loaded"))
	cfg.write = []string{dir}
	lost := make(chan engine.VersionID, 10)
	var deaths atomic.Int64
	cfg.OnDeath = func(Death) { deaths.Add(1) }
	cfg.OnLost = func(id engine.VersionID, reason error) {
		if _, died := errors.AsType[*DeathError](reason); !died || !errors.Is(reason, engine.ErrQuarantined) {
			t.Errorf("%s lost to %v", id, reason)
		}
		lost <- id
	}
	w := start(t, cfg)
	id, _ := load(t, w, "digits-size.onnx")
	p := child(t, w)
	p.command.Process.Kill()
	if got := <-lost; got != id {
		t.Errorf("lost %s", got)
	}
	if child(t, w); deaths.Load() != 1+2 {
		t.Errorf("%d deaths", deaths.Load())
	}
	if _, err := one(t.Context(), w, id, nil, nil); !errors.Is(err, engine.ErrQuarantined) || !strings.Contains(err.Error(), "signal: aborted") {
		t.Error(err)
	}
	if _, err := w.Load(t.Context(), spec(t, "digits-size.onnx")); !errors.Is(err, engine.ErrQuarantined) {
		t.Errorf("loaded again: %v", err)
	}
	if err := w.Unload(t.Context(), id); err != nil {
		t.Error(err)
	}
	if err := w.Unload(t.Context(), id); !errors.Is(err, engine.ErrNotLoaded) {
		t.Errorf("unloaded twice: %v", err)
	}
}

func TestUnload(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, info := load(t, w, "digits-size.onnx")
	if again, err := w.Load(t.Context(), spec(t, "digits-size.onnx")); err != nil || !reflect.DeepEqual(again, info) {
		t.Errorf("loaded again: %+v, %v", again, err)
	}
	if err := w.Unload(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := w.Unload(t.Context(), id); !errors.Is(err, engine.ErrNotLoaded) {
		t.Errorf("unloaded twice: %v", err)
	}
	p := child(t, w)
	p.command.Process.Kill()
	<-p.dead
	load(t, w, "any-rank.onnx")
	if _, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 1, 64)}, nil); !errors.Is(err, engine.ErrNotLoaded) {
		t.Errorf("run after unload: %v", err)
	}
}

// TestCancel cancels a long run; the child works on.
func TestCancel(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "chain.onnx")
	p := child(t, w)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := one(ctx, w, id, []tensor.Tensor{floats("x", 1, 1000, 1000)}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if _, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 2, 2)}, nil); err != nil || child(t, w) != p {
		t.Errorf("after it: %v", err)
	}
}

// TestHang stops the child under a run that is then cancelled: the worker
// kills it, starts another, and answers again.
func TestHang(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.grace = 50 * time.Millisecond
	deaths := make(chan Death, 10)
	cfg.OnDeath = func(d Death) { deaths <- d }
	w := start(t, cfg)
	id, _ := load(t, w, "digits-size.onnx")
	x := []tensor.Tensor{floats("x", 1, 1, 64)}
	child(t, w).command.Process.Signal(syscall.SIGSTOP)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := one(ctx, w, id, x, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the run on the hung child: %v", err)
	}
	if d := <-deaths; !strings.Contains(d.Err.Error(), "gave no answer for 50ms") || !reflect.DeepEqual(d.InFlight, []engine.VersionID{id}) {
		t.Errorf("death %+v", d)
	}
	if _, err := one(t.Context(), w, id, x, nil); err != nil {
		t.Error(err)
	}
}

func TestNoRuntime(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.RuntimeLib = "/nowhere/libonnxruntime.so"
	if _, err := Probe(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), cfg.RuntimeLib) {
		t.Errorf("Probe: %v", err)
	}
	w := start(t, cfg)
	if _, err := w.Load(t.Context(), spec(t, "add.onnx")); !errors.Is(err, engine.ErrUnavailable) || !strings.Contains(err.Error(), cfg.RuntimeLib) {
		t.Errorf("Load: %v", err)
	}
	if _, err := Check(t.Context(), cfg, spec(t, "add.onnx")); !errors.Is(err, engine.ErrUnavailable) || !strings.Contains(err.Error(), cfg.RuntimeLib) {
		t.Errorf("Check: %v", err)
	}
	cfg = testConfig(t, "")
	cfg.Command = []string{"/nowhere/dunlin-agent"}
	if _, err := start(t, cfg).Load(t.Context(), spec(t, "add.onnx")); !errors.Is(err, engine.ErrUnavailable) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Load: %v", err)
	}
}

// TestStillborn has a command that is no child at all.
func TestStillborn(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.Command = []string{"/bin/false"}
	if _, err := start(t, cfg).Load(t.Context(), spec(t, "add.onnx")); !errors.Is(err, engine.ErrUnavailable) || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("Load: %v", err)
	}
}

func TestStopped(t *testing.T) {
	w := New(testConfig(t, ""))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Supervise(ctx); err != nil {
		t.Error(err)
	}
	if _, err := w.Load(t.Context(), spec(t, "add.onnx")); !errors.Is(err, engine.ErrUnavailable) {
		t.Error(err)
	}
}
