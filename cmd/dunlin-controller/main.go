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
	"slices"
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, program.ErrUsage):
		fmt.Fprintln(os.Stderr, "dunlin-controller:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "dunlin-controller:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) >= 3 && slices.Equal(args[:3], []string{"broker", "config", "mosquitto"}) {
		c, err := controller.LoadMosquittoConfig(args[3:], os.Getenv, os.Stdout)
		if err != nil {
			return err
		}
		return controller.SetUpMosquitto(ctx, c)
	}
	if len(args) > 0 && (args[0] == "backup" || args[0] == "restore") {
		c, err := controller.LoadBackupConfig(args[0], args[1:], os.Getenv, os.Stdout)
		if err != nil {
			return err
		}
		if args[0] == "backup" {
			return controller.Backup(ctx, c)
		}
		return controller.Restore(ctx, c)
	}
	c, err := controller.LoadConfig(args, os.Getenv, os.Stdout)
	if err != nil {
		return err
	}
	return controller.Run(ctx, c)
}
