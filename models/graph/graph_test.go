package graph

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/tensor"
)

// f32 is a constant of FP32 with so many dimensions, and no content.
func f32(dims ...int64) Constant {
	return Constant{Type: tensor.Float32, Dims: dims, Bytes: int64(4 * product(dims))}
}

func i64(v ...int64) Constant {
	return Constant{Type: tensor.Int64, Dims: []int64{int64(len(v))}, Ints: v, Bytes: int64(8 * len(v))}
}

// open is an input of FP32 whose first dimension has the rows.
func open(name string, dims ...int64) Value {
	v := Value{Name: name, Type: tensor.Float32, Dims: []Dim{{-1, "batch"}}}
	for _, d := range dims {
		v.Dims = append(v.Dims, Dim{Size: d})
	}
	return v
}

type attributes = map[string]Attribute

func ints(v ...int64) Attribute     { return Attribute{Ints: v} }
func number(v int64) Attribute      { return Attribute{Int: v} }
func text(s string) Attribute       { return Attribute{Text: s} }
func floats(v ...float64) Attribute { return Attribute{Floats: v} }

// TestShapes infers one operator each, with 3 rows. The expectations are what
// the operators' specifications say.
func TestShapes(t *testing.T) {
	image, words, table := []int64{-1, 8, 10, 12}, []int64{-1, 5, 16}, []int64{-1, 6}
	tests := []struct {
		op     string
		in     [][]int64 // shapes of inputs; -1 first has the rows
		consts []Constant
		attr   attributes
		want   string // of all outputs, "?" where unknown
	}{
		{"Relu", [][]int64{image}, nil, nil, "[3 8 10 12]"},
		{"Add", [][]int64{image, {12}}, nil, nil, "[3 8 10 12]"},
		{"Add", [][]int64{{-1, 1, 4}, {5, 1}}, nil, nil, "[3 5 4]"},
		{"Add", [][]int64{image, {11}}, nil, nil, "?"},
		{"Where", [][]int64{{-1, 1}, {1, 4}, {}}, nil, nil, "[3 4]"},
		{"Conv", [][]int64{image}, []Constant{f32(6, 8, 3, 3)}, attributes{"pads": ints(1, 1, 1, 1), "strides": ints(2, 2)}, "[3 6 5 6]"},
		{"Conv", [][]int64{image}, []Constant{f32(6, 8, 3, 3)}, attributes{"dilations": ints(2, 1)}, "[3 6 6 10]"},
		{"Conv", [][]int64{image}, []Constant{f32(6, 8, 4, 4)}, attributes{"auto_pad": text("SAME_UPPER"), "strides": ints(3, 1)}, "[3 6 4 12]"},
		{"Conv", [][]int64{image}, []Constant{f32(6, 7, 3, 3)}, nil, "?"},
		{"Conv", [][]int64{image}, []Constant{f32(8, 1, 3, 3)}, attributes{"group": number(8)}, "[3 8 8 10]"},
		{"ConvTranspose", [][]int64{image}, []Constant{f32(8, 6, 2, 2)}, attributes{"strides": ints(2, 2)}, "[3 6 20 24]"},
		{"ConvTranspose", [][]int64{image}, []Constant{f32(8, 6, 3, 3)}, attributes{"strides": ints(2, 2), "pads": ints(1, 1, 1, 1), "output_padding": ints(1, 1)}, "[3 6 20 24]"},
		{"MaxPool", [][]int64{image}, nil, attributes{"kernel_shape": ints(3, 3), "strides": ints(2, 2)}, "[3 8 4 5]"},
		{"MaxPool", [][]int64{image}, nil, attributes{"kernel_shape": ints(3, 3), "strides": ints(2, 2), "ceil_mode": number(1)}, "[3 8 5 6]"},
		{"GlobalAveragePool", [][]int64{image}, nil, nil, "[3 8 1 1]"},
		{"Gemm", [][]int64{table}, []Constant{f32(4, 6)}, attributes{"transB": number(1)}, "[3 4]"},
		{"Gemm", [][]int64{table}, []Constant{f32(4, 6)}, nil, "?"},
		{"MatMul", [][]int64{words}, []Constant{f32(16, 7)}, nil, "[3 5 7]"},
		{"MatMul", [][]int64{{-1, 4, 5, 6}, {4, 6, 2}}, nil, nil, "[3 4 5 2]"},
		{"MatMul", [][]int64{table}, []Constant{f32(6)}, nil, "[3]"},
		{"Reshape", [][]int64{words}, []Constant{i64(0, -1, 4)}, nil, "[3 20 4]"},
		{"Reshape", [][]int64{words}, []Constant{i64(2, -1, 7)}, nil, "?"},
		{"Reshape", [][]int64{words}, []Constant{i64(1, 80)}, nil, "?"},
		{"Flatten", [][]int64{image}, nil, nil, "[3 960]"},
		{"Flatten", [][]int64{image}, nil, attributes{"axis": number(0)}, "[1 2880]"},
		{"Squeeze", [][]int64{{-1, 1, 4, 1}}, []Constant{i64(-1)}, nil, "[3 1 4]"},
		{"Unsqueeze", [][]int64{table}, nil, attributes{"axes": ints(1, -1)}, "[3 1 6 1]"},
		{"Transpose", [][]int64{image}, nil, attributes{"perm": ints(0, 2, 3, 1)}, "[3 10 12 8]"},
		{"Transpose", [][]int64{image}, nil, attributes{"perm": ints(0, 2, 2, 1)}, "?"},
		{"Concat", [][]int64{table, {-1, 2}}, nil, attributes{"axis": number(-1)}, "[3 8]"},
		{"Slice", [][]int64{image}, []Constant{i64(1, -3), i64(100, -1), i64(1, 2)}, nil, "[3 7 2 12]"},
		{"Slice", [][]int64{table}, []Constant{i64(-1), i64(-100), i64(1), i64(-2)}, nil, "[3 3]"},
		{"Gather", [][]int64{table}, []Constant{i64(0, 2)}, attributes{"axis": number(1)}, "[3 2]"},
		{"Expand", [][]int64{{-1, 1}}, []Constant{i64(2, 1, 4)}, nil, "[2 3 4]"},
		{"Tile", [][]int64{table}, []Constant{i64(2, 3)}, nil, "[6 18]"},
		{"Pad", [][]int64{image}, []Constant{i64(0, 0, 1, 2, 0, 0, 3, 4)}, nil, "[3 8 14 18]"},
		{"Upsample", [][]int64{image}, nil, attributes{"scales": floats(1, 1, 2, 1.5)}, "[3 8 20 18]"},
		{"ReduceMean", [][]int64{image}, nil, attributes{"axes": ints(2, 3), "keepdims": number(0)}, "[3 8]"},
		{"ReduceSum", [][]int64{image}, []Constant{i64(-1)}, nil, "[3 8 10 1]"},
		{"ReduceMax", [][]int64{table}, nil, nil, "[1 1]"},
		{"ArgMax", [][]int64{table}, nil, attributes{"axis": number(1), "keepdims": number(0)}, "[3]"},
		{"TopK", [][]int64{table}, []Constant{i64(2)}, nil, "[3 2] [3 2]"},
		{"DepthToSpace", [][]int64{image}, nil, attributes{"blocksize": number(2)}, "[3 2 20 24]"},
		{"LayerNormalization", [][]int64{words}, nil, nil, "[3 5 16]"},
		{"Dropout", [][]int64{words}, nil, nil, "[3 5 16] [3 5 16]"},
		{"QuantizeLinear", [][]int64{words}, nil, nil, "[3 5 16]"},
		{"MatMulInteger", [][]int64{words}, []Constant{{Type: tensor.Int8, Dims: []int64{16, 4}}}, nil, "[3 5 4]"},
		{"NonZero", [][]int64{words}, nil, nil, "?"},
		{"Frobnicate", [][]int64{words}, nil, nil, "?"},
		// What is damaged, or too large to be.
		{"Reshape", [][]int64{words}, nil, nil, "?"},
		{"Conv", [][]int64{image}, nil, nil, "?"},
		{"Tile", [][]int64{table}, []Constant{i64(1<<40, 1<<40)}, nil, "?"},
		{"Softmax", nil, nil, nil, "?"},
		{"Split", [][]int64{table}, nil, attributes{"axis": number(1 << 62)}, "?"},
	}
	for _, tt := range tests {
		g := &Graph{Opset: 17, Constants: map[string]Constant{}}
		n := Node{Op: tt.op, Outputs: []string{"out0"}, Attributes: tt.attr}
		if strings.Contains(tt.want, "] [") {
			n.Outputs = append(n.Outputs, "out1")
		}
		for i, shape := range tt.in {
			name := fmt.Sprint("in", i)
			v := Value{Name: name, Type: tensor.Float32, Dims: []Dim{}}
			for _, d := range shape {
				v.Dims = append(v.Dims, Dim{Size: d})
			}
			g.Inputs, n.Inputs = append(g.Inputs, v), append(n.Inputs, name)
		}
		for i, c := range tt.consts {
			name := fmt.Sprint("const", i)
			g.Constants[name] = c
			n.Inputs = append(n.Inputs, name)
		}
		g.Nodes = []Node{n}
		f := infer(g, 3)
		var got []string
		for _, name := range n.Outputs {
			if v := f.values[name]; v.dims != nil {
				got = append(got, fmt.Sprint(v.dims))
			} else {
				got = append(got, "?")
			}
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s of %v %v: %s, want %s", tt.op, tt.in, tt.attr, s, tt.want)
		}
		if unknown := Estimate(g).Unknown; (len(unknown) > 0) != (tt.want == "?") {
			t.Errorf("%s: unknown are %v", tt.op, unknown)
		}
	}
}

// TestShapesOfShapes follows what exporters write to flatten all but the rows:
// the shape is worked out from that of the input.
func TestShapesOfShapes(t *testing.T) {
	g := &Graph{
		Opset:  17,
		Inputs: []Value{open("x", 4, 5, 6)},
		Nodes: []Node{
			{Op: "Shape", Inputs: []string{"x"}, Outputs: []string{"shape"}},
			{Op: "Constant", Outputs: []string{"zero"}, Attributes: attributes{"value_int": number(0)}},
			{Op: "Gather", Inputs: []string{"shape", "zero"}, Outputs: []string{"rows"}},
			{Op: "Unsqueeze", Inputs: []string{"rows", "axis"}, Outputs: []string{"rows1"}},
			{Op: "Slice", Inputs: []string{"shape", "one", "three"}, Outputs: []string{"middle"}},
			{Op: "ReduceProd", Inputs: []string{"middle"}, Outputs: []string{"product"}},
			{Op: "Mul", Inputs: []string{"product", "two"}, Outputs: []string{"twice"}},
			{Op: "Cast", Inputs: []string{"twice"}, Outputs: []string{"cast"}, Attributes: attributes{"to": number(7)}},
			{Op: "Concat", Inputs: []string{"rows1", "cast", "rest"}, Outputs: []string{"to"}, Attributes: attributes{"axis": number(0)}},
			{Op: "Reshape", Inputs: []string{"x", "to"}, Outputs: []string{"y"}},
		},
		Constants: map[string]Constant{"axis": i64(0), "one": i64(1), "three": i64(3), "two": i64(2), "rest": i64(-1)},
		Outputs:   []Value{{Name: "y", Type: tensor.Float32}},
	}
	for _, rows := range []int64{1, 7} {
		f := infer(g, rows)
		if want := []int64{rows, 40, 3}; !slices.Equal(f.values["y"].dims, want) {
			t.Errorf("%d rows: %v, want %v", rows, f.values["y"].dims, want)
		}
	}
	if c := Estimate(g); len(c.Unknown) > 0 {
		t.Errorf("unknown: %v", c.Unknown)
	}
}

// TestStated takes shapes from the file where an operator is not known, but
// not one that the rows cannot be told of.
func TestStated(t *testing.T) {
	g := &Graph{
		Inputs:  []Value{open("x", 4)},
		Nodes:   []Node{{Domain: "a.vendor", Op: "Frob", Inputs: []string{"x"}, Outputs: []string{"y"}}, {Op: "Relu", Inputs: []string{"y"}, Outputs: []string{"z"}}},
		Stated:  map[string]Value{"y": open("y", 9)},
		Outputs: []Value{{Name: "z", Type: tensor.Float32}},
	}
	if f := infer(g, 5); !slices.Equal(f.values["z"].dims, []int64{5, 9}) || len(f.unknown) > 0 {
		t.Errorf("%v, unknown %v", f.values["z"].dims, f.unknown)
	}
	g.Stated["y"] = Value{Name: "y", Type: tensor.Float32, Dims: []Dim{{-1, "other"}, {Size: 9}}}
	if c := Estimate(g); !slices.Equal(c.Unknown, []string{"Relu", "a.vendor.Frob"}) {
		t.Errorf("unknown: %v", c.Unknown)
	}
}

// TestMemory holds the allocator's rules against a few sequences by hand.
func TestMemory(t *testing.T) {
	const kb = 1 << 10
	var m memory
	a := m.take(256 * kb)
	b := m.take(256 * kb)
	m.give(a)
	c := m.take(100 * kb) // in the place of a
	m.give(b)
	m.give(c)
	if want := float64(2 * (256*kb + headBytes)); m.bytes != want {
		t.Errorf("%g bytes, want %g", m.bytes, want)
	}
	m.give(m.take(16 * kb)) // the C heap's
	d := m.take(4096 * kb)
	m.give(d)
	e := m.take(300 * kb) // more than 8 times as large is not given
	if want := float64(2*(256*kb+headBytes) + 4096*kb + 300*kb + 2*headBytes); m.bytes != want || m.smallPeak != 16*kb+headBytes {
		t.Errorf("%g bytes, want %g; of the heap %g", m.bytes, want, m.smallPeak)
	}
	m.give(e)
}
