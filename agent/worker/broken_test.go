package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/compiled"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// brokenLimit bounds how long one broken file may take.
const brokenLimit = 5 * time.Second

// crafted are models that are broken on purpose.
func crafted() map[string]onnxwriter.Model {
	x, y := []onnxwriter.Value{onnxwriter.Float("x", 1, 4)}, []onnxwriter.Value{onnxwriter.Float("y", 1, 4)}
	shape := func(dims ...int64) onnxwriter.Weight {
		w := onnxwriter.Weight{Name: "shape", Type: tensor.Int64, Shape: []int64{int64(len(dims))}}
		for _, d := range dims {
			for b := range 8 {
				w.Data = append(w.Data, byte(d>>(8*b)))
			}
		}
		return w
	}
	external := func(location string) onnxwriter.Model {
		return onnxwriter.Model{Opset: 17, Inputs: x, Outputs: y,
			Nodes:   []onnxwriter.Node{{Op: "Add", In: []string{"x", "w"}, Out: []string{"y"}}},
			Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{1, 4}, External: location}}}
	}
	return map[string]onnxwriter.Model{
		"cycle of two": {Opset: 17, Inputs: x, Outputs: y, Nodes: []onnxwriter.Node{
			{Op: "Add", In: []string{"x", "b"}, Out: []string{"a"}}, {Op: "Relu", In: []string{"a"}, Out: []string{"b"}}, {Op: "Neg", In: []string{"b"}, Out: []string{"y"}}}},
		"cycle of one":       {Opset: 17, Inputs: x, Outputs: y, Nodes: []onnxwriter.Node{{Op: "Add", In: []string{"x", "y"}, Out: []string{"y"}}}},
		"value given twice":  {Opset: 17, Inputs: x, Outputs: y, Nodes: []onnxwriter.Node{{Op: "Neg", In: []string{"x"}, Out: []string{"y"}}, {Op: "Relu", In: []string{"x"}, Out: []string{"y"}}}},
		"value from nowhere": {Opset: 17, Inputs: x, Outputs: y, Nodes: []onnxwriter.Node{{Op: "Neg", In: []string{"ghost"}, Out: []string{"y"}}}},
		"no nodes":           {Opset: 17, Inputs: x, Outputs: y},
		"huge constant": {Opset: 17, Inputs: x, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, -1)}, Weights: []onnxwriter.Weight{shape(1<<20, 1<<20)},
			Nodes: []onnxwriter.Node{{Op: "ConstantOfShape", In: []string{"shape"}, Out: []string{"y"}}}},
		"overflowing constant": {Opset: 17, Inputs: x, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, -1)}, Weights: []onnxwriter.Weight{shape(1<<40, 1<<40)},
			Nodes: []onnxwriter.Node{{Op: "ConstantOfShape", In: []string{"shape"}, Out: []string{"y"}}}},
		"huge expansion": {Opset: 17, Inputs: x, Outputs: []onnxwriter.Value{onnxwriter.Float("y", -1, -1)}, Weights: []onnxwriter.Weight{shape(1<<28, 4)},
			Nodes: []onnxwriter.Node{{Op: "Expand", In: []string{"x", "shape"}, Out: []string{"y"}}}},
		"huge input": {Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", 1<<31, 1<<31)}, Outputs: []onnxwriter.Value{onnxwriter.Float("y", 1<<31, 1<<31)},
			Nodes: []onnxwriter.Node{{Op: "Neg", In: []string{"x"}, Out: []string{"y"}}}},
		"huge weight": {Opset: 17, Inputs: x, Outputs: y, Nodes: []onnxwriter.Node{{Op: "Add", In: []string{"x", "w"}, Out: []string{"y"}}},
			Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{1 << 31, 1 << 31}, Data: []byte{1, 2, 3, 4}}}},
		"external above":    external("../secret"),
		"external absolute": external("/etc/passwd"),
		"external missing":  external("missing"),
		"external link":     external("link"),
	}
}

// breakage changes the bytes of a file.
func breakage(r *rand.Rand, good []byte) ([]byte, string) {
	b := bytes.Clone(good)
	switch r.IntN(4) {
	case 0:
		n := r.IntN(len(b))
		return b[:n], fmt.Sprintf("cut at %d", n)
	case 1:
		n := 1 + r.IntN(8)
		for range n {
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		}
		return b, fmt.Sprintf("%d bits changed", n)
	case 2: // where the structure is, which weights hide
		at := r.IntN(min(len(b), 512))
		b[at] = byte(r.Uint32())
		return b, fmt.Sprintf("byte %d is %#x", at, b[at])
	default:
		from, to, n := r.IntN(len(b)), r.IntN(len(b)), 1+r.IntN(64)
		copy(b[to:], b[from:min(len(b), from+n)])
		return b, fmt.Sprintf("%d bytes of %d also at %d", n, from, to)
	}
}

// TestBrokenFiles gives broken files to the short-lived child: each ends as
// an error that names the version or as a success, in bounded time, and the
// parent lives. DUNLIN_BROKEN_CASES has it try so many files,
// DUNLIN_BROKEN_SEED others.
func TestBrokenFiles(t *testing.T) {
	cases, seed := 48, uint64(1)
	if v := os.Getenv("DUNLIN_BROKEN_CASES"); v != "" {
		cases, _ = strconv.Atoi(v)
	}
	if v := os.Getenv("DUNLIN_BROKEN_SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("seed %d, %d cases", seed, cases)
	cfg := testConfig(t, "")
	cfg.Log, cfg.CheckMemory, cfg.grace = nil, func() int64 { return 1 << 30 }, time.Second

	good := written(t, zoo.MLP(1).Model)
	ort := filepath.Join(t.TempDir(), "model.ort")
	if _, err := Compile(t.Context(), cfg, good, ort); err != nil {
		t.Fatal(err)
	}
	var bases [][]byte // the last one is compiled
	for _, path := range []string{filepath.Join(good.Dir, good.Entry), "../ort/testdata/types.onnx", "../ort/testdata/gather.onnx", "../ort/testdata/constant.onnx", ort} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bases = append(bases, b)
	}

	type broken struct {
		what, entry string
		bytes       []byte
	}
	var all []broken
	models := crafted()
	for what, g := range models {
		all = append(all, broken{what, "model.onnx", g.Marshal()})
	}
	for n := range cases {
		r := rand.New(rand.NewPCG(seed, uint64(n)))
		base, entry := r.IntN(len(bases)), "model.onnx"
		if n%3 == 0 {
			base = len(bases) - 1
		}
		if base == len(bases)-1 {
			entry = "model.ort"
		}
		b, what := breakage(r, bases[base])
		all = append(all, broken{fmt.Sprintf("case %d, base %d, %s", n, base, what), entry, b})
	}
	var errs, deaths, late, fine atomic.Int32
	var wg sync.WaitGroup
	queue := make(chan broken)
	for range 2 {
		wg.Go(func() {
			for c := range queue {
				dir := t.TempDir()
				s := engine.Spec{ID: engine.VersionID{Model: "broken", Version: 7}, Dir: filepath.Join(dir, "model"), Entry: c.entry}
				err := errors.Join(os.Mkdir(s.Dir, 0o700), os.WriteFile(filepath.Join(s.Dir, c.entry), c.bytes, 0o600),
					os.WriteFile(filepath.Join(dir, "secret"), make([]byte, 16), 0o600), os.Symlink("../secret", filepath.Join(s.Dir, "link")))
				if err != nil {
					t.Error(err)
					continue
				}
				ctx, cancel := context.WithTimeout(t.Context(), brokenLimit)
				began := time.Now()
				if c.entry == "model.ort" {
					_, err = Check(ctx, cfg, s)
				} else {
					_, err = Compile(ctx, cfg, s, filepath.Join(dir, "out.ort"))
				}
				took := time.Since(began)
				cancel()
				_, died := errors.AsType[*DeathError](err)
				switch {
				case err == nil:
					fine.Add(1)
				case errors.Is(err, context.DeadlineExceeded):
					late.Add(1)
				case died:
					deaths.Add(1)
				default:
					errs.Add(1)
				}
				if took > 2*brokenLimit {
					t.Errorf("%s: took %v", c.what, took)
				}
				if err != nil && !strings.Contains(err.Error(), s.ID.String()) {
					t.Errorf("%s: the error does not name the version: %v", c.what, err)
				}
				if err == nil && strings.HasPrefix(c.what, "external") {
					t.Errorf("%s: it was read", c.what)
				}
				if _, known := models[c.what]; known || died {
					t.Logf("%s: %v", c.what, err)
				}
			}
		})
	}
	for _, c := range all {
		queue <- c
	}
	close(queue)
	wg.Wait()
	t.Logf("%d errors, %d deaths, %d not done within %v, %d fine", errs.Load(), deaths.Load(), late.Load(), brokenLimit, fine.Load())
	if _, err := Compile(t.Context(), cfg, good, filepath.Join(t.TempDir(), "model.ort")); err != nil {
		t.Errorf("after them, a good one: %v", err)
	}
}

// TestBrokenCache breaks compiled files in the cache: none is given out.
func TestBrokenCache(t *testing.T) {
	const seed, cases = 2, 60
	t.Logf("seed %d", seed)
	dir := t.TempDir()
	key := compiled.Key{Model: "mlp"}
	cfg := testConfig(t, "")
	cache, err := compiled.Open(dir, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	e, err := cache.Put(t.Context(), key, func(dir string) (compiled.Model, error) {
		c, err := Compile(t.Context(), cfg, written(t, zoo.MLP(1).Model), filepath.Join(dir, compiled.FileName))
		return compiled.Model{Inputs: c.Info.Inputs, Outputs: c.Info.Outputs, Batch: c.Info.Batch, Need: c.Need, Prepack: c.Prepack}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(e.File)
	if err != nil {
		t.Fatal(err)
	}
	e.Release()
	put := func(dir string) (compiled.Model, error) {
		return e.Model, os.WriteFile(filepath.Join(dir, compiled.FileName), good, 0o600)
	}
	for n := range cases {
		b, what := breakage(rand.New(rand.NewPCG(seed, uint64(n))), good)
		if slices.Equal(b, good) {
			continue
		}
		if err := os.WriteFile(e.File, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if cache, err = compiled.Open(dir, 1<<30); err != nil {
			t.Fatal(err)
		}
		if got, err := cache.Get(t.Context(), key); !errors.Is(err, compiled.ErrNone) || err == compiled.ErrNone {
			t.Errorf("case %d, %s: %v, %v", n, what, got, err)
		}
		again, err := cache.Put(t.Context(), key, put)
		if err != nil {
			t.Fatal(err)
		}
		again.Release()
	}
}
