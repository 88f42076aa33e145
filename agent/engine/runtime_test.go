package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// still is that part of a Runtime whose weights come and go at once.
type still struct{}

func (still) Activate(context.Context, VersionID, Setting) (Need, error) { return Need{}, nil }
func (still) Set(context.Context, VersionID, Setting) error              { return nil }
func (still) Deactivate(context.Context, VersionID) error                { return nil }

// runtime is a Runtime that takes a second for everything, and gives back what
// it got as output "y", and its first byte as output "z".
type runtime struct {
	still
	loads, unloads atomic.Int64
	failure        error // of Run
	lost           bool  // it does not have what it is to unload
	keeps          error // of Unload
	noRows         bool  // its outputs cannot be told apart
	batch          bool  // what it says of the graph

	mu      sync.Mutex
	ids     []VersionID // that are loaded
	runs    [][]string  // outputs that each run was asked for
	sizes   []int       // requests in each run
	given   int         // outcomes
	back    int         // outcomes that were released
	aborted int         // runs whose context was cancelled
}

var digits = Info{
	Inputs: []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 2}}, {Name: "any", Type: tensor.String}},
	Outputs: []tensor.Info{
		{Name: "y", Type: tensor.Float32, Shape: []int64{-1, 2}}, {Name: "z", Type: tensor.Uint8, Shape: []int64{-1}},
	},
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(time.Second):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (r *runtime) Load(ctx context.Context, s Spec) (Info, error) {
	if s.Entry == "bad" {
		return Info{}, errors.New("bad model")
	}
	r.loads.Add(1)
	info := digits
	info.Batch = r.batch
	if err := pause(ctx); err != nil {
		return Info{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ids = append(r.ids, s.ID)
	return info, nil
}

// held gives the ids of what is loaded.
func (r *runtime) held() []VersionID {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.ids)
}

var errInput = errors.New("the runtime refuses this input")

func (r *runtime) Run(ctx context.Context, id VersionID, requests [][]tensor.Tensor, outputs []string) (Outcome, error) {
	if !slices.Contains(r.held(), id) {
		return Outcome{}, ErrNotLoaded
	}
	r.mu.Lock()
	r.runs = append(r.runs, outputs)
	r.sizes = append(r.sizes, len(requests))
	r.mu.Unlock()
	if r.failure != nil {
		return Outcome{}, r.failure
	}
	if r.noRows && len(requests) > 1 {
		return Outcome{}, fmt.Errorf("reshape: %w", ErrRows)
	}
	if outputs == nil {
		outputs = []string{"y", "z"}
	}
	out := Outcome{Input: time.Millisecond, Infer: time.Second, Output: time.Microsecond}
	for _, q := range requests {
		if q[0].Name != "x" {
			return Outcome{}, fmt.Errorf("the first input is %q", q[0].Name)
		}
		if q[0].Data[0] == 0xff {
			return Outcome{}, errInput
		}
		var given []tensor.Tensor
		for _, name := range outputs {
			switch name {
			case "y":
				given = append(given, tensor.Tensor{Name: "y", Data: q[0].Data})
			case "z":
				given = append(given, tensor.Tensor{Name: "z", Data: q[0].Data[:1]})
			}
		}
		out.Outputs = append(out.Outputs, given)
	}
	if err := pause(ctx); err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.aborted++
		return Outcome{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.given++
	out.Release = func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.back++
	}
	return out, nil
}

func (r *runtime) Unload(ctx context.Context, id VersionID) error {
	r.unloads.Add(1)
	if r.lost {
		return ErrNotLoaded
	}
	if err := cmp.Or(pause(ctx), r.keeps); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ids = slices.DeleteFunc(r.ids, func(held VersionID) bool { return held == id })
	return nil
}

func request1() []tensor.Tensor {
	return []tensor.Tensor{
		{Name: "any", Type: tensor.String, Shape: []int64{3, 1}, Data: slices.Repeat(tensor.AppendString(nil, []byte("s")), 3)},
		{Name: "x", Type: tensor.Float32, Shape: []int64{3, 2}, Data: make([]byte, 24)},
	}
}

// marked is request1 of one row whose first byte is b.
func marked(b byte) []tensor.Tensor {
	return []tensor.Tensor{
		{Name: "any", Type: tensor.String, Shape: []int64{1}, Data: tensor.AppendString(nil, []byte("s"))},
		{Name: "x", Type: tensor.Float32, Shape: []int64{1, 2}, Data: append([]byte{b}, make([]byte, 7)...)},
	}
}

// echo is a Runtime that gives back what it got, at once.
type echo struct {
	still
	given, back *atomic.Int64
}

func (echo) Load(context.Context, Spec) (Info, error) { return digits, nil }
func (echo) Unload(context.Context, VersionID) error  { return nil }
func (e echo) Run(ctx context.Context, _ VersionID, requests [][]tensor.Tensor, _ []string) (Outcome, error) {
	var out Outcome
	for _, q := range requests {
		if q[0].Data[0] == 0xff {
			return Outcome{}, errInput
		}
		out.Outputs = append(out.Outputs, []tensor.Tensor{{Name: "y", Data: q[0].Data}})
	}
	e.given.Add(1)
	out.Release = func() { e.back.Add(1) }
	return out, context.Cause(ctx)
}
