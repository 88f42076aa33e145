// Package policy decides which version of which model answers a request to a
// route: the first rule that matches it, and among the rule's targets a weight
// or a key; and which one answers where that one does not.
package policy

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Limits of a route.
const (
	MaxTargets = 64 // of the route, and of each rule
	MaxWeight  = 10000
	MaxRules   = 64

	// MaxNames bounds the names of parameters and headers that the conditions
	// and keys of a route look at, all together.
	MaxNames     = 64
	MaxNameBytes = 128 // of a name
	// MaxConditions bounds those of one match on parameters, on headers, on
	// labels and on inputs.
	MaxConditions = 16
	MaxValues     = 64  // of a condition
	MaxValueBytes = 256 // of a value
	MaxRows       = 1 << 40

	MaxExpression = 1024 // bytes of the text of one expression
	MaxPattern    = 128  // bytes of a regular expression
	// MaxCost bounds an expression by what CEL says that it costs, at its most
	// and when it runs; one unit is a few nanoseconds to some tens.
	MaxCost = 10000
	// Expressions see no more than so many parameters or headers of a request,
	// and fault where it has more; what has a longer value is not there for
	// them.
	MaxEntries   = 64
	MaxEntryText = 1024
)

// DefaultRule is the name of what happens to a request that no rule matches.
const DefaultRule = "default"

// Target is where a request goes.
type Target struct {
	Model   string
	Version int64 // 0: the one that the device serves of the model
}

// String writes "digits:1", or "digits" where it means what is served.
func (t Target) String() string {
	if t.Version == 0 {
		return t.Model
	}
	return t.Model + ":" + strconv.FormatInt(t.Version, 10)
}

// Fault is one thing that is wrong with a route.
type Fault struct {
	Field   string // "rules[2].match.cel"
	Problem string
}

func (f *Fault) Error() string { return f.Field + ": " + f.Problem }

// Faults is all that is wrong with a route, in its order.
type Faults []*Fault

func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i, fault := range f {
		lines[i] = fault.Error()
	}
	return strings.Join(lines, "; ")
}

// Policy is a compiled route. It never changes and may be used concurrently.
type Policy struct {
	seed      uint64
	rules     []rule
	unmatched choice
	// The names that conditions and keys look at; a slot is an index, first of
	// the parameters, then of the headers.
	parameters, headers []string
}

// rule sends what its match matches to its choice.
type rule struct {
	name   string
	match  match
	choice choice
}

// choice picks one of its targets.
type choice struct {
	targets   []Target
	ends      []uint64  // sum of the weights up to and including each target
	hashes    []uint64  // of each target
	weights   []float64 // of each target
	key       int       // slot of what is sticky; -1: nothing is
	fallbacks []Fallback
	shadow    *Shadow  // nil: none
	cascade   *Cascade // nil: none
}

// Decision is what a policy says of a request.
type Decision struct {
	Rule   int // index; -1: no rule matches
	Target Target
	// Faulted has the bit of each rule whose match could not be evaluated, and
	// so did not match.
	Faulted uint64
}

// Compile checks a route and makes a policy of it. A target of weight 0 gets
// no requests; in each list of targets one at least must have more. An error
// that is not one of the route's name wraps Faults.
func Compile(route *dunlinv1.DesiredRoute) (*Policy, error) {
	if err := models.CheckName(route.GetName()); err != nil {
		return nil, fmt.Errorf("route: %w", err)
	}
	c := compiler{policy: &Policy{seed: hash(route.GetName())}}
	c.route(route)
	if len(c.faults) > 0 {
		return nil, fmt.Errorf("route %s: %w", route.GetName(), c.faults)
	}
	return c.policy, nil
}

// RuleName gives the name of what a decision calls by its number.
func (p *Policy) RuleName(i int) string {
	if i < 0 {
		return DefaultRule
	}
	return p.rules[i].name
}

// Rules is how many rules there are.
func (p *Policy) Rules() int { return len(p.rules) }

// Targets are those of a rule, or with -1 of the requests that no rule
// matches, that can get requests. They must not be changed.
func (p *Policy) Targets(i int) []Target {
	if i < 0 {
		return p.unmatched.targets
	}
	return p.rules[i].choice.targets
}

// Decide gives the target of a request. The same request and number always get
// the same target. It does not allocate where no rule has an expression and
// the request's Values do not.
func (p *Policy) Decide(q *Request, random uint64) Decision {
	if len(p.rules) == 0 && p.unmatched.key < 0 {
		return Decision{Rule: -1, Target: p.unmatched.pick(random)}
	}
	s := sight{policy: p, request: *q} // a copy, so that the caller's need not be on the heap
	return s.decide(random)
}

// decide is what Decide does, and notes for Explain what it sees.
func (s *sight) decide(random uint64) Decision {
	p := s.policy
	d := Decision{Rule: -1}
	taken := &p.unmatched
	for i := range p.rules {
		s.rule(i)
		matches, faulted := s.matches(&p.rules[i].match)
		if faulted {
			d.Faulted |= 1 << i
		}
		if matches {
			d.Rule, taken = i, &p.rules[i].choice
			break
		}
	}
	if taken.key >= 0 {
		if key, ok := s.value(taken.key); ok {
			d.Target = taken.stick(p.seed, key)
			s.stuck(taken, key)
			return d
		}
	}
	d.Target = taken.pick(random)
	s.picked(taken, random)
	return d
}

// pick gives a target by chance. Over any run of consecutive numbers as long
// as the sum of the weights, each target is picked exactly as often as its
// weight says.
func (c *choice) pick(random uint64) Target {
	at := c.point(random)
	i := 0
	for at >= c.ends[i] {
		i++
	}
	return c.targets[i]
}

// point is where a number falls among the weights.
func (c *choice) point(random uint64) uint64 { return random % c.ends[len(c.ends)-1] }
