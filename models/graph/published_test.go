package graph_test

import (
	"math"
	"path/filepath"
	"testing"

	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/graph"
)

// TestPublished holds the arithmetic of nets against what was published of
// them, in multiplications with an addition each.
func TestPublished(t *testing.T) {
	tests := []struct {
		net    zoo.Net
		macs   float64
		within float64
		source string
	}{
		{zoo.ResNet50(1), 4.09e9, 0.02, "He et al. 2016 have 3.8e9 for the net with strides in its 1x1 convolutions; torchvision has 4.09e9 for that with strides in the 3x3 ones"},
		{zoo.MobileNet(1), 300e6, 0.05, "Sandler et al. 2018, table 4"},
		{zoo.VGG11(1), 7.61e9, 0.02, "torchvision, for configuration A of Simonyan and Zisserman 2015"},
		// By hand: 4 projections, two multiplications with the tokens, and
		// twice the inner layer.
		{zoo.Encoder(1, 16), 6 * (4*16*768*768 + 2*16*16*768 + 2*16*768*3072), 0.02, "Devlin et al. 2019, sizes"},
	}
	for _, tt := range tests {
		path := filepath.Join(t.TempDir(), "model.onnx")
		if err := tt.net.WriteFile(path); err != nil {
			t.Fatal(err)
		}
		g, err := models.ReadGraph(path)
		if err != nil {
			t.Fatal(err)
		}
		c := graph.Estimate(g)
		if got := c.FLOPs.PerRow / 2; math.Abs(got/tt.macs-1) > tt.within || c.FLOPs.Fixed > 0.001*got || len(c.Unknown) > 0 {
			t.Errorf("%s: %.4g for each row and %.4g, unknown %v, want %.4g: %s", tt.net.Name, got, c.FLOPs.Fixed, c.Unknown, tt.macs, tt.source)
		}
		// Weights are read once, however many the rows.
		if w := float64(4 * tt.net.Parameters()); c.Traffic.Fixed < 0.99*w || c.Traffic.Fixed > 1.01*w {
			t.Errorf("%s: a run reads %g bytes once, its weights have %g", tt.net.Name, c.Traffic.Fixed, w)
		}
	}
}
