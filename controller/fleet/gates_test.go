package fleet

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/sketch"
)

// requests makes figures of n requests of which some failed, with times around
// one, in seconds.
func requests(n, failed uint64, seconds float64) Figures {
	f := Figures{Requests: n, Failures: failed, Rows: n, Latency: make(sketch.Counts, sketch.Latency.Buckets()), Confidence: make(sketch.Counts, sketch.Confidence.Buckets()), Energy: true, Joules: float64(n) * 2}
	r := rand.New(rand.NewPCG(n, failed))
	for range n - failed {
		f.Latency[sketch.Latency.Bucket(seconds*(1+r.Float64()))]++
		f.Confidence[sketch.Confidence.Bucket(min(max(.8+r.NormFloat64()/10, 0), 1))]++
	}
	return f
}

// sure makes the confidences of figures other ones.
func (f Figures) sure(mean float64) Figures {
	r := rand.New(rand.NewPCG(1, 2))
	n := f.Confidence.Sum()
	f.Confidence = make(sketch.Counts, sketch.Confidence.Buckets())
	for range n {
		f.Confidence[sketch.Confidence.Bucket(min(max(mean+r.NormFloat64()/10, 0), 1))]++
	}
	return f
}

func (f Figures) joules(perRow float64) Figures {
	f.Joules = perRow * float64(f.Rows)
	return f
}

func (f Figures) without() Figures {
	f.Energy, f.Joules, f.Confidence = false, 0, nil
	return f
}

func TestGates(t *testing.T) {
	same := requests(1000, 5, .01)
	tests := []struct {
		name      string
		gate      Gate
		minSample uint64
		new, old  Figures
		verdict   GateVerdict
		reason    string
	}{
		{"no error", Gate{ErrorRate, .02}, 0, requests(133, 0, .01), requests(133, 0, .01), Passed, "0.00 % of requests failed, 0.00 % before, the limit is 2 % more"},
		{"no error among few", Gate{ErrorRate, .02}, 0, requests(100, 0, .01), requests(1000, 0, .01), NoSample, "0.00 % of requests failed, 0.00 % before, the limit is 2 % more: 100 requests are too few to tell"},
		{"nothing", Gate{ErrorRate, .02}, 0, Figures{}, same, NoSample, "0 of 30 requests to m:2"},
		{"less than the document wants", Gate{ErrorRate, .5}, 500, requests(499, 0, .01), same, NoSample, "499 of 500 requests to m:2"},
		{"nothing to compare with", Gate{ErrorRate, .02}, 0, same, requests(29, 0, .01), NoSample, "29 of 30 requests to m:1, to compare with"},
		{"errors as before", Gate{ErrorRate, .02}, 0, requests(2000, 200, .01), requests(2000, 200, .01), Passed, "10.00 % of requests failed"},
		{"one error in few", Gate{ErrorRate, .02}, 0, requests(30, 1, .01), same, NoSample, ""},
		{"three errors in few", Gate{ErrorRate, .02}, 0, requests(30, 3, .01), same, NoSample, ""},
		{"half of few", Gate{ErrorRate, .02}, 0, requests(30, 15, .01), same, FailedGate, "50.00 % of requests failed, 0.50 % before"},
		{"some more in many", Gate{ErrorRate, .02}, 0, requests(20000, 700, .01), requests(20000, 100, .01), FailedGate, "3.50 % of requests failed, 0.50 % before"},
		{"at the limit", Gate{ErrorRate, .02}, 0, requests(2000, 50, .01), requests(2000, 10, .01), NoSample, "2.50 % of requests failed"},
		{"all fail", Gate{ErrorRate, .02}, 0, requests(40, 40, .01), same, FailedGate, "100.00 %"},
		{"as fast", Gate{P99, 1.25}, 0, requests(300, 0, .01), same, Passed, ""},
		{"faster", Gate{P99, 1}, 0, requests(300, 0, .005), same, Passed, ""},
		{"slower", Gate{P99, 1.25}, 0, requests(300, 0, .03), same, FailedGate, "60.53 ms, 20.97 ms before: 2.89 times, the limit is 1.25"},
		{"slower by little, too few to tell", Gate{P99, 1.25}, 0, requests(110, 0, .013), requests(110, 0, .01), NoSample, ""},
		{"slower by little, in many", Gate{P99, 1.25}, 0, requests(50000, 0, .014), requests(50000, 0, .01), FailedGate, ""},
		{"few times", Gate{P99, 1.25}, 0, requests(99, 0, .01), same, NoSample, "99 of 100 requests to m:2"},
		{"failed requests have no time", Gate{P99, 1.25}, 0, requests(1000, 950, .01), same, NoSample, "50 of 100 requests to m:2"},
		{"as much energy", Gate{Energy, 1.3}, 0, same, same, Passed, "2 J for a row, 2 J before: 1 times, the limit is 1.3"},
		{"more energy", Gate{Energy, 1.3}, 0, same.joules(3), same, FailedGate, "3 J for a row, 2 J before: 1.5 times, the limit is 1.3"},
		{"energy from nothing", Gate{Energy, 1.3}, 0, same.joules(3), same.joules(0), FailedGate, ""},
		{"energy of the new one is not measured", Gate{Energy, 1.3}, 0, same.without(), same, NoSample, "energy is not measured"},
		{"as sure", Gate{Confidence, .25}, 0, same, requests(1000, 4, .01), Passed, ""},
		{"as sure, of few", Gate{Confidence, .25}, 0, requests(35, 0, .01), requests(35, 1, .01), NoSample, ""},
		{"as sure, of a hundred", Gate{Confidence, .25}, 0, requests(120, 0, .01), requests(120, 1, .01), Passed, ""},
		{"less sure", Gate{Confidence, .25}, 0, same.sure(.5), same, FailedGate, "the stability index is"},
		{"less sure, of few", Gate{Confidence, .25}, 0, requests(40, 0, .01).sure(.4), requests(1000, 0, .01), FailedGate, ""},
		{"unknown", Gate{"heat", 1}, 0, same, same, NoSample, "the gate is not known"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := gateStep(Strategy{Gates: []Gate{tt.gate}, MinSample: tt.minSample}, 1, tt.new, tt.old)
			got, _ := s.gate(tt.gate, "c")
			if got.Verdict != tt.verdict || !strings.HasPrefix(got.Reason, tt.reason) || got.Reason == "" {
				t.Errorf("got %d, %q, value %v", got.Verdict, got.Reason, got.Value)
			}
			if got.NewSamples != tt.new.Requests || got.OldSamples != tt.old.Requests || (got.Value == nil) != (got.New == nil) || got.Verdict != NoSample && (got.Value == nil || math.IsNaN(*got.Value)) {
				t.Errorf("evidence %+v", got)
			}
		})
	}
}

func gateStep(strategy Strategy, from int64, n, o Figures) *step {
	r := Rollout{Model: "m", From: from, To: 2, Strategy: strategy, State: Running, Devices: []RolloutDevice{{Device: "a", Class: "c", AdmittedAt: begin, Phase: DeviceReady}}}
	return &step{r: r, now: begin, waves: strategy.AllWaves(), seen: map[string]*Observation{"a": {Device: "a", New: n, Old: o}}}
}

// Looked at after each request, a version that is as good as the one before
// nearly never fails, and one that is much worse never passes.
func TestErrorRateIsNotLuck(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	run := func(p, q float64) (failed, passed int) {
		for range 400 {
			var n, o Figures
			for range 1500 {
				n.Requests++
				o.Requests++
				if r.Float64() < p {
					n.Failures++
				}
				if r.Float64() < q {
					o.Failures++
				}
				if n.Requests < leastRequests {
					continue
				}
				var res GateResult
				res.Limit = .02
				(&step{r: Rollout{From: 1}}).errorRate(&res, n, o)
				if res.Verdict == FailedGate {
					failed++
					break
				}
				if res.Verdict == Passed {
					passed++
					break
				}
			}
		}
		return failed, passed
	}
	if failed, passed := run(.01, .01); failed > 2 || passed < 390 {
		t.Errorf("of 400 as good, %d failed and %d passed", failed, passed)
	}
	if failed, passed := run(.2, .01); failed < 398 || passed > 2 {
		t.Errorf("of 400 bad ones, %d failed and %d passed", failed, passed)
	}
}

// Without a version before, only the rate of errors counts, by itself.
func TestGatesOfTheFirstVersion(t *testing.T) {
	gates := []Gate{{ErrorRate, .02}, {P99, 1.25}, {Energy, 1.3}, {Confidence, .25}}
	for _, tt := range []struct {
		figures Figures
		verdict GateVerdict
		held    bool
	}{
		{requests(200, 0, .01), Passed, false}, {requests(200, 40, .01), FailedGate, false}, {requests(20, 0, .01), NoSample, true},
	} {
		s := gateStep(Strategy{Gates: gates}, 0, tt.figures, Figures{})
		held := s.judge(true)
		if (held != "") != tt.held || len(s.r.Gates) != 4 || s.r.Gates[0].Verdict != tt.verdict {
			t.Errorf("held by %q: %+v", held, s.r.Gates)
		}
		for _, g := range s.r.Gates[1:] {
			if g.Verdict != NoSample || g.Reason != "there is no version before to compare with" {
				t.Errorf("%+v", g)
			}
		}
	}
}

// What one class does not measure does not hold a wave up where another does;
// what none measures does.
func TestGatesOfSeveralClasses(t *testing.T) {
	all := requests(1000, 0, .01)
	s := gateStep(Strategy{Gates: []Gate{{Energy, 1.3}}}, 1, all, all)
	s.r.Devices = append(s.r.Devices, RolloutDevice{Device: "b", Class: "d", AdmittedAt: begin, Phase: DeviceReady})
	s.seen["b"] = &Observation{Device: "b", New: all.without(), Old: all.without()}
	if held := s.judge(true); held != "" || s.r.Gates[0].Verdict != Passed || s.r.Gates[1].Verdict != NoSample {
		t.Errorf("held by %q: %+v", held, s.r.Gates)
	}
	s.figures, s.seen["a"] = nil, s.seen["b"]
	if held := s.judge(true); held != "energy on c: energy is not measured, energy on d: energy is not measured" {
		t.Errorf("held by %q", held)
	}
	s.r.Devices[1].Phase = DeviceFailed // it will not answer
	s.figures, s.seen["a"] = nil, &Observation{Device: "a", New: all, Old: all}
	s.seen["b"] = &Observation{Device: "b"}
	if held := s.judge(true); held != "" {
		t.Errorf("held by %q", held)
	}
}

// canaryRollout has one canary, then all, and soaks for a minute.
func canaryRollout(gates ...Gate) Rollout {
	return Rollout{Number: 1, Deployment: "d", Model: "m", From: 1, To: 2, State: Running, StartedAt: begin, Strategy: Strategy{
		Waves: []Wave{{Canary: 1}}, Soak: time.Minute, Gates: gates, Deadline: 10 * time.Minute, AwayAfter: 5 * time.Minute,
	}}
}

// A canary with bad figures ends the rollout at once, on the record.
func TestGateRollsBack(t *testing.T) {
	old := requests(500, 1, .01)
	seen := func(n Figures) []Observation {
		return []Observation{
			{Device: "a", Class: "c", Connected: true, HeardAt: begin, Observed: true, Old: old}, {Device: "b", Class: "c", Connected: true, HeardAt: begin, Observed: true, Old: old},
		}
	}
	r, actions := canaryRollout(Gate{ErrorRate, .02}).Step(begin, seen(Figures{}))
	canary := r.Devices[0]
	if canary.AdmittedAt.IsZero() {
		canary = r.Devices[1]
	}
	admitted, watched := 0, 0
	for _, d := range r.Devices {
		if !d.AdmittedAt.IsZero() {
			admitted++
		}
	}
	for _, a := range actions {
		if a.Kind == Watch {
			watched++
		}
	}
	if admitted != 1 || watched != 2 || r.Wave != 1 {
		t.Fatalf("%d admitted, %d watched: %+v", admitted, watched, r)
	}
	now := seen(Figures{})
	for i := range now {
		if now[i].Device == canary.Device {
			now[i].Serving, now[i].New = true, requests(60, 30, .01)
		}
	}
	r, actions = r.Step(begin.Add(10*time.Second), now)
	const why = "wave 1 of 2 (1 canary per class): gate errorRate failed on c: 50.00 % of requests failed, 0.20 % before, the limit is 2 % more"
	if r.State != RollingBack || r.Cause != why {
		t.Fatalf("%s: %q", r.State, r.Cause)
	}
	var d Decision
	for _, a := range actions {
		if a.Kind == Decide {
			d = a.Decision
		}
	}
	if d.Kind != DecideRollBack || d.By != "gate" || d.Reason != why || len(d.Gates) != 1 || d.Gates[0].NewSamples != 60 || d.Gates[0].OldSamples != 1000 || len(d.Devices) != 1 || d.Devices[0] != canary.Device {
		t.Errorf("decided %+v", d)
	}
	for i := range now {
		now[i].RolledBack = true
	}
	r, _ = r.Step(begin.Add(20*time.Second), now)
	if r.State != RolledBack || r.Reason != "1 device of 1 back to m:1, because "+why {
		t.Errorf("%s: %q", r.State, r.Reason)
	}
}

// A class whose devices all change at once waits until there is something to
// compare with; where that does not come, nothing was changed.
func TestGateNeedsBase(t *testing.T) {
	r := canaryRollout(Gate{P99, 1.25})
	seen := []Observation{{Device: "a", Class: "c", Connected: true, HeardAt: begin, Observed: true, Old: requests(99, 0, .01)}}
	r, _ = r.Step(begin, seen)
	if r.State != Running || !r.Devices[0].AdmittedAt.IsZero() || r.Reason != "wave 1 of 2 (1 canary per class): waits for 1 of 1 device: a (99 of 100 requests to m:1, to compare with)" {
		t.Fatalf("%s: %q", r.State, r.Reason)
	}
	halted, _ := r.Step(begin.Add(10*time.Minute), seen)
	if halted.State != Halted || !strings.Contains(halted.Reason, "the deadline of 10m0s passed: waits for a sample: 99 of 100 requests to m:1") {
		t.Errorf("%s: %q", halted.State, halted.Reason)
	}
	seen[0].Old = requests(100, 0, .01)
	if r, _ = r.Step(begin.Add(time.Minute), seen); r.Devices[0].AdmittedAt.IsZero() {
		t.Errorf("not admitted: %q", r.Reason)
	}
}

// A gate without a sample halts at the deadline, and is judged anew when an
// operator resumes, without what was counted before.
func TestGateHaltsAndIsJudgedAnew(t *testing.T) {
	old := requests(500, 0, .01)
	r := canaryRollout(Gate{ErrorRate, .02})
	r.Strategy.OnFailure = Halt
	seen := []Observation{
		{Device: "a", Class: "c", Connected: true, HeardAt: begin, Observed: true, Serving: true, Old: old, New: requests(29, 0, .01)},
		{Device: "b", Class: "c", Connected: true, HeardAt: begin, Observed: true, Old: old},
	}
	r.Strategy.Waves = []Wave{{Count: 1}}
	if hash("a") > hash("b") {
		seen[0].Device, seen[1].Device = "b", "a"
	}
	r, _ = r.Step(begin, seen)
	r, actions := r.Step(begin, seen)
	if want := "wave 1 of 2 (1 device): soaks until 2026-01-01T00:01:00Z"; r.Reason != want || !r.SoaksUntil().Equal(begin.Add(time.Minute)) {
		t.Fatalf("%q", r.Reason)
	}
	if last := actions[len(actions)-1]; last.Kind != Wake || !last.At.Equal(begin.Add(time.Minute)) {
		t.Errorf("%+v", last)
	}
	r, _ = r.Step(begin.Add(time.Minute), seen)
	if want := "wave 1 of 2 (1 device): waits for a sample: errorRate on c: 29 of 30 requests to m:2"; r.State != Running || r.Reason != want {
		t.Fatalf("%s: %q", r.State, r.Reason)
	}
	r, _ = r.Step(begin.Add(11*time.Minute), seen)
	if r.State != Halted {
		t.Fatalf("%s: %q", r.State, r.Reason)
	}
	r, _, err := r.Command(begin.Add(12*time.Minute), CommandResume, "user:ann", "go on")
	if err != nil {
		t.Fatal(err)
	}
	at := begin.Add(12 * time.Minute)
	seen[0].HeardAt, seen[1].HeardAt = at, at
	r, _ = r.Step(at, seen)
	seen[0].New = seen[0].New.Add(requests(20, 20, .01)) // as many failed after as none before
	r, _ = r.Step(at.Add(time.Minute), seen)
	if len(r.Gates) != 1 || r.Gates[0].NewSamples != 20 || r.State != Running {
		t.Errorf("%s: %+v", r.State, r.Gates)
	}
	seen[0].New = seen[0].New.Add(requests(30, 30, .01))
	if r, _ = r.Step(at.Add(2*time.Minute), seen); r.State != Halted || r.Gates[0].NewSamples != 50 {
		t.Errorf("%s: %q, %+v", r.State, r.Reason, r.Gates)
	}
}
