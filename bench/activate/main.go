// Command activate measures what the first answer of a model costs whose
// weights are out: mapped from the file that was compiled for this machine,
// against a session of its .onnx file.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

const (
	seed = 1
	// packedFaster is how much faster prepacked weights have to be for the
	// session to be replaced, as worker.Compile has it.
	packedFaster = 1.02
)

func main() {
	rounds := flag.Int("rounds", 7, "activations of each net each way; the median counts")
	pairs := flag.Int("pairs", 31, "pairs of steady runs of each net; the median counts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *pairs); err != nil {
		fmt.Fprintln(os.Stderr, "activate:", err)
		os.Exit(1)
	}
}

// figures are those of one net, in milliseconds, medians.
type figures struct {
	plain, mapped float64 // cost of the first answer
	least         float64 // that of mapped, of the fastest of all runs: what a busy machine adds is not in it
	steady        float64 // a run of a plain session
	verify        float64 // of the compiled file
	ratio         float64 // of the session that stays to a plain one
	packed        bool    // that one has prepacked weights
}

func run(ctx context.Context, rounds, pairs int) error {
	if err := ort.Init(os.Getenv("DUNLIN_ORT_LIB"), 0); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dunlin-activate-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	worst, steady, vgg := 0.0, 0.0, figures{}
	fmt.Printf("%-10s %12s %12s %10s %10s %10s %10s %8s\n", "net", "plain_ms", "mapped_ms", "least_ms", "run_ms", "verify_ms", "prepacked", "steady")
	for _, n := range zoo.Nets(seed) {
		f, err := measure(ctx, dir, n, rounds, pairs)
		if err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
		fmt.Printf("%-10s %12.2f %12.2f %10.2f %10.3f %10.1f %10t %8.3f\n", n.Name, f.plain, f.mapped, f.least, f.steady, f.verify, f.packed, f.ratio)
		worst, steady = max(worst, f.mapped), max(steady, f.ratio)
		if n.Name == "vgg11" {
			vgg = f
		}
	}
	fmt.Printf("activate: vgg11_ratio=%.1f vgg11_first_ms=%.1f worst_first_ms=%.1f steady_ratio=%.3f\n",
		vgg.plain/vgg.mapped, vgg.mapped, worst, steady)
	return nil
}

// measure compiles a net into a cache and activates it both ways in turn.
func measure(ctx context.Context, root string, n zoo.Net, rounds, pairs int) (f figures, err error) {
	dir := filepath.Join(root, n.Name)
	entry := n.Name + ".onnx"
	if err := os.Mkdir(dir, 0o700); err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := n.WriteFile(filepath.Join(dir, entry)); err != nil {
		return f, err
	}
	key := compiled.Key{Model: n.Name}
	cache, err := compiled.Open(filepath.Join(dir, "cache"), 4<<30)
	if err != nil {
		return f, err
	}
	e, err := cache.Put(ctx, key, func(to string) (compiled.Model, error) {
		return compiled.Model{}, ort.Compile(ctx, dir, entry, filepath.Join(to, compiled.FileName))
	})
	if err != nil {
		return f, err
	}
	e.Release()
	// As the next process finds it.
	if cache, err = compiled.Open(filepath.Join(dir, "cache"), 4<<30); err != nil {
		return f, err
	}
	began := time.Now()
	if e, err = cache.Get(ctx, key); err != nil {
		return f, err
	}
	defer e.Release()
	f.verify = ms(time.Since(began))

	in := input(n.Input())
	plain := func() (*ort.Session, error) { return ort.Open(ctx, dir, entry, ort.Setting{}) }
	mapped := func() (*ort.Session, error) { return ort.OpenCompiled(ctx, e.File, ort.Setting{}) }
	var firsts [2][]float64
	var runs []float64
	for range rounds {
		for way, open := range []func() (*ort.Session, error){plain, mapped} {
			first, steady, err := activate(ctx, open, in)
			if err != nil {
				return f, err
			}
			firsts[way] = append(firsts[way], first)
			if way == 0 {
				runs = append(runs, steady)
			}
		}
	}
	f.steady = median(runs)
	f.least = slices.Min(firsts[1]) - slices.Min(runs)
	f.plain, f.mapped = median(firsts[0])-f.steady, median(firsts[1])-f.steady

	faster, err := compare(ctx, mapped, func() (*ort.Session, error) { return ort.OpenCompiled(ctx, e.File, ort.Setting{Prepack: true}) }, in, min(pairs, 15))
	if err != nil {
		return f, err
	}
	f.packed = faster > packedFaster
	f.ratio, err = compare(ctx, func() (*ort.Session, error) { return ort.OpenCompiled(ctx, e.File, ort.Setting{Prepack: f.packed}) }, plain, in, pairs)
	return f, err
}

// activate gives the time from nothing to the first answer, and that of a
// later run.
func activate(ctx context.Context, open func() (*ort.Session, error), in []tensor.Tensor) (first, steady float64, err error) {
	began := time.Now()
	s, err := open()
	if err != nil {
		return 0, 0, err
	}
	defer s.Close()
	if _, err := timed(ctx, s, in); err != nil {
		return 0, 0, err
	}
	first = ms(time.Since(began))
	var runs []float64
	for range 3 {
		took, err := timed(ctx, s, in)
		if err != nil {
			return 0, 0, err
		}
		runs = append(runs, took)
	}
	return first, median(runs), nil
}

// compare gives the median of how much longer a run of a takes than one of b
// right after it.
func compare(ctx context.Context, a, b func() (*ort.Session, error), in []tensor.Tensor, pairs int) (float64, error) {
	var sessions [2]*ort.Session
	for i, open := range []func() (*ort.Session, error){a, b} {
		s, err := open()
		if err != nil {
			return 0, err
		}
		defer s.Close()
		sessions[i] = s
	}
	var ratios []float64
	for n := range pairs + 2 {
		var took [2]float64
		for i := range sessions {
			i = (i + n) % 2 // neither is always the first
			var err error
			if took[i], err = timed(ctx, sessions[i], in); err != nil {
				return 0, err
			}
		}
		if n >= 2 {
			ratios = append(ratios, took[0]/took[1])
		}
	}
	return median(ratios), nil
}

func timed(ctx context.Context, s *ort.Session, in []tensor.Tensor) (float64, error) {
	began := time.Now()
	err := s.Run(ctx, in, nil, func([]tensor.Tensor) error { return nil })
	return ms(time.Since(began)), err
}

// input gives one row.
func input(info tensor.Info) []tensor.Tensor {
	shape := slices.Clone(info.Shape)
	shape[0] = 1
	count, err := tensor.Elements(shape)
	if err != nil {
		panic(err)
	}
	var data []byte
	for i := range count {
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(math.Sin(float64(i)))))
	}
	return []tensor.Tensor{{Name: info.Name, Type: info.Type, Shape: shape, Data: data}}
}

func median(all []float64) float64 {
	all = slices.Clone(all)
	slices.Sort(all)
	return all[len(all)/2]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
