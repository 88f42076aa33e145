package engine

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

func (m *machine) version(t *rapid.T) (VersionID, *modelled) {
	id := rapid.SampledFrom(m.ids).Draw(t, "version")
	return id, m.model[id]
}

// any draws one of all versions that are loaded; nil where there is none.
func (m *machine) any(t *rapid.T) (VersionID, *modelled) {
	if len(m.all) == 0 {
		return VersionID{}, nil
	}
	id := rapid.SampledFrom(slices.SortedFunc(maps.Keys(m.all), VersionID.Compare)).Draw(t, "one of all")
	return id, m.all[id]
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
	v := m.all[r.version.id]
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
		case m.answers[q] == 1 && errors.Is(q.err, errBad) && !m.wrong[q] && !m.stopped:
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
			id, _ := m.version(t)
			m.claim(t, id, false)
		},
		"replace": func(t *rapid.T) {
			id, _ := m.version(t)
			m.claim(t, id, true)
		},
		"loaded": func(t *rapid.T) {
			id, _ := m.version(t)
			if _, ok := m.loading[id]; !ok {
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
			_, v := m.any(t)
			if v == nil || len(v.order) == 0 {
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
			_, v := m.any(t)
			if v == nil || len(v.runs) == 0 {
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
			replaced := rapid.Bool().Draw(t, "replaced")
			v.draining = v.draining || v.loaded && !replaced && !m.stopped
			known := m.leaving(id) && !m.stopped
			m.drains[c] = id
			m.step(t, drain{c, id, replaced})
			if (m.calls[c] == 0) != known {
				t.Fatalf("drain of a version that is loaded=%v was answered %d times", known, m.calls[c])
			}
		},
		"unloaded": func(t *rapid.T) {
			id, v := m.any(t)
			if v == nil || !v.unloading {
				return
			}
			var err error
			if rapid.Bool().Draw(t, "fails") {
				err = errors.New("unload failed")
			}
			m.unloaded(t, id, v, err)
		},
		"": m.check,
	}
}

func (m *machine) unloaded(t *rapid.T, id VersionID, v *modelled, err error) {
	v.unloading = false
	if err == nil {
		delete(m.all, id)
	}
	name := id
	name.Generation = 0
	current := m.model[name]
	want := current.loaded && (current != v || err != nil)
	if m.step(t, unloaded{id, err}); current.loaded != want {
		t.Fatalf("%+v was unloaded (%v), and loaded is %v", id, err, current.loaded)
	}
}

func (m *machine) arrive(t *rapid.T) {
	id, v := m.version(t)
	r := m.drawRequest(t, id, v)
	m.wrong[r] = rapid.IntRange(0, 9).Draw(t, "wrong") == 0
	r.info = m.infos[id]
	outdated := m.old[id] != nil && rapid.IntRange(0, 9).Draw(t, "outdated") == 0
	if outdated {
		r.info = m.old[id]
	}
	admitted := v.loaded && !v.draining && !m.stopped && !outdated
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
		if !errors.Is(err, ErrNotLoaded) && !errors.Is(err, ErrDraining) && !errors.Is(err, ErrStopped) && !(outdated && errors.Is(err, errReplaced)) {
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
		if record := m.core.current[id]; v.loaded != (record != nil) || v.loaded && (m.all[record.id] != v || m.infos[id] != record.info) {
			t.Fatalf("%s: requests do not go to the version that was loaded last", id)
		}
	}
	if !m.stopped {
		var ids []VersionID
		for _, s := range m.core.inspect(newCall()).versions {
			ids = append(ids, s.ID)
		}
		want := slices.DeleteFunc(slices.Clone(m.ids), func(id VersionID) bool { return !m.model[id].loaded })
		if !slices.Equal(ids, want) {
			t.Fatalf("the status lists %v instead of %v", ids, want)
		}
	}
	if n := len(m.core.versions); n != len(m.all)+len(m.loading) {
		t.Fatalf("%d versions are known instead of %d and %d", n, len(m.all), len(m.loading))
	}
	for id, v := range m.all {
		record := m.core.versions[id]
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
			for _, v := range m.all {
				if len(v.waiting) > 0 {
					t.Fatalf("%d requests wait after the stop", len(v.waiting))
				}
			}
		}
		// However it went, once runs end and time passes everything is answered.
		for range 10_000 {
			busy := false
			for _, v := range m.all {
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
		for id, v := range m.all {
			if len(v.order) > 0 {
				t.Fatalf("%s: %d requests have no answer", id, len(v.order))
			}
		}
		for range 100 { // one unload may begin another
			for id, v := range m.all {
				if v.unloading {
					m.unloaded(t, id, v, nil)
				}
			}
		}
		for c, id := range m.drains {
			if m.calls[c] != 1 {
				t.Fatalf("%s: a call of drain has no answer", id)
			}
		}
		for len(m.lent) > 0 {
			m.release(m.lent[0])
		}
		m.check(t)
	})
}
