package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

// What is served while another net is profiled.
const (
	// Pauses between an answer and the next request, evenly distributed: the
	// device is idle for long enough to measure, and not for long.
	shortest, longest = 5 * time.Millisecond, 95 * time.Millisecond
	duty              = 0.1 // as agents have it where nobody says
)

// live is a served net.
type live struct {
	engine *engine.Engine
	id     engine.VersionID
	input  []tensor.Tensor
}

// liveImpact gives by how much the p99 of the requests for a served net is
// higher while another net is profiled: blocks of both kinds take turns.
func liveImpact(ctx context.Context, cfg worker.Config, o options) (float64, error) {
	if o.blocks == 0 {
		return 0, nil
	}
	dir, err := os.MkdirTemp("", "dunlin-profile-live-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	cache, err := compiled.Open(filepath.Join(dir, "compiled"), 4<<30)
	if err != nil {
		return 0, err
	}
	serving := cfg
	serving.Folders = []string{dir}
	serving.Compile = worker.Cached(cache, cfg)
	w := worker.New(serving)
	e := engine.New(engine.Config{Runtime: w})
	below, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	all.Go(func() { w.Supervise(below) })
	all.Go(func() { e.Run(below) })
	served, measured := zoo.MobileNet(seed), zoo.ResNet50(seed)
	l, err := load(ctx, e, served, dir)
	if err != nil {
		return 0, err
	}
	s, err := compile(ctx, cfg, measured, dir, o.batch)
	if err != nil {
		return 0, err
	}
	r := rand.New(rand.NewPCG(seed, 0))
	if _, err := l.traffic(ctx, r, o.block); err != nil { // warms up
		return 0, err
	}
	// Profiling goes on all the time, but for the blocks in which another has
	// its turn.
	b := &beside{idle: profile.NewIdle(e, duty)}
	b.turn.Lock()
	during, end := context.WithCancel(ctx)
	defer end()
	failed := make(chan error, 1)
	all.Go(func() { failed <- b.run(during, cfg, s) })
	var times [2][]time.Duration
	for range o.blocks {
		for side := range 2 {
			if side == 1 {
				b.turn.Unlock()
			}
			more, err := l.traffic(ctx, r, o.block)
			if side == 1 {
				b.turn.Lock()
			}
			select {
			case err = <-failed:
			default:
			}
			if err != nil {
				end()
				b.turn.Unlock()
				return 0, err
			}
			times[side] = append(times[side], more...)
		}
	}
	worked, settings := b.idle.Worked(), b.settings
	end()
	b.turn.Unlock()
	if worked <= 0 {
		return 0, errors.New("nothing was measured beside live traffic")
	}
	alone, beside := quantile(times[0], 0.99), quantile(times[1], 0.99)
	fmt.Fprintf(o.out, "live: %s served, %d settings of %s measured in %.1f%% of the time: p50 %.2f and %.2f ms, p99 of %d and %d requests %.2f and %.2f ms\n",
		served.Name, settings, measured.Name, 100*worked.Seconds()/(time.Duration(o.blocks)*o.block).Seconds(),
		ms(quantile(times[0], 0.5)), ms(quantile(times[1], 0.5)), len(times[0]), len(times[1]), ms(alone), ms(beside))
	return beside.Seconds()/alone.Seconds() - 1, nil
}

func load(ctx context.Context, e *engine.Engine, n zoo.Net, dir string) (*live, error) {
	folder := filepath.Join(dir, "served")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return nil, err
	}
	if err := n.WriteFile(filepath.Join(folder, "model.onnx")); err != nil {
		return nil, err
	}
	l := &live{engine: e, id: engine.VersionID{Model: n.Name, Version: 1}}
	if _, err := e.Load(ctx, engine.Spec{ID: l.id, Dir: folder, Entry: "model.onnx"}); err != nil {
		return nil, err
	}
	in := n.Input()
	in.Shape = slices.Clone(in.Shape)
	in.Shape[0] = 1
	size, err := tensor.Bytes(in.Type, in.Shape)
	if err != nil {
		return nil, err
	}
	l.input = []tensor.Tensor{{Name: in.Name, Type: in.Type, Shape: in.Shape, Data: make([]byte, size)}}
	return l, nil
}

// traffic asks, waits for the answer and then for a while, again and again, and
// gives how long the answers took.
func (l *live) traffic(ctx context.Context, r *rand.Rand, length time.Duration) ([]time.Duration, error) {
	var all []time.Duration
	for end := time.Now().Add(length); time.Now().Before(end); {
		pause := time.NewTimer(shortest + time.Duration(r.Int64N(int64(longest-shortest))))
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-pause.C:
		}
		began := time.Now()
		result, err := l.engine.Infer(ctx, l.id, engine.Request{Inputs: l.input})
		if err != nil {
			return nil, err
		}
		all = append(all, time.Since(began))
		result.Release()
	}
	return all, nil
}

// beside measures in idle time while it has its turn.
type beside struct {
	idle *profile.Idle
	turn sync.Mutex // held by a slice, and while there are to be none; guards settings
	// settings counts those that were measured.
	settings int
}

// Do is that of profile.Gate.
func (b *beside) Do(ctx context.Context, f func(context.Context) error) (bool, error) {
	b.turn.Lock()
	defer b.turn.Unlock()
	return b.idle.Do(ctx, f)
}

// run measures settings of the grid, one after the other, until ctx is done.
func (b *beside) run(ctx context.Context, cfg worker.Config, s *subject) error {
	grid := s.Space.Grid()
	r := rand.New(rand.NewPCG(seed, 1))
	return worker.Measure(ctx, cfg, s.spec, s.file, func(ctx context.Context, m *worker.Measuring) error {
		b.turn.Lock()
		b.idle.Hold(m)
		b.turn.Unlock()
		for {
			if _, err := profile.Measure(ctx, m, b, s.Subject, grid[r.IntN(len(grid))]); err != nil {
				return err
			}
			b.turn.Lock()
			b.settings++
			b.turn.Unlock()
		}
	})
}

func quantile(all []time.Duration, q float64) time.Duration {
	all = slices.Sorted(slices.Values(all))
	return all[min(len(all)-1, int(float64(len(all))*q))]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
