package zoo

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// Published counts of parameters: of ResNet-50, MobileNetV2 and VGG-11 those
// that torchvision lists, of an encoder layer that of BERT base. Folding
// leaves one number of each channel's batch normalisation instead of two.
const (
	resnet50     = 25_557_032
	resnet50BN   = 26_560 // channels with batch normalisation
	mobilenetV2  = 3_504_872
	mobilenetBN  = 17_056
	vgg11        = 132_863_336
	encoderLayer = 7_087_872
)

func TestParameters(t *testing.T) {
	want := map[string]int64{
		"mlp":       64*64 + 64 + 64*64 + 64 + 64*10 + 10,
		"mobilenet": mobilenetV2 - mobilenetBN,
		"resnet50":  resnet50 - resnet50BN,
		"encoder":   6 * encoderLayer,
		"vgg11":     vgg11,
	}
	for _, n := range Nets(1) {
		if n.Parameters() != want[n.Name] {
			t.Errorf("%s has %d parameters, published are %d", n.Name, n.Parameters(), want[n.Name])
		}
		delete(want, n.Name)
	}
	if len(want) > 0 {
		t.Errorf("there are no nets %v", want)
	}
}

// TestSameBytes holds what a seed gives against what it gave when results
// were recorded with it.
func TestSameBytes(t *testing.T) {
	want := map[string]string{
		"mlp":       "26651da725796db0db07681851720b3d8fb83d5be47567b3c8b445b9b83e20ee",
		"mobilenet": "583ab9fb2237752eb038b894de937d7cfb7cfd12f908413cbf9e34f766cf17ee",
	}
	for _, n := range Nets(1) {
		if want[n.Name] == "" {
			continue
		}
		sum := sha256.New()
		if err := n.Model.Encode(sum); err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(sum.Sum(nil)); got != want[n.Name] {
			t.Errorf("%s: SHA-256 %s, want %s", n.Name, got, want[n.Name])
		}
		delete(want, n.Name)
	}
	if len(want) > 0 {
		t.Errorf("there are no nets %v", want)
	}
	a, b := MLP(1), MLP(2)
	if string(a.Model.Marshal()) == string(b.Model.Marshal()) {
		t.Error("two seeds give the same bytes")
	}
}

// TestEncodeNeedsLittleMemory writes 531 MB.
func TestEncodeNeedsLittleMemory(t *testing.T) {
	const limit = 4 << 20
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := VGG11(1).Model.Encode(io.Discard); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > limit {
		t.Errorf("allocated %d bytes, want at most %d", got, limit)
	}
}

func TestRefusesWrongFill(t *testing.T) {
	for _, size := range []int{3, 5} {
		g := newGraph(1, []int64{1}, []int64{1})
		g.op("Add", "input", g.same(1, 1))
		g.model.Weights[0].Fill = func(w io.Writer) error { _, err := w.Write(make([]byte, size)); return err }
		if err := g.model.Encode(io.Discard); err == nil {
			t.Errorf("a weight of 4 bytes was filled with %d, without an error", size)
		}
	}
	broken := errors.New("broken")
	m := onnxwriter.Model{Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{1},
		Fill: func(io.Writer) error { return broken }}}}
	if err := m.Encode(io.Discard); !errors.Is(err, broken) {
		t.Errorf("error %v, want the one of Fill", err)
	}
}

// TestRun runs each net on two random items, together and alone.
func TestRun(t *testing.T) {
	if err := ort.Init(library(t), 0); err != nil {
		t.Fatal(err)
	}
	for _, n := range Nets(1) {
		t.Run(n.Name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "model.onnx")
			if err := n.WriteFile(path); err != nil {
				t.Fatal(err)
			}
			graph, err := models.Inspect(path)
			if err != nil {
				t.Fatal(err)
			}
			if got, least := graph.WeightBytes, uint64(4*n.Parameters()); got < least || got > least+4096 {
				t.Errorf("the file has %d bytes of weights, the net %d", got, least)
			}
			s, err := ort.Open(t.Context(), dir, "model.onnx", ort.Setting{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			const seed = 7
			rng := rand.New(rand.NewPCG(seed, 0))
			size := -int(elements(n.Input().Shape))
			in := make([]float32, 2*size)
			for i := range in {
				in[i] = float32(rng.NormFloat64())
			}
			both := run(t, s, n, in)
			outputs := -int(elements(n.Output().Shape))
			if len(both) != 2*outputs {
				t.Fatalf("%d outputs, want %d", len(both), 2*outputs)
			}
			for item := range 2 {
				part := both[item*outputs:][:outputs]
				alone := run(t, s, n, in[item*size:][:size])
				largest := checkSpread(t, part)
				if d := distance(part, alone); d > 1e-4*largest {
					t.Errorf("item %d: alone it gives other values, by up to %g of %g", item, d, largest)
				}
			}
			if d := distance(both[:outputs], both[outputs:]); d < 1e-3 {
				t.Errorf("two inputs differ in the output by at most %g", d)
			}
		})
	}
}

func run(t *testing.T, s *ort.Session, n Net, in []float32) (out []float32) {
	t.Helper()
	shape := slices.Clone(n.Input().Shape)
	shape[0] = int64(len(in)) / -elements(shape)
	x := tensor.Tensor{Name: n.Input().Name, Type: tensor.Float32, Shape: shape}
	for _, v := range in {
		x.Data = binary.LittleEndian.AppendUint32(x.Data, math.Float32bits(v))
	}
	err := s.Run(t.Context(), []tensor.Tensor{x}, []string{n.Output().Name}, func(all []tensor.Tensor) error {
		for b := all[0].Data; len(b) > 0; b = b[4:] {
			out = append(out, math.Float32frombits(binary.LittleEndian.Uint32(b)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// checkSpread wants finite values of a sensible size that are not all alike,
// and gives the largest.
func checkSpread(t *testing.T, values []float32) float64 {
	t.Helper()
	var largest, sum, squares float64
	for _, v := range values {
		x := float64(v)
		if math.IsNaN(x) || math.IsInf(x, 0) {
			t.Fatalf("the output has the value %g", x)
		}
		largest = max(largest, math.Abs(x))
		sum, squares = sum+x, squares+x*x
	}
	mean := sum / float64(len(values))
	deviation := math.Sqrt(squares/float64(len(values)) - mean*mean)
	if deviation < 1e-3 || largest > 1e4 {
		t.Errorf("the output deviates by %g around %g, its largest value is %g", deviation, mean, largest)
	}
	t.Logf("mean %.3g, deviation %.3g, largest %.3g", mean, deviation, largest)
	return largest
}

// distance gives the largest difference of two elements.
func distance(a, b []float32) (d float64) {
	for i := range a {
		d = max(d, math.Abs(float64(a[i])-float64(b[i])))
	}
	return d
}

// library finds ONNX Runtime.
func library(t *testing.T) string {
	if lib := os.Getenv("DUNLIN_ORT_LIB"); lib != "" {
		return lib
	}
	found, _ := filepath.Glob("../../.cache/onnxruntime/libonnxruntime.so.*")
	if len(found) == 0 {
		t.Fatal("ONNX Runtime is not there: run make runtime")
	}
	lib, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return lib
}
