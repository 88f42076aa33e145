package rest

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// in is a request with one input.
func in(typ, shape, data string) string {
	return fmt.Sprintf(`{"inputs":[{"name":"x","datatype":%q,"shape":%s,"data":%s}]}`, typ, shape, data)
}

// binaryInput is a request with one binary input, and the data after it.
func binaryInput(typ, shape string, size int, data string) (head, tail string) {
	return fmt.Sprintf(`{"inputs":[{"name":"x","datatype":%q,"shape":%s,"parameters":{"binary_data_size":%d}}]}`, typ, shape, size), data
}

// out is a request for an output with parameters.
func out(parameters string) string {
	return `{"inputs":[],"outputs":[{"name":"y","parameters":{` + parameters + `}}]}`
}

// Each request that is wrong gets the right status, and a message that names
// what is wrong.
func TestInferRefuses(t *testing.T) {
	server := serve(t, oip.Config{Backend: &echo{}})
	long := strings.Repeat("n", oip.MaxName+1)
	binaryOf := func(typ, shape string, size int, data string) [2]string {
		head, tail := binaryInput(typ, shape, size, data)
		return [2]string{head, tail}
	}
	only := func(head string) [2]string { return [2]string{head} }
	for _, tt := range []struct {
		name string
		body [2]string // JSON, and what follows it
		want string    // part of the error
		code int
	}{
		{"empty", only(""), "JSON at byte 0: ends where an object", 400},
		{"not JSON", only("hello"), "has 'h'", 400},
		{"array", only("[]"), "an object", 400},
		{"cut short", only(`{"inputs":[`), "ends where", 400},
		{"cut in a string", only(`{"inp`), "ends inside a string", 400},
		{"trailing comma", only(`{"inputs":[],}`), "a string", 400},
		{"more after the end", only(`{"inputs":[]}x`), "the end", 400},
		{"not UTF-8", only("{\"\xff\":1}"), "not UTF-8", 400},
		{"control character", only("{\"a\n\":1}"), "control character", 400},
		{"bad escape", only(`{"\q":1}`), "escape", 400},
		{"nested too deep", only(strings.Repeat(`{"a":`, 70)), "nested deeper than 64", 400},
		{"leading zero", only(`{"a":01}`), "'1'", 400},
		{"no inputs", only(`{}`), "no inputs", 400},
		{"inputs twice", only(`{"inputs":[],"inputs":[]}`), "inputs twice", 400},
		{"outputs twice", only(`{"inputs":[],"outputs":[],"outputs":[]}`), "outputs twice", 400},
		{"inputs no array", only(`{"inputs":{}}`), "an array", 400},
		{"input no object", only(`{"inputs":[1]}`), "an object", 400},
		{"too many inputs", only(`{"inputs":[` + strings.Repeat(`{"name":"x","datatype":"UINT8","shape":[0],"data":[]},`, oip.MaxTensors+1) + `]}`), "more than 1024 inputs", 400},
		{"too many outputs", only(`{"inputs":[],"outputs":[` + strings.Repeat(`{"name":"x"},`, oip.MaxTensors+1) + `]}`), "more than 1024 outputs", 400},

		{"long id", only(`{"id":"` + long + `","inputs":[]}`), "id: has 1025 bytes, allowed are 1024", 400},
		{"id not a string", only(`{"id":5,"inputs":[]}`), "id: JSON at byte 6: has '5' where a string", 400},
		{"long name", only(`{"inputs":[{"name":"` + long + `"}]}`), "inputs[0].name: has 1025 bytes", 400},
		{"name not a string", only(`{"inputs":[{"name":1}]}`), "inputs[0].name: JSON", 400},
		{"no name", only(`{"inputs":[{"datatype":"UINT8","shape":[1],"data":[1]}]}`), `inputs[0] "": name is missing`, 400},
		{"empty name", only(`{"inputs":[{"name":"","datatype":"UINT8","shape":[1],"data":[1]}]}`), `inputs[0] "": name is missing`, 400},
		{"no datatype", only(`{"inputs":[{"name":"x","shape":[1],"data":[1]}]}`), `inputs[0] "x": datatype is missing`, 400},
		{"no shape", only(`{"inputs":[{"name":"x","datatype":"UINT8","data":[1]}]}`), "shape is missing", 400},
		{"no data", only(`{"inputs":[{"name":"x","datatype":"UINT8","shape":[1]}]}`), "neither data, binary_data_size nor shared_memory_region", 400},
		{"both data", [2]string{`{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1],"parameters":{"binary_data_size":1}}]}`, "a"}, "both data and binary_data_size", 400},
		{"data and memory", only(`{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1],"parameters":{"shared_memory_region":"r"}}]}`), "both data and shared_memory_region", 400},
		{"unknown type", only(in("FP8", "[1]", "[1]")), `inputs[0] "x": datatype "FP8" is unknown`, 400},
		{"long type", only(in(long[:1000], "[1]", "[1]")), `datatype "nnnn`, 400},
		{"parameters no object", only(`{"inputs":[{"name":"x","parameters":[]}]}`), "inputs[0].parameters: JSON", 400},

		{"shape no array", only(in("UINT8", "1", "[1]")), "inputs[0].shape: JSON", 400},
		{"negative dimension", only(in("UINT8", "[2,-1]", "[1]")), "inputs[0].shape: -1 is not an integer from 0", 400},
		{"fractional dimension", only(in("UINT8", "[1.0]", "[1]")), "inputs[0].shape: 1.0 is not", 400},
		{"huge dimension", only(in("UINT8", "[9223372036854775808]", "[1]")), "to 9223372036854775807", 400},
		{"too many dimensions", only(in("UINT8", "["+strings.Repeat("1,", oip.MaxDims)+"1]", "[1]")), "inputs[0].shape: has more than 32 dimensions", 400},
		{"overflowing shape", only(in("UINT8", "[4294967296,4294967296]", "[1]")), "invalid shape", 400},
		{"overflowing bytes", binaryOf("FP64", "[2305843009213693952]", 1, "a"), "inputs[0]: tensor \"x\": invalid shape", 400},
		{"overflowing binary shape", binaryOf("UINT8", "[4294967296,4294967296]", 1, "a"), "invalid shape", 400},
		{"overflow with a zero", binaryOf("UINT8", "[0,4294967296,4294967296]", 0, ""), "invalid shape", 400},
		{"huge shape", only(in("FP64", "[1000000000000]", "[1]")), "fewer elements than the 1000000000000", 400},
		{"too few elements", only(in("UINT8", "[2]", "[100]")), "data has 1 elements, shape [2] needs 2", 400},
		{"too many elements", only(in("UINT8", "[1]", "[[1],[2]]")), "more elements than the 1", 400},
		{"data no array", only(in("UINT8", "[]", "1")), "data is not an array", 400},

		{"out of range", only(in("UINT8", "[2]", "[1,300]")), `inputs[0] "x": data[1]: 300 is not an integer from 0 to 255, as UINT8 needs`, 400},
		{"below range", only(in("INT8", "[1]", "[-129]")), "-129 is not an integer from -128 to 127, as INT8 needs", 400},
		{"negative unsigned", only(in("UINT32", "[1]", "[-1]")), "-1 is not an integer from 0 to 4294967295", 400},
		{"above INT64", only(in("INT64", "[1]", "[9223372036854775808]")), "to 9223372036854775807", 400},
		{"fraction", only(in("INT32", "[1]", "[1.5]")), "1.5 is not an integer", 400},
		{"exponent", only(in("INT32", "[1]", "[1e3]")), "1e3 is not an integer", 400},
		{"NaN for an integer", only(in("INT32", "[1]", "[NaN]")), "NaN is not an integer", 400},
		{"above FP32", only(in("FP32", "[1]", "[1e39]")), "data[0]: 1e39 is out of range for FP32", 400},
		{"above FP64", only(in("FP64", "[1]", "[1e309]")), "1e309 is out of range for FP64", 400},
		{"string for a number", only(in("FP32", "[1]", `["1"]`)), "data[0]: JSON at byte", 400},
		{"null for a number", only(in("FP32", "[1]", `[null]`)), "a number", 400},
		{"number for a boolean", only(in("BOOL", "[1]", "[1]")), "true or false", 400},
		{"number for a string", only(in("BYTES", "[1]", "[1]")), "a string", 400},
		{"FP16 in JSON", only(in("FP16", "[1]", "[1]")), "FP16 data cannot be given in JSON", 400},
		{"BF16 in JSON", only(in("BF16", "[1]", "[1]")), "BF16 data cannot be given in JSON", 400},

		{"binary beyond the body", binaryOf("UINT8", "[4]", 4, "abc"), "binary_data_size is 4, but only 3 bytes are left", 400},
		{"binary of a wrong size", binaryOf("INT16", "[2]", 3, "abc"), `inputs[0]: tensor "x": has 3 bytes of data`, 400},
		{"binary left over", [2]string{`{"inputs":[]}`, "abc"}, "3 bytes of binary data are left", 400},
		{"binary strings cut short", binaryOf("BYTES", "[1]", 5, "\x02\x00\x00\x00a"), "cut short", 400},
		{"binary strings too few", binaryOf("BYTES", "[2]", 4, "\x00\x00\x00\x00"), "has 1 elements", 400},
		{"huge binary string", binaryOf("BYTES", "[1]", 4, "\xff\xff\xff\xff"), "cut short", 400},
		{"negative binary size", binaryOf("UINT8", "[1]", -1, ""), "inputs[0].parameters: binary_data_size: -1 is not", 400},
		{"binary size no number", only(`{"inputs":[{"name":"x","parameters":{"binary_data_size":"1"}}]}`), "inputs[0].parameters: binary_data_size: JSON", 400},

		{"output without name", only(`{"inputs":[],"outputs":[{}]}`), "outputs[0]: name is missing", 400},
		{"output name long", only(`{"inputs":[],"outputs":[{"name":"` + long + `"}]}`), "outputs[0]: name: has 1025 bytes", 400},
		{"binary_data no boolean", only(out(`"binary_data":1`)), "outputs[0]: parameters: binary_data: JSON", 400},
		{"classification negative", only(out(`"classification":-1`)), "outputs[0]: parameters: classification: -1 is", 400},
		{"classification huge", only(out(`"classification":2147483648`)), "classification: 2147483648 is not", 400},
		{"classification and memory", only(out(`"classification":1,"shared_memory_region":"r","shared_memory_byte_size":4`)), `outputs[0] "y": asks for both`, 400},
		{"binary and memory", only(out(`"binary_data":true,"shared_memory_region":"r","shared_memory_byte_size":4`)), `both binary_data and shared_memory_region`, 400},
		{"memory without region", only(out(`"shared_memory_byte_size":4`)), "shared_memory_region is missing", 400},
		{"region no string", only(out(`"shared_memory_region":4`)), "outputs[0]: parameters: shared_memory_region", 400},
		{"offset negative", only(out(`"shared_memory_offset":-4`)), "shared_memory_offset: -4 is", 400},
		{"size no integer", only(out(`"shared_memory_byte_size":4.5`)), "shared_memory_byte_size: 4.5 is", 400},
		{"memory is off", only(out(`"shared_memory_region":"r","shared_memory_byte_size":4`)), "shared memory is off", 501},
		{"memory is off for inputs", only(`{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"parameters":{"shared_memory_region":"r","shared_memory_byte_size":1}}]}`), `inputs[0] "x": shared memory is off`, 501},

		{"priority negative", only(`{"parameters":{"priority":-1},"inputs":[]}`), "parameters.priority: -1 is", 400},
		{"priority no number", only(`{"parameters":{"priority":"high"},"inputs":[]}`), "parameters.priority", 400},
		{"timeout too long", only(`{"parameters":{"timeout":18446744073709551615},"inputs":[]}`), "parameters.timeout: 18446744073709551615", 400},
		{"timeout above 64 bits", only(`{"parameters":{"timeout":18446744073709551616},"inputs":[]}`), "parameters.timeout: 18446744073709551616", 400},
		{"binary_data_output no boolean", only(`{"parameters":{"binary_data_output":"yes"},"inputs":[]}`), "parameters.binary_data_output", 400},
		{"sequence", only(`{"parameters":{"sequence_id":7},"inputs":[]}`), "parameters.sequence_id: sequences are not supported", 501},
		{"named sequence", only(`{"parameters":{"sequence_id":"a"},"inputs":[]}`), "parameters.sequence_id", 501},
		{"sequence start", only(`{"parameters":{"sequence_start":true},"inputs":[]}`), "parameters.sequence_start", 501},
		{"sequence end", only(`{"parameters":{"sequence_end":true},"inputs":[]}`), "parameters.sequence_end", 501},
	} {
		w := do(t, server, "POST", "/v2/models/echo/infer", tt.body[0]+tt.body[1], headerLength, fmt.Sprint(len(tt.body[0])))
		if tt.body[0] == "" { // which would be raw data
			w = do(t, server, "POST", "/v2/models/echo/infer", "")
		}
		message := errorOf(t, w)
		if w.Code != tt.code || !strings.Contains(message, tt.want) {
			t.Errorf("%s: status %d, error %q, want %d and %q", tt.name, w.Code, message, tt.code, tt.want)
		}
		if !utf8.ValidString(message) || len(message) > 500 {
			t.Errorf("%s: error %q", tt.name, message)
		}
	}
}

// What a request for inference need not be.
func TestInferAccepts(t *testing.T) {
	b := &echo{}
	server := serve(t, oip.Config{Backend: b})
	for name, body := range map[string]string{
		"no sequence":        `{"parameters":{"sequence_id":0,"sequence_start":false,"sequence_end":false},"inputs":[]}`,
		"own parameters":     `{"parameters":{"mine":{"a":[1,null]},"triton_enable_empty_final_response":true},"inputs":[{"name":"x","datatype":"UINT8","shape":[0],"data":[],"parameters":{"mine":1}}],"outputs":[{"name":"x","parameters":{"mine":"a"}}]}`,
		"null":               `{"id":null,"parameters":null,"inputs":[{"name":"x","datatype":"UINT8","shape":[0],"data":[],"parameters":null}],"outputs":null}`,
		"null of an output":  `{"inputs":[{"name":"x","datatype":"UINT8","shape":[0],"data":[]}],"outputs":[{"name":"x","parameters":null}]}`,
		"scalar":             in("FP64", "[]", "[1.5]"),
		"zero elements":      in("FP64", "[3,0,2]", "[[],[],[]]"),
		"deeply nested data": in("INT8", "[1]", strings.Repeat("[", 60)+"1"+strings.Repeat("]", 60)),
		"no classes":         `{"inputs":[{"name":"x","datatype":"UINT8","shape":[0],"data":[]}],"outputs":[{"name":"x","parameters":{"classification":0}}]}`,
	} {
		if w := do(t, server, "POST", "/v2/models/echo/infer", body); w.Code != 200 {
			t.Errorf("%s: status %d, %s", name, w.Code, w.Body)
		}
	}
	const scheduled = `{"id":"a","parameters":{"priority":3,"timeout":1500},"inputs":[]}`
	if w := do(t, server, "POST", "/v2/models/echo/infer", scheduled); w.Code != 200 {
		t.Fatalf("status %d, %s", w.Code, w.Body)
	}
	if b.got.Priority != 3 || b.got.Timeout.Microseconds() != 1500 {
		t.Errorf("the backend got %+v", b.got)
	}
}

func TestHeaderLength(t *testing.T) {
	server := serve(t, oip.Config{Backend: &echo{}})
	for _, value := range []string{"-1", "x", "1e3", "+", fmt.Sprint(len(small) + 1), "99999999999999999999"} {
		w := do(t, server, "POST", "/v2/models/echo/infer", small, headerLength, value)
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
		response := &oip.Response{Outputs: []oip.OutputTensor{{Tensor: out}}}
		_, _, err := encodeResponse(&inferRequest{}, response)
		if err == nil || oip.CodeOf(err) != oip.InvalidArgument || !strings.Contains(err.Error(), `"y"`) {
			t.Errorf("%s in JSON: %v", name, err)
		}
		if _, data, err := encodeResponse(&inferRequest{binaryOutput: true}, response); err != nil || len(data) != 1 {
			t.Errorf("%s as binary data: %v, %v", name, data, err)
		}
	}
}

func TestBinaryInputsShareTheBody(t *testing.T) {
	head, tail := binaryInput("UINT8", "[4]", 4, "abcd")
	data := []byte(tail)
	r := newRequest()
	if err := r.decode([]byte(head), data); err != nil {
		t.Fatal(err)
	}
	if &r.Inputs[0].Data[0] != &data[0] {
		t.Error("the data were copied")
	}
}

// Names in a path are bounded, as errors and logs may hold them.
func TestLongNames(t *testing.T) {
	server := serve(t, oip.Config{Backend: &echo{}, SharedMemory: true})
	long := strings.Repeat("n", oip.MaxName+1)
	for _, request := range []string{"GET /v2/models/" + long, "POST /v2/models/" + long + "/infer", "POST /v2/systemsharedmemory/region/" + long + "/register", "GET /v2/" + long} {
		method, path, _ := strings.Cut(request, " ")
		w := do(t, server, method, path, `{"key":"/k","byte_size":1}`)
		if message := errorOf(t, w); w.Code != http.StatusBadRequest && w.Code != http.StatusNotFound || len(message) > 300 {
			t.Errorf("%s: status %d, error %q", request, w.Code, message)
		}
	}
}
