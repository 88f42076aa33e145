package worker

import (
	"bytes"
	"errors"
	"math"
	"reflect"
	"testing"

	"github.com/dunlin/dunlin/models/tensor"
)

func encode(m *message) []byte {
	header, size := m.header()
	b := make([]byte, size)
	m.pieces(header, func(part []byte, at uint64) error { copy(b[at:], part); return nil })
	return b
}

var messages = []*message{
	{kind: kindInit, seq: 1, number: 2, limit: 1 << 30, strings: []string{"/lib/libonnxruntime.so"}},
	{kind: kindLoad, seq: 2, session: 3, strings: []string{"/models/digits", "model.onnx"}},
	{kind: kindRun, seq: math.MaxUint64, session: 3, tensors: []tensor.Tensor{
		{Name: "x", Type: tensor.Float32, Shape: []int64{1, 2}, Data: []byte("12345678")},
		{Name: "", Type: tensor.String, Shape: []int64{}, Data: []byte("\x01\x00\x00\x00a")},
		{Name: "empty", Type: tensor.BFloat16, Shape: []int64{0, 7}, Data: []byte{}},
	}},
	{kind: kindDone, seq: 2, number: 123456, inputs: []tensor.Info{{Name: "x", Type: tensor.Bool, Shape: []int64{-1, math.MaxInt64}}},
		outputs: []tensor.Info{{Name: "any", Type: tensor.Float32}, {Name: "scalar", Type: tensor.Int8, Shape: []int64{}}}},
	{kind: kindFailed, seq: 2, strings: []string{"no such file", ""}},
	{kind: kindCancel, seq: 9},
	{kind: kindShared, seq: 9, number: 1 << 20, slot: slot{64 << 10, 2 << 20}},
}

func TestMessages(t *testing.T) {
	for _, m := range messages {
		b := encode(m)
		got, err := decode(b)
		m.size = uint64(len(b))
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%+v came back as %+v, %v", m, got, err)
		}
		for n := range b {
			if _, err := decode(b[:n]); !errors.Is(err, errMalformed) {
				t.Errorf("%d of the %d bytes of kind %d: %v", n, len(b), m.kind, err)
			}
		}
		if _, err := decode(append(bytes.Clone(b), 0)); !errors.Is(err, errMalformed) {
			t.Errorf("a byte too many: %v", err)
		}
	}
}

// FuzzMessage holds for both ends: they decode with the same code.
func FuzzMessage(f *testing.F) {
	for _, m := range messages {
		f.Add(encode(m))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Errorf("error %v", err)
			}
			return
		}
		again, err := decode(encode(m))
		if err == nil {
			again.size = m.size // numbers may have been written with more bytes than they need
		}
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Errorf("%+v came back as %+v, %v", m, again, err)
		}
	})
}
