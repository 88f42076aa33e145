package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

const ms = time.Millisecond

// arrival is a request of a script: when it comes, in milliseconds, and what
// it is.
type arrival struct {
	at       int
	rows     int64
	width    int64
	priority int
	timeout  int
	deadline int
	leaves   int // when its caller gives it up
}

// script runs requests through a version whose runs each take 10 ms and 10 ms
// for each row, and gives what the requests' fate was, each as "start-end" in
// milliseconds or as its error, and the runs as "start: requests".
func script(t *testing.T, o serving.Options, known bool, arrivals ...arrival) (fates, runs []string) {
	t.Helper()
	s := newSimulation(t, o, func(r *run) time.Duration { return 10*ms + time.Duration(r.rows)*10*ms })
	v := s.core.versions[one]
	if known {
		train(v)
	}
	info := Info{Inputs: []tensor.Info{{Name: "x", Type: tensor.Uint8, Shape: []int64{-1, -1}}}, Options: v.info.Options}
	index := map[*request]int{}
	fates = make([]string, len(arrivals))
	for i, a := range arrivals {
		rows, width := max(a.rows, 1), 8+a.width
		r, err := info.request(one, Request{
			Inputs:   []tensor.Tensor{{Name: "x", Type: tensor.Uint8, Shape: []int64{rows, width}, Data: make([]byte, rows*width)}},
			Priority: a.priority, Timeout: time.Duration(a.timeout) * ms,
		})
		if err != nil {
			fates[i] = err.Error()
			continue
		}
		index[r] = i
		at := time.Duration(a.at) * ms
		if a.deadline > 0 {
			r.deadline = start.Add(at + time.Duration(a.deadline)*ms)
		}
		s.at(at, func() event { return arrive{r} })
		if a.leaves > 0 {
			s.at(time.Duration(a.leaves)*ms, func() event { return cancelled{r} })
		}
	}
	s.started = func(r *run) {
		var members []int
		for _, q := range r.requests {
			members = append(members, index[q])
		}
		runs = append(runs, fmt.Sprintf("%d: %v", r.started/ms, members))
	}
	s.answered = func(r *request) {
		if fates[index[r]] != "" {
			t.Errorf("request %d is answered twice", index[r])
		}
		if r.err != nil {
			fates[index[r]] = fmt.Sprintf("%d: %v", s.now/ms, r.err)
		} else {
			fates[index[r]] = fmt.Sprintf("%d-%d", r.run.started/ms, s.now/ms)
		}
	}
	s.run(time.Hour)
	return fates, runs
}

func TestPolicy(t *testing.T) {
	batching := func(change func(o *serving.Options)) serving.Options {
		o := serving.Options{MaxBatchSize: 4, DynamicBatching: true}
		change(&o)
		return o
	}
	for name, tt := range map[string]struct {
		options  serving.Options
		trained  bool // the estimates are known
		arrivals []arrival
		fates    []string
		runs     []string // not compared where nil
	}{
		"one at a time": {
			arrivals: []arrival{{}, {at: 1}, {at: 2}},
			fates:    []string{"0-20", "20-40", "40-60"},
		},
		"instances": {
			options:  serving.Options{Instances: 2},
			arrivals: []arrival{{}, {at: 1}, {at: 2}},
			fates:    []string{"0-20", "1-21", "20-40"},
		},
		"no delay: what is there": {
			options:  batching(func(*serving.Options) {}),
			arrivals: []arrival{{}, {at: 1}, {at: 2}, {at: 3}, {at: 4, rows: 2}, {at: 5}},
			fates:    []string{"0-20", "20-60", "20-60", "20-60", "60-100", "60-100"},
			runs:     []string{"0: [0]", "20: [1 2 3]", "60: [4 5]"}, // 3 + 2 rows would be one too many
		},
		"no batching": {
			options:  serving.Options{MaxBatchSize: 4},
			arrivals: []arrival{{}, {at: 1}, {at: 2}},
			runs:     []string{"0: [0]", "20: [1]", "40: [2]"},
			fates:    []string{"0-20", "20-40", "40-60"},
		},
		"shapes apart": {
			options:  batching(func(*serving.Options) {}),
			arrivals: []arrival{{}, {at: 1}, {at: 2, width: 1}, {at: 3}, {at: 4, width: 1}},
			runs:     []string{"0: [0]", "20: [1 3]", "50: [2 4]"},
			fates:    []string{"0-20", "20-50", "50-80", "20-50", "50-80"},
		},
		"more rows than a run has": {
			options:  batching(func(*serving.Options) {}),
			arrivals: []arrival{{}, {at: 1}, {at: 2, rows: 5}, {at: 3}},
			runs:     []string{"0: [0]", "20: [1 3]", "50: [2]"},
			fates:    []string{"0-20", "20-50", "50-110", "20-50"},
		},
		"more rows, strictly": {
			options:  batching(func(o *serving.Options) { o.Strict = true }),
			arrivals: []arrival{{rows: 5}, {rows: 4}},
			fates:    []string{`invalid input "x": has 5 rows, allowed are 4`, "0-50"},
		},
		"held until the oldest has waited": {
			options:  batching(func(o *serving.Options) { o.MaxQueueDelay = 15 * ms }),
			arrivals: []arrival{{}, {at: 10}, {at: 16}},
			runs:     []string{"15: [0 1]", "45: [2]"},
			fates:    []string{"15-45", "15-45", "45-65"},
		},
		"held until it is full": {
			options:  batching(func(o *serving.Options) { o.MaxQueueDelay = time.Second }),
			arrivals: []arrival{{}, {at: 1}, {at: 2}, {at: 3}},
			runs:     []string{"3: [0 1 2 3]"},
			fates:    []string{"3-53", "3-53", "3-53", "3-53"},
		},
		"held until nothing can join": {
			options:  batching(func(o *serving.Options) { o.MaxQueueDelay = 50 * ms }),
			arrivals: []arrival{{rows: 3}, {at: 1, rows: 2}},
			runs:     []string{"1: [0]", "51: [1]"},
			fates:    []string{"1-41", "51-81"},
		},
		"held until a preferred size": {
			options: batching(func(o *serving.Options) {
				o.MaxBatchSize, o.MaxQueueDelay, o.PreferredBatchSizes = 8, time.Second, []int{2, 4}
			}),
			arrivals: []arrival{{}, {at: 1}, {at: 2}, {at: 3}, {at: 4}, {at: 5}, {at: 6}, {at: 7}},
			runs:     []string{"1: [0 1]", "31: [2 3 4 5]", "81: [6 7]"},
			fates:    []string{"1-31", "1-31", "31-81", "31-81", "31-81", "31-81", "81-111", "81-111"},
		},
		"an overdue run takes all": {
			options: batching(func(o *serving.Options) {
				o.MaxBatchSize, o.MaxQueueDelay, o.PreferredBatchSizes = 8, 10*ms, []int{2}
			}),
			arrivals: []arrival{{rows: 2}, {at: 1}, {at: 2}, {at: 3}},
			runs:     []string{"0: [0]", "30: [1 2 3]"},
			fates:    []string{"0-30", "30-70", "30-70", "30-70"},
		},
		"a full queue is not held": {
			options:  batching(func(o *serving.Options) { o.MaxQueueDelay, o.Queue.MaxSize = time.Second, 2 }),
			arrivals: []arrival{{}, {at: 1}},
			runs:     []string{"1: [0 1]"},
			fates:    []string{"1-31", "1-31"},
		},
		"held until one must start": {
			options:  batching(func(o *serving.Options) { o.MaxQueueDelay = time.Second }),
			trained:  true,
			arrivals: []arrival{{}, {at: 10, deadline: 100}, {at: 90}},
			runs:     []string{"50: [0 1]", "1090: [2]"},
			fates:    []string{"50-80", "50-80", "1090-1110"},
		},
		"held until a time-out": {
			options: batching(func(o *serving.Options) {
				o.MaxQueueDelay, o.Queue.AllowTimeoutOverride = time.Second, true
			}),
			arrivals: []arrival{{}, {at: 10, timeout: 20}},
			runs:     []string{"20: [0 1]"},
			fates:    []string{"20-50", "20-50"},
		},
		"held until a deadline is near of which nothing is known": {
			options:  batching(func(o *serving.Options) { o.MaxQueueDelay = time.Second }),
			arrivals: []arrival{{deadline: 200}},
			runs:     []string{"100: [0]"},
			fates:    []string{"100-120"},
		},
		"priorities": {
			options:  serving.Options{PriorityLevels: 3, DefaultPriority: 2},
			arrivals: []arrival{{}, {at: 1, priority: 3}, {at: 2}, {at: 3, priority: 1}, {at: 4, priority: 2}, {at: 5, priority: 4}},
			runs:     []string{"0: [0]", "20: [3]", "40: [2]", "60: [4]", "80: [1]"},
			fates:    []string{"0-20", "80-100", "40-60", "20-40", "60-80", "invalid input: priority is 4, allowed are 1 to 3, and 0 for the default"},
		},
		"no priorities: all are equal": {
			arrivals: []arrival{{}, {at: 1, priority: 9}, {at: 2, priority: 1}},
			fates:    []string{"0-20", "20-40", "40-60"},
		},
		"ageing": { // a low one is overtaken for 30 ms
			options:  serving.Options{PriorityLevels: 2, DefaultPriority: 1, Ageing: 30 * ms},
			arrivals: []arrival{{}, {at: 1, priority: 2}, {at: 2}, {at: 25}, {at: 32}, {at: 33}},
			runs:     []string{"0: [0]", "20: [2]", "40: [3]", "60: [1]", "80: [4]", "100: [5]"},
			fates:    []string{"0-20", "60-80", "20-40", "40-60", "80-100", "100-120"},
		},
		"the one that others wait for leaves": {
			options:  batching(func(o *serving.Options) { o.MaxBatchSize, o.MaxQueueDelay = 2, time.Second }),
			arrivals: []arrival{{width: 1, leaves: 10}, {at: 1}, {at: 2}},
			runs:     []string{"10: [1 2]"},
			fates:    []string{"10: context canceled", "10-40", "10-40"},
		},
		"order is preserved": {
			options:  serving.Options{PreserveOrdering: true, Instances: 2},
			arrivals: []arrival{{rows: 5}, {at: 1}, {at: 2}},
			fates:    []string{"0-20", "1-21", "20-40"}, // a version that does not batch has no rows
		},
		"order is preserved over runs": {
			options:  serving.Options{PreserveOrdering: true, Instances: 2, MaxBatchSize: 8},
			arrivals: []arrival{{rows: 5}, {at: 1}, {at: 2}},
			fates:    []string{"0-60", "1-60", "21-60"},
		},
		"order is preserved when one leaves": {
			options:  serving.Options{PreserveOrdering: true, Instances: 2, MaxBatchSize: 8},
			arrivals: []arrival{{rows: 5, leaves: 30}, {at: 1}, {at: 2}, {at: 3}},
			fates:    []string{"30: context canceled", "1-30", "21-41", "41-61"},
		},
		"order is preserved in a priority": {
			options:  serving.Options{PreserveOrdering: true, Instances: 2, MaxBatchSize: 8, PriorityLevels: 2, DefaultPriority: 1},
			arrivals: []arrival{{rows: 5}, {at: 1, priority: 2}, {at: 2}},
			fates:    []string{"0-60", "1-21", "21-60"},
		},
		"the queue is full": {
			options:  serving.Options{Queue: serving.QueuePolicy{MaxSize: 2}},
			arrivals: []arrival{{}, {at: 1}, {at: 2}, {at: 3}, {at: 21}},
			fates:    []string{"0-20", "20-40", "40-60", "3: digits:1: queue is full: 2 requests wait", "60-80"},
		},
		"one priority's queue is full": {
			options:  serving.Options{PriorityLevels: 2, DefaultPriority: 1, Queues: map[int]serving.QueuePolicy{2: {MaxSize: 1}}},
			arrivals: []arrival{{}, {at: 1, priority: 2}, {at: 2, priority: 2}, {at: 3}},
			fates:    []string{"0-20", "40-60", "2: digits:1: queue is full: 1 requests wait", "20-40"},
		},
		"a time-out": {
			options:  serving.Options{Queue: serving.QueuePolicy{Timeout: 30 * ms}},
			arrivals: []arrival{{}, {at: 1}, {at: 2}, {at: 3, timeout: 5}},
			// The first run makes the estimate.
			fates: []string{"0-20", "20-40", "20: digits:1: the request's time is out: it would wait 20ms, 12ms are left", "20: digits:1: the request's time is out: it would wait 20ms, 13ms are left"},
		},
		"a time-out of one's own": {
			options:  serving.Options{Queue: serving.QueuePolicy{Timeout: 30 * ms, AllowTimeoutOverride: true}},
			arrivals: []arrival{{}, {at: 1, timeout: 10}, {at: 2, timeout: 1000}, {at: 3, timeout: 1000}},
			fates:    []string{"0-20", "11: digits:1: the request's time is out: it would wait 0s, 0s are left", "20-40", "20: digits:1: the request's time is out: it would wait 20ms, 13ms are left"},
		},
		"a time-out of one's own where there is none": {
			options:  serving.Options{Queue: serving.QueuePolicy{AllowTimeoutOverride: true}},
			arrivals: []arrival{{}, {at: 1, timeout: 10}},
			fates:    []string{"0-20", "11: digits:1: the request's time is out: it would wait 0s, 0s are left"},
		},
		"a time-out that delays": {
			options:  serving.Options{Queue: serving.QueuePolicy{AllowTimeoutOverride: true, Delay: true}},
			arrivals: []arrival{{}, {at: 1, timeout: 10}, {at: 2}, {at: 21}, {at: 41}},
			runs:     []string{"0: [0]", "20: [2]", "40: [3]", "60: [4]", "80: [1]"},
			fates:    []string{"0-20", "80-100", "20-40", "40-60", "60-80"},
		},
		"a time-out is known not to suffice": {
			options:  serving.Options{Queue: serving.QueuePolicy{Timeout: 30 * ms}},
			trained:  true,
			arrivals: []arrival{{}, {at: 1}, {at: 2}},
			fates:    []string{"0-20", "20-40", "2: digits:1: the request's time is out: it would wait 38ms, 30ms are left"},
		},
		"deadlines": {
			trained:  true,
			arrivals: []arrival{{deadline: 20}, {at: 1, deadline: 40}, {at: 2, deadline: 50}, {at: 3, deadline: 57}, {at: 4, deadline: 10}},
			fates: []string{
				"0-20", "20-40", "2: digits:1: the request's time is out: it would take 58ms, 50ms are left", "40-60",
				"4: digits:1: the request's time is out: it would take 76ms, 10ms are left",
			},
		},
		"a deadline that no run can meet": {
			trained:  true,
			arrivals: []arrival{{deadline: 19}},
			fates:    []string{"0: digits:1: the request's time is out: it would take 20ms, 19ms are left"},
		},
		"a higher priority makes one late": {
			options:  serving.Options{PriorityLevels: 2, DefaultPriority: 2},
			trained:  true,
			arrivals: []arrival{{}, {at: 1, deadline: 50}, {at: 5, priority: 1}},
			fates:    []string{"0-20", "5: digits:1: the request's time is out: it would take 55ms, 46ms are left", "20-40"},
		},
		"a run takes longer than expected": { // by 30 ms
			options:  serving.Options{MaxBatchSize: 8},
			trained:  true,
			arrivals: []arrival{{}, {at: 1, deadline: 80}, {at: 2, rows: 4}},
			fates:    []string{"0-20", "20-40", "40-90"},
		},
		"the deadline bounds the run that one joins": {
			options:  batching(func(o *serving.Options) {}),
			trained:  true,
			arrivals: []arrival{{}, {at: 1, deadline: 55}, {at: 2}, {at: 3}, {at: 4}},
			runs:     []string{"0: [0]", "20: [1]", "40: [2 3 4]"},
			fates:    []string{"0-20", "20-40", "40-80", "40-80", "40-80"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			fates, runs := script(t, tt.options, tt.trained, tt.arrivals...)
			if !slices.Equal(fates, tt.fates) {
				t.Errorf("fates\n%s\ninstead of\n%s", strings.Join(fates, "\n"), strings.Join(tt.fates, "\n"))
			}
			if tt.runs != nil && !slices.Equal(runs, tt.runs) {
				t.Errorf("runs %q instead of %q", runs, tt.runs)
			}
		})
	}
}

// Where run times do not vary, a request that is taken in is answered in time,
// and none is refused that had twice the time it needed to wait.
func TestFeasible(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 3))
		s := newSimulation(t, serving.Options{Instances: 1 + int(seed%3)}, func(*run) time.Duration { return 20 * ms })
		v := s.core.versions[one]
		for range window {
			v.predict.observe(1, 20*ms, 0)
		}
		answers := 0
		s.answered = func(r *request) {
			answers++
			if r.err == nil {
				if s.now > r.due {
					t.Errorf("seed %d: answered %v after the deadline", seed, s.now-r.due)
				}
				return
			}
			if !errors.Is(r.err, ErrExpired) || s.now != r.arrived {
				t.Errorf("seed %d: %v after having waited for %v", seed, r.err, s.now-r.arrived)
			}
			wait := v.startAfter(v.queue.total(), 20*ms, s.now) - s.now
			if left := r.due - s.now; left >= 2*wait+20*ms {
				t.Errorf("seed %d: refused with %v left, expected to wait for %v", seed, left, wait)
			}
		}
		const n = 2000
		at := time.Duration(0)
		for range n {
			at += time.Duration(random.ExpFloat64() * float64(10*ms))
			r := &request{id: one, rows: 1, size: 1, alone: true, deadline: start.Add(at + time.Duration(20+random.IntN(300))*ms)}
			s.at(at, func() event { return arrive{r} })
		}
		s.run(time.Hour)
		if answers != n {
			t.Errorf("seed %d: %d of %d requests are answered", seed, answers, n)
		}
	}
}

// trained gives a version whose estimates are known: a run takes 10 ms and 10 ms
// for each row of 9 bytes.
func trained(t *testing.T, o serving.Options) *version {
	v := newSimulation(t, o, nil).core.versions[one]
	train(v)
	return v
}

func train(v *version) {
	for i := range window {
		rows := 1 + i%2*7
		v.predict.observe(int64(rows*9), time.Duration(10+10*rows)*ms, 0)
	}
	v.predict.worst = 1 // what a long time without a slow run makes of it
}

func row(number uint64, due moment) *request {
	return &request{
		id: one, rows: 1, size: 9, startBy: never, due: due, inputs: []tensor.Tensor{{Shape: []int64{1}}}, place: place{number: number, moves: never},
	}
}

// A request must leave time for a run as large as it plans for while enough
// wait to make one, and needs no more than its own otherwise.
func TestHopeless(t *testing.T) {
	v := trained(t, serving.Options{MaxBatchSize: 4, DynamicBatching: true})
	for n := range 4 {
		r := row(uint64(n), 100*ms) // of which half is for a run of nearly 4 rows, which takes 50 ms
		v.price(r)
		v.queue.insert(r)
	}
	if r := v.hopeless(51 * ms); r != nil {
		t.Errorf("%v left, and hopeless", r.due-51*ms)
	}
	late := v.hopeless(60 * ms)
	if late == nil {
		t.Fatal("40 ms left for a run of 50 ms, and not hopeless")
	}
	for v.queue.len > 1 {
		v.queue.remove(v.queue.root)
	}
	if r := v.hopeless(79 * ms); r != nil {
		t.Errorf("21 ms left for a run of 20 ms, and hopeless")
	}
	if r := v.hopeless(81 * ms); r == nil {
		t.Errorf("19 ms left for a run of 20 ms, and not hopeless")
	}
}

// No request is part of a run that ends after its deadline.
func TestNextKeepsDeadlines(t *testing.T) {
	for _, tt := range []struct {
		due  []moment
		want int
	}{
		{[]moment{never, never, never, never}, 4}, // 50 ms
		{[]moment{never, never, never, 50 * ms, never}, 4},
		{[]moment{never, never, never, 45 * ms, never}, 3},
		{[]moment{never, 30 * ms, never, never}, 2},
		{[]moment{20 * ms, never, never}, 1},
	} {
		v := trained(t, serving.Options{MaxBatchSize: 8, DynamicBatching: true})
		for n, due := range tt.due {
			r := row(uint64(n), due)
			r.urgent = true
			v.price(r)
			v.queue.insert(r)
		}
		if members := v.next(0); len(members) != tt.want {
			t.Errorf("%d requests run together instead of %d, deadlines %v", len(members), tt.want, tt.due)
		}
	}
}

// What stands between two requests that may run together is passed over, up to
// a limit.
func TestScanLimit(t *testing.T) {
	for _, between := range []int{scanLimit - 1, scanLimit} {
		v := trained(t, serving.Options{MaxBatchSize: 2, DynamicBatching: true})
		for n := range between + 2 {
			r := row(uint64(n), never)
			if n > 0 && n <= between {
				r.inputs = []tensor.Tensor{{Shape: []int64{1, 2}}}
			}
			v.price(r)
			v.queue.insert(r)
		}
		if got := len(v.next(0)); got == 2 != (between < scanLimit) {
			t.Errorf("%d requests run together over %d others", got, between)
		}
	}
}

// A run that takes longer than expected is expected to do so by as much again.
func TestOverrun(t *testing.T) {
	v := trained(t, serving.Options{})
	v.runs = []*run{{started: 0, ends: 20 * ms}}
	for left, want := range map[time.Duration]bool{59 * ms: false, 61 * ms: true} {
		r := row(0, 60*ms+left) // 20 ms of its own
		r.arrived, r.alone = 60*ms, true
		if err := v.admit(r, 60*ms); err == nil != want {
			t.Errorf("with %v left: %v", left, err)
		}
	}
}

// While a run overruns, those that wait are refused as it takes their time.
func TestRefusedDuringARun(t *testing.T) {
	s := newSimulation(t, serving.Options{}, func(*run) time.Duration { return time.Second })
	train(s.core.versions[one])
	for range 2 {
		s.arrive(0, &request{id: one, rows: 1, size: 9, alone: true})
	}
	var refused time.Duration
	s.answered = func(r *request) {
		if errors.Is(r.err, ErrExpired) {
			refused = s.now
		}
	}
	s.arrive(ms, &request{id: one, rows: 1, size: 9, alone: true, deadline: start.Add(100 * ms)})
	s.run(time.Hour)
	if want := 60*ms + 1; refused != want { // what is ahead of it and itself take 20 ms each
		t.Errorf("refused after %v instead of %v", refused, want)
	}
}

// A run that was given up tells at least that it takes so long.
func TestGivenUpRunsCount(t *testing.T) {
	s := newSimulation(t, serving.Options{}, func(*run) time.Duration { return time.Hour })
	r := &request{id: one, rows: 1, size: 1, alone: true}
	s.arrive(0, r)
	s.at(90*ms, func() event { return cancelled{r} })
	s.at(95*ms, func() event { r.run.err = context.Canceled; return finish{r.run} })
	s.run(96 * ms)
	if got := s.core.versions[one].predict.mean(1); got != 95*ms {
		t.Errorf("a run is expected to take %v", got)
	}
	failing := &request{id: one, rows: 1, size: 1, alone: true}
	s.arrive(s.now, failing)
	s.at(s.now+98*ms, func() event { failing.run.err = errors.New("failed"); return finish{failing.run} })
	s.run(s.now + 99*ms)
	if got := s.core.versions[one].predict.runs; got != 1 {
		t.Errorf("%d runs count, also one that failed", got)
	}
}

// A low priority is served, and not only when nothing else waits.
func TestNothingStarves(t *testing.T) {
	s := newSimulation(t, serving.Options{PriorityLevels: 4, DefaultPriority: 1, Ageing: 100 * ms}, func(*run) time.Duration { return 10 * ms })
	longest := time.Duration(0)
	s.answered = func(r *request) {
		if r.level == 3 {
			longest = max(longest, s.now-r.arrived)
		}
	}
	for i := range 2000 { // one percent more than there is time for
		at := time.Duration(i) * 9900 * time.Microsecond
		s.arrive(at, &request{id: one, rows: 1, size: 1, alone: true})
		if i%100 == 0 {
			s.arrive(at, &request{id: one, rows: 1, size: 1, alone: true, level: 3})
		}
	}
	s.run(time.Hour)
	// 300 ms of ageing, and what waits then; 0.4 s of work too much in all.
	if longest < 300*ms || longest > 800*ms {
		t.Errorf("a request of the lowest priority has waited for %v", longest)
	}
}

// The hint of a refusal is when the same request would be admitted.
func TestRetryAfter(t *testing.T) {
	s := newSimulation(t, serving.Options{}, func(*run) time.Duration { return 20 * ms })
	for range window {
		s.core.versions[one].predict.observe(1, 20*ms, 0)
	}
	s.core.versions[one].predict.worst = 1
	var hint time.Duration
	s.answered = func(r *request) {
		if e, ok := errors.AsType[*RefusedError](r.err); ok {
			hint = e.RetryAfter
		}
	}
	for range 4 { // done at 20, 40, 60 and 80 ms
		s.step(arrive{&request{id: one, size: 1, alone: true}})
	}
	late := func() *request {
		return &request{id: one, size: 1, alone: true, deadline: start.Add(s.now + 60*ms)}
	}
	s.step(arrive{late()}) // would be done at 100
	if hint != 40*ms {
		t.Fatalf("the hint is %v", hint)
	}
	s.run(40 * ms)
	hint = 0
	if s.step(arrive{late()}); hint != 0 {
		t.Errorf("refused again, with hint %v", hint)
	}
}

func TestHealth(t *testing.T) {
	first := true
	s := newSimulation(t, serving.Options{}, func(*run) time.Duration {
		if first {
			return time.Second
		}
		return time.Hour
	})
	health := func() error { return s.core.health() }
	s.step(arrive{&request{id: one, size: 1}})
	s.run(2 * time.Second)
	first = false
	s.step(arrive{&request{id: one, size: 1}})
	for _, tt := range []struct {
		at   time.Duration
		want string
	}{
		{11 * time.Second, ""}, // 20 s are 20 times what was expected
		{21 * time.Second, ""},
		{23 * time.Second, "digits:1: a run has not ended for 21s"},
	} {
		s.run(tt.at)
		s.step(tick{})
		if err := health(); fmt.Sprint(err) != tt.want && (err != nil || tt.want != "") {
			t.Errorf("after %v: %v", tt.at, err)
		}
	}
}
