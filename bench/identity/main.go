// Command identity measures what identity and trust cost a controller: devices
// that join at once, connections with certificates, revocation, and a new
// certificate authority under load; and it tries who may do what.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/access"
)

// size says how much a run measures.
type size struct {
	devices  int           // that join
	revoked  int           // of them
	rotating int           // of them, that are connected while the authority changes
	clients  int           // that join or connect at one time
	spread   time.Duration // over which devices renew that are told to; 0: as they are told
}

func main() {
	s := size{}
	flag.IntVar(&s.devices, "devices", 2000, "how many devices join")
	flag.IntVar(&s.revoked, "revoked", 100, "how many of them are revoked")
	flag.IntVar(&s.rotating, "rotating", 200, "how many of them are connected while the certificate authority changes")
	flag.IntVar(&s.clients, "clients", 64, "how many join, or connect, at one time")
	flag.DurationVar(&s.spread, "spread", 0, "the time over which devices renew; 0: what the controller tells them")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "identity:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s size) error {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-identity-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintln(os.Stderr, "building the programs")
	programs, err := e2e.Build(ctx, root, dir)
	if err != nil {
		return err
	}
	fmt.Printf("machine: %s; %s; load %s\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly), load())
	f, err := measure(ctx, s, programs, filepath.Join(dir, "fleet"), os.Stderr)
	if err != nil {
		return err
	}
	f.print()
	cells, err := tryAccess(ctx, programs, root, filepath.Join(dir, "access"))
	if err != nil {
		return err
	}
	fmt.Printf("who may do what: %d cells were tried at a controller, its broker and an agent, %d came out wrong\n", cells.Tried, len(cells.Wrong))
	for _, c := range cells.Wrong {
		fmt.Println("wrong:", c)
	}
	fmt.Printf("identity: enrol_per_s=%.0f mtls_connect_per_s=%.0f revoke_p99_ms=%.0f matrix_cells=%d matrix_wrong=%d\n",
		f.enrolPerSecond, f.connectPerSecond, ms(percentile(f.revoke, 99)), cells.Tried, len(cells.Wrong))
	return nil
}

// tryAccess tries everything that anybody may or may not do: at a controller
// with the embedded broker, and at an agent.
func tryAccess(ctx context.Context, programs e2e.Programs, root, dir string) (result access.Result, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return result, err
	}
	library, err := e2e.RuntimeLibrary(ctx, root, os.Stderr)
	if err != nil {
		return result, err
	}
	fleet, err := e2e.NewFleet(programs, dir, library)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, fleet.Stop()) }()
	if err := fleet.StartController(ctx); err != nil {
		return result, err
	}
	const model = "digits"
	file := filepath.Join(root, "models/examples/digits/v1.onnx")
	if _, err := fleet.CLI(ctx, "push", file, model+":1"); err != nil {
		return result, err
	}
	if result, err = access.Try(ctx, access.Controller{
		URL: fleet.URL, DeviceURL: fleet.DeviceURL(), MQTT: fleet.MQTT, EnrolMQTT: fleet.MQTT, Data: filepath.Join(dir, "controller"), Token: fleet.Token, Model: model,
	}); err != nil {
		return result, err
	}
	agent, err := access.NewAgent(dir, file)
	if err != nil {
		return result, err
	}
	alone, err := e2e.Serve(ctx, programs.Agent, dir, "agent", library, agent.Args()...)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, alone.Stop()) }()
	agent.URL, agent.GRPC = alone.URL, alone.GRPC
	if err := alone.Wait(ctx, agent.Ready); err != nil {
		return result, err
	}
	cells, err := agent.Try(ctx)
	result.Add(cells)
	return result, err
}

// load is the machine's load averages.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil || len(b) < 14 {
		return "unknown"
	}
	return string(b[:14])
}
