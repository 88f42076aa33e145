package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

var update = flag.Bool("update", false, "write the golden files again")

// TestTables compares the tables with testdata/tables/*.golden.
func TestTables(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	before := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-d)) }
	rollouts := []*dunlinv1.Rollout{
		{Id: "digits-2", Deployment: "digits", Model: "digits", FromVersion: 1, ToVersion: 2, State: dunlinv1.RolloutState_ROLLOUT_STATE_FAILED,
			Reason: "2 devices refused it, allowed is 1", StartedAt: before(90 * time.Second), Devices: []*dunlinv1.RolloutDevice{
				{Device: "cam-1", Phase: dunlinv1.RolloutDevice_PHASE_READY, BytesPresent: 154065, BytesTotal: 154065},
				{Device: "cam-2", Phase: dunlinv1.RolloutDevice_PHASE_WORKING, BytesPresent: 1 << 20, BytesTotal: 5 << 20},
				{Device: "cam-3", Phase: dunlinv1.RolloutDevice_PHASE_FAILED, Reason: "truncated: byte 7"},
			}},
		{Id: "digits-1", Deployment: "digits", Model: "digits", ToVersion: 1, State: dunlinv1.RolloutState_ROLLOUT_STATE_SUCCEEDED, StartedAt: before(50 * time.Hour)},
	}
	for name, table := range map[string]*table{
		"devices": devicesTable(now, []*dunlinv1.Device{
			{Name: "cam-1", Connected: true, LastHeardAt: before(3 * time.Second), Labels: map[string]string{"site": "demo", "floor": "2"},
				Info: &dunlinv1.DeviceInfo{Arch: "arm64", RuntimeVersion: "1.30.0", FirmwareProfile: "raspberry-pi-5", Simulated: true}, Reported: &dunlinv1.Reported{
					Versions: []*dunlinv1.VersionStatus{
						{Model: "digits", Version: 1, State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true},
						{Model: "digits", Version: 2, State: dunlinv1.VersionState_VERSION_STATE_QUARANTINED},
						{Model: "faces", Version: 4, State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true},
					},
					Routes: []*dunlinv1.RouteStatus{{Name: "digits", Ready: true}, {Name: "eyes"}},
				}},
			{Name: "cam-2", LastHeardAt: before(49 * time.Hour), Labels: map[string]string{"site": "de\x1b[31mmo"}, Reported: &dunlinv1.Reported{
				Versions: []*dunlinv1.VersionStatus{{Model: "digits", Version: 1, State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true}},
			}},
			{Name: "cam-3"},
		}),
		"models": modelsTable(now, []*dunlinv1.ModelVersion{
			{Model: "digits", Version: 1, Digest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", SizeBytes: 3023, Opset: 17,
				Inputs: []string{"image:FP32[-1,1,8,8]"}, Outputs: []string{"probabilities:FP32[-1,10]", "label:INT64[-1]"}, CreatedAt: before(time.Minute), CreatedBy: "user:ada"},
			{Model: "digits", Version: 2, Digest: "short", SizeBytes: 5 << 30},
		}),
		"deployments": deploymentsTable(now, []*dunlinv1.Deployment{
			{Name: "digits", Model: "digits", Version: 2, Selector: map[string]string{"site": "demo"}, UpdatedAt: before(2 * time.Hour), Devices: 3, Ready: 2, Failed: 1},
			{Name: "everywhere", Model: "faces", Version: 12},
		}),
		"routes": routesTable(now, []*dunlinv1.Route{
			{Name: "digits", Targets: []*dunlinv1.RouteTarget{{Model: "digits", Weight: 90}, {Model: "digits", Version: 2, Weight: 10}}, UpdatedAt: before(0)},
		}),
		"rollouts":        rolloutsTable(now, rollouts),
		"rollout":         rolloutTable(rollouts[0]),
		"rollout-of-none": rolloutTable(&dunlinv1.Rollout{Id: "x-1", Model: "x", ToVersion: 1, State: dunlinv1.RolloutState_ROLLOUT_STATE_SUCCEEDED}),
		"events": eventsTable(now, []*dunlinv1.DeviceEvent{
			{Device: "cam-1", Event: &dunlinv1.Event{At: before(time.Hour), Kind: "version.quarantined", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: "digits", Version: 2, Message: "line one\nline two"}},
			{Device: "cam-2", Event: &dunlinv1.Event{At: before(26 * time.Hour), Kind: "worker.died", Severity: dunlinv1.Severity_SEVERITY_WARNING}},
		}),
		"alarms": alarmsTable(now, []*dunlinv1.Device{
			{Name: "cam-1", Telemetry: &dunlinv1.Telemetry{Alarms: []*dunlinv1.Alarm{
				{Kind: "temperature", Subject: "cpu-thermal", Severity: dunlinv1.Severity_SEVERITY_WARNING, RaisedAt: before(2 * time.Hour), Message: "it rises", Method: "theil-sen", Unit: "°C",
					Threshold: new(80.0), SlopePerHour: new(4.25), HoursToThreshold: new(1.5), Samples: []*dunlinv1.AlarmSample{{Value: 70}, {Value: 74}}, Action: "duty 0.5"},
				{Kind: "disk_wear", Severity: dunlinv1.Severity_SEVERITY_ERROR, Message: "worn", Method: "threshold", Threshold: new(0.9)},
				{Kind: "ecc", Subject: "gpu:0"},
			}}},
			{Name: "cam-2"},
		}),
		"plan": planTable([]*dunlinv1.DevicePlan{
			{Deployment: "digits", Device: "cam-1", Model: "digits", Version: 2, Verdict: dunlinv1.DevicePlan_VERDICT_FITS, MemoryBytes: 9 << 20, TotalBytes: 12 << 20, BudgetBytes: 1 << 30,
				MemorySource: dunlinv1.DevicePlan_SOURCE_MEASURED_HERE, LatencySeconds: new(0.00125), LatencySource: dunlinv1.DevicePlan_SOURCE_MEASURED_HERE,
				Joules: new(0.0052), EnergySource: dunlinv1.DevicePlan_SOURCE_ESTIMATED, MeasuredOn: "cam-1"},
			{Deployment: "digits", Device: "cam-2", Model: "digits", Version: 2, Verdict: dunlinv1.DevicePlan_VERDICT_FITS_WITH_SWAPPING, MemoryBytes: 9 << 20, TotalBytes: 12 << 20, BudgetBytes: 10 << 20,
				MemorySource: dunlinv1.DevicePlan_SOURCE_MEASURED_ON_CLASS, MeasuredOn: "cam-1", LatencySeconds: new(13.0), LatencySource: dunlinv1.DevicePlan_SOURCE_ESTIMATED,
				Joules: new(2.0), EnergySource: dunlinv1.DevicePlan_SOURCE_ESTIMATED, Reason: "together with faces:1 it needs 12.0 MiB, 2.0 MiB more than the budget"},
			{Deployment: "digits", Device: "cam-3", Model: "digits", Version: 2, Verdict: dunlinv1.DevicePlan_VERDICT_DOES_NOT_FIT, MemoryBytes: 9 << 20, TotalBytes: 9 << 20, BudgetBytes: 1 << 20,
				MemorySource: dunlinv1.DevicePlan_SOURCE_ESTIMATED, Reason: "it needs more"},
			{Deployment: "digits", Device: "cam-4", Model: "digits", Version: 2, MemorySource: dunlinv1.DevicePlan_SOURCE_UNKNOWN, Reason: "its bundle does not say what it needs"},
		}),
		"profiles": profilesTable(now, []*dunlinv1.DeviceProfile{
			{Device: "cam-1", Profile: measuredProfile("digits", 2, "sha256:1")},
			{Device: "cam-2", Profile: &dunlinv1.ModelProfile{Model: "faces", Version: 1, Unmeasured: "no inputs", WeightBytes: 512}},
		}),
		"points": pointsTable(measuredProfile("digits", 2, "sha256:1")),
		"audit": auditTable(now, []*dunlinv1.AuditRecord{
			{Number: 7, At: before(time.Minute), Who: "user:ada", From: "192.0.2.1:99", Action: "object.apply", Object: "Route/r", Count: 1},
			{Number: 8, At: before(time.Second), Who: "nobody", From: "192.0.2.2:99", Action: "call.refused", Object: "/x\x1b[2J", Count: 12, Refused: true, Reason: "credentials are missing or wrong"},
		}),
		"join-tokens": joinTokensTable(now, []*dunlinv1.JoinToken{
			{Id: "e6daa951bc63", UsesLeft: 2, ExpiresAt: before(-time.Hour), Labels: map[string]string{"site": "demo"}},
			{Id: "ed7087257406", ExpiresAt: before(time.Hour)},
		}),
	} {
		t.Run(name, func(t *testing.T) {
			var got bytes.Buffer
			if err := table.write(&got); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join("testdata", "tables", name+".golden")
			if *update {
				if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, got.Bytes(), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("got\n%swant\n%s", got.Bytes(), want)
			}
		})
	}
}

// TestProfilePage compares the forms of a profile with testdata/profiles.
func TestProfilePage(t *testing.T) {
	p := measuredProfile("digits", 2, "sha256:1")
	p.CpuModel = "a\x1b[31m <b>board</b>"
	for _, f := range []figureFormat{"table", "html"} {
		t.Run(string(f), func(t *testing.T) {
			got, err := renderProfile(f, "cam-1", p)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join("testdata", "profiles", string(f)+".golden")
			if *update {
				if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, got, 0o666); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func TestRolloutLine(t *testing.T) {
	r := &dunlinv1.Rollout{Deployment: "digits", Model: "digits", ToVersion: 2, State: dunlinv1.RolloutState_ROLLOUT_STATE_RUNNING, Devices: []*dunlinv1.RolloutDevice{
		{Device: "a", Phase: dunlinv1.RolloutDevice_PHASE_READY},
		{Device: "b", Phase: dunlinv1.RolloutDevice_PHASE_WORKING, BytesPresent: 1 << 20, BytesTotal: 4 << 20},
		{Device: "c", Phase: dunlinv1.RolloutDevice_PHASE_FAILED},
	}}
	if got, want := rolloutLine(r), "digits: digits:2 running, 1/3 ready, 1.0 MiB of 4.0 MiB fetched, failed on c"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestColourDiff(t *testing.T) {
	in := "--- a\n+++ b\n@@ -1 +1 @@\n same\n-old\n+new\n"
	want := "\x1b[1m--- a\x1b[0m\n\x1b[1m+++ b\x1b[0m\n\x1b[36m@@ -1 +1 @@\x1b[0m\n same\n\x1b[31m-old\x1b[0m\n\x1b[32m+new\x1b[0m\n"
	if got := colourDiff(in); got != want {
		t.Errorf("got %q", got)
	}
	if coloured(&bytes.Buffer{}) {
		t.Error("a buffer was taken for a terminal")
	}
}
