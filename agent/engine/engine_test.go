package engine

import (
	"context"
	"errors"
	"math"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/models/tensor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// runtime is a Runtime that takes a second for everything and gives back what
// it got.
type runtime struct {
	loads, unloads atomic.Int64
	failure        error // of Run
	lost           bool  // it does not have what it is to unload
}

var digits = Info{
	Inputs:  []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 2}}, {Name: "any", Type: tensor.String}},
	Outputs: []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{-1, 2}}},
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(time.Second):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (r *runtime) Load(ctx context.Context, s Spec) (Info, error) {
	if s.Entry == "bad" {
		return Info{}, errors.New("bad model")
	}
	r.loads.Add(1)
	return digits, pause(ctx)
}

func (r *runtime) Run(ctx context.Context, _ VersionID, in []tensor.Tensor, _ []string) ([]tensor.Tensor, error) {
	if r.failure != nil {
		return nil, r.failure
	}
	return in, pause(ctx)
}

func (r *runtime) Unload(ctx context.Context, _ VersionID) error {
	r.unloads.Add(1)
	if r.lost {
		return ErrNotLoaded
	}
	return pause(ctx)
}

var one = VersionID{"digits", 1}

func request1() []tensor.Tensor {
	return []tensor.Tensor{
		{Name: "any", Type: tensor.String, Shape: []int64{1, 1}, Data: tensor.AppendString(nil, []byte("s"))},
		{Name: "x", Type: tensor.Float32, Shape: []int64{3, 2}, Data: make([]byte, 24)},
	}
}

// bubble runs f with an engine that has version one loaded, in a bubble.
func bubble(t *testing.T, limit int, f func(t *testing.T, e *Engine, r *runtime)) {
	synctest.Test(t, func(t *testing.T) {
		r := &runtime{}
		e := New(Config{Runtime: r, QueueLimit: limit})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- e.Run(ctx) }()
		info, err := e.Load(t.Context(), Spec{ID: one})
		if err != nil || !reflect.DeepEqual(info, digits) {
			t.Fatalf("%+v, %v", info, err)
		}
		f(t, e, r)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), one, request1(), nil); !errors.Is(err, ErrStopped) {
			t.Errorf("Infer after the end: %v", err)
		}
		if e.Versions() != nil {
			t.Error("versions after the end")
		}
	})
}

func TestInfer(t *testing.T) {
	bubble(t, 2, func(t *testing.T, e *Engine, r *runtime) {
		began := time.Now()
		var wg sync.WaitGroup
		for n := range 4 {
			wg.Go(func() {
				res, err := e.Infer(t.Context(), one, request1(), []string{"y"})
				if n == 3 { // one runs, two wait
					if !errors.Is(err, ErrOverloaded) || !strings.Contains(err.Error(), "digits:1: queue is full: 2 requests wait") {
						t.Errorf("%v", err)
					}
					return
				}
				if err != nil || res.Queue != time.Duration(n)*time.Second || res.Run != time.Second || len(res.Outputs) != 2 {
					t.Errorf("request %d: %+v, %v", n, res, err)
				}
			})
			synctest.Wait()
		}
		want := []Status{{ID: one, Info: digits, Queued: 2, Running: 1}}
		if got := e.Versions(); !reflect.DeepEqual(got, want) {
			t.Errorf("versions %+v", got)
		}
		wg.Wait()
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("took %v", took)
		}
		r.failure = errors.New("out of memory")
		if _, err := e.Infer(t.Context(), one, request1(), nil); !errors.Is(err, r.failure) || !strings.Contains(err.Error(), "run digits:1: ") {
			t.Error(err)
		}
		want = []Status{{ID: one, Info: digits, Succeeded: 3, Failed: 1, RunTime: 3 * time.Second}}
		if got := e.Versions(); !reflect.DeepEqual(got, want) {
			t.Errorf("versions %+v", got)
		}
	})
}

func TestCancel(t *testing.T) {
	bubble(t, 0, func(t *testing.T, e *Engine, _ *runtime) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		cause := errors.New("client left")
		gone, leave := context.WithCancelCause(t.Context())
		began := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { // runs
			if _, err := e.Infer(ctx, one, request1(), nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 100*time.Millisecond {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		})
		synctest.Wait()
		wg.Go(func() { // waits
			if _, err := e.Infer(gone, one, request1(), nil); !errors.Is(err, cause) || time.Since(began) != 0 {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		})
		synctest.Wait()
		leave(cause)
		synctest.Wait()
		if s := e.Versions()[0]; s.Queued != 0 || s.Running != 1 {
			t.Errorf("%+v", s)
		}
		wg.Wait()
		if _, err := e.Infer(gone, one, request1(), nil); !errors.Is(err, cause) {
			t.Error(err)
		}
		if res, err := e.Infer(t.Context(), one, request1(), nil); err != nil || res.Queue != 0 {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

func TestUnload(t *testing.T) {
	bubble(t, 0, func(t *testing.T, e *Engine, r *runtime) {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := e.Infer(t.Context(), one, request1(), nil); err != nil {
					t.Error(err) // admitted before the unload
				}
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if err := e.Unload(ctx, one); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), one, request1(), nil); !errors.Is(err, ErrDraining) {
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
		if _, err := e.Infer(t.Context(), one, request1(), nil); !errors.Is(err, ErrNotLoaded) {
			t.Error(err)
		}
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil {
			t.Errorf("loaded again: %v", err)
		}
	})
}

// A version that the runtime has lost can be unloaded and loaded again.
func TestUnloadOfALostVersion(t *testing.T) {
	bubble(t, 0, func(t *testing.T, e *Engine, r *runtime) {
		r.lost = true
		if err := e.Unload(t.Context(), one); err != nil {
			t.Errorf("Unload: %v", err)
		}
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil || r.loads.Load() != 2 {
			t.Errorf("Load: %v, %d loads", err, r.loads.Load())
		}
	})
}

func TestLoad(t *testing.T) {
	bubble(t, 0, func(t *testing.T, e *Engine, r *runtime) {
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil || r.loads.Load() != 1 {
			t.Errorf("loaded again: %v, %d loads", err, r.loads.Load())
		}
		two := VersionID{"digits", 2}
		if _, err := e.Load(t.Context(), Spec{ID: two, Entry: "bad"}); err == nil || err.Error() != "load digits:2: bad model" {
			t.Error(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := e.Load(t.Context(), Spec{ID: two}); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if _, err := e.Load(t.Context(), Spec{ID: two}); err == nil || !strings.Contains(err.Error(), "is being loaded") {
			t.Error(err)
		}
		if _, err := e.Infer(t.Context(), two, request1(), nil); !errors.Is(err, ErrNotLoaded) {
			t.Error(err)
		}
		// The old version serves meanwhile.
		if res, err := e.Infer(t.Context(), one, request1(), nil); err != nil || res.Queue != 0 {
			t.Errorf("%+v, %v", res, err)
		}
		wg.Wait()
		if all := e.Versions(); len(all) != 2 || all[1].ID != two {
			t.Errorf("%+v", all)
		}
	})
}

// TestStop stops the engine while a request runs and others wait.
func TestStop(t *testing.T) {
	bubble(t, 0, func(t *testing.T, e *Engine, _ *runtime) {
		for n := range 3 {
			go func() { // the bubble waits for it

				began := time.Now()
				_, err := e.Infer(context.WithoutCancel(t.Context()), one, request1(), nil)
				if want := []error{context.Canceled, ErrStopped, ErrStopped}[n]; !errors.Is(err, want) || time.Since(began) != 0 {
					t.Errorf("request %d after %v: %v", n, time.Since(began), err)
				}
			}()
			synctest.Wait()
		}
	})
}

func TestBeforeRun(t *testing.T) {
	e := New(Config{Runtime: &runtime{}})
	if e.Versions() != nil {
		t.Error("versions before the start")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Load(ctx, Spec{ID: one}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestCheck(t *testing.T) {
	info := digits
	change := func(f func(in []tensor.Tensor)) []tensor.Tensor { in := request1(); f(in); return in }
	for name, tt := range map[string]struct {
		in      []tensor.Tensor
		outputs []string
		want    string // "" where it is fine
	}{
		"fine":             {request1(), nil, ""},
		"one output":       {request1(), []string{"y"}, ""},
		"any rank":         {change(func(in []tensor.Tensor) { in[0].Shape = nil }), nil, ""},
		"empty batch":      {change(func(in []tensor.Tensor) { in[1].Shape, in[1].Data = []int64{0, 2}, nil }), nil, ""},
		"missing":          {request1()[:1], nil, `invalid input "x": missing`},
		"unknown":          {append(request1(), tensor.Tensor{Name: "z"}), nil, `invalid input "z": the model has no input of this name`},
		"twice":            {append(request1(), request1()...), nil, `invalid input "any": given twice`},
		"type":             {change(func(in []tensor.Tensor) { in[1].Type = tensor.Int32 }), nil, `invalid input "x": has type INT32, the model takes FP32`},
		"dimension":        {change(func(in []tensor.Tensor) { in[1].Shape = []int64{2, 3} }), nil, `invalid input "x": has shape [2 3], the model takes [-1 2]`},
		"rank":             {change(func(in []tensor.Tensor) { in[1].Shape = []int64{6} }), nil, `invalid input "x": has shape [6], the model takes [-1 2]`},
		"negative":         {change(func(in []tensor.Tensor) { in[1].Shape = []int64{-1, 2} }), nil, `tensor "x"`},
		"overflow":         {change(func(in []tensor.Tensor) { in[1].Shape = []int64{math.MaxInt64, 2} }), nil, `tensor "x"`},
		"data":             {change(func(in []tensor.Tensor) { in[1].Data = in[1].Data[1:] }), nil, "has 23 bytes of data"},
		"strings":          {change(func(in []tensor.Tensor) { in[0].Data = in[0].Data[1:] }), nil, `tensor "any"`},
		"unknown output":   {request1(), []string{"z"}, `the model has no output "z"`},
		"output twice":     {request1(), []string{"y", "y"}, `output "y" is asked for twice`},
		"none of anything": {nil, nil, `invalid input "x": missing`},
	} {
		err := info.check(tt.in, tt.outputs)
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrInvalidInput) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// BenchmarkInfer measures what the engine adds to a runtime that takes no time.
func BenchmarkInfer(b *testing.B) {
	e := New(Config{Runtime: instant{}})
	ctx, stop := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	wg.Go(func() { e.Run(ctx) })
	defer wg.Wait()
	defer stop()
	if _, err := e.Load(b.Context(), Spec{ID: one}); err != nil {
		b.Fatal(err)
	}
	in := request1()
	for b.Loop() {
		if _, err := e.Infer(b.Context(), one, in, nil); err != nil {
			b.Fatal(err)
		}
	}
}

type instant struct{}

func (instant) Load(context.Context, Spec) (Info, error) { return digits, nil }
func (instant) Run(context.Context, VersionID, []tensor.Tensor, []string) ([]tensor.Tensor, error) {
	return nil, nil
}
func (instant) Unload(context.Context, VersionID) error { return nil }
