package models

// Costs is what the shapes in a graph tell of its runs.
type Costs struct {
	// Workspace is the most memory that values, without weights, inputs and
	// outputs, take at one moment of a run, in bytes.
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
