package dispatch

import (
	"context"
	"errors"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of what devices send.
const (
	maxID       = 64   // characters of a session, boot or outbox id
	maxVersions = 1000 // that a device reports
	maxKind     = 64   // characters of an event's kind
)

// decode gives the message of a kind, checked.
func decode(kind string, payload []byte) (proto.Message, error) {
	var m proto.Message
	var check func() error
	switch kind {
	case link.Hello:
		v := &dunlinv1.Hello{}
		m, check = v, func() error {
			return errors.Join(checkID("session", v.GetSession()), checkID("boot_id", v.GetBootId()), fleet.CheckLabels(v.GetLabels()))
		}
	case link.Reported:
		v := &dunlinv1.Reported{}
		m, check = v, func() error { return checkReported(v) }
	case link.Events:
		v := &dunlinv1.EventBatch{}
		m, check = v, func() error { return checkEvents(v) }
	case link.Telemetry:
		v := &dunlinv1.Telemetry{}
		m, check = v, func() error {
			if u := v.GetCpuUtilisation(); math.IsNaN(u) || math.IsInf(u, 0) {
				return fmt.Errorf("cpu_utilisation %v is not a number", u)
			}
			return nil
		}
	case link.Request:
		v := &dunlinv1.BlockRequest{}
		m, check = v, func() error {
			if n := v.GetLength(); n < 1 || n > link.MaxBlock {
				return fmt.Errorf("length %d, allowed are 1 to %d", n, link.MaxBlock)
			}
			if n := len(v.GetSha256()); n != 32 {
				return fmt.Errorf("sha256 has %d bytes, not 32", n)
			}
			return nil
		}
	case link.Gone:
		v := &dunlinv1.Gone{}
		m, check = v, func() error { return checkID("session", v.GetSession()) }
	default:
		return nil, fmt.Errorf("unknown kind %q", kind)
	}
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(payload, m); err != nil {
		return nil, err
	}
	return m, check()
}

func checkID(field, id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("%s has %d characters, allowed are 1 to %d", field, len(id), maxID)
	}
	return nil
}

func checkReported(r *dunlinv1.Reported) error {
	if err := checkID("session", r.GetSession()); err != nil {
		return err
	}
	if r.GetSequence() == 0 || r.GetSequence() > math.MaxInt64 {
		return fmt.Errorf("sequence %d, allowed are 1 to %d", r.GetSequence(), int64(math.MaxInt64))
	}
	if n := len(r.GetVersions()); n > maxVersions {
		return fmt.Errorf("versions has %d entries, the limit is %d", n, maxVersions)
	}
	for _, v := range r.GetVersions() {
		if v.GetBytesPresent() > math.MaxInt64 || v.GetBytesTotal() > math.MaxInt64 {
			return fmt.Errorf("version %d of model %q: bytes are above %d", v.GetVersion(), v.GetModel(), int64(math.MaxInt64))
		}
	}
	return nil
}

func checkEvents(b *dunlinv1.EventBatch) error {
	if err := checkID("outbox_id", b.GetOutboxId()); err != nil {
		return err
	}
	last := uint64(0)
	for i, e := range b.GetEvents() {
		if e.GetSequence() <= last || e.GetSequence() > math.MaxInt64 {
			return fmt.Errorf("events[%d].sequence %d, it must be above %d, the one before", i, e.GetSequence(), last)
		}
		if k := e.GetKind(); k == "" || len(k) > maxKind {
			return fmt.Errorf("events[%d].kind has %d characters, allowed are 1 to %d", i, len(k), maxKind)
		}
		last = e.GetSequence()
	}
	return nil
}

// take does what one message asks for.
func (d *Dispatcher) take(ctx context.Context, in message) {
	m, err := decode(in.kind, in.payload)
	if err != nil {
		d.drop(in.kind, in.device, err)
		return
	}
	switch m := m.(type) {
	case *dunlinv1.Hello:
		err = d.hello(ctx, in.device, m)
	case *dunlinv1.Reported:
		err = d.reported(ctx, in.device, m)
	case *dunlinv1.EventBatch:
		err = d.events(ctx, in.device, m)
	case *dunlinv1.Telemetry:
		d.telemetry(in.device, m)
	case *dunlinv1.BlockRequest:
		err = d.request(ctx, in.device, m)
	case *dunlinv1.Gone:
		err = d.gone(ctx, in.device, m)
	}
	switch {
	case err == nil || ctx.Err() != nil:
	case errors.Is(err, store.ErrStale):
		d.stale.WithLabelValues(in.kind).Inc()
		d.log.Debug("ignored a message of an older session or out of order", "device", in.device, "kind", in.kind)
	case errors.Is(err, store.ErrNotFound):
		d.stale.WithLabelValues(in.kind).Inc()
		d.log.Warn("message of a device that is not known", "device", in.device, "kind", in.kind)
		d.bus.Disconnect(in.device)
	default:
		// The device sends again what it has no answer to.
		d.log.Error("cannot take a message in", "device", in.device, "kind", in.kind, "error", err)
	}
}

// touch notes that a device was heard, and gives its entry to do.
func (d *Dispatcher) touch(device string, do func(l *live)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.live[device]
	if l == nil {
		l = &live{}
		d.live[device] = l
	}
	l.heard = d.now()
	do(l)
}

func (d *Dispatcher) hello(ctx context.Context, device string, h *dunlinv1.Hello) error {
	// Live first: a generation that the planner makes while the store is
	// asked is then published by the planner.
	d.touch(device, func(*live) {})
	dev, relabelled, err := d.store.Hello(ctx, device, h)
	if errors.Is(err, store.ErrNotFound) {
		d.mu.Lock()
		delete(d.live, device)
		d.mu.Unlock()
	}
	if err != nil {
		return err
	}
	// Heard not before the store has it: it counts as away by this time.
	d.touch(device, func(l *live) { l.greeted = true })
	d.log.Info("device connected", "device", device)
	if relabelled {
		d.Replan()
	}
	if d.running.Load() {
		d.wake()
	}
	if dev.Desired == 0 {
		return nil // the planner makes its first generation and publishes it
	}
	g, err := d.store.Desired(ctx, device)
	if err != nil {
		return err
	}
	// Expected though it may have it: its report may get lost.
	d.expect(g)
	have := h.GetHaveGeneration()
	if have.GetIncarnation() != d.store.Incarnation() || have.GetNumber() != g.Number {
		d.sendDesired(g)
	}
	return nil
}

// expect notes a generation that is sent now, until the device reports it as
// observed.
func (d *Dispatcher) expect(g store.Desired) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.live[g.Device]
	if l == nil {
		return // away: it says hello when it comes
	}
	if l.pending != g.Number {
		l.pending, l.attempt = g.Number, 0
	}
	l.asked = d.now()
	l.next = l.asked.Add(d.backoff(l.attempt))
	l.attempt++
}

func (d *Dispatcher) reported(ctx context.Context, device string, r *dunlinv1.Reported) error {
	err := d.store.Report(ctx, device, r)
	if err != nil && !errors.Is(err, store.ErrStale) {
		return err
	}
	if err != nil {
		dev, derr := d.store.Device(ctx, device)
		if derr != nil {
			return derr
		}
		if dev.Session != r.GetSession() { // its hello may have been lost
			d.ask(device)
			return err
		}
	}
	greeted := false
	d.touch(device, func(l *live) {
		greeted = l.greeted
		g := r.GetObserved()
		if g.GetIncarnation() == d.store.Incarnation() && g.GetNumber() == l.pending {
			l.pending = 0
		}
	})
	if !greeted { // it counted as away
		d.ask(device)
	}
	if err == nil && d.running.Load() {
		d.wake()
	}
	return err
}

// ask asks a device to say hello again, unless it was asked just now.
func (d *Dispatcher) ask(device string) {
	now, due := d.now(), false
	d.mu.Lock()
	if l := d.live[device]; l == nil {
		d.live[device] = &live{heard: now, asked: now}
		due = true
	} else if now.Sub(l.asked) >= d.timing.ask {
		l.asked, due = now, true
	}
	d.mu.Unlock()
	if due {
		d.send(link.Down(device, link.Command), link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_HelloAgain{HelloAgain: &dunlinv1.HelloAgain{}}})
	}
}

func (d *Dispatcher) events(ctx context.Context, device string, b *dunlinv1.EventBatch) error {
	stored, err := d.store.AddEvents(ctx, device, b.GetOutboxId(), b.GetEvents())
	if err != nil {
		return err
	}
	d.send(link.Down(device, link.Command), link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_EventAck{
		EventAck: &dunlinv1.EventAck{OutboxId: b.GetOutboxId(), Sequence: stored},
	}})
	return nil
}

// telemetry keeps the newest sample of a connected device, and asks one that
// counts as away to say hello.
func (d *Dispatcher) telemetry(device string, t *dunlinv1.Telemetry) {
	greeted := false
	d.touch(device, func(l *live) { l.telemetry, greeted = t, l.greeted })
	if !greeted {
		d.ask(device)
	}
}

// request answers with a piece of the device's own desired document.
func (d *Dispatcher) request(ctx context.Context, device string, r *dunlinv1.BlockRequest) error {
	block := &dunlinv1.Block{Sha256: r.GetSha256(), Offset: r.GetOffset()}
	g, err := d.store.Desired(ctx, device)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if size := uint64(len(g.Document)); err == nil && string(g.SHA256[:]) == string(r.GetSha256()) && r.GetOffset() < size {
		block.Data = g.Document[r.GetOffset():min(size, r.GetOffset()+uint64(r.GetLength()))]
	}
	d.send(link.Down(device, link.Block), link.Block, block)
	return nil
}

func (d *Dispatcher) gone(ctx context.Context, device string, g *dunlinv1.Gone) error {
	if err := d.store.Gone(ctx, device, g.GetSession()); err != nil {
		return err
	}
	d.log.Info("device disconnected", "device", device)
	d.mu.Lock()
	delete(d.live, device)
	d.mu.Unlock()
	if d.running.Load() {
		d.wake()
	}
	return nil
}
