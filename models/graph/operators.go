package graph

import (
	"cmp"
	"math"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// The domain of the operators that the runtime adds to ONNX's.
const runtimeDomain = "com.microsoft"

// operatorKey names a node's operator.
func operatorKey(n *Node) string {
	if n.Domain == "" {
		return n.Op
	}
	return n.Domain + "." + n.Op
}

// operators infer outputs from inputs, as the operators' specifications have
// it (onnx/onnx, docs/Operators.md). They give false where they cannot.
var operators = map[string]func(*call) bool{}

func register(f func(*call) bool, names ...string) {
	for _, name := range names {
		operators[name] = f
	}
}

func init() {
	register(unary(nil), "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Abs", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan",
		"Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Reciprocal", "Softplus", "Softsign", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Mish",
		"ThresholdedRelu", "Gelu", "Swish", "Clip", "Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "InstanceNormalization",
		"BatchNormalization", "GroupNormalization", "RMSNormalization", "LRN", "MeanVarianceNormalization", "CumSum", "Trilu", "Shrink",
		"Not", "BitwiseNot", "ReverseSequence", "ScatterElements", "ScatterND", "Scatter", "SimplifiedLayerNormalization",
		"com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu", "com.microsoft.BiasGelu",
		"com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization", "com.microsoft.QLinearSigmoid",
		"com.microsoft.QLinearLeakyRelu", "com.microsoft.QLinearSoftmax", "com.microsoft.BiasAdd", "com.microsoft.RotaryEmbedding",
		"com.microsoft.GroupNorm")
	register(unary(func(v float64) float64 { return v }), "Identity", "Dropout")
	register(unary(math.Sqrt), "Sqrt")
	register(unary(func(v float64) float64 { return -v }), "Neg")
	register(unary(math.Floor), "Floor")
	register(unary(math.Ceil), "Ceil")
	register(unary(math.RoundToEven), "Round")
	register(layerNormalization, "LayerNormalization")
	register(func(c *call) bool { return c.give(0, tensor.Bool, c.dims(0)) }, "IsNaN", "IsInf")
	register(cast, "Cast")
	register(func(c *call) bool { return c.give(0, c.typ(1), c.dims(0)) }, "CastLike")
	register(binary(func(a, b float64) float64 { return a + b }), "Add")
	register(binary(func(a, b float64) float64 { return a - b }), "Sub")
	register(binary(func(a, b float64) float64 { return a * b }), "Mul")
	register(binary(func(a, b float64) float64 { return a / b }), "Div")
	register(binary(math.Max), "Max")
	register(binary(math.Min), "Min")
	register(binary(nil), "Pow", "PRelu", "Mod", "Sum", "Mean", "And", "Or", "Xor", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
	register(comparison(func(a, b float64) bool { return a == b }), "Equal")
	register(comparison(func(a, b float64) bool { return a > b }), "Greater")
	register(comparison(func(a, b float64) bool { return a < b }), "Less")
	register(comparison(func(a, b float64) bool { return a >= b }), "GreaterOrEqual")
	register(comparison(func(a, b float64) bool { return a <= b }), "LessOrEqual")
	register(where, "Where")
	register(func(c *call) bool { return c.give(0, c.typ(0), broadcast(c.dims(0), c.dims(3))) }, "com.microsoft.QLinearAdd", "com.microsoft.QLinearMul")

	register(func(c *call) bool { return conv(c, 0, 1, c.typ(0)) }, "Conv", "com.microsoft.FusedConv")
	register(func(c *call) bool { return conv(c, 0, 1, tensor.Int32) }, "ConvInteger")
	register(func(c *call) bool { return conv(c, 0, 3, c.typ(0)) }, "QLinearConv")
	register(convTranspose, "ConvTranspose")
	register(pool, "MaxPool", "AveragePool", "LpPool", "com.microsoft.QLinearAveragePool")
	register(globalPool, "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "com.microsoft.QLinearGlobalAveragePool")
	register(gemm, "Gemm", "com.microsoft.FusedGemm")
	register(func(c *call) bool { return matMul(c, 0, 1, c.typ(0)) }, "MatMul", "com.microsoft.FusedMatMul")
	register(func(c *call) bool { return matMul(c, 0, 1, tensor.Int32) }, "MatMulInteger")
	register(func(c *call) bool { return matMul(c, 0, 1, c.typ(2)) }, "com.microsoft.MatMulIntegerToFloat")
	register(func(c *call) bool { return matMul(c, 0, 1, c.typ(0)) }, "com.microsoft.DynamicQuantizeMatMul")
	register(func(c *call) bool { return matMul(c, 0, 3, c.typ(0)) }, "QLinearMatMul")
	register(matMulBits, "com.microsoft.MatMulNBits")
	register(quantize, "QuantizeLinear", "com.microsoft.QuantizeLinear")
	register(func(c *call) bool { return c.give(0, c.typ(1), c.dims(0)) }, "DequantizeLinear", "com.microsoft.DequantizeLinear")
	register(func(c *call) bool {
		return c.give(0, tensor.Uint8, c.dims(0)) && c.give(1, tensor.Float32, []int64{}) && c.give(2, tensor.Uint8, []int64{})
	}, "DynamicQuantizeLinear")

	register(reshape, "Reshape")
	register(flatten, "Flatten")
	register(squeeze, "Squeeze")
	register(unsqueeze, "Unsqueeze")
	register(transpose, "Transpose")
	register(concat, "Concat")
	register(split, "Split")
	register(slice, "Slice")
	register(gather, "Gather")
	register(func(c *call) bool { return c.give(0, c.typ(0), c.dims(1)) }, "GatherElements")
	register(gatherND, "GatherND")
	register(expand, "Expand")
	register(tile, "Tile")
	register(pad, "Pad")
	register(resize, "Resize", "Upsample")
	register(shapeOf, "Shape")
	register(sizeOf, "Size")
	register(constant, "Constant")
	register(constantOfShape, "ConstantOfShape")
	register(rangeOf, "Range")
	register(reduce, "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare")
	register(arg, "ArgMax", "ArgMin")
	register(topK, "TopK")
	register(oneHot, "OneHot")
	register(depthToSpace, "DepthToSpace")
	register(spaceToDepth, "SpaceToDepth")
	register(func(c *call) bool { return recurrent(c) }, "LSTM", "GRU", "RNN")
	register(func(c *call) bool { return recurrent(c) }, "com.microsoft.DynamicQuantizeLSTM")
}

func unary(f func(float64) float64) func(*call) bool {
	return func(c *call) bool {
		in := c.arg(0)
		if in == nil || !c.give(0, in.typ, in.dims) {
			return false
		}
		for i := 1; i < len(c.out); i++ { // the mask of Dropout; statistics that nobody asks for
			if c.n.Outputs[i] == "" {
				continue
			}
			if c.n.Op != "Dropout" {
				return false
			}
			c.give(i, tensor.Bool, in.dims)
		}
		if f != nil && in.content != nil {
			content := slices.Clone(in.content)
			for i, v := range content {
				content[i] = f(v)
			}
			c.setContent(0, content)
		}
		return true
	}
}

func layerNormalization(c *call) bool {
	dims := c.dims(0)
	a, ok := axis(c.n.int("axis", -1), len(dims))
	if dims == nil || !ok {
		return false
	}
	kept := slices.Clone(dims)
	for i := a; i < len(kept); i++ {
		kept[i] = 1
	}
	return c.give(0, c.typ(0), dims) && c.give(1, tensor.Float32, kept) && c.give(2, tensor.Float32, kept)
}

func cast(c *call) bool {
	if !c.give(0, tensor.Type(c.n.int("to", 0)), c.dims(0)) {
		return false
	}
	if content := c.in[0].content; content != nil {
		c.setContent(0, slices.Clone(content))
	}
	return true
}

// binary infers an operator that works element by element on two inputs, or
// on any number.
func binary(f func(a, b float64) float64) func(*call) bool {
	return func(c *call) bool {
		if len(c.in) == 0 {
			return false
		}
		shapes := make([][]int64, len(c.in))
		for i := range c.in {
			shapes[i] = c.dims(i)
		}
		if !c.give(0, c.typ(0), broadcast(shapes...)) {
			return false
		}
		if content := c.elementwise(f); content != nil {
			c.setContent(0, content)
		}
		return true
	}
}

// elementwise works out the content of two inputs, of which each is as long as
// the output or has one element.
func (c *call) elementwise(f func(a, b float64) float64) []float64 {
	n := c.out[0].elements()
	if f == nil || len(c.in) != 2 || n > maxContent {
		return nil
	}
	a, b := c.arg(0), c.arg(1)
	for _, in := range []*fact{a, b} {
		if in == nil || in.content == nil || len(in.content) != 1 && float64(len(in.content)) != n {
			return nil
		}
	}
	content := make([]float64, int(n))
	for i := range content {
		content[i] = f(a.content[i%len(a.content)], b.content[i%len(b.content)])
	}
	return content
}

func comparison(f func(a, b float64) bool) func(*call) bool {
	return func(c *call) bool {
		if !c.give(0, tensor.Bool, broadcast(c.dims(0), c.dims(1))) {
			return false
		}
		if content := c.elementwise(func(a, b float64) float64 {
			if f(a, b) {
				return 1
			}
			return 0
		}); content != nil {
			c.setContent(0, content)
		}
		return true
	}
}

func where(c *call) bool {
	if !c.give(0, c.typ(1), broadcast(c.dims(0), c.dims(1), c.dims(2))) {
		return false
	}
	n := c.out[0].elements()
	for i := range 3 {
		if in := c.arg(i); n == 0 || n > maxContent || in.content == nil || len(in.content) != 1 && float64(len(in.content)) != n {
			return true
		}
	}
	at := func(i, j int) float64 { return c.in[i].content[j%len(c.in[i].content)] }
	content := make([]float64, int(n))
	for j := range content {
		if content[j] = at(2, j); at(0, j) != 0 {
			content[j] = at(1, j)
		}
	}
	c.setContent(0, content)
	return true
}

// window has what convolutions and pools say of where they look.
type window struct{ kernel, strides, dilations, pads []int64 }

func (c *call) window(kernel []int64) (w window, ok bool) {
	n := len(kernel)
	list := func(name string, length int, otherwise int64) []int64 {
		if l := c.n.ints(name); len(l) == length {
			return l
		}
		return slices.Repeat([]int64{otherwise}, length)
	}
	w = window{kernel, list("strides", n, 1), list("dilations", n, 1), list("pads", 2*n, 0)}
	for i := range n {
		if min(kernel[i], w.strides[i], w.dilations[i]) < 1 || max(kernel[i], w.dilations[i]) > 1<<24 || w.strides[i] > 1<<12 {
			return w, false
		}
	}
	for _, p := range w.pads {
		if p < -1<<40 || p > 1<<40 {
			return w, false
		}
	}
	return w, true
}

// out gives the size that a dimension has afterwards.
func (w window) out(i int, in int64, auto string, ceil bool) int64 {
	k := (w.kernel[i]-1)*w.dilations[i] + 1
	switch auto {
	case "SAME_UPPER", "SAME_LOWER":
		return (in + w.strides[i] - 1) / w.strides[i]
	case "VALID":
		return (in-k)/w.strides[i] + 1
	}
	before, after := w.pads[i], w.pads[len(w.kernel)+i]
	span := in + before + after - k
	if span < 0 {
		return -1
	}
	out := span/w.strides[i] + 1
	// A last window has to begin inside of the input or of the pad before it.
	if ceil && span%w.strides[i] != 0 && out*w.strides[i] < in+before {
		out++
	}
	return out
}

func conv(c *call, x, w int, typ tensor.Type) bool {
	in, weight := c.dims(x), c.dims(w)
	if len(in) < 3 || len(weight) != len(in) {
		return false
	}
	if kernel := c.n.ints("kernel_shape"); len(kernel) > 0 && !slices.Equal(kernel, weight[2:]) {
		return false
	}
	if float64(weight[1])*float64(c.n.int("group", 1)) != float64(in[1]) {
		return false
	}
	win, ok := c.window(weight[2:])
	if !ok {
		return false
	}
	out := []int64{in[0], weight[0]}
	for i, d := range in[2:] {
		out = append(out, win.out(i, d, c.n.text("auto_pad", ""), false))
	}
	return c.give(0, typ, out)
}

func convTranspose(c *call) bool {
	in, weight := c.dims(0), c.dims(1)
	if len(in) < 3 || len(weight) != len(in) || weight[0] != in[1] {
		return false
	}
	win, ok := c.window(weight[2:])
	group := c.n.int("group", 1)
	if !ok || group < 1 || group > 1<<12 {
		return false
	}
	out := []int64{in[0], weight[1] * group}
	sizes, extra := c.n.ints("output_shape"), c.n.ints("output_padding")
	for i, d := range in[2:] {
		k := (win.kernel[i]-1)*win.dilations[i] + 1
		size := win.strides[i]*(d-1) + k - win.pads[i] - win.pads[len(win.kernel)+i]
		if len(extra) == len(win.kernel) {
			size += extra[i]
		}
		switch auto := c.n.text("auto_pad", ""); {
		case len(sizes) == len(win.kernel):
			size = sizes[i]
		case len(sizes) == len(in):
			size = sizes[i+2]
		case auto == "SAME_UPPER" || auto == "SAME_LOWER":
			size = d * win.strides[i]
		}
		out = append(out, size)
	}
	return c.give(0, c.typ(0), out)
}

func pool(c *call) bool {
	in, kernel := c.dims(0), c.n.ints("kernel_shape")
	if len(in) < 3 || len(kernel) != len(in)-2 {
		return false
	}
	win, ok := c.window(kernel)
	if !ok {
		return false
	}
	out := []int64{in[0], in[1]}
	for i, d := range in[2:] {
		out = append(out, win.out(i, d, c.n.text("auto_pad", ""), c.n.int("ceil_mode", 0) != 0))
	}
	return c.give(0, c.typ(0), out) && c.give(1, tensor.Int64, out)
}

func globalPool(c *call) bool {
	in := c.dims(0)
	if len(in) < 3 {
		return false
	}
	out := slices.Repeat([]int64{1}, len(in))
	out[0], out[1] = in[0], in[1]
	return c.give(0, c.typ(0), out)
}

func gemm(c *call) bool {
	a, b := c.dims(0), c.dims(1)
	if len(a) != 2 || len(b) != 2 {
		return false
	}
	m, k, k2, n := a[0], a[1], b[0], b[1]
	if c.n.int("transA", 0) != 0 {
		m, k = k, m
	}
	if c.n.int("transB", 0) != 0 {
		k2, n = n, k2
	}
	return k == k2 && c.give(0, c.typ(0), []int64{m, n})
}

func matMul(c *call, x, y int, typ tensor.Type) bool {
	a, b := c.dims(x), c.dims(y)
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	a, b = slices.Clone(a), slices.Clone(b)
	swap := func(s []int64, name string) {
		if n := len(s); n > 1 && c.n.Domain == runtimeDomain && c.n.int(name, 0) != 0 {
			s[n-1], s[n-2] = s[n-2], s[n-1]
		}
	}
	swap(a, "transA")
	swap(b, "transB")
	rowless, columnless := len(a) == 1, len(b) == 1
	if rowless {
		a = append([]int64{1}, a...)
	}
	if columnless {
		b = append(b, 1)
	}
	if a[len(a)-1] != b[len(b)-2] {
		return false
	}
	out := broadcast(a[:len(a)-2], b[:len(b)-2])
	if out == nil {
		return false
	}
	if !rowless {
		out = append(out, a[len(a)-2])
	}
	if !columnless {
		out = append(out, b[len(b)-1])
	}
	return c.give(0, typ, out)
}

// matMulBits multiplies by a matrix of N columns whose elements have few bits.
func matMulBits(c *call) bool {
	a := c.dims(0)
	n := c.n.int("N", 0)
	if len(a) == 0 || n < 1 {
		return false
	}
	return c.give(0, c.typ(0), append(slices.Clone(a[:len(a)-1]), n))
}

func quantize(c *call) bool {
	typ := cmp.Or(c.typ(2), tensor.Type(c.n.int("output_dtype", 0)), tensor.Uint8)
	return c.give(0, typ, c.dims(0))
}

func reshape(c *call) bool {
	in := c.arg(0)
	to, ok := c.content(1)
	if len(c.in) < 2 {
		to, ok = c.n.ints("shape"), true
	}
	if in == nil || in.dims == nil || !ok || len(to) > MaxRank {
		return false
	}
	out, rest := make([]int64, len(to)), -1
	for i, d := range to {
		switch {
		case d > 0 || d == 0 && c.n.int("allowzero", 0) != 0:
			out[i] = d
		case d == 0 && i < len(in.dims):
			out[i] = in.dims[i]
		case d == -1 && rest < 0:
			out[i], rest = 1, i
		default:
			return false
		}
	}
	all := in.elements()
	if rest >= 0 {
		others := product(out)
		if others == 0 || math.Mod(all, others) != 0 {
			return false
		}
		out[rest] = integer(all / others)
	}
	if product(out) != all {
		return false
	}
	return c.give(0, in.typ, out) && c.keepContent()
}

// keepContent says that the output has the content of the first input.
func (c *call) keepContent() bool {
	if in := c.arg(0); in.content != nil {
		c.setContent(0, slices.Clone(in.content))
	}
	return true
}

func flatten(c *call) bool {
	in := c.dims(0)
	a := c.n.int("axis", 1)
	if a < 0 {
		a += int64(len(in))
	}
	if in == nil || a < 0 || a > int64(len(in)) {
		return false
	}
	before, after := product(in[:a]), product(in[a:])
	return c.give(0, c.typ(0), []int64{integer(before), integer(after)}) && c.keepContent()
}

func squeeze(c *call) bool {
	in := c.dims(0)
	axes, given, ok := c.axes(1, len(in))
	if in == nil || !ok {
		return false
	}
	out := []int64{}
	for i, d := range in {
		gone := d == 1 && !given || slices.Contains(axes, i)
		if gone && d != 1 {
			return false
		}
		if !gone {
			out = append(out, d)
		}
	}
	return c.give(0, c.typ(0), out) && c.keepContent()
}

func unsqueeze(c *call) bool {
	in := c.dims(0)
	list, ok := c.content(1)
	if c.arg(1) == nil {
		list, ok = c.n.ints("axes"), true
	}
	rank := len(in) + len(list)
	if in == nil || !ok || rank > MaxRank {
		return false
	}
	out := slices.Repeat([]int64{-1}, rank)
	for _, a := range list {
		i, ok := axis(a, rank)
		if !ok || out[i] == 1 {
			return false
		}
		out[i] = 1
	}
	next := 0
	for i := range out {
		if out[i] < 0 {
			out[i] = in[next]
			next++
		}
	}
	return c.give(0, c.typ(0), out) && c.keepContent()
}

func transpose(c *call) bool {
	in := c.dims(0)
	if in == nil {
		return false
	}
	perm := c.n.ints("perm")
	if len(perm) == 0 {
		for i := range in {
			perm = append(perm, int64(len(in)-1-i))
		}
	}
	if len(perm) != len(in) {
		return false
	}
	out, seen := make([]int64, len(in)), make([]bool, len(in))
	for i, p := range perm {
		if p < 0 || p >= int64(len(in)) || seen[p] {
			return false
		}
		out[i], seen[p] = in[p], true
	}
	return c.give(0, c.typ(0), out)
}

func concat(c *call) bool {
	first := c.dims(0)
	a, ok := axis(c.n.int("axis", 1), len(first))
	if first == nil || !ok {
		return false
	}
	out := slices.Clone(first)
	out[a] = 0
	var content []float64
	for i, in := range c.in {
		dims := c.dims(i)
		if len(dims) != len(first) {
			return false
		}
		for d := range dims {
			if d != a && dims[d] != first[d] {
				return false
			}
		}
		out[a] += dims[a]
		if in.content == nil || len(first) != 1 || i > 0 && content == nil {
			content = nil
			continue
		}
		if content = append(content, in.content...); len(content) > maxContent {
			content = nil
		}
	}
	c.give(0, c.typ(0), out)
	if len(out) == 1 && content != nil {
		c.setContent(0, content)
	}
	return true
}

func split(c *call) bool {
	in := c.dims(0)
	a, ok := axis(c.n.int("axis", 0), len(in))
	if in == nil || !ok || len(c.out) == 0 {
		return false
	}
	sizes := c.n.ints("split")
	if c.arg(1) != nil {
		if sizes, ok = c.content(1); !ok {
			return false
		}
	}
	if len(sizes) == 0 {
		n := int64(len(c.out))
		each := (in[a] + n - 1) / n
		left := in[a]
		for range n {
			sizes = append(sizes, min(each, left))
			left -= min(each, left)
		}
	}
	if len(sizes) != len(c.out) {
		return false
	}
	sum := 0.0
	at := 0
	for i, size := range sizes {
		if sum += float64(size); size < 0 || sum > float64(in[a]) {
			return false
		}
		out := slices.Clone(in)
		out[a] = size
		c.give(i, c.typ(0), out)
		if content := c.in[0].content; len(in) == 1 && content != nil {
			c.setContent(i, slices.Clone(content[at:at+int(size)]))
		}
		at += int(size)
	}
	return sum == float64(in[a])
}

func slice(c *call) bool {
	in := c.dims(0)
	if in == nil {
		return false
	}
	starts, ok := c.content(1)
	ends, ok2 := c.content(2)
	axes, ok3 := c.content(3)
	steps, ok4 := c.content(4)
	if c.arg(1) == nil {
		starts, ends, axes, ok, ok2, ok3 = c.n.ints("starts"), c.n.ints("ends"), c.n.ints("axes"), true, true, true
	}
	ok3 = ok3 || c.arg(3) == nil
	ok4 = ok4 || c.arg(4) == nil
	if !ok || !ok2 || !ok3 || !ok4 || len(starts) != len(ends) || len(starts) > len(in) {
		return false
	}
	if len(axes) == 0 {
		for i := range starts {
			axes = append(axes, int64(i))
		}
	}
	if len(steps) == 0 {
		steps = slices.Repeat([]int64{1}, len(starts))
	}
	if len(axes) != len(starts) || len(steps) != len(starts) {
		return false
	}
	out := slices.Clone(in)
	for i := range starts {
		a, ok := axis(axes[i], len(in))
		if !ok || steps[i] == 0 {
			return false
		}
		d, step := in[a], steps[i]
		low, high := int64(0), d
		if step < 0 {
			low, high = -1, d-1
		}
		bound := func(v int64) int64 {
			if v < 0 {
				v += d
			}
			return min(max(v, low), high)
		}
		from, to := bound(starts[i]), bound(ends[i])
		if step < 0 {
			out[a] = max((from-to-step-1)/-step, 0)
		} else {
			out[a] = max((to-from+step-1)/step, 0)
		}
		if content := c.in[0].content; len(in) == 1 && content != nil {
			var part []float64
			for j := from; len(part) < int(out[a]); j += step {
				part = append(part, content[j])
			}
			defer func() { c.setContent(0, part) }()
		}
	}
	return c.give(0, c.typ(0), out)
}

func gather(c *call) bool {
	in, index := c.dims(0), c.dims(1)
	a, ok := axis(c.n.int("axis", 0), len(in))
	if in == nil || index == nil || !ok {
		return false
	}
	out := slices.Concat(in[:a], index, in[a+1:])
	if out == nil {
		out = []int64{}
	}
	c.give(0, c.typ(0), out)
	list, ok := c.content(1)
	if content := c.in[0].content; ok && len(in) == 1 && content != nil {
		part := []float64{}
		for _, i := range list {
			j, ok := axis(i, len(content))
			if !ok {
				return true
			}
			part = append(part, content[j])
		}
		c.setContent(0, part)
	}
	return true
}

func gatherND(c *call) bool {
	in, index := c.dims(0), c.dims(1)
	batch := c.n.int("batch_dims", 0)
	if in == nil || len(index) == 0 || batch < 0 || batch >= int64(len(index)) {
		return false
	}
	last := index[len(index)-1]
	if last < 1 || last > int64(len(in)) || batch+last > int64(len(in)) {
		return false
	}
	return c.give(0, c.typ(0), append(slices.Clone(index[:len(index)-1]), in[batch+last:]...))
}

func expand(c *call) bool {
	to, ok := c.content(1)
	if !ok {
		return false
	}
	if to == nil {
		to = []int64{}
	}
	if !c.give(0, c.typ(0), broadcast(c.dims(0), to)) {
		return false
	}
	if content := c.in[0].content; len(content) == 1 && c.out[0].elements() <= maxContent && plausible(c.out[0].dims) {
		c.setContent(0, slices.Repeat(content, int(c.out[0].elements())))
	}
	return true
}

func tile(c *call) bool {
	in := c.dims(0)
	times, ok := c.content(1)
	if in == nil || !ok || len(times) != len(in) {
		return false
	}
	out := make([]int64, len(in))
	for i := range in {
		if times[i] < 0 || float64(in[i])*float64(times[i]) > 1<<50 {
			return false
		}
		out[i] = in[i] * times[i]
	}
	return c.give(0, c.typ(0), out)
}

func pad(c *call) bool {
	in := c.dims(0)
	pads, ok := c.content(1)
	if c.arg(1) == nil {
		pads, ok = c.n.ints("pads"), true
	}
	axes, given, ok2 := c.axes(3, len(in))
	if in == nil || !ok || !ok2 {
		return false
	}
	if !given {
		for i := range in {
			axes = append(axes, i)
		}
	} else if list, ok := c.content(3); !ok || len(list) != len(axes) || !slices.IsSorted(list) || len(list) > 0 && list[0] < 0 {
		return false // pads are in the order of the axes
	}
	if len(pads) != 2*len(axes) {
		return false
	}
	out := slices.Clone(in)
	for i, a := range axes {
		if out[a] += pads[i] + pads[i+len(axes)]; out[a] < 0 {
			return false
		}
	}
	return c.give(0, c.typ(0), out)
}

func resize(c *call) bool {
	in := c.dims(0)
	scales, sizes := c.arg(2), c.arg(3)
	if len(c.in) == 2 { // Upsample, and Resize of operator set 10
		scales = c.arg(1)
	}
	if in == nil {
		return false
	}
	if scales == nil && c.n.Op == "Upsample" {
		scales = &fact{content: c.n.Attributes["scales"].Floats}
	}
	axes, given, ok := c.axes(len(c.in), len(in))
	if !ok {
		return false
	}
	if !given {
		axes = nil
		for i := range in {
			axes = append(axes, i)
		}
	} else if list := c.n.ints("axes"); len(list) != len(axes) || !slices.IsSorted(list) || len(list) > 0 && list[0] < 0 {
		return false
	}
	out := slices.Clone(in)
	switch {
	case sizes != nil:
		if len(sizes.content) != len(axes) || c.n.text("keep_aspect_ratio_policy", "stretch") != "stretch" {
			return false
		}
		for i, a := range axes {
			out[a] = integer(sizes.content[i])
		}
	case scales != nil:
		if len(scales.content) != len(axes) {
			return false
		}
		for i, a := range axes {
			out[a] = integer(math.Floor(float64(in[a]) * scales.content[i]))
		}
	default:
		return false
	}
	return c.give(0, c.typ(0), out)
}

func shapeOf(c *call) bool {
	in := c.dims(0)
	if in == nil {
		return false
	}
	clamp := func(v int64) int64 {
		if v < 0 {
			v += int64(len(in))
		}
		return min(max(v, 0), int64(len(in)))
	}
	from, to := clamp(c.n.int("start", 0)), clamp(c.n.int("end", int64(len(in))))
	in = in[from:max(from, to)]
	content := make([]float64, len(in))
	for i, d := range in {
		content[i] = float64(d)
	}
	c.give(0, tensor.Int64, []int64{int64(len(in))})
	c.setContent(0, content)
	return true
}

func sizeOf(c *call) bool {
	if c.dims(0) == nil {
		return false
	}
	c.give(0, tensor.Int64, []int64{})
	c.setContent(0, []float64{c.in[0].elements()})
	return true
}

func constant(c *call) bool {
	for name, a := range c.n.Attributes {
		var v Constant
		switch name {
		case "value":
			if a.Tensor == nil {
				return false
			}
			v = *a.Tensor
		case "value_int":
			v = Constant{Type: tensor.Int64, Dims: []int64{}, Ints: []int64{a.Int}}
		case "value_ints":
			v = Constant{Type: tensor.Int64, Dims: []int64{int64(len(a.Ints))}, Ints: a.Ints}
		case "value_float":
			v = Constant{Type: tensor.Float32, Dims: []int64{}, Floats: []float64{a.Float}}
		case "value_floats":
			v = Constant{Type: tensor.Float32, Dims: []int64{int64(len(a.Floats))}, Floats: a.Floats}
		default:
			continue
		}
		if len(c.out) > 0 {
			c.out[0] = v.fact()
		}
		return true
	}
	return false
}

func constantOfShape(c *call) bool {
	dims, ok := c.content(0)
	if !ok || !plausible(dims) && len(dims) > 0 {
		return false
	}
	if dims == nil {
		dims = []int64{}
	}
	typ, value := tensor.Float32, []float64{0}
	if a := c.n.Attributes["value"].Tensor; a != nil {
		typ, value = a.Type, a.fact().content
	}
	c.give(0, typ, dims)
	if n := c.out[0].elements(); n <= maxContent && len(value) == 1 {
		c.setContent(0, slices.Repeat(value, int(n)))
	}
	return true
}

func rangeOf(c *call) bool {
	var v [3]float64
	for i := range v {
		in := c.arg(i)
		if in == nil || len(in.content) != 1 {
			return false
		}
		v[i] = in.content[0]
	}
	n := max(math.Ceil((v[1]-v[0])/v[2]), 0)
	if n != n || n > 1<<40 {
		return false
	}
	c.give(0, c.typ(0), []int64{int64(n)})
	if n <= maxContent {
		content := make([]float64, int(n))
		for i := range content {
			content[i] = v[0] + float64(i)*v[2]
		}
		c.setContent(0, content)
	}
	return true
}

func reduce(c *call) bool {
	in := c.dims(0)
	axes, given, ok := c.axes(1, len(in))
	if in == nil || !ok {
		return false
	}
	keep := c.n.int("keepdims", 1) != 0
	if !given || len(axes) == 0 {
		if c.n.int("noop_with_empty_axes", 0) != 0 {
			return c.give(0, c.typ(0), in)
		}
		for i := range in {
			axes = append(axes, i)
		}
	}
	out := []int64{}
	for i, d := range in {
		switch {
		case !slices.Contains(axes, i):
			out = append(out, d)
		case keep:
			out = append(out, 1)
		}
	}
	c.give(0, c.typ(0), out)
	if content := c.in[0].content; c.n.Op == "ReduceProd" && len(axes) == len(in) && content != nil {
		p := 1.0
		for _, v := range content {
			p *= v
		}
		c.setContent(0, []float64{p})
	}
	return true
}

func arg(c *call) bool {
	in := c.dims(0)
	a, ok := axis(c.n.int("axis", 0), len(in))
	if in == nil || !ok {
		return false
	}
	out := slices.Clone(in)
	out[a] = 1
	if c.n.int("keepdims", 1) == 0 {
		out = slices.Delete(out, a, a+1)
	}
	return c.give(0, tensor.Int64, out)
}

func topK(c *call) bool {
	in := c.dims(0)
	a, ok := axis(c.n.int("axis", -1), len(in))
	k, ok2 := c.content(1)
	if c.arg(1) == nil {
		k, ok2 = []int64{c.n.int("k", -1)}, true
	}
	if in == nil || !ok || !ok2 || len(k) != 1 {
		return false
	}
	out := slices.Clone(in)
	out[a] = k[0]
	return c.give(0, c.typ(0), out) && c.give(1, tensor.Int64, out)
}

func oneHot(c *call) bool {
	in := c.dims(0)
	depth, ok := c.content(1)
	if in == nil || !ok || len(depth) != 1 {
		return false
	}
	a, ok := axis(c.n.int("axis", -1), len(in)+1)
	if !ok {
		return false
	}
	return c.give(0, c.typ(2), slices.Insert(slices.Clone(in), a, depth[0]))
}

func depthToSpace(c *call) bool {
	in, b := c.dims(0), c.n.int("blocksize", 0)
	if len(in) != 4 || b < 1 || b > 64 || in[1]%(b*b) != 0 {
		return false
	}
	return c.give(0, c.typ(0), []int64{in[0], in[1] / (b * b), in[2] * b, in[3] * b})
}

func spaceToDepth(c *call) bool {
	in, b := c.dims(0), c.n.int("blocksize", 0)
	if len(in) != 4 || b < 1 || b > 64 || in[2]%b != 0 || in[3]%b != 0 {
		return false
	}
	return c.give(0, c.typ(0), []int64{in[0], in[1] * b * b, in[2] / b, in[3] / b})
}

func recurrent(c *call) bool {
	in, hidden := c.dims(0), c.n.int("hidden_size", 0)
	if len(in) != 3 || hidden < 1 || c.n.int("layout", 0) != 0 {
		return false
	}
	directions := int64(1)
	if c.n.text("direction", "forward") == "bidirectional" {
		directions = 2
	}
	last := []int64{directions, in[1], hidden}
	return c.give(0, c.typ(0), []int64{in[0], directions, in[1], hidden}) && c.give(1, c.typ(0), last) && c.give(2, c.typ(0), last)
}
