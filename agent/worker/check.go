package worker

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
)

// CheckLimit is how long Check and Probe may take where their context does
// not end before. It also bounds how long a new child may take to open the
// runtime, and to activate a version again.
const CheckLimit = 2 * time.Minute

// Runtime describes the runtime that the child has opened.
type Runtime struct {
	Version   string
	Providers []string // that the library was built with
}

// open has the child open the runtime.
func (p *process) open(ctx context.Context, cfg *Config) error {
	ctx, cancel := context.WithTimeout(ctx, CheckLimit)
	defer cancel()
	m, err := p.call(ctx, engine.VersionID{}, &message{
		kind: kindInit, strings: []string{cfg.RuntimeLib}, number: uint64(max(cfg.Threads, 0)),
	})
	if err != nil {
		return err
	}
	if len(m.strings) == 0 {
		return fmt.Errorf("%w: the runtime has no version", errMalformed)
	}
	p.runtime = Runtime{m.strings[0], m.strings[1:]}
	return nil
}

// load has the child open a version as the kindActivate question says, and
// gives what it is like and by how many bytes the child has grown.
func (p *process) load(ctx context.Context, id engine.VersionID, question *message) (info engine.Info, grown int64, err error) {
	m, err := p.call(ctx, id, question)
	if err != nil {
		return engine.Info{}, 0, err
	}
	info = engine.Info{Inputs: m.inputs, Outputs: m.outputs, Batch: m.batch, LoadTime: time.Duration(m.number)}
	return info, int64(min(m.memory, math.MaxInt64)), nil
}

// once gives what f gives for a short-lived child of its own.
func once[T any](ctx context.Context, cfg Config, f func(context.Context, *process) (T, error)) (result T, err error) {
	// A child dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithTimeoutCause(ctx, CheckLimit, fmt.Errorf("not done within %v: %w", CheckLimit, context.DeadlineExceeded))
	defer cancel()
	cfg = cfg.withDefaults()
	p, err := startProcess(&cfg, nil)
	if err != nil {
		return result, err
	}
	defer p.stop()
	// A child that hangs does not hear of the end of ctx.
	defer context.AfterFunc(ctx, func() { p.kill(verdictStopped) })()
	if err = p.open(ctx, &cfg); err == nil {
		result, err = f(ctx, p)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return result, err
}

// Check loads a version in a short-lived child and gives what it takes and
// gives. A version that kills its loader gives a DeathError, one that hangs
// it an error of ctx or of CheckLimit. engine.ErrUnavailable says that it did
// not come to loading.
func Check(ctx context.Context, cfg Config, s engine.Spec) (engine.Info, error) {
	began := false
	info, err := once(ctx, cfg, func(ctx context.Context, p *process) (engine.Info, error) {
		began = true
		info, _, err := p.load(ctx, s.ID, &message{kind: kindActivate, session: 1, strings: []string{s.Dir, s.Entry}})
		return info, err
	})
	if err != nil {
		if !began && ctx.Err() == nil {
			err = unavailable(err)
		}
		return engine.Info{}, fmt.Errorf("check %s: %w", s.ID, err)
	}
	return info, nil
}

// Probe opens the runtime in a short-lived child and describes it.
func Probe(ctx context.Context, cfg Config) (Runtime, error) {
	r, err := once(ctx, cfg, func(_ context.Context, p *process) (Runtime, error) { return p.runtime, nil })
	if death, died := errors.AsType[*DeathError](err); died {
		err = fmt.Errorf("open ONNX Runtime %s: %w", cfg.RuntimeLib, death)
	}
	return r, err
}
