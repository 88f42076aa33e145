package policy

import (
	"math"
	"strings"
	"testing"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestShadow(t *testing.T) {
	route := &dunlinv1.DesiredRoute{
		Name: "r", Targets: []*dunlinv1.RouteTarget{target("a", 0, 1), target("b", 0, 1)}, Shadow: &dunlinv1.RouteShadow{Model: "b", Rate: 0.25},
		Rules: []*dunlinv1.RouteRule{{Name: "x", Match: &dunlinv1.RouteMatch{Cel: "true"}, Targets: one("c")}},
	}
	p := mustCompile(t, route)
	if p.Shadow(0) != nil {
		t.Error("a rule has the shadow of the route")
	}
	taken := map[Target]int{}
	for n := range uint64(100000) {
		if p.Shadow(-1).Takes(n) {
			taken[p.unmatched.pick(n)]++
		}
	}
	for _, target := range p.Targets(-1) {
		if math.Abs(float64(taken[target])/50000-0.25) > 0.01 {
			t.Errorf("of 50000 requests to %s it takes %d", target, taken[target])
		}
	}
	for _, rate := range []float64{0, -1, 1.01, math.NaN(), math.Inf(1)} {
		route.Shadow.Rate = rate
		if _, err := Compile(route); err == nil || !strings.Contains(err.Error(), "shadow.rate: ") {
			t.Errorf("rate %v: %v", rate, err)
		}
	}
}
