package models

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/tensor"
)

// message is an encoded protobuf message that grows field by field.
type message []byte

func (m message) num(field protowire.Number, v int64) message {
	return protowire.AppendVarint(protowire.AppendTag(m, field, protowire.VarintType), uint64(v))
}

func (m message) sub(field protowire.Number, content message) message {
	return protowire.AppendBytes(protowire.AppendTag(m, field, protowire.BytesType), content)
}

func (m message) str(field protowire.Number, s string) message { return m.sub(field, message(s)) }

func packed(values ...int64) (b message) {
	for _, v := range values {
		b = protowire.AppendVarint(b, uint64(v))
	}
	return b
}

func opset(domain string, version int64) message { return message{}.str(1, domain).num(2, version) }

// valueInfo gives a ValueInfoProto. A dimension is a number, a name, or nil.
func valueInfo(name string, typ tensor.Type, dims ...any) message {
	var shape message
	for _, d := range dims {
		var dim message
		switch d := d.(type) {
		case int:
			dim = dim.num(1, int64(d))
		case string:
			dim = dim.str(2, d)
		}
		shape = shape.sub(1, dim)
	}
	return message{}.str(1, name).sub(2, message{}.sub(1, message{}.num(1, int64(typ)).sub(2, shape)))
}

// rawTensor gives a TensorProto with raw_data.
func rawTensor(name string, typ int64, raw []byte, dims ...int64) message {
	return message{}.sub(1, packed(dims...)).num(2, typ).str(8, name).sub(9, raw)
}

// externalTensor gives a TensorProto of 4-byte floats in another file.
func externalTensor(name string, elements int64, keysAndValues ...string) message {
	m := message{}.sub(1, packed(elements)).num(2, 1).str(8, name)
	for i := 0; i < len(keysAndValues); i += 2 {
		m = m.sub(13, message{}.str(1, keysAndValues[i]).str(2, keysAndValues[i+1]))
	}
	return m.num(14, 1)
}

func node(op, domain string, attributes ...message) message {
	m := message{}.str(1, "x").str(2, "y").str(4, op)
	for _, a := range attributes {
		m = m.sub(5, a)
	}
	if domain != "" {
		m = m.str(7, domain)
	}
	return m
}

var (
	inputX  = valueInfo("x", tensor.Float32, "batch", 4)
	outputY = valueInfo("y", tensor.Float32, nil, 2)
)

// smallGraph is y = x W.
func smallGraph() message {
	return message{}.
		sub(1, node("MatMul", "")).
		str(2, "small").
		sub(5, rawTensor("W", 1, make([]byte, 32), 4, 2)).
		sub(11, inputX).
		sub(12, outputY)
}

func modelOf(graph message) message {
	return message{}.num(1, 8).str(2, "test").str(3, "1.0").sub(7, graph).sub(8, opset("", 17))
}

// writeModel writes a model and the files beside it.
func writeModel(t testing.TB, model []byte, beside map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range beside {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := filepath.Join(dir, "net.onnx")
	if err := os.WriteFile(p, model, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestInspect(t *testing.T) {
	// A graph in an attribute, two in another, one with initialisers of its
	// own, and a node whose operator is a function of the model.
	inner := message{}.
		sub(1, node("Relu", "ai.onnx")).
		sub(5, rawTensor("inner", 7, make([]byte, 16), 2)).
		sub(12, valueInfo("r", tensor.Float32))
	nested := message{}.sub(1, node("If", "", message{}.str(1, "then_branch").sub(6, inner)))
	constant := message{}.str(1, "value").sub(5, message{}.num(2, 1).sub(4, make([]byte, 4)))
	sparse := message{}.
		sub(1, rawTensor("S", 1, make([]byte, 8), 2)).
		sub(2, message{}.num(1, 2).num(2, 7).sub(7, packed(1, 300))).
		sub(3, packed(1000))
	graph := message{}.
		sub(1, node("Loop", "", message{}.sub(11, nested).sub(11, inner))).
		sub(1, node("FusedConv", "com.microsoft")).
		sub(1, node("Twice", "local")).
		sub(1, node("Constant", "", constant)).
		sub(11, valueInfo("x", tensor.Float32, "batch", 4, -7)).
		sub(11, valueInfo("W", 22, 3)). // int4: no type that is served, but it has an initialiser
		sub(11, valueInfo("scalar", tensor.Int64)).
		sub(11, message{}.str(1, "any").sub(2, message{}.sub(1, message{}.num(1, 8)))).
		sub(11, valueInfo("S", tensor.Float32, 1000)).
		sub(12, outputY).
		sub(5, rawTensor("W", 22, make([]byte, 2), 3)).
		sub(15, sparse)
	function := message{}.str(1, "Twice").sub(7, node("Add", "")).sub(9, opset("", 17)).str(10, "local").
		sub(11, message{}.str(1, "a").sub(5, rawTensor("", 10, make([]byte, 6), 3)))
	model := message{}.
		num(1, 10).str(2, "writer").str(3, "2.1").str(6, "a model").
		sub(7, graph).
		sub(8, opset("", 17)).sub(8, opset("ai.onnx", 17)).sub(8, opset("com.microsoft", 1)).
		sub(14, message{}.str(1, "key").str(2, "value")).
		sub(25, function).
		str(999, "of a later version")

	got, err := Inspect(writeModel(t, model, nil))
	if err != nil {
		t.Fatal(err)
	}
	want := &Graph{
		Inputs: []tensor.Info{
			{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 4, -1}},
			{Name: "scalar", Type: tensor.Int64, Shape: []int64{}},
			{Name: "any", Type: tensor.String},
		},
		Outputs:     []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{-1, 2}}},
		Opset:       17,
		Opsets:      map[string]int64{"com.microsoft": 1},
		IRVersion:   10,
		Producer:    "writer 2.1",
		Operators:   []string{"Add", "Constant", "If", "Loop", "Relu", "com.microsoft.FusedConv"},
		WeightBytes: 16 + 16 + 4 + 2 + 8 + 16 + 6,
		WeightTypes: []tensor.Type{tensor.Float32, tensor.Int64, tensor.Float16, 22},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestInspectTensorEncodings(t *testing.T) {
	half := func(bytes int) []byte { return make([]byte, bytes) }
	tests := []struct {
		name   string
		tensor message
		bytes  uint64
		fails  string
	}{
		{"raw", rawTensor("t", 1, half(24), 2, 3), 24, ""},
		{"raw scalar", rawTensor("t", 11, half(8)), 8, ""},
		{"raw of nothing", rawTensor("t", 1, nil, 0, 7), 0, ""},
		{"nothing", message{}.sub(1, packed(0)).num(2, 1), 0, ""},
		{"complex128", rawTensor("t", 15, half(32), 2), 32, ""},
		{"5 4-bit elements", rawTensor("t", 21, half(3), 5), 3, ""},
		{"5 2-bit elements", rawTensor("t", 25, half(2), 5), 2, ""},
		{"a type of the future", rawTensor("t", 99, half(11), 5), 11, ""},
		{"packed floats", message{}.sub(1, packed(3)).num(2, 1).sub(4, half(12)), 12, ""},
		{"a float by itself", protowire.AppendFixed32(protowire.AppendTag(message{}.num(2, 1), 4, protowire.Fixed32Type), 1), 4, ""},
		{"complex64", message{}.sub(1, packed(3)).num(2, 14).sub(4, half(24)), 24, ""},
		{"doubles", message{}.sub(1, packed(3)).num(2, 11).sub(10, half(24)), 24, ""},
		{"int8 as int32", message{}.sub(1, packed(3)).num(2, 3).sub(5, packed(-1, 0, 1)), 3, ""},
		{"int64 one by one", message{}.num(1, 2).num(2, 7).num(7, 1<<40).num(7, -1), 16, ""},
		{"uint32", message{}.sub(1, packed(1)).num(2, 12).sub(11, packed(1<<31)), 4, ""},
		{"5 4-bit elements, typed", message{}.sub(1, packed(5)).num(2, 22).sub(5, packed(1, 2, 3)), 3, ""},
		{"strings", message{}.sub(1, packed(2)).num(2, 8).str(6, "one").str(6, ""), 3, ""},

		{"raw too short", rawTensor("t", 1, half(23), 2, 3), 0, "23 bytes of raw_data, its type and shape [2 3] need 24"},
		{"raw too long", rawTensor("t", 1, half(25), 2, 3), 0, "25 bytes of raw_data"},
		{"raw missing", message{}.sub(1, packed(3)).num(2, 1), 0, "0 values, its type and shape [3] need 3"},
		{"floats missing", message{}.sub(1, packed(3)).num(2, 1).sub(4, half(8)), 0, "2 values"},
		{"floats cut", message{}.sub(1, packed(3)).num(2, 1).sub(4, half(11)), 0, "11 bytes, not a multiple of 4"},
		{"values of another type", message{}.sub(1, packed(1)).num(2, 7).sub(5, packed(1)), 0, "0 values"},
		{"strings missing", message{}.sub(1, packed(2)).num(2, 8).str(6, "one"), 0, "1 values"},
		{"raw strings", rawTensor("t", 8, half(3), 1), 0, "0 values"},
		{"no type", rawTensor("t", 0, half(4), 1), 0, "has no data type"},
		{"negative", rawTensor("t", 1, half(4), -1), 0, "dimension -1 is negative"},
		{"too many elements", rawTensor("t", 1, half(4), 1<<62), 0, "4611686018427387904 elements"},
		{"beyond int64", rawTensor("t", 1, half(4), 1<<62, 4), 0, "invalid shape"},
		{"too many dimensions", rawTensor("t", 1, half(4), make([]int64, 65)...), 0, "more than 64 dimensions"},
		{"number cut", message{}.num(2, 7).sub(7, message{0x80}), 0, "is no number"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			graph := message{}.sub(5, tt.tensor).sub(12, outputY)
			g, err := Inspect(writeModel(t, modelOf(graph), nil))
			checkFault(t, err, tt.fails)
			if err == nil && g.WeightBytes != tt.bytes {
				t.Errorf("%d bytes, want %d", g.WeightBytes, tt.bytes)
			}
		})
	}
}

// checkFault checks for an error about content that has want in its text, or
// for none where want is empty.
func checkFault(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("error %v", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("error %v, want %q", err, want)
	case want != "" && !errors.Is(err, ErrInvalid):
		t.Errorf("error %v is not ErrInvalid", err)
	}
}

func TestInspectRefuses(t *testing.T) {
	whole := modelOf(smallGraph())
	withInput := func(v message) message { return modelOf(message{}.sub(11, v).sub(12, outputY)) }
	deep := func(levels int) message {
		g := message{}.sub(12, outputY)
		for range levels - 1 {
			g = message{}.sub(1, node("If", "", message{}.sub(6, g))).sub(12, outputY)
		}
		return modelOf(g)
	}
	typeOf := func(kind protowire.Number) message { return message{}.str(1, "x").sub(2, message{}.sub(kind, nil)) }
	tests := []struct {
		name  string
		model []byte
		want  string
	}{
		{"whole", whole, ""},
		{"deepest", deep(maxDepth), ""},
		{"empty", nil, "empty file"},
		{"a picture", []byte("\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), "not an ONNX model"},
		{"text", []byte("hello, this is no model at all\n"), "not an ONNX model"},
		{"JSON", []byte(`{"graph": {}}`), "not an ONNX model"},
		{"text that starts like a graph", []byte(":graph"), "not an ONNX model"},
		{"other protobuf", message{}.str(1, "name").num(2, 3), "not an ONNX model"},
		{"protobuf of unknown fields", message{}.str(200, "name").num(201, 3), "not an ONNX model: it has no ir_version"},
		{"truncated in the weights", whole[:len(whole)-40], "truncated: field 7"},
		{"truncated in a tag", append(whole[:len(whole):len(whole)], 0x80), "truncated"},
		{"damaged inside", modelOf(message{0xff, 0xff}), "not an ONNX model"},
		{"a field too long for its graph", modelOf(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.BytesType), 1<<40)), "not an ONNX model: field 1"},
		{"group", append(whole[:len(whole):len(whole)], 0x0b, 0x0c), "wire type 3"},
		{"no graph", message{}.num(1, 8).sub(8, opset("", 17)), "no graph"},
		{"two graphs", append(whole[:len(whole):len(whole)], message{}.sub(7, smallGraph())...), "more than one graph"},
		{"no opset", message{}.num(1, 8).sub(7, smallGraph()), "no opset_import"},
		{"opset 0", append(whole[:len(whole):len(whole)], message{}.sub(8, opset("a", 0))...), "has version 0"},
		{"two opsets", append(whole[:len(whole):len(whole)], message{}.sub(8, opset("ai.onnx", 13))...), "two versions, 17 and 13"},
		{"no outputs", modelOf(message{}.sub(11, inputX)), "graph has no outputs"},
		{"input twice", modelOf(smallGraph().sub(11, inputX)), `input "x" is there twice`},
		{"output twice", modelOf(smallGraph().sub(12, outputY)), `output "y" is there twice`},
		{"input without name", withInput(valueInfo("", tensor.Float32)), "input 0 has no name"},
		{"input without type", withInput(message{}.str(1, "x")), `input "x" has no type`},
		{"input without element type", withInput(message{}.str(1, "x").sub(2, message{}.sub(1, nil))), "no element type"},
		{"input of complex numbers", withInput(valueInfo("x", 14)), "element type 14, which cannot be served"},
		{"input of wide type", withInput(message{}.str(1, "x").sub(2, message{}.sub(1, message{}.num(1, 1<<32+1)))), "element type 4294967297"},
		{"sequence", withInput(typeOf(4)), `input "x" is a sequence, only tensors`},
		{"map", modelOf(message{}.sub(12, typeOf(5))), `output "x" is a map, only tensors`},
		{"control character", withInput(valueInfo("x\x1b[31m", tensor.Float32)), "holds a control character"},
		{"not UTF-8", withInput(valueInfo("x\xff", tensor.Float32)), "not valid UTF-8"},
		{"long name", withInput(valueInfo(strings.Repeat("x", maxString+1), tensor.Float32)), "has 4097 bytes, allowed are 4096"},
		{"many dimensions", withInput(valueInfo("x", tensor.Float32, make([]any, maxRank+1)...)), "more than 64 dimensions"},
		{"node without operator", modelOf(smallGraph().sub(1, message{}.str(1, "x"))), "has no op_type"},
		{"too deep", deep(maxDepth + 1), "nested more than 32 deep"},
		{"wrong wire type", modelOf(smallGraph().num(1, 5)), "field 1 at byte"},
		{"wrong wire type of a number", message{}.str(1, "8"), "not an ONNX model: field 1"},
		{"long producer", message{}.num(1, 8).str(2, strings.Repeat("p", 4000)).str(3, strings.Repeat("v", 4000)).sub(7, smallGraph()).sub(8, opset("", 1)), "producer has 8001 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Inspect(writeModel(t, tt.model, nil))
			checkFault(t, err, tt.want)
		})
	}
}

// Every beginning of a model is refused, most of them as truncated.
func TestInspectTruncated(t *testing.T) {
	whole := modelOf(smallGraph())
	for n := range whole {
		if _, err := Inspect(writeModel(t, whole[:n], nil)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
}

func TestInspectExternalData(t *testing.T) {
	beside := map[string]string{"w.bin": strings.Repeat("w", 100), "sub/v.bin": "12345678"}
	tests := []struct {
		name string
		kv   []string
		want string
	}{
		{"whole", []string{"location", "w.bin", "offset", "20", "length", "80", "checksum", "any"}, ""},
		{"no offset, no length", []string{"location", "w.bin"}, ""},
		{"dotted", []string{"location", "./w.bin", "offset", "0"}, ""},
		{"absolute", []string{"location", "/etc/passwd"}, `location "/etc/passwd" is absolute`},
		{"parent", []string{"location", "../w.bin"}, `location "../w.bin" leaves the model's folder`},
		{"parent inside", []string{"location", "sub/../w.bin"}, "leaves the model's folder"},
		{"backslash", []string{"location", `..\w.bin`}, "a character that is not allowed"},
		{"marker of the runtime", []string{"location", "*/_ORT_MEM_ADDR_/*"}, "a character that is not allowed"},
		{"the folder", []string{"location", "."}, "path"},
		{"none", []string{"offset", "0"}, "has no location"},
		{"empty", []string{"location", ""}, "has no location"},
		{"missing", []string{"location", "gone.bin"}, `"gone.bin" does not exist`},
		{"a folder", []string{"location", "sub"}, "not a regular file"},
		{"through a link", []string{"location", "link"}, "cannot be used"},
		{"too short", []string{"location", "w.bin", "offset", "21"}, "too short: 80 bytes from byte 21 on are needed, the file has 100"},
		{"offset beyond", []string{"location", "w.bin", "offset", "9223372036854775807", "length", "80"}, "too short"},
		{"wrong length", []string{"location", "w.bin", "length", "79"}, "length of 79 bytes, its type and shape [20] need 80"},
		{"negative offset", []string{"location", "w.bin", "offset", "-1"}, `offset "-1"`},
		{"offset no number", []string{"location", "w.bin", "offset", "0x10"}, `offset "0x10"`},
		{"location twice", []string{"location", "w.bin", "location", "sub/v.bin"}, `two entries "location"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			graph := message{}.sub(5, externalTensor("W", 20, tt.kv...)).sub(5, externalTensor("V", 2, "location", "sub/v.bin")).sub(12, outputY)
			path := writeModel(t, modelOf(graph), beside)
			if err := os.Symlink("/etc/hosts", filepath.Join(filepath.Dir(path), "link")); err != nil {
				t.Fatal(err)
			}
			g, err := Inspect(path)
			checkFault(t, err, tt.want)
			if err == nil && (!reflect.DeepEqual(g.External, []string{"sub/v.bin", "w.bin"}) || g.WeightBytes != 88) {
				t.Errorf("external %q, %d bytes of weights", g.External, g.WeightBytes)
			}
		})
	}
	t.Run("in a subgraph", func(t *testing.T) {
		inner := message{}.sub(5, externalTensor("W", 1, "location", "../w"))
		graph := message{}.sub(1, node("If", "", message{}.sub(6, inner))).sub(12, outputY)
		_, err := Inspect(writeModel(t, modelOf(graph), nil))
		checkFault(t, err, "leaves the model's folder")
	})
	t.Run("strings", func(t *testing.T) {
		w := message{}.sub(1, packed(1)).num(2, 8).sub(13, message{}.str(1, "location").str(2, "w.bin")).num(14, 1)
		_, err := Inspect(writeModel(t, modelOf(message{}.sub(5, w).sub(12, outputY)), beside))
		checkFault(t, err, "holds strings")
	})
	t.Run("too many files", func(t *testing.T) {
		graph := message{}.sub(12, outputY)
		files := map[string]string{}
		for i := range MaxFiles {
			name := "w" + strconv.Itoa(i)
			files[name] = "1234"
			graph = graph.sub(5, externalTensor(name, 1, "location", name))
		}
		_, err := Inspect(writeModel(t, modelOf(graph), files))
		checkFault(t, err, "more than 1023 files")
	})
}

func TestInspectNoFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := Inspect(filepath.Join(dir, "gone.onnx")); !errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrInvalid) {
		t.Errorf("missing file: %v", err)
	}
	_, err := Inspect(dir)
	checkFault(t, err, "not a regular file")
}

// A model of nearly 2 GB, a hole in the file system, is inspected by reading
// a little of it.
func TestInspectSkipsWeights(t *testing.T) {
	const weights = 2_000_000_000
	header := message{}.sub(1, packed(weights)).num(2, 2).str(8, "W")
	header = protowire.AppendVarint(protowire.AppendTag(header, 9, protowire.BytesType), weights)
	head := protowire.AppendTag(nil, 5, protowire.BytesType)
	head = append(protowire.AppendVarint(head, uint64(len(header)+weights)), header...)
	tail := message{}.sub(11, inputX).sub(12, outputY)
	start := protowire.AppendTag(message{}.num(1, 8), 7, protowire.BytesType)
	start = append(protowire.AppendVarint(start, uint64(len(head)+weights+len(tail))), head...)
	end := append(tail, message{}.sub(8, opset("", 17))...)

	src := &sparseFile{size: int64(len(start) + weights + len(end)), parts: map[int64][]byte{0: start, int64(len(start) + weights): end}}
	folder, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	g, err := inspect(src, src.size, folder)
	if err != nil {
		t.Fatal(err)
	}
	if g.WeightBytes != weights || len(g.Inputs) != 1 {
		t.Errorf("got %+v", g)
	}
	if src.read > 4*fileWindow {
		t.Errorf("read %d bytes", src.read)
	}
	if _, err := inspect(src, maxONNXBytes+1, folder); err == nil || !strings.Contains(err.Error(), "external data") {
		t.Errorf("file above 2 GiB: %v", err)
	}
}

// sparseFile is zero but for some parts, and counts what is read of it.
type sparseFile struct {
	size, read int64
	parts      map[int64][]byte
}

func (f *sparseFile) ReadAt(b []byte, at int64) (int, error) {
	clear(b)
	f.read += int64(len(b))
	for from, part := range f.parts {
		for i, c := range part {
			if k := from + int64(i) - at; k >= 0 && k < int64(len(b)) {
				b[k] = c
			}
		}
	}
	return len(b), nil
}

func FuzzInspect(f *testing.F) {
	f.Add([]byte(modelOf(smallGraph())))
	f.Add([]byte(modelOf(message{}.sub(5, externalTensor("W", 2, "location", "w.bin")).sub(12, outputY))))
	f.Add([]byte(modelOf(message{}.sub(1, node("If", "", message{}.sub(6, smallGraph()))).sub(12, outputY))))
	f.Add([]byte(modelOf(smallGraph()).sub(25, message{}.str(1, "F").sub(7, node("Add", "")))))
	f.Add([]byte{})
	folder, err := os.OpenRoot(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { folder.Close() })
	if err := folder.WriteFile("w.bin", []byte("12345678"), 0o644); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := inspect(strings.NewReader(string(b)), int64(len(b)), folder)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		c := newConfig(g, PackOptions{})
		if err := c.check(); err != nil {
			t.Errorf("accepted a model with an invalid config: %v", err)
		}
		for _, location := range g.External {
			if location != "w.bin" {
				t.Errorf("external data at %q", location)
			}
		}
	})
}
