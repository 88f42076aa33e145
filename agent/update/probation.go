package update

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Health is how an agent does.
type Health struct {
	Linked bool     // a session with the controller is open
	Worker bool     // models can be loaded, or there is none that should be
	Served []string // models that requests are answered for
	Wanted []string // models that the device should have a version of
}

// Probation judges a release that is tried. It is pure.
type Probation struct {
	// For is how long it must be healthy without a break, and Limit how long
	// it may take until it has been.
	For, Limit time.Duration
	Linked     bool     // the controller was reached before
	Served     []string // models that were served before

	began, since time.Time // zero: not yet
}

// Verdict is what became of a release that is tried.
type Verdict int

// The verdicts.
const (
	Undecided Verdict = iota
	Proved
	Failed
)

// Step takes in how the agent does at a time that does not go back. The reason
// says what is missing, or was.
func (p *Probation) Step(now time.Time, h Health) (Verdict, string) {
	if p.began.IsZero() {
		p.began = now
	}
	missing := p.missing(h)
	if missing != "" {
		p.since = time.Time{}
	} else if p.since.IsZero() {
		p.since = now
	}
	switch {
	case missing == "" && now.Sub(p.since) >= p.For:
		return Proved, ""
	case missing == "" || now.Sub(p.began) < p.Limit:
		return Undecided, missing
	}
	return Failed, fmt.Sprintf("it did not prove itself within %v: %s", p.Limit, missing)
}

// missing says what is not as it was before.
func (p *Probation) missing(h Health) string {
	var all []string
	if p.Linked && !h.Linked {
		all = append(all, "the controller is not reached")
	}
	if !h.Worker {
		all = append(all, "no model can be loaded")
	}
	for _, m := range p.Served {
		if slices.Contains(h.Wanted, m) && !slices.Contains(h.Served, m) {
			all = append(all, fmt.Sprintf("model %s is not served", m))
		}
	}
	const shown = 3
	if len(all) > shown {
		all = append(all[:shown], fmt.Sprintf("and %d more", len(all)-shown))
	}
	return strings.Join(all, ", ")
}
