package reconcile

import (
	"fmt"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
)

// A version that begins to serve in the place of a good one is on probation: the
// good one stays on the disk, and loaded where both can be, until the new one
// has proven itself. The first one of a model is the good one from the start. A
// fault before that has the device go back, by itself, and puts the new version
// into quarantine, which lasts until another one is wanted of its model, also
// over starts of the agent.
//
// After an end of the agent that was asked for, the new version serves at the
// next start, and begins its probation anew. After any other, like a power cut,
// the good one serves first, and the new one has to be checked once more. One that has not come to the end of it in maxTrials starts has the device
// go back.
//
// Where the good one's bundle is gone, or is damaged and cannot be repaired yet, a
// version that has served on probation without a fault stands in at a start, once
// it has been checked, for as long as the wanted one is not there; the good one is
// fetched again, unless another has proven itself before.

// Probation says when a version that has begun to serve has proven itself: after
// so many runs, not earlier than Least, or after Most without a fault.
type Probation struct {
	Runs        uint64
	Least, Most time.Duration
}

// DefaultProbation is that of a Config that has none.
var DefaultProbation = Probation{Runs: 100, Least: 30 * time.Second, Most: 10 * time.Minute}

// What a version on probation is judged by.
const (
	// judgeEvery is how often its counts are looked at.
	judgeEvery = time.Second
	// Requests that fail count as a fault when there are leastFailures, and
	// their share is above that of the good version by more than
	// moreFailures. Callers' mistakes make both fail.
	leastFailures = 5
	moreFailures  = 0.1
	// leastBaseline is how many requests the good version must have had for
	// its share to be known; it is 0 else.
	leastBaseline = 20
	// maxTrials is how often the agent may start while a version is on
	// probation.
	maxTrials = 5
)

// Counts are those of the requests of a version since it was loaded.
type Counts struct {
	Succeeded, Failed uint64
	Stalled           uint64 // runs that made no progress
}

func (n Counts) share() float64 {
	return float64(n.Failed) / float64(max(n.Succeeded+n.Failed, 1))
}

// fault says what is wrong with a version on probation, given the counts of the
// good one; "" where nothing is.
func (n Counts) fault(good Counts) string {
	if n.Stalled > 0 {
		return fmt.Sprintf("%d of its runs made no progress", n.Stalled)
	}
	baseline := 0.
	if good.Succeeded+good.Failed >= leastBaseline {
		baseline = good.share()
	}
	if n.Failed >= leastFailures && n.share() > baseline+moreFailures {
		return fmt.Sprintf("%d of %d requests failed, which is more than the %.0f %% of the version before it by over %.0f %%",
			n.Failed, n.Succeeded+n.Failed, 100*baseline, 100*moreFailures)
	}
	return ""
}

// onProbation gives the versions that are, in order.
func (c *core) onProbation() []*version {
	var all []*version
	for _, v := range c.serving {
		if !v.good && v.quarantine == "" {
			all = append(all, v)
		}
	}
	slices.SortFunc(all, func(a, b *version) int { return compareKeys(a.key, b.key) })
	return all
}

// fallback gives the good version that a model can go back to from v; nil where
// there is none.
func (c *core) fallback(v *version) *version {
	if o := c.proven(v); o != nil && o.stage != absent {
		return o
	}
	return nil
}

// proven gives the good version of v's model that is not v and not in
// quarantine, also where it has to be fetched again; nil where there is none.
func (c *core) proven(v *version) *version {
	for _, o := range c.versions {
		if o != v && o.id.Model == v.id.Model && o.good && o.quarantine == "" && o.busy != removing {
			return o
		}
	}
	return nil
}

// judge takes in the counts of versions, and gives those that the device goes
// back from, and those that have proven themselves.
func (c *core) judge(counts func(engine.VersionID) (Counts, bool), now time.Time) (reverted, proven []*version) {
	for _, v := range c.onProbation() {
		n, known := counts(v.id)
		var good Counts
		back := c.fallback(v)
		if back != nil && back.id != v.id {
			good, _ = counts(back.id)
		}
		switch fault := n.fault(good); {
		case known && fault != "" && back != nil:
			c.revert(v, fault, now)
			reverted = append(reverted, v)
		case known && n.Succeeded >= c.probation.Runs && now.Sub(v.serves) >= c.probation.Least || now.Sub(v.serves) >= c.probation.Most:
			c.prove(v)
			proven = append(proven, v)
		}
	}
	return reverted, proven
}

// prove makes a version the good one of its model.
func (c *core) prove(v *version) {
	for _, o := range c.versions {
		if o.id.Model == v.id.Model {
			o.good, o.resumes = o == v, false
		}
	}
	v.trials = 0
}

// revert puts a version into quarantine that has served, or was to, in the
// place of a good one.
func (c *core) revert(v *version, reason string, now time.Time) {
	v.quarantine, v.reverted, v.failure, v.since = reason, true, "", now
}

// interrupted puts versions into quarantine whose probation the agent has
// begun too often. It is called once, after a start.
func (c *core) interrupted(now time.Time) (reverted []*version) {
	for _, v := range c.sorted() {
		if c.desired[v.id.Model] == v && !v.good && v.quarantine == "" && v.trials >= maxTrials && c.fallback(v) != nil {
			c.revert(v, fmt.Sprintf("the agent ended %d times while it was on probation", v.trials), now)
			reverted = append(reverted, v)
		}
	}
	return reverted
}

// stopped takes in that the agent ends because it was asked to: that does not
// count against the versions on probation, which serve at the next start.
func (c *core) stopped() {
	for _, v := range c.onProbation() {
		v.trials, v.resumes = max(v.trials-1, 0), true
	}
}

// proved is when time alone will have proven a version; zero for none.
func (c *core) proved() (at time.Time) {
	for _, v := range c.onProbation() {
		if end := v.serves.Add(c.probation.Most); at.IsZero() || end.Before(at) {
			at = end
		}
	}
	return at
}

// standsBy says whether a version stays loaded for the one that serves.
func (c *core) standsBy(v *version) bool {
	have := c.serving[v.id.Model]
	return v.good && !v.broken && have != nil && have != v && !have.good
}
