package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

var nameText = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.:/-]*[A-Za-z0-9_])?$`)

// compiler makes a policy and collects what is wrong with its route.
type compiler struct {
	policy *Policy
	faults Faults
	// pending are the uses of headers, whose slots come after all parameters.
	pending []*int
	crowded bool // there are more than MaxNames
}

func (c *compiler) fault(field, format string, args ...any) {
	c.faults = append(c.faults, &Fault{field, fmt.Sprintf(format, args...)})
}

func (c *compiler) route(route *dunlinv1.DesiredRoute) {
	p := c.policy
	c.choice(&p.unmatched, "", route.GetTargets(), route.GetSticky())
	c.fallbacks(&p.unmatched, "fallback", route.GetFallback())
	c.shadow(&p.unmatched, "shadow", route.GetShadow())
	c.cascade(&p.unmatched, "cascade", route.GetCascade())
	rules := route.GetRules()
	if len(rules) > MaxRules {
		c.fault("rules", "has %d entries, allowed are 0 to %d", len(rules), MaxRules)
		return
	}
	first := map[string]int{}
	p.rules = make([]rule, len(rules))
	for i, r := range rules {
		at := fmt.Sprintf("rules[%d].", i)
		name := r.GetName()
		p.rules[i].name = name
		switch err := models.CheckName(name); {
		case err != nil:
			c.fault(at+"name", "%v", err)
		case name == DefaultRule:
			c.fault(at+"name", "%q is the name of what happens to requests that no rule matches", name)
		default:
			if j, ok := first[name]; ok {
				c.fault(at+"name", "is that of rules[%d] too", j)
			} else {
				first[name] = i
			}
		}
		c.match(&p.rules[i].match, at+"match", r.GetMatch())
		c.choice(&p.rules[i].choice, at, r.GetTargets(), r.GetSticky())
		c.fallbacks(&p.rules[i].choice, at+"fallback", r.GetFallback())
		c.shadow(&p.rules[i].choice, at+"shadow", r.GetShadow())
		c.cascade(&p.rules[i].choice, at+"cascade", r.GetCascade())
	}
	for _, slot := range c.pending {
		*slot += len(p.parameters)
	}
}

func (c *compiler) choice(to *choice, at string, targets []*dunlinv1.RouteTarget, sticky *dunlinv1.RouteSticky) {
	to.key = -1
	c.targets(to, at+"targets", targets)
	switch {
	case sticky == nil:
	case (sticky.GetHeader() == "") == (sticky.GetParameter() == ""):
		c.fault(at+"sticky", "must have one of header and parameter")
	case sticky.GetHeader() != "":
		to.key = c.header(at+"sticky.header", sticky.GetHeader())
		c.pending = append(c.pending, &to.key)
	default:
		to.key = c.parameter(at+"sticky.parameter", sticky.GetParameter())
	}
}

func (c *compiler) targets(to *choice, at string, targets []*dunlinv1.RouteTarget) {
	if len(targets) < 1 || len(targets) > MaxTargets {
		c.fault(at, "there are %d, allowed are 1 to %d", len(targets), MaxTargets)
		return
	}
	first := map[Target]int{}
	faults := len(c.faults)
	var end uint64
	for i, rt := range targets {
		at := fmt.Sprintf("%s[%d]", at, i)
		t := Target{rt.GetModel(), rt.GetVersion()}
		if err := models.CheckName(t.Model); err != nil {
			c.fault(at+".model", "%v", err)
		}
		if t.Version < 0 {
			c.fault(at+".version", "%d is below 0", t.Version)
		}
		if rt.GetWeight() > MaxWeight {
			c.fault(at+".weight", "%d, allowed are 0 to %d", rt.GetWeight(), MaxWeight)
		}
		if j, ok := first[t]; ok {
			c.fault(at, "the same model and version as targets[%d]", j)
		}
		first[t] = i
		if rt.GetWeight() == 0 {
			continue
		}
		end += uint64(rt.GetWeight())
		to.targets = append(to.targets, t)
		to.ends = append(to.ends, end)
		to.hashes = append(to.hashes, t.hash())
		to.weights = append(to.weights, float64(rt.GetWeight()))
	}
	if end == 0 && len(c.faults) == faults {
		c.fault(at, "every weight is 0")
	}
}

// parameter gives the slot of a parameter.
func (c *compiler) parameter(at, name string) int {
	return c.slot(at, name, &c.policy.parameters)
}

// header gives the slot of a header among the headers.
func (c *compiler) header(at, name string) int {
	switch {
	case strings.ToLower(name) != name:
		c.fault(at, "header %q must be written in lower case", clip(name))
	case slices.Contains(secretHeaders, name):
		c.fault(at, "header %q carries credentials, which rules do not see", name)
	}
	return c.slot(at, name, &c.policy.headers)
}

func (c *compiler) slot(at, name string, names *[]string) int {
	if !c.name(at, name) {
		return 0
	}
	if i := slices.Index(*names, name); i >= 0 {
		return i
	}
	if len(c.policy.parameters)+len(c.policy.headers) == MaxNames {
		if !c.crowded {
			c.fault(at, "is one too many: rules and keys of a route may name %d parameters and headers", MaxNames)
		}
		c.crowded = true
		return 0
	}
	*names = append(*names, name)
	return len(*names) - 1
}

func (c *compiler) name(at, name string) bool {
	if name == "" || len(name) > MaxNameBytes {
		c.fault(at, "name %q has %d bytes, allowed are 1 to %d", clip(name), len(name), MaxNameBytes)
		return false
	}
	if !nameText.MatchString(name) {
		c.fault(at, "name %q: allowed are A-Z a-z 0-9 _ . : / -, first and last a letter, digit or _", clip(name))
		return false
	}
	return true
}

func (c *compiler) match(to *match, at string, m *dunlinv1.RouteMatch) {
	n := len(m.GetParameters()) + len(m.GetHeaders())
	if n+len(m.GetLabels())+len(m.GetInputs()) == 0 && m.GetCel() == "" {
		c.fault(at, "has no condition, it must have one at least")
	}
	to.values = make([]condition, 0, n) // so that the slots stay where they are
	c.conditions(at+".parameters", m.GetParameters(), func(at, name string, values []string) {
		to.values = append(to.values, condition{c.parameter(at, name), values})
	})
	c.conditions(at+".headers", m.GetHeaders(), func(at, name string, values []string) {
		to.values = append(to.values, condition{c.header(at, name), values})
		c.pending = append(c.pending, &to.values[len(to.values)-1].slot)
	})
	c.conditions(at+".labels", m.GetLabels(), func(at, name string, values []string) {
		if c.name(at, name) {
			to.labels = append(to.labels, labelled{name, values})
		}
	})
	c.inputs(to, at+".inputs", m.GetInputs())
	if text := m.GetCel(); text != "" {
		var err error
		if to.cel, err = compileExpression(text); err != nil {
			c.fault(at+".cel", "%v", err)
		}
	}
}

func (c *compiler) conditions(at string, conditions []*dunlinv1.RouteCondition, add func(at, name string, values []string)) {
	if len(conditions) > MaxConditions {
		c.fault(at, "has %d entries, the limit is %d", len(conditions), MaxConditions)
		return
	}
	seen := map[string]bool{}
	for _, condition := range conditions {
		at, values := at+"."+condition.GetName(), condition.GetValues()
		if len(values) < 1 || len(values) > MaxValues {
			c.fault(at, "has %d values, allowed are 1 to %d", len(values), MaxValues)
		}
		for i, v := range values {
			if len(v) > MaxValueBytes {
				c.fault(fmt.Sprintf("%s[%d]", at, i), "value %q has %d bytes, the limit is %d", clip(v), len(v), MaxValueBytes)
			}
		}
		if seen[condition.GetName()] {
			c.fault(at, "is there twice")
		}
		seen[condition.GetName()] = true
		add(at, condition.GetName(), slices.Clone(values))
	}
}

func (c *compiler) inputs(to *match, at string, inputs []*dunlinv1.RouteInput) {
	if len(inputs) > MaxConditions {
		c.fault(at, "has %d entries, the limit is %d", len(inputs), MaxConditions)
		return
	}
	seen := map[string]bool{}
	for _, in := range inputs {
		at := at + "." + in.GetName()
		least, most := in.GetMinRows(), in.GetMaxRows()
		if !c.name(at, in.GetName()) {
			continue
		}
		if seen[in.GetName()] {
			c.fault(at, "is there twice")
		}
		seen[in.GetName()] = true
		switch {
		case least < 0 || least > MaxRows:
			c.fault(at+".minRows", "is %d, allowed are 0 to %d", least, MaxRows)
		case most < 0 || most > MaxRows:
			c.fault(at+".maxRows", "is %d, allowed are 0 to %d", most, MaxRows)
		case most > 0 && most < least:
			c.fault(at+".maxRows", "is %d, which is below minRows, %d", most, least)
		}
		to.inputs = append(to.inputs, input{in.GetName(), least, most})
	}
}

// clip shortens a value from outside for a message.
func clip(s string) string {
	if len(s) <= 100 {
		return s
	}
	return strings.ToValidUTF8(s[:100], "") + "..."
}
