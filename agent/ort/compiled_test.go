package ort

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// layers is a chain of products with weights, of so many rows and columns
// each.
func layers(n int, width int64) model {
	g := model{Opset: 17,
		Inputs: values{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, width}, Batch: true}}}
	random := rand.New(rand.NewPCG(1, 2))
	last := "x"
	for i := range n {
		w, next := "w"+strconv.Itoa(i), "y"+strconv.Itoa(i)
		data := make([]float32, width*width)
		for j := range data {
			data[j] = random.Float32() / float32(width)
		}
		g.Weights = append(g.Weights, onnxwriter.Weight{Name: w, Type: tensor.Float32, Shape: []int64{width, width}, Data: floats("", nil, data...).Data})
		g.Nodes = append(g.Nodes, onnxwriter.Node{Op: "MatMul", In: []string{last, w}, Out: []string{next}})
		last = next
	}
	g.Outputs = values{{Name: last, Type: tensor.Float32, Shape: []int64{-1, width}, Batch: true}}
	return g
}

// write writes a model into a folder of its own.
func write(t testing.TB, g model) (dir, entry string) {
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "model.onnx"), g.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, "model.onnx"
}

func compileModel(t testing.TB, dir, entry string) string {
	initialise(t)
	out := filepath.Join(t.TempDir(), "model.ort")
	if err := Compile(t.Context(), dir, entry, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func openCompiledModel(t testing.TB, file string, prepack bool) *Session {
	s, err := OpenCompiled(t.Context(), file, Setting{Prepack: prepack})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// rssAnon gives the bytes that are this process's own.
func rssAnon(t testing.TB) int64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

func TestCompiledGivesTheSame(t *testing.T) {
	dir, entry := write(t, layers(3, 64))
	file := compileModel(t, dir, entry)
	plain, err := Open(t.Context(), dir, entry, Setting{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(plain.Close)
	x := floats("x", []int64{2, 64}, make([]float32, 128)...)
	for i := range 128 {
		copy(x.Data[4*i:], floats("", nil, float32(math.Sin(float64(i)))).Data)
	}
	want, err := run(t.Context(), plain, []tensor.Tensor{x}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, prepack := range []bool{false, true} {
		s := openCompiledModel(t, file, prepack)
		if !reflect.DeepEqual(s.Inputs(), plain.Inputs()) || !reflect.DeepEqual(s.Outputs(), plain.Outputs()) || s.Batch() != plain.Batch() {
			t.Errorf("it takes %v and gives %v, batch %v", s.Inputs(), s.Outputs(), s.Batch())
		}
		if info, err := os.Stat(file); err != nil || s.Mapped() != info.Size() {
			t.Errorf("mapped %d bytes of a file of %v, %v", s.Mapped(), info, err)
		}
		got, err := run(t.Context(), s, []tensor.Tensor{x}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 128 {
			a, b := float32At(got[0].Data, i), float32At(want[0].Data, i)
			if math.Abs(float64(a-b)) > 1e-5 {
				t.Fatalf("prepack %v: element %d is %v, want %v", prepack, i, a, b)
			}
		}
	}
	if plain.Mapped() != 0 {
		t.Errorf("a plain session has mapped %d bytes", plain.Mapped())
	}
}

// TestCompiledWeightsStayInTheFile holds what a session takes for itself
// against its weights, and what is left after it against the start.
func TestCompiledWeightsStayInTheFile(t *testing.T) {
	const weights = 16 * 1024 * 1024 * 4
	dir, entry := write(t, layers(16, 1024))
	file := compileModel(t, dir, entry)
	Trim()
	before := rssAnon(t)
	s, err := OpenCompiled(t.Context(), file, Setting{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := run(t.Context(), s, []tensor.Tensor{{Name: "x", Type: tensor.Float32, Shape: []int64{1, 1024}, Data: make([]byte, 4096)}}, nil); err != nil {
		t.Fatal(err)
	}
	Trim()
	if more := rssAnon(t) - before; more > weights/8 {
		t.Errorf("a session of %d bytes of weights took %d of its own", weights, more)
	}
	s.Close()
	s, err = OpenCompiled(t.Context(), file, Setting{Prepack: true})
	if err != nil {
		t.Fatal(err)
	}
	if more := rssAnon(t) - before; more < weights/2 {
		t.Errorf("with prepacking it took %d only: the bound above says nothing", more)
	}
	s.Close()
	if more := rssAnon(t) - before; more > 8<<20 {
		t.Errorf("%d bytes stayed after Close", more)
	}
}

// TestTrimGivesWorkspaceBack runs on large inputs.
func TestTrimGivesWorkspaceBack(t *testing.T) {
	dir, entry := write(t, layers(4, 256))
	s := openCompiledModel(t, compileModel(t, dir, entry), false)
	x := tensor.Tensor{Name: "x", Type: tensor.Float32, Shape: []int64{16 << 10, 256}, Data: make([]byte, 16<<20)}
	Trim()
	before := rssAnon(t)
	for range 3 {
		if err := s.Run(t.Context(), []tensor.Tensor{x}, nil, func([]tensor.Tensor) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if more := rssAnon(t) - before; more < 16<<20 {
		t.Errorf("runs kept %d bytes only: what follows says nothing", more)
	}
	Trim()
	if more := rssAnon(t) - before; more > 8<<20 {
		t.Errorf("%d bytes stayed after Trim", more)
	}
}

func float32At(data []byte, i int) float32 {
	return math.Float32frombits(uint32(data[4*i]) | uint32(data[4*i+1])<<8 | uint32(data[4*i+2])<<16 | uint32(data[4*i+3])<<24)
}

func TestCompileFails(t *testing.T) {
	initialise(t)
	out := filepath.Join(t.TempDir(), "out.ort")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		ctx   context.Context
		entry string
		want  string
	}{
		{t.Context(), "unknown-operator.onnx", "Frobnicate"},
		{t.Context(), "missing.onnx", "missing.onnx"},
		{t.Context(), "../ort.go", "leaves the model's folder"},
		{cancelled, "add.onnx", "canceled"},
	} {
		err := Compile(tt.ctx, "testdata", tt.entry, out)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.entry, err, tt.want)
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%s: it left a file", tt.entry)
		}
	}
}

// TestNotCompilable has weights that a flatbuffer cannot hold, in a file with
// a hole.
func TestNotCompilable(t *testing.T) {
	initialise(t)
	const width = 24 << 10 // squared, 2.4 GB
	g := model{Opset: 17, Inputs: values{float("x", 1, width)}, Outputs: values{float("y", 1, width)},
		Nodes:   nodes{{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"y"}}},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{width, width}, External: "w.bin"}}}
	dir, entry := write(t, g)
	f, err := os.Create(filepath.Join(dir, "w.bin"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(4 * width * width); err != nil {
		t.Fatal(err)
	}
	if err := Compile(t.Context(), dir, entry, filepath.Join(t.TempDir(), "out.ort")); !errors.Is(err, ErrNotCompilable) {
		t.Errorf("got %v", err)
	}
}

func TestOpenCompiledFails(t *testing.T) {
	initialise(t)
	dir := t.TempDir()
	empty, text := filepath.Join(dir, "empty"), filepath.Join(dir, "text")
	for path, content := range map[string][]byte{empty: nil, text: bytes.Repeat([]byte("text"), 1000)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{empty, text, dir, filepath.Join(dir, "missing")} {
		if s, err := OpenCompiled(t.Context(), path, Setting{}); err == nil {
			s.Close()
			t.Errorf("%s opened", path)
		}
	}
}

// TestOutOfMemory asks for an output that no machine has room for.
func TestOutOfMemory(t *testing.T) {
	initialise(t)
	dir, entry := write(t, model{Opset: 17, Inputs: values{float("x", -1, 1), float("y", 1, -1)}, Outputs: values{float("z", -1, -1)},
		Nodes: nodes{{Op: "Add", In: []string{"x", "y"}, Out: []string{"z"}}}})
	s := openCompiledModel(t, compileModel(t, dir, entry), false)
	const n = 4 << 20 // squared, 64 TiB
	in := []tensor.Tensor{
		{Name: "x", Type: tensor.Float32, Shape: []int64{n, 1}, Data: make([]byte, 4*n)},
		{Name: "y", Type: tensor.Float32, Shape: []int64{1, n}, Data: make([]byte, 4*n)},
	}
	_, err := run(t.Context(), s, in, nil)
	if !IsOutOfMemory(err) {
		t.Fatalf("got %v", err)
	}
	t.Log(err)
	small := []tensor.Tensor{floats("x", []int64{1, 1}, 1), floats("y", []int64{1, 1}, 2)}
	if out, err := run(t.Context(), s, small, nil); err != nil || float32At(out[0].Data, 0) != 3 {
		t.Errorf("after it: %v, %v", out, err)
	}
	if _, err := run(t.Context(), s, small[:1], nil); err == nil || IsOutOfMemory(err) {
		t.Errorf("a missing input gave %v", err)
	}
}
