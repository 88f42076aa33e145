// Command dunlin-controller is the one daemon in the cloud: registry, desired
// state, rollouts and MQTT broker.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/internal/program"
)

func main() {
	if err := program.HideMemory(); err != nil {
		fmt.Fprintln(os.Stderr, "dunlin-controller: hide memory:", err)
		os.Exit(1)
	}
	if len(os.Args) == 2 && os.Args[1] == "version" {
		fmt.Println("dunlin-controller", program.Version())
		return
	}
	c, err := controller.LoadConfig(os.Args[1:], os.Getenv, os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dunlin-controller:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := controller.Run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "dunlin-controller:", err)
		os.Exit(1)
	}
}
