package dispatch

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/controller/store"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// view is what the store has of the devices, kept in memory so that nobody
// reads 10,000 of them at each report. What a device sends is noted here after
// its commit; what else changes a device is read anew from the store.
type view struct {
	mu      sync.Mutex
	devices map[string]*store.Device // replaced, never changed
	clock   uint64                   // counts changes
	changed map[string]uint64        // by device: the clock at its last change
	news    map[string]news          // since they were taken last
	known   bool                     // all devices were read once
}

// news is what of a device changed.
type news uint8

const (
	newReport news = 1 << iota // what it does, or whether it is connected
	newShape                   // what its desired document follows from
	newRow                     // it is to be read from the store
	newDrop                    // it is gone from the store
)

func newView() *view {
	return &view{devices: map[string]*store.Device{}, changed: map[string]uint64{}, news: map[string]news{}}
}

// note replaces a device by what change makes of a copy, which is nil where
// nothing changes. One that is not known is read from the store by the planner.
func (v *view) note(device string, what news, change func(d *store.Device) bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.clock++
	v.changed[device] = v.clock
	d := v.devices[device]
	if d == nil {
		v.news[device] |= newRow
		return
	}
	after := *d
	if change(&after) {
		v.devices[device] = &after
		if what != 0 {
			v.news[device] |= what
		}
	}
}

// said notes what came of a message that the store has kept.
func (v *view) said(m store.Inbound, t store.Taken, now time.Time) {
	switch {
	case t.Err != nil:
	case m.Hello != nil:
		what := newReport
		if t.Changed {
			what |= newShape
		}
		v.note(m.Device, what, func(d *store.Device) bool {
			number, sum := d.Desired, d.DesiredSHA
			if *d = *t.Device; number > d.Desired {
				d.Desired, d.DesiredSHA = number, sum
			}
			return true
		})
	case m.Report != nil:
		v.note(m.Device, newReport, func(d *store.Device) bool {
			if had := d.Reported; had.GetSession() == m.Report.GetSession() && had.GetSequence() > m.Report.GetSequence() {
				return false
			}
			d.Reported, d.Connected, d.LastHeardAt = m.Report, true, now
			return true
		})
	case m.Gone != nil:
		v.note(m.Device, newReport, func(d *store.Device) bool {
			if d.Session != m.Gone.GetSession() {
				return false
			}
			d.Connected, d.LastHeardAt = false, now
			return true
		})
	}
}

// away notes that a device is not connected, unless it was heard after at.
func (v *view) away(device string, at time.Time) {
	v.note(device, newReport, func(d *store.Device) bool {
		if d.LastHeardAt.After(at) {
			return false
		}
		d.Connected, d.LastHeardAt = false, at
		return true
	})
}

// free notes how many bytes the store has as free on a device's disk, and
// whether its document may follow from that.
func (v *view) free(device string, bytes uint64, matters bool) {
	var what news
	if matters {
		what = newShape
	}
	v.note(device, what, func(d *store.Device) bool {
		d.DiskFree = &bytes
		return true
	})
}

// wanted notes a new generation.
func (v *view) wanted(g store.Desired) {
	v.note(g.Device, newReport, func(d *store.Device) bool {
		if g.Number <= d.Desired {
			return false
		}
		d.Desired, d.DesiredSHA = g.Number, g.SHA256
		return true
	})
}

// stale says that a device is to be read from the store.
func (v *view) stale(device string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.clock++
	v.changed[device] = v.clock
	v.news[device] |= newRow
}

// now gives the clock: what is read from the store from here on has all that
// was noted before.
func (v *view) now() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.clock
}

// read takes in devices as they were read from the store after the clock stood
// at since: all where names is nil, else those of names, of which some may be
// gone. Those that changed meanwhile are to be read again; one that was not
// known yet is there all the same, as it was read: a rollout would take one that
// is not there for one that is not its own any more.
func (v *view) read(devices []*store.Device, names []string, since uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	found := make(map[string]bool, len(devices))
	for _, d := range devices {
		found[d.Name] = true
		v.news[d.Name] |= newReport | newShape
		if v.changed[d.Name] > since {
			v.news[d.Name] |= newRow
			if v.devices[d.Name] != nil {
				continue
			}
		}
		v.devices[d.Name] = d
	}
	if names == nil {
		v.known = true
		names = slices.Collect(maps.Keys(v.devices))
	}
	for _, name := range names {
		switch {
		case found[name]:
		case v.changed[name] > since:
			v.news[name] |= newRow
		default:
			delete(v.devices, name)
			delete(v.changed, name)
			v.news[name] = newDrop
		}
	}
}

// take gives what changed since it was called last.
func (v *view) take() map[string]news {
	v.mu.Lock()
	defer v.mu.Unlock()
	taken := v.news
	v.news = map[string]news{}
	return taken
}

// all gives the devices that there are.
func (v *view) all() map[string]*store.Device {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.devices)
}

// some gives devices by their names; those that there are not are left out.
func (v *view) some(names []string) []*store.Device {
	v.mu.Lock()
	defer v.mu.Unlock()
	devices := make([]*store.Device, 0, len(names))
	for _, name := range names {
		if d := v.devices[name]; d != nil {
			devices = append(devices, d)
		}
	}
	return devices
}

// Seen is a device as the dispatcher has it in memory.
type Seen struct {
	*store.Device // not to be changed
	// Of a connected device; nil: none has come.
	Telemetry *dunlinv1.Telemetry
	Heard     time.Time // zero: never
}

// Fleet gives all devices, in no order. Where one is as it was, so are the
// pointers. Not known: the dispatcher has not read the store yet.
func (d *Dispatcher) Fleet() (fleet []Seen, known bool) {
	d.view.mu.Lock()
	known = d.view.known
	fleet = make([]Seen, 0, len(d.view.devices))
	for _, dev := range d.view.devices {
		fleet = append(fleet, Seen{Device: dev, Heard: dev.LastHeardAt})
	}
	d.view.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range fleet {
		if l := d.live[fleet[i].Name]; l != nil {
			fleet[i].Telemetry = l.telemetry
			if l.heard.After(l.saved) && l.heard.After(fleet[i].Heard) {
				fleet[i].Heard = l.heard
			}
		}
	}
	return fleet, known
}
