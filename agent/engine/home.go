package engine

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
)

// This file keeps the accounts of the memory: what each version takes of it,
// and what becomes of that when weights come and go. memory.go decides which.

// ErrTooLarge is the error of what does not fit the memory even when nothing
// else is in it.
var ErrTooLarge = errors.New("does not fit the memory")

// residency is where a version's weights are.
type residency int

const (
	out residency = iota
	entering
	resident
	leaving
)

// String gives the words of reports and metrics.
func (r residency) String() string {
	return [...]string{"out", "entering", "resident", "leaving"}[r]
}

// Reason says why weights came in or left.
type Reason string

// The reasons.
const (
	ForLoad    Reason = "load"      // to see whether the version can run at all
	ForRequest Reason = "request"   // one waits
	ForRoom    Reason = "room"      // there is room for it; or another version needs it
	Predicted  Reason = "predicted" // requests are expected
	ForBudget  Reason = "budget"    // the budget became smaller
	ForMemory  Reason = "memory"    // a run or an activation found too little memory
	Lost       Reason = "lost"      // the runtime could not keep it
)

// home is the memory side of a version.
type home struct {
	residency residency
	since     moment // in this residency
	need      Need
	measured  int64   // workspace that it was loaded with; need may have a larger one
	charged   int64   // what the ledger has for it
	set       Setting // by which it is in
	changing  bool    // to next
	next      Setting
	refused   *Setting // that a change failed to; nil: none has
	move      job      // what goes on of activation, deactivation and change
	why       Reason
	takes     time.Duration // to activate; 0: not known
	demand    demand
	life      uint64 // counts its comings in
	hung      bool   // the activation was ended for want of progress
	yields    bool   // begins no run, so that it can leave or others can run
	hungry    bool   // its next run lacks workspace
	ends      bool   // begins no run: the session is to be closed when none goes on
	runsSince int    // that began since it came in
	most      int    // rows of a run, after one found too little memory; 0: no bound
	good      int    // runs since

	failures int // of activation, in a row
	failure  error
	retryAt  moment
	lost     error // the runtime does not have it any more

	swaps Swaps
}

// ledger is the account of the memory.
type ledger struct {
	budget   int64 // bytes; 0: no bound
	most     int64 // the largest budget so far, by which loads are judged
	oversize bool  // weights that do not fit may stay in their files
	used     int64
	pinned   int64 // of used
}

func (l *ledger) free() int64 {
	if l.budget == 0 {
		return math.MaxInt64
	}
	return l.budget - l.used
}

// size is what a version is to be charged with once it is in.
func (l *ledger) size(v *version) int64 {
	n, h := l.bare(v), &v.home
	if h.set.Prepack {
		n += h.need.copies()
	}
	if h.changing {
		n += h.beside(h.next)
	}
	return n
}

// bare is the size of a version without a prepacked copy.
func (l *ledger) bare(v *version) int64 {
	n := v.home.need.Weights + v.home.need.Session
	if l.oversize && v.home.need.Mapped && l.budget > 0 && n > l.budget {
		n = v.home.need.Session
	}
	return n
}

// copies is what prepacked weights take. Where nobody measured that, they are
// taken to be as large as the others.
func (n *Need) copies() int64 { return cmp.Or(n.Prepacked, n.Weights) }

// beside is what a version that is in takes more while it is opened anew by a
// setting.
func (h *home) beside(next Setting) int64 {
	n := int64(0)
	if next.Prepack {
		if n = h.need.copies(); !h.set.Prepack {
			return n // its session is small, and takes the place of the other
		}
	}
	if n += h.need.Session; !h.need.Mapped {
		n += h.need.Weights
	}
	return n
}

// charge has the ledger hold n bytes for a version.
func (c *core) charge(v *version, n int64) {
	c.ledger.used += n - v.home.charged
	if v.info.Options.Pinned {
		c.ledger.pinned += n - v.home.charged
	}
	v.home.charged = n
}

// workspace is what a run of so many rows is taken to need. Of a first dimension
// that is no batch, or is longer than a batch gets, nothing is known: it counts
// as much as the largest batch, so that no guess refuses it.
func (v *version) workspace(rows int) int64 {
	return v.home.need.Workspace * int64(max(min(rows, max(v.info.Options.MaxBatchSize, v.base.MaxBatchSize)), 1))
}

// pinnedBeside is what pinned versions other than v, and than those that v is
// taking the place of, hold.
func (c *core) pinnedBeside(v *version) int64 {
	if c.ledger.pinned == 0 {
		return 0
	}
	sum := int64(0)
	for _, o := range c.sorted() {
		if o.pinned() && o.spec.ID != v.spec.ID {
			sum += o.home.charged
		}
	}
	return sum
}

// tooLarge says why a request of so many rows can never run within a budget,
// and nil where it can.
func (c *core) tooLarge(v *version, rows int, budget int64) error {
	if budget == 0 {
		return nil
	}
	size := c.ledger.bare(v)
	work, pinned := v.workspace(rows), c.pinnedBeside(v)
	if size+work+pinned <= budget {
		return nil
	}
	return fmt.Errorf("%s: %w: it needs %d bytes of weights and session and %d of workspace; the budget is %d bytes, of which %d are pinned by other versions",
		v.id, ErrTooLarge, size, work, budget, pinned)
}

// raise gives a larger estimate of what a version needs beside so many bytes,
// with which it can still run.
func (c *core) raise(v *version, estimate, beside int64) int64 {
	raised := int64(float64(estimate) * memoryGrowth)
	if c.ledger.budget > 0 {
		raised = min(raised, c.ledger.budget-c.pinnedBeside(v)-beside)
	}
	return max(raised, estimate)
}

// activated takes in that a version has come in, or why not.
type activated struct {
	version *version
	need    Need
	took    time.Duration
	err     error
}

type deactivated struct {
	version *version
	err     error
}

// changed takes in that a version is open by its next Setting, or why not.
type changed struct {
	version *version
	err     error
}

// setMemory changes the budget.
type setMemory struct{ budget int64 }

// giveUp says that the caller of a load waits no more.
type giveUp struct {
	id    VersionID
	cause error
}

// What the core decides about memory.
type (
	startActivate struct {
		version *version
		set     Setting
	}
	startDeactivate struct{ version *version }
	startSet        struct {
		version *version
		set     Setting
	}
)

func (c *core) activated(ev activated) {
	v := ev.version
	h := &v.home
	h.hung = false
	if ev.err == nil {
		h.residency, h.since, h.failures, h.failure = resident, c.now, 0, nil
		ev.need.Workspace = max(ev.need.Workspace, h.need.Workspace)
		h.need = ev.need
		if h.takes == 0 {
			h.takes = ev.took
		} else {
			h.takes += (ev.took - h.takes) / 4
		}
		c.charge(v, c.ledger.size(v))
		h.swaps.came(h.why, ev.took, h.charged)
		if v.trial != nil {
			c.open(v)
		}
		c.schedule(v)
		return
	}
	h.residency, h.since = out, c.now
	c.charge(v, 0)
	h.swaps.Failed++
	switch {
	case errors.Is(ev.err, ErrOutOfMemory) && h.failures == 0:
		// Once more, when others have made room for what it seems to need.
		h.failures++
		size := c.ledger.bare(v)
		h.need.Session += c.raise(v, size, v.workspace(1)) - size
		c.relieve(c.ledger.bare(v))
	case v.trial != nil:
		c.emit(reply{call: v.trial, err: ev.err})
		v.trial = nil
		c.trials--
	case errors.Is(ev.err, ErrNotLoaded), errors.Is(ev.err, ErrQuarantined):
		c.lose(v, ev.err)
	default:
		if errors.Is(ev.err, ErrUnavailable) { // which says nothing of the version
			h.failures = 0
		}
		h.failures++
		h.failure = ev.err
		h.retryAt = c.now + min(retryActivate<<min(h.failures-1, 10), retryMost)
		c.refuseAll(v, ev.err)
	}
	c.schedule(v)
}

// giveUp ends the wait of a Load for whether its version can run.
func (c *core) giveUp(ev giveUp) {
	v := c.versions[ev.id]
	switch {
	case v == nil || v.trial == nil:
	case v.home.residency == entering:
		c.emit(interrupt{&v.home.move, ev.cause}) // it ends with an error
	default:
		c.emit(reply{call: v.trial, err: ev.cause})
		v.trial = nil
		c.trials--
	}
}

// lose takes in that the runtime will not run a version any more.
func (c *core) lose(v *version, err error) {
	h := &v.home
	h.lost = err
	c.gone(v)
	c.refuseAll(v, err)
}

// gone takes in that the runtime has put a version's weights out by itself.
func (c *core) gone(v *version) {
	h := &v.home
	if h.residency == resident {
		h.swaps.left(Lost, h.charged)
		h.residency, h.since, h.set, h.ends, h.hungry = out, c.now, Setting{}, false, false
		c.charge(v, 0)
		c.dirty = true
	}
}

// refuseTooLarge answers those first in line that can never run: the budget,
// or what is known of the version's need, may have changed since they came.
func (c *core) refuseTooLarge(v *version) {
	for r := v.queue.first(); r != nil; r = v.queue.first() {
		err := c.tooLarge(v, r.rows, c.ledger.budget)
		if err == nil {
			return
		}
		c.dequeue(v, r)
		v.figures.refused(err)
		c.leave(v, r, err)
		c.dirty = c.dirty || c.presses
	}
}

// refuseAll answers all that waits with an error.
func (c *core) refuseAll(v *version, err error) {
	for _, r := range slices.Collect(v.queue.all) {
		c.dequeue(v, r)
		v.figures.refused(err)
		c.leave(v, r, err)
	}
}

func (c *core) deactivated(ev deactivated) {
	v := ev.version
	h := &v.home
	h.residency, h.since, h.set, h.ends, h.hungry = out, c.now, Setting{}, false, false
	c.charge(v, 0)
	c.schedule(v)
}

func (c *core) changed(ev changed) {
	v := ev.version
	h := &v.home
	h.changing = false
	switch {
	case ev.err != nil:
		refused := h.next
		h.refused = &refused
	case h.residency == resident:
		h.set = h.next
	}
	if h.residency == resident {
		c.charge(v, c.ledger.size(v))
	}
	c.end(v)
	c.schedule(v)
}

// outOfMemory takes in that a run found too little memory: the session is
// closed and made anew, others leave, and the next run is at most half as
// large.
func (c *core) outOfMemory(v *version, r *run) {
	h := &v.home
	h.most, h.good = max(1, r.rows/2), 0
	h.need.Workspace = max(c.raise(v, h.need.Workspace, c.ledger.bare(v)), 1)
	h.ends = h.residency == resident && r.life == h.life
	c.end(v)
	c.relieve(v.workspace(r.rows))
}

// end closes a session that is to be closed, as soon as nothing goes on with
// it.
func (c *core) end(v *version) {
	if h := &v.home; h.ends && !c.stopped && len(v.runs) == 0 && h.residency == resident && v.phase != unloading && !h.changing {
		c.putOut(v, ForMemory)
	}
}

// grow lets runs become larger again after many that ended well since one that
// found too little memory, and takes what the version was measured to need.
func (h *home) grow(rows int) {
	if h.good++; h.good < growBatches {
		return
	}
	h.good, h.most = 0, 2*h.most
	if h.most >= rows {
		h.most, h.need.Workspace = 0, h.measured
	}
}

func (c *core) enter(v *version, why Reason) {
	h := &v.home
	h.residency, h.since, h.why, h.yields, h.runsSince = entering, c.now, why, false, 0
	h.life++
	h.set = Setting{Threads: v.tuning.Threads}
	c.charge(v, c.ledger.size(v))
	c.emit(startActivate{v, h.set})
}

// putOut has a version on which nothing runs leave.
func (c *core) putOut(v *version, why Reason) {
	h := &v.home
	h.residency, h.since, h.yields = leaving, c.now, false
	h.swaps.left(why, h.charged)
	c.emit(startDeactivate{v})
}

// Swaps count how often a version's weights came in and left, and how much
// that took.
type Swaps struct {
	In  map[Reason]Total
	Out map[Reason]uint64
	// Bytes that came in and left, as the ledger has them.
	BytesIn, BytesOut uint64
	Failed            uint64 // activations
	Times             Histogram
}

func newSwaps() Swaps {
	return Swaps{In: map[Reason]Total{}, Out: map[Reason]uint64{}, Times: Histogram{Bounds: timeBounds, Counts: make([]uint64, len(timeBounds)+1)}}
}

func (s *Swaps) came(why Reason, took time.Duration, bytes int64) {
	t := s.In[why]
	t.add(took)
	s.In[why] = t
	s.BytesIn += uint64(bytes)
	s.Times.observe(took.Seconds())
}

func (s *Swaps) left(why Reason, bytes int64) {
	s.Out[why]++
	s.BytesOut += uint64(bytes)
}

func (s *Swaps) clone() Swaps {
	c := *s
	c.In, c.Out = maps.Clone(s.In), maps.Clone(s.Out)
	c.Times.Counts = slices.Clone(s.Times.Counts)
	return c
}

// cannotCome says why a request need not wait for its version's weights, and
// nil where it may.
func (c *core) cannotCome(v *version, r *request) error {
	h := &v.home
	switch {
	case h.lost != nil:
		return h.lost
	case h.residency != resident && h.retryAt > c.now:
		return &RefusedError{fmt.Errorf("%s: %w: %w", v.id, ErrUnavailable, h.failure), h.retryAt - c.now}
	case c.ledger.budget > 0:
		return c.tooLarge(v, r.rows, c.ledger.budget)
	}
	return nil
}
