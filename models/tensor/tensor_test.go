package tensor

import (
	"errors"
	"math"
	"testing"
)

func TestTypes(t *testing.T) {
	for _, i := range types {
		got, err := ParseType(i.typ.String())
		if err != nil || got != i.typ {
			t.Errorf("ParseType(%q) = %v, %v", i.typ, got, err)
		}
		if !i.typ.Known() {
			t.Errorf("%v is not known", i.typ)
		}
	}
	if _, err := ParseType("FP8"); err == nil {
		t.Error("ParseType(FP8) gave no error")
	}
	if Type(14).Known() {
		t.Error("complex64 is known")
	}
}

func TestElements(t *testing.T) {
	tests := []struct {
		shape []int64
		want  int64
		fails bool
	}{
		{nil, 1, false},
		{[]int64{2, 3}, 6, false},
		{[]int64{math.MaxInt64, 0}, 0, false},
		{[]int64{math.MaxInt64, 2, 0}, 0, true},
		{[]int64{1 << 32, 1 << 31}, 0, true},
		{[]int64{0, -1}, 0, true},
	}
	for _, tt := range tests {
		got, err := Elements(tt.shape)
		if got != tt.want || (err != nil) != tt.fails || (err != nil && !errors.Is(err, ErrShape)) {
			t.Errorf("Elements(%v) = %d, %v", tt.shape, got, err)
		}
	}
	if _, err := Bytes(Float64, []int64{math.MaxInt64}); !errors.Is(err, ErrShape) {
		t.Errorf("Bytes of too many elements: %v", err)
	}
}

func TestCheck(t *testing.T) {
	two := AppendString(AppendString(nil, []byte("ab")), nil)
	tests := []struct {
		tensor Tensor
		ok     bool
	}{
		{Tensor{Type: Float32, Shape: []int64{2}, Data: make([]byte, 8)}, true},
		{Tensor{Type: Float32, Shape: []int64{2}, Data: make([]byte, 7)}, false},
		{Tensor{Type: Float32, Data: make([]byte, 4)}, true},
		{Tensor{Type: Int64, Shape: []int64{0, 7}}, true},
		{Tensor{Type: String, Shape: []int64{2}, Data: two}, true},
		{Tensor{Type: String, Shape: []int64{1}, Data: two}, false},
		{Tensor{Type: String, Shape: []int64{2}, Data: two[:len(two)-1]}, false},
		{Tensor{Type: 14, Shape: []int64{1}, Data: make([]byte, 8)}, false},
	}
	for _, tt := range tests {
		if err := tt.tensor.Check(); (err == nil) != tt.ok {
			t.Errorf("%+v: %v", tt.tensor, err)
		}
	}
}

func FuzzStrings(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 'a'})
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, data []byte) {
		var again []byte
		for e := range Strings(data) {
			again = AppendString(again, e)
		}
		if end := stringsEnd(data); string(again) != string(data[:end]) {
			t.Errorf("elements of %x give %x", data, again)
		}
	})
}

func TestNumber(t *testing.T) {
	for _, tt := range []struct {
		typ  Type
		data []byte
		want float64
	}{
		{Float32, []byte{0, 0, 0xc0, 0xbf}, -1.5},
		{Float64, []byte{0, 0, 0, 0, 0, 0, 0xf8, 0xbf}, -1.5},
		{BFloat16, []byte{0xc0, 0xbf}, -1.5},
		{Bool, []byte{1}, 1},
		{Uint8, []byte{0xff}, 255},
		{Int8, []byte{0xff}, -1},
		{Uint16, []byte{0xfe, 0xff}, 65534},
		{Int16, []byte{0xfe, 0xff}, -2},
		{Uint32, []byte{0, 0, 0, 0x80}, 1 << 31},
		{Int32, []byte{0, 0, 0, 0x80}, -1 << 31},
		{Uint64, []byte{0, 0, 0, 0, 0, 0, 0, 0x80}, 1 << 63},
		{Int64, []byte{0, 0, 0, 0, 0, 0, 0, 0x80}, -1 << 63},
		{Float16, []byte{0, 0x3c}, 1},
		{Float16, []byte{0, 0x38}, 0.5},
		{Float16, []byte{0, 0xc0}, -2},
		{Float16, []byte{1, 0}, math.Ldexp(1, -24)},
		{Float16, []byte{0xff, 0x7b}, 65504},
		{Float16, []byte{0, 0x7c}, math.Inf(1)},
		{Float16, []byte{0, 0x80}, 0},
	} {
		if got := tt.typ.Number(tt.data); got != tt.want {
			t.Errorf("%v %x is %v, want %v", tt.typ, tt.data, got, tt.want)
		}
	}
	for _, typ := range []Type{Float16, String, 14} {
		if got := typ.Number([]byte{1, 0x7c}); !math.IsNaN(got) {
			t.Errorf("%v 7c01 is %v, want NaN", typ, got)
		}
	}
}
