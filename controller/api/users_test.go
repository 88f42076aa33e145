package api

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

func (w *world) auth(token string) v1connect.AuthServiceClient {
	return v1connect.NewAuthServiceClient(w.client, w.url, as(token))
}
func (w *world) users(token string) v1connect.UserServiceClient {
	return v1connect.NewUserServiceClient(w.client, w.url, as(token))
}

const password = "correct horse battery"

// audited gives the newest records as "who action object before > after".
func (w *world) audited(t *testing.T, n int) (lines []string) {
	t.Helper()
	records := w.audit(t, uint32(n))
	slices.Reverse(records)
	for _, r := range records {
		lines = append(lines, fmt.Sprintf("%s %s %s %s", r.Who, r.Action, r.Object, r.After))
	}
	return lines
}

func TestUsers(t *testing.T) {
	w := start(t)
	c := w.users(admin)
	for _, tt := range []struct {
		req  *v1.CreateUserRequest
		part string
	}{
		{&v1.CreateUserRequest{Name: "a b", Role: "viewer"}, `name "a b"`},
		{&v1.CreateUserRequest{Name: "oidc:ada", Role: "viewer"}, `name "oidc:ada"`},
		{&v1.CreateUserRequest{Name: "ada", Role: "root"}, `role "root" is none of viewer, operator, admin`},
		{&v1.CreateUserRequest{Name: "ada", Role: "viewer", Scope: map[string]string{"": ""}}, "scope: label key"},
		{&v1.CreateUserRequest{Name: "ada", Role: "viewer", Password: "short"}, "the password has 5 characters, allowed are 12 to 512"},
	} {
		refused(t, c.CreateUser, tt.req, connect.CodeInvalidArgument, tt.part)
	}
	ada := call(t, c.CreateUser, &v1.CreateUserRequest{Name: "ada", Role: "operator", Scope: map[string]string{"site": "berlin"}, Password: password}).User
	if ada.Name != "ada" || ada.Role != "operator" || ada.Scope["site"] != "berlin" || !ada.HasPassword || ada.External || ada.CreatedAt == nil {
		t.Errorf("got %v", ada)
	}
	refused(t, c.CreateUser, &v1.CreateUserRequest{Name: "ada", Role: "viewer"}, connect.CodeAlreadyExists, "user ada")

	login := call(t, w.auth("").Login, &v1.LoginRequest{Name: "ada", Password: password})
	who := call(t, w.auth(login.Token).WhoAmI, &v1.WhoAmIRequest{})
	if who.Name != "ada" || who.Role != "operator" || who.Scope["site"] != "berlin" || !who.ExpiresAt.AsTime().Equal(login.ExpiresAt.AsTime()) || time.Until(who.ExpiresAt.AsTime()) > loginValidFor {
		t.Errorf("got %v", who)
	}
	// What a user may is what its tokens allow, at once.
	call(t, c.UpdateUser, &v1.UpdateUserRequest{Name: "ada", Role: new("viewer"), SetScope: true, Scope: map[string]string{"site": "rome"}})
	if who = call(t, w.auth(login.Token).WhoAmI, &v1.WhoAmIRequest{}); who.Role != "viewer" || who.Scope["site"] != "rome" {
		t.Errorf("got %v", who)
	}
	call(t, c.UpdateUser, &v1.UpdateUserRequest{Name: "ada", Password: new("another long password")})
	refused(t, w.auth("").Login, &v1.LoginRequest{Name: "ada", Password: password}, connect.CodeUnauthenticated, "wrong credentials")
	if got := call(t, c.UpdateUser, &v1.UpdateUserRequest{Name: "ada", Password: new("")}).User; got.HasPassword || got.Role != "viewer" || got.Scope["site"] != "rome" {
		t.Errorf("got %v", got)
	}
	refused(t, w.auth("").Login, &v1.LoginRequest{Name: "ada", Password: ""}, connect.CodeUnauthenticated, "wrong credentials")
	refused(t, c.UpdateUser, &v1.UpdateUserRequest{Name: "eve"}, connect.CodeNotFound, `user "eve"`)
	refused(t, c.UpdateUser, &v1.UpdateUserRequest{Name: "ada", Scope: map[string]string{"a": "b"}}, connect.CodeInvalidArgument, "set_scope is false")
	refused(t, c.UpdateUser, &v1.UpdateUserRequest{Name: "ada", Role: new("root")}, connect.CodeInvalidArgument, "role")

	var names []string
	for _, u := range call(t, c.ListUsers, &v1.ListUsersRequest{}).Users {
		names = append(names, u.Name)
	}
	if diff := cmp.Diff([]string{"ada", "admin", "operator", "viewer"}, names); diff != "" {
		t.Error(diff)
	}
	call(t, c.DeleteUser, &v1.DeleteUserRequest{Name: "ada"})
	refused(t, c.DeleteUser, &v1.DeleteUserRequest{Name: "ada"}, connect.CodeNotFound, `user "ada"`)
	refused(t, w.auth(login.Token).WhoAmI, &v1.WhoAmIRequest{}, connect.CodeUnauthenticated, "")
	if diff := cmp.Diff([]string{
		"user:admin user.delete user/ada ",
		"user:admin user.update user/ada viewer of site=rome, which is new",
		"user:admin user.update user/ada viewer of site=rome, with a password, which is new",
		"user:admin user.update user/ada viewer of site=rome, with a password",
		"user:ada token.create user/ada token " + login.Id + ", until " + login.ExpiresAt.AsTime().Format(time.RFC3339) + `, "login"`,
		"user:admin user.create user/ada operator of site=berlin, with a password",
	}, w.audited(t, 6)); diff != "" {
		t.Error(diff)
	}
}

func TestTokens(t *testing.T) {
	w := start(t)
	call(t, w.users(admin).CreateUser, &v1.CreateUserRequest{Name: "ada", Role: "operator", Scope: map[string]string{"site": "berlin"}})
	ada := call(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{User: "ada", Comment: "first"})
	if i := ada.Info; i.User != "ada" || i.Role != "operator" || i.Scope["site"] != "berlin" || i.Comment != "first" || i.LastUsedAt != nil ||
		i.ExpiresAt.AsTime().Sub(i.CreatedAt.AsTime()).Round(time.Hour) != defaultTokenValid {
		t.Errorf("got %v", i)
	}
	c := w.users(ada.Token)
	for _, tt := range []struct {
		req  *v1.CreateTokenRequest
		code connect.Code
		part string
	}{
		{&v1.CreateTokenRequest{Role: "admin"}, connect.CodeInvalidArgument, "role is admin, that of user:ada is operator"},
		{&v1.CreateTokenRequest{Role: "root"}, connect.CodeInvalidArgument, `role "root"`},
		{&v1.CreateTokenRequest{Scope: map[string]string{"site": "rome"}}, connect.CodeInvalidArgument, "scope site=rome has nothing in common with that of user:ada, site=berlin"},
		{&v1.CreateTokenRequest{ValidFor: durationpb.New(maxTokenValid + 1)}, connect.CodeInvalidArgument, "valid_for"},
		{&v1.CreateTokenRequest{ValidFor: durationpb.New(-1)}, connect.CodeInvalidArgument, "valid_for"},
		{&v1.CreateTokenRequest{Comment: strings.Repeat("x", 201)}, connect.CodeInvalidArgument, "comment has 201 characters"},
		{&v1.CreateTokenRequest{Comment: "a\x1b"}, connect.CodeInvalidArgument, "cannot be shown"},
		{&v1.CreateTokenRequest{User: "admin"}, connect.CodePermissionDenied, "user:ada lacks the role admin"},
	} {
		refused(t, c.CreateToken, tt.req, tt.code, tt.part)
	}
	refused(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{User: "eve"}, connect.CodeNotFound, `user "eve"`)

	// Nobody gets more by a token than the token that asks for it allows.
	narrow := call(t, c.CreateToken, &v1.CreateTokenRequest{Role: "viewer", Scope: map[string]string{"env": "prod"}, ValidFor: durationpb.New(time.Hour)})
	who := call(t, w.auth(narrow.Token).WhoAmI, &v1.WhoAmIRequest{})
	if who.Name != "ada" || who.Role != "viewer" || len(who.Scope) != 2 || who.Scope["env"] != "prod" {
		t.Errorf("got %v", who)
	}
	refused(t, w.users(narrow.Token).CreateToken, &v1.CreateTokenRequest{Role: "operator"}, connect.CodeInvalidArgument, "that of user:ada is viewer")
	if i := call(t, w.users(narrow.Token).CreateToken, &v1.CreateTokenRequest{}).Info; i.Role != "viewer" || len(i.Scope) != 2 {
		t.Errorf("got %v", i)
	}

	list := func(token, user string) (ids []string) {
		t.Helper()
		for _, i := range call(t, w.users(token).ListTokens, &v1.ListTokensRequest{User: user}).Tokens {
			ids = append(ids, i.User)
		}
		return ids
	}
	if got := list(narrow.Token, ""); len(got) != 3 || got[0] != "ada" {
		t.Errorf("of oneself: %v", got)
	}
	if got := list(admin, "ada"); len(got) != 3 {
		t.Errorf("of another: %v", got)
	}
	if got := list(admin, ""); len(got) != 6 {
		t.Errorf("of all: %v", got)
	}
	refused(t, c.ListTokens, &v1.ListTokensRequest{User: "admin"}, connect.CodePermissionDenied, "lacks the role admin")
	if i := call(t, c.ListTokens, &v1.ListTokensRequest{}).Tokens[0]; i.LastUsedAt == nil || i.LastUsedAt.AsTime().Minute() != 0 {
		t.Errorf("its use was not kept: %v", i)
	}

	adminID := call(t, w.users(admin).ListTokens, &v1.ListTokensRequest{User: "admin"}).Tokens[0].Id
	refused(t, c.DeleteToken, &v1.DeleteTokenRequest{Id: adminID}, connect.CodeNotFound, "token")
	call(t, c.DeleteToken, &v1.DeleteTokenRequest{Id: narrow.Info.Id})
	refused(t, w.auth(narrow.Token).WhoAmI, &v1.WhoAmIRequest{}, connect.CodeUnauthenticated, "")
	call(t, w.users(admin).DeleteToken, &v1.DeleteTokenRequest{Id: ada.Info.Id})
	refused(t, w.auth(ada.Token).WhoAmI, &v1.WhoAmIRequest{}, connect.CodeUnauthenticated, "")
	// A scoped administrator has nothing to do with other users.
	scoped := call(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{Scope: map[string]string{"site": "berlin"}}).Token
	refused(t, w.users(scoped).CreateToken, &v1.CreateTokenRequest{User: "ada"}, connect.CodePermissionDenied, "has the scope site=berlin")
	refused(t, w.users(scoped).ListUsers, &v1.ListUsersRequest{}, connect.CodePermissionDenied, "has the scope site=berlin")
	for _, line := range w.audited(t, 100) {
		for _, secret := range []string{password, ada.Token, narrow.Token, scoped} {
			if strings.Contains(line, secret) {
				t.Errorf("the audit log has a secret: %s", line)
			}
		}
	}
}

// A token makes none that outlives it, who signed in does; a new password ends
// what the old one let in.
func TestTokensEnd(t *testing.T) {
	w := start(t)
	call(t, w.users(admin).CreateUser, &v1.CreateUserRequest{Name: "ada", Role: "operator", Password: password})
	in := call(t, w.auth("").Login, &v1.LoginRequest{Name: "ada", Password: password})
	day := call(t, w.users(in.Token).CreateToken, &v1.CreateTokenRequest{ValidFor: durationpb.New(24 * time.Hour)})
	if !day.Info.ExpiresAt.AsTime().After(in.ExpiresAt.AsTime()) {
		t.Errorf("who signed in until %v has a token until %v", in.ExpiresAt.AsTime(), day.Info.ExpiresAt.AsTime())
	}
	refused(t, w.users(day.Token).CreateToken, &v1.CreateTokenRequest{ValidFor: durationpb.New(48 * time.Hour)}, connect.CodeInvalidArgument, "valid_for")
	if i := call(t, w.users(day.Token).CreateToken, &v1.CreateTokenRequest{}).Info; i.ExpiresAt.AsTime().After(day.Info.ExpiresAt.AsTime()) {
		t.Errorf("a token until %v makes one until %v", day.Info.ExpiresAt.AsTime(), i.ExpiresAt.AsTime())
	}
	call(t, w.users(admin).UpdateUser, &v1.UpdateUserRequest{Name: "ada", Role: new("viewer")})
	call(t, w.auth(in.Token).WhoAmI, &v1.WhoAmIRequest{})
	call(t, w.users(admin).UpdateUser, &v1.UpdateUserRequest{Name: "ada", Password: new(password + "2")})
	refused(t, w.auth(in.Token).WhoAmI, &v1.WhoAmIRequest{}, connect.CodeUnauthenticated, "")
	call(t, w.auth(day.Token).WhoAmI, &v1.WhoAmIRequest{})
}

// Guessing a password is slowed, wherever from; so is guessing tokens and join
// tokens, from one address. Whoever has the right token is not locked out.
func TestGuessing(t *testing.T) {
	w := start(t)
	call(t, w.users(admin).CreateUser, &v1.CreateUserRequest{Name: "ada", Role: "viewer", Password: password})
	guess := func(name string) error {
		_, err := w.auth("").Login(t.Context(), connect.NewRequest(&v1.LoginRequest{Name: name, Password: "wrong password"}))
		return err
	}
	guesses := 0
	for ; connect.CodeOf(guess("ada")) == connect.CodeUnauthenticated; guesses++ {
	}
	err := guess("ada")
	limited, ok := err.(*connect.Error)
	if !ok || limited.Code() != connect.CodeResourceExhausted || guesses != 10 {
		t.Fatalf("after %d guesses: %v", guesses, err)
	}
	if s, err := strconv.Atoi(limited.Meta().Get("Retry-After")); err != nil || s < 1 || s > 30 {
		t.Errorf("Retry-After is %q", limited.Meta().Get("Retry-After"))
	}
	// The right password waits too: else guessing would go on.
	refused(t, w.auth("").Login, &v1.LoginRequest{Name: "ada", Password: password}, connect.CodeResourceExhausted, "too many wrong credentials; try again in ")
	w.wait(time.Minute)
	call(t, w.auth("").Login, &v1.LoginRequest{Name: "ada", Password: password})

	w.wait(time.Hour)
	call(t, w.auth(admin).WhoAmI, &v1.WhoAmIRequest{})
	for n := 0; ; n++ {
		_, err := w.auth(fmt.Sprint("guess", n)).WhoAmI(t.Context(), connect.NewRequest(&v1.WhoAmIRequest{}))
		if connect.CodeOf(err) == connect.CodeResourceExhausted {
			break
		}
		if n > 100 {
			t.Fatal("tokens can be guessed for ever")
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.url+v1connect.AuthServiceWhoAmIProcedure, strings.NewReader("{}"))
	must(t, err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer guess")
	resp, err := w.client.Do(req)
	must(t, err)
	must(t, resp.Body.Close())
	if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" {
		t.Errorf("got %s, Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
	}
	refused(t, w.auth(viewer).WhoAmI, &v1.WhoAmIRequest{}, connect.CodeResourceExhausted, "too many")
	call(t, w.auth(admin).WhoAmI, &v1.WhoAmIRequest{}) // was in before
	_, csr := pkitest.Request(t, "dev")
	refused(t, w.enrollment("").Join, &v1.JoinRequest{JoinToken: "guess", Name: "dev", Csr: csr}, connect.CodeResourceExhausted, "too many")

	w.wait(time.Hour)
	for n := 0; ; n++ {
		_, err := w.enrollment("").Join(t.Context(), connect.NewRequest(&v1.JoinRequest{JoinToken: "guess", Name: "dev", Csr: csr}))
		if connect.CodeOf(err) == connect.CodeResourceExhausted {
			break
		}
		if n > 100 {
			t.Fatal("join tokens can be guessed for ever")
		}
	}
}

func doc(name, model, selector string) string {
	return fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: %s}\nspec: {model: %s, version: 1, selector: {%s}}\n", name, model, selector)
}

// Users with a scope see and change what lies within it, and nothing else.
func TestScope(t *testing.T) {
	w := start(t)
	for i, site := range []string{"berlin", "rome"} {
		token := call(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{Labels: map[string]string{"site": site}}).JoinToken
		device := "cam-" + site
		_, csr := pkitest.Request(t, device)
		call(t, w.enrollment("").Join, &v1.JoinRequest{JoinToken: token, Name: device, Csr: csr})
		_, _, err := w.store.AddEvents(t.Context(), device, "o", []*v1.Event{{Sequence: 1, Kind: "k", Profile: nil}})
		must(t, err)
		w.push(t, "digits", i+1)
	}
	for _, model := range []string{"a", "b", "c", "d"} {
		w.push(t, model, 1)
	}
	call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: doc("berlin", "a", "site: berlin") + "---\n" + doc("rome", "b", "site: rome") + "---\n" + doc("all", "c", "")})
	token := func(role string) string {
		t.Helper()
		return call(t, w.users(admin).CreateToken, &v1.CreateTokenRequest{Role: role, Scope: map[string]string{"site": "berlin"}}).Token
	}
	op, boss := token("operator"), token("admin")

	devices := w.devices(op)
	if got := call(t, devices.ListDevices, &v1.ListDevicesRequest{}).Devices; len(got) != 1 || got[0].Name != "cam-berlin" {
		t.Errorf("devices: %v", got)
	}
	if got := call(t, devices.ListDevices, &v1.ListDevicesRequest{Selector: map[string]string{"site": "rome"}}).Devices; len(got) != 0 {
		t.Errorf("devices of rome: %v", got)
	}
	refused(t, devices.ListDevices, &v1.ListDevicesRequest{Device: "cam-rome"}, connect.CodeNotFound, "device cam-rome: not found")
	refused(t, devices.ListTelemetry, &v1.ListTelemetryRequest{Device: "cam-rome"}, connect.CodeNotFound, "device cam-rome: not found")
	call(t, devices.ListTelemetry, &v1.ListTelemetryRequest{Device: "cam-berlin"})
	for device, want := range map[string]int{"": 1, "cam-berlin": 1, "cam-rome": 0, "cam-none": 0} {
		if got := call(t, devices.ListEvents, &v1.ListEventsRequest{Device: device}).Events; len(got) != want || want > 0 && got[0].Device != "cam-berlin" {
			t.Errorf("events of %q: %v", device, got)
		}
	}
	var deployments []string
	for _, d := range call(t, w.objects(op).ListDeployments, &v1.ListDeploymentsRequest{}).Deployments {
		deployments = append(deployments, fmt.Sprintf("%s %d", d.Name, d.Devices))
	}
	if diff := cmp.Diff([]string{"all 1", "berlin 1"}, deployments); diff != "" {
		t.Error(diff)
	}
	plans := call(t, v1connect.NewProfileServiceClient(w.client, w.url, as(op)).Plan, &v1.PlanRequest{Documents: doc("x", "d", "") + "---\n" + doc("y", "digits", "site: rome")}).Devices
	for _, p := range plans {
		if p.Device != "cam-berlin" {
			t.Errorf("plan: %v", p)
		}
	}
	if len(plans) != 1 {
		t.Errorf("plan of %d devices", len(plans))
	}

	c := w.objects(op)
	const only = "user:admin may do this only where site=berlin"
	refused(t, c.Apply, &v1.ApplyRequest{Documents: doc("x", "d", "")}, connect.CodePermissionDenied, "Deployment x: "+only)
	refused(t, c.Apply, &v1.ApplyRequest{Documents: doc("x", "d", "site: rome")}, connect.CodePermissionDenied, only)
	refused(t, c.Apply, &v1.ApplyRequest{Documents: doc("x", "d", "site: berlin") + "---\n" + doc("y", "digits", "env: prod")}, connect.CodePermissionDenied, "Deployment y: "+only)
	refused(t, c.Apply, &v1.ApplyRequest{Documents: doc("rome", "b", "site: berlin")}, connect.CodePermissionDenied, "Deployment rome: "+only)
	refused(t, c.Apply, &v1.ApplyRequest{Documents: doc("all", "c", "site: berlin"), DryRun: true}, connect.CodePermissionDenied, "Deployment all: "+only)
	refused(t, c.Delete, &v1.DeleteRequest{Kind: fleet.KindDeployment, Name: "rome"}, connect.CodePermissionDenied, only)
	const route = "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: [{model: digits, weight: 1}]}\n"
	refused(t, c.Apply, &v1.ApplyRequest{Documents: route}, connect.CodePermissionDenied, "has the scope site=berlin")
	call(t, w.objects(operator).Apply, &v1.ApplyRequest{Documents: route})
	refused(t, c.Delete, &v1.DeleteRequest{Kind: fleet.KindRoute, Name: "r"}, connect.CodePermissionDenied, "has the scope site=berlin")
	call(t, c.Apply, &v1.ApplyRequest{Documents: doc("x", "d", "site: berlin, env: prod")})
	call(t, c.Delete, &v1.DeleteRequest{Kind: fleet.KindDeployment, Name: "x"})

	rollouts := w.rollouts(op)
	seen := map[string]bool{}
	for _, r := range call(t, rollouts.ListRollouts, &v1.ListRolloutsRequest{}).Rollouts {
		seen[r.Deployment] = true
		for _, d := range r.Devices {
			if d.Device != "cam-berlin" {
				t.Errorf("rollout: %v", r)
			}
		}
	}
	if !seen["berlin"] || !seen["all"] || seen["rome"] {
		t.Errorf("rollouts of %v", seen)
	}
	refused(t, rollouts.GetRollout, &v1.GetRolloutRequest{Deployment: "rome"}, connect.CodeNotFound, "rollout rome-")
	call(t, rollouts.GetRollout, &v1.GetRolloutRequest{Deployment: "all"})

	e := w.enrollment(boss)
	refused(t, e.CreateJoinToken, &v1.CreateJoinTokenRequest{}, connect.CodePermissionDenied, only)
	call(t, w.enrollment(admin).CreateJoinToken, &v1.CreateJoinTokenRequest{Labels: map[string]string{"site": "rome"}})
	mine := call(t, e.CreateJoinToken, &v1.CreateJoinTokenRequest{Labels: map[string]string{"site": "berlin", "a": "b"}}).Info
	if got := call(t, e.ListJoinTokens, &v1.ListJoinTokensRequest{}).JoinTokens; len(got) != 1 || got[0].Id != mine.Id {
		t.Errorf("join tokens: %v", got)
	}
	// A join token for a device gives away who that is.
	refused(t, e.CreateJoinToken, &v1.CreateJoinTokenRequest{Device: "cam-rome", Labels: map[string]string{"site": "berlin"}}, connect.CodeNotFound, "device cam-rome: not found")
	call(t, e.CreateJoinToken, &v1.CreateJoinTokenRequest{Device: "cam-berlin", Labels: map[string]string{"site": "berlin"}})
	for _, other := range call(t, w.enrollment(admin).ListJoinTokens, &v1.ListJoinTokensRequest{}).JoinTokens {
		if other.Labels["site"] == "rome" {
			refused(t, e.DeleteJoinToken, &v1.DeleteJoinTokenRequest{Id: other.Id}, connect.CodeNotFound, "join token "+other.Id)
		}
	}
	call(t, e.DeleteJoinToken, &v1.DeleteJoinTokenRequest{Id: mine.Id})
	refused(t, w.devices(boss).RevokeDevice, &v1.RevokeDeviceRequest{Device: "cam-rome"}, connect.CodeNotFound, "device cam-rome: not found")
	call(t, w.devices(boss).RevokeDevice, &v1.RevokeDeviceRequest{Device: "cam-berlin"})
	refused(t, w.devices(boss).RemoveDevice, &v1.RemoveDeviceRequest{Device: "cam-rome"}, connect.CodeNotFound, "device cam-rome: not found")
	call(t, w.devices(boss).RemoveDevice, &v1.RemoveDeviceRequest{Device: "cam-berlin"})
}

// A rollout shows the devices within the scope, and no names of others.
func TestScopeOfRollouts(t *testing.T) {
	v := view{
		caller:    identity.Principal{Kind: identity.User, Role: identity.Viewer, Scope: map[string]string{"site": "berlin"}},
		devices:   map[string]bool{"b": true},
		selectors: map[string]map[string]string{"prod": {"env": "prod"}, "rome": {"site": "rome"}},
	}
	rows := func(names ...string) (all []fleet.RolloutDevice) {
		for _, n := range names {
			all = append(all, fleet.RolloutDevice{Device: n})
		}
		return all
	}
	const hidden = "what it says is of devices outside the scope too"
	for name, test := range map[string]struct {
		rollout fleet.Rollout
		devices int
		reason  string
		seen    bool
	}{
		"all of it":             {fleet.Rollout{Deployment: "prod", Reason: "b (x)", Devices: rows("b")}, 1, "b (x)", true},
		"a part":                {fleet.Rollout{Deployment: "prod", Reason: "a (x)", Devices: rows("a", "b")}, 1, hidden, true},
		"none yet":              {fleet.Rollout{Deployment: "prod"}, 0, "", true},
		"without its devices":   {fleet.Rollout{Deployment: "prod", State: fleet.Succeeded, Reason: "a (x)"}, 0, hidden, true},
		"of elsewhere":          {fleet.Rollout{Deployment: "rome", Devices: rows("a")}, 0, "", false},
		"deleted, devices here": {fleet.Rollout{Deployment: "old", Devices: rows("a", "b")}, 1, "", true},
		"deleted, none here":    {fleet.Rollout{Deployment: "old", Devices: rows("a")}, 0, "", false},
	} {
		before := len(test.rollout.Devices)
		got, seen := v.rollout(test.rollout)
		if seen != test.seen || len(got.Devices) != test.devices || got.Reason != test.reason || len(test.rollout.Devices) != before {
			t.Errorf("%s: got %+v, %v", name, got, seen)
		}
	}
}

func TestProtect(t *testing.T) {
	w := start(t)
	auth := identity.New(w.store, identity.Options{Guard: identity.NewGuard(w.now)})
	h := Protect(auth, slog.New(slog.DiscardHandler), identity.Metrics, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "figures") }))
	scoped, hash := identity.NewToken("")
	_, err := w.store.CreateToken(t.Context(), "user:admin", hash, store.Token{User: "admin", Role: identity.Admin, Scope: map[string]string{"site": "berlin"}})
	must(t, err)
	for _, tt := range []struct {
		from, token, proxy string
		want               int
	}{
		{"127.0.0.1:1", "", "", http.StatusOK},
		{"[::1]:1", "", "", http.StatusOK},
		{"127.0.0.1:1", "", "192.0.2.1", http.StatusUnauthorized},
		{"192.0.2.1:1", "", "", http.StatusUnauthorized},
		{"192.0.2.1:1", "wrong", "", http.StatusUnauthorized},
		{"192.0.2.1:1", viewer, "", http.StatusOK},
		{"192.0.2.1:1", scoped, "", http.StatusForbidden},
	} {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.RemoteAddr = tt.from
		if tt.token != "" {
			r.Header.Set("Authorization", "Bearer "+tt.token)
		}
		if tt.proxy != "" {
			r.Header.Set("X-Forwarded-For", tt.proxy)
		}
		got := httptest.NewRecorder()
		h.ServeHTTP(got, r)
		if got.Code != tt.want || (got.Body.String() == "figures") != (tt.want == http.StatusOK) {
			t.Errorf("%+v: got %d %s", tt, got.Code, got.Body)
		}
	}
	for range 100 {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.Header.Set("Authorization", "Bearer wrong")
		h.ServeHTTP(httptest.NewRecorder(), r)
	}
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.Header.Set("Authorization", "Bearer wrong")
	got := httptest.NewRecorder()
	h.ServeHTTP(got, r)
	if got.Code != http.StatusTooManyRequests || got.Header().Get("Retry-After") == "" {
		t.Errorf("guesses: got %d", got.Code)
	}
}

// The registry's URL is as the caller came: by TLS or not.
func TestRegistryURL(t *testing.T) {
	w := start(t)
	auth := identity.New(w.store, identity.Options{})
	server := httptest.NewTLSServer(New(Config{Store: w.store, Auth: auth, Log: slog.New(slog.DiscardHandler)}))
	t.Cleanup(server.Close)
	got := call(t, v1connect.NewAuthServiceClient(server.Client(), server.URL, as(viewer)).WhoAmI, &v1.WhoAmIRequest{})
	if got.RegistryUrl != server.URL || !strings.HasPrefix(server.URL, "https://") {
		t.Errorf("got %s, want %s", got.RegistryUrl, server.URL)
	}
}

// What OpenID Connect says of a user bounds its tokens, as soon as it is said.
func TestExternal(t *testing.T) {
	w := start(t)
	s := &server{Config: Config{Store: w.store}}
	p := identity.Principal{Kind: identity.User, Name: "oidc:ada", Role: identity.Admin, External: true}
	must(t, w.store.External(t.Context(), p, false))
	if _, err := w.store.User(t.Context(), p.Name); err == nil {
		t.Error("a user without tokens is kept")
	}
	created, err := s.CreateToken(identity.WithPrincipal(t.Context(), p), connect.NewRequest(&v1.CreateTokenRequest{}))
	must(t, err)
	token := created.Msg.Token
	if who := call(t, w.auth(token).WhoAmI, &v1.WhoAmIRequest{}); who.Name != "oidc:ada" || who.Role != "admin" {
		t.Errorf("got %v", who)
	}
	p.Role, p.Scope = identity.Viewer, map[string]string{"site": "rome"}
	must(t, w.store.External(t.Context(), p, false))
	must(t, w.store.External(t.Context(), p, false)) // nothing new: nothing written
	if who := call(t, w.auth(token).WhoAmI, &v1.WhoAmIRequest{}); who.Role != "viewer" || who.Scope["site"] != "rome" {
		t.Errorf("got %v", who)
	}
	refused(t, w.users(admin).UpdateUser, &v1.UpdateUserRequest{Name: "oidc:ada", Role: new("admin")}, connect.CodeInvalidArgument, "signs in by OpenID Connect")
	if diff := cmp.Diff([]string{"user:oidc:ada user.update user/oidc:ada viewer of site=rome"}, w.audited(t, 1)); diff != "" {
		t.Error(diff)
	}
}
