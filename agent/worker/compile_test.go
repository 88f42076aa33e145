package worker

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// written writes a model into a folder of its own.
func written(t testing.TB, g onnxwriter.Model) engine.Spec {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "model.onnx"), g.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	return engine.Spec{ID: engine.VersionID{Model: "model", Version: 1}, Dir: dir, Entry: "model.onnx"}
}

func TestCompile(t *testing.T) {
	cfg := testConfig(t, "")
	for _, s := range []engine.Spec{spec(t, "add.onnx"), spec(t, "types.onnx"), spec(t, "scalars.onnx"), spec(t, "any-rank.onnx"), spec(t, "gather.onnx"), written(t, zoo.MLP(1).Model)} {
		out := filepath.Join(t.TempDir(), "model.ort")
		c, err := Compile(t.Context(), cfg, s, out)
		if err != nil {
			t.Error(err)
			continue
		}
		t.Logf("%s: %+v, speedup %.2f %s", s.Entry, c.Need, c.Speedup, c.Unmeasured)
		checked, err := Check(t.Context(), cfg, s)
		if err != nil {
			t.Fatal(err)
		}
		c.Info.LoadTime, checked.LoadTime = 0, 0
		if !reflect.DeepEqual(c.Info, checked) {
			t.Errorf("%s: compiled, it is %+v, and %+v when checked", s.Entry, c.Info, checked)
		}
		info, err := os.Stat(out)
		if err != nil {
			t.Fatal(err)
		}
		if !c.Need.Measured || c.Need.Weights != info.Size() || c.Speedup <= 0 {
			t.Errorf("%s: a file of %d bytes, and %+v", s.Entry, info.Size(), c)
		}
	}
}

// TestCompileMeasures holds figures against what is known of a model.
func TestCompileMeasures(t *testing.T) {
	const width, layers = 1024, 6
	g := onnxwriter.Model{Opset: 17}
	last, random := "x", rand.New(rand.NewPCG(1, 1))
	value := func(name string) []onnxwriter.Value {
		return []onnxwriter.Value{{Name: name, Type: tensor.Float32, Shape: []int64{-1, 64, width}, Batch: true}}
	}
	g.Inputs = value("x")
	for i := range layers {
		w, next := fmt.Sprint("w", i), fmt.Sprint("y", i)
		g.Weights = append(g.Weights, onnxwriter.Weight{Name: w, Type: tensor.Float32, Shape: []int64{width, width}, Data: elements(random, tensor.Float32, width*width, 0)})
		g.Nodes = append(g.Nodes, onnxwriter.Node{Op: "MatMul", In: []string{last, w}, Out: []string{next}})
		last = next
	}
	g.Outputs = value(last)
	c, err := Compile(t.Context(), testConfig(t, ""), written(t, g), filepath.Join(t.TempDir(), "model.ort"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v, speedup %.2f", c.Need, c.Speedup)
	const weights, row = layers * 4 * width * width, 4 * 64 * width
	if c.Need.Weights < weights || c.Need.Weights > weights+1<<20 {
		t.Errorf("weights %d, want %d", c.Need.Weights, weights)
	}
	if c.Need.Session > weights/8 {
		t.Errorf("a mapped session takes %d", c.Need.Session)
	}
	if c.Prepack != (c.Need.Prepacked > 0) || c.Prepack && c.Need.Prepacked < weights/2 {
		t.Errorf("prepack %v takes %d", c.Prepack, c.Need.Prepacked)
	}
	if c.Need.Workspace < row || c.Need.Workspace > 32*row {
		t.Errorf("a row of %d bytes takes %d", row, c.Need.Workspace)
	}
}

func TestCompileFails(t *testing.T) {
	cfg := testConfig(t, "")
	out := filepath.Join(t.TempDir(), "model.ort")
	fails := func(cfg Config, s engine.Spec, want string) error {
		t.Helper()
		_, err := Compile(t.Context(), cfg, s, out)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", s.Entry, err, want)
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%s: it left a file", s.Entry)
		}
		return err
	}
	fails(cfg, spec(t, "unknown-operator.onnx"), "Frobnicate")
	var death *DeathError
	if err := fails(testConfig(t, "fault-on-load"), spec(t, "add.onnx"), "segmentation fault"); !errors.As(err, &death) {
		t.Errorf("got %v", err)
	}
	// Weights beyond a flatbuffer, in a file with a hole.
	const width = 24 << 10
	s := written(t, onnxwriter.Model{Opset: 17,
		Inputs:  []onnxwriter.Value{onnxwriter.Float("x", 1, width)},
		Outputs: []onnxwriter.Value{onnxwriter.Float("y", 1, width)},
		Nodes:   []onnxwriter.Node{{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"y"}}},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{width, width}, External: "w.bin"}}})
	if err := os.WriteFile(filepath.Join(s.Dir, "w.bin"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(s.Dir, "w.bin"), 4*width*width); err != nil {
		t.Fatal(err)
	}
	if err := fails(cfg, s, "cannot be compiled"); !errors.Is(err, ort.ErrNotCompilable) {
		t.Errorf("got %v", err)
	}
	// More than the child may have.
	large := written(t, onnxwriter.Model{Opset: 17,
		Inputs:  []onnxwriter.Value{onnxwriter.Float("x", 1)},
		Outputs: []onnxwriter.Value{onnxwriter.Float("y", 16<<10, 16<<10)},
		Nodes:   []onnxwriter.Node{{Op: "Expand", In: []string{"x", "shape"}, Out: []string{"y"}}},
		Weights: []onnxwriter.Weight{{Name: "shape", Type: tensor.Int64, Shape: []int64{2}, Data: []byte{0, 64, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0}}}})
	cfg.CheckMemory = func() int64 { return 300 << 20 }
	if err := fails(cfg, large, "out of memory"); !errors.Is(err, engine.ErrOutOfMemory) {
		t.Errorf("got %v", err)
	}
}

// TestUnmeasured has a model that takes no made-up input.
func TestUnmeasured(t *testing.T) {
	s := written(t, onnxwriter.Model{Opset: 17,
		Inputs:  []onnxwriter.Value{onnxwriter.Float("x", -1)},
		Outputs: []onnxwriter.Value{onnxwriter.Float("y", 2, 3)},
		Nodes:   []onnxwriter.Node{{Op: "Reshape", In: []string{"x", "shape"}, Out: []string{"y"}}},
		Weights: []onnxwriter.Weight{{Name: "shape", Type: tensor.Int64, Shape: []int64{2}, Data: []byte{2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0}}}})
	c, err := Compile(t.Context(), testConfig(t, ""), s, filepath.Join(t.TempDir(), "model.ort"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Need.Measured || c.Unmeasured == "" || c.Need.Workspace < estimatedWorkspace {
		t.Errorf("got %+v", c)
	}
}

// TestIdleChildGivesWorkspaceBack runs a burst and waits until the child has
// as little of its own as before.
func TestIdleChildGivesWorkspaceBack(t *testing.T) {
	w := start(t, testConfig(t, ""))
	s := written(t, onnxwriter.Model{Opset: 17,
		Inputs:  []onnxwriter.Value{onnxwriter.Float("x", -1)},
		Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1)},
		Nodes: []onnxwriter.Node{{Op: "Expand", In: []string{"x", "shape"}, Out: []string{"big"}}, {Op: "Sin", In: []string{"big"}, Out: []string{"sin"}},
			{Op: "ReduceSum", In: []string{"sin"}, Out: []string{"y"}}},
		Weights: []onnxwriter.Weight{{Name: "shape", Type: tensor.Int64, Shape: []int64{1}, Data: []byte{0, 0, 0, 4, 0, 0, 0, 0}}}})
	activate(t, w, s)
	p, err := w.acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := rssAnon(t, p.command.Process.Pid)
	for range 3 {
		o, err := w.Run(t.Context(), s.ID, [][]tensor.Tensor{{{Name: "x", Type: tensor.Float32, Shape: []int64{1}, Data: make([]byte, 4)}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if o.Release != nil {
			o.Release()
		}
	}
	burst := rssAnon(t, p.command.Process.Pid)
	if burst < before+100<<20 {
		t.Fatalf("the burst took %d bytes only: what follows says nothing", burst-before)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for now := burst; now > before+8<<20; now = rssAnon(t, p.command.Process.Pid) {
		if time.Since(began) > 5*time.Second {
			t.Fatalf("%d bytes before, %d after the burst, %d 5 s later", before, burst, now)
		}
		<-tick.C
	}
	t.Logf("%d MB came back after %v", (burst-before)>>20, time.Since(began))
}

// rssAnon gives the bytes that are a process's own.
func rssAnon(t testing.TB, pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	var kb int64
	if _, err := fmt.Sscan(rest, &kb); err != nil {
		t.Fatal(err)
	}
	return kb << 10
}
