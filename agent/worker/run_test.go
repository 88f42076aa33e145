package worker

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/tensor"
)

// release gives an outcome's memory back.
func release(out engine.Outcome) {
	if out.Release != nil {
		out.Release()
	}
}

// TestBatches runs several requests together, of every type, and holds each
// one's outputs against those of its own run.
func TestBatches(t *testing.T) {
	const seed = 3
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	cfg := testConfig(t, "")
	cfg.SharedBytes = 8 << 20
	w := start(t, cfg)
	id, info := load(t, w, "types.onnx")
	if !info.Batch {
		t.Errorf("%+v", info)
	}
	for _, largest := range []int{4, 300, 20_000} {
		for range 10 {
			requests := make([][]tensor.Tensor, 1+r.IntN(5))
			for q := range requests {
				rows := int64(r.IntN(largest + 1))
				for _, typ := range types(info) {
					requests[q] = append(requests[q], sample("in_"+typ.String(), typ, []int64{rows}))
				}
				r.Shuffle(len(requests[q]), func(i, j int) { requests[q][i], requests[q][j] = requests[q][j], requests[q][i] })
			}
			outputs := []string{"out_BYTES", "out_FP16", "out_BOOL", "out_INT64"}
			if r.IntN(2) == 0 {
				outputs = nil
			}
			out, err := w.Run(t.Context(), id, requests, outputs)
			if err != nil {
				t.Fatal(err)
			}
			if len(out.Outputs) != len(requests) {
				t.Fatalf("%d answers for %d requests", len(out.Outputs), len(requests))
			}
			for q := range requests {
				want, err := one(t.Context(), w, id, requests[q], outputs)
				if err != nil || !reflect.DeepEqual(out.Outputs[q], want) {
					t.Errorf("request %d of %d, %d rows: outputs differ from those of its own run, or %v", q, len(requests), requests[q][0].Shape[0], err)
				}
			}
			release(out)
		}
	}
}

func TestBatchesRefused(t *testing.T) {
	w := start(t, testConfig(t, ""))
	add, info := load(t, w, "add.onnx")
	if info.Batch {
		t.Error("a model with a weight among its inputs has batches")
	}
	gather, _ := load(t, w, "gather.onnx")
	relu, _ := load(t, w, "digits-size.onnx")
	sum, _ := load(t, w, "sum.onnx")
	scalars, _ := load(t, w, "scalars.onnx")
	index := sample("i", tensor.Int64, []int64{1})
	index.Data = make([]byte, 8)
	pair := floats("x", 1, 1, 2)
	wrong := floats("x", 1, 1, 64)
	wrong.Type = tensor.Int32
	short := floats("x", 1, 1, 64)
	short.Data = short.Data[:255]
	digit := []tensor.Tensor{floats("x", 1, 1, 64)}
	var scalar []tensor.Tensor
	for _, i := range info.Inputs {
		scalar = append(scalar, sample(i.Name, i.Type, i.Shape))
	}
	for name, tt := range map[string]struct {
		id       engine.VersionID
		requests [][]tensor.Tensor
		want     error
	}{
		"no request":       {relu, nil, engine.ErrInvalidInput},
		"a sum":            {sum, [][]tensor.Tensor{{floats("x", 1, 1, 2)}, {floats("x", 1, 3, 2)}}, engine.ErrRows},
		"scalars":          {scalars, [][]tensor.Tensor{scalar, scalar}, engine.ErrInvalidInput},
		"unequal rows":     {gather, [][]tensor.Tensor{{floats("x", 1, 3, 2), index}, {pair, index}}, engine.ErrInvalidInput},
		"not rows":         {add, [][]tensor.Tensor{{floats("a", 1, 1, 2), floats("b", 1, 2, 2)}, {floats("a", 1, 1, 2), floats("b", 1, 2, 2)}}, engine.ErrInvalidInput},
		"another shape":    {relu, [][]tensor.Tensor{digit, {floats("x", 1, 1, 63)}}, engine.ErrInvalidInput},
		"another rank":     {relu, [][]tensor.Tensor{digit, {floats("x", 1, 1, 64, 1)}}, engine.ErrInvalidInput},
		"another type":     {relu, [][]tensor.Tensor{digit, {wrong}}, engine.ErrInvalidInput},
		"short data":       {relu, [][]tensor.Tensor{digit, {short}}, engine.ErrInvalidInput},
		"another name":     {relu, [][]tensor.Tensor{digit, {floats("y", 1, 1, 64)}}, engine.ErrInvalidInput},
		"a missing input":  {gather, [][]tensor.Tensor{{pair, index}, {pair}}, engine.ErrInvalidInput},
		"one given twice":  {gather, [][]tensor.Tensor{{pair, pair}}, engine.ErrInvalidInput},
		"one too many":     {relu, [][]tensor.Tensor{digit, {digit[0], digit[0]}}, engine.ErrInvalidInput},
		"refused together": {relu, [][]tensor.Tensor{{floats("x", 1, 1, 63)}, {floats("x", 1, 1, 63)}}, engine.ErrInvalidInput},
	} {
		out, err := w.Run(t.Context(), tt.id, tt.requests, nil)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %d outcomes, %v", name, len(out.Outputs), err)
		}
	}
	if out, err := w.Run(t.Context(), sum, [][]tensor.Tensor{{pair}}, nil); err != nil {
		t.Errorf("a sum alone: %v", err)
	} else {
		release(out)
	}
}

// TestOutputsNobodyWrites has outputs that are inputs or constants: the places
// that they were given before hold nothing.
func TestOutputsNobodyWrites(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "constant.onnx")
	for _, rows := range []int64{1, 2, 100} {
		in := []tensor.Tensor{floats("x", 1, rows, 2048)}
		for range 3 {
			got, err := one(t.Context(), w, id, in, nil)
			if want := inProcess(t, spec(t, "constant.onnx"), in, nil); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%d rows: the child's outputs differ from those in-process, or %v", rows, err)
			}
		}
	}
}

// TestSurprise has outputs of other shapes than the model says.
func TestSurprise(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, info := load(t, w, "gather.onnx")
	if !info.Batch {
		t.Fatalf("%+v", info)
	}
	index := tensor.Tensor{Name: "i", Type: tensor.Int64, Shape: []int64{5000}, Data: make([]byte, 40_000)}
	in := []tensor.Tensor{floats("x", 1, 2000, 2), index}
	for range 3 {
		got, err := one(t.Context(), w, id, in, nil)
		if want := inProcess(t, spec(t, "gather.onnx"), in, nil); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("the child's outputs differ from those in-process, or %v", err)
		}
	}
	binary.LittleEndian.PutUint64(index.Data, 1<<40)
	if _, err := one(t.Context(), w, id, in, nil); err == nil || !strings.Contains(err.Error(), "idx") {
		t.Errorf("an index outside the matrix: %v", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.loaded[id].surprising.Load() {
		t.Error("the worker goes on expecting")
	}
}

// TestLending keeps outcomes for long: what is lent stays as it is, and there
// is room for other runs.
func TestLending(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.SharedBytes = 32 * slotUnit
	w := start(t, cfg)
	id, _ := load(t, w, "digits-size.onnx")
	x := []tensor.Tensor{floats("x", 1, 300, 64)} // a slot of three units, with the outputs
	want := inProcess(t, spec(t, "digits-size.onnx"), x, nil)
	var kept []engine.Outcome
	lent := 0
	for range 20 {
		out, err := w.Run(t.Context(), id, [][]tensor.Tensor{x}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if out.Release != nil {
			lent++
		}
		kept = append(kept, out)
	}
	if lent != 5 { // 15 of 32 units
		t.Errorf("%d of %d outcomes are lent", lent, len(kept))
	}
	p := child(t, w)
	p.region.mu.Lock()
	if p.region.slots != lent || p.region.lent != uint64(lent)*3*slotUnit {
		t.Errorf("%d slots taken, %d bytes lent", p.region.slots, p.region.lent)
	}
	p.region.mu.Unlock()
	// The child and its region go; what is lent stays.
	p.command.Process.Kill()
	<-p.dead
	if out, err := w.Run(t.Context(), id, [][]tensor.Tensor{x}, nil); err != nil || out.Release == nil {
		t.Errorf("on the next child: %v", err)
	} else {
		kept = append(kept, out)
	}
	for i, out := range kept {
		if !reflect.DeepEqual(out.Outputs[0], want) {
			t.Errorf("outcome %d has changed", i)
		}
		release(out)
	}
	p.region.mu.Lock()
	defer p.region.mu.Unlock()
	if p.region.memory != nil || p.region.slots != 0 || p.region.lent != 0 {
		t.Errorf("the dead child's region is still there: %d slots, %d bytes lent", p.region.slots, p.region.lent)
	}
}

// TestMemfd has runs that find no slot: their outputs are lent too.
func TestMemfd(t *testing.T) {
	cfg := testConfig(t, "")
	cfg.SharedBytes = slotUnit
	w := start(t, cfg)
	before := 0
	for i, entry := range []string{"any-rank.onnx", "digits-size.onnx"} {
		id, _ := load(t, w, entry)
		for _, rows := range []int64{1, 50, 300, 5000, 1} {
			x := []tensor.Tensor{floats("x", 1, rows, 64)}
			out, err := w.Run(t.Context(), id, [][]tensor.Tensor{x, x}, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := inProcess(t, spec(t, entry), x, nil)
			for _, got := range out.Outputs {
				if !reflect.DeepEqual(got, want) {
					t.Errorf("%s, %d rows: the child's outputs differ from those in-process", entry, rows)
				}
			}
			release(out)
		}
		if i == 0 {
			before = descriptors(t)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// TestTimes adds a run's times up.
func TestTimes(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "chain.onnx")
	x := [][]tensor.Tensor{{floats("x", 1, 200, 200)}}
	began := time.Now()
	out, err := w.Run(t.Context(), id, x, nil)
	took := time.Since(began)
	if err != nil {
		t.Fatal(err)
	}
	release(out)
	all := out.Input + out.Infer + out.Output
	if out.Input <= 0 || out.Infer <= 0 || out.Output <= 0 || all > took || out.Infer < took/2 {
		t.Errorf("input %v, infer %v, output %v; %v in all", out.Input, out.Infer, out.Output, took)
	}
}

// TestCancelBatches cancels runs of several requests at random moments, from
// before they begin until they are over.
func TestCancelBatches(t *testing.T) {
	const seed = 11
	t.Logf("seed %d", seed)
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "chain.onnx")
	p := child(t, w)
	x := [][]tensor.Tensor{{floats("x", 1, 32, 64)}, {floats("x", 2, 32, 64)}}
	var wg sync.WaitGroup
	var cancelled, finished atomic.Int64
	for g := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, g))
			for range 100 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(4000))*time.Microsecond)
				out, err := w.Run(ctx, id, x, nil)
				cancel()
				switch {
				case err == nil:
					release(out)
					finished.Add(1)
				case errors.Is(err, context.DeadlineExceeded):
					cancelled.Add(1)
				default:
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d cancelled, %d finished", cancelled.Load(), finished.Load())
	if cancelled.Load() == 0 {
		t.Error("none was cancelled")
	}
	if out, err := w.Run(t.Context(), id, x, nil); err != nil || child(t, w) != p {
		t.Errorf("after it: %v", err)
	} else {
		release(out)
	}
}

// TestCancelLong cancels a run that would take long: it ends at once, and the
// child works on.
func TestCancelLong(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "chain.onnx")
	p := child(t, w)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("nobody waits any more")
	began := time.Now()
	finished := make(chan error)
	go func() {
		_, err := w.Run(ctx, id, [][]tensor.Tensor{{floats("x", 1, 1000, 1000)}}, nil)
		finished <- err
	}()
	until(t, "the run to begin", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.running > 0
	})
	cancel(reason)
	if err := <-finished; err != reason {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	if child(t, w) != p {
		t.Error("the child has died")
	}
}

// TestManyLanes has more runs than lanes, on a child that is stopped and goes
// on: all are answered, and no more lanes are open than there may be.
func TestManyLanes(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "digits-size.onnx")
	p := child(t, w)
	p.command.Process.Signal(syscall.SIGSTOP)
	var wg sync.WaitGroup
	for range 2 * maxRunning {
		wg.Go(func() {
			if _, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 1, 64)}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	running := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.running
	}
	until(t, "runs to begin", func() bool { return running() == maxRunning })
	p.command.Process.Signal(syscall.SIGCONT)
	wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.lanes) != maxRunning || len(p.free) != maxRunning || p.running != 0 {
		t.Errorf("%d lanes, %d of them free, %d running", len(p.lanes), len(p.free), p.running)
	}
}

// TestPriority has all of the child's threads nicer than this process.
func TestPriority(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "digits-size.onnx")
	if _, err := one(t.Context(), w, id, []tensor.Tensor{floats("x", 1, 1, 64)}, nil); err != nil {
		t.Fatal(err)
	}
	ours, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	pid := child(t, w).command.Process.Pid
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil || len(threads) < 2 {
		t.Fatal(threads, err)
	}
	for _, thread := range threads {
		var tid int
		fmt.Sscan(thread.Name(), &tid)
		if theirs, err := unix.Getpriority(unix.PRIO_PROCESS, tid); err != nil || theirs != ours-niceness { // 20 less the niceness
			t.Errorf("thread %d: %d, %v; this process: %d", tid, theirs, err, ours)
		}
	}
}

// TestAllocations bounds the objects of a small run that can be cancelled.
func TestAllocations(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "digits-size.onnx")
	x := [][]tensor.Tensor{{floats("x", 1, 1, 64)}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	objects := testing.AllocsPerRun(1000, func() {
		if _, err := w.Run(ctx, id, x, nil); err != nil {
			t.Error(err)
		}
	})
	if t.Logf("%v objects", objects); objects > 12 {
		t.Errorf("%v objects", objects)
	}
}

// TestCopies bounds the memory that a large run takes here: its tensors are
// not copied to the heap, whether it is released at once or not at all.
func TestCopies(t *testing.T) {
	w := start(t, testConfig(t, ""))
	id, _ := load(t, w, "digits-size.onnx")
	x := [][]tensor.Tensor{{floats("x", 1, 4000, 64)}} // a megabyte
	var before, after runtime.MemStats
	const runs = 20
	for i := range runs + 1 {
		if i == 1 { // the first one opens the lane
			runtime.ReadMemStats(&before)
		}
		out, err := w.Run(t.Context(), id, x, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Outputs[0][0].Data[:4], []byte{0, 0, 0, 0}) && out.Outputs[0][0].Data[3]&0x80 != 0 {
			t.Error("a negative number")
		}
		release(out)
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / runs; each > 16<<10 {
		t.Errorf("%d bytes for each run", each)
	}
}
