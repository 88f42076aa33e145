package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// instances is how many requests one version runs at a time.
const instances = 1

// errLoaded refuses to load what is loaded; Load turns it into success.
var errLoaded = errors.New("version is loaded")

// request is one inference on its way. The fields below the line belong to
// the core.
type request struct {
	ctx     context.Context // of the call that waits for it
	id      VersionID
	inputs  []tensor.Tensor
	outputs []string
	answer  chan requestReply // holds one; each request gets exactly one

	state            requestState
	arrived, started time.Time
}

type requestState int

const (
	fresh requestState = iota
	queued
	running
	answered  // and not running
	abandoned // answered while it runs on
)

type requestReply struct {
	result Result
	err    error
}

// call is a question of the engine's caller that is not a request.
type call struct{ answer chan reply } // holds one

func newCall() *call { return &call{make(chan reply, 1)} }

// What happens to the core.
type (
	event  any
	arrive struct{ request *request }
	// cancelled says that the request's caller waits no more.
	cancelled struct{ request *request }
	finish    struct {
		request *request
		outputs []tensor.Tensor
		err     error
	}
	// claim asks to load a version; loaded says how that went.
	claim struct {
		call *call
		id   VersionID
	}
	loaded struct {
		call *call
		id   VersionID
		info Info
		err  error
	}
	drain struct {
		call *call
		id   VersionID
	}
	unloaded struct {
		id  VersionID
		err error
	}
	list struct{ call *call }
	stop struct{}
)

// What the core decides; carried out in order.
type (
	effect   any
	startRun struct{ request *request }
	// startUnload comes when nothing runs on the version any more.
	startUnload struct{ id VersionID }
	answer      struct {
		request *request
		reply   requestReply
	}
	reply struct {
		call     *call
		versions []Status
		err      error
	}
	// publish makes a version's Info known, or unknown where nil.
	publish struct {
		id   VersionID
		info *Info
	}
)

type phase int

const (
	loading phase = iota
	ready
	draining  // admits nothing; answers what it has admitted
	unloading // idle; the runtime unloads it
)

type version struct {
	phase     phase
	info      Info
	queue     []*request // waiting, in the order of arrival
	running   int
	waiters   []*call // of drain
	succeeded uint64
	failed    uint64
	runTime   time.Duration
}

// core decides: which request runs, which is refused, when a version may be
// unloaded. It does no I/O, starts nothing and reads no clock.
type core struct {
	limit    int // waiting requests for each version
	versions map[VersionID]*version
	stopped  bool
	effects  []effect
}

func newCore(limit int) *core {
	return &core{limit: limit, versions: make(map[VersionID]*version)}
}

// step takes an event and gives what is to be done now. The slice is valid
// until the next step.
func (c *core) step(ev event, now time.Time) []effect {
	clear(c.effects)
	c.effects = c.effects[:0]
	switch ev := ev.(type) {
	case arrive:
		c.arrive(ev.request, now)
	case cancelled:
		c.cancel(ev.request, now)
	case finish:
		c.finish(ev, now)
	case claim:
		c.emit(reply{call: ev.call, err: c.claim(ev.id)})
	case loaded:
		c.loaded(ev)
	case drain:
		c.drain(ev)
	case unloaded:
		c.unloaded(ev)
	case list:
		c.emit(reply{call: ev.call, versions: c.list()})
	case stop:
		c.stop()
	}
	return c.effects
}

func (c *core) emit(f effect) { c.effects = append(c.effects, f) }

func (c *core) refuse(r *request, err error) {
	r.state = answered
	c.emit(answer{r, requestReply{err: err}})
}

func (c *core) arrive(r *request, now time.Time) {
	v := c.versions[r.id]
	switch {
	case c.stopped:
		c.refuse(r, ErrStopped)
	case v == nil || v.phase == loading:
		c.refuse(r, fmt.Errorf("%s: %w", r.id, ErrNotLoaded))
	case v.phase != ready:
		c.refuse(r, fmt.Errorf("%s: %w", r.id, ErrDraining))
	case v.running >= instances && len(v.queue) >= c.limit:
		c.refuse(r, fmt.Errorf("%s: %w: %d requests wait", r.id, ErrOverloaded, len(v.queue)))
	default:
		r.state, r.arrived = queued, now
		v.queue = append(v.queue, r)
		c.schedule(r.id, v, now)
	}
}

// schedule starts what may run, and the unloading of a drained version.
func (c *core) schedule(id VersionID, v *version, now time.Time) {
	for v.running < instances && len(v.queue) > 0 {
		r := v.queue[0]
		v.queue = slices.Delete(v.queue, 0, 1)
		v.running++
		r.state, r.started = running, now
		c.emit(startRun{r})
	}
	if v.phase == draining && v.running == 0 && !c.stopped {
		v.phase = unloading
		c.emit(startUnload{id})
	}
}

func (c *core) cancel(r *request, now time.Time) {
	switch r.state {
	case queued:
		v := c.versions[r.id]
		v.queue = slices.DeleteFunc(v.queue, func(q *request) bool { return q == r })
		c.refuse(r, context.Canceled)
		c.schedule(r.id, v, now)
	case running:
		c.refuse(r, context.Canceled)
		r.state = abandoned
	}
}

func (c *core) finish(ev finish, now time.Time) {
	r := ev.request
	v := c.versions[r.id]
	v.running--
	took := now.Sub(r.started)
	v.runTime += took
	if ev.err != nil {
		v.failed++
	} else {
		v.succeeded++
	}
	if r.state == running {
		r.state = answered
		c.emit(answer{r, requestReply{Result{ev.outputs, r.started.Sub(r.arrived), took}, ev.err}})
	}
	r.state = answered
	c.schedule(r.id, v, now)
}

func (c *core) claim(id VersionID) error {
	v := c.versions[id]
	switch {
	case c.stopped:
		return ErrStopped
	case v == nil:
		c.versions[id] = &version{phase: loading}
		return nil
	case v.phase == loading:
		return errors.New("version is being loaded")
	case v.phase == ready:
		return errLoaded
	default:
		return ErrDraining
	}
}

func (c *core) loaded(ev loaded) {
	if ev.err != nil {
		delete(c.versions, ev.id)
		c.emit(reply{call: ev.call})
		return
	}
	v := c.versions[ev.id]
	v.phase, v.info = ready, ev.info
	c.emit(publish{ev.id, &ev.info})
	c.emit(reply{call: ev.call})
}

func (c *core) drain(ev drain) {
	v := c.versions[ev.id]
	switch {
	case c.stopped:
		c.emit(reply{call: ev.call, err: ErrStopped})
	case v == nil || v.phase == loading:
		c.emit(reply{call: ev.call, err: ErrNotLoaded})
	default:
		v.waiters = append(v.waiters, ev.call)
		if v.phase == ready {
			v.phase = draining
		}
		c.schedule(ev.id, v, time.Time{}) // nothing can start: what waits is behind what runs
	}
}

// unloaded forgets a version, or lets it drain on when the runtime failed:
// another Unload tries again.
func (c *core) unloaded(ev unloaded) {
	v := c.versions[ev.id]
	for _, w := range v.waiters {
		c.emit(reply{call: w, err: ev.err})
	}
	v.waiters = nil
	if ev.err != nil {
		v.phase = draining
		return
	}
	delete(c.versions, ev.id)
	c.emit(publish{ev.id, nil})
}

func (c *core) list() []Status {
	all := make([]Status, 0, len(c.versions))
	for id, v := range c.versions {
		if v.phase == loading {
			continue
		}
		all = append(all, Status{
			ID: id, Info: v.info, Draining: v.phase != ready,
			Queued: len(v.queue), Running: v.running,
			Succeeded: v.succeeded, Failed: v.failed, RunTime: v.runTime,
		})
	}
	slices.SortFunc(all, func(a, b Status) int { return a.ID.Compare(b.ID) })
	return all
}

// stop refuses all that waits; runs that go on are answered as they finish.
func (c *core) stop() {
	c.stopped = true
	for _, v := range c.versions {
		for _, r := range v.queue {
			c.refuse(r, ErrStopped)
		}
		v.queue = nil
		for _, w := range v.waiters {
			c.emit(reply{call: w, err: ErrStopped})
		}
		v.waiters = nil
	}
}
