package engine

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/agent/datadrift"
)

// What answers requests shows a version's watch what they were, and what became
// of them; a version in the place of another begins anew.
func TestData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		e := New(Config{Runtime: echo{given: new(atomic.Int64), back: new(atomic.Int64)}, Data: func(s Spec, info *Info) *datadrift.Watch {
			asked++
			if s.ID.Model != one.Model || info.Options.MaxBatchSize != oneByOne.MaxBatchSize {
				t.Errorf("a watch for %+v with %+v", s, info.Options)
			}
			return datadrift.New(info.Inputs, info.Outputs, info.Options.MaxBatchSize > 0)
		}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx) }()
		spec := Spec{ID: one, Dir: "/models", Entry: "m.onnx", Options: oneByOne}
		if info, err := e.Load(ctx, spec); err != nil || info.data != nil {
			t.Fatal(info, err)
		}
		ask := func(b byte) {
			time.Sleep(time.Minute)
			q := marked(b)
			q[1].Data[3] = b // of a little-endian number
			res, err := e.Infer(ctx, one, Request{Inputs: q})
			if err != nil {
				t.Fatal(err)
			}
			res.Release()
			synctest.Wait()
		}
		for n := range 1700 { // more than a day
			ask(byte(n % 4))
		}
		if f := e.Versions()[0].Data; f.Looks == 0 || f.Drifted {
			t.Errorf("after a day: %+v", f)
		}
		for range 300 {
			ask(0x42)
		}
		if f := e.Versions()[0].Data; !f.Drifted || f.Worst.Tensor != "x" {
			t.Errorf("of other requests: %+v", f)
		}
		if _, err := e.Replace(ctx, spec); err != nil {
			t.Fatal(err)
		}
		if f := e.Versions()[0].Data; f != (datadrift.Finding{}) || asked != 2 {
			t.Errorf("after it was replaced: %+v", f)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
