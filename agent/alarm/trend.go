package alarm

import (
	"math"
	"slices"
	"time"
)

// point is a value at a moment; moments count from the detector's start.
type point struct {
	at    time.Duration
	value float64
}

// bucketMost bounds the values of a bucket that are kept: of more, every
// second is.
const bucketMost = 64

// window keeps a bounded past of a figure: one point for each bucket of time
// in which there were values. It has no more than most points, and none that
// is older than most buckets.
type window struct {
	width time.Duration
	most  int
	stat  func([]float64) float64 // of a bucket's values, which it may sort

	points []point
	bucket []float64
	number int64 // of the bucket
	every  int   // of this many values one is kept
	seen   int   // values since the last that was kept
}

func newWindow(width time.Duration, most int, stat func([]float64) float64) window {
	return window{width: width, most: most, stat: stat}
}

// add takes in a value, and says whether that closed a bucket, which
// is the last point then.
func (w *window) add(now time.Duration, value float64) (closed bool) {
	number := int64(now / w.width)
	if len(w.bucket) > 0 && number != w.number {
		w.points = append(w.points, point{time.Duration(w.number)*w.width + w.width/2, w.stat(w.bucket)})
		w.bucket = w.bucket[:0]
		oldest := now - time.Duration(w.most+1)*w.width
		drop := max(0, len(w.points)-w.most)
		for drop < len(w.points) && w.points[drop].at < oldest {
			drop++
		}
		w.points = slices.Delete(w.points, 0, drop)
		closed = len(w.points) > 0
	}
	if len(w.bucket) == 0 {
		w.number, w.every, w.seen = number, 1, 0
	}
	if w.seen++; w.seen < w.every {
		return closed
	}
	w.seen = 0
	if len(w.bucket) == bucketMost {
		for i := range bucketMost / 2 {
			w.bucket[i] = w.bucket[2*i+1]
		}
		w.bucket = w.bucket[:bucketMost/2]
		w.every *= 2
	}
	w.bucket = append(w.bucket, value)
	return closed
}

// tail gives the points of the last so many buckets.
func (w *window) tail(buckets int) []point {
	if len(w.points) == 0 {
		return nil
	}
	from := w.points[len(w.points)-1].at - time.Duration(buckets-1)*w.width
	i := len(w.points)
	for i > 0 && w.points[i-1].at >= from {
		i--
	}
	return w.points[i:]
}

// median sorts the values and gives the one in the middle; NaN of none.
func median(values []float64) float64 {
	n := len(values)
	if n == 0 {
		return math.NaN()
	}
	slices.Sort(values)
	if n%2 == 1 {
		return values[n/2]
	}
	return (values[n/2-1] + values[n/2]) / 2
}

// spread gives the standard deviation as the median absolute deviation from
// middle has it for normal values (Hampel, 1974). It changes the values.
func spread(values []float64, middle float64) float64 {
	for i, v := range values {
		values[i] = math.Abs(v - middle)
	}
	return 1.4826 * median(values)
}

func mean(points []point) float64 {
	var sum float64
	for _, p := range points {
		sum += p.value
	}
	return sum / float64(len(points))
}

// trend is a straight line through points.
type trend struct {
	slope float64 // per hour
	end   float64 // the line at the last point
	z     float64 // how far from no trend, in standard deviations
}

// theilSen fits a line: its slope is the median of those of all pairs of
// points (Theil, 1950; Sen, 1968), and z the statistic of Kendall's test for a
// trend (Mann, 1945), with ties. With a season only points of the same phase
// make pairs, so that what comes back with the season is no trend (Hirsch,
// Slack and Smith, 1982). Points are width apart, or several times that.
func theilSen(points []point, width, season time.Duration) trend {
	groups := [][]point{points}
	if season > 0 {
		groups = make([][]point, int(season/width))
		for _, p := range points {
			i := int(p.at/width) % len(groups)
			groups[i] = append(groups[i], p)
		}
	}
	var slopes []float64
	var s, variance float64
	for _, g := range groups {
		for i, p := range g {
			for _, q := range g[:i] {
				slopes = append(slopes, (p.value-q.value)/(p.at-q.at).Hours())
				s += sign(p.value - q.value)
			}
		}
		variance += kendallVariance(g)
	}
	if len(slopes) == 0 || variance <= 0 {
		return trend{end: math.NaN()}
	}
	t := trend{slope: median(slopes)}
	t.z = (s - sign(s)) / math.Sqrt(variance)
	last := points[len(points)-1].at
	levels := make([]float64, len(points))
	for i, p := range points {
		levels[i] = p.value + t.slope*(last-p.at).Hours()
	}
	t.end = median(levels)
	return t
}

// kendallVariance is the variance of Kendall's sum without a trend: n(n-1)(2n+5)/18,
// less as much for each run of equal values.
func kendallVariance(points []point) float64 {
	of := func(n int) float64 { return float64(n) * float64(n-1) * float64(2*n+5) / 18 }
	values := make([]float64, len(points))
	for i, p := range points {
		values[i] = p.value
	}
	slices.Sort(values)
	v := of(len(values))
	for i := 0; i < len(values); {
		j := i + 1
		for j < len(values) && values[j] == values[i] {
			j++
		}
		v -= of(j - i)
		i = j
	}
	return v
}

func sign(v float64) float64 {
	switch {
	case v > 0:
		return 1
	case v < 0:
		return -1
	}
	return 0
}

// Least shares of a whole rise that lie between the first and the second
// quarter of a steady one, the second and third, the third and last; a third
// each where it is a line. A step has all of its rise in one or two of these,
// and what approaches its end little in the last.
var steadyShares = [3]float64{0.12, 0.15, 0.2}

// steady says whether the values go up all through the time of the points,
// and gives the rise between the means of the first and the last quarter.
func steady(points []point) (rise float64, ok bool) {
	if len(points) < 8 {
		return 0, false
	}
	first, last := points[0].at, points[len(points)-1].at
	var sums [4]float64
	var counts [4]int
	for _, p := range points {
		i := min(int(4*(p.at-first)/max(last-first, 1)), 3)
		sums[i] += p.value
		counts[i]++
	}
	for i := range sums {
		if counts[i] == 0 {
			return 0, false
		}
		sums[i] /= float64(counts[i])
	}
	rise = sums[3] - sums[0]
	for i, share := range steadyShares {
		if !(sums[i+1]-sums[i] >= share*rise) {
			return rise, false
		}
	}
	return rise, rise > 0
}

// significant is the least z of a trend that counts: points that follow each
// other are not independent, so that it must be far beyond the usual 2.
const significant = 4

// outlook is how a trend is looked for: in the last points of a window, need
// of them at least over three quarters of the time at least, and with a
// threshold that is reached within so many hours.
type outlook struct {
	width        time.Duration
	points, need int
	season       time.Duration // 0: none
	hours        float64
	rise         float64 // least rise over the window
}

// prospect is what an outlook shows.
type prospect struct {
	trend
	hours float64 // until the threshold; 0: it is reached
	soon  bool    // within the outlook's hours
	far   bool    // not within twice of them
}

// see looks at the end of a window whose values are to stay below threshold
// where up, and above otherwise. Levels stand for the value that the line is
// continued from; NaN: the line's own end.
func (o outlook) see(w *window, threshold, from float64, up bool) prospect {
	points := w.tail(o.points)
	if len(points) < o.need || points[len(points)-1].at-points[0].at < time.Duration(o.need-1)*o.width*3/4 {
		return prospect{far: true}
	}
	turn := 1.0
	if !up {
		turn = -1
		points = slices.Clone(points)
		for i := range points {
			points[i].value *= -1
		}
	}
	rise, ok := steady(points)
	if !ok || rise < o.rise {
		return prospect{far: true}
	}
	// Most rises end far from the threshold: the quarters' means, which are
	// cheap, say so.
	rough := rise / (0.75 * (points[len(points)-1].at - points[0].at).Hours())
	last := points[len(points)-1].value
	if !math.IsNaN(from) {
		last = turn * from
	}
	if (turn*threshold-last)/rough > 4*o.hours {
		return prospect{far: true}
	}
	t := theilSen(points, o.width, o.season)
	if !(t.z >= significant) || !(t.slope > 0) {
		return prospect{far: true}
	}
	if !math.IsNaN(from) {
		t.end = turn * from
	}
	hours := max(0, (turn*threshold-t.end)/t.slope)
	return prospect{
		trend: trend{slope: turn * t.slope, end: turn * t.end, z: turn * t.z},
		hours: hours, soon: hours <= o.hours, far: hours > 2*o.hours,
	}
}
