package fleet

import (
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
)

// Touched says which devices' documents, and what is planned and observed of
// them, a change from one state of the objects to another may have changed: for
// a device for which it says false, Compile gives the same before and after. It
// says true for more than need be: for all that a changed object matches, or
// matched.
//
// It knows objects only. A device whose own labels, class, limits, disk,
// holdings or Closed changed has to be compiled as well, and so has one that
// was closed once what Closed said of it may have passed.
func Touched(before, after Objects) func(Device) bool {
	t := &touched{devices: map[string]bool{}, classes: map[string]bool{}, models: map[string]bool{}}
	diff(before.Freezes, after.Freezes, func(f Freeze) string { return f.Name }, func(a, b *Freeze) bool {
		return maps.Equal(a.Selector, b.Selector) && a.Reason == b.Reason && a.Until.Equal(b.Until)
	}, func(f *Freeze) { t.selectors = append(t.selectors, f.Selector) })
	diff(before.Maintenances, after.Maintenances, func(m Maintenance) string { return m.Name }, func(a, b *Maintenance) bool {
		return Object{Maintenance: a}.YAML() == Object{Maintenance: b}.YAML()
	}, func(m *Maintenance) { t.selectors = append(t.selectors, m.Selector) })
	diff(before.Deployments, after.Deployments, func(d Deployment) string { return d.Name }, func(a, b *Deployment) bool {
		return a.Model == b.Model && a.Version == b.Version && maps.Equal(a.Selector, b.Selector) && proto.Equal(a.Delivery, b.Delivery)
	}, func(d *Deployment) { t.selectors = append(t.selectors, d.Selector) })
	diff(before.Routes, after.Routes, func(r Route) string { return r.Name }, func(a, b *Route) bool { return proto.Equal(a.Desired(), b.Desired()) }, func(r *Route) {
		for _, target := range r.All() {
			t.models[target.Model] = true
		}
	})
	diff(before.Versions, after.Versions, func(v Version) versionKey { return versionKey{v.Model, v.Version} }, func(a, b *Version) bool {
		return a.Digest == b.Digest && a.SizeBytes == b.SizeBytes && a.AgentVersion == b.AgentVersion && slices.Equal(a.Signatures, b.Signatures) && (a.Bundle == nil) == (b.Bundle == nil)
	}, func(v *Version) { t.models[v.Model] = true })
	type measured struct{ device, model, digest string }
	diff(before.Measured, after.Measured, func(m Measurement) measured { return measured{m.Device, m.Model, m.Digest} }, func(a, b *Measurement) bool { return *a == *b }, func(m *Measurement) {
		t.devices[m.Device] = true
		if m.Class != "" {
			t.classes[m.Class] = true
		}
	})
	t.rollouts(newestRollouts(before.Rollouts), newestRollouts(after.Rollouts), slices.Concat(before.Deployments, after.Deployments))
	// A model is there by its deployment, or by the one that it came from.
	by := map[string]string{}
	for _, r := range slices.Concat(before.Rollouts, after.Rollouts) {
		if t.models[r.Back()] {
			by[r.Deployment] = r.Back()
		}
	}
	for _, d := range slices.Concat(before.Deployments, after.Deployments) {
		if _, from := by[d.Name]; from || t.models[d.Model] {
			t.selectors = append(t.selectors, d.Selector)
		}
	}
	return t.says
}

type touched struct {
	selectors []map[string]string
	devices   map[string]bool
	classes   map[string]bool
	models    map[string]bool
}

func (t *touched) says(d Device) bool {
	return t.devices[d.Name] || t.classes[d.Class] || slices.ContainsFunc(t.selectors, func(s map[string]string) bool { return Matches(s, d) })
}

// diff calls changed with what is in one only, and with both of what differs.
func diff[T any, K comparable](before, after []T, key func(T) K, same func(a, b *T) bool, changed func(*T)) {
	was := make(map[K]*T, len(before))
	for i := range before {
		was[key(before[i])] = &before[i]
	}
	for i := range after {
		now := &after[i]
		k := key(*now)
		if old, ok := was[k]; !ok {
			changed(now)
		} else if !same(old, now) {
			changed(old)
			changed(now)
		}
		delete(was, k)
	}
	for _, old := range was {
		changed(old)
	}
}

// rollouts notes the devices to which a rollout gives another version than
// before, and all of its deployment where it is another rollout, or decides for
// devices that it does not know.
func (t *touched) rollouts(before, after map[string]*Rollout, deployments []Deployment) {
	all := map[string]bool{} // deployments
	for name, now := range after {
		old := before[name]
		if old == nil || old.Number != now.Number || old.State != now.State || old.Model != now.Model || old.To != now.To || old.Back() != now.Back() || old.From != now.From {
			all[name] = true
			continue
		}
		if slices.Equal(old.Devices, now.Devices) {
			continue
		}
		for _, pair := range [][2]*Rollout{{old, now}, {now, old}} {
			for _, d := range pair[0].Devices {
				if o, _ := pair[1].Device(d.Device); d.AdmittedAt.IsZero() != o.AdmittedAt.IsZero() {
					t.devices[d.Device] = true
				}
			}
		}
	}
	for name := range before {
		if after[name] == nil {
			all[name] = true
		}
	}
	for _, d := range deployments {
		if all[d.Name] {
			t.selectors = append(t.selectors, d.Selector)
		}
	}
}
