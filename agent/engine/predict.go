package engine

import (
	"math"
	"slices"
	"time"
)

const (
	// window is how many runs of a version an estimate rests on.
	window = 32
	// fewRuns are too few to refuse a request that nothing is ahead of, and so
	// are runs that ended longer than staleAfter ago: it is let through, to
	// measure anew.
	fewRuns    = 4
	staleAfter = 10 * time.Second
	// worstRatio is what predictor.worst starts from, and 1/worstFade is how
	// much of it goes with each run.
	worstRatio = 2
	worstFade  = 1024
	// saving is by how much cheaper for each byte a run must become for it to
	// be worth its being larger.
	saving = 0.04
	// Until trustedRuns have ended, what was measured before takes part in the
	// estimate, in proportion to the median of how the runs compare with it and
	// of priorRuns that do not differ from it. Of its points maxPrior count.
	trustedRuns = 8
	priorRuns   = 3
	maxPrior    = 16
	// costLimit bounds what one request adds to a predicted wait, so that the
	// sum over the longest queues stays a duration.
	costLimit = 4 * time.Minute
)

// predictor estimates how long a version's runs take from the last ones: a run
// of size bytes of input takes max(least, fixed + each*size) seconds. The line
// is Tukey's resistant one (Exploratory Data Analysis, 1977, chapter 10), with
// two groups: through the medians of the smaller and of the larger runs.
// Unlike a mean and its deviation (RFC 6298) it ignores a cold first run and
// the odd slow one. Until runs of different sizes have been seen, smaller ones
// are taken to last as long, and larger ones in proportion. What was measured
// before the first run gives it a line to begin with, see expect.
type predictor struct {
	sizes, times [window]float64 // rings
	runs         int             // observed in all
	last         moment          // end of the latest

	prior  []sample // what was measured before
	before line     // through those
	doubt  moment   // of the first refusal; 0: none

	line
	shaped bool // runs of different sizes have been seen, or were measured before
	// high is how many times the estimate a run may well take: the third
	// highest such ratio of a full window, the second highest of a smaller one.
	// worst is that of the worst run of all, fading.
	high, worst float64
}

// sample is the run time of so many bytes of input.
type sample struct{ size, seconds float64 }

// line is an estimate: max(least, fixed + each*size) seconds.
type line struct{ fixed, each, least float64 }

// expect has the estimate begin with what was measured before; where there have
// been runs, it tells only what those do not.
func (p *predictor) expect(points []sample) {
	p.prior = nil
	if len(points) == 0 {
		if p.runs == 0 {
			*p = predictor{}
		}
		return
	}
	for i := range min(len(points), maxPrior) { // the first, the last, and those evenly between
		p.prior = append(p.prior, points[i*(len(points)-1)/max(min(len(points), maxPrior)-1, 1)])
	}
	if p.runs == 0 {
		p.worst = worstRatio
	}
	// As if there were only these.
	own := *p
	p.runs, p.shaped = 0, false
	p.fit()
	p.before = p.line
	p.runs, p.high = own.runs, own.high
	p.fit()
}

// drift is by how much runs differ from what was measured before.
func (p *predictor) drift(n int) float64 {
	var room [priorRuns + trustedRuns]float64
	ratios := room[:0]
	for range priorRuns {
		ratios = append(ratios, 1)
	}
	for i := range n {
		ratios = append(ratios, p.times[i]/max(p.before.seconds(p.sizes[i]), 1e-9))
	}
	return median(ratios)
}

// observe adds a run and says whether the estimate has moved by more than a
// sixteenth.
func (p *predictor) observe(size int64, took time.Duration, now moment) bool {
	if p.runs == 0 {
		p.worst = worstRatio
	} else {
		p.worst = max(p.ratio(float64(size), took.Seconds()), p.worst-(p.worst-1)/worstFade)
	}
	p.sizes[p.runs%window], p.times[p.runs%window] = float64(size), took.Seconds()
	p.runs++
	p.last = now
	if p.runs > 8 && p.runs%4 != 0 { // a line through many runs may lag by three
		return false
	}
	mean, upper := p.mean(size), p.upper(size)
	p.fit()
	return differ(mean, p.mean(size)) || differ(upper, p.upper(size))
}

func differ(a, b time.Duration) bool { return (a - b).Abs() > a/16 }

func (p *predictor) fit() {
	n := min(p.runs, window)
	sizes, times := p.sizes[:n], p.times[:n]
	if n < trustedRuns && len(p.prior) > 0 {
		var room [2][trustedRuns + maxPrior]float64
		sizes, times = append(room[0][:0], sizes...), append(room[1][:0], times...)
		drift := p.drift(n)
		for _, s := range p.prior {
			sizes, times = append(sizes, s.size), append(times, drift*s.seconds)
		}
	}
	low, high := slices.Min(sizes), slices.Max(sizes)
	switch {
	case high > 1.25*low && p.fitLine(sizes, times, (low+high)/2):
	case p.shaped: // keeps its shape
		var ratios [window]float64
		for i := range sizes {
			ratios[i] = p.ratio(sizes[i], times[i])
		}
		ratio := median(ratios[:len(sizes)])
		p.fixed *= ratio
		p.each *= ratio
		p.least *= ratio
	default:
		p.least = median(times)
		p.each = p.least / max(median(sizes), 1)
	}
	var top [3]float64 // highest ratios
	for i := range n {
		ratio := p.ratio(p.sizes[i], p.times[i])
		for k := range top {
			if ratio > top[k] {
				ratio, top[k] = top[k], ratio
			}
		}
	}
	p.high = max(1, top[max(0, min(n-1, 1+n/window))])
}

// fitLine puts the line through the medians of the runs up to the size middle,
// and of those above it, unless larger runs are faster: then the large ones are
// of another time, when all were.
func (p *predictor) fitLine(sizes, times []float64, middle float64) bool {
	var room [4][window]float64
	small, smallTimes, large, largeTimes := room[0][:0], room[1][:0], room[2][:0], room[3][:0]
	for i, size := range sizes {
		if size <= middle {
			small, smallTimes = append(small, size), append(smallTimes, times[i])
		} else {
			large, largeTimes = append(large, size), append(largeTimes, times[i])
		}
	}
	x0, y0, x1, y1 := median(small), median(smallTimes), median(large), median(largeTimes)
	if y1 < y0 && p.shaped {
		return false
	}
	p.shaped, p.least = true, 0
	p.each = max(0, (y1-y0)/(x1-x0))
	if p.fixed = y1 - p.each*x1; p.fixed < 0 { // more than in proportion
		p.fixed, p.each, p.least = 0, y1/x1, slices.Min(times)
	}
	return true
}

// median gives the lower one where there are two.
func median(values []float64) float64 {
	var room [window]float64
	sorted := append(room[:0], values...)
	slices.Sort(sorted)
	return sorted[(len(sorted)-1)/2]
}

// ratio is how many times the estimate a run has taken.
func (p *predictor) ratio(size, seconds float64) float64 {
	return seconds / max(p.seconds(size), 1e-9)
}

func (l *line) seconds(size float64) float64 {
	return max(l.least, l.fixed+l.each*size)
}

// known says whether there is an estimate at all.
func (p *predictor) known() bool { return p.runs > 0 || len(p.prior) > 0 }

// doubtful says that the estimate is not worth refusing a request for which
// could run at once. What was measured before stands in for the first few
// runs, until requests have been refused for its sake for a while.
func (p *predictor) doubtful(now moment) bool {
	if p.runs >= fewRuns {
		return now-p.last > staleAfter
	}
	return len(p.prior) == 0 || p.doubt > 0 && now-p.doubt > staleAfter
}

// refuses takes note that a request was refused because of the estimate.
func (p *predictor) refuses(now moment) {
	if p.doubt == 0 {
		p.doubt = now
	}
}

// mean is how long a run of this size takes; 0 where that is not known.
func (p *predictor) mean(size int64) time.Duration { return duration(p.seconds(float64(size))) }

// upper is how long it takes when it is one of the slower ones.
func (p *predictor) upper(size int64) time.Duration {
	return duration(p.high * p.seconds(float64(size)))
}

// efficient is the size of the smallest run that costs hardly more for each
// byte than the largest one does which ends within the limit, see saving. No
// run is larger than whole; 0 where no run ends within the limit, or size
// saves nothing.
func (p *predictor) efficient(whole float64, limit time.Duration) int64 {
	largest := whole
	if p.high*p.seconds(whole) > limit.Seconds() {
		largest = (limit.Seconds()/p.high - p.fixed) / p.each
	}
	switch {
	case largest <= 0:
		return 0
	case !p.shaped: // what it saves is not known
		return int64(largest)
	case p.fixed == 0:
		return 0
	default:
		return int64(min(largest, p.fixed/((1+saving)*p.fixed/largest+saving*p.each)))
	}
}

// cost is by how much a request of a size delays those behind it when it is
// part of a run of size all.
func (p *predictor) cost(size, all int64) time.Duration {
	share := 1.0
	if all > 0 {
		share = float64(size) / float64(all)
	}
	return min(duration(p.fixed*share+p.each*float64(size)), costLimit)
}

func duration(seconds float64) time.Duration {
	return time.Duration(min(seconds*1e9, math.MaxInt64/16))
}
