package engine

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/internal/sketch"
	"github.com/dunlin/dunlin/models/serving"
)

func TestMain(m *testing.M) {
	// More schedules than rapid tries by itself; -rapid.checks overrides it.
	if err := flag.Set("rapid.checks", "1000"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

var oneByOne = &serving.Options{Queue: serving.QueuePolicy{MaxSize: 2}}

// bubble runs f with an engine that has version one loaded, in a bubble.
func bubble(t *testing.T, r *runtime, o *serving.Options, f func(t *testing.T, e *Engine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Runtime: r})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- e.Run(ctx) }()
		if _, err := e.Load(t.Context(), Spec{ID: one, Options: o}); err != nil {
			t.Fatal(err)
		}
		f(t, e)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), one, Request{Inputs: request1()}); !errors.Is(err, ErrStopped) {
			t.Errorf("Infer after the end: %v", err)
		}
		if e.Versions() != nil {
			t.Error("versions after the end")
		}
		if err := e.Health(t.Context()); !errors.Is(err, ErrStopped) {
			t.Errorf("Health after the end: %v", err)
		}
		time.Sleep(2 * time.Second) // what the test has left behind ends
		if r.given != r.back {
			t.Errorf("%d of %d outcomes were released", r.back, r.given)
		}
	})
}

func TestInfer(t *testing.T) {
	r := &runtime{}
	bubble(t, r, oneByOne, func(t *testing.T, e *Engine) {
		began := time.Now()
		var wg sync.WaitGroup
		for n := range 4 {
			wg.Go(func() {
				res, err := e.Infer(t.Context(), one, Request{Inputs: request1(), Outputs: []string{"y"}})
				if n == 3 { // one runs, two wait
					refused, ok := errors.AsType[*RefusedError](err)
					if !ok || !errors.Is(err, ErrOverloaded) || err.Error() != "digits:1: queue is full: 2 requests wait" || refused.RetryAfter != time.Second {
						t.Errorf("%v", err)
					}
					return
				}
				queue := time.Duration(n) * time.Second
				if err != nil || res.Queue != queue || res.Input != time.Millisecond || res.Infer != time.Second || res.Output != time.Microsecond ||
					res.Rows != 1 || len(res.Outputs) != 1 || res.Outputs[0].Name != "y" {
					t.Errorf("request %d: %+v, %v", n, res, err)
				}
				res.Release()
			})
			synctest.Wait()
		}
		if s := e.Versions()[0]; s.Queued != 2 || s.Running != 1 || s.Figures.Overloaded != 1 || s.Figures.Executions != 0 {
			t.Errorf("%+v", s)
		}
		wg.Wait()
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("took %v", took)
		}
		r.failure = errors.New("out of memory")
		if _, err := e.Infer(t.Context(), one, Request{Inputs: request1()}); !errors.Is(err, r.failure) || !strings.Contains(err.Error(), "run digits:1: ") {
			t.Error(err)
		}
	})
}

// TestFigures runs two requests in one run, then one that fails, then one that
// its caller gives up.
func TestFigures(t *testing.T) {
	r := &runtime{}
	bubble(t, r, &serving.Options{MaxBatchSize: 8, DynamicBatching: true, MaxQueueDelay: 2 * time.Second}, func(t *testing.T, e *Engine) {
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				res, err := e.Infer(t.Context(), one, Request{Inputs: marked(1)})
				if err != nil || res.Rows != 2 {
					t.Errorf("%+v, %v", res, err)
				}
				res.Release()
			})
			time.Sleep(time.Second)
		}
		wg.Wait()
		last := time.Now()
		if _, err := e.Infer(t.Context(), one, Request{Inputs: marked(0xff)}); !errors.Is(err, errInput) {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := e.Infer(ctx, one, Request{Inputs: marked(1)}); err == nil {
			t.Error("no error in a millisecond")
		}
		synctest.Wait()
		total := func(n uint64, d time.Duration) Total { return Total{n, d} }
		f := e.Versions()[0].Figures
		want := Figures{
			Success: total(2, 5*time.Second), Failure: total(1, 2*time.Second),
			Queue: total(3, 5*time.Second), Input: total(3, 2*time.Millisecond), Infer: total(3, 2*time.Second), Output: total(3, 2*time.Microsecond),
			Cancelled: 1, Inferences: 4, Executions: 3, Run: total(3, time.Second), Last: last.Add(2*time.Second + time.Millisecond),
			Batches: []BatchFigures{
				{1, total(2, 0), total(2, 0), total(2, 0)},
				{2, total(1, time.Millisecond), total(1, time.Second), total(1, time.Microsecond)},
			},
		}
		histograms := []Histogram{f.Request, f.Wait, f.Size}
		f.Request, f.Wait, f.Size = Histogram{}, Histogram{}, Histogram{}
		if f.Took[class(2*time.Second)] != 1 || f.Took[class(3*time.Second)] != 1 || f.Took.Count() != 2 || f.Failed[class(2*time.Second)] != 1 || f.Failed.Count() != 1 {
			t.Errorf("successes took %v, failures %v", f.Took, f.Failed)
		}
		f.Took, f.Failed = Durations{}, Durations{}
		if l := f.Latency; l[sketch.LatencyBucket(2*time.Second)] != 1 || l[sketch.LatencyBucket(3*time.Second)] != 1 || l.Sum() != 2 {
			t.Errorf("latencies %v", l)
		}
		f.Latency, f.Confidence = nil, nil
		if !f.Last.Equal(want.Last) {
			t.Errorf("last %v instead of %v", f.Last, want.Last)
		}
		f.Last = want.Last
		if !reflect.DeepEqual(f, want) {
			t.Errorf("figures\n%+v\ninstead of\n%+v", f, want)
		}
		for i, want := range []struct {
			sum   float64
			above map[float64]uint64 // by upper bound
		}{
			{5, map[float64]uint64{2.5: 1, 5: 1}}, {5, map[float64]uint64{1: 1, 2.5: 2}}, {4, map[float64]uint64{1: 2, 2: 1}},
		} {
			h := histograms[i]
			if len(h.Counts) != len(h.Bounds)+1 || h.Sum != want.sum {
				t.Errorf("histogram %d: %+v", i, h)
			}
			for n, bound := range h.Bounds {
				if h.Counts[n] != want.above[bound] {
					t.Errorf("histogram %d: %d up to %v instead of %d", i, h.Counts[n], bound, want.above[bound])
				}
			}
		}
	})
}

// Requests that ask for different outputs run together, and each gets its own.
func TestBatch(t *testing.T) {
	r := &runtime{batch: true}
	bubble(t, r, nil, func(t *testing.T, e *Engine) {
		info, _ := e.Info(one)
		if want := serving.Automatic(true); info.Options.MaxBatchSize != want.MaxBatchSize || info.Options.Instances != 1 || info.Options.Ageing != serving.DefaultAgeing {
			t.Errorf("%+v", info.Options)
		}
		var wg sync.WaitGroup
		infer := func(b byte, outputs []string, want ...string) {
			wg.Go(func() {
				res, err := e.Infer(t.Context(), one, Request{Inputs: marked(b), Outputs: outputs})
				if err != nil {
					t.Error(err)
					return
				}
				var got []string
				for _, o := range res.Outputs {
					got = append(got, fmt.Sprint(o.Name, o.Data[0]))
				}
				if !slices.Equal(got, want) {
					t.Errorf("outputs %q instead of %q", got, want)
				}
				res.Release()
			})
			synctest.Wait()
		}
		infer(1, nil, "y1", "z1")
		infer(2, []string{"z"}, "z2")
		infer(3, []string{"y"}, "y3")
		infer(4, []string{"y", "z"}, "y4", "z4")
		wg.Wait()
		infer(5, []string{"y"}, "y5")
		infer(6, nil, "y6", "z6")
		infer(7, []string{"z"}, "z7")
		wg.Wait()
		if want := [][]string{nil, {"z", "y"}, {"y"}, nil}; !reflect.DeepEqual(r.runs, want) {
			t.Errorf("runs of outputs %q instead of %q", r.runs, want)
		}
	})
}

// A request that makes a run fail does not make those fail that ran with it.
func TestBatchFails(t *testing.T) {
	r := &runtime{}
	bubble(t, r, &serving.Options{MaxBatchSize: 4, DynamicBatching: true, MaxQueueDelay: time.Second}, func(t *testing.T, e *Engine) {
		var wg sync.WaitGroup
		for n := range 4 {
			wg.Go(func() {
				in := marked(byte(n))
				if n == 1 {
					in = marked(0xff)
				}
				res, err := e.Infer(t.Context(), one, Request{Inputs: in})
				if (n == 1) != errors.Is(err, errInput) || n != 1 && (err != nil || res.Outputs[0].Data[0] != byte(n) || res.Rows != 1) {
					t.Errorf("request %d: %+v, %v", n, res, err)
				}
				res.Release()
			})
		}
		wg.Wait()
		if want := []int{4, 1, 1, 1, 1}; !slices.Equal(r.sizes, want) {
			t.Errorf("runs of %d requests instead of %d", r.sizes, want)
		}
	})
}

// A version whose outputs have no rows answers all the same, and one request
// at a time from then on; it is logged once.
func TestNoRows(t *testing.T) {
	var log bytes.Buffer
	r := &runtime{noRows: true}
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Runtime: r, Log: slog.New(slog.NewTextHandler(&log, nil))})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- e.Run(ctx) }()
		o := &serving.Options{MaxBatchSize: 2, DynamicBatching: true, MaxQueueDelay: time.Second, Instances: 2}
		if _, err := e.Load(t.Context(), Spec{ID: one, Options: o}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				if res, err := e.Infer(t.Context(), one, Request{Inputs: marked(1)}); err != nil || res.Rows != 1 {
					t.Errorf("%+v, %v", res, err)
				}
			})
		}
		wg.Wait()
		if slices.Sort(r.sizes); r.sizes[len(r.sizes)-1] != 2 || r.sizes[0] != 1 {
			t.Errorf("runs of %d requests", r.sizes)
		}
		stop()
		<-ended
	})
	if n := strings.Count(log.String(), "requests run alone"); n != 1 || !strings.Contains(log.String(), "model=digits version=1") {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
}

func TestCancel(t *testing.T) {
	bubble(t, &runtime{}, nil, func(t *testing.T, e *Engine) {
		cause := errors.New("client left")
		gone, leave := context.WithCancelCause(t.Context())
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		began := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { // runs
			if _, err := e.Infer(ctx, one, Request{Inputs: request1()}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 100*time.Millisecond {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		})
		synctest.Wait()
		wg.Go(func() { // waits
			if _, err := e.Infer(gone, one, Request{Inputs: request1()}); !errors.Is(err, cause) || time.Since(began) != 0 {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		})
		synctest.Wait()
		leave(cause)
		synctest.Wait()
		if s := e.Versions()[0]; s.Queued != 0 || s.Running != 1 || s.Figures.Cancelled != 1 {
			t.Errorf("%+v", s)
		}
		wg.Wait()
		synctest.Wait()
		if s := e.Versions()[0]; s.Running != 0 || s.Figures.Cancelled != 2 || s.Figures.Failure.Count != 0 {
			t.Errorf("%+v", s) // nobody waits for the run any more, so that it was cancelled
		}
		if _, err := e.Infer(gone, one, Request{Inputs: request1()}); !errors.Is(err, cause) {
			t.Error(err)
		}
		res, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
		if err != nil || res.Queue != 0 {
			t.Errorf("%+v, %v", res, err)
		}
		res.Release()
		res.Release() // the second one does nothing
	})
}

// A run goes on while anybody waits for it; and its outputs are released when
// the last one has done so, whoever gave up meanwhile.
func TestCancelMember(t *testing.T) {
	r := &runtime{}
	bubble(t, r, &serving.Options{MaxBatchSize: 3, DynamicBatching: true, MaxQueueDelay: time.Second}, func(t *testing.T, e *Engine) {
		for _, leaving := range []int{1, 2, 3} {
			r.aborted, r.given, r.back = 0, 0, 0
			gone, leave := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for n := range 3 {
				wg.Go(func() {
					ctx := t.Context()
					if n < leaving {
						ctx = gone
					}
					res, err := e.Infer(ctx, one, Request{Inputs: marked(byte(n))})
					if (n < leaving) != errors.Is(err, context.Canceled) || n >= leaving && (err != nil || res.Outputs[0].Data[0] != byte(n)) {
						t.Errorf("request %d, %d of which leave: %+v, %v", n, leaving, res, err)
					}
					res.Release()
				})
				synctest.Wait()
			}
			leave()
			wg.Wait()
			synctest.Wait()
			if all := leaving == 3; r.aborted == 1 != all || r.given == 1 == all || r.back != r.given {
				t.Errorf("%d leave: %d runs were cancelled, %d outcomes given, %d released", leaving, r.aborted, r.given, r.back)
			}
		}
	})
}

// A request is refused at once when it cannot make its deadline, and when the
// one that it waits for takes too long.
func TestDeadline(t *testing.T) {
	bubble(t, &runtime{}, nil, func(t *testing.T, e *Engine) {
		infer := func(limit time.Duration) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			began := time.Now()
			res, err := e.Infer(ctx, one, Request{Inputs: request1()})
			if err == nil {
				res.Release()
			}
			return time.Since(began), err
		}
		for range fewRuns {
			if took, err := infer(5 * time.Second); err != nil || took != time.Second {
				t.Errorf("after %v: %v", took, err)
			}
		}
		if took, err := infer(900 * time.Millisecond); !errors.Is(err, ErrExpired) || took != 0 ||
			err.Error() != "digits:1: the request's time is out: it would take 1s, 900ms are left" {
			t.Errorf("after %v: %v", took, err)
		}
		var wg sync.WaitGroup
		for n, want := range []time.Duration{1 * time.Second, 2 * time.Second, 0} {
			wg.Go(func() {
				took, err := infer(3500 * time.Millisecond)
				if took != want || (n == 2) != errors.Is(err, ErrExpired) {
					t.Errorf("request %d after %v: %v", n, took, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		if f := e.Versions()[0].Figures; f.Expired != 2 || f.Success.Count != fewRuns+2 {
			t.Errorf("%+v", f)
		}
	})
}

func TestUnload(t *testing.T) {
	r := &runtime{}
	bubble(t, r, nil, func(t *testing.T, e *Engine) {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				res, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
				if err != nil {
					t.Error(err) // admitted before the unload
				}
				res.Release()
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if err := e.Unload(ctx, one); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), one, Request{Inputs: request1()}); !errors.Is(err, ErrDraining) {
			t.Error(err)
		}
		if _, err := e.Load(t.Context(), Spec{ID: one}); !errors.Is(err, ErrDraining) {
			t.Error(err)
		}
		if _, ok := e.Info(one); !ok || !e.Versions()[0].Draining {
			t.Error("the version is not draining")
		}
		wg.Go(func() {
			if err := e.Unload(t.Context(), one); err != nil {
				t.Error(err)
			}
		})
		if err := e.Unload(t.Context(), one); err != nil || r.unloads.Load() != 1 {
			t.Errorf("%v, %d unloads", err, r.unloads.Load())
		}
		wg.Wait()
		if err := e.Unload(t.Context(), one); !errors.Is(err, ErrNotLoaded) {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), one, Request{Inputs: request1()}); !errors.Is(err, ErrNotLoaded) {
			t.Error(err)
		}
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil {
			t.Errorf("loaded again: %v", err)
		}
	})
}

// A version that the runtime has lost can be unloaded and loaded again.
func TestUnloadOfALostVersion(t *testing.T) {
	r := &runtime{lost: true}
	bubble(t, r, nil, func(t *testing.T, e *Engine) {
		if err := e.Unload(t.Context(), one); err != nil {
			t.Errorf("Unload: %v", err)
		}
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil || r.loads.Load() != 2 {
			t.Errorf("Load: %v, %d loads", err, r.loads.Load())
		}
	})
}

func TestLoad(t *testing.T) {
	r := &runtime{}
	bubble(t, r, nil, func(t *testing.T, e *Engine) {
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil || r.loads.Load() != 1 {
			t.Errorf("loaded again: %v, %d loads", err, r.loads.Load())
		}
		if _, err := e.Load(t.Context(), Spec{ID: one, Entry: "other"}); err == nil || err.Error() != "load digits:1: version is loaded from other files or with other options" {
			t.Errorf("loaded from elsewhere: %v", err)
		}
		two := VersionID{Model: "digits", Version: 2}
		if _, err := e.Load(t.Context(), Spec{ID: two, Entry: "bad"}); err == nil || err.Error() != "load digits:2: bad model" {
			t.Error(err)
		}
		if _, err := e.Load(t.Context(), Spec{ID: two, Options: &serving.Options{Instances: 65}}); err == nil ||
			err.Error() != "load digits:2: options: instances is 65, allowed are 0 to 64" {
			t.Error(err)
		}
		var wg sync.WaitGroup
		labels := map[string][]string{"y": {"zero", "one"}}
		wg.Go(func() {
			info, err := e.Load(t.Context(), Spec{ID: two, Options: &serving.Options{Instances: 2, PriorityLevels: 2, DefaultPriority: 1}, Labels: labels})
			if err != nil || info.Options.Instances != 2 || !reflect.DeepEqual(info.Labels, labels) {
				t.Errorf("%+v, %v", info, err)
			}
		})
		synctest.Wait()
		if _, err := e.Load(t.Context(), Spec{ID: two}); err == nil || !strings.Contains(err.Error(), "is being loaded") {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), two, Request{Inputs: request1()}); !errors.Is(err, ErrNotLoaded) {
			t.Error(err)
		}
		// The old version serves meanwhile.
		res, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
		if err != nil || res.Queue != 0 {
			t.Errorf("%+v, %v", res, err)
		}
		res.Release()
		wg.Wait()
		if all := e.Versions(); len(all) != 2 || all[1].ID != two {
			t.Errorf("%+v", all)
		}
	})
}

// TestStop stops the engine while a request runs and others wait.
func TestStop(t *testing.T) {
	bubble(t, &runtime{}, nil, func(t *testing.T, e *Engine) {
		for n := range 3 {
			go func() { // the bubble waits for it
				began := time.Now()
				_, err := e.Infer(context.WithoutCancel(t.Context()), one, Request{Inputs: request1()})
				if want := []error{context.Canceled, ErrStopped, ErrStopped}[n]; !errors.Is(err, want) || time.Since(began) != 0 {
					t.Errorf("request %d after %v: %v", n, time.Since(began), err)
				}
			}()
			synctest.Wait()
		}
	})
}

// TestStopWhileUnloading stops the engine while the runtime unloads, and
// another load goes on.
func TestStopWhileUnloading(t *testing.T) {
	bubble(t, &runtime{}, nil, func(t *testing.T, e *Engine) {
		go func() {
			if err := e.Unload(context.WithoutCancel(t.Context()), one); !errors.Is(err, ErrStopped) {
				t.Errorf("Unload: %v", err)
			}
		}()
		go func() {
			if _, err := e.Load(context.WithoutCancel(t.Context()), Spec{ID: VersionID{Model: "digits", Version: 2}}); !errors.Is(err, ErrStopped) {
				t.Errorf("Load: %v", err)
			}
		}()
		synctest.Wait()
	})
}

func TestBeforeRun(t *testing.T) {
	e := New(Config{Runtime: &runtime{}})
	if e.Versions() != nil {
		t.Error("versions before the start")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the scheduler has not answered")
	cancel(cause)
	if _, err := e.Load(ctx, Spec{ID: one}); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := e.Health(ctx); !errors.Is(err, cause) {
		t.Error(err)
	}
}

// TestEngine has many callers at a time, in real time: each gets its own
// answer, and all memory comes back.
func TestEngine(t *testing.T) {
	var given, back atomic.Int64
	e := New(Config{Runtime: echo{given: &given, back: &back}})
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	o := &serving.Options{
		MaxBatchSize: 8, DynamicBatching: true, Instances: 3, MaxQueueDelay: 100 * time.Microsecond, PreserveOrdering: true,
		PriorityLevels: 3, DefaultPriority: 2, Queue: serving.QueuePolicy{MaxSize: 8, AllowTimeoutOverride: true},
	}
	if _, err := e.Load(ctx, Spec{ID: one, Options: o}); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	var answered, refused, gone atomic.Int64
	var wg sync.WaitGroup
	for n := range 16 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(n)))
			for range 500 {
				b := byte(random.IntN(256))
				ctx, cancel := ctx, context.CancelFunc(func() {})
				if random.IntN(4) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(random.IntN(500))*time.Microsecond)
				}
				res, err := e.Infer(ctx, one, Request{Inputs: marked(b), Priority: random.IntN(4), Timeout: time.Duration(random.IntN(2)) * time.Millisecond})
				cancel()
				_, refusal := errors.AsType[*RefusedError](err)
				switch {
				case b == 0xff && errors.Is(err, errInput):
					answered.Add(1)
				case err == nil:
					if answered.Add(1); res.Outputs[0].Data[0] != b || b == 0xff {
						t.Errorf("seed %d: %d instead of %d", seed, res.Outputs[0].Data[0], b)
					}
					res.Release()
				case refusal:
					refused.Add(1)
				case errors.Is(err, context.DeadlineExceeded):
					gone.Add(1)
				default:
					t.Errorf("seed %d: %v", seed, err)
				}
			}
		})
	}
	wg.Wait()
	if err := e.Unload(t.Context(), one); err != nil {
		t.Error(err)
	}
	stop()
	running.Wait()
	if given.Load() != back.Load() || answered.Load() < 1000 {
		t.Errorf("seed %d: %d of %d outcomes were released; %d answered, %d refused, %d gone", seed, back.Load(), given.Load(), answered.Load(), refused.Load(), gone.Load())
	}
}
