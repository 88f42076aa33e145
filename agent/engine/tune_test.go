package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// latency is a run time of fixed milliseconds, and each for a row.
func latency(fixed, each float64) estimate.Latency {
	var points []estimate.Point
	for _, rows := range []int{1, 2, 4, 8, 16} {
		points = append(points, estimate.Point{Rows: rows, Seconds: (fixed + each*float64(rows)) / 1000})
	}
	return estimate.FitLatency(points)
}

// An operator's word wins over what was measured, for each field.
func TestTunedOptions(t *testing.T) {
	for name, tt := range map[string]struct {
		asked              *serving.Options
		batch              bool
		tuning             Tuning
		batches, instances int
	}{
		"nothing was measured":          {nil, true, Tuning{}, serving.DefaultBatchSize, 1},
		"nobody has chosen":             {nil, true, Tuning{MaxBatchSize: 4, Instances: 2}, 4, 2},
		"more than automatic":           {nil, true, Tuning{MaxBatchSize: 64}, 64, 1},
		"the graph does not batch":      {nil, false, Tuning{MaxBatchSize: 4, Instances: 2}, 0, 2},
		"an operator has chosen both":   {&serving.Options{MaxBatchSize: 8, Instances: 3}, true, Tuning{MaxBatchSize: 4, Instances: 2}, 8, 3},
		"an operator wants no batches":  {&serving.Options{}, true, Tuning{MaxBatchSize: 4, Instances: 2}, 0, 2},
		"an operator leaves that open":  {&serving.Options{MaxBatchSize: 8}, true, Tuning{MaxBatchSize: 4, Instances: 2}, 8, 2},
		"an operator wants one at once": {&serving.Options{MaxBatchSize: 8, Instances: 1}, true, Tuning{Instances: 2}, 8, 1},
	} {
		o := tt.tuning.options(tt.asked, resolve(tt.asked, tt.batch))
		if o.MaxBatchSize != tt.batches || o.Instances != tt.instances {
			t.Errorf("%s: batches of %d and %d at a time, expected %d and %d", name, o.MaxBatchSize, o.Instances, tt.batches, tt.instances)
		}
	}
	for want, tuning := range map[string]Tuning{
		"maxBatchSize is -1":     {MaxBatchSize: -1},
		"maxBatchSize is 65537":  {MaxBatchSize: serving.MaxBatchSize + 1},
		"instances is 65":        {Instances: serving.MaxInstances + 1},
		"threads is 257":         {Threads: MaxThreads + 1},
		"rowBytes is -1":         {RowBytes: -1},
		"instances is -1, allow": {MaxBatchSize: 4, Instances: -1},
	} {
		if err := tuning.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, expected %q", tuning, err, want)
		}
	}
}

func TestRowBytes(t *testing.T) {
	in := func(typ tensor.Type, shape ...int64) tensor.Info {
		return tensor.Info{Name: "x", Type: typ, Shape: shape}
	}
	for name, tt := range map[string]struct {
		inputs []tensor.Info
		want   int64
	}{
		"images":         {[]tensor.Info{in(tensor.Float32, -1, 3, 224, 224)}, 4 * 3 * 224 * 224},
		"two":            {[]tensor.Info{in(tensor.Float32, -1, 8), in(tensor.Uint8, -1, 2)}, 34},
		"no batch":       {[]tensor.Info{in(tensor.Float32, 2, 8)}, 64},
		"a scalar":       {[]tensor.Info{{Name: "x", Type: tensor.Int64, Shape: []int64{}}}, 8},
		"open":           {[]tensor.Info{in(tensor.Float32, -1, 3, -1, -1)}, 0},
		"open by rank":   {[]tensor.Info{{Name: "x", Type: tensor.Float32}}, 0},
		"strings":        {[]tensor.Info{in(tensor.String, -1, 3)}, 0},
		"one of them":    {[]tensor.Info{in(tensor.Float32, -1, 8), in(tensor.String, -1, 3)}, 0},
		"too many":       {[]tensor.Info{in(tensor.Float32, -1, 1<<40, 1<<40)}, 0},
		"nothing":        {[]tensor.Info{in(tensor.Float32, -1, 0)}, 0},
		"without inputs": {nil, 0},
	} {
		if got := rowBytes(&Info{Inputs: tt.inputs}); got != tt.want {
			t.Errorf("%s: %d bytes, expected %d", name, got, tt.want)
		}
	}
}

// Tune changes what Info says while requests wait, and none is refused for it.
// Load is content with a version that is tuned otherwise.
func TestTune(t *testing.T) { synctest.Test(t, testTune) }

func testTune(t *testing.T) {
	e := New(Config{Runtime: &runtime{batch: true}})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- e.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	spec := Spec{ID: one, Tuning: Tuning{MaxBatchSize: 3}}
	info, err := e.Load(ctx, spec)
	if err != nil || info.Options.MaxBatchSize != 3 {
		t.Fatalf("batches of %d, %v", info.Options.MaxBatchSize, err)
	}
	if published, _ := e.Info(one); published.Options.MaxBatchSize != 3 {
		t.Errorf("batches of %d, by its Info", published.Options.MaxBatchSize)
	}
	const clients = 20
	answers := make(chan error, clients)
	for i := range clients {
		go func() {
			_, err := e.Infer(ctx, one, Request{Inputs: marked(byte(i))})
			answers <- err
		}()
		if i%5 == 4 {
			if err := e.Tune(ctx, one, Tuning{MaxBatchSize: i, Instances: 1 + i%3}); err != nil {
				t.Error(err)
			}
			if info, _ := e.Info(one); info.Options.MaxBatchSize != i || info.Options.Instances != 1+i%3 {
				t.Errorf("after it was tuned: %+v", info.Options)
			}
		}
	}
	for range clients {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	spec.Tuning = Tuning{}
	if info, err := e.Load(ctx, spec); err != nil || info.Options.MaxBatchSize != 19 {
		t.Errorf("loaded again: batches of %d, %v", info.Options.MaxBatchSize, err)
	}
	spec.Tuning.Threads = -1
	if _, err := e.Load(ctx, spec); err == nil || !strings.Contains(err.Error(), "threads is -1") {
		t.Errorf("with a tuning that cannot be: %v", err)
	}
	if err := e.Tune(ctx, VersionID{Model: "none", Version: 1}, Tuning{}); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("of what is not there: %v", err)
	}
}

// What was measured with other instances than an operator asks for says nothing
// of threads and times, whether a version is loaded with it or given it.
func TestTuneSuits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Runtime: &runtime{batch: true}})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		defer func() { stop(); <-done }()
		for i, asked := range []int{1, 8, 0} {
			for _, loaded := range []bool{true, false} {
				s, tuning, want := Spec{ID: VersionID{Model: "m", Version: int64(1 + i)}}, Tuning{Instances: 8, Threads: 1}, 1
				if asked > 0 {
					s.Options = &serving.Options{MaxBatchSize: 8, Instances: asked}
				}
				if asked == 1 {
					want = 0
				}
				if loaded {
					s.Tuning = tuning
				}
				if _, err := e.Load(ctx, s); err != nil {
					t.Fatal(err)
				}
				if !loaded {
					if err := e.Tune(ctx, s.ID, tuning); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(time.Second)
				if v := e.Versions()[0]; v.Setting.Threads != want || v.Info.Options.Instances != max(asked, 1) && v.Info.Options.Instances != 8 {
					t.Errorf("%d instances asked for, loaded with it %v: %d instances with %d threads, want %d", asked, loaded, v.Info.Options.Instances, v.Setting.Threads, want)
				}
				if err := e.Unload(ctx, s.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// What was measured of a version is not given to the one that took its place.
func TestTuneGeneration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Runtime: &runtime{batch: true}})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		defer func() { stop(); <-done }()
		if _, err := e.Load(ctx, Spec{ID: one}); err != nil {
			t.Fatal(err)
		}
		old, err := e.Replace(ctx, Spec{ID: one, Entry: "new"})
		if err != nil || old.ID.Generation == 0 {
			t.Fatalf("generation %d, %v", old.ID.Generation, err)
		}
		if err := e.Tune(ctx, old.ID, Tuning{MaxBatchSize: 2}); err != nil {
			t.Error(err)
		}
		if info, _ := e.Info(one); info.ID != old.ID || info.Options.MaxBatchSize != 2 {
			t.Errorf("of its generation: %+v", info)
		}
		if _, err := e.Replace(ctx, Spec{ID: one}); err != nil {
			t.Fatal(err)
		}
		if err := e.Tune(ctx, old.ID, Tuning{MaxBatchSize: 3}); !errors.Is(err, ErrNotLoaded) {
			t.Errorf("of the one before: %v", err)
		}
		if info, _ := e.Info(one); info.Options.MaxBatchSize == 3 {
			t.Errorf("the one before: %+v", info)
		}
		if err := e.Tune(ctx, one, Tuning{MaxBatchSize: 4}); err != nil {
			t.Error(err)
		}
	})
}

// pixels is a request of one row of an image, with a deadline.
func pixels(deadline time.Duration) *request {
	return &request{id: one, rows: 1, size: 1 + 4*1000, inputs: []tensor.Tensor{{Shape: []int64{1, 1000}}}, deadline: start.Add(deadline)}
}

// tuned gives a simulation in which version one was measured before it is
// loaded.
func tuned(t *testing.T, o serving.Options, tuning Tuning, takes func(*run) time.Duration) *simulation {
	s := &simulation{core: newCore(start), takes: takes}
	s.step(claim{newCall(), Spec{ID: one, Tuning: tuning}, false})
	inputs := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 1000}}}
	s.step(loaded{newCall(), one, Info{Inputs: inputs, Options: resolve(&o, false)}, nil})
	return s
}

// What was measured before tells from the first request on which deadlines
// cannot be met. Where it is wrong, a request is let through after a while.
func TestDeadlineOfTheFirstRequest(t *testing.T) {
	after := func(s *simulation, at, deadline time.Duration) (refused bool, hint time.Duration) {
		r := pixels(at + deadline)
		s.arrive(at, r)
		s.run(at + time.Second)
		if r.state != answered {
			t.Fatal("it is not answered")
		}
		refusal, ok := errors.AsType[*RefusedError](r.err)
		if ok && !errors.Is(r.err, ErrExpired) {
			t.Error(r.err)
		}
		if ok {
			hint = refusal.RetryAfter
		}
		return ok, hint
	}
	takes := func(*run) time.Duration { return 40 * ms }
	untold := newSimulation(t, serving.Options{}, takes)
	if refused, _ := after(untold, 0, 20*ms); refused {
		t.Error("without a measurement, a deadline was judged")
	}
	for _, load := range []time.Duration{0, 5 * time.Minute} { // whenever the first request comes
		s := tuned(t, serving.Options{}, Tuning{Latency: latency(30, 10)}, takes)
		if refused, hint := after(s, load, 20*ms); !refused || hint != 0 {
			t.Errorf("a deadline that cannot be met: refused %v, to be tried again after %v", refused, hint)
		}
		if refused, _ := after(s, load+time.Second, 60*ms); refused {
			t.Error("a deadline that can be met was refused")
		}
	}
	// It runs four times as fast as when it was measured.
	s := tuned(t, serving.Options{}, Tuning{Latency: latency(30, 10)}, func(*run) time.Duration { return 10 * ms })
	through := 0
	for i := range 20 {
		if refused, _ := after(s, time.Duration(i)*time.Second, 20*ms); !refused {
			through++
		}
	}
	if through == 0 || through > 9 {
		t.Errorf("%d of 20 requests a second apart got through", through)
	}
	if mean := s.core.current[one].predict.mean(4001); mean > 20*ms {
		t.Errorf("then a run is expected to take %v", mean)
	}
}

// Several wait at once before anything has run: those that cannot be in time
// are refused when they come.
func TestQueueBeforeTheFirstRun(t *testing.T) {
	s := tuned(t, serving.Options{}, Tuning{Latency: latency(30, 10)}, func(*run) time.Duration { return 40 * ms })
	late, refused, good := 0, 0, 0
	s.answered = func(r *request) {
		switch {
		case r.err == nil && s.now <= r.due:
			good++
		case r.err != nil && s.now == r.arrived:
			refused++
		default:
			late++
		}
	}
	for i := range 10 {
		s.arrive(time.Duration(i)*time.Microsecond, pixels(130*ms))
	}
	s.run(time.Second)
	if good != 2 || refused != 8 || late != 0 {
		t.Errorf("%d in time, %d refused at once, %d late", good, refused, late)
	}
}

// Real runs win over what was measured, after a few, whether the measurement
// was too high or too low, and of sizes that have not run yet too.
func TestPriorGivesWay(t *testing.T) {
	const row = 4000
	for _, factor := range []float64{0.1, 0.5, 1, 2, 10} {
		for seed := range uint64(5) {
			random := rand.New(rand.NewPCG(seed, 3))
			var points []sample
			for _, p := range latency(30*factor, 2*factor).Points() {
				points = append(points, sample{float64(p.Rows*row + 1), p.Seconds})
			}
			var p predictor
			p.expect(points)
			check := func(when string, rows int, tolerance float64, times float64) {
				t.Helper()
				want := (30 + 2*float64(rows)) / 1000 * times
				if got := p.mean(int64(rows*row + 1)).Seconds(); got < want*(1-tolerance) || got > want*(1+tolerance) {
					t.Errorf("%g times too high, seed %d, %s: %d rows are expected to take %.4f s instead of %.4f", factor, seed, when, rows, got, want)
				}
			}
			check("before", 1, 0.1, factor)
			check("before", 16, 0.1, factor)
			// The first is cold, and alone says nothing.
			p.observe(row+1, time.Second, 0)
			check("one cold run", 1, 0.15, factor)
			for i := range 5 {
				p.observe(row+1, time.Duration(32e6*(0.95+0.1*random.Float64())), moment(i))
			}
			check("six runs", 1, 0.25, 1)
			check("six runs", 16, 0.25, 1)
			for i := range 40 {
				p.observe(row+1, time.Duration(32e6*(0.95+0.1*random.Float64())), moment(i))
			}
			check("many runs", 1, 0.06, 1)
			check("many runs", 16, 0.25, 1)
			for i := range 64 {
				rows := 1 + i%16
				p.observe(int64(rows*row+1), time.Duration((30+2*float64(rows))*1e6), moment(i))
			}
			check("of all sizes", 1, 0.02, 1)
			check("of all sizes", 16, 0.02, 1)
			// What is measured then changes nothing.
			p.expect(points)
			check("measured again", 8, 0.02, 1)
		}
	}
	var p predictor
	p.expect([]sample{{100, 1}})
	p.expect(nil)
	if p.known() || p.mean(100) != 0 {
		t.Errorf("nothing is measured any more, and a run takes %v", p.mean(100))
	}
}

// A setting is applied when the version comes in, or beside the one that it
// has; what the runtime refuses is not tried again until something else is
// measured.
func TestSettings(t *testing.T) {
	need := func(int) Need { return Need{Weights: 100, Session: 10, Workspace: 10, Mapped: true} }
	c := newCrowd(t, 1, 380, need, time.Millisecond, quick)
	var did []string
	c.moved = func(f effect) {
		switch f := f.(type) {
		case startActivate:
			did = append(did, fmt.Sprintf("activate %d", f.set.Threads))
		case startSet:
			did = append(did, fmt.Sprintf("set %d %v", f.set.Threads, f.set.Prepack))
		}
	}
	until := time.Duration(0)
	after := func(tuning *Tuning, want string) {
		t.Helper()
		if tuning != nil {
			call := newCall()
			c.at(until, func() event { return tune{call, c.ids[0], *tuning} })
		}
		for range 4 {
			until += time.Second
			c.ask(until, 0)
		}
		until += time.Second
		c.run(until)
		if got := strings.Join(did, ", "); got != want {
			t.Errorf("%+v: %s; expected: %s", tuning, got, want)
		}
		did = nil
	}
	yes, no := true, false
	after(nil, "")
	after(&Tuning{Threads: 2}, "set 2 false")
	after(&Tuning{Threads: 2, MaxBatchSize: 4}, "")
	after(&Tuning{Threads: 1, Prepack: &yes}, "set 1 true")
	after(&Tuning{Threads: 1, Prepack: &no}, "set 1 false")
	c.refuses = errBad
	after(&Tuning{Threads: 3}, "set 3 false")
	if set := c.version(0).home.set; set != (Setting{Threads: 1}) {
		t.Errorf("after a change that failed it is %+v", set)
	}
	c.refuses = nil
	after(nil, "")
	after(&Tuning{Threads: 3}, "set 3 false")
	c.step(setMemory{110}) // there is no room beside the session, and it goes on as it is
	after(&Tuning{Threads: 4, Prepack: &yes}, "")
	c.step(setMemory{60})
	after(nil, "")
	c.step(setMemory{1000})
	after(nil, "activate 4, set 4 true")
	if v := c.version(0); v.home.charged != 210 || v.home.set != (Setting{Threads: 4, Prepack: true}) {
		t.Errorf("charged %d bytes for %+v", v.home.charged, v.home.set)
	}
}
