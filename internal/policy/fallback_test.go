package policy

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestFallbacks(t *testing.T) {
	route := &dunlinv1.DesiredRoute{
		Name: "r", Targets: []*dunlinv1.RouteTarget{target("a", 0, 1), target("b", 0, 0)},
		Fallback: []*dunlinv1.RouteFallback{{Model: "b"}, {Model: "a", Version: 2, On: []string{"not-resident"}}},
		Rules:    []*dunlinv1.RouteRule{{Name: "x", Match: &dunlinv1.RouteMatch{Cel: "true"}, Targets: one("c")}},
	}
	p := mustCompile(t, route)
	all := p.Fallbacks(-1)
	if len(all) != 2 || all[1].Target != (Target{"a", 2}) || len(p.Fallbacks(0)) != 0 {
		t.Fatalf("%+v, %+v", all, p.Fallbacks(0))
	}
	for why, want := range map[Reason]int{Overload: 0, Failed: 0, Deadline: 0, NotResident: 1} {
		if i := NextFallback(all, 0, why); i != want {
			t.Errorf("%s: next is %d, want %d", why, i, want)
		}
	}
	if i := NextFallback(all, 1, Failed); i != 2 {
		t.Errorf("next is %d", i)
	}
	route.Fallback[0].Version = -1
	route.Fallback[1].On = []string{""}
	if _, err := Compile(route); err == nil || !strings.Contains(err.Error(), `fallback[0].version: -1 is below 0; fallback[1].on[0]: "" is not known`) {
		t.Error(err)
	}
}

// Whatever goes wrong at each, a request comes to the end of its fallbacks,
// and to none of them twice.
func TestFallbacksEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fallbacks := make([]Fallback, rapid.IntRange(0, MaxFallbacks).Draw(t, "fallbacks"))
		for i := range fallbacks {
			fallbacks[i].on = rapid.Uint8Range(0, 1<<Reasons-1).Draw(t, "on")
		}
		last, why := -1, Reason(0)
		for steps := 0; last < len(fallbacks); steps++ {
			why = Reason(rapid.Uint8Range(0, uint8(Reasons)-1).Draw(t, "why"))
			next := NextFallback(fallbacks, last+1, why)
			if next <= last || next < len(fallbacks) && !fallbacks[next].Takes(why) || steps > len(fallbacks) {
				t.Fatalf("from %d to %d for %s in step %d of %v", last, next, why, steps, fallbacks)
			}
			last = next
		}
	})
}
