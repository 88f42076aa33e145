package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

// Run runs an active version, see engine.Runtime. Inputs that the runtime
// refuses give engine.ErrInvalidInput. Outputs of more than a few kB lie in
// memory that is shared with the child until the Outcome is released; nothing
// that the child does can change more than their numbers.
//
// A run that was cancelled for engine.ErrStalled and whose child had to be
// killed for it is tried again for as long as it was given.
func (w *Worker) Run(ctx context.Context, id engine.VersionID, requests [][]tensor.Tensor, outputs []string) (engine.Outcome, error) {
	called := clock()
	if len(requests) == 0 {
		return engine.Outcome{}, fmt.Errorf("%w: no request", engine.ErrInvalidInput)
	}
	for g := (guilt{}); ; {
		u, err := w.begin(ctx, id, g, true)
		if err != nil {
			return engine.Outcome{}, err
		}
		out, err := w.attempt(ctx, called, u, requests, outputs)
		w.end(u, err == nil)
		if _, died := errors.AsType[*DeathError](err); !died {
			return out, err
		}
		if err := w.again(&g, id, u.process, err); err != nil {
			return engine.Outcome{}, err
		}
		if errors.Is(context.Cause(ctx), engine.ErrStalled) {
			// It may take as long as it was given before.
			again, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), clock()-called, engine.ErrStalled)
			defer cancel()
			ctx = again
		}
	}
}

func (w *Worker) attempt(ctx context.Context, called time.Duration, u use, requests [][]tensor.Tensor, outputs []string) (engine.Outcome, error) {
	if ctx.Err() != nil {
		return engine.Outcome{}, context.Cause(ctx)
	}
	if err := take(ctx, w.turn); err != nil {
		return engine.Outcome{}, err
	}
	defer func() { <-w.turn }()
	l, err := u.process.lane(u.version.spec.ID)
	if err != nil {
		return engine.Outcome{}, err
	}
	defer l.release()
	r := run{lane: l, version: u.version, session: u.session.number, limit: uint64(w.cfg.MaxBytes), called: called}
	out, err := r.do(ctx, requests, outputs)
	if errors.Is(err, engine.ErrOutOfMemory) {
		w.mu.Lock()
		u.session.spent = true
		w.mu.Unlock()
	}
	return out, err
}

// errTooLarge is the error of tensors over the limit.
var errTooLarge = errors.New("tensors are too large")

// run is one run on a lane.
type run struct {
	*lane
	version *version
	session uint64
	limit   uint64 // bytes of the inputs, and of the outputs
	called  time.Duration
}

func (r *run) do(ctx context.Context, requests [][]tensor.Tensor, outputs []string) (engine.Outcome, error) {
	q, v := &r.question, r.version
	r.seq++
	*q = ort.Question{Kind: ort.AskRun, Sequence: r.seq, Session: r.session, Outputs: q.Outputs, Inputs: q.Inputs}
	if err := r.plan.make(q, &v.info, requests, outputs); err != nil {
		return engine.Outcome{}, err
	}
	if r.plan.inputs > r.limit {
		return engine.Outcome{}, fmt.Errorf("%w: %w: inputs of %d bytes, more than %d", engine.ErrInvalidInput, errTooLarge, r.plan.inputs, r.limit)
	}
	if err := r.prepare(); err != nil {
		return engine.Outcome{}, err
	}
	defer r.watch(ctx)()
	if err := r.ask(q.Room); err != nil {
		return engine.Outcome{}, err
	}
	if r.answer.Kind == ort.AnswerRoom {
		if err := r.store(); err != nil {
			return engine.Outcome{}, err
		}
	}
	if r.answer.Surprised {
		v.surprising.Store(true)
	}
	text := r.answer.Text
	switch r.answer.Kind {
	case ort.AnswerDone:
		return r.outcome()
	case ort.AnswerRefused:
		return engine.Outcome{}, fmt.Errorf("%w: %s", engine.ErrInvalidInput, text)
	case ort.AnswerFailed:
		if ort.PoisonedText(text) {
			return engine.Outcome{}, r.process.fail(errors.New(text))
		}
		if ort.OutOfMemoryText(text) {
			return engine.Outcome{}, fmt.Errorf("%w: %s", engine.ErrOutOfMemory, text)
		}
		return engine.Outcome{}, errors.New(text)
	case ort.AnswerCancelled:
		if ctx.Err() != nil {
			return engine.Outcome{}, context.Cause(ctx)
		}
	}
	return engine.Outcome{}, r.process.fail(fmt.Errorf("%w: kind %d", ort.ErrPacket, r.answer.Kind))
}

// prepare writes the question, and the inputs' data to where it belongs:
// behind it or into memory.
func (r *run) prepare() error {
	q, p := &r.question, &r.plan
	q.Inline = p.inputs <= ort.MaxInlined
	if !q.Inline {
		q.From = p.inputs
	}
	room := r.room()
	header := q.Size()
	if align(header)+ort.MaxInlined > maxPacket {
		return fmt.Errorf("%w: %d inputs and %d outputs are more than a packet describes", engine.ErrInvalidInput, len(q.Inputs), len(q.Outputs))
	}
	if q.From+room > 0 {
		m, err := allocate(r.process.region, q.From+room)
		if err != nil {
			return err
		}
		r.use(m)
	}
	if !q.Inline {
		r.packet = q.Append(r.packet[:0])
		p.lay(r.memory.bytes)
		return nil
	}
	start := align(header)
	for i := range q.Inputs {
		q.Inputs[i].At += start
	}
	r.packet = q.Append(r.packet[:0])[:start+p.inputs]
	p.lay(r.packet[start:])
	return nil
}

// room gives how much memory the outputs may need from From on. Those that are
// large and whose shapes the model says are given their places before, so that
// the runtime writes them where they are read; From is then behind them.
func (r *run) room() uint64 {
	q, v := &r.question, r.version
	if v.surprising.Load() {
		return v.room.Load()
	}
	from := q.From
	end, all := r.plan.expect(q, &v.info, from)
	room := uint64(0)
	if !all {
		room = v.room.Load()
	}
	if end-from <= ort.MaxInlined || end-from > r.limit {
		r.plan.expectNothing(q)
		return room
	}
	q.From = end
	return room
}

// use makes m the memory of the question.
func (r *run) use(m memory) {
	r.memory = m
	r.question.Base, r.question.Room, r.question.Attached = m.slot.place, uint64(len(m.bytes)), m.region == nil
}

// store gives the outputs of a run that needs more memory what it needs.
func (r *run) store() error {
	q := &r.question
	*q = ort.Question{Kind: ort.AskStore, Sequence: r.seq, Outputs: q.Outputs[:0], Inputs: q.Inputs[:0]}
	size := r.answer.Bytes
	err := fmt.Errorf("outputs: %w: %d bytes, more than %d", errTooLarge, size, r.limit)
	var more memory
	if size <= r.limit {
		more, err = allocate(r.process.region, size)
	}
	if err != nil {
		q.Kind = ort.AskDrop
		r.packet = q.Append(r.packet[:0])
		return errors.Join(err, r.tell())
	}
	// The outputs may be the inputs: those stay until the answer is there.
	before := r.memory
	defer before.give()
	r.use(more)
	r.packet = q.Append(r.packet[:0])
	return r.ask(q.Room)
}

// outcome makes the outcome of a run from its answer.
func (r *run) outcome() (engine.Outcome, error) {
	a, v := &r.answer, r.version
	if !a.Inline {
		v.room.Store(min(max(v.room.Load(), a.Bytes), r.limit))
	}
	if err := r.collect(); err != nil {
		return engine.Outcome{}, r.process.fail(err)
	}
	outputs, err := r.plan.split(&v.info, a.Outputs, r.data)
	if err != nil {
		return engine.Outcome{}, err
	}
	out := engine.Outcome{Outputs: outputs}
	if r.memory.lent {
		m := r.memory
		out.Release = m.give
	} else {
		r.memory.give()
	}
	r.memory = memory{}
	returned := clock()
	start := min(max(time.Duration(a.Began), r.called), returned)
	end := min(max(time.Duration(a.Ended), start), returned)
	out.Input, out.Infer, out.Output = start-r.called, end-start, returned-end
	return out, nil
}

// collect holds the answer against what was asked for, so that nothing above
// need doubt a tensor's name, type or size, and takes the outputs' data into
// r.data. Numbers may stay in memory that the child can write to. Strings
// never do: their lengths are read again.
func (r *run) collect() error {
	a, asked := &r.answer, r.plan.asked
	if len(a.Outputs) != len(asked) {
		return fmt.Errorf("%w: %d outputs instead of %d", ort.ErrPacket, len(a.Outputs), len(asked))
	}
	from, numbers := r.memory.bytes, uint64(0)
	if a.Inline {
		from = bytes.Clone(r.packet[:r.n])
	}
	for i := range a.Outputs {
		o, known := &a.Outputs[i], &r.version.info.Outputs[asked[i]]
		if o.Index != asked[i] || o.Type != known.Type {
			return fmt.Errorf("%w: output %d of type %s instead of %q", ort.ErrPacket, o.Index, o.Type, known.Name)
		}
		if o.Type != tensor.String {
			numbers += o.Size
		}
	}
	lent := !a.Inline && numbers > ort.MaxInlined && r.memory.lend()
	for i := range a.Outputs {
		o := &a.Outputs[i]
		data := []byte{}
		if o.Size > 0 {
			data = from[o.At : o.At+o.Size : o.At+o.Size]
		}
		if !a.Inline && (!lent || o.Type == tensor.String) {
			data = bytes.Clone(data)
		}
		t := tensor.Tensor{Name: r.version.info.Outputs[asked[i]].Name, Type: o.Type, Shape: o.Shape, Data: data}
		if err := t.Check(); err != nil {
			return fmt.Errorf("%w: %w", ort.ErrPacket, err)
		}
		r.data = append(r.data, data)
	}
	return nil
}

// began is when the process did, by time.Now and, since its start, by
// CLOCK_MONOTONIC, which the child reads too.
var began = func() (b struct {
	at    time.Time
	since time.Duration
}) {
	var now unix.Timespec
	b.at = time.Now()
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err)
	}
	b.since = time.Duration(now.Nano())
	return b
}()

// clock reads CLOCK_MONOTONIC without a system call.
func clock() time.Duration { return began.since + time.Since(began.at) }
