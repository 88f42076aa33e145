package fleet

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
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

func TestRolloutStep(t *testing.T) {
	soon, late := begin.Add(time.Second), begin.Add(time.Minute)
	tests := []struct {
		name         string
		maxFailed    int
		now          time.Time
		observations []Observation
		state        State
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
		t.Run(tt.name, func(t *testing.T) {
			r, actions := rolloutOf(tt.maxFailed).Step(tt.now, tt.observations)
			if r.State != tt.state || !strings.HasPrefix(r.Reason, tt.reason) {
				t.Errorf("got state %d, %q", r.State, r.Reason)
			}
			if (r.State == Running) != r.EndedAt.IsZero() {
				t.Errorf("state %d ended at %s", r.State, r.EndedAt)
			}
			var wakes, ends int
			for _, a := range actions {
				switch a.Kind {
				case Wake:
					wakes++
					if !a.At.Equal(late) {
						t.Errorf("wakes at %s", a.At)
					}
				case End:
					ends++
				}
			}
			if want := map[bool]int{true: 1}; wakes != want[r.State == Running] || ends != want[r.State != Running] {
				t.Errorf("actions %v in state %d", actions, r.State)
			}
		})
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
	failed, _ := rolloutOf(0).Step(begin, []Observation{refused("a")})
	if after := failed.Supersede(begin, "x"); !after.Equal(failed) {
		t.Errorf("a failed rollout was superseded: %+v", after)
	}
}

// Over any history a rollout ends by its deadline, stays as it ended, names
// its cause, and ends well only with evidence.
func TestRolloutHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rolloutOf(rapid.IntRange(0, 2).Draw(t, "max failed"))
		now := begin
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 20).Draw(t, "seconds")) * time.Second)
			var observations []Observation
			var serving, quarantined, connectedBusy int
			for i := range rapid.IntRange(0, 5).Draw(t, "devices") {
				o := Observation{
					Device: string(rune('a' + i)), Connected: rapid.Bool().Draw(t, "connected"), Observed: rapid.Bool().Draw(t, "observed"),
					Quarantined: rapid.Bool().Draw(t, "quarantined"), Serving: rapid.Bool().Draw(t, "serving"),
					Refused: rapid.SampledFrom([]string{"", "", "does not fit"}).Draw(t, "refused"),
				}
				observations = append(observations, o)
				switch {
				case o.Refused != "", o.Observed && o.Quarantined:
					quarantined++
				case o.Observed && o.Serving:
					serving++
				case o.Connected:
					connectedBusy++
				}
			}
			if rapid.IntRange(0, 15).Draw(t, "newer") == 0 {
				before := r
				r = r.Supersede(now, "newer")
				if before.State != Running && !r.Equal(before) {
					t.Fatalf("ended rollout changed to %+v", r)
				}
				continue
			}
			before := r
			r, _ = r.Step(now, observations)
			switch {
			case before.State != Running:
				if !r.Equal(before) {
					t.Fatalf("ended rollout changed: %+v to %+v", before, r)
				}
				continue
			case r.Reason == "":
				t.Fatal("no cause")
			case len(r.Devices) != len(observations):
				t.Fatalf("%d devices of %d", len(r.Devices), len(observations))
			case r.State == Succeeded && (serving == 0 || connectedBusy > 0 || quarantined > r.Strategy.MaxFailed):
				t.Fatalf("succeeded with %d serving, %d busy, %d refused of %d", serving, connectedBusy, quarantined, r.Strategy.MaxFailed)
			case r.State == Running && quarantined > r.Strategy.MaxFailed:
				t.Fatal("runs on with too many refusals")
			case r.State == Running && !now.Before(r.StartedAt.Add(r.Strategy.Deadline)):
				t.Fatal("runs beyond its deadline")
			case r.State == Superseded:
				t.Fatal("a step superseded it")
			}
		}
	})
}
