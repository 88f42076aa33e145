package repository

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/models/examples/digits"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// A cascade over the digits, with the bound that was chosen on the training
// images, keeps 99 % of the large model's accuracy on the held-out ones, and
// has the small one answer 60 % of them.
func TestDigitsCascade(t *testing.T) {
	s := startSystem(t, Config{Control: Explicit, Startup: []string{"small", "large"}})
	for model, file := range map[string]string{"small": "v1.onnx", "large": "v2.onnx"} {
		b, err := digits.Models.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(s.dir, model, "1")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "model.onnx"), b, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := s.Load(t.Context(), model, oip.Override{}); err != nil {
			t.Fatal(err)
		}
	}
	s.front.SetRoutes("g", []*dunlinv1.DesiredRoute{{
		Name: "digits", Targets: []*dunlinv1.RouteTarget{{Model: "small", Weight: 1}},
		Cascade: &dunlinv1.RouteCascade{Model: "large", When: fmt.Sprintf("max(output) < %v", digits.CascadeBound)},
	}}, nil)
	images, labels := digits.HeldOut()
	ask := func(model string, i int) (right bool, outcome string) {
		t.Helper()
		in := tensor.Tensor{Name: "image", Type: tensor.Float32, Shape: []int64{1, 1, 8, 8}}
		for _, x := range images[i] {
			in.Data = binary.LittleEndian.AppendUint32(in.Data, math.Float32bits(x))
		}
		a, err := s.front.Infer(t.Context(), oip.Call{Model: model, Inputs: []tensor.Tensor{in}, Outputs: []string{"label"}})
		if err != nil {
			t.Fatal(err)
		}
		if a.Release != nil {
			defer a.Release()
		}
		if len(a.Outputs) != 1 || a.Outputs[0].Name != "label" {
			t.Fatalf("outputs %v", a.Outputs)
		}
		return int(a.Outputs[0].Type.Number(a.Outputs[0].Data)) == labels[i], a.Header[serve.HeaderCascade]
	}
	var large, both, small int
	for i := range images {
		if right, _ := ask("large", i); right {
			large++
		}
		right, outcome := ask("digits", i)
		if right {
			both++
		}
		switch outcome {
		case "small":
			small++
		case "large":
		default:
			t.Fatalf("image %d: the cascade's outcome is %q", i, outcome)
		}
	}
	ratio, share := float64(both)/float64(large), float64(small)/float64(len(images))
	t.Logf("the large model has %d of %d right, the cascade %d: %.4f of it; the small model answers %.4f", large, len(images), both, ratio, share)
	if ratio < 0.99 || share < 0.6 {
		t.Errorf("the cascade has %.4f of the large model's accuracy, want 0.99; the small model answers %.4f, want 0.6", ratio, share)
	}
}
