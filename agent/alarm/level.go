package alarm

import (
	"math"
	"slices"
	"time"
)

const (
	// A bin's reference are its first binValues values, some time apart.
	binValues  = 20
	learnApart = 10 * time.Minute // for most figures
	// Page's sum takes in how many standard deviations a value is beyond the
	// reference, at most clip, less drift; beyond limit the level has changed.
	clip  = 3
	drift = 1
	limit = 15
	// The median of the last recentRaise values says whether the change
	// matters, that of the last recentClear whether it is over.
	recentRaise = 10
	recentClear = 15
	// beyond is how many standard deviations a change has at least.
	beyond = 3
	// rebaseValues is how many values tell the level after what is served has
	// changed.
	rebaseValues = 30
)

// level watches whether a figure is what it was under like conditions. Values
// belong to bins: those of one bin are alike in what the figure depends on. A
// bin's first values are its reference; later ones are compared with their
// median, in units of their spread, and the differences summed up as Page
// (Continuous inspection schemes, 1954) does it.
type level struct {
	floor  float64       // least standard deviation that values are taken to have
	effect float64       // least change that matters
	up     bool          // more is a change for the worse
	down   bool          // less is
	apart  time.Duration // between two values of a reference, at least

	bins   map[int]*bin
	ready  bool    // one of them has its reference
	shift  float64 // of all bins since what is served has changed
	anew   []float64
	rebase bool // shift is being found

	above, below float64 // Page's sums
	recent       []residual
	values       []point // as evidence
	expected     float64 // of the last value
}

// binsMost bounds level.bins.
const binsMost = 32

// residual is a difference to the reference, and what it is taken for.
type residual struct{ value, spread float64 }

type bin struct {
	values         []float64
	last           time.Duration
	median, spread float64
}

// observe takes in a value, and says whether it could be compared.
func (l *level) observe(now time.Duration, number int, value float64) bool {
	b := l.bins[number]
	if b == nil {
		if len(l.bins) == binsMost {
			return false
		}
		if l.bins == nil {
			l.bins = map[int]*bin{}
		}
		b = &bin{last: now - l.apart}
		l.bins[number] = b
	}
	if len(b.values) < binValues {
		// While the level is changed there is nothing to learn from.
		if now-b.last >= l.apart && !l.rebase && max(l.above, l.below) < limit/2 {
			b.last = now
			if b.values = append(b.values, value-l.shift); len(b.values) == binValues {
				b.median = median(b.values)
				b.spread = max(l.floor, l.spread(b))
				l.ready = true
			}
		}
		return false
	}
	beside := value - b.median - l.shift
	if l.rebase {
		if l.anew = append(l.anew, beside); len(l.anew) == rebaseValues {
			l.shift += median(l.anew)
			l.anew, l.rebase = nil, false
			l.above, l.below, l.recent = 0, 0, l.recent[:0]
		}
		return false
	}
	z := min(max(beside/b.spread, -clip), clip)
	l.above = min(max(0, l.above+z-drift), 2*limit)
	l.below = min(max(0, l.below-z-drift), 2*limit)
	l.recent = push(l.recent, residual{beside, b.spread}, recentClear)
	l.values = push(l.values, point{now, value}, maxSamples)
	l.expected = b.median + l.shift
	return true
}

// served says that what is served has changed: what the level is then is found
// anew, unless it counts as changed.
func (l *level) served() {
	if l.ready && !l.changed() {
		l.anew, l.rebase = l.anew[:0], true
	}
}

// spread gives the standard deviation of a bin's values in the directions that
// count: many figures have a long tail in that for the worse.
func (l *level) spread(b *bin) float64 {
	wide := spread(slices.Clone(b.values), b.median)
	slices.Sort(b.values)
	// 1.2816 standard deviations of normal values are above the median there.
	if l.up {
		wide = max(wide, (b.values[binValues*9/10]-b.median)/1.2816)
	}
	if l.down {
		wide = max(wide, (b.median-b.values[binValues/10-1])/1.2816)
	}
	return wide
}

// middle gives the median of the last residuals.
func (l *level) middle(last int) (m residual) {
	values, spreads := make([]float64, last), make([]float64, last)
	for i, r := range l.recent[len(l.recent)-last:] {
		values[i], spreads[i] = r.value, r.spread
	}
	return residual{median(values), median(spreads)}
}

// changed says whether the level is another one, by enough to matter.
func (l *level) changed() bool {
	if up, down := l.up && l.above > limit, l.down && l.below > limit; !up && !down || len(l.recent) < recentRaise {
		return false
	}
	m := l.middle(recentRaise)
	least := max(l.effect, beyond*m.spread)
	return l.up && l.above > limit && m.value >= least || l.down && l.below > limit && m.value <= -least
}

// back says whether the level is again what it was; the sums then begin anew.
func (l *level) back() bool {
	if len(l.recent) < recentClear {
		return false
	}
	if m := l.middle(recentClear); math.Abs(m.value) >= max(l.effect, beyond*m.spread)/2 {
		return false
	}
	l.above, l.below = 0, 0
	return true
}

// push appends to a list that keeps its last most elements.
func push[T any](list []T, v T, most int) []T {
	if len(list) >= most {
		list = slices.Delete(list, 0, len(list)-most+1)
	}
	return append(list, v)
}
