package worker

import (
	"errors"
	"testing"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/bench/zoo"
)

// TestRebuildLeavesNewcomersAlone holds a rebuild up until a version that was
// prepacked has left and come back: nobody has asked for that to be prepacked.
func TestRebuildLeavesNewcomersAlone(t *testing.T) {
	w := start(t, compiling(t, testConfig(t, "")))
	a, b := write(t, zoo.MLP(1)), write(t, zoo.MLP(1))
	a.ID.Model, b.ID.Model = "a", "b"
	for _, s := range []engine.Spec{a, b} {
		activate(t, w, s)
		if err := w.Set(t.Context(), s.ID, engine.Setting{Prepack: true}); err != nil {
			t.Fatal(err)
		}
	}
	w.mu.Lock()
	vb := w.loaded[b.ID]
	w.mu.Unlock()
	if err := w.Deactivate(t.Context(), b.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Activate(t.Context(), b.ID, engine.Setting{}); err != nil {
		t.Fatal(err)
	}
	if err := w.prepackAgain(t.Context(), b.ID); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if vb.set.Prepack {
		t.Error("b was activated only, and is prepacked")
	}
}

// TestDeactivateWithoutChild puts a version out while there is no child: those
// to come do not open it.
func TestDeactivateWithoutChild(t *testing.T) {
	w := New(Config{})
	id := of("a")
	v := &version{spec: engine.Spec{ID: id}, active: true, set: engine.Setting{Threads: 2, Prepack: true}, lane: make(chan struct{}, 1)}
	w.loaded[id] = v
	w.failure = errors.New("three stillborn children")
	if err := w.Deactivate(t.Context(), id); !errors.Is(err, engine.ErrUnavailable) || v.active || v.set != (engine.Setting{}) {
		t.Errorf("%v; active %v", err, v.active)
	}
	if err := w.Unload(t.Context(), id); err != nil || w.loaded[id] != nil {
		t.Errorf("%v; it is loaded still", err)
	}
}

// TestNoRoomInCache serves a model that was compiled and is too large for the
// cache, from its own file.
func TestNoRoomInCache(t *testing.T) {
	cache, err := compiled.Open(t.TempDir(), 1)
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t, "")
	cfg.Compile = Cached(cache, cfg)
	w := start(t, cfg)
	s := write(t, zoo.MLP(1))
	found, err := w.Runtime(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.Compile(t.Context(), found, s); !errors.Is(err, ort.ErrNotCompilable) {
		t.Errorf("got %v", err)
	}
	activate(t, w, s)
	if _, err := one(t.Context(), w, s.ID, input(zoo.MLP(1), 1), nil); err != nil {
		t.Error(err)
	}
}
