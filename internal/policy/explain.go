package policy

import "strconv"

// Explanation is a decision, and what was looked at to come to it.
type Explanation struct {
	Decision
	// Rules are those that were looked at, in their order. Where one decides it
	// is the last.
	Rules  []Seen
	Choice Choice
	// Live has the figures where an expression asked for them.
	Live *Figures
}

// Seen is what was seen of a rule: its conditions up to the first that does
// not hold.
type Seen struct {
	Rule       string
	Conditions []Condition
}

// Condition is one that was looked at.
type Condition struct {
	Kind  string // "parameter", "header", "label", "input" or "cel"
	Name  string // of what it looks at; of cel the expression
	Value string // of the request or the device; of an input its rows
	There bool   // false: there is no such value
	// Want are the values of which it must be one; of an input the bounds of
	// its rows, the second "" where there is none.
	Want  []string
	Holds bool
	Fault string // why an expression could not be evaluated
}

// Choice is how one of the targets was chosen: by a key, or by chance.
type Choice struct {
	// KeyKind and KeyName are those of what is sticky, "" where nothing is.
	KeyKind, KeyName string
	Key              string
	Stuck            bool // false: the request has no key, or nothing is sticky
	// By chance, the point that the number gave, from 0 to below the sum of the
	// weights.
	Point, Sum uint64
	Options    []Option
}

// Option is one of the targets that could be chosen.
type Option struct {
	Target Target
	Weight uint64
	// End is the point below which a choice by chance takes it, if it took none
	// before.
	End uint64
	// Draw is what it drew from the key; the least wins.
	Draw float64
}

// Explain decides as Decide does, by the same code, and says why.
func (p *Policy) Explain(q *Request, random uint64) *Explanation {
	e := new(Explanation)
	s := sight{policy: p, request: *q, seen: e}
	e.Decision = s.decide(random)
	if s.cel != nil {
		e.Live = s.cel.live
	}
	return e
}

// What follows notes what is seen, where somebody asks.

func (s *sight) rule(i int) {
	if s.seen != nil {
		s.seen.Rules = append(s.seen.Rules, Seen{Rule: s.policy.rules[i].name})
	}
}

func (s *sight) note(c Condition) {
	rule := &s.seen.Rules[len(s.seen.Rules)-1]
	rule.Conditions = append(rule.Conditions, c)
}

// slotName gives what a slot holds.
func (p *Policy) slotName(slot int) (kind, name string) {
	if n := len(p.parameters); slot >= n {
		return "header", p.headers[slot-n]
	}
	return "parameter", p.parameters[slot]
}

func (s *sight) compared(c *condition, value string, there, holds bool) {
	if s.seen != nil {
		kind, name := s.policy.slotName(c.slot)
		s.note(Condition{Kind: kind, Name: name, Value: value, There: there, Want: c.values, Holds: holds})
	}
}

func (s *sight) labelled(l *labelled, value string, there, holds bool) {
	if s.seen != nil {
		s.note(Condition{Kind: "label", Name: l.name, Value: value, There: there, Want: l.values, Holds: holds})
	}
}

func (s *sight) counted(in *input, rows int64, there, holds bool) {
	if s.seen == nil {
		return
	}
	c := Condition{Kind: "input", Name: in.name, There: there, Want: []string{strconv.FormatInt(in.least, 10), ""}, Holds: holds}
	if there {
		c.Value = strconv.FormatInt(rows, 10)
	}
	if in.most > 0 {
		c.Want[1] = strconv.FormatInt(in.most, 10)
	}
	s.note(c)
}

func (s *sight) evaluated(e *expression, holds bool, err error) {
	if s.seen == nil {
		return
	}
	c := Condition{Kind: "cel", Name: e.text, There: err == nil, Holds: holds}
	if err != nil {
		c.Fault = err.Error()
	} else {
		c.Value = strconv.FormatBool(holds)
	}
	s.note(c)
}

func (s *sight) stuck(c *choice, key string) {
	if s.seen == nil {
		return
	}
	to := s.choice(c)
	to.Key, to.Stuck = key, true
	k := mix(hash(key) ^ s.policy.seed)
	for i := range to.Options {
		to.Options[i].Draw = c.draw(k, i)
	}
}

func (s *sight) picked(c *choice, random uint64) {
	if s.seen != nil {
		s.choice(c).Point = c.point(random)
	}
}

func (s *sight) choice(c *choice) *Choice {
	to := &s.seen.Choice
	to.Sum = c.ends[len(c.ends)-1]
	for i, t := range c.targets {
		to.Options = append(to.Options, Option{Target: t, Weight: uint64(c.weights[i]), End: c.ends[i]})
	}
	if c.key >= 0 {
		to.KeyKind, to.KeyName = s.policy.slotName(c.key)
	}
	return to
}
