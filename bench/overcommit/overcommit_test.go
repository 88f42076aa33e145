package main

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	os.Exit(m.Run())
}

// library finds ONNX Runtime for a test.
func library(t *testing.T) string {
	if lib := os.Getenv("DUNLIN_ORT_LIB"); lib != "" {
		return lib
	}
	found, _ := filepath.Glob("../../.cache/onnxruntime/libonnxruntime.so.*")
	if len(found) == 0 {
		t.Fatal("ONNX Runtime is not there: run make runtime")
	}
	path, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestMeasure runs a small form of the benchmark.
func TestMeasure(t *testing.T) {
	p := plan{
		nets: []string{"mlp", "mobilenet"}, copies: 3, fit: 4, concurrency: 4,
		rounds: 1, slice: time.Second, dir: t.TempDir(), lib: library(t), seed: 1,
	}
	fleet, err := writeFleet(p)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{plan: p, fleet: fleet, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	r, err := b.measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !(r.warm > 0 && r.naive > 0) || !math.IsNaN(r.bound) {
		t.Errorf("%+v", r)
	}
}

// TestManyModels serves 200 models with memory for 20, in real time: a few
// seconds, or as long as DUNLIN_CROWD says. No request fails, and weights come
// in at most once for each request.
func TestManyModels(t *testing.T) {
	const models, fit, callers = 200, 20, 8
	took := 5 * time.Second
	if text := os.Getenv("DUNLIN_CROWD"); text != "" {
		var err error
		if took, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, for %v", seed, took)
	b := &bench{plan: plan{dir: t.TempDir(), lib: library(t), seed: seed}, log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))}
	cache, err := compiled.Open(filepath.Join(b.plan.dir, "compiled"), math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	// The same net under all names: it is compiled once, and each name has its
	// own session.
	net := zoo.MLP(1)
	path := filepath.Join(b.plan.dir, "model.onnx")
	if err := net.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	for i := range models {
		b.fleet = append(b.fleet, model{
			spec:  engine.Spec{ID: engine.VersionID{Model: fmt.Sprintf("m%03d", i), Version: 1}, Dir: b.plan.dir, Entry: "model.onnx"},
			input: random("input", []int64{1, 64}, 1),
		})
	}
	all, err := b.start(t.Context(), "to learn what one needs", 0, cache, false)
	if err != nil {
		t.Fatal(err)
	}
	var needs []float64
	var workspace int64
	for _, v := range all.engine.Versions() {
		needs = append(needs, float64(v.Need.Weights+v.Need.Session))
		workspace = max(workspace, v.Need.Workspace)
	}
	all.stop()
	s, err := b.start(t.Context(), "many models", fit*int64(median(needs))+2*workspace, cache, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	before := comings(s)
	ctx, cancel := context.WithTimeout(t.Context(), took+30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	counts, worst := make([]int, callers), make([]time.Duration, callers)
	for c := range callers {
		draw := zipf(rand.New(rand.NewPCG(seed, uint64(c))).Uint64(), models)
		wg.Go(func() {
			for began := time.Now(); time.Since(began) < took; counts[c]++ {
				m := b.fleet[draw()]
				asked := time.Now()
				r, err := s.engine.Infer(ctx, m.spec.ID, engine.Request{Inputs: []tensor.Tensor{m.input}})
				if err != nil {
					t.Error(err)
					return
				}
				r.Release()
				worst[c] = max(worst[c], time.Since(asked))
			}
		})
	}
	wg.Wait()
	requests := 0
	for _, n := range counts {
		requests += n
	}
	swaps := comings(s) - before
	m := s.engine.Memory()
	t.Logf("%.0f bytes each, %d of workspace", median(needs), workspace)
	t.Logf("%d requests, weights came in %d times, the longest request took %v; %d of %d bytes used", requests, swaps, slices.Max(worst), m.Used, m.Budget)
	if swaps > uint64(requests)+models || swaps < 10 || m.Used > m.Budget {
		t.Errorf("weights came in %d times for %d requests; %d of %d bytes are used", swaps, requests, m.Used, m.Budget)
	}
}

func comings(s *side) uint64 {
	n := uint64(0)
	for _, v := range s.engine.Versions() {
		for _, t := range v.Swaps.In {
			n += t.Count
		}
	}
	return n
}

// TestOptimalReads compares with sequences whose least reads are known.
func TestOptimalReads(t *testing.T) {
	sizes := []int64{10, 10, 10, 30}
	for _, tt := range []struct {
		asked  []int
		budget int64
		want   int64
	}{
		{[]int{0, 0, 0}, 10, 10},
		{[]int{0, 1, 2, 0, 1, 2}, 30, 30},
		{[]int{0, 1, 2, 0, 1, 2}, 20, 40}, // 0 1 2(-1) 0 1(-0) 2
		{[]int{0, 3, 0}, 30, 50},
		{[]int{3, 3}, 5, 30}, // what is larger than all stays while it is asked for
	} {
		if got := optimalReads(sizes, tt.asked, tt.budget); got != tt.want {
			t.Errorf("%v with %d: %d, want %d", tt.asked, tt.budget, got, tt.want)
		}
	}
}
