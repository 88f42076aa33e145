package worker

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/bench/zoo"
)

// TestCached compiles a version into a cache, from where another worker has it
// that cannot compile.
func TestCached(t *testing.T) {
	cache, err := compiled.Open(t.TempDir(), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	net := zoo.MLP(1)
	s, x := write(t, net), input(net, 1)
	want := inProcess(t, s, x, nil)
	cfg := testConfig(t, "")
	cannot := cfg
	cannot.Command = []string{"/bin/false"}
	for n, compile := range []Config{cfg, cannot} {
		cfg.Compile = Cached(cache, compile)
		w := start(t, cfg)
		need := activate(t, w, s)
		if need.Weights == 0 {
			t.Errorf("it needs %+v", need)
		}
		if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, want) {
			t.Errorf("other outputs than in-process, or %v", err)
		}
		if file := w.loaded[s.ID].image.File; filepath.Base(file) != compiled.FileName || mappings(t, w, file) == 0 {
			t.Errorf("the child has not mapped %s", file)
		}
		if err := w.Unload(t.Context(), s.ID); err != nil {
			t.Error(err)
		}
		other := write(t, zoo.MLP(uint64(2+n)))
		if _, err := w.Load(t.Context(), other); (err != nil) != (compile.Command[0] == "/bin/false") {
			t.Errorf("another version, with %v: %v", compile.Command, err)
		}
		if err := w.Unload(context.Background(), other.ID); err != nil && !errors.Is(err, engine.ErrNotLoaded) {
			t.Error(err)
		}
	}
}

// TestNotCompilable has a version that cannot be compiled: it is opened as it
// is.
func TestNotCompilable(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.Compile = func(context.Context, Runtime, engine.Spec) (Image, error) { return Image{}, ort.ErrNotCompilable }
	w := start(t, cfg)
	net := zoo.MLP(1)
	s, x := write(t, net), input(net, 1)
	activate(t, w, s)
	if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, inProcess(t, s, x, nil)) {
		t.Errorf("other outputs than in-process, or %v", err)
	}
}
