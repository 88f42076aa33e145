package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/enrol"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

func TestMain(m *testing.M) {
	// The embedded registry starts one that nothing ends.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

// versions is the store as the registry sees it; nothing is pushed here.
type versions struct{ registry.Versions }

// silent is a broker without devices.
type silent struct {
	mu  sync.Mutex
	cut []string // devices whose session was ended
}

func (*silent) Publish(string, []byte) error { return nil }

func (s *silent) Disconnect(device string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut = append(s.cut, device)
}

type world struct {
	store    *store.Store
	bus      *silent
	dispatch *dispatch.Dispatcher
	url      string
	client   *http.Client
	accounts int // calls of AccountsChanged
	stopping chan struct{}
	site     site // whose keys sign

	mu sync.Mutex
	at time.Time // of the guard
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at
}

func (w *world) wait(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at = w.at.Add(d)
}

func start(t *testing.T) *world {
	t.Helper()
	st, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "store.db"), store.Options{})
	must(t, err)
	bus := &silent{}
	w := &world{store: st, bus: bus, stopping: make(chan struct{}), at: time.Now()}
	auth := identity.New(st, identity.Options{Guard: identity.NewGuard(w.now)})
	log := slog.New(slog.DiscardHandler)
	authorities, err := identity.OpenAuthorities(t.Context(), st, t.TempDir(), []string{"localhost"}, time.Now)
	must(t, err)
	reg, err := registry.New(registry.Config{Root: t.TempDir(), Auth: auth, Refusals: st, Versions: versions{}, Log: log})
	must(t, err)
	w.site = newSite(t)
	must(t, st.AddTrust(t.Context(), "test", w.site.first))
	w.dispatch = dispatch.New(dispatch.Config{Store: st, Bus: bus, Log: log})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.dispatch.Run(ctx) }()
	accounts := func(context.Context) error { w.accounts++; return nil }
	enrolment := enrol.New(enrol.Config{
		Store: st, Authorities: authorities, Lifetime: identity.DeviceLifetime, Grace: identity.Grace, BrokerURL: "mqtts://localhost:8883",
		Roots: authorities.Roots, Trust: st.TrustSince,
		AccountsChanged: accounts, Joined: w.dispatch.Joined, Refusals: st, Now: time.Now, Log: log,
	})
	_, active := authorities.All()
	server := httptest.NewServer(pkitest.Showing(t, active, New(Config{
		Store: st, Dispatch: w.dispatch, Registry: reg, Auth: auth, Log: log, Version: "v1.2.3", SigningKey: w.site.controller.KeyId, Enrol: enrolment, Authorities: authorities,
		AccountsChanged: accounts, Stopping: w.stopping,
	})))
	w.url, w.client = server.URL, server.Client()
	t.Cleanup(func() {
		server.Close()
		cancel()
		if err := errors.Join(<-done, st.Close()); err != nil {
			t.Error(err)
		}
	})
	for _, role := range []identity.Role{identity.Viewer, identity.Operator, identity.Admin} {
		must(t, st.AddToken(t.Context(), string(role), role, identity.Hash(string(role)+"-token")))
	}
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// as adds a bearer token to each call.
func as(token string) connect.ClientOption {
	return connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			if token != "" {
				req.Header().Set("Authorization", "Bearer "+token)
			}
			return next(ctx, req)
		}
	}))
}

func call[Q, A any](t *testing.T, f func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), q *Q) *A {
	t.Helper()
	resp, err := f(t.Context(), connect.NewRequest(q))
	must(t, err)
	return resp.Msg
}

// refused calls and wants a code and a part of the message.
func refused[Q, A any](t *testing.T, f func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), q *Q, code connect.Code, part string) {
	t.Helper()
	_, err := f(t.Context(), connect.NewRequest(q))
	if connect.CodeOf(err) != code || !strings.Contains(fmt.Sprint(err), part) {
		t.Errorf("got %v, want %s with %q", err, code, part)
	}
}

func (w *world) enrollment(token string) v1connect.EnrollmentServiceClient {
	return v1connect.NewEnrollmentServiceClient(w.client, w.url, as(token))
}
func (w *world) objects(token string) v1connect.ObjectServiceClient {
	return v1connect.NewObjectServiceClient(w.client, w.url, as(token))
}
func (w *world) rollouts(token string) v1connect.RolloutServiceClient {
	return v1connect.NewRolloutServiceClient(w.client, w.url, as(token))
}
func (w *world) devices(token string) v1connect.DeviceServiceClient {
	return v1connect.NewDeviceServiceClient(w.client, w.url, as(token))
}

const (
	viewer   = "viewer-token"
	operator = "operator-token"
	admin    = "admin-token"
)

func (w *world) join(t *testing.T, name string) *v1.JoinResponse {
	t.Helper()
	return w.joinAs(t, name, nil)
}

func (w *world) joinAs(t *testing.T, name string, info *v1.DeviceInfo) *v1.JoinResponse {
	t.Helper()
	token := call(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{}).JoinToken
	_, csr := pkitest.Request(t, name)
	return call(t, w.enrollment("").Join, &v1.JoinRequest{JoinToken: token, Name: name, Csr: csr, Labels: map[string]string{"site": "demo"}, Info: info})
}

func (w *world) push(t *testing.T, model string, n int) {
	t.Helper()
	for i := range n {
		_, _, err := w.store.CreateVersion(t.Context(), store.Version{Model: model, Digest: fmt.Sprint("d", i), Size: 1, CreatedBy: "user:test"})
		must(t, err)
	}
}

func deploymentDoc(version int) string {
	return fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: digits}\nspec: {model: digits, version: %d, selector: {site: demo}}\n", version)
}

// Every procedure there is has a rule, and nobody with less may call it.
func TestAuthorisation(t *testing.T) {
	w := start(t)
	w.join(t, "dev")
	const expired, scoped = "expired-token", "scoped-token"
	for _, token := range []string{scoped, expired} { // the next one that is made sweeps those that have expired away
		made := store.Token{User: "admin", Scope: map[string]string{"site": "berlin"}}
		if token == expired {
			made.ExpiresAt = time.Now().Add(-time.Hour)
		}
		_, err := w.store.CreateToken(t.Context(), "user:admin", identity.Hash(token), made)
		must(t, err)
	}
	ranks := map[string]int{"": 0, "wrong": 0, expired: 0, "device": 0, viewer: 1, operator: 2, admin: 3, scoped: 3}
	need := map[identity.Role]int{identity.Anyone: 0, identity.Viewer: 1, identity.Operator: 2, identity.Admin: 3}
	for _, procedure := range allProcedures() {
		rule, ok := identity.RuleOf(procedure)
		if !ok {
			t.Errorf("%s has no rule", procedure)
		}
		for caller, rank := range ranks {
			contentType, body := "application/json", "{}"
			if strings.HasSuffix(procedure, "/WatchRollout") {
				contentType, body = "application/connect+json", "\x00\x00\x00\x00\x02{}"
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.url+procedure, strings.NewReader(body))
			must(t, err)
			req.Header.Set("Content-Type", contentType)
			switch caller {
			case "":
			case "device":
				req.Header.Set(pkitest.AsDevice, "dev")
			default:
				req.Header.Set("Authorization", "Bearer "+caller)
			}
			resp, err := w.client.Do(req)
			must(t, err)
			text := make([]byte, 4096)
			n, _ := resp.Body.Read(text)
			must(t, resp.Body.Close())
			got := string(text[:n])
			denied := strings.Contains(got, `"code":"unauthenticated"`) ||
				strings.Contains(got, `"code":"permission_denied"`) && (strings.Contains(got, "lacks the role") || strings.Contains(got, "has the scope"))
			w.wait(time.Minute) // no guess is too many here
			if strings.HasSuffix(procedure, "/Login") {
				denied = false // there are no name and password
			}
			if want := rank < need[rule.Least] || caller == scoped && rule.Scoping == identity.Whole; denied != want {
				t.Errorf("%s as %q: denied %v, want %v: %s", procedure, caller, denied, want, got)
			}
		}
	}
}

// allProcedures lists those of the protocol.
func allProcedures() (all []string) {
	descriptors := v1.File_dunlin_v1_api_proto.Services()
	for i := range descriptors.Len() {
		s := descriptors.Get(i)
		for j := range s.Methods().Len() {
			all = append(all, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name()))
		}
	}
	return all
}

func TestWhoAmI(t *testing.T) {
	w := start(t)
	got := call(t, v1connect.NewAuthServiceClient(w.client, w.url, as(viewer)).WhoAmI, &v1.WhoAmIRequest{})
	if got.Name != "viewer" || got.Role != "viewer" || got.ControllerVersion != "v1.2.3" || got.RegistryUrl != w.url {
		t.Errorf("got %v", got)
	}
}

func TestJoin(t *testing.T) {
	w := start(t)
	created := call(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{Uses: 2, ValidFor: durationpb.New(time.Minute), Labels: map[string]string{"site": "x"}})
	if created.Info.UsesLeft != 2 || created.Info.Id == "" || time.Until(created.Info.ExpiresAt.AsTime()) > time.Minute {
		t.Errorf("got %v", created.Info)
	}
	_, csr := pkitest.Request(t, "dev")
	good := func() *v1.JoinRequest {
		return &v1.JoinRequest{JoinToken: created.JoinToken, Name: "dev", Csr: csr, Labels: map[string]string{"a": "b"}, Info: &v1.DeviceInfo{Arch: "arm64"}}
	}
	join := w.enrollment("").Join
	for _, tt := range []struct {
		change func(*v1.JoinRequest)
		code   connect.Code
		part   string
	}{
		{func(r *v1.JoinRequest) { r.Name = "a/b" }, connect.CodeInvalidArgument, `name: device name "a/b" holds '/'`},
		{func(r *v1.JoinRequest) { r.Labels = map[string]string{"": ""} }, connect.CodeInvalidArgument, "labels: label key"},
		{func(r *v1.JoinRequest) { r.Info.Hostname = strings.Repeat("h", 16<<10) }, connect.CodeInvalidArgument, "the limit is 16384"},
		{func(r *v1.JoinRequest) { r.JoinToken = "other" }, connect.CodePermissionDenied, "join token is unknown"},
	} {
		r := good()
		tt.change(r)
		refused(t, join, r, tt.code, tt.part)
	}
	first, again := call(t, join, good()), call(t, join, good())
	if first.Device != "dev" || first.BrokerUrl == "" || !slices.EqualFunc(first.Identity.Certificates, again.Identity.Certificates, bytes.Equal) || w.accounts != 3 {
		t.Errorf("got %v, then %v; %d", first, again, w.accounts)
	}
	r := good()
	_, r.Csr = pkitest.Request(t, "dev")
	refused(t, join, r, connect.CodeAlreadyExists, "device dev: already exists")
	list := call(t, w.enrollment(admin).ListJoinTokens, &v1.ListJoinTokensRequest{})
	if len(list.JoinTokens) != 1 || list.JoinTokens[0].UsesLeft != 1 {
		t.Errorf("got %v", list)
	}
	refused(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{Uses: maxUses + 1}, connect.CodeInvalidArgument, "uses is 10001, the limit is 10000")
	refused(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{ValidFor: durationpb.New(maxValidFor + 1)}, connect.CodeInvalidArgument, "valid_for")
	refused(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{ValidFor: durationpb.New(-1)}, connect.CodeInvalidArgument, "valid_for")
}

func TestCreateVersionErrors(t *testing.T) {
	w := start(t)
	client := v1connect.NewModelServiceClient(w.client, w.url, as(operator))
	digest := "sha256:" + strings.Repeat("0", 64)
	refused(t, client.CreateVersion, &v1.CreateVersionRequest{Model: "No", Digest: digest}, connect.CodeInvalidArgument, "model: ")
	refused(t, client.CreateVersion, &v1.CreateVersionRequest{Model: "m", Digest: "x"}, connect.CodeInvalidArgument, "digest")
	refused(t, client.CreateVersion, &v1.CreateVersionRequest{Model: "m", Digest: digest, Version: -1}, connect.CodeInvalidArgument, "version is -1")
	refused(t, client.CreateVersion, &v1.CreateVersionRequest{Model: "m", Digest: digest}, connect.CodeNotFound, "")
}

func TestObjects(t *testing.T) {
	w := start(t)
	w.join(t, "dev")
	w.push(t, "digits", 2)
	c := w.objects(operator)
	refused(t, c.Apply, &v1.ApplyRequest{}, connect.CodeInvalidArgument, "there is no document")
	refused(t, c.Apply, &v1.ApplyRequest{Documents: deploymentDoc(0) + "---\n" + deploymentDoc(3) + "x: y\n"}, connect.CodeInvalidArgument, "document 2, line 10:1: x: is not known")
	refused(t, c.Apply, &v1.ApplyRequest{Documents: deploymentDoc(3)}, connect.CodeInvalidArgument, "document 1, line 4:23: spec.version: model digits has no version 3")
	refused(t, c.Apply, &v1.ApplyRequest{Documents: strings.Repeat("#", maxRequest)}, connect.CodeResourceExhausted, "")
	dry := call(t, c.Apply, &v1.ApplyRequest{Documents: deploymentDoc(1), DryRun: true})
	if got := dry.Changes[0]; got.Action != v1.ObjectChange_ACTION_CREATED || got.After == "" || got.Rollout != "" {
		t.Errorf("got %v", got)
	}
	applied := call(t, c.Apply, &v1.ApplyRequest{Documents: deploymentDoc(1)}).Changes[0]
	if applied.Action != v1.ObjectChange_ACTION_CREATED || applied.Rollout == "" {
		t.Errorf("got %v", applied)
	}
	if got := call(t, c.Apply, &v1.ApplyRequest{Documents: deploymentDoc(1)}).Changes[0]; got.Action != v1.ObjectChange_ACTION_UNCHANGED {
		t.Errorf("got %v", got)
	}
	if got := call(t, c.Apply, &v1.ApplyRequest{Documents: deploymentDoc(2)}).Changes[0]; got.Action != v1.ObjectChange_ACTION_CHANGED || got.Before == got.After {
		t.Errorf("got %v", got)
	}
	route := "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: [{model: digits, weight: 1}]}\n"
	call(t, c.Apply, &v1.ApplyRequest{Documents: route})
	if got := call(t, c.ListRoutes, &v1.ListRoutesRequest{}).Routes; len(got) != 1 || got[0].Targets[0].Model != "digits" || got[0].Yaml == "" {
		t.Errorf("got %v", got)
	}
	ruled := strings.Replace(route, "}]}", "}], sticky: {header: x}, rules: [{name: a, match: {cel: %s}, targets: [{model: digits, version: 2, weight: 1}]}]}", 1)
	refused(t, c.Apply, &v1.ApplyRequest{Documents: fmt.Sprintf(ruled, "nobody")}, connect.CodeInvalidArgument, "document 1, line 4:94: spec.rules[0].match.cel: column 1 of the expression: undeclared reference to 'nobody'")
	call(t, c.Apply, &v1.ApplyRequest{Documents: fmt.Sprintf(ruled, "'true'")})
	if got := call(t, c.ListRoutes, &v1.ListRoutesRequest{}).Routes[0]; len(got.Rules) != 1 || got.Rules[0].Targets[0].Version != 2 || got.Sticky.GetHeader() != "x" || !strings.Contains(got.Yaml, "rules:") {
		t.Errorf("got %v", got)
	}
	got := call(t, c.ListDeployments, &v1.ListDeploymentsRequest{}).Deployments
	if len(got) != 1 || got[0].Version != 2 || got[0].Devices != 1 || got[0].Ready != 0 || got[0].Selector["site"] != "demo" {
		t.Errorf("got %v", got)
	}
	refused(t, c.Delete, &v1.DeleteRequest{Kind: "Pod", Name: "x"}, connect.CodeInvalidArgument, `kind "Pod"`)
	refused(t, c.Delete, &v1.DeleteRequest{Kind: "Route", Name: "x"}, connect.CodeNotFound, "Route x")
	if got := call(t, c.Delete, &v1.DeleteRequest{Kind: "Route", Name: "r"}).Change; got.Action != v1.ObjectChange_ACTION_DELETED || got.Before == "" {
		t.Errorf("got %v", got)
	}
	records := w.audit(t, 1)
	if r := records[0]; r.Who != "user:operator" || r.Object != "Route/r" || !strings.HasPrefix(r.From, "127.0.0.1:") {
		t.Errorf("got %v", records)
	}
}

func (w *world) watch(t *testing.T, id string) *connect.ServerStreamForClient[v1.WatchRolloutResponse] {
	t.Helper()
	req := connect.NewRequest(&v1.WatchRolloutRequest{Id: id})
	req.Header().Set("Authorization", "Bearer "+viewer)
	stream, err := v1connect.NewRolloutServiceClient(w.client, w.url).WatchRollout(t.Context(), req)
	must(t, err)
	return stream
}

func TestRollouts(t *testing.T) {
	w := start(t)
	w.push(t, "digits", 2)
	id := call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: deploymentDoc(1)}).Changes[0].Rollout
	stream := w.watch(t, id)
	if !stream.Receive() || stream.Msg().Rollout.State != v1.RolloutState_ROLLOUT_STATE_RUNNING {
		t.Fatalf("got %v, %v", stream.Msg(), stream.Err())
	}
	// A newer one ends it, and the stream with it.
	newer := call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: deploymentDoc(2)}).Changes[0].Rollout
	var last *v1.Rollout
	for stream.Receive() {
		last = stream.Msg().Rollout
	}
	must(t, stream.Err())
	must(t, stream.Close())
	if last.GetState() != v1.RolloutState_ROLLOUT_STATE_SUPERSEDED || last.GetId() != id {
		t.Errorf("ended with %v", last)
	}
	c := w.rollouts(viewer)
	if got := call(t, c.GetRollout, &v1.GetRolloutRequest{Deployment: "digits"}).Rollout; got.Id != newer || got.FromVersion != 0 || got.ToVersion != 2 {
		t.Errorf("got %v", got)
	}
	if got := call(t, c.ListRollouts, &v1.ListRolloutsRequest{Deployment: "digits"}).Rollouts; len(got) != 2 || got[1].Id != id {
		t.Errorf("got %v", got)
	}
	refused(t, c.GetRollout, &v1.GetRolloutRequest{}, connect.CodeInvalidArgument, "either id or deployment")
	refused(t, c.GetRollout, &v1.GetRolloutRequest{Id: "x", Deployment: "y"}, connect.CodeInvalidArgument, "either id or deployment")
	refused(t, c.GetRollout, &v1.GetRolloutRequest{Id: "digits-99"}, connect.CodeNotFound, "rollout digits-99")
	refused(t, c.GetRollout, &v1.GetRolloutRequest{Deployment: "x"}, connect.CodeNotFound, "")

	// A stop ends streams.
	stream = w.watch(t, newer)
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	close(w.stopping)
	for stream.Receive() {
	}
	if code := connect.CodeOf(stream.Err()); code != connect.CodeUnavailable {
		t.Errorf("ended with %s", code)
	}
	_ = stream.Close()
}

// A stream tells nothing to one who may come in no more.
func TestWatchEndsWithItsToken(t *testing.T) {
	w := start(t)
	w.push(t, "digits", 2)
	id := call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: deploymentDoc(1)}).Changes[0].Rollout
	stream := w.watch(t, id)
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	call(t, w.users(admin).DeleteUser, &v1.DeleteUserRequest{Name: "viewer"})
	call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: deploymentDoc(2)})
	for stream.Receive() {
		// What became of it before may still be on its way.
		if stream.Msg().GetRollout().GetState() != v1.RolloutState_ROLLOUT_STATE_RUNNING {
			t.Errorf("got %v", stream.Msg())
		}
	}
	if code := connect.CodeOf(stream.Err()); code != connect.CodeUnauthenticated {
		t.Errorf("ended with %v", stream.Err())
	}
	_ = stream.Close()
}

func TestDevices(t *testing.T) {
	w := start(t)
	w.join(t, "b")
	w.join(t, "a")
	c := w.devices(admin)
	names := func(q *v1.ListDevicesRequest) (got []string) {
		t.Helper()
		for _, d := range call(t, c.ListDevices, q).Devices {
			got = append(got, d.Name)
		}
		return got
	}
	if got := names(&v1.ListDevicesRequest{}); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %v", got)
	}
	if got := names(&v1.ListDevicesRequest{Device: "b", Selector: map[string]string{"site": "demo"}}); !slices.Equal(got, []string{"b"}) {
		t.Errorf("got %v", got)
	}
	if got := names(&v1.ListDevicesRequest{Selector: map[string]string{"site": "other"}}); got != nil {
		t.Errorf("got %v", got)
	}
	refused(t, c.ListDevices, &v1.ListDevicesRequest{Device: "x"}, connect.CodeNotFound, "device x")
	_, _, err := w.store.AddEvents(t.Context(), "a", "o", []*v1.Event{{Sequence: 1, Kind: "k"}, {Sequence: 2, Kind: "l"}})
	must(t, err)
	events := call(t, c.ListEvents, &v1.ListEventsRequest{Device: "a", Limit: 1}).Events
	if len(events) != 1 || events[0].Event.Kind != "l" || events[0].OutboxId != "o" || events[0].ReceivedAt == nil {
		t.Errorf("got %v", events)
	}
	refused(t, c.ListEvents, &v1.ListEventsRequest{Limit: maxEvents + 1}, connect.CodeInvalidArgument, "limit is 10001")
	call(t, c.RemoveDevice, &v1.RemoveDeviceRequest{Device: "a"})
	refused(t, c.RemoveDevice, &v1.RemoveDeviceRequest{Device: "a"}, connect.CodeNotFound, "device a")
	if got := names(&v1.ListDevicesRequest{}); !slices.Equal(got, []string{"b"}) || w.accounts != 5 {
		t.Errorf("got %v, accounts changed %d times", got, w.accounts)
	}
}

// TestListTelemetry gives the kept samples, as many as are asked for.
func TestListTelemetry(t *testing.T) {
	w := start(t)
	w.join(t, "a")
	now := time.Now()
	for i := range 5 {
		must(t, w.store.AddTelemetry(t.Context(), []store.Sample{{Device: "a", ReceivedAt: now.Add(time.Duration(i+1) * time.Minute), Telemetry: &v1.Telemetry{CpuUtilisation: new(float64(i))}}}))
	}
	c := w.devices(viewer)
	until := timestamppb.New(now.Add(time.Hour))
	for limit, want := range map[uint32]int{0: 5, 2: 2, 2000: 5} {
		got := call(t, c.ListTelemetry, &v1.ListTelemetryRequest{Device: "a", Until: until, Limit: limit}).Samples
		if len(got) != want || got[len(got)-1].GetCpuUtilisation() < 3 {
			t.Errorf("limit %d: %v", limit, got)
		}
	}
	if got := call(t, c.ListTelemetry, &v1.ListTelemetryRequest{Device: "a"}).Samples; len(got) > 1 {
		t.Errorf("from now on: %v", got)
	}
	refused(t, c.ListTelemetry, &v1.ListTelemetryRequest{Device: "x"}, connect.CodeNotFound, "device x")
	refused(t, c.ListTelemetry, &v1.ListTelemetryRequest{Device: "a", Limit: maxSamples + 1}, connect.CodeInvalidArgument, "limit is 2001")
	refused(t, c.ListTelemetry, &v1.ListTelemetryRequest{Device: "a", From: until}, connect.CodeInvalidArgument, "must be before until")
}

// What is not the caller's fault is not shown to the caller.
func TestInternalErrors(t *testing.T) {
	w := start(t)
	must(t, w.store.Close())
	resp, err := w.client.Post(w.url+v1connect.AuthServiceWhoAmIProcedure, "application/json", strings.NewReader("{}"))
	must(t, err)
	must(t, resp.Body.Close())
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("without credentials: %s", resp.Status)
	}
	_, csr := pkitest.Request(t, "d")
	refused(t, w.enrollment("").Join, &v1.JoinRequest{Name: "d", Csr: csr}, connect.CodeInternal, "internal error; the controller's log says more")
}

// A store that was interrupted says so in its own words.
func TestDeadline(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), -1)
	defer cancel()
	err := gate{log: slog.New(slog.DiscardHandler)}.coded(ctx, "x", errors.New("interrupted"))
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("got %v", err)
	}
}
