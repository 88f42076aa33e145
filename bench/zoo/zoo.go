// Package zoo writes nets of published shapes with random weights, so that
// benchmarks and tests need no download. What a net costs to load and to run
// depends on its shape only.
package zoo

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"os"

	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// Net is a model with one FP32 input and one FP32 output, whose first
// dimension is open and has the name "batch" on both.
type Net struct {
	Name, About string
	Model       onnxwriter.Model
}

// Tokens is the length of the sequences of the encoder that Nets gives.
const Tokens = 16

// Nets gives all nets. The same seed gives the same bytes, on every machine.
func Nets(seed uint64) []Net {
	return []Net{MLP(seed), MobileNet(seed), ResNet50(seed), Encoder(seed, Tokens), VGG11(seed)}
}

// Input gives the net's input; its first dimension is -1.
func (n Net) Input() tensor.Info { return info(n.Model.Inputs[0]) }

// Output gives the net's output; its first dimension is -1.
func (n Net) Output() tensor.Info { return info(n.Model.Outputs[0]) }

func info(v onnxwriter.Value) tensor.Info {
	return tensor.Info{Name: v.Name, Type: v.Type, Shape: v.Shape}
}

// Parameters counts what training would learn: no scalars, no shapes.
func (n Net) Parameters() int64 {
	var sum int64
	for _, w := range n.Model.Weights {
		if w.Type == tensor.Float32 && len(w.Shape) > 0 {
			sum += elements(w.Shape)
		}
	}
	return sum
}

func elements(shape []int64) int64 {
	n := int64(1)
	for _, d := range shape {
		n *= d
	}
	return n
}

// WriteFile writes the .onnx file. A weight is made when it is written:
// memory does not grow with the net.
func (n Net) WriteFile(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := n.Model.Encode(w); err != nil {
		return fmt.Errorf("%s: %w", n.Name, err)
	}
	return w.Flush()
}

// graph is a net that grows node by node. Values have the names of the nodes
// that give them.
type graph struct {
	model onnxwriter.Model
	seed  uint64
}

// newGraph begins a net; shapes are those of one item, without the batch.
func newGraph(seed uint64, input, output []int64) *graph {
	open := func(name string, shape []int64) []onnxwriter.Value {
		return []onnxwriter.Value{{Name: name, Type: tensor.Float32, Shape: append([]int64{-1}, shape...), Batch: true}}
	}
	return &graph{seed: seed, model: onnxwriter.Model{Opset: 17, Inputs: open("input", input), Outputs: open("output", output)}}
}

// node adds a node with one output and gives that one's name: out, or one of
// the graph's own where out is "".
func (g *graph) node(n onnxwriter.Node, out string) string {
	if out == "" {
		out = fmt.Sprintf("%s_%d", n.Op, len(g.model.Nodes))
	}
	n.Out = []string{out}
	g.model.Nodes = append(g.model.Nodes, n)
	return out
}

func (g *graph) op(op string, in ...string) string {
	return g.node(onnxwriter.Node{Op: op, In: in}, "")
}

// uniform adds a weight whose elements lie evenly between -limit and limit.
func (g *graph) uniform(limit float64, shape ...int64) string {
	name := fmt.Sprintf("weight_%d", len(g.model.Weights))
	g.model.Weights = append(g.model.Weights, onnxwriter.Weight{Name: name, Type: tensor.Float32, Shape: shape,
		Fill: func(w io.Writer) error { return fillUniform(w, source(g.seed, name), float32(limit), elements(shape)) }})
	return name
}

// he adds a weight with the variance gain²·2/fanIn (He et al. 2015, equation
// 10): with gain 1, values keep their size through a layer and a ReLU.
func (g *graph) he(gain float64, fanIn int64, shape ...int64) string {
	return g.uniform(gain*math.Sqrt(6/float64(fanIn)), shape...)
}

// same adds a weight whose elements all have one value.
func (g *graph) same(value float32, shape ...int64) string {
	name := fmt.Sprintf("weight_%d", len(g.model.Weights))
	data := make([]byte, 0, 4*elements(shape))
	for len(data) < cap(data) {
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(value))
	}
	g.model.Weights = append(g.model.Weights, onnxwriter.Weight{Name: name, Type: tensor.Float32, Shape: shape, Data: data})
	return name
}

// shape adds the shape that a Reshape asks for.
func (g *graph) shape(dims ...int64) string {
	name := fmt.Sprintf("shape_%d", len(g.model.Weights))
	var data []byte
	for _, d := range dims {
		data = binary.LittleEndian.AppendUint64(data, uint64(d))
	}
	g.model.Weights = append(g.model.Weights,
		onnxwriter.Weight{Name: name, Type: tensor.Int64, Shape: []int64{int64(len(dims))}, Data: data})
	return name
}

// source gives the numbers of one weight.
func source(seed uint64, name string) *rand.PCG {
	h := fnv.New64a()
	h.Write([]byte(name))
	return rand.NewPCG(seed, h.Sum64())
}

// fillUniform uses the generator's bits only, and one rounding each, so that
// no version of a library and no processor gives other values.
func fillUniform(w io.Writer, bits *rand.PCG, limit float32, n int64) error {
	const steps = 1 << 23
	scale := limit / steps
	value := func(r uint32) uint32 { return math.Float32bits(float32(int32(r>>8)-steps) * scale) }
	buffer := make([]byte, 0, 64<<10)
	for n > 0 {
		buffer = buffer[:0]
		for ; n > 0 && len(buffer) < cap(buffer); n -= 2 {
			r := bits.Uint64()
			buffer = binary.LittleEndian.AppendUint32(buffer, value(uint32(r)))
			buffer = binary.LittleEndian.AppendUint32(buffer, value(uint32(r>>32)))
		}
		if n < 0 {
			buffer = buffer[:len(buffer)-4]
		}
		if _, err := w.Write(buffer); err != nil {
			return err
		}
	}
	return nil
}
