package api

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// convert gives f of each element.
func convert[A, B any](from []A, f func(A) B) []B {
	to := make([]B, len(from))
	for i, a := range from {
		to[i] = f(a)
	}
	return to
}

// timestamp leaves the zero time unset.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func joinToken(t store.JoinToken) *v1.JoinToken {
	return &v1.JoinToken{Id: t.ID, UsesLeft: t.UsesLeft, ExpiresAt: timestamp(t.ExpiresAt), Labels: t.Labels, Device: t.Device}
}

func modelVersion(v store.Version) *v1.ModelVersion {
	return &v1.ModelVersion{
		Model: v.Model, Version: v.Version, Digest: v.Digest, SizeBytes: uint64(v.Size), CreatedAt: timestamp(v.CreatedAt),
		CreatedBy: v.CreatedBy, Inputs: v.Inputs, Outputs: v.Outputs, Opset: v.Opset,
	}
}

func objectChange(c store.Change) *v1.ObjectChange {
	action := v1.ObjectChange_ACTION_CHANGED
	switch {
	case c.Before == c.After:
		action = v1.ObjectChange_ACTION_UNCHANGED
	case c.Before == "":
		action = v1.ObjectChange_ACTION_CREATED
	case c.After == "":
		action = v1.ObjectChange_ACTION_DELETED
	}
	return &v1.ObjectChange{Kind: c.Kind, Name: c.Name, Action: action, Before: c.Before, After: c.After, Rollout: c.Rollout}
}

func deployment(o store.StoredObject) *v1.Deployment {
	d := o.Deployment
	return &v1.Deployment{Name: d.Name, Model: d.Model, Version: d.Version, Selector: d.Selector, UpdatedAt: timestamp(o.UpdatedAt), Yaml: o.YAML()}
}

func route(o store.StoredObject) *v1.Route {
	r := o.Route.Desired()
	return &v1.Route{Name: r.Name, Targets: r.Targets, UpdatedAt: timestamp(o.UpdatedAt), Yaml: o.YAML(), Rules: r.Rules, Sticky: r.Sticky, Fallback: r.Fallback, Shadow: r.Shadow, Cascade: r.Cascade}
}

var rolloutStates = map[fleet.State]v1.RolloutState{
	fleet.Running:     v1.RolloutState_ROLLOUT_STATE_RUNNING,
	fleet.Succeeded:   v1.RolloutState_ROLLOUT_STATE_SUCCEEDED,
	fleet.Failed:      v1.RolloutState_ROLLOUT_STATE_FAILED,
	fleet.Superseded:  v1.RolloutState_ROLLOUT_STATE_SUPERSEDED,
	fleet.Paused:      v1.RolloutState_ROLLOUT_STATE_PAUSED,
	fleet.Halted:      v1.RolloutState_ROLLOUT_STATE_HALTED,
	fleet.RollingBack: v1.RolloutState_ROLLOUT_STATE_ROLLING_BACK,
	fleet.RolledBack:  v1.RolloutState_ROLLOUT_STATE_ROLLED_BACK,
	fleet.Aborted:     v1.RolloutState_ROLLOUT_STATE_ABORTED,
}

var rolloutPhases = map[fleet.Phase]v1.RolloutDevice_Phase{
	fleet.DevicePending:    v1.RolloutDevice_PHASE_PENDING,
	fleet.DeviceWorking:    v1.RolloutDevice_PHASE_WORKING,
	fleet.DeviceReady:      v1.RolloutDevice_PHASE_READY,
	fleet.DeviceFailed:     v1.RolloutDevice_PHASE_FAILED,
	fleet.DeviceWaiting:    v1.RolloutDevice_PHASE_WAITING,
	fleet.DeviceRolledBack: v1.RolloutDevice_PHASE_ROLLED_BACK,
}

// rollout gives a rollout with at most so many of its devices: those that are
// most worth a look.
func rollout(r fleet.Rollout, most int) *v1.Rollout {
	m := &v1.Rollout{
		Id: r.ID(), Deployment: r.Deployment, Model: r.Model, FromModel: r.FromModel, FromVersion: r.From, ToVersion: r.To,
		State: rolloutStates[r.State], Reason: r.Reason, StartedAt: timestamp(r.StartedAt), EndedAt: timestamp(r.EndedAt),
		Devices: convert(worthALook(r.Devices, most), rolloutDevice), DeviceCount: uint32(len(r.Devices)),
		Wave: uint32(r.Wave), Waves: convert(r.Progress(), rolloutWave), Gates: convert(r.Gates, gateResult),
	}
	if !r.State.Ended() {
		m.SoaksUntil = timestamp(r.SoaksUntil())
	}
	return m
}

// worthALook gives at most so many devices, by name: those that failed, then
// those on their way, then those that are done, then those that wait.
func worthALook(devices []fleet.RolloutDevice, most int) []fleet.RolloutDevice {
	if len(devices) <= most {
		return devices
	}
	rank := func(d fleet.RolloutDevice) int {
		switch d.Phase {
		case fleet.DeviceFailed:
			return 0
		case fleet.DevicePending, fleet.DeviceWorking:
			return 1
		case fleet.DeviceReady, fleet.DeviceRolledBack:
			return 2
		}
		return 3
	}
	left := make([]int, 4) // of each rank
	for _, d := range devices {
		left[rank(d)]++
	}
	for i := range left {
		left[i] = min(left[i], most)
		most -= left[i]
	}
	var some []fleet.RolloutDevice
	for _, d := range devices {
		if r := rank(d); left[r] > 0 {
			left[r]--
			some = append(some, d)
		}
	}
	return some
}

func rolloutDevice(d fleet.RolloutDevice) *v1.RolloutDevice {
	return &v1.RolloutDevice{
		Device: d.Device, Phase: rolloutPhases[d.Phase], Reason: d.Reason, BytesPresent: d.BytesPresent, BytesTotal: d.BytesTotal,
		Class: d.Class, Wave: uint32(d.Wave), Excused: d.Excused, ReadyAt: timestamp(d.ReadyAt),
	}
}

func rolloutWave(w fleet.WaveProgress) *v1.RolloutWave {
	return &v1.RolloutWave{
		Name: w.Wave.String(), Devices: uint32(w.Devices), Ready: uint32(w.Ready), Failed: uint32(w.Failed), Excused: uint32(w.Excused), StartedAt: timestamp(w.StartedAt),
	}
}

var gateVerdicts = map[fleet.GateVerdict]v1.GateResult_Verdict{
	fleet.Passed:     v1.GateResult_VERDICT_PASSED,
	fleet.FailedGate: v1.GateResult_VERDICT_FAILED,
	fleet.NoSample:   v1.GateResult_VERDICT_NO_SAMPLE,
}

func gateResult(g fleet.GateResult) *v1.GateResult {
	return &v1.GateResult{
		Gate: string(g.Gate), Class: g.Class, Verdict: gateVerdicts[g.Verdict], NewFigure: g.New, OldFigure: g.Old, Value: g.Value, Limit: g.Limit,
		NewSamples: g.NewSamples, OldSamples: g.OldSamples, Reason: g.Reason,
	}
}

func decision(d fleet.Decision) *v1.Decision {
	return &v1.Decision{
		At: timestamp(d.At), Kind: string(d.Kind), Wave: uint32(d.Wave), By: d.By, Reason: d.Reason, Devices: d.Devices, DeviceCount: uint32(d.DeviceCount),
		Gates: convert(d.Gates, gateResult),
	}
}

func device(d *store.Device, incarnation string, t *v1.Telemetry, known *v1.DeviceIdentity) *v1.Device {
	m := &v1.Device{
		Name: d.Name, Labels: d.Labels, Info: d.Info, Connected: d.Connected, LastHeardAt: timestamp(d.LastHeardAt),
		JoinedAt: timestamp(d.JoinedAt), Reported: d.Reported, Telemetry: t, Identity: known,
	}
	if d.Desired > 0 {
		m.Desired = &v1.Generation{Incarnation: incarnation, Number: d.Desired}
	}
	return m
}

func deviceEvent(e store.DeviceEvent) *v1.DeviceEvent {
	return &v1.DeviceEvent{Device: e.Device, OutboxId: e.OutboxID, Event: e.Event, ReceivedAt: timestamp(e.ReceivedAt)}
}

var verdicts = map[fleet.Verdict]v1.DevicePlan_Verdict{
	fleet.Unknown:          v1.DevicePlan_VERDICT_UNSPECIFIED,
	fleet.Fits:             v1.DevicePlan_VERDICT_FITS,
	fleet.FitsWithSwapping: v1.DevicePlan_VERDICT_FITS_WITH_SWAPPING,
	fleet.DoesNotFit:       v1.DevicePlan_VERDICT_DOES_NOT_FIT,
}

var sources = map[fleet.Source]v1.DevicePlan_Source{
	fleet.SourceUnknown:   v1.DevicePlan_SOURCE_UNKNOWN,
	fleet.Estimated:       v1.DevicePlan_SOURCE_ESTIMATED,
	fleet.MeasuredOnClass: v1.DevicePlan_SOURCE_MEASURED_ON_CLASS,
	fleet.MeasuredHere:    v1.DevicePlan_SOURCE_MEASURED_HERE,
}

func devicePlan(device, deployment string, f fleet.Fit) *v1.DevicePlan {
	p := &v1.DevicePlan{
		Deployment: deployment, Device: device, Model: f.Version.Model, Version: f.Version.Version,
		Verdict: verdicts[f.Verdict], Reason: f.Reason, MemoryBytes: f.Need.Peak(), TotalBytes: f.Total, BudgetBytes: f.Budget,
		MemorySource: sources[f.Need.Memory], LatencySource: sources[f.Need.LatencyFrom], EnergySource: sources[f.Need.JoulesFrom],
		MeasuredOn: f.Need.MeasuredOn,
	}
	if f.Need.Latency > 0 {
		p.LatencySeconds = new(f.Need.Latency.Seconds())
	}
	if f.Need.Joules > 0 {
		p.Joules = new(f.Need.Joules)
	}
	return p
}

func deviceProfile(p store.DeviceProfile) *v1.DeviceProfile {
	return &v1.DeviceProfile{Device: p.Device, Profile: p.Profile}
}
