package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// everything is a route whose rules look at all that rules can look at.
func everything() *dunlinv1.DesiredRoute {
	two := []*dunlinv1.RouteTarget{target("a", 0, 90), target("b", 2, 10), target("c", 0, 0)}
	return &dunlinv1.DesiredRoute{
		Name: "vision", Targets: two, Sticky: &dunlinv1.RouteSticky{Header: "x-session"},
		Rules: []*dunlinv1.RouteRule{
			{Name: "gold", Targets: one("large"), Match: &dunlinv1.RouteMatch{Parameters: where("tier", "gold", "platinum"), Labels: where("site", "berlin")}},
			{Name: "batches", Targets: two, Match: &dunlinv1.RouteMatch{Inputs: []*dunlinv1.RouteInput{{Name: "image", MinRows: 9, MaxRows: 20}}}},
			{Name: "busy", Targets: one("small"), Match: &dunlinv1.RouteMatch{Headers: where("x-kind", "a"), Cel: `device.live.queue_depth > 50 && request.parameters["user"] == "me" && request.inputs.mask[0] < 4`}},
		},
	}
}

func TestExplain(t *testing.T) {
	p := mustCompile(t, everything())
	q := &Request{
		Parameters: words{"tier": "gold"}, Headers: words{"x-kind": "a", "x-session": "s1"}, Labels: map[string]string{"site": "bonn"},
		Live: func() Figures { return Figures{QueueDepth: Figure{60, true}} },
	}
	e := p.Explain(q, 7)
	if e.Decision != p.Decide(q, 7) {
		t.Errorf("%+v, decided is %+v", e.Decision, p.Decide(q, 7))
	}
	want := []Seen{
		{"gold", []Condition{
			{Kind: "parameter", Name: "tier", Value: "gold", There: true, Want: []string{"gold", "platinum"}, Holds: true},
			{Kind: "label", Name: "site", Value: "bonn", There: true, Want: []string{"berlin"}},
		}},
		{"batches", []Condition{{Kind: "input", Name: "image", Want: []string{"9", "20"}}}},
		{"busy", []Condition{
			{Kind: "header", Name: "x-kind", Value: "a", There: true, Want: []string{"a"}, Holds: true},
			{Kind: "cel", Name: everything().Rules[2].Match.Cel, Fault: "no such key: user"},
		}},
	}
	if got, want := fmt.Sprintf("%+v", e.Rules), fmt.Sprintf("%+v", want); got != want {
		t.Errorf("rules\n%s, want\n%s", got, want)
	}
	if e.Faulted != 1<<2 || e.Live == nil || e.Live.QueueDepth.Value != 60 {
		t.Errorf("faulted %b, live %v", e.Faulted, e.Live)
	}
	if c := e.Choice; !c.Stuck || c.Key != "s1" || c.KeyKind != "header" || c.KeyName != "x-session" || len(c.Options) != 2 || c.Sum != 100 {
		t.Errorf("choice %+v", c)
	}
}

// Of requests that are made up, the explanation always says what is decided,
// and what it shows leads there.
func TestExplainSaysWhatIsDecided(t *testing.T) {
	route := everything()
	p, seed := mustCompile(t, route), rand.Uint64()
	t.Logf("seed %d", seed)
	made := MakeUp(route, seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	rules := map[int]int{}
	faults, byKey := 0, 0
	for i := range 5000 {
		parameters, headers, inputs, random := made.Next()
		q := &Request{Parameters: words(parameters), Headers: words(headers), Inputs: inputs, Labels: map[string]string{"site": []string{"berlin", "bonn"}[rng.IntN(2)]}}
		if rng.IntN(2) == 0 {
			q.Live = func() Figures { return Figures{QueueDepth: Figure{60, true}} }
		}
		e, d := p.Explain(q, random), p.Decide(q, random)
		if e.Decision != d {
			t.Fatalf("request %d: explained %+v, decided %+v", i, e.Decision, d)
		}
		rules[d.Rule]++
		for j, seen := range e.Rules {
			all := !slices.ContainsFunc(seen.Conditions, func(c Condition) bool { return !c.Holds })
			if all != (j == d.Rule) || len(seen.Conditions) == 0 || seen.Rule != p.RuleName(j) {
				t.Fatalf("request %d: rule %d decides, seen are %+v", i, d.Rule, e.Rules)
			}
			if fault := seen.Conditions[len(seen.Conditions)-1].Fault != ""; fault != (d.Faulted>>j&1 == 1) {
				t.Fatalf("request %d: faults %b, seen are %+v", i, d.Faulted, e.Rules)
			} else if fault {
				faults++
			}
		}
		best := e.Choice.Options[0]
		if e.Choice.Stuck {
			byKey++
			for _, o := range e.Choice.Options {
				if o.Draw < best.Draw {
					best = o
				}
			}
		} else {
			best = e.Choice.Options[slices.IndexFunc(e.Choice.Options, func(o Option) bool { return e.Choice.Point < o.End })]
		}
		if best.Target != d.Target {
			t.Fatalf("request %d: %+v goes to %v", i, e.Choice, d.Target)
		}
	}
	if len(rules) != 4 || faults == 0 || byKey == 0 {
		t.Errorf("rules %v, %d faults, %d by a key: what is made up does not reach all", rules, faults, byKey)
	}
}

func TestMakeUpIsTheSameForASeed(t *testing.T) {
	a, b, c := MakeUp(everything(), 1), MakeUp(everything(), 1), MakeUp(everything(), 2)
	next := func(m *Made) string {
		parameters, headers, inputs, random := m.Next()
		return fmt.Sprint(parameters, headers, inputs, random)
	}
	same := 0
	for range 100 {
		first, second := next(a), next(b)
		if first != second {
			t.Fatalf("%s and %s", first, second)
		}
		if first == next(c) {
			same++
		}
	}
	if same > 0 {
		t.Errorf("%d requests are those of another seed", same)
	}
}
