package engine

import (
	"math"
	"math/bits"
	"time"
)

// Durations counts durations by class: four for each doubling from 8.2 us to
// 137 s, so that a class is at most a quarter wider than its least duration;
// what is shorter is in the first, what is longer in the last. Its counts only
// grow: the difference of two, see Since, is what came between.
type Durations [98]uint64

const (
	steps     = 2  // bits of a class below the highest one
	firstBits = 13 // 2^13 ns is the least duration of the second class
)

// class gives the number of the class of a duration.
func class(d time.Duration) int {
	if d < 1<<firstBits {
		return 0
	}
	high := bits.Len64(uint64(d)) - 1
	step := int(uint64(d)>>(high-steps)) & (1<<steps - 1)
	return min((high-firstBits)<<steps+step+1, len(Durations{})-1)
}

// least gives the least duration of a class.
func least(class int) time.Duration {
	if class == 0 {
		return 0
	}
	class--
	return (1<<steps + time.Duration(class&(1<<steps-1))) << (firstBits - steps + class>>steps)
}

func (d *Durations) observe(t time.Duration) { d[class(t)]++ }

// Count gives how many there are.
func (d *Durations) Count() uint64 {
	n := uint64(0)
	for _, c := range d {
		n += c
	}
	return n
}

// Since gives what has come since an earlier one of the same version. After
// that was loaded anew, all has.
func (d *Durations) Since(earlier *Durations) Durations {
	all := *d
	for i := range all {
		if all[i] < earlier[i] {
			return *d
		}
		all[i] -= earlier[i]
	}
	return all
}

// Quantile gives the duration that a share q of all do not exceed, in between
// the bounds of its class by its place among those in there; 0 where there are
// none. Of the last class it gives the least.
func (d *Durations) Quantile(q float64) time.Duration {
	rank := uint64(math.Ceil(min(max(q, 0), 1) * float64(d.Count())))
	rank = max(rank, 1)
	for i, n := range d {
		if rank > n {
			rank -= n
			continue
		}
		from := least(i)
		if i == len(d)-1 {
			return from
		}
		return from + time.Duration(float64(least(i+1)-from)*float64(rank)/float64(n))
	}
	return 0
}
