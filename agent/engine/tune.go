package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models/serving"
)

// Tuning is what was measured of a version on this device, and what follows
// from it. The zero value changes nothing.
type Tuning struct {
	// MaxBatchSize and Instances are those of the version's options where
	// nobody has chosen any, see serving.Automatic: MaxBatchSize where the Spec
	// has no options and the graph batches, Instances where the Spec's options
	// have none. 0 changes nothing.
	MaxBatchSize, Instances int
	// Threads are those of Setting.
	Threads int
	// Prepack says whether prepacked weights make runs faster; nil leaves that
	// to what was found when the version was compiled.
	Prepack *bool
	// Latency is how long runs take. Requests are judged by it until there have
	// been a few runs; those then tell more.
	Latency estimate.Latency
	// RowBytes are the bytes of all inputs of one row that Latency was measured
	// with; 0 takes them from the shapes of the inputs. Where those leave them
	// open, Latency is not used.
	RowBytes int64
}

// Check names every figure that is out of its limits.
func (t *Tuning) Check() error {
	number := func(name string, value, most int) error {
		if value < 0 || value > most {
			return fmt.Errorf("%s is %d, allowed are 0 to %d", name, value, most)
		}
		return nil
	}
	errs := []error{
		number("maxBatchSize", t.MaxBatchSize, serving.MaxBatchSize),
		number("instances", t.Instances, serving.MaxInstances),
		number("threads", t.Threads, MaxThreads),
	}
	if t.RowBytes < 0 {
		errs = append(errs, fmt.Errorf("rowBytes is %d, allowed are 0 and more", t.RowBytes))
	}
	return errors.Join(errs...)
}

// options gives those of a version that was asked for with some, or nil, and
// has the others without tuning.
func (t *Tuning) options(asked *serving.Options, o serving.Options) serving.Options {
	if t.MaxBatchSize > 0 && asked == nil && o.MaxBatchSize > 0 {
		o.MaxBatchSize = t.MaxBatchSize
	}
	if t.Instances > 0 && (asked == nil || asked.Instances == 0) {
		o.Instances = t.Instances
	}
	return o
}

// suits leaves out what was measured with other instances than are asked for.
func (t Tuning) suits(asked *serving.Options) Tuning {
	if asked != nil && asked.Instances > 0 && t.Instances > 0 && asked.Instances != t.Instances {
		t.Threads, t.Latency = 0, estimate.Latency{}
	}
	return t
}

// points gives the Latency by bytes of input, as request counts them.
func (t *Tuning) points(info *Info) []sample {
	row := t.RowBytes
	if row == 0 {
		row = rowBytes(info)
	}
	if row == 0 {
		return nil
	}
	var all []sample
	for _, p := range t.Latency.Points() {
		all = append(all, sample{float64(row)*float64(p.Rows) + 1, p.Seconds})
	}
	return all
}

// rowBytes gives the bytes of a row of all inputs; 0 where the shapes do not
// say. A first dimension that is not open is part of the row.
func rowBytes(info *Info) int64 {
	sum := int64(0)
	for _, in := range info.Inputs {
		n := int64(in.Type.Size())
		if in.Shape == nil {
			return 0
		}
		for d, length := range in.Shape {
			if d == 0 && length < 0 {
				continue
			}
			if length <= 0 || n > maxRowBytes/length {
				return 0
			}
			n *= length
		}
		if n == 0 { // strings
			return 0
		}
		sum += n
	}
	return sum
}

// maxRowBytes bounds what rowBytes takes for the size of an input.
const maxRowBytes = 1 << 40

// tune asks to use what was measured of a version.
type tune struct {
	call   *call
	id     VersionID
	tuning Tuning
}

// Tune has a loaded version use what was measured of it, from now on and with
// no request refused for it. It replaces the Tuning of the version's Spec, or
// of the last call, and lasts until the version is unloaded or replaced. What
// it changes of Info.Options is seen by Info. A Setting that is another than
// the one that the version runs by is applied when there is room for it, and
// nothing waits for that room. An id with a generation, as in Info.ID, is only
// that version: it is not loaded any more once another has taken its place.
func (e *Engine) Tune(ctx context.Context, id VersionID, t Tuning) error {
	err := t.Check()
	if err == nil {
		c := newCall()
		_, err = e.ask(ctx, c, tune{c, id, t})
	}
	if err != nil {
		return fmt.Errorf("tune %s: %w", id, err)
	}
	return nil
}

func (c *core) tune(id VersionID, t Tuning) error {
	generation := id.Generation
	id.Generation = 0
	v := c.current[id]
	switch {
	case c.stopped:
		return ErrStopped
	case v == nil || generation != 0 && v.id.Generation != generation:
		return ErrNotLoaded
	case v.phase != ready:
		return ErrDraining
	}
	t = t.suits(v.spec.Options)
	v.tuning, v.home.refused = t, nil
	if o := t.options(v.spec.Options, v.base); o.MaxBatchSize != v.info.Options.MaxBatchSize || o.Instances != v.info.Options.Instances {
		info := *v.info // requests that were checked by the old one are checked anew
		info.Options = o
		v.info = &info
		c.emit(publish{id, v.info})
	}
	v.predict.expect(t.points(v.info))
	v.queue.reprice(v.price)
	c.dirty = true
	c.schedule(v)
	return nil
}
