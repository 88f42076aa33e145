package policy

import (
	"fmt"
	"maps"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func target(model string, version int64, weight uint32) *dunlinv1.RouteTarget {
	return &dunlinv1.RouteTarget{Model: model, Version: version, Weight: weight}
}

func TestCompileRefuses(t *testing.T) {
	many := func(n int) (ts []*dunlinv1.RouteTarget) {
		for i := range n {
			ts = append(ts, target("digits", int64(i), 1))
		}
		return ts
	}
	tests := []struct {
		name, route string
		targets     []*dunlinv1.RouteTarget
		want        string // part of the error; "" where it is valid
	}{
		{"one", "r", many(1), ""},
		{"most targets", "r", many(MaxTargets), ""},
		{"zero beside others", "r", []*dunlinv1.RouteTarget{target("a", 1, 0), target("a", 2, 1)}, ""},
		{"greatest weight", "r", []*dunlinv1.RouteTarget{target("a", 1, MaxWeight)}, ""},
		{"none", "r", nil, "targets: there are 0, allowed are 1 to 64"},
		{"too many", "r", many(MaxTargets + 1), "targets: there are 65"},
		{"all zero", "r", []*dunlinv1.RouteTarget{target("a", 1, 0), target("b", 1, 0)}, "every weight is 0"},
		{"weight", "r", []*dunlinv1.RouteTarget{target("a", 1, MaxWeight+1)}, "targets[0].weight: 10001, allowed are 0 to 10000"},
		{"version", "r", []*dunlinv1.RouteTarget{target("a", -1, 1)}, "targets[0].version: -1"},
		{"model", "r", []*dunlinv1.RouteTarget{target("A", 1, 1)}, "targets[0].model: name \"A\""},
		{"duplicate", "r", []*dunlinv1.RouteTarget{target("a", 1, 1), target("b", 1, 1), target("a", 1, 2)}, "targets[2]: the same model and version as targets[0]"},
		{"route name", "no/name", many(1), "route: name \"no/name\""},
		{"nil target", "r", []*dunlinv1.RouteTarget{nil}, "targets[0].model"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Compile(&dunlinv1.DesiredRoute{Name: tt.route, Targets: tt.targets})
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

func TestPickSharesAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		weights := rapid.SliceOfN(rapid.Uint32Range(0, 200), 1, MaxTargets).Draw(t, "weights")
		weights[0]++
		route := &dunlinv1.DesiredRoute{Name: "r"}
		want := map[Target]int{}
		var sum uint64
		for i, w := range weights {
			route.Targets = append(route.Targets, target(fmt.Sprintf("m%d", i), int64(i%3), w))
			sum += uint64(w)
			if w > 0 {
				want[Target{fmt.Sprintf("m%d", i), int64(i % 3)}] = int(w)
			}
		}
		p, err := Compile(route)
		if err != nil {
			t.Fatal(err)
		}
		from := rapid.Uint64Range(0, math.MaxUint64/2).Draw(t, "from")
		got := map[Target]int{}
		for r := from; r < from+sum; r++ {
			got[p.Decide(&Request{}, r).Target]++
		}
		if !maps.Equal(got, want) {
			t.Fatalf("picked %v, want %v", got, want)
		}
	})
}
