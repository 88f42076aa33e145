package fleet

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Route is a served name and where its requests go: by the first rule that
// matches, and where none does to the targets.
type Route struct {
	Name     string
	Targets  []Target
	Sticky   *dunlinv1.RouteSticky // nil: by chance
	Rules    []Rule
	Fallback []Fallback
	Shadow   *dunlinv1.RouteShadow  // nil: none
	Cascade  *dunlinv1.RouteCascade // nil: none
}

// Rule says where the requests go that it matches.
type Rule struct {
	Name     string
	Match    *dunlinv1.RouteMatch // its conditions by name
	Targets  []Target
	Sticky   *dunlinv1.RouteSticky
	Fallback []Fallback
	Shadow   *dunlinv1.RouteShadow  // nil: none
	Cascade  *dunlinv1.RouteCascade // nil: none
}

// Fallback answers instead of a target that does not, for the reasons that it
// names; none: the usual ones.
type Fallback struct {
	Model   string
	Version int64 // as a target's
	On      []string
}

// Target is where a share of a route's requests goes. Version 0 is the
// version that the device's deployment of the model gives it.
type Target struct {
	Model   string
	Version int64
	Weight  uint32
}

// All gives all that requests can go to, of rules too, with its field in the
// document; what is not a target has no weight.
func (r *Route) All() iter.Seq2[string, Target] {
	return func(yield func(string, Target) bool) {
		if !yieldAll(yield, "spec", r.Targets, r.Fallback, r.Shadow, r.Cascade) {
			return
		}
		for j := range r.Rules {
			if rule := &r.Rules[j]; !yieldAll(yield, fmt.Sprintf("spec.rules[%d]", j), rule.Targets, rule.Fallback, rule.Shadow, rule.Cascade) {
				return
			}
		}
	}
}

func yieldAll(yield func(string, Target) bool, at string, targets []Target, fallback []Fallback, shadow *dunlinv1.RouteShadow, cascade *dunlinv1.RouteCascade) bool {
	for i, t := range targets {
		if !yield(fmt.Sprintf("%s.targets[%d]", at, i), t) {
			return false
		}
	}
	for i, f := range fallback {
		if !yield(fmt.Sprintf("%s.fallback[%d]", at, i), Target{f.Model, f.Version, 0}) {
			return false
		}
	}
	if shadow != nil && !yield(at+".shadow", Target{shadow.GetModel(), shadow.GetVersion(), 0}) {
		return false
	}
	return cascade == nil || yield(at+".cascade", Target{cascade.GetModel(), cascade.GetVersion(), 0})
}

// chooses says whether a target is of one of the models.
func (r *Route) chooses(models map[string]bool) bool {
	has := func(targets []Target) bool {
		return slices.ContainsFunc(targets, func(t Target) bool { return models[t.Model] })
	}
	return has(r.Targets) || slices.ContainsFunc(r.Rules, func(rule Rule) bool { return has(rule.Targets) })
}

// Desired gives the route as devices get it, with all of its rules.
func (r *Route) Desired() *dunlinv1.DesiredRoute {
	d := &dunlinv1.DesiredRoute{Name: r.Name, Targets: desiredTargets(r.Targets), Sticky: r.Sticky, Fallback: desiredFallback(r.Fallback), Shadow: r.Shadow, Cascade: r.Cascade}
	for i := range r.Rules {
		d.Rules = append(d.Rules, r.Rules[i].desired())
	}
	return d
}

func (r *Rule) desired() *dunlinv1.RouteRule {
	return &dunlinv1.RouteRule{Name: r.Name, Match: r.Match, Targets: desiredTargets(r.Targets), Sticky: r.Sticky, Fallback: desiredFallback(r.Fallback), Shadow: r.Shadow, Cascade: r.Cascade}
}

func desiredTargets(targets []Target) []*dunlinv1.RouteTarget {
	var desired []*dunlinv1.RouteTarget
	for _, t := range targets {
		desired = append(desired, &dunlinv1.RouteTarget{Model: t.Model, Version: t.Version, Weight: t.Weight})
	}
	return desired
}

func desiredFallback(fallback []Fallback) []*dunlinv1.RouteFallback {
	var desired []*dunlinv1.RouteFallback
	for _, f := range fallback {
		desired = append(desired, &dunlinv1.RouteFallback{Model: f.Model, Version: f.Version, On: f.On})
	}
	return desired
}

// reaches says whether the device can have requests that the rule matches:
// its conditions on labels hold there.
func (r *Rule) reaches(labels map[string]string) bool {
	for _, c := range r.Match.GetLabels() {
		if v, ok := labels[c.GetName()]; !ok || !slices.Contains(c.GetValues(), v) {
			return false
		}
	}
	return true
}

// seesLabels says whether the rule looks at labels.
func (r *Rule) seesLabels() bool {
	return len(r.Match.GetLabels()) > 0 || strings.Contains(r.Match.GetCel(), "labels")
}

// addRoutes puts the routes into a device's document that have a target among
// the models that are here, each with the rules that reach the device, and the
// device's labels where these look at them.
func (c *Compiler) addRoutes(doc *dunlinv1.DesiredDocument, d Device, here map[string]bool) {
	labels := false
	for i := range c.routes {
		r := c.routes[i]
		r.Rules = slices.DeleteFunc(slices.Clone(r.Rules), func(rule Rule) bool { return !rule.reaches(d.Labels) })
		if !r.chooses(here) {
			continue
		}
		doc.Routes = append(doc.Routes, r.Desired())
		for j := range r.Rules {
			labels = labels || r.Rules[j].seesLabels()
		}
	}
	if labels {
		for _, k := range slices.Sorted(maps.Keys(d.Labels)) {
			doc.Labels = append(doc.Labels, &dunlinv1.DeviceLabel{Name: k, Value: d.Labels[k]})
		}
	}
}

type yamlRoute struct {
	Targets  []yamlTarget   `yaml:"targets"`
	Sticky   yaml.MapSlice  `yaml:"sticky,omitempty"`
	Fallback []yamlFallback `yaml:"fallback,omitempty"`
	Shadow   *yamlShadow    `yaml:"shadow,omitempty"`
	Cascade  *yamlCascade   `yaml:"cascade,omitempty"`
	Rules    []yamlRule     `yaml:"rules,omitempty"`
}

type yamlShadow struct {
	Model   string  `yaml:"model"`
	Version int64   `yaml:"version,omitempty"`
	Rate    float64 `yaml:"rate"`
}

type yamlCascade struct {
	Model   string `yaml:"model"`
	Version int64  `yaml:"version,omitempty"`
	When    string `yaml:"when"`
}

type yamlFallback struct {
	Model   string   `yaml:"model"`
	Version int64    `yaml:"version,omitempty"`
	On      []string `yaml:"on,omitempty"`
}

type yamlTarget struct {
	Model   string `yaml:"model"`
	Version int64  `yaml:"version,omitempty"`
	Weight  uint32 `yaml:"weight"`
}

type yamlRule struct {
	Name     string         `yaml:"name"`
	Match    yamlMatch      `yaml:"match"`
	Targets  []yamlTarget   `yaml:"targets"`
	Sticky   yaml.MapSlice  `yaml:"sticky,omitempty"`
	Fallback []yamlFallback `yaml:"fallback,omitempty"`
	Shadow   *yamlShadow    `yaml:"shadow,omitempty"`
	Cascade  *yamlCascade   `yaml:"cascade,omitempty"`
}

type yamlMatch struct {
	Parameters yaml.MapSlice `yaml:"parameters,omitempty"`
	Headers    yaml.MapSlice `yaml:"headers,omitempty"`
	Labels     yaml.MapSlice `yaml:"labels,omitempty"`
	Inputs     yaml.MapSlice `yaml:"inputs,omitempty"`
	CEL        string        `yaml:"cel,omitempty"`
}

type yamlInput struct {
	MinRows int64 `yaml:"minRows,omitempty"`
	MaxRows int64 `yaml:"maxRows,omitempty"`
}

func routeYAML(r *Route) yamlRoute {
	y := yamlRoute{Targets: targetsYAML(r.Targets), Sticky: stickyYAML(r.Sticky), Fallback: fallbackYAML(r.Fallback), Shadow: shadowYAML(r.Shadow), Cascade: cascadeYAML(r.Cascade)}
	for _, rule := range r.Rules {
		m := rule.Match
		match := yamlMatch{conditionsYAML(m.GetParameters()), conditionsYAML(m.GetHeaders()), conditionsYAML(m.GetLabels()), nil, m.GetCel()}
		for _, in := range m.GetInputs() {
			match.Inputs = append(match.Inputs, yaml.MapItem{Key: in.GetName(), Value: yamlInput{in.GetMinRows(), in.GetMaxRows()}})
		}
		y.Rules = append(y.Rules, yamlRule{rule.Name, match, targetsYAML(rule.Targets), stickyYAML(rule.Sticky), fallbackYAML(rule.Fallback), shadowYAML(rule.Shadow), cascadeYAML(rule.Cascade)})
	}
	return y
}

func targetsYAML(targets []Target) []yamlTarget {
	y := make([]yamlTarget, 0, len(targets))
	for _, t := range targets {
		y = append(y, yamlTarget(t))
	}
	return y
}

func fallbackYAML(fallback []Fallback) []yamlFallback {
	var y []yamlFallback
	for _, f := range fallback {
		y = append(y, yamlFallback(f))
	}
	return y
}

func shadowYAML(s *dunlinv1.RouteShadow) *yamlShadow {
	if s == nil {
		return nil
	}
	return &yamlShadow{s.GetModel(), s.GetVersion(), s.GetRate()}
}

func cascadeYAML(c *dunlinv1.RouteCascade) *yamlCascade {
	if c == nil {
		return nil
	}
	return &yamlCascade{c.GetModel(), c.GetVersion(), c.GetWhen()}
}

func stickyYAML(s *dunlinv1.RouteSticky) yaml.MapSlice {
	switch {
	case s == nil:
		return nil
	case s.GetHeader() != "":
		return yaml.MapSlice{{Key: "header", Value: s.GetHeader()}}
	}
	return yaml.MapSlice{{Key: "parameter", Value: s.GetParameter()}}
}

func conditionsYAML(conditions []*dunlinv1.RouteCondition) yaml.MapSlice {
	var y yaml.MapSlice
	for _, c := range conditions {
		var value any = c.GetValues()
		if len(c.GetValues()) == 1 {
			value = c.GetValues()[0]
		}
		y = append(y, yaml.MapItem{Key: c.GetName(), Value: value})
	}
	return y
}

func (r *reader) route(spec node) *Route {
	route := &Route{}
	fields := r.mapping(spec, "spec", "targets", "sticky", "fallback", "shadow", "cascade", "rules")
	route.Targets = r.targets(fields, "spec.targets")
	route.Sticky = r.sticky(fields, "spec.sticky")
	route.Fallback = r.fallback(fields, "spec.fallback")
	route.Shadow = r.shadow(fields, "spec.shadow")
	route.Cascade = r.cascade(fields, "spec.cascade")
	if n, ok := fields["spec.rules"]; ok {
		items, _ := r.sequence(n, "spec.rules")
		if len(items) > policy.MaxRules {
			r.fault("spec.rules", "has %d entries, allowed are 0 to %d", len(items), policy.MaxRules)
			items = nil
		}
		for i, item := range items {
			route.Rules = append(route.Rules, r.rule(item, fmt.Sprintf("spec.rules[%d]", i)))
		}
	}
	r.policy(route)
	return route
}

// policy compiles the route as a device will, and adds what that finds wrong
// where nothing was found so far: in a field, around it or in its parts.
func (r *reader) policy(route *Route) {
	desired := route.Desired()
	desired.Name = "route" // that of the document is checked elsewhere
	_, err := policy.Compile(desired)
	if err == nil {
		return
	}
	found, ok := errors.AsType[policy.Faults](err)
	if !ok {
		r.fault("spec", "%v", err)
		return
	}
	known := slices.Clone(r.faults)
	for _, f := range found {
		field := "spec." + f.Field
		if slices.ContainsFunc(known, func(k Fault) bool { return k.Field == field || below(k.Field, field) || below(field, k.Field) }) {
			continue
		}
		r.add(r.place(field), field, f.Problem)
	}
}

// below says whether a field is a part of another.
func below(field, of string) bool {
	rest, ok := strings.CutPrefix(field, of)
	return ok && (strings.HasPrefix(rest, ".") || strings.HasPrefix(rest, "["))
}

// place gives where a field stands, or else what it is a part of.
func (r *reader) place(field string) position {
	for {
		if at, ok := r.at[field]; ok {
			return at
		}
		i := strings.LastIndexAny(field, ".[")
		if i < 0 {
			return position{}
		}
		field = field[:i]
	}
}

// answers reads the model and version of what answers requests.
func (r *reader) answers(fields map[string]node, at string) (model string, version int64) {
	model, _ = r.name(fields, at+".model")
	if model == AgentModel {
		r.fault(at+".model", "%s is the agent program, which answers no requests", AgentModel)
	}
	if n, ok := fields[at+".version"]; ok {
		version = r.integer(n, at+".version", 1, models.MaxVersion)
	}
	return model, version
}

func (r *reader) targets(fields map[string]node, at string) []Target {
	n, ok := r.required(fields, at)
	if !ok {
		return nil
	}
	items, ok := r.sequence(n, at)
	if !ok {
		return nil
	}
	if len(items) == 0 || len(items) > policy.MaxTargets {
		r.fault(at, "has %d entries, allowed are 1 to %d", len(items), policy.MaxTargets)
		return nil
	}
	var targets []Target
	seen := map[[2]any]int{}
	var sum uint64
	faults := len(r.faults)
	for i, item := range items {
		path := fmt.Sprintf("%s[%d]", at, i)
		fields := r.mapping(item, path, "model", "version", "weight")
		var t Target
		t.Model, t.Version = r.answers(fields, path)
		if n, ok := r.required(fields, path+".weight"); ok {
			t.Weight = uint32(r.integer(n, path+".weight", 0, policy.MaxWeight))
		}
		sum += uint64(t.Weight)
		if j, ok := seen[[2]any{t.Model, t.Version}]; ok && t.Model != "" {
			r.fault(path, "is the same target as %s[%d]", at, j)
		}
		seen[[2]any{t.Model, t.Version}] = i
		targets = append(targets, t)
	}
	if sum == 0 && len(r.faults) == faults {
		r.fault(at, "all weights are 0, at least one must be 1 to %d", policy.MaxWeight)
	}
	return targets
}

func (r *reader) sticky(fields map[string]node, at string) *dunlinv1.RouteSticky {
	n, ok := fields[at]
	if !ok {
		return nil
	}
	s := &dunlinv1.RouteSticky{}
	inner := r.mapping(n, at, "header", "parameter")
	if _, ok := inner[at+".header"]; ok {
		s.Header, _ = r.text(inner, at+".header")
	}
	if _, ok := inner[at+".parameter"]; ok {
		s.Parameter, _ = r.text(inner, at+".parameter")
	}
	return s
}

// fallback reads what answers instead of a target. Compiling the policy finds
// what cannot be.
func (r *reader) fallback(fields map[string]node, at string) []Fallback {
	n, ok := fields[at]
	if !ok {
		return nil
	}
	items, _ := r.sequence(n, at)
	if len(items) > policy.MaxFallbacks {
		r.fault(at, "has %d entries, allowed are 0 to %d", len(items), policy.MaxFallbacks)
		return nil
	}
	var all []Fallback
	for i, item := range items {
		path := fmt.Sprintf("%s[%d]", at, i)
		fields := r.mapping(item, path, "model", "version", "on")
		var f Fallback
		f.Model, f.Version = r.answers(fields, path)
		if n, ok := fields[path+".on"]; ok {
			reasons, ok := r.sequence(n, path+".on")
			if ok && (len(reasons) < 1 || len(reasons) > int(policy.Reasons)) {
				r.fault(path+".on", "has %d entries, allowed are 1 to %d", len(reasons), policy.Reasons)
				reasons = nil
			}
			for j, reason := range reasons {
				why, _ := r.scalar(reason, fmt.Sprintf("%s.on[%d]", path, j))
				f.On = append(f.On, why)
			}
		}
		all = append(all, f)
	}
	return all
}

// shadow reads what requests are mirrored to.
func (r *reader) shadow(fields map[string]node, at string) *dunlinv1.RouteShadow {
	n, ok := fields[at]
	if !ok {
		return nil
	}
	s := &dunlinv1.RouteShadow{}
	inner := r.mapping(n, at, "model", "version", "rate")
	s.Model, s.Version = r.answers(inner, at)
	if n, ok := r.required(inner, at+".rate"); ok {
		s.Rate = r.number(n, at+".rate", 0.0001, 1)
	}
	return s
}

// cascade reads where requests go on to.
func (r *reader) cascade(fields map[string]node, at string) *dunlinv1.RouteCascade {
	n, ok := fields[at]
	if !ok {
		return nil
	}
	c := &dunlinv1.RouteCascade{}
	inner := r.mapping(n, at, "model", "version", "when")
	c.Model, c.Version = r.answers(inner, at)
	c.When, _ = r.text(inner, at+".when")
	return c
}

func (r *reader) rule(n node, at string) Rule {
	fields := r.mapping(n, at, "name", "match", "targets", "sticky", "fallback", "shadow", "cascade")
	rule := Rule{Match: &dunlinv1.RouteMatch{}}
	rule.Name, _ = r.name(fields, at+".name")
	if n, ok := r.required(fields, at+".match"); ok {
		r.match(rule.Match, n, at+".match")
	}
	rule.Targets = r.targets(fields, at+".targets")
	rule.Sticky = r.sticky(fields, at+".sticky")
	rule.Fallback = r.fallback(fields, at+".fallback")
	rule.Shadow = r.shadow(fields, at+".shadow")
	rule.Cascade = r.cascade(fields, at+".cascade")
	return rule
}

func (r *reader) match(m *dunlinv1.RouteMatch, n node, at string) {
	fields := r.mapping(n, at, "parameters", "headers", "labels", "inputs", "cel")
	m.Parameters = r.conditions(fields, at+".parameters")
	m.Headers = r.conditions(fields, at+".headers")
	m.Labels = r.conditions(fields, at+".labels")
	if n, ok := fields[at+".inputs"]; ok {
		inputs := r.entries(n, at+".inputs")
		for _, name := range slices.Sorted(maps.Keys(inputs)) {
			path := at + ".inputs." + name
			in := &dunlinv1.RouteInput{Name: name}
			bounds := r.mapping(inputs[name], path, "minRows", "maxRows")
			if n, ok := bounds[path+".minRows"]; ok {
				in.MinRows = r.integer(n, path+".minRows", 0, policy.MaxRows)
			}
			if n, ok := bounds[path+".maxRows"]; ok {
				in.MaxRows = r.integer(n, path+".maxRows", 1, policy.MaxRows)
			}
			m.Inputs = append(m.Inputs, in)
		}
	}
	if _, ok := fields[at+".cel"]; ok {
		m.Cel, _ = r.text(fields, at+".cel")
	}
}

// conditions reads the values that names may have: one, or a list of them.
func (r *reader) conditions(fields map[string]node, at string) []*dunlinv1.RouteCondition {
	n, ok := fields[at]
	if !ok {
		return nil
	}
	var conditions []*dunlinv1.RouteCondition
	entries := r.entries(n, at)
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		path := at + "." + name
		c := &dunlinv1.RouteCondition{Name: name}
		if _, list := entries[name].(*ast.SequenceNode); list {
			items, _ := r.sequence(entries[name], path)
			for i, item := range items {
				v, _ := r.scalar(item, fmt.Sprintf("%s[%d]", path, i))
				c.Values = append(c.Values, v)
			}
		} else if v, ok := r.scalar(entries[name], path); ok {
			c.Values = []string{v}
		}
		conditions = append(conditions, c)
	}
	return conditions
}
