package engine

import (
	"errors"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// load is what became of a stream of requests that all have one deadline.
type load struct {
	good    int // answered in time
	refused int // on arrival
	late    int // given up after that, without having run
	missed  int // ran, and were not answered in time
}

// offer lets requests of one row come at random, rate in a second, until the
// given time. Their callers give up at the deadline.
func offer(s *simulation, random *rand.Rand, rate float64, deadline, until time.Duration) *load {
	l := new(load)
	s.answered = func(r *request) {
		arrived := r.deadline.Sub(start) - deadline
		_, refused := errors.AsType[*RefusedError](r.err)
		switch {
		case r.err == nil && s.now <= arrived+deadline:
			l.good++
		case refused && s.now == arrived:
			l.refused++
		case r.run == nil:
			l.late++
		default:
			l.missed++
		}
	}
	for at := time.Duration(0); at < until; at += time.Duration(random.ExpFloat64() / rate * 1e9) {
		s.arrive(at, &request{
			id: one, rows: 1, size: 600e3, inputs: []tensor.Tensor{{Shape: []int64{1, 3, 224, 224}}}, deadline: start.Add(at + deadline),
		})
	}
	s.run(until + time.Minute)
	return l
}

// TestOverload offers three times what a version can do for 30 s, from idle.
// Run times vary, and some are much longer.
func TestOverload(t *testing.T) {
	batching := serving.Options{MaxBatchSize: 16, DynamicBatching: true}
	for _, tt := range []struct {
		name             string
		options          serving.Options
		fixed, each      float64 // milliseconds of a run and of each of its rows
		jitter           float64 // standard deviation of the logarithm
		slow, by         float64 // how many runs are slow, and by what factor
		cold             float64 // factor of the first run
		change           float64 // factor of the second half
		deadline         time.Duration
		goodput          float64 // at least
		missed, lateness float64 // at most, of the good and of the refused
	}{
		// ResNet-50 on one core, which gains nothing from batching.
		{"resnet50", serving.Options{}, 2, 60, 0.05, 0.005, 2, 1, 1, 500 * time.Millisecond, 0.95, 0, 0.005},
		{"resnet50 batched", batching, 2, 60, 0.05, 0.005, 2, 1, 1, 500 * time.Millisecond, 0.95, 0, 0.005},
		{"resnet50 cold", batching, 2, 60, 0.05, 0.005, 2, 12, 1, 500 * time.Millisecond, 0.9, 0.005, 0.04},
		{"resnet50, the core is shared from half time", batching, 2, 60, 0.05, 0.005, 2, 1, 1.7, 500 * time.Millisecond, 0.95, 0.01, 0.01},
		{"resnet50 on two", serving.Options{Instances: 2}, 2, 60, 0.05, 0.005, 2, 1, 1, 500 * time.Millisecond, 0.95, 0.001, 0.005},
		{"wide jitter", serving.Options{}, 0, 40, 0.15, 0.01, 3, 1, 1, 500 * time.Millisecond, 0.95, 0.004, 0.01},
		{"many slow runs", serving.Options{}, 0, 40, 0.1, 0.02, 5, 1, 1, 500 * time.Millisecond, 0.9, 0.01, 0.02},
		// What gains most from batching.
		{"accelerator", batching, 30, 1, 0.1, 0.01, 3, 1, 1, 500 * time.Millisecond, 0.95, 0.002, 0.01},
		{"half is fixed", batching, 20, 20, 0.1, 0.01, 3, 1, 1, 500 * time.Millisecond, 0.85, 0.02, 0.02},
		// Slow runs cannot be in time; capacity is what no deadline would allow.
		{"tight", serving.Options{}, 0, 40, 0.1, 0.01, 3, 1, 1, 120 * time.Millisecond, 0.9, 0.025, 0.02},
		{"tight accelerator", batching, 30, 1, 0.1, 0.01, 3, 1, 1, 120 * time.Millisecond, 0.7, 0.025, 0.02},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(5) {
				random := rand.New(rand.NewPCG(seed, 1))
				runs := 0
				const until = 30 * time.Second
				var s *simulation
				s = newSimulation(t, tt.options, func(r *run) time.Duration {
					ms := (tt.fixed + tt.each*float64(r.rows)) * math.Exp(tt.jitter*random.NormFloat64())
					if random.Float64() < tt.slow {
						ms *= tt.by
					}
					if runs++; runs == 1 {
						ms *= tt.cold
					}
					if s.now > until/2 {
						ms *= tt.change
					}
					return time.Duration(ms * 1e6)
				})
				rows := float64(max(tt.options.MaxBatchSize, 1))
				mean := (tt.fixed/rows + tt.each) / 1000 * math.Exp(tt.jitter*tt.jitter/2) * (1 + tt.slow*(tt.by-1))
				capacity := float64(max(tt.options.Instances, 1)) / mean // rows in a second
				l := offer(s, random, 3*capacity, tt.deadline, until)
				possible := capacity * until.Seconds() * (1 + 1/tt.change) / 2
				goodput := float64(l.good) / possible
				missed := float64(l.missed) / float64(l.good)
				lateness := float64(l.late) / float64(l.late+l.refused)
				t.Logf("seed %d: goodput %.3f of capacity, %+v, %.2f rows in a run", seed, goodput, *l, float64(s.core.versions[one].figures.Inferences)/float64(runs))
				if goodput < tt.goodput || missed > tt.missed || lateness > tt.lateness {
					t.Errorf("seed %d: goodput %.3f, at least %.3f expected; missed %.4f, at most %.4f; late refusals %.4f, at most %.4f",
						seed, goodput, tt.goodput, missed, tt.missed, lateness, tt.lateness)
				}
			}
		})
	}
}

// TestModerateLoad offers two thirds of what a version can do: few are refused.
func TestModerateLoad(t *testing.T) {
	for seed := range uint64(8) {
		random := rand.New(rand.NewPCG(seed, 2))
		s := newSimulation(t, serving.Options{}, func(*run) time.Duration {
			return time.Duration(40e6 * math.Exp(0.05*random.NormFloat64()))
		})
		l := offer(s, random, 2/0.04/3, 500*time.Millisecond, time.Minute)
		t.Logf("seed %d: %+v", seed, *l)
		if l.missed+l.late > 0 || l.refused*100 > l.good {
			t.Errorf("seed %d: %+v", seed, *l)
		}
	}
}
