package serve

import (
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/internal/policy"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// route is a compiled route, or the reason why it cannot be followed.
type route struct {
	policy  *policy.Policy
	targets []policy.Target // those of its rules too, each once
	broken  error
	counts  []ruleCounts // of requests that no rule matches, then of each rule
}

// ruleCounts count the requests that a rule decided on.
type ruleCounts struct {
	rule      string
	targets   []policy.Target
	requests  []*atomic.Uint64 // of each target
	fallbacks []*fallbackCounts
	shadow    *shadowCounts  // nil: there is none
	cascade   *cascadeCounts // nil: there is none
	faults    *atomic.Uint64
}

func newRoute(r *dunlinv1.DesiredRoute) *route {
	p, err := policy.Compile(r)
	c := &route{policy: p, broken: err}
	add := func(targets []*dunlinv1.RouteTarget) {
		for _, rt := range targets {
			t := policy.Target{Model: rt.GetModel(), Version: rt.GetVersion()}
			if rt.GetWeight() > 0 && !slices.Contains(c.targets, t) {
				c.targets = append(c.targets, t)
			}
		}
	}
	add(r.GetTargets())
	for _, rule := range r.GetRules() {
		add(rule.GetTargets())
	}
	if err != nil {
		return c
	}
	for i := -1; i < p.Rules(); i++ {
		n := ruleCounts{rule: p.RuleName(i), targets: p.Targets(i), faults: new(atomic.Uint64)}
		for range n.targets {
			n.requests = append(n.requests, new(atomic.Uint64))
		}
		for range p.Fallbacks(i) {
			n.fallbacks = append(n.fallbacks, new(fallbackCounts))
		}
		if shadow := p.Shadow(i); shadow != nil {
			n.shadow = &shadowCounts{ShadowFigures: ShadowFigures{Target: shadow.Target}}
		}
		if p.Cascade(i) != nil {
			n.cascade = new(cascadeCounts)
		}
		c.counts = append(c.counts, n)
	}
	return c
}

// resume goes on with the counts of the route that was there before, which may
// be nil, where the rule and the target are the same.
func (r *route) resume(before *route) {
	if before == nil {
		return
	}
	for i := range r.counts {
		n := &r.counts[i]
		j := slices.IndexFunc(before.counts, func(old ruleCounts) bool { return old.rule == n.rule })
		if j < 0 {
			continue
		}
		old := &before.counts[j]
		n.faults = old.faults
		for k, t := range n.targets {
			if l := slices.Index(old.targets, t); l >= 0 {
				n.requests[k] = old.requests[l]
			}
		}
		if n.shadow != nil && old.shadow != nil && n.shadow.Target == old.shadow.Target {
			n.shadow = old.shadow
		}
		if was, is := before.policy.Cascade(j-1), r.policy.Cascade(i-1); was != nil && is != nil && was.Target == is.Target {
			n.cascade = old.cascade
		}
		had := before.policy.Fallbacks(j - 1)
		for k, f := range r.policy.Fallbacks(i - 1) {
			if l := slices.IndexFunc(had, func(o policy.Fallback) bool { return o.Target == f.Target }); l >= 0 {
				n.fallbacks[k] = old.fallbacks[l]
			}
		}
	}
}

// choice is how the target of a request was found.
type choice struct {
	route    *route // nil: it asks for a model
	decision policy.Decision
	mirrored *mirrored // nil: no shadow runs it
	fallback string    // why the target does not answer; "": it is asked
	cascade  string    // what came of the cascade; "": there was none
}

// rule names the rule that matched; "" where no route was asked.
func (c *choice) rule() string {
	if c.route == nil {
		return ""
	}
	return c.route.counts[c.decision.Rule+1].rule
}

func (c *choice) count() {
	if c.route == nil {
		return
	}
	n := &c.route.counts[c.decision.Rule+1]
	if i := slices.Index(n.targets, c.decision.Target); i >= 0 {
		n.requests[i].Add(1)
	}
	for faulted := c.decision.Faulted; faulted != 0; faulted &= faulted - 1 {
		c.route.counts[bits.TrailingZeros64(faulted)+1].faults.Add(1)
	}
}

// figures are what rules know of the device at this moment.
func (s *Server) figures() policy.Figures {
	b := s.engine.Backlog()
	f := policy.Figures{
		QueueDepth:    policy.Figure{Value: float64(b.Waiting), Known: true},
		PredictedWait: policy.Figure{Value: float64(b.Wait) / float64(time.Millisecond), Known: b.Known},
	}
	if s.heat != nil {
		f.Temperature.Value, f.Temperature.Known = s.heat()
	}
	return f
}

// RuleFigures count the requests to a route that one of its rules decided on,
// since the route has the rule.
type RuleFigures struct {
	Route, Rule string // policy.DefaultRule: those that no rule matched
	Targets     []TargetFigures
	Fallbacks   []FallbackFigures
	Shadow      *ShadowFigures  // nil: there is none
	Cascade     *CascadeFigures // nil: there is none
	Faults      uint64          // requests for which the match could not be evaluated
}

// TargetFigures count the requests that were sent to a target, also those that
// failed there.
type TargetFigures struct {
	policy.Target
	Requests uint64
}

// Rules gives the figures of all rules of all routes, in no order.
func (s *Server) Rules() []RuleFigures {
	var all []RuleFigures
	for name, r := range s.table.Load().routes {
		for i := range r.counts {
			n := &r.counts[i]
			f := RuleFigures{Route: name, Rule: n.rule, Faults: n.faults.Load()}
			for j, t := range n.targets {
				f.Targets = append(f.Targets, TargetFigures{t, n.requests[j].Load()})
			}
			for j, fallback := range r.policy.Fallbacks(i - 1) {
				g := FallbackFigures{Fallback: fallback}
				for why := range g.Requests {
					g.Requests[why] = n.fallbacks[j][why].Load()
				}
				f.Fallbacks = append(f.Fallbacks, g)
			}
			if n.shadow != nil {
				figures := n.shadow.get()
				f.Shadow = &figures
			}
			if n.cascade != nil {
				f.Cascade = n.cascade.get(r.policy.Cascade(i - 1))
			}
			all = append(all, f)
		}
	}
	return all
}
