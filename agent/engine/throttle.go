package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dunlin/dunlin/models/serving"
)

// Throttle is how much less than it could a device is to do, for all versions
// together: to cool, or to be gentle with what is about to fail. The zero value
// is no restraint.
type Throttle struct {
	// MaxBatch bounds the rows of a run of several requests; 0 sets no bound
	// but the options' own.
	MaxBatch int
	// Duty is the share of time in which runs go on, at most: above 0, at most
	// 1; 0 is 1. A row of runs that overlap is followed by a pause in proportion
	// to its length, in which none starts.
	Duty float64
	// Cordon refuses new requests with ErrCordoned; those that were admitted
	// before are answered.
	Cordon bool
}

// ErrCordoned is the error of a request that comes while a Throttle has the
// device take in none.
var ErrCordoned = errors.New("the device is cordoned: it takes in no requests")

const (
	// leastDuty bounds Throttle.Duty: the pause after a run of a second is 99
	// at most.
	leastDuty = 0.01
	// retryCordoned is after what time a request may find the device open
	// again; nobody knows.
	retryCordoned = 10 * time.Second
)

// Check names every figure that is out of its limits.
func (t Throttle) Check() error {
	var errs []error
	if t.MaxBatch < 0 || t.MaxBatch > serving.MaxBatchSize {
		errs = append(errs, fmt.Errorf("maxBatch is %d, allowed are 0 to %d", t.MaxBatch, serving.MaxBatchSize))
	}
	if t.Duty != 0 && !(t.Duty >= leastDuty && t.Duty <= 1) {
		errs = append(errs, fmt.Errorf("duty is %v, allowed are %v to 1, and 0 for 1", t.Duty, leastDuty))
	}
	return errors.Join(errs...)
}

// setThrottle replaces the Throttle; throttled says that it has been.
type (
	setThrottle struct{ throttle Throttle }
	throttled   struct{ Throttle }
)

// Throttle has the device do less, or as much as it can again: it replaces what
// the last call said. What runs already goes on. It waits until Run runs.
func (e *Engine) Throttle(ctx context.Context, t Throttle) error {
	if err := t.Check(); err != nil {
		return fmt.Errorf("throttle: %w", err)
	}
	return e.do(ctx, setThrottle{t})
}

// Throttled gives the Throttle that counts.
func (e *Engine) Throttled() Throttle {
	if t := e.throttle.Load(); t != nil {
		return *t
	}
	return Throttle{}
}

// Admits says why new requests are refused whatever version they are for, and
// nil where they are not: ErrCordoned.
func (e *Engine) Admits() error {
	if e.Throttled().Cordon {
		return ErrCordoned
	}
	return nil
}

// pace is the account of the Throttle: of rows of runs, each of which begins
// when nothing runs, and ends when nothing runs any more. What it means for the
// next run is in policy.go.
type pace struct {
	Throttle
	running int    // runs that go on
	began   moment // the row, or when the Throttle was set during it
	ended   moment // the last one
	length  time.Duration
	closing bool   // a run of the row has ended
	ends    moment // the last of its runs, as predicted
}

// throttled says that runs must pause.
func (p *pace) throttled() bool { return p.Duty > 0 && p.Duty < 1 }

// rest is the pause after a row of a length.
func (p *pace) rest(length time.Duration) time.Duration {
	if !p.throttled() {
		return 0
	}
	return duration(length.Seconds() * (1/p.Duty - 1))
}

// until is when the pause after the last row ends.
func (p *pace) until() moment { return p.ended + p.rest(p.length) }

// starts takes in a run.
func (p *pace) starts(now, ends moment) {
	if p.running == 0 {
		p.began, p.closing, p.ends = now, false, ends
	}
	p.running++
	p.ends = max(p.ends, ends)
}

// finishes takes in its end.
func (p *pace) finishes(now moment) {
	p.running--
	p.closing = true
	if p.running == 0 {
		p.ended, p.length = now, now-p.began
	}
}

// set replaces the Throttle. A row that goes on counts from now on.
func (p *pace) set(t Throttle, now moment) {
	p.Throttle = t
	if p.running > 0 {
		p.began, p.closing = now, false
	}
}

func (c *core) throttle(t Throttle) {
	c.pace.set(t, c.now)
	c.pace.ends = c.lastEnd()
	for _, v := range c.sorted() {
		if v.queue.len > 0 {
			v.queue.reprice(v.price)
			c.schedule(v)
		}
	}
	c.emit(throttled{t})
}

// lastEnd is when the last run that goes on ends, as predicted.
func (c *core) lastEnd() (last moment) {
	for _, v := range c.versions {
		for _, r := range v.runs {
			last = max(last, r.ends)
		}
	}
	return last
}

// rest has all that waits wait for the pause to end: a row of runs has ended.
func (c *core) rest() {
	for _, v := range c.sorted() {
		if v.queue.len > 0 {
			c.schedule(v)
		}
	}
}
