package engine

import (
	"sync/atomic"
	"time"
)

// activity says whether there is anything to do. The owner of the core writes
// it, anybody reads it.
type activity struct {
	began   time.Time
	working bool          // the owner's
	since   atomic.Int64  // began to be idle, by nanoseconds since began; -1: it is not
	busy    chan struct{} // holds one
}

// note takes in whether the core is idle, at the end of a step.
func (a *activity) note(idle bool, now time.Time) {
	if idle != a.working {
		return
	}
	if a.working = !idle; idle {
		a.since.Store(int64(now.Sub(a.began)))
		return
	}
	a.since.Store(-1)
	select {
	case a.busy <- struct{}{}:
	default:
	}
}

// Idle says for how long no request has waited and nothing has run, of all
// versions; 0 while there is one. It costs a few nanoseconds and may be called
// at any time.
func (e *Engine) Idle() time.Duration {
	since := e.activity.since.Load()
	if since < 0 {
		return 0
	}
	return max(time.Since(e.activity.began)-time.Duration(since), 0)
}

// Busy has a value once a request has come while there was none, since it was
// read last. It is for one reader, which empties it before it looks at Idle and
// learns from then on of the next request at once.
func (e *Engine) Busy() <-chan struct{} { return e.activity.busy }
