package graph

import (
	"cmp"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// step is an operator as a run executes it: a node, or several that the
// runtime makes one of.
type step struct {
	node *Node // the first of them
	op   string
	// Values that are not constants, and what constants it reads.
	in, out []string
	weights float64 // bytes
	flops   float64
	scratch float64 // bytes that it takes while it works
	// inPlace has inputs in whose memory the first output may lie, by index,
	// the best first; alias says that it always lies in that of the first.
	inPlace []int
	alias   bool
	act     bool // an activation has been taken in
	sum     bool // an addition has
	at      int  // its place among the steps
	index   int  // the runtime works in this order where it may choose
	gone    bool
}

// program is what a run executes.
type program struct {
	*facts
	steps []*step
	by    map[string]*step   // that gives a value
	uses  map[string][]*step // that take it, once for each time
	final map[string]bool    // outputs of the graph
	// blocked values lie in blocks of channels, as the runtime's convolutions
	// of 4-dimensional FP32 values want it; their bytes include what is left
	// empty of the last block.
	blocked map[string]float64
}

// channels is how many of them lie together on processors with AVX-512; there
// are 8 with AVX2.
const channels = 16

var activations = []string{"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid"}

// Operators whose output may lie in the memory of an input.
var unaryInPlace = []string{"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Ceil", "Floor", "Round",
	"Reciprocal", "Softplus", "Softsign", "Elu", "Selu", "HardSigmoid", "HardSwish", "ThresholdedRelu", "Not", "Softmax", "Cast"}
var binaryInPlace = []string{"Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"}

// Operators that give their first input with another shape.
var aliases = []string{"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}

// newProgram makes steps of what a run does with the nodes, as ONNX Runtime's
// optimisations for a CPU leave them.
func newProgram(f *facts) *program {
	p := &program{facts: f, by: map[string]*step{}, uses: map[string][]*step{}, final: map[string]bool{}, blocked: map[string]float64{}}
	for _, o := range f.graph.Outputs {
		p.final[o.Name] = true
	}
	same := map[string]string{} // an output of Identity, and what it is
	for i := range f.graph.Nodes {
		n := &f.graph.Nodes[i]
		if p.isConstant(n.Outputs) {
			continue
		}
		s := &step{node: n, op: operatorKey(n), index: i, alias: slices.Contains(aliases, n.Op)}
		for _, name := range n.Inputs {
			if first, ok := same[name]; ok {
				name = first
			}
			v := f.values[name]
			switch {
			case name == "" || v == nil:
			case v.constant:
				s.weights += v.size()
			default:
				s.in = append(s.in, name)
			}
		}
		for _, name := range n.Outputs {
			if name != "" {
				s.out = append(s.out, name)
			}
		}
		if (n.Op == "Identity" || n.Op == "Dropout") && n.Domain == "" && len(s.in) > 0 && !slices.ContainsFunc(s.out, p.isFinal) {
			for _, out := range s.out {
				same[out] = s.in[0]
			}
			continue
		}
		if n.Op == "Gather" && n.Domain == "" {
			s.weights = p.size(s.out...) // of a table, only the rows that it takes
		}
		s.flops, s.scratch = f.arithmetic(n)
		switch {
		case len(s.in) == 0:
		case n.Domain == "" && slices.Contains(unaryInPlace, n.Op):
			s.inPlace = []int{0}
		case n.Domain == "" && slices.Contains(binaryInPlace, n.Op):
			for i := range s.in {
				s.inPlace = append(s.inPlace, i)
			}
		}
		p.steps = append(p.steps, s)
	}
	p.index()
	p.fuse()
	p.order()
	p.block()
	p.order()
	return p
}

func (p *program) isConstant(names []string) bool {
	return !slices.ContainsFunc(names, func(name string) bool { return name != "" && !p.values[name].constant })
}

func (p *program) isFinal(name string) bool { return p.final[name] }

// size gives the bytes of values.
func (p *program) size(names ...string) (sum float64) {
	for _, name := range names {
		if b, ok := p.blocked[name]; ok {
			sum += b
		} else {
			sum += p.values[name].size()
		}
	}
	return sum
}

// index finds out again who gives and takes each value.
func (p *program) index() {
	p.steps = slices.DeleteFunc(p.steps, func(s *step) bool { return s.gone })
	clear(p.by)
	clear(p.uses)
	for i, s := range p.steps {
		s.at = i
		for _, v := range s.out {
			p.by[v] = s
		}
		for _, v := range s.in {
			p.uses[v] = append(p.uses[v], s)
		}
	}
}

// next gives the only step that takes what s gives, nil where that is not one.
func (p *program) next(s *step) *step {
	if s == nil || len(s.out) != 1 || p.final[s.out[0]] || len(p.uses[s.out[0]]) != 1 {
		return nil
	}
	return p.uses[s.out[0]][0]
}

// take has a step do what the one after it does.
func (p *program) take(s, next *step) {
	gives := s.out[0]
	for _, v := range next.in {
		if v == gives {
			continue
		}
		s.in = append(s.in, v)
		for i, u := range p.uses[v] {
			if u == next {
				p.uses[v][i] = s
				break
			}
		}
	}
	delete(p.by, gives)
	delete(p.uses, gives)
	s.out = next.out
	for _, v := range s.out {
		p.by[v] = s
	}
	s.weights += next.weights
	s.flops += next.flops
	next.gone = true
}

// drop removes a step whose work another one does.
func (p *program) drop(s *step) {
	s.gone = true
	for _, v := range s.out {
		delete(p.by, v)
		delete(p.uses, v)
	}
	for _, v := range s.in {
		if i := slices.Index(p.uses[v], s); i >= 0 {
			p.uses[v] = slices.Delete(p.uses[v], i, i+1)
		}
	}
}

// replace has one step do what several do: with these inputs it gives what the
// last of them gives.
func (p *program) replace(op string, in []string, all ...*step) *step {
	last := all[len(all)-1]
	one := *last
	one.op, one.in, one.inPlace, one.alias = op, in, nil, false
	one.weights, one.flops = 0, 0
	for _, s := range all {
		one.weights += s.weights
		one.flops += s.flops
	}
	uses := map[string][]*step{}
	for _, v := range last.out {
		uses[v] = p.uses[v]
	}
	for _, s := range all {
		p.drop(s)
	}
	for _, v := range last.out {
		p.by[v], p.uses[v] = &one, uses[v]
	}
	for _, v := range in {
		p.uses[v] = append(p.uses[v], &one)
	}
	p.steps[one.at] = &one
	return &one
}

// is says whether a step is a certain operator with so many inputs that are
// not constants.
func (s *step) is(inputs int, ops ...string) bool {
	return s != nil && !s.gone && len(s.in) == inputs && len(s.out) == 1 && slices.Contains(ops, s.op)
}

// fuse makes one step of several where the runtime does. What it leaves out
// are mostly chains of small operators that would work in place.
func (p *program) fuse() {
	for i := 0; i < len(p.steps); i++ {
		switch s := p.steps[i]; {
		case s.gone:
		case s.is(1, "Erf"):
			p.gelu(s)
		case s.is(1, "Sqrt"):
			p.layerNorm(s)
		case s.is(1, "MatMul") && p.values[s.out[0]].rank() == 2:
			if n := p.next(s); n.is(1, "Add") {
				p.take(s, n)
				s.op = "Gemm"
			}
		}
	}
	for _, s := range p.steps {
		if !s.gone {
			p.fuseAfter(s)
		}
	}
	for i := 0; i < len(p.steps); i++ {
		s := p.steps[i]
		switch {
		case s.gone:
		case s.is(1, "Gelu"):
			// The bias before it.
			if before := p.by[s.in[0]]; before.is(1, "Add") && p.next(before) == s {
				p.replace("Gelu", before.in, before, s).scratch = s.scratch
			}
		case s.is(1, "LayerNormalization"):
			p.skipLayerNorm(s)
		}
	}
	p.index()
}

// fuseAfter takes into a step what follows it.
func (p *program) fuseAfter(s *step) {
	for {
		n := p.next(s)
		if n == nil || n.gone {
			return
		}
		act := n.is(1, activations...) && !s.act
		switch s.op {
		case "Conv":
			switch {
			// By a channel, into the weights.
			case !s.act && !s.sum && n.is(1, "BatchNormalization", "Mul", "Add") && p.sameShape(s, n):
				p.take(s, n)
				s.weights -= n.weights
				s.flops -= n.flops
			case act:
				p.take(s, n)
				s.act = true
			case !s.act && !s.sum && n.is(2, "Add", "Sum") && n.in[0] != n.in[1] && p.latest(s, n):
				p.take(s, n)
				s.sum = true
				s.inPlace = []int{len(s.in) - 1}
			default:
				return
			}
		case "Gemm":
			if !act || n.op == "Clip" {
				return
			}
			p.take(s, n)
			s.act = true
		case "MatMul", "Transpose":
			switch {
			case s.op == "MatMul" && n.is(1, "Mul", "Div") && n.weights <= 8:
				p.take(s, n) // a scale
			case s.op == "Transpose" && n.is(2, "MatMul") && p.swaps(s):
				in := slices.Clone(n.in)
				in[slices.Index(in, s.out[0])] = s.in[0]
				p.replace("MatMul", in, s, n)
				return
			default:
				return
			}
		default:
			return
		}
	}
}

// sameShape says whether two steps give the same shape.
func (p *program) sameShape(a, b *step) bool {
	x, y := p.values[a.out[0]], p.values[b.out[0]]
	return x.dims != nil && slices.Equal(x.dims, y.dims)
}

// latest says whether, of the two convolutions that an addition adds, s is the
// one that the runtime adds in: the other has to be there first.
func (p *program) latest(s, sum *step) bool {
	if !p.sameShape(s, sum) {
		return false
	}
	for _, v := range sum.in {
		o := p.by[v]
		if o == nil || o == s {
			continue
		}
		if o.op == "Conv" && !o.act && !o.sum && p.next(o) == sum && o.index > s.index {
			return false
		}
		if !slices.Equal(p.values[v].dims, p.values[sum.out[0]].dims) {
			return false
		}
	}
	return true
}

// swaps says whether a transposition exchanges the last two dimensions only.
func (p *program) swaps(s *step) bool {
	perm := s.node.ints("perm")
	n := len(perm)
	if n < 2 || perm[n-1] != int64(n-2) || perm[n-2] != int64(n-1) {
		return false
	}
	for i, d := range perm[:n-2] {
		if d != int64(i) {
			return false
		}
	}
	return true
}

// gelu finds x·(1+erf(x/√2))/2 around an Erf.
func (p *program) gelu(erf *step) {
	scale := p.by[erf.in[0]]
	add := p.next(erf)
	mul := p.next(add)
	if !scale.is(1, "Div", "Mul") || p.next(scale) != erf || !add.is(1, "Add") || !mul.is(2, "Mul") {
		return
	}
	x := scale.in[0]
	other := mul.in[0]
	if other == add.out[0] {
		other = mul.in[1]
	}
	all := []*step{scale, erf, add, mul}
	half := p.next(mul)
	switch before := p.by[other]; {
	case other == x && half.is(1, "Mul") && half.weights <= 8:
		all = append(all, half)
	case before.is(1, "Mul") && before.in[0] == x && p.next(before) == mul:
		all = slices.Insert(all, 0, before)
	default:
		return
	}
	one := p.replace("Gelu", []string{x}, all...)
	one.weights = 0
	one.scratch = p.size(one.out...)
}

// layerNorm finds a layer normalisation around its Sqrt.
func (p *program) layerNorm(root *step) {
	add := p.by[root.in[0]]
	if !add.is(1, "Add") {
		return
	}
	mean := p.by[add.in[0]]
	if !mean.is(1, "ReduceMean") {
		return
	}
	square := p.by[mean.in[0]]
	if !square.is(1, "Pow") && !(square.is(2, "Mul") && square.in[0] == square.in[1]) {
		return
	}
	sub := p.by[square.in[0]]
	div := p.next(root)
	if !sub.is(2, "Sub") || !div.is(2, "Div") || div.in[0] != sub.out[0] {
		return
	}
	first := p.by[sub.in[1]]
	if !first.is(1, "ReduceMean") || first.in[0] != sub.in[0] || p.next(first) != sub {
		return
	}
	all := []*step{first, sub, square, mean, add, root, div}
	if mul := p.next(div); mul.is(1, "Mul") {
		all = append(all, mul)
		if bias := p.next(mul); bias.is(1, "Add") {
			all = append(all, bias)
		}
	}
	p.replace("LayerNormalization", []string{first.in[0]}, all...)
}

// skipLayerNorm takes the addition before a layer normalisation into it, and
// the bias before that.
func (p *program) skipLayerNorm(norm *step) {
	add := p.by[norm.in[0]]
	if !add.is(2, "Add") || p.next(add) != norm {
		return
	}
	for _, v := range add.in {
		if !slices.Equal(p.values[v].dims, p.values[add.out[0]].dims) {
			return
		}
	}
	in, all := slices.Clone(add.in), []*step{add, norm}
	for i, v := range in {
		if bias := p.by[v]; bias.is(1, "Add") && p.next(bias) == add {
			in[i] = bias.in[0]
			all = append([]*step{bias}, all...)
			break
		}
	}
	p.replace("SkipLayerNormalization", in, all...)
}

// order sorts the steps as the runtime does: depth first from those that
// nobody follows, of several inputs the one first that comes last.
func (p *program) order() {
	p.index()
	done := make(map[*step]bool, len(p.steps))
	sorted := make([]*step, 0, len(p.steps))
	type visit struct {
		s     *step
		leave bool
	}
	var stack []visit
	for _, s := range p.steps {
		if !slices.ContainsFunc(s.out, func(v string) bool { return len(p.uses[v]) > 0 }) {
			stack = append(stack, visit{s, false})
		}
	}
	slices.Reverse(stack)
	for len(stack) > 0 {
		v := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if v.leave {
			sorted = append(sorted, v.s)
			continue
		}
		if done[v.s] {
			continue
		}
		done[v.s] = true
		stack = append(stack, visit{v.s, true})
		var before []*step
		for _, name := range v.s.in {
			if b := p.by[name]; b != nil && !done[b] {
				before = append(before, b)
			}
		}
		slices.SortStableFunc(before, func(a, b *step) int { return cmp.Compare(a.index, b.index) })
		for _, b := range before {
			stack = append(stack, visit{b, false})
		}
	}
	p.steps = sorted
}

// block lays values that convolutions give and take out in blocks of channels,
// with steps that bring them into that order and back where others use them.
func (p *program) block() {
	plain := map[string]string{} // the same value in the other order
	blocks := map[string]string{}
	var all []*step
	for i, s := range p.steps {
		out := s.out
		can := len(out) == 1 && p.four(out[0])
		isConv := s.op == "Conv" && len(out) == 1 && p.four(out[0]) && p.blockable(s)
		switch {
		case isConv:
			s.index = len(p.graph.Nodes) + i
			for i, v := range s.in {
				if i == 0 && p.values[v].dims[1] < channels {
					continue // it takes images as they are
				}
				if _, ok := p.blocked[v]; !ok {
					s.in[i] = p.reordered(v, s, blocks, &all, true)
				}
			}
		case can && len(s.in) > 0 && p.allBlocked(s.in) && p.keepsBlocks(s):
			s.index = len(p.graph.Nodes) + i
		default:
			for i, v := range s.in {
				if _, ok := p.blocked[v]; ok {
					s.in[i] = p.reordered(v, s, plain, &all, false)
				}
			}
			all = append(all, s)
			continue
		}
		all = append(all, s)
		if v := out[0]; p.final[v] {
			// It is brought back at once.
			name := v + "\x00blocks"
			p.values[name] = p.values[v]
			p.blocked[name] = p.inBlocks(v)
			all = append(all, &step{node: s.node, op: "Reorder", in: []string{name}, out: []string{v}, index: s.index})
			s.out = []string{name}
			blocks[v] = name
		} else {
			p.blocked[v] = p.inBlocks(v)
		}
	}
	p.steps = all
}

// reordered gives a value in the other order, by a step before s that makes it
// so.
func (p *program) reordered(v string, s *step, have map[string]string, all *[]*step, toBlocks bool) string {
	name, ok := have[v]
	if ok {
		return name
	}
	name = v + "\x00reordered"
	have[v] = name
	p.values[name] = p.values[v]
	if toBlocks {
		p.blocked[name] = p.inBlocks(v)
	}
	*all = append(*all, &step{node: s.node, op: "Reorder", in: []string{v}, out: []string{name}, index: s.index})
	return name
}

func (p *program) inBlocks(v string) float64 {
	d := p.values[v].dims
	return 4 * float64(d[0]) * float64((d[1]+channels-1)/channels*channels) * float64(d[2]) * float64(d[3])
}

func (p *program) four(v string) bool {
	f := p.values[v]
	return len(f.dims) == 4 && f.typ == tensor.Float32
}

func (p *program) allBlocked(names []string) bool {
	return !slices.ContainsFunc(names, func(v string) bool { _, ok := p.blocked[v]; return !ok })
}

// blockable says whether the runtime has a convolution in blocks for a step.
func (p *program) blockable(s *step) bool {
	n := s.node
	x, w := p.values[n.input(0)], p.values[n.input(1)]
	// The runtime wants weights and bias constant there.
	if slices.ContainsFunc(s.in, func(v string) bool { return !p.four(v) }) {
		return false
	}
	if len(s.in) == 0 || x.rank() != 4 || w.rank() != 4 || !w.constant || x.typ != tensor.Float32 {
		return false
	}
	if group := n.int("group", 1); group != 1 {
		return w.dims[1] == 1 && w.dims[0] == group || w.dims[1]%channels == 0 && w.dims[0]/max(group, 1)%channels == 0
	}
	return x.dims[1] < channels || x.dims[1]%4 == 0
}

// keepsBlocks says whether a step works on values in blocks as well.
func (p *program) keepsBlocks(s *step) bool {
	switch s.op {
	case "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "BatchNormalization":
		return len(s.in) == 1
	case "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "Gelu":
		return true
	case "Add", "Sum", "Mul":
		return !slices.ContainsFunc(s.in, func(v string) bool { return !slices.Equal(p.values[v].dims, p.values[s.out[0]].dims) })
	case "Concat":
		return s.node.int("axis", 1) == 1 && !slices.ContainsFunc(s.in, func(v string) bool { return p.values[v].dims[1]%channels != 0 })
	}
	return false
}
