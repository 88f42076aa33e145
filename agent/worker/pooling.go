package worker

import (
	"context"
	"fmt"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// ProbePooling finds out in a short-lived child whether the runtime puts
// weights into a pool of device memory. A child that dies of it is a reason
// why not; the error is that of a child that could not ask.
func ProbePooling(ctx context.Context, cfg Config) (ort.Pooling, error) {
	asked := false
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
