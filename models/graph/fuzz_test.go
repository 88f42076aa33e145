package graph

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// FuzzEstimate makes graphs that no exporter would write, of which all names
// are known: whatever they say, there is an answer, soon.
func FuzzEstimate(f *testing.F) {
	for seed := range uint64(2000) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		g := odd(rand.New(rand.NewPCG(seed, 1)))
		began := time.Now()
		c := Estimate(g)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
		for _, l := range []Linear{c.Workspace, c.FLOPs, c.Traffic} {
			if !(l.Fixed >= 0) || !(l.PerRow >= 0) {
				t.Errorf("%+v", c)
			}
		}
	})
}

// odd gives a random graph.
func odd(random *rand.Rand) *Graph {
	one := func(all ...int64) int64 { return all[random.IntN(len(all))] }
	small := func() int64 { return one(0, 1, 1, 2, 3, 4, 16, 32) }
	any := func() int64 { return one(0, 1, 1, 2, 3, 4, 16, 32, 1<<20, 1<<62, -1, -2) }
	list := func(next func() int64) []int64 {
		all := make([]int64, one(0, 1, 2, 3, 4, 4, 4, 5))
		for i := range all {
			all[i] = next()
		}
		return all
	}
	name := func() string {
		if random.IntN(20) == 0 {
			return ""
		}
		return fmt.Sprint("v", random.IntN(14))
	}
	value := func(name string) Value {
		v := Value{Name: name, Type: []tensor.Type{tensor.Float32, tensor.Float32, tensor.Int64, 0, tensor.String}[random.IntN(5)]}
		next := small
		if random.IntN(6) == 0 {
			next = any
		}
		if random.IntN(8) > 0 {
			v.Dims = []Dim{}
			for _, d := range list(next) {
				v.Dims = append(v.Dims, Dim{Size: max(d, -1)})
			}
		}
		return v
	}
	g := &Graph{Opset: one(0, 7, 11, 13, 17, 21), Constants: map[string]Constant{}, Stated: map[string]Value{}}
	for i := range 3 {
		g.Inputs = append(g.Inputs, value(fmt.Sprint("v", i)))
		dims, n := list(small), int64(1)
		for _, d := range dims {
			n *= d
		}
		c := Constant{Type: tensor.Float32, Dims: dims, Bytes: 4 * n}
		if random.IntN(2) == 0 && n <= 1024 {
			c.Type, c.Bytes, c.Ints = tensor.Int64, 8*n, make([]int64, n)
			for j := range c.Ints {
				c.Ints[j] = one(-1, 0, 1, 2, 3, 1<<40, 1<<62, -1<<63)
			}
		}
		g.Constants[fmt.Sprint("v", 3+i)] = c
	}
	ops := append(slices.Sorted(maps.Keys(operators)), "Nope", "If")
	attributes := strings.Fields("axis axes perm kernel_shape group pads strides split num_outputs to value value_ints transA allowzero blocksize block_size " +
		"K N hidden_size direction mode scales sizes keepdims starts ends repeats start end batch_dims layout num_heads output_shape auto_pad p")
	for range 1 + random.IntN(12) {
		n := Node{Op: ops[random.IntN(len(ops))], Attributes: map[string]Attribute{}}
		if op, ok := strings.CutPrefix(n.Op, "com.microsoft."); ok {
			n.Domain, n.Op = "com.microsoft", op
		}
		for range random.IntN(5) {
			n.Inputs = append(n.Inputs, name())
		}
		for range one(0, 1, 1, 1, 1, 1, 2, 3) {
			n.Outputs = append(n.Outputs, name())
		}
		for range random.IntN(6) {
			c := g.Constants["v3"]
			a := Attribute{Int: any(), Float: random.Float64(), Ints: list(any), Text: []string{"", "SAME_UPPER", "VALID", "linear", "bidirectional"}[random.IntN(5)], Tensor: []*Constant{nil, &c}[random.IntN(2)]}
			if random.IntN(2) == 0 {
				a.Ints, a.Int = list(small), small()-1
			}
			n.Attributes[attributes[random.IntN(len(attributes))]] = a
		}
		g.Nodes = append(g.Nodes, n)
	}
	for range 6 {
		v := value(name())
		g.Stated[v.Name] = v
	}
	for range random.IntN(3) {
		g.Outputs = append(g.Outputs, value(name()))
	}
	return g
}

// Constants and outputs without end cost no memory or time without end.
func TestEstimateIsBounded(t *testing.T) {
	many := make([]string, 1<<18)
	for i := range many {
		many[i] = "c"
	}
	outputs := make([]string, len(many))
	for i := range outputs {
		outputs[i] = fmt.Sprint("o", i)
	}
	g := &Graph{
		Opset: 17, Constants: map[string]Constant{"c": {Type: tensor.Int64, Dims: []int64{1024}, Bytes: 8192, Ints: make([]int64, 1024)}},
		Nodes: []Node{
			{Op: "Concat", Inputs: many, Outputs: []string{"y"}, Attributes: map[string]Attribute{"axis": {Int: 0}}},
			{Op: "Split", Inputs: []string{"c"}, Outputs: outputs, Attributes: map[string]Attribute{"axis": {Int: 0}}},
			{Op: "Nope", Inputs: []string{"c"}, Outputs: outputs},
		},
	}
	began := time.Now()
	Estimate(g)
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}
