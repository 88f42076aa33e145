package sim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// Model is what a Device has to know of a version.
type Model struct {
	Inputs, Outputs []tensor.Info
	WeightBytes     uint64
	Batch           bool // see engine.Info
	// Costs are those of a run; nil takes them from the weights.
	Costs *models.Costs
}

// version is one that is loaded.
type version struct {
	info  engine.Info
	costs models.Costs
	in    bool // its weights are in memory
	rng   rand.PCG
	// How often in a row its own runs have crashed the worker; after maxCrashes
	// it is in quarantine, as a worker puts it there.
	crashes int
}

// bytes are what it takes while it is in.
func (v *version) bytes() int64 { return v.info.Need.Weights + v.info.Need.Session }

func (v *version) random() float64 { return float64(v.rng.Uint64()>>11) / (1 << 53) }

// Read describes a version by its ONNX file, as a Device does whose Config has
// no Describe.
func Read(s engine.Spec) (Model, error) {
	path := filepath.Join(s.Dir, s.Entry)
	about, err := models.Inspect(path)
	if err != nil {
		return Model{}, err
	}
	m := Model{Inputs: about.Inputs, Outputs: about.Outputs, WeightBytes: about.WeightBytes}
	if m.Costs, err = models.EstimateCosts(path); err != nil || m.Costs == nil {
		return m, err
	}
	g, err := models.ReadGraph(path)
	if err != nil {
		return m, err
	}
	var names [][]string
	for _, v := range slices.Concat(g.Inputs, g.Outputs) {
		of := make([]string, len(v.Dims))
		for i, d := range v.Dims {
			of[i] = d.Name
		}
		names = append(names, of)
	}
	m.Batch = len(g.Inputs) > 0 && len(g.Outputs) > 0 && serving.Batch(names)
	return m, nil
}

// Inspect gives what Load would, without loading.
func (d *Device) Inspect(s engine.Spec) (engine.Info, error) {
	v, err := d.describe(s)
	if err != nil {
		return engine.Info{}, err
	}
	return v.info, nil
}

func (d *Device) describe(s engine.Spec) (*version, error) {
	describe := d.cfg.Describe
	if describe == nil {
		describe = Read
	}
	m, err := describe(s)
	if err != nil {
		return nil, fmt.Errorf("simulate %s: %w", s.ID, err)
	}
	v := &version{costs: costs(m)}
	need := estimate.Memory(m.WeightBytes, v.costs, 1)
	v.info = engine.Info{
		Inputs: m.Inputs, Outputs: m.Outputs, Batch: m.Batch,
		Need: engine.Need{Weights: need.Weights, Session: need.Session, Workspace: need.Workspace, Measured: true},
	}
	id := fnv.New64a()
	fmt.Fprint(id, s.ID)
	v.rng.Seed(d.cfg.Seed, id.Sum64())
	return v, nil
}

// costs gives those that a model says it has. Else each weight is taken to be
// of four bytes, and to be multiplied and added once for each row.
func costs(m Model) models.Costs {
	if m.Costs != nil {
		return *m.Costs
	}
	weights := float64(m.WeightBytes)
	return models.Costs{FLOPs: models.Linear{PerRow: weights / 2}, Traffic: models.Linear{Fixed: weights}}
}

// runTime is how long a run takes with the device for itself at full clock.
func (d *Device) runTime(c models.Costs, rows int) time.Duration {
	hw := &d.cfg.Profile.Hardware
	overhead := time.Duration(hw.OverheadMicros * float64(time.Microsecond))
	return max(estimate.RunTime(c, rows, estimate.Hardware{FP32GFLOPS: hw.FP32GFLOPS, MemoryGBPerSecond: hw.MemoryGBPerSecond, Overhead: overhead}), overhead)
}

// Load reads what a version is like, and takes the time of reading its weights
// from the disk.
func (d *Device) Load(ctx context.Context, s engine.Spec) (engine.Info, error) {
	began := time.Now()
	v, err := d.describe(s)
	if err != nil {
		return engine.Info{}, err
	}
	d.lock()
	err = d.down()
	if err == nil && d.core.runsAs(s.ID).unloadable {
		err = fmt.Errorf("%s: a fault of the simulated device: it cannot be loaded", s.ID)
	}
	if err != nil {
		d.unlock()
		return engine.Info{}, err
	}
	if have := d.core.versions[s.ID]; have != nil {
		v = have
	} else {
		d.core.versions[s.ID] = v
	}
	d.unlock()
	pause := time.NewTimer(time.Duration(float64(v.info.Need.Weights) / (d.cfg.Profile.Hardware.StorageMBPerSecond * 1e6) * float64(time.Second)))
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-d.off:
		err = errDown
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return engine.Info{}, errors.Join(err, d.Unload(context.WithoutCancel(ctx), s.ID))
	}
	info := v.info
	info.LoadTime = time.Since(began)
	return info, nil
}

// Activate moves a version's weights into the memory that models run in, over
// the link to the GPU or from the disk. engine.ErrOutOfMemory says that there
// is no room.
func (d *Device) Activate(ctx context.Context, id engine.VersionID, _ engine.Setting) (engine.Need, error) {
	d.lock()
	v, err := d.version(id)
	if err != nil || v.in {
		d.unlock()
		if err != nil {
			return engine.Need{}, err
		}
		return v.info.Need, nil
	}
	if err := d.take(v.bytes()); err != nil {
		d.unlock()
		return engine.Need{}, fmt.Errorf("activate %s: %w", id, err)
	}
	j := d.core.bus.add(id, float64(v.info.Need.Weights)/d.core.busBytes)
	d.unlock()
	err = d.wait(ctx, &d.core.bus, j)
	d.lock()
	defer d.unlock()
	if d.core.versions[id] != v && err == nil {
		err = fmt.Errorf("%s: %w", id, engine.ErrNotLoaded)
	}
	if err != nil {
		d.core.used -= v.bytes()
		return engine.Need{}, err
	}
	v.in = true
	return v.info.Need, nil
}

// Set does nothing: versions run alike by any setting.
func (d *Device) Set(context.Context, engine.VersionID, engine.Setting) error { return nil }

// Deactivate gives a version's memory back.
func (d *Device) Deactivate(_ context.Context, id engine.VersionID) error {
	d.lock()
	defer d.unlock()
	v, err := d.version(id)
	if err == nil && v.in {
		v.in = false
		d.core.used -= v.bytes()
	}
	return err
}

// Unload forgets a version.
func (d *Device) Unload(_ context.Context, id engine.VersionID) error {
	d.lock()
	defer d.unlock()
	v := d.core.versions[id]
	if v == nil {
		return fmt.Errorf("%s: %w", id, engine.ErrNotLoaded)
	}
	if v.in {
		d.core.used -= v.bytes()
	}
	v.in = false
	delete(d.core.versions, id)
	return nil
}

// Run takes the time that the version's costs say, longer where others run
// too, where the device is hot or capped, and by the jitter. The outputs have
// the types and shapes that the model declares, and are zeros and empty
// strings; of a dimension that it leaves open the first is the rows, and
// another as the first input has it, or 1. Where the script gives a confidence,
// FP32 outputs of rows of two or more have class probabilities, whose largest
// has that mean and the deviation confidenceDeviation, and is of any class.
func (d *Device) Run(ctx context.Context, id engine.VersionID, requests [][]tensor.Tensor, outputs []string) (engine.Outcome, error) {
	d.lock()
	v, err := d.version(id)
	switch {
	case err != nil:
	case v.crashes >= maxCrashes:
		err = quarantined(id)
	case !v.in:
		err = fmt.Errorf("%s: %w", id, errCrashed)
	}
	var given [][]tensor.Tensor
	rows := rowsOf(requests)
	if err == nil {
		given, err = v.outputs(requests, outputs)
	}
	work := int64(0)
	if err == nil {
		work = estimate.Memory(0, v.costs, rows).Workspace
		err = d.take(work)
	}
	if err != nil {
		d.unlock()
		return engine.Outcome{}, err
	}
	q := d.core.runsAs(id)
	seconds := d.runTime(v.costs, rows).Seconds() * q.slow / d.core.all.slow // the lane has the device's factor
	if d.cfg.Jitter > 0 {
		seconds *= 1 + min(d.cfg.Jitter*(math.Pow(1-v.random(), -1/jitterShape)-1), 10)
	}
	fails := q.failing > 0 && v.random() < q.failing
	crashes := q.crashing > 0 && v.random() < q.crashing
	if q.confidence > 0 && !fails {
		for _, outputs := range given {
			for i := range outputs {
				v.guess(&outputs[i], q.confidence)
			}
		}
	}
	began := d.core.now
	j := d.core.processor.add(id, seconds)
	j.energy = q.energy
	if crashes {
		if v.crashes++; v.crashes == maxCrashes {
			d.core.lost = append(d.core.lost, id)
		}
		d.core.crash()
	}
	d.unlock()
	err = d.wait(ctx, &d.core.processor, j)
	d.lock()
	defer d.unlock()
	d.core.used -= work
	if err == nil && fails {
		err = fmt.Errorf("%s: a fault of the simulated device: the run fails", id)
	}
	if err != nil {
		if v.crashes >= maxCrashes {
			err = quarantined(id)
		}
		return engine.Outcome{}, err
	}
	v.crashes = 0
	return engine.Outcome{Outputs: given, Infer: d.core.now - began}, nil
}

const (
	jitterShape = 2.5
	maxCrashes  = 2
)

func quarantined(id engine.VersionID) error {
	return fmt.Errorf("%w: %s was at work when the simulated worker crashed, not for the first time", engine.ErrQuarantined, id)
}

// version gives a loaded one. It is called with the lock.
func (d *Device) version(id engine.VersionID) (*version, error) {
	if err := d.down(); err != nil {
		return nil, err
	}
	v := d.core.versions[id]
	if v == nil {
		return nil, fmt.Errorf("%s: %w", id, engine.ErrNotLoaded)
	}
	return v, nil
}

// take takes so many bytes of the memory that models run in. It is called with
// the lock.
func (d *Device) take(bytes int64) error {
	free := d.capacity - d.core.used
	if !d.discrete() {
		free -= int64(d.core.faults.leak)
	}
	if bytes > free {
		return fmt.Errorf("%w: %d bytes are needed, %d of %d are free", engine.ErrOutOfMemory, bytes, max(free, 0), d.capacity)
	}
	d.core.used += bytes
	return nil
}

// wait waits for the end of a job.
func (d *Device) wait(ctx context.Context, l *lane, j *job) error {
	select {
	case <-j.done:
		return j.failure
	case <-ctx.Done():
	}
	d.lock()
	defer d.unlock()
	l.remove(func(o *job) bool { return o == j }, context.Cause(ctx))
	return context.Cause(ctx)
}

// rowsOf counts the rows of all requests' first inputs together, 1 where they
// have none.
func rowsOf(requests [][]tensor.Tensor) int {
	rows := 0
	for _, in := range requests {
		if len(in) > 0 && len(in[0].Shape) > 0 {
			rows += int(min(in[0].Shape[0], math.MaxInt32))
		}
	}
	return max(rows, 1)
}

// outputs makes those of a run.
func (v *version) outputs(requests [][]tensor.Tensor, names []string) ([][]tensor.Tensor, error) {
	var asked []*tensor.Info
	if names == nil {
		for i := range v.info.Outputs {
			asked = append(asked, &v.info.Outputs[i])
		}
	}
	for _, name := range names {
		i := slices.IndexFunc(v.info.Outputs, func(o tensor.Info) bool { return o.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("%w: the model has no output %q", engine.ErrInvalidInput, name)
		}
		asked = append(asked, &v.info.Outputs[i])
	}
	all := make([][]tensor.Tensor, len(requests))
	for r, in := range requests {
		for _, o := range asked {
			if len(requests) > 1 && (len(o.Shape) == 0 || o.Shape[0] >= 0) {
				return nil, fmt.Errorf("%w: output %q has shape %v", engine.ErrRows, o.Name, o.Shape)
			}
			t, err := zeros(o, in)
			if err != nil {
				return nil, err
			}
			all[r] = append(all[r], t)
		}
	}
	return all, nil
}

// zeros makes the output o for the inputs of one request.
func zeros(o *tensor.Info, in []tensor.Tensor) (tensor.Tensor, error) {
	t := tensor.Tensor{Name: o.Name, Type: o.Type, Shape: slices.Clone(o.Shape)}
	if t.Shape == nil {
		t.Shape = []int64{-1}
	}
	for i, n := range t.Shape {
		if n >= 0 {
			continue
		}
		t.Shape[i] = 1
		if len(in) > 0 && i < len(in[0].Shape) {
			t.Shape[i] = in[0].Shape[i]
		}
	}
	var size int64
	var err error
	if o.Type == tensor.String { // each is its length in four bytes
		size, err = tensor.Bytes(tensor.Uint32, t.Shape)
	} else {
		size, err = tensor.Bytes(o.Type, t.Shape)
	}
	if err == nil && size > maxOutput {
		err = fmt.Errorf("%d bytes, allowed are %d", size, maxOutput)
	}
	if err != nil {
		return t, fmt.Errorf("output %q: %w", o.Name, err)
	}
	t.Data = make([]byte, size)
	return t, nil
}

// confidenceDeviation is the standard deviation of the largest probability of a
// row before it is brought within its bounds.
const confidenceDeviation = 0.1

// guess fills an output that looks like class probabilities.
func (v *version) guess(t *tensor.Tensor, mean float64) {
	if t.Type != tensor.Float32 || len(t.Shape) != 2 || t.Shape[1] < 2 {
		return
	}
	n := int(t.Shape[1])
	for row := range int(t.Shape[0]) {
		// Box and Muller.
		normal := math.Sqrt(-2*math.Log(1-v.random())) * math.Cos(2*math.Pi*v.random())
		most := min(max(mean+confidenceDeviation*normal, 1/float64(n)), 1)
		class := int(v.random() * float64(n))
		for i := range n {
			p := (1 - most) / float64(n-1)
			if i == class {
				p = most
			}
			binary.LittleEndian.PutUint32(t.Data[4*(row*n+i):], math.Float32bits(float32(p)))
		}
	}
}

// maxOutput bounds the bytes of an output, as those of an answer are bounded.
const maxOutput = 1 << 30
