package engine

import (
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
	case !reflect.DeepEqual(s, v.spec):
		return VersionID{}, errors.New("version is loaded from other files or with other options")
	default:
		return VersionID{}, errLoaded
	}
	id := s.ID
	if v != nil || c.versions[id] != nil { // that one drains still
		c.generation++
		id.Generation = c.generation
	}
	c.versions[id] = &version{id: id, spec: s, phase: loading, hold: never}
	return id, nil
}

// loaded lets requests go to a version, and the one that was in its place
// drain.
func (c *core) loaded(ev loaded) {
	if ev.err == nil && c.stopped {
		ev.err = ErrStopped
	}
	if ev.err != nil {
		delete(c.versions, ev.id)
		c.emit(reply{call: ev.call, err: ev.err})
		return
	}
	v := c.versions[ev.id]
	v.phase, v.info = ready, ev.info
	v.figures = newFigures()
	o := &v.info.Options
	v.levels = make([]level, max(o.PriorityLevels, 1))
	for i := range v.levels {
		v.levels[i].policy = o.Policy(i + 1)
	}
	old := c.current[v.spec.ID]
	c.current[v.spec.ID] = v
	c.emit(publish{v.spec.ID, &v.info})
	c.emit(reply{call: ev.call})
	if old != nil {
		c.retire(old)
	}
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
	if ev.err != nil {
		v.phase = draining
		for _, w := range waiters {
			c.emit(reply{call: w, err: ev.err})
		}
		return
	}
	delete(c.versions, ev.id)
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
		s := Status{ID: id, Info: v.info, Draining: v.phase != ready, Queued: v.queue.len, Figures: v.figures.clone()}
		for _, r := range v.runs {
			s.Running += len(r.requests)
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Status) int { return a.ID.Compare(b.ID) })
	return reply{call: asked, versions: all}
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
	for _, v := range c.versions {
		for _, r := range slices.Collect(v.queue.all) {
			c.dequeue(v, r)
			c.leave(v, r, ErrStopped)
		}
		for _, r := range v.runs {
			c.emit(interrupt{&r.job})
		}
		if v.phase == unloading {
			c.emit(interrupt{&v.unload})
		}
		for _, w := range v.waiters {
			c.emit(reply{call: w, err: ErrStopped})
		}
		v.waiters = nil
	}
}
