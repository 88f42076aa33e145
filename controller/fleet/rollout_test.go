package fleet

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

var begin = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func rolloutOf(maxFailed int) Rollout {
	return Rollout{Number: 3, Deployment: "digits", Model: "digits", From: 1, To: 2, Strategy: Strategy{MaxFailed: maxFailed, Deadline: time.Minute}, State: Running, StartedAt: begin}
}

func ready(d string) Observation {
	return Observation{Device: d, Connected: true, Observed: true, Serving: true}
}
func working(d string) Observation {
	return Observation{Device: d, Connected: true, Observed: true, BytesPresent: 1, BytesTotal: 2}
}
func refused(d string) Observation {
	return Observation{Device: d, Connected: true, Observed: true, Quarantined: true, Reason: "opset 99"}
}
func unfit(d string) Observation {
	return Observation{Device: d, Refused: "does not fit: it is large", Connected: true, Observed: true, Serving: true}
}
func unaware(d string) Observation {
	return Observation{Device: d, Connected: true, Serving: true, Quarantined: true}
}
func gone(o Observation) Observation { o.Connected = false; return o }

// A rollout of one wave, with and without a version to go back to. All devices
// were given the version when it began.
func TestRolloutStep(t *testing.T) {
	soon, late := begin.Add(time.Second), begin.Add(time.Minute)
	tests := []struct {
		name         string
		maxFailed    int
		now          time.Time
		observations []Observation
		state        State // where there is no version before
		reason       string
	}{
		{"all ready", 0, soon, []Observation{ready("a"), ready("b")}, Succeeded, "2 devices of 2 ready"},
		{"one works", 0, soon, []Observation{ready("a"), working("b")}, Running, "waits for 1 of 2 devices: b"},
		{"one does not know yet", 0, soon, []Observation{ready("a"), unaware("b")}, Running, "waits for 1 of 2 devices: b"},
		{"many work", 0, soon, []Observation{working("e"), working("d"), working("c"), working("b"), working("a")}, Running, "waits for 5 of 5 devices: a, b, c and 2 more"},
		{"one away does not hold it", 0, soon, []Observation{ready("a"), gone(working("b"))}, Succeeded, "1 device of 2 ready, 1 away"},
		{"away but ready", 0, soon, []Observation{gone(ready("a"))}, Succeeded, "1 device of 1 ready"},
		{"all away", 0, soon, []Observation{gone(working("a"))}, Running, "waits for a device: none of 1 device that match is connected"},
		{"no device", 0, soon, nil, Running, "waits for a device: none matches the selector"},
		{"no device until the deadline", 0, late, nil, Failed, "the deadline of 1m0s passed: waits for a device: none matches"},
		{"one refuses", 0, soon, []Observation{working("a"), refused("b")}, Failed, "1 device refused the version, allowed are 0: b (opset 99)"},
		{"one away refused", 0, soon, []Observation{ready("a"), gone(refused("b"))}, Failed, "1 device refused the version"},
		{"one may refuse", 1, soon, []Observation{ready("a"), refused("b")}, Succeeded, "1 device of 2 ready, 1 refused it"},
		{"one may refuse, one works", 1, soon, []Observation{working("a"), refused("b")}, Running, "waits for 1 of 2 devices: a"},
		{"it does not fit on one", 0, soon, []Observation{ready("a"), unfit("b")}, Failed, "1 device refused the version, allowed are 0: b (does not fit: it is large)"},
		{"it does not fit on one away", 1, soon, []Observation{ready("a"), gone(unfit("b"))}, Succeeded, "1 device of 2 ready, 1 refused it"},
		{"all may refuse", 2, soon, []Observation{refused("a"), refused("b")}, Failed, "no device serves the version: 2 devices refused"},
		{"deadline", 0, late, []Observation{ready("a"), working("b")}, Failed, "the deadline of 1m0s passed: waits for 1 of 2 devices: b"},
		{"ready at the deadline", 0, late, []Observation{ready("a")}, Succeeded, "1 device of 1 ready"},
	}
	for _, tt := range tests {
		for _, from := range []int64{0, 1} {
			t.Run(fmt.Sprintf("%s, from %d", tt.name, from), func(t *testing.T) {
				r := rolloutOf(tt.maxFailed)
				r.From = from
				var first []Observation
				for _, o := range tt.observations {
					first = append(first, unaware(o.Device))
				}
				r, _ = r.Step(begin, first)
				r, actions := r.Step(tt.now, tt.observations)
				state, reason := tt.state, tt.reason
				if state == Failed && from > 0 {
					state, reason = RollingBack, "rolling back: "+reason
				}
				if len(tt.observations) == 0 && from > 0 { // nothing speaks against the version
					state, reason = Running, "waits for a device: none matches the selector"
				}
				if r.State != state || !strings.HasPrefix(r.Reason, reason) {
					t.Errorf("got %s, %q", r.State, r.Reason)
				}
				if r.State.Ended() == r.EndedAt.IsZero() {
					t.Errorf("%s, ended at %s", r.State, r.EndedAt)
				}
				ends, wakes := false, time.Time{}
				for _, a := range actions {
					switch a.Kind {
					case Wake:
						wakes = a.At
					case End:
						ends = true
					}
				}
				if ends != r.State.Ended() {
					t.Errorf("actions %v, %s", actions, r.State)
				}
				if r.State == Running && (len(tt.observations) > 0 || from == 0) && !wakes.Equal(late) && !strings.Contains(r.Reason, "none of") {
					t.Errorf("wakes at %s, %q", wakes, r.Reason)
				}
			})
		}
	}
}

func TestRolloutSuperseded(t *testing.T) {
	r := rolloutOf(0).Supersede(begin, "a newer one")
	if r.State != Superseded || r.Reason != "a newer one" || r.EndedAt != begin {
		t.Errorf("got %+v", r)
	}
	again, actions := r.Step(begin.Add(time.Hour), []Observation{ready("a")})
	if !again.Equal(r) || actions != nil {
		t.Errorf("a step changed it: %+v, %v", again, actions)
	}
	failed := rolloutOf(0)
	failed.From = 0
	for range 2 { // what it refused before it was given the version does not count
		if failed.State != Running {
			t.Errorf("%s", failed.State)
		}
		failed, _ = failed.Step(begin, []Observation{refused("a")})
	}
	if after := failed.Supersede(begin, "x"); failed.State != Failed || !after.Equal(failed) {
		t.Errorf("a failed rollout was superseded: %+v", after)
	}
}
