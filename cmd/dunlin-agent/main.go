// Command dunlin-agent serves models on a device and follows the controller.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/dunlin/dunlin/agent"
	"github.com/dunlin/dunlin/agent/simfleet"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/internal/program"
)

func main() {
	verb, args := "run", os.Args[1:]
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, args = args[0], args[1:]
	}
	if verb == "worker" { // the agent's own child
		os.Exit(worker.Child())
	}
	if err := program.HideMemory(); err != nil {
		fmt.Fprintln(os.Stderr, "dunlin-agent: hide memory:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := fmt.Errorf("%w: unknown command %q; there are run (the default), serve, simulate, doctor, verify, import and version\nrun: dunlin-agent --help", program.ErrUsage, verb)
	if strings.HasSuffix(verb, ".onnx") {
		err = fmt.Errorf("%w: %q is not a command; to serve it: dunlin-agent serve %s", program.ErrUsage, verb, verb)
	}
	switch verb {
	case "help":
		err = agent.Main(ctx, []string{"--help"}, os.Getenv, os.Stdout)
	case "run":
		err = agent.Main(ctx, args, os.Getenv, os.Stdout)
	case "serve":
		err = agent.ServeMain(ctx, args, os.Getenv, os.Stdout)
	case "simulate":
		err = simfleet.Main(ctx, args, os.Getenv, os.Stdout)
	case "doctor":
		err = agent.Doctor(ctx, args, os.Getenv, os.Stdout, os.Stdout)
	case "verify":
		err = agent.Verify(ctx, args, os.Getenv, os.Stdout, os.Stdout)
	case "import":
		err = agent.Import(ctx, args, os.Getenv, os.Stdout, os.Stdout)
	case "watch": // the launcher's own child
		err = agent.Watch(args)
	case "version":
		_, err = fmt.Println("dunlin-agent", program.Version())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dunlin-agent:", err)
		if errors.Is(err, program.ErrUsage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}
