package engine

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// request is one inference on its way.
type request struct {
	id       VersionID
	info     *Info           // that it was checked by
	inputs   []tensor.Tensor // in the order of Info.Inputs
	outputs  []string
	level    int           // its priority's index, 0 the highest
	timeout  time.Duration // 0: none
	deadline time.Time     // zero: none
	rows     int
	size     int64 // bytes of the inputs, and one
	resident bool  // it does not wait for weights
	alone    bool  // runs with no other
	retried  bool  // its run failed for want of memory or progress, once

	// The core's until the request is answered, which happens once.
	version      *version // that admitted it
	state        requestState
	arrived      moment
	startBy, due moment // limits of the wait and of the answer
	plan         int64  // size of the run that it expects to be part of
	urgent       bool   // it must make do with a smaller one
	run          *run   // that it is part of, or was
	turn         *list.Element
	place

	// The caller's from when answer is ready.
	answer   chan struct{} // holds one
	result   Result
	err      error
	released atomic.Bool
}

type requestState int

const (
	fresh requestState = iota
	waiting
	running
	held // has run, and is answered after those that came before it
	answered
)

// run is one call of Runtime.Run.
type run struct {
	job
	version  *version
	requests []*request // in the order of their rows
	outputs  []string
	rows     int
	size     int64
	started  moment
	ends     moment // as predicted
	live     int    // requests that somebody waits for
	memory   int64  // of its workspace
	life     uint64 // of its version's weights, at its start
	stalled  bool   // it was interrupted for want of progress

	// Known when it is over.
	outcome Outcome
	err     error
	holders atomic.Int32 // of the outcome's memory
}

// job is something that goes on outside of the core; who starts it sets
// cancel.
type job struct{ cancel context.CancelCauseFunc }

// call is a question of the engine's caller that is not a request.
type call struct{ answer chan reply } // holds one

func newCall() *call { return &call{make(chan reply, 1)} }

// What happens to the core.
type (
	event  any
	arrive struct{ request *request }
	// cancelled says that the request's caller waits no more.
	cancelled struct{ request *request }
	finish    struct{ run *run }
	// tick comes at the time that wake named last.
	tick struct{}
	// claim asks to load a version, in the place of a loaded one or not;
	// loaded says how that went, of the id that the claim was answered with.
	claim struct {
		call    *call
		spec    Spec
		replace bool
	}
	loaded struct {
		call *call
		id   VersionID
		info Info
		err  error
	}
	// drain asks to unload a version, or those only that it has replaced.
	drain struct {
		call     *call
		id       VersionID
		replaced bool
	}
	unloaded struct {
		id  VersionID
		err error
	}
	// abandoned forgets a version that was claimed and cannot be loaded.
	abandoned struct{ id VersionID }
	inspect   struct{ call *call }
	count     struct{ call *call }
	health    struct{ call *call }
	stop      struct{}
)

// What the core decides; carried out in order.
type (
	effect   any
	startRun struct{ run *run }
	// startUnload comes when nothing runs on the version any more.
	startUnload struct{ version *version }
	interrupt   struct {
		job   *job
		cause error // nil: nobody waits for it
	}
	answer struct{ request *request }
	reply  struct {
		call     *call
		id       VersionID // that a claim may load
		versions []Status
		memory   Memory
		backlog  Backlog
		err      error
	}
	// publish makes a version's Info known, or unknown where nil.
	publish struct {
		id   VersionID
		info *Info
	}
	// retired tells that a version is not loaded any more, which comes before
	// whoever unloaded it is answered.
	retired struct{ version *version }
	// separate tells that a version's requests cannot run together, and why.
	separate struct {
		id  VersionID
		err error
	}
	// wake asks for a tick at a time, instead of at any named before.
	wake struct{ at time.Time }
)

// core decides: which request runs, which is refused, when a version may be
// unloaded. It does no I/O, starts nothing and reads no clock. This file keeps
// the accounts of requests, lifecycle.go those of versions; policy.go decides
// on requests.
type core struct {
	versions   map[VersionID]*version // what the runtime has, or is about to have
	current    map[VersionID]*version // those that requests go to, by generation 0
	generation uint64                 // the last one given
	stopped    bool
	number     uint64 // of requests that have been admitted
	waiting    int    // requests, in all queues

	order     []*version // as sorted gives them; nil: to be made
	pace      pace
	ledger    ledger
	trials    int    // versions that are being loaded, and come in for that
	dirty     bool   // the memory is to be arranged
	presses   bool   // something waits for memory
	arrangeAt moment // when the memory is to be arranged again
	calm      moment // until when nothing is brought in ahead of demand

	epoch, time time.Time
	now         moment
	alarm       moment // the next tick
	effects     []effect
}

func newCore(now time.Time) *core {
	return &core{versions: make(map[VersionID]*version), current: make(map[VersionID]*version), epoch: now, alarm: never, arrangeAt: never}
}

// step takes an event and gives what is to be done now. The slice is valid
// until the next step.
func (c *core) step(ev event, now time.Time) []effect {
	clear(c.effects)
	c.effects = c.effects[:0]
	c.time, c.now = now, now.Sub(c.epoch)
	switch ev := ev.(type) {
	case arrive:
		c.arrive(ev.request)
	case cancelled:
		c.cancel(ev.request)
	case finish:
		c.finish(ev.run)
	case tick:
		c.tick()
	case claim:
		id, err := c.claim(ev.spec, ev.replace)
		c.emit(reply{call: ev.call, id: id, err: err})
	case loaded:
		c.loaded(ev)
	case drain:
		c.drain(ev)
	case unloaded:
		c.unloaded(ev)
	case abandoned:
		c.put(ev.id, nil)
	case activated:
		c.dirty = true
		c.activated(ev)
	case deactivated:
		c.dirty = true
		c.deactivated(ev)
	case changed:
		c.dirty = true
		c.changed(ev)
	case tune:
		c.emit(reply{call: ev.call, err: c.tune(ev.id, ev.tuning)})
	case giveUp:
		c.dirty = true
		c.giveUp(ev)
	case setMemory:
		c.dirty = true
		c.ledger.budget = ev.budget
		c.ledger.most = max(c.ledger.most, ev.budget)
	case setThrottle:
		c.throttle(ev.throttle)
	case inspect:
		c.emit(c.inspect(ev.call))
	case count:
		c.emit(reply{call: ev.call, backlog: c.backlog()})
	case health:
		c.emit(reply{call: ev.call, err: c.health()})
	case stop:
		c.stop()
	}
	for n := 0; c.dirty && n < maxArrange; n++ {
		c.arrange()
	}
	return c.effects
}

// idle says that no request waits and nothing runs.
func (c *core) idle() bool { return c.waiting+c.pace.running == 0 }

func (c *core) emit(f effect) { c.effects = append(c.effects, f) }

func (c *core) arrive(r *request) {
	v := c.current[r.id]
	var err error
	switch {
	case c.stopped:
		err = ErrStopped
	case v == nil:
		err = fmt.Errorf("%s: %w", r.id, ErrNotLoaded)
	case r.info != v.info:
		err = errReplaced
	case v.phase != ready:
		err = fmt.Errorf("%s: %w", r.id, ErrDraining)
	}
	if err != nil {
		c.answer(r, err)
		return
	}
	v.home.demand.observe(c.now, c.time)
	if r.resident && v.home.residency != resident {
		c.dirty = true // they may come in where there is room
		c.answer(r, fmt.Errorf("%s: %w", r.id, ErrNotResident))
		return
	}
	err = c.cannotCome(v, r)
	if c.pace.Cordon {
		err = &RefusedError{fmt.Errorf("%s: %w", v.id, ErrCordoned), retryCordoned}
	}
	if err != nil {
		v.figures.refused(err)
		c.answer(r, err)
		return
	}
	r.version = v
	v.limits(r, c.now, c.epoch)
	r.number = c.number
	r.rank = v.rank(r)
	if err := v.admit(r, c.now); err != nil {
		v.figures.refused(err)
		c.answer(r, err)
		return
	}
	c.number++
	l := &v.levels[r.level]
	if v.info.Options.PreserveOrdering {
		r.turn = l.order.PushBack(r)
	}
	c.enqueue(v, r)
	if v.home.residency != resident && v.queue.first() == r {
		c.dirty = true
	}
	c.schedule(v)
}

func (c *core) enqueue(v *version, r *request) {
	r.state = waiting
	v.levels[r.level].waiting++
	c.waiting++
	v.queue.insert(r)
}

func (c *core) dequeue(v *version, r *request) {
	v.levels[r.level].waiting--
	c.waiting--
	v.queue.remove(r)
}

// schedule does what a version's state asks for: it refuses what waits in
// vain, starts what may run, and the unloading of a drained version.
func (c *core) schedule(v *version) {
	for r := v.queue.moving(c.now); r != nil; r = v.queue.moving(c.now) {
		v.queue.remove(r)
		r.late, r.rank, r.moves = true, c.now, never
		v.queue.insert(r)
	}
	c.refuseTooLarge(v)
	for {
		for r := v.hopeless(c.now); r != nil; r = v.hopeless(c.now) {
			c.dequeue(v, r)
			start, _ := v.start(c.now)
			c.leave(v, r, v.expired(r, start+v.queue.ahead(r), 0, c.now))
			c.dirty = c.dirty || c.presses // v may be idle now, and can leave
		}
		v.hold = never
		if h := &v.home; h.residency != resident || h.yields || h.ends {
			break
		}
		if !v.free() {
			break
		}
		if at := v.closed(c.now); at > c.now {
			if c.pace.running == 0 { // else there will be another row to wait for
				v.hold = at
			}
			break
		}
		members := c.afford(v, v.next(c.now))
		if len(members) == 0 {
			break
		}
		c.start(v, members)
	}
	if at := v.wake(); at < c.alarm {
		c.alarm = at
		c.emit(wake{c.epoch.Add(at)})
	}
	if v.phase == draining && v.idle() && v.settled() && !c.stopped {
		v.phase = unloading
		c.emit(startUnload{v})
	}
}

func (c *core) start(v *version, members []*request) {
	r := &run{version: v, requests: members, outputs: members[0].outputs, started: c.now, live: len(members)}
	for i, m := range members {
		c.dequeue(v, m)
		m.state, m.run = running, r
		m.startBy, m.moves = never, never
		r.rows += m.rows
		r.size += m.size
		if i > 0 {
			r.outputs = union(r.outputs, m.outputs)
		}
	}
	r.ends = c.now + v.predict.mean(r.size)
	r.memory, r.life = v.workspace(r.rows), v.home.life
	c.ledger.used += r.memory
	v.runs = append(v.runs, r)
	c.pace.starts(c.now, r.ends)
	if v.home.runsSince++; v.home.runsSince == prepackAfter && v.worthPrepacking() {
		c.dirty = true
	}
	c.emit(startRun{r})
}

func (c *core) tick() {
	c.alarm = never
	if c.arrangeAt <= c.now {
		c.dirty = true
	} else if c.arrangeAt < c.alarm {
		c.alarm = c.arrangeAt
		c.emit(wake{c.epoch.Add(c.alarm)})
	}
	for _, v := range c.sorted() {
		c.interruptStalled(v)
		c.interruptHung(v)
		if v.wake() <= c.now {
			c.schedule(v)
		} else if at := v.wake(); at < c.alarm {
			c.alarm = at
			c.emit(wake{c.epoch.Add(at)})
		}
	}
}

// cancel answers a request that its caller has given up.
func (c *core) cancel(r *request) {
	v := r.version
	switch r.state {
	case waiting:
		c.dequeue(v, r)
		c.leave(v, r, context.Canceled)
		c.schedule(v)
		c.dirty = c.dirty || c.presses
	case running:
		if r.run.live--; r.run.live == 0 {
			c.emit(interrupt{job: &r.run.job})
		}
		c.leave(v, r, context.Canceled)
	case held:
		v.levels[r.level].held--
		c.leave(v, r, r.err) // with its result, which the caller releases
	default:
		return
	}
	v.figures.Cancelled++
}

func (c *core) finish(r *run) {
	v := r.version
	v.runs = slices.DeleteFunc(v.runs, func(o *run) bool { return o == r })
	over := false // a row of runs, after which all pause
	if c.pace.finishes(c.now); c.pace.throttled() {
		c.pace.ends = c.lastEnd()
		over = c.pace.running == 0
	}
	took := c.now - r.started
	c.ledger.used -= r.memory
	defer c.end(v)
	c.dirty = c.dirty || c.presses || v.home.yields || c.ledger.free() < 0
	v.figures.ran(r, c.time)
	// A run that was cancelled after its predicted end took at least so long.
	if r.err == nil || r.live == 0 && took > v.predict.mean(r.size) {
		if v.predict.observe(r.size, took, c.now) {
			v.queue.reprice(v.price)
		}
	}
	if errors.Is(r.err, ErrRows) && len(r.requests) > 1 && !v.separate {
		v.separate = true
		v.queue.reprice(v.price)
		c.emit(separate{v.id, r.err})
	}
	retry := c.harmed(v, r)
	again := !retry && v.home.lost == nil && len(r.requests) > 1 && !c.stopped && r.err != nil &&
		!errors.Is(r.err, context.Canceled) && !errors.Is(r.err, ErrUnavailable)
	r.holders.Store(int32(1 + r.live)) // and the one that reports it
	for i, m := range r.requests {
		switch {
		case m.state != running: // given up
		case retry && !m.retried:
			m.retried = true
			v.price(m)
			c.enqueue(v, m)
		case again:
			m.alone = true
			v.price(m)
			c.enqueue(v, m)
		default:
			if m.err = r.err; r.err == nil {
				m.result = Result{
					Outputs: pick(r.outcome.Outputs[i], r.outputs, m.outputs), Rows: r.rows,
					Queue: r.started - m.arrived, Input: r.outcome.Input, Infer: r.outcome.Infer, Output: r.outcome.Output,
					Labels: v.info.Labels, request: m,
				}
			}
			c.deliver(v, m)
		}
	}
	c.schedule(v)
	if over {
		c.rest()
	}
}

// harmed takes in what a run's error says of its version beyond this run, and
// says whether its requests are to be run once more.
func (c *core) harmed(v *version, r *run) bool {
	h := &v.home
	switch {
	case r.err == nil:
		if h.most > 0 {
			h.grow(v.info.Options.MaxBatchSize)
		}
	case c.stopped:
	case errors.Is(r.err, ErrQuarantined):
		c.lose(v, r.err)
	case r.stalled:
		r.err = fmt.Errorf("run %s: %w: it took %v", v.id, ErrStalled, (c.now - r.started).Round(time.Millisecond))
		return true
	case errors.Is(r.err, ErrOutOfMemory):
		c.outOfMemory(v, r)
		return true
	case errors.Is(r.err, ErrNotLoaded):
		// The runtime could not bring it back after a death; unless that was in
		// an earlier life of it.
		if r.life == h.life {
			c.gone(v)
		}
		return true
	}
	return false
}

// deliver answers a request that has run, when it is its turn.
func (c *core) deliver(v *version, r *request) {
	if r.turn == nil {
		v.figures.answered(r, c.now)
		c.answer(r, r.err)
		return
	}
	r.state = held
	v.levels[r.level].held++
	c.release(v, &v.levels[r.level])
}

// release answers those whose turn it is.
func (c *core) release(v *version, l *level) {
	for e := l.order.Front(); e != nil; e = l.order.Front() {
		r := e.Value.(*request)
		if r.state != held {
			return
		}
		l.order.Remove(e)
		l.held--
		v.figures.answered(r, c.now)
		c.answer(r, r.err)
	}
}

// leave answers a request out of turn.
func (c *core) leave(v *version, r *request, err error) {
	if _, refusal := errors.AsType[*RefusedError](err); refusal {
		v.figures.refused(err)
	}
	c.answer(r, err)
	if r.turn != nil {
		l := &v.levels[r.level]
		l.order.Remove(r.turn)
		c.release(v, l)
	}
}

func (c *core) answer(r *request, err error) {
	r.state, r.err = answered, err
	c.emit(answer{r})
}

// union gives the outputs that a or b ask for; nil where one asks for all.
func union(a, b []string) []string {
	if a == nil || b == nil {
		return nil
	}
	var all []string
	for _, name := range b {
		if !slices.Contains(a, name) {
			all = append(all, name)
		}
	}
	if all == nil {
		return a
	}
	return append(slices.Clip(a), all...)
}

// pick gives those of a run's outputs that one of its requests asked for, in
// its order.
func pick(outputs []tensor.Tensor, names, asked []string) []tensor.Tensor {
	if asked == nil || names != nil && slices.Equal(names, asked) {
		return outputs
	}
	picked := make([]tensor.Tensor, 0, len(asked))
	for _, name := range asked {
		if i := slices.IndexFunc(outputs, func(t tensor.Tensor) bool { return t.Name == name }); i >= 0 {
			picked = append(picked, outputs[i])
		}
	}
	return picked
}
