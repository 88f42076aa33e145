package dispatch

import (
	"math"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const mib = 1 << 20

// pushLarge makes a version with so many MiB of weights.
func (w *world) pushLarge(model string, weights uint64) store.Version {
	w.t.Helper()
	v, _, err := w.store.CreateVersion(w.t.Context(), store.Version{Model: model, Digest: rnd(), Size: int64(weights * mib), CreatedBy: "user:test",
		Bundle: &fleet.Bundle{WeightBytes: weights * mib, Costs: &models.Costs{}, Opset: 17}})
	w.must(err)
	return v
}

// helloLimited says hello from a device of class board with so many MiB.
func (w *world) helloLimited(device, session string, budget uint64) {
	w.t.Helper()
	w.up(device, link.Hello, &dunlinv1.Hello{BootId: "boot", Session: session, Info: &dunlinv1.DeviceInfo{
		FirmwareProfile: "board", DiskBytes: 1 << 40, Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: budget * mib, DiskReserveBytes: 10 * mib},
	}})
}

func profileOf(v store.Version, weights uint64) *dunlinv1.ModelProfile {
	return &dunlinv1.ModelProfile{Model: v.Model, Version: v.Version, Digest: v.Digest, FirmwareProfile: "board", WeightBytes: weights * mib,
		Latency: []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 0.01}}}
}

// event sends the event of a sequence and waits until it is acknowledged.
func (w *world) event(device string, sequence uint64, e *dunlinv1.Event) {
	w.t.Helper()
	e.Sequence = sequence
	w.up(device, link.Events, &dunlinv1.EventBatch{OutboxId: "o-" + device, Events: []*dunlinv1.Event{e}})
	w.bus.wait(w.t, "ack", 0, func(m message) bool {
		return isCommand(m, device, func(c *dunlinv1.Command) bool { return c.GetEventAck().GetSequence() == sequence })
	})
}

// A version that does not fit on a device is not sent to it; what it had
// stays, also after a restart, until there is room.
func TestRefused(t *testing.T) {
	w := fresh(t, defaultTiming)
	w.pushLarge("net", 20)
	w.pushLarge("net", 200)
	w.join("small")
	w.join("big")
	w.helloLimited("small", "s", 100)
	w.helloLimited("big", "s", 1000)
	w.apply("net", 1)
	w.desired("small", 0, hasVersion("net", 1))
	w.desired("big", 0, hasVersion("net", 1))

	id := w.apply("net", 2, "onFailure: halt")
	w.desired("big", 0, hasVersion("net", 2))
	r := w.rollout(id, ended(fleet.Halted))
	if !strings.Contains(r.Reason, "small (does not fit: it needs 20") || !strings.Contains(r.Reason, "weights 200.0 MiB") {
		t.Error(r.Reason)
	}
	had := func(device string, version int64) bool {
		docs, err := w.store.Documents(t.Context(), []string{device})
		w.must(err)
		versions := docs[device].GetVersions()
		return len(versions) == 1 && versions[0].GetVersion() == version
	}
	if !had("small", 1) || !had("big", 2) {
		t.Error("the wrong documents")
	}
	if got := w.d.Refused("small"); len(got) != 1 || got[0].Version != 2 || len(w.d.Refused("big")) != 0 {
		t.Errorf("refused are %v, %v", got, w.d.Refused("big"))
	}
	w.stop()

	w = start(t, w.path, defaultTiming)
	waitFor(t, func() bool { return len(w.d.Refused("small")) == 1 }, "refused after a restart")
	if !had("small", 1) {
		t.Error("the restart took the old version away")
	}
	w.helloLimited("small", "s2", 300)
	w.desired("small", 0, hasVersion("net", 2))
	waitFor(t, func() bool { return len(w.d.Refused("small")) == 0 }, "not refused any more")

	// The device takes less again: what it was given stays.
	w.helloLimited("small", "s3", 100)
	waitFor(t, func() bool {
		d, err := w.store.Device(t.Context(), "small")
		return err == nil && d.Info.GetLimits().GetHostMemoryBytes() == 100*mib
	}, "the new limits")
	w.push("probe")
	w.apply("probe", 1)
	w.desired("small", 0, func(_ *dunlinv1.Desired, doc *dunlinv1.DesiredDocument) bool {
		return hasVersion("probe", 1)(nil, doc) && hasVersion("net", 2)(nil, doc)
	})
}

// What one device measured decides for the others of its class, and a profile
// that is no good is left out of its event, which is acknowledged.
func TestProfiles(t *testing.T) {
	w := fresh(t, defaultTiming)
	v := w.pushLarge("net", 20)
	w.join("a")
	w.join("b")
	w.helloLimited("a", "s", 1000)
	w.event("a", 1, &dunlinv1.Event{Kind: ProfileKind, Model: "net", Version: 1, Message: "measured", Profile: profileOf(v, 500)})
	w.helloLimited("b", "s", 100)
	waitFor(t, func() bool {
		d, err := w.store.Device(t.Context(), "b")
		return err == nil && d.Info.GetLimits() != nil
	}, "the limits")
	id := w.apply("net", 1)
	r := w.rollout(id, ended(fleet.Failed))
	if !strings.Contains(r.Reason, "b (does not fit: it needs 500.0 MiB of memory") {
		t.Error(r.Reason)
	}
	// A better one from the same class gives it to b.
	w.event("a", 2, &dunlinv1.Event{Kind: ProfileKind, Profile: profileOf(v, 50)})
	w.desired("b", 0, hasVersion("net", 1))

	bad := map[string]func(*dunlinv1.ModelProfile){
		"no model":        func(p *dunlinv1.ModelProfile) { p.Model = "" },
		"a path":          func(p *dunlinv1.ModelProfile) { p.Model = "../net" },
		"no version":      func(p *dunlinv1.ModelProfile) { p.Version = 0 },
		"no digest":       func(p *dunlinv1.ModelProfile) { p.Digest = "" },
		"a wrong digest":  func(p *dunlinv1.ModelProfile) { p.Digest = "sha256:12" },
		"too many bytes":  func(p *dunlinv1.ModelProfile) { p.SessionBytes = math.MaxUint64 },
		"a long text":     func(p *dunlinv1.ModelProfile) { p.CpuModel = strings.Repeat("x", maxText+1) },
		"too many points": func(p *dunlinv1.ModelProfile) { p.Latency = make([]*dunlinv1.LatencyPoint, maxPoints+1) },
		"no number":       func(p *dunlinv1.ModelProfile) { p.ActivationColdSeconds = math.NaN() },
		"no number within": func(p *dunlinv1.ModelProfile) {
			p.Providers = []*dunlinv1.ProviderCheck{{MaxAbsoluteError: math.Inf(1)}}
		},
		"no rows":           func(p *dunlinv1.ModelProfile) { p.Latency[0].Rows = 0 },
		"a negative time":   func(p *dunlinv1.ModelProfile) { p.Latency[0].Seconds = -1 },
		"a large batch":     func(p *dunlinv1.ModelProfile) { p.Recommended = &dunlinv1.ModelSetting{Batch: maxRows + 1} },
		"a negative energy": func(p *dunlinv1.ModelProfile) { p.Points = []*dunlinv1.ProfilePoint{{JoulesPerRow: new(-1.0)}} },
	}
	sequence := uint64(2)
	for name, spoil := range bad {
		p := profileOf(v, 7)
		spoil(p)
		if checkProfile(p) == nil {
			t.Errorf("%s: taken", name)
		}
		sequence++
		w.event("a", sequence, &dunlinv1.Event{Kind: ProfileKind, Message: name, Profile: p})
	}
	w.event("a", sequence+1, &dunlinv1.Event{Kind: "other", Profile: profileOf(v, 7)})
	w.event("a", sequence+2, &dunlinv1.Event{Kind: "alarm.raised", Alarm: &dunlinv1.Alarm{Threshold: new(math.NaN())}})
	w.event("a", sequence+3, &dunlinv1.Event{Kind: "alarm.raised", Alarm: &dunlinv1.Alarm{Kind: "temperature", Samples: []*dunlinv1.AlarmSample{{Value: 80}}}})
	if n := count(t, w.metrics, "dunlin_controller_malformed_total", "profile"); n != float64(len(bad)+1) {
		t.Errorf("%v profiles are malformed", n)
	}
	profiles, err := w.store.Profiles(t.Context(), store.ProfileFilter{})
	if err != nil || len(profiles) != 1 || profiles[0].Profile.GetWeightBytes() != 50*mib || profiles[0].Device != "a" {
		t.Errorf("got %v, %v", profiles, err)
	}
	events, err := w.store.Events(t.Context(), "a", 100)
	w.must(err)
	if len(events) != len(bad)+5 {
		t.Errorf("%d events", len(events))
	}
	for _, e := range events {
		if e.Event.GetProfile() != nil {
			t.Error("an event keeps its profile")
		}
	}
	if got := events[0].Event.GetAlarm(); got.GetKind() != "temperature" || len(got.GetSamples()) != 1 || events[1].Event.GetAlarm() != nil {
		t.Errorf("alarms are %v, %v", got, events[1].Event.GetAlarm())
	}
}

// A device whose disk is full is given the version when there is room.
func TestDiskRoom(t *testing.T) {
	w := fresh(t, fast)
	w.join("dev")
	w.helloLimited("dev", "s", 1000)
	telemetry := func(free uint64) {
		w.up("dev", link.Telemetry, &dunlinv1.Telemetry{DiskFreeBytes: new(free * mib)})
		waitFor(t, func() bool {
			d, err := w.store.Device(t.Context(), "dev")
			return err == nil && d.DiskFree != nil && *d.DiskFree == free*mib
		}, "%d MiB free in the store", free)
	}
	telemetry(60)
	w.pushLarge("net", 100)
	id := w.apply("net", 1)
	r := w.rollout(id, ended(fleet.Failed))
	if !strings.Contains(r.Reason, "its files have 100.0 MiB, the disk has 60.0 MiB free, of which 10.0 MiB stay free") {
		t.Error(r.Reason)
	}
	telemetry(110)
	w.desired("dev", 0, hasVersion("net", 1))
}

func TestAlarmsAreBounded(t *testing.T) {
	for name, m := range map[string]*dunlinv1.Telemetry{
		"too many":         {Alarms: make([]*dunlinv1.Alarm, maxAlarms+1)},
		"too many samples": {Alarms: []*dunlinv1.Alarm{{Samples: make([]*dunlinv1.AlarmSample, maxSamples+1)}}},
		"no number":        {Alarms: []*dunlinv1.Alarm{{Samples: []*dunlinv1.AlarmSample{{Value: math.NaN()}}}}},
		"no temperature":   {Temperatures: []*dunlinv1.Temperature{{Celsius: math.Inf(-1)}}},
		"no utilisation":   {CpuUtilisation: new(math.NaN())},
	} {
		if err := checkTelemetry(m); err == nil {
			t.Errorf("%s: taken", name)
		} else if !strings.Contains(err.Error(), "alarms") && !strings.Contains(err.Error(), "is not a number") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkTelemetry(&dunlinv1.Telemetry{PowerWatts: new(5.0), Alarms: []*dunlinv1.Alarm{{Samples: make([]*dunlinv1.AlarmSample, maxSamples)}}}); err != nil {
		t.Error(err)
	}
}
