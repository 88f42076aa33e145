package profile

import (
	"context"
	"time"
)

// Engine says whether anybody asks the device for something.
type Engine interface {
	// Idle gives for how long nobody has.
	Idle() time.Duration
	// Busy has a value once somebody has while nobody had, since it was read.
	Busy() <-chan struct{}
}

// Child is a process that can stand still.
type Child interface {
	Pause()
	Resume()
}

// Idle is a Gate that lets slices through when the engine has been idle for a
// moment, for a part of the time. As soon as a request comes, the process that
// measures stands still, until the engine is idle again. It is the only reader
// of Engine.Busy.
type Idle struct {
	engine Engine
	child  Child // nil: there is none yet
	pace   Pace
	began  time.Time
	worked time.Duration
}

// NewIdle gives a gate for one version. duty is the part of the time that
// measuring may take.
func NewIdle(e Engine, duty float64) *Idle {
	return &Idle{engine: e, pace: Pace{Duty: duty}, began: time.Now()}
}

// Hold says which process is to stand still. It is called before or between
// calls of Do, or in f.
func (g *Idle) Hold(c Child) { g.child = c }

// Worked gives for how long slices went on, without standing still. It is not
// called during Do.
func (g *Idle) Worked() time.Duration { return g.worked }

// Do is that of Gate.
func (g *Idle) Do(ctx context.Context, f func(context.Context) error) (disturbed bool, err error) {
	for {
		drain(g.engine.Busy())
		wait, err := g.pace.Wait(time.Since(g.began), g.engine.Idle())
		if err != nil {
			return false, err
		}
		if wait <= 0 {
			break
		}
		if !sleep(ctx, wait) {
			return false, context.Cause(ctx)
		}
	}
	done := make(chan error, 1)
	began, still := time.Now(), time.Duration(0)
	go func() { done <- f(ctx) }()
	for {
		select {
		case err = <-done:
			took := time.Since(began) - still
			g.worked += took
			g.pace.Ran(took, disturbed)
			return disturbed, err
		case <-g.engine.Busy():
		}
		disturbed = true
		if g.child == nil {
			continue
		}
		paused := time.Now()
		g.child.Pause()
		for wait := Settle; wait > 0; {
			if !g.pace.Paused(wait) || !sleep(ctx, wait) {
				break
			}
			drain(g.engine.Busy())
			wait = Settle - g.engine.Idle()
		}
		g.child.Resume()
		still += time.Since(paused)
	}
}

func drain(c <-chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// sleep says whether it has slept that long: ctx was not done before.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
