// Command fleet measures one controller with thousands of simulated devices:
// how long they take to connect, and one change of a deployment to reach all
// of them and to be reported; held against a bare broker with the same devices.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// size says how much a run measures.
type size struct {
	devices int
	idle    time.Duration // how long the traffic of idle devices is counted, after settle
	settle  time.Duration
	quiet   time.Duration // after a change, in which what comes of it is counted as its cost
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == bareCommand {
		if err := bareBroker(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "fleet: bare broker:", err)
			os.Exit(1)
		}
		return
	}
	s := size{quiet: quiet, settle: settle}
	flag.IntVar(&s.devices, "devices", 10000, "how many devices there are")
	flag.DurationVar(&s.idle, "idle", 2*time.Minute, "how long the traffic of idle devices is counted")
	only := flag.Bool("only-idle", false, "count nothing but the traffic of idle devices, and of agents that are processes")
	controller := flag.String("controller", "", "`program` to measure in place of the one that is built from here")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s, *only, *controller); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s size, onlyIdle bool, controller string) error {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-fleet-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintln(os.Stderr, "building the programs")
	programs, err := e2e.Build(ctx, root, dir)
	if err != nil {
		return err
	}
	if controller != "" {
		programs.Controller = controller
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fmt.Printf("machine: %s; %s\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly))
	if onlyIdle {
		f, err := measureIdle(ctx, idleSize{s.devices, s.settle, s.idle}, programs, root, filepath.Join(dir, "fleet"), os.Stderr)
		if err == nil {
			f.print(os.Stdout)
		}
		return err
	}
	f, err := measure(ctx, s, programs, self, root, filepath.Join(dir, "fleet"), os.Stderr)
	if err != nil {
		return err
	}
	f.print(os.Stdout)
	return nil
}
