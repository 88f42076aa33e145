package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/pools"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// energyTime is how long the GPU is sampled under load, every energyEvery,
	// after settleTime: the driver's power is a mean of the last second.
	energyTime  = 10 * time.Second
	energyEvery = 200 * time.Millisecond
	settleTime  = 2 * time.Second
	// energyTolerance is how far power times time may lie from what the energy
	// counter says.
	energyTolerance = 0.05
	// energyGap is the longest time without a sample that still says something.
	energyGap = 2 * time.Second
)

// errNoCounter is the error of a GPU without power or energy counter.
var errNoCounter = errors.New("the GPU does not tell its power and its energy")

// reading is what a GPU has said at a time.
type reading struct {
	at            time.Time
	watts, joules float64
}

// read samples the GPU with that UUID, or the first one.
func read(m *device.Device, uuid string) (reading, error) {
	t := m.Sample()
	for _, g := range t.Gpus {
		if uuid != "" && g.Uuid != uuid {
			continue
		}
		if g.PowerWatts == nil || g.EnergyJoules == nil {
			return reading{}, errNoCounter
		}
		return reading{t.At.AsTime(), *g.PowerWatts, *g.EnergyJoules}, nil
	}
	return reading{}, fmt.Errorf("GPU %q does not answer: %v", uuid, t.Faults)
}

// sampleEnergy reads a GPU until ctx is done or the time is over.
func sampleEnergy(ctx context.Context, m *device.Device, uuid string) ([]reading, error) {
	var all []reading
	tick := time.NewTicker(energyEvery)
	defer tick.Stop()
	for end := time.Now().Add(energyTime); !time.Now().After(end); {
		r, err := read(m, uuid)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
	return all, nil
}

// compare integrates power over time by trapezoids, and gives that and what
// the energy counter says, in joules. They must agree within energyTolerance.
func compare(all []reading) (integrated, counted float64, err error) {
	if len(all) < 2 {
		return 0, 0, fmt.Errorf("%d samples, needed are 2", len(all))
	}
	for i, now := range all[1:] {
		before := all[i]
		gap := now.at.Sub(before.at)
		if gap <= 0 || gap > energyGap {
			return 0, 0, fmt.Errorf("%v between two samples, allowed is above 0 to %v", gap, energyGap)
		}
		if now.joules < before.joules {
			return 0, 0, fmt.Errorf("the energy counter fell from %v to %v J", before.joules, now.joules)
		}
		integrated += (before.watts + now.watts) / 2 * gap.Seconds()
	}
	counted = all[len(all)-1].joules - all[0].joules
	if apart := math.Abs(integrated-counted) / counted; !(apart <= energyTolerance) {
		return integrated, counted, fmt.Errorf("power times time is %.1f J, the energy counter says %.1f J: more than %g apart", integrated, counted, energyTolerance)
	}
	return integrated, counted, nil
}

// energy samples a GPU under load and compares its power with its energy.
func energy(ctx context.Context, m *device.Device, uuid string, load func(context.Context) error, out io.Writer) (err error) {
	loading, stop := context.WithCancel(ctx)
	loaded := make(chan error, 1)
	go func() { loaded <- load(loading) }()
	defer func() {
		stop()
		if e := <-loaded; e != nil && !errors.Is(e, context.Canceled) {
			err = errors.Join(err, fmt.Errorf("load: %w", e))
		}
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(settleTime):
	}
	all, err := sampleEnergy(ctx, m, uuid)
	if err != nil {
		return err
	}
	integrated, counted, err := compare(all)
	fmt.Fprintf(out, "energy: %d samples in %v: power times time %.1f J, counter %.1f J\n", len(all), energyTime, integrated, counted)
	return err
}

// swapLoad keeps a GPU busy with weights that leave and come back.
func swapLoad(driver weights.Driver, size int64) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		d, err := weights.Open(driver, weights.Settings{Pinned: size + 1<<20, Recycled: size + size/4})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		for ctx.Err() == nil {
			if _, err := pools.MeasureSwap(ctx, d, size, 9); err != nil {
				return err
			}
		}
		return nil
	}
}

// describeGPUs says what NVML finds.
func describeGPUs(info *dunlinv1.DeviceInfo, out io.Writer) {
	for _, g := range info.Gpus {
		fmt.Fprintf(out, "nvml: GPU %d: %s, %s, compute capability %s, %d MiB, parts %q\n", g.Index, g.Name, g.Uuid, g.ComputeCapability, g.MemoryBytes>>20, g.MigDevices)
	}
}
