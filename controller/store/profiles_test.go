package store

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func profile(model, digest string, weights uint64) *dunlinv1.ModelProfile {
	return &dunlinv1.ModelProfile{Model: model, Version: 1, Digest: digest, FirmwareProfile: "board", WeightBytes: weights, SessionBytes: 5,
		WorkspaceFixedBytes: 6, WorkspaceRowBytes: 7, Recommended: &dunlinv1.ModelSetting{Provider: "cpu", Batch: 8},
		Latency: []*dunlinv1.LatencyPoint{{Rows: 1, Seconds: 0.002}, {Rows: 8, Seconds: 0.008}},
		Points: []*dunlinv1.ProfilePoint{
			{Setting: &dunlinv1.ModelSetting{Provider: "cpu", Batch: 8}, P50Seconds: 0.008, JoulesPerRow: new(0.5)},
			{Setting: &dunlinv1.ModelSetting{Provider: "cpu", Batch: 1}, P50Seconds: 0.002, JoulesPerRow: new(0.75)},
			{Setting: &dunlinv1.ModelSetting{Provider: "gpu", Batch: 1}, P50Seconds: 0.001, JoulesPerRow: new(0.1)},
		}}
}

// add stores the next event of a device, with a profile.
func add(t *testing.T, s *Store, device string, sequence uint64, p *dunlinv1.ModelProfile) (measured bool) {
	t.Helper()
	stored, measured, err := s.AddEvents(t.Context(), device, "o-"+device, []*dunlinv1.Event{{Sequence: sequence, Kind: "profile.measured", Message: "m", Profile: p}})
	must(t, err)
	if stored != sequence {
		t.Fatalf("stored up to %d", stored)
	}
	return measured
}

func TestProfiles(t *testing.T) {
	s, clock := fresh(t)
	ctx := t.Context()
	for name, info := range map[string]*dunlinv1.DeviceInfo{
		"a": {FirmwareProfile: "board"}, "b": {FirmwareProfile: "board"}, "liar": {FirmwareProfile: "desk"}, "made-up": {FirmwareProfile: "board", Simulated: true},
	} {
		join(t, s, name, nil)
		_, _, err := s.Hello(ctx, name, &dunlinv1.Hello{Session: "s", Info: info})
		must(t, err)
	}
	push(t, s, "net", "other")
	push(t, s, "net", "d1") // version 2 here, version 1 where the device had it from
	_, err := s.Apply(ctx, "user:op", parse(t, deployment("dep", "net", 2, "")), false)
	must(t, err)
	if !add(t, s, "a", 1, profile("net", "d1", 100)) {
		t.Error("the first is no news")
	}
	clock.now = clock.now.Add(time.Second)
	same := profile("net", "d1", 100)
	same.Points, same.MeasuredSeconds = nil, 3
	if add(t, s, "a", 2, same) {
		t.Error("the same needs are news")
	}
	if !add(t, s, "b", 1, profile("net", "d1", 200)) || !add(t, s, "b", 2, profile("lost", "d9", 1)) {
		t.Error("no news of b")
	}
	if add(t, s, "b", 2, profile("net", "d1", 900)) {
		t.Error("an event that was stored before is news")
	}
	events, err := s.Events(ctx, "a", 10)
	if err != nil || len(events) != 2 || events[0].Event.GetProfile() != nil || events[0].Event.GetMessage() != "m" {
		t.Errorf("events %v, %v", events, err)
	}
	names := func(f ProfileFilter) string {
		all, err := s.Profiles(ctx, f)
		must(t, err)
		var out []string
		for _, p := range all {
			out = append(out, fmt.Sprintf("%s:%d@%s=%d", p.Profile.GetModel(), p.Profile.GetVersion(), p.Device, p.Profile.GetWeightBytes()))
		}
		return strings.Join(out, " ")
	}
	for want, f := range map[string]ProfileFilter{
		"lost:1@b=1 net:2@a=100 net:2@b=200": {},
		"net:2@a=100 net:2@b=200":            {Model: "net", Version: 2},
		"net:2@a=100":                        {Device: "a", Class: "board"},
		"lost:1@b=1":                         {Version: 1},
		"":                                   {Class: "desk"},
	} {
		if got := names(f); got != want {
			t.Errorf("%+v: got %q, want %q", f, got, want)
		}
	}
	snap, err := s.Snapshot(ctx)
	must(t, err)
	want := []fleet.Measurement{
		{Device: "a", Class: "board", Model: "net", Digest: "d1", ReceivedAt: clock.now, Weights: 100, Session: 5, Fixed: 6, Row: 7, Batch: 8, Latency: 2 * time.Millisecond},
		{Device: "b", Class: "board", Model: "net", Digest: "d1", ReceivedAt: clock.now, Weights: 200, Session: 5, Fixed: 6, Row: 7, Batch: 8, Latency: 2 * time.Millisecond, Joules: 0.75},
	}
	if !slices.Equal(snap.Objects.Measured, want) {
		t.Errorf("measured %+v", snap.Objects.Measured)
	}

	// Who is of another class, or simulated, speaks for itself only.
	add(t, s, "liar", 1, profile("net", "d1", 1<<40))
	add(t, s, "made-up", 1, profile("net", "d1", 1<<40))
	snap, err = s.Snapshot(ctx)
	must(t, err)
	for _, m := range snap.Objects.Measured {
		if (m.Device == "liar" || m.Device == "made-up") && m.Class != "" {
			t.Errorf("measured %+v", m)
		}
	}
	must(t, s.RemoveDevice(ctx, "user:op", "liar"))
	must(t, s.RemoveDevice(ctx, "user:op", "made-up"))

	must(t, s.RemoveDevice(ctx, "user:op", "a"))
	if got := names(ProfileFilter{Model: "net"}); got != "net:2@b=200" {
		t.Errorf("after device a was removed: %s", got)
	}
	_, err = s.writer.ExecContext(ctx, "DELETE FROM versions WHERE model = 'net' AND version = 2")
	must(t, err)
	if got := names(ProfileFilter{}); got != "lost:1@b=1" {
		t.Errorf("after the version was removed: %s", got)
	}
}

func TestProfilesAreBounded(t *testing.T) {
	s, clock := fresh(t)
	join(t, s, "a", nil)
	join(t, s, "b", nil)
	var batch []*dunlinv1.Event
	for i := range MaxProfiles {
		batch = append(batch, &dunlinv1.Event{Sequence: uint64(i + 1), Kind: "profile.measured", Profile: profile("net", fmt.Sprint("d", i), 1)})
	}
	_, _, err := s.AddEvents(t.Context(), "a", "o-a", batch[:1])
	must(t, err)
	clock.now = clock.now.Add(time.Second)
	_, _, err = s.AddEvents(t.Context(), "a", "o-a", batch[1:])
	must(t, err)
	clock.now = clock.now.Add(time.Second)
	add(t, s, "a", MaxProfiles+1, profile("net", "newest", 1))
	add(t, s, "b", 1, profile("net", "d0", 1))
	all, err := s.Profiles(t.Context(), ProfileFilter{Device: "a"})
	must(t, err)
	if len(all) != MaxProfiles || slices.ContainsFunc(all, func(p DeviceProfile) bool { return p.Profile.GetDigest() == "d0" }) {
		t.Errorf("%d profiles", len(all))
	}
	if all, err := s.Profiles(t.Context(), ProfileFilter{Device: "b"}); err != nil || len(all) != 1 {
		t.Errorf("b has %v, %v", all, err)
	}
}

// Suppose shows what Apply would make, and changes nothing.
func TestSuppose(t *testing.T) {
	s, _ := fresh(t)
	ctx := t.Context()
	push(t, s, "net", "d1")
	push(t, s, "net", "d2")
	apply := parse(t, deployment("a", "net", 1, "")+deployment("b", "net", 2, "site: x"))
	_, err := s.Apply(ctx, "user:op", apply[:1], false)
	must(t, err)
	moved := parse(t, deployment("a", "net", 2, "site: y"))
	snap, err := s.Suppose(ctx, append(moved, apply[1]))
	if err != nil || len(snap.Objects.Deployments) != 2 || snap.Objects.Deployments[0].Version != 2 || len(snap.Objects.Versions) != 2 {
		t.Errorf("got %+v, %v", snap.Objects, err)
	}
	if snap, err := s.Snapshot(ctx); err != nil || len(snap.Objects.Deployments) != 1 || snap.Objects.Deployments[0].Version != 1 {
		t.Errorf("it was applied: %+v, %v", snap.Objects, err)
	}
	if _, err := s.Suppose(ctx, parse(t, deployment("c", "net", 9, ""))); err == nil || !strings.Contains(err.Error(), "no version 9") {
		t.Errorf("got %v", err)
	}
}

// A store of the first release has its versions and devices still, of which
// nothing more is known.
func TestMigrationFromFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	released := migrations
	migrations = released[:1]
	defer func() { migrations = released }()
	old := open(t, path, Options{})
	_, err := old.writer.ExecContext(t.Context(), `INSERT INTO devices (name, secret_hash, broker_hash, own_labels, token_labels, info, joined_at) VALUES ('d', zeroblob(32), '', '{}', '{}', x'', 1);
		INSERT INTO versions (model, version, digest, size, inputs, outputs, opset, created_at, created_by) VALUES ('net', 1, 'd1', 10, '[]', '[]', 17, 1, 'user:op')`)
	must(t, err)
	must(t, old.Close())
	migrations = released
	s := open(t, path, Options{})
	v, err := s.Version(t.Context(), "net", 1)
	if err != nil || v.Bundle != nil || v.Fleet().SizeBytes != 10 {
		t.Errorf("got %+v, %v", v, err)
	}
	d, err := s.Device(t.Context(), "d")
	if err != nil || d.DiskFree != nil {
		t.Errorf("got %+v, %v", d, err)
	}
	b := &fleet.Bundle{WeightBytes: 9, Opset: 13, Precisions: []string{"FP32"}, MaxBatch: 4, Costs: &models.Costs{FLOPs: models.Linear{Fixed: 1, PerRow: 2.5}, Unknown: []string{"Loop"}}}
	made, _, err := s.CreateVersion(t.Context(), Version{Model: "net", Digest: "d2", Bundle: b})
	must(t, err)
	got, err := s.Version(t.Context(), "net", made.Version)
	if err != nil || got.Bundle == nil || got.Bundle.WeightBytes != 9 || got.Bundle.MaxBatch != 4 || got.Bundle.Costs.FLOPs.PerRow != 2.5 || !slices.Equal(got.Bundle.Costs.Unknown, b.Costs.Unknown) {
		t.Errorf("got %+v, %v", got.Bundle, err)
	}
}

// What documents follow from says whether a hello changed it.
func TestHelloChanges(t *testing.T) {
	s, _ := fresh(t)
	join(t, s, "d", nil)
	info := &dunlinv1.DeviceInfo{Hostname: "h", FirmwareProfile: "board", DiskBytes: 5, Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: 1, Precisions: []string{"FP32"}}}
	for i, tt := range []struct {
		edit func(*dunlinv1.DeviceInfo)
		want bool
	}{
		{func(*dunlinv1.DeviceInfo) {}, true},
		{func(*dunlinv1.DeviceInfo) {}, false},
		{func(i *dunlinv1.DeviceInfo) { i.Hostname = "other" }, false},
		{func(i *dunlinv1.DeviceInfo) { i.Limits.HostMemoryBytes = 2 }, true},
		{func(i *dunlinv1.DeviceInfo) { i.Limits.Precisions = nil }, true},
		{func(i *dunlinv1.DeviceInfo) { i.DiskBytes = 6 }, true},
		{func(i *dunlinv1.DeviceInfo) { i.FirmwareProfile = "desk" }, true},
	} {
		tt.edit(info)
		d, changed, err := s.Hello(t.Context(), "d", &dunlinv1.Hello{Session: "s", Info: info})
		if err != nil || changed != tt.want || !proto.Equal(d.Info, info) {
			t.Errorf("%d: changed %v, %v", i, changed, err)
		}
	}
	// An agent that says nothing changes nothing.
	if _, changed, err := s.Hello(t.Context(), "d", &dunlinv1.Hello{Session: "s"}); err != nil || changed {
		t.Errorf("changed %v, %v", changed, err)
	}
}
