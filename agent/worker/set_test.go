package worker

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/bench/zoo"
)

// underLoad has two clients infer without a pause until it is told to stop,
// which gives how many answers there were. None may be an error or another
// answer.
func underLoad(t *testing.T, infer func(context.Context) (same bool, err error)) (stop func() int64) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var n atomic.Int64
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if same, err := infer(t.Context()); err != nil || !same {
					t.Errorf("after %d requests: the same answer: %v, %v", n.Load(), same, err)
					return
				}
				n.Add(1)
			}
		})
	}
	return func() int64 { cancel(); wg.Wait(); return n.Load() }
}

// tasks counts the threads of the child.
func tasks(t *testing.T, w *Worker) int {
	all, err := os.ReadDir(procFile(t, w, "task"))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestSet has a version go over from each setting to each other while it runs,
// compiled and not, with a death in between.
func TestSet(t *testing.T) {
	for name, compile := range map[string]bool{"plain": false, "compiled": true} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, "")
			if compile {
				cfg = compiling(t, cfg)
			}
			w := start(t, cfg)
			net := zoo.MobileNet(1)
			s, x := write(t, net), input(net, 1)
			want := inProcess(t, s, x, nil)
			activate(t, w, s)
			stop := underLoad(t, func(ctx context.Context) (bool, error) {
				got, err := one(ctx, w, s.ID, x, nil)
				return near(got, want), err
			})
			defer stop()
			set := func(threads int, prepack bool) {
				t.Helper()
				want := engine.Setting{Threads: threads, Prepack: prepack}
				if err := w.Set(t.Context(), s.ID, want); err != nil {
					t.Errorf("%+v: %v", want, err)
				}
				w.mu.Lock()
				defer w.mu.Unlock()
				if v := w.loaded[s.ID]; v.set != want || v.session == nil || !v.session.is(want) {
					t.Errorf("%+v: it is to be %+v, and is %+v", want, v.set, v.session)
				}
			}
			for _, prepack := range []bool{true, false} {
				own := 0
				for try := 0; try == 0 || try < 20 && own != 4; try++ { // Go may begin a thread at any time
					set(5, prepack)
					own = tasks(t, w)
					set(1, prepack)
					own -= tasks(t, w)
				}
				if own != 4 {
					t.Errorf("prepack %v: a session of 5 threads has %d beside those that run it", prepack, own)
				}
			}
			set(2, true)
			set(0, true)
			set(2, true)
			kill(t, w)
			until(t, "the next child to run it as this one did", func() bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				v := w.loaded[s.ID]
				return v.session != nil && v.session.is(engine.Setting{Threads: 2, Prepack: true})
			})
			if compile {
				until(t, "the old sessions to be closed", func() bool { return mappings(t, w, image(s)) == 1 })
			}
			if n := stop(); n < 10 {
				t.Errorf("%d answers only", n)
			}
			if err := w.Deactivate(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
			if err := w.Set(t.Context(), s.ID, engine.Setting{Threads: 1}); !errors.Is(err, engine.ErrNotLoaded) {
				t.Errorf("of what is out: %v", err)
			}
			if _, err := w.Activate(t.Context(), s.ID, engine.Setting{Threads: tooMany}); err == nil {
				t.Errorf("activated with %d threads", tooMany)
			}
			if _, err := w.Activate(t.Context(), s.ID, engine.Setting{Threads: 1}); err != nil {
				t.Fatal(err)
			}
			if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, want) {
				t.Errorf("with one thread from the start: %v", err)
			}
		})
	}
}

const tooMany = 1000 // threads, more than there may be

// TestTune has an engine go over to what was measured, and back, while clients
// infer.
func TestTune(t *testing.T) {
	cfg := compiling(t, testConfig(t, ""))
	compile := cfg.Compile
	cfg.Compile = func(ctx context.Context, r Runtime, s engine.Spec) (Image, error) {
		i, err := compile(ctx, r, s)
		i.Info.Need.Mapped = true
		return i, err
	}
	w := start(t, cfg)
	e := engine.New(engine.Config{Runtime: w, Memory: 1 << 30})
	ctx, end := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { e.Run(ctx) })
	defer wg.Wait()
	defer end()
	net := zoo.MobileNet(1)
	s, x := write(t, net), input(net, 1)
	want := inProcess(t, s, x, nil)
	s.Tuning.Threads = 1
	if _, err := e.Load(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	stop := underLoad(t, func(ctx context.Context) (bool, error) {
		r, err := e.Infer(ctx, s.ID, engine.Request{Inputs: x})
		if err != nil {
			return false, err
		}
		defer r.Release()
		return near(r.Outputs, want), nil
	})
	defer stop()
	is := func(set engine.Setting) func() bool {
		return func() bool {
			w.mu.Lock()
			v := w.loaded[s.ID]
			same := v.session != nil && v.session.set == set
			w.mu.Unlock()
			return same && e.Versions()[0].Setting == set
		}
	}
	until(t, "one thread", is(engine.Setting{Threads: 1}))
	yes, no := true, false
	for _, tuning := range []engine.Tuning{
		{Threads: 2}, {Threads: 1, Prepack: &yes, Instances: 2}, {Threads: 2, Prepack: &no, MaxBatchSize: 2}, {Prepack: &yes}, {},
	} {
		if err := e.Tune(t.Context(), s.ID, tuning); err != nil {
			t.Fatal(err)
		}
		until(t, "another setting", is(engine.Setting{Threads: tuning.Threads, Prepack: tuning.Prepack == &yes}))
	}
	if n := stop(); n < 10 {
		t.Errorf("%d answers only", n)
	}
	if f := e.Versions()[0].Figures; f.Failure.Count > 0 {
		t.Errorf("%d requests have failed", f.Failure.Count)
	}
}
