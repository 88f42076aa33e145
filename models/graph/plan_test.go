package graph

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// steps names the operators that a run executes.
func steps(g *Graph) (ops []string) {
	for _, s := range newProgram(infer(g, 2)).steps {
		ops = append(ops, s.op)
	}
	return ops
}

func node(op string, out string, in ...string) Node {
	return Node{Op: op, Inputs: in, Outputs: []string{out}}
}

// TestFused has what the runtime makes one operator of.
func TestFused(t *testing.T) {
	scalar := func(v float64) Constant {
		return Constant{Type: tensor.Float32, Dims: []int64{}, Bytes: 4, Floats: []float64{v}}
	}
	constants := map[string]Constant{"w": f32(16, 16), "k": f32(16, 16, 1, 1), "c": f32(16), "half": scalar(0.5), "two": scalar(2), "one": scalar(1)}
	for k := range 4 {
		constants[fmt.Sprint("bn", k)] = f32(16)
	}
	words, image := open("x", 5, 16), open("x", 16, 8, 8)
	tests := []struct {
		name  string
		in    Value
		nodes []Node
		want  []string
	}{
		{"gelu", words, []Node{node("MatMul", "m", "x", "w"), node("Add", "b", "m", "c"), node("Div", "d", "b", "two"), node("Erf", "e", "d"),
			node("Add", "a", "e", "one"), node("Mul", "g", "b", "a"), node("Mul", "y", "g", "half")}, []string{"MatMul", "Gelu"}},
		{"gelu, halved first", words, []Node{node("Div", "d", "x", "two"), node("Erf", "e", "d"), node("Add", "a", "e", "one"),
			node("Mul", "h", "x", "half"), node("Mul", "y", "h", "a")}, []string{"Gelu"}},
		{"layer normalisation", words, []Node{node("ReduceMean", "m", "x"), node("Sub", "s", "x", "m"), node("Pow", "p", "s", "two"), node("ReduceMean", "v", "p"),
			node("Add", "a", "v", "one"), node("Sqrt", "r", "a"), node("Div", "n", "s", "r"), node("Mul", "g", "n", "c"), node("Add", "y", "g", "c")}, []string{"LayerNormalization"}},
		{"sum and normalisation", words, []Node{node("MatMul", "m", "x", "w"), node("Add", "b", "m", "c"), node("Add", "s", "x", "b"),
			node("LayerNormalization", "y", "s", "c", "c")}, []string{"MatMul", "SkipLayerNormalization"}},
		{"batch normalisation", image, []Node{node("Conv", "a", "x", "k"), node("BatchNormalization", "n", "a", "bn0", "bn1", "bn2", "bn3"), node("Relu", "y", "n")},
			[]string{"Reorder", "Conv", "Reorder"}},
		{"convolutions with a sum", image, []Node{node("Conv", "a", "x", "k"), node("Relu", "r", "a"), node("Conv", "b", "r", "k"), node("Add", "s", "b", "r"),
			node("Relu", "t", "s"), node("GlobalAveragePool", "g", "t"), node("Flatten", "y", "g")},
			[]string{"Reorder", "Conv", "Conv", "GlobalAveragePool", "Reorder", "Flatten"}},
		{"constants", words, []Node{node("Transpose", "wt", "w"), node("Mul", "ws", "wt", "two"), node("MatMul", "m", "x", "ws"), node("Identity", "i", "m"),
			node("Dropout", "d", "i"), node("Tanh", "y", "d")}, []string{"MatMul", "Tanh"}},
		// Somebody else needs what is between.
		{"two readers", image, []Node{node("Conv", "a", "x", "k"), node("Relu", "r", "a"), node("Add", "y", "a", "r")}, []string{"Reorder", "Conv", "Relu", "Add", "Reorder"}},
	}
	for _, tt := range tests {
		g := &Graph{Opset: 17, Inputs: []Value{tt.in}, Outputs: []Value{{Name: "y", Type: tensor.Float32}}, Nodes: tt.nodes, Constants: constants}
		if got := steps(g); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestLarge has many nodes of every kind that is looked at in more than one
// way, in a time that nobody waits for.
func TestLarge(t *testing.T) {
	g := &Graph{Opset: 17, Inputs: []Value{open("x", 4)}, Constants: map[string]Constant{"c": {Type: tensor.Float32, Dims: []int64{}, Bytes: 4, Floats: []float64{1}}}}
	last := "x"
	for i := 0; len(g.Nodes) < 1<<16-8; i++ {
		name := func(s string) string { return fmt.Sprint(s, i) }
		g.Nodes = append(g.Nodes, node("Div", name("d"), "x", "c"), node("Erf", name("e"), name("d")), node("Add", name("a"), name("e"), "c"),
			node("Mul", name("m"), "x", name("a")), node("Mul", name("h"), name("m"), "c"), node("Add", name("s"), last, name("h")))
		last = name("s")
	}
	g.Outputs = []Value{{Name: last, Type: tensor.Float32}}
	began := time.Now()
	c := Estimate(g)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("%d nodes took %v", len(g.Nodes), took)
	}
	if c.Nodes != len(g.Nodes)/3 {
		t.Errorf("%d nodes become %d", len(g.Nodes), c.Nodes)
	}
}
