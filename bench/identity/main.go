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
	cells, err := tryAccess(ctx, programs, filepath.Join(dir, "access"))
	if err != nil {
		return err
	}
	for _, c := range cells.Wrong {
		fmt.Println("wrong:", c)
	}
	fmt.Printf("identity: enrol_per_s=%.0f mtls_connect_per_s=%.0f revoke_p99_ms=%.0f matrix_cells=%d matrix_wrong=%d\n",
		f.enrolPerSecond, f.connectPerSecond, ms(percentile(f.revoke, 99)), cells.Tried, len(cells.Wrong))
	return nil
}

// tryAccess tries everything that anybody may or may not do, with the embedded broker.
func tryAccess(ctx context.Context, programs e2e.Programs, dir string) (result access.Result, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return result, err
	}
	fleet, err := e2e.NewFleet(programs, dir, "")
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, fleet.Stop()) }()
	if err := fleet.StartController(ctx); err != nil {
		return result, err
	}
	return access.Try(ctx, fleet)
}

// load is the machine's load averages.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil || len(b) < 14 {
		return "unknown"
	}
	return string(b[:14])
}
