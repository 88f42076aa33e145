package dispatch

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxDriftsAtOnce bounds the devices whose documents one pass reads to hold
// them against reports.
const maxDriftsAtOnce = 1000

// driftKinds are the kinds that the metric tells apart.
var driftKinds = []string{"version", "file", "route", "agent", "runtime", "setting"}

// drifting is what the planner knows of one connected device's drift.
type drifting struct {
	generation uint64    // that the device has taken in
	observed   time.Time // when that was noticed; zero: it has not taken in its newest
	due        time.Time // when it is looked at next; zero: when it reports
}

// drift holds connected devices against their documents: those that changed,
// and those whose time to follow a new document has passed.
func (d *Dispatcher) drift(ctx context.Context, changed map[string]news) error {
	p := &d.planner
	now := d.now()
	for _, dev := range d.view.some(slices.Collect(maps.Keys(changed))) {
		if !dev.Connected {
			delete(p.drifts, dev.Name)
			d.found(dev.Name, nil)
			continue
		}
		one := p.drifts[dev.Name]
		switch {
		case dev.Desired == 0 || !dev.Observe(d.store.Incarnation(), "", 0).Observed:
			one.observed = time.Time{}
		case one.generation != dev.Desired || one.observed.IsZero():
			one.generation, one.observed = dev.Desired, now
		}
		one.due = now
		if after := one.observed.Add(fleet.DriftGrace + time.Second); !one.observed.IsZero() && now.Before(after) {
			one.due = after
			if len(dev.Reported.GetDrifts()) > 0 { // what it found itself counts now
				one.due = now
			}
		}
		p.drifts[dev.Name] = one
	}
	if now.Sub(p.swept) < d.timing.drift {
		return nil
	}
	p.swept = now
	var due []string
	for name, one := range p.drifts {
		if !one.due.IsZero() && !now.Before(one.due) {
			due = append(due, name)
		}
	}
	slices.Sort(due)
	due = due[:min(len(due), maxDriftsAtOnce)]
	if len(due) == 0 {
		return nil
	}
	documents, err := d.store.Documents(ctx, due)
	if err != nil {
		return fmt.Errorf("read desired documents: %w", err)
	}
	for _, dev := range d.view.some(due) {
		one := p.drifts[dev.Name]
		d.found(dev.Name, d.drifted(dev, documents[dev.Name], one.observed, now))
		one.due = time.Time{}
		if after := one.observed.Add(fleet.DriftGrace + time.Second); !one.observed.IsZero() && now.Before(after) {
			one.due = after
		}
		p.drifts[dev.Name] = one
	}
	return nil
}

func (d *Dispatcher) drifted(dev *store.Device, doc *dunlinv1.DesiredDocument, observed, now time.Time) []*dunlinv1.Drift {
	d.mu.Lock()
	before := d.drifts[dev.Name]
	d.mu.Unlock()
	reported := dev.Reported
	if made, outside := fleet.Skew(program.Version(), dev.Info.GetAgentVersion()); outside {
		reported = proto.CloneOf(reported)
		if reported == nil {
			reported = &dunlinv1.Reported{}
		}
		reported.Drifts = append(reported.Drifts, &dunlinv1.Drift{Kind: "agent", Subject: "controller", Want: made, Have: dev.Info.GetAgentVersion()})
	}
	return fleet.Drifts(dev.Info, doc, reported, observed, now, before)
}

// found keeps what of a device is other than it should be.
func (d *Dispatcher) found(device string, drifts []*dunlinv1.Drift) {
	d.mu.Lock()
	before := d.drifts[device]
	if len(drifts) > 0 {
		d.drifts[device] = drifts
	} else {
		delete(d.drifts, device)
	}
	d.mu.Unlock()
	for _, one := range before {
		d.drifting.WithLabelValues(driftKind(one)).Dec()
	}
	for _, one := range drifts {
		d.drifting.WithLabelValues(driftKind(one)).Inc()
	}
}

func driftKind(one *dunlinv1.Drift) string {
	if slices.Contains(driftKinds, one.GetKind()) {
		return one.GetKind()
	}
	return "other"
}

// Drifts gives what of connected devices is other than it should be, by device.
// It is not to be changed.
func (d *Dispatcher) Drifts() map[string][]*dunlinv1.Drift {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.drifts)
}
