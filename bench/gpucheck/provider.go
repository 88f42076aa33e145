package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/tensor"
)

// tolerance is how far answers of GPU and CPU may lie apart, as a part of the
// largest.
const tolerance = 0.02

// checkProvider runs the zoo's nets by the CUDA provider, whose library lies in
// folder beside ONNX Runtime's own, with their weights out and in between.
func checkProvider(ctx context.Context, folder string, out io.Writer) error {
	libraries, err := filepath.Glob(filepath.Join(folder, "libonnxruntime.so*"))
	if err != nil {
		return err
	}
	if len(libraries) == 0 {
		return fmt.Errorf("no libonnxruntime.so in %s: the runtime looks for its providers beside itself", folder)
	}
	if err := ort.Init(libraries[len(libraries)-1], 0); err != nil {
		return err
	}
	pooling := ort.ProbePooling(ctx)
	fmt.Fprintf(out, "provider: ONNX Runtime %s; weights in pools: %v %s\n", ort.Version(), pooling.Works, pooling.Reason)
	if !pooling.Works {
		return errors.New("the runtime does not put weights into pools")
	}
	dir, err := os.MkdirTemp("", "dunlin-gpucheck-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var failed error
	for _, n := range zoo.Nets(1) {
		if err := checkNet(ctx, weights.CUDA(0), ort.Placement{CUDA: true}, dir, n, out); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", n.Name, err))
		}
	}
	return failed
}

// checkNet runs a net with its weights on a device.
func checkNet(ctx context.Context, driver weights.Driver, place ort.Placement, dir string, n zoo.Net, out io.Writer) (err error) {
	entry := n.Name + ".onnx"
	if err := n.WriteFile(filepath.Join(dir, entry)); err != nil {
		return err
	}
	defer os.Remove(filepath.Join(dir, entry))
	in := input(n)
	plain, err := ort.Open(ctx, dir, entry, ort.Setting{})
	if err != nil {
		return err
	}
	want, err := answer(ctx, plain, in)
	plain.Close()
	if err != nil {
		return err
	}
	image := 4*n.Parameters() + 64<<20
	d, err := weights.Open(driver, weights.Settings{Pinned: image})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	p, err := d.NewPool(2 * image)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	before, _, err := d.Memory()
	if err != nil {
		return err
	}
	s, err := ort.OpenPooled(ctx, dir, entry, p, place)
	if err != nil {
		return err
	}
	defer s.Close()
	first, err := answer(ctx, s, in)
	if err != nil {
		return err
	}
	after, _, err := d.Memory()
	if err != nil {
		return err
	}
	if apart := distance(want, first); !(apart <= tolerance) {
		return fmt.Errorf("answers of GPU and CPU lie %.3g of the largest apart, more than %g", apart, tolerance)
	}
	if err := p.Capture(); err != nil {
		return err
	}
	stats := p.Stats()
	if stats.Used < 4*n.Parameters()*9/10 {
		return fmt.Errorf("%d bytes in the pool, of %d of weights", stats.Used, 4*n.Parameters())
	}
	var left, came, ran time.Duration
	for range 5 {
		start := time.Now()
		if err := p.Out(); err != nil {
			return err
		}
		left = time.Since(start)
		start = time.Now()
		if err := p.In(ctx); err != nil {
			return err
		}
		came = time.Since(start)
		start = time.Now()
		again, err := answer(ctx, s, in)
		if err != nil {
			return err
		}
		ran = time.Since(start)
		// The GPU may sum in another order from run to run, hence not to the bit
		// where it did not without the swap either.
		if !bytes.Equal(first, again) {
			once, err := answer(ctx, s, in)
			if err != nil {
				return err
			}
			if bytes.Equal(again, once) || !(distance(first, again) <= tolerance) {
				return errors.New("the answer has changed after the weights were out")
			}
		}
	}
	fmt.Fprintf(out, "provider: %s: %d MiB of weights in %d chunks; session beyond them %d MiB; out %.2f ms, in %.2f ms, run %.2f ms\n",
		n.Name, stats.Image>>20, stats.Chunks, (before-after-stats.Mapped)>>20, ms(left), ms(came), ms(ran))
	return nil
}

func ms(d time.Duration) float64 { return d.Seconds() * 1e3 }

func input(n zoo.Net) tensor.Tensor {
	i := n.Input()
	shape := slices.Clone(i.Shape)
	shape[0] = 1
	count, _ := tensor.Elements(shape)
	r := rand.New(rand.NewPCG(1, 1))
	t := tensor.Tensor{Name: i.Name, Type: i.Type, Shape: shape}
	for range count {
		t.Data = binary.LittleEndian.AppendUint32(t.Data, math.Float32bits(2*r.Float32()-1))
	}
	return t
}

func answer(ctx context.Context, s *ort.Session, in tensor.Tensor) (data []byte, err error) {
	err = s.Run(ctx, []tensor.Tensor{in}, nil, func(out []tensor.Tensor) error {
		data = bytes.Clone(out[0].Data)
		return nil
	})
	return data, err
}

// distance gives how far FP32 values lie apart at most, as a part of the
// largest; NaN for values that are none.
func distance(a, b []byte) float64 {
	if len(a) != len(b) {
		return math.NaN()
	}
	var most, apart float64
	for i := 0; i+4 <= len(a); i += 4 {
		x := float64(math.Float32frombits(binary.LittleEndian.Uint32(a[i:])))
		y := float64(math.Float32frombits(binary.LittleEndian.Uint32(b[i:])))
		most, apart = max(most, math.Abs(x)), max(apart, math.Abs(x-y))
	}
	return apart / most
}
