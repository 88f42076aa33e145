package serve

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/policy"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// stage is an Engine whose versions answer as they are told.
type stage struct {
	leaving
	infer func(ctx context.Context, id engine.VersionID, q engine.Request) error
	ran   []string
}

func (s *stage) Infer(ctx context.Context, id engine.VersionID, q engine.Request) (engine.Result, error) {
	text := id.String()
	if q.Resident {
		text += " if resident"
	}
	s.ran = append(s.ran, text)
	return engine.Result{}, s.infer(ctx, id, q)
}

// fallbacks are given as "m:2" or "m=overload,error".
func fallbacks(all ...string) (list []*dunlinv1.RouteFallback) {
	for _, text := range all {
		ref, on, _ := strings.Cut(text, "=")
		t := r("", ref).Targets[0]
		f := &dunlinv1.RouteFallback{Model: t.Model, Version: t.Version}
		if on != "" {
			f.On = strings.Split(on, ",")
		}
		list = append(list, f)
	}
	return list
}

func TestFallback(t *testing.T) {
	refused := func(err error) error { return &engine.RefusedError{Err: err, RetryAfter: 7 * time.Second} }
	broken := errors.New("broken")
	for _, tt := range []struct {
		name      string
		fallbacks []string
		serving   int64 // of m
		errs      map[int64]error
		cold      []int64
		ran       string // what was run, in order
		header    string
		err       string
		code      oip.Code
	}{
		{"the target answers", []string{"m:2"}, 1, nil, nil, "m:1", "", "", 0},
		{"overload", []string{"m:2"}, 1, map[int64]error{1: refused(engine.ErrOverloaded)}, nil, "m:1, m:2", "overload", "", 0},
		{"deadline", []string{"m:2"}, 1, map[int64]error{1: refused(engine.ErrExpired)}, nil, "m:1, m:2", "deadline", "", 0},
		{"error", []string{"m:2"}, 1, map[int64]error{1: broken}, nil, "m:1, m:2", "error", "", 0},
		{"not loaded", []string{"m:2"}, 1, map[int64]error{1: engine.ErrNotLoaded}, nil, "m:1, m:2", "error", "", 0},
		{"nothing serves", []string{"m:2"}, 0, nil, nil, "m:2", "error", "", 0},
		{"not for this reason", []string{"m:2=deadline,error"}, 1, map[int64]error{1: refused(engine.ErrOverloaded)}, nil, "m:1", "", "queue is full", oip.Unavailable},
		{"one is passed over", []string{"m:2=deadline", "m:3=overload"}, 1, map[int64]error{1: refused(engine.ErrOverloaded)}, nil, "m:1, m:3", "overload", "", 0},
		{"each for its reason", []string{"m:2=overload", "m:3=overload", "m:4=error"}, 1, map[int64]error{1: refused(engine.ErrOverloaded), 2: broken}, nil, "m:1, m:2, m:4", "overload", "", 0},
		{"all fail", []string{"m:2", "m:3"}, 1, map[int64]error{1: refused(engine.ErrOverloaded), 2: broken, 3: refused(engine.ErrExpired)}, nil,
			"m:1, m:2, m:3", "", "queue is full; fallback m:2: broken; fallback m:3: the request's time is out", oip.Unavailable},
		{"the caller's fault", []string{"m:2"}, 1, map[int64]error{1: engine.ErrInvalidInput}, nil, "m:1", "", "invalid input", oip.InvalidArgument},
		{"a fallback with other inputs", []string{"m:2", "m:3"}, 1, map[int64]error{1: broken, 2: engine.ErrInvalidInput}, nil, "m:1, m:2, m:3", "error", "", 0},
		{"a cordon", []string{"m:2"}, 1, map[int64]error{1: refused(engine.ErrCordoned)}, nil, "m:1", "", "cordoned", oip.Unavailable},
		{"what it means has been tried", []string{"m:1", "n"}, 1, map[int64]error{1: broken}, nil, "m:1, n:9", "error", "", 0},
		{"weights are out", []string{"m:2=not-resident"}, 1, nil, []int64{1}, "m:1 if resident, m:2", "not-resident", "", 0},
		{"weights are in", []string{"m:2=not-resident"}, 1, nil, nil, "m:1 if resident", "", "", 0},
		{"nobody takes cold weights", []string{"m:2"}, 1, nil, []int64{1}, "m:1", "", "", 0},
		{"at last it waits for weights", []string{"m:2=not-resident", "m:3"}, 1, map[int64]error{2: broken, 3: broken}, []int64{1}, "m:1 if resident, m:2, m:3, m:1", "", "", 0},
		{"and a fallback's too", []string{"m:2", "m:3=not-resident"}, 1, map[int64]error{1: broken, 3: broken}, []int64{2}, "m:1 if resident, m:2 if resident, m:3, m:2", "error", "", 0},
		{"the weights do not come", []string{"m:2=not-resident"}, 1, map[int64]error{1: engine.ErrOutOfMemory, 2: broken}, []int64{1}, "m:1 if resident, m:2, m:1", "", "; fallback m:2: broken", oip.Unavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := &stage{infer: func(_ context.Context, id engine.VersionID, q engine.Request) error {
				if q.Resident && slices.Contains(tt.cold, id.Version) {
					return engine.ErrNotResident
				}
				return tt.errs[id.Version]
			}}
			s := New(e, nil)
			s.SetServing(map[string]int64{"m": tt.serving, "n": 9})
			live := r("live", "m", "k=0")
			live.Fallback = fallbacks(tt.fallbacks...)
			s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
			a, err := s.Infer(t.Context(), request("live", 0))
			if ran := strings.Join(e.ran, ", "); ran != tt.ran || a.Header[HeaderFallback] != tt.header {
				t.Errorf("%s ran, want %s; headers %v", ran, tt.ran, a.Header)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err) || codeOf(err) != tt.code) {
				t.Errorf("error %v (code %d), want %q (%d)", err, codeOf(err), tt.err, tt.code)
			}
			last := tt.ran[strings.LastIndex(tt.ran, " ")+1:]
			if err == nil && !strings.Contains(tt.ran, "if resident") && a.Header[HeaderVersion] != last {
				t.Errorf("headers %v, %s has answered", a.Header, last)
			}
			if e, ok := errors.AsType[*oip.Error](err); ok && errors.Is(tt.errs[1], engine.ErrOverloaded) && e.RetryAfter != 7*time.Second {
				t.Errorf("try again after %v", e.RetryAfter)
			}
		})
	}
}

// A fallback gets what is left of the time in which the request may wait.
func TestFallbackTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var left []time.Duration
		e := &stage{infer: func(_ context.Context, _ engine.VersionID, q engine.Request) error {
			left = append(left, q.Timeout)
			time.Sleep(600 * time.Millisecond)
			return &engine.RefusedError{Err: engine.ErrExpired}
		}}
		s := New(e, nil)
		s.SetServing(map[string]int64{"m": 1})
		live := r("live", "m")
		live.Fallback = fallbacks("m:2", "m:3")
		s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
		q := request("live", 0)
		q.Timeout = time.Second
		if _, err := s.Infer(t.Context(), q); codeOf(err) != oip.Expired {
			t.Error(err)
		}
		if !slices.Equal(left, []time.Duration{time.Second, 400 * time.Millisecond, 1}) {
			t.Errorf("%v", left)
		}
		// Whoever has gone away gets no fallback.
		ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
		defer cancel()
		left = nil
		if _, err := s.Infer(ctx, request("live", 0)); !errors.Is(err, context.DeadlineExceeded) || len(left) != 2 {
			t.Errorf("%v after %d runs", err, len(left))
		}
	})
}

// While one version takes the place of another, a fallback answers; where none
// does, the request waits.
func TestFallbackWhileChanging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := errors.New("broken")
		e := &stage{infer: func(_ context.Context, id engine.VersionID, _ engine.Request) error {
			if id.Model == "n" {
				return fail
			}
			return nil
		}}
		s := New(e, nil)
		s.SetServing(map[string]int64{"n": 5})
		s.SetStandby(nil, map[string]bool{"m": true})
		live := r("live", "m")
		live.Fallback = fallbacks("n")
		s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
		go func() {
			time.Sleep(time.Second)
			s.SetServing(map[string]int64{"m": 2, "n": 5})
		}()
		if a, err := s.Infer(t.Context(), request("live", 0)); err != nil || a.Version != 2 || a.Header[HeaderFallback] != "" {
			t.Errorf("%+v, %v", a, err)
		}
		s.SetServing(map[string]int64{"n": 5})
		fail = nil
		if a, err := s.Infer(t.Context(), request("live", 0)); err != nil || a.Model != "n" || a.Header[HeaderFallback] != "error" {
			t.Errorf("%+v, %v", a, err)
		}
	})
}

// Figures of fallbacks go on where the rule and the fallback stay.
func TestFallbackFigures(t *testing.T) {
	e := startEngine(t, adder{fail: func(id engine.VersionID) error {
		if id.Version == 1 {
			return errors.New("broken")
		}
		return nil
	}})
	s := New(e, nil)
	load(t, e, "m", 1)
	load(t, e, "m", 2)
	s.SetServing(map[string]int64{"m": 1})
	live := r("live", "m")
	live.Fallback = fallbacks("n", "m:2")
	count := func() (got []uint64) {
		t.Helper()
		s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
		a, err := s.Infer(t.Context(), request("live", 0))
		if err != nil || a.Version != 2 || a.Outputs[0].Data[0] != 12 || a.Header[HeaderFallback] != "error" {
			t.Fatalf("%+v, %v", a, err)
		}
		a.Release()
		for _, f := range s.Rules()[0].Fallbacks {
			got = append(got, f.Requests[policy.Failed])
		}
		return got
	}
	if got := count(); !slices.Equal(got, []uint64{1, 1}) {
		t.Error(got)
	}
	live.Fallback = fallbacks("m:2", "k:3=deadline")
	if got := count(); !slices.Equal(got, []uint64{2, 0}) {
		t.Error(got)
	}
}

// Random policies and loads, on versions that fail and come back: each request
// ends exactly once, by a version that its rule allows or with an error, after
// each version has run it once at most, one after the other, and only the one
// that was passed over because its weights were out twice.
func TestRandomFallbacks(t *testing.T) {
	const models = 6
	whys := []error{
		&engine.RefusedError{Err: engine.ErrOverloaded}, &engine.RefusedError{Err: engine.ErrExpired}, errors.New("broken"),
		engine.ErrNotLoaded, engine.ErrOutOfMemory, engine.ErrInvalidInput, &engine.RefusedError{Err: engine.ErrCordoned},
	}
	name := func(i int) string { return fmt.Sprintf("m%d", i) }
	random := func(seed uint64, live *dunlinv1.DesiredRoute) string {
		p, err := policy.Compile(live)
		if err != nil {
			return err.Error()
		}
		type record struct {
			chance  *rand.Rand // its own, so that the order of requests does not matter
			running bool
			ids     []engine.VersionID
			cold    []engine.VersionID
			answers int
		}
		var mu sync.Mutex
		records := map[int64]*record{}
		var fault string
		e := &busy{infer: func(ctx context.Context, id engine.VersionID, q engine.Request) error {
			mu.Lock()
			rec := records[q.Inputs[0].Shape[0]]
			if rec.running || rec.answers > 0 {
				fault = "a request runs twice at a time, or after its answer"
			}
			rec.running = true
			rec.ids = append(rec.ids, id)
			var err error
			if q.Resident && rec.chance.IntN(3) == 0 {
				err = engine.ErrNotResident
				rec.cold = append(rec.cold, id)
			} else if rec.chance.IntN(2) == 0 {
				err = whys[rec.chance.IntN(len(whys))]
			}
			takes := time.Duration(rec.chance.IntN(20)) * time.Millisecond
			mu.Unlock()
			select {
			case <-time.After(takes):
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
			mu.Lock()
			defer mu.Unlock()
			if rec.running = false; err == nil {
				rec.answers++
			}
			return err
		}}
		s := New(e, nil)
		serving := map[string]int64{}
		for i := range models - 1 { // nothing serves the last
			serving[name(i)] = 1
		}
		s.SetServing(serving)
		s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
		var wg sync.WaitGroup
		for i := range 40 {
			rec := &record{chance: rand.New(rand.NewPCG(seed, uint64(i)))}
			wait := time.Duration(rec.chance.IntN(300)) * time.Millisecond
			timeout := time.Duration(1+rec.chance.IntN(100)) * time.Millisecond
			mu.Lock()
			records[int64(i)] = rec
			mu.Unlock()
			wg.Go(func() {
				time.Sleep(wait)
				ctx, cancel := context.WithTimeout(context.Background(), timeout)
				defer cancel()
				q := request("live", 0)
				q.Inputs[0].Shape[0] = int64(i)
				q.Parameters = words{"p": fmt.Sprint(i % 2), "key": fmt.Sprint(i)}
				a, err := s.Infer(ctx, q)
				mu.Lock()
				defer mu.Unlock()
				allowed, rule := []string{}, -(i % 2) // "0" matches rule 0, "1" none
				for _, t := range p.Targets(rule) {
					allowed = append(allowed, t.Model)
				}
				targets := len(allowed)
				for _, f := range p.Fallbacks(rule) {
					allowed = append(allowed, f.Model)
				}
				switch {
				case (err == nil) != (rec.answers == 1) || rec.answers > 1:
					fault = fmt.Sprintf("%d answers, error %v", rec.answers, err)
				case err == nil && (a.Model != rec.ids[len(rec.ids)-1].Model || !slices.Contains(allowed, a.Model)):
					fault = fmt.Sprintf("%s has answered, %v ran, allowed are %v", a.Model, rec.ids, allowed)
				case err == nil && a.Header[HeaderFallback] == "" && !slices.Contains(allowed[:targets], a.Model):
					fault = fmt.Sprintf("%s has answered, which is no target, headers %v", a.Model, a.Header)
				case err != nil && err.Error() == "":
					fault = "a refusal without a reason"
				case err != nil && errors.Is(err, engine.ErrNotResident):
					fault = "a request is refused for weights that are out"
				case len(rec.ids) > policy.MaxFallbacks+2:
					fault = fmt.Sprintf("%v ran", rec.ids)
				}
				seen := map[engine.VersionID]int{}
				for k, id := range rec.ids {
					seen[id]++
					if seen[id] > 1 && (k < len(rec.ids)-1 || len(rec.cold) == 0 || rec.cold[0] != id) {
						fault = fmt.Sprintf("%v ran, of which %v were out", rec.ids, rec.cold)
					}
				}
			})
		}
		wg.Wait()
		return fault
	}
	rapid.Check(t, func(rt *rapid.T) {
		list := func(label string) []*dunlinv1.RouteFallback {
			var all []*dunlinv1.RouteFallback
			for i, model := range rapid.SliceOfNDistinct(rapid.IntRange(0, models-1), 0, 4, func(i int) int { return i }).Draw(rt, label) {
				f := &dunlinv1.RouteFallback{Model: name(model), Version: int64(i % 2)}
				f.On = rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"overload", "error", "deadline", "not-resident"}), 0, 4, rapid.ID[string]).Draw(rt, "on")
				all = append(all, f)
			}
			return all
		}
		live := r("live", "m0=2", "m1=1", "m5=1")
		live.Fallback = list("fallback")
		live.Rules = []*dunlinv1.RouteRule{rule("a", whenParameter("p", "0"), "m2", "m3=3")}
		live.Rules[0].Fallback = list("fallback of the rule")
		live.Sticky = &dunlinv1.RouteSticky{Parameter: "key"}
		live.Rules[0].Sticky = live.Sticky
		seed := rapid.Uint64().Draw(rt, "seed")
		var fault string
		synctest.Test(t, func(*testing.T) { fault = random(seed, live) })
		if fault != "" {
			rt.Fatal(fault)
		}
	})
}

// busy is a stage for many requests at a time.
type busy struct {
	leaving
	infer func(ctx context.Context, id engine.VersionID, q engine.Request) error
}

func (b *busy) Infer(ctx context.Context, id engine.VersionID, q engine.Request) (engine.Result, error) {
	return engine.Result{}, b.infer(ctx, id, q)
}
