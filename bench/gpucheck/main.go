// Command gpucheck runs the pools' sequences on a real GPU, measures how fast
// weights leave and come back, compares NVML's power with its energy counter
// meanwhile, and, where DUNLIN_ORT_CUDA_DIR names the folder of ONNX Runtime's
// CUDA provider, runs nets whose weights do so. Its last line says how each
// part came out, or that there is no GPU.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/pools"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if len(os.Args) == 3 && os.Args[1] == providerPart {
		err = checkProvider(ctx, os.Args[2], os.Stdout)
	} else {
		err = run(ctx, weights.CUDA(0), os.Getenv("DUNLIN_ORT_CUDA_DIR"), os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gpucheck:", err)
		os.Exit(1)
	}
}

// providerPart has this program check the provider only: a runtime that fails
// there may take the process with it.
const providerPart = "provider"

var errFailed = errors.New("a part failed")

// run checks part by part, each on a device of its own, and goes on after one
// that fails.
func run(ctx context.Context, driver weights.Driver, provider string, out io.Writer) error {
	d, err := weights.Open(driver, weights.Settings{})
	if errors.Is(err, weights.ErrNoGPU) {
		fmt.Fprintf(out, "gpu: %s\n", strings.TrimPrefix(err.Error(), "open device: "))
		return nil
	}
	if err != nil {
		return err
	}
	info := d.Info()
	free, total, err := d.Memory()
	if err := errors.Join(err, d.Close()); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s, %s, CUDA %s, %d of %d MiB free, memory shared with the CPU: %v\n", info.Name, info.UUID, info.Driver, free>>20, total>>20, info.Integrated)
	line := fmt.Sprintf("gpu: device=%s cuda=%s", strings.ReplaceAll(info.Name, " ", "_"), info.Driver)
	failed := false
	part := func(name string, f func() error) {
		verdict := "pass"
		if err := f(); errors.Is(err, errNoCounter) {
			fmt.Fprintf(out, "%s: %v\n", name, err)
			verdict = "absent"
		} else if err != nil {
			fmt.Fprintf(out, "%s: %v\n", name, err)
			verdict, failed = "fail", true
		}
		line += fmt.Sprintf(" %s=%s", name, verdict)
	}
	part("sequences", func() error { return sequences(ctx, driver, min(512<<20, free/16), out) })
	part("swap", func() error {
		s, err := swap(ctx, driver, min(531<<20, free/4))
		if err == nil {
			line += " " + s.String()
		}
		return err
	})
	if info.Driver == "" { // a fake
		line += " energy=absent"
	} else {
		part("energy", func() (err error) {
			m := device.Open(device.Config{Dir: os.TempDir()})
			defer func() { err = errors.Join(err, m.Close()) }()
			describeGPUs(m.Info(), out)
			return energy(ctx, m, info.UUID, swapLoad(driver, min(531<<20, free/4)), out)
		})
	}
	if provider == "" {
		line += " provider=absent"
		fmt.Fprintln(out, "provider: DUNLIN_ORT_CUDA_DIR does not name the folder of the CUDA provider")
	} else {
		part("provider", func() error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			cmd := exec.CommandContext(ctx, exe, providerPart, provider)
			cmd.Stdout, cmd.Stderr = out, os.Stderr
			return cmd.Run()
		})
	}
	fmt.Fprintln(out, line)
	if failed {
		return errFailed
	}
	return nil
}

// sequences are those of the fake driver's tests, without its failures.
func sequences(ctx context.Context, driver weights.Driver, unit int64, out io.Writer) (err error) {
	d, err := weights.Open(driver, weights.Settings{Pinned: unit, Recycled: 2 * unit, Largest: unit / 4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	for seed := range uint64(5) {
		// Pools have up to unit bytes, and there are eight at most.
		if err := pools.Sequences(ctx, d, seed, 200, unit/2, nil); err != nil {
			return fmt.Errorf("seed %d: %w", seed, err)
		}
	}
	fmt.Fprintf(out, "sequences: seeds 0 to 4, 200 steps each, pools of up to %d MiB\n", unit/2>>20)
	return nil
}

func swap(ctx context.Context, driver weights.Driver, size int64) (s pools.Swap, err error) {
	d, err := weights.Open(driver, weights.Settings{Pinned: size + 1<<20, Recycled: size + size/4})
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return pools.MeasureSwap(ctx, d, size, 9)
}
