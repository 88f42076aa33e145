package models

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/models/tensor"
)

const oneOutput = `"outputs": [{"name": "y", "datatype": "INT8", "shape": [], "data": 1}]`

func TestParseReference(t *testing.T) {
	got, err := ParseReference([]byte(`{
		"inputs": [
			{"name": "flat", "datatype": "FP32", "shape": [2, 2], "data": [1, -2.5, 3e38, 0], "parameters": {"binary_data_size": 3}},
			{"name": "nested", "datatype": "INT64", "shape": [2, 1], "data": [[-9223372036854775808], [7]]},
			{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["", "größer"]},
			{"name": "half", "datatype": "FP16", "shape": [2], "data": [1, -65504]},
			{"name": "none", "datatype": "UINT8", "shape": [0, 3], "data": []}
		],
		"outputs": [{"name": "y", "datatype": "BOOL", "shape": [], "data": true}, {"name": "b", "datatype": "BF16", "shape": [1], "data": [[1]]}],
		"tolerance": {"relative": 0.5, "absolute": 0}
	}`))
	if err == nil || !strings.Contains(err.Error(), `output "b" nests its data deeper than its 1 dimensions`) {
		t.Errorf("nested too deep: %v, %v", got, err)
	}
	got, err = ParseReference([]byte(`{
		"inputs": [
			{"name": "flat", "datatype": "FP32", "shape": [2, 2], "data": [1, -2.5, 3e38, 0], "parameters": {"binary_data_size": 3}},
			{"name": "nested", "datatype": "INT64", "shape": [2, 1], "data": [[-9223372036854775808], [7]]},
			{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["", "größer"]},
			{"name": "half", "datatype": "FP16", "shape": [2], "data": [1, -65504]},
			{"name": "none", "datatype": "UINT8", "shape": [0, 3], "data": []}
		],
		"outputs": [{"name": "y", "datatype": "BOOL", "shape": [], "data": true}, {"name": "b", "datatype": "BF16", "shape": [1], "data": [-1]}],
		"tolerance": {"relative": 0.5, "absolute": 0}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	flat := []byte{}
	for _, v := range []float32{1, -2.5, 3e38, 0} {
		flat = le.AppendUint32(flat, math.Float32bits(v))
	}
	want := &Reference{
		Inputs: []tensor.Tensor{
			{Name: "flat", Type: tensor.Float32, Shape: []int64{2, 2}, Data: flat},
			{Name: "nested", Type: tensor.Int64, Shape: []int64{2, 1}, Data: le.AppendUint64(le.AppendUint64(nil, 1<<63), 7)},
			{Name: "text", Type: tensor.String, Shape: []int64{2}, Data: tensor.AppendString(tensor.AppendString(nil, nil), []byte("größer"))},
			{Name: "half", Type: tensor.Float16, Shape: []int64{2}, Data: []byte{0, 0x3c, 0xff, 0xfb}},
			{Name: "none", Type: tensor.Uint8, Shape: []int64{0, 3}, Data: []byte{}},
		},
		Outputs: []tensor.Tensor{
			{Name: "y", Type: tensor.Bool, Shape: []int64{}, Data: []byte{1}},
			{Name: "b", Type: tensor.BFloat16, Shape: []int64{1}, Data: []byte{0x80, 0xbf}},
		},
		Relative: 0.5,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	got, err = ParseReference([]byte("{" + oneOutput + "}"))
	if err != nil || got.Relative != defaultRelative || got.Absolute != defaultAbsolute || len(got.Inputs) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestParseReferenceRefuses(t *testing.T) {
	input := func(datatype, shape, data string) string {
		return fmt.Sprintf(`{"inputs": [{"name": "x", "datatype": %q, "shape": %s, "data": %s}], %s}`, datatype, shape, data, oneOutput)
	}
	for _, tt := range []struct{ text, want string }{
		{"", "not valid"}, {"[]", "not valid"}, {"{}", "no outputs"}, {"{" + oneOutput + "} {}", "something after its end"},
		{"{" + oneOutput + `, "tolerence": {}}`, `unknown field "tolerence"`},
		{"{" + oneOutput + `, "tolerance": {"relative": -1}}`, "tolerance.relative is -1"},
		{`{"outputs": [{"name": "y", "datatype": "INT8", "shape": [], "data": 1}, {"name": "y", "datatype": "INT8", "shape": [], "data": 1}]}`, `output "y" is there twice`},
		{input("FP8", "[1]", "[1]"), `datatype "FP8"`}, {input("FP32", "[-1]", "[1]"), "shape [-1]"}, {input("FP32", "[2]", "[1]"), "has 1 elements, its shape [2] needs 2"},
		{input("FP32", "[9223372036854775807, 9]", "[1]"), "which is none"}, {input("FP32", "[1000000000000]", "[1]"), "its data has fewer"},
		{input("FP32", "[1]", `["1"]`), "element 0: 1 is no FP32"}, {input("FP32", "[1]", "[1e39]"), "element 0: 1e39 is no FP32"}, {input("FP16", "[1]", "[65520]"), "65520 is no FP16"},
		{input("BF16", "[1]", "[3.4e38]"), "is no BF16"}, {input("INT8", "[1]", "[128]"), "128 is no INT8"}, {input("UINT8", "[1]", "[-1]"), "-1 is no UINT8"},
		{input("INT32", "[1]", "[1.5]"), "1.5 is no INT32"}, {input("BOOL", "[1]", "[1]"), "1 is no BOOL"}, {input("BYTES", "[1]", "[1]"), "1 is no BYTES"},
		{input("FP32", "[1]", "[null]"), "is no FP32"}, {input("FP32", "[1]", `[{"a": 1}]`), "object"}, {input("FP32", "[1]", "[[[1]]]"), "deeper"},
		{`{"inputs": [{"name": "x", "datatype": "FP32", "shape": [0]}], ` + oneOutput + "}", "no data"},
		{strings.Repeat(" ", MaxReferenceBytes+1), "more than 16777216 bytes"},
	} {
		r, err := ParseReference([]byte(tt.text))
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.100s: %+v, %v; want %q", tt.text, r, err, tt.want)
		}
	}
}

// The 16-bit numbers are the ones that are nearest, the even one of two.
func TestHalf(t *testing.T) {
	for _, tt := range []struct {
		v           float64
		half, brain uint64
	}{
		{0, 0, 0}, {math.Copysign(0, -1), 0x8000, 0x8000}, {1, 0x3c00, 0x3f80}, {-2, 0xc000, 0xc000}, {65504, 0x7bff, 0x4780},
		{1 + 1.0/2048, 0x3c00, 0x3f80}, {1 + 3.0/2048, 0x3c02, 0x3f80}, {math.Ldexp(1, -24), 1, 0x3380}, {math.Ldexp(1, -25), 0, 0x3300}, {math.Ldexp(1.5, -25), 1, 0x3340},
		{math.Ldexp(1, -14), 0x400, 0x3880}, {math.Ldexp(1023.6, -24), 0x400, 0x3880}, {2047.9, 0x6800, 0x4500}, {0.1, 0x2e66, 0x3dcd},
	} {
		h, ok := half(tt.v)
		b, ok2 := brain(tt.v)
		if !ok || !ok2 || h != tt.half || b != tt.brain {
			t.Errorf("%v: %#x %v, %#x %v; want %#x, %#x", tt.v, h, ok, b, ok2, tt.half, tt.brain)
		}
	}
}

func TestReferenceFits(t *testing.T) {
	inputs := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 2}}, {Name: "any", Type: tensor.Int8}}
	outputs := []tensor.Info{{Name: "y", Type: tensor.Int8, Shape: []int64{}}, {Name: "z", Type: tensor.Int8, Shape: []int64{}}}
	x := `{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}`
	anything := `{"name": "any", "datatype": "INT8", "shape": [1, 1], "data": [1]}`
	for _, tt := range []struct{ inputs, want string }{
		{x + "," + anything, ""}, {x, `lacks input "any"`}, {anything, `lacks input "x"`},
		{strings.Replace(x, `"x"`, `"w"`, 1) + "," + anything, `no input "w"`},
		{strings.Replace(x, "FP32", "FP64", 1) + "," + anything, `input "x" is FP64, the model's is FP32`},
		{strings.Replace(x, "[1, 2]", "[2, 1]", 1) + "," + anything, `input "x" has shape [2 1], the model's is [-1 2]`},
		{strings.Replace(x, "[1, 2]", "[2]", 1) + "," + anything, `has shape [2]`},
	} {
		r, err := ParseReference(fmt.Appendf(nil, `{"inputs": [%s], %s}`, tt.inputs, oneOutput))
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Fits(inputs, outputs); (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.inputs, err, tt.want)
		}
	}
	r := &Reference{Outputs: []tensor.Tensor{{Name: "w", Type: tensor.Int8, Shape: []int64{}}}}
	if err := r.Fits(nil, outputs); err == nil || !strings.Contains(err.Error(), `no output "w"`) {
		t.Error(err)
	}
}

// A bundle has its reference as a file, which can be read from its folder.
func TestPackReference(t *testing.T) {
	model := "examples/digits/v1.onnx"
	plain, err := Pack(t.Context(), model, PackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	image := strings.TrimSuffix(strings.Repeat("0,", 64), ",")
	text := `{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [` + image + `]}],
		"outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [1, 10], "data": [0,1,2,3,4,5,6,7,8,9]}]}`
	path := filepath.Join(t.TempDir(), "made.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := Pack(t.Context(), model, PackOptions{Reference: path})
	if err != nil {
		t.Fatal(err)
	}
	if b.Digest == plain.Digest || b.Config.Reference != ReferenceFile || plain.Config.Reference != "" || len(b.Files) != 2 || b.Files[1].Path != ReferenceFile {
		t.Errorf("%+v", b)
	}
	dir := t.TempDir()
	if r, err := ReadReference(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of an empty folder: %+v, %v", r, err)
	}
	raw, err := os.ReadFile(b.Files[1].Source)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, b.Files[1].Path), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := ReadReference(dir)
	if err != nil || r.Fits(b.Config.Inputs, b.Config.Outputs) != nil || len(r.Inputs[0].Data) != 256 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(text, "probabilities", "logits", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Pack(t.Context(), model, PackOptions{Reference: path}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), `made.json: reference: the model has no output "logits"`) {
		t.Errorf("a reference that does not fit: %v", err)
	}
	if _, err := Pack(t.Context(), model, PackOptions{Reference: filepath.Join(dir, "absent")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}

func FuzzParseReference(f *testing.F) {
	f.Add([]byte("{" + oneOutput + "}"))
	f.Add([]byte(`{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1, -2.5], [3e38, 0]]}], ` + oneOutput + `, "tolerance": {"relative": 1}}`))
	f.Add([]byte(`{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [2], "data": ["a", "\u00e9"]}], ` + oneOutput + "}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseReference(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		if len(r.Outputs) == 0 || !(r.Relative >= 0 && r.Absolute >= 0) {
			t.Errorf("%+v", r)
		}
		for _, all := range [][]tensor.Tensor{r.Inputs, r.Outputs} {
			for _, x := range all {
				if err := x.Check(); err != nil {
					t.Error(err)
				}
			}
		}
		if !json.Valid(bytes.TrimSpace(b)) {
			t.Error("accepts what is no JSON")
		}
	})
}
