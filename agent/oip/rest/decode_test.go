package rest

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

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
		req := newRequest()
		for i := range rapid.IntRange(0, 4).Draw(t, "tensors") {
			asBinary := rapid.Bool().Draw(t, "binary")
			x := drawTensor(t, fmt.Sprintf("t\"%d", i), !asBinary)
			outputs = append(outputs, x)
			req.form = append(req.form, map[bool]form{true: formBinary, false: formJSON}[asBinary])
		}
		response := &oip.Response{Model: "m", Version: 1}
		for _, x := range outputs {
			response.Outputs = append(response.Outputs, oip.OutputTensor{Tensor: x})
		}
		head, data, err := encodeResponse(req, response)
		if err != nil {
			t.Fatal(err)
		}
		var binary []byte
		for _, b := range data {
			binary = append(binary, b...)
		}
		got := newRequest()
		if err := got.decode([]byte(strings.Replace(string(head), `"outputs":`, `"inputs":`, 1)), binary); err != nil {
			t.Fatalf("%v in %s", err, head)
		}
		if diff := cmp.Diff(outputs, tensors(got), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("%s\nin %s", diff, head)
		}
	})
}

// tensors gives the inputs of a request.
func tensors(r *inferRequest) (list []tensor.Tensor) {
	for _, in := range r.Inputs {
		list = append(list, in.Tensor)
	}
	return list
}

func newRequest() *inferRequest {
	return &inferRequest{Request: oip.Request{Model: "m"}, hold: func(int64) error { return nil }}
}

func BenchmarkDecodeJSON(b *testing.B) {
	const n = 3 * 224 * 224
	body := []byte(in("FP32", "[1,3,224,224]", "["+strings.Repeat("0.123456,", n-1)+"1]"))
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if err := newRequest().decode(body, nil); err != nil {
			b.Fatal(err)
		}
	}
}
