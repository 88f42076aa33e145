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

// plan runs passes until ctx is done: when something changed, when a
// generation is to be sent again, and when a rollout's time comes.
func (d *Dispatcher) plan(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next, err := d.pass(ctx)
		if ctx.Err() != nil {
			return
		}
		wait := max(next.Sub(d.now()), 0)
		if err != nil {
			d.log.Error("cannot bring the devices up to date, will try again", "error", err)
			d.objects.Store(true)
			wait = retry
		}
		// Reports come in bursts: one pass sees many of them.
		pause := time.NewTimer(d.timing.pass)
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

// pass brings everything up to date with one state of the store, and says
// when the next one is due though nothing changes. It is the same work after
// a restart: nothing else needs to be known.
func (d *Dispatcher) pass(ctx context.Context) (next time.Time, err error) {
	objects := d.objects.Swap(false)
	next = d.now().Add(time.Hour)
	if objects || d.running.Load() {
		// A report that comes after the snapshot, of a generation that this
		// very pass publishes maybe, must lead to another pass.
		d.running.Store(true)
		snap, err := d.store.Snapshot(ctx)
		if err != nil {
			return next, fmt.Errorf("read the store: %w", err)
		}
		// The caller of Replan may still be on the way to it.
		newest := d.newest
		for _, r := range snap.Rollouts {
			newest = max(newest, r.Number)
		}
		if objects || newest > d.newest {
			if err := d.compile(ctx, &snap); err != nil {
				return next, err
			}
			d.newest = newest
		}
		// Only now that the devices' generations follow from the same
		// objects as the rollouts can their reports be held against them.
		wake, running, err := d.step(ctx, snap)
		if err != nil {
			return next, err
		}
		d.running.Store(running)
		if running {
			next = earlier(wake, d.now().Add(d.timing.look))
		}
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

// compile persists the desired documents that changed as new generations, then
// publishes those of connected devices, and those that were never observed.
func (d *Dispatcher) compile(ctx context.Context, snap *store.Snapshot) error {
	compiler := fleet.NewCompiler(snap.Objects)
	var changed []store.Desired
	byName := make(map[string]*store.Device, len(snap.Devices))
	documents := make(map[string]*dunlinv1.DesiredDocument, len(snap.Devices))
	refused := map[string][]fleet.Refusal{}
	for _, dev := range snap.Devices {
		byName[dev.Name] = dev
		doc, refuses := compiler.Compile(dev.Fleet(), nil)
		if documents[dev.Name] = doc; len(refuses) > 0 {
			refused[dev.Name] = refuses
		}
	}
	// Only these depend on what they were given before.
	had, err := d.store.Documents(ctx, slices.Sorted(maps.Keys(refused)))
	if err != nil {
		return fmt.Errorf("read desired documents: %w", err)
	}
	for name := range refused {
		if documents[name], refused[name] = compiler.Compile(byName[name].Fleet(), had[name]); len(refused[name]) == 0 {
			delete(refused, name)
		}
	}
	d.refuse(refused)
	for _, dev := range snap.Devices {
		data, sum, err := fleet.Encode(documents[dev.Name])
		if err != nil {
			return fmt.Errorf("device %s: %w", dev.Name, err)
		}
		if dev.Desired == 0 || dev.DesiredSHA != sum {
			changed = append(changed, store.Desired{Device: dev.Name, SHA256: sum, Document: data})
		}
	}
	d.resume(snap.Devices)
	for some := range slices.Chunk(changed, batch) {
		saved, err := d.store.SaveDesired(ctx, some)
		if err != nil {
			return fmt.Errorf("persist desired documents: %w", err)
		}
		for _, g := range saved {
			dev := byName[g.Device]
			dev.Desired, dev.DesiredSHA = g.Number, g.SHA256
			d.log.Info("new generation", "device", g.Device, "generation", g.Number)
			if d.expect(g) {
				d.sendDesired(g)
			}
		}
	}
	return nil
}

// refuse keeps what devices are not given, and says so once.
func (d *Dispatcher) refuse(refused map[string][]fleet.Refusal) {
	d.mu.Lock()
	before := d.refused
	d.refused = refused
	d.mu.Unlock()
	for device, all := range refused {
		for _, r := range all {
			if !slices.Contains(before[device], r) {
				d.log.Warn("a device is not given a version", "device", device, "deployment", r.Deployment, "model", r.Model, "version", r.Version, "reason", r.Reason)
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

// step takes the rollouts of a snapshot on.
func (d *Dispatcher) step(ctx context.Context, snap store.Snapshot) (wake time.Time, running bool, err error) {
	if len(snap.Rollouts) == 0 {
		return wake, false, nil
	}
	assigned := map[string][]*store.Device{} // by deployment
	for _, dev := range snap.Devices {
		for _, dep := range fleet.Assign(dev.Fleet(), snap.Objects.Deployments) {
			assigned[dep.Name] = append(assigned[dep.Name], dev)
		}
	}
	for _, before := range snap.Rollouts {
		var observations []fleet.Observation
		for _, dev := range assigned[before.Deployment] {
			o := dev.Observe(d.store.Incarnation(), before.Model, before.To)
			for _, r := range d.Refused(dev.Name) {
				if r.Deployment == before.Deployment && r.Version == before.To {
					o.Refused = r.Reason
				}
			}
			observations = append(observations, o)
		}
		after, actions := before.Step(d.now().UTC(), observations)
		if !after.Equal(before) {
			err := d.store.SaveRollout(ctx, before, after)
			if errors.Is(err, store.ErrStale) {
				d.wake() // a newer one took over meanwhile
				running = true
				continue
			}
			if err != nil {
				return wake, true, fmt.Errorf("persist rollout %s: %w", before.ID(), err)
			}
			d.Notify()
		}
		running = running || after.State == fleet.Running
		for _, a := range actions {
			switch a.Kind {
			case fleet.Wake:
				wake = earlier(a.At, wake)
			case fleet.Ask:
				d.ask(a.Device)
			case fleet.End:
				d.log.Info("rollout ended", "rollout", after.ID(), "succeeded", after.State == fleet.Succeeded, "reason", after.Reason)
			}
		}
	}
	return wake, running, nil
}

// resend sends generations again that were not observed in time, and says
// when the next one is due; zero: none waits.
func (d *Dispatcher) resend(ctx context.Context) (next time.Time, err error) {
	now := d.now()
	var due []string
	d.mu.Lock()
	for device, l := range d.live {
		switch {
		case l.pending == 0:
		case !l.next.After(now):
			due = append(due, device)
		default:
			next = earlier(l.next, next)
		}
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
