package engine

import (
	"encoding/binary"
	"math"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/sketch"
	"github.com/dunlin/dunlin/models/tensor"
)

func floats(name string, classes int, values ...float32) tensor.Tensor {
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: []int64{int64(len(values) / classes), int64(classes)}}
	for _, v := range values {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(v))
	}
	return t
}

func TestConfidenceOutput(t *testing.T) {
	out := func(name string, typ tensor.Type, shape ...int64) tensor.Info {
		return tensor.Info{Name: name, Type: typ, Shape: shape}
	}
	label := map[string][]string{"scores": {"a", "b"}}
	for _, tt := range []struct {
		name string
		info Info
		want string
	}{
		{"one", Info{Outputs: []tensor.Info{out("y", tensor.Float32, -1, 10)}}, "y"},
		{"open classes", Info{Outputs: []tensor.Info{out("y", tensor.Float16, -1, -1)}}, "y"},
		{"one beside a text", Info{Outputs: []tensor.Info{out("class", tensor.String, -1, 2), out("y", tensor.Float32, 1, 2)}}, "y"},
		{"two", Info{Outputs: []tensor.Info{out("boxes", tensor.Float32, -1, 4), out("scores", tensor.Float32, -1, 2)}}, ""},
		{"two, one with labels", Info{Outputs: []tensor.Info{out("boxes", tensor.Float32, -1, 4), out("scores", tensor.Float32, -1, 2)}, Labels: label}, "scores"},
		{"one value", Info{Outputs: []tensor.Info{out("y", tensor.Float32, -1, 1)}}, ""},
		{"three dimensions", Info{Outputs: []tensor.Info{out("y", tensor.Float32, -1, 3, 3)}}, ""},
		{"too many classes", Info{Outputs: []tensor.Info{out("y", tensor.Float32, -1, maxClasses+1)}}, ""},
		{"double", Info{Outputs: []tensor.Info{out("y", tensor.Float64, -1, 3)}}, ""},
	} {
		got := ""
		if c := newConfidence(&tt.info); c != nil {
			got = c.output
		}
		if got != tt.want {
			t.Errorf("%s: looks at %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestLargest(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	for _, tt := range []struct {
		row  []float32
		want float64
	}{
		{[]float32{0.25, 0.7, 0.05}, 0.7},
		{[]float32{0, 0, 1.00001}, 1},
		{[]float32{0, 0, 0, 0}, 0.25}, // logits
		{[]float32{1000, 1000 + float32(math.Ln2), -1000}, 2. / 3},
		{[]float32{-3, -3}, 0.5},
		{[]float32{1.5, -0.5}, 1 / (1 + math.Exp(-2))}, // of the sum 1, and no probabilities
		{[]float32{0.5, nan}, 0},
		{[]float32{0.5, inf}, 0},
		{[]float32{-inf, 0}, 1},
	} {
		row := floats("y", len(tt.row), tt.row...)
		if got := largest(tensor.Float32, row.Data); math.Abs(got-tt.want) > 1e-4 {
			t.Errorf("%v: %v, want %v", tt.row, got, tt.want)
		}
	}
	if got := largest(tensor.Float16, []byte{0, 0x38, 0, 0x38}); got != 0.5 {
		t.Errorf("two halves: %v", got)
	}
}

func TestConfidenceRate(t *testing.T) {
	c := &confidence{output: "y"}
	now := time.Unix(1e9, 0)
	outputs := [][]tensor.Tensor{{floats("x", 2, 0, 0), floats("y", 2, 0.1, 0.9, 0.5, 0.5)}}
	for range 500 {
		c.look(outputs, now)
	}
	got := c.snapshot()
	if got.Sum() != confidenceRows || got[17] != confidenceRows/2 || got[9] != confidenceRows/2 {
		t.Errorf("in one second: %v", got)
	}
	c.look(outputs, now.Add(time.Second))
	if got := c.snapshot(); got.Sum() != confidenceRows+2 {
		t.Errorf("in the next: %v", got)
	}
	// What does not hold what it says is left out.
	short := floats("y", 2, 0.1, 0.9)
	short.Shape = []int64{1 << 40, 2}
	odd := tensor.Tensor{Name: "y", Type: tensor.String, Shape: []int64{1, 2}, Data: make([]byte, 8)}
	c.look([][]tensor.Tensor{{short}, {odd}, {{Name: "y", Type: tensor.Float32, Shape: []int64{-5, 2}}}}, now.Add(2*time.Second))
	if got := c.snapshot(); got.Sum() != confidenceRows+2 {
		t.Errorf("after what cannot be read: %v", got)
	}
	if (*confidence)(nil).snapshot() != nil {
		t.Error("nothing counts something")
	}
	if len(got) != sketch.Confidence.Buckets() {
		t.Errorf("%d buckets", len(got))
	}
}

// What is recorded of each answered request, and of a run's outputs.
func BenchmarkRecord(b *testing.B) {
	f := newFigures()
	r := &request{run: &run{outcome: Outcome{Infer: time.Millisecond}}}
	b.Run("latency", func(b *testing.B) {
		b.ReportAllocs()
		took := moment(0)
		for b.Loop() {
			took = (took + 12345) & (1<<24 - 1)
			f.Latency[sketch.LatencyBucket(took)]++
		}
	})
	b.Run("answered", func(b *testing.B) {
		b.ReportAllocs()
		now := moment(0)
		for b.Loop() {
			now = (now + 12345) & (1<<24 - 1)
			f.answered(r, now)
		}
	})
	c := &confidence{output: "y"}
	outputs := [][]tensor.Tensor{{floats("y", 10, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)}}
	b.Run("confidence", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c.left = 1
			c.look(outputs, time.Unix(0, 0))
		}
	})
	b.Run("confidence over its rate", func(b *testing.B) {
		b.ReportAllocs()
		now := time.Now()
		for b.Loop() {
			c.look(outputs, now)
		}
	})
}
