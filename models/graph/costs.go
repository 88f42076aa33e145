package graph

import (
	"math"
	"slices"
)

// Costs is what the shapes in a graph tell of its runs. Of open dimensions,
// the first of each input is the rows of a run, and all others count as 1.
type Costs struct {
	// Workspace is the memory that a run takes on a CPU for the values between
	// operators and for its outputs, in bytes, as the runtime plans it and as
	// the allocator of package ort keeps it. Neither weights nor inputs are
	// part of it.
	Workspace Linear `json:"workspace"`
	// FLOPs counts additions and multiplications.
	FLOPs Linear `json:"flops"`
	// Traffic is the sum of what operators read and write, weights included,
	// in bytes.
	Traffic Linear `json:"traffic"`
	// Nodes are the operators that a run executes.
	Nodes int `json:"nodes"`
	// Unknown are operators the shapes of whose outputs could not be told: the
	// figures are too low where there are any. Sorted, at most 32.
	Unknown []string `json:"unknown,omitempty"`
}

// Linear is an amount that grows with the rows of a run.
type Linear struct {
	Fixed  float64 `json:"fixed"`
	PerRow float64 `json:"perRow"`
}

// At gives the amount for so many rows.
func (l Linear) At(rows int) float64 { return l.Fixed + l.PerRow*float64(rows) }

// MaxUnknown bounds Costs.Unknown.
const MaxUnknown = 32

// Estimate gives what runs of a graph cost. It looks at runs of one row and of
// 16, and draws a line through them; a model without open dimensions has no
// costs for each row.
func Estimate(g *Graph) Costs {
	const few, many = 1, 16
	a, b := at(g, few), at(g, many)
	line := func(x, y float64) Linear { // in whole numbers
		each := max(math.Ceil((y-x)/(many-few)), 0)
		return Linear{Fixed: max(math.Ceil(x)-few*each, 0), PerRow: each}
	}
	c := Costs{Workspace: line(a.workspace, b.workspace), FLOPs: line(a.flops, b.flops), Traffic: line(a.traffic, b.traffic),
		Nodes: max(a.nodes, b.nodes)}
	seen := map[string]bool{}
	for _, n := range slices.Concat(a.unknown, b.unknown) {
		if key := operatorKey(n); !seen[key] {
			seen[key] = true
			c.Unknown = append(c.Unknown, key)
		}
	}
	slices.Sort(c.Unknown)
	c.Unknown = c.Unknown[:min(len(c.Unknown), MaxUnknown)]
	return c
}

type figures struct {
	workspace, flops, traffic float64
	nodes                     int
	unknown                   []*Node
}

// at gives the figures of runs of so many rows.
func at(g *Graph, rows int64) figures {
	p := newProgram(infer(g, rows))
	f := figures{workspace: p.workspace(), nodes: len(p.steps), unknown: p.unknown}
	for _, s := range p.steps {
		f.flops += s.flops
		if !s.alias {
			f.traffic += s.weights + p.size(s.in...) + p.size(s.out...)
		}
	}
	return f
}
