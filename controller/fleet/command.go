package fleet

import (
	"fmt"
	"slices"
	"time"
)

// MaxCommandReason bounds what an operator says about a command, in bytes.
const MaxCommandReason = 1000

// Command does what an operator asks. Its error says why that makes no sense
// now; then nothing has changed. The caller makes sure that the rollout is the
// newest of its deployment, and steps it soon.
//
//	pause    running                    no further device is given the version, nothing is judged
//	resume   paused, halted             goes on; after a halt its devices that failed, and what was
//	                                    counted before, do not count, and the wave soaks anew
//	promote  running, paused, halted    the wave has passed, whatever it waits for
//	abort    running, paused, halted    ends it; every device keeps what it has
//	rollback any but rolling back,      every device gets the version before, or loses this one where
//	         rolled back, superseded    there is none
func (r Rollout) Command(now time.Time, cmd Command, by, reason string) (Rollout, Decision, error) {
	now = now.UTC().Round(0)
	d := Decision{At: now, Wave: r.Wave, By: by, Reason: reason, Gates: r.Gates}
	cannot := func(format string, args ...any) (Rollout, Decision, error) {
		return r, Decision{}, fmt.Errorf("cannot %s rollout %s: %s", cmd, r.ID(), fmt.Sprintf(format, args...))
	}
	if len(reason) > MaxCommandReason {
		return cannot("the reason has %d bytes, the limit is %d", len(reason), MaxCommandReason)
	}
	in := func(states ...State) bool { return slices.Contains(states, r.State) }
	open := in(Running, Paused, Halted)
	said := by
	if reason != "" {
		said += ": " + reason
	}
	switch cmd {
	case CommandPause:
		if !in(Running) {
			return cannot("it is %s", r.State)
		}
		d.Kind = DecidePause
		r.State, r.Cause, r.Reason = Paused, said, "paused by "+said
	case CommandResume:
		if !in(Paused, Halted) {
			return cannot("it is %s", r.State)
		}
		d.Kind = DecideResume
		if r.State == Halted {
			r.WaveReadyAt = time.Time{}
			r = r.forgive(false)
		}
		r.State, r.Cause, r.Reason, r.Since = Running, "", "resumed by "+said, now
	case CommandPromote:
		if !open {
			return cannot("it is %s", r.State)
		}
		if r.Wave == 0 {
			return cannot("no wave has begun")
		}
		d.Kind = DecidePromote
		r = r.forgive(true)
		r.State, r.Cause, r.Reason, r.Since, r.Promoted = Running, "", "promoted by "+said, now, true
	case CommandAbort:
		if !open {
			return cannot("it is %s", r.State)
		}
		d.Kind = DecideAbort
		r.State, r.Cause, r.Reason, r.EndedAt = Aborted, said, "aborted by "+said, now
	case CommandRollBack:
		switch {
		case !open && !in(Succeeded, Failed, Aborted):
			return cannot("it is %s", r.State)
		case r.same():
			return cannot("%s is the version before", r.before())
		}
		d.Kind = DecideRollBack
		all := r.State == Succeeded || r.State == Failed && len(r.Strategy.AllWaves()) == 1
		if all { // every device was to have it, also those that had not been given it when the rollout ended
			r.Devices = slices.Clone(r.Devices)
			for i := range r.Devices {
				if r.Devices[i].AdmittedAt.IsZero() {
					r.Devices[i].AdmittedAt = now
				}
			}
		}
		r = r.turnBack(now, said)
	default:
		return r, Decision{}, fmt.Errorf("command %q is not known, known are pause, resume, promote, abort and rollback", clip(string(cmd)))
	}
	names := r.admitted()
	d.DeviceCount, d.Devices = len(names), names[:min(len(names), maxDecided)]
	return r, d, nil
}

// forgive makes what went wrong so far not count any more. With excuse, no wave
// waits for a device that was given the version and is not ready.
func (r Rollout) forgive(excuse bool) Rollout {
	r.Anew = true
	r.Devices = slices.Clone(r.Devices)
	for i := range r.Devices {
		d := &r.Devices[i]
		switch {
		case d.Phase == DeviceFailed && d.Wave > 0:
			d.Forgiven = true
		case excuse && d.Wave > 0 && d.Phase != DeviceReady:
			d.Excused = true
		}
	}
	return r
}
