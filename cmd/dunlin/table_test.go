package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
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
	gates := []*dunlinv1.GateResult{
		{Gate: "errorRate", Class: "board", Verdict: dunlinv1.GateResult_VERDICT_FAILED, NewFigure: new(0.125), OldFigure: new(0.001), Value: new(0.124), Limit: 0.01, NewSamples: 400, OldSamples: 9000, Reason: "12.4 % above the old version's, the limit is 1 %"},
		{Gate: "p99", Class: "board", Verdict: dunlinv1.GateResult_VERDICT_PASSED, NewFigure: new(0.011), OldFigure: new(0.010), Value: new(1.1), Limit: 1.5, NewSamples: 400, OldSamples: 9000},
		{Gate: "energy", Class: "box", Verdict: dunlinv1.GateResult_VERDICT_NO_SAMPLE, Limit: 1.2, NewSamples: 3, Reason: "3 requests, 100 are needed"},
		{Gate: "confidence", Class: "box", Verdict: dunlinv1.GateResult_VERDICT_PASSED, Value: new(0.0312), Limit: 0.25, NewSamples: 400, OldSamples: 9000},
	}
	waves := &dunlinv1.Rollout{
		Id: "digits-3", Deployment: "digits", Model: "digits", FromVersion: 2, ToVersion: 3, State: dunlinv1.RolloutState_ROLLOUT_STATE_HALTED, Reason: "errorRate failed on board", StartedAt: before(time.Hour),
		Wave: 2, Gates: gates, SoaksUntil: before(-90 * time.Second), Waves: []*dunlinv1.RolloutWave{
			{Name: "1 canary per class", Devices: 2, Ready: 2, StartedAt: before(time.Hour)},
			{Name: "10 %", Devices: 200, Ready: 190, Failed: 1, Excused: 5, StartedAt: before(20 * time.Minute)},
			{Name: "all", Devices: 1800},
		},
	}
	for i := range 25 {
		d := &dunlinv1.RolloutDevice{Device: fmt.Sprintf("cam-%02d", i), Phase: dunlinv1.RolloutDevice_PHASE_READY, Class: "board", Wave: 1}
		if i%5 == 0 {
			d.Phase, d.Reason = dunlinv1.RolloutDevice_PHASE_FAILED, "opset 99"
		}
		if i == 7 {
			d.Phase, d.Reason = dunlinv1.RolloutDevice_PHASE_FAILED, "no room\x1b[2J"
		}
		waves.Devices = append(waves.Devices, d)
	}
	decisions := []*dunlinv1.Decision{
		{At: before(time.Hour), Kind: "start", By: "user:ada", Reason: "version 3"},
		{At: before(time.Hour), Kind: "admit", Wave: 1, By: "controller", Devices: []string{"a", "b", "c", "d"}, DeviceCount: 120},
		{At: before(time.Minute), Kind: "halt", Wave: 1, By: "gate", Devices: []string{"a"}, DeviceCount: 1, Reason: "errorRate failed on board", Gates: gates[:1]},
	}
	for name, table := range map[string]interface{ write(io.Writer) error }{
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
			{Name: "cam-3", Reported: &dunlinv1.Reported{
				Refused: &dunlinv1.DesiredRefusal{Generation: &dunlinv1.Generation{Number: 7}, Reason: "routes[0]: route r: rules[0].match.cel: no"},
			}},
		}),
		"devices-wide": devicesTable(now, []*dunlinv1.Device{
			{Name: "cam-1", JoinedAt: before(72 * time.Hour), Identity: &dunlinv1.DeviceIdentity{NotAfter: before(-2000 * time.Hour)}, Info: &dunlinv1.DeviceInfo{
				Arch: "arm64", AgentVersion: "1.2.3", Board: "Raspberry Pi 5\x1b[2J", CpuCount: 4, MemoryBytes: 8 << 30, Providers: []string{"CPUExecutionProvider"}, ServingUrl: "http://10.0.0.7:8000", Gpus: make([]*dunlinv1.GpuInfo, 2)}},
			{Name: "cam-2"},
		}).widened(),
		"models-wide":   modelsTable(now, []*dunlinv1.ModelVersion{{Model: "digits", Version: 2, Digest: "sha256:0123456789abcdef0123456789abcdef", Signers: []string{"release 1234", "qa 99"}}}).widened(),
		"rollouts-wide": rolloutsTable(now, append(rollouts, waves)).widened(),
		"top-fleet":     fleetPage(now, topDevices(before)),
		"top-device":    devicePage(now, topDevices(before)[1]),
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
			{Name: "faces", Targets: []*dunlinv1.RouteTarget{{Model: "faces", Weight: 1}}, Rules: make([]*dunlinv1.RouteRule, 1)},
			{Name: "words", Targets: []*dunlinv1.RouteTarget{{Model: "words", Weight: 1}}, Rules: make([]*dunlinv1.RouteRule, 3)},
		}),
		"routes-wide": routesTable(now, []*dunlinv1.Route{
			{Name: "digits", Targets: []*dunlinv1.RouteTarget{{Model: "digits", Weight: 1}},
				Fallback: []*dunlinv1.RouteFallback{{Model: "digits", Version: 2}, {Model: "small"}}, Shadow: &dunlinv1.RouteShadow{Model: "digits", Version: 3, Rate: 0.05},
				Rules: []*dunlinv1.RouteRule{
					{Name: "gold", Fallback: []*dunlinv1.RouteFallback{{Model: "small"}}, Cascade: &dunlinv1.RouteCascade{Model: "large", When: "max(output) < 0.95"}},
					{Name: "tin"},
				}},
			{Name: "faces", Targets: []*dunlinv1.RouteTarget{{Model: "faces", Weight: 1}}},
		}).widened(),
		"freezes": freezesTable(now, []*dunlinv1.Object{
			{Name: "fleet", Reason: "end of the year", Until: before(-36 * time.Hour), UpdatedAt: before(time.Hour)},
			{Name: "site-demo", Selector: map[string]string{"site": "demo"}, Reason: "stock\ntaking", Until: before(time.Hour)},
			{Name: "x", Selector: map[string]string{"a": "b", "c": "d"}, Reason: "until somebody says so"},
		}),
		"maintenances":    maintenancesTable(now, []*dunlinv1.Object{{Name: "nights", Windows: []string{"mon-fri 22:00-05:00", "sun 00:00-24:00"}, Timezone: "Europe/Berlin", UpdatedAt: before(time.Minute)}}),
		"rollouts":        rolloutsTable(now, rollouts),
		"rollout":         rolloutPage(now, rollouts[0], false),
		"rollout-of-none": rolloutPage(now, &dunlinv1.Rollout{Id: "x-1", Model: "x", ToVersion: 1, State: dunlinv1.RolloutState_ROLLOUT_STATE_SUCCEEDED}, false),
		"rollout-waves":   rolloutPage(now, waves, false),
		"decisions":       decisionsPage(now, decisions),
		"drift": driftTable(now, []*dunlinv1.DeviceDrift{
			{Device: "cam-1", Drift: &dunlinv1.Drift{Kind: "file", Subject: "digits:2 model.onnx", Want: "sha256:12", Have: "sha256:34", Since: before(3 * time.Minute), Repair: "fetched again"}},
			{Device: "cam-2", Drift: &dunlinv1.Drift{Kind: "runtime", Want: "1.30.0", Have: "1.29\x1b[0m"}},
		}),
		"telemetry": telemetryTable([]*dunlinv1.Telemetry{
			{At: before(time.Minute), CpuUtilisation: new(0.254), MemoryUsedBytes: new(uint64(3 << 30)), ModelMemoryUsedBytes: new(uint64(9 << 20)), DiskFreeBytes: new(uint64(5 << 30)),
				Temperatures: []*dunlinv1.Temperature{{Sensor: "a", Celsius: 51}, {Sensor: "b", Celsius: 73.4}}, PowerWatts: new(7.25), RequestsPerSecond: new(12.5), FailuresPerSecond: new(0.0), RequestP99Seconds: new(0.0125),
				Alarms: []*dunlinv1.Alarm{{Kind: "temperature"}}},
			{At: before(0)},
		}),
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

// topDevices are one that is at rest, one that works and has an alarm, and one
// that is away, with figures of before.
func topDevices(before func(time.Duration) *timestamppb.Timestamp) []*dunlinv1.Device {
	return []*dunlinv1.Device{
		{Name: "cam-1", Connected: true, LastHeardAt: before(3 * time.Second), Telemetry: &dunlinv1.Telemetry{CpuUtilisation: new(0.05), RequestsPerSecond: new(0.5)}},
		{Name: "cam-2", Connected: true, LastHeardAt: before(time.Second), Telemetry: &dunlinv1.Telemetry{
			CpuUtilisation: new(0.254), MemoryUsedBytes: new(uint64(3 << 30)), MemoryTotalBytes: new(uint64(8 << 30)), ModelMemoryUsedBytes: new(uint64(9 << 20)), ModelMemoryBudgetBytes: new(uint64(1 << 30)),
			Temperatures: []*dunlinv1.Temperature{{Celsius: 51}, {Celsius: 73.4}}, PowerWatts: new(7.25), RequestsPerSecond: new(12.5), FailuresPerSecond: new(0.25), RequestP99Seconds: new(0.0125),
			Gpus:   []*dunlinv1.GpuTelemetry{{Utilisation: new(0.55), MemoryUsedBytes: new(uint64(2 << 30)), MemoryTotalBytes: new(uint64(4 << 30)), PowerWatts: new(11.0), Celsius: new(60.0), ThrottleReasons: []string{"sw_thermal"}}, {Index: 1}},
			Models: []*dunlinv1.ModelTelemetry{{Model: "digits", Version: 2, Succeeded: 98, Failed: 2, RunNanoseconds: 98e6, Resident: true, MemoryBytes: 9 << 20, NeedBytes: 9 << 20}, {Model: "faces", Version: 4, NeedBytes: 1 << 30}},
			Alarms: []*dunlinv1.Alarm{{Kind: "temperature", Subject: "cpu", Severity: dunlinv1.Severity_SEVERITY_WARNING, RaisedAt: before(time.Minute), Message: "it\x1b[2J rises"}}},
			Reported: &dunlinv1.Reported{Versions: []*dunlinv1.VersionStatus{
				{Model: "digits", Version: 2, State: dunlinv1.VersionState_VERSION_STATE_RESIDENT, Serving: true},
				{Model: "faces", Version: 4, State: dunlinv1.VersionState_VERSION_STATE_WARM, Serving: true},
				{Model: "words", Version: 1, State: dunlinv1.VersionState_VERSION_STATE_QUARANTINED, Reason: "opset 99"},
			}}},
		{Name: "cam-3", LastHeardAt: before(time.Hour), Telemetry: &dunlinv1.Telemetry{CpuUtilisation: new(0.9), RequestsPerSecond: new(99.0)}},
		{Name: "cam-4", Identity: &dunlinv1.DeviceIdentity{RevokedAt: before(time.Hour)}},
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

func TestBar(t *testing.T) {
	for _, c := range []struct {
		total, ready, failed, excused uint32
		want                          string
	}{
		{0, 0, 0, 0, ".........."},
		{1, 0, 0, 0, ".........."},
		{1, 1, 0, 0, "##########"},
		{10, 3, 1, 1, "###x-....."},
		{10000, 9999, 0, 0, "#########."},
		{10000, 9997, 1, 1, "#######x-."},
		{10000, 1, 0, 0, "#........."},
		{3, 1, 1, 1, "####xxx---"},
		{1, 4, 0, 0, "##########"}, // a count that runs ahead
	} {
		if got := bar(10, c.total, c.ready, c.failed, c.excused); got != c.want {
			t.Errorf("bar of %v: got %s, want %s", c, got, c.want)
		}
	}
}

// TestLivePage: each page takes the place of the one before, and none is wider
// or longer than the terminal.
func TestLivePage(t *testing.T) {
	var out bytes.Buffer
	l := &livePage{w: &out, size: func() (int, int) { return 6, 3 }}
	l.show(tables{{header: []string{"A", "BCDEF"}, rows: [][]string{{"1", "2"}, {"3", "4"}}}})
	l.show(tables{{header: []string{"X"}}})
	l.clear()
	l.clear()
	if got, want := out.String(), "A  BC\n1  2\n\x1b[2A\r\x1b[JX\n\x1b[1A\r\x1b[J"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	var none *livePage
	none.clear()
	if newLivePage(&out) != nil {
		t.Error("a buffer was taken for a terminal")
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
	r = &dunlinv1.Rollout{Deployment: "digits", Model: "digits", ToVersion: 2, State: dunlinv1.RolloutState_ROLLOUT_STATE_ROLLING_BACK, Reason: "p99\nfailed", Wave: 1, Waves: make([]*dunlinv1.RolloutWave, 3)}
	if got, want := rolloutLine(r), "digits: digits:2 rolling back, 0/0 ready, wave 1 of 3: p99\ufffdfailed"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFreezeNames(t *testing.T) {
	for name, labels := range map[string]map[string]string{"fleet": nil, "site-demo": {"site": "demo"}, "a-b-site-demo": {"site": "Demo", "a": "b"}} {
		if got := freezeName(labels); got != name {
			t.Errorf("got %q, want %q", got, name)
		}
	}
	now := time.Date(2026, 11, 20, 12, 0, 0, 500, time.UTC)
	for text, want := range map[string]time.Time{"": {}, "12h": now.Add(12 * time.Hour).Truncate(time.Second), "2026-12-24T18:00:00+02:00": time.Date(2026, 12, 24, 16, 0, 0, 0, time.UTC)} {
		if got, err := parseUntil(now, text); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"-1h", "0s", "2026-11-20T11:59:59Z", "tomorrow"} {
		if _, err := parseUntil(now, text); err == nil {
			t.Errorf("%q was taken", text)
		}
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
