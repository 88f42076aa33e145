package fleet

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// given writes a document as "model:version deployment", routes with their name.
func given(doc *dunlinv1.DesiredDocument) []string {
	var all []string
	for _, v := range doc.GetVersions() {
		text := fmt.Sprintf("%s:%d %s", v.Model, v.Version, v.Deployment)
		if v.InPlace {
			text += " in place"
		}
		all = append(all, text)
	}
	if a := doc.GetAgent(); a != nil {
		all = append(all, fmt.Sprintf("agent %s %s", a.AgentVersion, a.Deployment))
	}
	for _, r := range doc.GetRoutes() {
		all = append(all, "route "+r.Name)
	}
	return all
}

func version(model string, n int64) Version {
	return Version{Model: model, Version: n, Digest: fmt.Sprintf("sha256:%s-%d", model, n), SizeBytes: uint64(n)}
}

// halfway is a rollout from 1 to 2 that only device "in" was given.
func halfway(state State) Objects {
	return Objects{
		Deployments: []Deployment{{Name: "d", Model: "m", Version: 2, Delivery: &dunlinv1.Delivery{Priority: 7}}},
		Routes:      []Route{{Name: "r", Targets: []Target{{"m", 0, 1}}}},
		Versions:    []Version{version("m", 1), version("m", 2)},
		Rollouts: []Rollout{
			{Number: 4, Deployment: "d", Model: "m", To: 1, State: Succeeded},
			{Number: 5, Deployment: "d", Model: "m", From: 1, To: 2, State: state, Strategy: Strategy{Waves: []Wave{{Canary: 1}}}, Devices: []RolloutDevice{{Device: "in", Wave: 1, AdmittedAt: begin}, {Device: "out"}}},
		},
	}
}

func compiled(o Objects, d Device, had *dunlinv1.DesiredDocument) *dunlinv1.DesiredDocument {
	doc, _ := NewCompiler(o).Compile(d, had)
	return doc
}

func TestCompileFollowsTheRollout(t *testing.T) {
	for state, want := range map[State][2]int64{Running: {2, 1}, Halted: {2, 1}, Aborted: {2, 1}, RollingBack: {1, 1}, Succeeded: {2, 2}} {
		for i, name := range []string{"in", "out"} {
			doc := compiled(halfway(state), Device{Name: name}, nil)
			if got := given(doc); !slices.Equal(got, []string{fmt.Sprintf("m:%d d", want[i]), "route r"}) || doc.Versions[0].GetDelivery().GetPriority() != 7 {
				t.Errorf("%s: %s is given %v", state, name, got)
			}
		}
	}
	// Nothing before it, and its wave has not begun: nothing.
	o := halfway(Running)
	o.Rollouts[1].From = 0
	if got := given(compiled(o, Device{Name: "out"}, nil)); got != nil {
		t.Errorf("is given %v", got)
	}
	// A deployment that is only supposed: as if it had succeeded.
	o = halfway(Running)
	o.Deployments[0].Version = 3
	o.Versions = append(o.Versions, version("m", 3))
	if got := given(compiled(o, Device{Name: "out"}, nil)); got[0] != "m:3 d" {
		t.Errorf("is given %v", got)
	}
}

// A deployment that changes its model gives the one before to those that wait,
// unless another deployment gives that model by now.
func TestCompileFromAnotherModel(t *testing.T) {
	o := Objects{
		Deployments: []Deployment{{Name: "a", Model: "new", Version: 1}},
		Versions:    []Version{version("new", 1), version("old", 1), version("old", 2)},
		Rollouts:    []Rollout{{Number: 2, Deployment: "a", Model: "new", FromModel: "old", From: 1, To: 1, State: Running, Devices: []RolloutDevice{{Device: "in", AdmittedAt: begin}}}},
	}
	if got := given(compiled(o, Device{Name: "in"}, nil)); !slices.Equal(got, []string{"new:1 a"}) {
		t.Errorf("is given %v", got)
	}
	if got := given(compiled(o, Device{Name: "out"}, nil)); !slices.Equal(got, []string{"old:1 a"}) {
		t.Errorf("is given %v", got)
	}
	o.Deployments = append(o.Deployments, Deployment{Name: "z", Model: "old", Version: 2})
	if got := given(compiled(o, Device{Name: "out"}, nil)); !slices.Equal(got, []string{"old:2 z"}) {
		t.Errorf("is given %v", got)
	}
}

func TestCompileAgent(t *testing.T) {
	release := version(AgentModel, 3)
	release.AgentVersion, release.Signatures = "0.9.0", []string{"sha256:s"}
	o := Objects{Deployments: []Deployment{{Name: "agents", Model: AgentModel, Version: 3, Delivery: &dunlinv1.Delivery{Metered: true}}}, Versions: []Version{release}}
	doc := compiled(o, Device{Name: "x", Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: 1}}, nil)
	want := &dunlinv1.DesiredDocument{Agent: &dunlinv1.DesiredAgent{Deployment: "agents", AgentVersion: "0.9.0", Version: 3, Digest: release.Digest, SizeBytes: 3, Signatures: release.Signatures, Delivery: &dunlinv1.Delivery{Metered: true}}}
	if diff := cmp.Diff(want, doc, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	o.Versions[0].SizeBytes = 1 << 40 // more than the disk has
	full := Device{Name: "x", Limits: &dunlinv1.DeviceLimits{}, DiskBytes: 1 << 30}
	kept, refused := NewCompiler(o).Compile(full, &dunlinv1.DesiredDocument{Agent: &dunlinv1.DesiredAgent{Deployment: "agents", AgentVersion: "0.8.0", Version: 2}})
	if len(refused) != 1 || !refused[0].Disk || kept.GetAgent().GetAgentVersion() != "0.8.0" {
		t.Errorf("%v, %v", kept, refused)
	}
	fits, _ := NewCompiler(o).Plan(Device{Name: "x"})
	if len(fits) != 1 || fits[0].Verdict != Unknown || fits[0].Reason != "a release of the agent program takes no memory of models" {
		t.Errorf("%+v", fits)
	}
}

// What a freeze covers: nothing begins, what has begun goes on, a rollback
// works, and a device without a document gets one.
func TestCompileClosed(t *testing.T) {
	before := halfway(Running)
	docs := map[string]*dunlinv1.DesiredDocument{"in": compiled(before, Device{Name: "in"}, nil), "out": compiled(before, Device{Name: "out"}, nil)}
	more := func(o Objects) Objects { // also a new deployment, another route, another delivery
		o.Deployments = []Deployment{{Name: "d", Model: "m", Version: 2, Delivery: &dunlinv1.Delivery{Priority: 9}}, {Name: "e", Model: "extra", Version: 1}}
		o.Versions = append(o.Versions, version("extra", 1))
		o.Routes = nil
		return o
	}
	rolledBack := halfway(RolledBack)
	gone := halfway(Running)
	gone.Deployments, gone.Rollouts = nil, nil
	admitted := halfway(Running)
	admitted.Rollouts[1].Devices[1].AdmittedAt = begin
	tests := []struct {
		name    string
		objects Objects
		device  string
		want    []string
	}{
		{"nothing new", before, "out", []string{"m:1 d", "route r"}},
		{"a new deployment, route and delivery", more(halfway(Running)), "in", []string{"m:2 d", "route r"}},
		{"a rollout that has succeeded", halfway(Succeeded), "out", []string{"m:1 d", "route r"}},
		{"what a rollout has begun", admitted, "out", []string{"m:2 d", "route r"}},
		{"a rollback", more(rolledBack), "in", []string{"m:1 d", "route r"}},
		{"a deployment that is gone", gone, "in", []string{"m:2 d", "route r"}},
	}
	for _, tt := range tests {
		d := Device{Name: tt.device, Closed: "freeze x: y"}
		doc, refused := NewCompiler(tt.objects).Compile(d, docs[tt.device])
		if got := given(doc); !slices.Equal(got, tt.want) || len(refused) > 0 {
			t.Errorf("%s: is given %v, refused %v", tt.name, got, refused)
		}
		if again := compiled(tt.objects, d, doc); !proto.Equal(again, doc) {
			t.Errorf("%s: then %v", tt.name, given(again))
		}
		if same := given(doc)[0] == given(docs[tt.device])[0]; same && !proto.Equal(doc, docs[tt.device]) {
			t.Errorf("%s: the bytes changed: %v", tt.name, doc)
		}
	}
	if got := given(compiled(halfway(Succeeded), Device{Name: "new", Closed: "freeze x: y"}, nil)); !slices.Equal(got, []string{"m:2 d", "route r"}) {
		t.Errorf("a device without a document is given %v", got)
	}
	// Going back to nothing takes the version away.
	rolledBack.Rollouts[1].From = 0
	if got := given(compiled(rolledBack, Device{Name: "in", Closed: "x"}, docs["in"])); !slices.Equal(got, []string{"route r"}) {
		t.Errorf("is given %v", got)
	}
}

func TestCompileInPlace(t *testing.T) {
	o := halfway(Running)
	for i := range o.Versions {
		o.Versions[i].Bundle = &Bundle{WeightBytes: 600 << 20}
	}
	device := func(name string, budget uint64) Device {
		return Device{Name: name, Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: budget}}
	}
	for _, name := range []string{"in", "out"} { // on the way back too
		if got := compiled(o, device(name, 1000<<20), nil); !got.Versions[0].InPlace {
			t.Errorf("%s: %v", name, got)
		}
		if got := compiled(o, device(name, 4000<<20), nil); got.Versions[0].InPlace {
			t.Errorf("%s, with room: %v", name, got)
		}
	}
	fits, _ := NewCompiler(o).Plan(device("out", 1000<<20))
	const want = "it takes the place of m:1, which is unloaded first: together they need "
	if !fits[0].InPlace || fits[0].Verdict != Fits || len(fits[0].Reason) < len(want) || fits[0].Reason[:len(want)] != want {
		t.Errorf("%+v", fits[0])
	}
	o.Deployments[0].Version = 3 // supposed
	v := version("m", 3)
	v.Bundle = o.Versions[0].Bundle
	o.Versions = append(o.Versions, v)
	if fits, _ := NewCompiler(o).Plan(device("out", 1000<<20)); !fits[0].InPlace {
		t.Errorf("%+v", fits[0])
	}
	o.Rollouts = nil // the first version of it
	if fits, _ := NewCompiler(o).Plan(device("out", 1000<<20)); fits[0].InPlace {
		t.Errorf("%+v", fits[0])
	}
}

// drawObjects makes objects of a few deployments, routes, rollouts and freezes.
func drawObjects(t *rapid.T, label string) Objects {
	var o Objects
	for _, m := range []string{"m", "n"} {
		for v := range int64(3) {
			o.Versions = append(o.Versions, version(m, v+1))
		}
	}
	selectors := []map[string]string{nil, {"site": "a"}, {"site": "b"}, {"site": "a", "tier": "1"}}
	for i, name := range []string{"p", "q", "s"} {
		if rapid.IntRange(0, 3).Draw(t, label+" there") == 0 {
			continue
		}
		d := Deployment{Name: name, Model: rapid.SampledFrom([]string{"m", "n"}).Draw(t, label+" model"), Version: rapid.Int64Range(1, 3).Draw(t, label+" version"), Selector: rapid.SampledFrom(selectors).Draw(t, label+" selector")}
		o.Deployments = append(o.Deployments, d)
		if rapid.Bool().Draw(t, label+" delivery") {
			o.Deployments[len(o.Deployments)-1].Delivery = &dunlinv1.Delivery{Priority: 1}
		}
		if rapid.Bool().Draw(t, label+" rollout") {
			r := Rollout{Number: int64(i + 1), Deployment: name, Model: d.Model, To: d.Version, From: rapid.Int64Range(0, 3).Draw(t, label+" from"), State: rapid.SampledFrom([]State{Running, Running, Halted, Succeeded, RollingBack}).Draw(t, label+" state")}
			r.FromModel = rapid.SampledFrom([]string{"", "", "n"}).Draw(t, label+" from model")
			for _, device := range []string{"x", "y", "z"} {
				if rapid.Bool().Draw(t, label+" row") {
					row := RolloutDevice{Device: device, Phase: DeviceWaiting}
					if rapid.Bool().Draw(t, label+" admitted") {
						row.AdmittedAt, row.Phase = begin, DeviceReady
					}
					r.Devices = append(r.Devices, row)
				}
			}
			o.Rollouts = append(o.Rollouts, r)
		}
	}
	if rapid.Bool().Draw(t, label+" route") {
		o.Routes = []Route{{Name: "r", Targets: []Target{{"m", 0, rapid.Uint32Range(1, 2).Draw(t, label+" weight")}}}}
		if rapid.Bool().Draw(t, label+" rule") {
			o.Routes[0].Rules = []Rule{{
				Name: "a", Targets: []Target{{rapid.SampledFrom([]string{"m", "n"}).Draw(t, label+" rule's model"), 0, 1}},
				Match: &dunlinv1.RouteMatch{Labels: []*dunlinv1.RouteCondition{{Name: "site", Values: []string{rapid.SampledFrom([]string{"a", "b"}).Draw(t, label+" site")}}}},
			}}
		}
	}
	if rapid.IntRange(0, 3).Draw(t, label+" freeze") == 0 {
		o.Freezes = []Freeze{{Name: "f", Reason: "x", Selector: map[string]string{"site": "a"}}}
	}
	if rapid.IntRange(0, 3).Draw(t, label+" signed") == 0 {
		o.Versions[0].Signatures = []string{"sha256:s"}
	}
	return o
}

// A device that a change does not touch has the same document, the same plan,
// and is as open as before.
func TestTouchedIsSound(t *testing.T) {
	untouched := 0
	rapid.Check(t, func(t *rapid.T) {
		before := drawObjects(t, "before")
		after := before
		if rapid.Bool().Draw(t, "little") { // only a part of it
			other := drawObjects(t, "after")
			switch rapid.IntRange(0, 4).Draw(t, "part") {
			case 0:
				after.Rollouts = other.Rollouts
			case 1:
				after.Routes = other.Routes
			case 2:
				after.Versions = other.Versions
			case 3:
				after.Freezes = other.Freezes
			case 4:
				after.Deployments = other.Deployments
			}
		} else {
			after = drawObjects(t, "after")
		}
		touched := Touched(before, after)
		a, b := NewCompiler(before), NewCompiler(after)
		for i, name := range []string{"x", "y", "z"} {
			d := Device{Name: name, Labels: map[string]string{"site": []string{"a", "b", "c"}[i], "tier": "1"}}
			if touched(d) {
				continue
			}
			untouched++
			one, _ := a.Compile(d, nil)
			two, _ := b.Compile(d, nil)
			if diff := cmp.Diff(one, two, protocmp.Transform()); diff != "" {
				t.Fatalf("%s is not touched: %s", name, diff)
			}
			why, _ := a.Closed(d, begin)
			still, _ := b.Closed(d, begin)
			if why != still || fmt.Sprint(a.Assigned(d)) != fmt.Sprint(b.Assigned(d)) {
				t.Fatalf("%s is not touched: %q and %q, %v and %v", name, why, still, a.Assigned(d), b.Assigned(d))
			}
		}
	})
	if untouched == 0 {
		t.Error("every change touched everything")
	}
}

// A wave that begins touches its devices only.
func TestTouchedByAWave(t *testing.T) {
	before, after := halfway(Running), halfway(Running)
	after.Rollouts[1].Devices = []RolloutDevice{{Device: "in", Wave: 1, AdmittedAt: begin, Phase: DeviceReady}, {Device: "out", Wave: 2, AdmittedAt: begin}}
	touched := Touched(before, after)
	for name, want := range map[string]bool{"in": false, "out": true, "other": false} {
		if touched(Device{Name: name}) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
	m := Measurement{Device: "here", Class: "c", Model: "m", Digest: "sha256:m-2"}
	after.Measured = []Measurement{m}
	touched = Touched(before, after)
	for d, want := range map[string]bool{"here": true, "in": false} {
		if touched(Device{Name: d}) != want {
			t.Errorf("%s: %v", d, !want)
		}
	}
	if !touched(Device{Name: "in", Class: "c"}) {
		t.Error("a measurement counts for its class")
	}
}

// As Assign, whatever the labels.
func TestAssigned(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := drawObjects(t, "objects")
		d := Device{Name: "x", Labels: map[string]string{"site": rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "site"), "tier": rapid.SampledFrom([]string{"1", "2"}).Draw(t, "tier")}}
		want := Assign(d, o.Deployments)
		got := NewCompiler(o).Assigned(d)
		for _, dep := range got {
			if want[dep.Model].Name != dep.Name {
				t.Fatalf("%s for %s, want %s", dep.Name, dep.Model, want[dep.Model].Name)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("%d of %d", len(got), len(want))
		}
	})
}

func TestDrifts(t *testing.T) {
	desired := &dunlinv1.DesiredDocument{
		Versions: []*dunlinv1.DesiredVersion{{Model: "m", Version: 2, Digest: "sha256:2"}}, Routes: []*dunlinv1.DesiredRoute{{Name: "r"}},
		Agent: &dunlinv1.DesiredAgent{AgentVersion: "0.9.0", Version: 3},
	}
	status := func(s dunlinv1.VersionState, serving bool, digest string) *dunlinv1.VersionStatus {
		return &dunlinv1.VersionStatus{Model: "m", Version: 2, Digest: digest, State: s, Serving: serving, Reason: "why", BytesPresent: 1 << 20, BytesTotal: 2 << 20}
	}
	resident, stored, absent, quarantined := dunlinv1.VersionState_VERSION_STATE_RESIDENT, dunlinv1.VersionState_VERSION_STATE_STORED, dunlinv1.VersionState_VERSION_STATE_ABSENT, dunlinv1.VersionState_VERSION_STATE_QUARANTINED
	well := func(change func(*dunlinv1.Reported)) *dunlinv1.Reported {
		r := &dunlinv1.Reported{Versions: []*dunlinv1.VersionStatus{status(resident, true, "sha256:2")}, Routes: []*dunlinv1.RouteStatus{{Name: "r", Ready: true}}, Agent: &dunlinv1.AgentStatus{AgentVersion: "0.9.0"}}
		change(r)
		return r
	}
	tests := []struct {
		name   string
		report *dunlinv1.Reported
		want   string // of the one drift
	}{
		{"none", well(func(*dunlinv1.Reported) {}), ""},
		{"no report", nil, ""},
		{"absent", well(func(r *dunlinv1.Reported) { r.Versions = nil }), "version m:2: want serving sha256:2, have absent, is fetched"},
		{"under way", well(func(r *dunlinv1.Reported) { r.Versions[0] = status(absent, false, "") }), "version m:2: want serving sha256:2, have absent, 1.0 MiB of 2.0 MiB there, is fetched"},
		{"not serving", well(func(r *dunlinv1.Reported) { r.Versions[0] = status(stored, false, "sha256:2") }), "version m:2: want serving sha256:2, have stored: why, is loaded"},
		{"quarantined", well(func(r *dunlinv1.Reported) { r.Versions[0] = status(quarantined, false, "sha256:2") }), "version m:2: want serving sha256:2, have quarantined: why, "},
		{"other files", well(func(r *dunlinv1.Reported) { r.Versions[0] = status(resident, true, "sha256:x") }), "version m:2: want serving sha256:2, have files of sha256:x, is fetched"},
		{"one too many", well(func(r *dunlinv1.Reported) {
			r.Versions = append(r.Versions, &dunlinv1.VersionStatus{Model: "n", Version: 1, Serving: true})
		}), "version n:1: want absent, have serving, is unloaded"},
		{"a route", well(func(r *dunlinv1.Reported) { r.Routes[0].Ready, r.Routes[0].Reason = false, "no target" }), "route r: want ready, have not ready: no target, "},
		{"no route", well(func(r *dunlinv1.Reported) { r.Routes = nil }), "route r: want ready, have absent, "},
		{"the agent", well(func(r *dunlinv1.Reported) { r.Agent.AgentVersion = "0.8.0" }), "agent dunlin-agent: want 0.9.0, have 0.8.0, is updated"},
		{"the agent as it was at start", well(func(r *dunlinv1.Reported) { r.Agent = nil }), "agent dunlin-agent: want 0.9.0, have 0.7.0, is updated"},
		{"the agent went back", well(func(r *dunlinv1.Reported) {
			r.Agent = &dunlinv1.AgentStatus{AgentVersion: "0.8.0", State: dunlinv1.AgentStatus_STATE_REVERTED, Reason: "no hello"}
		}), "agent dunlin-agent: want 0.9.0, have 0.8.0, went back: no hello, "},
		{"what it found", well(func(r *dunlinv1.Reported) {
			r.Drifts = []*dunlinv1.Drift{{Kind: "file", Subject: "m:2 model.onnx", Want: "a", Have: "b", Repair: "fetched again"}}
		}), "file m:2 model.onnx: want a, have b, fetched again"},
	}
	info := &dunlinv1.DeviceInfo{AgentVersion: "0.7.0"}
	now := begin.Add(time.Hour)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Drifts(info, desired, tt.report, begin, now, nil)
			var text strings.Builder
			for _, d := range got {
				text.WriteString(fmt.Sprintf("%s %s: want %s, have %s, %s", d.Kind, d.Subject, d.Want, d.Have, d.Repair))
				if !d.Since.AsTime().Equal(now) {
					t.Errorf("since %s", d.Since.AsTime())
				}
			}
			if text.String() != tt.want {
				t.Errorf("got  %s\nwant %s", text.String(), tt.want)
			}
			later := Drifts(info, desired, tt.report, begin, now.Add(time.Hour), got)
			if diff := cmp.Diff(got, later, protocmp.Transform()); diff != "" {
				t.Errorf("an hour later: %s", diff)
			}
			// Before it had its time, only what it found itself counts.
			for _, observed := range []time.Time{{}, now.Add(-DriftGrace)} {
				if early := Drifts(info, desired, tt.report, observed, now, nil); len(early) != len(tt.report.GetDrifts()) {
					t.Errorf("observed at %s: %v", observed, early)
				}
			}
		})
	}
}

// What a device says of itself is bounded, and its clock counts only as far as
// it can be right.
func TestDriftsAreBounded(t *testing.T) {
	r := &dunlinv1.Reported{}
	for i := range 500 {
		since := timestamppb.New(begin.Add(time.Duration(i%2) * 10 * time.Hour))
		r.Drifts = append(r.Drifts, &dunlinv1.Drift{Kind: "file", Subject: fmt.Sprintf("%03d", i), Want: string(make([]byte, 5000)), Have: "\xff\xfe", Since: since})
	}
	now := begin.Add(time.Hour)
	got := Drifts(nil, nil, r, time.Time{}, now, nil)
	if len(got) != MaxDrifts {
		t.Fatalf("%d drifts", len(got))
	}
	for i, d := range got {
		if len(d.Want) > maxDriftText+3 || d.Have != "" {
			t.Errorf("%d bytes, have %q", len(d.Want), d.Have)
		}
		if want := []time.Time{begin, now}[i%2]; !d.Since.AsTime().Equal(want) {
			t.Errorf("%s since %s", d.Subject, d.Since.AsTime())
		}
	}
	if _, err := proto.Marshal(got[0]); err != nil {
		t.Error(err)
	}
}

// A fleet of 10,000 devices at 100 sites, with 200 deployments.
func largeFleet() (Objects, []Device) {
	var o Objects
	devices := make([]Device, 10000)
	for i := range devices {
		devices[i] = Device{
			Name: fmt.Sprintf("device-%05d", i), Class: "generic-x86-64",
			Labels: map[string]string{"site": fmt.Sprintf("s%02d", i%100), "tier": fmt.Sprint(i % 3), "line": fmt.Sprint(i % 17), "country": "de"},
			Limits: &dunlinv1.DeviceLimits{HostMemoryBytes: 8 << 30},
		}
	}
	for i := range 200 {
		d := Deployment{Name: fmt.Sprintf("dep-%03d", i), Model: fmt.Sprintf("model-%03d", i), Version: 2, Selector: map[string]string{"country": "de", "site": fmt.Sprintf("s%02d", i/2)}}
		r := Rollout{Number: int64(i), Deployment: d.Name, Model: d.Model, From: 1, To: 2, State: Running}
		for j := i / 2; j < len(devices); j += 100 {
			r.Devices = append(r.Devices, RolloutDevice{Device: devices[j].Name, Wave: 1, AdmittedAt: begin})
		}
		o.Deployments, o.Rollouts = append(o.Deployments, d), append(o.Rollouts, r)
		o.Versions = append(o.Versions, version(d.Model, 1), version(d.Model, 2))
		o.Routes = append(o.Routes, Route{Name: d.Name, Targets: []Target{{d.Model, 0, 1}}})
	}
	return o, devices
}

func BenchmarkNewCompiler(b *testing.B) {
	o, _ := largeFleet()
	for b.Loop() {
		NewCompiler(o)
	}
}

func BenchmarkCompile(b *testing.B) {
	o, devices := largeFleet()
	c := NewCompiler(o)
	i := 0
	for b.Loop() {
		if doc, _ := c.Compile(devices[i%len(devices)], nil); len(doc.Versions) != 2 {
			b.Fatal(doc)
		}
		i++
	}
}

func BenchmarkTouched(b *testing.B) {
	o, devices := largeFleet()
	after := o
	after.Deployments = slices.Clone(o.Deployments)
	after.Deployments[7].Version = 1
	for b.Loop() {
		n := 0
		touched := Touched(o, after)
		for _, d := range devices {
			if touched(d) {
				n++
			}
		}
		if n != 100 {
			b.Fatal(n)
		}
	}
}

func BenchmarkStep(b *testing.B) {
	_, devices := largeFleet()
	r := Rollout{Deployment: "d", Model: "m", From: 1, To: 2, State: Running, Strategy: Strategy{Waves: []Wave{{Canary: 1}, {Percent: 50}}, Gates: []Gate{{ErrorRate, .02}}, Deadline: time.Hour}}
	observations := make([]Observation, len(devices))
	for i, d := range devices {
		observations[i] = Observation{Device: d.Name, Class: d.Class, Connected: true, HeardAt: begin}
	}
	r, _ = r.Step(begin, observations)
	for b.Loop() {
		r.Step(begin.Add(time.Second), observations)
	}
}
