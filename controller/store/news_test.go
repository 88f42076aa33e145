package store

import (
	"fmt"
	"testing"

	"github.com/dunlin/dunlin/controller/fleet"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TestNews: who begins is told of what comes from then on, of each once and in
// order, whatever the steps; a cursor is kept.
func TestNews(t *testing.T) {
	s, _ := fresh(t)
	join(t, s, "dev", map[string]string{"site": "demo"})
	push(t, s, "m", "sha256:1")
	event := func(n uint64) {
		t.Helper()
		_, _, err := s.AddEvents(t.Context(), "dev", "box", []*dunlinv1.Event{{Sequence: n, Kind: fmt.Sprint("kind.", n)}})
		must(t, err)
	}
	event(1)
	cursor, err := s.Cursor(t.Context(), "x")
	must(t, err)
	changes, err := s.Apply(t.Context(), "user:test", parse(t, "apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {model: m, version: 1, selector: {site: demo}}\n"), false)
	must(t, err)
	before, err := s.Rollout(t.Context(), changes[0].Rollout)
	must(t, err)
	event(2)
	after := before
	after.State, after.Reason = fleet.Halted, "p99"
	must(t, s.SaveRollout(t.Context(), before, after, []fleet.Decision{{Kind: fleet.DecideHalt, Reason: "p99"}}))
	event(3)
	var told []string
	for at := cursor; ; {
		news, err := s.News(t.Context(), at, 1)
		must(t, err)
		if len(news) == 0 {
			must(t, s.SetCursor(t.Context(), "x", at))
			break
		}
		for _, n := range news {
			at = n.Cursor
			switch {
			case n.Decision != nil && (n.Rollout.ID() != changes[0].Rollout || n.Selector["site"] != "demo" || n.Rollout.To != 1):
				t.Errorf("told of %+v", n.Rollout)
			case n.Event != nil && (n.Device != "dev" || n.Labels["site"] != "demo"):
				t.Errorf("told of %+v", n)
			}
			if n.Decision != nil {
				told = append(told, string(n.Decision.Kind))
			} else {
				told = append(told, n.Event.GetKind())
			}
		}
	}
	kinds := map[string]int{}
	for _, k := range told {
		kinds[k]++
	}
	if kinds["kind.1"] != 0 || kinds["kind.2"] != 1 || kinds["kind.3"] != 1 || kinds["halt"] != 1 {
		t.Errorf("told %v", told)
	}
	again, err := s.Cursor(t.Context(), "x")
	must(t, err)
	if news, err := s.News(t.Context(), again, 10); err != nil || len(news) != 0 {
		t.Errorf("told again: %v, %v", news, err)
	}
}
