package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// State is where a rollout stands.
type State int

// The states of a rollout, with the numbers that the store keeps. Running,
// Paused, Halted and RollingBack are those of a rollout that has not ended.
const (
	Running State = iota + 1
	Succeeded
	Failed // and there is no version to go back to
	Superseded
	Paused // by an operator
	Halted // by a gate or by devices that refused; waits for an operator
	RollingBack
	RolledBack
	Aborted // by an operator: every device keeps what it has
)

// String writes the state in lower case.
func (s State) String() string {
	return [...]string{
		Running: "running", Succeeded: "succeeded", Failed: "failed", Superseded: "superseded", Paused: "paused", Halted: "halted",
		RollingBack: "rolling back", RolledBack: "rolled back", Aborted: "aborted",
	}[s]
}

// Ended says whether nothing more comes of it by itself.
func (s State) Ended() bool {
	return s == Succeeded || s == Failed || s == Superseded || s == RolledBack || s == Aborted
}

// Phase is how far a device is in a rollout.
type Phase int

// The phases of a device, with the numbers that the store keeps.
const (
	DevicePending Phase = iota + 1 // has not taken in the desired state
	DeviceWorking
	DeviceReady
	DeviceFailed
	DeviceWaiting    // its wave has not begun
	DeviceRolledBack // has the version before again
)

// Rollout is one change of a deployment.
type Rollout struct {
	Number     int64 // in order of their start, over all deployments
	Deployment string
	Model      string
	From, To   int64  // From is 0 where the deployment is new
	FromModel  string // the model of From; empty: Model
	Strategy   Strategy
	State      State
	Reason     string // what it waits for, or why it ended
	StartedAt  time.Time
	EndedAt    time.Time       // zero while it runs
	Devices    []RolloutDevice // by name

	Wave          int       // that runs, from 1; 0: none has begun
	WaveStartedAt time.Time // zero: none has begun
	WaveReadyAt   time.Time // since when its devices are ready; zero: they are not
	Promoted      bool      // an operator said not to wait for the present wave
	Gates         []GateResult
}

// ID names the rollout.
func (r Rollout) ID() string { return fmt.Sprintf("%s-%d", r.Deployment, r.Number) }

// Equal says whether r and o are the same in everything.
func (r Rollout) Equal(o Rollout) bool {
	same := slices.Equal(r.Devices, o.Devices) && r.Wave == o.Wave && r.WaveStartedAt.Equal(o.WaveStartedAt) && r.WaveReadyAt.Equal(o.WaveReadyAt) && r.Promoted == o.Promoted && r.FromModel == o.FromModel && r.StartedAt.Equal(o.StartedAt) && r.EndedAt.Equal(o.EndedAt)
	return same && r.Number == o.Number && r.Deployment == o.Deployment && r.Model == o.Model && r.From == o.From && r.To == o.To &&
		r.Strategy.Equal(o.Strategy) && r.State == o.State && r.Reason == o.Reason
}

// RolloutDevice is one device's part of a rollout.
type RolloutDevice struct {
	Device       string
	Class        string
	Wave         int // in which it is given the version, from 1; 0: none yet
	Phase        Phase
	Reason       string
	BytesPresent uint64
	BytesTotal   uint64
	AdmittedAt   time.Time // zero: it is not given the version
	ReadyAt      time.Time // zero: it is not ready
	Excused      bool      // away for so long that its wave does not wait for it
}

// Observation is what is known of one device and the version of a rollout.
type Observation struct {
	Device    string
	Class     string
	Connected bool
	HeardAt   time.Time // last
	// Busy names an older rollout that changes the device now; empty: none.
	Busy string
	// Closed says why no change may begin on the device now: a freeze, or
	// that its maintenance window is not open; Opens is when it may, zero: not
	// known.
	Closed string
	Opens  time.Time
	// What was counted of the new version since the device was given it, and
	// of the old one, on this device, since the rollout began and before it was.
	New, Old Figures
	// RolledBack: it serves the version before again (or, where there was
	// none, does not serve the new one), by its newest document.
	RolledBack bool
	// Refused says why the device is not given the version; empty: it is.
	Refused string
	// Observed: what it reports follows from its current desired document.
	// All below counts only then.
	Observed     bool
	Serving      bool // answers requests for the model with the version
	Quarantined  bool
	Reason       string
	BytesPresent uint64
	BytesTotal   uint64
}

// ActionKind says what to do.
type ActionKind int

// The actions of a rollout.
const (
	Wake   ActionKind = iota + 1 // step again at At, though nothing was observed
	Ask                          // ask Device to report again
	End                          // the rollout ended in this step
	Decide                       // Decision is to be kept, in the transaction that keeps the rollout
	Watch                        // Device is to send telemetry with figures, often, while this is asked for
)

// Action is what a step asks for.
type Action struct {
	Kind   ActionKind
	At     time.Time
	Device string

	Decision Decision
}

// Supersede ends a running rollout because of a newer one, or of what reason says.
func (r Rollout) Supersede(now time.Time, reason string) Rollout {
	if r.State == Running {
		r.State, r.Reason, r.EndedAt = Superseded, reason, now
	}
	return r
}

// Step takes in what is known of all devices that the deployment counts for.
// The rollout succeeds when every connected one serves the version, at least
// one does, and no more than Strategy.MaxFailed refused it; it fails with one
// refusal more or at the deadline, and otherwise names what it waits for.
// Devices that are away do not hold it up, yet one that refused counts. A
// rollout that has ended is given back as it is. Step changes neither r's
// devices nor the observations.
func (r Rollout) Step(now time.Time, observations []Observation) (Rollout, []Action) {
	if r.State != Running {
		return r, nil
	}
	var ready, away int
	var failed, waiting []string
	var actions []Action
	var devices []RolloutDevice
	for _, o := range observations {
		d := progress(o)
		devices = append(devices, d)
		switch {
		case d.Phase == DeviceReady:
			ready++
		case d.Phase == DeviceFailed:
			failed = append(failed, o.Device)
		case o.Connected:
			waiting = append(waiting, o.Device)
			actions = append(actions, Action{Kind: Ask, Device: o.Device})
		default:
			away++
		}
	}
	byName := func(a, b RolloutDevice) int { return cmp.Compare(a.Device, b.Device) }
	slices.SortFunc(devices, byName)
	slices.Sort(waiting)
	slices.Sort(failed)
	slices.SortFunc(actions, func(a, b Action) int { return cmp.Compare(a.Device, b.Device) })
	r.Devices = devices

	end := func(s State, reason string) (Rollout, []Action) {
		r.State, r.Reason, r.EndedAt = s, reason, now
		return r, []Action{{Kind: End}}
	}
	refused := func() string {
		return fmt.Sprintf("%s refused the version, allowed are %d: %s", count(len(failed)), r.Strategy.MaxFailed, reasons(devices))
	}
	deadline := r.StartedAt.Add(r.Strategy.Deadline)
	var cause string
	switch {
	case len(failed) > r.Strategy.MaxFailed:
		return end(Failed, refused())
	case len(waiting) > 0:
		cause = fmt.Sprintf("waits for %d of %s: %s", len(waiting), count(len(devices)), list(waiting))
	case ready > 0:
		return end(Succeeded, fmt.Sprintf("%s of %d ready%s", count(ready), len(devices), others(away, len(failed))))
	case len(devices) == 0:
		cause = "waits for a device: none matches the selector"
	case away > 0:
		cause = fmt.Sprintf("waits for a device: none of %s that match is connected", count(len(devices)))
	default:
		return end(Failed, "no device serves the version: "+refused())
	}
	if !now.Before(deadline) {
		return end(Failed, fmt.Sprintf("the deadline of %s passed: %s", r.Strategy.Deadline, cause))
	}
	r.Reason = cause
	return r, append(actions, Action{Kind: Wake, At: deadline})
}

func progress(o Observation) RolloutDevice {
	d := RolloutDevice{Device: o.Device, Phase: DevicePending}
	if o.Refused != "" {
		d.Phase, d.Reason = DeviceFailed, o.Refused
		return d
	}
	if o.Observed {
		d.BytesPresent, d.BytesTotal, d.Reason = o.BytesPresent, o.BytesTotal, o.Reason
		switch {
		case o.Quarantined:
			d.Phase = DeviceFailed
		case o.Serving:
			d.Phase, d.Reason = DeviceReady, ""
		default:
			d.Phase = DeviceWorking
		}
	}
	if !o.Connected && d.Phase != DeviceReady && d.Phase != DeviceFailed {
		d.Reason = "away"
	}
	return d
}

func count(n int) string {
	if n == 1 {
		return "1 device"
	}
	return fmt.Sprintf("%d devices", n)
}

func others(away, failed int) string {
	var s string
	if away > 0 {
		s += fmt.Sprintf(", %d away", away)
	}
	if failed > 0 {
		s += fmt.Sprintf(", %d refused it", failed)
	}
	return s
}

const (
	shown     = 3   // how many devices a reason names
	maxReason = 400 // how much it says of what a device said, in bytes
)

func list(names []string) string {
	if len(names) <= shown {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
}

func reasons(devices []RolloutDevice) string {
	var parts []string
	for _, d := range devices {
		if d.Phase == DeviceFailed {
			parts = append(parts, fmt.Sprintf("%s (%s)", d.Device, clipTo(d.Reason, maxReason)))
		}
	}
	return list(parts)
}
