// Package repository serves models from a folder in Triton's layout, or from
// one ONNX file, without a controller.
//
// The folder holds MODEL/VERSION/model.onnx, with external data beside it, and
// MODEL/config.pbtxt where a model has a configuration. Folders of models and
// versions, and model files, may be links to anywhere; one that leads out of
// the folder is logged. Other files must lie in their model's folder. Names
// that begin with a dot are left alone.
//
// Files are read when they are loaded, and again when the worker starts anew:
// put new ones in place by renaming, under a new version where that is
// possible.
package repository

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
)

const (
	// maxLoading is how many models are loaded at a time.
	maxLoading = 2
	// maxPending is how many calls of Load and Unload may be at work or wait;
	// a further one is refused as Unavailable.
	maxPending = 64
	// maxLost bounds the lost versions that wait to be looked at; the caller
	// of Lost waits when there are more.
	maxLost = 1024
	// firstRetry and lastRetry are the shortest and the longest wait before a
	// load is tried again that failed for want of a runtime.
	firstRetry = time.Second
	lastRetry  = time.Minute
	// maxNamed bounds how many models the error of Ready names.
	maxNamed = 8
)

// Control says who decides what is loaded.
type Control int

const (
	None     Control = iota // everything is loaded at start, and stays
	Explicit                // Startup is loaded at start; then Load and Unload decide
	Poll                    // the folder decides
)

// Engine runs versions.
type Engine interface {
	Load(ctx context.Context, s engine.Spec) (engine.Info, error)
	// Replace puts a version in the place of a loaded one of the same name,
	// with no moment between them. A failure leaves the old one as it was.
	Replace(ctx context.Context, s engine.Spec) (engine.Info, error)
	Unload(ctx context.Context, id engine.VersionID) error
}

// Config configures a Repository.
type Config struct {
	Dir     string // absolute; or
	File    string // absolute
	Control Control
	Startup []string      // with Explicit: the models to load at start; "*" alone: all
	Poll    time.Duration // with Poll: from one look at the folder to the next
	// Staging is a folder for what callers of Load bring along. It is emptied
	// at start. Empty: they may bring no files.
	Staging string
	Engine  Engine
	// Check, where not nil, loads a version once where it can do no harm.
	Check func(context.Context, engine.Spec) (engine.Info, error)
	// Front is told which version answers for each model. It must be quick.
	Front interface{ SetServing(map[string]int64) }
	Log   *slog.Logger
}

// Repository is an oip.Repository. It is safe for concurrent use.
type Repository struct {
	cfg     Config
	folder  *folder
	jobs    chan func(context.Context)
	lost    chan lost
	running chan struct{} // closed when Run takes jobs
	ended   chan struct{} // closed when it takes no more
	slots   chan struct{} // holds one for each load at work
	pending atomic.Int64  // calls at work or waiting
	staging *staging      // set before running is closed

	mu     sync.Mutex // guards what follows, and the fields of models that say so
	begun  bool       // the initial loads are known
	models map[string]*model
}

type lost struct {
	id     engine.VersionID
	reason error
}

// New gives a Repository; Run starts it.
func New(cfg Config) (*Repository, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f, err := newFolder(cfg.Dir, cfg.File)
	if err != nil {
		return nil, err
	}
	switch {
	case cfg.Control != Explicit && len(cfg.Startup) > 0:
		return nil, errors.New("models to load at start can be named with explicit model control only")
	case len(cfg.Startup) > 1 && slices.Contains(cfg.Startup, "*"):
		return nil, errors.New(`"*" loads all models at start: no others can be named with it`)
	case cfg.Control == Poll && cfg.Poll <= 0:
		return nil, fmt.Errorf("the folder is to be looked at each %v", cfg.Poll)
	}
	return &Repository{
		cfg:     cfg,
		folder:  f,
		jobs:    make(chan func(context.Context)),
		lost:    make(chan lost, maxLost),
		running: make(chan struct{}),
		ended:   make(chan struct{}),
		slots:   make(chan struct{}, maxLoading),
		models:  make(map[string]*model),
	}, nil
}

// Run loads what is to be loaded at start and follows the folder and the
// callers until ctx is done. It then returns nil when all that it started has
// ended; what is loaded stays loaded. It may be called once.
func (r *Repository) Run(ctx context.Context) error {
	defer close(r.ended)
	var err error
	if r.staging, err = newStaging(r.cfg.Staging); err != nil {
		return err
	}
	defer r.staging.close()
	var wg sync.WaitGroup
	defer wg.Wait()
	if err := r.begin(ctx, &wg); err != nil {
		return err
	}
	close(r.running)
	var ticks <-chan time.Time
	if r.cfg.Control == Poll {
		ticker := time.NewTicker(r.cfg.Poll)
		defer ticker.Stop()
		ticks = ticker.C
	}
	looked := make(chan struct{}, 1)
	looking := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case job := <-r.jobs:
			wg.Go(func() { job(ctx) })
		case l := <-r.lost:
			wg.Go(func() { r.revive(ctx, l) })
		case <-looked:
			looking = false
		case <-ticks:
			if !looking {
				looking = true
				wg.Go(func() { r.look(ctx, &wg); looked <- struct{}{} })
			}
		}
	}
}

// begin starts the initial loads.
func (r *Repository) begin(ctx context.Context, wg *sync.WaitGroup) error {
	names := r.cfg.Startup
	if r.cfg.Control != Explicit || slices.Contains(names, "*") {
		var bad []string
		var err error
		if names, bad, err = r.folder.names(); err != nil {
			return err
		}
		for _, name := range bad {
			r.cfg.Log.Warn("folder left alone: its name is not one of a model", "folder", name)
		}
	}
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, name := range names {
		m := r.model(name)
		m.wanted, m.busy = true, true
		wg.Go(func() { r.insist(ctx, m) })
	}
	r.begun = true
	return nil
}

// model gives the model of this name. The caller holds r.mu.
func (r *Repository) model(name string) *model {
	m := r.models[name]
	if m == nil {
		m = &model{name: name, turn: make(chan struct{}, 1), versions: make(map[int64]*version)}
		r.models[name] = m
	}
	return m
}

// look compares the folder with what is loaded, and has the difference loaded
// and unloaded.
func (r *Repository) look(ctx context.Context, wg *sync.WaitGroup) {
	names, _, err := r.folder.names()
	if err != nil {
		r.cfg.Log.Warn("the model repository cannot be read; what is loaded stays", "error", err)
		return
	}
	var there []*model
	r.mu.Lock()
	for _, name := range names {
		m := r.model(name)
		m.wanted = true
		if !m.busy {
			there = append(there, m)
		}
	}
	for name, m := range r.models {
		if m.busy || slices.Contains(names, name) {
			continue
		}
		m.wanted, m.busy = false, true
		m.calls++
		wg.Go(func() {
			if err := r.unload(ctx, ctx, m); err != nil && ctx.Err() == nil {
				r.cfg.Log.Error("model cannot be unloaded", "model", m.name, "error", err)
			}
			r.idle(m)
			r.release(m)
		})
	}
	r.mu.Unlock()
	for _, m := range there {
		key := r.folder.plan(m.name, nil).key()
		r.mu.Lock()
		changed := m.tried != key
		m.busy = changed
		r.mu.Unlock()
		if changed {
			wg.Go(func() { r.insist(ctx, m) })
		}
	}
}

func (r *Repository) idle(m *model) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.busy = false
}

// Lost says that a loaded version cannot run any more, and why. It is loaded
// again, if it can be, unless another of its name has taken its place.
func (r *Repository) Lost(id engine.VersionID, reason error) {
	select {
	case r.lost <- lost{id, reason}:
	case <-r.ended:
	}
}

// Ready says what of that which should be served is not: the models of the
// folder or, with Explicit, those loaded at start, and those that callers have
// loaded and not unloaded. A model of which an older version serves is ready.
func (r *Repository) Ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.begun {
		return errors.New("the model repository has not been read")
	}
	var missing []string
	for _, name := range slices.Sorted(maps.Keys(r.models)) {
		m := r.models[name]
		if m.wanted && m.serves == 0 {
			missing = append(missing, fmt.Sprintf("model %s: %s", name, m.why()))
		}
	}
	if len(missing) > maxNamed {
		missing = append(missing[:maxNamed], fmt.Sprintf("and %d more", len(missing)-maxNamed))
	}
	if len(missing) > 0 {
		return errors.New(strings.Join(missing, "; "))
	}
	return nil
}

var errStopped = oip.Errorf(oip.Unavailable, "the model repository has stopped")

// admit checks and bounds the calls; each that it admits must leave.
func (r *Repository) admit(ctx context.Context, what, name string) error {
	if r.cfg.Control != Explicit {
		return oip.Errorf(oip.Forbidden, "%s model %q: explicit model load / unload is not allowed without --model-control explicit", what, name)
	}
	if err := checkName(name); err != nil {
		return oip.Errorf(oip.InvalidArgument, "%s model: %w", what, err)
	}
	select {
	case <-r.running:
	case <-r.ended:
		return errStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if r.pending.Add(1) > maxPending {
		r.leave()
		return &oip.Error{Code: oip.Unavailable, Err: fmt.Errorf("%s model %q: %d loads and unloads are at work", what, name, maxPending), RetryAfter: firstRetry}
	}
	return nil
}

func (r *Repository) leave() { r.pending.Add(-1) }

// call has Run carry out an admitted call's work, and waits for it. Where it
// does not come to that, it calls dropped. Work that has begun goes on when
// ctx ends, under the context of Run; it may wait for its turn under ctx.
func (r *Repository) call(ctx context.Context, name string, work func(run context.Context, m *model) error, dropped func()) error {
	r.mu.Lock()
	m := r.model(name)
	m.calls++
	r.mu.Unlock()
	done := make(chan error, 1)
	job := func(run context.Context) {
		err := work(run, m)
		r.release(m)
		r.leave()
		done <- err
	}
	err := errStopped
	select {
	case r.jobs <- job:
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case <-r.ended:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	dropped()
	r.release(m)
	r.leave()
	return err
}

// release ends the use of a model by a call, and forgets one that is neither
// loaded nor in the folder.
func (r *Repository) release(m *model) {
	there := r.folder.has(m.name)
	r.mu.Lock()
	defer r.mu.Unlock()
	m.calls--
	if m.calls == 0 && !there && !m.wanted && !m.holds() {
		delete(r.models, m.name)
	}
}

// Load loads a model as the folder or o has it now, or does nothing where that
// is what is loaded. A load that fails leaves what was loaded as it was. It is
// refused as Forbidden unless control is Explicit.
func (r *Repository) Load(ctx context.Context, name string, o oip.Override) error {
	if err := r.admit(ctx, "load", name); err != nil {
		return err
	}
	over, err := r.staging.override(o) // while the memory of o is there
	if err != nil {
		r.leave()
		return classify(fmt.Errorf("load model %q: %w", name, err))
	}
	return r.call(ctx, name, func(run context.Context, m *model) error {
		if err := r.load(run, ctx, m, over); err != nil {
			return classify(fmt.Errorf("load model %q: %w", name, err))
		}
		return nil
	}, over.discard)
}

// Unload unloads a model when the requests that it was given have been
// answered. One that is not loaded stays so. It is refused as Forbidden unless
// control is Explicit.
func (r *Repository) Unload(ctx context.Context, name string) error {
	if err := r.admit(ctx, "unload", name); err != nil {
		return err
	}
	return r.call(ctx, name, func(run context.Context, m *model) error {
		if err := r.unload(run, ctx, m); err != nil {
			return classify(fmt.Errorf("unload model %q: %w", name, err))
		}
		return nil
	}, func() {})
}

// classify gives an error the code that callers get.
func classify(err error) error {
	code := oip.InvalidArgument // of what was to be loaded
	switch {
	case oip.CodeOf(err) != oip.Internal:
		code = oip.CodeOf(err)
	case errors.Is(err, errNoModel):
		code = oip.NotFound
	case passing(err), errors.Is(err, engine.ErrStopped):
		return &oip.Error{Code: oip.Unavailable, Err: err, RetryAfter: firstRetry}
	case errors.Is(err, errDisk):
		code = oip.Internal
	}
	return oip.Errorf(code, "%w", err)
}

// passing says whether an error of loading is not the model's own.
func passing(err error) bool {
	return errors.Is(err, engine.ErrUnavailable) || errors.Is(err, engine.ErrDraining) || errors.Is(err, engine.ErrOutOfMemory)
}
