package ort

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

var update = flag.Bool("update", false, "write the models of testdata again")

// allTypes is every element type that a tensor may have.
var allTypes = []tensor.Type{
	tensor.Float32, tensor.Uint8, tensor.Int8, tensor.Uint16, tensor.Int16, tensor.Int32, tensor.Int64, tensor.String,
	tensor.Bool, tensor.Float16, tensor.Float64, tensor.Uint32, tensor.Uint64, tensor.BFloat16,
}

// What the models below are written in.
type (
	model  = onnxwriter.Model
	values = []onnxwriter.Value
	nodes  = []onnxwriter.Node
)

var float = onnxwriter.Float

// each gives a graph with one Identity for each element type.
func each(shape []int64) model {
	g := model{Opset: 17}
	for _, t := range allTypes {
		in, out := "in_"+t.String(), "out_"+t.String()
		g.Inputs = append(g.Inputs, onnxwriter.Value{Name: in, Type: t, Shape: shape})
		g.Outputs = append(g.Outputs, onnxwriter.Value{Name: out, Type: t, Shape: shape})
		g.Nodes = append(g.Nodes, onnxwriter.Node{Op: "Identity", In: []string{in}, Out: []string{out}})
	}
	return g
}

// chain multiplies a square matrix by itself so many times; how long that
// takes is up to the matrix.
func chain(n int) model {
	g := model{Opset: 17, Inputs: values{float("x", -1, -1)}}
	last := "x"
	for i := range n {
		next := "y" + string(rune('0'+i/10)) + string(rune('0'+i%10))
		g.Nodes = append(g.Nodes, onnxwriter.Node{Op: "MatMul", In: []string{last, "x"}, Out: []string{next}})
		last = next
	}
	g.Outputs = values{float(last, -1, -1)}
	return g
}

var testModels = map[string]model{
	"types.onnx":   each([]int64{-1}),
	"scalars.onnx": each(nil),
	// The sum and the product of two matrices.
	"add.onnx": {
		Opset:   17,
		Inputs:  values{float("a", -1, 2), float("b", 2, 2)},
		Outputs: values{float("sum", -1, 2), float("product", -1, 2)},
		Nodes: nodes{
			{Op: "ReduceSum", In: []string{"b"}, Out: []string{"s"}},
			{Op: "Add", In: []string{"a", "s"}, Out: []string{"sum"}},
			{Op: "MatMul", In: []string{"a", "b"}, Out: []string{"product"}},
		},
	},
	"digits-size.onnx": {Opset: 17, Inputs: values{float("x", -1, 64)}, Outputs: values{float("y", -1, 64)},
		Nodes: nodes{{Op: "Relu", In: []string{"x"}, Out: []string{"y"}}}},
	"any-rank.onnx": {Opset: 17,
		Inputs:  values{{Name: "x", Type: tensor.Float32, AnyRank: true}},
		Outputs: values{{Name: "y", Type: tensor.Float32, AnyRank: true}},
		Nodes:   nodes{{Op: "Neg", In: []string{"x"}, Out: []string{"y"}}}},
	// Its output is its input.
	"passthrough.onnx": {Opset: 17, Inputs: values{float("x", -1)}, Outputs: values{float("x", -1), float("y", -1)},
		Nodes: nodes{{Op: "Neg", In: []string{"x"}, Out: []string{"y"}}}},
	"chain.onnx":   chain(90),
	"opset99.onnx": {Opset: 99, Inputs: values{float("x", 1)}, Outputs: values{float("y", 1)}, Nodes: nodes{{Op: "Relu", In: []string{"x"}, Out: []string{"y"}}}},
	"unknown-operator.onnx": {Opset: 17, Inputs: values{float("x", 1)}, Outputs: values{float("y", 1)},
		Nodes: nodes{{Op: "Frobnicate", In: []string{"x"}, Out: []string{"y"}}}},
	"sequence.onnx": {Opset: 17, Inputs: values{float("x", 4)},
		Outputs: values{{Name: "y", Type: tensor.Float32, Shape: []int64{-1}, Sequence: true}},
		Nodes:   nodes{{Op: "SplitToSequence", In: []string{"x"}, Out: []string{"y"}}}},
	// One number, however many rows there are.
	"sum.onnx": {Opset: 17, Inputs: values{float("x", -1, 2)}, Outputs: values{float("y", -1, -1)},
		Nodes: nodes{{Op: "ReduceSum", In: []string{"x"}, Out: []string{"y"}}}},
	// Outputs that no node writes to when the model runs.
	"constant.onnx": {Opset: 17, Inputs: values{float("x", -1, 2048)},
		Outputs: values{float("x", -1, 2048), float("c", 1, 2048), float("folded", 1, 2048), float("same", -1, 2048)},
		Weights: []onnxwriter.Weight{{Name: "c", Type: tensor.Float32, Shape: []int64{1, 2048}, Data: bytes.Repeat([]byte{0, 0, 128, 63}, 2048)}},
		Nodes: nodes{
			{Op: "Neg", In: []string{"c"}, Out: []string{"folded"}},
			{Op: "Identity", In: []string{"x"}, Out: []string{"same"}},
		}},
	// Reads row i of a matrix: an index outside it is an error of the run.
	"gather.onnx": {Opset: 17,
		Inputs:  values{float("x", -1, 2), {Name: "i", Type: tensor.Int64, Shape: []int64{-1}}},
		Outputs: values{float("y", -1, 2)},
		Nodes:   nodes{{Op: "Gather", In: []string{"x", "i"}, Out: []string{"y"}}}},
}

// TestModels holds the committed files against the graphs above.
func TestModels(t *testing.T) {
	for name, g := range testModels {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, g.Marshal(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, g.Marshal()) {
			t.Errorf("%s is not what its graph gives; run go test -update", path)
		}
		if len(got) > 10<<10 {
			t.Errorf("%s has %d bytes", path, len(got))
		}
	}
}
