// Command dunlin-agent serves models on a device and follows the controller.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/dunlin/dunlin/agent"
	"github.com/dunlin/dunlin/agent/worker"
)

func main() {
	verb, args := "run", os.Args[1:]
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, args = args[0], args[1:]
	}
	if verb == "worker" { // the agent's own child
		os.Exit(worker.Child())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := fmt.Errorf("unknown command %q; there are run (the default), doctor and version", verb)
	switch verb {
	case "run":
		err = agent.Main(ctx, args, os.Getenv, os.Stderr)
	case "doctor":
		err = agent.Doctor(ctx, args, os.Getenv, os.Stdout, os.Stderr)
	case "version":
		_, err = fmt.Println("dunlin-agent", agent.Version())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dunlin-agent:", err)
		os.Exit(1)
	}
}
