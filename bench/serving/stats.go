package main

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// percentile gives the smallest value that at least p percent of the sorted
// values do not exceed (nearest rank), 0 where there are none.
func percentile[T any](sorted []T, p float64) T {
	if len(sorted) == 0 {
		var none T
		return none
	}
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// spread is what the rounds of a measurement gave.
type spread struct {
	Least, Median, Most float64
}

// spreadOf gives the spread of values; the median of an even number of them
// is the mean of the two in the middle. All are NaN where there are none.
func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	s := slices.Sorted(slices.Values(values))
	middle := len(s) / 2
	median := s[middle]
	if len(s)%2 == 0 {
		median = (s[middle-1] + s[middle]) / 2
	}
	return spread{s[0], median, s[len(s)-1]}
}

// each applies f to the pairs of two sides' rounds.
func each[T any](a, b []T, f func(a, b T) float64) []float64 {
	all := make([]float64, min(len(a), len(b)))
	for i := range all {
		all[i] = f(a[i], b[i])
	}
	return all
}

func (s spread) format(f string) string {
	return fmt.Sprintf(f+" ("+f+" to "+f+")", s.Median, s.Least, s.Most)
}

// figure writes a figure of the last line; "na" for one that was not measured.
func figure(f string, v float64) string {
	if math.IsNaN(v) {
		return "na"
	}
	return fmt.Sprintf(f, v)
}

func milliseconds(d time.Duration) float64 { return float64(d) / 1e6 }

func microseconds(d time.Duration) float64 { return float64(d) / 1e3 }
