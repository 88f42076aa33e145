// Command crash measures how long callers wait when the process that runs the
// models is killed: five nets are resident, all of them are called all the
// time, and somebody else ends the process again and again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/models/tensor"
)

const seed = 1

func main() {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	kills := flag.Int("kills", 100, "how often the process is killed")
	think := flag.Duration("think", 200*time.Millisecond, "the longest time from an answer to the caller's next call; it is half of it on average")
	between := flag.Duration("between", time.Second, "the longest time between all nets' first answers and the next kill")
	prepack := flag.Bool("prepack", true, "prepack the nets' weights where that makes them faster")
	verbose := flag.Bool("v", false, "print each kill, and the worker's log")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *kills, *think, *between, *prepack, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		os.Exit(1)
	}
}

// caller calls one net: it waits for each answer, and then for a while.
type caller struct {
	name  string
	id    engine.VersionID
	input []tensor.Tensor
	quiet []time.Duration // of calls that no death came into

	mu     sync.Mutex // guards what follows
	deaths int64      // before the last answer
	began  time.Duration
	first  time.Duration // when the first answer after the last death came, and when its call began, since start
}

func run(ctx context.Context, kills int, think, between time.Duration, prepack, verbose bool) (err error) {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	library, err := e2e.RuntimeLibrary(ctx, root, os.Stderr)
	if err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-crash-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cache, err := compiled.Open(filepath.Join(dir, "compiled"), 4<<30)
	if err != nil {
		return err
	}
	start := time.Now()
	var deaths, died atomic.Int64 // how many, and when the last one was known, since start
	var lost atomic.Pointer[error]
	log := slog.New(slog.DiscardHandler)
	if verbose {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	cfg := worker.Config{
		Command: []string{exe, "worker"}, RuntimeLib: library, Folders: []string{dir}, Log: log,
		OnDeath: func(worker.Death) {
			died.Store(int64(time.Since(start)))
			deaths.Add(1)
		},
		OnLost: func(id engine.VersionID, reason error) {
			err := fmt.Errorf("%s is lost: %w", id, reason)
			lost.Store(&err)
		},
	}
	cfg.Compile = worker.Cached(cache, cfg)
	w := worker.New(cfg)
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	all.Go(func() { w.Supervise(ctx) })
	callers, err := prepare(ctx, w, dir, prepack)
	if err != nil {
		return err
	}
	var answers, computed atomic.Int64
	var failed atomic.Pointer[error]
	running := time.Now()
	for n, c := range callers {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(n)))
			for ; ctx.Err() == nil; wait(ctx, time.Duration(random.Int64N(int64(think)+1))) {
				before, began := deaths.Load(), time.Since(start)
				out, err := w.Run(ctx, c.id, [][]tensor.Tensor{c.input}, nil)
				if err != nil {
					if ctx.Err() == nil {
						err = fmt.Errorf("%s: %w", c.name, err)
						failed.Store(&err)
					}
					return
				}
				if out.Release != nil {
					out.Release()
				}
				answers.Add(1)
				computed.Add(int64(out.Infer))
				c.answered(before, deaths.Load(), began, time.Since(start))
			}
		})
	}
	random := rand.New(rand.NewPCG(seed, 99))
	var longest, shortest, noticed []time.Duration
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for k := range kills {
		wait(ctx, time.Duration(random.Int64N(int64(between))))
		pid, err := child()
		if err != nil {
			return err
		}
		killed := time.Since(start)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			return fmt.Errorf("kill the worker: %w", err)
		}
		last, first := time.Duration(0), time.Duration(1<<62)
		for _, c := range callers {
			began, answered, ok := c.firstAfter(int64(k + 1))
			for ; !ok; began, answered, ok = c.firstAfter(int64(k + 1)) {
				if err := failed.Load(); err != nil {
					return *err
				}
				if err := lost.Load(); err != nil {
					return *err
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				<-tick.C
			}
			pause := answered - max(killed, began)
			last, first = max(last, pause), min(first, answered-killed)
			if verbose {
				fmt.Fprintf(os.Stderr, "kill %d: %s %v\n", k, c.name, pause)
			}
		}
		longest, shortest = append(longest, last), append(shortest, first)
		noticed = append(noticed, time.Duration(died.Load())-killed)
	}
	busy := float64(computed.Load()) / float64(time.Since(running))
	cancel()
	all.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	fmt.Printf("%d kills at random times, %d answers, no call failed; %.2f runs at a time on average\n", kills, answers.Load(), busy)
	for _, c := range callers {
		fmt.Printf("%s: a call without a death p50 %.1f ms, p99 %.1f ms\n", c.name, ms(percentile(c.quiet, 50)), ms(percentile(c.quiet, 99)))
	}
	fmt.Printf("from a kill until the agent knows of the death: p50 %.1f ms, p99 %.1f ms\n", ms(percentile(noticed, 50)), ms(percentile(noticed, 99)))
	fmt.Printf("from a kill to the first answer of any net: p50 %.1f ms, p99 %.1f ms\n", ms(percentile(shortest, 50)), ms(percentile(shortest, 99)))
	fmt.Printf("the longest that a caller waited, of each kill: p50 %.1f ms, p90 %.1f ms, longest %.1f ms\n", ms(percentile(longest, 50)), ms(percentile(longest, 90)), ms(percentile(longest, 100)))
	fmt.Printf("crash: pause_p99_ms=%.0f first_answer_p99_ms=%.0f\n", ms(percentile(longest, 99)), ms(percentile(shortest, 99)))
	return nil
}

// answered takes note of an answer, and of how many deaths there had been
// when its call began and when it came.
func (c *caller) answered(before, now int64, began, at time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now > c.deaths {
		c.deaths, c.began, c.first = now, began, at
	} else if before == now {
		c.quiet = append(c.quiet, at-began)
	}
}

// firstAfter gives when the first answer after so many deaths came, and when
// its call began.
func (c *caller) firstAfter(deaths int64) (began, at time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.began, c.first, c.deaths >= deaths
}

// prepare writes the nets and makes all of them resident.
func prepare(ctx context.Context, w *worker.Worker, dir string, prepack bool) (all []*caller, err error) {
	for _, net := range zoo.Nets(seed) {
		c := &caller{name: net.Name, id: engine.VersionID{Model: net.Name, Version: 1}}
		folder := filepath.Join(dir, net.Name)
		if err := os.Mkdir(folder, 0o700); err != nil {
			return nil, err
		}
		if err := net.WriteFile(filepath.Join(folder, "model.onnx")); err != nil {
			return nil, err
		}
		info, err := w.Load(ctx, engine.Spec{ID: c.id, Dir: folder, Entry: "model.onnx"})
		if err != nil {
			return nil, err
		}
		if _, err := w.Activate(ctx, c.id, engine.Setting{}); err != nil {
			return nil, err
		}
		if prepack && info.Need.Prepacked > 0 {
			if err := w.Set(ctx, c.id, engine.Setting{Prepack: true}); err != nil {
				return nil, err
			}
		}
		fmt.Fprintf(os.Stderr, "%s is resident: %+v\n", net.Name, info.Need)
		in := net.Input()
		in.Shape = append([]int64{1}, in.Shape[1:]...)
		size, err := tensor.Bytes(in.Type, in.Shape)
		if err != nil {
			return nil, err
		}
		c.input = []tensor.Tensor{{Name: in.Name, Type: in.Type, Shape: in.Shape, Data: make([]byte, size)}}
		all = append(all, c)
	}
	return all, nil
}

// child gives this process's only child.
func child() (int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	parent := strconv.Itoa(os.Getpid())
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" && f[1] == parent {
			return strconv.Atoi(filepath.Base(filepath.Dir(path)))
		}
	}
	return 0, errors.New("there is no worker")
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// percentile gives the smallest that so many percent do not exceed; it sorts d.
func percentile(d []time.Duration, percent int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[(len(d)*percent+99)/100-1]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
