package policy

import (
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Shadow runs a share of the requests once more, to be compared.
type Shadow struct {
	Target
	rate float64
}

// Takes says whether it runs the request for which this number was drawn. It
// does not depend on which target the number picks.
func (s *Shadow) Takes(random uint64) bool {
	return float64(mix(random^0x5ead0)>>11)/(1<<53) < s.rate
}

// Shadow is that of a rule, or with -1 of the requests that no rule matches;
// nil where there is none.
func (p *Policy) Shadow(rule int) *Shadow {
	if rule < 0 {
		return p.unmatched.shadow
	}
	return p.rules[rule].choice.shadow
}

func (c *compiler) shadow(to *choice, at string, shadow *dunlinv1.RouteShadow) {
	if shadow == nil {
		return
	}
	s := &Shadow{Target{shadow.GetModel(), shadow.GetVersion()}, shadow.GetRate()}
	if err := models.CheckName(s.Model); err != nil {
		c.fault(at+".model", "%v", err)
	}
	if s.Version < 0 {
		c.fault(at+".version", "%d is below 0", s.Version)
	}
	if !(s.rate > 0 && s.rate <= 1) {
		c.fault(at+".rate", "%v, allowed are numbers above 0 up to 1", s.rate)
	}
	if len(to.targets) == 1 && to.targets[0] == s.Target {
		c.fault(at, "is the only target that gets requests: there is nothing to compare")
	}
	to.shadow = s
}
