package estimate

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models"
)

func TestMemory(t *testing.T) {
	c := models.Costs{Workspace: models.Linear{Fixed: 1000, PerRow: 100.5}, Nodes: 10}
	n := Memory(5000, c, 4)
	if n.Weights != 5000 || n.Workspace != 1402 || n.Session < 1<<20 || n.Peak() != n.Weights+n.Session+n.Workspace {
		t.Errorf("%+v", n)
	}
	if Memory(5000, c, 0) != Memory(5000, c, 1) {
		t.Error("no rows are not one")
	}
	// What nobody can have does not overflow.
	if p := Memory(math.MaxUint64, models.Costs{Workspace: models.Linear{PerRow: 1e18}}, math.MaxInt32).Peak(); p < math.MaxInt64/2 {
		t.Errorf("peak %d", p)
	}
}

func TestRunTime(t *testing.T) {
	c := models.Costs{FLOPs: models.Linear{PerRow: 2e9}, Traffic: models.Linear{Fixed: 1e8, PerRow: 1e6}}
	h := Hardware{FP32GFLOPS: 100, MemoryGBPerSecond: 2, Overhead: time.Millisecond, ActiveWatts: 5}
	tests := []struct {
		name string
		c    models.Costs
		rows int
		h    Hardware
		want time.Duration
	}{
		{"memory bound", c, 1, h, 51500 * time.Microsecond}, // 20 ms of arithmetic, 50.5 of traffic
		{"compute bound", c, 8, h, 161 * time.Millisecond},  // 160 and 54
		{"no rows", c, 0, h, 51500 * time.Microsecond},
		{"no arithmetic known", c, 1, Hardware{MemoryGBPerSecond: 2}, 0},
		{"no bandwidth known", c, 1, Hardware{FP32GFLOPS: 100}, 0},
		{"no costs known", models.Costs{}, 1, h, 0},
		{"nonsense", c, 1, Hardware{FP32GFLOPS: math.NaN(), MemoryGBPerSecond: 2}, 0},
	}
	for _, tt := range tests {
		if got := RunTime(tt.c, tt.rows, tt.h); got.Round(time.Microsecond) != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if j := Energy(2*time.Second, h); j != 10 {
		t.Errorf("%g J", j)
	}
	if j := Energy(2*time.Second, Hardware{}); j != 0 {
		t.Errorf("%g J of unknown power", j)
	}
}

// TestMoreNeverTakesLess has figures grow with rows, and with slower hardware.
func TestMoreNeverTakesLess(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		amount := rapid.Float64Range(0, 1e18)
		line := func(name string) models.Linear {
			return models.Linear{Fixed: amount.Draw(t, name), PerRow: amount.Draw(t, name+" per row")}
		}
		c := models.Costs{Workspace: line("workspace"), FLOPs: line("flops"), Traffic: line("traffic"), Nodes: rapid.IntRange(0, 1<<20).Draw(t, "nodes")}
		weights := rapid.Uint64().Draw(t, "weights")
		h := Hardware{FP32GFLOPS: rapid.Float64Range(1e-3, 1e6).Draw(t, "gflops"), MemoryGBPerSecond: rapid.Float64Range(1e-3, 1e4).Draw(t, "bandwidth"), ActiveWatts: 10}
		rows := rapid.IntRange(0, 1<<20).Draw(t, "rows")
		more := rows + rapid.IntRange(0, 1<<20).Draw(t, "more")
		a, b := Memory(weights, c, rows), Memory(weights, c, more)
		if b.Workspace < a.Workspace || b.Peak() < a.Peak() || a.Peak() < a.Workspace || a.Peak() < 0 {
			t.Errorf("%d rows take %+v, %d take %+v", rows, a, more, b)
		}
		slow := h
		slow.FP32GFLOPS /= 2
		for _, pair := range [][2]time.Duration{{RunTime(c, rows, h), RunTime(c, more, h)}, {RunTime(c, rows, h), RunTime(c, rows, slow)}} {
			if pair[1] < pair[0] || pair[0] < 0 || Energy(pair[1], h) < Energy(pair[0], h) {
				t.Errorf("run times %v", pair)
			}
		}
	})
}
