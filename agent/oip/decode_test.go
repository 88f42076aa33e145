package oip

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/tensor"
)

// in is a request with one input.
func in(typ, shape, data string) string {
	return fmt.Sprintf(`{"inputs":[{"name":"x","datatype":%q,"shape":%s,"data":%s}]}`, typ, shape, data)
}

func TestDecodeRefuses(t *testing.T) {
	long := strings.Repeat("n", MaxName+1)
	for _, tt := range []struct {
		name, head, data string
		want             string // part of the error
		code             Code
	}{
		{"empty", "", "", "JSON at byte 0: ends where an object", InvalidArgument},
		{"not JSON", "hello", "", "has 'h'", InvalidArgument},
		{"array", "[]", "", "an object", InvalidArgument},
		{"cut short", `{"inputs":[`, "", "ends where", InvalidArgument},
		{"cut in a string", `{"inp`, "", "ends inside a string", InvalidArgument},
		{"trailing comma", `{"inputs":[],}`, "", "a string", InvalidArgument},
		{"more after the end", `{"inputs":[]}x`, "", "the end", InvalidArgument},
		{"not UTF-8", "{\"\xff\":1}", "", "not UTF-8", InvalidArgument},
		{"control character", "{\"a\n\":1}", "", "control character", InvalidArgument},
		{"bad escape", `{"\q":1}`, "", "escape", InvalidArgument},
		{"nested too deep", strings.Repeat(`{"a":`, 70), "", "nested deeper than 64", InvalidArgument},
		{"leading zero", `{"a":01}`, "", "'1'", InvalidArgument},
		{"no inputs", `{}`, "", "no inputs", InvalidArgument},
		{"inputs twice", `{"inputs":[],"inputs":[]}`, "", "twice", InvalidArgument},
		{"outputs twice", `{"inputs":[],"outputs":[],"outputs":[]}`, "", "twice", InvalidArgument},
		{"too many inputs", `{"inputs":[` + strings.Repeat(`{"name":"x","datatype":"UINT8","shape":[0],"data":[]},`, MaxTensors+1) + `]}`, "", "more than 1024 inputs", InvalidArgument},
		{"too many outputs", `{"inputs":[],"outputs":[` + strings.Repeat(`{"name":"x"},`, MaxTensors+1) + `]}`, "", "more than 1024 outputs", InvalidArgument},
		{"long id", `{"id":"` + long + `","inputs":[]}`, "", "id has 1025 bytes, allowed are 1024", InvalidArgument},
		{"long name", `{"inputs":[{"name":"` + long + `"}]}`, "", "inputs[0].name has 1025 bytes", InvalidArgument},
		{"id not a string", `{"id":5,"inputs":[]}`, "", "a string", InvalidArgument},
		{"no name", `{"inputs":[{"datatype":"UINT8","shape":[1],"data":[1]}]}`, "", "name is missing", InvalidArgument},
		{"no datatype", `{"inputs":[{"name":"x","shape":[1],"data":[1]}]}`, "", `inputs[0] "x": datatype is missing`, InvalidArgument},
		{"no shape", `{"inputs":[{"name":"x","datatype":"UINT8","data":[1]}]}`, "", "shape is missing", InvalidArgument},
		{"no data", `{"inputs":[{"name":"x","datatype":"UINT8","shape":[1]}]}`, "", "neither data nor binary_data_size", InvalidArgument},
		{"both data", `{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1],"parameters":{"binary_data_size":1}}]}`, "a", "both data and binary_data_size", InvalidArgument},
		{"unknown type", in("FP8", "[1]", "[1]"), "", `unknown data type "FP8"`, InvalidArgument},
		{"negative dimension", in("UINT8", "[2,-1]", "[1]"), "", "inputs[0].shape[1]: -1 is not an integer from 0", InvalidArgument},
		{"fractional dimension", in("UINT8", "[1.0]", "[1]"), "", "inputs[0].shape[0]: 1.0", InvalidArgument},
		{"too many dimensions", in("UINT8", "["+strings.Repeat("1,", MaxDims)+"1]", "[1]"), "", "inputs[0].shape has more than 32 dimensions", InvalidArgument},
		{"overflowing shape", in("UINT8", "[4294967296,4294967296]", "[1]"), "", "invalid shape", InvalidArgument},
		{"huge shape", in("FP64", "[1000000000000]", "[1]"), "", "fewer elements than the 1000000000000", InvalidArgument},
		{"too few elements", in("UINT8", "[2]", "[100]"), "", "data has 1 elements, shape [2] needs 2", InvalidArgument},
		{"too many elements", in("UINT8", "[1]", "[[1],[2]]"), "", "more elements than the 1", InvalidArgument},
		{"data no array", in("UINT8", "[]", "1"), "", "data is not an array", InvalidArgument},
		{"out of range", in("UINT8", "[2]", "[1,300]"), "", `inputs[0] "x": data[1]: 300 is not an integer from 0 to 255, as UINT8 needs`, InvalidArgument},
		{"below range", in("INT8", "[1]", "[-129]"), "", "-129 is not an integer from -128 to 127, as INT8 needs", InvalidArgument},
		{"negative unsigned", in("UINT32", "[1]", "[-1]"), "", "-1 is not an integer from 0 to 4294967295", InvalidArgument},
		{"above INT64", in("INT64", "[1]", "[9223372036854775808]"), "", "to 9223372036854775807", InvalidArgument},
		{"fraction", in("INT32", "[1]", "[1.5]"), "", "1.5 is not an integer", InvalidArgument},
		{"exponent", in("INT32", "[1]", "[1e3]"), "", "1e3 is not an integer", InvalidArgument},
		{"NaN for an integer", in("INT32", "[1]", "[NaN]"), "", "NaN is not an integer", InvalidArgument},
		{"above FP32", in("FP32", "[1]", "[1e39]"), "", "data[0]: 1e39 is out of range for FP32", InvalidArgument},
		{"above FP64", in("FP64", "[1]", "[1e309]"), "", "1e309 is out of range for FP64", InvalidArgument},
		{"string for a number", in("FP32", "[1]", `["1"]`), "", "data[0]: JSON at byte", InvalidArgument},
		{"null for a number", in("FP32", "[1]", `[null]`), "", "a number", InvalidArgument},
		{"number for a boolean", in("BOOL", "[1]", "[1]"), "", "true or false", InvalidArgument},
		{"number for a string", in("BYTES", "[1]", "[1]"), "", "a string", InvalidArgument},
		{"FP16 in JSON", in("FP16", "[1]", "[1]"), "", "FP16 data cannot be given in JSON", InvalidArgument},
		{"BF16 in JSON", in("BF16", "[1]", "[1]"), "", "BF16 data cannot be given in JSON", InvalidArgument},
		{"binary beyond the body", `{"inputs":[{"name":"x","datatype":"UINT8","shape":[4],"parameters":{"binary_data_size":4}}]}`, "abc", "binary_data_size is 4, but only 3 bytes are left", InvalidArgument},
		{"binary of a wrong size", `{"inputs":[{"name":"x","datatype":"INT16","shape":[2],"parameters":{"binary_data_size":3}}]}`, "abc", "has 3 bytes of data", InvalidArgument},
		{"binary left over", `{"inputs":[]}`, "abc", "3 bytes of binary data are left", InvalidArgument},
		{"binary strings cut short", `{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":5}}]}`, "\x02\x00\x00\x00a", "cut short", InvalidArgument},
		{"negative binary size", `{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"parameters":{"binary_data_size":-1}}]}`, "", "binary_data_size: -1", InvalidArgument},
		{"output without name", `{"inputs":[],"outputs":[{}]}`, "", "outputs[0]: name is missing", InvalidArgument},
		{"binary_data no boolean", `{"inputs":[],"outputs":[{"name":"y","parameters":{"binary_data":1}}]}`, "", "true or false", InvalidArgument},
		{"classification", `{"inputs":[],"outputs":[{"name":"y","parameters":{"classification":3}}]}`, "", "classification is not supported", Unsupported},
		{"shared memory in", `{"inputs":[{"name":"x","parameters":{"shared_memory_region":"r"}}]}`, "", "shared memory is not supported", Unsupported},
		{"shared memory out", `{"inputs":[],"outputs":[{"name":"y","parameters":{"shared_memory_region":"r"}}]}`, "", "shared memory is not supported", Unsupported},
	} {
		r, err := decodeRequest([]byte(tt.head), []byte(tt.data))
		if err == nil {
			t.Errorf("%s: gave %+v", tt.name, r)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) || codeOf(err) != tt.code {
			t.Errorf("%s: error %q (code %d), want %q (code %d)", tt.name, err, codeOf(err), tt.want, tt.code)
		}
		if !utf8.ValidString(err.Error()) || len(err.Error()) > 400 {
			t.Errorf("%s: error %q", tt.name, err)
		}
	}
}

func TestHeaderLength(t *testing.T) {
	h := New(Config{Backend: &echo{}})
	for _, value := range []string{"-1", "x", "1e3", fmt.Sprint(len(small) + 1), "99999999999999999999"} {
		w := do(h, "POST", "/v2/models/echo/infer", small, headerLength, value)
		if w.Code != 400 || !strings.Contains(errorOf(t, w), headerLength) {
			t.Errorf("header length %q: status %d, %s", value, w.Code, w.Body)
		}
	}
}

func TestOutputsRefused(t *testing.T) {
	for name, out := range map[string]tensor.Tensor{
		"FP16":  {Name: "y", Type: tensor.Float16, Shape: []int64{1}, Data: []byte{0, 0}},
		"BF16":  {Name: "y", Type: tensor.BFloat16, Shape: []int64{1}, Data: []byte{0, 0}},
		"bytes": {Name: "y", Type: tensor.String, Shape: []int64{1}, Data: tensor.AppendString(nil, []byte{0xff})},
	} {
		_, _, err := encodeResponse(&inferRequest{}, Response{Outputs: []tensor.Tensor{out}})
		if err == nil || codeOf(err) != InvalidArgument || !strings.Contains(err.Error(), `"y"`) {
			t.Errorf("%s in JSON: %v", name, err)
		}
		if _, data, err := encodeResponse(&inferRequest{binaryOutput: true}, Response{Outputs: []tensor.Tensor{out}}); err != nil || len(data) != 1 {
			t.Errorf("%s as binary data: %v, %v", name, data, err)
		}
	}
	_, _, err := encodeResponse(&inferRequest{}, Response{Outputs: []tensor.Tensor{{Name: "y", Type: tensor.Int32, Shape: []int64{2}, Data: make([]byte, 7)}}})
	if err == nil || codeOf(err) != Internal {
		t.Errorf("an output that is cut short: %v", err)
	}
}

func TestBinaryInputsShareTheBody(t *testing.T) {
	data := []byte("abcd")
	r, err := decodeRequest([]byte(`{"inputs":[{"name":"x","datatype":"UINT8","shape":[4],"parameters":{"binary_data_size":4}}]}`), data)
	if err != nil {
		t.Fatal(err)
	}
	if &r.inputs[0].Data[0] != &data[0] {
		t.Error("the data were copied")
	}
}

var allTypes = []tensor.Type{
	tensor.Float32, tensor.Uint8, tensor.Int8, tensor.Uint16, tensor.Int16, tensor.Int32, tensor.Int64,
	tensor.String, tensor.Bool, tensor.Float16, tensor.Float64, tensor.Uint32, tensor.Uint64, tensor.BFloat16,
}

// drawTensor draws a tensor that can be sent: with canonical booleans and,
// for JSON, valid strings.
func drawTensor(t *rapid.T, name string, inJSON bool) tensor.Tensor {
	types := allTypes
	if inJSON {
		types = jsonTypes()
	}
	x := tensor.Tensor{Name: name, Type: rapid.SampledFrom(types).Draw(t, "type")}
	x.Shape = rapid.SliceOfN(rapid.Int64Range(0, 4), 0, 4).Draw(t, "shape")
	n, err := tensor.Elements(x.Shape)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		switch x.Type {
		case tensor.String:
			e := rapid.String().Draw(t, "element")
			if !inJSON {
				e = string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes"))
			}
			x.Data = tensor.AppendString(x.Data, []byte(strings.ToValidUTF8(e, "?")))
		case tensor.Bool:
			x.Data = append(x.Data, byte(rapid.IntRange(0, 1).Draw(t, "element")))
		default:
			x.Data = append(x.Data, rapid.SliceOfN(rapid.Byte(), x.Type.Size(), x.Type.Size()).Draw(t, "element")...)
		}
	}
	if x.Type == tensor.Float32 || x.Type == tensor.Float64 {
		canonicalNaN(&x)
	}
	return x
}

func jsonTypes() []tensor.Type {
	var list []tensor.Type
	for _, typ := range allTypes {
		if elementReaders[typ] != nil {
			list = append(list, typ)
		}
	}
	return list
}

// canonicalNaN replaces every NaN by the one that JSON's NaN stands for.
func canonicalNaN(x *tensor.Tensor) {
	size := x.Type.Size()
	for i := 0; i < len(x.Data); i += size {
		text := string(elementWriters[x.Type](nil, x.Data[i:]))
		if text != "NaN" {
			continue
		}
		nan := uint64(math.Float32bits(float32(math.NaN())))
		if size == 8 {
			nan = math.Float64bits(math.NaN())
		}
		copy(x.Data[i:], appendBits(nil, nan, 8*size))
	}
}

// What is encoded as a response and read back as a request is the same, in
// JSON and as binary data.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var outputs []tensor.Tensor
		req := &inferRequest{}
		for i := range rapid.IntRange(0, 4).Draw(t, "tensors") {
			asBinary := rapid.Bool().Draw(t, "binary")
			x := drawTensor(t, fmt.Sprintf("t\"%d", i), !asBinary)
			outputs = append(outputs, x)
			req.outputs = append(req.outputs, outputRequest{x.Name, &asBinary})
		}
		head, data, err := encodeResponse(req, Response{Model: "m", Version: 1, Outputs: outputs})
		if err != nil {
			t.Fatal(err)
		}
		var binary []byte
		for _, b := range data {
			binary = append(binary, b...)
		}
		got, err := decodeRequest([]byte(strings.Replace(string(head), `"outputs":`, `"inputs":`, 1)), binary)
		if err != nil {
			t.Fatalf("%v in %s", err, head)
		}
		if diff := cmp.Diff(outputs, got.inputs, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("%s\nin %s", diff, head)
		}
	})
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(in("FP32", "[2]", "[1,[-2.5e-3]]")), []byte(nil))
	f.Add([]byte(in("BYTES", "[2,1]", `[["a\u00e9"],[""]]`)), []byte(nil))
	f.Add([]byte(`{"id":"1","parameters":{"binary_data_output":true},"inputs":[{"name":"x","datatype":"BOOL","shape":[1],"parameters":{"binary_data_size":1}}],"outputs":[{"name":"y","parameters":{"binary_data":true}}]}`), []byte{1})
	f.Fuzz(func(t *testing.T, head, data []byte) {
		r, err := decodeRequest(head, data)
		if err != nil {
			if c := codeOf(err); c != InvalidArgument && c != Unsupported {
				t.Errorf("error %q has code %d", err, c)
			}
			return
		}
		for _, x := range r.inputs {
			if err := x.Check(); err != nil {
				t.Errorf("accepted %v", err)
			}
		}
	})
}

func BenchmarkDecodeJSON(b *testing.B) {
	const n = 3 * 224 * 224
	body := []byte(in("FP32", "[1,3,224,224]", "["+strings.Repeat("0.123456,", n-1)+"1]"))
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if _, err := decodeRequest(body, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// The parser accepts what encoding/json accepts, but for its own limits and
// literals.
func FuzzParser(f *testing.F) {
	for _, seed := range []string{`{"a":[1,-0.5e+7,null,true,"\u00e9\ud800"],"b":{}}`, `[NaN,-Infinity]`, ` [ ] `, `01`, "\"\xff\""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &parser{b: b}
		err := p.skip()
		if err == nil {
			err = p.end()
		}
		if err != nil && strings.Contains(err.Error(), "nested deeper") {
			return
		}
		text := string(b)
		extended := strings.Contains(text, "NaN") || strings.Contains(text, "Infinity")
		if want := json.Valid(b) && utf8.Valid(b); (err == nil) != want && (!extended || want) {
			t.Errorf("%q: %v, encoding/json says %v", b, err, want)
		}
	})
}
