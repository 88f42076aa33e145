// Command console measures the web console of a controller with thousands of
// devices that report and viewers that look: how soon pages begin, how soon
// what changes is on the pages of those who look, what pages weigh; and looks
// at all of them with a browser and axe.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// size says how much a run measures.
type size struct {
	devices, models, viewers int
	load                     time.Duration
	browser                  bool
}

func main() {
	s := size{}
	flag.IntVar(&s.devices, "devices", 10000, "how many devices report")
	flag.IntVar(&s.models, "models", 200, "how many models there are")
	flag.IntVar(&s.viewers, "viewers", 50, "how many look at live pages")
	flag.DurationVar(&s.load, "load", time.Minute, "how long live updates are measured")
	flag.BoolVar(&s.browser, "browser", true, "look at all pages with Chromium and axe")
	program := flag.String("controller", "", "`program` to measure in place of the one that is built from here")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s, *program); err != nil {
		fmt.Fprintln(os.Stderr, "console:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s size, program string) (err error) {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-console-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if program == "" {
		fmt.Fprintln(os.Stderr, "building the controller")
		program = filepath.Join(dir, "dunlin-controller")
		build := exec.CommandContext(ctx, "go", "build", "-o", program, "./cmd/dunlin-controller")
		build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build: %w: %s", err, out)
		}
	}
	fmt.Printf("machine: %s; %s\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly))
	w, err := begin(ctx, s, program, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.stop()) }()
	f, err := w.measure(ctx)
	if err != nil {
		return err
	}
	f.axe, f.policy = -1, -1
	if s.browser {
		if f.axe, f.policy, err = w.look(ctx, root); err != nil {
			return err
		}
	}
	f.print()
	return nil
}
