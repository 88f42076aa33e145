// Command overcommit measures an agent's engine and worker with many more
// models than its memory budget holds: against the same load with a budget for
// all of them, against sessions that are made anew with the least recently used
// one leaving, and, under a memory control group, against what the disk allows.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/internal/e2e"
)

// plan says what is measured.
type plan struct {
	nets        []string // of the zoo
	copies      int      // of each, with weights of their own
	fit         int      // models of middling size that the budget holds
	concurrency int
	rounds      int
	slice       time.Duration // of one side in one round
	seed        uint64
	dir         string // for the models; a temporary one where empty
	lib         string
	group       bool // also under a memory control group
	only        bool // only that, and what it is compared with
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "overcommit:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	p := plan{
		nets: []string{"mlp", "mobilenet", "resnet50", "encoder", "vgg11"}, copies: 8, fit: 5, concurrency: 8,
		rounds: 3, slice: 20 * time.Second, lib: os.Getenv("DUNLIN_ORT_LIB"), group: true,
	}
	flags := flag.NewFlagSet("overcommit", flag.ContinueOnError)
	quick := flags.Bool("quick", false, "small nets and short rounds, to see that everything works")
	flags.Uint64Var(&p.seed, "seed", 1, "of weights, order and requests")
	flags.BoolVar(&p.only, "only-group", false, "measure only under a memory control group")
	flags.StringVar(&p.dir, "dir", "", "`folder` for the models and their compiled forms, kept for the next run; without it, a temporary one")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if *quick {
		p.nets, p.rounds, p.slice, p.group = []string{"mlp", "mobilenet"}, 2, 2*time.Second, false
	}
	if p.lib == "" {
		return errors.New("DUNLIN_ORT_LIB names no ONNX Runtime library")
	}
	return measure(ctx, p)
}

// result is what the rounds of the sides gave, in requests per second; NaN
// where there is none.
type result struct{ warm, bound, naive float64 }

func measure(ctx context.Context, p plan) (err error) {
	began := time.Now()
	if p.dir == "" {
		if p.dir, err = os.MkdirTemp("", "dunlin-overcommit-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(p.dir)) }()
	}
	fmt.Printf("machine: %s; %s\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly))
	fleet, err := writeFleet(p)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	b := &bench{plan: p, fleet: fleet, log: log}
	r, err := b.measure(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("took %s\n", time.Since(began).Round(time.Second))
	fmt.Printf("overcommit: warm_ratio=%s bound_ratio=%s naive_ratio=%s\n", figure(r.warm), figure(r.bound), figure(r.naive))
	return nil
}

func figure(v float64) string {
	if v != v {
		return "na"
	}
	return fmt.Sprintf("%.2f", v)
}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	return s[len(s)/2]
}

func absolute(dir string) string {
	path, err := filepath.Abs(dir)
	if err != nil {
		return dir
	}
	return path
}
