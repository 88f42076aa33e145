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

	Since time.Time // from when deadlines count: the wave began, was resumed, or the rollback began; zero: not stepped yet
	Cause string    // why it was paused, halted or rolled back
	Anew  bool      // what is counted before the next step does not count for gates
	// Discount is what was counted of the new version before an operator
	// resumed or promoted, by class: gates are judged by what came after.
	Discount []ClassFigures
}

// Gives says which version a device should have by this rollout, as the newest
// of its deployment; version 0: none. A device that it does not know, as one
// that joins now, counts as one that is not admitted.
//
// It is the new version for those that are admitted, and, once the rollout has
// succeeded, for all; else it is the one before, which all have when it was
// rolled back. Where a rollout of one wave failed and there is no version
// before, the new one stays deployed.
func (r Rollout) Gives(device string) (model string, version int64) {
	switch r.State {
	case Succeeded:
		return r.Model, r.To
	case Failed:
		if len(r.Strategy.AllWaves()) == 1 {
			return r.Model, r.To
		}
	case RollingBack, RolledBack:
		return r.Back(), r.From
	}
	if d, ok := r.Device(device); ok && !d.AdmittedAt.IsZero() || r.same() {
		return r.Model, r.To
	}
	return r.Back(), r.From
}

// Device gives a device's part of the rollout.
func (r Rollout) Device(name string) (RolloutDevice, bool) {
	i, ok := slices.BinarySearchFunc(r.Devices, name, func(d RolloutDevice, name string) int { return cmp.Compare(d.Device, name) })
	if !ok {
		return RolloutDevice{}, false
	}
	return r.Devices[i], true
}

// Changes says whether the rollout is changing a device now, so that a later
// rollout leaves it alone: for Observation.Busy of that one. Nothing waits for
// ever: a rollout that an operator has to take on changes nothing, nor does
// one whose device is ready, has failed, is late or away for long.
func (r Rollout) Changes(device string, now time.Time) bool {
	d, ok := r.Device(device)
	switch {
	case !ok || d.AdmittedAt.IsZero() || d.BehindSince.IsZero():
		return false
	case r.State == Running:
		return d.Phase != DeviceReady && d.Phase != DeviceFailed && !r.late(d, now)
	case r.State == RollingBack:
		return d.Phase != DeviceRolledBack && d.Phase != DeviceFailed && !r.late(d, now)
	}
	return false
}

// late says whether a device has not been ready for longer than the deadline.
func (r Rollout) late(d RolloutDevice, now time.Time) bool {
	return !d.BehindSince.IsZero() && !now.Before(r.dueAt(d))
}

func (r Rollout) dueAt(d RolloutDevice) time.Time {
	from := d.BehindSince
	if r.Since.After(from) {
		from = r.Since
	}
	return from.Add(r.Strategy.Deadline)
}

// LastGood gives the version that a new rollout of a deployment comes from:
// that which all its devices have, or were to have again, when nothing is under
// way. That is the version of its newest rollout where that succeeded, and
// else the one before that: of a rollout that is given up midway, the new
// version is not proven, and its devices get the last good one until their
// wave comes. Where there is none before, and the rollout was giving its
// version to all devices, it is that one all the same: they have no other.
// history holds the deployment's rollouts since it was made, in any order; 0:
// there is none.
func LastGood(history []Rollout) (model string, version int64) {
	if len(history) == 0 {
		return "", 0
	}
	newest := slices.MaxFunc(history, func(a, b Rollout) int { return cmp.Compare(a.Number, b.Number) })
	if newest.State == Succeeded {
		return newest.Model, newest.To
	}
	switch {
	case newest.From > 0:
		return newest.Back(), newest.From
	case newest.State != RollingBack && newest.State != RolledBack && newest.Wave == len(newest.Strategy.AllWaves()):
		return newest.Model, newest.To
	}
	return "", 0
}

// WaveProgress is how far a wave is.
type WaveProgress struct {
	Wave                            Wave
	Devices, Ready, Failed, Excused int
	StartedAt                       time.Time // zero: it has not begun
}

// Progress gives how far each wave is.
func (r Rollout) Progress() []WaveProgress {
	var all []WaveProgress
	for _, w := range r.Strategy.AllWaves() {
		all = append(all, WaveProgress{Wave: w})
	}
	for _, d := range r.Devices {
		if d.Wave < 1 || d.Wave > len(all) {
			continue
		}
		w := &all[d.Wave-1]
		w.Devices++
		switch {
		case d.Phase == DeviceReady:
			w.Ready++
		case d.Phase == DeviceFailed:
			w.Failed++
		case d.Excused:
			w.Excused++
		}
		if !d.AdmittedAt.IsZero() && (w.StartedAt.IsZero() || d.AdmittedAt.Before(w.StartedAt)) {
			w.StartedAt = d.AdmittedAt
		}
	}
	return all
}

// SoaksUntil gives when the present wave may be over at the earliest; zero:
// not known.
func (r Rollout) SoaksUntil() time.Time {
	if r.State != Running || r.WaveReadyAt.IsZero() {
		return time.Time{}
	}
	return r.WaveReadyAt.Add(r.Strategy.Soak)
}

// ID names the rollout.
func (r Rollout) ID() string { return fmt.Sprintf("%s-%d", r.Deployment, r.Number) }

// Back gives the model of the version before.
func (r Rollout) Back() string { return cmp.Or(r.FromModel, r.Model) }

// same says whether the version before is the new one: only the devices
// changed, and there is nothing to compare or to go back to.
func (r Rollout) same() bool { return r.From == r.To && r.Back() == r.Model }

// before writes the version before for people.
func (r Rollout) before() string { return fmt.Sprintf("%s:%d", r.Back(), r.From) }

// Equal says whether r and o are the same in everything but the figures of
// their gates.
func (r Rollout) Equal(o Rollout) bool {
	gates := slices.EqualFunc(r.Gates, o.Gates, func(a, b GateResult) bool { return a.Gate == b.Gate && a.Class == b.Class && a.Verdict == b.Verdict })
	discount := slices.EqualFunc(r.Discount, o.Discount, func(a, b ClassFigures) bool {
		return a.Class == b.Class && a.New.Equal(b.New) && a.Old.Equal(b.Old)
	})
	if !gates || !discount || !r.Since.Equal(o.Since) || r.Cause != o.Cause || r.Anew != o.Anew {
		return false
	}
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
	BehindSince  time.Time // since when it could be ready and is not; zero: it is, or cannot be
	// Excused: it was away for so long that its wave does not wait for it, or
	// an operator said not to wait. It counts when it fails.
	Excused  bool
	Forgiven bool // it had failed when an operator went on: that does not count
	Joined   bool // after the first wave began: it is for the last one
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

// Supersede ends a rollout that has not ended because of a newer one, or of
// what reason says.
func (r Rollout) Supersede(now time.Time, reason string) Rollout {
	if !r.State.Ended() {
		r.State, r.Reason, r.EndedAt = Superseded, reason, now
	}
	return r
}

func count(n int) string {
	if n == 1 {
		return "1 device"
	}
	return fmt.Sprintf("%d devices", n)
}

func others(away, failed, late int) string {
	var s string
	if away > 0 {
		s += fmt.Sprintf(", %d away", away)
	}
	if failed > 0 {
		s += fmt.Sprintf(", %d refused it", failed)
	}
	if late > 0 {
		s += fmt.Sprintf(", %d not ready in time", late)
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
		if d.Phase == DeviceFailed && d.Wave > 0 && !d.Forgiven {
			parts = append(parts, fmt.Sprintf("%s (%s)", d.Device, clipTo(d.Reason, maxReason)))
		}
	}
	return list(parts)
}
