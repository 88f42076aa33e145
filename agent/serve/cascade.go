package serve

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models/tensor"
)

// CascadeOutcome is what came of a request whose target has answered.
type CascadeOutcome int

// The outcomes. In all but CascadeLarge the target's own answer stands.
const (
	CascadeSmall    CascadeOutcome = iota // it is sure enough
	CascadeLarge                          // the larger one has answered
	CascadeFailed                         // the larger one was asked, and has not answered
	CascadeFault                          // the expression could not be evaluated
	CascadeOutcomes                       // how many there are
)

var cascadeNames = [CascadeOutcomes]string{"small", "large", "failed", "fault"}

// String gives the name that the header of an answer has for it.
func (o CascadeOutcome) String() string { return cascadeNames[o] }

// cascadeCounts count the outcomes of a cascade.
type cascadeCounts [CascadeOutcomes]atomic.Uint64

// CascadeFigures count the answers that a cascade has looked at.
type CascadeFigures struct {
	policy.Target
	Requests [CascadeOutcomes]uint64
}

func (c *cascadeCounts) get(of *policy.Cascade) *CascadeFigures {
	f := &CascadeFigures{Target: of.Target}
	for i := range c {
		f.Requests[i] = c[i].Load()
	}
	return f
}

// runTarget runs a request on its target, and on the larger model of a cascade
// where the target's output says so. The target's answer stands where the
// larger one does not answer, and where the expression cannot be evaluated; its
// outputs are copied while the larger one runs, so that nobody waits for memory
// that they hold.
func (s *Server) runTarget(ctx context.Context, t *table, c oip.Call, id engine.VersionID, began time.Time, by *choice) (oip.Answer, error) {
	resident := takesCold(by.fallbacks(), 0)
	cascade := by.larger()
	if cascade == nil {
		return s.run(ctx, t, c, id, resident, by)
	}
	large, absent := t.version(cascade.Target)
	if absent == nil && large == id {
		return s.run(ctx, t, c, id, resident, by) // it is the larger one
	}
	look := c
	var all []string        // outputs that the model has, where the caller asks for some
	if len(c.Outputs) > 0 { // what the expression looks at may not be among them
		all = s.outputs(id)
		look.Outputs = slices.Clone(c.Outputs)
		for _, name := range all {
			if !slices.Contains(look.Outputs, name) {
				look.Outputs = append(look.Outputs, name)
			}
		}
	}
	small, err := s.run(ctx, t, look, id, resident, by)
	if err != nil {
		return small, err
	}
	outputs := small.Outputs
	if len(c.Outputs) > 0 {
		outputs = ordered(outputs, all)
		small.Outputs = small.Outputs[:min(len(c.Outputs), len(small.Outputs))]
	}
	end := func(a oip.Answer, o CascadeOutcome) (oip.Answer, error) {
		by.cascade = o.String()
		by.route.counts[by.decision.Rule+1].cascade[o].Add(1)
		a.Header = t.header(answered{engine.VersionID{Model: a.Model, Version: a.Version}, by.rule(), by.fallback, by.cascade})
		return a, nil
	}
	on, err := cascade.SendsOn(&policy.Request{
		Parameters: c.Parameters, Headers: c.Headers, Inputs: c.Inputs, Labels: t.labels, Live: t.live,
	}, outputs)
	switch {
	case err != nil:
		return end(small, CascadeFault)
	case !on:
		return end(small, CascadeSmall)
	case absent != nil:
		return end(small, CascadeFailed)
	}
	small.Outputs = clone(small.Outputs)
	if small.Release != nil {
		small.Release()
		small.Release = nil
	}
	if c.Timeout > 0 {
		c.Timeout = max(c.Timeout-time.Since(began), 1) // what is left of it
	}
	answer, err := s.run(ctx, t, c, large, false, by)
	if err != nil {
		return end(small, CascadeFailed)
	}
	return end(answer, CascadeLarge)
}

// larger gives the cascade of the rule that decided, nil where it has none.
func (c *choice) larger() *policy.Cascade {
	if c.route == nil {
		return nil
	}
	return c.route.policy.Cascade(c.decision.Rule)
}

// outputs gives the names of a version's outputs, in its order.
func (s *Server) outputs(id engine.VersionID) []string {
	info, _ := s.engine.Info(id)
	names := make([]string, len(info.Outputs))
	for i := range names {
		names[i] = info.Outputs[i].Name
	}
	return names
}

// ordered gives the outputs of these names, in their order.
func ordered(outputs []tensor.Tensor, names []string) []tensor.Tensor {
	var all []tensor.Tensor
	for _, name := range names {
		if i := slices.IndexFunc(outputs, func(t tensor.Tensor) bool { return t.Name == name }); i >= 0 {
			all = append(all, outputs[i])
		}
	}
	return all
}
