// Command profile holds the search for how a net runs best, and what it
// predicts, against measuring everything, and looks at what profiling costs who
// is served meanwhile.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/internal/e2e"
)

const seed = 1

func main() {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	o := options{out: os.Stdout}
	flag.IntVar(&o.batch, "batch", 64, "the largest batch of search and grid")
	flag.IntVar(&o.rounds, "rounds", 3, "how often the recommended setting and the grid's best are measured again, in turn")
	flag.IntVar(&o.blocks, "blocks", 20, "pairs of blocks of live traffic, without profiling and beside it; 0 leaves that out")
	flag.DurationVar(&o.block, "block", 2*time.Second, "the length of a block")
	only := flag.String("nets", "", "only these `nets`, by commas")
	flag.Parse()
	for _, n := range zoo.Nets(seed) {
		if *only == "" || slices.Contains(strings.Split(*only, ","), n.Name) {
			o.nets = append(o.nets, n)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "profile:", err)
		os.Exit(1)
	}
}

// config gives the configuration of children.
func config(ctx context.Context) (worker.Config, error) {
	root, err := e2e.Root()
	if err != nil {
		return worker.Config{}, err
	}
	library, err := e2e.RuntimeLibrary(ctx, root, os.Stderr)
	if err != nil {
		return worker.Config{}, err
	}
	exe, err := os.Executable()
	return worker.Config{Command: []string{exe, "worker"}, RuntimeLib: library}, err
}

func run(ctx context.Context, o options) error {
	if len(o.nets) == 0 {
		return errors.New("there is no such net")
	}
	cfg, err := config(ctx)
	if err != nil {
		return err
	}
	r, err := measureAll(ctx, cfg, o)
	if err != nil {
		return err
	}
	impact, err := liveImpact(ctx, cfg, o)
	if err != nil {
		return err
	}
	fmt.Fprintf(o.out, "profile: mem_err_pct=%.1f latency_err_pct=%.1f best_ratio=%.3f time_ratio=%.3f p99_impact_pct=%.1f\n",
		100*r.memory, 100*r.latency, r.best, r.time, 100*impact)
	return nil
}
