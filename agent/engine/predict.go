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
// are taken to last as long, and larger ones in proportion.
type predictor struct {
	sizes, times [window]float64 // rings
	runs         int             // observed in all
	last         moment          // end of the latest

	fixed, each, least float64
	shaped             bool // runs of different sizes have been seen
	// high is how many times the estimate a run may well take: the third
	// highest such ratio of a full window, the second highest of a smaller one.
	// worst is that of the worst run of all, fading.
	high, worst float64
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
	low, high := slices.Min(sizes), slices.Max(sizes)
	switch {
	case high > 1.25*low && p.fitLine(sizes, times, (low+high)/2):
	case p.shaped: // keeps its shape
		var ratios [window]float64
		for i := range sizes {
			ratios[i] = p.ratio(sizes[i], times[i])
		}
		ratio := median(ratios[:n])
		p.fixed *= ratio
		p.each *= ratio
		p.least *= ratio
	default:
		p.least = median(times)
		p.each = p.least / max(median(sizes), 1)
	}
	var top [3]float64 // highest ratios
	for i := range sizes {
		ratio := p.ratio(sizes[i], times[i])
		for k := range top {
			if ratio > top[k] {
				ratio, top[k] = top[k], ratio
			}
		}
	}
	p.high = max(1, top[min(n-1, 1+n/window)])
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

func (p *predictor) seconds(size float64) float64 {
	return max(p.least, p.fixed+p.each*size)
}

// known says whether there is an estimate at all.
func (p *predictor) known() bool { return p.runs > 0 }

// doubtful says that the estimate is not worth refusing a request for which
// could run at once.
func (p *predictor) doubtful(now moment) bool {
	return p.runs < fewRuns || now-p.last > staleAfter
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
