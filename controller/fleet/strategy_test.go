package fleet

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// script steps a rollout with what its devices are like at times after begin.
type script struct {
	t    *testing.T
	r    Rollout
	now  time.Time
	seen map[string]*Observation
	log  []Decision
	wake time.Time
	asks []string
}

func newScript(t *testing.T, s Strategy, from int64, devices ...string) *script {
	if s.Deadline == 0 {
		s.Deadline = 10 * time.Minute
	}
	sc := &script{t: t, now: begin, seen: map[string]*Observation{}, r: Rollout{Number: 1, Deployment: "dep", Model: "m", From: from, To: 2, State: Running, StartedAt: begin, Strategy: s}}
	for _, d := range devices {
		sc.join(d)
	}
	return sc
}

// join adds a device "NAME.CLASS".
func (s *script) join(name string) {
	_, class, _ := strings.Cut(name, ".")
	s.seen[name] = &Observation{Device: name, Class: class, Connected: true}
}

func (s *script) step(after time.Duration) {
	s.t.Helper()
	s.now = begin.Add(after)
	var all []Observation
	for _, o := range s.seen {
		if o.Connected {
			o.HeardAt = s.now
		}
		all = append(all, *o)
	}
	r, actions := s.r.Step(s.now, all)
	s.r, s.wake, s.asks = r, time.Time{}, nil
	for _, a := range actions {
		switch a.Kind {
		case Decide:
			s.log = append(s.log, a.Decision)
		case Wake:
			s.wake = a.At
		case Ask:
			s.asks = append(s.asks, a.Device)
		}
	}
}

// serve makes all devices that were given the version serve it.
func (s *script) serve() {
	for _, d := range s.r.Devices {
		if o := s.seen[d.Device]; o != nil && !d.AdmittedAt.IsZero() && o.Connected {
			o.Observed, o.Serving = true, true
		}
	}
}

func (s *script) admitted() []string { return s.r.admitted() }

func (s *script) want(state State, reason string) {
	s.t.Helper()
	if s.r.State != state || s.r.Reason != reason {
		s.t.Fatalf("%s: %q, want %s: %q", s.r.State, s.r.Reason, state, reason)
	}
}

func (s *script) command(c Command) {
	s.t.Helper()
	r, d, err := s.r.Command(s.now, c, "user:ann", "why not")
	if err != nil {
		s.t.Fatal(err)
	}
	s.r, s.log = r, append(s.log, d)
}

func (s *script) kinds() (all []DecisionKind) {
	for _, d := range s.log {
		all = append(all, d.Kind)
	}
	return all
}

func TestWaves(t *testing.T) {
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("d%02d.%s", i, []string{"small", "small", "small", "large"}[i%4]))
	}
	s := newScript(t, Strategy{Waves: []Wave{{Canary: 1}, {Count: 3}, {Percent: 40}}, Soak: time.Minute}, 1, names...)
	s.step(0)
	canaries := s.admitted()
	if len(canaries) != 2 || canaries[0][4:] == canaries[1][4:] {
		t.Fatalf("canaries %v", canaries)
	}
	s.want(Running, fmt.Sprintf("wave 1 of 4 (1 canary per class): waits for 2 of 2 devices: %s, %s", canaries[0], canaries[1]))
	if !slices.Equal(s.asks, canaries) {
		t.Errorf("asks %v", s.asks)
	}
	for i, size := range []int{2, 3, 8, 20} {
		at := time.Duration(i) * 2 * time.Minute
		if got := s.admitted(); len(got) != size {
			t.Fatalf("wave %d: %v", i+1, got)
		}
		for _, d := range s.admitted() {
			if i == 0 && !slices.Contains(canaries, d) {
				t.Errorf("%s is no canary", d)
			}
		}
		s.serve()
		s.step(at + time.Second)
		if s.r.State != Running || !strings.Contains(s.r.Reason, "soaks until") || !s.wake.Equal(s.now.Add(time.Minute)) {
			t.Fatalf("%s: %q, wakes at %s", s.r.State, s.r.Reason, s.wake)
		}
		s.step(at + time.Minute)
		if len(s.admitted()) != size {
			t.Fatal("it soaked too short")
		}
		s.step(at + time.Minute + time.Second)
	}
	s.want(Succeeded, "20 devices of 20 ready")
	if got, want := s.kinds(), []DecisionKind{DecideStart, DecideAdmit, DecidePass, DecideAdmit, DecidePass, DecideAdmit, DecidePass, DecideAdmit, DecideSucceed}; !slices.Equal(got, want) {
		t.Errorf("decided %v", got)
	}
	if got := s.log[2]; got.Wave != 1 || got.By != "controller" || got.Reason != "wave 1 of 4 (1 canary per class): 2 devices of 2 ready" {
		t.Errorf("%+v", got)
	}
	for i, p := range s.r.Progress() {
		if want := []int{2, 1, 5, 12}[i]; p.Devices != want || p.Ready != want || p.StartedAt.IsZero() {
			t.Errorf("wave %d: %+v", i+1, p)
		}
	}
	again := newScript(t, s.r.Strategy, 1, names...)
	again.step(0)
	if !slices.Equal(again.admitted(), canaries) {
		t.Errorf("other canaries: %v and %v", canaries, again.admitted())
	}
}

// Of those that could be chosen, one that is there, fits, is open and free is.
func TestCanaryPreference(t *testing.T) {
	for name, spoil := range map[string]func(*Observation){
		"away":   func(o *Observation) { o.Connected, o.HeardAt = false, begin },
		"unfit":  func(o *Observation) { o.Refused = "does not fit" },
		"closed": func(o *Observation) { o.Closed = "freeze x: y" },
		"busy":   func(o *Observation) { o.Busy = "other-1" },
	} {
		s := newScript(t, Strategy{Waves: []Wave{{Canary: 1}}, AwayAfter: time.Minute}, 1, "a", "b", "c", "d")
		for d, o := range s.seen {
			if d != "c" {
				spoil(o)
			}
		}
		if s.step(0); !slices.Equal(s.admitted(), []string{"c"}) {
			t.Errorf("%s: %v", name, s.admitted())
		}
	}
}

func TestLateJoiner(t *testing.T) {
	s := newScript(t, Strategy{Waves: []Wave{{Canary: 1}, {Percent: 50}}}, 1, "a.x", "b.x")
	s.step(0)
	s.join("c.y") // also of a class without canary
	s.step(time.Second)
	if d, _ := s.r.Device("c.y"); len(s.admitted()) != 1 || d.Wave != 0 {
		t.Fatalf("%+v", s.r.Devices)
	}
	if model, version := s.r.Gives("c.y"); model != "m" || version != 1 {
		t.Errorf("is given %s:%d", model, version)
	}
	for i := range 3 {
		s.serve()
		s.step(time.Duration(2+i) * time.Second)
	}
	s.want(Succeeded, "3 devices of 3 ready")
	if model, version := s.r.Gives("later"); model != "m" || version != 2 {
		t.Errorf("one that joins afterwards is given %s:%d", model, version)
	}
}

// One that comes when the last wave is ready is given the version and does not
// hold it up.
func TestJoinerInTheLastWave(t *testing.T) {
	s := newScript(t, Strategy{Soak: time.Minute}, 0, "a")
	s.step(0)
	s.serve()
	s.step(time.Second)
	s.join("b")
	s.step(30 * time.Second)
	if !slices.Equal(s.admitted(), []string{"a", "b"}) {
		t.Fatalf("%v", s.admitted())
	}
	s.step(61 * time.Second)
	s.want(Succeeded, "1 device of 2 ready")
}

func TestAway(t *testing.T) {
	s := newScript(t, Strategy{Waves: []Wave{{Count: 1}}, AwayAfter: 3 * time.Minute}, 1, "a", "b")
	s.step(0)
	first := s.admitted()[0]
	other := map[string]string{"a": "b", "b": "a"}[first]
	s.seen[first].Connected = false
	s.step(time.Minute)
	s.want(Running, "wave 1 of 2 (1 device): waits for 1 of 1 device: "+first)
	if !s.wake.Equal(begin.Add(3 * time.Minute)) {
		t.Errorf("wakes at %s", s.wake)
	}
	s.step(3 * time.Minute) // another one takes its place
	if !slices.Equal(s.admitted(), []string{"a", "b"}) {
		t.Fatalf("%v", s.admitted())
	}
	s.serve()
	s.step(4 * time.Minute)
	s.want(Succeeded, "1 device of 2 ready, 1 away")
	if d, _ := s.r.Device(first); !d.Excused || s.r.Changes(first, s.now) {
		t.Errorf("%+v", d)
	}

	// It is back in time, and refuses.
	s = newScript(t, Strategy{Waves: []Wave{{Count: 1}}, AwayAfter: 3 * time.Minute, Soak: time.Hour}, 1, "a", "b")
	s.step(0)
	s.seen[first].Connected = false
	s.step(3 * time.Minute)
	s.serve()
	s.step(4 * time.Minute)
	*s.seen[first] = Observation{Device: first, Connected: true, Observed: true, Quarantined: true, Reason: "opset 99"}
	s.step(5 * time.Minute)
	if s.r.State != RollingBack || s.r.Cause != fmt.Sprintf("wave 1 of 2 (1 device): 1 device refused the version, allowed are 0: %s (opset 99)", first) {
		t.Errorf("%s: %q", s.r.State, s.r.Cause)
	}
	s.seen[other].RolledBack = true
	s.seen[first].RolledBack = true
	s.step(6 * time.Minute)
	if s.r.State != RolledBack {
		t.Errorf("%s: %q", s.r.State, s.r.Reason)
	}
}

func TestDeadline(t *testing.T) {
	for onFailure, state := range map[OnFailure]State{RollBack: RollingBack, Halt: Halted} {
		s := newScript(t, Strategy{MaxFailed: 1, OnFailure: onFailure}, 1, "a", "b", "c")
		s.step(0)
		s.seen["a"].Observed, s.seen["a"].Serving = true, true
		s.step(9 * time.Minute)
		s.want(Running, "waits for 2 of 3 devices: b, c")
		if !s.wake.Equal(begin.Add(10*time.Minute)) || !s.r.Changes("b", s.now) || s.r.Changes("a", s.now) {
			t.Errorf("wakes at %s", s.wake)
		}
		s.seen["c"].Observed, s.seen["c"].Serving = true, true
		late := *s
		late.step(10 * time.Minute)
		late.want(Succeeded, "2 devices of 3 ready, 1 not ready in time")
		s.seen["c"].Serving = false
		s.step(10 * time.Minute)
		if s.r.State != state || s.r.Cause != "the deadline of 10m0s passed: waits for 2 of 3 devices: b, c" {
			t.Errorf("%s: %q", s.r.State, s.r.Cause)
		}
		if state == Halted && s.r.Changes("b", s.now) {
			t.Error("a halted rollout keeps others off its devices")
		}
	}
}

// Devices that may not change have no deadline, and are named.
func TestClosedAndBusy(t *testing.T) {
	s := newScript(t, Strategy{}, 1, "a", "b", "c")
	opens := begin.Add(5 * time.Hour)
	s.seen["b"].Closed, s.seen["b"].Opens = "maintenance night opens at Thu 05:00 UTC", opens
	s.seen["c"].Busy = "older-7"
	s.step(0)
	s.serve()
	s.step(time.Hour)
	s.want(Running, "waits for 2 of 3 devices: b (maintenance night opens at Thu 05:00 UTC), c (rollout older-7 changes it)")
	if !s.wake.Equal(opens) || !slices.Equal(s.admitted(), []string{"a"}) {
		t.Errorf("wakes at %s, %v", s.wake, s.admitted())
	}
	s.seen["b"].Closed, s.seen["c"].Busy = "", ""
	s.step(5 * time.Hour)
	s.serve()
	s.step(5*time.Hour + time.Second)
	s.want(Succeeded, "3 devices of 3 ready")
}

func TestCommands(t *testing.T) {
	fresh := func() *script {
		s := newScript(t, Strategy{Waves: []Wave{{Count: 1}}, OnFailure: Halt, Soak: time.Hour}, 1, "a", "b")
		s.step(0)
		return s
	}
	s := fresh()
	s.command(CommandPause)
	s.want(Paused, "paused by user:ann: why not")
	s.serve()
	s.step(2 * time.Hour)
	s.want(Paused, "paused by user:ann: why not")
	if s.r.Devices[slices.IndexFunc(s.r.Devices, func(d RolloutDevice) bool { return d.Wave == 1 })].Phase != DeviceReady {
		t.Error("what devices do is not seen while it is paused")
	}
	s.command(CommandResume)
	s.step(2 * time.Hour)
	if s.r.State != Running || !strings.Contains(s.r.Reason, "soaks until") {
		t.Errorf("%q", s.r.Reason)
	}
	s.command(CommandPromote)
	s.step(2 * time.Hour)
	s.want(Running, "wave 2 of 2 (all): waits for 1 of 2 devices: "+map[bool]string{true: "b", false: "a"}[s.log[1].Devices[0] == "a"])
	s.command(CommandAbort)
	s.want(Aborted, "aborted by user:ann: why not")
	if s.r.EndedAt.IsZero() {
		t.Error("has no end")
	}
	for _, name := range []string{"a", "b"} {
		if _, version := s.r.Gives(name); version != 2 {
			t.Errorf("%s had it and loses it", name)
		}
	}
	if _, version := s.r.Gives("c"); version != 1 {
		t.Error("one that had it not is given it")
	}
	s.command(CommandRollBack)
	s.step(2 * time.Hour)
	s.want(RollingBack, "rolling back: waits for 2 of 2 devices: a, b; because user:ann: why not")
	for _, o := range s.seen {
		o.RolledBack = true
	}
	s.step(2 * time.Hour)
	s.want(RolledBack, "2 devices of 2 back to m:1, because user:ann: why not")
	if got, want := s.kinds(), []DecisionKind{DecideStart, DecideAdmit, DecidePause, DecideResume, DecidePromote, DecidePass, DecideAdmit, DecideAbort, DecideRollBack}; !slices.Equal(got, want) {
		t.Errorf("decided %v", got)
	}

	// After a halt, what had failed does not count.
	s = fresh()
	first := s.admitted()[0]
	s.seen[first].Observed, s.seen[first].Quarantined = true, true
	s.step(time.Minute)
	if s.r.State != Halted {
		t.Fatalf("%s", s.r.State)
	}
	s.command(CommandResume)
	s.step(2 * time.Minute) // the other one takes its place
	if !slices.Equal(s.admitted(), []string{"a", "b"}) {
		t.Errorf("%v", s.admitted())
	}
	s.serve()
	s.seen[first].Serving = false
	s.step(3 * time.Minute)
	s.want(Running, "wave 1 of 2 (1 device): soaks until 2026-01-01T01:03:00Z")
	s.step(2 * time.Hour)
	s.step(4 * time.Hour)
	s.want(Succeeded, "1 device of 2 ready")

	// Where there was none before, going back takes it away.
	s = newScript(t, Strategy{}, 0, "a")
	s.step(0)
	s.serve()
	s.step(time.Second)
	s.want(Succeeded, "1 device of 1 ready")
	s.command(CommandRollBack)
	if _, version := s.r.Gives("a"); version != 0 {
		t.Errorf("is given %d", version)
	}
}

func TestCommandsThatMakeNoSense(t *testing.T) {
	allowed := map[Command][]State{
		CommandPause: {Running}, CommandResume: {Paused, Halted}, CommandPromote: {Running, Paused, Halted}, CommandAbort: {Running, Paused, Halted},
		CommandRollBack: {Running, Paused, Halted, Succeeded, Failed, Aborted},
	}
	for state := Running; state <= Aborted; state++ {
		for cmd, in := range allowed {
			r := Rollout{Number: 3, Deployment: "d", Model: "m", From: 1, To: 2, State: state, Wave: 1}
			_, _, err := r.Command(begin, cmd, "user:ann", "")
			if slices.Contains(in, state) != (err == nil) {
				t.Errorf("%s while %s: %v", cmd, state, err)
			}
			if want := fmt.Sprintf("cannot %s rollout d-3: it is %s", cmd, state); err != nil && err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
		}
	}
	r := Rollout{Number: 3, Deployment: "d", Model: "m", From: 2, To: 2, State: Succeeded}
	for _, tt := range []struct {
		cmd          Command
		reason, want string
	}{
		{CommandRollBack, "", "cannot rollback rollout d-3: m:2 is the version before"},
		{CommandRollBack, strings.Repeat("x", 1001), "cannot rollback rollout d-3: the reason has 1001 bytes, the limit is 1000"},
		{"stop", "", `command "stop" is not known, known are pause, resume, promote, abort and rollback`},
	} {
		if _, _, err := r.Command(begin, tt.cmd, "user:ann", tt.reason); err == nil || err.Error() != tt.want {
			t.Errorf("%v, want %s", err, tt.want)
		}
	}
	r.State = Running
	if _, _, err := r.Command(begin, CommandPromote, "user:ann", ""); err == nil || err.Error() != "cannot promote rollout d-3: no wave has begun" {
		t.Errorf("%v", err)
	}
}

// What a device that is rolled back does not take back is named; others do not
// wait for it, nor for one that is away.
func TestRollBackWaits(t *testing.T) {
	s := newScript(t, Strategy{AwayAfter: time.Minute}, 1, "a", "b", "c")
	s.step(0)
	s.serve()
	s.step(time.Second)
	s.command(CommandRollBack)
	s.seen["a"].RolledBack, s.seen["c"].Connected, s.seen["b"].Reason = true, false, "disk full"
	s.step(30 * time.Second)
	s.want(RollingBack, "rolling back: waits for 2 of 3 devices: b, c; because user:ann: why not")
	if !s.r.Changes("b", s.now) || s.r.Changes("a", s.now) || !slices.Equal(s.asks, []string{"b"}) {
		t.Errorf("asks %v", s.asks)
	}
	s.step(20 * time.Minute)
	s.want(RollingBack, "rolling back: waits for 1 of 3 devices: b (disk full); because user:ann: why not")
	if s.r.Changes("b", s.now) || s.r.Changes("c", s.now) {
		t.Error("others wait for ever")
	}
	s.seen["b"].RolledBack = true
	s.step(21 * time.Minute)
	s.want(RolledBack, "2 devices of 3 back to m:1, 1 away, because user:ann: why not")
}

func TestLastGood(t *testing.T) {
	at := func(n int64, model, fromModel string, from, to int64, state State) Rollout {
		return Rollout{Number: n, Model: model, FromModel: fromModel, From: from, To: to, State: state}
	}
	tests := []struct {
		name    string
		history []Rollout
		model   string
		version int64
	}{
		{"none", nil, "", 0},
		{"the first one under way", []Rollout{at(1, "m", "", 0, 1, Running)}, "", 0},
		{"the first one, given to all", []Rollout{{Number: 1, Model: "m", To: 1, State: Superseded, Wave: 1}}, "m", 1},
		{"the first one, given to canaries", []Rollout{{Number: 1, Model: "m", To: 1, State: Halted, Wave: 1, Strategy: Strategy{Waves: []Wave{{Canary: 1}}}}}, "", 0},
		{"the first one, taken back", []Rollout{{Number: 1, Model: "m", To: 1, State: RolledBack, Wave: 1}}, "", 0},
		{"succeeded", []Rollout{at(1, "m", "", 0, 1, Succeeded)}, "m", 1},
		{"in any order", []Rollout{at(2, "m", "", 1, 2, Succeeded), at(1, "m", "", 0, 1, Succeeded)}, "m", 2},
		{"midway", []Rollout{at(1, "m", "", 0, 1, Succeeded), at(2, "m", "", 1, 2, Superseded), at(3, "m", "", 1, 3, Halted)}, "m", 1},
		{"rolled back", []Rollout{at(2, "m", "", 1, 2, RolledBack)}, "m", 1},
		{"aborted", []Rollout{at(2, "m", "", 1, 2, Aborted)}, "m", 1},
		{"of another model", []Rollout{at(2, "new", "old", 7, 2, RollingBack)}, "old", 7},
	}
	for _, tt := range tests {
		if model, version := LastGood(tt.history); model != tt.model || version != tt.version {
			t.Errorf("%s: %s:%d", tt.name, model, version)
		}
	}
}

func TestGives(t *testing.T) {
	one := Strategy{}
	waves := Strategy{Waves: []Wave{{Canary: 1}}}
	for _, tt := range []struct {
		state         State
		strategy      Strategy
		given, others int64
	}{
		{Running, waves, 2, 1}, {Paused, waves, 2, 1}, {Halted, waves, 2, 1}, {Aborted, waves, 2, 1}, {Superseded, waves, 2, 1}, {Failed, waves, 2, 1},
		{Failed, one, 2, 2}, {Succeeded, waves, 2, 2}, {RollingBack, waves, 1, 1}, {RolledBack, one, 1, 1},
	} {
		r := Rollout{Model: "m", From: 1, To: 2, State: tt.state, Strategy: tt.strategy, Devices: []RolloutDevice{{Device: "a", AdmittedAt: begin}, {Device: "b", Wave: 2}}}
		for device, want := range map[string]int64{"a": tt.given, "b": tt.others, "c": tt.others} {
			if model, got := r.Gives(device); model != "m" || got != want {
				t.Errorf("%s, %d waves: %s is given %s:%d", tt.state, len(tt.strategy.AllWaves()), device, model, got)
			}
		}
	}
}

// A step with many devices asks for the figures of a bounded number of them,
// from all classes.
func TestWatchIsBounded(t *testing.T) {
	s := newScript(t, Strategy{Waves: []Wave{{Percent: 60}}, Gates: []Gate{{ErrorRate, .02}}}, 1)
	for i := range 3000 {
		s.join(fmt.Sprintf("d%04d.%s", i, map[bool]string{true: "rare", false: "common"}[i%100 == 0]))
	}
	s.step(0)
	var all []Observation
	for _, o := range s.seen {
		all = append(all, *o)
	}
	_, actions := s.r.Step(begin.Add(time.Second), all)
	given, others, rare := 0, 0, 0
	for _, a := range actions {
		if a.Kind != Watch {
			continue
		}
		if strings.HasSuffix(a.Device, ".rare") {
			rare++
		}
		if d, _ := s.r.Device(a.Device); d.AdmittedAt.IsZero() {
			others++
		} else {
			given++
		}
	}
	if given != MaxWatched || others != MaxCompared || rare != 30 {
		t.Errorf("watches %d and %d, %d of them of the rare class", given, others, rare)
	}
}
