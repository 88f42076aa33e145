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

// errLoaded refuses to load what is loaded; Load turns it into success.
var errLoaded = errors.New("version is loaded")

func (c *core) claim(s Spec) error {
	v := c.versions[s.ID]
	switch {
	case c.stopped:
		return ErrStopped
	case v == nil:
		c.versions[s.ID] = &version{id: s.ID, spec: s, phase: loading, hold: never}
		return nil
	case v.phase == loading:
		return errors.New("version is being loaded")
	case v.phase == ready && !reflect.DeepEqual(s, v.spec):
		return errors.New("version is loaded from other files or with other options")
	case v.phase == ready:
		return errLoaded
	default:
		return ErrDraining
	}
}

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
	c.emit(publish{ev.id, &v.info})
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
		c.schedule(v)
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

func (c *core) inspect(asked *call) reply {
	if c.stopped {
		return reply{call: asked, err: ErrStopped}
	}
	all := make([]Status, 0, len(c.versions))
	for id, v := range c.versions {
		if v.phase == loading {
			continue
		}
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
