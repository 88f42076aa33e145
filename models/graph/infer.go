package graph

import (
	"cmp"
	"math"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// maxContent bounds the elements of a value whose content is followed: shapes,
// indices, scales.
const maxContent = 1024

// fact is what is known of a value in a run of so many rows.
type fact struct {
	typ  tensor.Type // 0 where it is not known
	dims []int64     // nil where they are not known
	// content has the elements of a small value that follows from shapes and
	// constants; nil where it does not.
	content []float64
	// constant values do not change from run to run: the runtime works them
	// out when it loads the model.
	constant bool
	bytes    int64 // of a constant in the file
}

// elements gives the number of elements, as a float64 so that nothing
// overflows; 0 where it is not known.
func (f *fact) elements() float64 {
	if f == nil || f.dims == nil {
		return 0
	}
	return product(f.dims)
}

// size gives the bytes that the value has in memory, 0 where that is not known.
func (f *fact) size() float64 {
	switch {
	case f == nil:
		return 0
	case f.bytes > 0:
		return float64(f.bytes)
	}
	const word = 16 // a string of the runtime's at least
	return f.elements() * float64(cmp.Or(f.typ.Size(), word))
}

// rank gives the number of dimensions, -1 where it is not known.
func (f *fact) rank() int {
	if f == nil || f.dims == nil {
		return -1
	}
	return len(f.dims)
}

// facts are what is known of a graph's values in a run of so many rows.
type facts struct {
	graph  *Graph
	rows   int64
	open   map[string]bool // names of dimensions that have the rows
	values map[string]*fact
	// unknown are the nodes of whose outputs a shape is not known.
	unknown []*Node
}

// infer finds what is known of a graph's values in a run of so many rows.
func infer(g *Graph, rows int64) *facts {
	f := &facts{graph: g, rows: rows, open: map[string]bool{}, values: make(map[string]*fact, len(g.Nodes)+len(g.Constants))}
	for name, c := range g.Constants {
		f.values[name] = c.fact()
	}
	for _, in := range g.Inputs {
		if len(in.Dims) > 0 && in.Dims[0].Size < 0 && in.Dims[0].Name != "" {
			f.open[in.Dims[0].Name] = true
		}
	}
	for _, in := range g.Inputs {
		v := &fact{typ: in.Type, dims: []int64{1}}
		if in.Dims != nil {
			v.dims = make([]int64, len(in.Dims))
		}
		for i, d := range in.Dims {
			switch {
			case d.Size >= 0:
				v.dims[i] = d.Size
			case i == 0 || f.open[d.Name]:
				v.dims[i] = rows
			default:
				v.dims[i] = 1
			}
		}
		if _, ok := f.values[in.Name]; !ok {
			f.values[in.Name] = v
		}
	}
	outputs := make(map[string]Value, len(g.Outputs))
	for _, v := range slices.Backward(g.Outputs) { // of one name the first counts
		outputs[v.Name] = v
	}
	stated := func(name string) (Value, bool) {
		v, ok := g.Stated[name]
		if !ok {
			v, ok = outputs[name]
		}
		return v, ok
	}
	for i := range g.Nodes {
		n := &g.Nodes[i]
		c := call{n: n, opset: g.Opset, in: make([]*fact, len(n.Inputs)), out: make([]*fact, len(n.Outputs))}
		for i, name := range n.Inputs {
			if c.in[i] = f.values[name]; c.in[i] == nil && name != "" {
				c.in[i] = &fact{}
			}
		}
		for i := range c.out {
			c.out[i] = &fact{}
		}
		if infer, ok := operators[operatorKey(n)]; !ok || len(c.out) == 0 || !infer(&c) {
			for i := range c.out {
				c.out[i] = &fact{}
			}
		}
		constant := !n.Graphs && n.Op != "RandomNormal" && n.Op != "RandomUniform"
		for i, name := range n.Inputs {
			constant = constant && (name == "" || c.in[i].constant)
		}
		missing := false
		for i, name := range n.Outputs {
			if name == "" {
				continue
			}
			v := c.out[i]
			if !plausible(v.dims) {
				v.dims, v.content = nil, nil
			}
			if s, ok := stated(name); ok {
				f.state(v, s)
			}
			v.constant = constant
			missing = missing || v.dims == nil || v.typ == 0
			if _, ok := f.values[name]; !ok { // ONNX gives each value once
				f.values[name] = v
			}
		}
		if missing {
			f.unknown = append(f.unknown, n)
		}
	}
	return f
}

// state fills in what the file says of a value and could not be inferred.
func (f *facts) state(v *fact, s Value) {
	if v.typ == 0 {
		v.typ = s.Type
	}
	if v.dims != nil || s.Dims == nil {
		return
	}
	dims := make([]int64, len(s.Dims))
	for i, d := range s.Dims {
		switch {
		case d.Size >= 0:
			dims[i] = d.Size
		case f.open[d.Name]:
			dims[i] = f.rows
		default:
			return
		}
	}
	if plausible(dims) {
		v.dims = dims
	}
}

// plausible says whether dimensions can be those of a value in memory.
func plausible(dims []int64) bool {
	if dims == nil || len(dims) > MaxRank {
		return false
	}
	n := 1.0
	for _, d := range dims {
		if d < 0 {
			return false
		}
		n *= float64(max(d, 1))
	}
	return n < 1<<50
}

func (c *Constant) fact() *fact {
	f := &fact{typ: c.Type, dims: slices.Clone(c.Dims), constant: true, bytes: c.Bytes}
	if f.dims == nil {
		f.dims = []int64{}
	}
	switch {
	case len(c.Ints) > maxContent || len(c.Floats) > maxContent:
	case c.Ints != nil:
		f.content = make([]float64, len(c.Ints))
		for i, v := range c.Ints {
			f.content[i] = float64(v)
		}
	case c.Floats != nil:
		f.content = slices.Clone(c.Floats)
	}
	if float64(len(f.content)) != f.elements() {
		f.content = nil
	}
	return f
}

// call is a node with what is known of its inputs; an inference fills in what
// follows of its outputs.
type call struct {
	n     *Node
	opset int64
	in    []*fact // nil where left out
	out   []*fact
}

// arg gives what is known of an input, nil where it is left out.
func (c *call) arg(i int) *fact {
	if i < len(c.in) {
		return c.in[i]
	}
	return nil
}

// dims gives the dimensions of an input, nil where they are not known.
func (c *call) dims(i int) []int64 {
	if f := c.arg(i); f != nil {
		return f.dims
	}
	return nil
}

func (c *call) typ(i int) tensor.Type {
	if f := c.arg(i); f != nil {
		return f.typ
	}
	return 0
}

// content gives the content of an input as whole numbers.
func (c *call) content(i int) ([]int64, bool) {
	f := c.arg(i)
	if f == nil || f.content == nil {
		return nil, false
	}
	all := make([]int64, len(f.content))
	for i, v := range f.content {
		all[i] = integer(v)
	}
	return all, true
}

// integer gives the whole number nearest to zero, held within what a
// dimension can be.
func integer(v float64) int64 {
	if v != v {
		return 0
	}
	return int64(max(min(v, 1<<53), -1<<53))
}

// give says the type and dimensions of an output.
func (c *call) give(i int, typ tensor.Type, dims []int64) bool {
	if dims == nil {
		return false
	}
	if i < len(c.out) {
		c.out[i].typ, c.out[i].dims = typ, dims
	}
	return true
}

// axis gives an axis as an index, by a rank; ok is false where there is none
// such.
func axis(a int64, rank int) (int, bool) {
	if a < 0 {
		a += int64(rank)
	}
	return int(a), a >= 0 && a < int64(rank)
}

// axes gives the axes of a node, from the input where newer operator sets have
// them or from the attribute where older ones do. given is false where the node
// has none; ok is false where they cannot be told.
func (c *call) axes(input, rank int) (all []int, given, ok bool) {
	var list []int64
	if f := c.arg(input); f != nil {
		if list, ok = c.content(input); !ok {
			return nil, true, false
		}
	} else if a, has := c.n.Attributes["axes"]; has {
		list = a.Ints
	} else {
		return nil, false, true
	}
	for _, a := range list {
		i, ok := axis(a, rank)
		if !ok {
			return nil, true, false
		}
		all = append(all, i)
	}
	slices.Sort(all)
	return slices.Compact(all), true, true
}

// broadcast gives the shape that several have together.
func broadcast(shapes ...[]int64) []int64 {
	rank := 0
	for _, s := range shapes {
		if s == nil {
			return nil
		}
		rank = max(rank, len(s))
	}
	all := make([]int64, rank)
	for i := range all {
		all[i] = 1
	}
	for _, s := range shapes {
		for i, d := range s {
			have := &all[rank-len(s)+i]
			switch {
			case *have == 1:
				*have = d
			case d != 1 && d != *have:
				return nil
			}
		}
	}
	return all
}

func product(dims []int64) float64 {
	if slices.Contains(dims, 0) {
		return 0 // also where the others are beyond all numbers
	}
	n := 1.0
	for _, d := range dims {
		n *= float64(d)
	}
	return n
}

// setContent says what an output holds, where that is little.
func (c *call) setContent(i int, content []float64) {
	if i < len(c.out) && len(content) <= maxContent && float64(len(content)) == c.out[i].elements() {
		if whole(c.out[i].typ) {
			for i := range content {
				content[i] = math.Trunc(content[i])
			}
		}
		c.out[i].content = content
	}
}

// whole says whether elements of a type are whole numbers.
func whole(t tensor.Type) bool {
	switch t {
	case tensor.Float16, tensor.BFloat16, tensor.Float32, tensor.Float64, tensor.String, 0:
		return false
	}
	return true
}
