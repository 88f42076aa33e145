package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// MaxFallbacks bounds the fallbacks of the route, and of each rule.
const MaxFallbacks = 8

// Reason is why a target does not answer a request.
type Reason uint8

// The reasons.
const (
	Overload    Reason = iota // its queue is full
	Failed                    // its run fails, or it cannot run
	Deadline                  // it cannot answer in the request's time
	NotResident               // its weights are not in memory
	Reasons                   // how many there are
)

var reasonNames = [Reasons]string{"overload", "error", "deadline", "not-resident"}

// String gives the name that documents have for it.
func (r Reason) String() string { return reasonNames[r] }

// usual are the reasons that a fallback takes which names none. Weights that
// are out are not among them: they come in for requests that wait for them.
const usual = 1<<Overload | 1<<Failed | 1<<Deadline

// Fallback answers instead of a target that does not.
type Fallback struct {
	Target
	on uint8 // a bit for each Reason
}

// Takes says whether it answers when the one before did not for this reason.
func (f *Fallback) Takes(why Reason) bool { return f.on&(1<<why) != 0 }

// Fallbacks are those of a rule, or with -1 of the requests that no rule
// matches, in the order in which they are tried. They must not be changed.
func (p *Policy) Fallbacks(rule int) []Fallback {
	if rule < 0 {
		return p.unmatched.fallbacks
	}
	return p.rules[rule].choice.fallbacks
}

// NextFallback gives the first of them, from one on, that takes the reason;
// len(fallbacks) where there is none. Whoever goes on behind the one that it
// gives comes to an end.
func NextFallback(fallbacks []Fallback, from int, why Reason) int {
	for from < len(fallbacks) && !fallbacks[from].Takes(why) {
		from++
	}
	return from
}

// fallbacks compiles those of targets. One that is the only target that gets
// requests would send them round in a circle; where there are several, it is
// one for the others.
func (c *compiler) fallbacks(to *choice, at string, fallbacks []*dunlinv1.RouteFallback) {
	if len(fallbacks) > MaxFallbacks {
		c.fault(at, "has %d entries, allowed are 0 to %d", len(fallbacks), MaxFallbacks)
		return
	}
	first := map[Target]int{}
	for i, rf := range fallbacks {
		at := fmt.Sprintf("%s[%d]", at, i)
		f := Fallback{Target: Target{rf.GetModel(), rf.GetVersion()}}
		if err := models.CheckName(f.Model); err != nil {
			c.fault(at+".model", "%v", err)
		}
		if f.Version < 0 {
			c.fault(at+".version", "%d is below 0", f.Version)
		}
		if j, ok := first[f.Target]; ok {
			c.fault(at, "the same model and version as fallback[%d]", j)
		} else {
			first[f.Target] = i
		}
		if len(to.targets) == 1 && to.targets[0] == f.Target {
			c.fault(at, "is circular: it is the only target that gets requests")
		}
		for j, name := range rf.GetOn() {
			at := fmt.Sprintf("%s.on[%d]", at, j)
			why := slices.Index(reasonNames[:], name)
			switch {
			case why < 0:
				c.fault(at, "%q is not known, known are %s", clip(name), strings.Join(reasonNames[:], ", "))
			case f.Takes(Reason(why)):
				c.fault(at, "%s is there twice", name)
			default:
				f.on |= 1 << why
			}
		}
		if len(rf.GetOn()) == 0 {
			f.on = usual
		}
		to.fallbacks = append(to.fallbacks, f)
	}
}
