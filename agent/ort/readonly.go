package ort

// #include <stdlib.h>
// #include "readonly.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"unsafe"

	binding "github.com/yalue/onnxruntime_go"

	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
)

// Placement says where a session runs.
type Placement struct {
	// CUDA has it run on the GPU Device, by the CUDA provider, which has to
	// lie beside the runtime's library; otherwise it runs on the CPU.
	CUDA   bool
	Device int
	// Limit bounds the bytes of the GPU that the session works in, apart from
	// its weights; 0 for none. What Session.Run has worked in beyond what the
	// session began with is given back after each run.
	Limit int64
}

// OpenPooled loads a model as Open does, with its weights in a pool of the
// device that it runs on: the GPU's, or for the CPU a fake device's. On the
// CPU only prepacked weights are there: the runtime reads others where they
// were loaded, even if it has allocated memory for them. The pool is to be
// captured then; its content may leave while the session does not run, and the
// session has to be closed before it.
func OpenPooled(ctx context.Context, dir, entry string, pool *weights.Pool, place Placement) (*Session, error) {
	if !filepath.IsLocal(entry) {
		return nil, fmt.Errorf("open model: entry %q leaves the model's folder", entry)
	}
	path := filepath.Join(dir, entry)
	s, _, err := openPooled(ctx, path, pool, place, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		return binding.NewDynamicAdvancedSession(path, nil, nil, o)
	})
	if err != nil {
		return nil, fmt.Errorf("open model: %w", err)
	}
	return s, nil
}

// openPooled has f make the session, and gives how many allocations the pool
// was asked for.
func openPooled(ctx context.Context, path string, pool *weights.Pool, place Placement, f func(*binding.SessionOptions) (*binding.DynamicAdvancedSession, error)) (*Session, int, error) {
	kind := "Cpu"
	if place.CUDA {
		kind = "Cuda"
	}
	name := C.CString(kind)
	defer C.free(unsafe.Pointer(name))
	if err := check(C.ort_readonly_register(name, C.int(place.Device))); err != nil {
		return nil, 0, fmt.Errorf("register an allocator of weights: %w", err)
	}
	memory := pool.Memory()
	if memory == nil {
		return nil, 0, fmt.Errorf("pool: %w", weights.ErrClosed)
	}
	// The runtime allocates weights in the thread that makes the session.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	C.ort_readonly_use((*C.struct_weights_memory)(memory))
	defer C.ort_readonly_use(nil)
	entries := map[string]string{"session.use_env_allocators": "1"}
	if place.CUDA {
		// Weights that nothing is going to replace are allocated in one piece.
		entries["session.disable_prepacking"] = "1"
	}
	var provider error
	session, err := create(ctx, path, 0, entries, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		if place.CUDA {
			if provider = addCUDA(o, place); provider != nil {
				return nil, provider
			}
		}
		return f(o)
	})
	if err != nil {
		if provider != nil {
			err = fmt.Errorf("CUDA provider: %s", clean(provider.Error()))
		}
		if refused := pool.Refused(); refused != nil {
			err = fmt.Errorf("%w: %w", err, refused)
		}
		return nil, 0, err
	}
	var blocks, bytes C.size_t
	C.ort_readonly_count(&blocks, &bytes)
	s, err := newSession(session, nil)
	Trim()
	if err == nil && place.CUDA {
		s.shrink = fmt.Sprintf("gpu:%d", place.Device)
	}
	return s, int(blocks), err
}

// shrinkAfter has a run give back what the named arenas have grown by.
func shrinkAfter(o *binding.RunOptions, arenas string) error {
	value := C.CString(arenas)
	defer C.free(unsafe.Pointer(value))
	return check(C.ort_shrink_after(runOptionsPointer(o), value))
}

// addCUDA has a session run by the CUDA provider.
func addCUDA(o *binding.SessionOptions, place Placement) error {
	cuda, err := binding.NewCUDAProviderOptions()
	if err != nil {
		return err
	}
	defer cuda.Destroy()
	options := map[string]string{
		"device_id": strconv.Itoa(place.Device),
		// What a session works in grows by what is needed, and copies are in
		// the order of its stream.
		"arena_extend_strategy":     "kSameAsRequested",
		"do_copy_in_default_stream": "1",
	}
	if place.Limit > 0 {
		options["gpu_mem_limit"] = strconv.FormatInt(place.Limit, 10)
	}
	if err := cuda.Update(options); err != nil {
		return err
	}
	return o.AppendExecutionProviderCUDA(cuda)
}

// Pooling says whether the runtime puts weights into a pool, and why not.
type Pooling struct {
	Device string // the GPU's name; "" for the CPU
	Works  bool
	Reason string // "" where it works
}

// ProbePooling opens a small model with its weights in a pool, runs it, takes
// its weights out and in, and runs it again: on the first GPU, or, where there
// is none, on the CPU. Init must have succeeded. A runtime that does it badly
// may kill the process.
func ProbePooling(ctx context.Context) Pooling {
	d, err := weights.Open(weights.CUDA(0), weights.Settings{})
	if errors.Is(err, weights.ErrNoGPU) {
		fake, err := weights.NewFake(weights.FakeConfig{Capacity: 16 << 20})
		if err == nil {
			defer fake.Close()
			err = probe(ctx, fake, Placement{})
		}
		return pooling("", err)
	}
	if err != nil {
		return pooling("GPU 0", err)
	}
	name := d.Info().Name
	if err := d.Close(); err != nil {
		return pooling(name, err)
	}
	return pooling(name, probe(ctx, weights.CUDA(0), Placement{CUDA: true}))
}

func pooling(device string, err error) Pooling {
	if err != nil {
		return Pooling{Device: device, Reason: err.Error()}
	}
	return Pooling{Device: device, Works: true}
}

// ProbeBytes are the addresses that a pool for ProbePool has.
const ProbeBytes = 64 << 20

// probed is the width of the probe's weights.
const probed = 64

func probe(ctx context.Context, driver weights.Driver, place Placement) (err error) {
	device, err := weights.Open(driver, weights.Settings{Recycled: 8 << 20})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, device.Close()) }()
	pool, err := device.NewPool(ProbeBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	return ProbePool(ctx, pool, place)
}

// ProbePool is ProbePooling for an empty pool of ProbeBytes, in the place to
// which it belongs. Its error says why the runtime does not put weights there.
// The pool is to be closed afterwards.
func ProbePool(ctx context.Context, pool *weights.Pool, place Placement) error {
	s, blocks, err := openPooled(ctx, "probe", pool, place, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		return binding.NewDynamicAdvancedSessionWithONNXData(probeModel(), nil, nil, o)
	})
	if err != nil {
		return err
	}
	defer s.Close()
	if used := pool.Stats().Used; blocks == 0 || used < 4*probed*probed {
		return fmt.Errorf("ONNX Runtime %s put %d of %d bytes of weights into the allocator for them", Version(), used, 4*probed*probed)
	}
	before, err := probeRun(ctx, s)
	if err != nil {
		return err
	}
	if err := errors.Join(pool.Capture(), pool.Write(pool.Base(), make([]byte, 4*probed*probed))); err != nil {
		return err
	}
	zeroed, err := probeRun(ctx, s)
	if err != nil {
		return err
	}
	if zeroed == before {
		return fmt.Errorf("ONNX Runtime %s reads weights elsewhere than where it has allocated memory for them", Version())
	}
	if err := errors.Join(pool.Out(), pool.In(ctx)); err != nil {
		return err
	}
	after, err := probeRun(ctx, s)
	if err == nil && before != after {
		err = errors.New("the model answers differently after its weights were out")
	}
	return err
}

// probeModel multiplies a row by a matrix.
func probeModel() []byte {
	data := make([]byte, 4*probed*probed)
	for i := range data {
		data[i] = byte(i*i%61 + 1) // small numbers, whatever their exponent
		if i%4 == 3 {
			data[i] = 0x3c
		}
	}
	value := func(name string) []onnxwriter.Value {
		return []onnxwriter.Value{{Name: name, Type: tensor.Float32, Shape: []int64{1, probed}}}
	}
	return onnxwriter.Model{
		Opset: 17, Inputs: value("x"), Outputs: value("y"),
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{probed, probed}, Data: data}},
		Nodes:   []onnxwriter.Node{{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"y"}}},
	}.Marshal()
}

func probeRun(ctx context.Context, s *Session) (answer string, err error) {
	in := make([]byte, 4*probed)
	for i := range in {
		in[i] = 0x3c // 0.0115
	}
	err = s.Run(ctx, []tensor.Tensor{{Name: "x", Type: tensor.Float32, Shape: []int64{1, probed}, Data: in}}, nil,
		func(out []tensor.Tensor) error { answer = string(out[0].Data); return nil })
	return answer, err
}
