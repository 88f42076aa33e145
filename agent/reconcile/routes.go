package reconcile

import (
	"fmt"
	"iter"
	"maps"

	"github.com/dunlin/dunlin/agent/engine"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// targets gives every target of a route, those of its rules too.
func targets(r *dunlinv1.DesiredRoute) iter.Seq[*dunlinv1.RouteTarget] {
	return func(yield func(*dunlinv1.RouteTarget) bool) {
		for _, t := range r.Targets {
			if !yield(t) {
				return
			}
		}
		for _, rule := range r.Rules {
			for _, t := range rule.Targets {
				if !yield(t) {
					return
				}
			}
		}
	}
}

// uses gives every version that requests to a route can be run by.
func uses(r *dunlinv1.DesiredRoute) iter.Seq[used] {
	return func(yield func(used) bool) {
		for t := range targets(r) {
			if !yield(t) {
				return
			}
		}
		for _, f := range r.Fallback {
			if !yield(f) {
				return
			}
		}
		if r.Shadow != nil && !yield(r.Shadow) || r.Cascade != nil && !yield(r.Cascade) {
			return
		}
		for _, rule := range r.Rules {
			if rule.Shadow != nil && !yield(rule.Shadow) || rule.Cascade != nil && !yield(rule.Cascade) {
				return
			}
			for _, f := range rule.Fallback {
				if !yield(f) {
					return
				}
			}
		}
	}
}

// used is what a route names.
type used interface {
	GetModel() string
	GetVersion() int64
}

// missing says what a route lacks to be answered, and "" where it can be.
func (c *core) missing(r *dunlinv1.DesiredRoute) string {
	for t := range targets(r) {
		if t.Version == 0 {
			if c.serving[t.Model] == nil {
				return fmt.Sprintf("no version of %s serves", t.Model)
			}
		} else if id := (engine.VersionID{Model: t.Model, Version: t.Version}); !c.runs(id) {
			return fmt.Sprintf("%s is not loaded", id)
		}
	}
	return ""
}

func (c *core) runs(id engine.VersionID) bool {
	for _, v := range c.versions {
		if v.id == id && v.ready() {
			return true
		}
	}
	return false
}

// settleRoutes brings the routes in force nearer to the desired ones: one
// that can be answered now still stays when its replacement cannot. It says
// whether something changed.
func (c *core) settleRoutes() bool {
	force := map[string]*dunlinv1.DesiredRoute{}
	for name, r := range c.routes {
		force[name] = r
		if old := c.inForce[name]; old != nil && old != r && c.missing(r) != "" && c.missing(old) == "" {
			force[name] = old
		}
	}
	changed := !maps.Equal(force, c.inForce)
	c.inForce = force
	return changed
}

// pinned says whether a route in force names a version. It stays loaded
// then, even when its model is answered by another.
func (c *core) pinned(id engine.VersionID) bool {
	for _, r := range c.inForce {
		for t := range uses(r) {
			if t.GetModel() == id.Model && t.GetVersion() == id.Version {
				return true
			}
		}
	}
	return false
}

// held says whether a route names a model that is in force only until its
// replacement can be answered.
func (c *core) held(model string) bool {
	for name, r := range c.inForce {
		if r == c.routes[name] {
			continue
		}
		for t := range uses(r) {
			if t.GetModel() == model {
				return true
			}
		}
	}
	return false
}
