// Package graph infers the shapes of a model's values and what its runs cost.
package graph

import "github.com/dunlin/dunlin/models/tensor"

// MaxRank bounds the dimensions of a value.
const MaxRank = 64

// Graph is the main graph of an ONNX model. The graphs inside of nodes (If,
// Loop, Scan) and the model's own functions are not part of it.
type Graph struct {
	// Nodes are in the file's order: ONNX wants each after those that it
	// takes values from.
	Nodes []Node
	// Inputs are those that a run gives, without those that have an
	// initialiser.
	Inputs  []Value
	Outputs []Value
	// Stated are the values between nodes of which the file says the type or
	// the shape, by name.
	Stated map[string]Value
	// Constants are the initialisers, by name.
	Constants map[string]Constant
	// Opset is the version of the default operator set, 0 where the model
	// does not import it.
	Opset int64
}

// Node is one operation.
type Node struct {
	// Name is "" where the file gives none. Exporters write the scope that the
	// node comes from into it, with slashes.
	Name string
	// Domain is "" for the default operator set.
	Domain, Op string
	// Inputs and Outputs name values; "" stands for one that is left out.
	Inputs, Outputs []string
	Attributes      map[string]Attribute
	// Graphs says that there are graphs inside of the node, which read values
	// that are not among its inputs.
	Graphs bool
}

// Attribute is one of a node. Of its members those have something in them
// that the attribute's type has.
type Attribute struct {
	Int    int64
	Float  float64
	Text   string
	Ints   []int64
	Floats []float64
	Tensor *Constant
}

// Value is a tensor that a node takes or gives.
type Value struct {
	Name string
	// Type is 0 where it is not known, or not that of a tensor.
	Type tensor.Type
	// Dims is nil where the rank is not known, and empty for a scalar.
	Dims []Dim
}

// Dim is a dimension: a size, or -1 with the name that the file gives it, ""
// where it gives none.
type Dim struct {
	Size int64
	Name string
}

// Constant is a tensor that is in the file.
type Constant struct {
	Type  tensor.Type
	Dims  []int64
	Bytes int64
	// Ints has the elements of a small tensor of integers or BOOL, Floats
	// those of a small one of FP32 or FP64; nil where there are others, or too
	// many.
	Ints   []int64
	Floats []float64
}

func (n *Node) int(name string, otherwise int64) int64 {
	if a, ok := n.Attributes[name]; ok {
		return a.Int
	}
	return otherwise
}

func (n *Node) ints(name string) []int64 { return n.Attributes[name].Ints }

func (n *Node) text(name, otherwise string) string {
	if a, ok := n.Attributes[name]; ok && a.Text != "" {
		return a.Text
	}
	return otherwise
}

// input gives the name of an input, "" where it is left out.
func (n *Node) input(i int) string {
	if i < len(n.Inputs) {
		return n.Inputs[i]
	}
	return ""
}
