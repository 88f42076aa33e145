package dispatch

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of what devices send.
const (
	maxID       = 64   // characters of a session, boot or outbox id
	maxVersions = 1000 // that a device reports
	maxKind     = 64   // characters of an event's kind
	maxAlarms   = 256  // that are raised at a time
	maxSamples  = 64   // that an alarm rests on
	maxModels   = 1000 // of which telemetry tells
	// Of a profile:
	maxText    = 1024 // bytes of a text
	maxBytes   = 1 << 48
	maxPoints  = 4096
	maxRows    = 1 << 20
	maxSeconds = 86400
)

// ProfileKind is the kind of an event that carries a profile.
const ProfileKind = "profile.measured"

// decode gives the message of a kind, checked.
func decode(kind string, payload []byte) (proto.Message, error) {
	var m proto.Message
	var check func() error
	switch kind {
	case link.Hello:
		v := &dunlinv1.Hello{}
		m, check = v, func() error {
			return errors.Join(checkID("session", v.GetSession()), checkID("boot_id", v.GetBootId()), fleet.CheckLabels(v.GetLabels()), CheckNumbers(v.GetInfo()))
		}
	case link.Reported:
		v := &dunlinv1.Reported{}
		m, check = v, func() error { return checkReported(v) }
	case link.Events:
		v := &dunlinv1.EventBatch{}
		m, check = v, func() error { return checkEvents(v) }
	case link.Telemetry:
		v := &dunlinv1.Telemetry{}
		m, check = v, func() error { return checkTelemetry(v) }
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
	case link.Sources:
		v := &dunlinv1.SourcesRequest{}
		m, check = v, func() error {
			if err := models.CheckName(v.GetModel()); err != nil {
				return fmt.Errorf("model: %w", err)
			}
			if d := digest.Digest(v.GetDigest()); d.Validate() != nil || d.Algorithm() != digest.SHA256 {
				return fmt.Errorf("digest %.100q is not sha256: and 64 hexadecimal digits", v.GetDigest())
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
	if n := len(r.GetDrifts()); n > maxVersions {
		return fmt.Errorf("drifts has %d entries, the limit is %d", n, maxVersions)
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

func checkTelemetry(t *dunlinv1.Telemetry) error {
	if n := len(t.GetAlarms()); n > maxAlarms {
		return fmt.Errorf("alarms has %d entries, the limit is %d", n, maxAlarms)
	}
	for i, a := range t.GetAlarms() {
		if n := len(a.GetSamples()); n > maxSamples {
			return fmt.Errorf("alarms[%d].samples has %d entries, the limit is %d", i, n, maxSamples)
		}
	}
	if n := len(t.GetBootId()); n > maxID {
		return fmt.Errorf("boot_id has %d characters, the limit is %d", n, maxID)
	}
	if n := len(t.GetModels()); n > maxModels {
		return fmt.Errorf("models has %d entries, the limit is %d", n, maxModels)
	}
	for i, m := range t.GetModels() {
		if m.GetSucceeded() > maxCounted || m.GetFailed() > maxCounted {
			return fmt.Errorf("models[%d] counts more than %d requests", i, uint64(maxCounted))
		}
		if err := checkFigures(m.GetFigures()); err != nil {
			return fmt.Errorf("models[%d].%w", i, err)
		}
	}
	return CheckNumbers(t)
}

// checkAlarm says what is wrong with the alarm of an event.
func checkAlarm(a *dunlinv1.Alarm) error {
	if n := len(a.GetSamples()); n > maxSamples {
		return fmt.Errorf("samples has %d entries, the limit is %d", n, maxSamples)
	}
	return CheckNumbers(a)
}

// CheckNumbers says which field of m, or of what m holds, is no finite number.
func CheckNumbers(m proto.Message) error { return checkNumbers(m.ProtoReflect(), "") }

func checkNumbers(m protoreflect.Message, path string) (err error) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := path + string(f.Name())
		one := func(v protoreflect.Value) error {
			switch f.Kind() {
			case protoreflect.DoubleKind, protoreflect.FloatKind:
				if x := v.Float(); math.IsNaN(x) || math.IsInf(x, 0) {
					return fmt.Errorf("%s %v is not a number", name, x)
				}
			case protoreflect.MessageKind:
				return checkNumbers(v.Message(), name+".")
			}
			return nil
		}
		switch {
		case f.IsMap(): // none of these messages has one with numbers
		case f.Kind() != protoreflect.DoubleKind && f.Kind() != protoreflect.FloatKind && f.Kind() != protoreflect.MessageKind:
		case f.IsList():
			for i := 0; i < v.List().Len() && err == nil; i++ {
				err = one(v.List().Get(i))
			}
		default:
			err = one(v)
		}
		return err == nil
	})
	return err
}

// maxProfile bounds a profile in bytes; an agent keeps its events below that.
const maxProfile = 32 << 10

// checkProfile says what is wrong with a profile that a device sends.
func checkProfile(p *dunlinv1.ModelProfile) error {
	if err := models.CheckName(p.GetModel()); err != nil {
		return fmt.Errorf("model: %w", err)
	}
	if v := p.GetVersion(); v < 1 || v > models.MaxVersion {
		return fmt.Errorf("version %d, allowed are 1 to %d", v, int64(models.MaxVersion))
	}
	if d := digest.Digest(p.GetDigest()); d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("digest %.100q is not sha256: and 64 hexadecimal digits", p.GetDigest())
	}
	for field, s := range map[string]string{
		"model_digest": p.GetModelDigest(), "firmware_profile": p.GetFirmwareProfile(), "runtime_version": p.GetRuntimeVersion(),
		"driver_version": p.GetDriverVersion(), "cpu_model": p.GetCpuModel(), "unmeasured": p.GetUnmeasured(),
	} {
		if len(s) > maxText {
			return fmt.Errorf("%s has %d bytes, the limit is %d", field, len(s), maxText)
		}
	}
	for field, n := range map[string]uint64{
		"weight_bytes": p.GetWeightBytes(), "session_bytes": p.GetSessionBytes(), "prepacked_bytes": p.GetPrepackedBytes(),
		"workspace_fixed_bytes": p.GetWorkspaceFixedBytes(), "workspace_row_bytes": p.GetWorkspaceRowBytes(),
	} {
		if n > maxBytes {
			return fmt.Errorf("%s is %d, the limit is %d", field, n, uint64(maxBytes))
		}
	}
	if n := proto.Size(p); n > maxProfile {
		return fmt.Errorf("it has %d bytes, the limit is %d", n, maxProfile)
	}
	if n := len(p.GetPoints()) + len(p.GetLatency()) + len(p.GetProviders()); n > maxPoints {
		return fmt.Errorf("points, latency and providers have %d entries together, the limit is %d", n, maxPoints)
	}
	if b := p.GetRecommended().GetBatch(); b > maxRows {
		return fmt.Errorf("recommended.batch is %d, the limit is %d", b, maxRows)
	}
	for i, l := range p.GetLatency() {
		if l.GetRows() < 1 || l.GetRows() > maxRows || l.GetSeconds() < 0 || l.GetSeconds() > maxSeconds {
			return fmt.Errorf("latency[%d] is %v s of %d rows, allowed are 0 to %d s and 1 to %d rows", i, l.GetSeconds(), l.GetRows(), maxSeconds, maxRows)
		}
	}
	for i, q := range p.GetPoints() {
		if b := q.GetSetting().GetBatch(); b > maxRows {
			return fmt.Errorf("points[%d].setting.batch is %d, the limit is %d", i, b, maxRows)
		}
		for field, x := range map[string]float64{"p50_seconds": q.GetP50Seconds(), "p95_seconds": q.GetP95Seconds(), "p99_seconds": q.GetP99Seconds(), "joules_per_row": q.GetJoulesPerRow(), "rows_per_second": q.GetRowsPerSecond() / 1e9} {
			if x < 0 || x > maxSeconds {
				return fmt.Errorf("points[%d].%s is out of bounds", i, field)
			}
		}
	}
	return CheckNumbers(p)
}

// take does what messages ask for, in order. Those that are kept are kept in one
// transaction, and answered after its commit only.
func (d *Dispatcher) take(ctx context.Context, in []message) {
	var kept []store.Inbound
	var later []func(store.Taken) error // what follows for each of kept
	var kinds []string
	var who map[*dunlinv1.Hello]said
	for _, m := range in {
		decoded, err := decode(m.kind, m.payload)
		if err != nil {
			d.drop(m.kind, m.device, err)
			continue
		}
		keep := func(i store.Inbound, then func(store.Taken) error) {
			i.Device = m.device
			kept, later, kinds = append(kept, i), append(later, then), append(kinds, m.kind)
		}
		switch v := decoded.(type) {
		case *dunlinv1.Hello:
			// Live first: a generation that the planner makes while the store is
			// asked is then published by the planner.
			d.touch(m.device, func(l *live) { l.sent, l.leased, l.looked = 0, time.Time{}, time.Time{} })
			keep(store.Inbound{Hello: v}, func(t store.Taken) error { return d.hello(ctx, m.device, v, t, who[v]) })
		case *dunlinv1.Reported:
			keep(store.Inbound{Report: v}, func(t store.Taken) error { return d.reported(ctx, m.device, v, t) })
		case *dunlinv1.EventBatch:
			d.checkBatch(m.device, v)
			keep(store.Inbound{Events: v}, func(t store.Taken) error { return d.events(m.device, v, t) })
		case *dunlinv1.Gone:
			keep(store.Inbound{Gone: v}, func(t store.Taken) error { return d.gone(m.device, v, t) })
		case *dunlinv1.Telemetry:
			d.telemetry(m.device, v)
		case *dunlinv1.BlockRequest:
			d.failed(ctx, m.device, m.kind, d.request(ctx, m.device, v))
		case *dunlinv1.SourcesRequest:
			d.sources(m.device, v)
		}
	}
	if len(kept) == 0 {
		return
	}
	taken, err := d.store.Take(ctx, kept)
	if err != nil {
		taken = slices.Repeat([]store.Taken{{Err: err}}, len(kept))
	}
	who = d.identify(ctx, kept, taken)
	for i, t := range taken {
		d.view.said(kept[i], t, d.now())
		d.failed(ctx, kept[i].Device, kinds[i], later[i](t))
	}
}

// failed says what came of a message that could not be taken in.
func (d *Dispatcher) failed(ctx context.Context, device, kind string, err error) {
	switch {
	case err == nil || ctx.Err() != nil:
	case errors.Is(err, store.ErrStale):
		d.stale.WithLabelValues(kind).Inc()
		d.log.Debug("ignored a message of an older session or out of order", "device", device, "kind", kind)
	case errors.Is(err, store.ErrNotFound):
		d.stale.WithLabelValues(kind).Inc()
		d.log.Warn("message of a device that is not known", "device", device, "kind", kind)
		d.bus.Disconnect(device)
	default:
		// The device sends again what it has no answer to.
		d.log.Error("cannot take a message in", "device", device, "kind", kind, "error", err)
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

func (d *Dispatcher) hello(ctx context.Context, device string, h *dunlinv1.Hello, t store.Taken, who said) error {
	if errors.Is(t.Err, store.ErrNotFound) {
		d.mu.Lock()
		delete(d.live, device)
		d.mu.Unlock()
	}
	if t.Err != nil {
		return t.Err
	}
	if who.err != nil || !who.serve {
		return who.err
	}
	d.renew(device, h)
	// Heard not before the store has it: it counts as away by this time.
	d.touch(device, func(l *live) { l.greeted = true })
	d.log.Info("device connected", "device", device)
	if made, outside := fleet.Skew(program.Version(), h.GetInfo().GetAgentVersion()); outside {
		d.log.Warn("this controller is not made for the device's agent: update the older one of the two", "device", device, "agent_version", h.GetInfo().GetAgentVersion(), "made_for", made)
	}
	d.wake()
	if t.Device.Desired == 0 {
		return nil // the planner makes its first generation and publishes it
	}
	// Expected though it may have it: its report may get lost.
	first := d.expect(store.Desired{Device: device, Number: t.Device.Desired})
	have := h.GetHaveGeneration()
	if !first || have.GetIncarnation() == d.store.Incarnation() && have.GetNumber() == t.Device.Desired {
		return nil
	}
	g, err := d.store.Desired(ctx, device)
	if err != nil {
		return err
	}
	if g.Number == t.Device.Desired || d.expect(g) { // else the planner sends the newer one
		d.sendDesired(g)
	}
	return nil
}

// expect notes a generation that is sent now, until the device reports it as
// observed. It says whether it is the first time since the device said hello:
// the planner and hello may both be about to send it.
func (d *Dispatcher) expect(g store.Desired) (first bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.live[g.Device]
	if l == nil {
		return false // away: it says hello when it comes
	}
	if g.Number < max(l.pending, l.sent) {
		return false // a newer one was sent since it was read
	}
	first, l.sent = l.sent != g.Number, g.Number
	if l.pending != g.Number {
		l.pending, l.attempt = g.Number, 0
	}
	l.asked = d.now()
	// What is slow because many answer at once is not made faster by sending
	// it again.
	l.next = l.asked.Add(d.backoff(l.attempt) + time.Duration(d.crowd)*d.timing.share)
	l.attempt++
	return first
}

func (d *Dispatcher) reported(ctx context.Context, device string, r *dunlinv1.Reported, t store.Taken) error {
	err := t.Err
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
	if err == nil {
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

// checkBatch leaves out what is wrong within events.
func (d *Dispatcher) checkBatch(device string, b *dunlinv1.EventBatch) {
	// What is wrong within an event is left out, and the event acknowledged all
	// the same: sent again it would be no better.
	for _, e := range b.GetEvents() {
		if p := e.GetProfile(); p != nil {
			err := checkProfile(p)
			if err == nil && e.GetKind() != ProfileKind {
				err = fmt.Errorf("kind %q carries no profile", e.GetKind())
			}
			if err != nil {
				d.malformed.WithLabelValues("profile").Inc()
				d.log.Warn("left out a malformed profile", "device", device, "event", e.GetSequence(), "error", err)
				e.Profile = nil
			}
		}
		if a := e.GetAlarm(); a != nil {
			if err := checkAlarm(a); err != nil {
				d.malformed.WithLabelValues("alarm").Inc()
				d.log.Warn("left out a malformed alarm", "device", device, "event", e.GetSequence(), "error", err)
				e.Alarm = nil
			}
		}
	}
}

func (d *Dispatcher) events(device string, b *dunlinv1.EventBatch, t store.Taken) error {
	if t.Err != nil {
		return t.Err
	}
	if t.Measured && d.refuses() {
		d.Replan()
	}
	d.send(link.Down(device, link.Command), link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_EventAck{
		EventAck: &dunlinv1.EventAck{OutboxId: b.GetOutboxId(), Sequence: t.Stored},
	}})
	return nil
}

// telemetry keeps the newest sample of a connected device, and asks one that
// counts as away to say hello.
func (d *Dispatcher) telemetry(device string, t *dunlinv1.Telemetry) {
	greeted := false
	d.touch(device, func(l *live) {
		keepEvidence(l.telemetry, t)
		l.telemetry, greeted = t, l.greeted
		d.count(device, t)
	})
	if !greeted {
		d.ask(device)
	}
}

// keepEvidence gives the alarms of a sample what they rest on where the device
// has left that out because the sample before has it.
func keepEvidence(before, now *dunlinv1.Telemetry) {
	for _, a := range now.GetAlarms() {
		for _, b := range before.GetAlarms() {
			if len(a.GetSamples()) == 0 && a.GetKind() == b.GetKind() && a.GetSubject() == b.GetSubject() &&
				a.GetMethod() == b.GetMethod() && a.GetSeverity() == b.GetSeverity() && proto.Equal(a.GetRaisedAt(), b.GetRaisedAt()) {
				a.Samples = b.GetSamples() // never changed
			}
		}
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

func (d *Dispatcher) gone(device string, _ *dunlinv1.Gone, t store.Taken) error {
	if t.Err != nil {
		return t.Err
	}
	d.log.Info("device disconnected", "device", device)
	d.mu.Lock()
	delete(d.live, device)
	d.mu.Unlock()
	d.wake()
	return nil
}
