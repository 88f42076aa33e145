package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/agent/engine"
)

// trials is a worker whose child dies when a test says so.
type trials struct {
	t *testing.T
	w *Worker
	p *process
}

func newTrials(t *testing.T, models ...string) *trials {
	tr := &trials{t: t, w: New(Config{})}
	for _, m := range models {
		v := &version{spec: engine.Spec{ID: of(m)}}
		tr.w.loaded[of(m)] = v
	}
	tr.next()
	return tr
}

func of(model string) engine.VersionID { return engine.VersionID{Model: model, Version: 1} }

func (tr *trials) next() {
	tr.p = &process{dead: make(chan struct{})}
	tr.w.update(func() { tr.w.current = tr.p })
}

// begin begins a call, which must not have to wait.
func (tr *trials) begin(model string, g guilt) use {
	tr.t.Helper()
	ctx, cancel := context.WithCancel(tr.t.Context())
	cancel()
	u, err := tr.w.begin(ctx, of(model), g, false)
	if err != nil {
		tr.t.Fatalf("%s: %v", model, err)
	}
	return u
}

// waits holds whether a call has to wait.
func (tr *trials) waits(model string, g guilt) {
	tr.t.Helper()
	ctx, cancel := context.WithCancel(tr.t.Context())
	cancel()
	if _, err := tr.w.begin(ctx, of(model), g, false); !errors.Is(err, context.Canceled) {
		tr.t.Fatalf("%s need not wait: %v", model, err)
	}
}

// die ends the child during calls, and holds which versions are blamed and
// then in quarantine.
func (tr *trials) die(weak bool, culprit string, calls []use, blamed, quarantined string) {
	tr.t.Helper()
	p := tr.p
	p.weak, p.death = weak, &DeathError{Status: "test"}
	for _, u := range calls {
		p.inFlight = append(p.inFlight, u.version.spec.ID)
	}
	slices.SortFunc(p.inFlight, engine.VersionID.Compare)
	p.inFlight = slices.Compact(p.inFlight)
	id := engine.VersionID{}
	if culprit != "" {
		id = of(culprit)
	}
	tr.w.blame(p, id)
	close(p.dead)
	for _, u := range calls {
		tr.w.end(u, false)
	}
	names := func(ids []engine.VersionID) string {
		var all []string
		for _, id := range ids {
			all = append(all, id.Model)
		}
		slices.Sort(all)
		return strings.Join(all, " ")
	}
	var gone []engine.VersionID
	for id := range tr.w.quarantined {
		gone = append(gone, id)
	}
	if names(p.blamed) != blamed || names(gone) != quarantined {
		tr.t.Fatalf("blamed %q, in quarantine %q; not %q and %q", names(p.blamed), names(gone), blamed, quarantined)
	}
	tr.next()
}

func TestTrials(t *testing.T) {
	strong, weak := guilt{strong: 1}, guilt{weak: 1}
	for name, test := range map[string]func(*trials){
		"one of two": func(tr *trials) {
			tr.die(false, "", []use{tr.begin("a", guilt{}), tr.begin("b", guilt{}), tr.begin("a", guilt{})}, "a b", "")
			a := tr.begin("a", strong)
			tr.waits("b", strong)
			tr.waits("a", strong)
			tr.die(false, "", []use{a, tr.begin("c", guilt{}), tr.begin("d", guilt{})}, "a", "a")
			tr.w.end(tr.begin("b", strong), true)
			one, other := tr.begin("b", guilt{}), tr.begin("b", guilt{})
			tr.die(false, "", []use{one, other, tr.begin("c", guilt{})}, "b c", "a")
		},
		"cleared, then on the way": func(tr *trials) {
			tr.die(false, "", []use{tr.begin("a", guilt{}), tr.begin("b", guilt{})}, "a b", "")
			tr.w.end(tr.begin("b", strong), true)
			tr.die(false, "", []use{tr.begin("b", guilt{}), tr.begin("a", strong)}, "a", "a")
		},
		"inputs that are to blame": func(tr *trials) {
			tr.die(false, "", []use{tr.begin("a", guilt{}), tr.begin("a", guilt{})}, "a", "")
			tr.w.end(tr.begin("a", strong), true) // of other inputs
			tr.die(false, "", []use{tr.begin("a", guilt{}), tr.begin("a", strong)}, "a", "a")
		},
		"kills": func(tr *trials) {
			tr.die(true, "", []use{tr.begin("a", guilt{}), tr.begin("b", guilt{})}, "a b", "")
			tr.die(true, "", []use{tr.begin("a", weak), tr.begin("b", weak)}, "a b", "")
			a := tr.begin("a", guilt{weak: 2})
			tr.waits("b", guilt{weak: 2})
			tr.die(true, "", []use{a}, "a", "a")
			tr.w.end(tr.begin("b", guilt{weak: 2}), true)
			tr.die(true, "", []use{tr.begin("b", guilt{})}, "b", "a")
		},
		"a kill after a death": func(tr *trials) {
			tr.die(false, "", []use{tr.begin("a", guilt{})}, "a", "")
			tr.die(true, "", []use{tr.begin("a", strong)}, "a", "")
			tr.die(true, "", []use{tr.begin("a", guilt{strong: 1, weak: 1})}, "a", "a")
		},
		"ended for one": func(tr *trials) {
			tr.die(false, "b", []use{tr.begin("a", guilt{}), tr.begin("b", guilt{})}, "b", "")
			tr.die(false, "b", []use{tr.begin("a", guilt{}), tr.begin("b", strong)}, "b", "b")
		},
		"nothing in flight": func(tr *trials) {
			for range 5 {
				tr.die(false, "", nil, "", "")
			}
		},
	} {
		t.Run(name, func(t *testing.T) { test(newTrials(t, "a", "b", "c", "d")) })
	}
	for g, want := range map[guilt]string{
		{}: "true", {strong: 1}: "true", {strong: 2}: "false", {weak: 3}: "true", {weak: 4}: "false",
		{strong: 1, weak: 2}: "true", {deaths: maxDeaths}: "false",
	} {
		if got := fmt.Sprint(g.retried()); got != want {
			t.Errorf("after %+v retried: %s", g, got)
		}
	}
}
