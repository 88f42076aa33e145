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

	"github.com/dunlin/dunlin/agent/datadrift"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// VersionID names one version of a model.
type VersionID struct {
	Model   string
	Version int64
	// Generation is what Replace tells those apart by that it puts in each
	// other's place. Only the Runtime is given it, so that it can hold both,
	// and Info.ID; everywhere else it is 0.
	Generation uint64
}

// String writes "digits:1".
func (v VersionID) String() string { return fmt.Sprintf("%s:%d", v.Model, v.Version) }

// Compare orders versions by model, then by number, then by generation.
func (v VersionID) Compare(o VersionID) int {
	return cmp.Or(cmp.Compare(v.Model, o.Model), cmp.Compare(v.Version, o.Version), cmp.Compare(v.Generation, o.Generation))
}

// Spec says what to load: the version, the absolute folder of its files and
// the path of the .onnx file in that folder.
type Spec struct {
	ID         VersionID
	Dir, Entry string
	// Options say how its requests are scheduled; nil leaves that to what the
	// graph says of itself, see serving.Automatic.
	Options *serving.Options
	// Labels are the names of the classes, by output.
	Labels map[string][]string
	// Tuning is what was measured of it before; Tune changes it.
	Tuning Tuning
}

// Info is what a loaded version takes and gives, and how long it took to
// load. A nil shape leaves the number of dimensions open; a scalar's is empty
// and not nil.
type Info struct {
	Inputs, Outputs []tensor.Info
	LoadTime        time.Duration
	// Batch says that the graph calls the first dimension of each input and
	// output by one name, and that a batch.
	Batch bool
	// Need is what it takes of the memory, measured or estimated.
	Need Need
	// Run is how long a run of one row took on one thread, before it was loaded;
	// 0: not known.
	Run time.Duration
	// Options and Labels are those of the Spec, and ID is the one that the
	// Runtime has the version by; the engine fills them in.
	Options serving.Options
	Labels  map[string][]string
	ID      VersionID

	data *datadrift.Watch // on its way to the core; nil: nobody watches its data
}

// Runtime runs models. Its methods may be called from many goroutines at a
// time; they return when what they began is over, soon after ctx is done.
type Runtime interface {
	// Load makes a version ready to be activated; its weights are out.
	Load(ctx context.Context, s Spec) (Info, error)
	// Activate brings a version's weights in, to run with the threads of the
	// Setting, and gives what it needs by now. Its cost should be a small part
	// of that of Load: prepacked weights are left to Set.
	Activate(ctx context.Context, id VersionID, set Setting) (Need, error)
	// Set has an active version run by another Setting: it is opened anew
	// beside the old way, and runs go on meanwhile. After an error it is as it
	// was.
	Set(ctx context.Context, id VersionID, set Setting) error
	// Deactivate puts a version's weights out. Nothing runs on it.
	Deactivate(ctx context.Context, id VersionID) error
	// Run runs an active version once on several requests together: the rows
	// of each input are those of the first request, then those of the second,
	// and so on. One request alone need not have rows. It does not write to
	// the inputs. The outputs come in the order asked for; nil asks for all of
	// them. ErrRows is the error of outputs that cannot be told apart by the
	// rows of the inputs.
	Run(ctx context.Context, id VersionID, requests [][]tensor.Tensor, outputs []string) (Outcome, error)
	// Unload forgets a version, whose weights may be in.
	Unload(ctx context.Context, id VersionID) error
}

// Setting is how a version runs while its weights are in. The zero value is
// that of most.
type Setting struct {
	// Threads compute a run, 1 to MaxThreads; 0 leaves it to the threads that
	// all versions share.
	Threads int
	// Prepack has the weights laid out anew, so that runs become faster. They
	// take more memory then: Need.Prepacked.
	Prepack bool
}

// MaxThreads bounds Setting.Threads.
const MaxThreads = 256

// Outcome is what a run gave.
type Outcome struct {
	Outputs [][]tensor.Tensor // of each request
	// Times from the call to the start of the run, of the run itself, and
	// from its end to the return.
	Input, Infer, Output time.Duration
	// Release gives the memory of the outputs back; it is called once, and
	// they are not used afterwards. nil where nobody waits for them.
	Release func()
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
	// ErrExpired is that of a request which cannot be answered in its time.
	ErrExpired = errors.New("the request's time is out")
	// ErrNotResident is that of a Request that asks for it.
	ErrNotResident = errors.New("the weights are not in memory")
	// ErrRows is that of a run whose outputs do not have the rows of its inputs.
	ErrRows = errors.New("the outputs do not have as many rows as the inputs")
)

// RefusedError is the refusal of a request for want of room or time:
// ErrOverloaded or ErrExpired.
type RefusedError struct {
	Err error
	// RetryAfter says when the same request may be admitted; 0 where waiting
	// does not help.
	RetryAfter time.Duration
}

func (e *RefusedError) Error() string { return e.Err.Error() }

// Unwrap gives Err.
func (e *RefusedError) Unwrap() error { return e.Err }

// Config configures an Engine.
type Config struct {
	Runtime Runtime
	// Memory is how many bytes the loaded versions may take; 0 sets no bound.
	Memory int64
	// Oversize lets a version run whose weights alone are more than that, where
	// they are mapped: they stay in their file, and are read from there as they
	// are needed. Without it, such a version is refused.
	Oversize bool
	// Retired, where not nil, is told of the figures of each version that has
	// been unloaded, or replaced, by the name that it was loaded by. It must be
	// quick and may not call the Engine.
	Retired func(VersionID, Figures)
	// Data, where not nil, gives what watches the requests and answers of a
	// version that has been loaded; it may give nil.
	Data func(Spec, *Info) *datadrift.Watch
	Log  *slog.Logger
}

// Engine is safe for use by many goroutines. Its calls wait until Run runs
// and give ErrStopped once it has ended.
type Engine struct {
	runtime Runtime
	log     *slog.Logger
	ledger  ledger        // that the core begins with
	core    chan *core    // holds the core while nobody owns it
	running chan struct{} // closed when Run begins
	tick    *time.Timer   // reset by the owner of the core
	work    sync.WaitGroup
	activity
	throttle atomic.Pointer[Throttle]
	infos    atomic.Pointer[map[VersionID]*Info]
	retired  func(VersionID, Figures)           // nil: nobody is told
	data     func(Spec, *Info) *datadrift.Watch // nil: none is watched
}

// New gives an Engine; Run starts it.
func New(cfg Config) *Engine {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Engine{
		runtime: cfg.Runtime,
		log:     cfg.Log,
		retired: cfg.Retired,
		data:    cfg.Data,
		ledger:  ledger{budget: cfg.Memory, most: cfg.Memory, oversize: cfg.Oversize},
		core:    make(chan *core, 1),
		running: make(chan struct{}),
	}
	e.activity.began, e.activity.busy = time.Now(), make(chan struct{}, 1)
	e.infos.Store(&map[VersionID]*Info{})
	return e
}

// Run lets the engine work until ctx is done. It then refuses what waits,
// cancels what runs, and returns nil when all of that is over. It may be
// called once.
func (e *Engine) Run(ctx context.Context) error {
	e.tick = time.NewTimer(time.Hour)
	defer e.tick.Stop()
	c := newCore(time.Now())
	c.ledger = e.ledger
	close(e.running) // before anybody has the core: who was answered finds it running
	e.core <- c
	for {
		select {
		case <-e.tick.C:
			e.must(tick{})
		case <-ctx.Done():
			e.must(stop{})
			e.work.Wait()
			return nil
		}
	}
}

// do takes one event through the core. The core has one owner at a time,
// which is whoever has taken it out of e.core; it goes back when the effects
// are under way. None of them blocks.
func (e *Engine) do(ctx context.Context, ev event) error {
	var c *core
	select {
	case c = <-e.core:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	now := time.Now()
	effects := c.step(ev, now)
	e.activity.note(c.idle(), now)
	for _, f := range effects {
		switch f := f.(type) {
		case answer:
			f.request.answer <- struct{}{}
		case startRun:
			ctx := f.run.begin()
			e.work.Go(func() { e.execute(ctx, f.run) })
		case startUnload:
			ctx := f.version.unload.begin()
			e.work.Go(func() { e.unload(ctx, f.version) })
		case startActivate:
			ctx := f.version.home.move.begin()
			e.work.Go(func() { e.activate(ctx, f.version, f.set) })
		case startDeactivate:
			ctx := f.version.home.move.begin()
			e.work.Go(func() { e.deactivate(ctx, f.version) })
		case startSet:
			ctx := f.version.home.move.begin()
			e.work.Go(func() { e.set(ctx, f.version, f.set) })
		case interrupt:
			f.job.cancel(f.cause)
		case reply:
			f.call.answer <- f
		case publish:
			e.publish(f)
		case separate:
			e.work.Go(func() {
				e.log.Warn("requests run alone: those of a batch cannot be told apart", "model", f.id.Model, "version", f.id.Version, "error", f.err)
			})
		case retired:
			if e.retired != nil {
				e.retired(f.version.spec.ID, f.version.counted())
			}
		case throttled:
			e.throttle.Store(&f.Throttle)
		case wake:
			e.tick.Reset(time.Until(f.at))
		}
	}
	e.core <- c
	return nil
}

// must is do for an event that must not be lost.
func (e *Engine) must(ev event) { e.do(context.Background(), ev) }

// begin gives the context of a job that starts.
func (j *job) begin() context.Context {
	var ctx context.Context
	ctx, j.cancel = context.WithCancelCause(context.Background())
	return ctx
}

func (e *Engine) activate(ctx context.Context, v *version, set Setting) {
	cancel := v.home.move.cancel
	defer cancel(nil)
	began := time.Now()
	need, err := e.runtime.Activate(ctx, v.id, set)
	if err != nil {
		err = fmt.Errorf("activate %s: %w", v.id, err)
	}
	e.must(activated{v, need, time.Since(began), err})
}

func (e *Engine) deactivate(ctx context.Context, v *version) {
	cancel := v.home.move.cancel
	defer cancel(nil)
	err := e.runtime.Deactivate(ctx, v.id)
	if err != nil && !errors.Is(err, ErrNotLoaded) && ctx.Err() == nil {
		e.log.Warn("weights could not be put out", "model", v.id.Model, "version", v.id.Version, "error", err)
	}
	e.must(deactivated{v, err})
}

func (e *Engine) set(ctx context.Context, v *version, set Setting) {
	cancel := v.home.move.cancel
	defer cancel(nil)
	err := e.runtime.Set(ctx, v.id, set)
	if err != nil && ctx.Err() == nil {
		e.log.Info("version stays as it is open", "model", v.id.Model, "version", v.id.Version,
			"threads", set.Threads, "prepacked", set.Prepack, "error", err)
	}
	e.must(changed{v, err})
}

// execute runs requests together.
func (e *Engine) execute(ctx context.Context, r *run) {
	defer r.cancel(nil)
	inputs := make([][]tensor.Tensor, len(r.requests))
	for i, q := range r.requests {
		inputs[i] = q.inputs
	}
	r.outcome, r.err = e.runtime.Run(ctx, r.version.id, inputs, r.outputs)
	if n := len(r.outcome.Outputs); r.err == nil && n != len(inputs) {
		r.err = fmt.Errorf("outputs are of %d requests instead of %d", n, len(inputs))
	}
	if r.err != nil {
		r.err = fmt.Errorf("run %s: %w", r.version.id, r.err)
	}
	e.must(finish{r})
	if r.err == nil && r.version.sure != nil {
		r.version.sure.look(r.outcome.Outputs, time.Now())
	}
	if r.err == nil {
		r.version.data.Look(time.Now(), inputs, r.outcome.Outputs)
	}
	r.drop()
}

// drop says that one holder of the outcome's memory needs it no more.
func (r *run) drop() {
	if r.holders.Add(-1) == 0 && r.outcome.Release != nil {
		r.outcome.Release()
	}
}

func (e *Engine) unload(ctx context.Context, v *version) {
	defer v.unload.cancel(nil)
	err := e.runtime.Unload(ctx, v.id)
	if errors.Is(err, ErrNotLoaded) { // the runtime has lost it before
		err = nil
	}
	e.must(unloaded{v.id, err})
}

// publish shows a version's Info to Infer and Info, or takes it away.
func (e *Engine) publish(p publish) {
	next := maps.Clone(*e.infos.Load())
	if p.info != nil {
		next[p.id] = p.info
	} else {
		delete(next, p.id)
	}
	e.infos.Store(&next)
}

// ask takes a call's event through the core and waits for its answer. A call
// that was given up because of ctx may still take effect.
func (e *Engine) ask(ctx context.Context, c *call, ev event) (reply, error) {
	if err := e.do(ctx, ev); err != nil {
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
// that is loaded already gives its Info and does nothing, and is an error where
// the Spec is another, but for its Tuning; ErrDraining says that it is on its
// way out.
func (e *Engine) Load(ctx context.Context, s Spec) (Info, error) {
	info, err := e.load(ctx, s, false)
	if errors.Is(err, errLoaded) {
		if info, ok := e.Info(s.ID); ok {
			return info, nil
		}
	}
	if err != nil {
		return Info{}, fmt.Errorf("load %s: %w", s.ID, err)
	}
	return info, nil
}

// Replace puts a version in the place of the loaded one of the same name, also
// where the Spec is the same, with no moment in which requests are refused: it
// loads the new one beside the old one, so that both take up memory, admits all
// further requests to it as soon as that is done, waits until those that the
// old one has admitted are answered by it, and unloads that. The figures of the
// version begin anew. Where none is loaded it is Load.
//
// An error says that the old one is as it was. When ctx is done, or the runtime
// fails, after the new one has taken over, that is logged: the old one goes on
// draining, and the next Unload or Replace unloads it.
func (e *Engine) Replace(ctx context.Context, s Spec) (Info, error) {
	info, err := e.load(ctx, s, true)
	if err != nil {
		return Info{}, fmt.Errorf("replace %s: %w", s.ID, err)
	}
	c := newCall()
	if _, err := e.ask(ctx, c, drain{c, s.ID, true}); err != nil && !errors.Is(err, ErrNotLoaded) {
		e.log.Warn("a version that was replaced is not unloaded yet", "model", s.ID.Model, "version", s.ID.Version, "error", err)
	}
	return info, nil
}

func (e *Engine) load(ctx context.Context, s Spec, replace bool) (Info, error) {
	if s.Options != nil {
		if err := s.Options.Check(); err != nil {
			return Info{}, fmt.Errorf("options: %w", err)
		}
	}
	if err := s.Tuning.Check(); err != nil {
		return Info{}, fmt.Errorf("tuning: %w", err)
	}
	c := newCall()
	if err := e.do(ctx, claim{c, s, replace}); err != nil {
		return Info{}, err
	}
	claimed := <-c.answer // the core answers a claim at once
	if claimed.err != nil {
		return Info{}, claimed.err
	}
	s.ID = claimed.id
	info, err := e.runtime.Load(ctx, s)
	info.Options, info.Labels, info.ID = resolve(s.Options, info.Batch), s.Labels, s.ID
	if err == nil && e.data != nil {
		info.data = e.data(s, &info)
	}
	// The claim must not outlive this call, whatever has become of ctx.
	c = newCall()
	e.must(loaded{c, s.ID, info, err})
	info.data = nil
	if r := e.tried(ctx, c, s.ID); r.err != nil {
		if err == nil { // the runtime has it
			if err := e.runtime.Unload(context.WithoutCancel(ctx), s.ID); err != nil && !errors.Is(err, ErrNotLoaded) {
				e.log.Warn("a version that cannot run is not unloaded", "model", s.ID.Model, "version", s.ID.Version, "error", err)
			}
			e.must(abandoned{s.ID})
		}
		return Info{}, r.err
	}
	e.log.Debug("version loaded", "model", s.ID.Model, "version", s.ID.Version)
	info.Options = s.Tuning.options(s.Options, info.Options)
	return info, nil
}

// tried waits for the answer to a load. When ctx is done, the version is not
// tried any longer.
func (e *Engine) tried(ctx context.Context, c *call, id VersionID) reply {
	select {
	case r := <-c.answer:
		return r
	case <-ctx.Done():
		e.must(giveUp{id, context.Cause(ctx)})
		return <-c.answer
	}
}

// Unload admits no more requests to a version, waits until those admitted
// are answered, and unloads it. When ctx is done before that, the version
// goes on draining, and another Unload waits for the same end.
func (e *Engine) Unload(ctx context.Context, id VersionID) error {
	c := newCall()
	if _, err := e.ask(ctx, c, drain{c, id, false}); err != nil {
		return fmt.Errorf("unload %s: %w", id, err)
	}
	return nil
}

// Request is one inference.
type Request struct {
	Inputs  []tensor.Tensor // nobody may write to them, also after the answer
	Outputs []string        // nil: all
	// Priority is 1, the highest, to Options.PriorityLevels; 0 is the default.
	Priority int
	// Timeout bounds the wait in the queue; 0 leaves it to the version's
	// queue policy.
	Timeout time.Duration
	// Resident refuses the request with ErrNotResident where the weights of the
	// version are not in memory. It counts as demand for them all the same.
	Resident bool
}

// Result is the answer to a request.
type Result struct {
	Outputs []tensor.Tensor
	Rows    int // of the run that it was part of
	// Times in the queue, until the run began, of the run, and after it.
	Queue, Input, Infer, Output time.Duration
	// Labels are those of the version that ran it.
	Labels map[string][]string

	request *request
}

// Release gives the memory of the outputs back, which are not used any more
// from then on.
func (r *Result) Release() {
	if q := r.request; q != nil && q.released.CompareAndSwap(false, true) {
		q.run.drop()
	}
}

// Infer runs a request on a version. Its inputs are checked before it waits:
// ErrInvalidInput names the one at fault. The deadline of ctx is the request's:
// a RefusedError says at once, or as soon as that is known, that it cannot be
// met. When ctx is done the call returns at once: a waiting request leaves the
// queue, a running one may go on for a while, so the inputs must not be written
// to afterwards either. ErrDraining asks the caller to resolve its route again.
func (e *Engine) Infer(ctx context.Context, id VersionID, q Request) (Result, error) {
	for {
		result, err := e.infer(ctx, id, q)
		if !errors.Is(err, errReplaced) { // else there is another Info now
			return result, err
		}
	}
}

func (e *Engine) infer(ctx context.Context, id VersionID, q Request) (Result, error) {
	info, ok := (*e.infos.Load())[id]
	if !ok {
		return Result{}, fmt.Errorf("%s: %w", id, ErrNotLoaded)
	}
	r, err := info.request(id, q)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", id, err)
	}
	r.info = info
	r.deadline, _ = ctx.Deadline()
	if err := e.do(ctx, arrive{r}); err != nil {
		return Result{}, err
	}
	select {
	case <-r.answer:
		return r.result, r.err
	case <-ctx.Done():
	}
	e.must(cancelled{r})
	<-r.answer // at once, unless an answer is there already
	r.result.Release()
	return Result{}, context.Cause(ctx)
}

// Info gives what a loaded version takes and gives, also while it drains.
func (e *Engine) Info(id VersionID) (Info, bool) {
	info, ok := (*e.infos.Load())[id]
	if !ok {
		return Info{}, false
	}
	return *info, true
}

// Versions gives the loaded versions in the order of their names, without
// those that have been replaced; none before Run begins and after it has ended.
func (e *Engine) Versions() []Status {
	select {
	case <-e.running:
	default:
		return nil
	}
	c := newCall()
	r, err := e.ask(context.Background(), c, inspect{c})
	if err != nil {
		return nil
	}
	return r.versions
}

// Memory gives the ledger at this moment; zero before Run begins and after it
// has ended.
func (e *Engine) Memory() Memory {
	select {
	case <-e.running:
	default:
		return Memory{}
	}
	c := newCall()
	r, err := e.ask(context.Background(), c, inspect{c})
	if err != nil {
		return Memory{}
	}
	return r.memory
}

// Backlog says how much there is to do at this moment; zero before Run begins.
func (e *Engine) Backlog() Backlog {
	select {
	case <-e.running:
	default:
		return Backlog{}
	}
	c := newCall()
	r, err := e.ask(context.Background(), c, count{c})
	if err != nil {
		return Backlog{}
	}
	return r.backlog
}

// SetMemory changes how many bytes the loaded versions may take for now; 0 sets
// no bound. What is above leaves as soon as nothing runs on it. A version may be
// loaded that fits the largest budget there has been. It waits until Run runs.
func (e *Engine) SetMemory(ctx context.Context, bytes int64) error {
	return e.do(ctx, setMemory{bytes})
}

// Health says why the engine makes no progress, and nil where it does: its
// core answers before ctx is done, no run takes much longer than runs of its
// version do, and nothing waits that could run.
func (e *Engine) Health(ctx context.Context) error {
	c := newCall()
	_, err := e.ask(ctx, c, health{c})
	return err
}
