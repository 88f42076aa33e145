package profile

import (
	"math"
	"slices"
	"time"
)

// How often a setting is run.
const (
	// SliceTime is how long a slice takes at most, unless one run takes longer.
	SliceTime = 50 * time.Millisecond
	// minRuns, minSlices and minTime are what a result rests on at least, and
	// maxTime is when it is as good as it gets.
	minRuns   = 3
	minSlices = 3
	minTime   = 90 * time.Millisecond
	maxTime   = 500 * time.Millisecond
	// spread is how far apart, relative to it, the bounds of the median run may
	// be, and drift how far apart the quartiles of the slices: where they are,
	// somebody else computes, and it takes longer to see through that.
	spread = 0.03
	drift  = 0.06
)

// Sample is what is known of one setting so far.
type Sample struct {
	set       Setting
	run       time.Duration // about what a run takes
	times     []time.Duration
	rates     []float64 // rows per second of each slice
	wall      time.Duration
	workspace int64
	joules    float64
	energy    bool // known for each slice
}

// NewSample begins with the time that a run took to make ready.
func NewSample(set Setting, ready Ready) *Sample {
	return &Sample{set: set, run: ready.Run, workspace: ready.Workspace, energy: true}
}

// Runs gives how many runs each instance does in the next slice; 0 says that
// enough is known.
func (s *Sample) Runs() int {
	if s.enough() {
		return 0
	}
	return int(max(1, min(SliceTime/max(s.run, 1), 1<<12)))
}

func (s *Sample) enough() bool {
	if len(s.times) < minRuns || len(s.rates) < minSlices || s.wall < minTime {
		return false
	}
	rates := slices.Sorted(slices.Values(s.rates))
	low, middle, high := rates[len(rates)/4], rates[len(rates)/2], rates[len(rates)-1-len(rates)/4]
	return s.wall >= maxTime || s.width() <= spread && high-low <= drift*middle
}

// width gives how far apart the bounds of the median are, relative to it: those
// between which it is with about two thirds, the order statistics half a root
// of n below and above the middle.
func (s *Sample) width() float64 {
	sorted := slices.Sorted(slices.Values(s.times))
	n := float64(len(sorted))
	low := int(max(0, math.Floor((n-math.Sqrt(n))/2)))
	high := int(min(n-1, math.Ceil((n+math.Sqrt(n))/2)))
	return float64(sorted[high]-sorted[low]) / float64(max(quantile(sorted, 0.5), 1))
}

// Add adds an undisturbed slice. joules is what the device took meanwhile; not
// positive where it cannot tell.
func (s *Sample) Add(x Slice, joules float64) {
	if len(x.Times) == 0 || x.Wall <= 0 {
		return
	}
	s.times = append(s.times, x.Times...)
	s.rates = append(s.rates, float64(len(x.Times)*s.set.Batch)/x.Wall.Seconds())
	s.wall += x.Wall
	if s.joules += joules; !(joules > 0) {
		s.energy = false
	}
	s.run = quantile(slices.Sorted(slices.Values(s.times)), 0.5)
}

// Starved tells of a slice that does not count. While others compute, runs take
// longer, and the next slice has fewer of them, so as not to take longer too.
func (s *Sample) Starved(x Slice) {
	if len(x.Times) > 0 {
		s.run = quantile(slices.Sorted(slices.Values(x.Times)), 0.5)
	}
}

// Result gives what is known. fixed are the bytes of weights and sessions.
func (s *Sample) Result(fixed int64) Result {
	sorted := slices.Sorted(slices.Values(s.times))
	rates := slices.Sorted(slices.Values(s.rates))
	r := Result{
		Runs: len(sorted), P50: quantile(sorted, 0.5), P95: quantile(sorted, 0.95), P99: quantile(sorted, 0.99), Workspace: s.workspace,
	}
	if len(rates) > 0 {
		r.RowsPerSecond = rates[len(rates)/2]
	}
	if s.workspace > 0 {
		r.Peak = fixed + s.workspace
	}
	if s.energy && len(sorted) > 0 {
		r.JoulesPerRow = s.joules / float64(len(sorted)*s.set.Batch)
	}
	return r
}

// quantile gives the nearest rank of a sorted sample; 0 of none.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(math.Ceil(q*float64(len(sorted))))-1)]
}
