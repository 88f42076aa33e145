package worker

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

// Bounds of what Compile measures.
const (
	measureTime  = 2 * time.Second // for all runs but the first of each kind
	firstRuns    = 10 * time.Second
	measurePairs = 15
	measureRows  = 4         // of the larger batch
	measureBytes = 256 << 20 // of the inputs of a run
	// faster is how much faster a prepacked session has to be to be worth its
	// memory.
	faster = 1.02
	// estimatedWorkspace is that of a model that could not be run, at least.
	estimatedWorkspace = 4 << 20
	// maxCompiledFile bounds what a child writes.
	maxCompiledFile = ort.MaxCompiled
)

// Compiled is what Compile has found out about a version.
type Compiled struct {
	Info engine.Info // LoadTime is that of the compilation
	// Need has what was measured in a child with nothing else in it, in which
	// all runs were on one thread.
	Need engine.Need
	// Prepack says that runs are faster by more than a fiftieth with the
	// memory that Need.Prepacked has; otherwise that is 0.
	Prepack bool
	// Speedup is the median by which a prepacked session was faster, 0 where
	// the model could not be run on made-up inputs: Need is an estimate then,
	// and Unmeasured says why.
	Speedup    float64
	Unmeasured string
	// Run is the median time of a run of one row, on one thread; 0: not known.
	Run time.Duration
}

// Compile compiles a version for this machine into the new file out, in a
// short-lived child that can do nothing else, opens the result and measures
// it. So it has been checked as Check does: its errors are those of Check,
// ort.ErrNotCompilable, after which there is no file, and
// engine.ErrOutOfMemory.
func Compile(ctx context.Context, cfg Config, s engine.Spec, out string) (Compiled, error) {
	cfg.Threads = 1 // others are being served
	cfg.sandbox = cfg.confined(s, filepath.Dir(out))
	began := false
	c, err := once(ctx, cfg, func(ctx context.Context, p *process) (Compiled, error) {
		began = true
		return p.compile(ctx, s, out)
	})
	if err != nil {
		os.Remove(out)
		if !began && ctx.Err() == nil {
			err = unavailable(err)
		}
		return Compiled{}, fmt.Errorf("compile %s: %w", s.ID, classify(err))
	}
	return c, nil
}

// classify adds what callers tell apart to an error that is a child's text.
func classify(err error) error {
	switch {
	case ort.IsOutOfMemory(err):
		return fmt.Errorf("%w: %w", engine.ErrOutOfMemory, err)
	case strings.Contains(err.Error(), ort.ErrNotCompilable.Error()):
		return fmt.Errorf("%w: %w", ort.ErrNotCompilable, err)
	}
	return err
}

// findings is what the child says of a compiled model besides what it takes
// and gives.
type findings struct {
	Need       engine.Need
	Prepack    bool
	Speedup    float64
	Unmeasured string
	Run        time.Duration
}

// compile has the child compile a version.
func (p *process) compile(ctx context.Context, s engine.Spec, out string) (Compiled, error) {
	m, err := p.call(ctx, s.ID, &message{kind: kindCompile, strings: []string{s.Dir, s.Entry, out}})
	if err != nil {
		return Compiled{}, err
	}
	var f findings
	if len(m.strings) != 1 {
		return Compiled{}, fmt.Errorf("%w: a compilation has %d findings", errMalformed, len(m.strings))
	}
	if err := json.Unmarshal([]byte(m.strings[0]), &f); err != nil {
		return Compiled{}, fmt.Errorf("%w: %w", errMalformed, err)
	}
	for _, n := range []int64{f.Need.Weights, f.Need.Session, f.Need.Prepacked, f.Need.Workspace} {
		if n < 0 {
			return Compiled{}, fmt.Errorf("%w: a compiled model needs %d bytes", errMalformed, n)
		}
	}
	return Compiled{
		Info: engine.Info{Inputs: m.inputs, Outputs: m.outputs, Batch: m.batch, LoadTime: time.Duration(m.number)},
		Need: f.Need, Prepack: f.Prepack, Speedup: f.Speedup, Unmeasured: f.Unmeasured, Run: max(f.Run, 0),
	}, nil
}

// compileModel answers kindCompile.
func compileModel(ctx context.Context, m *message) (*message, error) {
	if len(m.strings) != 3 {
		return nil, fmt.Errorf("%w: compile has %d strings", errMalformed, len(m.strings))
	}
	dir, entry, out := m.strings[0], m.strings[1], m.strings[2]
	start := time.Now()
	if err := ort.Compile(ctx, dir, entry, out); err != nil {
		return nil, err
	}
	took := time.Since(start)
	f, s, err := examine(ctx, out)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	text, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	return &message{kind: kindDone, seq: m.seq, number: uint64(took), batch: s.Batch(),
		inputs: s.Inputs(), outputs: s.Outputs(), strings: []string{string(text)}}, nil
}

// examine opens a compiled model both ways and runs it a few times. It gives
// a session of it.
func examine(ctx context.Context, file string) (f findings, s *ort.Session, err error) {
	start := ownBytes()
	plain, err := ort.OpenCompiled(ctx, file, ort.Setting{})
	if err != nil {
		return f, nil, err
	}
	defer func() {
		if err != nil {
			plain.Close()
		}
	}()
	f.Need = engine.Need{Weights: plain.Mapped(), Session: max(ownBytes()-start, 0), Measured: true}
	before := ownBytes()
	packed, err := ort.OpenCompiled(ctx, file, ort.Setting{Prepack: true})
	if err != nil {
		return f, nil, err
	}
	defer packed.Close()
	prepacked := max(ownBytes()-before-f.Need.Session, 0)
	runErr := f.run(ctx, plain, packed, prepacked)
	if ctx.Err() != nil {
		return f, nil, context.Cause(ctx)
	}
	if ort.IsOutOfMemory(runErr) {
		return f, nil, runErr // smaller inputs cannot be made up
	}
	if runErr != nil {
		f.Unmeasured = runErr.Error()
		f.Unmeasured = f.Unmeasured[:min(len(f.Unmeasured), 512)]
		f.Need.Measured = false
		f.Need.Workspace = max(estimatedWorkspace, f.Need.Weights/8)
		f.Prepack = prepacked > 0 // as a session has it that is not compiled
	}
	if f.Prepack {
		f.Need.Prepacked = prepacked
	}
	return f, plain, nil
}

// run runs both sessions on the same inputs and fills in what the runs tell.
func (f *findings) run(ctx context.Context, plain, packed *ort.Session, prepacked int64) error {
	// Integers may be indices, which 1 is too large for, or divisors.
	integer := byte(1)
	in, err := madeUp(plain.Inputs(), 1, integer)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, firstRuns, errors.New("the first runs take too long"))
	defer cancel()
	if _, err := timed(ctx, plain, in); err != nil {
		if ctx.Err() != nil || ort.IsOutOfMemory(err) {
			return err
		}
		integer = 0
		if in, err = madeUp(plain.Inputs(), 1, integer); err != nil {
			return err
		}
		if _, err := timed(ctx, plain, in); err != nil {
			return err
		}
	}
	if _, err := timed(ctx, packed, in); err != nil {
		return err
	}
	var speedups []float64
	var times []time.Duration
	for began := time.Now(); len(speedups) < measurePairs && (len(speedups) == 0 || time.Since(began) < measureTime); {
		a, err := timed(ctx, plain, in)
		if err != nil {
			return err
		}
		b, err := timed(ctx, packed, in)
		if err != nil {
			return err
		}
		speedups = append(speedups, float64(a)/float64(max(b, 1)))
		times = append(times, a)
	}
	slices.Sort(speedups)
	slices.Sort(times)
	f.Speedup, f.Run = speedups[len(speedups)/2], times[len(times)/2]
	f.Prepack = prepacked > 0 && f.Speedup > faster
	// What a run takes: it is kept for the next one until it is trimmed. Runs
	// of other shapes take more the first time.
	perRow := func(rows int64) error {
		took, err := workspace(ctx, plain, rows, integer)
		f.Need.Workspace = max(f.Need.Workspace, (took+rows-1)/rows)
		return err
	}
	if err := perRow(1); err != nil {
		return err
	}
	if plain.Batch() {
		_ = perRow(measureRows) // one row is known
	}
	return nil
}

// workspace gives the bytes that this process has taken after two runs of so
// many rows, made up with an integer, for which it had nothing before.
func workspace(ctx context.Context, s *ort.Session, rows int64, integer byte) (int64, error) {
	in, err := madeUp(s.Inputs(), rows, integer)
	if err != nil {
		return 0, err
	}
	without := ownBytes()
	for range 2 {
		if _, err := timed(ctx, s, in); err != nil {
			return 0, err
		}
	}
	took, err := statusBytes("RssAnon:")
	runtime.KeepAlive(in)
	return took - without, err
}

// ownBytes gives the memory that is this process's own, without what is free
// of it.
func ownBytes() int64 {
	ort.Trim()
	debug.FreeOSMemory()
	n, err := statusBytes("RssAnon:")
	if err != nil {
		return 0
	}
	return n
}

// timed runs a session once.
func timed(ctx context.Context, s *ort.Session, in []tensor.Tensor) (time.Duration, error) {
	start := time.Now()
	err := s.Run(ctx, in, nil, func([]tensor.Tensor) error { return nil })
	return time.Since(start), err
}

// madeUp gives inputs of so many rows, with 1 for each other open dimension.
// All integers are one and the same; floats lie between 0 and 1.
func madeUp(infos []tensor.Info, rows int64, integer byte) ([]tensor.Tensor, error) {
	random := rand.New(rand.NewPCG(1, uint64(rows)))
	all, left := make([]tensor.Tensor, 0, len(infos)), int64(measureBytes)
	for _, info := range infos {
		shape := slices.Clone(info.Shape)
		if shape == nil {
			shape = []int64{1}
		}
		for d := range shape {
			if shape[d] < 0 {
				shape[d] = 1
				if d == 0 {
					shape[d] = rows
				}
			}
		}
		n, err := tensor.Elements(shape)
		if err != nil {
			return nil, fmt.Errorf("input %q: %w", info.Name, err)
		}
		each := int64(cmp.Or(info.Type.Size(), 5))
		if n > left/each {
			return nil, fmt.Errorf("input %q: %v of %s has more than the %d bytes that are made up", info.Name, shape, info.Type, left)
		}
		left -= n * each
		all = append(all, tensor.Tensor{Name: info.Name, Type: info.Type, Shape: shape, Data: elements(random, info.Type, n, integer)})
	}
	return all, nil
}

// elements makes n elements of a type.
func elements(random *rand.Rand, typ tensor.Type, n int64, integer byte) []byte {
	data := make([]byte, 0, n*int64(cmp.Or(typ.Size(), 5)))
	for range n {
		switch typ {
		case tensor.String:
			data = tensor.AppendString(data, []byte{'a'})
		case tensor.Float32:
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(random.Float32()))
		case tensor.Float64:
			data = binary.LittleEndian.AppendUint64(data, math.Float64bits(random.Float64()))
		case tensor.Float16:
			data = binary.LittleEndian.AppendUint16(data, 0x3800) // 0.5
		case tensor.BFloat16:
			data = binary.LittleEndian.AppendUint16(data, 0x3f00)
		default: // integers and BOOL
			data = append(data, integer)
			data = append(data, make([]byte, typ.Size()-1)...)
		}
	}
	return data
}
