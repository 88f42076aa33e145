package api

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

func (w *world) profiles(token string) v1connect.ProfileServiceClient {
	return v1connect.NewProfileServiceClient(w.client, w.url, as(token))
}

// joinLimited joins a device of class board whose models may take so many bytes.
func (w *world) joinLimited(t *testing.T, name string, budget uint64) {
	t.Helper()
	w.joinAs(t, name, &v1.DeviceInfo{
		FirmwareProfile: "board", Limits: &v1.DeviceLimits{HostMemoryBytes: budget, Fp32Gflops: 1, MemoryGbPerSecond: 1},
	})
}

func (w *world) pushLarge(t *testing.T, model string, weights uint64) store.Version {
	t.Helper()
	v, _, err := w.store.CreateVersion(t.Context(), store.Version{Model: model, Digest: fmt.Sprintf("%s-%d", model, weights), Size: 1, CreatedBy: "user:test",
		Bundle: &fleet.Bundle{WeightBytes: weights, Costs: &models.Costs{FLOPs: models.Linear{PerRow: 1e6}}}})
	must(t, err)
	return v
}

// Plan says what Apply and the rollout will do, from the best that is known.
func TestPlan(t *testing.T) {
	w := start(t)
	w.joinLimited(t, "large", 900<<20)
	w.joinLimited(t, "small", 100<<20)
	w.join(t, "silent")
	w.pushLarge(t, "digits", 1<<20)
	v2 := w.pushLarge(t, "digits", 500<<20)
	other := w.pushLarge(t, "other", 600<<20)
	c := w.profiles(viewer)
	refused(t, c.Plan, &v1.PlanRequest{Documents: deploymentDoc(7)}, connect.CodeInvalidArgument, "digits has no version 7")
	refused(t, c.Plan, &v1.PlanRequest{}, connect.CodeInvalidArgument, "there is no document")
	say := func(plans []*v1.DevicePlan) string {
		var out []string
		for _, p := range plans {
			verdict := strings.TrimPrefix(p.GetVerdict().String(), "VERDICT_")
			out = append(out, fmt.Sprintf("%s/%s %s:%d %s", p.GetDeployment(), p.GetDevice(), p.GetModel(), p.GetVersion(), verdict))
		}
		return strings.Join(out, ", ")
	}
	before := call(t, c.Plan, &v1.PlanRequest{Documents: deploymentDoc(2)}).Devices
	const want = "digits/large digits:2 FITS, digits/silent digits:2 UNSPECIFIED, digits/small digits:2 DOES_NOT_FIT"
	if got := say(before); got != want {
		t.Fatalf("got %s", got)
	}
	p := before[2]
	if p.GetMemorySource() != v1.DevicePlan_SOURCE_ESTIMATED || p.GetMemoryBytes() < 500<<20 || p.GetBudgetBytes() != 100<<20 || p.GetTotalBytes() < p.GetMemoryBytes() ||
		p.GetLatencySeconds() != 0.001 || p.GetLatencySource() != v1.DevicePlan_SOURCE_ESTIMATED || p.Joules != nil || p.GetEnergySource() != v1.DevicePlan_SOURCE_UNKNOWN ||
		!strings.Contains(p.GetReason(), "the budget is 100.0 MiB") {
		t.Errorf("got %v", p)
	}
	if got := call(t, w.objects(operator).ListDeployments, &v1.ListDeploymentsRequest{}).Deployments; len(got) > 0 {
		t.Errorf("plan applied %v", got)
	}

	// Another deployment in the same documents makes it swap.
	second := strings.ReplaceAll(deploymentDoc(1), "digits", "other")
	got := call(t, c.Plan, &v1.PlanRequest{Documents: deploymentDoc(2) + "---\n" + second}).Devices
	if say(got[:1]) != "digits/large digits:2 FITS_WITH_SWAPPING" || !strings.Contains(got[0].GetReason(), "together with other:1") {
		t.Errorf("got %v", got[0])
	}

	o := w.objects(operator)
	dry := call(t, o.Apply, &v1.ApplyRequest{Documents: deploymentDoc(2), DryRun: true})
	if got := say(dry.GetRefused()); got != "digits/small digits:2 DOES_NOT_FIT" {
		t.Errorf("dry run: refused %s", got)
	}
	if got := call(t, o.Apply, &v1.ApplyRequest{Documents: deploymentDoc(1)}).GetRefused(); len(got) > 0 {
		t.Errorf("refused %v", got)
	}
	// Whether there is a version to go back to depends on how far the first one
	// came: it halts in any case.
	halting := strings.Replace(deploymentDoc(2), "}}\n", "}, rollout: {onFailure: halt}}\n", 1)
	if got := say(call(t, o.Apply, &v1.ApplyRequest{Documents: halting}).GetRefused()); got != "digits/small digits:2 DOES_NOT_FIT" {
		t.Errorf("refused %s", got)
	}
	// One that is away is not given anything, nor refused.
	hello, err := proto.Marshal(&v1.Hello{BootId: "b", Session: "s"})
	must(t, err)
	w.dispatch.Handle(link.Up("small", link.Hello), hello)
	changed := w.dispatch.Changed()
	for {
		r := call(t, w.rollouts(viewer).GetRollout, &v1.GetRolloutRequest{Deployment: "digits"}).Rollout
		if r.GetState() == v1.RolloutState_ROLLOUT_STATE_HALTED {
			if !strings.Contains(r.GetReason(), "small (does not fit: ") {
				t.Error(r.GetReason())
			}
			break
		}
		select {
		case <-changed:
		case <-time.After(30 * time.Second):
			t.Fatalf("the rollout is %v", r)
		}
		changed = w.dispatch.Changed()
	}
	if got := call(t, o.ListDeployments, &v1.ListDeploymentsRequest{}).Deployments[0]; got.GetFailed() != 1 || got.GetDevices() != 3 {
		t.Errorf("got %v", got)
	}

	// Measured on the class, it is smaller.
	_, measured, err := w.store.AddEvents(t.Context(), "large", "o", []*v1.Event{{Sequence: 1, Kind: "profile.measured", Profile: &v1.ModelProfile{
		Model: "digits", Version: 2, Digest: v2.Digest, FirmwareProfile: "board", WeightBytes: 50 << 20, Latency: []*v1.LatencyPoint{{Rows: 1, Seconds: 0.5}},
	}}, {Sequence: 2, Kind: "profile.measured", Profile: &v1.ModelProfile{Model: "other", Version: 1, Digest: other.Digest, FirmwareProfile: "desk"}}})
	must(t, err)
	if !measured {
		t.Error("no news")
	}
	after := call(t, c.Plan, &v1.PlanRequest{Documents: deploymentDoc(2)}).Devices
	if p := after[2]; p.GetDevice() != "small" || p.GetVerdict() != v1.DevicePlan_VERDICT_FITS || p.GetMemoryBytes() != 50<<20 || p.GetLatencySeconds() != 0.5 ||
		p.GetMemorySource() != v1.DevicePlan_SOURCE_MEASURED_ON_CLASS || p.GetMeasuredOn() != "large" {
		t.Errorf("got %v", p)
	}
	if p := after[0]; p.GetMemorySource() != v1.DevicePlan_SOURCE_MEASURED_HERE {
		t.Errorf("got %v", p)
	}
	profiles := call(t, c.ListProfiles, &v1.ListProfilesRequest{}).Profiles
	if len(profiles) != 2 || profiles[0].GetDevice() != "large" || profiles[0].GetProfile().GetWeightBytes() != 50<<20 {
		t.Errorf("got %v", profiles)
	}
	for want, q := range map[int]*v1.ListProfilesRequest{0: {FirmwareProfile: "desk"}, 1: {FirmwareProfile: "board"}, 2: {Device: "large"}} {
		if got := call(t, c.ListProfiles, q).Profiles; len(got) != want {
			t.Errorf("%v: got %v", q, got)
		}
	}
}
