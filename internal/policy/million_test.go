package policy

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Over a million requests each target's share is within 0.2 points of its
// weight's, by chance and by a key; and when one weight changes, so that the
// share of its target changes by x, no more than x and 0.5 points of the keys
// have another target.
func TestMillionRequests(t *testing.T) {
	for seed := range uint64(3) { // fixed: 0.2 points are four deviations
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { million(t, seed) })
	}
}

func million(t *testing.T, seed uint64) {
	const n = 1_000_000
	rng := rand.New(rand.NewPCG(seed, 0))
	weights := []uint32{9000, 700, 250, 50}
	if seed > 0 {
		for i := range weights {
			weights[i] = 1 + rng.Uint32N(MaxWeight)
		}
	}
	route := func(sticky bool) *Policy {
		r := &dunlinv1.DesiredRoute{Name: "r"}
		for i, w := range weights {
			r.Targets = append(r.Targets, target("m", int64(i+1), w))
		}
		if sticky {
			r.Sticky = &dunlinv1.RouteSticky{Header: "key"}
		}
		return mustCompile(t, r)
	}
	share := func(i int) float64 {
		sum := 0.
		for _, w := range weights {
			sum += float64(w)
		}
		return float64(weights[i]) / sum
	}
	check := func(how string, got []int) {
		t.Helper()
		for i := range weights {
			if is := float64(got[i+1]) / n; math.Abs(is-share(i)) > 0.002 {
				t.Errorf("%s, weights %v: target %d gets %.4f, want %.4f", how, weights, i, is, share(i))
			}
		}
	}
	byChance := route(false)
	got := make([]int, len(weights)+1)
	for range n {
		got[byChance.Decide(&Request{}, rng.Uint64()).Target.Version]++
	}
	check("by chance", got)

	keys := make([]string, n)
	for i := range keys {
		keys[i] = fmt.Sprintf("session-%x", rng.Uint64())
	}
	targets := make([]int64, n)
	stick := func() (moved int) {
		p, got := route(true), make([]int, len(weights)+1)
		for i, key := range keys {
			to := p.unmatched.stick(p.seed, key).Version
			got[to]++
			if to != targets[i] {
				moved++
			}
			targets[i] = to
		}
		check("by key", got)
		return moved
	}
	stick()
	i := rng.IntN(len(weights))
	before := share(i)
	weights[i] = 1 + rng.Uint32N(MaxWeight)
	if x, moved := math.Abs(share(i)-before), float64(stick())/n; moved > x+0.005 {
		t.Errorf("the share of target %d changes by %.4f, and %.4f of the keys move", i, x, moved)
	}
}
