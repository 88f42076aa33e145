package clients

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

var elementTypes = []tensor.Type{
	tensor.Bool, tensor.Int8, tensor.Int16, tensor.Int32, tensor.Int64, tensor.Uint8, tensor.Uint16, tensor.Uint32, tensor.Uint64,
	tensor.Float16, tensor.BFloat16, tensor.Float32, tensor.Float64, tensor.String,
}

// idle are models that are in the repository and not loaded at start.
var idle = []string{"spare", "broken"}

// writeRepository writes the models that the Python programs use and gives the
// names of those to load at start.
func writeRepository(dir string) ([]string, error) {
	files := map[string][]byte{}
	add := func(model string, onnx onnxwriter.Model, config string) {
		files[model+"/1/model.onnx"] = onnx.Marshal()
		if config != "" {
			files[model+"/config.pbtxt"] = []byte(config)
		}
	}
	var all onnxwriter.Model
	for _, t := range elementTypes {
		name := strings.ToLower(t.String())
		add("identity_"+name, graph("Identity", value("x", t, -1, 2), value("y", t, -1, 2)), "")
		one := graph("Identity", value("x_"+name, t, -1), value("y_"+name, t, -1))
		all.Inputs, all.Outputs, all.Nodes = append(all.Inputs, one.Inputs...), append(all.Outputs, one.Outputs...), append(all.Nodes, one.Nodes...)
	}
	all.Opset = opset
	add("types", all, "")

	number, count := graph("Identity", onnxwriter.Float("x"), onnxwriter.Float("y")), graph("Identity", value("n", tensor.Int64), value("m", tensor.Int64))
	add("scalars", onnxwriter.Model{
		Opset: opset, Inputs: append(number.Inputs, count.Inputs...), Outputs: append(number.Outputs, count.Outputs...), Nodes: append(number.Nodes, count.Nodes...),
	}, "")

	row := func(name string) onnxwriter.Value { return value(name, tensor.Int32, -1, 16) }
	add("add_sub", onnxwriter.Model{
		Opset: opset, Inputs: []onnxwriter.Value{row("INPUT0"), row("INPUT1")}, Outputs: []onnxwriter.Value{row("OUTPUT0"), row("OUTPUT1")},
		Nodes: []onnxwriter.Node{
			{Op: "Add", In: []string{"INPUT0", "INPUT1"}, Out: []string{"OUTPUT0"}},
			{Op: "Sub", In: []string{"INPUT0", "INPUT1"}, Out: []string{"OUTPUT1"}},
		},
	}, `name: "add_sub"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] },
  { name: "INPUT1" data_type: TYPE_INT32 dims: [ 16 ] }
]
output [
  { name: "OUTPUT0" data_type: TYPE_INT32 dims: [ 16 ] },
  { name: "OUTPUT1" data_type: TYPE_INT32 dims: [ 16 ] }
]
dynamic_batching { max_queue_delay_microseconds: 100 }
instance_group [ { count: 1 kind: KIND_CPU } ]
`)

	add("classes", onnxwriter.Model{
		Opset: opset, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, 4)},
		Outputs: []onnxwriter.Value{onnxwriter.Float("scores", -1, 4), onnxwriter.Float("negated", -1, 4)},
		Nodes:   []onnxwriter.Node{{Op: "Identity", In: []string{"x"}, Out: []string{"scores"}}, {Op: "Neg", In: []string{"x"}, Out: []string{"negated"}}},
	}, `backend: "onnxruntime"
max_batch_size: 4
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [
  { name: "scores" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" },
  { name: "negated" data_type: TYPE_FP32 dims: [ 4 ] }
]
`)
	files["classes/labels.txt"] = []byte("zebra\nhorse\ndonkey\nmule\n")

	rows := graph("Identity", onnxwriter.Float("x", -1, 4), onnxwriter.Float("y", -1, 4))
	tensors := func(dims int) string {
		return fmt.Sprintf("input [ { name: \"x\" data_type: TYPE_FP32 dims: [ %d ] } ]\noutput [ { name: \"y\" data_type: TYPE_FP32 dims: [ %[1]d ] } ]\n", dims)
	}
	// Four single requests fill the batch; fewer wait for a long time.
	add("batched", rows, "backend: \"onnxruntime\"\nmax_batch_size: 4\ndynamic_batching { max_queue_delay_microseconds: 5000000 }\n"+tensors(4))
	add("spare", rows, "backend: \"onnxruntime\"\nmax_batch_size: 2\n"+tensors(4))

	add("versions", plus(1), "backend: \"onnxruntime\"\nversion_policy { all { } }\n"+tensors(-1))
	files["versions/2/model.onnx"] = plus(2).Marshal()

	slow := slowModel()
	queue := "backend: \"onnxruntime\"\nmax_batch_size: 1\ninstance_group [ { count: 1 kind: KIND_CPU } ]\ndynamic_batching { default_queue_policy { allow_timeout_override: true %s} }\n"
	add("slow", slow, fmt.Sprintf(queue, ""))
	add("busy", slow, fmt.Sprintf(queue, "max_queue_size: 1 "))

	files["broken/1/model.onnx"] = []byte("not a model")

	var load []string
	for path, content := range files {
		name, _, _ := strings.Cut(path, "/")
		if !slices.Contains(load, name) && !slices.Contains(idle, name) {
			load = append(load, name)
		}
		path = filepath.Join(dir, filepath.FromSlash(path))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return nil, err
		}
	}
	slices.Sort(load)
	return load, nil
}

const opset = 17

func value(name string, t tensor.Type, shape ...int64) onnxwriter.Value {
	return onnxwriter.Value{Name: name, Type: t, Shape: shape}
}

// graph is one operator.
func graph(op string, in, out onnxwriter.Value) onnxwriter.Model {
	return onnxwriter.Model{
		Opset: opset, Inputs: []onnxwriter.Value{in}, Outputs: []onnxwriter.Value{out},
		Nodes: []onnxwriter.Node{{Op: op, In: []string{in.Name}, Out: []string{out.Name}}},
	}
}

// plus adds a constant.
func plus(n float32) onnxwriter.Model {
	return onnxwriter.Model{
		Opset: opset, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1)},
		Weights: []onnxwriter.Weight{{Name: "n", Type: tensor.Float32, Shape: []int64{1}, Data: floats(1, n)}},
		Nodes:   []onnxwriter.Node{{Op: "Add", In: []string{"x", "n"}, Out: []string{"y"}}},
	}
}

// slowModel takes minutes on two cores, by many steps, between which a run can
// be ended. No step has a constant factor, of which the runtime would keep a
// copy for each step.
func slowModel() onnxwriter.Model {
	const size, steps = 1536, 800
	m := onnxwriter.Model{
		Opset: opset, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, 1)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, size)},
		Weights: []onnxwriter.Weight{
			{Name: "w", Type: tensor.Float32, Shape: []int64{size, size}, Data: floats(size*size, 1./size)},
			{Name: "row", Type: tensor.Float32, Shape: []int64{1, size}, Data: floats(size, 1)},
		},
		Nodes: []onnxwriter.Node{{Op: "Add", In: []string{"x", "w"}, Out: []string{"h0"}}},
	}
	for i := range steps {
		m.Nodes = append(m.Nodes, onnxwriter.Node{Op: "MatMul", In: []string{fmt.Sprint("h", i), "h0"}, Out: []string{fmt.Sprint("h", i+1)}})
	}
	m.Nodes = append(m.Nodes, onnxwriter.Node{Op: "MatMul", In: []string{"row", fmt.Sprint("h", steps)}, Out: []string{"y"}})
	return m
}

func floats(n int, v float32) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint32(nil, math.Float32bits(v)), n)
}
