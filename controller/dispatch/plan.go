package dispatch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// batch bounds the generations that are persisted in one transaction.
const batch = 500

// retry is how long the planner waits after a pass that failed.
const retry = time.Second

// The planner waits idle times as long as a pass took before the next one, and
// maxIdle at most: what comes meanwhile is one pass's work.
const (
	idle    = 2
	maxIdle = 500 * time.Millisecond
)

// planner is what the planner knows from one pass to the next. It is its
// goroutine's own.
type planner struct {
	loaded   bool
	objects  fleet.Objects
	rollouts []fleet.Rollout // current, by number
	compiler *fleet.Compiler // nil: of other objects or rollouts
	names    []string        // of the devices, sorted; nil: to be sorted anew
	assigned map[string][]string
	closed   map[string]time.Time // devices on which no change may begin, and when it may; zero: not known
	wake     time.Time            // when a rollout's time comes
	looked   time.Time            // when rollouts were stepped last
	drifts   map[string]drifting  // of connected devices
	swept    time.Time            // when devices were held against their documents last
	kept     time.Time            // when figures were kept last
}

// plan runs passes until ctx is done: when something changed, when a
// generation is to be sent again, and when a rollout's time comes.
func (d *Dispatcher) plan(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		began := time.Now()
		next, err := d.pass(ctx)
		if ctx.Err() != nil {
			return
		}
		wait := max(next.Sub(d.now()), 0)
		if err != nil {
			d.log.Error("cannot bring the devices up to date, will try again", "error", err)
			d.objects.Store(true)
			d.planner.loaded = false // what it did is not known: all is read anew
			wait = retry
		}
		// Reports come in bursts: one pass sees many of them.
		pause := time.NewTimer(max(d.timing.pass, min(idle*time.Since(began), maxIdle)))
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-d.kick:
		case <-timer.C:
		}
	}
}

// pass brings everything up to date with the store, and says when the next one
// is due though nothing changes. After a restart, the first one is the same work
// for all devices: nothing else needs to be known.
func (d *Dispatcher) pass(ctx context.Context) (next time.Time, err error) {
	p := &d.planner
	compile := map[string]bool{} // devices whose documents may have changed
	objects := d.objects.Swap(false)
	if !p.loaded {
		if err := d.load(ctx); err != nil {
			return next, fmt.Errorf("read the store: %w", err)
		}
		objects, p.loaded = false, true
	}
	if objects {
		if err := d.reload(ctx, compile); err != nil {
			return next, fmt.Errorf("read the store: %w", err)
		}
	}
	changed, err := d.refresh(ctx, compile)
	if err != nil {
		return next, fmt.Errorf("read the store: %w", err)
	}
	now := d.now()
	for name, opens := range p.closed {
		if !opens.IsZero() && !now.Before(opens) {
			compile[name] = true
		}
	}
	due := objects || len(changed) > 0 || !p.wake.IsZero() && !now.Before(p.wake) || now.Sub(p.looked) >= d.timing.look
	if due {
		// A rollout that has not been stepped says only now who is given its
		// version: until then they keep what they have.
		if err := d.step(ctx, compile, func(r fleet.Rollout) bool { return r.Since.IsZero() }); err != nil {
			return next, err
		}
	}
	if err := d.compile(ctx, compile); err != nil {
		return next, err
	}
	if due {
		// Only now that the devices' generations follow from the same objects as
		// the rollouts can their reports be held against them.
		clear(compile)
		p.wake, p.looked = time.Time{}, now
		if err := d.step(ctx, compile, func(r fleet.Rollout) bool { return !r.Since.IsZero() }); err != nil {
			return next, err
		}
		if err := d.compile(ctx, compile); err != nil {
			return next, err
		}
	}
	if err := d.keepFigures(ctx); err != nil {
		return next, err
	}
	if err := d.drift(ctx, changed); err != nil {
		return next, err
	}
	next = earlier(p.wake, d.now().Add(time.Hour))
	var drift time.Time
	for _, one := range p.drifts {
		drift = earlier(one.due, drift)
	}
	if soon := p.swept.Add(d.timing.drift); !drift.IsZero() && drift.Before(soon) {
		drift = soon
	}
	next = earlier(drift, next)
	if slices.ContainsFunc(p.rollouts, func(r fleet.Rollout) bool { return !r.State.Ended() }) {
		next = earlier(next, d.now().Add(d.timing.look))
	}
	for _, opens := range p.closed {
		next = earlier(next, opens)
	}
	again, err := d.resend(ctx)
	return earlier(next, again), err
}

func earlier(a, b time.Time) time.Time {
	if b.IsZero() || !a.IsZero() && a.Before(b) {
		return a
	}
	return b
}

// load reads everything.
func (d *Dispatcher) load(ctx context.Context) error {
	p := &d.planner
	since := d.view.now()
	snap, err := d.store.Snapshot(ctx)
	if err != nil {
		return err
	}
	d.view.read(snap.Devices, nil, since)
	p.objects, p.rollouts, p.compiler, p.names, p.assigned = snap.Objects, snap.Rollouts, nil, nil, map[string][]string{}
	p.closed, p.drifts = map[string]time.Time{}, map[string]drifting{}
	d.resume(snap.Devices)
	d.publish()
	return d.loadFigures(ctx)
}

// publish shows the rollouts to those who follow them.
func (d *Dispatcher) publish() {
	current := make(map[string]fleet.Rollout, len(d.planner.rollouts))
	for _, r := range d.planner.rollouts {
		current[r.ID()] = r
	}
	d.mu.Lock()
	d.current = current
	d.mu.Unlock()
	d.Notify()
}

// reload reads objects and rollouts, and adds the devices that the changes
// touch.
func (d *Dispatcher) reload(ctx context.Context, compile map[string]bool) error {
	p := &d.planner
	snap, err := d.store.Plans(ctx, p.rollouts)
	if err != nil {
		return err
	}
	before, after := p.objects, snap.Objects
	before.Rollouts, after.Rollouts = p.rollouts, snap.Rollouts
	touched := fleet.Touched(before, after)
	p.objects, p.rollouts, p.compiler = snap.Objects, snap.Rollouts, nil
	for name, dev := range d.view.all() {
		f := dev.Fleet()
		if touched(f) {
			compile[name] = true
			p.assign(f)
		}
	}
	d.publish()
	return d.loadFigures(ctx)
}

// assign finds the deployments that count for a device.
func (p *planner) assign(f fleet.Device) {
	var all []string
	for _, dep := range fleet.Assign(f, p.objects.Deployments) {
		all = append(all, dep.Name)
	}
	p.assigned[f.Name] = all
}

// refresh reads the devices that the view does not know, adds those whose
// documents may have changed because they did, and gives all that changed.
func (d *Dispatcher) refresh(ctx context.Context, compile map[string]bool) (map[string]news, error) {
	p := &d.planner
	changed := d.view.take()
	var unknown []string
	for name, what := range changed {
		if what&newRow != 0 {
			unknown = append(unknown, name)
		}
	}
	if len(unknown) > 0 {
		since := d.view.now()
		devices, err := d.store.DevicesOf(ctx, unknown)
		if err != nil {
			return nil, err
		}
		d.view.read(devices, unknown, since)
		d.resume(devices)
		for name, what := range d.view.take() {
			changed[name] = changed[name]&^newRow | what
			if what&newRow != 0 { // it changed meanwhile
				d.view.stale(name)
				d.wake()
			}
		}
	}
	for name, what := range changed {
		switch {
		case what&newDrop != 0:
			p.names = nil
			delete(p.assigned, name)
			delete(p.closed, name)
			delete(p.drifts, name)
			d.dropped(name)
		case what&newShape != 0:
			compile[name] = true
			if _, known := p.assigned[name]; !known {
				p.names = nil
			}
			for _, dev := range d.view.some([]string{name}) {
				p.assign(dev.Fleet())
			}
		}
	}
	return changed, nil
}

// compile persists the desired documents that changed as new generations, then
// publishes those of connected devices, and those that were never observed.
func (d *Dispatcher) compile(ctx context.Context, names map[string]bool) error {
	if len(names) == 0 {
		return nil
	}
	p := &d.planner
	compiler, now := p.compile(), d.now()
	devices := d.view.some(slices.Sorted(maps.Keys(names)))
	of := make([]fleet.Device, len(devices))
	documents := make([]*dunlinv1.DesiredDocument, len(devices))
	refused := make([][]fleet.Refusal, len(devices))
	var unsure []string // those whose document depends on what they were given before
	for i, dev := range devices {
		of[i] = dev.Fleet()
		delete(p.closed, dev.Name)
		var opens time.Time
		if of[i].Closed, opens = compiler.Closed(of[i], now); of[i].Closed != "" {
			p.closed[dev.Name] = opens
			unsure = append(unsure, dev.Name)
			continue
		}
		if documents[i], refused[i] = compiler.Compile(of[i], nil); len(refused[i]) > 0 {
			unsure = append(unsure, dev.Name)
		}
	}
	had, err := d.store.Documents(ctx, unsure)
	if err != nil {
		return fmt.Errorf("read desired documents: %w", err)
	}
	var changed []store.Desired
	for i, dev := range devices {
		if of[i].Closed != "" || len(refused[i]) > 0 {
			documents[i], refused[i] = compiler.Compile(of[i], had[dev.Name])
		}
		data, sum, err := fleet.Encode(documents[i])
		if err != nil {
			return fmt.Errorf("device %s: %w", dev.Name, err)
		}
		if dev.Desired == 0 || dev.DesiredSHA != sum {
			changed = append(changed, store.Desired{Device: dev.Name, SHA256: sum, Document: data})
		}
	}
	d.refuse(devices, refused)
	d.mu.Lock()
	d.crowd = max(d.crowd, len(changed))
	d.mu.Unlock()
	for some := range slices.Chunk(changed, batch) {
		saved, err := d.store.SaveDesired(ctx, some)
		if err != nil {
			return fmt.Errorf("persist desired documents: %w", err)
		}
		for _, g := range saved {
			d.view.wanted(g)
			d.log.Debug("new generation", "device", g.Device, "generation", g.Number)
			if d.expect(g) {
				d.sendDesired(g)
			}
		}
	}
	if len(changed) > 0 {
		d.log.Info("new generations", "devices", len(changed), "first", changed[0].Device)
	}
	return nil
}

// compile gives the compiler of the objects and rollouts as they are.
func (p *planner) compile() *fleet.Compiler {
	if p.compiler == nil {
		o := p.objects
		o.Rollouts = p.rollouts
		p.compiler = fleet.NewCompiler(o)
	}
	return p.compiler
}

// refuse keeps what devices are not given, and says so once.
func (d *Dispatcher) refuse(devices []*store.Device, refused [][]fleet.Refusal) {
	for i, dev := range devices {
		d.mu.Lock()
		before := d.refused[dev.Name]
		if len(refused[i]) > 0 {
			d.refused[dev.Name] = refused[i]
		} else {
			delete(d.refused, dev.Name)
		}
		d.mu.Unlock()
		for _, r := range refused[i] {
			if !slices.Contains(before, r) {
				d.log.Warn("a device is not given a version", "device", dev.Name, "deployment", r.Deployment, "model", r.Model, "version", r.Version, "reason", r.Reason)
			}
		}
	}
}

// resume makes an entry for each device that the store has as connected, as
// it does after a restart: one that has not observed its generation gets it
// now, and one that is not heard any more will be found away.
func (d *Dispatcher) resume(devices []*store.Device) {
	now := d.now()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, dev := range devices {
		if !dev.Connected || d.live[dev.Name] != nil {
			continue
		}
		l := &live{greeted: true, heard: now, saved: now}
		if dev.Desired != 0 && !dev.Observe(d.store.Incarnation(), "", 0).Observed {
			l.pending, l.next = dev.Desired, now
		}
		d.live[dev.Name] = l
	}
}

// step takes rollouts that have not ended on, the oldest first, and adds the
// devices that are to have another version because of it.
func (d *Dispatcher) step(ctx context.Context, compile map[string]bool, which func(fleet.Rollout) bool) error {
	p := &d.planner
	watched, ended := 0, false
	for i := range p.rollouts {
		before := p.rollouts[i]
		if before.State.Ended() || !which(before) {
			continue
		}
		if before.State == fleet.Running && before.Anew {
			if err := d.anew(ctx, before.Number); err != nil {
				return err
			}
		}
		now := d.now().UTC().Round(0)
		after, actions := before.Step(now, d.observe(before, now))
		var decisions []fleet.Decision
		for _, a := range actions {
			if a.Kind == fleet.Decide {
				decisions = append(decisions, a.Decision)
			}
		}
		if len(decisions) > 0 || !same(before, after) {
			err := d.store.SaveRollout(ctx, before, after, decisions)
			if errors.Is(err, store.ErrStale) {
				d.Replan() // a newer one took over meanwhile, or an operator asked for something
				continue
			}
			if err != nil {
				return fmt.Errorf("persist rollout %s: %w", before.ID(), err)
			}
			p.rollouts[i] = after
			gives(before, after, compile)
			p.compiler = nil
			d.publish()
		}
		for _, decision := range decisions {
			d.log.Info("rollout: "+string(decision.Kind), "rollout", after.ID(), "wave", decision.Wave, "devices", decision.DeviceCount, "by", decision.By, "reason", decision.Reason)
		}
		var watch []string
		for _, a := range actions {
			switch a.Kind {
			case fleet.Wake:
				p.wake = earlier(a.At, p.wake)
			case fleet.Ask:
				d.ask(a.Device)
			case fleet.Watch:
				if watched++; watched <= maxWatched {
					watch = append(watch, a.Device)
				}
			case fleet.End:
				ended = true
				d.log.Info("rollout ended", "rollout", after.ID(), "state", after.State.String(), "reason", after.Reason)
			}
		}
		d.watch(after, watch)
		if len(watch) > 0 {
			p.wake = earlier(p.wake, now.Add(d.timing.sample))
		}
	}
	if ended {
		return d.loadFigures(ctx)
	}
	return nil
}

// same says whether a step changed nothing that is kept.
func same(before, after fleet.Rollout) bool {
	return before.Equal(after) && slices.EqualFunc(before.Gates, after.Gates, func(a, b fleet.GateResult) bool {
		return a.NewSamples == b.NewSamples && a.OldSamples == b.OldSamples && a.Reason == b.Reason
	})
}

// gives adds the devices to which a rollout gives another version than before.
func gives(before, after fleet.Rollout, to map[string]bool) {
	if before.State != after.State {
		for _, d := range after.Devices {
			model, version := before.Gives(d.Device)
			if m, v := after.Gives(d.Device); m != model || v != version {
				to[d.Device] = true
			}
		}
		return
	}
	had := before.Devices
	for _, d := range after.Devices {
		for len(had) > 0 && had[0].Device < d.Device {
			to[had[0].Device] = true
			had = had[1:]
		}
		known := len(had) > 0 && had[0].Device == d.Device
		if !known && !d.AdmittedAt.IsZero() || known && had[0].AdmittedAt.IsZero() != d.AdmittedAt.IsZero() {
			to[d.Device] = true
		}
		if known {
			had = had[1:]
		}
	}
	for _, d := range had {
		to[d.Device] = true
	}
}

// observe gives what is known of the devices of a rollout, by name.
func (d *Dispatcher) observe(r fleet.Rollout, now time.Time) []fleet.Observation {
	p := &d.planner
	devices := d.view.all()
	if p.names == nil {
		p.names = slices.Sorted(maps.Keys(devices))
	}
	var older []fleet.Rollout
	for _, o := range p.rollouts {
		if o.Number < r.Number && !o.State.Ended() && o.Deployment != r.Deployment {
			older = append(older, o)
		}
	}
	figures := d.figuresOf(r.Number)
	bounded := len(p.objects.Freezes)+len(p.objects.Maintenances) > 0
	observations := make([]fleet.Observation, 0, len(r.Devices))
	for _, name := range p.names {
		if !slices.Contains(p.assigned[name], r.Deployment) {
			continue
		}
		dev := devices[name]
		if dev == nil {
			continue
		}
		o := dev.ObserveRollout(d.store.Incarnation(), r)
		for _, refusal := range d.Refused(name) {
			if refusal.Deployment == r.Deployment && refusal.Version == r.To {
				o.Refused = refusal.Reason
			}
		}
		if bounded {
			o.Closed, o.Opens = p.compile().Closed(fleet.Device{Name: name, Labels: dev.Labels}, now)
		}
		for _, other := range older {
			if other.Changes(name, now) {
				o.Busy = other.ID()
				break
			}
		}
		if t, ok := figures[name]; ok {
			o.New, o.Old = t.New.Sum, t.Old.Sum
		}
		observations = append(observations, o)
	}
	return observations
}

// resend sends generations again that were not observed in time, and says
// when the next one is due; zero: none waits.
func (d *Dispatcher) resend(ctx context.Context) (next time.Time, err error) {
	now := d.now()
	var due []string
	d.mu.Lock()
	waiting := false
	for device, l := range d.live {
		waiting = waiting || l.pending != 0
		switch {
		case l.pending == 0:
		case !l.next.After(now):
			due = append(due, device)
		default:
			next = earlier(l.next, next)
		}
	}
	if !waiting {
		d.crowd = 0
	}
	d.mu.Unlock()
	for _, device := range due {
		g, err := d.store.Desired(ctx, device)
		if errors.Is(err, store.ErrNotFound) {
			d.mu.Lock()
			delete(d.live, device) // removed meanwhile
			d.mu.Unlock()
			continue
		}
		if err != nil {
			return next, err
		}
		d.expect(g)
		d.sendDesired(g)
		next = earlier(next, now.Add(d.timing.resend/2))
	}
	return next, nil
}

// backoff gives how long to wait for an answer to the n-th attempt: half of
// it fixed, half of it random.
func (d *Dispatcher) backoff(n int) time.Duration {
	most := d.timing.resendMost
	if n < 16 {
		most = min(most, d.timing.resend<<n)
	}
	return most/2 + rand.N(most/2+1)
}
