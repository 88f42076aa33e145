package store

import (
	"fmt"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/internal/audit"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// forget runs a step until it has nothing more to do.
func forget(t *testing.T, step func() (bool, error)) {
	t.Helper()
	for again := true; again; {
		var err error
		again, err = step()
		must(t, err)
	}
}

// TestTelemetry keeps two days of samples of a device: minutes become tens of
// minutes and hours, means and peaks are right, and what is asked for comes
// from the finest there is.
func TestTelemetry(t *testing.T) {
	s, c := fresh(t)
	join(t, s, "dev", nil)
	join(t, s, "other", nil)
	keep := TelemetryKeep{2 * time.Hour, 24 * time.Hour, 400 * 24 * time.Hour}
	start := c.now
	var samples []Sample
	for minute := range 48 * 60 {
		at := start.Add(time.Duration(minute) * time.Minute)
		c.now = at
		samples = append(samples, Sample{"dev", at, &dunlinv1.Telemetry{
			CpuUtilisation: new(float64(minute % 60)), RequestP99Seconds: new(float64(minute % 60)), MemoryUsedBytes: new(uint64(minute % 10)), BootId: fmt.Sprint(minute),
			Temperatures: []*dunlinv1.Temperature{{Sensor: "a", Celsius: float64(minute % 10)}}, EnergyJoules: new(float64(minute)),
			Gpus:   []*dunlinv1.GpuTelemetry{{Celsius: new(float64(minute % 10)), PowerWatts: new(float64(minute % 2)), Processes: []*dunlinv1.GpuProcess{{Pid: 1}}}},
			Alarms: []*dunlinv1.Alarm{{Kind: "ecc", Message: "long", Samples: make([]*dunlinv1.AlarmSample, 3)}}, Faults: []string{"x"},
		}})
		if minute%2 == 0 {
			samples = append(samples, Sample{"other", at, &dunlinv1.Telemetry{}})
		}
		if minute%30 == 29 {
			must(t, s.AddTelemetry(t.Context(), samples))
			samples = nil
			forget(t, func() (bool, error) { return s.RollTelemetry(t.Context()) })
			forget(t, func() (bool, error) { return s.PruneTelemetry(t.Context(), keep) })
		}
	}
	get := func(from, until time.Time, limit int) []*dunlinv1.Telemetry {
		t.Helper()
		samples, err := s.Telemetry(t.Context(), "dev", from, until, limit)
		must(t, err)
		return samples
	}
	end := start.Add(48 * time.Hour)
	all := get(start, end, 2000)
	// 24 hours by hours, 22 by tens of minutes, 2 by minutes; slots are whole.
	if n := len(all); n < 24+22*6+120-10 || n > 24+22*6+120+10 {
		t.Errorf("%d samples", n)
	}
	for i := 1; i < len(all); i++ {
		if !all[i].At.AsTime().After(all[i-1].At.AsTime()) {
			t.Fatalf("sample %d is of %v, the one before of %v", i, all[i].At.AsTime(), all[i-1].At.AsTime())
		}
	}
	hour := all[3]
	if hour.GetCpuUtilisation() != 29.5 || hour.GetRequestP99Seconds() != 59 || hour.GetMemoryUsedBytes() != 4 || hour.GetTemperatures()[0].GetCelsius() != 9 ||
		hour.GetGpus()[0].GetCelsius() != 9 || hour.GetGpus()[0].GetPowerWatts() != 0.5 || hour.GetEnergyJoules() != 239 || hour.GetBootId() != "239" {
		t.Errorf("the fourth hour is %v", hour)
	}
	last := all[len(all)-1]
	if last.GetCpuUtilisation() != 59 || !last.At.AsTime().Equal(end.Add(-time.Minute)) {
		t.Errorf("the last minute is %v", last)
	}
	if a := last.GetAlarms()[0]; a.GetKind() != "ecc" || a.GetMessage() != "" || len(a.GetSamples()) > 0 || len(last.GetFaults()) > 0 || len(last.GetGpus()[0].GetProcesses()) > 0 {
		t.Errorf("too much is kept: %v", last)
	}
	if n := len(get(end.Add(-10*time.Minute), end, 500)); n != 10 {
		t.Errorf("%d samples of the last 10 minutes", n)
	}
	if n := len(get(end.Add(-90*time.Minute), end.Add(-60*time.Minute), 500)); n != 30 {
		t.Errorf("%d samples of half an hour", n)
	}
	for _, limit := range []int{1, 7, 100} {
		thinned := get(start, end, limit)
		if len(thinned) > limit || len(thinned) < limit/2 {
			t.Errorf("%d samples, the limit is %d", len(thinned), limit)
		}
	}
	if n := len(get(end, start, 10)) + len(get(end.Add(time.Hour), end.Add(2*time.Hour), 10)); n != 0 {
		t.Errorf("%d samples of no time", n)
	}
	_, err := s.Telemetry(t.Context(), "none", start, end, 1)
	is(t, err, ErrNotFound)

	// A device that takes the name has none of the history.
	must(t, s.RemoveDevice(t.Context(), "user:test", "dev"))
	c.now = end
	join(t, s, "dev", nil)
	if n := len(get(start, end.Add(time.Hour), 100)); n != 0 {
		t.Errorf("%d samples of another device", n)
	}
	// In the end all of it goes.
	c.now = end.Add(500 * 24 * time.Hour)
	forget(t, func() (bool, error) { return s.PruneTelemetry(t.Context(), keep) })
	var rows int
	must(t, s.reader.QueryRow("SELECT count(*) FROM telemetry").Scan(&rows))
	if rows != 0 {
		t.Errorf("%d samples are left", rows)
	}
}

// TestTelemetryLate: a controller that was away for long goes on where it
// stopped, in bounded steps, and a sample that is too long loses its details.
func TestTelemetryLate(t *testing.T) {
	s, c := fresh(t)
	join(t, s, "dev", nil)
	long := &dunlinv1.Telemetry{CpuUtilisation: new(0.5)}
	for range 500 {
		long.Models = append(long.Models, &dunlinv1.ModelTelemetry{Model: "a-name-of-a-model", NeedBytes: math.MaxUint32})
	}
	start := c.now
	for i := range 3 * telemetryStep {
		c.now = start.Add(time.Duration(i) * 10 * time.Minute)
		must(t, s.AddTelemetry(t.Context(), []Sample{{"dev", c.now, long}}))
	}
	if again, err := s.RollTelemetry(t.Context()); err != nil || !again {
		t.Errorf("all of it was done in one step: %v", err)
	}
	forget(t, func() (bool, error) { return s.RollTelemetry(t.Context()) })
	var tens, hours int
	must(t, s.reader.QueryRow("SELECT count(*) FILTER (WHERE span = 600), count(*) FILTER (WHERE span = 3600) FROM telemetry").Scan(&tens, &hours))
	if tens != 3*telemetryStep-2 || hours != 3*telemetryStep/6-1 {
		t.Errorf("%d tens of minutes, %d hours", tens, hours)
	}
	got, err := s.Telemetry(t.Context(), "dev", start, c.now, 10)
	must(t, err)
	if len(got) == 0 || len(got[0].GetModels()) > 0 || got[0].GetCpuUtilisation() != 0.5 {
		t.Errorf("got %v", got)
	}
}

func TestThin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		items := make([]int, rapid.IntRange(0, 200).Draw(t, "items"))
		for i := range items {
			items[i] = i
		}
		limit := rapid.IntRange(1, 50).Draw(t, "limit")
		got := thin(items, limit)
		if len(got) != min(len(items), limit) {
			t.Fatalf("%d of %d, the limit is %d", len(got), len(items), limit)
		}
		for i := 1; i < len(got); i++ {
			if got[i] <= got[i-1] {
				t.Fatalf("%v", got)
			}
		}
		if len(items) > 0 && got[len(got)-1] != len(items)-1 {
			t.Fatalf("the last is missing: %v", got)
		}
	})
}

// TestRetention forgets events and audit records by age. Neither can come
// again, and the audit log stays a chain.
func TestRetention(t *testing.T) {
	s, c := fresh(t)
	join(t, s, "dev", nil)
	start := c.now
	event := func(n uint64) []*dunlinv1.Event { return []*dunlinv1.Event{{Sequence: n, Kind: "test"}} }
	for n := uint64(1); n <= 10; n++ {
		c.now = start.Add(time.Duration(n) * 24 * time.Hour)
		_, _, err := s.AddEvents(t.Context(), "dev", "box", event(n))
		must(t, err)
		push(t, s, "model", fmt.Sprint("sha256:", n))
	}
	cut := start.Add(6 * 24 * time.Hour)
	forget(t, func() (bool, error) { return s.PruneEvents(t.Context(), cut) })
	events, err := s.Events(t.Context(), "dev", 100)
	must(t, err)
	if len(events) != 5 || events[4].Event.GetSequence() != 6 {
		t.Errorf("left are %v", events)
	}
	stored, _, err := s.AddEvents(t.Context(), "dev", "box", event(3))
	must(t, err)
	if stored != 10 {
		t.Errorf("a forgotten event came again: %d", stored)
	}
	// Also where all of them are forgotten.
	forget(t, func() (bool, error) { return s.PruneEvents(t.Context(), c.now.Add(time.Hour)) })
	if stored, _, err = s.AddEvents(t.Context(), "dev", "box", event(10)); err != nil || stored != 10 {
		t.Errorf("stored %d, %v", stored, err)
	}

	before, err := s.ListAudit(t.Context(), 0, 1000, false)
	must(t, err)
	forget(t, func() (bool, error) { return s.PruneAudit(t.Context(), cut) })
	after, err := s.ListAudit(t.Context(), 0, 1000, false)
	must(t, err)
	if len(after.Records) == 0 || after.Records[0].GetAt().AsTime().Before(cut) || len(after.Records) >= len(before.Records) {
		t.Errorf("%d records of %d are left", len(after.Records), len(before.Records))
	}
	chain := after.Anchor
	for _, r := range after.Records {
		if chain.Hash = audit.Hash(chain.Hash, r); string(chain.Hash[:]) != string(r.GetHash()) || r.GetNumber() != chain.Number+1 {
			t.Fatalf("record %d does not follow the one before", r.GetNumber())
		}
		chain.Number++
	}
	// The newest always stays: the next one follows it.
	forget(t, func() (bool, error) { return s.PruneAudit(t.Context(), c.now.Add(time.Hour)) })
	page, err := s.ListAudit(t.Context(), 0, 10, false)
	must(t, err)
	if len(page.Records) != 1 || page.Head != before.Head {
		t.Errorf("left are %d records, the head is %v", len(page.Records), page.Head)
	}
}

// BenchmarkTelemetry keeps one sample of each of 10,000 devices.
func BenchmarkTelemetry(b *testing.B) {
	s, err := Open(b.Context(), b.TempDir()+"/store.db", Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	samples := make([]Sample, 10_000)
	for i := range samples {
		samples[i] = Sample{Device: fmt.Sprintf("device-%05d", i), Telemetry: &dunlinv1.Telemetry{
			CpuUtilisation: new(0.25), MemoryUsedBytes: new(uint64(3 << 30)), MemoryTotalBytes: new(uint64(8 << 30)), DiskFreeBytes: new(uint64(5 << 30)), BootId: "abcdefghijklmnopqrstuvwxyz",
			Temperatures: []*dunlinv1.Temperature{{Sensor: "cpu-thermal", Celsius: 61}}, PowerWatts: new(7.5), EnergyJoules: new(123456.7), PowerSource: "rapl package-0",
			RequestsPerSecond: new(12.5), FailuresPerSecond: new(0.0), RequestP99Seconds: new(0.012), Models: []*dunlinv1.ModelTelemetry{{Model: "digits", Version: 2, Succeeded: 1000, MemoryBytes: 9 << 20}},
		}}
	}
	at := time.Now()
	for b.Loop() {
		at = at.Add(time.Minute)
		for i := range samples {
			samples[i].ReceivedAt = at
		}
		if err := s.AddTelemetry(b.Context(), samples); err != nil {
			b.Fatal(err)
		}
	}
}
