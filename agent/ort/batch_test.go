package ort

import "testing"

func TestIsBatch(t *testing.T) {
	for _, tt := range []struct {
		tensors [][]string
		want    bool
	}{
		{[][]string{{"batch", ""}, {"batch"}}, true},
		{[][]string{{"N", "h", "w"}, {"N", "classes"}}, true},
		{[][]string{{"Batch_size"}, {"Batch_size"}}, true},
		{[][]string{{"bs", ""}}, true},
		{[][]string{{"b"}}, true},
		{[][]string{{"BSZ"}}, true},
		{[][]string{{"batch"}, {"Batch"}}, false},
		{[][]string{{"batch"}, {"n"}}, false},
		{[][]string{{"batch"}, {""}}, false},
		{[][]string{{"batch"}, {}}, false},
		{[][]string{{}, {}}, false},
		{[][]string{{""}, {""}}, false},
		{[][]string{{"seq"}, {"seq"}}, false},
		{[][]string{{"nodes"}, {"nodes"}}, false},
		{[][]string{{"unk__0"}, {"unk__0"}}, false},
		{[][]string{{"n", "n"}, {"n"}}, false},
		{[][]string{{"n"}, {"n", "c", "n"}}, false},
	} {
		if got := isBatch(tt.tensors); got != tt.want {
			t.Errorf("%q: %t", tt.tensors, got)
		}
	}
}

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
