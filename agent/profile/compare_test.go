package profile

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/tensor"
)

func floats(name string, values ...float32) tensor.Tensor {
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: []int64{int64(len(values))}}
	for _, v := range values {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(v))
	}
	return t
}

func TestCompare(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	half := func(bits ...uint16) tensor.Tensor {
		x := tensor.Tensor{Name: "y", Type: tensor.Float16, Shape: []int64{int64(len(bits))}}
		for _, b := range bits {
			x.Data = binary.LittleEndian.AppendUint16(x.Data, b)
		}
		return x
	}
	whole := func(values ...byte) tensor.Tensor {
		return tensor.Tensor{Name: "y", Type: tensor.Uint8, Shape: []int64{int64(len(values))}, Data: values}
	}
	all := func(t ...tensor.Tensor) []tensor.Tensor { return t }
	tests := []struct {
		name      string
		want, got []tensor.Tensor
		tolerance Tolerance
		reason    string // "": accepted
		absolute  float64
	}{
		{"the same", all(floats("y", 1, 2)), all(floats("y", 1, 2)), ForFP32, "", 0},
		{"in another order", all(floats("y", 1), floats("z", 2)), all(floats("z", 2), floats("y", 1)), ForFP32, "", 0},
		{"rounded", all(floats("y", 1000, 0)), all(floats("y", 1000.5, 0.00005)), ForFP32, "", 0.5},
		{"too far", all(floats("y", 1000, 0)), all(floats("y", 1002, 0)), ForFP32, "1 of 2 values differ by more than", 2},
		{"not around zero", all(floats("y", 0)), all(floats("y", 0.001)), ForFP32, "1 of 1", 0.001},
		{"not a number, both", all(floats("y", nan, inf)), all(floats("y", nan, inf)), ForFP32, "", 0},
		{"not a number", all(floats("y", 1)), all(floats("y", nan)), ForFP32, "has NaN where the reference has 1", 0},
		{"infinite", all(floats("y", inf)), all(floats("y", 1)), ForFP32, "has 1 where the reference has +Inf", 0},
		{"missing", all(floats("y", 1)), nil, ForFP32, `output "y" is missing`, 0},
		{"of another shape", all(floats("y", 1)), all(floats("y", 1, 1)), ForFP32, "is FP32 [2] instead of FP32 [1]", 0},
		{"of another type", all(floats("y", 1)), all(half(1)), ForFP32, "is FP16", 0},
		{"half a digit off", all(half(0x3c00)), all(half(0x3c10)), ForLower, "", 0.015625},
		{"half of it off", all(half(0x4000)), all(half(0x3c00)), ForLower, "1 of 1", 1},
		{"whole numbers", all(whole(1, 2)), all(whole(1, 2)), ForFP32, "", 0},
		{"whole numbers off", all(whole(1, 2)), all(whole(1, 3)), ForLower, "differs from the reference", 0},
	}
	for _, tt := range tests {
		c := Compare("P", tt.want, tt.got, tt.tolerance)
		if c.Accepted != (tt.reason == "") || !strings.Contains(c.Reason, tt.reason) || math.Abs(c.Absolute-tt.absolute) > 1e-6 || c.Provider != "P" {
			t.Errorf("%s: %+v, want %q and %g", tt.name, c, tt.reason, tt.absolute)
		}
	}
}

func TestHalf(t *testing.T) {
	for bits, want := range map[uint16]float64{
		0: 0, 0x8000: 0, 0x3c00: 1, 0xc000: -2, 0x3555: 0.333251953125, 0x7bff: 65504, 0x0001: math.Ldexp(1, -24), 0x03ff: math.Ldexp(1023, -24), 0x7c00: math.Inf(1), 0xfc00: math.Inf(-1),
	} {
		if got := half(bits); got != want {
			t.Errorf("%#04x is %v, want %v", bits, got, want)
		}
	}
	if !math.IsNaN(half(0x7e00)) {
		t.Error("0x7e00 is a number")
	}
}
