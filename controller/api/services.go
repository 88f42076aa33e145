package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/enrol"
	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// The limits of requests.
const (
	maxUses         = 10000
	defaultValidFor = time.Hour
	maxValidFor     = 30 * 24 * time.Hour
	maxReason       = 1024 // bytes
	defaultEvents   = 100
	maxEvents       = 10000
	maxRollouts     = 1000 // that one call lists
	maxShown        = 1000 // devices of a rollout that is listed or watched
	maxListed       = 20_000
	watchEvery      = 250 * time.Millisecond
)

func invalid(format string, args ...any) error { return enrol.Invalid(format, args...) }

func caller(ctx context.Context) string { return identity.FromContext(ctx).String() }

func (s *server) WhoAmI(ctx context.Context, _ *connect.Request[v1.WhoAmIRequest]) (*connect.Response[v1.WhoAmIResponse], error) {
	p := identity.FromContext(ctx)
	return connect.NewResponse(&v1.WhoAmIResponse{
		Name: p.Name, Role: string(p.Role), ControllerVersion: s.Version, RegistryUrl: registryURL(ctx), Scope: p.Scope, ExpiresAt: timestamp(p.Expires),
	}), nil
}

func (s *server) Join(ctx context.Context, req *connect.Request[v1.JoinRequest]) (*connect.Response[v1.JoinResponse], error) {
	attempt := identity.Attempt{From: identity.FromContext(ctx).From, Credential: req.Msg.GetJoinToken()}
	if err := s.Auth.Guard().Check(attempt); err != nil {
		return nil, err
	}
	answer, err := s.Enrol.Join(ctx, req.Msg, deviceURL(ctx))
	switch {
	case err == nil:
		s.Auth.Guard().Right(attempt)
	case errors.Is(err, store.ErrRefused):
		s.Auth.Guard().Wrong(attempt)
	}
	return response(answer, err)
}

func (s *server) Renew(ctx context.Context, req *connect.Request[v1.RenewRequest]) (*connect.Response[v1.RenewResponse], error) {
	answer, err := s.Enrol.Renew(ctx, req.Msg, deviceURL(ctx))
	return response(answer, err)
}

func (s *server) GetTime(ctx context.Context, req *connect.Request[v1.GetTimeRequest]) (*connect.Response[v1.GetTimeResponse], error) {
	answer, err := s.Enrol.Time(ctx, req.Msg)
	return response(answer, err)
}

func response[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}

func (s *server) accountsChanged(ctx context.Context) error {
	if s.AccountsChanged == nil {
		return nil
	}
	return s.AccountsChanged(ctx)
}

func (s *server) CreateJoinToken(ctx context.Context, req *connect.Request[v1.CreateJoinTokenRequest]) (*connect.Response[v1.CreateJoinTokenResponse], error) {
	m := req.Msg
	uses := max(m.GetUses(), 1)
	if uses > maxUses {
		return nil, invalid("uses is %d, the limit is %d", uses, maxUses)
	}
	validFor := defaultValidFor
	if m.GetValidFor() != nil {
		if validFor = m.GetValidFor().AsDuration(); validFor <= 0 || validFor > maxValidFor {
			return nil, invalid("valid_for is %s, it must be above 0 and at most %s", validFor, maxValidFor)
		}
	}
	if err := fleet.CheckLabels(m.GetLabels()); err != nil {
		return nil, invalid("labels: %w", err)
	}
	if err := identity.Allow(identity.FromContext(ctx), v1connect.EnrollmentServiceCreateJoinTokenProcedure, m.GetLabels()); err != nil {
		return nil, err
	}
	if m.GetDevice() != "" {
		if uses != 1 {
			return nil, invalid("uses is %d, a join token for one device has 1", uses)
		}
		if err := link.CheckDevice(m.GetDevice()); err != nil {
			return nil, invalid("device: %w", err)
		}
		// It takes the place of that device.
		if len(identity.FromContext(ctx).Scope) > 0 {
			if _, err := s.seen(ctx, m.GetDevice()); err != nil {
				return nil, err
			}
		}
	}
	secret, _ := identity.NewToken("dunlin_join_")
	token := pki.AppendPin(secret, s.Authorities.Pin())
	hashed, err := broker.HashPassword(token)
	if err != nil {
		return nil, err
	}
	t, err := s.Store.CreateJoinToken(ctx, caller(ctx), identity.Hash(token), store.JoinToken{
		UsesLeft: uses, ExpiresAt: time.Now().Add(validFor), Labels: m.GetLabels(), Device: m.GetDevice(), Broker: hashed,
	})
	if err != nil {
		return nil, err
	}
	// A device with its MQTT port only joins through the broker.
	if err := s.accountsChanged(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.CreateJoinTokenResponse{JoinToken: token, Info: joinToken(t)}), nil
}

func (s *server) ListJoinTokens(ctx context.Context, _ *connect.Request[v1.ListJoinTokensRequest]) (*connect.Response[v1.ListJoinTokensResponse], error) {
	tokens, err := s.joinTokens(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ListJoinTokensResponse{JoinTokens: convert(tokens, joinToken)}), nil
}

// joinTokens gives those within the caller's scope.
func (s *server) joinTokens(ctx context.Context) ([]store.JoinToken, error) {
	tokens, err := s.Store.JoinTokens(ctx)
	p := identity.FromContext(ctx)
	return slices.DeleteFunc(tokens, func(t store.JoinToken) bool { return !p.Covers(t.Labels) }), err
}

func (s *server) DeleteJoinToken(ctx context.Context, req *connect.Request[v1.DeleteJoinTokenRequest]) (*connect.Response[v1.DeleteJoinTokenResponse], error) {
	id := req.Msg.GetId()
	if len(identity.FromContext(ctx).Scope) > 0 {
		tokens, err := s.joinTokens(ctx)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(tokens, func(t store.JoinToken) bool { return t.ID == id }) {
			return nil, fmt.Errorf("join token %s: %w", id, store.ErrNotFound)
		}
	}
	if err := s.Store.DeleteJoinToken(ctx, caller(ctx), id); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.DeleteJoinTokenResponse{}), s.accountsChanged(ctx)
}

func (s *server) CreateVersion(ctx context.Context, req *connect.Request[v1.CreateVersionRequest]) (*connect.Response[v1.CreateVersionResponse], error) {
	m := req.Msg
	if err := models.CheckName(m.GetModel()); err != nil {
		return nil, invalid("model: %w", err)
	}
	if m.GetVersion() < 0 {
		return nil, invalid("version is %d, it must not be negative; 0 is the next one", m.GetVersion())
	}
	version, created, err := s.Registry.Ingest(ctx, m.GetModel(), m.GetDigest(), m.GetVersion(), caller(ctx))
	if err != nil {
		return nil, err
	}
	v, err := s.Store.Version(ctx, m.GetModel(), version)
	if err != nil {
		return nil, err
	}
	resp := &v1.CreateVersionResponse{Version: modelVersion(v), Created: created}
	return connect.NewResponse(resp), s.withSigners(ctx, v.Model, []*v1.ModelVersion{resp.Version})
}

func (s *server) ListModels(ctx context.Context, req *connect.Request[v1.ListModelsRequest]) (*connect.Response[v1.ListModelsResponse], error) {
	versions, err := s.Store.Versions(ctx, req.Msg.GetModel())
	if err != nil {
		return nil, err
	}
	resp := &v1.ListModelsResponse{Versions: convert(versions, modelVersion)}
	return connect.NewResponse(resp), s.withSigners(ctx, req.Msg.GetModel(), resp.Versions)
}

func (s *server) Apply(ctx context.Context, req *connect.Request[v1.ApplyRequest]) (*connect.Response[v1.ApplyResponse], error) {
	objects, err := fleet.Parse(req.Msg.GetDocuments())
	if err != nil {
		return nil, err
	}
	may := mayApply(identity.FromContext(ctx))
	for _, o := range objects {
		if err := may(o); err != nil {
			return nil, err
		}
	}
	changes, err := s.Store.Apply(ctx, caller(ctx), objects, req.Msg.GetDryRun(), may)
	if err != nil {
		return nil, err
	}
	resp := &v1.ApplyResponse{Changes: convert(changes, objectChange)}
	if !req.Msg.GetDryRun() {
		s.changed()
	}
	if resp.Refused, err = s.refused(ctx, objects); err != nil {
		// What was applied stays so, and rollouts say it too.
		s.Log.Warn("cannot say on which devices the deployments do not fit", "error", err)
	}
	return connect.NewResponse(resp), nil
}

// refused gives the devices that are not given a version because of objects:
// it does not fit, and they were not given it before.
func (s *server) refused(ctx context.Context, objects []fleet.Object) ([]*v1.DevicePlan, error) {
	plans, err := s.plan(ctx, objects)
	if err != nil {
		return nil, err
	}
	plans = slices.DeleteFunc(plans, func(p *v1.DevicePlan) bool { return p.GetVerdict() != v1.DevicePlan_VERDICT_DOES_NOT_FIT })
	had, err := s.Store.Documents(ctx, convert(plans, (*v1.DevicePlan).GetDevice))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(plans, func(p *v1.DevicePlan) bool {
		return slices.ContainsFunc(had[p.GetDevice()].GetVersions(), func(v *v1.DesiredVersion) bool {
			return v.GetModel() == p.GetModel() && v.GetVersion() == p.GetVersion()
		})
	}), nil
}

// plan says of each deployment among objects on which devices it fits, once
// all of them are applied.
func (s *server) plan(ctx context.Context, objects []fleet.Object) ([]*v1.DevicePlan, error) {
	snap, err := s.Store.Suppose(ctx, objects)
	if err != nil {
		return nil, err
	}
	asked := map[string]bool{}
	for _, o := range objects {
		if o.Deployment != nil {
			asked[o.Name()] = true
		}
	}
	compiler := fleet.NewCompiler(snap.Objects)
	var plans []*v1.DevicePlan
	for _, dev := range snap.Devices {
		d := dev.Fleet()
		if t := s.Dispatch.Telemetry(dev.Name); t != nil && t.DiskFreeBytes != nil {
			d.DiskFree = t.DiskFreeBytes
		}
		fits, deployments := compiler.Plan(d)
		for i, fit := range fits {
			if asked[deployments[i].Name] {
				plans = append(plans, devicePlan(dev.Name, deployments[i].Name, fit))
			}
		}
	}
	slices.SortFunc(plans, func(a, b *v1.DevicePlan) int {
		return cmp.Or(cmp.Compare(a.GetDeployment(), b.GetDeployment()), cmp.Compare(a.GetDevice(), b.GetDevice()))
	})
	return plans, nil
}

func (s *server) Plan(ctx context.Context, req *connect.Request[v1.PlanRequest]) (*connect.Response[v1.PlanResponse], error) {
	objects, err := fleet.Parse(req.Msg.GetDocuments())
	if err != nil {
		return nil, err
	}
	plans, err := s.plan(ctx, narrow(identity.FromContext(ctx), objects))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.PlanResponse{Devices: plans}), nil
}

func (s *server) ListProfiles(ctx context.Context, req *connect.Request[v1.ListProfilesRequest]) (*connect.Response[v1.ListProfilesResponse], error) {
	m := req.Msg
	profiles, err := s.Store.Profiles(ctx, store.ProfileFilter{Model: m.GetModel(), Version: m.GetVersion(), Device: m.GetDevice(), Class: m.GetFirmwareProfile()})
	if err != nil {
		return nil, err
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	profiles = slices.DeleteFunc(profiles, func(p store.DeviceProfile) bool { return !v.sees(p.Device) })
	return connect.NewResponse(&v1.ListProfilesResponse{Profiles: convert(profiles, deviceProfile)}), nil
}

// changed starts what follows from a change of the objects.
func (s *server) changed() {
	s.Dispatch.Replan()
	s.Dispatch.Notify() // rollouts were superseded
}

func (s *server) Delete(ctx context.Context, req *connect.Request[v1.DeleteRequest]) (*connect.Response[v1.DeleteResponse], error) {
	if k := req.Msg.GetKind(); !slices.Contains(fleet.Kinds, k) {
		return nil, invalid("kind %q is none of %s", k, strings.Join(fleet.Kinds, ", "))
	}
	c, err := s.Store.Delete(ctx, caller(ctx), req.Msg.GetKind(), req.Msg.GetName(), mayDelete(identity.FromContext(ctx)))
	if err != nil {
		return nil, err
	}
	s.changed()
	return connect.NewResponse(&v1.DeleteResponse{Change: objectChange(c)}), nil
}

func (s *server) ListDeployments(ctx context.Context, _ *connect.Request[v1.ListDeploymentsRequest]) (*connect.Response[v1.ListDeploymentsResponse], error) {
	objects, err := s.Store.Objects(ctx, fleet.KindDeployment)
	if err != nil {
		return nil, err
	}
	devices, err := s.list.fleet(ctx)
	if err != nil {
		return nil, err
	}
	p := identity.FromContext(ctx)
	resp := &v1.ListDeploymentsResponse{}
	byName := map[string]*v1.Deployment{}
	deployments := make([]fleet.Deployment, 0, len(objects))
	for _, o := range objects {
		d := deployment(o)
		if _, ok := p.Narrow(d.Selector); ok {
			resp.Deployments = append(resp.Deployments, d)
		}
		byName[d.Name] = d
		deployments = append(deployments, *o.Deployment)
	}
	for _, dev := range devices {
		if !p.Covers(dev.Labels) {
			continue
		}
		for _, dep := range fleet.Assign(dev.Fleet(), deployments) {
			d := byName[dep.Name]
			d.Devices++
			refused := slices.ContainsFunc(s.Dispatch.Refused(dev.Name), func(r fleet.Refusal) bool {
				return r.Deployment == dep.Name && r.Version == dep.Version
			})
			switch o := dev.Observe(s.Store.Incarnation(), dep.Model, dep.Version); {
			case o.Serving:
				d.Ready++
			case o.Quarantined, refused:
				d.Failed++
			}
		}
	}
	return connect.NewResponse(resp), nil
}

func (s *server) ListRoutes(ctx context.Context, _ *connect.Request[v1.ListRoutesRequest]) (*connect.Response[v1.ListRoutesResponse], error) {
	objects, err := s.Store.Objects(ctx, fleet.KindRoute)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ListRoutesResponse{Routes: convert(objects, route)}), nil
}

func (s *server) ListRollouts(ctx context.Context, req *connect.Request[v1.ListRolloutsRequest]) (*connect.Response[v1.ListRolloutsResponse], error) {
	rollouts, err := s.Store.RolloutsWithin(ctx, req.Msg.GetDeployment(), maxRollouts, maxListed)
	if err != nil {
		return nil, err
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	resp := &v1.ListRolloutsResponse{}
	left := maxListed
	for _, r := range rollouts {
		if r, ok := v.rollout(r); ok {
			m := rollout(r, min(maxShown, left))
			left -= len(m.GetDevices())
			resp.Rollouts = append(resp.Rollouts, m)
		}
	}
	return connect.NewResponse(resp), nil
}

// find gives what the caller sees of a rollout by its id, or of the newest of
// a deployment.
func (s *server) find(ctx context.Context, id, deployment string) (fleet.Rollout, error) {
	r, err := s.whole(ctx, id, deployment)
	if err != nil {
		return r, err
	}
	return s.within(ctx, r)
}

// follow is find for those who look often: it does not ask the store while the
// dispatcher has the rollout.
func (s *server) follow(ctx context.Context, id string) (fleet.Rollout, error) {
	if r, ok := s.Dispatch.Rollout(id); ok {
		return s.within(ctx, r)
	}
	return s.find(ctx, id, "")
}

func (s *server) within(ctx context.Context, r fleet.Rollout) (fleet.Rollout, error) {
	v, err := s.view(ctx)
	if err != nil {
		return r, err
	}
	r, ok := v.rollout(r)
	if !ok {
		return r, fmt.Errorf("rollout %s: %w", r.ID(), store.ErrNotFound)
	}
	return r, nil
}

// whole gives a rollout with all of its devices.
func (s *server) whole(ctx context.Context, id, deployment string) (fleet.Rollout, error) {
	if err := eitherOf(id, deployment); err != nil {
		return fleet.Rollout{}, err
	}
	if id != "" {
		return s.Store.Rollout(ctx, id)
	}
	newest, err := s.Store.Rollouts(ctx, deployment, 1)
	if err != nil {
		return fleet.Rollout{}, err
	}
	if len(newest) == 0 {
		return fleet.Rollout{}, fmt.Errorf("rollout of deployment %q: %w", deployment, store.ErrNotFound)
	}
	return newest[0], nil
}

func eitherOf(id, deployment string) error {
	if (id == "") == (deployment == "") {
		return invalid("give either id or deployment")
	}
	return nil
}

func (s *server) GetRollout(ctx context.Context, req *connect.Request[v1.GetRolloutRequest]) (*connect.Response[v1.GetRolloutResponse], error) {
	r, err := s.find(ctx, req.Msg.GetId(), req.Msg.GetDeployment())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.GetRolloutResponse{Rollout: rollout(r, len(r.Devices))}), nil
}

func (s *server) WatchRollout(ctx context.Context, req *connect.Request[v1.WatchRolloutRequest], stream *connect.ServerStream[v1.WatchRolloutResponse]) error {
	changed := s.Dispatch.Changed()
	r, err := s.find(ctx, req.Msg.GetId(), req.Msg.GetDeployment())
	if err != nil {
		return err
	}
	for sent := false; ; {
		if !sent {
			if err := stream.Send(&v1.WatchRolloutResponse{Rollout: rollout(r, maxShown)}); err != nil {
				return err
			}
		}
		if r.State.Ended() {
			return nil
		}
		next := time.NewTimer(watchEvery)
		if err := until(ctx, s.Stopping, changed); err != nil {
			return err
		}
		if err := until(ctx, s.Stopping, next.C); err != nil {
			return err
		}
		changed = s.Dispatch.Changed()
		if ctx, err = s.again(ctx, v1connect.RolloutServiceWatchRolloutProcedure); err != nil {
			return err
		}
		now, err := s.follow(ctx, r.ID())
		if err != nil {
			return err
		}
		sent, r = now.Equal(r), now
	}
}

// until waits for something.
func until[T any](ctx context.Context, stopping <-chan struct{}, c <-chan T) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-stopping:
		return connect.NewError(connect.CodeUnavailable, errors.New("the controller stops"))
	case <-c:
		return nil
	}
}

var commands = map[v1.ControlRolloutRequest_Action]fleet.Command{
	v1.ControlRolloutRequest_ACTION_PAUSE:     fleet.CommandPause,
	v1.ControlRolloutRequest_ACTION_RESUME:    fleet.CommandResume,
	v1.ControlRolloutRequest_ACTION_PROMOTE:   fleet.CommandPromote,
	v1.ControlRolloutRequest_ACTION_ABORT:     fleet.CommandAbort,
	v1.ControlRolloutRequest_ACTION_ROLL_BACK: fleet.CommandRollBack,
}

func (s *server) ControlRollout(ctx context.Context, req *connect.Request[v1.ControlRolloutRequest]) (*connect.Response[v1.ControlRolloutResponse], error) {
	m := req.Msg
	command, ok := commands[m.GetAction()]
	if !ok {
		return nil, invalid("action %d is not known", m.GetAction())
	}
	if err := eitherOf(m.GetId(), m.GetDeployment()); err != nil {
		return nil, err
	}
	if n := len(m.GetReason()); n > fleet.MaxCommandReason {
		return nil, invalid("reason has %d bytes, the limit is %d", n, fleet.MaxCommandReason)
	}
	p := identity.FromContext(ctx)
	// One that the caller does not see is not there for them.
	if _, err := s.find(ctx, m.GetId(), m.GetDeployment()); err != nil {
		return nil, err
	}
	r, err := s.Store.ControlRollout(ctx, caller(ctx), m.GetId(), m.GetDeployment(), command, m.GetReason(), func(o fleet.Object) error {
		return about(o, identity.Allow(p, v1connect.RolloutServiceControlRolloutProcedure, o.Deployment.Selector))
	})
	if err != nil {
		return nil, err
	}
	s.changed()
	return connect.NewResponse(&v1.ControlRolloutResponse{Rollout: rollout(r, maxShown)}), nil
}

func (s *server) ListDecisions(ctx context.Context, req *connect.Request[v1.ListDecisionsRequest]) (*connect.Response[v1.ListDecisionsResponse], error) {
	r, err := s.whole(ctx, req.Msg.GetId(), req.Msg.GetDeployment())
	if err != nil {
		return nil, err
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	if _, ok := v.rollout(r); !ok {
		return nil, fmt.Errorf("rollout %s: %w", r.ID(), store.ErrNotFound)
	}
	decisions, err := s.Store.Decisions(ctx, r.ID())
	if err != nil {
		return nil, err
	}
	for i := range decisions {
		decisions[i] = v.decision(decisions[i])
	}
	return connect.NewResponse(&v1.ListDecisionsResponse{Decisions: convert(decisions, decision)}), nil
}

func (s *server) ListDevices(ctx context.Context, req *connect.Request[v1.ListDevicesRequest]) (*connect.Response[v1.ListDevicesResponse], error) {
	if err := checkPage(req.Msg); err != nil {
		return nil, err
	}
	if req.Msg.GetLimit() > 0 {
		resp, err := s.pageOf(ctx, req.Msg)
		if err != nil {
			return nil, err
		}
		return connect.NewResponse(resp), nil
	}
	var all []*store.Device
	var names []string // none: all
	if name := req.Msg.GetDevice(); name != "" {
		d, err := s.seen(ctx, name)
		if err != nil {
			return nil, err
		}
		all, names = append(all, d), []string{name}
	} else {
		var err error
		if all, err = s.Store.Devices(ctx); err != nil {
			return nil, err
		}
	}
	known, err := s.Store.Identities(ctx, names...)
	if err != nil {
		return nil, err
	}
	p := identity.FromContext(ctx)
	resp := &v1.ListDevicesResponse{}
	for _, d := range all {
		if p.Covers(d.Labels) && fleet.Matches(req.Msg.GetSelector(), d.Fleet()) {
			resp.Devices = append(resp.Devices, s.deviceOf(d, known[d.Name], time.Now()))
		}
	}
	if req.Msg.GetDevice() != "" && len(resp.Devices) > 0 {
		documents, err := s.Store.Documents(ctx, []string{req.Msg.GetDevice()})
		if err != nil {
			return nil, err
		}
		resp.Devices[0].DesiredDocument = documents[req.Msg.GetDevice()]
	}
	return connect.NewResponse(resp), nil
}

func (s *server) RemoveDevice(ctx context.Context, req *connect.Request[v1.RemoveDeviceRequest]) (*connect.Response[v1.RemoveDeviceResponse], error) {
	if _, err := s.seen(ctx, req.Msg.GetDevice()); err != nil {
		return nil, err
	}
	if err := s.Store.RemoveDevice(ctx, caller(ctx), req.Msg.GetDevice()); err != nil {
		return nil, err
	}
	err := s.accountsChanged(ctx)
	s.Dispatch.Forget(req.Msg.GetDevice())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.RemoveDeviceResponse{}), nil
}

func (s *server) ListEvents(ctx context.Context, req *connect.Request[v1.ListEventsRequest]) (*connect.Response[v1.ListEventsResponse], error) {
	limit := req.Msg.GetLimit()
	if limit > maxEvents {
		return nil, invalid("limit is %d, allowed are 1 to %d", limit, maxEvents)
	}
	if limit == 0 {
		limit = defaultEvents
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	var events []store.DeviceEvent
	switch name := req.Msg.GetDevice(); {
	case v.devices == nil:
		events, err = s.Store.Events(ctx, name, int(limit))
	case name == "":
		events, err = s.Store.EventsOf(ctx, v.names(), int(limit))
	case v.sees(name):
		events, err = s.Store.Events(ctx, name, int(limit))
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ListEventsResponse{Events: convert(events, deviceEvent)}), nil
}

func (s *server) ListDrift(ctx context.Context, req *connect.Request[v1.ListDriftRequest]) (*connect.Response[v1.ListDriftResponse], error) {
	if name := req.Msg.GetDevice(); name != "" {
		if _, err := s.seen(ctx, name); err != nil {
			return nil, err
		}
	}
	labels, err := s.Store.DeviceLabels(ctx)
	if err != nil {
		return nil, err
	}
	p := identity.FromContext(ctx)
	resp := &v1.ListDriftResponse{}
	drifts := s.Dispatch.Drifts()
	for _, name := range slices.Sorted(maps.Keys(drifts)) {
		l, ok := labels[name]
		if !ok || !p.Covers(l) || req.Msg.GetDevice() != "" && req.Msg.GetDevice() != name || !fleet.Matches(req.Msg.GetSelector(), fleet.Device{Labels: l}) {
			continue
		}
		for _, one := range drifts[name] {
			resp.Drifts = append(resp.Drifts, &v1.DeviceDrift{Device: name, Drift: one})
		}
	}
	return connect.NewResponse(resp), nil
}
