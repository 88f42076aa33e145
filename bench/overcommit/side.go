package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// side is an engine with its worker that serves the fleet.
type side struct {
	name   string
	engine *engine.Engine
	worker *worker.Worker
	stop   func()
}

// start starts a side and loads the fleet. With a cache its models are
// compiled; naive makes it hold to the budget by itself, see lru.
func (b *bench) start(ctx context.Context, name string, budget int64, cache *compiled.Cache, naive bool) (*side, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cfg := worker.Config{Command: []string{self, "worker"}, RuntimeLib: b.plan.lib, Folders: []string{absolute(b.plan.dir)}, Log: b.log}
	s := &side{name: name}
	if cache != nil {
		cfg.Compile = worker.Cached(cache, cfg)
	}
	s.worker = worker.New(cfg)
	var runtime engine.Runtime = s.worker
	if naive {
		runtime, budget = &lru{Worker: s.worker, budget: budget, sizes: map[engine.VersionID]int64{}, in: map[engine.VersionID]*entry{}}, 0
	}
	s.engine = engine.New(engine.Config{Runtime: runtime, Memory: budget, Log: b.log})
	running, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.worker.Supervise(running) })
	engineCtx, stopEngine := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { s.engine.Run(engineCtx); close(ended) }()
	s.stop = sync.OnceFunc(func() { stopEngine(); <-ended; cancel(); wg.Wait() })
	for _, m := range b.fleet {
		spec := m.spec
		spec.Options = &serving.Options{MaxBatchSize: 8, DynamicBatching: true}
		if _, err := s.engine.Load(ctx, spec); err != nil {
			s.stop()
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return s, nil
}

// throughput asks for the models of a sequence, concurrency requests at a
// time, for a while, and gives requests per second and what was asked for.
func (b *bench) throughput(ctx context.Context, s *side, seed uint64, took time.Duration) (float64, []int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	draw := zipf(seed, len(b.fleet))
	var mu sync.Mutex
	var asked []int
	next := func() model {
		mu.Lock()
		defer mu.Unlock()
		i := draw()
		asked = append(asked, i)
		return b.fleet[i]
	}
	var done atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for range b.plan.concurrency {
		wg.Go(func() {
			for time.Since(began) < took && ctx.Err() == nil {
				m := next()
				r, err := s.engine.Infer(ctx, m.spec.ID, engine.Request{Inputs: []tensor.Tensor{m.input}})
				if err != nil {
					cancel(fmt.Errorf("%s: %w", s.name, err))
					return
				}
				r.Release()
				done.Add(1)
			}
		})
	}
	wg.Wait()
	rate := float64(done.Load()) / time.Since(began).Seconds()
	if err := context.Cause(ctx); err != nil {
		return 0, nil, err
	}
	return rate, asked, nil
}

// lru is a Runtime for an engine without a budget that does what a server
// without this engine's memory side does: a run of a version that is out makes
// its session anew, from the model as it is, and the least recently used one
// is closed where that takes more than the budget.
type lru struct {
	*worker.Worker
	budget int64

	mu    sync.Mutex // guards what follows
	sizes map[engine.VersionID]int64
	in    map[engine.VersionID]*entry
	order []engine.VersionID // the least recently used one first
	used  int64
	busy  sync.Mutex // held while sessions are made and closed
}

type entry struct{ runs int }

// Load notes what the version takes.
func (l *lru) Load(ctx context.Context, s engine.Spec) (engine.Info, error) {
	info, err := l.Worker.Load(ctx, s)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sizes[s.ID] = info.Need.Weights
	info.Need = engine.Need{}
	return info, err
}

// Activate leaves it to Run.
func (l *lru) Activate(context.Context, engine.VersionID, engine.Setting) (engine.Need, error) {
	return engine.Need{}, nil
}

// Run runs a version, whose session it makes first where there is none.
func (l *lru) Run(ctx context.Context, id engine.VersionID, requests [][]tensor.Tensor, outputs []string) (engine.Outcome, error) {
	if err := l.bring(ctx, id); err != nil {
		return engine.Outcome{}, err
	}
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.in[id].runs--
	}()
	return l.Worker.Run(ctx, id, requests, outputs)
}

func (l *lru) bring(ctx context.Context, id engine.VersionID) error {
	if l.use(id) {
		return nil
	}
	l.busy.Lock()
	defer l.busy.Unlock()
	for !l.use(id) {
		victim, ok := l.victim(id)
		if ok {
			if err := l.Worker.Deactivate(ctx, victim); err != nil {
				return err
			}
			continue
		}
		if _, err := l.Worker.Activate(ctx, id, engine.Setting{}); err != nil {
			return err
		}
		l.mu.Lock()
		l.in[id] = &entry{}
		l.used += l.sizes[id]
		l.order = append(l.order, id)
		l.mu.Unlock()
	}
	return nil
}

// use counts a run of a version that has a session.
func (l *lru) use(id engine.VersionID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.in[id]
	if e == nil {
		return false
	}
	e.runs++
	i := slices.Index(l.order, id)
	l.order = append(slices.Delete(l.order, i, i+1), id)
	return true
}

// victim takes out the version to close before there is room for another; it
// gives none where there is room, or all that are in run.
func (l *lru) victim(id engine.VersionID) (engine.VersionID, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.used+l.sizes[id] <= l.budget {
		return engine.VersionID{}, false
	}
	for i, v := range l.order {
		if l.in[v].runs == 0 {
			l.order = slices.Delete(l.order, i, i+1)
			delete(l.in, v)
			l.used -= l.sizes[v]
			return v, true
		}
	}
	return engine.VersionID{}, false
}

// bench is one run of the benchmark.
type bench struct {
	plan  plan
	fleet []model
	log   *slog.Logger
}
