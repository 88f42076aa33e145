package profile

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// traffic is an engine whose requests take a while each.
type traffic struct {
	mu      sync.Mutex
	running int
	since   time.Time
	busy    chan struct{}
}

func newTraffic() *traffic { return &traffic{since: time.Now(), busy: make(chan struct{}, 1)} }

func (e *traffic) Idle() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running > 0 {
		return 0
	}
	return time.Since(e.since)
}

func (e *traffic) Busy() <-chan struct{} { return e.busy }

func (e *traffic) begin() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running++; e.running == 1 {
		select {
		case e.busy <- struct{}{}:
		default:
		}
	}
}

func (e *traffic) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running--
	e.since = time.Now()
}

// still is a child whose work stands still while it is paused.
type still struct {
	mu     sync.Mutex
	paused bool
	change chan struct{}
	worked time.Duration
	met    time.Duration // that it worked while there were requests
	engine *traffic
}

func (c *still) set(paused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = paused
	close(c.change)
	c.change = make(chan struct{})
}

func (c *still) Pause()  { c.set(true) }
func (c *still) Resume() { c.set(false) }

// work computes for so long.
func (c *still) work(ctx context.Context, d time.Duration) error {
	for d > 0 {
		c.mu.Lock()
		paused, change := c.paused, c.change
		c.mu.Unlock()
		if paused {
			select {
			case <-change:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			continue
		}
		const bit = 100 * time.Microsecond
		time.Sleep(bit)
		d -= bit
		c.worked += bit
		if c.engine.Idle() < bit {
			c.met += bit
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// TestIdleMeetsNobody measures beside traffic of several kinds in simulated
// time: what is measured stays within its part of the time, stands still as
// soon as a request comes, and ends, or is given up in bounded time.
func TestIdleMeetsNobody(t *testing.T) {
	const seed = 1
	tests := []struct {
		name         string
		pause, run   time.Duration // mean pause between requests, and what each takes
		duty         float64
		slices       int
		givenUp      bool
		within, most time.Duration
	}{
		{"nobody", time.Hour * 1000, time.Millisecond, 0.1, 50, false, 20 * time.Second, 30 * time.Second},
		{"nobody, all the time", time.Hour * 1000, time.Millisecond, 1, 50, false, 2 * time.Second, 4 * time.Second},
		{"now and then", 500 * time.Millisecond, 20 * time.Millisecond, 0.1, 50, false, 20 * time.Second, time.Minute},
		{"often", 80 * time.Millisecond, 10 * time.Millisecond, 0.1, 20, false, 5 * time.Second, 3 * time.Minute},
		{"all the time", 2 * time.Millisecond, 30 * time.Millisecond, 0.1, 50, true, 0, 20 * time.Minute},
	}
	for _, tt := range tests {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			e := newTraffic()
			r := rand.New(rand.NewPCG(seed, uint64(tt.pause)))
			var requests sync.WaitGroup
			defer requests.Wait()
			defer stop()
			requests.Go(func() {
				for sleep(ctx, time.Duration(r.ExpFloat64()*float64(tt.pause))) {
					e.begin()
					sleep(ctx, tt.run)
					e.end()
				}
			})
			c := &still{change: make(chan struct{}), engine: e}
			g := NewIdle(e, tt.duty)
			g.Hold(c)
			began, clean, disturbed := time.Now(), 0, 0
			var err error
			for clean < tt.slices {
				var met bool
				if met, err = g.Do(ctx, func(ctx context.Context) error { return c.work(ctx, 40*time.Millisecond) }); err != nil {
					break
				}
				if met {
					disturbed++
				} else {
					clean++
				}
			}
			took := time.Since(began)
			t.Logf("%s: %d slices, %d disturbed, in %v; worked %v, %v of it beside requests", tt.name, clean, disturbed, took, c.worked, c.met)
			if errors.Is(err, ErrGivenUp) != tt.givenUp || err != nil && !tt.givenUp {
				t.Errorf("%s: %v", tt.name, err)
			}
			if took > tt.most || took < tt.within/2 {
				t.Errorf("%s: it took %v", tt.name, took)
			}
			if part := (c.worked - burst).Seconds() / took.Seconds(); part > tt.duty*1.05 {
				t.Errorf("%s: it worked %.3f of the time, allowed are %.3f", tt.name, part, tt.duty)
			}
			// The bit that is under way when a request comes is done, and what is
			// given up ends.
			if c.met > 40*time.Millisecond || !tt.givenUp && c.met > time.Duration(disturbed)*200*time.Microsecond {
				t.Errorf("%s: it worked %v beside requests", tt.name, c.met)
			}
			if c.paused {
				t.Errorf("%s: the child still stands still", tt.name)
			}
		})
	}
}

// TestIdleEnds cancels while nothing may be measured, and while the child
// stands still.
func TestIdleEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		enough := errors.New("enough")
		e := newTraffic()
		c := &still{change: make(chan struct{}), engine: e}
		g := NewIdle(e, 0.5)
		g.Hold(c)
		for _, when := range []time.Duration{0, 30 * time.Millisecond} {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.Sleep(time.Second)
			if when == 0 {
				e.begin()
			}
			go func() {
				time.Sleep(when)
				if when > 0 {
					e.begin()
				}
				time.Sleep(time.Second)
				cancel(enough)
			}()
			if _, err := g.Do(ctx, func(ctx context.Context) error { return c.work(ctx, time.Minute) }); !errors.Is(err, enough) {
				t.Errorf("got %v", err)
			}
			e.end()
		}
	})
}
