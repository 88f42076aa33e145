// Package onnxwriter writes ONNX models from a description of their graph, for
// tests and benchmarks that need nets of a certain shape or fault.
//
// Field numbers are those of onnx.proto in the ONNX specification.
package onnxwriter

import (
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/tensor"
)

// Model is a graph and the version of the standard operators that it uses.
type Model struct {
	Opset           int64
	Inputs, Outputs []Value
	Weights         []Weight
	Nodes           []Node
}

// Value is an input or output.
type Value struct {
	Name     string
	Type     tensor.Type
	Shape    []int64 // -1: any size, under the name "n"
	AnyRank  bool    // no shape at all
	Sequence bool    // a sequence of such tensors
}

// Float gives a FP32 value.
func Float(name string, shape ...int64) Value {
	return Value{Name: name, Type: tensor.Float32, Shape: shape}
}

// Weight is an initialiser.
type Weight struct {
	Name  string
	Type  tensor.Type
	Shape []int64
	Data  []byte // raw little-endian elements; nil where External is set
	// External is the file, in the model's folder, that holds the data.
	External string
}

// Node is a use of an operator.
type Node struct {
	Op      string
	Domain  string
	In, Out []string
	Ints    map[string]int64 // attributes
}

func message(b []byte, field protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), m)
}

func text(b []byte, field protowire.Number, s string) []byte {
	return message(b, field, []byte(s))
}

func number(b []byte, field protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
}

// Marshal gives the bytes of the .onnx file. The same model gives the same bytes.
func (m Model) Marshal() []byte {
	var graph []byte
	domains := map[string]bool{}
	var opsets []byte
	for _, n := range m.Nodes {
		graph = message(graph, 1, n.marshal())
		if n.Domain != "" && !domains[n.Domain] {
			domains[n.Domain] = true
			opsets = message(opsets, 8, number(text(nil, 1, n.Domain), 2, 1))
		}
	}
	graph = text(graph, 2, "graph")
	for _, w := range m.Weights {
		graph = message(graph, 5, w.marshal())
	}
	for _, v := range m.Inputs {
		graph = message(graph, 11, v.marshal())
	}
	for _, v := range m.Outputs {
		graph = message(graph, 12, v.marshal())
	}
	const irVersion = 8
	b := message(number(nil, 1, irVersion), 7, graph)
	b = message(b, 8, number(text(nil, 1, ""), 2, m.Opset))
	return append(b, opsets...)
}

func (v Value) marshal() []byte {
	t := number(nil, 1, int64(v.Type))
	if !v.AnyRank {
		var shape []byte
		for _, d := range v.Shape {
			dim := number(nil, 1, d)
			if d < 0 {
				dim = text(nil, 2, "n")
			}
			shape = message(shape, 1, dim)
		}
		t = message(t, 2, shape)
	}
	typ := message(nil, 1, t)
	if v.Sequence {
		typ = message(nil, 4, message(nil, 1, typ))
	}
	return message(text(nil, 1, v.Name), 2, typ)
}

func (w Weight) marshal() []byte {
	var b []byte
	for _, d := range w.Shape {
		b = number(b, 1, d)
	}
	b = number(b, 2, int64(w.Type))
	b = text(b, 8, w.Name)
	if w.External == "" {
		return message(b, 9, w.Data)
	}
	b = message(b, 13, text(text(nil, 1, "location"), 2, w.External))
	return number(b, 14, 1) // data_location: EXTERNAL
}

func (n Node) marshal() []byte {
	var b []byte
	for _, s := range n.In {
		b = text(b, 1, s)
	}
	for _, s := range n.Out {
		b = text(b, 2, s)
	}
	b = text(b, 4, n.Op)
	for _, name := range slices.Sorted(maps.Keys(n.Ints)) {
		b = message(b, 5, number(number(text(nil, 1, name), 3, n.Ints[name]), 20, 2))
	}
	if n.Domain != "" {
		b = text(b, 7, n.Domain)
	}
	return b
}
