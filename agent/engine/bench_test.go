package engine

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// instant is a Runtime that takes no time.
type instant struct {
	still
	outputs [][]tensor.Tensor
}

func (instant) Load(context.Context, Spec) (Info, error) { return digits, nil }
func (i instant) Run(_ context.Context, _ VersionID, requests [][]tensor.Tensor, _ []string) (Outcome, error) {
	return Outcome{Outputs: i.outputs[:len(requests)]}, nil
}
func (instant) Unload(context.Context, VersionID) error { return nil }

func benchmark(b *testing.B, o *serving.Options, f func(e *Engine, in []tensor.Tensor)) {
	e := New(Config{Runtime: instant{outputs: make([][]tensor.Tensor, serving.DefaultBatchSize)}})
	ctx, stop := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	wg.Go(func() { e.Run(ctx) })
	defer wg.Wait()
	defer stop()
	if _, err := e.Load(b.Context(), Spec{ID: one, Options: o}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	f(e, request1())
}

func inferLoop(b *testing.B, e *Engine, in []tensor.Tensor, timeout time.Duration) {
	for b.Loop() {
		ctx, cancel := b.Context(), context.CancelFunc(func() {})
		if timeout > 0 {
			ctx, cancel = context.WithTimeout(ctx, timeout)
		}
		res, err := e.Infer(ctx, one, Request{Inputs: in})
		if err != nil {
			b.Fatal(err)
		}
		res.Release()
		cancel()
	}
}

// BenchmarkInferIdle measures what the engine adds to a request on an idle
// version.
func BenchmarkInferIdle(b *testing.B) {
	benchmark(b, nil, func(e *Engine, in []tensor.Tensor) { inferLoop(b, e, in, 0) })
}

// BenchmarkInferDeadline is BenchmarkInferIdle with a deadline for each request.
func BenchmarkInferDeadline(b *testing.B) {
	benchmark(b, nil, func(e *Engine, in []tensor.Tensor) { inferLoop(b, e, in, time.Second) })
}

func parallel(b *testing.B, o *serving.Options) {
	benchmark(b, o, func(e *Engine, in []tensor.Tensor) {
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				res, err := e.Infer(b.Context(), one, Request{Inputs: in})
				if err != nil {
					b.Error(err)
					return
				}
				res.Release()
			}
		})
	})
}

// BenchmarkInfer8 has eight goroutines for each processor infer.
func BenchmarkInfer8(b *testing.B) {
	b.Run("alone", func(b *testing.B) { parallel(b, nil) })
	b.Run("batched", func(b *testing.B) { o := serving.Automatic(true); parallel(b, &o) })
}
