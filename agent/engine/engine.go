// Package engine admits requests to the loaded versions of models and
// schedules them on a Runtime: a bounded queue for each version, one owner
// for all of its state, one answer for each request.
package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// VersionID names one version of a model.
type VersionID struct {
	Model   string
	Version int64
}

// String writes "digits:1".
func (v VersionID) String() string { return fmt.Sprintf("%s:%d", v.Model, v.Version) }

// Compare orders versions by model and then by number.
func (v VersionID) Compare(o VersionID) int {
	return cmp.Or(cmp.Compare(v.Model, o.Model), cmp.Compare(v.Version, o.Version))
}

// Spec says what to load: the version, the absolute folder of its files and
// the path of the .onnx file in that folder.
type Spec struct {
	ID         VersionID
	Dir, Entry string
}

// Info is what a loaded version takes and gives, and how long it took to
// load. A nil shape leaves the number of dimensions open; a scalar's is empty
// and not nil.
type Info struct {
	Inputs, Outputs []tensor.Info
	LoadTime        time.Duration
}

// Runtime runs models. Its methods may be called from many goroutines at a
// time; they return when what they began is over, soon after ctx is done.
type Runtime interface {
	Load(ctx context.Context, s Spec) (Info, error)
	// Run runs a loaded version once. It does not write to the inputs. The
	// outputs come in the order asked for; nil asks for all of them.
	Run(ctx context.Context, id VersionID, inputs []tensor.Tensor, outputs []string) ([]tensor.Tensor, error)
	Unload(ctx context.Context, id VersionID) error
}

// Errors that callers tell apart. What the engine returns wraps them.
var (
	ErrNotLoaded    = errors.New("version is not loaded")
	ErrDraining     = errors.New("version is being unloaded")
	ErrOverloaded   = errors.New("queue is full")
	ErrInvalidInput = errors.New("invalid input")
	ErrStopped      = errors.New("engine has stopped")
	// ErrUnavailable is that of a Runtime which for now can run nothing.
	ErrUnavailable = errors.New("the runtime is not available")
)

// DefaultQueueLimit is the number of requests that wait for one version
// when Config does not say; a further one is refused with ErrOverloaded.
const DefaultQueueLimit = 1024

// Config configures an Engine.
type Config struct {
	Runtime    Runtime
	QueueLimit int // waiting requests for each version; DefaultQueueLimit where 0
	Log        *slog.Logger
}

// Engine is safe for use by many goroutines. Its calls wait until Run runs
// and give ErrStopped once it has ended.
type Engine struct {
	runtime Runtime
	log     *slog.Logger
	events  chan event
	running chan struct{} // closed when Run begins
	stopped chan struct{} // closed when the loop takes no more events
	infos   atomic.Pointer[map[VersionID]Info]
	core    *core // owned by Run
}

// New gives an Engine; Run starts it.
func New(cfg Config) *Engine {
	if cfg.QueueLimit <= 0 {
		cfg.QueueLimit = DefaultQueueLimit
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Engine{
		runtime: cfg.Runtime,
		log:     cfg.Log,
		events:  make(chan event),
		running: make(chan struct{}),
		stopped: make(chan struct{}),
		core:    newCore(cfg.QueueLimit),
	}
	e.infos.Store(&map[VersionID]Info{})
	return e
}

// Run owns the engine's state until ctx is done. It then refuses what waits,
// cancels what runs, and returns nil when all of that is over. It may be
// called once.
func (e *Engine) Run(ctx context.Context) error {
	close(e.running)
	runs, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var wg sync.WaitGroup
	finished := make(chan event)
	over := make(chan struct{}) // closed when every goroutine of wg is done
	done := ctx.Done()
	for {
		var ev event
		select {
		case ev = <-e.events:
		case ev = <-finished:
		case <-done:
			done = nil
			close(e.stopped)
			cancel()
			ev = stop{}
			e.apply(runs, ev, &wg, finished)
			go func() { wg.Wait(); close(over) }()
			continue
		case <-over:
			return nil
		}
		e.apply(runs, ev, &wg, finished)
	}
}

// apply takes one event through the core and carries out what it decides.
func (e *Engine) apply(ctx context.Context, ev event, wg *sync.WaitGroup, finished chan<- event) {
	for _, f := range e.core.step(ev, time.Now()) {
		switch f := f.(type) {
		case startRun:
			wg.Go(func() { finished <- e.execute(ctx, f.request) })
		case startUnload:
			wg.Go(func() {
				err := e.runtime.Unload(ctx, f.id)
				if errors.Is(err, ErrNotLoaded) { // the runtime has lost it before
					err = nil
				}
				finished <- unloaded{f.id, err}
			})
		case answer:
			f.request.answer <- f.reply
		case reply:
			f.call.answer <- f
		case publish:
			e.publish(f)
		}
	}
}

// execute runs one request under its caller's context and the engine's.
func (e *Engine) execute(ctx context.Context, r *request) event {
	runCtx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	outputs, err := e.runtime.Run(runCtx, r.id, r.inputs, r.outputs)
	if err != nil {
		err = fmt.Errorf("run %s: %w", r.id, err)
	}
	return finish{r, outputs, err}
}

// publish shows a version's Info to Infer and Info, or takes it away.
func (e *Engine) publish(p publish) {
	next := maps.Clone(*e.infos.Load())
	if p.info != nil {
		next[p.id] = *p.info
	} else {
		delete(next, p.id)
	}
	e.infos.Store(&next)
	e.log.Debug("versions changed", "model", p.id.Model, "version", p.id.Version, "loaded", p.info != nil)
}

// post hands an event to the loop.
func (e *Engine) post(ctx context.Context, ev event) error {
	select {
	case e.events <- ev:
		return nil
	case <-e.stopped:
		return ErrStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ask posts a call's event and waits for its answer. A call that was given
// up because of ctx may still take effect.
func (e *Engine) ask(ctx context.Context, c *call, ev event) (reply, error) {
	if err := e.post(ctx, ev); err != nil {
		return reply{}, err
	}
	select {
	case r := <-c.answer:
		return r, r.err
	case <-ctx.Done():
		return reply{}, context.Cause(ctx)
	}
}

// Load loads a version and admits requests to it from then on. Loading one
// that is loaded already gives its Info and does nothing; ErrDraining says
// that it is on its way out.
func (e *Engine) Load(ctx context.Context, s Spec) (Info, error) {
	if err := e.claim(ctx, s.ID); err != nil {
		if info, ok := e.Info(s.ID); ok && errors.Is(err, errLoaded) {
			return info, nil
		}
		return Info{}, fmt.Errorf("load %s: %w", s.ID, err)
	}
	info, err := e.runtime.Load(ctx, s)
	// The claim must not outlive this call, whatever has become of ctx.
	c := newCall()
	if _, lost := e.ask(context.WithoutCancel(ctx), c, loaded{c, s.ID, info, err}); err == nil {
		err = lost
	}
	if err != nil {
		return Info{}, fmt.Errorf("load %s: %w", s.ID, err)
	}
	return info, nil
}

// claim makes this call the one that loads the version.
func (e *Engine) claim(ctx context.Context, id VersionID) error {
	c := newCall()
	if err := e.post(ctx, claim{c, id}); err != nil {
		return err
	}
	return (<-c.answer).err // the loop answers a claim at once
}

// Unload admits no more requests to a version, waits until those admitted
// are answered, and unloads it. When ctx is done before that, the version
// goes on draining, and another Unload waits for the same end.
func (e *Engine) Unload(ctx context.Context, id VersionID) error {
	c := newCall()
	if _, err := e.ask(ctx, c, drain{c, id}); err != nil {
		return fmt.Errorf("unload %s: %w", id, err)
	}
	return nil
}

// Result is the answer to a request: its outputs, how long it waited and how
// long it ran.
type Result struct {
	Outputs    []tensor.Tensor
	Queue, Run time.Duration
}

// Infer runs a request on a version. Its inputs are checked before it waits:
// ErrInvalidInput names the one at fault. When ctx is done the call returns
// at once: a waiting request leaves the queue, a running one may go on for a
// while, so the inputs must not be written to afterwards either. ErrDraining
// asks the caller to resolve its route again.
func (e *Engine) Infer(ctx context.Context, id VersionID, in []tensor.Tensor, outputs []string) (Result, error) {
	info, ok := e.Info(id)
	if !ok {
		return Result{}, fmt.Errorf("%s: %w", id, ErrNotLoaded)
	}
	if err := info.check(in, outputs); err != nil {
		return Result{}, fmt.Errorf("%s: %w", id, err)
	}
	r := &request{ctx: ctx, id: id, inputs: in, outputs: outputs, answer: make(chan requestReply, 1)}
	if err := e.post(ctx, arrive{r}); err != nil {
		return Result{}, err
	}
	select {
	case a := <-r.answer:
		return a.result, a.err
	case <-ctx.Done():
	}
	// The loop answers cancel at once, unless an answer is there already.
	if err := e.post(context.WithoutCancel(ctx), cancelled{r}); err == nil {
		<-r.answer
	}
	return Result{}, context.Cause(ctx)
}

// Info gives what a loaded version takes and gives, also while it drains.
func (e *Engine) Info(id VersionID) (Info, bool) {
	info, ok := (*e.infos.Load())[id]
	return info, ok
}

// Status is one loaded version at a moment, and its figures since it was loaded.
type Status struct {
	ID                VersionID
	Info              Info
	Draining          bool
	Queued, Running   int
	Succeeded, Failed uint64        // runs; one that its caller gave up counts too, a request that never ran does not
	RunTime           time.Duration // of all of them together
}

// Versions gives the loaded versions in the order of their names; none
// before Run begins and after it has ended.
func (e *Engine) Versions() []Status {
	select {
	case <-e.running:
	default:
		return nil
	}
	c := newCall()
	r, err := e.ask(context.Background(), c, list{c})
	if err != nil {
		return nil
	}
	return r.versions
}
