// Command delta measures what travels when a model changes, and how fast a
// whole model comes: from a controller's registry over TLS, by the download of
// the agent, against curl; and over MQTT.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// size says how much a run measures.
type size struct {
	model  int // MB of the model
	layers int // of equal size
	rounds int // of each way to fetch it whole; the median counts
}

func main() {
	s := size{}
	flag.IntVar(&s.model, "mb", 170, "`MB` of the model")
	flag.IntVar(&s.layers, "layers", 12, "`number` of its layers, of which the last changes")
	flag.IntVar(&s.rounds, "rounds", 7, "how often the whole model is fetched each way; the median counts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "delta:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s size) (err error) {
	root, err := e2e.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-delta-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintln(os.Stderr, "building the programs")
	programs, err := e2e.Build(ctx, root, dir)
	if err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "fleet"), 0o700); err != nil {
		return err
	}
	fleet, err := e2e.NewFleet(programs, filepath.Join(dir, "fleet"), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fleet.Stop()) }()
	if err := fleet.StartController(ctx); err != nil {
		return err
	}
	b := &bench{size: s, fleet: fleet, dir: dir}
	fmt.Fprintln(os.Stderr, "pushing three versions of the model")
	if err := b.prepare(ctx); err != nil {
		return err
	}
	defer b.close()
	fmt.Printf("machine: %s; %s; model of %d bytes, of which the last layer has %d\n", e2e.Machine(), time.Now().UTC().Format(time.DateOnly), b.bytes, b.layer)

	head, err := b.delta(ctx, "head")
	if err != nil {
		return err
	}
	insert, err := b.delta(ctx, "insert")
	if err != nil {
		return err
	}
	fmt.Printf("last layer changed: %d bytes on the wire for %d, allowed are %d\n", head, b.layer, b.layer+b.layer*15/100+1<<20)
	fmt.Printf("a node inserted before all: %d bytes on the wire, %.4f of the model\n", insert, float64(insert)/float64(b.bytes))

	var ours, curls, inbands, bares []float64
	for range s.rounds { // in turns: what else the machine does meets both
		rate, err := b.curl(ctx)
		if err != nil {
			return err
		}
		curls = append(curls, rate)
		if rate, err = b.whole(ctx, b.registry()); err != nil {
			return err
		}
		ours = append(ours, rate)
		if b.mqtt != nil {
			if rate, err = b.whole(ctx, b.mqtt); err != nil {
				return err
			}
			inbands = append(inbands, rate)
			if rate, err = bareMQTT(ctx, b.bytes); err != nil {
				return err
			}
			bares = append(bares, rate)
		}
	}
	curl, whole := median(curls), median(ours)
	fmt.Printf("whole model, verified and on disk: %.0f MB/s; curl, on disk: %.0f MB/s\n", whole, curl)
	inband := "none"
	if len(inbands) > 0 {
		inband = fmt.Sprintf("%.2f", median(inbands)/curl)
		fmt.Printf("over MQTT, verified and on disk: %.0f MB/s; the same bytes through a bare broker, dropped: %.0f MB/s\n", median(inbands), median(bares))
	}
	fmt.Printf("delta: head_only_ratio=%.3f insert_ratio=%.4f full_mbs_vs_curl=%.2f inband_mbs_vs_curl=%s\n",
		float64(head)/float64(b.layer), float64(insert)/float64(b.bytes), whole/curl, inband)
	return nil
}

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}
