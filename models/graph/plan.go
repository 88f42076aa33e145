package graph

import (
	"math"
	"math/bits"
	"slices"
)

// arithmetic gives the additions and multiplications of a node, and the bytes
// that it works in besides its inputs and outputs.
func (f *facts) arithmetic(n *Node) (flops, scratch float64) {
	in := func(i int) *fact { return f.values[n.input(i)] }
	var out *fact
	for _, name := range n.Outputs {
		if name != "" {
			out = f.values[name]
			break
		}
	}
	if out == nil {
		return 0, 0
	}
	all := out.elements()
	switch n.Op {
	case "Conv", "FusedConv", "ConvInteger", "QLinearConv":
		w, bias := in(1), 2
		if n.Op == "QLinearConv" {
			w, bias = in(3), 8
		}
		if w.rank() < 3 {
			return 0, 0
		}
		flops = 2 * all * product(w.dims[1:])
		if len(n.Inputs) > bias && n.Op != "ConvInteger" {
			flops += all
		}
		if n.Op == "QLinearConv" {
			scratch = in(0).size() + out.size() // with the channels last
		}
	case "ConvTranspose":
		w, x := in(1), in(0)
		if w.rank() < 3 || x.rank() != w.rank() || x.dims[0] == 0 {
			return 0, 0
		}
		flops = 2 * x.elements() * product(w.dims[1:])
		// Columns of one image.
		scratch = x.elements() / float64(x.dims[0]) / float64(max(x.dims[1], 1)) * product(w.dims[1:]) * 4
	case "Gemm", "FusedGemm":
		a := in(0)
		if a.rank() != 2 {
			return 0, 0
		}
		k := a.dims[1]
		if n.int("transA", 0) != 0 {
			k = a.dims[0]
		}
		flops = 2 * all * float64(k)
		if n.input(2) != "" {
			flops += all
		}
	case "MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits":
		a := in(0)
		if a.rank() < 1 {
			return 0, 0
		}
		k := a.dims[len(a.dims)-1]
		if n.Domain == runtimeDomain && n.int("transA", 0) != 0 && len(a.dims) > 1 {
			k = a.dims[len(a.dims)-2]
		}
		flops = 2 * all * float64(k)
		if n.Op == "DynamicQuantizeMatMul" {
			scratch = a.elements()
		}
	case "MaxPool", "AveragePool", "LpPool":
		flops = all * product(n.ints("kernel_shape"))
	case "GlobalAveragePool", "GlobalMaxPool", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
		"ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin":
		flops = in(0).elements()
	case "LayerNormalization", "InstanceNormalization", "GroupNormalization", "SkipLayerNormalization":
		flops = 7 * all // mean, variance, and then both are taken away
	case "RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization":
		flops = 4 * all
	case "Softmax", "LogSoftmax":
		flops = 3 * all
	case "BatchNormalization":
		flops = 2 * all
	case "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM":
		x, w, r := in(0), in(1), in(2)
		if x.rank() != 3 || w == nil || r == nil {
			return 0, 0
		}
		flops = 2 * product(x.dims[:2]) * (w.elements() + r.elements())
	case "Gelu", "FastGelu", "BiasGelu", "QuickGelu":
		flops, scratch = 5*all, out.size()
	case "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND",
		"Expand", "Tile", "Pad", "Identity", "Dropout", "Shape", "Size", "Constant", "ConstantOfShape", "Cast", "CastLike", "Where",
		"DepthToSpace", "SpaceToDepth", "OneHot", "TopK", "ScatterND", "ScatterElements":
	default:
		flops = all // one for each element
	}
	return flops, scratch
}

// buffer is memory that values lie in, one after the other.
type buffer struct {
	size float64
	like string // a value of the shape that it was made for
	last int    // the step after which nobody needs it
	uses int    // of the value that is in it, still to come
	out  bool   // it holds an output of the graph
	idle bool   // it waits for a value
}

// workspace gives the bytes that a run takes. Buffers are planned as ONNX
// Runtime plans them (allocation_planner.cc): a value lies in an input's memory
// where the operator allows that and nobody else needs the input; or in the
// buffer of a value of the same shape that nobody needs any more, the last
// such; or in a new one, which the allocator gives when the step begins, and
// gets back after the last one that uses it.
func (p *program) workspace() float64 {
	in := map[string]*buffer{} // by value
	begins := make([][]*buffer, len(p.steps))
	var free []*buffer
	release := func(b *buffer, i int) {
		if b.uses--; b.uses <= 0 && !b.out {
			b.uses, b.last, b.idle = 0, i, true
			free = append(free, b)
		}
	}
	for i, s := range p.steps {
		for j, v := range s.out {
			uses := len(p.uses[v])
			if b := p.reused(s, j, in); b != nil {
				b.uses += uses
				b.last = i
				in[v] = b
				continue
			}
			if at := p.fitting(free, v); at >= 0 && !p.final[v] {
				b := free[at]
				free = slices.Delete(free, at, at+1)
				b.uses, b.last, b.like, b.idle = uses, i, v, false
				in[v] = b
				continue
			}
			b := &buffer{size: p.size(v), like: v, last: i, uses: uses, out: p.final[v]}
			if b.out {
				b.last = len(p.steps)
			}
			in[v] = b
			begins[i] = append(begins[i], b)
		}
		for _, v := range s.in {
			if b := in[v]; b != nil {
				release(b, i)
			}
		}
		for _, v := range s.out {
			if b := in[v]; b != nil && len(p.uses[v]) == 0 && !b.out && b.uses == 0 && !b.idle {
				b.idle = true
				free = append(free, b)
			}
		}
	}
	ends := make([][]*buffer, len(p.steps)+1)
	for _, all := range begins {
		for _, b := range all {
			ends[b.last] = append(ends[b.last], b)
		}
	}
	var m memory
	blocks := map[*buffer]block{}
	for i, s := range p.steps {
		for _, b := range begins[i] {
			blocks[b] = m.take(b.size)
		}
		if s.scratch > 0 {
			m.give(m.take(s.scratch))
		}
		for _, b := range ends[i] {
			m.give(blocks[b])
		}
	}
	return m.bytes + m.smallPeak
}

// reused gives the buffer of an input that an output of a step lies in, nil
// where there is none.
func (p *program) reused(s *step, output int, in map[string]*buffer) *buffer {
	if output > 0 || len(s.in) == 0 {
		return nil
	}
	v := s.out[0]
	if s.alias {
		b := in[s.in[0]] // nil for an input of the graph
		if b == nil || p.final[v] || b.out {
			return nil
		}
		return b
	}
	if p.final[v] {
		return nil
	}
	for _, i := range s.inPlace {
		b := in[s.in[i]]
		if b != nil && b.uses == 1 && !b.out && p.size(s.in[i]) == p.size(v) && p.size(v) == b.size {
			return b
		}
	}
	return nil
}

// fitting gives the newest free buffer that was made for a value of the same
// shape, -1 where there is none.
func (p *program) fitting(free []*buffer, v string) int {
	f := p.values[v]
	const most = 256 // are looked at
	for at := len(free) - 1; at >= max(len(free)-most, 0); at-- {
		o := p.values[free[at].like]
		if f.dims != nil && slices.Equal(f.dims, o.dims) && f.typ == o.typ && p.size(v) == free[at].size {
			return at
		}
	}
	return -1
}

// memory does what the allocator of agent/ort does with the blocks of one run,
// see workspace.c: it gives a free block of the first class that is large
// enough and at most eight times as large, the newest of that; or maps one.
// What is small comes from the C heap. All figures are in bytes.
type memory struct {
	free             [classes][]int // indices of blocks
	blocks           []float64      // what of each was touched
	bytes            float64        // of all blocks
	small, smallPeak float64
}

const (
	headBytes    = 64
	smallestBits = 16
	stepBits     = 3
	classes      = (63 - smallestBits) << stepBits
	generous     = 3 << stepBits
)

// block is what was taken.
type block struct {
	size  float64
	class int // -1 for one of the C heap
	index int
}

func (m *memory) take(size float64) block {
	all := min(math.Ceil(size)+headBytes, 1<<60)
	if all < 1<<smallestBits {
		m.small += all
		m.smallPeak = max(m.smallPeak, m.small)
		return block{size: all, class: -1}
	}
	n := uint64(all)
	exp := bits.Len64(n) - 1
	unit := uint64(1) << (exp - stepBits)
	class := (exp-smallestBits)<<stepBits + int((n-uint64(1)<<exp+unit-1)/unit)
	for c := class; c < classes && c <= class+generous; c++ {
		if l := m.free[c]; len(l) > 0 {
			i := l[len(l)-1]
			m.free[c] = l[:len(l)-1]
			m.touch(i, all)
			return block{size: all, class: c, index: i}
		}
	}
	m.blocks = append(m.blocks, 0)
	i := len(m.blocks) - 1
	m.touch(i, all)
	return block{size: all, class: class, index: i}
}

func (m *memory) touch(i int, bytes float64) {
	m.bytes += max(bytes-m.blocks[i], 0)
	m.blocks[i] = max(bytes, m.blocks[i])
}

func (m *memory) give(b block) {
	if b.class < 0 {
		m.small -= b.size
		return
	}
	m.free[b.class] = append(m.free[b.class], b.index)
}
