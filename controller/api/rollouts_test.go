package api

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/internal/link"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// up sends a message of a device.
func (w *world) up(t *testing.T, device, kind string, m proto.Message) {
	t.Helper()
	payload, err := proto.Marshal(m)
	must(t, err)
	w.dispatch.Handle(link.Up(device, kind), payload)
}

// Freezes and maintenances are shown as their documents have them, to those who
// have devices that they may be about.
func TestListObjects(t *testing.T) {
	w := start(t)
	const nights = "apiVersion: dunlin/v1\nkind: Maintenance\nmetadata: {name: nights}\nspec: {selector: {site: rome}, windows: [\"mon-fri 22:00-05:00\", \"sun 00:00-24:00\"], timezone: Europe/Rome}\n"
	call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: nights})
	q := &v1.ListObjectsRequest{Kind: fleet.KindMaintenance}
	all := call(t, w.objects(viewer).ListObjects, q).Objects
	if len(all) != 1 || all[0].Name != "nights" || all[0].Timezone != "Europe/Rome" || !slices.Equal(all[0].Windows, []string{"mon-fri 22:00-05:00", "sun 00:00-24:00"}) {
		t.Errorf("got %v", all)
	}
	for site, want := range map[string]int{"rome": 1, "berlin": 0} {
		token := call(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{Role: "operator", Scope: map[string]string{"site": site}}).Token
		if got := call(t, w.objects(token).ListObjects, q).Objects; len(got) != want {
			t.Errorf("%s is shown %v", site, got)
		}
		if want == 0 {
			refused(t, w.objects(token).Delete, &v1.DeleteRequest{Kind: fleet.KindMaintenance, Name: "nights"}, connect.CodePermissionDenied, "site=berlin")
			refused(t, w.objects(token).Apply, &v1.ApplyRequest{Documents: nights}, connect.CodePermissionDenied, "site=berlin")
		}
	}
}

// An operator commands a rollout by its id or its deployment, and what was
// decided is shown; who lacks the role or the scope does neither.
func TestControlRollout(t *testing.T) {
	w := start(t)
	w.join(t, "a") // away: nothing is decided but by operators
	w.push(t, "digits", 2)
	id := call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: deploymentDoc(1)}).Changes[0].Rollout
	c := w.rollouts(operator)
	const pause, abort = v1.ControlRolloutRequest_ACTION_PAUSE, v1.ControlRolloutRequest_ACTION_ABORT
	for _, tt := range []struct {
		q    *v1.ControlRolloutRequest
		code connect.Code
		part string
	}{
		{&v1.ControlRolloutRequest{Id: id}, connect.CodeInvalidArgument, "action 0 is not known"},
		{&v1.ControlRolloutRequest{Action: pause}, connect.CodeInvalidArgument, "either id or deployment"},
		{&v1.ControlRolloutRequest{Id: "x-1", Action: pause}, connect.CodeNotFound, "rollout x-1"},
		{&v1.ControlRolloutRequest{Id: id, Action: pause, Reason: strings.Repeat("x", fleet.MaxCommandReason+1)}, connect.CodeInvalidArgument, "reason has 1001 bytes, the limit is 1000"},
		{&v1.ControlRolloutRequest{Id: id, Action: v1.ControlRolloutRequest_ACTION_RESUME}, connect.CodeFailedPrecondition, "cannot resume rollout digits-1: it is running"},
	} {
		refused(t, c.ControlRollout, tt.q, tt.code, tt.part)
	}
	refused(t, w.rollouts(viewer).ControlRollout, &v1.ControlRolloutRequest{Id: id, Action: pause}, connect.CodePermissionDenied, "lacks the role operator")
	scoped := func(role, site string) string {
		return call(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{Role: role, Scope: map[string]string{"site": site}}).Token
	}
	// The deployment is of site demo: others do not even see it.
	refused(t, w.rollouts(scoped("operator", "rome")).ControlRollout, &v1.ControlRolloutRequest{Id: id, Action: pause}, connect.CodeNotFound, "")
	refused(t, w.rollouts(scoped("operator", "rome")).ListDecisions, &v1.ListDecisionsRequest{Id: id}, connect.CodeNotFound, "")

	if r := call(t, w.rollouts(scoped("operator", "demo")).ControlRollout, &v1.ControlRolloutRequest{Id: id, Action: pause, Reason: "lunch"}).Rollout; r.State != v1.RolloutState_ROLLOUT_STATE_PAUSED {
		t.Errorf("got %v", r)
	}
	if r := call(t, c.ControlRollout, &v1.ControlRolloutRequest{Deployment: "digits", Action: abort}).Rollout; r.State != v1.RolloutState_ROLLOUT_STATE_ABORTED || r.EndedAt == nil {
		t.Errorf("got %v", r)
	}
	decisions := call(t, w.rollouts(viewer).ListDecisions, &v1.ListDecisionsRequest{Deployment: "digits"}).Decisions
	var got []string
	for _, d := range decisions {
		if d.By != "controller" {
			got = append(got, d.Kind+" by "+d.By)
		}
	}
	if !slices.Equal(got, []string{"pause by user:admin", "abort by user:operator"}) {
		t.Errorf("decided %q", got)
	}
	records := w.audit(t, 10)
	if !slices.ContainsFunc(records, func(r *v1.AuditRecord) bool {
		return r.Action == "rollout.pause" && r.Reason == "lunch" && r.Object == "rollout/"+id
	}) {
		t.Errorf("got %v", records)
	}
}

// Of a rollout with many devices, those that are worth a look are shown, and
// all are counted.
func TestLargeRollout(t *testing.T) {
	r := fleet.Rollout{Deployment: "d", Strategy: fleet.Strategy{Waves: []fleet.Wave{{Canary: 1}}}}
	for i := range 5000 {
		d := fleet.RolloutDevice{Device: fmt.Sprintf("d%04d", i), Wave: 1, Phase: fleet.DeviceReady}
		switch {
		case i%1000 == 999:
			d.Phase = fleet.DeviceFailed
		case i%500 == 7:
			d.Phase = fleet.DeviceWorking
		case i >= 4000:
			d.Wave, d.Phase = 0, fleet.DeviceWaiting
		}
		r.Devices = append(r.Devices, d)
	}
	m := rollout(r, maxShown)
	count := map[v1.RolloutDevice_Phase]int{}
	for _, d := range m.Devices {
		count[d.Phase]++
	}
	if len(m.Devices) != maxShown || m.DeviceCount != 5000 || count[v1.RolloutDevice_PHASE_FAILED] != 5 || count[v1.RolloutDevice_PHASE_WORKING] != 10 || count[v1.RolloutDevice_PHASE_WAITING] != 0 {
		t.Errorf("%d of %d devices, by phase %v", len(m.Devices), m.DeviceCount, count)
	}
	if !slices.IsSortedFunc(m.Devices, func(a, b *v1.RolloutDevice) int { return strings.Compare(a.Device, b.Device) }) {
		t.Error("they are in no order")
	}
	if len(m.Waves) != 2 || m.Waves[0].Devices != 4003 || m.Waves[0].Failed != 5 || m.Waves[0].Name != "1 canary per class" {
		t.Errorf("got %v", m.Waves)
	}
	if m := rollout(r, 3); len(m.Devices) != 3 || m.Devices[2].Phase != v1.RolloutDevice_PHASE_FAILED {
		t.Errorf("got %v", m.Devices)
	}
}

// Drift is shown of the devices within the scope.
func TestListDrift(t *testing.T) {
	w := start(t)
	for _, name := range []string{"a", "b"} {
		w.join(t, name)
		w.up(t, name, link.Hello, &v1.Hello{BootId: "b", Session: "s"})
		w.up(t, name, link.Reported, &v1.Reported{Session: "s", Sequence: 1, Drifts: []*v1.Drift{{Kind: "file", Subject: "x"}, {Kind: "setting", Subject: name}}})
	}
	c := w.devices(viewer)
	list := func(q *v1.ListDriftRequest) string {
		t.Helper()
		var got []string
		for _, d := range call(t, c.ListDrift, q).Drifts {
			got = append(got, d.Device+" "+d.Drift.Kind+" "+d.Drift.Subject)
			if d.Drift.Since == nil {
				t.Errorf("%v: since when?", d)
			}
		}
		return strings.Join(got, ", ")
	}
	const all = "a file x, a setting a, b file x, b setting b"
	for deadline := time.Now().Add(20 * time.Second); list(&v1.ListDriftRequest{}) != all; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("got %s", list(&v1.ListDriftRequest{}))
		}
	}
	if got := list(&v1.ListDriftRequest{Device: "b"}); got != "b file x, b setting b" {
		t.Errorf("got %s", got)
	}
	if got := list(&v1.ListDriftRequest{Selector: map[string]string{"site": "rome"}}); got != "" {
		t.Errorf("got %s", got)
	}
	refused(t, c.ListDrift, &v1.ListDriftRequest{Device: "x"}, connect.CodeNotFound, "device x")
	c = w.devices(call(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{Role: "viewer", Scope: map[string]string{"site": "rome"}}).Token)
	if got := list(&v1.ListDriftRequest{}); got != "" {
		t.Errorf("got %s", got)
	}
}
