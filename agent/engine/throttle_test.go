package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

func TestThrottleCheck(t *testing.T) {
	for _, ok := range []Throttle{{}, {Duty: 1}, {Duty: leastDuty, MaxBatch: 1, Cordon: true}} {
		if err := ok.Check(); err != nil {
			t.Errorf("%+v: %v", ok, err)
		}
	}
	for want, bad := range map[string]Throttle{
		"maxBatch is -1": {MaxBatch: -1}, "maxBatch is 65537": {MaxBatch: serving.MaxBatchSize + 1},
		"duty is -0.5": {Duty: -0.5}, "duty is 1.5": {Duty: 1.5}, "duty is 0.001": {Duty: 0.001},
	} {
		if err := bad.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, expected %q", bad, err, want)
		}
	}
}

// meter watches the rows of runs of a simulation.
type meter struct {
	running     int
	began       time.Duration
	first, last time.Duration // begin of the first row, end of the last one
	busy        time.Duration
	waited      map[*version]bool // when the row began
	ran         map[*version]int
}

// watch has a meter watch; rows that break a rule are faults.
func watch(s *simulation, fault func(format string, args ...any)) *meter {
	m := &meter{first: -1, ran: map[*version]int{}}
	s.started = func(r *run) {
		p := &s.core.pace
		if m.running++; m.running == 1 {
			m.began, m.waited = s.now, map[*version]bool{}
			if m.first < 0 {
				m.first = s.now
			}
			for _, v := range s.core.versions {
				if q := v.queue.first(); v == r.version || q != nil && q.arrived < s.now {
					m.waited[v] = true
				}
			}
		}
		delete(m.waited, r.version)
		m.ran[r.version]++
		if p.MaxBatch > 0 && len(r.requests) > 1 && r.rows > p.MaxBatch {
			fault("a run of %d requests has %d rows, %d are allowed", len(r.requests), r.rows, p.MaxBatch)
		}
	}
	takes := s.takes
	s.takes = func(r *run) time.Duration { return max(takes(r), time.Microsecond) }
	s.ends = func(*run) error {
		if m.running--; m.running == 0 {
			m.busy += s.now - m.began
			m.last = s.now
			for v := range m.waited {
				fault("%s waited when a row of runs began at %v, and was not let in", v.id, m.began)
			}
		}
		return nil
	}
	return m
}

// TestDuty has models with runs of different lengths, and more requests than
// they can do, keep to the duty, and use it; all of them get their turn, and
// each request one answer.
func TestDuty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 7))
		s := &simulation{core: newCore(start)}
		models := rapid.IntRange(1, 4).Draw(t, "models")
		lengths := map[VersionID]float64{}
		jitter := rapid.SampledFrom([]float64{0, 0.1, 0.5}).Draw(t, "jitter")
		s.takes = func(r *run) time.Duration {
			return time.Duration(lengths[r.version.id] * (1 + jitter*random.Float64()) * float64(ms))
		}
		var ids []VersionID
		for i := range models {
			id := VersionID{Model: fmt.Sprintf("m%d", i), Version: 1}
			ids = append(ids, id)
			lengths[id] = rapid.SampledFrom([]float64{1, 5, 30, 200}).Draw(t, "ms")
			s.add(id, serving.Options{
				MaxBatchSize: 8, DynamicBatching: rapid.Bool().Draw(t, "batches"),
				Instances: rapid.IntRange(1, 3).Draw(t, "instances"),
			}, Need{})
		}
		throttle := Throttle{Duty: rapid.Float64Range(0.05, 0.95).Draw(t, "duty"), MaxBatch: rapid.IntRange(0, 4).Draw(t, "most")}
		s.step(setThrottle{throttle})
		m := watch(s, t.Fatalf)
		answers := map[*request]int{}
		s.answered = func(r *request) {
			if answers[r]++; answers[r] > 1 || r.err != nil {
				t.Fatalf("answer %d: %v", answers[r], r.err)
			}
		}
		// They come within the time of two short runs, which is less than the
		// fastest of these, three instances that take eight at a time, needs
		// for them.
		const n = 200 // for each model
		within := int64(2 * slices.Min(slices.Collect(maps.Values(lengths))) * float64(ms))
		for _, id := range ids {
			for range n {
				s.arrive(time.Duration(random.Int64N(within)), &request{
					id: id, rows: 1, size: 100, inputs: []tensor.Tensor{{Shape: []int64{1, 100}}},
				})
			}
		}
		s.run(24 * time.Hour)
		if len(answers) != n*models {
			t.Fatalf("%d of %d requests have an answer", len(answers), n*models)
		}
		// The first rows and the last ones may be short of requests, and the
		// last has no pause behind it.
		span := m.last - m.first + s.core.pace.rest(m.last-m.began)
		share := m.busy.Seconds() / span.Seconds()
		if share > throttle.Duty+1e-6 || share < 0.9*throttle.Duty {
			t.Fatalf("runs went on for %.4f of the time, the duty is %.4f", share, throttle.Duty)
		}
	})
}

// A short model beside a long one has its share of what the duty leaves.
func TestDutyIsFair(t *testing.T) {
	runs := func(duty float64) (short, long int) {
		s := &simulation{core: newCore(start)}
		ids := []VersionID{{Model: "short", Version: 1}, {Model: "long", Version: 1}}
		s.takes = func(r *run) time.Duration {
			if r.version.id == ids[0] {
				return 5 * ms
			}
			return 50 * ms
		}
		for _, id := range ids {
			s.add(id, serving.Options{Queue: serving.QueuePolicy{MaxSize: 60000}}, Need{})
		}
		s.step(setThrottle{Throttle{Duty: duty}})
		m := watch(s, t.Errorf)
		for i := range 50_000 {
			for _, id := range ids {
				s.arrive(time.Duration(i), &request{id: id, rows: 1, size: 100, alone: true})
			}
		}
		s.run(20 * time.Second)
		return m.ran[s.core.current[ids[0]]], m.ran[s.core.current[ids[1]]]
	}
	short, long := runs(1)
	halfShort, halfLong := runs(0.5)
	t.Logf("unthrottled %d and %d runs, at half duty %d and %d", short, long, halfShort, halfLong)
	for name, share := range map[string]float64{"short": float64(halfShort) / float64(short), "long": float64(halfLong) / float64(long)} {
		if share < 0.4 || share > 0.55 {
			t.Errorf("the %s one runs %.2f times as often at half duty", name, share)
		}
	}
}

// Deadlines are kept under a duty: what cannot be in time because of the pauses
// is refused when it comes.
func TestDutyAndDeadlines(t *testing.T) {
	for _, o := range []serving.Options{{}, {MaxBatchSize: 16, DynamicBatching: true}} {
		for seed := range uint64(3) {
			random := rand.New(rand.NewPCG(seed, 8))
			s := newSimulation(t, o, func(r *run) time.Duration {
				return time.Duration((2 + 20*float64(r.rows)) * (1 + 0.05*random.NormFloat64()) * 1e6)
			})
			s.step(setThrottle{Throttle{Duty: 0.5, MaxBatch: 4}})
			const capacity = 0.5 / 0.0205 // rows in a second, in runs of four
			l := offer(s, random, 3*capacity, time.Second, 30*time.Second)
			goodput := float64(l.good) / (capacity * 30)
			t.Logf("seed %d: goodput %.3f, %+v", seed, goodput, *l)
			if goodput < 0.8 || float64(l.missed) > 0.01*float64(l.good) || float64(l.late) > 0.03*float64(l.refused) {
				t.Errorf("seed %d: goodput %.3f, %+v", seed, goodput, *l)
			}
		}
	}
}

// During a pause a request that cannot wait for its end is refused with the
// time that is left of it. When the throttle is taken back, all goes on at once.
func TestPause(t *testing.T) {
	s := newSimulation(t, serving.Options{}, func(*run) time.Duration { return 100 * ms })
	for i := range 6 { // so that run times are known
		s.arrive(time.Duration(i)*time.Second, &request{id: one, rows: 1, size: 100, alone: true})
	}
	s.run(6 * time.Second)
	s.step(setThrottle{Throttle{Duty: 0.1}})
	s.arrive(7*time.Second, &request{id: one, rows: 1, size: 100, alone: true}) // until 7.1; the pause until 8
	soon := &request{id: one, rows: 1, size: 100, alone: true, deadline: start.Add(7*time.Second + 400*ms)}
	s.arrive(7*time.Second+200*ms, soon)
	waits := &request{id: one, rows: 1, size: 100, alone: true, deadline: start.Add(12 * time.Second)}
	s.arrive(7*time.Second+200*ms, waits)
	s.run(7*time.Second + 300*ms)
	if refused, ok := errors.AsType[*RefusedError](soon.err); !ok || !errors.Is(soon.err, ErrExpired) || refused.RetryAfter < 700*ms || refused.RetryAfter > 2*time.Second {
		t.Errorf("a request that would have to wait for 0.8 s and has 0.2: %v, %+v", soon.err, refused)
	}
	if waits.state != waiting {
		t.Fatalf("one that can wait does not: %v", waits.err)
	}
	if err := s.core.versions[one].stuck(s.now); err != nil {
		t.Errorf("a pause counts as no progress: %v", err)
	}
	s.step(setThrottle{})
	s.run(7*time.Second + 400*ms)
	if waits.state != answered || waits.err != nil {
		t.Errorf("the throttle is taken back, and it is not answered: %v", waits.err)
	}
}

// A cordon refuses what comes, answers what has come, and is seen.
func TestCordon(t *testing.T) {
	bubble(t, new(runtime), oneByOne, func(t *testing.T, e *Engine) {
		answer := make(chan error)
		for range 2 {
			go func() {
				r, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
				r.Release()
				answer <- err
			}()
		}
		synctest.Wait()
		if err := e.Throttle(t.Context(), Throttle{Cordon: true, Duty: 0.05}); err != nil {
			t.Fatal(err)
		}
		if err := e.Admits(); !errors.Is(err, ErrCordoned) || !e.Throttled().Cordon {
			t.Errorf("cordoned, and it admits: %v", err)
		}
		_, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
		if refused, ok := errors.AsType[*RefusedError](err); !ok || !errors.Is(err, ErrCordoned) || refused.RetryAfter != retryCordoned {
			t.Errorf("a request that comes: %v", err)
		}
		began := time.Now()
		for range 2 {
			if err := <-answer; err != nil {
				t.Errorf("a request that had come: %v", err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := e.Health(ctx); err != nil {
				t.Errorf("a pause counts as no progress: %v", err)
			}
			cancel()
		}
		if took := time.Since(began); took != 21*time.Second {
			t.Errorf("two runs of a second, and the pause of 19 between them, took %v", took)
		}
		if err := e.Throttle(t.Context(), Throttle{Duty: 2}); err == nil || !strings.Contains(err.Error(), "duty is 2") {
			t.Errorf("a duty of 2: %v", err)
		}
		if err := e.Throttle(t.Context(), Throttle{}); err != nil || e.Admits() != nil {
			t.Errorf("taken back: %v, %v", err, e.Admits())
		}
		began = time.Now()
		r, err := e.Infer(t.Context(), one, Request{Inputs: request1()})
		if r.Release(); err != nil || time.Since(began) != time.Second {
			t.Errorf("taken back, a request took %v: %v", time.Since(began), err)
		}
		if n := e.Versions()[0].Figures.Refused; n != 1 {
			t.Errorf("%d refusals are counted", n)
		}
	})
}
