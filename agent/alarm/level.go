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

// level watches whether a figure is what it was under like conditions. These
// are a number, and values whose conditions round to the same make a bin. A
// bin's first values are its reference, with a line through them by their
// conditions; later ones are compared with that, in units of the spread around
// it, and the differences summed up as Page (Continuous inspection schemes,
// 1954) does it.
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
const binsMost = 64

// residual is a difference to the reference, and what it is taken for.
type residual struct{ value, spread float64 }

type bin struct {
	conditions, values []float64 // until there are enough
	last               time.Duration
	known              bool
	from, to           float64 // the conditions that are known
	at, median         float64 // of conditions and values
	slope, spread      float64
}

// outside is how far beyond the conditions of the reference its line goes.
const outside = 0.1

// learn makes the values the reference.
func (b *bin) learn(l *level) {
	var slopes []float64
	for i, x := range b.conditions {
		for j := range i {
			if step := x - b.conditions[j]; step != 0 {
				slopes = append(slopes, (b.values[i]-b.values[j])/step)
			}
		}
	}
	if len(slopes) > binValues {
		b.slope = median(slopes)
	}
	b.at = median(slices.Clone(b.conditions))
	b.from, b.to = slices.Min(b.conditions)-outside, slices.Max(b.conditions)+outside
	for i, x := range b.conditions {
		b.values[i] -= b.slope * (x - b.at)
	}
	b.median = median(b.values)
	b.spread = max(l.floor, spread(slices.Clone(b.values), b.median))
	// Many figures have a long tail in the direction for the worse. The largest
	// of so many normal values is 1.87 standard deviations above the middle.
	if l.up {
		b.spread = max(b.spread, (b.values[binValues-1]-b.median)/1.87)
	}
	if l.down {
		b.spread = max(b.spread, (b.median-b.values[0])/1.87)
	}
	b.conditions, b.values, b.known = nil, nil, true
	l.ready = true
}

// observe takes in a value, and says whether it could be compared.
func (l *level) observe(now time.Duration, conditions, value float64) bool {
	number := int(math.Round(conditions))
	b := l.bins[number]
	if b == nil {
		if len(l.bins) >= binsMost {
			return false
		}
		if l.bins == nil {
			l.bins = map[int]*bin{}
		}
		b = &bin{last: now - l.apart}
		l.bins[number] = b
	}
	if !b.known {
		// While the level is changed there is nothing to learn from.
		if now-b.last >= l.apart && !l.rebase && max(l.above, l.below) < limit/2 {
			b.last = now
			b.conditions, b.values = append(b.conditions, conditions), append(b.values, value-l.shift)
			if len(b.values) == binValues {
				b.learn(l)
			}
		}
		return false
	}
	if conditions < b.from || conditions > b.to {
		return false
	}
	expected := b.expect(conditions) + l.shift
	beside := value - expected
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
	l.expected = expected
	return true
}

func (b *bin) expect(conditions float64) float64 { return b.median + b.slope*(conditions-b.at) }

// expect gives the value that is expected under conditions, where there is a
// reference for them.
func (l *level) expect(conditions float64) (float64, bool) {
	b := l.bins[int(math.Round(conditions))]
	if b == nil || !b.known {
		return 0, false
	}
	return b.expect(conditions) + l.shift, true
}

// served says that what is served has changed: what the level is then is found
// anew, unless it counts as changed.
func (l *level) served() {
	if l.ready && !l.changed() {
		l.anew, l.rebase = l.anew[:0], true
	}
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
