package engine

import (
	"errors"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// machine drives a core with random events and holds it against what any
// correct core does: nothing is lost, answered twice or out of order, bounds
// hold, and a version is unloaded when and only when it is idle.
type machine struct {
	core     *core
	limit    int
	now      time.Time
	ids      []VersionID
	admits   map[VersionID]bool       // loaded and not draining
	waiting  map[VersionID][]*request // in the order of arrival
	running  map[VersionID][]*request
	answers  map[*request]int
	calls    map[*call]int
	unloads  map[VersionID]bool // the runtime is unloading
	draining map[VersionID]bool
	loading  map[VersionID]*call
	stopped  bool
}

func newMachine(limit int) *machine {
	return &machine{
		core: newCore(limit), limit: limit, now: time.Unix(0, 0),
		ids:    []VersionID{{"a", 1}, {"a", 2}, {"b", 1}},
		admits: map[VersionID]bool{}, waiting: map[VersionID][]*request{}, running: map[VersionID][]*request{},
		answers: map[*request]int{}, calls: map[*call]int{}, unloads: map[VersionID]bool{},
		draining: map[VersionID]bool{}, loading: map[VersionID]*call{},
	}
}

// step feeds an event and checks each effect as it comes.
func (m *machine) step(t *rapid.T, ev event) {
	m.now = m.now.Add(time.Millisecond)
	for _, f := range m.core.step(ev, m.now) {
		switch f := f.(type) {
		case startRun:
			id := f.request.id
			if len(m.waiting[id]) == 0 || m.waiting[id][0] != f.request {
				t.Fatalf("%s: a request runs that is not the first in line", id)
			}
			m.waiting[id] = m.waiting[id][1:]
			m.running[id] = append(m.running[id], f.request)
		case startUnload:
			if !m.draining[f.id] || m.unloads[f.id] || len(m.waiting[f.id])+len(m.running[f.id]) > 0 || m.stopped {
				t.Fatalf("%s is unloaded too early, twice or for no reason", f.id)
			}
			m.unloads[f.id] = true
		case answer:
			if m.answers[f.request]++; m.answers[f.request] > 1 {
				t.Fatalf("%s: answered twice", f.request.id)
			}
			m.waiting[f.request.id] = slices.DeleteFunc(m.waiting[f.request.id], func(r *request) bool { return r == f.request })
		case reply:
			if m.calls[f.call]++; m.calls[f.call] > 1 {
				t.Fatal("a call was answered twice")
			}
		case publish:
			m.admits[f.id] = f.info != nil
		}
	}
}

func (m *machine) anyVersion(t *rapid.T) VersionID {
	return rapid.SampledFrom(m.ids).Draw(t, "version")
}

func (m *machine) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"load": func(t *rapid.T) {
			id, c := m.anyVersion(t), newCall()
			free := !m.admits[id] && !m.draining[id] && m.loading[id] == nil && !m.stopped
			m.step(t, claim{c, id})
			if m.calls[c] != 1 {
				t.Fatal("a claim got no answer")
			}
			if free {
				m.loading[id] = c
			}
		},
		"loaded": func(t *rapid.T) {
			id := m.anyVersion(t)
			if m.loading[id] == nil {
				return
			}
			delete(m.loading, id)
			var err error
			if rapid.Bool().Draw(t, "fails") {
				err = errors.New("load failed")
			}
			c := newCall()
			m.step(t, loaded{c, id, Info{}, err})
			if m.calls[c] != 1 || m.admits[id] != (err == nil) {
				t.Fatalf("%s: after loading it (%v), admitted is %v", id, err, m.admits[id])
			}
		},
		"arrive": func(t *rapid.T) {
			r := &request{id: m.anyVersion(t)}
			admitted := m.admits[r.id] && !m.draining[r.id] && !m.stopped && len(m.waiting[r.id]) < m.limit
			if admitted {
				m.waiting[r.id] = append(m.waiting[r.id], r)
			}
			m.step(t, arrive{r})
			if refused := m.answers[r] == 1; refused == admitted {
				t.Fatalf("%s: refused is %v with %d waiting", r.id, refused, len(m.waiting[r.id]))
			}
		},
		"cancel": func(t *rapid.T) {
			id := m.anyVersion(t)
			all := slices.Concat(m.waiting[id], m.running[id])
			if len(all) == 0 {
				return
			}
			r := rapid.SampledFrom(all).Draw(t, "request")
			m.step(t, cancelled{r})
			if m.answers[r] != 1 || slices.Contains(m.waiting[id], r) {
				t.Fatalf("%s: a cancelled request waits on", id)
			}
		},
		"finish": func(t *rapid.T) {
			id := m.anyVersion(t)
			if len(m.running[id]) == 0 {
				return
			}
			r := m.running[id][0]
			m.running[id] = m.running[id][1:]
			m.step(t, finish{r, nil, nil})
			if m.answers[r] != 1 {
				t.Fatalf("%s: a finished request has no answer", id)
			}
		},
		"drain": func(t *rapid.T) {
			id, c := m.anyVersion(t), newCall()
			if m.admits[id] && !m.stopped {
				m.draining[id] = true
			}
			known := m.draining[id] && !m.stopped
			m.step(t, drain{c, id})
			if (m.calls[c] == 0) != known {
				t.Fatalf("%s: drain of a version that is loaded=%v was answered %d times", id, known, m.calls[c])
			}
		},
		"unloaded": func(t *rapid.T) {
			id := m.anyVersion(t)
			if !m.unloads[id] {
				return
			}
			delete(m.unloads, id)
			if rapid.Bool().Draw(t, "fails") {
				m.step(t, unloaded{id, errors.New("unload failed")})
				return
			}
			delete(m.draining, id)
			m.step(t, unloaded{id, nil})
			if m.admits[id] {
				t.Fatalf("%s is still known", id)
			}
		},
		"list": func(t *rapid.T) {
			c := newCall()
			m.step(t, list{c})
			if m.calls[c] != 1 {
				t.Fatal("list got no answer")
			}
		},
		"": func(t *rapid.T) {
			for _, id := range m.ids {
				if len(m.running[id]) > instances || len(m.waiting[id]) > m.limit {
					t.Fatalf("%s: %d run, %d wait", id, len(m.running[id]), len(m.waiting[id]))
				}
				if len(m.waiting[id]) > 0 && len(m.running[id]) < instances {
					t.Fatalf("%s is idle while %d wait", id, len(m.waiting[id]))
				}
			}
			for _, s := range m.core.list() {
				if s.Queued != len(m.waiting[s.ID]) || s.Running != len(m.running[s.ID]) || s.Draining != m.draining[s.ID] {
					t.Fatalf("status %+v", s)
				}
			}
		},
	}
}

func TestCore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(rapid.IntRange(1, 4).Draw(t, "limit"))
		t.Repeat(m.actions())
		// However it went, a stop answers everything.
		m.stopped = true
		m.step(t, stop{})
		for _, id := range m.ids {
			for _, r := range m.running[id] {
				m.step(t, finish{r, nil, nil})
			}
			m.running[id] = nil
			if n := len(m.waiting[id]); n > 0 {
				t.Fatalf("%s: %d requests wait after the stop", id, n)
			}
		}
		for _, s := range m.core.list() {
			if s.Queued+s.Running > 0 {
				t.Fatalf("after the stop %+v", s)
			}
		}
	})
}
