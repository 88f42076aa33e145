// Command serving measures what an agent adds to the runtime that it serves,
// next to a bare loop, a bare gRPC server and MLServer: all in one run, on the
// same processors, the sides in turn.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// plan says how much is measured.
type plan struct {
	rounds   int
	slice    time.Duration // of one side in one round
	overload time.Duration
	agent    string // its program
	mlserver string // MLServer's program
	only     string
}

func (p plan) wants(name string) bool { return p.only == "" || p.only == name }

// measurements, in the order in which they are made.
var measurements = []struct {
	name    string
	measure func(context.Context, *bench) error
}{
	{"resnet50", measureResNet},
	{"tiny", measureTiny},
	{"batch", measureBatch},
	{"overload", measureOverload},
}

// figures of the last line, and how each is written.
var figures = []struct{ name, format string }{
	{"resnet50_vs_raw", "%.3f"},
	{"tiny_grpc_vs_echo", "%.2f"},
	{"tiny_grpc_vs_mlserver", "%.1f"},
	{"overhead_p50_us", "%.0f"},
	{"batch_gain", "%.2f"},
	{"overload_goodput", "%.2f"},
	{"reject_p99_ms", "%.2f"},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "serving:", err)
		os.Exit(1)
	}
}

// run is the benchmark, or one of the processes that it starts.
func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "load":
			return loadProcess(ctx, args[1:])
		case "raw":
			return rawProcess(ctx, args[1:])
		case "echo":
			return echoProcess(ctx, args[1:])
		case "pin":
			return pinProcess(args[1:])
		}
	}
	p := plan{rounds: 7, slice: 1500 * time.Millisecond, overload: 30 * time.Second}
	var names []string
	for _, m := range measurements {
		names = append(names, m.name)
	}
	flags := flag.NewFlagSet("serving", flag.ContinueOnError)
	quick := flags.Bool("quick", false, "measure for a minute, to see that everything works")
	flags.StringVar(&p.only, "only", "", "measure only one of "+strings.Join(names, ", "))
	flags.StringVar(&p.agent, "agent", "", "`path` of the agent's program; without it, it is built")
	flags.StringVar(&p.mlserver, "mlserver", "", "`path` of MLServer's program; without it, it is installed into .cache")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if p.only != "" && !slices.Contains(names, p.only) {
		return fmt.Errorf("-only %q: there are %s", p.only, strings.Join(names, ", "))
	}
	if *quick {
		p.rounds, p.slice, p.overload = 3, 500*time.Millisecond, 5*time.Second
	}
	return measureAll(ctx, p)
}

func measureAll(ctx context.Context, p plan) (err error) {
	began := time.Now()
	dir, err := os.MkdirTemp("", "dunlin-serving-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b, err := prepare(ctx, p, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	fmt.Printf("machine: %s; %s\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly))
	for _, m := range measurements {
		if !p.wants(m.name) {
			continue
		}
		if err := m.measure(ctx, b); err != nil {
			return fmt.Errorf("%s: %w\n%s", m.name, err, b.logs())
		}
	}
	fmt.Printf("versions: %s\n", strings.Join(slices.Sorted(maps.Values(b.versions)), ", "))
	fmt.Printf("took %s\n", time.Since(began).Round(time.Second))
	fmt.Print("serving:")
	for _, f := range figures {
		v, ok := b.figures[f.name]
		if !ok {
			v = math.NaN()
		}
		fmt.Printf(" %s=%s", f.name, figure(f.format, v))
	}
	fmt.Println()
	return nil
}
