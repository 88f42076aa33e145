package engine

import (
	"container/list"
	"fmt"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/datadrift"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// This file is how a version decides what it takes in, what runs next and what
// it gives up. In short:
//
// The waiting requests stand in one line, see rank. Whenever an instance is
// free the first in line runs, together with those behind it that may join it,
// unless that run is held back so that it becomes larger, see next.
//
// The estimate of run times puts a price on each request: by how much it
// delays those behind it. So it is known when each will start. A request that
// will start too late is refused: on arrival, see admit, and whenever what
// happened since makes it late, see hopeless. On arrival the wait must leave a
// reserve, so that few are taken in that are refused afterwards.
//
// A device that is throttled pauses between rows of runs, see opens, and all of
// the above reckons with that: each run takes up its pause too, see stretch.

const (
	// scanLimit is how many requests that cannot join a run are passed over to
	// find those that can.
	scanLimit = 256
	// slowRuns is how many runs as slow as the worst one the reserve is for.
	slowRuns = 2
	// retryUnknown is the hint where no estimate gives one.
	retryUnknown = time.Second
	// A run that has gone on for longer than stuckAfter, and than stuckFactor
	// times its estimate, is no progress.
	stuckAfter  = 10 * time.Second
	stuckFactor = 20
)

// version is the core's record of a version.
type version struct {
	id       VersionID // of its generation
	spec     Spec      // as it was asked for
	phase    phase
	info     *Info           // never changed once it is published
	base     serving.Options // before tuning
	tuning   Tuning
	levels   []level // of priority, the highest first
	pace     *pace   // of all versions
	queue    queue
	runs     []*run // in progress
	separate bool   // its outputs have no rows: every request runs alone
	predict  predictor
	hold     moment // until when the first in line is held back; never where it is not
	home     home   // its weights
	trial    *call  // of Load, which waits for whether it can run; nil: there is none
	unload   job
	waiters  []*call // of drain
	figures  Figures
	sure     *confidence      // nil: no output says; a mutex of its own
	data     *datadrift.Watch // the same; nil: nobody watches
}

// level is one priority of a version.
type level struct {
	policy  serving.QueuePolicy
	waiting int       // in the queue
	held    int       // that have run, and whose answers must not leave yet
	order   list.List // of the requests to answer, by arrival, where answers keep that order
}

func (l *level) full() bool { return l.waiting+l.held >= l.policy.MaxSize }

// limits says until when r may wait and when it must be answered: within the
// time-out of its queue, or a shorter one of its own where it may name one,
// and within its deadline. With Delay it goes behind all others when the
// time-out ends, instead of leaving.
func (v *version) limits(r *request, now moment, epoch time.Time) {
	r.arrived, r.startBy, r.due, r.moves = now, never, never, never
	policy := &v.levels[r.level].policy
	timeout := policy.Timeout
	if policy.AllowTimeoutOverride && r.timeout > 0 && (timeout == 0 || r.timeout < timeout) {
		timeout = min(r.timeout, serving.MaxDuration)
	}
	if timeout > 0 && policy.Delay {
		r.moves = now + timeout
	} else if timeout > 0 {
		r.startBy = now + timeout
	}
	if !r.deadline.IsZero() {
		r.due = min(r.deadline.Sub(epoch), never)
	}
}

// rank orders the line: by arrival, as if a request of the next lower priority
// had come one Ageing later. So it counts one level higher for each Ageing that
// it has waited, and nothing overtakes it for ever.
func (v *version) rank(r *request) moment {
	return r.arrived + time.Duration(r.level)*v.info.Options.Ageing
}

// price says by how much r delays those behind it, and when it must start.
func (v *version) price(r *request) {
	o := &v.info.Options
	r.plan = r.size
	if v.joins(r) {
		whole := float64(r.size) / float64(r.rows) * float64(v.largest())
		r.plan = max(r.size, v.predict.efficient(whole, (r.due-r.arrived)/2))
	}
	r.cost = v.stretch(v.predict.cost(r.size, r.plan)) / time.Duration(o.Instances)
	switch {
	case r.due == never:
		r.latest = r.startBy
	case r.urgent:
		r.latest = min(r.startBy, r.due-v.predict.upper(r.size))
	default:
		r.latest = min(r.startBy, r.due-v.predict.upper(r.plan))
	}
}

// largest is the most rows of a run of several requests.
func (v *version) largest() int {
	most := v.info.Options.MaxBatchSize
	if v.pace.MaxBatch > 0 {
		most = min(most, v.pace.MaxBatch)
	}
	return most
}

// opens is when the pace lets a run begin which takes so long, and for which
// all else is ready at a time from now on.
//
// A device that is throttled rests after each row of runs. Any may begin a row,
// or join it until the first of it has ended, and from then on those that are
// not expected to make it longer. So the shares of a short and of a long model
// are as without a throttle, and yet each row ends. All that waits for the next
// one is let in at its begin: nothing waits for ever.
func (v *version) opens(now, ready moment, takes time.Duration) moment {
	p := v.pace
	switch {
	case !p.throttled():
		return ready
	case p.running == 0:
		return max(ready, p.until())
	case !p.closing && ready <= now, takes > 0 && ready+takes <= p.ends:
		return ready
	default:
		ends := max(now, p.ends) + 1
		return max(ready, ends+p.rest(ends-p.began))
	}
}

// closed is until when the pace lets the next run not begin; now where it may.
func (v *version) closed(now moment) moment {
	if !v.pace.throttled() {
		return now
	}
	takes := time.Duration(0)
	if r := v.queue.first(); r != nil {
		takes = v.predict.mean(r.plan)
	}
	return v.opens(now, now, takes)
}

// stretch is for how long a run, which takes so long, keeps the next one from
// starting.
func (v *version) stretch(takes time.Duration) time.Duration {
	return takes + v.pace.rest(takes)
}

// start is when the next run can start: at once where an instance is free and
// the weights are in, and else when the first of those in progress ends, or the
// weights have come; and not before the pace lets it. overrun is for how long
// that has been over its estimate.
func (v *version) start(now moment) (start moment, overrun time.Duration) {
	if v.free() || !v.predict.known() {
		return max(now+v.comes(now), v.closed(now)), 0
	}
	ends := v.runs[0].ends
	for _, r := range v.runs[1:] {
		ends = min(ends, r.ends)
	}
	return v.opens(now, max(now, ends), 0), max(0, now-ends)
}

func (v *version) free() bool { return len(v.runs) < v.info.Options.Instances }

// startAfter is when a request can start that has this cost ahead of it, where
// runs last as long as given, and their pauses. Several instances do not take it up evenly, but
// in the order in which they become free.
func (v *version) startAfter(cost, takes time.Duration, now moment) moment {
	var room [serving.MaxInstances]moment
	ends := room[:v.info.Options.Instances]
	for i := range ends {
		ends[i] = now + v.comes(now)
		if i < len(v.runs) && v.predict.known() {
			ends[i] = max(ends[i], v.runs[i].ends)
		}
		ends[i] = v.opens(now, ends[i], takes)
	}
	takes = v.stretch(takes)
	slices.Sort(ends)
	instances := time.Duration(len(ends))
	cost *= instances
	var runs time.Duration
	if takes > 0 {
		runs = cost / takes
	}
	return ends[runs%instances] + runs/instances*takes + cost%max(takes, 1)
}

// backlog counts what waits. A version that has nothing to do lets nobody wait.
func (c *core) backlog() Backlog {
	b := Backlog{Waiting: c.waiting, Known: true}
	for _, v := range c.current {
		switch {
		case v.idle():
		case !v.predict.known():
			b.Known = false
		default:
			b.Wait = max(b.Wait, v.startAfter(v.queue.total(), v.predict.mean(1), c.now)-c.now)
		}
	}
	if !b.Known {
		b.Wait = 0
	}
	return b
}

// lag is by how much the first in line may start later than if busy instances
// took up its costs evenly.
func (v *version) lag() time.Duration {
	longest := time.Duration(0)
	for _, r := range v.runs {
		longest = max(longest, r.ends-r.started)
	}
	return longest - longest/time.Duration(v.info.Options.Instances)
}

// admit says why a request may not wait, and nil where it may. It prices it.
func (v *version) admit(r *request, now moment) error {
	start, overrun := v.start(now)
	if l := &v.levels[r.level]; l.full() {
		after := start - now
		if after == 0 {
			after = retryUnknown
		}
		return &RefusedError{fmt.Errorf("%s: %w: %d requests wait", v.id, ErrOverloaded, l.waiting+l.held), after}
	}
	v.price(r)
	if v.short(r) {
		r.urgent = true
		v.price(r)
	}
	if v.queue.len == 0 && len(v.runs) == 0 && r.due != never {
		// To refuse it saves nothing, unless it is sure to be too late.
		takes := v.predict.mean(r.size)
		if v.predict.doubtful(now) {
			takes = 0
		}
		r.latest = min(r.startBy, r.due-takes)
	}
	start = v.startAfter(v.queue.ahead(r), v.predict.mean(r.plan), now)
	// The wait may turn out longer: by as much as slower runs take longer. For
	// a deadline's sake also by runs as slow as the worst one, though not by
	// more than itself, since a short wait is one for few runs; and by as much
	// again as a run in progress has overrun its estimate.
	wait := start - now
	reserve := times(wait, v.predict.high-1)
	if r.latest < r.startBy {
		takes := v.predict.mean(r.plan)
		for _, run := range v.runs {
			takes = max(takes, run.ends-run.started)
		}
		takes = v.stretch(takes)
		reserve += min(wait, times(takes, slowRuns*(v.predict.worst-1))) + overrun
	}
	if r.latest < start+reserve {
		v.predict.refuses(now)
		return v.expired(r, start, reserve, now)
	}
	return nil
}

// times is d by a factor; 0 where that is negative.
func times(d time.Duration, factor float64) time.Duration {
	return max(0, duration(d.Seconds()*factor))
}

// expired is the refusal of a request that would start at start.
func (v *version) expired(r *request, start moment, reserve time.Duration, now moment) error {
	would, takes, left := "wait", start-now, r.startBy-now
	if run := v.predict.upper(r.size); r.due-run <= r.startBy {
		would, takes, left = "take", takes+run, r.due-now
	}
	var after time.Duration
	if start > now {
		after = max(0, start+reserve-r.latest)
	} // else it comes too late though nothing is ahead of it
	return &RefusedError{fmt.Errorf("%s: %w: it would %s %v, %v are left", v.id, ErrExpired, would,
		takes.Round(time.Microsecond), max(0, left).Round(time.Microsecond)), after}
}

// hopeless gives a waiting request that will start too late; nil where there
// is none. While an instance is free those count only that are late already.
//
// A run that is small because the first in line has no time for a larger one
// makes those behind it late in turn. So a request must start in time for a
// run as large as it plans for, unless so few wait that there is none.
func (v *version) hopeless(now moment) *request {
	start, _ := v.start(now)
	for {
		r := v.queue.overdue(now)
		if r == nil && (!v.free() || v.closed(now) > now) {
			r = v.queue.hopeless(start - v.lag())
		}
		if r == nil || r.urgent || !v.short(r) {
			return r
		}
		v.queue.remove(r)
		r.urgent = true
		v.price(r)
		v.queue.insert(r)
	}
}

// short says that no more waits than fits a run as large as r plans for.
func (v *version) short(r *request) bool {
	return v.queue.total()*time.Duration(v.info.Options.Instances) < v.stretch(v.predict.mean(r.plan))
}

// next gives the requests of the next run. It gives none where that is held
// back, until v.hold or until something happens.
//
// The first in line takes with it those behind it whose shapes agree, as far
// as the rows allow, and the deadlines, see shared. If the rows make
// the largest run, or a preferred size on the way, that is the run. Otherwise it
// is held while it could grow, until the oldest has waited for MaxQueueDelay or
// one must start.
func (v *version) next(now moment) []*request {
	o := &v.info.Options
	var members []*request
	var size int64
	largest := v.largest()
	var rows, preferred, passed int // preferred is how many of members make the largest preferred size
	longest, oldest, due, latest := never, never, never, never
	whole := false
	for r := range v.queue.all {
		if members == nil {
			if !v.joins(r) {
				return []*request{r}
			}
			members = make([]*request, 0, min(v.queue.len, largest))
		} else if !v.joins(r) || !alike(members[0], r) {
			if passed++; passed == scanLimit {
				break
			}
			continue
		}
		all := size + r.size
		if len(members) > 0 && (rows+r.rows > largest || v.predict.mean(all) > longest || now+v.predict.upper(all) > r.due) {
			whole = true
			break
		}
		members, rows, size = append(members, r), rows+r.rows, all
		longest = min(longest, v.shared(r, now))
		oldest, due, latest = min(oldest, r.arrived), min(due, r.due), min(latest, r.patience())
		if slices.Contains(o.PreferredBatchSizes, rows) {
			preferred = len(members)
		}
		if rows >= largest {
			return members
		}
	}
	if members == nil {
		return nil
	}
	overdue := oldest + o.MaxQueueDelay
	switch {
	case overdue <= now:
		return members
	case preferred > 0:
		return members[:preferred]
	case whole, v.phase != ready, slices.ContainsFunc(v.levels, func(l level) bool { return l.full() }):
		return members // nothing can join
	}
	until := min(overdue, latest, due-v.predict.upper(size))
	if until <= now {
		return members
	}
	v.hold = until
	return nil
}

// patience is until when r lets itself be held back: for half of the time that
// it can wait. The rest is for what no estimate knows: a late timer, a run that
// is slow, the way back.
func (r *request) patience() moment {
	if r.latest == never {
		return never
	}
	return r.arrived + (r.latest-r.arrived)/2
}

// joins says whether r may run with others at all.
func (v *version) joins(r *request) bool {
	return v.info.Options.DynamicBatching && !v.separate && !r.alone
}

// shared is how long a run that r is part of may be expected to take with those
// behind r in it: as long as one of the size that r plans for, while they take
// no more than half of the time that r can spare; and in any case a quarter of
// the time it has left.
func (v *version) shared(r *request, now moment) time.Duration {
	if r.due == never || !v.predict.known() {
		return never
	}
	left := times(r.due-now, 1/v.predict.high)
	if !v.predict.shaped {
		return left // only larger runs tell what they save
	}
	own := v.predict.mean(r.size)
	return max(min(v.predict.mean(r.plan), own+(left-own)/2), (r.due-now)/4)
}

// alike says whether the inputs of two requests, which both have in the order
// of the model, differ in the first dimension only.
func alike(a, b *request) bool {
	return slices.EqualFunc(a.inputs, b.inputs, func(x, y tensor.Tensor) bool {
		return slices.Equal(x.Shape[1:], y.Shape[1:])
	})
}

// wake is when the version must be looked at again if nothing happens.
func (v *version) wake() moment {
	wake := min(v.hold, v.queue.soonest())
	for _, r := range v.runs {
		if !r.stalled {
			wake = min(wake, r.started+v.patienceFor(r)+1)
		}
	}
	if h := &v.home; h.residency == entering && !h.hung {
		wake = min(wake, h.since+h.patience()+1)
	}
	if slack := v.queue.slack(); !v.free() && slack < never/2 { // no deadline is as far off as that
		wake = min(wake, slack+v.lag()+1)
	}
	return wake
}

// patienceFor is how long a run may go on before it counts as one without
// progress.
func (v *version) patienceFor(r *run) time.Duration {
	return max(stuckAfter, stuckFactor*v.predict.mean(r.size))
}

// interruptStalled ends the runs that make no progress.
func (c *core) interruptStalled(v *version) {
	for _, r := range v.runs {
		if !r.stalled && c.now-r.started > v.patienceFor(r) {
			r.stalled = true
			c.emit(interrupt{&r.job, ErrStalled})
		}
	}
}

// patience is how long an activation may go on.
func (h *home) patience() time.Duration { return max(hungAfter, stuckFactor*h.takes) }

// interruptHung ends an activation that makes no progress.
func (c *core) interruptHung(v *version) {
	if h := &v.home; h.residency == entering && !h.hung && c.now-h.since > h.patience() {
		h.hung = true
		c.emit(interrupt{&h.move, ErrStalled})
	}
}

// stuck says why the version makes no progress, and nil where it does.
func (v *version) stuck(now moment) error {
	for _, r := range v.runs {
		if age := now - r.started; age > v.patienceFor(r) {
			return fmt.Errorf("%s: a run has not ended for %v", v.id, age.Round(time.Millisecond))
		}
	}
	switch r, h := v.queue.first(), &v.home; {
	case h.residency == entering || h.residency == leaving:
		if age := now - h.since; age > stuckAfter+stuckFactor*h.takes {
			return fmt.Errorf("%s: its weights have been %s for %v", v.id, h.residency, age.Round(time.Millisecond))
		}
	case r == nil || !v.free() || h.residency == out || h.yields || v.closed(now) > now: // nothing waits, or for something
	case now-max(r.arrived, v.pace.until()) > stuckAfter+v.info.Options.MaxQueueDelay && now-h.since > stuckAfter:
		return fmt.Errorf("%s: a request has waited for %v though it could run", v.id, (now - r.arrived).Round(time.Millisecond))
	}
	return nil
}
