// Command swap measures how fast weights leave a GPU and come back, next to a
// bare copy of the same size. Without a GPU it does the same on a fake one,
// whose times say nothing: the content is compared all the same.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/pools"
)

func main() {
	gpu := flag.Int("gpu", 0, "`number` of the GPU")
	rounds := flag.Int("rounds", 9, "how often each size goes out and in; the median counts")
	most := flag.Int64("most", 4096, "largest size in `MiB`; smaller where memory is")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *gpu, *rounds, *most<<20); err != nil {
		fmt.Fprintln(os.Stderr, "swap:", err)
		os.Exit(1)
	}
}

// sizes of one net each, from a small one on.
var sizes = []int64{16 << 20, 128 << 20, 531 << 20, 4 << 30, 16 << 30}

// fakeMost bounds the sizes on a fake device.
const fakeMost = 128 << 20

func run(ctx context.Context, gpu, rounds int, most int64) (err error) {
	// Once without the arena, to learn how large it can be.
	var driver weights.Driver = weights.CUDA(gpu)
	d, err := weights.Open(driver, weights.Settings{})
	name := ""
	switch {
	case errors.Is(err, weights.ErrNoGPU):
		fmt.Fprintf(os.Stderr, "swap: %v; a fake device instead: the content is compared, the times are those of copies in memory\n", err)
		name, most = "fake", min(most, fakeMost)
		fake, err := weights.NewFake(weights.FakeConfig{Capacity: 3 * fakeMost})
		if err != nil {
			return err
		}
		defer fake.Close()
		driver = fake
	case err != nil:
		return err
	default:
		free, _, err := d.Memory()
		if err := errors.Join(err, d.Close()); err != nil {
			return err
		}
		// The content, the bare copy's and what the recycler holds.
		name, most = strings.ReplaceAll(d.Info().Name, " ", "_"), min(most, free/4)
	}
	d, err = weights.Open(driver, weights.Settings{Pinned: most + 64<<20, Recycled: most + most/4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	var worst, slowest pools.Swap
	for _, size := range sizes {
		if size > most {
			break
		}
		s, err := pools.MeasureSwap(ctx, d, size, rounds)
		if err != nil {
			return fmt.Errorf("%d bytes: %w", size, err)
		}
		fmt.Printf("%6d MiB: %v\n", size>>20, s)
		if worst.Size == 0 || s.Ratio() < worst.Ratio() {
			worst = s
		}
		if s.Out > slowest.Out {
			slowest = s
		}
	}
	if worst.Size == 0 {
		return fmt.Errorf("no size fits in %d bytes", most)
	}
	worst.Out = slowest.Out
	fmt.Printf("swap: device=%s %v\n", name, worst)
	return nil
}
