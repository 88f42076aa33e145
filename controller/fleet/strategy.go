package fleet

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/dunlin/dunlin/internal/sketch"
)

// Strategy says how a change of a deployment is rolled out.
type Strategy struct {
	Waves     []Wave        // none: one wave with every device
	Soak      time.Duration // that a wave runs, once it is ready, before the next begins
	MinSample uint64        // requests to each version that a gate needs on a class of devices, beside what it needs itself
	Gates     []Gate
	OnFailure OnFailure // what a failed gate, or too many refusals, lead to
	MaxFailed int       // devices that may refuse the version, or not be ready in time, in all waves together
	// Deadline bounds how long a device takes to be ready once it is given the
	// version, and how long a wave waits for its sample once it is ready and
	// has soaked.
	Deadline  time.Duration
	AwayAfter time.Duration // a device that has been away for so long does not hold a wave up
}

// AllWaves gives the waves with the last one, in which every device is.
func (s Strategy) AllWaves() []Wave {
	if n := len(s.Waves); n > 0 && s.Waves[n-1].Percent == 100 {
		return s.Waves
	}
	return append(slices.Clone(s.Waves), Wave{Percent: 100})
}

// Equal says whether two strategies are the same in everything.
func (s Strategy) Equal(o Strategy) bool {
	return slices.Equal(s.Waves, o.Waves) && slices.Equal(s.Gates, o.Gates) && s.Soak == o.Soak && s.MinSample == o.MinSample &&
		s.OnFailure == o.OnFailure && s.MaxFailed == o.MaxFailed && s.Deadline == o.Deadline && s.AwayAfter == o.AwayAfter
}

// Wave is a part of the devices of a rollout that change together: exactly one
// of its fields is set. Counts and percentages are of all devices of the
// rollout, and include the waves before.
type Wave struct {
	Canary  int     // so many devices of each class
	Count   int     // devices
	Percent float64 // above 0, up to 100
}

// String writes the wave as people are shown it: "1 canary per class", "20
// devices", "10 %", "all".
func (w Wave) String() string {
	switch {
	case w.Canary == 1:
		return "1 canary per class"
	case w.Canary > 1:
		return fmt.Sprintf("%d canaries per class", w.Canary)
	case w.Count > 0:
		return count(w.Count)
	case w.Percent == 100:
		return "all"
	}
	return strconv.FormatFloat(w.Percent, 'f', -1, 64) + " %"
}

// OnFailure is what a failed rollout leads to.
type OnFailure string

// The ways to go on after a failure.
const (
	RollBack OnFailure = "rollback" // every device gets the version before
	Halt     OnFailure = "halt"     // an operator decides
)

// GateKind is a figure by which a version is judged.
type GateKind string

// The gates. Each compares the new version on the devices that have it with
// the old one on the same class of device.
const (
	ErrorRate  GateKind = "errorRate"  // share of requests that fail, above the old version's by at most Limit
	P99        GateKind = "p99"        // 99th percentile of the latency, over the old version's
	Energy     GateKind = "energy"     // joules of a row, over the old version's
	Confidence GateKind = "confidence" // population stability index of the confidence (sketch.PSI)
)

// Gate bounds a figure of the new version.
type Gate struct {
	Kind  GateKind
	Limit float64
}

// Figures are what was counted of a version's requests on one device, or on
// several of one class. The zero value counts nothing.
type Figures struct {
	Requests, Failures uint64
	Rows               uint64
	Latency            sketch.Counts // of sketch.Latency
	Confidence         sketch.Counts // of sketch.Confidence; nil: the outputs say nothing of it
	Joules             float64
	Energy             bool // Joules is known
}

// Add gives the figures of both together.
func (f Figures) Add(o Figures) Figures {
	sum := Figures{
		Requests: f.Requests + o.Requests, Failures: f.Failures + o.Failures, Rows: f.Rows + o.Rows,
		Latency: f.Latency.Add(o.Latency), Confidence: f.Confidence.Add(o.Confidence), Joules: f.Joules + o.Joules,
	}
	// Of devices of which some do not measure it, none counts.
	sum.Energy = (f.Energy || f.Requests == 0) && (o.Energy || o.Requests == 0) && (f.Energy || o.Energy)
	return sum
}

// Since gives what was counted after an earlier state of the same figures.
// Where a count is less than before, it began anew.
func (f Figures) Since(before Figures) Figures {
	if before.Requests > f.Requests || before.Failures > f.Failures || before.Rows > f.Rows || before.Joules > f.Joules {
		return f
	}
	f.Requests, f.Failures, f.Rows = f.Requests-before.Requests, f.Failures-before.Failures, f.Rows-before.Rows
	f.Latency, f.Confidence = f.Latency.Since(before.Latency), f.Confidence.Since(before.Confidence)
	f.Joules -= before.Joules
	return f
}

// Equal says whether two figures are the same.
func (f Figures) Equal(o Figures) bool {
	return f.Requests == o.Requests && f.Failures == o.Failures && f.Rows == o.Rows && f.Joules == o.Joules && f.Energy == o.Energy &&
		slices.Equal(f.Latency, o.Latency) && slices.Equal(f.Confidence, o.Confidence)
}

// ClassFigures are the figures of both versions on one class of devices.
type ClassFigures struct {
	Class    string
	New, Old Figures
}

// GateVerdict is what came of a gate.
type GateVerdict int

// The verdicts.
const (
	Passed GateVerdict = iota + 1
	FailedGate
	NoSample // too few requests, or nothing to compare with
)

// GateResult is what a gate was judged by, on one class of devices.
type GateResult struct {
	Gate       GateKind
	Class      string
	Verdict    GateVerdict
	New, Old   *float64 // the figure of each; nil: there is none
	Value      *float64 // what is compared with Limit; nil: there is none
	Limit      float64
	NewSamples uint64 // requests
	OldSamples uint64
	Reason     string // in words
}

// Decision is what was decided in a rollout, and on what.
type Decision struct {
	At          time.Time
	Kind        DecisionKind
	Wave        int    // from 1; 0: of none
	By          string // "gate", "controller", or the user as in the audit log
	Reason      string
	Devices     []string // that it is about, at most 100
	DeviceCount int
	Gates       []GateResult
}

// DecisionKind says what was decided.
type DecisionKind string

// What is decided.
const (
	DecideStart     DecisionKind = "start"
	DecideAdmit     DecisionKind = "admit" // devices are given the version: a wave begins, or grows
	DecidePass      DecisionKind = "pass"  // a wave has passed
	DecideHalt      DecisionKind = "halt"
	DecideRollBack  DecisionKind = "roll back"
	DecidePause     DecisionKind = "pause"
	DecideResume    DecisionKind = "resume"
	DecidePromote   DecisionKind = "promote"
	DecideAbort     DecisionKind = "abort"
	DecideSucceed   DecisionKind = "succeed"
	DecideFail      DecisionKind = "fail"
	DecideSupersede DecisionKind = "supersede"
)

// Command is what an operator asks of a rollout.
type Command string

// The commands.
const (
	CommandPause    Command = "pause"
	CommandResume   Command = "resume"
	CommandPromote  Command = "promote"
	CommandAbort    Command = "abort"
	CommandRollBack Command = "rollback"
)
