package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// TestLifecycle feeds events to a core and compares what it does at each, in
// order: "reply" to a call by its event's name, "run" and "unload" with the
// generation, "publish" and "withdraw" of the Info.
func TestLifecycle(t *testing.T) {
	type steps [][2]string // an event, and the effects
	loadedOne := steps{{"load", "reply load: 0"}, {"loaded 0", "publish, reply loaded"}}
	for name, tt := range map[string]steps{
		"load and unload": {
			{"unload", "reply unload: version is not loaded"},
			{"load", "reply load: 0"},
			{"arrive", "answer: version is not loaded"},
			{"load", "reply load: version is being loaded"},
			{"unload", "reply unload: version is not loaded"},
			{"loaded 0", "publish, reply loaded"},
			{"load", "reply load: version is loaded"},
			{"load other", "reply load other: version is loaded from other files or with other options"},
			{"unload", "unload 0"},
			{"load", "reply load: version is being unloaded"},
			{"replace", "reply replace: version is being unloaded"},
			{"arrive", "answer: version is being unloaded"},
			{"unload", ""},
			{"unloaded 0", "withdraw, reply unload, reply unload"},
			{"load", "reply load: 0"},
		},
		"replace of nothing": {
			{"replace", "reply replace: 0"}, {"loaded 0", "publish, reply loaded"}, {"settle", "reply settle: version is not loaded"},
		},
		"replace": append(loadedOne, steps{
			{"arrive", "run 0"},
			{"arrive", ""},
			{"replace", "reply replace: 1"},
			{"replace", "reply replace: version is being loaded"},
			{"load", "reply load: version is being loaded"},
			{"loaded 1", "publish, reply loaded"},
			{"settle", ""},
			{"arrive", "run 1"}, // beside the run of the old one
			{"finish 0", "answer, run 0"},
			{"finish 1", "answer"},
			{"finish 0", "answer, unload 0"},
			{"load", "reply load: version is loaded"},
			{"unloaded 0", "reply settle"},
			{"settle", "reply settle: version is not loaded"},
			{"replace", "reply replace: 2"},
			{"loaded 2", "publish, reply loaded, unload 1"},
			{"unloaded 1", ""},
			{"unload", "unload 2"},
			{"unloaded 2", "withdraw, reply unload"},
			{"load", "reply load: 0"},
		}...),
		"a request that was checked before": append(loadedOne, steps{
			{"look", ""},
			{"replace", "reply replace: 1"}, {"loaded 1", "publish, reply loaded, unload 0"},
			{"arrive", "answer: version has been replaced"},
			{"look", ""},
			{"arrive", "run 1"},
		}...),
		"a load that fails": append(loadedOne, steps{
			{"arrive", "run 0"},
			{"replace", "reply replace: 1"},
			{"failed 1", "reply failed: failure"},
			{"settle", "reply settle: version is not loaded"},
			{"arrive", ""},
			{"finish 0", "answer, run 0"},
			{"replace", "reply replace: 2"}, // the runtime may know the generation before
		}...),
		"an unload that fails": append(loadedOne, steps{
			{"replace", "reply replace: 1"}, {"loaded 1", "publish, reply loaded, unload 0"},
			{"settle", ""},
			{"stuck 0", "reply settle: failure"},
			{"arrive", "run 1"},
			{"settle", "unload 0"},
			{"stuck 0", "reply settle: failure"},
			{"replace", "reply replace: 2"}, {"loaded 2", "publish, reply loaded"}, // one runs on it
			{"settle", "unload 0"},
			{"unloaded 0", ""}, // settle waits for the next one
			{"finish 1", "answer, unload 1"},
			{"unloaded 1", "reply settle"},
		}...),
		"unload of the new one before the old one is gone": append(loadedOne, steps{
			{"arrive", "run 0"},
			{"replace", "reply replace: 1"}, {"loaded 1", "publish, reply loaded"},
			{"unload", "unload 1"},
			{"unloaded 1", "withdraw"},
			{"arrive", "answer: version is not loaded"},
			{"load", "reply load: 2"}, // the old one has the id of generation 0
			{"loaded 2", "publish, reply loaded"},
			{"finish 0", "answer, unload 0"},
			{"unloaded 0", "reply unload"},
		}...),
		"unload of the old one before the new one is loaded": append(loadedOne, steps{
			{"replace", "reply replace: 1"},
			{"unload", "unload 0"},
			{"unloaded 0", "withdraw, reply unload"},
			{"load", "reply load: version is being loaded"},
			{"loaded 1", "publish, reply loaded"},
			{"arrive", "run 1"},
		}...),
		"stop": append(loadedOne, steps{
			{"arrive", "run 0"},
			{"replace", "reply replace: 1"}, {"loaded 1", "publish, reply loaded"},
			{"settle", ""},
			{"replace", "reply replace: 2"},
			{"stop", "interrupt, reply settle: engine has stopped"},
			{"loaded 2", "reply loaded: engine has stopped"},
			{"finish 0", "answer"},
			{"replace", "reply replace: engine has stopped"},
			{"settle", "reply settle: engine has stopped"},
		}...),
	} {
		t.Run(name, func(t *testing.T) {
			s := &scripted{core: newCore(start), calls: map[*call]string{}}
			for i, step := range tt {
				if got := s.do(step[0]); got != step[1] {
					t.Fatalf("step %d, %s: %q instead of %q", i, step[0], got, step[1])
				}
			}
		})
	}
}

// scripted is a core that is fed events by their names.
type scripted struct {
	core  *core
	calls map[*call]string
	runs  []*run
	info  *Info // that requests are checked by; nil: the current one
}

func (s *scripted) do(name string) string {
	what, number, _ := strings.Cut(name, " ")
	id := one
	fmt.Sscan(number, &id.Generation)
	c := newCall()
	s.calls[c] = name
	named := func() *call { s.calls[c] = what; return c }
	info := Info{Options: serving.Options{Instances: 1, Queue: serving.QueuePolicy{MaxSize: 8}}}
	failure := errors.New("failure")
	var ev event
	switch what {
	case "load":
		ev = claim{c, Spec{ID: one, Entry: number}, false}
	case "replace":
		ev = claim{c, Spec{ID: one}, true}
	case "loaded":
		ev = loaded{named(), id, info, nil}
	case "failed":
		ev = loaded{named(), id, Info{}, failure}
	case "unload":
		ev = drain{c, one, false}
	case "settle":
		ev = drain{c, one, true}
	case "unloaded":
		ev = unloaded{id, nil}
	case "stuck":
		ev = unloaded{id, failure}
	case "stop":
		ev = stop{}
	case "look":
		s.info = s.core.current[one].info
		return ""
	case "arrive":
		r := &request{id: one, info: s.info, size: 1, rows: 1, alone: true}
		if v := s.core.current[one]; v != nil && r.info == nil {
			r.info = v.info
		}
		ev = arrive{r}
	case "finish":
		for _, r := range s.runs {
			if r.version.id == id {
				r.outcome.Outputs = make([][]tensor.Tensor, len(r.requests))
				ev = finish{r}
			}
		}
	}
	var got []string
	add := func(what string, err error) {
		if err != nil {
			what += ": " + strings.TrimPrefix(err.Error(), "digits:1: ")
		}
		got = append(got, what)
	}
	effects := slices.Clone(s.core.step(ev, start))
	for i := 0; i < len(effects); i++ {
		switch f := effects[i].(type) {
		case startActivate:
			effects = append(effects, s.core.step(activated{f.version, Need{}, 0, nil}, start)...)
		case answer:
			add("answer", f.request.err)
		case startRun:
			s.runs = append(s.runs, f.run)
			add(fmt.Sprint("run ", f.run.version.id.Generation), nil)
		case startUnload:
			add(fmt.Sprint("unload ", f.version.id.Generation), nil)
		case interrupt:
			add("interrupt", nil)
		case reply:
			name := s.calls[f.call]
			if _, ok := ev.(claim); ok && f.err == nil {
				name += fmt.Sprint(": ", f.id.Generation)
			}
			add("reply "+name, f.err)
		case publish:
			add(map[bool]string{true: "publish", false: "withdraw"}[f.info != nil], nil)
		}
	}
	return strings.Join(got, ", ")
}

// TestReplace replaces a version while one request runs on it and another one
// waits: they are answered by the old one, those that come later by the new
// one, and none is refused.
func TestReplace(t *testing.T) {
	r := &runtime{}
	bubble(t, r, oneByOne, func(t *testing.T, e *Engine) {
		infer := func(wg *sync.WaitGroup, rows int, after time.Duration) {
			began := time.Now()
			wg.Go(func() {
				res, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
				if err != nil || res.Rows != rows || time.Since(began) != after {
					t.Errorf("after %v: %+v, %v", time.Since(began), res, err)
				}
				res.Release()
			})
			synctest.Wait()
		}
		began := time.Now()
		s := Spec{ID: one, Entry: "new", Options: &serving.Options{MaxBatchSize: 8, Queue: serving.QueuePolicy{MaxSize: 8}}}
		var wg, old sync.WaitGroup
		wg.Go(func() {
			info, err := e.Replace(t.Context(), s)
			if err != nil || info.ID != (VersionID{"digits", 1, 1}) || info.Options.MaxBatchSize != 8 || time.Since(began) != 3900*time.Millisecond {
				t.Errorf("after %v: %+v, %v", time.Since(began), info, err)
			}
		})
		time.Sleep(900 * time.Millisecond)
		infer(&old, 1, time.Second)
		infer(&old, 1, 2*time.Second)
		if s := e.Versions(); len(s) != 1 || s[0].Running != 1 || s[0].Queued != 1 {
			t.Errorf("%+v", s)
		}
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		infer(&wg, 3, time.Second) // the rows of its batch are 3
		now, _ := e.Info(one)
		if s := e.Versions(); len(s) != 1 || s[0].ID != one || s[0].Running != 1 || s[0].Queued != 0 || s[0].Draining || !reflect.DeepEqual(s[0].Info, now) {
			t.Errorf("%+v", s)
		}
		old.Wait()
		wg.Wait()
		if s := e.Versions(); len(s) != 1 || s[0].Figures.Success.Count != 1 || s[0].Figures.Inferences != 3 {
			t.Errorf("%+v", s)
		}
		if _, err := e.Load(t.Context(), s); err != nil || r.loads.Load() != 2 || r.unloads.Load() != 1 {
			t.Errorf("%v, %d loads, %d unloads", err, r.loads.Load(), r.unloads.Load())
		}
		if ids := r.held(); !reflect.DeepEqual(ids, []VersionID{{"digits", 1, 1}}) {
			t.Errorf("the runtime holds %v", ids)
		}
	})
}

// A Replace that fails leaves the old one as it was, with its figures.
func TestReplaceFails(t *testing.T) {
	r := &runtime{}
	bubble(t, r, nil, func(t *testing.T, e *Engine) {
		infer := func() {
			t.Helper()
			res, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
			if err != nil {
				t.Error(err)
			}
			res.Release()
		}
		infer()
		short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		for want, replace := range map[string]func() (Info, error){
			"replace digits:1: bad model": func() (Info, error) { return e.Replace(t.Context(), Spec{ID: one, Entry: "bad"}) },
			"replace digits:1: options: instances is 65, allowed are 0 to 64": func() (Info, error) {
				return e.Replace(t.Context(), Spec{ID: one, Options: &serving.Options{Instances: 65}})
			},
			"replace digits:1: context deadline exceeded": func() (Info, error) { return e.Replace(short, Spec{ID: one, Entry: "new"}) },
		} {
			before, _ := e.Info(one)
			if _, err := replace(); err == nil || err.Error() != want {
				t.Errorf("%v instead of %s", err, want)
			}
			after, _ := e.Info(one)
			if s := e.Versions(); len(s) != 1 || s[0].Draining || s[0].Figures.Success.Count == 0 || !reflect.DeepEqual(before, after) {
				t.Errorf("%+v", s)
			}
			infer()
		}
		if _, err := e.Load(t.Context(), Spec{ID: one}); err != nil || r.unloads.Load() != 0 {
			t.Errorf("%v, %d unloads", err, r.unloads.Load())
		}
		if ids := r.held(); !reflect.DeepEqual(ids, []VersionID{one}) {
			t.Errorf("the runtime holds %v", ids)
		}
		two := VersionID{Model: "digits", Version: 2}
		if info, err := e.Replace(t.Context(), Spec{ID: two}); err != nil || info.ID != two {
			t.Errorf("of nothing: %+v, %v", info, err)
		}
	})
}

// An old one that cannot be unloaded, or not before the caller leaves, is
// unloaded by the next Replace or Unload.
func TestReplacedStays(t *testing.T) {
	var log bytes.Buffer
	r := &runtime{}
	bubble(t, r, nil, func(t *testing.T, e *Engine) {
		e.log = slog.New(slog.NewTextHandler(&log, nil))
		replace := func(ctx context.Context) {
			t.Helper()
			if _, err := e.Replace(ctx, Spec{ID: one}); err != nil {
				t.Error(err)
			}
		}
		r.keeps = errors.New("no answer")
		replace(t.Context())
		if n := strings.Count(log.String(), "is not unloaded yet"); n != 1 || len(r.held()) != 2 {
			t.Errorf("%d lines, the runtime holds %v", n, r.held())
		}
		res, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
		if err != nil {
			t.Error(err)
		}
		res.Release()
		r.keeps = nil
		short, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		replace(short) // loads in a second, and unloads in another one
		if n := strings.Count(log.String(), "is not unloaded yet"); n != 2 {
			t.Errorf("%d lines", n)
		}
		time.Sleep(time.Second)
		if ids := r.held(); !reflect.DeepEqual(ids, []VersionID{{"digits", 1, 2}}) {
			t.Errorf("the runtime holds %v", ids)
		}
		r.keeps = errors.New("no answer")
		replace(t.Context())
		r.keeps = nil
		if err := e.Unload(t.Context(), one); err != nil || len(r.held()) != 0 {
			t.Errorf("%v, the runtime holds %v", err, r.held())
		}
		if info, err := e.Load(t.Context(), Spec{ID: one}); err != nil || info.ID != one {
			t.Errorf("loaded again: %+v, %v", info, err)
		}
	})
}

// TestReplaceUnderLoad replaces a version again and again, in real time, by
// ones that take other inputs and have other priorities: each request is
// answered or, where it does not fit, refused for that.
func TestReplaceUnderLoad(t *testing.T) {
	var given, back atomic.Int64
	e := New(Config{Runtime: echo{given: &given, back: &back}})
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	specs := []Spec{
		{ID: one, Options: &serving.Options{PriorityLevels: 8, DefaultPriority: 8, Queue: serving.QueuePolicy{MaxSize: 8}}},
		{ID: one, Options: &serving.Options{MaxBatchSize: 8, DynamicBatching: true, Instances: 2, Queue: serving.QueuePolicy{MaxSize: 8}}},
	}
	if _, err := e.Load(ctx, specs[0]); err != nil {
		t.Fatal(err)
	}
	var answered atomic.Int64
	var clients sync.WaitGroup
	done := make(chan struct{})
	for n := range byte(4) {
		clients.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				res, err := e.Infer(ctx, one, Request{Inputs: marked(n)})
				if err != nil || res.Outputs[0].Data[0] != n {
					t.Errorf("%+v, %v", res, err)
					return
				}
				res.Release()
				answered.Add(1)
			}
		})
	}
	for n := range 300 {
		if _, err := e.Replace(ctx, specs[n%2]); err != nil {
			t.Error(err)
		}
	}
	close(done)
	clients.Wait()
	if err := e.Unload(ctx, one); err != nil {
		t.Error(err)
	}
	stop()
	running.Wait()
	if given.Load() != back.Load() || answered.Load() < 300 {
		t.Errorf("%d of %d outcomes were released; %d answered", back.Load(), given.Load(), answered.Load())
	}
}
