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
	// rebuildAfter is how long a new child is ready before weights are
	// prepacked again.
	rebuildAfter = time.Second
	// DefaultStallGrace is how long it may take to give up a run that has
	// stalled.
	DefaultStallGrace = 2 * time.Second
	// maxDeaths bounds how often a call is made again, whatever the children
	// died of.
	maxDeaths = 20
)

// Config configures a Worker.
type Config struct {
	Command    []string // the child's executable and arguments; its main calls Child
	RuntimeLib string   // path of ONNX Runtime's shared library
	// Folders are those of models, and of compiled ones. The child that serves
	// may read them from its start on; for what a version has elsewhere, another
	// child takes its place. No child may read, or write, anything else.
	Folders     []string
	Threads     int   // of the runtime, for all models together; 0 for one per core
	Affinity    []int // numbers of the processors that children may use; none: all
	SharedBytes int   // see DefaultSharedBytes; larger tensors pass too, more slowly
	MaxBytes    int   // see DefaultMaxBytes
	// StallGrace is how long a run that was cancelled for engine.ErrStalled may
	// take to end before the child is killed for it; see DefaultStallGrace.
	StallGrace time.Duration
	// Compile, where not nil, gives a version as it was compiled for this
	// device, and compiles it where it was not yet; see Cached. It is called from
	// many goroutines at a time. After ort.ErrNotCompilable the version is opened
	// as it is.
	Compile func(context.Context, Runtime, engine.Spec) (Image, error)
	Log     *slog.Logger
	// OnDeath, where not nil, is told of each death of the child, before the
	// next one is started. It must be quick.
	OnDeath func(Death)
	// OnLost, where not nil, is told of each version that is not loaded any
	// more because a new child could not open it again, or because it is in
	// quarantine: the reason is engine.ErrQuarantined then. It must be quick.
	OnLost func(id engine.VersionID, reason error)

	// CheckMemory gives how many bytes the child of a Check or Compile may
	// allocate that is about to be started; nil for what the machine has.
	CheckMemory func() int64

	// Eager has a child of Measure not give way to everybody: for benchmarks on
	// machines that have other things to do.
	Eager bool

	// Pools names a device in whose memory the child that serves keeps weights,
	// so that a version's session stays while they leave and come back: "" for
	// none, "cuda:N" for a GPU, FakePools for tests. Where that cannot be had,
	// Runtime.Pooling says why, and all is as without.
	Pools string
	// ProviderOptions are options of the GPU's execution provider, by ONNX
	// Runtime's names.
	ProviderOptions map[string]string
	// PoolBytes is the size of a fake device.
	PoolBytes int64
	// PinnedBytes is host memory from which a GPU reads weights at full speed;
	// the child takes it when it starts.
	PinnedBytes int64
	// WarmBytes bounds what sessions in pools have on the host, copies of their
	// weights included; 0 for no bound. Beyond it, those whose weights have been
	// out for the longest time are closed, and opened anew when they are
	// activated.
	WarmBytes int64

	settled, grace, rebuildAfter time.Duration
	sandbox                      *sandbox // of the child
	write                        []string // folders that one that serves may write in, for tests
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
	if c.StallGrace <= 0 {
		c.StallGrace = DefaultStallGrace
	}
	if c.settled == 0 {
		c.settled = settled
	}
	if c.rebuildAfter == 0 {
		c.rebuildAfter = rebuildAfter
	}
	if c.grace == 0 {
		c.grace = grace
	}
	return c
}

// FakePools has a Config.Pools that is made of the child's own memory.
const FakePools = "fake"

// Death tells how a child ended and which versions it was working on: each
// that was being run, activated, prepacked or deactivated, once.
type Death struct {
	Err      *DeathError
	InFlight []engine.VersionID
}

// Worker is an engine.Runtime whose models live in a child process. Its calls
// wait until a child is ready; engine.ErrUnavailable says why none can be.
//
// What is in flight when the child dies is done again on the next child: once,
// after a kill that this process did not send up to three times, and however
// often another version was the cause. What was in flight at a death is under
// suspicion until a run of it succeeds; meanwhile only one of the suspects
// works at a time. So at the next death it is known which one it is due to: it
// is put into quarantine, and its calls give engine.ErrQuarantined.
type Worker struct {
	cfg      Config
	turn     chan struct{} // holds one for each run that goes on
	checking chan struct{} // holds one while a version is checked

	mu       sync.Mutex    // guards what follows
	current  *process      // the ready child, nil while there is none
	failure  error         // why the last one did not start; nil once one is ready
	stopped  bool          // Supervise has ended
	changed  chan struct{} // closed and replaced when one of the above changes
	loaded   map[engine.VersionID]*version
	sessions uint64   // the last session number given
	deaths   int      // before the runtime was open, in a row
	trial    *version // the suspect that works; nil for none
	accused  guilt    // of the call that trial works on
	lost     []lost   // that OnLost has yet to be told of
	outs     uint64   // how often weights have left a pool, and their session stayed
	noPools  string   // why children open none; "": they do as Config says
	said     string   // why there are none, as it was logged last

	quarantined map[engine.VersionID]error // with the reason
}

// New gives a Worker; Supervise starts its child.
func New(cfg Config) *Worker {
	return &Worker{
		cfg:      cfg.withDefaults(),
		turn:     make(chan struct{}, maxRunning),
		checking: make(chan struct{}, 1),
		changed:  make(chan struct{}),
		loaded:   make(map[engine.VersionID]*version),

		quarantined: make(map[engine.VersionID]error),
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
		ready, proved, err := w.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if ready >= w.cfg.settled || proved {
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
	w.wake()
}

// wake is called with mu held.
func (w *Worker) wake() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// once runs one child from its start to its end, and gives how long it was
// ready, whether it has run something, and how it ended.
func (w *Worker) once(ctx context.Context) (ready time.Duration, proved bool, err error) {
	cfg := w.cfg
	w.mu.Lock()
	noPools, versions := w.noPools, slices.Collect(maps.Values(w.loaded))
	w.mu.Unlock()
	if noPools != "" {
		cfg.Pools = ""
	}
	cfg.sandbox = cfg.serving(versions)
	p, err := startProcess(&cfg, w.blame)
	if err != nil {
		w.update(func() { w.failure = err })
		return 0, false, err
	}
	defer p.stop()
	defer context.AfterFunc(ctx, func() { p.kill(verdictStopped) })()
	began := time.Now()
	err = p.open(ctx, &cfg)
	opened := err == nil
	if cfg.Pools != "" && !opened && ctx.Err() == nil {
		w.doubtPools(p, err)
	}
	if opened {
		if noPools != "" {
			p.runtime.Pooling.Reason = noPools
		}
		w.sayPools(p.runtime.Pooling)
		err = w.reload(ctx, p)
	}
	if err != nil {
		if ctx.Err() != nil {
			return 0, false, nil
		}
		w.ended(p, opened, err)
		return 0, false, err
	}
	w.cfg.Log.Info("worker process is ready", "pid", p.command.Process.Pid, "runtime", p.runtime.Version, "took", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	stop := whileAlive(ctx, func(ctx context.Context) { w.rebuild(ctx, p) })
	<-p.dead
	stop()
	if ctx.Err() != nil {
		return 0, false, nil
	}
	w.ended(p, true, p.death)
	w.mu.Lock()
	proved = p.proved
	w.mu.Unlock()
	return time.Since(began), proved, p.death
}

// ended takes note of a child that is dead or did not come to be ready;
// opened says whether it opened the runtime.
func (w *Worker) ended(p *process, opened bool, err error) {
	death, died := errors.AsType[*DeathError](err)
	var gone []lost
	w.update(func() {
		gone, w.lost = w.lost, nil
		w.current = nil
		if w.deaths++; opened {
			w.deaths = 0
		}
		if !died || w.deaths >= maxStillborn {
			w.failure = err // the next child will hardly do better
		}
	})
	if died && w.cfg.OnDeath != nil && !p.replaced() {
		w.cfg.OnDeath(Death{death, p.inFlight})
	}
	if w.cfg.OnLost != nil {
		for _, l := range gone {
			w.cfg.OnLost(l.id, l.reason)
		}
	}
}

// lose gives a version up.
func (w *Worker) lose(v *version, reason error) {
	w.mu.Lock()
	w.remove(v)
	w.mu.Unlock()
	v.release()
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

// PID gives the number of the ready child's process; 0 where none is ready.
func (w *Worker) PID() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.current == nil {
		return 0
	}
	return w.current.command.Process.Pid
}
