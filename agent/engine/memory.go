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

// This file is how the core decides which versions' weights are in memory. In
// short:
//
// The ledger charges each version that is not out with its weights, its
// session and its prepacked copy, and each run with its workspace, and keeps
// the sum within the budget. What can never fit is refused with the numbers.
//
// A version that is out and has requests waits for room; the one whose first
// request is the first in line, by the rank of policy.go, is served first. Room
// is made by those that cost least to bring back: see victims. One that was
// brought in stays for a while, and one with requests of its own leaves only
// for an older request that has waited for long enough, between two runs. So
// each coming in answers at least one request, and nobody waits for ever.
//
// When nobody waits for room, what is left of it is used ahead of demand: for
// versions that fit, for those that are expected to be asked for soon, and for
// prepacked copies of those in use.

const (
	// maxEntering is how many versions come in at a time: a large one must not
	// hold up small ones.
	maxEntering = 2
	// A version that was brought in stays for stayFactor times what that took,
	// within these bounds.
	stayFactor         = 2
	stayLeast, stayMax = 5 * time.Millisecond, time.Second
	// patienceLeast is how long the first in line waits before a version with
	// younger requests must leave for it, or as long as it takes to bring both
	// in.
	patienceLeast = 20 * time.Millisecond
	// activateUnknown is what bringing a version in is taken to cost before it
	// has been done.
	activateUnknown = 10 * time.Millisecond
	// aheadFactor and aheadLeast say how long before a burst is expected its
	// version is brought in.
	aheadFactor = 3
	aheadLeast  = time.Second
	// After an activation that failed, requests are refused for a while that
	// doubles up to retryMost.
	retryActivate = 100 * time.Millisecond
	retryMost     = 10 * time.Second
	// prepackAfter is how many runs a version must have had since it came in
	// to be worth a prepacked copy.
	prepackAfter = 2
	// calmAfter is how long nothing is brought in ahead of demand after the
	// device has shown to have less memory than the ledger says.
	calmAfter = 30 * time.Second
	// growBatches is how many runs must end well until runs may become larger
	// again after one that found too little memory.
	growBatches = 100
	// memoryGrowth is by how much an estimate of memory is raised that has
	// turned out to be too low.
	memoryGrowth = 1.5
)

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
)

// home is the memory side of a version.
type home struct {
	residency  residency
	since      moment // in this residency
	need       Need
	charged    int64 // what the ledger has for it
	prepacked  bool
	prepacking bool
	noPrepack  bool // it failed
	move       job  // what goes on of activation, deactivation and prepacking
	why        Reason
	takes      time.Duration // to activate; 0: not known
	demand     demand
	yields     bool // begins no run, so that it can leave
	runsSince  int  // that began since it came in
	most       int  // rows of a run, after one found too little memory; 0: no bound
	good       int  // runs since

	failures int // of activation, in a row
	failure  error
	retryAt  moment
	lost     error // the runtime does not have it any more

	swaps Swaps
}

// ledger is the account of the memory.
type ledger struct {
	budget   int64 // bytes; 0: no bound
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
	n := v.home.need.Weights + v.home.need.Session
	if l.oversize && v.home.need.Mapped && l.budget > 0 && n > l.budget {
		n = v.home.need.Session
	}
	if v.home.prepacked || v.home.prepacking {
		n += v.home.need.Prepacked
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

// workspace is what a run of so many rows takes.
func (v *version) workspace(rows int) int64 { return v.home.need.Workspace * int64(max(rows, 1)) }

// pinnedBeside is what pinned versions other than v hold.
func (c *core) pinnedBeside(v *version) int64 {
	if v.info.Options.Pinned {
		return c.ledger.pinned - v.home.charged
	}
	return c.ledger.pinned
}

// tooLarge says why a request of so many rows can never run, and nil where it
// can.
func (c *core) tooLarge(v *version, rows int) error {
	l := &c.ledger
	if l.budget == 0 {
		return nil
	}
	size := l.size(v)
	if v.home.prepacked || v.home.prepacking {
		size -= v.home.need.Prepacked
	}
	pinned := c.pinnedBeside(v)
	if work := v.workspace(rows); size+work+pinned > l.budget {
		return fmt.Errorf("%s: %w: it needs %d bytes of weights and session and %d of workspace; the budget is %d bytes, of which %d are pinned by other versions",
			v.id, ErrTooLarge, size, work, l.budget, pinned)
	}
	return nil
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

type prepacked struct {
	version *version
	err     error
}

// setMemory changes the budget.
type setMemory struct{ budget int64 }

// What the core has done to memory.
type (
	startActivate   struct{ version *version }
	startDeactivate struct{ version *version }
	startPrepack    struct{ version *version }
)

// arrange brings in and puts out what the moment asks for. It is called at the
// end of each step in which something has changed for the memory.
func (c *core) arrange() {
	c.dirty, c.arrangeAt = false, never
	if c.stopped {
		return
	}
	yielded := c.unyield()
	moves := c.try(c.moves())
	c.presses = false
	for moves < maxEntering {
		v := c.claimant()
		if v == nil {
			break
		}
		if c.presses = !c.makeRoom(v); c.presses {
			break
		}
		c.enter(v, ForRequest)
		moves++
	}
	switch {
	case c.ledger.free() < 0:
		c.shed()
	case c.presses || moves > 0:
	case c.now < c.calm:
		c.look(c.calm)
	default:
		c.ahead()
	}
	for _, v := range yielded {
		if !v.home.yields && v.home.residency == resident {
			c.schedule(v)
		}
	}
	c.resume()
	c.dirty = false
	if c.arrangeAt < c.alarm {
		c.alarm = c.arrangeAt
		c.emit(wake{c.epoch.Add(c.alarm)})
	}
}

// unyield gives the versions that were asked to leave: whether they still are
// is decided anew.
func (c *core) unyield() []*version {
	var yielded []*version
	for _, v := range c.sorted() {
		if v.home.yields {
			v.home.yields = false
			yielded = append(yielded, v)
		}
	}
	return yielded
}

// try brings versions in that are being loaded, to see whether they can run at
// all, and gives how many come in now. One for which there is no room has to
// show that with its first request.
func (c *core) try(moves int) int {
	if c.trials == 0 {
		return moves
	}
	for _, v := range c.sorted() {
		switch {
		case v.trial == nil || v.home.residency != out:
		case c.ledger.size(v) > c.ledger.free():
			c.open(v)
		case moves < maxEntering:
			c.enter(v, ForLoad)
			moves++
		}
	}
	return moves
}

// look has the memory arranged again at a time.
func (c *core) look(at moment) { c.arrangeAt = min(c.arrangeAt, at) }

// moves counts the versions that come in.
func (c *core) moves() int {
	n := 0
	for _, v := range c.versions {
		if v.home.residency == entering {
			n++
		}
	}
	return n
}

// claimant gives the version that is to come in next, of those that have
// requests; nil where there is none.
func (c *core) claimant() *version {
	var first *version
	var ahead *request
	for _, v := range c.versions {
		if v.home.residency != out || v.queue.len == 0 {
			continue
		}
		if v.home.retryAt > c.now {
			c.look(v.home.retryAt)
			continue
		}
		c.refuseTooLarge(v)
		if r := v.queue.first(); r == nil {
			continue
		} else if ahead == nil || r.before(ahead) || !ahead.before(r) && v.id.Compare(first.id) < 0 {
			first, ahead = v, r
		}
	}
	return first
}

// makeRoom says whether there is room for a version and a run of its first
// request. Where there is none it has others leave.
func (c *core) makeRoom(v *version) bool {
	r := v.queue.first()
	lacks := c.ledger.size(v) + v.workspace(r.rows) - c.ledger.free()
	if lacks <= 0 {
		return true
	}
	patience := r.arrived + max(patienceLeast, 2*v.home.activation())
	return c.evict(v, lacks, patience, r)
}

// evict has idle versions leave until so many bytes are on their way, and,
// where those are too few and patience is over, versions with requests younger
// than r. It says whether there is room at once, which is only so where
// nothing lacks.
func (c *core) evict(claimant *version, lacks int64, patience moment, r *request) bool {
	var idle, busy []*version
	for _, v := range c.sorted() {
		h := &v.home
		switch {
		case v == claimant:
		case h.residency == leaving:
			lacks -= h.charged
		case !v.canLeave() || v.info.Options.Pinned:
		case len(v.runs) > 0 || v.queue.len > 0:
			busy = append(busy, v)
		case c.now < h.since+v.stay():
			c.look(h.since + v.stay())
		default:
			idle = append(idle, v)
		}
	}
	if lacks <= 0 {
		return false
	}
	chosen, enough := c.victims(idle, lacks)
	if enough {
		for _, v := range chosen {
			c.putOut(v, ForRoom)
		}
		return false
	}
	for _, v := range idle { // they are needed in any case
		c.putOut(v, ForRoom)
		lacks -= v.home.charged
	}
	if c.now < patience {
		c.look(patience)
		return false
	}
	busy = slices.DeleteFunc(busy, func(v *version) bool { return v.queue.len > 0 && v.queue.first().before(r) })
	chosen, _ = c.victims(busy, lacks)
	for _, v := range chosen {
		if len(v.runs) == 0 {
			c.putOut(v, ForRoom)
		} else {
			v.home.yields = true
		}
	}
	return false
}

// canLeave says whether a version holds memory that it can give back once
// nothing runs on it.
func (v *version) canLeave() bool {
	h := &v.home
	return h.residency == resident && v.phase != unloading && !h.prepacking && h.charged > 0
}

func (v *version) idle() bool { return len(v.runs) == 0 && v.queue.len == 0 }

// victims chooses versions to leave which together hold at least so many bytes
// and cost least to bring back, and says whether there are enough.
//
// It takes them in the order of what their leaving costs for each byte, and
// then gives back those that are not needed after all, the dearest first. That
// is the greedy algorithm for the covering knapsack problem.
func (c *core) victims(from []*version, bytes int64) ([]*version, bool) {
	type option struct {
		version *version
		loss    float64
	}
	options := make([]option, 0, len(from))
	for _, v := range from {
		options = append(options, option{v, c.loss(v)})
	}
	slices.SortStableFunc(options, func(a, b option) int {
		return cmp.Compare(a.loss/float64(a.version.home.charged), b.loss/float64(b.version.home.charged))
	})
	n, sum := 0, int64(0)
	for n < len(options) && sum < bytes {
		sum += options[n].version.home.charged
		n++
	}
	options = options[:n]
	slices.SortStableFunc(options, func(a, b option) int { return cmp.Compare(b.loss, a.loss) })
	var chosen []*version
	for _, o := range options {
		if sum-o.version.home.charged >= bytes {
			sum -= o.version.home.charged
			continue
		}
		chosen = append(chosen, o.version)
	}
	return chosen, sum >= bytes
}

// loss is what it costs that a version is out: the time that it takes to come
// in, for each second until it has to. So what is used soonest and comes in
// most slowly stays; where requests come at random that is the rate of them
// by the cost of one.
func (c *core) loss(v *version) float64 {
	return v.home.activation().Seconds() / v.home.demand.next(c.now, c.time).Seconds()
}

// activation is how long it takes to bring a version in.
func (h *home) activation() time.Duration { return cmp.Or(h.takes, activateUnknown) }

// stay is how long a version stays that was brought in.
func (v *version) stay() time.Duration {
	if v.home.why == ForRoom && v.home.runsSince == 0 {
		return 0 // nobody has asked for it
	}
	return min(max(stayLeast, stayFactor*v.home.activation()), stayMax)
}

// ahead is how long before requests are expected a version is brought in.
func (v *version) ahead() time.Duration { return max(aheadLeast, aheadFactor*v.home.activation()) }

// comes is how long it will be until a version is in, where nobody is ahead
// of it.
func (v *version) comes(now moment) time.Duration {
	switch h := &v.home; h.residency {
	case resident:
		return 0
	case entering:
		return max(0, h.since+h.takes-now)
	default:
		return h.takes
	}
}

func (c *core) enter(v *version, why Reason) {
	h := &v.home
	h.residency, h.since, h.why, h.yields, h.runsSince = entering, c.now, why, false, 0
	c.charge(v, c.ledger.size(v))
	c.emit(startActivate{v})
}

// putOut has a version on which nothing runs leave.
func (c *core) putOut(v *version, why Reason) {
	h := &v.home
	h.residency, h.since, h.yields = leaving, c.now, false
	h.swaps.left(why, h.charged)
	c.emit(startDeactivate{v})
}

// shed has versions leave until the ledger is within the budget again.
func (c *core) shed() {
	var idle, busy []*version
	lacks := -c.ledger.free()
	for _, v := range c.sorted() {
		switch h := &v.home; {
		case h.residency == leaving:
			lacks -= h.charged
		case !v.canLeave():
		case len(v.runs) > 0:
			busy = append(busy, v)
		default:
			idle = append(idle, v)
		}
	}
	if lacks <= 0 {
		return
	}
	chosen, enough := c.victims(idle, lacks)
	for _, v := range chosen {
		c.putOut(v, ForBudget)
		lacks -= v.home.charged
	}
	if !enough {
		chosen, _ = c.victims(busy, lacks)
		for _, v := range chosen {
			v.home.yields = true
		}
	}
}

// ahead uses room that nobody waits for: first for versions that are expected
// to be asked for soon, for which others may leave that are worth less; then
// for whatever fits; last for prepacked copies.
func (c *core) ahead() {
	var fits, expected, prepack *version
	var soonest moment = never
	for _, v := range c.sorted() {
		h := &v.home
		switch {
		case h.residency == out && v.phase == ready && h.lost == nil && h.failures == 0:
			h.demand.turn(c.time)
			if from, _ := h.demand.expects(c.now, c.time); from != never {
				if from -= v.ahead(); from > c.now {
					c.look(from)
				} else if from < soonest {
					expected, soonest = v, from
				}
			}
			if c.ledger.size(v) <= c.ledger.free() && (fits == nil || h.demand.rate(c.now) > fits.home.demand.rate(c.now)) {
				fits = v
			}
		case h.residency == resident && !h.prepacked && !h.prepacking && !h.noPrepack && h.need.Prepacked > 0 && h.runsSince >= prepackAfter &&
			v.phase == ready && h.need.Prepacked+v.workspace(v.info.Options.MaxBatchSize) <= c.ledger.free() && (prepack == nil || h.demand.rate(c.now) > prepack.home.demand.rate(c.now)):
			prepack = v
		case h.prepacking:
			return // one at a time, and nothing ahead of demand beside it
		}
	}
	switch {
	case expected != nil && c.worth(expected):
	case expected != nil:
		c.look(c.now + expected.ahead()/2) // it may become so
	case fits != nil:
		c.enter(fits, ForRoom)
	case prepack != nil:
		h := &prepack.home
		h.prepacking = true
		c.charge(prepack, c.ledger.size(prepack))
		c.emit(startPrepack{prepack})
	}
}

// worth brings a version in that is expected to be asked for, or has others
// leave for it, where those are worth less, and says whether it did.
func (c *core) worth(v *version) bool {
	lacks := c.ledger.size(v) - c.ledger.free()
	if lacks <= 0 {
		c.enter(v, Predicted)
		return true
	}
	var idle []*version
	for _, o := range c.sorted() {
		h := &o.home
		if h.residency == leaving {
			lacks -= h.charged
		}
		if o.canLeave() && o.idle() && !o.info.Options.Pinned {
			idle = append(idle, o)
		}
	}
	if lacks <= 0 {
		return true
	}
	chosen, enough := c.victims(idle, lacks)
	loss := 0.0
	for _, o := range chosen {
		loss += c.loss(o)
	}
	if !enough || loss >= c.loss(v) {
		return false
	}
	for _, o := range chosen {
		c.putOut(o, Predicted)
	}
	return true
}

// sorted gives the versions in the order of their names, so that decisions do
// not depend on that of a map.
func (c *core) sorted() []*version {
	if c.order == nil {
		c.order = slices.SortedFunc(maps.Values(c.versions), func(a, b *version) int { return a.id.Compare(b.id) })
	}
	return c.order
}

// put adds a version, or forgets one where v is nil.
func (c *core) put(id VersionID, v *version) {
	c.order = nil
	if v == nil {
		delete(c.versions, id)
	} else {
		c.versions[id] = v
	}
}

func (c *core) activated(ev activated) {
	v := ev.version
	h := &v.home
	if ev.err == nil {
		h.residency, h.since, h.failures, h.failure = resident, c.now, 0, nil
		ev.need.Workspace = max(ev.need.Workspace, h.need.Workspace)
		h.need = ev.need
		if h.takes == 0 {
			h.takes = ev.took
		} else {
			h.takes += (ev.took - h.takes) / 4
		}
		h.prepacked = false
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
	case v.trial != nil:
		c.emit(reply{call: v.trial, err: ev.err})
		v.trial = nil
		c.trials--
	case errors.Is(ev.err, ErrNotLoaded), errors.Is(ev.err, ErrQuarantined):
		c.lose(v, ev.err)
	case errors.Is(ev.err, ErrOutOfMemory) && h.failures == 0:
		// Once more, when others have made room for what it seems to need.
		h.failures++
		h.need.Session += int64(float64(c.ledger.size(v)) * (memoryGrowth - 1))
		c.relieve(c.ledger.size(v))
	default:
		h.failures++
		h.failure = ev.err
		h.retryAt = c.now + min(retryActivate<<min(h.failures-1, 10), retryMost)
		c.refuseAll(v, ev.err)
	}
	c.schedule(v)
}

// lose takes in that the runtime will not run a version any more.
func (c *core) lose(v *version, err error) {
	h := &v.home
	h.lost = err
	if h.residency == resident {
		h.residency, h.since = out, c.now
		c.charge(v, 0)
	}
	c.refuseAll(v, err)
}

// refuseTooLarge answers those first in line that can never run: the budget,
// or what is known of the version's need, may have changed since they came.
func (c *core) refuseTooLarge(v *version) {
	for r := v.queue.first(); r != nil; r = v.queue.first() {
		err := c.tooLarge(v, r.rows)
		if err == nil {
			return
		}
		c.dequeue(v, r)
		v.figures.refused(err)
		c.leave(v, r, err)
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

// relieve has idle versions leave because the device has less memory than the
// ledger says.
func (c *core) relieve(bytes int64) {
	var idle []*version
	for _, v := range c.sorted() {
		if v.canLeave() && v.idle() && !v.info.Options.Pinned {
			idle = append(idle, v)
		}
	}
	chosen, _ := c.victims(idle, bytes)
	for _, v := range chosen {
		c.putOut(v, ForMemory)
	}
	c.calm = c.now + calmAfter
}

func (c *core) deactivated(ev deactivated) {
	v := ev.version
	h := &v.home
	h.residency, h.since, h.prepacked = out, c.now, false
	c.charge(v, 0)
	c.schedule(v)
}

func (c *core) prepacked(ev prepacked) {
	v := ev.version
	h := &v.home
	h.prepacking = false
	if h.prepacked = ev.err == nil && h.residency == resident; !h.prepacked {
		h.noPrepack = ev.err != nil
	}
	if h.residency == resident {
		c.charge(v, c.ledger.size(v))
	}
	c.schedule(v)
}

// resume looks at the versions whose requests wait for workspace.
func (c *core) resume() {
	if !c.hungry {
		return
	}
	c.hungry = false
	for _, v := range c.sorted() {
		if v.home.residency == resident && v.queue.len > 0 {
			c.schedule(v)
		}
	}
}

// afford gives those of the first members for whose run there is workspace. It
// gives none where they must wait for some, which is then being made.
func (c *core) afford(v *version, members []*request) []*request {
	h := &v.home
	free, rows, n := c.ledger.free(), 0, 0
	if h.most == 0 && v.workspace(math.MaxInt32) <= free {
		return members
	}
	for _, r := range members {
		if n > 0 && h.most > 0 && rows+r.rows > h.most || v.workspace(rows+r.rows) > free {
			break
		}
		rows += r.rows
		n++
	}
	if n > 0 || len(members) == 0 {
		return members[:n]
	}
	c.hungry, c.dirty = true, true
	first := members[0]
	if h.prepacked && len(v.runs) == 0 && h.charged+v.workspace(first.rows) > c.ledger.budget-c.pinnedBeside(v) {
		c.putOut(v, ForRoom) // it leaves no room for its own runs with its prepacked copy
		return nil
	}
	c.evict(v, v.workspace(first.rows)-free, first.arrived+patienceLeast, first)
	return nil
}

// outOfMemory takes in that a run found too little memory: the session is
// closed and made anew, others leave, and the next run is at most half as
// large.
func (c *core) outOfMemory(v *version, r *run) {
	h := &v.home
	h.most = max(1, r.rows/2)
	h.need.Workspace = max(int64(float64(h.need.Workspace)*memoryGrowth), 1)
	if h.residency == resident && len(v.runs) == 0 && !h.prepacking {
		c.putOut(v, ForMemory)
	}
	c.relieve(v.workspace(r.rows))
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
		return c.tooLarge(v, r.rows)
	}
	return nil
}
