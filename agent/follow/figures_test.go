package follow

import (
	"math"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func ran(version int64, n uint64, busy time.Duration) engine.Status {
	s := engine.Status{ID: engine.VersionID{Model: "m", Version: version}}
	s.Figures.Success, s.Figures.Run = engine.Total{Count: n, Time: busy}, engine.Total{Count: n, Time: busy}
	s.Figures.Latency = make(sketch.Counts, sketch.Latency.Buckets())
	s.Figures.Latency[5] = n
	s.Figures.Inferences = n
	return s
}

// A version that takes twice the time of another for a row has twice its
// energy, however busy either of them is, and keeps it when it is unloaded.
func TestEnergy(t *testing.T) {
	const idle = 5.
	f := newFigures(idle)
	now, joules := time.Unix(1e9, 0), 100.
	sample := func(seconds, watts float64, versions ...engine.Status) {
		now, joules = now.Add(time.Duration(seconds*float64(time.Second))), joules+seconds*watts
		f.observe(&dunlinv1.Telemetry{At: timestamppb.New(now), EnergyJoules: new(joules)}, versions)
	}
	of := func(versions ...engine.Status) map[int64]float64 {
		all := map[int64]float64{}
		for _, m := range f.telemetry(versions, true) {
			all[m.Version] = m.GetFigures().GetJoules()
		}
		return all
	}
	near := func(what string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 1e-6 {
			t.Errorf("%s: %v J, want %v", what, got, want)
		}
	}
	sample(0, 0, ran(1, 100, time.Second)) // what came before it is not known
	near("at first", of(ran(1, 100, time.Second))[1], 0)
	// At full work the device takes 15 W: 4 s of runs in 10 s.
	sample(10, idle+4, ran(1, 500, 5*time.Second))
	near("100 ms a row", of(ran(1, 500, 5*time.Second))[1], 4*15)
	// Two versions, one of them at half the rows and twice the time.
	sample(10, idle+8, ran(1, 900, 9*time.Second), ran(2, 200, 4*time.Second))
	got := of(ran(1, 900, 9*time.Second), ran(2, 200, 4*time.Second))
	near("the first", got[1], 4*15+4*15)
	near("the second", got[2], 4*15)
	// It is unloaded, and loaded again, with counts from 0.
	f.retire(engine.VersionID{Model: "m", Version: 2}, ran(2, 300, 6*time.Second).Figures)
	sample(10, idle+2, ran(1, 900, 9*time.Second))
	near("unloaded", of(ran(1, 900, 9*time.Second))[2], 6*15)
	sample(10, idle+1, ran(1, 900, 9*time.Second), ran(2, 50, time.Second))
	near("loaded again", of(ran(1, 900, 9*time.Second), ran(2, 50, time.Second))[2], 7*15)
	// The device's count begins anew: that time is not known.
	joules = 0
	sample(10, 1, ran(1, 1000, 10*time.Second))
	near("after a gap", of(ran(1, 1000, 10*time.Second))[1], 8*15)
	all := f.telemetry([]engine.Status{ran(1, 1000, 10*time.Second), ran(2, 50, time.Second)}, true)
	if len(all) != 2 || all[1].Succeeded != 350 || all[1].Figures.Rows != 350 || sketch.Latency.FromProto(all[1].Figures.Latency)[5] != 350 {
		t.Errorf("counts %v", all)
	}
	if all := f.telemetry(nil, false); len(all) != 0 {
		t.Errorf("without a lease: %v", all)
	}
	// What does not measure it says nothing.
	if m := newFigures(0).telemetry([]engine.Status{ran(1, 1, 1)}, true); m[0].Figures.Joules != nil {
		t.Errorf("%v", m)
	}
}

// Without a figure of the class, the least power of a time without runs is that
// of the idle device; GPUs stand in for a device that only measures them.
func TestEnergyIdle(t *testing.T) {
	f := newFigures(0)
	now, joules := time.Unix(1e9, 0), 0.
	sample := func(watts float64, v engine.Status) float64 {
		now, joules = now.Add(10*time.Second), joules+10*watts
		f.observe(&dunlinv1.Telemetry{At: timestamppb.New(now), Gpus: []*dunlinv1.GpuTelemetry{{EnergyJoules: new(joules / 2)}, {EnergyJoules: new(joules / 2)}}}, []engine.Status{v})
		return f.telemetry([]engine.Status{v}, true)[0].GetFigures().GetJoules()
	}
	sample(7, ran(1, 0, 0))
	sample(6, ran(1, 0, 0))
	sample(7, ran(1, 0, 0))
	if got := sample(7, ran(1, 10, time.Second)); math.Abs(got-(10+6)) > 1e-6 {
		t.Errorf("%v J, want the 10 above idle and the 6 of a second", got)
	}
}

// A version that is unloaded while a sample is made counts once.
func TestRetiredMeanwhile(t *testing.T) {
	f := newFigures(0)
	counted := func(versions ...engine.Status) (n uint64) {
		for _, m := range f.telemetry(versions, true) {
			n += m.Succeeded
		}
		return n
	}
	one, two := ran(1, 100, time.Second), ran(2, 10, time.Second)
	f.retire(one.ID, one.Figures) // before: it counts on
	f.begin()
	f.retire(one.ID, one.Figures) // after what is loaded was looked at
	f.retire(two.ID, two.Figures) // before that
	if n := counted(one); n != 210 {
		t.Errorf("%d are counted in the sample, want 210", n)
	}
	f.end()
	if n := counted(); n != 210 {
		t.Errorf("%d are counted after it, want 210", n)
	}
}

func TestRetiredIsBounded(t *testing.T) {
	f := newFigures(0)
	for i := range int64(maxRetired + 50) {
		f.retire(engine.VersionID{Model: "m", Version: i}, ran(i, 1, 1).Figures)
	}
	if len(f.retired) != maxRetired || len(f.order) != maxRetired || len(f.telemetry(nil, true)) != maxRetired {
		t.Errorf("%d are kept", len(f.retired))
	}
	// Which are forgotten is by when they were unloaded last.
	first := f.order[0]
	f.retire(first, ran(1, 1, 1).Figures)
	f.retire(engine.VersionID{Model: "other", Version: 1}, ran(1, 1, 1).Figures)
	if f.retired[first].succeeded != 2 {
		t.Errorf("what was unloaded just now is forgotten")
	}
}

func TestFit(t *testing.T) {
	f := newFigures(0)
	var versions []engine.Status
	for i := range int64(1000) {
		v := ran(i, 1, 1)
		for b := range v.Figures.Latency {
			v.Figures.Latency[b] = 1 << 20
		}
		versions = append(versions, v)
	}
	sample := &dunlinv1.Telemetry{Models: f.telemetry(versions, true)}
	whole := proto.Size(sample)
	fit(sample, link.MaxPayload/2)
	if size := proto.Size(sample); whole <= link.MaxPayload/2 || size > link.MaxPayload/2 {
		t.Errorf("%d bytes, of %d", size, whole)
	}
	if sample.Models[0].Figures == nil || len(sample.Models) != 1000 {
		t.Error("too much was left out")
	}
}

// What an alarm rests on is left out where the controller has had it, and not
// where it was left out for its size.
func TestWithhold(t *testing.T) {
	s := &sender{}
	sample := func() *dunlinv1.Telemetry {
		return &dunlinv1.Telemetry{Alarms: []*dunlinv1.Alarm{{Kind: "heat", Samples: []*dunlinv1.AlarmSample{{Value: 1}}}}}
	}
	send := func(most int) (had int) {
		x := sample()
		s.withhold(x)
		fit(x, most)
		s.sends(x)
		return len(x.Alarms[0].Samples)
	}
	for i, tt := range []struct{ most, want int }{{1, 0}, {1000, 1}, {1000, 0}, {1, 0}, {1000, 0}} {
		if had := send(tt.most); had != tt.want {
			t.Errorf("message %d has %d values, want %d", i, had, tt.want)
		}
	}
}

func TestLeaseBounds(t *testing.T) {
	for l, want := range map[*dunlinv1.TelemetryLease]lease{
		{}:                              {time.Second, 0},
		{EveryMs: 2000, ForMs: 60000}:   {2 * time.Second, time.Minute},
		{EveryMs: 1, ForMs: 1 << 31}:    {time.Second, 10 * time.Minute},
		{EveryMs: 1 << 31, ForMs: 1000}: {time.Minute, time.Second},
	} {
		if got := leaseOf(l); got != want {
			t.Errorf("%v: %v, want %v", l, got, want)
		}
	}
}
