package dispatch

import (
	"cmp"
	"slices"

	"github.com/dunlin/dunlin/controller/store"
)

// Samples gives the newest sample of each connected device, by name, but for
// those that it gave already.
func (d *Dispatcher) Samples() []store.Sample {
	d.mu.Lock()
	var samples []store.Sample
	for device, l := range d.live {
		if l.telemetry != nil && l.telemetry != l.kept {
			l.kept = l.telemetry
			samples = append(samples, store.Sample{Device: device, ReceivedAt: l.heard, Telemetry: l.telemetry})
		}
	}
	d.mu.Unlock()
	slices.SortFunc(samples, func(a, b store.Sample) int { return cmp.Compare(a.Device, b.Device) })
	return samples
}
