package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// ProbePooling finds out in a short-lived child whether the runtime puts
// weights into a pool of device memory. A child that dies of it is a reason
// why not; the error is that of a child that could not ask.
func ProbePooling(ctx context.Context, cfg Config) (ort.Pooling, error) {
	asked := false
	cfg.Pools = "cuda"
	cfg.sandbox = cfg.minimal()
	p, err := once(ctx, cfg, func(ctx context.Context, p *process) (ort.Pooling, error) {
		asked = true
		m, err := p.call(ctx, engine.VersionID{}, &message{kind: kindPooling})
		if err != nil {
			return ort.Pooling{}, err
		}
		if len(m.strings) != 2 {
			return ort.Pooling{}, fmt.Errorf("%w: pooling has %d strings", errMalformed, len(m.strings))
		}
		return ort.Pooling{Works: m.number == 1, Device: m.strings[0], Reason: m.strings[1]}, nil
	})
	if err != nil && asked && ctx.Err() == nil {
		return ort.Pooling{Reason: err.Error()}, nil
	}
	return p, err
}

// pooling answers in the child.
func pooling(ctx context.Context, seq uint64) *message {
	p := ort.ProbePooling(ctx)
	m := &message{kind: kindDone, seq: seq, strings: []string{p.Device, p.Reason[:min(len(p.Reason), maxReason)]}}
	if p.Works {
		m.number = 1
	}
	return m
}

// doubtPools has no further child open pools where one has died of it.
func (w *Worker) doubtPools(p *process, err error) {
	if _, died := errors.AsType[*DeathError](err); !died || p.weak {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noPools = err.Error()
}

// sayPools logs that sessions do not stay while their weights are out, where
// they should, once for each reason.
func (w *Worker) sayPools(found ort.Pooling) {
	w.mu.Lock()
	said := w.said == found.Reason
	w.said = found.Reason
	w.mu.Unlock()
	if !said && found.Reason != "" {
		w.cfg.Log.Warn("weights do not leave and come back in place; models are opened anew from compiled files", "pools", w.cfg.Pools, "reason", found.Reason)
	}
}

// fill has the child open a version's model as a session with its weights in
// a pool, and gives what it takes.
func (p *process) fill(ctx context.Context, v *version, s *session) (need engine.Need, err error) {
	quiet := p.quiet()
	m, err := p.call(ctx, v.spec.ID, &message{
		kind: kindActivate, session: s.number, number: inPool, memory: uint64(poolFactor*v.files + poolRoom),
		strings: []string{v.spec.Dir, v.spec.Entry},
	})
	if err != nil {
		return need, err
	}
	var h holding
	if len(m.strings) == 1 {
		err = json.Unmarshal([]byte(m.strings[0]), &h)
	}
	if err != nil || len(m.strings) != 1 || min(h.Weights, h.Session, h.Image) < 0 {
		return need, p.fail(fmt.Errorf("%w: a session in a pool is described by %q", errMalformed, m.strings))
	}
	host := v.image.Info.Need.Session
	if quiet && p.quiet() {
		host = int64(min(m.memory, math.MaxInt64/2))
	}
	s.pooled = true
	s.host = host + min(h.Image, math.MaxInt64/2)
	s.need = engine.Need{Weights: h.Weights, Session: h.Session, Workspace: v.info.Need.Workspace, Measured: true}
	return s.need, nil
}

// comeIn brings a version's weights in: back into the pool of its session
// where that has stayed, or with a new one.
func (w *Worker) comeIn(ctx context.Context, u use, set engine.Setting) (*session, engine.Need, error) {
	v, p := u.version, u.process
	w.mu.Lock()
	s := v.warm
	w.mu.Unlock()
	if s == nil {
		return w.open(ctx, u, set)
	}
	_, err := p.call(ctx, v.spec.ID, &message{kind: kindIn, session: s.number})
	if err == nil {
		return s, s.need, nil
	}
	if _, died := errors.AsType[*DeathError](err); died || errors.Is(err, engine.ErrOutOfMemory) {
		return nil, engine.Need{}, err // it is still there for the next time
	}
	if ctx.Err() != nil {
		return nil, engine.Need{}, context.Cause(ctx)
	}
	w.cfg.Log.Warn("weights do not come back in place; the model is opened anew", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "error", err)
	_ = w.drop(u) // what the driver does not take back now is tried again
	return w.open(ctx, u, set)
}

// goOut has the weights of a session leave its pool, which no run can begin
// with any more, when those that go on are over. The session stays, or is
// closed where they do not leave in good order.
func (w *Worker) goOut(u use, s *session) error {
	v, p := u.version, u.process
	if !w.drain(p, s) {
		return nil
	}
	err := p.settle(v, kindOut, s)
	if err == nil {
		// A child that has died meanwhile, or succeeded this one, has nothing
		// of it.
		_ = w.commit(u, func() { w.outs++; v.warm, v.out = s, w.outs })
		return nil
	}
	w.cfg.Log.Warn("weights do not leave in good order; the session is closed", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "error", err)
	return p.closeSession(v, s)
}

// drop closes the session of a version that has stayed without its weights,
// if there is one.
func (w *Worker) drop(u use) error {
	v := u.version
	w.mu.Lock()
	s := v.warm
	if w.current != u.process {
		s = nil // it is gone with its child
	} else {
		v.warm = nil
	}
	w.mu.Unlock()
	if s == nil {
		return nil
	}
	return u.process.closeSession(v, s)
}

// closeSession has the child close a session that nothing runs on.
func (p *process) closeSession(v *version, s *session) error { return p.settle(v, kindDeactivate, s) }

// settle asks what is done whatever becomes of the caller: for the children to
// come it is so already. There is no error where the child dies, which it must
// where it takes longer than CheckLimit.
func (p *process) settle(v *version, k kind, s *session) error {
	ctx, cancel := context.WithTimeout(context.Background(), CheckLimit)
	defer cancel()
	_, err := p.call(ctx, v.spec.ID, &message{kind: k, session: s.number})
	if _, died := errors.AsType[*DeathError](err); died {
		return nil
	}
	return err
}

// cool closes sessions that have stayed without their weights, those first
// that have done so for the longest time, until all in pools have no more on
// the host than Config.WarmBytes.
func (w *Worker) cool(ctx context.Context) {
	for w.cfg.WarmBytes > 0 {
		var oldest *version
		host := int64(0)
		w.mu.Lock()
		for _, v := range w.loaded {
			for _, s := range []*session{v.session, v.warm} {
				if s != nil && s.pooled {
					host += s.host
				}
			}
			// One that changes is about to come in, or to be closed.
			if v.warm != nil && len(v.lane) == 0 && (oldest == nil || v.out < oldest.out) {
				oldest = v
			}
		}
		w.mu.Unlock()
		if host <= w.cfg.WarmBytes || oldest == nil {
			return
		}
		err := w.change(ctx, oldest.spec.ID, w.drop)
		if err != nil && !errors.Is(err, engine.ErrNotLoaded) {
			w.cfg.Log.Debug("session is not closed", "model", oldest.spec.ID.Model, "version", oldest.spec.ID.Version, "error", err)
			return
		}
	}
}
