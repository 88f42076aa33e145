package worker

import (
	"context"
	"fmt"
	"slices"

	"github.com/dunlin/dunlin/agent/engine"
)

// guilt counts the deaths that a version, or a run, was in flight at, in a
// row: a run that succeeds is the end of one. Weak ones are kills that this
// process did not send: the kernel's for want of memory, an operator's.
type guilt struct {
	strong, weak int
	deaths       int // of a call: these and those that others are to blame for
}

// suspected says that it may go on only while no other suspect does, so that
// it is known which one the next death is due to.
func (g guilt) suspected() bool { return g.strong >= 1 || g.weak >= 2 }

// proven says, of a version that each time may have been the cause, that it
// was: two deaths are no chance, or three kills.
func (g guilt) proven() bool { return g.strong >= 2 || g.strong+g.weak >= 3 }

// retried says whether a run is run again: once after a death, three times
// after kills.
func (g guilt) retried() bool {
	return g.strong < 2 && g.strong+g.weak <= 3 && g.deaths < maxDeaths
}

func (g *guilt) add(weak bool) {
	if weak {
		g.weak++
	} else {
		g.strong++
	}
}

// use is what a call has while the child works for it: the child, what of the
// version is open there, and the trial, where it is on trial.
type use struct {
	process *process
	version *version
	session *session // nil unless it was asked for
	onTrial bool
}

// begin waits until a child is ready and a version may be worked on: one that
// is under suspicion, or a call that is, waits until no other such one goes
// on. With run it gives the session to run; the version must be active then.
// Where there is no error, end is to be called.
func (w *Worker) begin(ctx context.Context, id engine.VersionID, g guilt, run bool) (use, error) {
	for {
		w.mu.Lock()
		p, failure, stopped, changed := w.current, w.failure, w.stopped, w.changed
		ready := p != nil && !p.isDead() // Supervise will notice a dead one in a moment
		if ready && !stopped {
			u, wait, err := w.admit(p, id, g, run)
			if !wait {
				w.mu.Unlock()
				return u, err
			}
		}
		w.mu.Unlock()
		switch {
		case stopped:
			return use{}, fmt.Errorf("%w: the worker has stopped", engine.ErrUnavailable)
		case p == nil && failure != nil:
			return use{}, unavailable(failure)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return use{}, context.Cause(ctx)
		}
	}
}

// admit is begin for a child that is ready; it is called with mu held. wait
// says that a trial goes on.
func (w *Worker) admit(p *process, id engine.VersionID, g guilt, run bool) (u use, wait bool, err error) {
	v := w.loaded[id]
	switch {
	case v == nil && w.quarantined[id] != nil:
		return use{}, false, w.quarantined[id]
	case v == nil:
		return use{}, false, engine.ErrNotLoaded
	case run && v.failure != nil:
		return use{}, false, v.failure
	case run && v.session == nil:
		return use{}, false, fmt.Errorf("%w: its weights are out", engine.ErrNotLoaded)
	}
	u = use{process: p, version: v}
	if g.suspected() || v.guilt.suspected() {
		if w.trial != nil {
			return use{}, true, nil
		}
		w.trial, u.onTrial = v, true
	}
	if run {
		u.session = v.session
		u.session.users++
	}
	return u, false, nil
}

// end is the end of what begin began; ran says that a run has succeeded.
func (w *Worker) end(u use, ran bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := u.session; s != nil {
		if s.users--; s.users == 0 && s.unused != nil {
			close(s.unused)
		}
	}
	cleared := ran && u.version.guilt != guilt{}
	if cleared {
		u.version.guilt = guilt{}
	}
	if u.process.proved = u.process.proved || ran; u.onTrial {
		w.trial = nil
	}
	if cleared || u.onTrial {
		w.wake()
	}
}

// blame puts the death of a child down to versions that were in flight, before
// anybody learns of it: to the one that the parent killed it for, or that was
// on trial, or else to all of them. One that is guilty for certain is put into
// quarantine.
func (w *Worker) blame(p *process, culprit engine.VersionID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.blamed = p.inFlight
	if culprit != (engine.VersionID{}) {
		p.blamed = []engine.VersionID{culprit}
	} else if w.trial != nil && slices.Contains(p.inFlight, w.trial.spec.ID) {
		p.blamed = []engine.VersionID{w.trial.spec.ID}
	}
	for _, id := range p.blamed {
		v := w.loaded[id]
		if v == nil {
			continue
		}
		v.guilt.add(p.weak)
		// Where several are to blame, each is so for the first time, or for
		// kills, which may have nothing to do with any of them.
		if v.guilt.proven() && len(p.blamed) == 1 {
			w.quarantine(v, fmt.Errorf("%w: %s was at work when %w, not for the first time", engine.ErrQuarantined, id, p.death))
		}
	}
}

// again says whether a call about a version is made again that came to the
// death of its child: then there is no error.
func (w *Worker) again(g *guilt, id engine.VersionID, p *process, death error) error {
	w.mu.Lock()
	quarantined := w.quarantined[id]
	w.mu.Unlock()
	if quarantined != nil {
		return quarantined
	}
	g.deaths++
	if slices.Contains(p.blamed, id) {
		g.add(p.weak)
	}
	if !g.retried() {
		return death
	}
	return nil
}

// quarantine is called with mu held.
func (w *Worker) quarantine(v *version, reason error) {
	w.quarantined[v.spec.ID] = reason
	w.remove(v)
	if w.cfg.OnLost != nil {
		w.lost = append(w.lost, lost{v.spec.ID, reason})
	}
}

// lost is a version that OnLost is to be told of.
type lost struct {
	id     engine.VersionID
	reason error
}
