// Package sketch keeps distributions as counts in fixed buckets, so that they
// can leave a device, be added up and be compared. It is pure, for both sides.
package sketch

import (
	"math"
	"slices"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Scale says which bucket a value falls into.
type Scale struct {
	buckets int
	first   float64 // upper bound of bucket 0
	factor  float64 // from one bound to the next; 0: bounds are evenly spaced by first
}

// The scales of what agents report. They may not change: counts of different
// agents are added up.
var (
	// Latency has 128 buckets of times in seconds: up to 100 us, then bounds
	// that grow by the eighth root of 2, to 6 s; the last has all beyond.
	Latency = Scale{128, 100e-6, math.Exp2(1. / 8)}
	// Confidence has 20 even buckets from 0 to 1.
	Confidence = Scale{20, 1. / 20, 0}
)

// Buckets gives how many there are.
func (s Scale) Buckets() int { return s.buckets }

// Bound gives the upper bound of bucket i, without which the last one is.
func (s Scale) Bound(i int) float64 {
	if s.factor == 0 {
		return s.first * float64(i+1)
	}
	return s.first * math.Pow(s.factor, float64(i))
}

// Bucket gives the bucket of a value; one that is not a number falls into the
// first.
func (s Scale) Bucket(x float64) int {
	var i float64
	switch {
	case !(x > s.first):
		return 0
	case s.factor == 0:
		i = math.Ceil(x/s.first-1e-9) - 1
	default:
		i = math.Ceil(math.Log(x/s.first)/math.Log(s.factor) - 1e-9)
	}
	return int(min(max(i, 0), float64(s.buckets-1)))
}

// Counts are the counts of a scale's buckets. Nil counts nothing.
type Counts []uint64

// Sum gives how many values were counted.
func (c Counts) Sum() (n uint64) {
	for _, x := range c {
		n += x
	}
	return n
}

// Add gives the sum of two counts of one scale.
func (c Counts) Add(o Counts) Counts {
	sum := make(Counts, max(len(c), len(o)))
	copy(sum, c)
	for i, x := range o {
		sum[i] += x
	}
	return sum
}

// Since gives what was counted after an earlier state of the same counts. Where
// a count is less than before, all of them began anew, and c is what there is.
func (c Counts) Since(before Counts) Counts {
	for i, x := range before {
		if i >= len(c) && x > 0 || i < len(c) && c[i] < x {
			return slices.Clone(c)
		}
	}
	diff := slices.Clone(c)
	for i := range min(len(before), len(diff)) {
		diff[i] -= before[i]
	}
	return diff
}

// Quantile gives the value below which a share q, 0 to 1, of the counted values
// lies, linear within its bucket; NaN where nothing was counted. It is off by
// at most the width of a bucket.
func (s Scale) Quantile(c Counts, q float64) float64 {
	n := c.Sum()
	if n == 0 {
		return math.NaN()
	}
	rank := q * float64(n)
	var below float64
	for i, x := range c {
		if x == 0 || below+float64(x) < rank {
			below += float64(x)
			continue
		}
		low := 0.
		if i > 0 {
			low = s.Bound(i - 1)
		}
		return low + (s.Bound(i)-low)*max(rank-below, 0)/float64(x)
	}
	return s.Bound(len(c) - 1)
}

// LatencyBucket gives the bucket of a time, as Latency.Bucket does of its
// seconds, without a logarithm.
func LatencyBucket(d time.Duration) int {
	i, _ := slices.BinarySearch(latencyBounds[:], d)
	return i
}

// latencyBounds are the longest times of all buckets of Latency but the last.
var latencyBounds = func() (bounds [127]time.Duration) {
	for i := range bounds {
		bounds[i] = time.Duration(Latency.Bound(i) * (1 + 1e-10) * 1e9)
	}
	return bounds
}()

// PSI is the population stability index of two distributions over the same
// buckets: the sum of (p-q) ln(p/q) over the shares p and q, neighbouring
// buckets merged so that each holds at least a twentieth of both on average, and
// half a count added to each. Below 0.1 they are taken as alike, above 0.25 as different
// (Siddiqi, Credit Risk Scorecards, 2006). NaN where either is empty.
func PSI(reference, counts Counts) float64 {
	n, m := reference.Sum(), counts.Sum()
	if n == 0 || m == 0 {
		return math.NaN()
	}
	type group struct{ ref, got float64 }
	var groups []group
	var g group
	for i := range max(len(reference), len(counts)) {
		if i < len(reference) {
			g.ref += float64(reference[i])
		}
		if i < len(counts) {
			g.got += float64(counts[i])
		}
		if g.ref/float64(n)+g.got/float64(m) >= 2./20 {
			groups = append(groups, g)
			g = group{}
		}
	}
	if g.ref+g.got > 0 { // what is left is too little by itself; there are groups
		groups[len(groups)-1].ref += g.ref
		groups[len(groups)-1].got += g.got
	}
	var psi float64
	k := float64(len(groups)) / 2
	for _, g := range groups {
		p, q := (g.ref+.5)/(float64(n)+k), (g.got+.5)/(float64(m)+k)
		psi += (p - q) * math.Log(p/q)
	}
	return psi
}

// Proto gives the counts as they travel.
func (c Counts) Proto() *dunlinv1.Buckets {
	first := slices.IndexFunc(c, func(x uint64) bool { return x > 0 })
	if first < 0 {
		return nil
	}
	last := len(c)
	for c[last-1] == 0 {
		last--
	}
	return &dunlinv1.Buckets{First: uint32(first), Counts: slices.Clone(c[first:last])}
}

// FromProto reads counts of a scale; what lies outside of it is left out.
func (s Scale) FromProto(b *dunlinv1.Buckets) Counts {
	if len(b.GetCounts()) == 0 {
		return nil
	}
	c := make(Counts, s.buckets)
	for i, x := range b.GetCounts() {
		if at := uint64(b.GetFirst()) + uint64(i); at < uint64(s.buckets) {
			c[at] = x
		}
	}
	return c
}
