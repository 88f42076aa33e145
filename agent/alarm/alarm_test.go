package alarm

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/datadrift"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	step = 10 * time.Second
	gib  = 1 << 30
)

// Moments of the tests: counting from when the detector began.
var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// run lets a detector see a figure for so long, and gives what changed with
// its time.
type run struct {
	d       *Detector
	now     time.Duration
	changes []Change
	at      []time.Duration
}

func newRun(cfg Config) *run { return &run{d: New(cfg)} }

func (r *run) see(s Sample) {
	r.now += step
	if s.Telemetry.At == nil {
		s.Telemetry.At = timestamppb.New(noon.Add(r.now))
	}
	for _, c := range r.d.Observe(r.now, s) {
		r.changes = append(r.changes, c)
		r.at = append(r.at, r.now)
	}
}

// last says in short what was last: "raised temperature cpu by theil-sen".
func (r *run) last() string {
	if len(r.changes) == 0 {
		return ""
	}
	c := r.changes[len(r.changes)-1]
	return strings.Join([]string{[]string{"", "raised", "worse", "cleared"}[c.Kind], c.Alarm.Kind, c.Alarm.Subject, "by", c.Alarm.Method}, " ")
}

// A case makes one figure of hours since the begin; what it comes to is the
// last change, and by when.
func TestKinds(t *testing.T) {
	seed := rand.NewPCG(1, 2)
	r := rand.New(seed)
	celsius := func(f func(h float64) float64) func(float64, *Sample) {
		return func(h float64, s *Sample) {
			s.Telemetry.Temperatures = []*dunlinv1.Temperature{{Sensor: "cpu", Celsius: math.Round(f(h) + 0.2*r.NormFloat64())}}
		}
	}
	free := func(f func(h float64) float64) func(float64, *Sample) {
		return func(h float64, s *Sample) { s.Telemetry.DiskFreeBytes = new(uint64(f(h))) }
	}
	wear := func(f func(h float64) float64) func(float64, *Sample) {
		return func(h float64, s *Sample) { s.Telemetry.DiskWear = new(math.Floor(100*f(h)) / 100) }
	}
	memory := func(f func(h float64) (device, agent float64)) func(float64, *Sample) {
		return func(h float64, s *Sample) {
			device, agent := f(h)
			s.Telemetry.MemoryTotalBytes, s.Telemetry.MemoryUsedBytes, s.Telemetry.AgentAnonymousBytes = new(uint64(8*gib)), new(uint64(device)), new(uint64(agent))
		}
	}
	gpu := func(f func(h float64, g *dunlinv1.GpuTelemetry)) func(float64, *Sample) {
		return func(h float64, s *Sample) {
			g := &dunlinv1.GpuTelemetry{Index: 1}
			f(h, g)
			s.Telemetry.Gpus = []*dunlinv1.GpuTelemetry{g}
		}
	}
	// Of one version: requests a second, seconds of each, shares that fail and
	// are refused.
	requests := func(f func(h float64) (rate, seconds, failed, refused float64)) func(float64, *Sample) {
		v := Version{Model: "digits", Version: 2}
		return func(h float64, s *Sample) {
			rate, seconds, failed, refused := f(h)
			n := math.Round(rate * step.Seconds() * (1 + 0.05*r.NormFloat64()))
			bad, no := math.Round(n*failed), math.Round(n*refused)
			ok := n - bad - no
			v.Succeeded, v.Failed, v.Refused = v.Succeeded+uint64(ok), v.Failed+uint64(bad), v.Refused+uint64(no)
			took := time.Duration(ok * seconds * (1 + 0.02*r.NormFloat64()) * float64(time.Second))
			v.Time, v.Run = v.Time+took+took/10, v.Run+took
			s.Versions = []Version{v}
		}
	}
	// Of one version: whether its data drifts, and how often that has begun.
	data := func(f func(h float64) (drifted bool, times uint64)) func(float64, *Sample) {
		v := Version{Model: "digits", Version: 2}
		return func(h float64, s *Sample) {
			v.Data.Looks++
			v.Data.Drifted, v.Data.Times = f(h)
			if v.Data.Times > 0 {
				v.Data.Worst = datadrift.Evidence{Tensor: "image", Figure: "the mean", PSI: 1.5}
			}
			s.Versions = []Version{v}
		}
	}
	constant := func(v float64) func(float64) float64 { return func(float64) float64 { return v } }
	after := func(h, at, before, then float64) float64 {
		if h < at {
			return before
		}
		return then
	}

	tests := map[string]struct {
		put   func(h float64, s *Sample)
		hours float64
		want  string  // the last change
		from  float64 // hours at which it comes, or a little later
		to    float64
	}{
		"cool":                       {celsius(constant(60)), 24, "", 0, 0},
		"above the slowdown":         {celsius(func(h float64) float64 { return after(h, 1, 60, 96) }), 2, "raised temperature cpu by threshold", 1, 1.02},
		"above it for ten seconds":   {celsius(func(h float64) float64 { return after(math.Abs(h-1), 0.001, 127, 60) }), 2, "", 0, 0},
		"above it and cool again":    {celsius(func(h float64) float64 { return after(math.Abs(h-1), 0.05, 96, 60) }), 3, "cleared temperature cpu by threshold", 1.1, 1.25},
		"hotter and hotter":          {celsius(func(h float64) float64 { return 60 + 15*max(0, h-1) }), 3.25, "raised temperature cpu by theil-sen", 2.8, 3.2},
		"hotter because of the load": {celsius(func(h float64) float64 { return after(h, 1, 50, 85-35*math.Exp(-(h-1)/0.3)) }), 3, "", 0, 0},
		"a step that stays below":    {celsius(func(h float64) float64 { return after(h, 1, 50, 80) }), 3, "", 0, 0},
		"disk as it was":             {free(constant(20 * gib)), 48, "", 0, 0},
		"below the reserve":          {free(func(h float64) float64 { return after(h, 1, 2*gib, gib/2) }), 2, "raised disk_space data by threshold", 1, 1.02},
		"nearly full":                {free(func(h float64) float64 { return after(h, 1, 2*gib, gib/8) }), 2, "raised disk_space data by threshold", 1, 1.02},
		"filled in ten hours":        {free(func(h float64) float64 { return 20*gib - 2*gib*max(0, h-2) }), 8, "raised disk_space data by theil-sen", 3, 5},
		"one large file":             {free(func(h float64) float64 { return after(h, 2, 20*gib, 5*gib) }), 12, "", 0, 0},
		"logs that are rotated":      {free(func(h float64) float64 { return 20*gib - gib/8*math.Mod(h, 24) }), 24 * 10, "", 0, 0},
		"worn by 1 % in a month":     {wear(func(h float64) float64 { return 0.5 + h/24/3000 }), 24 * 20, "", 0, 0},
		"worn by 2 % a day":          {wear(func(h float64) float64 { return 0.5 + 0.02*h/24 }), 24 * 12, "raised disk_wear data by theil-sen", 24 * 5, 24 * 9},
		"nearly worn out":            {wear(constant(0.93)), 2, "raised disk_wear data by threshold", 0, 0.1},
		"memory as it was":           {memory(func(float64) (float64, float64) { return 4 * gib, gib / 2 }), 48, "", 0, 0},
		"agent leaks 1 GiB an hour":  {memory(func(h float64) (float64, float64) { return 4*gib + gib*h, gib/2 + gib*h }), 3, "raised memory device by theil-sen", 0.8, 3},
		"none available":             {memory(func(h float64) (float64, float64) { return after(h, 1, 4*gib, 7.9*gib), gib }), 2, "raised memory device by threshold", 1, 1.1},
		"a model is loaded":          {memory(func(h float64) (float64, float64) { return after(h, 1, 4*gib, 6*gib), after(h, 1, gib, 3*gib) }), 12, "", 0, 0},
		"uncorrected at the start":   {gpu(func(_ float64, g *dunlinv1.GpuTelemetry) { g.EccUncorrected = new(uint64(7)) }), 2, "", 0, 0},
		"one uncorrected":            {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.EccUncorrected = new(uint64(after(h, 1, 7, 8))) }), 2, "raised ecc gpu:1 by counter", 1, 1.01},
		"counters begin anew":        {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.EccUncorrected = new(uint64(after(h, 1, 7, 0))) }), 2, "", 0, 0},
		"one uncorrected, a day ago": {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.EccUncorrected = new(uint64(after(h, 1, 7, 8))) }), 27, "cleared ecc gpu:1 by counter", 25, 25.1},
		"a burst of corrected":       {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.EccCorrected = new(uint64(after(h, 1, 7, 107))) }), 24, "", 0, 0},
		"corrected, 60 an hour":      {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.EccCorrected = new(uint64(60 * max(0, h-1))) }), 3, "raised ecc gpu:1 by counter", 1.2, 1.7},
		"a row remapped":             {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.RemappedRowsUncorrected = new(uint32(after(h, 1, 2, 3))) }), 2, "raised remapped_rows gpu:1 by counter", 1, 1.01},
		"remap fails":                {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.RemapFailed = new(h > 1) }), 2, "raised remapped_rows gpu:1 by threshold", 1, 1.01},
		"remap pending, then reset":  {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.RemapPending = new(h > 1 && h < 2) }), 3, "cleared remapped_rows gpu:1 by threshold", 2, 2.1},
		"an XID": {gpu(func(h float64, g *dunlinv1.GpuTelemetry) {
			g.XidCount, g.LastXid = new(uint64(after(h, 1, 0, 1))), new(uint64(79))
		}), 2, "raised xid gpu:1 by counter", 1, 1.01},
		"GPU above its slowdown": {gpu(func(h float64, g *dunlinv1.GpuTelemetry) { g.Celsius, g.SlowdownCelsius = new(88.), new(87.) }), 1, "raised temperature gpu:1 by threshold", 0, 0.02},
		"requests as they were":  {requests(func(float64) (float64, float64, float64, float64) { return 10, 0.02, 0.002, 0 }), 24, "", 0, 0},
		"day and night": {requests(func(h float64) (float64, float64, float64, float64) {
			return 20 + 15*math.Sin(2*math.Pi*h/24), 0.02 * (1 + 0.3*math.Sin(2*math.Pi*h/24)), 0, 0
		}), 24 * 5, "", 0, 0},
		"slower by half": {requests(func(h float64) (float64, float64, float64, float64) { return 10, after(h, 6, 0.02, 0.03), 0, 0 }), 8, "raised latency digits:2 by cusum", 6, 6.5},
		"slower for two minutes": {requests(func(h float64) (float64, float64, float64, float64) {
			return 10, after(math.Abs(h-6), 0.017, 0.03, 0.02), 0, 0
		}), 8, "", 0, 0},
		"slower, and fast again": {requests(func(h float64) (float64, float64, float64, float64) {
			return 10, after(math.Abs(h-7), 1, 0.03, 0.02), 0, 0
		}), 10, "cleared latency digits:2 by cusum", 8, 9},
		"a fifth refused":                  {requests(func(h float64) (float64, float64, float64, float64) { return 10, 0.02, 0, after(h, 6, 0, 0.2) }), 8, "raised throughput digits:2 by cusum", 6, 6.5},
		"most refused":                     {requests(func(h float64) (float64, float64, float64, float64) { return 10, 0.02, 0, after(h, 1, 0, 0.7) }), 2, "raised throughput digits:2 by threshold", 1, 1.3},
		"a tenth fails":                    {requests(func(h float64) (float64, float64, float64, float64) { return 10, 0.02, after(h, 6, 0, 0.1), 0 }), 8, "raised error_rate digits:2 by cusum", 6, 6.5},
		"most fail, and none before":       {requests(func(h float64) (float64, float64, float64, float64) { return 10, 0.02, after(h, 1, 0, 0.9), 0 }), 2, "raised error_rate digits:2 by threshold", 1, 1.1},
		"data as it was":                   {data(func(float64) (bool, uint64) { return false, 0 }), 2, "", 0, 0},
		"data drifted long ago":            {data(func(float64) (bool, uint64) { return false, 7 }), 2, "", 0, 0},
		"data drifts":                      {data(func(h float64) (bool, uint64) { return h > 1, uint64(after(h, 1, 0, 1)) }), 2, "raised data_drift digits:2 by two-sample", 1, 1.01},
		"data that drifted is as it was":   {data(func(h float64) (bool, uint64) { return h > 1 && h < 1.5, uint64(after(h, 1, 0, 1)) }), 2, "cleared data_drift digits:2 by two-sample", 1.5, 1.51},
		"data drifted between two samples": {data(func(h float64) (bool, uint64) { return false, uint64(after(h, 1, 0, 1)) }), 2, "cleared data_drift digits:2 by two-sample", 1.16, 1.18},
		"power as it was":                  {func(_ float64, s *Sample) { s.Telemetry.PowerWatts = new(30 + 20**s.Telemetry.CpuUtilisation) }, 24, "", 0, 0},
		"power without a load": {func(h float64, s *Sample) {
			s.Telemetry.CpuUtilisation = nil
			s.Telemetry.PowerWatts = new(after(h, 6, 30, 60))
		}, 24, "", 0, 0},
		"a third more power": {func(h float64, s *Sample) { s.Telemetry.PowerWatts = new(after(h, 6, 30, 40)) }, 8, "raised power device by cusum", 6, 6.5},
		"power follows the load": {func(h float64, s *Sample) {
			u := 0.5 + 0.4*math.Sin(h)
			s.Telemetry.CpuUtilisation = new(u)
			s.Telemetry.PowerWatts = new(30 + 20*u)
		}, 48, "", 0, 0},
		"nothing but the processor's": {func(float64, *Sample) {}, 2, "", 0, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			seed.Seed(1, 2)
			run := newRun(Config{WarnCelsius: 0, SlowdownCelsius: 95, ReserveBytes: gib})
			for run.now.Hours() < tt.hours {
				h := (run.now + step).Hours()
				load := 0.5
				if name == "hotter because of the load" && h >= 1 {
					load = 0.9
				}
				s := Sample{Telemetry: &dunlinv1.Telemetry{CpuUtilisation: new(load)}}
				tt.put(h, &s)
				run.see(s)
			}
			if got := run.last(); got != tt.want {
				t.Fatalf("last was %q, want %q", got, tt.want)
			}
			if tt.want == "" {
				return
			}
			if at := run.at[len(run.at)-1].Hours(); at < tt.from || at > tt.to {
				t.Errorf("after %.3f hours, want %.3f to %.3f", at, tt.from, tt.to)
			}
			a := run.changes[len(run.changes)-1].Alarm
			if a.Message == "" || a.Severity < dunlinv1.Severity_SEVERITY_WARNING || a.RaisedAt == nil || (a.ClearedAt != nil) != strings.HasPrefix(tt.want, "cleared") {
				t.Errorf("alarm %v", a)
			}
			if len(a.Samples) > maxSamples || len(a.Samples) == 0 && a.Kind != RemappedRows {
				t.Errorf("%d samples", len(a.Samples))
			}
			if a.Method == byTrend && (a.SlopePerHour == nil || a.HoursToThreshold == nil || a.Threshold == nil) {
				t.Errorf("a trend without figures: %v", a)
			}
		})
	}
}

// An alarm that gets worse says so once, and keeps its time.
func TestWorse(t *testing.T) {
	r := newRun(Config{WarnCelsius: 80, SlowdownCelsius: 95})
	heat := func(celsius float64, minutes int) {
		for range minutes * 6 {
			r.see(Sample{Telemetry: &dunlinv1.Telemetry{Temperatures: []*dunlinv1.Temperature{{Sensor: "cpu", Celsius: celsius}}}})
		}
	}
	heat(85, 10)
	heat(96, 10)
	heat(60, 30)
	var got []Kind
	for _, c := range r.changes {
		got = append(got, c.Kind)
	}
	if len(got) != 3 || got[0] != Raised || got[1] != Worse || got[2] != Cleared {
		t.Fatalf("changes %v", got)
	}
	if !r.changes[0].Alarm.RaisedAt.AsTime().Equal(r.changes[1].Alarm.RaisedAt.AsTime()) {
		t.Errorf("raised at %v and %v", r.changes[0].Alarm.RaisedAt, r.changes[1].Alarm.RaisedAt)
	}
}

// Time stamps follow the clock when it is set; nothing else does.
func TestClock(t *testing.T) {
	r := newRun(Config{SlowdownCelsius: 95})
	wall := time.Unix(100, 0)
	see := func(celsius float64) {
		wall = wall.Add(step)
		r.see(Sample{Telemetry: &dunlinv1.Telemetry{At: timestamppb.New(wall), Temperatures: []*dunlinv1.Temperature{{Sensor: "cpu", Celsius: celsius}}}})
	}
	for range 10 {
		see(99)
	}
	if len(r.changes) != 1 {
		t.Fatalf("%d changes", len(r.changes))
	}
	wall = noon
	see(99)
	a := r.d.Alarms()[0]
	if since := wall.Sub(a.RaisedAt.AsTime()); since < 0 || since > 2*time.Minute {
		t.Errorf("raised %v before the step's end", since)
	}
	for _, s := range a.Samples {
		if since := wall.Sub(s.At.AsTime()); since < 0 || since > 5*time.Minute {
			t.Errorf("a sample of %v before", since)
		}
	}
	wall = wall.Add(-time.Hour)
	for range 120 {
		see(60)
	}
	if r.last() != "cleared temperature cpu by threshold" {
		t.Errorf("last was %q", r.last())
	}
	if c := r.changes[1].Alarm; c.ClearedAt.AsTime().Before(c.RaisedAt.AsTime()) {
		t.Errorf("cleared at %v, raised at %v", c.ClearedAt.AsTime(), c.RaisedAt.AsTime())
	}
}

// The alarms of a version that is unloaded are cleared; its next one begins
// anew.
func TestUnloaded(t *testing.T) {
	r := newRun(Config{})
	v := Version{Model: "digits", Version: 2}
	for range 60 {
		v.Failed += 100
		r.see(Sample{Telemetry: &dunlinv1.Telemetry{}, Versions: []Version{v}})
	}
	if r.last() != "raised error_rate digits:2 by threshold" {
		t.Fatalf("last was %q", r.last())
	}
	for range 60 {
		r.see(Sample{Telemetry: &dunlinv1.Telemetry{}})
	}
	if r.last() != "cleared error_rate digits:2 by threshold" || len(r.d.versions) != 0 {
		t.Errorf("last was %q, %d versions", r.last(), len(r.d.versions))
	}
	r.now += time.Minute
	r.see(Sample{Telemetry: &dunlinv1.Telemetry{}})
	if len(r.d.causes) != 0 {
		t.Errorf("%d causes are left", len(r.d.causes))
	}
}

// What is served while the load is lowered says nothing.
func TestLimited(t *testing.T) {
	r := newRun(Config{})
	v := Version{Model: "digits", Version: 2}
	for range 600 {
		v.Refused += 100
		r.see(Sample{Telemetry: &dunlinv1.Telemetry{}, Versions: []Version{v}, Limited: true})
	}
	if len(r.changes) != 0 {
		t.Errorf("%s", r.last())
	}
}

// Whatever the figures are: a cause has one alarm at most, which stays for ten
// minutes at least, gets worse twice at most, and all is bounded.
func TestHysteresis(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := New(Config{WarnCelsius: 80, SlowdownCelsius: 95, ReserveBytes: gib})
		raised := map[Key]time.Duration{}
		worse := map[Key]int{}
		now := time.Duration(0)
		var v Version
		v.Model = "m"
		var uncorrected uint64
		for range rapid.IntRange(1, 40).Draw(t, "phases") {
			celsius := rapid.Float64Range(70, 100).Draw(t, "celsius")
			free := rapid.Uint64Range(0, 2*gib).Draw(t, "free")
			used := rapid.Uint64Range(7*gib, 8*gib).Draw(t, "used")
			failed := rapid.Uint64Range(0, 50).Draw(t, "failed")
			refused := rapid.Uint64Range(0, 100).Draw(t, "refused")
			failing := rapid.Bool().Draw(t, "remap failed")
			uncorrected += rapid.Uint64Range(0, 1).Draw(t, "uncorrected")
			for range rapid.IntRange(1, 60).Draw(t, "samples") {
				now += step * time.Duration(rapid.SampledFrom([]int{1, 1, 1, 1, 2, 30}).Draw(t, "gap"))
				v.Succeeded, v.Failed, v.Refused = v.Succeeded+50-failed, v.Failed+failed, v.Refused+refused
				changes := d.Observe(now, Sample{Versions: []Version{v}, Telemetry: &dunlinv1.Telemetry{
					At: timestamppb.New(noon.Add(now)), DiskFreeBytes: new(free), MemoryTotalBytes: new(uint64(8 * gib)), MemoryUsedBytes: new(used),
					Temperatures: []*dunlinv1.Temperature{{Sensor: "cpu", Celsius: celsius}, {Sensor: "cpu", Celsius: 20}},
					Gpus:         []*dunlinv1.GpuTelemetry{{EccUncorrected: new(uncorrected), RemapFailed: new(failing)}},
				}})
				for _, c := range changes {
					k := Key{c.Alarm.Kind, c.Alarm.Subject}
					since, on := raised[k]
					switch {
					case c.Kind == Raised && !on:
						raised[k], worse[k] = now, 0
					case c.Kind == Worse && on && worse[k] < 2:
						worse[k]++
					case c.Kind == Cleared && on && now-since >= minRaised:
						delete(raised, k)
					default:
						t.Fatalf("%v of %v, raised %v, since %v", c.Kind, k, on, now-since)
					}
				}
				if got := d.Alarms(); len(got) != len(raised) {
					t.Fatalf("%d alarms, want %d", len(got), len(raised))
				}
			}
		}
	})
}

// A sensor that goes away while it is hot is not hot for long, and does not
// have the load lowered for long.
func TestSensorGone(t *testing.T) {
	r, respond := newRun(Config{SlowdownCelsius: 80}), NewResponder(Throttle)
	see := func(sensors ...*dunlinv1.Temperature) Load {
		r.see(Sample{Telemetry: &dunlinv1.Telemetry{Temperatures: sensors}})
		pressing, hot := r.d.Pressing()
		return respond.Decide(r.now, len(pressing) > 0, hot)
	}
	for range 6 {
		see(&dunlinv1.Temperature{Sensor: "cpu", Celsius: 85})
	}
	gone := r.now
	for r.now-gone < heatStays {
		if load := see(); load != steps[1] {
			t.Fatalf("%v without the sensor: %q, want %q", r.now-gone, load, steps[1])
		}
	}
	if load := see(); load != (Load{}) {
		t.Errorf("%v without the sensor: %q", r.now-gone, load)
	}
	if load := see(&dunlinv1.Temperature{Sensor: "cpu", Celsius: 85}); load != steps[1] {
		t.Errorf("hot again: %q", load)
	}
}

// A version that is replaced, or runs otherwise, is no trouble of the device
// where it takes longer; one that is loaded again is the same.
func TestForm(t *testing.T) {
	for name, tt := range map[string]struct {
		form  Form
		alarm bool
	}{
		"the same": {Form{1, 8, 2, 4}, true}, "out for a while": {Form{1, 8, 2, 0}, true},
		"other files": {Form{2, 8, 2, 4}, false}, "other batches": {Form{1, 4, 2, 4}, false}, "other instances": {Form{1, 8, 1, 4}, false}, "other threads": {Form{1, 8, 2, 1}, false},
	} {
		r, v := newRun(Config{}), Version{Model: "m", Version: 1, Form: Form{1, 8, 2, 4}}
		serve := func(hours int, each time.Duration) {
			for range hours * 360 {
				v.Succeeded += 20
				v.Time, v.Run = v.Time+20*each, v.Run+20*each
				r.see(Sample{Telemetry: &dunlinv1.Telemetry{}, Versions: []Version{v}})
			}
		}
		serve(6, 10*time.Millisecond)
		v = Version{Model: "m", Version: 1, Form: tt.form}
		serve(3, 20*time.Millisecond)
		if got := len(r.d.Alarms()) > 0; got != tt.alarm {
			t.Errorf("%s: alarms %v", name, r.d.Alarms())
		}
		// The alarm about what was there before is over.
		v.Form.Generation = 3
		serve(1, 20*time.Millisecond)
		if len(r.d.Alarms()) > 0 {
			t.Errorf("%s, and replaced: alarms %v", name, r.d.Alarms())
		}
	}
}

// The limits of a class are about the chip that computes.
func TestDies(t *testing.T) {
	for name, want := range map[string]bool{
		"cpu-thermal": true, "cpu_thermal temp1": true, "CPU-therm": true, "GPU-therm": true, "soc0-thermal": true, "tj-thermal": true, "gpuss-0-thermal": true,
		"bigcore0-thermal": true, "package-thermal": true, "x86_pkg_temp": true, "coretemp Package id 0": true, "k10temp Tctl": true,
		"nvme Composite": false, "rp1_adc temp1": false, "PMIC-Die": false, "acpitz": false, "iwlwifi_1": false, "nct6775 CPUTIN": false, "pch_skylake": false,
		"amdgpu edge": false, "drivetemp temp1": false, "thermal_zone0": false, "": false,
	} {
		r := newRun(Config{SlowdownCelsius: 80, WarnCelsius: 70})
		for range 60 {
			r.see(Sample{Telemetry: &dunlinv1.Telemetry{Temperatures: []*dunlinv1.Temperature{{Sensor: name, Celsius: 85}}}})
		}
		if pressing, _ := r.d.Pressing(); len(pressing) > 0 != want || len(r.d.Alarms()) > 0 != want {
			t.Errorf("%q at 85 °C: %v, alarms %v", name, pressing, r.d.Alarms())
		}
	}
}

// There is a bound for everything that a name from outside makes.
func TestBounds(t *testing.T) {
	d := New(Config{SlowdownCelsius: 90})
	long := strings.Repeat("ä", 200)
	for i := range 50 {
		now := time.Duration(i+1) * step
		telemetry := &dunlinv1.Telemetry{At: timestamppb.New(noon.Add(now))}
		s := Sample{Telemetry: telemetry}
		for j := range 300 {
			telemetry.Temperatures = append(telemetry.Temperatures, &dunlinv1.Temperature{Sensor: "cpu " + string(rune('a'+i%26)) + string(rune('A'+j)) + long, Celsius: 99})
			telemetry.Gpus = append(telemetry.Gpus, &dunlinv1.GpuTelemetry{Index: uint32(1000*i + j), RemapFailed: new(true), PowerWatts: new(9.), Utilisation: new(0.5)})
			s.Versions = append(s.Versions, Version{Model: long, Version: int64(i*1000 + j)})
		}
		d.Observe(now, s)
		if n := len(d.Alarms()); n > maxRaised {
			t.Fatalf("%d alarms", n)
		}
		for _, n := range []int{len(d.causes), len(d.sensors), len(d.gpus), len(d.powers), len(d.versions)} {
			if n > maxSubjects {
				t.Fatalf("%d are watched", n)
			}
		}
	}
	if d.raised != maxRaised || len(d.Alarms()) != maxRaised {
		t.Errorf("%d alarms are raised", d.raised)
	}
	for k := range d.causes {
		if len(k.Subject) > maxName+24 {
			t.Fatalf("a name of %d bytes", len(k.Subject))
		}
	}
}

// Crazy samples do no harm, and no alarm carries a figure that is none.
func FuzzObserve(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 250, 251, 252, 253, 254, 255})
	f.Add([]byte(strings.Repeat("\x00\xff\x7f\x80", 64)))
	f.Fuzz(func(t *testing.T, b []byte) {
		i := 0
		next := func() byte {
			if i++; i <= len(b) {
				return b[i-1]
			}
			return 0
		}
		number := func() float64 {
			return []float64{0, 1, -1, 50, 95.5, 1e300, -1e300, math.NaN(), math.Inf(1), math.Inf(-1), 0.5, float64(next())}[next()%12]
		}
		float := func() *float64 {
			if next()%4 == 0 {
				return nil
			}
			return new(number())
		}
		count := func() *uint64 {
			if next()%4 == 0 {
				return nil
			}
			return new([]uint64{0, 1, 2, 1 << 30, 1 << 40, math.MaxUint64, uint64(next())}[next()%7])
		}
		some := func() uint64 {
			if n := count(); n != nil {
				return *n
			}
			return 0
		}
		d := New(Config{WarnCelsius: number(), SlowdownCelsius: number(), ReserveBytes: some()})
		now := time.Duration(0)
		for i < len(b) {
			now += time.Duration(int8(next())) * time.Duration([]int{1, 10, 600, 1e9}[next()%4]) * time.Second / 10
			telemetry := &dunlinv1.Telemetry{
				At: &timestamppb.Timestamp{Seconds: int64(some())}, CpuUtilisation: float(), PowerWatts: float(), DiskWear: float(), DiskFreeBytes: count(),
				MemoryTotalBytes: count(), MemoryUsedBytes: count(), AgentAnonymousBytes: count(), ModelMemoryUsedBytes: count(),
				Temperatures: []*dunlinv1.Temperature{nil, {Sensor: string(b[:min(3, len(b))]), Celsius: number()}},
				Gpus: []*dunlinv1.GpuTelemetry{nil, {
					Index: uint32(next() % 2), Utilisation: float(), PowerWatts: float(), Celsius: float(), SlowdownCelsius: float(),
					EccCorrected: count(), EccUncorrected: count(), XidCount: count(), LastXid: count(), RetiredPages: new(uint32(some())),
				}},
			}
			v := Version{Model: "m", Version: int64(next() % 2), Succeeded: some(), Failed: some(), Refused: some(), Time: time.Duration(some()), Run: time.Duration(some())}
			for _, c := range d.Observe(now, Sample{Telemetry: telemetry, Versions: []Version{v, v}}) {
				for _, p := range []*float64{c.Alarm.Threshold, c.Alarm.SlopePerHour, c.Alarm.HoursToThreshold} {
					if p != nil && (math.IsNaN(*p) || math.IsInf(*p, 0)) {
						t.Errorf("%v", c.Alarm)
					}
				}
				for _, s := range c.Alarm.Samples {
					if math.IsNaN(s.Value) || math.IsInf(s.Value, 0) {
						t.Errorf("%v", c.Alarm)
					}
				}
			}
		}
	})
}

// BenchmarkObserve is a device with two GPUs, four sensors and eight versions;
// at one sample each 10 s, 2 ms of it are 0.02 % of a core.
func BenchmarkObserve(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	d := New(Config{SlowdownCelsius: 95, ReserveBytes: gib})
	var versions []Version
	for i := range 8 {
		versions = append(versions, Version{Model: "m", Version: int64(i)})
	}
	now := time.Duration(0)
	for b.Loop() {
		now += step
		use := 0.5 + 0.3*r.Float64()
		t := &dunlinv1.Telemetry{
			At: timestamppb.New(noon.Add(now)), CpuUtilisation: new(use), PowerWatts: new(20 + 30*use), DiskFreeBytes: new(uint64(50*gib - float64(gib)*now.Hours()/10)), DiskWear: new(0.1),
			MemoryTotalBytes: new(uint64(8 * gib)), MemoryUsedBytes: new(uint64(4*gib + gib*r.Float64()/10)), AgentAnonymousBytes: new(uint64(gib)),
		}
		for _, name := range []string{"cpu a", "cpu b", "cpu c", "cpu d"} {
			t.Temperatures = append(t.Temperatures, &dunlinv1.Temperature{Sensor: name, Celsius: math.Round(50 + 20*use)})
		}
		for i := range 2 {
			t.Gpus = append(t.Gpus, &dunlinv1.GpuTelemetry{Index: uint32(i), Utilisation: new(use), PowerWatts: new(70 * use), Celsius: new(60.), EccCorrected: new(uint64(1)), EccUncorrected: new(uint64(0))})
		}
		for i := range versions {
			v := &versions[i]
			v.Succeeded += 100
			v.Time += time.Duration(100 * (0.02 + 0.001*r.Float64()) * float64(time.Second))
			v.Run += 100 * 18 * time.Millisecond
		}
		d.Observe(now, Sample{Telemetry: t, Versions: versions})
	}
}
