package models

import (
	"errors"
	"math"

	"github.com/dunlin/dunlin/models/graph"
)

// Costs is what the shapes in a graph tell of its runs.
type Costs = graph.Costs

// Linear is an amount that grows with the rows of a run.
type Linear = graph.Linear

// maxCost bounds each figure of Costs.
const maxCost = 1e18

// EstimateCosts gives what the graph in the ONNX file at path tells of its
// runs. It gives nil for a graph that Inspect takes and ReadGraph does not,
// for its size.
func EstimateCosts(path string) (*Costs, error) {
	g, err := ReadGraph(path)
	if errors.Is(err, ErrInvalid) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := graph.Estimate(g)
	if checkCosts(&c) != nil {
		return nil, nil
	}
	return &c, nil
}

func checkCosts(c *Costs) error {
	for _, l := range []struct {
		name string
		Linear
	}{{"workspace", c.Workspace}, {"flops", c.FLOPs}, {"traffic", c.Traffic}} {
		for _, v := range []float64{l.Fixed, l.PerRow} {
			if math.IsNaN(v) || v < 0 || v > maxCost {
				return invalid("costs: %s has %g, allowed are 0 to %g", l.name, v, maxCost)
			}
		}
	}
	if c.Nodes < 0 || c.Nodes > maxNodes {
		return invalid("costs: %d nodes, allowed are 0 to %d", c.Nodes, maxNodes)
	}
	if len(c.Unknown) > graph.MaxUnknown {
		return invalid("costs: %d unknown operators, allowed are %d", len(c.Unknown), graph.MaxUnknown)
	}
	for i, op := range c.Unknown {
		if err := checkString("unknown operator", op); err != nil {
			return err
		}
		if i > 0 && c.Unknown[i-1] >= op {
			return invalid("unknown operator %q is not in order", shorten(op))
		}
	}
	return nil
}
