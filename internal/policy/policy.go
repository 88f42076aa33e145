// Package policy decides which version of which model answers a request to a route.
package policy

import (
	"errors"
	"fmt"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Limits of a route.
const (
	MaxTargets = 64
	MaxWeight  = 10000
)

// Target is where a request goes.
type Target struct {
	Model   string
	Version int64 // 0: the one that the device serves of the model
}

// Policy is a compiled route. It never changes and may be used concurrently.
type Policy struct {
	targets []Target
	ends    []uint64 // sum of the weights up to and including each target
}

// Compile checks a route and makes a policy of it. A target of weight 0 gets
// no requests; at least one must have more.
func Compile(route *dunlinv1.DesiredRoute) (*Policy, error) {
	if err := models.CheckName(route.GetName()); err != nil {
		return nil, fmt.Errorf("route: %w", err)
	}
	p, err := compile(route.GetTargets())
	if err != nil {
		return nil, fmt.Errorf("route %s: %w", route.GetName(), err)
	}
	return p, nil
}

func compile(targets []*dunlinv1.RouteTarget) (*Policy, error) {
	if len(targets) < 1 || len(targets) > MaxTargets {
		return nil, fmt.Errorf("targets: there are %d, allowed are 1 to %d", len(targets), MaxTargets)
	}
	p := &Policy{}
	first := map[Target]int{}
	var end uint64
	for i, rt := range targets {
		t := Target{rt.GetModel(), rt.GetVersion()}
		if err := models.CheckName(t.Model); err != nil {
			return nil, fmt.Errorf("targets[%d].model: %w", i, err)
		}
		if t.Version < 0 {
			return nil, fmt.Errorf("targets[%d].version: %d is below 0", i, t.Version)
		}
		if rt.GetWeight() > MaxWeight {
			return nil, fmt.Errorf("targets[%d].weight: %d, allowed are 0 to %d", i, rt.GetWeight(), MaxWeight)
		}
		if j, ok := first[t]; ok {
			return nil, fmt.Errorf("targets[%d]: the same model and version as targets[%d]", i, j)
		}
		first[t] = i
		if rt.GetWeight() == 0 {
			continue
		}
		end += uint64(rt.GetWeight())
		p.targets = append(p.targets, t)
		p.ends = append(p.ends, end)
	}
	if end == 0 {
		return nil, errors.New("targets: every weight is 0")
	}
	return p, nil
}

// Pick gives the target of a request. Over any run of consecutive numbers as
// long as the sum of the weights, each target is picked exactly as often as
// its weight says; the same number always picks the same target. It does not
// allocate.
func (p *Policy) Pick(random uint64) Target {
	at := random % p.ends[len(p.ends)-1]
	i := 0
	for at >= p.ends[i] {
		i++
	}
	return p.targets[i]
}
