// Package estimate predicts what a version of a model takes of a device and
// how long its runs last: from its graph, or from what was measured.
package estimate

import (
	"cmp"
	"slices"
	"time"
)

// Point is the run time of so many rows.
type Point struct {
	Rows    int
	Seconds float64
}

// Latency is the run time of a version by the rows of a run: a line through
// each two neighbours among its points, from the origin of the first two on,
// and beyond the last in proportion to the last two. It never falls as rows
// grow. The zero value knows nothing. It is not changed once made.
type Latency struct{ points []Point }

// FitLatency gives the Latency through points; those of no rows or no time are
// left out, and of several with the same rows the median counts.
func FitLatency(points []Point) Latency {
	points = slices.DeleteFunc(slices.Clone(points), func(p Point) bool { return p.Rows < 1 || !(p.Seconds > 0) })
	slices.SortFunc(points, func(a, b Point) int {
		return cmp.Or(cmp.Compare(a.Rows, b.Rows), cmp.Compare(a.Seconds, b.Seconds))
	})
	var l Latency
	for i := 0; i < len(points); {
		j := i
		for j < len(points) && points[j].Rows == points[i].Rows {
			j++
		}
		p := points[(i+j-1)/2]
		if n := len(l.points); n > 0 {
			p.Seconds = max(p.Seconds, l.points[n-1].Seconds)
		}
		l.points = append(l.points, p)
		i = j
	}
	return l
}

// Points gives what the Latency goes through.
func (l Latency) Points() []Point { return slices.Clone(l.points) }

// At gives the run time of so many rows; 0 where nothing is known.
func (l Latency) At(rows int) time.Duration {
	rows = max(rows, 1)
	n := len(l.points)
	switch n {
	case 0:
		return 0
	case 1:
		p := l.points[0]
		if rows <= p.Rows {
			return seconds(p.Seconds)
		}
		return seconds(p.Seconds * float64(rows) / float64(p.Rows))
	}
	i := slices.IndexFunc(l.points, func(p Point) bool { return p.Rows >= rows })
	if i == 0 {
		return seconds(l.points[0].Seconds)
	}
	if i < 0 {
		i = n - 1
	}
	a, b := l.points[i-1], l.points[i]
	each := (b.Seconds - a.Seconds) / float64(b.Rows-a.Rows)
	return seconds(a.Seconds + each*float64(rows-a.Rows))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
