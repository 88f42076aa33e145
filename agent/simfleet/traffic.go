package simfleet

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// maxAsked bounds the requests of a device that wait for their answer; what is
// due beyond that is left out.
const maxAsked = 16

// traffic asks a device for an inference now and then, of each model that it
// serves, as somebody would who is connected to it.
func (d *Device) traffic(ctx context.Context, a *agent) {
	random := rand.New(rand.NewPCG(d.seed, 1))
	var wg sync.WaitGroup
	defer wg.Wait()
	room := make(chan struct{}, maxAsked)
	for {
		wait := time.Duration(random.ExpFloat64() / d.fleet.cfg.RequestsPerSecond * float64(time.Second))
		if sleep(ctx, wait) != nil {
			return
		}
		for _, v := range a.follow.Reconcile.Report().GetVersions() {
			if !v.Serving {
				continue
			}
			select {
			case room <- struct{}{}:
			default:
				continue
			}
			model := v.Model
			wg.Go(func() {
				defer func() { <-room }()
				d.ask(ctx, a, model)
			})
		}
	}
}

// ask asks for one inference on zeros, and counts how it ended.
func (d *Device) ask(ctx context.Context, a *agent, model string) {
	m, err := a.front.Model(ctx, model, 0)
	if err == nil && m.NotReady == "" {
		call := oip.Call{Model: model}
		for i := range m.Inputs {
			t := tensor.Tensor{Name: m.Inputs[i].Name, Type: m.Inputs[i].Type}
			for _, n := range m.Inputs[i].Shape {
				t.Shape = append(t.Shape, max(n, 1))
			}
			size, err := tensor.Bytes(t.Type, t.Shape)
			if err != nil || size > maxInput {
				return
			}
			t.Data = make([]byte, size)
			call.Inputs = append(call.Inputs, t)
		}
		var answer oip.Answer
		if answer, err = a.front.Infer(ctx, call); err == nil {
			if answer.Release != nil {
				answer.Release()
			}
			d.answered.Add(1)
			return
		}
	}
	if oip.CodeOf(err) == oip.NotFound { // it is not wanted any more
		return
	}
	if ctx.Err() == nil {
		d.failed.Add(1)
		if d.fleet.cfg.Agents != nil {
			d.fleet.cfg.Agents.Warn("a request failed", "device", d.Name, "model", model, "error", err, "not_ready", m.NotReady)
		}
	}
}

// maxInput bounds an input that is made up; models with larger ones are not
// asked.
const maxInput = 16 << 20

// Requests counts those that were answered, and those that failed, on all runs
// of the device's agent.
func (d *Device) Requests() (answered, failed uint64) { return d.answered.Load(), d.failed.Load() }
