package fleet

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strings"
	"time"
)

// This file is how a rollout goes on. In short:
//
// Devices are given the version in waves, each of which includes those before.
// A wave takes the devices that it is short of when it begins, and others for
// those that were excused or forgiven: connected ones first, then those on which a
// change may begin and that no other rollout changes, then by the hash of their names, so
// that the same rollout chooses the same devices and neighbours by name are not
// chosen together. A device that has been away for AwayAfter is chosen by the
// last wave only, which has every device, and those that joined since the
// first wave began.
//
// A device is given the version once it is connected, open and not busy. A wave
// is ready when each of its devices serves the version, has failed, or is
// excused, and at least one serves it; then it soaks, and it has passed when
// its gates have. Gates are judged all the time: one that fails ends the wave
// at once (gates.go).
//
// What goes wrong beyond MaxFailed, and a gate that fails, leads to OnFailure.
// A gate that has no sample by the deadline halts: no figure speaks against
// the version. Devices that cannot be given the version have no deadline, and
// neither has a rollout without any connected device where there is a version
// that they have; both name what they wait for.

// The bounds of what a rollout asks for.
const (
	MaxWatched  = 500 // devices with the new version of which figures are asked for
	MaxCompared = 200 // devices with the old one
	maxDecided  = 100 // devices that a decision names
)

// step is one step of a rollout on its way.
type step struct {
	r       Rollout
	now     time.Time
	waves   []Wave
	seen    map[string]*Observation
	wake    time.Time // zero: none
	actions []Action
	base    string // what of the old version's figures a device waits for before it is given the new one
	// Figures by class, as far as they are known; made when they are needed.
	figures map[string]ClassFigures
}

// Step takes in what is known of all devices that the deployment counts for,
// and takes the rollout on as far as it goes now. One that has ended is given
// back as it is, and so is one that waits for an operator but for how far its
// devices are. What is not in r and the observations plays no part. Step
// changes neither r's devices nor the observations.
func (r Rollout) Step(now time.Time, observations []Observation) (Rollout, []Action) {
	if r.State.Ended() {
		return r, nil
	}
	s := &step{r: r, now: now.UTC().Round(0), waves: r.Strategy.AllWaves()}
	s.look(observations)
	if s.r.Since.IsZero() {
		s.r.Since = s.now
		s.decide(DecideStart, "controller", fmt.Sprintf("from %s to %s:%d", orNothing(s.r), r.Model, r.To), nil)
	}
	switch r.State {
	case Running:
		s.run()
	case RollingBack:
		s.goBack()
	}
	if !s.wake.IsZero() && !s.r.State.Ended() {
		s.actions = append(s.actions, Action{Kind: Wake, At: s.wake})
	}
	return s.r, s.actions
}

func orNothing(r Rollout) string {
	if r.From == 0 {
		return "nothing"
	}
	return r.before()
}

// look takes in what was observed of each device.
func (s *step) look(observations []Observation) {
	s.seen = make(map[string]*Observation, len(observations))
	devices := make([]RolloutDevice, 0, len(observations))
	for i := range observations {
		o := &observations[i]
		s.seen[o.Device] = o
		d, known := s.r.Device(o.Device)
		if !known {
			d = RolloutDevice{Device: o.Device, Joined: s.r.Wave > 0}
			if s.r.State == RollingBack && o.Observed && o.Serving {
				d.AdmittedAt = s.now // it joined after the rollout had succeeded
			}
		}
		d.Class = cmp.Or(o.Class, d.Class)
		if s.r.State == RollingBack {
			s.lookBack(&d, o)
		} else {
			s.lookAt(&d, o)
		}
		devices = append(devices, d)
	}
	slices.SortFunc(devices, func(a, b RolloutDevice) int { return cmp.Compare(a.Device, b.Device) })
	s.r.Devices = devices
}

// lookAt says how far a device is on its way to the new version.
func (s *step) lookAt(d *RolloutDevice, o *Observation) {
	away := !o.Connected
	d.Reason, d.BytesPresent, d.BytesTotal = "", 0, 0
	if d.AdmittedAt.IsZero() {
		d.Phase = DeviceWaiting
	} else {
		s.progress(d, o)
	}
	if d.Phase == DeviceReady || d.Phase == DeviceFailed {
		return
	}
	if away {
		d.Reason = "away"
	}
	if away && d.Wave > 0 && !d.Excused {
		d.Excused = s.awayFor(o)
	}
	if away && d.Excused { // when it is back, it has its time again
		d.BehindSince = time.Time{}
	}
}

func (s *step) progress(d *RolloutDevice, o *Observation) {
	d.Phase = DevicePending
	switch {
	case o.Refused != "":
		d.Phase, d.Reason = DeviceFailed, o.Refused
	case o.Observed:
		d.BytesPresent, d.BytesTotal = o.BytesPresent, o.BytesTotal
		switch {
		case o.Quarantined:
			d.Phase, d.Reason = DeviceFailed, o.Reason
		case o.Serving:
			d.Phase = DeviceReady
		default:
			d.Phase, d.Reason = DeviceWorking, o.Reason
		}
	}
	switch d.Phase {
	case DeviceReady:
		if d.ReadyAt.IsZero() {
			d.ReadyAt = s.now
		}
		d.BehindSince, d.Excused, d.Forgiven = time.Time{}, false, false
	case DeviceFailed:
		d.ReadyAt, d.BehindSince = time.Time{}, time.Time{}
	default:
		d.ReadyAt = time.Time{}
		if d.BehindSince.IsZero() && (o.Connected || !d.Excused) {
			d.BehindSince = s.now
		}
	}
}

// awayFor says whether a device that is away has been so for long; if not, it
// is looked at again then.
func (s *step) awayFor(o *Observation) bool {
	until := o.HeardAt.Add(s.r.Strategy.AwayAfter)
	if s.now.Before(until) {
		s.wakeAt(until)
		return false
	}
	return true
}

func (s *step) wakeAt(t time.Time) {
	if s.wake.IsZero() || t.Before(s.wake) {
		s.wake = t.UTC().Round(0)
	}
}

func (s *step) decide(kind DecisionKind, by, reason string, devices []string) {
	d := Decision{At: s.now, Kind: kind, Wave: s.r.Wave, By: by, Reason: reason, DeviceCount: len(devices), Devices: devices}
	d.Devices = devices[:min(len(devices), maxDecided):min(len(devices), maxDecided)]
	if kind != DecideStart && kind != DecideAdmit {
		d.Gates = s.r.Gates
	}
	s.actions = append(s.actions, Action{Kind: Decide, Decision: d})
}

// run takes a running rollout on: through as many waves as it can.
func (s *step) run() {
	s.watch()
	if s.r.Anew {
		s.r.Anew, s.r.Discount = false, nil
		if len(s.r.Strategy.Gates) > 0 && !s.r.same() {
			for _, c := range s.counted() {
				s.r.Discount = append(s.r.Discount, ClassFigures{Class: c.Class, New: c.New})
			}
		}
	}
	for s.r.State == Running {
		if s.r.Wave == 0 {
			if len(s.r.Devices) == 0 {
				s.nobody("waits for a device: none matches the selector")
				return
			}
			s.begin(1)
		}
		if s.r.Promoted {
			s.pass("an operator said not to wait")
			continue
		}
		s.choose()
		s.admit()
		if !s.settle() {
			break
		}
	}
	for _, d := range s.r.Devices {
		if s.r.State == Running && d.behind() && s.seen[d.Device].Connected {
			s.actions = append(s.actions, Action{Kind: Ask, Device: d.Device})
		}
	}
}

// behind says whether a device was given the version and neither serves it nor
// has failed.
func (d RolloutDevice) behind() bool {
	return !d.AdmittedAt.IsZero() && d.Phase != DeviceReady && d.Phase != DeviceFailed
}

func (s *step) begin(wave int) {
	s.r.Wave, s.r.WaveStartedAt, s.r.Since, s.r.WaveReadyAt, s.r.Promoted = wave, s.now, s.now, time.Time{}, false
}

func (s *step) last() bool { return s.r.Wave == len(s.waves) }

// choose takes into the wave the devices that it is short of.
func (s *step) choose() {
	if s.last() {
		for i := range s.r.Devices {
			if d := &s.r.Devices[i]; d.Wave == 0 {
				d.Wave = s.r.Wave
				d.Excused = !s.seen[d.Device].Connected && s.awayFor(s.seen[d.Device])
			}
		}
		return
	}
	// Where none is left of those from the beginning, those that joined are all
	// there is.
	if !slices.ContainsFunc(s.r.Devices, func(d RolloutDevice) bool {
		o := s.seen[d.Device]
		return !d.Joined && (o.Connected || d.Wave > 0 && !d.Excused || d.Wave == 0 && !s.awayFor(o))
	}) {
		for i := range s.r.Devices {
			s.r.Devices[i].Joined = false
		}
	}
	in, all, inClass := 0, 0, map[string]int{} // that are neither excused nor forgiven
	type candidate struct {
		*RolloutDevice
		bad  int // what speaks against it
		hash uint64
	}
	var candidates []candidate
	for i := range s.r.Devices {
		d := &s.r.Devices[i]
		o := s.seen[d.Device]
		switch {
		case d.Wave > 0:
			all++
			if !d.Excused && !d.Forgiven {
				in++
				inClass[d.Class]++
			}
		case !d.Joined:
			all++
			if !o.Connected && s.awayFor(o) {
				continue
			}
			c := candidate{RolloutDevice: d, hash: hash(d.Device)}
			for i, good := range []bool{o.Busy == "", o.Closed == "", o.Refused == "", o.Connected} {
				if !good {
					c.bad += 1 << i
				}
			}
			candidates = append(candidates, c)
		}
	}
	slices.SortFunc(candidates, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.bad, b.bad), cmp.Compare(a.hash, b.hash), cmp.Compare(a.Device, b.Device))
	})
	w := s.waves[s.r.Wave-1]
	size := w.Count
	if w.Percent > 0 {
		size = int(math.Ceil(w.Percent / 100 * float64(all)))
	}
	for _, c := range candidates {
		d := c.RolloutDevice
		if w.Canary > 0 && inClass[d.Class] >= w.Canary || w.Canary == 0 && in >= size {
			continue
		}
		d.Wave = s.r.Wave
		in++
		inClass[d.Class]++
	}
}

func hash(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return h.Sum64()
}

// admit gives the version to the wave's devices that can be given it.
func (s *step) admit() {
	var names []string
	s.base = ""
	for i := range s.r.Devices {
		d := &s.r.Devices[i]
		if d.Wave == 0 || !d.AdmittedAt.IsZero() {
			continue
		}
		o := s.seen[d.Device]
		switch {
		case !o.Connected && !s.r.same():
		case o.Closed != "":
			d.Reason = o.Closed
			if o.Opens.After(s.now) {
				s.wakeAt(o.Opens)
			}
		case o.Busy != "":
			d.Reason = "rollout " + o.Busy + " changes it"
		default:
			if d.Reason = s.lacksBase(d.Class); d.Reason != "" {
				s.base = cmp.Or(s.base, d.Reason)
				continue
			}
			// What it reports follows from the document that it had: that it refused
			// the version then says nothing of now.
			d.AdmittedAt = s.now
			reported := *o
			reported.Quarantined = false
			s.progress(d, &reported)
			names = append(names, d.Device)
		}
	}
	if len(names) > 0 {
		s.decide(DecideAdmit, "controller", s.of(fmt.Sprintf("%s given %s:%d", areGiven(len(names)), s.r.Model, s.r.To)), names)
	}
}

func areGiven(n int) string {
	if n == 1 {
		return "1 device is"
	}
	return fmt.Sprintf("%d devices are", n)
}

// of says of which wave something is said, where there are several.
func (s *step) of(text string) string {
	if len(s.waves) == 1 || s.r.Wave == 0 {
		return text
	}
	return fmt.Sprintf("wave %d of %d (%s): %s", s.r.Wave, len(s.waves), s.waves[s.r.Wave-1], text)
}

// settle judges the wave, and says whether it was over.
func (s *step) settle() bool {
	var ready, away, inWave int
	var failed, late, waiting []string
	for _, d := range s.r.Devices {
		if d.Wave > 0 && d.Phase == DeviceReady {
			ready++
		}
	}
	for _, d := range s.r.Devices {
		if d.Wave == 0 {
			continue
		}
		inWave++
		o := s.seen[d.Device]
		switch {
		case d.Phase == DeviceReady || d.Forgiven:
		case d.Phase == DeviceFailed:
			failed = append(failed, d.Device)
		case d.Excused && !(ready == 0 && o.Connected): // one that is back may be all there is
			away++
		case d.behind() && o.Connected && s.r.late(d, s.now):
			late = append(late, d.Device)
		case s.last() && !s.r.WaveReadyAt.IsZero() && (d.AdmittedAt.IsZero() || d.AdmittedAt.After(s.r.WaveReadyAt)):
			// It came when the last wave was ready, and does not hold it up.
		default:
			if d.behind() && o.Connected {
				s.wakeAt(s.r.dueAt(d))
			}
			if d.AdmittedAt.IsZero() && o.Connected && d.Reason != "" {
				waiting = append(waiting, fmt.Sprintf("%s (%s)", d.Device, d.Reason))
			} else {
				waiting = append(waiting, d.Device)
			}
		}
	}
	refused := func() string {
		return fmt.Sprintf("%s refused the version, allowed are %d: %s", count(len(failed)), s.r.Strategy.MaxFailed, reasons(s.r.Devices))
	}
	held := s.judge(ready > 0)
	if bad := failedGates(s.r.Gates); bad != "" {
		s.fail("gate", bad)
		return true
	}
	if len(failed)+len(late) > s.r.Strategy.MaxFailed {
		switch {
		case len(late) == 0:
			s.fail("controller", refused())
		case len(failed) == 0:
			s.fail("controller", s.overdue(fmt.Sprintf("waits for %d of %s: %s", len(late), count(inWave), list(late))))
		default:
			s.fail("controller", s.overdue(fmt.Sprintf("waits for %s; %s", list(late), refused())))
		}
		return true
	}
	if base := s.r.Since.Add(s.r.Strategy.Deadline); s.base != "" {
		if !s.now.Before(base) {
			s.halt("gate", s.overdue("waits for a sample: "+s.base))
			return true
		}
		s.wakeAt(base)
	}
	switch {
	case len(waiting) > 0:
		s.r.WaveReadyAt = time.Time{}
		s.wait(fmt.Sprintf("waits for %d of %s: %s", len(waiting), count(inWave), list(waiting)))
		return false
	case inWave == 0, ready == 0 && away > 0:
		s.r.WaveReadyAt = time.Time{}
		s.nobody(fmt.Sprintf("waits for a device: none of %s that match is connected", count(len(s.r.Devices))))
		return s.r.State != Running
	case ready == 0:
		cause := "no device serves the version"
		if len(failed) > 0 {
			cause += ": " + refused()
		}
		s.fail("controller", cause)
		return true
	}
	if s.r.WaveReadyAt.IsZero() {
		s.r.WaveReadyAt = s.now
	}
	soaks := s.r.WaveReadyAt.Add(s.r.Strategy.Soak)
	due := soaks.Add(s.r.Strategy.Deadline)
	switch {
	case held != "" && !s.now.Before(due):
		s.halt("gate", s.overdue("waits for a sample: "+held))
		return true
	case s.now.Before(soaks):
		s.wakeAt(soaks)
		s.wait(fmt.Sprintf("soaks until %s", soaks.Format(time.RFC3339)))
		return false
	case held != "":
		s.wakeAt(due)
		s.wait("waits for a sample: " + held)
		return false
	}
	s.pass(fmt.Sprintf("%s of %d ready%s", count(ready), inWave, others(away, len(failed), len(late))))
	return true
}

func (s *step) overdue(cause string) string {
	return fmt.Sprintf("the deadline of %s passed: %s", s.r.Strategy.Deadline, cause)
}

func (s *step) wait(cause string) { s.r.Reason = s.of(cause) }

// nobody waits for a device that is there. Where no device can lose anything by
// it, a rollout of one wave does so until the deadline only.
func (s *step) nobody(cause string) {
	due := s.r.Since.Add(s.r.Strategy.Deadline)
	switch {
	case len(s.waves) > 1 || s.r.From > 0:
		s.wait(cause)
	case !s.now.Before(due):
		s.fail("controller", s.overdue(cause))
	default:
		s.wakeAt(due)
		s.wait(cause)
	}
}

// pass ends the wave well, and begins the next one.
func (s *step) pass(reason string) {
	by := "controller"
	if len(s.r.Gates) > 0 {
		by = "gate"
	}
	if s.last() {
		s.r.Promoted = false
		s.decide(DecideSucceed, by, reason, nil)
		s.end(Succeeded, reason)
		return
	}
	s.decide(DecidePass, by, s.of(reason), nil)
	s.begin(s.r.Wave + 1)
}

func (s *step) end(state State, reason string) {
	s.r.State, s.r.Reason, s.r.EndedAt = state, reason, s.now
	s.actions = append(s.actions, Action{Kind: End})
}

// fail does what Strategy.OnFailure says.
func (s *step) fail(by, cause string) {
	switch {
	case s.r.Strategy.OnFailure == Halt:
		s.halt(by, cause)
	case s.r.From == 0 || s.r.same():
		s.decide(DecideFail, by, s.of(cause), nil)
		s.end(Failed, s.of(cause))
	default:
		s.decide(DecideRollBack, by, s.of(cause), s.r.admitted())
		s.r = s.r.turnBack(s.now, s.of(cause))
		s.wakeAt(s.now)
	}
}

func (s *step) halt(by, cause string) {
	cause = s.of(cause)
	s.decide(DecideHalt, by, cause, nil)
	s.r.State, s.r.Cause, s.r.Reason = Halted, cause, "halted: "+cause
}

// admitted gives the devices that were given the version, by name.
func (r Rollout) admitted() (names []string) {
	for _, d := range r.Devices {
		if !d.AdmittedAt.IsZero() {
			names = append(names, d.Device)
		}
	}
	return names
}

// turnBack makes the rollout go back to the version before.
func (r Rollout) turnBack(now time.Time, cause string) Rollout {
	r.State, r.Cause, r.Since, r.EndedAt, r.Promoted, r.WaveReadyAt = RollingBack, cause, now, time.Time{}, false, time.Time{}
	r.Reason = "rolling back: " + cause
	r.Devices = slices.Clone(r.Devices)
	for i := range r.Devices {
		d := &r.Devices[i]
		d.Excused, d.Forgiven, d.ReadyAt, d.BehindSince = false, false, time.Time{}, now
		if d.AdmittedAt.IsZero() {
			d.BehindSince = time.Time{}
		}
	}
	return r
}

// lookBack says how far a device is on its way back.
func (s *step) lookBack(d *RolloutDevice, o *Observation) {
	d.BytesPresent, d.BytesTotal, d.Reason = 0, 0, ""
	switch {
	case d.AdmittedAt.IsZero():
		d.Phase, d.Reason = DeviceWaiting, "was not given the version"
		return
	case o.RolledBack:
		d.Phase, d.BehindSince, d.Excused = DeviceRolledBack, time.Time{}, false
		return
	}
	d.Phase = DevicePending
	if d.BehindSince.IsZero() {
		d.BehindSince = s.now
	}
	if o.Observed {
		d.Phase, d.Reason = DeviceWorking, o.Reason
	}
	switch {
	case !o.Connected:
		d.Reason = "away"
		if !d.Excused {
			d.Excused = s.awayFor(o)
		}
	case s.r.late(*d, s.now):
		d.Phase, d.Excused = DeviceFailed, false
		d.Reason = cmp.Or(d.Reason, fmt.Sprintf("does not have the version before after %s", s.r.Strategy.Deadline))
	default:
		d.Excused = false
		s.wakeAt(s.r.dueAt(*d))
	}
}

// goBack takes a rollback on. It has ended when each device that was given the
// version, and is not away for long, has the one before. A freeze does not
// hold it.
func (s *step) goBack() {
	var back, away int
	var waiting []string
	for _, d := range s.r.Devices {
		switch {
		case d.AdmittedAt.IsZero():
		case d.Phase == DeviceRolledBack:
			back++
		case d.Excused:
			away++
		case d.Phase == DeviceFailed:
			waiting = append(waiting, fmt.Sprintf("%s (%s)", d.Device, clipTo(d.Reason, maxReason)))
		default:
			waiting = append(waiting, d.Device)
		}
		if o := s.seen[d.Device]; o.Connected && !d.AdmittedAt.IsZero() && d.Phase != DeviceRolledBack {
			s.actions = append(s.actions, Action{Kind: Ask, Device: d.Device})
		}
	}
	if len(waiting) > 0 {
		s.r.Reason = fmt.Sprintf("rolling back: waits for %d of %s: %s; because %s", len(waiting), count(back+away+len(waiting)), list(waiting), s.r.Cause)
		return
	}
	to := "no version"
	if s.r.From > 0 {
		to = s.r.before()
	}
	s.end(RolledBack, fmt.Sprintf("%s of %d back to %s%s, because %s", count(back), back+away, to, others(away, 0, 0), s.r.Cause))
}

// watch asks for the figures of devices that are needed: of those with the new
// version, and of others of their classes.
func (s *step) watch() {
	if len(s.r.Strategy.Gates) == 0 || s.r.same() {
		return
	}
	given, others := map[string][]string{}, map[string][]string{}
	for _, d := range s.r.Devices {
		switch o := s.seen[d.Device]; {
		case !o.Connected:
		case !d.AdmittedAt.IsZero() && d.Phase != DeviceFailed:
			given[d.Class] = append(given[d.Class], d.Device)
		case d.AdmittedAt.IsZero() && s.r.From > 0:
			others[d.Class] = append(others[d.Class], d.Device)
		}
	}
	for _, name := range slices.Concat(byTurns(given, MaxWatched), byTurns(others, MaxCompared)) {
		s.actions = append(s.actions, Action{Kind: Watch, Device: name})
	}
}

// byTurns takes at most n names of classes, from each as many as from others as
// far as it goes, by the hash of their names.
func byTurns(classes map[string][]string, n int) []string {
	var names []string
	order := make([]string, 0, len(classes))
	hashes := map[string]uint64{}
	for class, all := range classes {
		for _, name := range all {
			hashes[name] = hash(name)
		}
		slices.SortFunc(all, func(a, b string) int { return cmp.Or(cmp.Compare(hashes[a], hashes[b]), strings.Compare(a, b)) })
		order = append(order, class)
	}
	slices.Sort(order)
	for i := 0; len(names) < n; i++ {
		more := false
		for _, class := range order {
			if all := classes[class]; i < len(all) && len(names) < n {
				names, more = append(names, all[i]), true
			}
		}
		if !more {
			break
		}
	}
	return names
}
