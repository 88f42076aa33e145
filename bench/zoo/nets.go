package zoo

import (
	"math"

	"github.com/dunlin/dunlin/models/onnxwriter"
)

// MLP gives two hidden layers of 64 between 64 numbers and 10.
func MLP(seed uint64) Net {
	g := newGraph(seed, []int64{64}, []int64{10})
	x := g.op("Relu", g.dense("input", "", 64, 64))
	x = g.op("Relu", g.dense(x, "", 64, 64))
	g.dense(x, "output", 64, 10)
	return Net{"mlp", "multi-layer perceptron, 64-64-64-10", g.model}
}

// VGG11 gives configuration A of Simonyan and Zisserman 2015, table 1.
func VGG11(seed uint64) Net {
	g := newGraph(seed, []int64{3, 224, 224}, []int64{1000})
	x, channels := "input", int64(3)
	for _, width := range []int64{64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0} {
		if width == 0 {
			x = g.maxPool(x, 2, 2, 0)
			continue
		}
		x = g.op("Relu", g.conv(x, conv{in: channels, out: width, kernel: 3, gain: 1}))
		channels = width
	}
	x = g.op("Flatten", x)
	x = g.op("Relu", g.dense(x, "", 512*7*7, 4096))
	x = g.op("Relu", g.dense(x, "", 4096, 4096))
	g.dense(x, "output", 4096, 1000)
	return Net{"vgg11", "VGG-11 (configuration A)", g.model}
}

// ResNet50 gives the net of He et al. 2016, table 1, with the stride of a
// block in its 3x3 convolution, as published weights have it. Batch
// normalisation is folded into the convolutions, as exporters do it: scale
// and shift of a channel become one bias.
func ResNet50(seed uint64) Net {
	g := newGraph(seed, []int64{3, 224, 224}, []int64{1000})
	x := g.op("Relu", g.conv("input", conv{in: 3, out: 64, kernel: 7, stride: 2, gain: 1}))
	x = g.maxPool(x, 3, 2, 1)
	channels := int64(64)
	for stage, blocks := range []int{3, 4, 6, 3} {
		width, stride := int64(64)<<stage, int64(1)
		if stage > 0 {
			stride = 2
		}
		for block := range blocks {
			if block > 0 {
				stride = 1
			}
			short := x
			if block == 0 {
				short = g.conv(x, conv{in: channels, out: 4 * width, kernel: 1, stride: stride, gain: 1})
			}
			y := g.op("Relu", g.conv(x, conv{in: channels, out: width, kernel: 1, gain: 1}))
			y = g.op("Relu", g.conv(y, conv{in: width, out: width, kernel: 3, stride: stride, gain: 1}))
			y = g.conv(y, conv{in: width, out: 4 * width, kernel: 1, gain: residualGain})
			x = g.op("Relu", g.op("Add", y, short))
			channels = 4 * width
		}
	}
	x = g.op("Flatten", g.op("GlobalAveragePool", x))
	g.dense(x, "output", channels, 1000)
	return Net{"resnet50", "ResNet-50, batch normalisation folded", g.model}
}

// MobileNet gives MobileNetV2 of Sandler et al. 2018, table 2, batch
// normalisation folded as in ResNet50.
func MobileNet(seed uint64) Net {
	g := newGraph(seed, []int64{3, 224, 224}, []int64{1000})
	x := g.relu6(g.conv("input", conv{in: 3, out: 32, kernel: 3, stride: 2, gain: 1}))
	channels := int64(32)
	for _, s := range []struct{ expand, width, blocks, stride int64 }{
		{1, 16, 1, 1}, {6, 24, 2, 2}, {6, 32, 3, 2}, {6, 64, 4, 2}, {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1},
	} {
		stride := s.stride
		for range s.blocks {
			y, hidden := x, channels*s.expand
			if s.expand > 1 {
				y = g.relu6(g.conv(y, conv{in: channels, out: hidden, kernel: 1, gain: 1}))
			}
			y = g.relu6(g.conv(y, conv{in: hidden, out: hidden, kernel: 3, stride: stride, groups: hidden, gain: 1}))
			// No ReLU follows that would halve the variance.
			y = g.conv(y, conv{in: hidden, out: s.width, kernel: 1, gain: math.Sqrt2 / 2})
			if stride == 1 && channels == s.width {
				y = g.op("Add", y, x)
			}
			x, channels, stride = y, s.width, 1
		}
	}
	x = g.relu6(g.conv(x, conv{in: channels, out: 1280, kernel: 1, gain: 1}))
	x = g.op("Flatten", g.op("GlobalAveragePool", x))
	g.dense(x, "output", 1280, 1000)
	return Net{"mobilenet", "MobileNetV2, batch normalisation folded", g.model}
}

// Encoder gives six layers of the encoder of Devlin et al. 2019 (BERT), with
// its width 768, 12 heads and feed-forward width 3072, on sequences of so many
// embedded tokens: no table of words, no mask.
func Encoder(seed uint64, tokens int64) Net {
	const layers, width, inner = 6, 768, 3072
	g := newGraph(seed, []int64{tokens, width}, []int64{tokens, width})
	x := "input"
	for layer := range layers {
		y := g.linear(g.attention(x, width), width, width, residualGain)
		x = g.norm(g.op("Add", x, y), "", width)
		y = g.linear(g.gelu(g.linear(x, width, inner, 1)), inner, width, residualGain)
		out := ""
		if layer == layers-1 {
			out = "output"
		}
		x = g.norm(g.op("Add", x, y), out, width)
	}
	return Net{"encoder", "transformer encoder, 6 layers of width 768", g.model}
}

// residualGain keeps the sum over all blocks of a residual net small.
const residualGain = 0.5

// conv describes a convolution that keeps the size of the image, or divides
// it by its stride.
type conv struct {
	in, out, kernel, stride, groups int64 // stride and groups: 0 is 1
	gain                            float64
}

func (g *graph) conv(x string, c conv) string {
	c.stride, c.groups = max(c.stride, 1), max(c.groups, 1)
	perGroup := c.in / c.groups
	w := g.he(c.gain, perGroup*c.kernel*c.kernel, c.out, perGroup, c.kernel, c.kernel)
	b := g.uniform(0.1, c.out)
	pad := c.kernel / 2
	return g.node(onnxwriter.Node{Op: "Conv", In: []string{x, w, b}, Ints: map[string]int64{"group": c.groups},
		Lists: map[string][]int64{"kernel_shape": {c.kernel, c.kernel}, "strides": {c.stride, c.stride}, "pads": {pad, pad, pad, pad}}}, "")
}

func (g *graph) maxPool(x string, kernel, stride, pad int64) string {
	return g.node(onnxwriter.Node{Op: "MaxPool", In: []string{x}, Lists: map[string][]int64{
		"kernel_shape": {kernel, kernel}, "strides": {stride, stride}, "pads": {pad, pad, pad, pad}}}, "")
}

func (g *graph) relu6(x string) string { return g.op("Clip", x, g.same(0), g.same(6)) }

// dense is a fully connected layer on [batch, in].
func (g *graph) dense(x, output string, in, out int64) string {
	return g.node(onnxwriter.Node{Op: "Gemm", In: []string{x, g.he(1, in, in, out), g.uniform(0.1, out)}}, output)
}

// linear is a fully connected layer on the last dimension.
func (g *graph) linear(x string, in, out int64, gain float64) string {
	return g.op("Add", g.op("MatMul", x, g.he(gain, in, in, out)), g.uniform(0.1, out))
}

func (g *graph) attention(x string, width int64) string {
	const heads = 12
	split := g.shape(0, 0, heads, width/heads)
	transpose := func(x string, order ...int64) string {
		return g.node(onnxwriter.Node{Op: "Transpose", In: []string{x}, Lists: map[string][]int64{"perm": order}}, "")
	}
	part := func(order ...int64) string {
		return transpose(g.op("Reshape", g.linear(x, width, width, 1), split), order...)
	}
	query, key, value := part(0, 2, 1, 3), part(0, 2, 3, 1), part(0, 2, 1, 3)
	scores := g.op("Mul", g.op("MatMul", query, key), g.same(float32(1/math.Sqrt(float64(width/heads)))))
	weights := g.node(onnxwriter.Node{Op: "Softmax", In: []string{scores}, Ints: map[string]int64{"axis": -1}}, "")
	return g.op("Reshape", transpose(g.op("MatMul", weights, value), 0, 2, 1, 3), g.shape(0, 0, width))
}

func (g *graph) norm(x, out string, width int64) string {
	return g.node(onnxwriter.Node{Op: "LayerNormalization", In: []string{x, g.same(1, width), g.same(0, width)},
		Ints: map[string]int64{"axis": -1}, Floats: map[string]float32{"epsilon": 1e-12}}, out)
}

// gelu is the Gaussian error linear unit in its exact form.
func (g *graph) gelu(x string) string {
	y := g.op("Add", g.op("Erf", g.op("Div", x, g.same(math.Sqrt2))), g.same(1))
	return g.op("Mul", g.op("Mul", x, y), g.same(0.5))
}
