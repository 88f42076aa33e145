package engine

import (
	"errors"
	"slices"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/serving"
)

// machine drives a core with random events in simulated time and holds it
// against what any correct core does.
type machine struct {
	core  *core
	now   time.Duration
	alarm time.Duration // the next tick
	ids   []VersionID
	// What requests go to, and all that is loaded with its generation.
	model, all map[VersionID]*modelled
	loading    map[VersionID]VersionID // ids by which versions are being loaded
	infos, old map[VersionID]*Info     // as published, and as they were before
	used       map[uint64]bool         // generations

	answers  map[*request]int
	calls    map[*call]int
	replies  map[*call]reply
	drains   map[*call]VersionID // calls of drain
	wrong    map[*request]bool   // makes its run fail
	given    map[*request]bool   // up
	ran      map[*request]int
	outcomes map[*run]int // how often the memory of each was given back
	lent     []*request   // answered with outputs that nobody has released
	stopped  bool
	throttle Throttle
	began    time.Duration // the row of runs that goes on, or when its throttle was set
	rested   time.Duration // until when nothing may run
}

// modelled is what the machine knows of a version.
type modelled struct {
	options   serving.Options
	base      serving.Options // before it was tuned
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
		core: newCore(start), alarm: never, ids: []VersionID{one, {Model: "digits", Version: 2}}, model: map[VersionID]*modelled{}, all: map[VersionID]*modelled{},
		loading: map[VersionID]VersionID{}, infos: map[VersionID]*Info{}, old: map[VersionID]*Info{}, used: map[uint64]bool{},
		answers: map[*request]int{}, calls: map[*call]int{}, replies: map[*call]reply{}, drains: map[*call]VersionID{},
		wrong: map[*request]bool{}, given: map[*request]bool{}, ran: map[*request]int{}, outcomes: map[*run]int{},
	}
	for _, id := range m.ids {
		m.model[id] = new(modelled)
	}
	m.claim(t, one, false)
	m.loaded(t, one, nil)
	return m
}

// claim asks to load a version, in the place of one or not.
func (m *machine) claim(t *rapid.T, id VersionID, replace bool) {
	v := m.model[id]
	_, busy := m.loading[id]
	free := !busy && !m.stopped && (!v.loaded || replace && !v.draining)
	c := newCall()
	m.step(t, claim{c, Spec{ID: id}, replace})
	got := m.replies[c]
	if m.calls[c] != 1 || (got.err == nil) != free {
		t.Fatalf("a claim got no answer, or a wrong one: %v", got.err)
	}
	if !free {
		return
	}
	if exact := got.id; exact.Model != id.Model || exact.Version != id.Version || m.all[exact] != nil || m.used[exact.Generation] || v.loaded && exact.Generation == 0 {
		t.Fatalf("%s is to be loaded by the id %+v", id, exact)
	}
	m.loading[id] = got.id
	m.used[got.id.Generation] = got.id.Generation != 0
}

func (m *machine) loaded(t *rapid.T, id VersionID, err error) {
	exact := m.loading[id]
	delete(m.loading, id)
	o := drawOptions(t)
	options := resolve(&o, false)
	old, info := m.model[id], m.infos[id]
	had := old.loaded
	if err == nil {
		old.draining, m.old[id] = true, info
		m.model[id] = &modelled{options: options, base: options}
		m.all[exact] = m.model[id]
	}
	c := newCall()
	m.step(t, loaded{c, exact, Info{Options: options}, err})
	switch v := m.model[id]; {
	case m.calls[c] != 1 || v.loaded != (err == nil || had):
		t.Fatalf("%s: after loading it (%v), loaded is %v", id, err, v.loaded)
	case err != nil && (v != old || m.infos[id] != info):
		t.Fatalf("%s: a load that failed has changed it", id)
	}
}

// of gives the version that a request belongs to.
func (m *machine) of(r *request) *modelled {
	if r.version != nil {
		return m.all[r.version.id]
	}
	return m.model[r.id]
}

// leaving says whether a version of this name is on its way out.
func (m *machine) leaving(id VersionID) bool {
	for exact, v := range m.all {
		if exact.Generation = 0; exact == id && v.draining {
			return true
		}
	}
	return false
}

// step feeds an event and checks each effect as it comes.
func (m *machine) step(t *rapid.T, ev event) {
	for _, f := range m.core.step(ev, start.Add(m.now)) {
		switch f := f.(type) {
		case startRun:
			m.started(t, f.run)
		case startUnload:
			v := m.all[f.version.id]
			if !v.draining || v.unloading || len(v.waiting)+len(v.runs) > 0 || m.stopped {
				t.Fatalf("%s is unloaded too early, twice or for no reason", f.version.id)
			}
			v.unloading = true
		case startActivate:
			defer m.step(t, activated{f.version, Need{}, 0, nil})
		case startSet:
			var err error
			if rapid.IntRange(0, 3).Draw(t, "refuses") == 0 {
				err = errBad
			}
			defer m.step(t, changed{f.version, err})
		case answer:
			m.answered(t, f.request)
		case reply:
			if m.calls[f.call]++; m.calls[f.call] > 1 {
				t.Fatal("a call was answered twice")
			}
			m.replies[f.call] = f
			if id, ok := m.drains[f.call]; ok && f.err == nil && m.leaving(id) {
				t.Fatalf("a call was answered before %s was gone", id)
			}
		case publish:
			m.model[f.id].loaded = f.info != nil
			m.infos[f.id] = f.info
		case separate:
			if m.all[f.id].separate {
				t.Fatalf("%s: it is told twice that requests run alone", f.id)
			}
			m.all[f.id].separate = true
		case wake:
			m.alarm = f.at.Sub(start)
		}
	}
}

func (m *machine) started(t *rapid.T, r *run) {
	v := m.all[r.version.id]
	if m.running() == 0 {
		if m.began = m.now; m.now < m.rested {
			t.Fatalf("a run begins at %v, a pause lasts until %v", m.now, m.rested)
		}
	}
	if most := m.throttle.MaxBatch; most > 0 && len(r.requests) > 1 && r.rows > most {
		t.Fatalf("a run of %d requests has %d rows, %d are allowed for now", len(r.requests), r.rows, most)
	}
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

func (m *machine) running() int {
	n := 0
	for _, v := range m.all {
		n += len(v.runs)
	}
	return n
}

// rest takes in that a row of runs is over, or that the throttle is another.
func (m *machine) rest(length time.Duration) {
	m.rested = m.now
	if d := m.throttle.Duty; d > 0 {
		m.rested += time.Duration(float64(length)*(1/d-1)) - time.Microsecond // rounded
	}
}

// before says that a stands before b in the line: neither is late, and a came
// first, where each level counts as one Ageing.
func (m *machine) before(a, b *request) bool {
	place := func(r *request) time.Duration {
		return r.arrived + time.Duration(r.level)*m.of(r).options.Ageing
	}
	return !a.late && (b.late || place(a) < place(b) || place(a) == place(b) && a.number < b.number)
}

func (m *machine) answered(t *rapid.T, r *request) {
	if m.answers[r]++; m.answers[r] > 1 {
		t.Fatalf("%s: answered twice", r.id)
	}
	v := m.of(r)
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
