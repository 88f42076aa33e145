package profile

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestSample runs a made-up setting until its median is known: of runs that
// vary by so much, within a few percent, and in bounded time.
func TestSample(t *testing.T) {
	tests := []struct {
		name   string
		run    time.Duration
		noise  float64 // standard deviation, relative
		within float64
		most   time.Duration // measured
	}{
		{"short and steady", 10 * time.Microsecond, 0.01, 0.01, 150 * time.Millisecond},
		{"short and noisy", 10 * time.Microsecond, 0.5, 0.05, 300 * time.Millisecond},
		{"middling", 3 * time.Millisecond, 0.1, 0.06, 1100 * time.Millisecond},
		{"long", 400 * time.Millisecond, 0.02, 0.06, 1700 * time.Millisecond},
		{"very long", 3 * time.Second, 0.02, 0.06, 10 * time.Second},
	}
	for _, tt := range tests {
		r := rand.New(rand.NewPCG(1, uint64(tt.run)))
		set := Setting{CPU, 4, 2, 1, false}
		s := NewSample(set, Ready{Run: tt.run * 3, Workspace: 1 << 20}) // the first run is slower
		var wall time.Duration
		for runs := s.Runs(); runs > 0; runs = s.Runs() {
			if slice := time.Duration(runs) * tt.run; slice > SliceTime*3/2 && runs > 1 {
				t.Errorf("%s: %d runs of %v in a slice", tt.name, runs, tt.run)
			}
			var x Slice
			for range runs * set.Instances {
				x.Times = append(x.Times, time.Duration(float64(tt.run)*max(0.2, 1+tt.noise*r.NormFloat64())))
				x.Wall += x.Times[len(x.Times)-1] / 2
			}
			wall += x.Wall
			s.Add(x, 2*x.Wall.Seconds())
		}
		got := s.Result(5 << 20)
		if off := got.P50.Seconds()/tt.run.Seconds() - 1; off > tt.within || off < -tt.within || wall > tt.most {
			t.Errorf("%s: median %v of %v after %v", tt.name, got.P50, tt.run, wall)
		}
		if want := 8 / tt.run.Seconds(); got.RowsPerSecond < want*0.85 || got.RowsPerSecond > want*1.15 {
			t.Errorf("%s: %.1f rows/s, want %.1f", tt.name, got.RowsPerSecond, want)
		}
		if got.P95 < got.P50 || got.P99 < got.P95 || got.Runs < minRuns || got.Peak != 6<<20 {
			t.Errorf("%s: %+v", tt.name, got)
		}
		// Two watts while eight rows take one run's time.
		if want := 2 * tt.run.Seconds() / 8; got.JoulesPerRow < want*0.85 || got.JoulesPerRow > want*1.15 {
			t.Errorf("%s: %g J a row, want %g", tt.name, got.JoulesPerRow, want)
		}
	}
}

func TestSampleWithoutEnergy(t *testing.T) {
	s := NewSample(Setting{CPU, 1, 1, 1, false}, Ready{Run: time.Millisecond})
	for i := range 3 {
		joules := 1.0
		if i == 1 {
			joules = 0 // somebody else computed
		}
		s.Add(Slice{Times: []time.Duration{time.Millisecond}, Wall: time.Millisecond}, joules)
	}
	if r := s.Result(0); r.JoulesPerRow != 0 || r.Peak != 0 {
		t.Errorf("%+v", r)
	}
}
