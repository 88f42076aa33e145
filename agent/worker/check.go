package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// CheckLimit is how long Check and Probe may take where their context does
// not end before. It also bounds how long a new child may take to open the
// runtime, and to activate a version again.
const CheckLimit = 2 * time.Minute

// Runtime describes the runtime that the child has opened.
type Runtime struct {
	Version   string
	Providers []string // that the library was built with
	Sandbox   Sandbox  // that the child is in
	// Pooling says whether sessions stay while their weights are out, as
	// Config.Pools asks, and PoolBytes how much of the device's memory was free
	// for them when the child began.
	Pooling   ort.Pooling
	PoolBytes int64
}

// open has the child open the runtime.
func (p *process) open(ctx context.Context, cfg *Config) error {
	ctx, cancel := context.WithTimeout(ctx, CheckLimit)
	defer cancel()
	question := &message{kind: kindInit, strings: []string{cfg.RuntimeLib}, number: uint64(max(cfg.Threads, 0))}
	if cfg.Pools != "" {
		text, err := json.Marshal(poolSettings{Device: cfg.Pools, Bytes: cfg.PoolBytes, Pinned: cfg.PinnedBytes, Options: cfg.ProviderOptions})
		if err != nil {
			return err
		}
		question.strings = append(question.strings, string(text))
	}
	m, err := p.call(ctx, engine.VersionID{}, question)
	if err != nil {
		return err
	}
	if len(m.strings) < len(question.strings) {
		return fmt.Errorf("%w: the runtime is described by %d strings", errMalformed, len(m.strings))
	}
	p.runtime = Runtime{Version: m.strings[0], Providers: m.strings[len(question.strings):], Sandbox: sandboxOf(m.number)}
	if cfg.Pools != "" {
		var found poolsFound
		if err := json.Unmarshal([]byte(m.strings[1]), &found); err != nil {
			return fmt.Errorf("%w: pools: %w", errMalformed, err)
		}
		p.runtime.Pooling, p.runtime.PoolBytes = found.Pooling, found.Bytes
	}
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
	cfg.Pools = "" // they are for the one that serves
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
	cfg.sandbox = cfg.confined(s, "")
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
		return engine.Info{}, fmt.Errorf("check %s: %w", s.ID, classify(err))
	}
	return info, nil
}

// Probe opens the runtime in a short-lived child and describes it, and the
// sandbox that Check, Compile and Probe have for their children.
func Probe(ctx context.Context, cfg Config) (Runtime, error) {
	cfg.sandbox = cfg.confined(engine.Spec{}, "")
	r, err := once(ctx, cfg, func(_ context.Context, p *process) (Runtime, error) { return p.runtime, nil })
	if death, died := errors.AsType[*DeathError](err); died {
		err = fmt.Errorf("open ONNX Runtime %s: %w", cfg.RuntimeLib, death)
	}
	return r, err
}
