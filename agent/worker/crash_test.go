package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

// events are what a worker tells of its children and versions.
type events struct {
	mu     sync.Mutex // guards what follows
	deaths []Death
	lost   map[engine.VersionID]error
}

func listen(cfg *Config) *events {
	e := &events{lost: make(map[engine.VersionID]error)}
	cfg.OnDeath = func(d Death) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.deaths = append(e.deaths, d)
	}
	cfg.OnLost = func(id engine.VersionID, reason error) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.lost[id] = errors.Join(e.lost[id], reason)
	}
	return e
}

// check holds the events against how often the child was to die, of what, and
// whether only bad was to be lost, to quarantine.
func (e *events) check(t *testing.T, deaths int, status string, bad ...engine.VersionID) {
	t.Helper()
	until(t, "what is lost to be told", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.lost) >= len(bad)
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.deaths) != deaths {
		t.Errorf("%d deaths, not %d: %+v", len(e.deaths), deaths, e.deaths)
	}
	for _, d := range e.deaths {
		if !strings.Contains(d.Err.Error(), status) {
			t.Errorf("death of %v, not %s", d.Err, status)
		}
	}
	for id, reason := range e.lost {
		if !slices.Contains(bad, id) || !errors.Is(reason, engine.ErrQuarantined) || strings.Contains(reason.Error(), "\n") {
			t.Errorf("%s lost to %v", id, reason)
		}
	}
}

// others has three versions run all the time, two runs of each, until the
// function that it gives is called: none may fail.
func others(t *testing.T, w *Worker) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for entry, in := range map[string][]tensor.Tensor{
		"any-rank.onnx":    {floats("x", 1, 50_000)},
		"digits-size.onnx": {floats("x", 2, 1, 64)},
		"add.onnx":         {floats("a", 3, 1, 2), floats("b", 4, 2, 2)},
	} {
		id, _ := load(t, w, entry)
		for range 2 {
			var runs atomic.Int64
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, err := one(t.Context(), w, id, in, nil); err != nil {
						t.Errorf("%s has noticed: %v", id, err)
						return
					}
					runs.Add(1)
				}
			})
			until(t, "a first run", func() bool { return runs.Load() > 0 || t.Failed() })
		}
	}
	return func() { cancel(); wg.Wait() }
}

// TestFault has a version whose weights cannot be read: a kernel faults at each
// run. It is put into quarantine at the second death, and others go on.
func TestFault(t *testing.T) {
	net := zoo.MLP(1)
	bad, x := write(t, net), input(net, 1)
	cfg := compiling(t, testConfig(t, "fault-on-run="+image(bad)))
	e := listen(&cfg)
	w := start(t, cfg)
	activate(t, w, bad)
	stop := others(t, w)
	defer stop()
	if _, err := one(t.Context(), w, bad.ID, x, nil); !errors.Is(err, engine.ErrQuarantined) {
		t.Errorf("the run that faults: %v", err)
	}
	e.check(t, 2, "signal: segmentation fault", bad.ID)
	if _, err := one(t.Context(), w, bad.ID, x, nil); !errors.Is(err, engine.ErrQuarantined) || !strings.Contains(err.Error(), "segmentation fault") {
		t.Errorf("run in quarantine: %v", err)
	}
	if _, err := w.Activate(t.Context(), bad.ID, engine.Setting{}); !errors.Is(err, engine.ErrQuarantined) {
		t.Errorf("activated in quarantine: %v", err)
	}
	stop()
	e.check(t, 2, "", bad.ID)
}

// TestAbort has a version that ends each child that activates it.
func TestAbort(t *testing.T) {
	bad := write(t, zoo.MLP(1))
	cfg := compiling(t, testConfig(t, "abort-on-load="+image(bad)))
	e := listen(&cfg)
	w := start(t, cfg)
	if _, err := w.Load(t.Context(), bad); err != nil {
		t.Fatal(err)
	}
	stop := others(t, w)
	defer stop()
	if _, err := w.Activate(t.Context(), bad.ID, engine.Setting{}); !errors.Is(err, engine.ErrQuarantined) {
		t.Error(err)
	}
	e.check(t, 2, "signal: aborted", bad.ID)
}

// TestTruncated cuts the compiled file of an active version: the run that
// reads behind its end kills the child, and is done from the model itself.
func TestTruncated(t *testing.T) {
	net := zoo.MLP(1)
	s, x := write(t, net), input(net, 1)
	want := inProcess(t, s, x, nil)
	cfg := compiling(t, testConfig(t, ""))
	e := listen(&cfg)
	w := start(t, cfg)
	activate(t, w, s)
	stop := others(t, w)
	defer stop()
	if err := os.Truncate(image(s), 4096); err != nil {
		t.Fatal(err)
	}
	if got, err := one(t.Context(), w, s.ID, x, nil); err != nil || !near(got, want) {
		t.Errorf("other outputs than in-process, or %v", err)
	}
	e.check(t, 1, "signal: bus error")
}

// TestStall has a run that goes on and on, and does not hear that it is
// cancelled for it.
func TestStall(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.StallGrace, cfg.Threads = 50*time.Millisecond, 1
	e := listen(&cfg)
	w := start(t, cfg)
	bad, _ := load(t, w, "chain.onnx")
	x := []tensor.Tensor{floats("x", 1, 2500, 2500)} // each node takes several times the grace
	stop := others(t, w)
	defer stop()
	p := child(t, w)
	before := processorTime(t, p)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() {
		_, err := one(ctx, w, bad, x, nil)
		ended <- err
	}()
	until(t, "the run to compute", func() bool { return processorTime(t, p) > before+200*time.Millisecond })
	cancel(engine.ErrStalled)
	if err := <-ended; !errors.Is(err, engine.ErrQuarantined) {
		t.Error(err)
	}
	e.check(t, 2, "gave no answer for 50ms after a request was cancelled", bad)
}

// processorTime gives how long a child has computed.
func processorTime(t testing.TB, p *process) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.command.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	fields := strings.Fields(rest) // from the third on
	var ticks time.Duration        // of 10 ms
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond
}

// worksOn says whether a run of a version goes on.
func (p *process) worksOn(id engine.VersionID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.lanes, func(l *lane) bool { return l.id == id })
}

// TestKilledAgain has somebody else kill the child while a version runs. That
// proves nothing where a run succeeds after two of them, however often; it does
// at the third.
func TestKilledAgain(t *testing.T) {
	cfg := testConfig(t, "")
	e := listen(&cfg)
	w := start(t, cfg)
	id, _ := load(t, w, "chain.onnx")
	stop := others(t, w)
	defer stop()
	for round, tt := range []struct {
		size  int64
		kills int
	}{{500, 2}, {500, 2}, {1500, 3}} {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := one(ctx, w, id, []tensor.Tensor{floats("x", 1, tt.size, tt.size)}, nil)
			ended <- err
		}()
		for range tt.kills {
			var p *process
			until(t, "the run to begin", func() bool { p = child(t, w); return p.worksOn(id) })
			p.command.Process.Kill()
			<-p.dead
		}
		err := <-ended
		cancel()
		if last := tt.kills == 3; last != errors.Is(err, engine.ErrQuarantined) || !last && err != nil {
			t.Fatalf("round %d, killed %d times: %v", round, tt.kills, err)
		}
	}
	e.check(t, 7, "signal: killed", id)
}
