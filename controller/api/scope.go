package api

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// view is what of the fleet the caller sees.
type view struct {
	caller    identity.Principal
	devices   map[string]bool              // within the scope; nil: all
	selectors map[string]map[string]string // of the deployments that are there
}

// view gives that of the caller.
func (s *server) view(ctx context.Context) (view, error) {
	v := view{caller: identity.FromContext(ctx)}
	if len(v.caller.Scope) == 0 {
		return v, nil
	}
	labels, err := s.Store.DeviceLabels(ctx)
	if err != nil {
		return v, err
	}
	v.devices = map[string]bool{}
	for name, l := range labels {
		if v.caller.Covers(l) {
			v.devices[name] = true
		}
	}
	objects, err := s.Store.Objects(ctx, fleet.KindDeployment)
	v.selectors = map[string]map[string]string{}
	for _, o := range objects {
		v.selectors[o.Name()] = o.Deployment.Selector
	}
	return v, err
}

// sees says whether a device is within the caller's scope.
func (v view) sees(device string) bool { return v.devices == nil || v.devices[device] }

// names gives the devices that the caller sees, by name.
func (v view) names() []string { return slices.Sorted(maps.Keys(v.devices)) }

// rollout gives what the caller sees of a rollout; false: nothing. That is
// where it has devices within the scope, or its deployment can have.
func (v view) rollout(r fleet.Rollout) (fleet.Rollout, bool) {
	if v.devices == nil {
		return r, true
	}
	all := len(r.Devices)
	r.Devices = slices.DeleteFunc(slices.Clone(r.Devices), func(d fleet.RolloutDevice) bool { return !v.sees(d.Device) })
	// In a long list those further back come without their devices.
	if len(r.Devices) < all || all == 0 && (r.Wave > 0 || r.State.Ended()) {
		if r.Reason != "" {
			r.Reason = outside // it names them
		}
		r.Gates = nil // their figures are of all
	}
	selector, there := v.selectors[r.Deployment]
	if there {
		_, there = v.caller.Narrow(selector)
	}
	return r, there || len(r.Devices) > 0
}

// decision gives what the caller sees of a decision.
func (v view) decision(d fleet.Decision) fleet.Decision {
	if v.devices == nil {
		return d
	}
	all := len(d.Devices)
	d.Devices = slices.DeleteFunc(slices.Clone(d.Devices), func(name string) bool { return !v.sees(name) })
	if len(d.Devices) < all || d.DeviceCount > all {
		d.DeviceCount = len(d.Devices)
	}
	// Its words name devices, and its figures are of all.
	if d.By == "controller" || d.By == "gate" {
		d.Reason = outside
	}
	d.Gates = nil
	return d
}

// outside stands for a reason that may name devices that the caller does not see.
const outside = "what it says is of devices outside the scope too"

// mayApply says whether the caller may make objects what they say, or change
// what was there.
func mayApply(p identity.Principal) store.Permit {
	return func(o fleet.Object) error {
		selector, ok := o.Selector()
		if !ok {
			return identity.Allow(p, identity.ApplyRoute)
		}
		return about(o, identity.Allow(p, v1connect.ObjectServiceApplyProcedure, selector))
	}
}

// mayDelete says whether the caller may delete an object.
func mayDelete(p identity.Principal) store.Permit {
	return func(o fleet.Object) error {
		selector, ok := o.Selector()
		if !ok {
			return identity.Allow(p, identity.DeleteRoute)
		}
		return about(o, identity.Allow(p, v1connect.ObjectServiceDeleteProcedure, selector))
	}
}

func about(o fleet.Object, err error) error {
	if err != nil {
		return fmt.Errorf("%s %s: %w", o.Kind(), o.Name(), err)
	}
	return nil
}

// narrow gives objects as far as they are about devices within the caller's
// scope.
func narrow(p identity.Principal, objects []fleet.Object) []fleet.Object {
	var within []fleet.Object
	for _, o := range objects {
		if o.Deployment != nil {
			d := *o.Deployment
			var ok bool
			if d.Selector, ok = p.Narrow(d.Selector); !ok {
				continue
			}
			o.Deployment = &d
		}
		within = append(within, o)
	}
	return within
}

// seen gives a device that the caller sees, or store.ErrNotFound.
func (s *server) seen(ctx context.Context, name string) (*store.Device, error) {
	d, err := s.Store.Device(ctx, name)
	if err == nil && !identity.FromContext(ctx).Covers(d.Labels) {
		return nil, fmt.Errorf("device %s: %w", name, store.ErrNotFound)
	}
	return d, err
}
