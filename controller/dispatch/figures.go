package dispatch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// While a rollout has gates, devices that run its versions are given a lease to
// send telemetry with figures often. Devices count since their start; what
// counts for the rollout is the difference of two samples of one boot: of the
// new version since the device was given it, and of the old one before that. The
// sum is kept with the counts that it goes up to, so a controller that is killed
// goes on from there: nothing counts twice.

const (
	maxWatched = fleet.MaxWatched + fleet.MaxCompared // devices of all rollouts that send figures at a time

	leaseFor   = time.Minute
	leaseRenew = leaseFor / 2 // what must be left of a lease
	leaseFast  = 2 * time.Second
	leaseSlow  = 5 * time.Second
	maxFast    = 50 // devices of a rollout that send every leaseFast; more send every leaseSlow
	maxCounted = 1 << 53

	// While somebody looks at a device:
	lookEvery = time.Second
	lookFor   = 15 * time.Second
	lookRenew = 10 * time.Second // what must be left
	maxLooked = 64               // devices at a time
)

// watched is a rollout whose figures are counted.
type watched struct {
	model, oldModel string
	to, from        int64
	devices         map[string]*tally
}

// tally is what was counted on one device.
type tally struct {
	store.Tally
	given bool // the device has been given the new version
	dirty bool // it is not kept yet
}

// loadFigures makes what is counted follow from the rollouts that have not
// ended. What is in memory is newer than what is kept.
func (d *Dispatcher) loadFigures(ctx context.Context) error {
	open := map[int64]bool{}
	for _, r := range d.planner.rollouts {
		if r.State.Ended() || len(r.Strategy.Gates) == 0 {
			continue
		}
		open[r.Number] = true
		d.mu.Lock()
		_, known := d.figures[r.Number]
		d.mu.Unlock()
		if known {
			continue
		}
		kept, err := d.store.Tallies(ctx, r.Number)
		if err != nil {
			return fmt.Errorf("read figures: %w", err)
		}
		w := &watched{model: r.Model, to: r.To, oldModel: r.Back(), from: r.From, devices: map[string]*tally{}}
		for device, t := range kept {
			part, _ := r.Device(device)
			w.devices[device] = &tally{Tally: t, given: !part.AdmittedAt.IsZero()}
		}
		d.mu.Lock()
		d.figures[r.Number] = w
		d.mu.Unlock()
	}
	d.mu.Lock()
	maps.DeleteFunc(d.figures, func(number int64, _ *watched) bool { return !open[number] })
	d.mu.Unlock()
	return nil
}

// figuresOf gives what was counted on the devices of a rollout.
func (d *Dispatcher) figuresOf(number int64) map[string]store.Tally {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := d.figures[number]
	if w == nil {
		return nil
	}
	all := make(map[string]store.Tally, len(w.devices))
	for device, t := range w.devices {
		all[device] = t.Tally
	}
	return all
}

// watch gives devices of a rollout leases, and counts what they send.
func (d *Dispatcher) watch(r fleet.Rollout, devices []string) {
	every := leaseFast
	if len(devices) > maxFast {
		every = leaseSlow
	}
	now := d.now()
	due := map[string]time.Duration{}
	d.mu.Lock()
	w := d.figures[r.Number]
	for _, device := range devices {
		l := d.live[device]
		if l == nil || w == nil {
			continue
		}
		t := w.devices[device]
		if t == nil {
			t = &tally{}
			w.devices[device] = t
		}
		if part, ok := r.Device(device); ok {
			t.given = !part.AdmittedAt.IsZero()
		}
		if l.leased.Sub(now) < leaseRenew {
			l.leased = now.Add(leaseFor)
			due[device] = every
			if l.looked.After(now) {
				due[device] = min(every, lookEvery)
			}
		}
	}
	d.mu.Unlock()
	for device, every := range due {
		d.lease(device, every, leaseFor)
	}
}

func (d *Dispatcher) lease(device string, every, lasts time.Duration) {
	d.command(device, &dunlinv1.Command{Command: &dunlinv1.Command_TelemetryLease{TelemetryLease: &dunlinv1.TelemetryLease{
		EveryMs: uint32(every.Milliseconds()), ForMs: uint32(lasts.Milliseconds()),
	}}})
}

// Look has a connected device send telemetry each second for lookFor: who goes
// on looking calls it again. It does not shorten what a rollout has leased.
// Beyond maxLooked devices nothing changes.
func (d *Dispatcher) Look(device string) {
	now := d.now()
	d.mu.Lock()
	l := d.live[device]
	if l == nil || l.looked.Sub(now) > lookRenew || !l.looked.After(now) && d.looked(now) >= maxLooked {
		d.mu.Unlock()
		return
	}
	l.looked = now.Add(lookFor)
	lasts := max(lookFor, l.leased.Sub(now))
	d.mu.Unlock()
	d.lease(device, lookEvery, lasts)
}

// looked counts the devices that somebody looks at; d.mu is held.
func (d *Dispatcher) looked(now time.Time) (n int) {
	for _, l := range d.live {
		if l.looked.After(now) {
			n++
		}
	}
	return n
}

// count takes the figures of a sample in; d.mu is held.
func (d *Dispatcher) count(device string, m *dunlinv1.Telemetry) {
	for _, w := range d.figures {
		t := w.devices[device]
		if t == nil || m.GetBootId() == "" {
			continue
		}
		if now, ok := figuresIn(m, w.oldModel, w.from); ok && w.from > 0 {
			t.Old, t.dirty = counted(t.Old, m.GetBootId(), now, !t.given), true
		}
		if now, ok := figuresIn(m, w.model, w.to); ok {
			t.New, t.dirty = counted(t.New, m.GetBootId(), now, t.given), true
		}
	}
}

// counted takes in the counts of a device's boot. The first ones, and those of
// a time that does not count, are only what later ones are counted from; those
// of a new boot all come after what was counted before.
func counted(c store.Count, boot string, now fleet.Figures, counts bool) store.Count {
	if counts && c.Boot != "" {
		since := now
		if boot == c.Boot {
			since = now.Since(c.Last)
		}
		c.Sum = c.Sum.Add(since)
	}
	c.Boot, c.Last = boot, now
	return c
}

// anew has what devices count of a rollout's new version begin with their next
// samples, and keeps that: what they counted while nobody asked for it, as
// while the rollout was halted, does not count.
func (d *Dispatcher) anew(ctx context.Context, number int64) error {
	tallies := map[string]store.Tally{}
	d.mu.Lock()
	if w := d.figures[number]; w != nil {
		for device, t := range w.devices {
			t.New.Boot, t.New.Last, t.dirty = "", fleet.Figures{}, false
			tallies[device] = t.Tally
		}
	}
	d.mu.Unlock()
	if err := d.store.SaveTallies(ctx, number, tallies); err != nil {
		return fmt.Errorf("keep figures: %w", err)
	}
	return nil
}

// figuresIn gives what a sample with figures counts of a version; a version
// that it does not name has had no requests. Not ok: the sample has no figures,
// or had no room for those of this version.
func figuresIn(m *dunlinv1.Telemetry, model string, version int64) (f fleet.Figures, ok bool) {
	for _, v := range m.GetModels() {
		g, this := v.GetFigures(), v.GetModel() == model && v.GetVersion() == version
		if g == nil {
			if this && v.GetSucceeded()+v.GetFailed() > 0 {
				return f, false
			}
			continue
		}
		ok = true
		if !this {
			continue
		}
		return fleet.Figures{
			Requests: v.GetSucceeded() + v.GetFailed(), Failures: v.GetFailed(), Rows: g.GetRows(),
			Latency: sketch.Latency.FromProto(g.GetLatency()), Confidence: sketch.Confidence.FromProto(g.GetConfidence()),
			Joules: g.GetJoules(), Energy: g.Joules != nil,
		}, true
	}
	return f, ok
}

// keepFigures keeps what was counted since it was last kept.
func (d *Dispatcher) keepFigures(ctx context.Context) error {
	p := &d.planner
	now := d.now()
	if now.Sub(p.kept) < d.timing.keep {
		return nil
	}
	p.kept = now
	dirty := map[int64]map[string]store.Tally{}
	d.mu.Lock()
	for number, w := range d.figures {
		for device, t := range w.devices {
			if !t.dirty {
				continue
			}
			if dirty[number] == nil {
				dirty[number] = map[string]store.Tally{}
			}
			dirty[number][device], t.dirty = t.Tally, false
		}
	}
	d.mu.Unlock()
	var errs []error
	for number, tallies := range dirty {
		if err := d.store.SaveTallies(ctx, number, tallies); err != nil {
			d.mu.Lock()
			if w := d.figures[number]; w != nil {
				for device := range tallies {
					if t := w.devices[device]; t != nil {
						t.dirty = true
					}
				}
			}
			d.mu.Unlock()
			errs = append(errs, fmt.Errorf("keep figures: %w", err))
		}
	}
	return errors.Join(errs...)
}

// checkFigures says what is wrong with the figures of a version.
func checkFigures(f *dunlinv1.VersionFigures) error {
	if f.GetRows() > maxCounted {
		return fmt.Errorf("figures.rows is %d, the limit is %d", f.GetRows(), uint64(maxCounted))
	}
	if j := f.GetJoules(); j < 0 || j > maxCounted {
		return fmt.Errorf("figures.joules is %v, allowed are 0 to %d", j, uint64(maxCounted))
	}
	for field, b := range map[string]struct {
		buckets *dunlinv1.Buckets
		scale   sketch.Scale
	}{"latency": {f.GetLatency(), sketch.Latency}, "confidence": {f.GetConfidence(), sketch.Confidence}} {
		if n, most := uint64(b.buckets.GetFirst())+uint64(len(b.buckets.GetCounts())), uint64(b.scale.Buckets()); n > most {
			return fmt.Errorf("figures.%s reaches to bucket %d, there are %d", field, n, most)
		}
		sum := uint64(0)
		for _, n := range b.buckets.GetCounts() {
			if sum += n; n > maxCounted || sum > maxCounted {
				return fmt.Errorf("figures.%s counts more than %d", field, uint64(maxCounted))
			}
		}
	}
	return nil
}
