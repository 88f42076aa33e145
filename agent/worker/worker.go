// Package worker runs models in a child process, so that neither a model nor
// the runtime can take the agent down: Worker is the parent's end, which
// starts the child again when it dies, and Child is the child's main.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// Defaults and bounds.
const (
	// DefaultSharedBytes is the address space of the memory that parent and
	// child share; what of it requests have used stays resident until a
	// version is unloaded.
	DefaultSharedBytes = 64 << 20
	// DefaultMaxBytes bounds the tensors of one request, and those of one
	// answer; more is refused with the numbers.
	DefaultMaxBytes = 1 << 30
	// maxRunning bounds the runs that the child works on at a time; further
	// ones wait for their turn.
	maxRunning = min(64, ort.MaxLanes)
	// maxReloads is how often in a row the child may die while it loads a
	// version again; the version is then given up.
	maxReloads = 2
	// maxBackoff is the longest pause before a child is started again that did
	// not come to be ready, maxPause before one that was: what it loaded and
	// answered, the next one can load and answer too.
	maxBackoff = 5 * time.Second
	maxPause   = 100 * time.Millisecond
	// maxStillborn is how often in a row the child may die before it has
	// opened the runtime; calls then fail until one succeeds.
	maxStillborn = 3
	// settled is how long a child must have been ready for its death to be
	// the first of a row.
	settled = 10 * time.Second
	// grace is how long a child may take to give up what was cancelled: ONNX
	// Runtime ends a run between two nodes, and a node may be large.
	grace = 30 * time.Second
)

// Config configures a Worker.
type Config struct {
	Command     []string // the child's executable and arguments; its main calls Child
	RuntimeLib  string   // path of ONNX Runtime's shared library
	Threads     int      // of the runtime, for all models together; 0 for one per core
	SharedBytes int      // see DefaultSharedBytes; larger tensors pass too, more slowly
	MaxBytes    int      // see DefaultMaxBytes
	Log         *slog.Logger
	// OnDeath, where not nil, is told of each death of the child, before the
	// next one is started. It must be quick.
	OnDeath func(Death)
	// OnLost, where not nil, is told of each version that was loaded and that
	// a new child could not load again: it is not loaded any more. It must be
	// quick.
	OnLost func(id engine.VersionID, reason error)

	// CheckMemory bounds the bytes that the child of a Check or Compile may
	// allocate; 0 for what the machine has.
	CheckMemory int64

	settled, grace time.Duration
	sandbox        *sandbox // of the child; nil for one that serves
}

func (c Config) withDefaults() Config {
	if c.SharedBytes <= 0 {
		c.SharedBytes = DefaultSharedBytes
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = DefaultMaxBytes
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.settled == 0 {
		c.settled = settled
	}
	if c.grace == 0 {
		c.grace = grace
	}
	return c
}

// Death tells how a child ended and which versions it was working on: each
// that was being loaded, run or unloaded, once.
type Death struct {
	Err      *DeathError
	InFlight []engine.VersionID
}

// Worker is an engine.Runtime whose models live in a child process. Its calls
// wait until a child is ready; engine.ErrUnavailable says why none can be. A
// request in flight when the child dies is run once more on the next child; a
// load is not, and fails with a DeathError.
type Worker struct {
	cfg     Config
	turn    chan struct{} // holds one for each run that goes on
	loading chan struct{} // holds one while a version is loaded: a death is put down to it

	mu       sync.Mutex    // guards what follows
	current  *process      // the ready child, nil while there is none
	failure  error         // why the last one did not start; nil once one is ready
	stopped  bool          // Supervise has ended
	changed  chan struct{} // closed and replaced when one of the above changes
	loaded   map[engine.VersionID]*version
	sessions uint64 // the last session number given
	deaths   int    // before the runtime was open, in a row
}

// version is one that every child is to hold.
type version struct {
	spec    engine.Spec
	info    engine.Info
	session uint64 // its number in every child
	deaths  int    // of children that were loading it again, in a row

	// What is known of its outputs: the bytes of the largest ones so far that
	// did not fit a packet, which the next ones may need too, and whether they
	// had other shapes than the model says.
	room       atomic.Uint64
	surprising atomic.Bool
}

// New gives a Worker; Supervise starts its child.
func New(cfg Config) *Worker {
	return &Worker{
		cfg:     cfg.withDefaults(),
		turn:    make(chan struct{}, maxRunning),
		loading: make(chan struct{}, 1),
		changed: make(chan struct{}),
		loaded:  make(map[engine.VersionID]*version),
	}
}

// Supervise keeps a child running until ctx is done, and then returns nil
// when it has ended. It may be called once.
func (w *Worker) Supervise(ctx context.Context) error {
	// A child dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer w.update(func() { w.stopped, w.current = true, nil })
	for row := 0; ; row++ {
		ready, err := w.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if ready >= w.cfg.settled {
			row = 0
		}
		level := slog.LevelWarn
		if row&(row-1) != 0 { // of many in a row, only those of a power of two are worth a line
			level = slog.LevelDebug
		}
		w.cfg.Log.Log(ctx, level, "worker process ended; starting another", "error", err, "ready_for", ready.Round(time.Millisecond), "in_a_row", row)
		pause := time.NewTimer(backoff(row, ready > 0))
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

// backoff is the pause after so many deaths in a row before the last one, of
// a child that was ready or was not.
func backoff(row int, ready bool) time.Duration {
	if row == 0 {
		return 0
	}
	longest := maxBackoff
	if ready {
		longest = maxPause
	}
	return min(10*time.Millisecond<<min(row-1, 20), longest)
}

// update changes the guarded state and wakes who waits for it.
func (w *Worker) update(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	close(w.changed)
	w.changed = make(chan struct{})
}

// once runs one child from its start to its end, and gives how long it was
// ready and how it ended.
func (w *Worker) once(ctx context.Context) (time.Duration, error) {
	p, err := startProcess(&w.cfg)
	if err != nil {
		w.update(func() { w.failure = err })
		return 0, err
	}
	defer p.stop()
	defer context.AfterFunc(ctx, func() { p.kill("stopped") })()
	began := time.Now()
	err = p.open(ctx, &w.cfg)
	opened := err == nil
	if opened {
		err = w.reload(ctx, p)
	}
	if err != nil {
		if ctx.Err() != nil {
			return 0, nil
		}
		w.ended(p, opened, err)
		return 0, err
	}
	w.cfg.Log.Info("worker process is ready", "pid", p.command.Process.Pid, "runtime", p.runtime.Version, "took", time.Since(began).Round(time.Millisecond))
	ready := time.Now()
	<-p.dead
	if ctx.Err() != nil {
		return 0, nil
	}
	err = p.death
	w.ended(p, true, err)
	return time.Since(ready), err
}

// ended takes note of a child that is dead or did not come to be ready;
// opened says whether it opened the runtime.
func (w *Worker) ended(p *process, opened bool, err error) {
	death, died := errors.AsType[*DeathError](err)
	w.update(func() {
		w.current = nil
		if w.deaths++; opened {
			w.deaths = 0
		}
		if !died || w.deaths >= maxStillborn {
			w.failure = err // the next child will hardly do better
		}
	})
	if died && w.cfg.OnDeath != nil {
		w.cfg.OnDeath(Death{death, p.inFlight})
	}
}

// reload brings back what was loaded and makes the child the current one.
func (w *Worker) reload(ctx context.Context, p *process) error {
	// Versions leave only while a child is current, so none does meanwhile.
	w.mu.Lock()
	versions := slices.SortedFunc(maps.Values(w.loaded), func(a, b *version) int { return a.spec.ID.Compare(b.spec.ID) })
	w.mu.Unlock()
	for _, v := range versions {
		limited, cancel := context.WithTimeout(ctx, CheckLimit)
		_, err := p.load(limited, v.spec, v.session)
		cancel()
		if ctx.Err() != nil {
			return err
		}
		death, died := errors.AsType[*DeathError](err)
		if died {
			if v.deaths++; v.deaths < maxReloads {
				return death
			}
		}
		if err != nil {
			w.lose(v, fmt.Errorf("load %s again: %w", v.spec.ID, err))
		}
		if died {
			return death
		}
		v.deaths = 0
	}
	w.update(func() { w.current, w.failure = p, nil })
	return nil
}

// lose gives a version up.
func (w *Worker) lose(v *version, reason error) {
	w.mu.Lock()
	delete(w.loaded, v.spec.ID)
	w.mu.Unlock()
	if w.cfg.OnLost != nil {
		w.cfg.OnLost(v.spec.ID, reason)
	}
}

// acquire waits for a ready child.
func (w *Worker) acquire(ctx context.Context) (*process, error) {
	for {
		w.mu.Lock()
		p, failure, stopped, changed := w.current, w.failure, w.stopped, w.changed
		w.mu.Unlock()
		switch {
		case stopped:
			return nil, fmt.Errorf("%w: the worker has stopped", engine.ErrUnavailable)
		case p != nil && !p.isDead(): // Supervise will notice a dead one in a moment
			return p, nil
		case p == nil && failure != nil:
			return nil, unavailable(failure)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// unavailable is the error of a child that cannot be started.
func unavailable(reason error) error {
	return fmt.Errorf("%w: the worker process does not start: %w", engine.ErrUnavailable, reason)
}

// Runtime waits for a ready child and describes the runtime that it has opened.
func (w *Worker) Runtime(ctx context.Context) (Runtime, error) {
	p, err := w.acquire(ctx)
	if err != nil {
		return Runtime{}, err
	}
	return p.runtime, nil
}

// take waits for one of a semaphore's places.
func take(ctx context.Context, semaphore chan struct{}) error {
	select {
	case semaphore <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Load loads a version, in this child and all that follow. A load during
// which the child dies is not done again: its error is a DeathError. Unless
// the load was all that the child was doing, it is engine.ErrUnavailable too:
// another version may have killed it.
func (w *Worker) Load(ctx context.Context, s engine.Spec) (engine.Info, error) {
	if err := take(ctx, w.loading); err != nil {
		return engine.Info{}, err
	}
	defer func() { <-w.loading }()
	w.mu.Lock()
	v := w.loaded[s.ID]
	w.sessions++
	session := w.sessions
	w.mu.Unlock()
	if v != nil {
		return v.info, nil
	}
	for {
		p, err := w.acquire(ctx)
		if err != nil {
			return engine.Info{}, err
		}
		info, err := p.load(ctx, s, session)
		if _, died := errors.AsType[*DeathError](err); died && !slices.Equal(p.inFlight, []engine.VersionID{s.ID}) {
			err = fmt.Errorf("%w: %w", engine.ErrUnavailable, err)
		}
		if err != nil {
			return engine.Info{}, err
		}
		w.mu.Lock()
		current := w.current == p
		if current {
			w.loaded[s.ID] = &version{spec: s, info: info, session: session}
		}
		w.mu.Unlock()
		if current {
			return info, nil
		}
		// The child died after it: the next one has not heard of the version.
	}
}

// Unload closes a version, in this child and all that follow.
func (w *Worker) Unload(ctx context.Context, id engine.VersionID) error {
	for {
		p, err := w.acquire(ctx)
		if err != nil {
			return err
		}
		w.mu.Lock()
		v, current := w.loaded[id], w.current == p
		if current {
			delete(w.loaded, id)
		}
		w.mu.Unlock()
		if !current {
			continue // the next child is loading it just now, and must be told
		}
		if v == nil {
			return engine.ErrNotLoaded
		}
		// From here on it is gone for the children to come; this one closes it
		// whatever becomes of ctx.
		_, err = p.call(context.WithoutCancel(ctx), id, &message{kind: kindUnload, session: v.session})
		if _, died := errors.AsType[*DeathError](err); died {
			return nil
		}
		return errors.Join(err, p.region.trim())
	}
}
