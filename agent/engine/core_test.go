package engine

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// machine drives a core with random events in simulated time and holds it
// against what any correct core does.
type machine struct {
	core  *core
	now   time.Duration
	alarm time.Duration // the next tick
	ids   []VersionID
	model map[VersionID]*modelled

	answers  map[*request]int
	calls    map[*call]int
	replies  map[*call]error
	wrong    map[*request]bool // makes its run fail
	given    map[*request]bool // up
	ran      map[*request]int
	outcomes map[*run]int // how often the memory of each was given back
	lent     []*request   // answered with outputs that nobody has released
	stopped  bool
}

// modelled is what the machine knows of a version.
type modelled struct {
	options   serving.Options
	loading   *call
	loaded    bool
	draining  bool
	unloading bool
	separate  bool
	order     []*request // admitted and not answered, by arrival
	waiting   []*request
	runs      []*run
}

func newMachine(t *rapid.T) *machine {
	m := &machine{
		core: newCore(start), alarm: never, ids: []VersionID{one, {"digits", 2}}, model: map[VersionID]*modelled{},
		answers: map[*request]int{}, calls: map[*call]int{}, replies: map[*call]error{}, wrong: map[*request]bool{}, given: map[*request]bool{}, ran: map[*request]int{}, outcomes: map[*run]int{},
	}
	for _, id := range m.ids {
		m.model[id] = new(modelled)
	}
	m.step(t, claim{newCall(), Spec{ID: one}})
	m.loaded(t, one, nil)
	return m
}

func (m *machine) loaded(t *rapid.T, id VersionID, err error) {
	v := m.model[id]
	*v = modelled{}
	o := drawOptions(t)
	v.options = resolve(&o, false)
	c := newCall()
	m.step(t, loaded{c, id, Info{Options: v.options}, err})
	if m.calls[c] != 1 || v.loaded != (err == nil) {
		t.Fatalf("%s: after loading it (%v), loaded is %v", id, err, v.loaded)
	}
}

// step feeds an event and checks each effect as it comes.
func (m *machine) step(t *rapid.T, ev event) {
	for _, f := range m.core.step(ev, start.Add(m.now)) {
		switch f := f.(type) {
		case startRun:
			m.started(t, f.run)
		case startUnload:
			v := m.model[f.version.id]
			if !v.draining || v.unloading || len(v.waiting)+len(v.runs) > 0 || m.stopped {
				t.Fatalf("%s is unloaded too early, twice or for no reason", f.version.id)
			}
			v.unloading = true
		case answer:
			m.answered(t, f.request)
		case reply:
			if m.calls[f.call]++; m.calls[f.call] > 1 {
				t.Fatal("a call was answered twice")
			}
			m.replies[f.call] = f.err
		case publish:
			m.model[f.id].loaded = f.info != nil
		case separate:
			if m.model[f.id].separate {
				t.Fatalf("%s: it is told twice that requests run alone", f.id)
			}
			m.model[f.id].separate = true
		case wake:
			m.alarm = f.at.Sub(start)
		}
	}
}

func (m *machine) started(t *rapid.T, r *run) {
	v := m.model[r.version.id]
	if v.runs = append(v.runs, r); len(v.runs) > v.options.Instances {
		t.Fatalf("%d runs at a time", len(v.runs))
	}
	if v.unloading || m.stopped {
		t.Fatal("a run on a version that has ended")
	}
	rows := 0
	first := r.requests[0]
	for _, q := range v.waiting {
		if m.before(q, first) {
			t.Fatalf("the run does not begin with the first in line: level %d came at %v, level %d at %v", q.level, q.arrived, first.level, first.arrived)
		}
	}
	for _, q := range r.requests {
		i := slices.Index(v.waiting, q)
		if i < 0 {
			t.Fatal("a request runs that does not wait")
		}
		v.waiting = slices.Delete(v.waiting, i, i+1)
		rows += q.rows
		if m.ran[q]++; m.ran[q] > 2 || m.ran[q] == 2 && len(r.requests) > 1 {
			t.Fatalf("a request runs for the %d. time, with %d others", m.ran[q], len(r.requests)-1)
		}
		if len(r.requests) > 1 && (q.alone || !slices.Equal(q.inputs[0].Shape[1:], first.inputs[0].Shape[1:])) {
			t.Fatalf("shapes %v and %v run together", q.inputs[0].Shape, first.inputs[0].Shape)
		}
		if q.due < m.now || q.startBy < m.now {
			t.Fatal("a request runs that is late")
		}
	}
	if rows != r.rows || len(r.requests) > 1 && (rows > v.options.MaxBatchSize || !v.options.DynamicBatching || v.separate) {
		t.Fatalf("%d requests of %d rows run together, %+v", len(r.requests), rows, v.options)
	}
}

// before says that a stands before b in the line: neither is late, and a came
// first, where each level counts as one Ageing.
func (m *machine) before(a, b *request) bool {
	place := func(r *request) time.Duration {
		return r.arrived + time.Duration(r.level)*m.model[r.id].options.Ageing
	}
	return !a.late && (b.late || place(a) < place(b) || place(a) == place(b) && a.number < b.number)
}

func (m *machine) answered(t *rapid.T, r *request) {
	if m.answers[r]++; m.answers[r] > 1 {
		t.Fatalf("%s: answered twice", r.id)
	}
	v := m.model[r.id]
	v.waiting = slices.DeleteFunc(v.waiting, func(q *request) bool { return q == r })
	if r.result.request != nil {
		m.lent = append(m.lent, r)
	}
	if i := slices.Index(v.order, r); i >= 0 {
		ran := r.run != nil && !errors.Is(r.err, ErrExpired) && !errors.Is(r.err, ErrStopped) && !m.given[r]
		earlier := slices.ContainsFunc(v.order[:i], func(q *request) bool { return q.level == r.level })
		if ran && earlier && v.options.PreserveOrdering {
			t.Fatal("a request is answered before one that came earlier")
		}
		v.order = slices.Delete(v.order, i, i+1)
	}
}

func (m *machine) version(t *rapid.T) (VersionID, *modelled) {
	id := rapid.SampledFrom(m.ids).Draw(t, "version")
	return id, m.model[id]
}

func drawOptions(t *rapid.T) serving.Options {
	policy := func(label string) serving.QueuePolicy {
		return serving.QueuePolicy{
			MaxSize:              rapid.IntRange(0, 5).Draw(t, label+" size"),
			Timeout:              time.Duration(rapid.SampledFrom([]int{0, 0, 30, 300}).Draw(t, label+" timeout")) * time.Millisecond,
			AllowTimeoutOverride: rapid.Bool().Draw(t, label+" override"),
			Delay:                rapid.Bool().Draw(t, label+" delay"),
		}
	}
	o := serving.Options{
		MaxBatchSize:     rapid.SampledFrom([]int{0, 1, 4, 8}).Draw(t, "batch"),
		Instances:        rapid.IntRange(0, 3).Draw(t, "instances"),
		DynamicBatching:  rapid.Bool().Draw(t, "dynamic"),
		MaxQueueDelay:    time.Duration(rapid.SampledFrom([]int{0, 5, 50}).Draw(t, "delay")) * time.Millisecond,
		PreserveOrdering: rapid.Bool().Draw(t, "ordered"),
		PriorityLevels:   rapid.SampledFrom([]int{0, 1, 3}).Draw(t, "levels"),
		Ageing:           time.Duration(rapid.SampledFrom([]int{0, 20}).Draw(t, "ageing")) * time.Millisecond,
		Queue:            policy("queue"),
	}
	if o.MaxBatchSize > 0 {
		o.PreferredBatchSizes = rapid.SliceOfN(rapid.IntRange(1, o.MaxBatchSize), 0, 2).Draw(t, "preferred")
	}
	if o.PriorityLevels > 0 {
		o.DefaultPriority = rapid.IntRange(1, o.PriorityLevels).Draw(t, "default")
		o.Queues = map[int]serving.QueuePolicy{1: policy("queue 1")}
	}
	if err := o.Check(); err != nil {
		t.Fatal(err)
	}
	return o
}

func (m *machine) drawRequest(t *rapid.T, id VersionID, v *modelled) *request {
	rows := rapid.SampledFrom([]int64{1, 1, 1, 2, 3, 9, 0}).Draw(t, "rows")
	width := rapid.Int64Range(1, 2).Draw(t, "width")
	info := Info{Inputs: []tensor.Info{{Name: "x", Type: tensor.Uint8, Shape: []int64{-1, -1}}}, Options: v.options}
	q := Request{Inputs: []tensor.Tensor{{Name: "x", Type: tensor.Uint8, Shape: []int64{rows, width}, Data: make([]byte, rows*width)}}}
	q.Priority = rapid.IntRange(0, v.options.PriorityLevels).Draw(t, "priority")
	q.Timeout = time.Duration(rapid.SampledFrom([]int{0, 0, 10, 100}).Draw(t, "timeout")) * time.Millisecond
	r, err := info.request(id, q)
	if err != nil {
		t.Fatal(err)
	}
	if d := rapid.SampledFrom([]int{0, 0, 0, 1, 40, 200, 1000}).Draw(t, "deadline"); d > 0 {
		r.deadline = start.Add(m.now + time.Duration(d)*time.Millisecond)
	}
	return r
}

var errBad = errors.New("bad input")

// end ends a run and carries on as the engine does.
func (m *machine) end(t *rapid.T, r *run, err error) {
	v := m.model[r.version.id]
	v.runs = slices.DeleteFunc(v.runs, func(o *run) bool { return o == r })
	for _, q := range r.requests {
		if err == nil && m.wrong[q] {
			err = errBad
		}
	}
	if r.err = err; err == nil {
		r.outcome.Outputs = make([][]tensor.Tensor, len(r.requests))
		m.outcomes[r] = 0
		r.outcome.Release = func() { m.outcomes[r]++ }
	}
	again := err != nil && len(r.requests) > 1 && !errors.Is(err, ErrUnavailable) && !m.stopped
	var live []*request
	for _, q := range r.requests {
		if m.answers[q] == 0 {
			live = append(live, q)
		}
	}
	if again {
		v.waiting = append(v.waiting, live...)
	}
	m.step(t, finish{r})
	r.drop()
	for _, q := range live {
		switch {
		case !again && !v.options.PreserveOrdering && m.answers[q] != 1:
			t.Fatal("a request that has run has no answer")
		case again && m.answers[q] == 1 && !errors.Is(q.err, ErrExpired):
			t.Fatalf("a request that should run again, alone, got %v", q.err)
		case m.answers[q] == 1 && errors.Is(q.err, errBad) && !m.wrong[q]:
			t.Fatal("a request fails for another's fault")
		}
	}
}

func (m *machine) release(r *request) {
	m.lent = slices.DeleteFunc(m.lent, func(q *request) bool { return q == r })
	r.result.Release()
	r.result.Release() // only the first one counts
}

func (m *machine) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"load": func(t *rapid.T) {
			id, v := m.version(t)
			c := newCall()
			free := !v.loaded && v.loading == nil && !m.stopped
			got := m.ask(t, c, claim{c, Spec{ID: id}})
			if m.calls[c] != 1 || (got == nil) != free {
				t.Fatal("a claim got no answer, or a wrong one")
			}
			if free {
				v.loading = c
			}
		},
		"loaded": func(t *rapid.T) {
			id, v := m.version(t)
			if v.loading == nil {
				return
			}
			var err error
			if rapid.IntRange(0, 3).Draw(t, "fails") == 0 {
				err = errors.New("load failed")
			}
			m.loaded(t, id, err)
		},
		"arrive": m.arrive, "arrive more": m.arrive, "arrive again": m.arrive, "arrive still": m.arrive,
		"cancel": func(t *rapid.T) {
			_, v := m.version(t)
			if len(v.order) == 0 {
				return
			}
			r := rapid.SampledFrom(v.order).Draw(t, "request")
			m.given[r] = true
			m.step(t, cancelled{r})
			if m.answers[r] != 1 || slices.Contains(v.waiting, r) {
				t.Fatal("a cancelled request waits on")
			}
		},
		"finish": func(t *rapid.T) {
			_, v := m.version(t)
			if len(v.runs) == 0 {
				return
			}
			r := rapid.SampledFrom(v.runs).Draw(t, "run")
			var err error
			switch rapid.IntRange(0, 9).Draw(t, "how") {
			case 0:
				err = ErrUnavailable
			case 1:
				err = fmt.Errorf("run: %w", ErrRows)
			}
			m.end(t, r, err)
		},
		"time passes": func(t *rapid.T) {
			m.pass(t, time.Duration(rapid.IntRange(0, 60_000).Draw(t, "microseconds"))*time.Microsecond)
		},
		"release": func(t *rapid.T) {
			if len(m.lent) > 0 {
				m.release(rapid.SampledFrom(m.lent).Draw(t, "request"))
			}
		},
		"drain": func(t *rapid.T) {
			id, v := m.version(t)
			c := newCall()
			known := v.loaded && !m.stopped
			v.draining = v.draining || known
			m.step(t, drain{c, id})
			if (m.calls[c] == 0) != known {
				t.Fatalf("drain of a version that is loaded=%v was answered %d times", known, m.calls[c])
			}
		},
		"unloaded": func(t *rapid.T) {
			id, v := m.version(t)
			if !v.unloading {
				return
			}
			v.unloading = false
			if rapid.Bool().Draw(t, "fails") {
				m.step(t, unloaded{id, errors.New("unload failed")})
				return
			}
			v.draining = false
			m.step(t, unloaded{id, nil})
			if v.loaded {
				t.Fatalf("%s is still known", id)
			}
		},
		"": m.check,
	}
}

// ask feeds the event of a call and gives its answer's error.
func (m *machine) ask(t *rapid.T, c *call, ev event) error {
	m.step(t, ev)
	return m.replies[c]
}

func (m *machine) arrive(t *rapid.T) {
	id, v := m.version(t)
	r := m.drawRequest(t, id, v)
	m.wrong[r] = rapid.IntRange(0, 9).Draw(t, "wrong") == 0
	admitted := v.loaded && !v.draining && !m.stopped
	inside := 0
	for _, q := range v.order {
		if q.level == r.level && q.state != running {
			inside++
		}
	}
	policy := v.options.Policy(r.level + 1)
	full := inside >= policy.MaxSize
	v.order = append(v.order, r)
	v.waiting = append(v.waiting, r)
	m.step(t, arrive{r})
	switch err := r.err; {
	case m.answers[r] == 0:
		if !admitted || full {
			t.Fatalf("a request was admitted, though admitted=%v, full=%v", admitted, full)
		}
	case !admitted:
		if !errors.Is(err, ErrNotLoaded) && !errors.Is(err, ErrDraining) && !errors.Is(err, ErrStopped) {
			t.Fatal(err)
		}
	case full:
		if !errors.Is(err, ErrOverloaded) {
			t.Fatal(err)
		}
	default:
		if refused, ok := errors.AsType[*RefusedError](err); !ok || !errors.Is(err, ErrExpired) || refused.RetryAfter < 0 || r.due == never && r.startBy == never {
			t.Fatalf("%v of a request with timeout %v and deadline %v", err, r.startBy, r.due)
		}
	}
}

// pass lets time pass, with all the ticks that were asked for.
func (m *machine) pass(t *rapid.T, d time.Duration) {
	for until := m.now + d; m.now < until; {
		m.now = min(until, max(m.now, m.alarm))
		if m.now >= m.alarm {
			m.alarm = never
			m.step(t, tick{})
			m.check(t)
		}
	}
}

func (m *machine) check(t *rapid.T) {
	for id, v := range m.model {
		record := m.core.versions[id]
		if !v.loaded {
			continue
		}
		if record.queue.len != len(v.waiting) || len(record.runs) != len(v.runs) {
			t.Fatalf("%d wait and %d run instead of %d and %d", record.queue.len, len(record.runs), len(v.waiting), len(v.runs))
		}
		for i := range record.levels {
			l := &record.levels[i]
			var queued, done, all int
			for _, q := range v.order {
				if q.level == i {
					all++
					if q.state == waiting {
						queued++
					} else if q.state == held {
						done++
					}
				}
			}
			if queued != l.waiting || done != l.held || v.options.PreserveOrdering && all != l.order.Len() {
				t.Fatalf("level %d counts %d, %d and %d instead of %d, %d and %d", i, l.waiting, l.held, l.order.Len(), queued, done, all)
			}
		}
		// A request that could run is held for MaxQueueDelay at most.
		if len(v.runs) < v.options.Instances && !m.stopped {
			for _, q := range v.waiting {
				first := !q.late && !slices.ContainsFunc(v.waiting, func(o *request) bool { return m.before(o, q) })
				if first && m.now-q.arrived >= max(v.options.MaxQueueDelay, 1) {
					t.Fatalf("the first in line has waited for %v while an instance is free, %v is the most", m.now-q.arrived, v.options.MaxQueueDelay)
				}
			}
			if len(v.waiting) > 0 && (v.options.MaxQueueDelay == 0 || !v.options.DynamicBatching) {
				t.Fatalf("%d wait while an instance is free", len(v.waiting))
			}
		}
		// One whose time is out does not wait.
		for _, q := range v.waiting {
			if q.due < m.now || q.startBy < m.now || q.moves <= m.now {
				t.Fatalf("a request waits at %v that had until %v, %v, %v", m.now, q.due, q.startBy, q.moves)
			}
		}
	}
	for r, n := range m.outcomes {
		lent := slices.ContainsFunc(m.lent, func(q *request) bool { return q.run == r })
		used := lent || slices.ContainsFunc(r.requests, func(q *request) bool { return q.state == held && q.run == r })
		if used && n != 0 || !used && n != 1 {
			t.Fatalf("outputs, in use=%v, were given back %d times", used, n)
		}
	}
}

// TestCore drives a core with random schedules. A seed that fails is kept by
// rapid under testdata and run again from then on.
func TestCore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t)
		t.Repeat(m.actions())
		if rapid.Bool().Draw(t, "stop") {
			m.stopped = true
			m.step(t, stop{})
			for _, v := range m.model {
				if len(v.waiting) > 0 {
					t.Fatalf("%d requests wait after the stop", len(v.waiting))
				}
			}
		}
		// However it went, once runs end and time passes everything is answered.
		for range 10_000 {
			busy := false
			for _, v := range m.model {
				for _, r := range slices.Clone(v.runs) {
					m.end(t, r, nil)
					busy = true
				}
				busy = busy || len(v.waiting) > 0
			}
			if !busy {
				break
			}
			m.pass(t, time.Millisecond)
		}
		for id, v := range m.model {
			if len(v.order) > 0 {
				t.Fatalf("%s: %d requests have no answer", id, len(v.order))
			}
		}
		for len(m.lent) > 0 {
			m.release(m.lent[0])
		}
		m.check(t)
	})
}
