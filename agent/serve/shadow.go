package serve

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models/tensor"
)

// Requests that are to be mirrored are held until the device has nothing else
// to do: so many, and so many bytes of inputs and outputs. What comes when
// there is no room is not mirrored.
const (
	maxMirrored      = 16
	maxMirroredBytes = 64 << 20
	// copyBeside is from how many bytes on inputs are copied while the request
	// runs, and not before.
	copyBeside = 64 << 10
)

// ShadowFigures say what became of the requests that a shadow was to run, and
// how its outputs compare.
type ShadowFigures struct {
	policy.Target
	Compared, Incomparable, Failed uint64
	Shed                           uint64 // there was no capacity
	// Of those compared: that agree, the largest distance of two numbers, and
	// the time that runs took in all.
	Agreed               uint64
	Distance             float64
	AnswerRun, ShadowRun time.Duration
}

// shadowCounts are the figures of one shadow.
type shadowCounts struct {
	mu sync.Mutex // guards figures
	ShadowFigures
}

func (c *shadowCounts) add(change func(f *ShadowFigures)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.ShadowFigures)
}

func (c *shadowCounts) get() ShadowFigures {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ShadowFigures
}

func (c *shadowCounts) shed() { c.add(func(f *ShadowFigures) { f.Shed++ }) }

// mirrored is a request that a shadow is to run. It owns its tensors.
type mirrored struct {
	counts          *shadowCounts
	target          policy.Target
	inputs, outputs []tensor.Tensor
	took            time.Duration // the run that was answered
	size            int64
	copied          chan struct{} // closed when inputs are there
}

// mirror is where mirrored requests are held. They run one at a time, while no
// caller is on its way, and are given up when one comes.
type mirror struct {
	callers atomic.Int64
	idle    chan struct{} // holds one: there was no caller for a moment
	running atomic.Pointer[context.CancelFunc]
	held    atomic.Int64
	bytes   atomic.Int64
	ready   chan *mirrored // holds maxMirrored
}

func newMirror() mirror {
	return mirror{idle: make(chan struct{}, 1), ready: make(chan *mirrored, maxMirrored)}
}

// enters says that a caller has come. One that runs a mirrored request stores
// running before it looks at callers, so that one of the two sees the other.
func (m *mirror) enters() {
	m.callers.Add(1)
	if cancel := m.running.Load(); cancel != nil {
		(*cancel)()
	}
}

func (m *mirror) leaves() {
	if m.callers.Add(-1) == 0 {
		select {
		case m.idle <- struct{}{}:
		default:
		}
	}
}

func sizeOf(tensors []tensor.Tensor) (n int64) {
	for i := range tensors {
		n += int64(len(tensors[i].Data))
	}
	return n
}

func clone(tensors []tensor.Tensor) []tensor.Tensor {
	c := slices.Clone(tensors)
	for i := range c {
		c[i].Data, c[i].Shape = bytes.Clone(c[i].Data), slices.Clone(c[i].Shape)
	}
	return c
}

// grow reserves room.
func (m *mirror) grow(r *mirrored, n int64) bool {
	r.size += n
	return m.bytes.Add(n) <= maxMirroredBytes
}

func (m *mirror) drop(r *mirrored) {
	m.bytes.Add(-r.size)
	m.held.Add(-1)
}

// take copies a request that is to be mirrored; nil where it is not, or there
// is no room. The copy is whole once copied is closed, until when the inputs
// must stay.
func (m *mirror) take(by *choice, c oip.Call, random uint64) *mirrored {
	if by.route == nil {
		return nil
	}
	shadow := by.route.policy.Shadow(by.decision.Rule)
	if shadow == nil || !shadow.Takes(random) {
		return nil
	}
	r := &mirrored{counts: by.route.counts[by.decision.Rule+1].shadow, target: shadow.Target, copied: make(chan struct{})}
	n := sizeOf(c.Inputs)
	if held, room := m.held.Add(1), m.grow(r, n); held > maxMirrored || !room {
		m.drop(r)
		r.counts.shed()
		return nil
	}
	if n < copyBeside {
		r.inputs = clone(c.Inputs)
		close(r.copied)
		return r
	}
	go func() {
		r.inputs = clone(c.Inputs)
		close(r.copied)
	}()
	return r
}

// follows has a mirrored request run after its answer has been sent.
func (m *mirror) follows(r *mirrored, a *oip.Answer) {
	release, outputs := a.Release, a.Outputs
	r.took = a.Times.Infer
	a.Release = func() {
		room := m.grow(r, sizeOf(outputs))
		if room {
			r.outputs = clone(outputs)
		}
		if release != nil {
			release()
		}
		if !room {
			m.drop(r)
			r.counts.shed()
			return
		}
		m.ready <- r // has a place for each that is held
	}
}

// Shadow runs mirrored requests until ctx is done, then drops what is held. It
// may be called once; without it none is run.
func (s *Server) Shadow(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-s.mirror.ready:
			s.shadow(ctx, r)
			s.mirror.drop(r)
		}
	}
}

func (s *Server) shadow(ctx context.Context, r *mirrored) {
	m := &s.mirror
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for m.callers.Load() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-m.idle:
		}
	}
	m.running.Store(&cancel)
	defer m.running.Store(nil)
	if m.callers.Load() > 0 { // one has come in between
		r.counts.shed()
		return
	}
	id, err := s.table.Load().version(r.target)
	var result engine.Result
	if err == nil {
		info, _ := s.engine.Info(id)
		result, err = s.engine.Infer(ctx, id, engine.Request{Inputs: r.inputs, Priority: info.Options.PriorityLevels, Resident: true})
	}
	_, refused := errors.AsType[*engine.RefusedError](err)
	switch {
	case refused, ctx.Err() != nil, errors.Is(err, engine.ErrNotResident):
		r.counts.shed()
		result.Release()
		return
	case err != nil:
		r.counts.add(func(f *ShadowFigures) { f.Failed++ })
		return
	}
	defer result.Release()
	same, agree, distance := compare(r.outputs, result.Outputs)
	r.counts.add(func(f *ShadowFigures) {
		if !same {
			f.Incomparable++
			return
		}
		f.Compared++
		if agree {
			f.Agreed++
		}
		f.Distance = max(f.Distance, distance)
		f.AnswerRun += r.took
		f.ShadowRun += result.Infer
	})
}

func float(t tensor.Type) bool {
	return t == tensor.Float32 || t == tensor.Float64 || t == tensor.Float16 || t == tensor.BFloat16
}

// compare holds outputs against those of a shadow, by their names. They are the
// same where each has its like, of one type and shape. They agree where the
// first one of floating-point numbers has its largest number at the same place
// in each row, or, where there is none of these, where all have the same bytes.
// Distance is the largest difference of two numbers; that to one that is not a
// number is infinite.
func compare(outputs, shadow []tensor.Tensor) (same, agree bool, distance float64) {
	agree, ranked := true, false
	for i := range outputs {
		a := &outputs[i]
		j := slices.IndexFunc(shadow, func(b tensor.Tensor) bool {
			return b.Name == a.Name && b.Type == a.Type && slices.Equal(b.Shape, a.Shape)
		})
		if j < 0 {
			return false, false, 0
		}
		b := &shadow[j]
		equal := bytes.Equal(a.Data, b.Data)
		if size := a.Type.Size(); size > 0 && !equal {
			for at := 0; at < len(a.Data); at += size {
				x, y := a.Type.Number(a.Data[at:]), b.Type.Number(b.Data[at:])
				switch d := math.Abs(x - y); {
				case x == y, math.IsNaN(x) && math.IsNaN(y):
				case math.IsNaN(d):
					distance = math.Inf(1)
				default:
					distance = max(distance, d)
				}
			}
		}
		switch {
		case float(a.Type) && !ranked:
			ranked, agree = true, equal || slices.Equal(largest(a), largest(b))
		case !ranked:
			agree = agree && equal
		}
	}
	return len(outputs) > 0, agree, distance
}

// largest gives the place of the largest number of each row, the first of
// equal ones. A tensor of one dimension is one row.
func largest(t *tensor.Tensor) (places []int) {
	size, rows := t.Type.Size(), int64(1)
	if len(t.Shape) > 1 {
		rows = t.Shape[0]
	}
	if rows == 0 || len(t.Data) == 0 {
		return nil
	}
	for row := range slices.Chunk(t.Data, len(t.Data)/int(rows)) {
		best, place := math.Inf(-1), 0
		for at := 0; at < len(row); at += size {
			if x := t.Type.Number(row[at:]); x > best {
				best, place = x, at/size
			}
		}
		places = append(places, place)
	}
	return places
}
