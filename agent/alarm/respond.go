package alarm

import (
	"fmt"
	"strings"
	"time"
)

// Reaction is what a device does about alarms of heat and of memory errors.
type Reaction string

// Reactions.
const (
	None     Reaction = "none"
	Throttle Reaction = "throttle" // take less load, and still less while it stays too hot
	Cordon   Reaction = "cordon"   // refuse new requests
)

// Reactions are all of them.
var Reactions = []Reaction{None, Throttle, Cordon}

// Load bounds what a device does. The zero value sets no bound.
type Load struct {
	MaxBatch int     // rows of a run; 0: no bound
	Duty     float64 // share of the time in which runs are in progress, below 1; 0: no bound
	Cordon   bool    // new requests are refused
}

// steps are how Throttle lowers the load.
var steps = []Load{{}, {MaxBatch: 4, Duty: 0.5}, {MaxBatch: 1, Duty: 0.25}}

// stepAfter is how long a device stays too hot before its load is lowered
// once more.
const stepAfter = 3 * time.Minute

// String says what is done: "duty 0.5, batch 4", "cordon"; "" where nothing.
func (l Load) String() string {
	var parts []string
	if l.Duty > 0 {
		parts = append(parts, fmt.Sprintf("duty %g", l.Duty))
	}
	if l.MaxBatch > 0 {
		parts = append(parts, fmt.Sprintf("batch %d", l.MaxBatch))
	}
	if l.Cordon {
		parts = append(parts, "cordon")
	}
	return strings.Join(parts, ", ")
}

// Responder decides what a device does.
type Responder struct {
	reaction Reaction
	step     int
	hot      bool          // at the last look
	since    time.Duration // it is hot, or the step was taken
}

// NewResponder gives one that reacts as told.
func NewResponder(r Reaction) *Responder { return &Responder{reaction: r} }

// Decide gives the load that the device may have: pressing says whether an
// alarm asks for less, hot whether a temperature is too high at this moment,
// see Detector.Pressing. It is taken back when no alarm asks for it any more.
func (r *Responder) Decide(now time.Duration, pressing, hot bool) Load {
	if !pressing {
		r.step, r.hot = 0, false
		return Load{}
	}
	switch r.reaction {
	case Throttle:
		switch {
		case r.step == 0:
			r.step, r.since = 1, now
		case hot && !r.hot:
			r.since = max(r.since, now)
		case hot && now-r.since >= stepAfter && r.step < len(steps)-1:
			r.step, r.since = r.step+1, now
		}
		r.hot = hot
		return steps[r.step]
	case Cordon:
		return Load{Cordon: true}
	}
	return Load{}
}
