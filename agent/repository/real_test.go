package repository

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// system is a repository with all that is below it, for real.
type system struct {
	*Repository
	front *serve.Server
	dir   string
}

func library(t testing.TB) string {
	t.Helper()
	if lib := os.Getenv("DUNLIN_ORT_LIB"); lib != "" {
		return lib
	}
	found, _ := filepath.Glob("../../.cache/onnxruntime/libonnxruntime.so.*")
	if len(found) == 0 {
		t.Fatal("ONNX Runtime is not there: run make runtime")
	}
	lib, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return lib
}

func startSystem(t testing.TB, cfg Config) system {
	t.Helper()
	log := (&logs{}).logger()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := system{dir: t.TempDir()}
	child := worker.Config{Command: []string{exe, "worker"}, RuntimeLib: library(t), Threads: 1, Log: log}
	w := worker.New(child)
	e := engine.New(engine.Config{Runtime: w, Log: log})
	s.front = serve.New(e, nil)
	cfg.Dir, cfg.Staging = s.dir, filepath.Join(t.TempDir(), "staging")
	cfg.Engine, cfg.Front, cfg.Log = e, s.front, log
	cfg.Check = func(ctx context.Context, spec engine.Spec) (engine.Info, error) {
		return worker.Check(ctx, child, spec)
	}
	if s.Repository, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	below, stop := context.WithCancel(context.Background())
	var above, under sync.WaitGroup
	run := func(wg *sync.WaitGroup, ctx context.Context, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	run(&under, below, w.Supervise)
	run(&under, below, e.Run)
	run(&above, ctx, s.Run)
	t.Cleanup(func() {
		cancel()
		above.Wait()
		stop()
		under.Wait()
	})
	return s
}

// infer gives what a model of modelBytes answers for 0.
func (s system) infer(ctx context.Context, model string) (float32, error) {
	a, err := s.front.Infer(ctx, oip.Call{Model: model, Inputs: []tensor.Tensor{{Name: "x", Type: tensor.Float32, Shape: []int64{1, 1}, Data: make([]byte, 4)}}})
	if err != nil {
		return 0, err
	}
	got := math.Float32frombits(binary.LittleEndian.Uint32(a.Outputs[0].Data))
	if a.Release != nil {
		a.Release()
	}
	return got, nil
}

// adds gives what a model of modelBytes adds.
func adds(content byte) float32 {
	return math.Float32frombits(uint32(content)<<16 | 0x40000000)
}

// TestReal loads, replaces, brings and unloads models while requests for them
// come in: each is answered, by the old model or by the new one.
func TestReal(t *testing.T) {
	s := startSystem(t, Config{Control: Explicit, Startup: []string{"m"}})
	external := onnxwriter.Model{
		Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, 1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, 1)},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{1}, External: "weights.bin"}},
		Nodes:   []onnxwriter.Node{{Op: "Add", In: []string{"x", "w"}, Out: []string{"y"}}},
	}.Marshal()
	load := func(model string, o oip.Override) {
		t.Helper()
		if err := s.Load(t.Context(), model, o); err != nil {
			t.Fatal(err)
		}
	}
	check := func(model string, want float32) {
		t.Helper()
		if got, err := s.infer(t.Context(), model); err != nil || got != want {
			t.Errorf("%s answers %v, %v, want %v", model, got, err, want)
		}
	}
	tree(t, s.dir, map[string]string{"m/1": "a", "external/1/model.onnx": string(external), "external/1/weights.bin": "\x00\x00\x80\x3f"})
	load("m", oip.Override{})
	check("m", adds('a'))
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	load("external", oip.Override{})
	check("external", 1)

	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	var answers atomic.Int64
	for range 3 {
		asking.Go(func() {
			for ctx.Err() == nil {
				got, err := s.infer(t.Context(), "m")
				if err != nil || got < adds('a') || got > adds('d') {
					t.Errorf("got %v, %v", got, err)
					return
				}
				answers.Add(1)
			}
		})
	}
	answered := func() {
		t.Helper()
		seen := answers.Load()
		for end := time.Now().Add(30 * time.Second); answers.Load() == seen; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("no answers")
			}
		}
	}
	answered()
	for n := range 20 { // in the place of the old one
		content := "ab"[(n+1)%2]
		put(t, filepath.Join(s.dir, "m/1/model.onnx"), modelBytes(content))
		load("m", oip.Override{})
		check("m", adds(content))
		answered()
	}
	put(t, filepath.Join(s.dir, "m/2/model.onnx"), modelBytes('c')) // beside it
	load("m", oip.Override{})
	check("m", adds('c'))
	answered()
	put(t, filepath.Join(s.dir, "m/3/model.onnx"), []byte("broken"))
	if err := s.Load(t.Context(), "m", oip.Override{}); oip.CodeOf(err) != oip.InvalidArgument {
		t.Errorf("got %v", err)
	}
	check("m", adds('c'))
	put(t, filepath.Join(s.dir, "m/3/model.onnx"), onnxwriter.Model{ // which only the runtime finds out
		Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, 1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, 1)},
		Nodes: []onnxwriter.Node{{Op: "NoSuchOperator", In: []string{"x"}, Out: []string{"y"}}},
	}.Marshal())
	if err := s.Load(t.Context(), "m", oip.Override{}); oip.CodeOf(err) != oip.InvalidArgument {
		t.Errorf("got %v", err)
	}
	check("m", adds('c'))
	answered()
	load("m", oip.Override{Config: []byte(`{"backend": "onnxruntime", "max_batch_size": 4}`), Files: map[string][]byte{"5/model.onnx": modelBytes('d')}})
	check("m", adds('d'))
	answered()
	stop()
	asking.Wait()
	if m, err := s.front.Model(t.Context(), "m", 0); err != nil || m.Config.GetMaxBatchSize() != 4 {
		t.Errorf("got %v, %v", m.Config, err)
	}
	t.Logf("%d answers", answers.Load())

	for _, model := range []string{"m", "external"} {
		if err := s.Unload(t.Context(), model); err != nil {
			t.Error(err)
		}
		if _, err := s.infer(t.Context(), model); oip.CodeOf(err) != oip.NotFound {
			t.Errorf("%s after the unload: %v", model, err)
		}
	}
	if n := stagedFolders(t, s.Repository); n != 0 {
		t.Errorf("%d folders are left", n)
	}
	if err := s.Load(t.Context(), "none", oip.Override{}); !errors.Is(err, errNoModel) {
		t.Errorf("got %v", err)
	}
}
