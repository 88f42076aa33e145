package dispatch

import (
	"reflect"
	"slices"

	"github.com/dunlin/dunlin/controller/fleet"
)

// touched says for which devices a change of the objects may change the desired
// document, as far as it does not depend on rollouts: those that a deployment
// matches, or matched, that changed, whose version did, or to whose model a
// route goes that changed.
func touched(before, after fleet.Objects) func(fleet.Device) bool {
	models := map[string]bool{} // every deployment of these is touched
	was, is := routes(before), routes(after)
	for name, r := range was {
		if now, ok := is[name]; !ok || !slices.Equal(r.Targets, now.Targets) {
			for _, t := range r.Targets {
				models[t.Model] = true
			}
		}
	}
	for name, r := range is {
		if had, ok := was[name]; !ok || !slices.Equal(r.Targets, had.Targets) {
			for _, t := range r.Targets {
				models[t.Model] = true
			}
		}
	}
	type key struct {
		model   string
		version int64
	}
	versions := map[key]fleet.Version{}
	for _, v := range before.Versions {
		versions[key{v.Model, v.Version}] = v
	}
	for _, v := range after.Versions {
		// One that was not there is new to a deployment too.
		if had, ok := versions[key{v.Model, v.Version}]; ok && !reflect.DeepEqual(had, v) {
			models[v.Model] = true
		}
	}
	measured := map[fleet.Measurement]int{}
	for _, m := range before.Measured {
		measured[m]++
	}
	for _, m := range after.Measured {
		measured[m]--
	}
	for m, n := range measured {
		if n != 0 {
			models[m.Model] = true
		}
	}

	var selectors []map[string]string
	had := map[string]fleet.Deployment{}
	for _, d := range before.Deployments {
		had[d.Name] = d
	}
	for _, d := range after.Deployments {
		b, ok := had[d.Name]
		delete(had, d.Name)
		b.Rollout, b.Selector = d.Rollout, orSame(b.Selector, d.Selector) // how it is rolled out is in no document
		switch {
		case !ok:
			selectors = append(selectors, d.Selector)
		case models[d.Model], models[b.Model], !reflect.DeepEqual(b, d):
			selectors = append(selectors, d.Selector, b.Selector)
		}
	}
	for _, b := range had { // they are gone
		selectors = append(selectors, b.Selector)
	}
	// What was kept from a device may be given it, and the other way round.
	selectors = append(selectors, changedSelectors(before.Freezes, after.Freezes, func(f fleet.Freeze) (string, map[string]string) { return f.Name, f.Selector })...)
	selectors = append(selectors, changedSelectors(before.Maintenances, after.Maintenances, func(m fleet.Maintenance) (string, map[string]string) { return m.Name, m.Selector })...)
	return func(d fleet.Device) bool {
		return slices.ContainsFunc(selectors, func(s map[string]string) bool { return fleet.Matches(s, d) })
	}
}

// orSame takes an empty selector for a nil one.
func orSame(a, b map[string]string) map[string]string {
	if len(a) == 0 && len(b) == 0 {
		return b
	}
	return a
}

func routes(o fleet.Objects) map[string]fleet.Route {
	all := make(map[string]fleet.Route, len(o.Routes))
	for _, r := range o.Routes {
		all[r.Name] = r
	}
	return all
}

// changedSelectors gives the selectors of what is not the same before and after.
func changedSelectors[T any](before, after []T, of func(T) (name string, selector map[string]string)) (selectors []map[string]string) {
	had := make(map[string]T, len(before))
	for _, b := range before {
		name, _ := of(b)
		had[name] = b
	}
	for _, a := range after {
		name, selector := of(a)
		b, ok := had[name]
		delete(had, name)
		if ok && reflect.DeepEqual(a, b) {
			continue
		}
		selectors = append(selectors, selector)
		if ok {
			_, was := of(b)
			selectors = append(selectors, was)
		}
	}
	for _, b := range had {
		_, selector := of(b)
		selectors = append(selectors, selector)
	}
	return selectors
}
