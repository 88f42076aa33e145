package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// State is where a rollout stands. Only Running changes.
type State int

// The states of a rollout, with the numbers that the store keeps.
const (
	Running State = iota + 1
	Succeeded
	Failed
	Superseded
)

// String writes the state in lower case.
func (s State) String() string {
	return [...]string{Running: "running", Succeeded: "succeeded", Failed: "failed", Superseded: "superseded"}[s]
}

// Phase is how far a device is in a rollout.
type Phase int

// The phases of a device, with the numbers that the store keeps.
const (
	DevicePending Phase = iota + 1 // has not taken in the desired state
	DeviceWorking
	DeviceReady
	DeviceFailed
)

// Rollout is one change of a deployment. It has one wave: every device that
// the deployment counts for.
type Rollout struct {
	Number     int64 // in order of their start, over all deployments
	Deployment string
	Model      string
	From, To   int64 // From is 0 where the deployment is new
	Strategy   Strategy
	State      State
	Reason     string // what it waits for, or why it ended
	StartedAt  time.Time
	EndedAt    time.Time       // zero while it runs
	Devices    []RolloutDevice // by name
}

// ID names the rollout.
func (r Rollout) ID() string { return fmt.Sprintf("%s-%d", r.Deployment, r.Number) }

// Equal says whether r and o are the same in everything.
func (r Rollout) Equal(o Rollout) bool {
	same := slices.Equal(r.Devices, o.Devices) && r.StartedAt.Equal(o.StartedAt) && r.EndedAt.Equal(o.EndedAt)
	return same && r.Number == o.Number && r.Deployment == o.Deployment && r.Model == o.Model && r.From == o.From && r.To == o.To &&
		r.Strategy == o.Strategy && r.State == o.State && r.Reason == o.Reason
}

// RolloutDevice is one device's part of a rollout.
type RolloutDevice struct {
	Device       string
	Phase        Phase
	Reason       string
	BytesPresent uint64
	BytesTotal   uint64
}

// Observation is what is known of one device and the version of a rollout.
type Observation struct {
	Device    string
	Connected bool
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
	Wake ActionKind = iota + 1 // step again at At, though nothing was observed
	Ask                        // ask Device to report again
	End                        // the rollout ended in this step
)

// Action is what a step asks for.
type Action struct {
	Kind   ActionKind
	At     time.Time
	Device string
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
