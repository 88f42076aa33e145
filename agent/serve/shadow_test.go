package serve

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func floats(name string, shape []int64, values ...float32) tensor.Tensor {
	t := tensor.Tensor{Name: name, Type: tensor.Float32, Shape: shape}
	for _, v := range values {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(v))
	}
	return t
}

func TestCompare(t *testing.T) {
	row, rows := []int64{3}, []int64{2, 2}
	nan := float32(math.NaN())
	bytesOf := func(name string, b ...byte) tensor.Tensor {
		return tensor.Tensor{Name: name, Type: tensor.Uint8, Shape: []int64{int64(len(b))}, Data: b}
	}
	for _, tt := range []struct {
		name        string
		a, b        []tensor.Tensor
		same, agree bool
		distance    float64
	}{
		{"equal", []tensor.Tensor{floats("y", row, 1, 2, 3)}, []tensor.Tensor{floats("y", row, 1, 2, 3)}, true, true, 0},
		{"same place", []tensor.Tensor{floats("y", row, 1, 2, 3)}, []tensor.Tensor{floats("y", row, 1, 0.5, 9)}, true, true, 6},
		{"another place", []tensor.Tensor{floats("y", row, 1, 2, 3)}, []tensor.Tensor{floats("y", row, 4, 2, 3)}, true, false, 3},
		{"another place in one row", []tensor.Tensor{floats("y", rows, 1, 2, 1, 2)}, []tensor.Tensor{floats("y", rows, 1, 2, 3, 2)}, true, false, 2},
		{"not a number", []tensor.Tensor{floats("y", row, 1, 2, 3)}, []tensor.Tensor{floats("y", row, nan, 2, 3)}, true, true, math.Inf(1)},
		{"neither is a number", []tensor.Tensor{floats("y", row, nan, 2, 3)}, []tensor.Tensor{floats("y", row, nan, 2, 4)}, true, true, 1},
		{"integers", []tensor.Tensor{bytesOf("y", 1, 2)}, []tensor.Tensor{bytesOf("y", 1, 4)}, true, false, 2},
		{"the first of floats decides", []tensor.Tensor{bytesOf("n", 1), floats("y", row, 1, 2, 3), floats("z", row, 1, 2, 3)},
			[]tensor.Tensor{floats("z", row, 3, 2, 1), floats("y", row, 1, 2, 3), bytesOf("n", 2), bytesOf("more", 1)}, true, true, 2},
		{"another shape", []tensor.Tensor{floats("y", row, 1, 2, 3)}, []tensor.Tensor{floats("y", rows, 1, 2, 3, 4)}, false, false, 0},
		{"another name", []tensor.Tensor{bytesOf("y", 1)}, []tensor.Tensor{bytesOf("x", 1)}, false, false, 0},
		{"empty", []tensor.Tensor{floats("y", []int64{0, 3})}, []tensor.Tensor{floats("y", []int64{0, 3})}, true, true, 0},
		{"nothing", nil, nil, false, true, 0},
	} {
		if same, agree, distance := compare(tt.a, tt.b); same != tt.same || agree != tt.agree || distance != tt.distance {
			t.Errorf("%s: %v, %v, %v; want %v, %v, %v", tt.name, same, agree, distance, tt.same, tt.agree, tt.distance)
		}
	}
}

// shadowed gives a server whose route sends a share of its requests to m:1 once
// more to m:2.
func shadowed(e Engine, rate float64) *Server {
	s := New(e, nil)
	s.SetServing(map[string]int64{"m": 1})
	live := r("live", "m")
	live.Shadow = &dunlinv1.RouteShadow{Model: "m", Version: 2, Rate: rate}
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
	return s
}

func shadowOf(s *Server) ShadowFigures { return *s.Rules()[0].Shadow }

// startShadow runs what is mirrored until the test ends.
func startShadow(t *testing.T, s *Server) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Shadow(ctx); err != nil {
			t.Error(err)
		}
	})
	return func() { cancel(); wg.Wait() }
}

// A mirrored request has its own inputs and outputs, runs after its answer has
// been sent, and is compared with it.
func TestShadow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := engine.New(engine.Config{Runtime: adder{}})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Run(ctx) })
		defer wg.Wait()
		defer cancel()
		load(t, e, "m", 1)
		load(t, e, "m", 2)
		s := shadowed(e, 1)
		defer startShadow(t, s)()
		for i, size := range []int{1, 2 * copyBeside} {
			q := request("live", 0)
			q.Inputs[0].Shape[0], q.Inputs[0].Data = int64(size), make([]byte, size)
			a, err := s.Infer(t.Context(), q)
			if err != nil || a.Version != 1 {
				t.Fatalf("%+v, %v", a, err)
			}
			synctest.Wait()
			if f := shadowOf(s); f.Compared != uint64(i) {
				t.Errorf("before the answer is sent: %+v", f)
			}
			for k := range q.Inputs[0].Data {
				q.Inputs[0].Data[k] = 100
			}
			a.Release()
			for k := range a.Outputs[0].Data {
				a.Outputs[0].Data[k] = 100
			}
			synctest.Wait()
			want := ShadowFigures{Target: shadowOf(s).Target, Compared: uint64(i + 1), Distance: 1}
			f := shadowOf(s)
			f.AnswerRun, f.ShadowRun = 0, 0
			if f != want {
				t.Errorf("%+v, want %+v", f, want)
			}
		}
		// What the shadow itself answers is not compared; what has no room, shed.
		s.SetServing(map[string]int64{"m": 2})
		if a, err := s.Infer(t.Context(), request("live", 0)); err != nil || a.Version != 2 {
			t.Errorf("%+v, %v", a, err)
		}
		s.SetServing(map[string]int64{"m": 1})
		q := request("live", 0)
		q.Inputs[0].Shape[0], q.Inputs[0].Data = maxMirroredBytes, make([]byte, maxMirroredBytes)
		for _, want := range []uint64{1, 2} { // for its outputs, for its inputs
			a, err := s.Infer(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			a.Release()
			synctest.Wait()
			if f := shadowOf(s); f.Shed != want {
				t.Errorf("%+v", f)
			}
			q.Inputs[0].Shape[0]++
			q.Inputs[0].Data = append(q.Inputs[0].Data, 0)
		}
		if n, b := s.mirror.held.Load(), s.mirror.bytes.Load(); n != 0 || b != 0 {
			t.Errorf("%d requests of %d bytes are held", n, b)
		}
	})
}

// Whoever comes ends what a shadow runs, and nothing is mirrored meanwhile.
func TestShadowGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended []error
		e := &busy{infer: func(ctx context.Context, id engine.VersionID, q engine.Request) error {
			if !q.Resident {
				return nil
			}
			select {
			case <-ctx.Done():
				ended = append(ended, ctx.Err())
				return ctx.Err()
			case <-time.After(time.Second):
				return nil
			}
		}}
		s := shadowed(e, 1)
		ask := func() {
			a, err := s.Infer(t.Context(), request("live", 0))
			if err != nil {
				t.Fatal(err)
			}
			a.Release()
			synctest.Wait()
		}
		for range maxMirrored + 3 { // nobody runs them
			ask()
		}
		if f := shadowOf(s); f.Shed != 3 || s.mirror.held.Load() != maxMirrored {
			t.Errorf("%+v, %d are held", f, s.mirror.held.Load())
		}
		stop := startShadow(t, s)
		synctest.Wait()
		began := time.Now()
		ask()
		if f := shadowOf(s); time.Since(began) > 0 || len(ended) != 1 || f.Shed != 5 {
			t.Errorf("after %v, %v ended, %+v", time.Since(began), ended, f)
		}
		time.Sleep(time.Minute)
		// The outputs are empty, so that there is nothing to compare.
		if f := shadowOf(s); f.Incomparable != maxMirrored-1 || s.mirror.held.Load() != 0 {
			t.Errorf("%+v, %d are held", f, s.mirror.held.Load())
		}
		stop()
	})
}

// Random loads, and a shadow that fails, is slow or has its weights out: each
// answer is what it is without a shadow, at the same moment; each request that
// was to be mirrored is counted once, and nothing stays behind.
func TestRandomShadows(t *testing.T) {
	whys := []error{engine.ErrNotResident, engine.ErrNotLoaded, &engine.RefusedError{Err: engine.ErrOverloaded}, errors.New("broken")}
	type result struct {
		version int64
		err     error
		at      time.Duration
	}
	run := func(t *testing.T, seed uint64, requests int, rate float64) (results []result) {
		broken := errors.New("the answer is broken")
		e := &busy{infer: func(ctx context.Context, id engine.VersionID, q engine.Request) error {
			chance := rand.New(rand.NewPCG(seed, uint64(q.Inputs[0].Shape[0])))
			takes := time.Duration(1+chance.IntN(20)) * time.Millisecond
			select {
			case <-time.After(takes):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			switch {
			case id.Version == 2 && chance.IntN(2) == 0:
				return whys[chance.IntN(len(whys))]
			case id.Version == 1 && chance.IntN(5) == 0:
				return broken
			}
			return nil
		}}
		s := shadowed(e, max(rate, 0.01))
		if rate == 0 {
			s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("live", "m")}, nil)
		}
		stop := startShadow(t, s)
		results = make([]result, requests)
		began := time.Now()
		var wg sync.WaitGroup
		for i := range requests {
			wg.Go(func() {
				time.Sleep(time.Duration(rand.New(rand.NewPCG(seed, uint64(i))).IntN(20*requests)) * time.Millisecond)
				q := request("live", 0)
				q.Inputs[0].Shape[0] = int64(i)
				a, err := s.Infer(context.Background(), q)
				results[i] = result{a.Version, err, time.Since(began)}
				if err == nil {
					a.Release()
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Minute)
		stop()
		if rate > 0 {
			answered := uint64(0)
			for _, r := range results {
				if r.err == nil {
					answered++
				}
			}
			f := shadowOf(s)
			if n := f.Compared + f.Incomparable + f.Failed + f.Shed; rate == 1 && n < answered || n > uint64(requests) || s.mirror.held.Load() != 0 || s.mirror.bytes.Load() != 0 {
				t.Errorf("of %d answered %+v; %d requests are held, %d bytes", answered, f, s.mirror.held.Load(), s.mirror.bytes.Load())
			}
		}
		for i := range results {
			if results[i].err != nil {
				results[i].err = nil
				results[i].version = -1
			}
		}
		return results
	}
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		requests := rapid.IntRange(1, 40).Draw(rt, "requests")
		rate := rapid.SampledFrom([]float64{0.1, 0.5, 1}).Draw(rt, "rate")
		var without, with []result
		synctest.Test(t, func(t *testing.T) { without = run(t, seed, requests, 0) })
		synctest.Test(t, func(t *testing.T) { with = run(t, seed, requests, rate) })
		for i := range with {
			if with[i] != without[i] {
				rt.Fatalf("request %d: %+v with a shadow, %+v without", i, with[i], without[i])
			}
		}
	})
}
