package engine

import (
	"cmp"
	"maps"
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
// What lacks memory, weights that are out or the workspace of a run, waits in
// the line of its first request, by the rank of policy.go, and the first in line
// is served first. Room is made by those that cost least to be without: see
// victims. One that was brought in stays for a while, and one with requests of
// its own leaves, or pauses, only for an older request that has waited for long
// enough, between two runs. So each coming in answers at least one request, and
// nobody waits for ever.
//
// When nobody waits for room, what is left of it is used ahead of demand: for
// versions that fit, for those that are expected to be asked for soon, and for
// better settings of those in use: prepacked copies, threads of their own.

const (
	// maxEntering is how many versions come in at a time: a large one must not
	// hold up small ones.
	maxEntering = 2
	// A version that was brought in stays for stayFactor times what that took,
	// within these bounds.
	stayFactor         = 2
	stayLeast, stayMax = 5 * time.Millisecond, time.Second
	// patienceLeast is how long the first in line waits before a version with
	// younger requests must leave or pause for it, or as long as it takes to
	// bring both in.
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
	// What arrange does may ask for it again: so often at once, and else after
	// arrangeAgain.
	maxArrange   = 3
	arrangeAgain = time.Millisecond
	// An activation that has gone on for longer than hungAfter, and than
	// stuckFactor times what it takes, is ended.
	hungAfter = 3 * time.Minute
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

// arrange brings in and puts out what the moment asks for. It is called at the
// end of each step in which something has changed for the memory.
func (c *core) arrange() {
	c.dirty, c.arrangeAt = false, never
	if c.stopped {
		return
	}
	yielded := c.unyield()
	moves := c.try(c.moves())
	c.presses = !c.grant(moves)
	switch {
	case c.ledger.free() < 0:
		c.shed()
	case c.presses || c.moves() > 0:
	case c.now < c.calm:
		c.look(c.calm)
	default:
		c.ahead()
	}
	for _, v := range yielded {
		if !v.home.yields {
			c.schedule(v)
		}
	}
	if c.dirty { // once more, now or soon
		c.look(c.now + arrangeAgain)
	}
	if c.arrangeAt < c.alarm {
		c.alarm = c.arrangeAt
		c.emit(wake{c.epoch.Add(c.alarm)})
	}
}

// unyield gives the versions that were asked to pause: whether they still are
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
	room := c.makingRoom()
	for _, v := range c.sorted() {
		switch h := &v.home; {
		case v.trial == nil || h.residency != out:
		case h.failures > 0 && room: // which it waits for
		case c.ledger.size(v) > c.ledger.free():
			c.open(v)
		case moves < maxEntering:
			c.enter(v, ForLoad)
			moves++
		}
	}
	return moves
}

// makingRoom says whether any weights are leaving.
func (c *core) makingRoom() bool {
	return slices.ContainsFunc(c.sorted(), func(v *version) bool { return v.home.residency == leaving })
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

// claims gives the versions that wait for memory, for their weights or for the
// workspace of a run, by the places of their first requests in the line.
func (c *core) claims() []*version {
	var all []*version
	room := c.makingRoom()
	for _, v := range c.sorted() {
		h := &v.home
		switch {
		case v.queue.len == 0 || h.changing && h.residency == out:
		case h.residency == out && h.retryAt > c.now:
			c.look(h.retryAt)
		case h.residency == out && h.failures > 0 && room: // it has found too little memory before
		case h.residency == out, h.residency == resident && h.hungry && !h.ends && v.free():
			if c.refuseTooLarge(v); v.queue.len == 0 {
				c.schedule(v) // it may have waited for that to be unloaded
				continue
			}
			all = append(all, v)
		}
	}
	slices.SortStableFunc(all, func(a, b *version) int { return compareLine(a.queue.first(), b.queue.first()) })
	return all
}

// compareLine orders requests of different versions by their places in the
// line, which a time-out of one's own queue does not change.
func compareLine(a, b *request) int {
	return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.number, b.number))
}

// grant gives claims their memory, the first in line first, and says whether
// none waits any more. For the first that lacks some, others leave or pause.
// Those behind it may have what is free only while nothing is on its way for it.
func (c *core) grant(moves int) bool {
	all, stuck := true, false
	for _, v := range c.claims() {
		h, r := &v.home, v.queue.first()
		needs, patience := v.workspace(r.rows), r.arrived+patienceLeast
		if h.residency == out {
			needs += c.ledger.size(v)
			patience = max(patience, r.arrived+2*h.activation())
		}
		switch lacks := needs - c.ledger.free(); {
		case h.residency == out && moves == maxEntering:
			all = false
		case lacks <= 0 && h.residency == out:
			c.enter(v, ForRequest)
			moves++
		case lacks <= 0:
			c.schedule(v)
		case stuck:
			all = false
		case h.set.Prepack && len(v.runs) == 0 && h.charged+needs > c.ledger.budget-c.pinnedBeside(v):
			c.putOut(v, ForRoom) // with its prepacked copy it leaves no room for its own runs
			return false
		case c.evict(v, lacks, patience, r):
			return false
		default:
			all, stuck = false, true
		}
	}
	return all
}

// evict has idle versions leave until so many bytes are on their way, and,
// where those are too few and patience is over, versions whose requests are
// younger than r leave or pause. It says whether anything is on its way.
func (c *core) evict(claimant *version, lacks int64, patience moment, r *request) bool {
	var idle, busy []*version
	coming := false
	for _, v := range c.sorted() {
		h := &v.home
		switch {
		case v == claimant:
		case h.residency == leaving:
			lacks -= h.charged
			coming = true
		case !v.canLeave():
		case !v.idle():
			busy = append(busy, v)
		case v.pinned():
		case c.now < h.since+v.stay():
			c.look(h.since + v.stay())
		default:
			idle = append(idle, v)
		}
	}
	if lacks <= 0 {
		return true
	}
	chosen, enough := c.victims(idle, lacks)
	for _, v := range chosen {
		c.putOut(v, ForRoom)
		lacks -= v.home.charged
		coming = true
	}
	if enough {
		return true
	}
	if c.now < patience {
		c.look(patience)
		return coming
	}
	busy = slices.DeleteFunc(busy, func(v *version) bool { return v.queue.len > 0 && compareLine(v.queue.first(), r) < 0 })
	leave := slices.DeleteFunc(slices.Clone(busy), func(v *version) bool { return v.pinned() })
	if chosen, enough = c.victims(leave, lacks); !enough {
		for _, v := range busy {
			lacks -= v.inRuns()
			if !v.pinned() {
				lacks -= v.home.charged
			}
		}
		if chosen = leave; lacks <= 0 {
			chosen = busy // pinned ones pause: their runs give their workspace back
		}
	}
	for _, v := range chosen {
		if len(v.runs) == 0 && !v.pinned() {
			c.putOut(v, ForRoom)
			coming = true
		} else {
			v.home.yields = true
			coming = coming || len(v.runs) > 0
		}
	}
	return coming
}

// canLeave says whether a version holds memory that it can give back once
// nothing runs on it.
func (v *version) canLeave() bool {
	h := &v.home
	return h.residency == resident && v.phase != unloading && !h.changing && h.charged > 0
}

// pinned says whether a version stays whatever others lack. One that is on its
// way out does not: who waits for it to go would wait for a version that may
// need room itself to answer what it has admitted.
func (v *version) pinned() bool { return v.info.Options.Pinned && v.phase <= ready }

// inRuns is the workspace of a version's runs.
func (v *version) inRuns() int64 {
	sum := int64(0)
	for _, r := range v.runs {
		sum += r.memory
	}
	return sum
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
// for whatever fits; last for better settings, such as prepacked copies.
func (c *core) ahead() {
	var fits, expected, change *version
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
		case h.changing:
			return // one at a time, and nothing ahead of demand beside it
		case h.residency == resident && v.phase == ready && v.better() != h.set && h.beside(v.better())+v.workspace(v.info.Options.MaxBatchSize) <= c.ledger.free() &&
			(change == nil || h.demand.rate(c.now) > change.home.demand.rate(c.now)):
			change = v
		}
	}
	switch {
	case expected != nil && c.worth(expected):
	case expected != nil:
		c.look(c.now + expected.ahead()/2) // it may become so
	case fits != nil:
		c.enter(fits, ForRoom)
	case change != nil:
		h := &change.home
		h.changing, h.next = true, change.better()
		c.charge(change, c.ledger.size(change))
		c.emit(startSet{change, h.next})
	}
}

// better is the setting that a version which is in should have: the threads
// that it was measured with, and prepacked weights where those make runs
// faster and there were some. It is the one that it has where the other could
// not be had.
func (v *version) better() Setting {
	h := &v.home
	set := Setting{Threads: v.tuning.Threads, Prepack: v.worthPrepacking() && (h.set.Prepack || h.runsSince >= prepackAfter)}
	if h.refused != nil && *h.refused == set {
		return h.set
	}
	return set
}

// worthPrepacking says whether prepacked weights make the runs of a version
// faster: as was found when it was compiled, or measured since. What is not
// mapped cannot have them apart.
func (v *version) worthPrepacking() bool {
	if p := v.tuning.Prepack; p != nil {
		return *p && (v.home.need.Mapped || v.home.need.Prepacked > 0)
	}
	return v.home.need.Prepacked > 0
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
		if o.canLeave() && o.idle() && !o.pinned() {
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

// relieve has idle versions leave because the device has less memory than the
// ledger says.
func (c *core) relieve(bytes int64) {
	var idle []*version
	for _, v := range c.sorted() {
		if v.canLeave() && v.idle() && !v.pinned() {
			idle = append(idle, v)
		}
	}
	chosen, _ := c.victims(idle, bytes)
	for _, v := range chosen {
		c.putOut(v, ForMemory)
	}
	c.calm = c.now + calmAfter
}

// afford gives those of the first members for whose run there is workspace. It
// gives none where they must wait for some.
func (c *core) afford(v *version, members []*request) []*request {
	h := &v.home
	h.hungry = false
	if h.most == 0 && (c.ledger.budget == 0 || h.need.Workspace == 0) {
		return members
	}
	free, rows, n := c.ledger.free(), 0, 0
	for _, r := range members {
		if n > 0 && h.most > 0 && rows+r.rows > h.most || v.workspace(rows+r.rows) > free {
			break
		}
		rows += r.rows
		n++
	}
	if h.hungry = n == 0 && len(members) > 0; h.hungry {
		c.dirty = true
	}
	return members[:n]
}
