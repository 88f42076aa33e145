// Package onnxwriter writes ONNX models from a description of their graph, for
// tests and benchmarks that need nets of a certain shape or fault.
//
// Field numbers are those of onnx.proto in the ONNX specification.
package onnxwriter

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/tensor"
)

// Model is a graph and the version of the standard operators that it uses.
type Model struct {
	Opset           int64
	Inputs, Outputs []Value
	Weights         []Weight
	Nodes           []Node
}

// Value is an input or output.
type Value struct {
	Name     string
	Type     tensor.Type
	Shape    []int64 // -1: any size
	Batch    bool    // a first dimension of any size has the name "batch"; all others have "n"
	AnyRank  bool    // no shape at all
	Sequence bool    // a sequence of such tensors
}

// Float gives a FP32 value.
func Float(name string, shape ...int64) Value {
	return Value{Name: name, Type: tensor.Float32, Shape: shape}
}

// Weight is an initialiser, or the value of an attribute.
type Weight struct {
	Name  string
	Type  tensor.Type
	Shape []int64
	Data  []byte // raw little-endian elements
	// Fill, where set, writes what Data would hold, each time that the model
	// is encoded; Type and Shape say how much that is.
	Fill func(io.Writer) error
	// External, where set, is the file in the model's folder that holds the data.
	External string
}

// Node is a use of an operator.
type Node struct {
	Op      string
	Domain  string
	In, Out []string
	// Attributes, by the kind of their value.
	Ints    map[string]int64
	Floats  map[string]float32
	Strings map[string]string
	Lists   map[string][]int64
	Tensors map[string]Weight
}

func message(b []byte, field protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), m)
}

func text(b []byte, field protowire.Number, s string) []byte {
	return message(b, field, []byte(s))
}

func number(b []byte, field protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
}

// begin appends the head of a message of so many bytes that follow.
func begin(b []byte, field protowire.Number, size int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(size))
}

// Marshal gives the bytes of the .onnx file. The same model gives the same
// bytes. It panics where Encode would fail.
func (m Model) Marshal() []byte {
	var b bytes.Buffer
	if err := m.Encode(&b); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// Encode writes the .onnx file, and holds no more of it in memory than what
// is no weight. It fails where w does, or where a weight's Fill does or writes
// another number of bytes than the weight has.
func (m Model) Encode(w io.Writer) error {
	var front, back, opsets []byte
	domains := map[string]bool{}
	for _, n := range m.Nodes {
		node, err := n.marshal()
		if err != nil {
			return fmt.Errorf("write model: node %s: %w", n.Op, err)
		}
		front = message(front, 1, node)
		if n.Domain != "" && !domains[n.Domain] {
			domains[n.Domain] = true
			opsets = message(opsets, 8, number(text(nil, 1, n.Domain), 2, 1))
		}
	}
	front = text(front, 2, "graph")
	for _, v := range m.Inputs {
		back = message(back, 11, v.marshal())
	}
	for _, v := range m.Outputs {
		back = message(back, 12, v.marshal())
	}

	heads := make([][]byte, len(m.Weights))
	size := int64(len(front) + len(back))
	for i := range m.Weights {
		head, data, err := m.Weights[i].head()
		if err != nil {
			return fmt.Errorf("write model: weight %q: %w", m.Weights[i].Name, err)
		}
		heads[i] = append(begin(nil, 5, int64(len(head))+data), head...)
		size += int64(len(heads[i])) + data
	}

	const irVersion = 8
	front = append(begin(number(nil, 1, irVersion), 7, size), front...)
	if _, err := w.Write(front); err != nil {
		return fmt.Errorf("write model: %w", err)
	}
	for i := range m.Weights {
		if _, err := w.Write(heads[i]); err != nil {
			return fmt.Errorf("write model: %w", err)
		}
		if err := m.Weights[i].writeData(w); err != nil {
			return fmt.Errorf("write model: weight %q: %w", m.Weights[i].Name, err)
		}
	}
	back = append(message(back, 8, number(text(nil, 1, ""), 2, m.Opset)), opsets...)
	if _, err := w.Write(back); err != nil {
		return fmt.Errorf("write model: %w", err)
	}
	return nil
}

func (v Value) marshal() []byte {
	t := number(nil, 1, int64(v.Type))
	if !v.AnyRank {
		var shape []byte
		for i, d := range v.Shape {
			dim := number(nil, 1, d)
			if d < 0 {
				name := "n"
				if v.Batch && i == 0 {
					name = "batch"
				}
				dim = text(nil, 2, name)
			}
			shape = message(shape, 1, dim)
		}
		t = message(t, 2, shape)
	}
	typ := message(nil, 1, t)
	if v.Sequence {
		typ = message(nil, 4, message(nil, 1, typ))
	}
	return message(text(nil, 1, v.Name), 2, typ)
}

// head gives all of a TensorProto but the raw data, which comes last, and how
// many bytes those are.
func (w *Weight) head() (head []byte, data int64, err error) {
	for _, d := range w.Shape {
		head = number(head, 1, d)
	}
	head = number(head, 2, int64(w.Type))
	if w.Name != "" {
		head = text(head, 8, w.Name)
	}
	if w.External != "" {
		head = message(head, 13, text(text(nil, 1, "location"), 2, w.External))
		return number(head, 14, 1), 0, nil // data_location: EXTERNAL
	}
	data = int64(len(w.Data))
	if w.Fill != nil {
		if data, err = tensor.Bytes(w.Type, w.Shape); err != nil {
			return nil, 0, err
		}
	}
	return begin(head, 9, data), data, nil
}

func (w *Weight) writeData(to io.Writer) error {
	if w.External != "" {
		return nil
	}
	if w.Fill == nil {
		_, err := to.Write(w.Data)
		return err
	}
	want, err := tensor.Bytes(w.Type, w.Shape)
	if err != nil {
		return err
	}
	counted := &counter{to: to}
	if err := w.Fill(counted); err != nil {
		return err
	}
	if counted.n != want {
		return fmt.Errorf("was filled with %d bytes, its type %s and shape %v need %d", counted.n, w.Type, w.Shape, want)
	}
	return nil
}

// counter counts what is written to it.
type counter struct {
	to io.Writer
	n  int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.to.Write(p)
	c.n += int64(n)
	return n, err
}

// Values of AttributeProto.type.
const (
	attributeFloat  = 1
	attributeInt    = 2
	attributeString = 3
	attributeTensor = 4
	attributeInts   = 7
)

func (n Node) marshal() ([]byte, error) {
	var b []byte
	for _, s := range n.In {
		b = text(b, 1, s)
	}
	for _, s := range n.Out {
		b = text(b, 2, s)
	}
	b = text(b, 4, n.Op)
	attribute := func(name string, value []byte, kind int64) {
		b = message(b, 5, number(append(text(nil, 1, name), value...), 20, kind))
	}
	for _, name := range slices.Sorted(maps.Keys(n.Ints)) {
		attribute(name, number(nil, 3, n.Ints[name]), attributeInt)
	}
	for _, name := range slices.Sorted(maps.Keys(n.Floats)) {
		value := protowire.AppendTag(nil, 2, protowire.Fixed32Type)
		attribute(name, protowire.AppendFixed32(value, math.Float32bits(n.Floats[name])), attributeFloat)
	}
	for _, name := range slices.Sorted(maps.Keys(n.Strings)) {
		attribute(name, text(nil, 4, n.Strings[name]), attributeString)
	}
	for _, name := range slices.Sorted(maps.Keys(n.Lists)) {
		var value []byte
		for _, i := range n.Lists[name] {
			value = number(value, 8, i)
		}
		attribute(name, value, attributeInts)
	}
	for _, name := range slices.Sorted(maps.Keys(n.Tensors)) {
		w := n.Tensors[name]
		head, _, err := w.head()
		if err != nil {
			return nil, fmt.Errorf("attribute %q: %w", name, err)
		}
		value := bytes.NewBuffer(head)
		if err := w.writeData(value); err != nil {
			return nil, fmt.Errorf("attribute %q: %w", name, err)
		}
		attribute(name, message(nil, 5, value.Bytes()), attributeTensor)
	}
	if n.Domain != "" {
		b = text(b, 7, n.Domain)
	}
	return b, nil
}
