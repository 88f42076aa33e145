package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/internal/sketch"
)

// This file is how a version is judged by its figures. In short:
//
// Each class of devices is judged by itself: what all devices of the class
// counted of the new version since they were given it, against what they
// counted of the old one before, together with those that still have it. After
// an operator has resumed or promoted, only what came after counts of the new
// one. A class whose devices all change at once first waits until enough was
// counted of the old version.
//
// A gate fails only when chance alone would do so once in a thousand looks (3
// standard errors, because it is looked at again and again), and passes only
// with enough requests on both sides; in between there is no sample yet, and
// the wave waits. The rate of errors, for which few requests say little, passes
// when it is within the limit with 95 % confidence: no failure among 133
// requests to each version is enough for a limit of 0.02.

const (
	failBy = 3.0   // standard errors beyond a limit, to fail
	passBy = 1.645 // standard errors within it, to pass where the gate says so: one-sided 95 %
	// Requests to each version that a gate needs, whatever MinSample is.
	leastRequests  = 30
	leastQuantile  = 100 // of these one lies above the 99th percentile
	leastEnergy    = 100
	confidenceBins = 20 // most groups that sketch.PSI compares
)

// counted sums figures up by class.
func (s *step) counted() []ClassFigures {
	by := map[string]ClassFigures{}
	for _, d := range s.r.Devices {
		o := s.seen[d.Device]
		c := by[d.Class]
		c.Class, c.Old = d.Class, c.Old.Add(o.Old)
		if !d.AdmittedAt.IsZero() {
			c.New = c.New.Add(o.New)
		}
		by[d.Class] = c
	}
	return slices.SortedFunc(maps.Values(by), func(a, b ClassFigures) int { return cmp.Compare(a.Class, b.Class) })
}

// classes gives the figures that count, by class.
func (s *step) classes() map[string]ClassFigures {
	if s.figures != nil {
		return s.figures
	}
	s.figures = map[string]ClassFigures{}
	for _, c := range s.counted() {
		for _, d := range s.r.Discount {
			if d.Class == c.Class {
				c.New = c.New.Since(d.New)
			}
		}
		s.figures[c.Class] = c
	}
	return s.figures
}

// lacksBase says why a device of a class has to wait until more was counted of
// the old version there: the class would have nothing to compare with once its
// devices have the new one. Empty: it has not.
func (s *step) lacksBase(class string) string {
	if len(s.r.Strategy.Gates) == 0 || s.r.From == 0 || s.r.same() {
		return ""
	}
	for _, d := range s.r.Devices {
		if d.Class == class && (!d.AdmittedAt.IsZero() || d.Wave == 0 && s.seen[d.Device].Connected) {
			return ""
		}
	}
	need := max(s.r.Strategy.MinSample, leastRequests)
	for _, g := range s.r.Strategy.Gates {
		need = max(need, g.least())
	}
	if have := s.classes()[class].Old.Requests; have < need {
		return fmt.Sprintf("%d of %d requests to %s, to compare with", have, need, s.r.before())
	}
	return ""
}

// least gives the requests that a gate needs to each version.
func (g Gate) least() uint64 {
	switch g.Kind {
	case P99:
		return leastQuantile
	case Energy:
		return leastEnergy
	}
	return leastRequests
}

// judge judges all gates on each class that has devices with the version, and
// says for which sample the wave waits; empty: for none. Before any is ready,
// which begun says, nothing was counted.
func (s *step) judge(begun bool) (held string) {
	s.r.Gates = nil
	if len(s.r.Strategy.Gates) == 0 || s.r.same() || !begun {
		return ""
	}
	given, ready := map[string]bool{}, map[string]bool{}
	for _, d := range s.r.Devices {
		if !d.AdmittedAt.IsZero() {
			given[d.Class] = true
			ready[d.Class] = ready[d.Class] || d.Phase == DeviceReady
		}
	}
	var holds []string
	for _, g := range s.r.Strategy.Gates {
		judged := false // on any class
		var lacking []string
		for _, class := range slices.Sorted(maps.Keys(given)) {
			res, unmeasured := s.gate(g, class)
			s.r.Gates = append(s.r.Gates, res)
			judged = judged || res.Verdict != NoSample
			if res.Verdict != NoSample || !ready[class] {
				continue
			}
			why := fmt.Sprintf("%s on %s: %s", g.Kind, cmp.Or(class, "no class"), res.Reason)
			if unmeasured {
				lacking = append(lacking, why)
			} else {
				holds = append(holds, why)
			}
		}
		// What is not measured on one class may be judged by another.
		if !judged && s.r.From > 0 {
			holds = append(holds, lacking...)
		}
	}
	return list(holds)
}

func failedGates(all []GateResult) string {
	var bad []string
	for _, g := range all {
		if g.Verdict == FailedGate {
			bad = append(bad, fmt.Sprintf("gate %s failed on %s: %s", g.Gate, cmp.Or(g.Class, "no class"), g.Reason))
		}
	}
	return strings.Join(bad[:min(len(bad), shown)], "; ")
}

// gate judges one gate on one class. unmeasured: both versions had their
// requests, and the figure is known of neither; or there is no old version to
// compare with, and never will be.
func (s *step) gate(g Gate, class string) (res GateResult, unmeasured bool) {
	c := s.classes()[class]
	n, o := c.New, c.Old
	res = GateResult{Gate: g.Kind, Class: class, Verdict: NoSample, Limit: g.Limit, NewSamples: n.Requests, OldSamples: o.Requests}
	need := max(s.r.Strategy.MinSample, g.least())
	newName, oldName := fmt.Sprintf("%s:%d", s.r.Model, s.r.To), s.r.before()
	if s.r.From == 0 && g.Kind != ErrorRate {
		res.Reason = "there is no version before to compare with"
		return res, true
	}
	haveNew, haveOld := n.Requests, o.Requests
	if g.Kind == P99 { // failed requests have no time
		haveNew, haveOld = n.Latency.Sum(), o.Latency.Sum()
	}
	switch {
	case haveNew < need:
		res.Reason = fmt.Sprintf("%d of %d requests to %s", haveNew, need, newName)
		return res, false
	case s.r.From > 0 && haveOld < need:
		res.Reason = fmt.Sprintf("%d of %d requests to %s, to compare with", haveOld, need, oldName)
		return res, false
	}
	switch g.Kind {
	case ErrorRate:
		s.errorRate(&res, n, o)
	case P99:
		p99(&res, n.Latency, o.Latency)
	case Energy:
		if !n.Energy || !o.Energy || n.Rows == 0 || o.Rows == 0 {
			res.Reason = "energy is not measured"
			return res, !n.Energy && !o.Energy
		}
		res.compare(n.Joules/float64(n.Rows), o.Joules/float64(o.Rows))
		res.ratio("%.4g J for a row, %.4g J before")
	case Confidence:
		if have, had := n.Confidence.Sum(), o.Confidence.Sum(); have < need || had < need {
			res.Reason = fmt.Sprintf("%d of %d confidences of %s, %d of %s", have, need, newName, had, oldName)
			return res, have == 0 && had == 0
		}
		confidence(&res, n.Confidence, o.Confidence)
	default:
		res.Reason = "the gate is not known"
	}
	return res, false
}

func (res *GateResult) compare(newFigure, oldFigure float64) {
	res.New, res.Old = &newFigure, &oldFigure
}

// ratio judges a figure by how many times the old one it is.
func (res *GateResult) ratio(format string) {
	value := *res.New / *res.Old
	if *res.Old == 0 {
		value = 1
		if *res.New > 0 {
			value = math.MaxFloat64
		}
	}
	res.Value, res.Verdict = &value, Passed
	if value > res.Limit {
		res.Verdict = FailedGate
	}
	res.Reason = fmt.Sprintf(format+": %.3g times, the limit is %g", *res.New, *res.Old, value, res.Limit)
}

// errorRate judges the difference of two shares by Newcombe's interval, which
// is made of two Wilson intervals (Newcombe, Statistics in Medicine 17, 1998,
// method 10); without an old version the share itself, by Wilson's.
func (s *step) errorRate(res *GateResult, n, o Figures) {
	p := share(n)
	res.New, res.Value = &p, &p
	bounds := func(z float64) (low, high float64) { return wilson(n, z) }
	what := fmt.Sprintf("%.2f %% of requests failed", 100*p)
	if s.r.From > 0 {
		q := share(o)
		res.Old, res.Value = &q, new(p-q)
		bounds = func(z float64) (low, high float64) {
			l1, u1 := wilson(n, z)
			l2, u2 := wilson(o, z)
			return p - q - math.Hypot(p-l1, u2-q), p - q + math.Hypot(u1-p, q-l2)
		}
		what += fmt.Sprintf(", %.2f %% before", 100*q)
	}
	what += fmt.Sprintf(", the limit is %.3g %%", 100*res.Limit)
	if s.r.From > 0 {
		what += " more"
	}
	low, _ := bounds(failBy)
	_, high := bounds(passBy)
	switch {
	case low > res.Limit:
		res.Verdict, res.Reason = FailedGate, what
	case high <= res.Limit:
		res.Verdict, res.Reason = Passed, what
	default:
		res.Reason = fmt.Sprintf("%s: %d requests are too few to tell", what, min(n.Requests, cmp.Or(o.Requests, n.Requests)))
	}
}

func share(f Figures) float64 {
	return float64(min(f.Failures, f.Requests)) / float64(max(f.Requests, 1))
}

// wilson gives the score interval of the share of requests that failed
// (Wilson, JASA 22, 1927).
func wilson(f Figures, z float64) (low, high float64) {
	n, p := float64(max(f.Requests, 1)), share(f)
	mid := (p + z*z/(2*n)) / (1 + z*z/n)
	half := z / (1 + z*z/n) * math.Sqrt(p*(1-p)/n+z*z/(4*n*n))
	return max(mid-half, 0), min(mid+half, 1)
}

// p99 judges the quantile. It fails when even the lower bound of the new one
// over the upper bound of the old one is above the limit; the bounds are those
// of the ranks, which are binomial.
func p99(res *GateResult, n, o sketch.Counts) {
	const q = .99
	at := func(c sketch.Counts, by float64) float64 {
		spread := by * math.Sqrt(q*(1-q)/float64(c.Sum()))
		return sketch.Latency.Quantile(c, min(q+spread, 1))
	}
	res.compare(at(n, 0), at(o, 0))
	value := *res.New / *res.Old
	res.Value = &value
	what := fmt.Sprintf("%.4g ms, %.4g ms before: %.3g times, the limit is %g", *res.New*1000, *res.Old*1000, value, res.Limit)
	switch {
	case at(n, -failBy)/at(o, failBy) > res.Limit:
		res.Verdict, res.Reason = FailedGate, what
	case value <= res.Limit:
		res.Verdict, res.Reason = Passed, what
	default:
		res.Reason = fmt.Sprintf("%s: %d requests are too few to tell", what, min(n.Sum(), o.Sum()))
	}
}

// confidence judges the population stability index, less what chance alone
// makes of it: where both are of one distribution, the index over 1/n + 1/m is
// chi-squared with one degree of freedom less than there are groups (Yurdakul,
// Statistical Properties of Population Stability Index, 2018).
func confidence(res *GateResult, n, o sketch.Counts) {
	groups := 0
	for i := range max(len(n), len(o)) {
		if i < len(n) && n[i] > 0 || i < len(o) && o[i] > 0 {
			groups++
		}
	}
	free := float64(max(min(groups, confidenceBins)-1, 1))
	scale := 1/float64(n.Sum()) + 1/float64(o.Sum())
	spread := scale * math.Sqrt(2*free)
	value := max(sketch.PSI(o, n)-scale*free, 0)
	res.compare(mean(n), mean(o))
	res.Value = &value
	what := fmt.Sprintf("the stability index is %.3g, the limit is %g", value, res.Limit)
	switch {
	case value-failBy*spread > res.Limit:
		res.Verdict, res.Reason = FailedGate, what
	case value <= res.Limit && passBy*spread <= res.Limit:
		res.Verdict, res.Reason = Passed, what
	default:
		res.Reason = fmt.Sprintf("%s: %d confidences are too few to tell", what, min(n.Sum(), o.Sum()))
	}
}

// mean gives the mean confidence, by the middles of the buckets.
func mean(c sketch.Counts) float64 {
	var sum float64
	for i, n := range c {
		low := 0.
		if i > 0 {
			low = sketch.Confidence.Bound(i - 1)
		}
		sum += float64(n) * (low + sketch.Confidence.Bound(i)) / 2
	}
	return sum / float64(c.Sum())
}
