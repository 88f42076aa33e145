package engine

import (
	"cmp"
	"errors"
	"reflect"
	"slices"
)

type phase int

const (
	loading phase = iota
	ready
	draining  // admits nothing; answers what it has admitted
	unloading // idle; the runtime unloads it
)

var (
	// errLoaded refuses to load what is loaded; Load turns it into success.
	errLoaded = errors.New("version is loaded")
	// errReplaced refuses a request that was checked by the Info of another
	// version than it would go to; Infer checks it again.
	errReplaced = errors.New("version has been replaced")
)

// same says whether two Specs load the same, whatever was measured of it.
func (s Spec) same(o Spec) bool {
	s.Tuning, o.Tuning = Tuning{}, Tuning{}
	return reflect.DeepEqual(s, o)
}

// claim gives the id to load a version by. One that takes the place of another
// has a generation that none has had.
func (c *core) claim(s Spec, replace bool) (VersionID, error) {
	if c.stopped {
		return VersionID{}, ErrStopped
	}
	for _, v := range c.versions {
		if v.spec.ID == s.ID && v.phase == loading {
			return VersionID{}, errors.New("version is being loaded")
		}
	}
	v := c.current[s.ID]
	switch {
	case v == nil:
	case v.phase != ready:
		return VersionID{}, ErrDraining
	case replace:
	case !s.same(v.spec):
		return VersionID{}, errors.New("version is loaded from other files or with other options")
	default:
		return VersionID{}, errLoaded
	}
	id := s.ID
	if v != nil || c.versions[id] != nil { // that one drains still
		c.generation++
		id.Generation = c.generation
	}
	c.put(id, &version{id: id, spec: s, phase: loading, info: new(Info), pace: &c.pace, hold: never})
	return id, nil
}

// loaded takes in that the runtime has a version. It is open once it has come
// in, or there is no room for that. The caller of a load that fails from here
// on unloads it and says abandoned.
func (c *core) loaded(ev loaded) {
	if ev.err == nil && c.stopped {
		ev.err = ErrStopped
	}
	if ev.err != nil {
		c.put(ev.id, nil)
		c.emit(reply{call: ev.call, err: ev.err})
		return
	}
	v := c.versions[ev.id]
	info := ev.info
	v.data, info.data = info.data, nil
	v.base, v.tuning = info.Options, v.spec.Tuning.suits(v.spec.Options)
	info.Options = v.tuning.options(v.spec.Options, v.base)
	v.info, v.home.need, v.home.swaps = &info, info.Need, newSwaps()
	v.figures, v.sure = newFigures(), newConfidence(v.info)
	o := &v.info.Options
	v.levels = make([]level, max(o.PriorityLevels, 1))
	for i := range v.levels {
		v.levels[i].policy = o.Policy(i + 1)
	}
	v.home.measured = v.home.need.Workspace
	v.predict.expect(v.tuning.points(v.info))
	if err := c.tooLarge(v, 1, c.ledger.most); err != nil {
		c.emit(reply{call: ev.call, err: err})
		return
	}
	v.trial = ev.call
	c.trials++
	c.dirty = true
}

// open lets requests go to a version, and the one that was in its place drain.
func (c *core) open(v *version) {
	call := v.trial
	v.trial = nil
	c.trials--
	v.phase = ready
	old := c.current[v.spec.ID]
	c.current[v.spec.ID] = v
	c.emit(publish{v.spec.ID, v.info})
	c.emit(reply{call: call})
	if old != nil {
		c.retire(old)
	}
}

// settled says that nothing goes on with the weights of a version.
func (v *version) settled() bool {
	h := &v.home
	return (h.residency == out || h.residency == resident) && !h.changing
}

// retire lets a version drain, if it does not do so already.
func (c *core) retire(v *version) {
	if v.phase == ready {
		v.phase = draining
	}
	c.schedule(v)
}

func (c *core) drain(ev drain) {
	if c.stopped {
		c.emit(reply{call: ev.call, err: ErrStopped})
		return
	}
	if v := c.current[ev.id]; v != nil && !ev.replaced {
		c.retire(v)
	}
	c.await(ev.id, []*call{ev.call}, ErrNotLoaded)
}

// await lets calls wait until no version of this name is on its way out. They
// wait for one after the other; where there is none they get err.
func (c *core) await(id VersionID, calls []*call, err error) {
	var first *version
	for _, v := range c.versions {
		if v.spec.ID == id && v.phase >= draining && (first == nil || v.id.Compare(first.id) < 0) {
			first = v
		}
	}
	if first == nil {
		for _, w := range calls {
			c.emit(reply{call: w, err: err})
		}
		return
	}
	first.waiters = append(first.waiters, calls...)
	c.schedule(first) // also one that could not be unloaded before
}

// unloaded forgets a version, or lets it drain on when the runtime failed:
// another Unload tries again.
func (c *core) unloaded(ev unloaded) {
	v := c.versions[ev.id]
	waiters := v.waiters
	v.waiters = nil
	c.dirty = true
	if ev.err != nil {
		v.phase = draining
		for _, w := range waiters {
			c.emit(reply{call: w, err: ev.err})
		}
		return
	}
	c.charge(v, 0)
	c.put(ev.id, nil)
	c.emit(retired{v})
	if c.current[v.spec.ID] == v {
		delete(c.current, v.spec.ID)
		c.emit(publish{v.spec.ID, nil})
	}
	c.await(v.spec.ID, waiters, nil)
}

func (c *core) inspect(asked *call) reply {
	if c.stopped {
		return reply{call: asked, err: ErrStopped}
	}
	all := make([]Status, 0, len(c.current))
	for id, v := range c.current {
		h := &v.home
		s := Status{
			ID: id, Info: *v.info, Draining: v.phase != ready, Queued: v.queue.len, Figures: v.counted(), Data: v.data.Finding(),
			Residency: h.residency.String(), Since: c.epoch.Add(h.since), Bytes: h.charged, Need: h.need, Setting: h.set, Activation: h.takes, Swaps: h.swaps.clone(),
		}
		if err := cmp.Or(h.lost, h.failure); err != nil {
			s.Reason = err.Error()
		}
		for _, r := range v.runs {
			s.Running += len(r.requests)
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Status) int { return a.ID.Compare(b.ID) })
	m := Memory{Budget: c.ledger.budget, Used: c.ledger.used, Pinned: c.ledger.pinned}
	for _, v := range c.versions {
		if v.home.residency == out && v.queue.len > 0 {
			m.Waiting++
		}
	}
	return reply{call: asked, versions: all, memory: m}
}

// counted gives the figures of a version at this moment.
func (v *version) counted() Figures {
	f := v.figures.clone()
	f.Confidence = v.sure.snapshot()
	return f
}

func (c *core) health() error {
	if c.stopped {
		return ErrStopped
	}
	var errs []error
	for _, v := range c.versions {
		errs = append(errs, v.stuck(c.now))
	}
	return errors.Join(errs...)
}

// stop refuses all that waits and cancels what goes on, which is answered as
// it ends.
func (c *core) stop() {
	c.stopped = true
	for _, v := range c.sorted() {
		for _, r := range slices.Collect(v.queue.all) {
			c.dequeue(v, r)
			c.leave(v, r, ErrStopped)
		}
		for _, r := range v.runs {
			c.emit(interrupt{job: &r.job})
		}
		if v.phase == unloading {
			c.emit(interrupt{job: &v.unload})
		}
		if !v.settled() {
			c.emit(interrupt{job: &v.home.move})
		}
		if v.trial != nil {
			c.emit(reply{call: v.trial, err: ErrStopped})
			v.trial = nil
			c.trials--
		}
		for _, w := range v.waiters {
			c.emit(reply{call: w, err: ErrStopped})
		}
		v.waiters = nil
	}
}
