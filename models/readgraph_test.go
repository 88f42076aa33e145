package models

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/graph"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// linked gives a NodeProto.
func linked(name, op string, in, out []string, attributes ...message) message {
	m := message{}
	for _, s := range in {
		m = m.str(1, s)
	}
	for _, s := range out {
		m = m.str(2, s)
	}
	m = m.str(3, name).str(4, op)
	for _, a := range attributes {
		m = m.sub(5, a)
	}
	return m
}

func attribute(name string, rest message) message { return append(message{}.str(1, name), rest...) }

// netGraph reshapes x to so many rows by a shape, in four kinds of constants.
func netGraph() message {
	shape := make([]byte, 16)
	binary.LittleEndian.PutUint64(shape, 0)
	binary.LittleEndian.PutUint64(shape[8:], math.MaxUint64) // -1
	return message{}.
		sub(1, linked("/a/Reshape", "Reshape", []string{"x", "shape"}, []string{"flat"}, attribute("allowzero", message{}.num(3, 0)))).
		sub(1, linked("", "Transpose", []string{"W"}, []string{"WT"}, attribute("perm", message{}.sub(8, packed(1, 0))))).
		sub(1, linked("/a/MatMul", "MatMul", []string{"flat", "WT"}, []string{"y"})).
		sub(5, rawTensor("shape", 7, shape, 2)).
		sub(5, rawTensor("W", 1, make([]byte, 4*6*2), 2, 6)).
		sub(11, valueInfo("x", tensor.Float32, "batch", 2, 3)).
		sub(12, valueInfo("y", tensor.Float32, "batch", 2)).
		sub(13, valueInfo("flat", tensor.Float32, "batch", 6))
}

func TestReadGraph(t *testing.T) {
	path := writeModel(t, modelOf(netGraph()), nil)
	g, err := ReadGraph(path)
	if err != nil {
		t.Fatal(err)
	}
	want := &graph.Graph{
		Opset: 17,
		Nodes: []graph.Node{
			{Name: "/a/Reshape", Op: "Reshape", Inputs: []string{"x", "shape"}, Outputs: []string{"flat"}, Attributes: map[string]graph.Attribute{"allowzero": {}}},
			{Op: "Transpose", Inputs: []string{"W"}, Outputs: []string{"WT"}, Attributes: map[string]graph.Attribute{"perm": {Ints: []int64{1, 0}}}},
			{Name: "/a/MatMul", Op: "MatMul", Inputs: []string{"flat", "WT"}, Outputs: []string{"y"}},
		},
		Inputs:  []graph.Value{{Name: "x", Type: tensor.Float32, Dims: []graph.Dim{{Size: -1, Name: "batch"}, {Size: 2}, {Size: 3}}}},
		Outputs: []graph.Value{{Name: "y", Type: tensor.Float32, Dims: []graph.Dim{{Size: -1, Name: "batch"}, {Size: 2}}}},
		Stated:  map[string]graph.Value{"flat": {Name: "flat", Type: tensor.Float32, Dims: []graph.Dim{{Size: -1, Name: "batch"}, {Size: 6}}}},
		Constants: map[string]graph.Constant{
			"shape": {Type: tensor.Int64, Dims: []int64{2}, Bytes: 16, Ints: []int64{0, -1}},
			"W":     {Type: tensor.Float32, Dims: []int64{2, 6}, Bytes: 48, Floats: make([]float64, 12)},
		},
	}
	if !reflect.DeepEqual(g, want) {
		t.Errorf("got  %+v\nwant %+v", g, want)
	}
	c, err := EstimateCosts(path)
	if err != nil {
		t.Fatal(err)
	}
	// The transposition is done when the model is loaded.
	if c.Nodes != 2 || len(c.Unknown) > 0 || c.FLOPs != (Linear{PerRow: 2 * 6 * 2}) {
		t.Errorf("costs %+v", c)
	}
}

func TestReadGraphRefuses(t *testing.T) {
	tests := []struct {
		name  string
		model message
		want  string
	}{
		{"nodes", modelOf(bytes.Repeat(message{}.sub(1, message{}), maxGraphNodes+1)), "more than 65536 nodes"},
		{"values", modelOf(bytes.Repeat(message{}.sub(13, message{}), maxGraphValues+1)), "more than 262144 initialisers and values"},
		{"links", modelOf(message{}.sub(1, bytes.Repeat(message{}.str(1, ""), maxGraphLinks+1))), "more than 1048576 inputs and outputs"},
		{"two graphs", append(modelOf(nil), modelOf(nil)...), "more than one graph"},
		{"no graph", message{}.num(1, 8), "no graph"},
		{"dimensions", modelOf(message{}.sub(5, rawTensor("w", 1, nil, math.MaxInt64, 2))), `tensor "w" has dimensions`},
		{"cut", modelOf(netGraph())[:100], "are left"},
	}
	for _, tt := range tests {
		_, err := ReadGraph(writeModel(t, tt.model, nil))
		if err == nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// FuzzReadGraph reads what may be a graph, and works out its costs.
func FuzzReadGraph(f *testing.F) {
	f.Add([]byte(modelOf(netGraph())))
	f.Add([]byte(modelOf(smallGraph())))
	f.Add([]byte(modelOf(message{}.
		sub(1, linked("", "Conv", []string{"x", "w"}, []string{"c"}, attribute("pads", message{}.sub(8, packed(1, 1, 1, 1))))).
		sub(1, linked("", "Relu", []string{"c"}, []string{"r"})).
		sub(1, linked("", "Add", []string{"r", "x"}, []string{"s"})).
		sub(1, linked("", "Shape", []string{"s"}, []string{"shape"})).
		sub(1, linked("", "Slice", []string{"shape", "one"}, []string{"part"})).
		sub(1, linked("", "Resize", []string{"s", "", "scales"}, []string{"y"})).
		sub(5, rawTensor("w", 1, make([]byte, 4*4*4*9), 4, 4, 3, 3)).
		sub(5, rawTensor("scales", 1, []byte{0, 0, 128, 63, 0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 0, 64}, 4)).
		sub(5, rawTensor("one", 7, []byte{1, 0, 0, 0, 0, 0, 0, 0}, 1)).
		sub(11, valueInfo("x", tensor.Float32, "batch", 4, 8, 8)).
		sub(12, outputY))))
	f.Add([]byte(modelOf(message{}.
		sub(1, linked("", "Constant", nil, []string{"k"}, attribute("value", message{}.sub(5, rawTensor("", 7, []byte{2, 0, 0, 0, 0, 0, 0, 0}, 1))))).
		sub(1, linked("", "Split", []string{"x", "k"}, []string{"y", "z"})).
		sub(1, linked("", "Erf", []string{"y"}, []string{"e"})).
		sub(1, linked("", "Mul", []string{"e", "y"}, []string{"m"})).
		sub(1, linked("", "If", []string{"m"}, []string{"i"}, attribute("then_branch", message{}.sub(6, smallGraph())))).
		sub(11, inputX).sub(12, outputY))))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := readGraph(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		c := graph.Estimate(g)
		for _, l := range []Linear{c.Workspace, c.FLOPs, c.Traffic} {
			if !(l.Fixed >= 0) || !(l.PerRow >= 0) || math.IsInf(l.At(1), 0) {
				t.Errorf("costs %+v", c)
			}
		}
		if len(c.Unknown) > graph.MaxUnknown || c.Nodes > 3*len(g.Nodes)+len(g.Outputs) {
			t.Errorf("%d nodes become %+v", len(g.Nodes), c)
		}
	})
}

// What a file may say, though no exporter writes it, is no reason to give up.
func TestEstimateCostsOfOddModels(t *testing.T) {
	image, filtered := onnxwriter.Float("x", 1, 32, 8, 8), onnxwriter.Float("y", 1, 32, 6, 6)
	weights := onnxwriter.Weight{Name: "w", Type: tensor.Float32, Shape: []int64{32, 32, 3, 3}, Data: make([]byte, 32*32*36)}
	huge := make([]int64, 20)
	for i := range huge {
		huge[i] = 1 << 62
	}
	for name, m := range map[string]onnxwriter.Model{
		"a bias that is an input": {Opset: 17, Inputs: []onnxwriter.Value{image, onnxwriter.Float("b", 32)}, Outputs: []onnxwriter.Value{filtered}, Weights: []onnxwriter.Weight{weights},
			Nodes: []onnxwriter.Node{{Op: "Conv", In: []string{"x", "w", "b"}, Out: []string{"y"}}}},
		"no weights": {Opset: 17, Inputs: []onnxwriter.Value{image}, Outputs: []onnxwriter.Value{filtered},
			Nodes: []onnxwriter.Node{{Op: "Conv", In: []string{"x"}, Out: []string{"y"}}}},
		"a node without outputs": {Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", 1, 32)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", 1, 32)},
			Nodes: []onnxwriter.Node{{Op: "Relu", In: []string{"x"}, Out: []string{"y"}}, {Op: "Add", In: []string{"x", "x"}}}},
		"a name twice, of no elements": {Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", append(huge, 0)...), onnxwriter.Float("z", 1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", 1)},
			Nodes: []onnxwriter.Node{{Op: "Nope", In: []string{"z"}, Out: []string{"x"}}, {Op: "Relu", In: []string{"x"}, Out: []string{"y"}}}},
	} {
		path := filepath.Join(t.TempDir(), "m.onnx")
		if err := os.WriteFile(path, m.Marshal(), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := EstimateCosts(path); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
