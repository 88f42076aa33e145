package ort

import "testing"

func TestBatch(t *testing.T) {
	for entry, want := range map[string]bool{
		"digits-size.onnx": true, "types.onnx": true, "gather.onnx": true, "passthrough.onnx": true,
		"add.onnx": false, "chain.onnx": false, "any-rank.onnx": false, "scalars.onnx": false, "constant.onnx": false,
	} {
		if got := openModel(t, entry).Batch(); got != want {
			t.Errorf("%s: %t", entry, got)
		}
	}
}
