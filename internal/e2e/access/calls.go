package access

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dunlin/dunlin/controller/console"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// probe is one way to ask for an action.
type probe struct {
	action string              // of identity.Allow; "": nobody may
	about  []map[string]string // labels that it is about
	what   string

	// A call of the API, whose body make gives, as {} where it is nil.
	procedure string
	stream    bool
	make      func(ctx context.Context) (string, error)
	// done says that only an answer without an error is one: what others own is
	// not there for who may not see it.
	done bool

	// A request to another route.
	method, path, body string
	header             http.Header
	// session says that a token is shown as that of a session of the console.
	session bool
}

// calls tries every procedure of the API, and the controller's other routes.
func (w *world) calls(ctx context.Context) (r Result, err error) {
	seen := map[string]bool{}
	if err := w.tryAll(ctx, &r, seen, w.procedures()); err != nil {
		return r, err
	}
	leave, err := w.given(ctx)
	if err != nil {
		return r, fmt.Errorf("have devices given the model: %w", err)
	}
	defer leave()
	routes, err := w.routes(ctx)
	if err != nil {
		return r, err
	}
	if err := w.tryAll(ctx, &r, seen, routes); err != nil {
		return r, err
	}
	for _, a := range identity.Actions() {
		if !seen[a] {
			r.cell("everybody", a, false, true, "there is nothing that tries it")
		}
	}
	return r, nil
}

// given has both devices connect, so that they are given the model, and waits
// until the registry knows it.
func (w *world) given(ctx context.Context) (leave func(), err error) {
	if _, err := dunlinv1connect.NewObjectServiceClient(w.admin, w.URL).Apply(ctx, connect.NewRequest(&dunlinv1.ApplyRequest{Documents: w.deployment("all", nil)})); err != nil {
		return nil, err
	}
	var conns []*byhand.Conn
	leave = func() {
		for _, c := range conns {
			c.Close()
		}
	}
	for _, d := range []*byhand.Device{w.device, w.other} {
		c, err := byhand.Connect(ctx, w.MQTT, d.TLS(host), byhand.Login{ClientID: d.Name, User: d.Name}, nil)
		if err != nil {
			leave()
			return nil, err
		}
		conns = append(conns, c)
		hello, err := proto.Marshal(&dunlinv1.Hello{BootId: d.Name, Session: d.Name, CertificateSerial: d.Chain[0].SerialNumber.Bytes()})
		if err == nil {
			err = errors.Join(c.Publish(link.Up(d.Name, link.Hello), hello), c.Ping())
		}
		if err != nil {
			leave()
			return nil, err
		}
	}
	for _, c := range w.callers {
		if c.device == nil || c.principal.Kind != identity.Device {
			continue
		}
		p := probe{action: identity.RegistryPull, what: "registry", method: http.MethodGet, path: "/v2/" + w.Model + "/tags/list"}
		for allowed := false; !allowed; {
			if allowed, _, err = w.try(ctx, c, p); err != nil {
				leave()
				return nil, err
			}
		}
	}
	return leave, nil
}

// tryAll tries what every caller may do, and notes which actions were tried.
func (w *world) tryAll(ctx context.Context, r *Result, seen map[string]bool, probes []probe) error {
	for _, p := range probes {
		seen[p.action] = true
		for _, c := range w.callers {
			want := !c.dead && p.action != "" && identity.Allow(c.principal, p.action, p.about...) == nil
			allowed, detail, err := w.try(ctx, c, p)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", c.name, p.what, err)
			}
			r.cell(c.name, p.what, allowed, want, detail)
		}
	}
	return nil
}

// procedures are all that the descriptors have, the one that makes a new
// authority last, and the parts of them that have rules of their own.
func (w *world) procedures() []probe {
	var all []probe
	services := dunlinv1.File_dunlin_v1_api_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			all = append(all, w.procedure(m))
		}
	}
	rotates := func(p probe) bool { return p.procedure == dunlinv1connect.TrustServiceRotateAuthorityProcedure }
	last := slices.IndexFunc(all, rotates)
	rotate := all[last]
	all = slices.Delete(all, last, last+1)

	berlin, rome, none := map[string]string{"site": "berlin"}, map[string]string{"site": "rome"}, map[string]string{}
	for name, selector := range map[string]map[string]string{"berlin": berlin, "rome": rome, "all": none} {
		all = append(all,
			probe{action: dunlinv1connect.ObjectServiceApplyProcedure, procedure: dunlinv1connect.ObjectServiceApplyProcedure,
				what: "Apply: a Deployment of " + name, about: []map[string]string{selector}, make: w.applying(w.deployment(name, selector))},
			probe{action: dunlinv1connect.ObjectServiceDeleteProcedure, procedure: dunlinv1connect.ObjectServiceDeleteProcedure,
				what: "Delete: a Deployment of " + name, about: []map[string]string{selector}, make: w.deleting("Deployment", name, w.deployment(name, selector))})
	}
	for name, labels := range map[string]map[string]string{"berlin": berlin, "rome": rome} {
		all = append(all, probe{action: dunlinv1connect.EnrollmentServiceCreateJoinTokenProcedure, procedure: dunlinv1connect.EnrollmentServiceCreateJoinTokenProcedure,
			what: "CreateJoinToken: for " + name, about: []map[string]string{labels}, make: func(context.Context) (string, error) { return fmt.Sprintf(`{"labels":{"site":%q}}`, name), nil }})
	}
	route := fmt.Sprintf("apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: a-route}\nspec: {targets: [{model: %s, weight: 1}]}\n", w.Model)
	somebody := func(context.Context) (string, error) { return `{"user":"somebody"}`, nil }
	users := dunlinv1connect.NewUserServiceClient(w.admin, w.URL)
	return append(all,
		probe{action: identity.ApplyRoute, procedure: dunlinv1connect.ObjectServiceApplyProcedure, what: "Apply: a Route", make: w.applying(route)},
		probe{action: identity.DeleteRoute, procedure: dunlinv1connect.ObjectServiceDeleteProcedure, what: "Delete: a Route", make: w.deleting("Route", "a-route", route)},
		probe{action: identity.CreateOthersToken, procedure: dunlinv1connect.UserServiceCreateTokenProcedure, what: "CreateToken: of another user", make: somebody},
		probe{action: identity.ListOthersTokens, procedure: dunlinv1connect.UserServiceListTokensProcedure, what: "ListTokens: of another user", make: somebody},
		probe{action: identity.DeleteOthersToken, procedure: dunlinv1connect.UserServiceDeleteTokenProcedure, what: "DeleteToken: of another user", done: true,
			make: func(ctx context.Context) (string, error) {
				t, err := users.CreateToken(ctx, connect.NewRequest(&dunlinv1.CreateTokenRequest{User: "somebody"}))
				if err != nil {
					return "", err
				}
				return fmt.Sprintf(`{"id":%q}`, t.Msg.GetInfo().GetId()), nil
			}},
		rotate)
}

func (w *world) procedure(m protoreflect.MethodDescriptor) probe {
	name := "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
	p := probe{action: name, procedure: name, what: strings.TrimPrefix(name, "/dunlin.v1."), stream: m.IsStreamingServer()}
	switch name {
	case dunlinv1connect.AuthServiceLoginProcedure: // a wrong password would be one more reason to be refused
		p.make = func(context.Context) (string, error) {
			return fmt.Sprintf(`{"name":"somebody","password":%q}`, password), nil
		}
	case dunlinv1connect.EnrollmentServiceCreateJoinTokenProcedure: // without labels it is for all
		p.about = []map[string]string{{}}
	}
	return p
}

func (w *world) deployment(name string, selector map[string]string) string {
	var labels []string
	for k, v := range selector {
		labels = append(labels, k+": "+v)
	}
	return fmt.Sprintf("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: %s}\nspec: {model: %s, version: 1, selector: {%s}}\n", name, w.Model, strings.Join(labels, ", "))
}

func (w *world) applying(document string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) {
		b, err := json.Marshal(map[string]any{"documents": document, "dryRun": true})
		return string(b), err
	}
}

// deleting asks to delete what is there, made again each time.
func (w *world) deleting(kind, name, document string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		_, err := dunlinv1connect.NewObjectServiceClient(w.admin, w.URL).Apply(ctx, connect.NewRequest(&dunlinv1.ApplyRequest{Documents: document}))
		return fmt.Sprintf(`{"kind":%q,"name":%q}`, kind, name), err
	}
}

// routes are the registry's, and what else the controller answers.
func (w *world) routes(ctx context.Context) ([]probe, error) {
	manifest, err := w.manifest(ctx)
	if err != nil {
		return nil, err
	}
	repository := "/v2/" + w.Model
	var all []probe
	add := func(action, method, path, body string) {
		all = append(all, probe{action: action, what: "registry: " + method + " " + strings.ReplaceAll(path, manifest, "DIGEST"), method: method, path: path, body: body})
	}
	for _, path := range []string{"/v2/", repository + "/tags/list", repository + "/manifests/1", repository + "/manifests/" + manifest,
		repository + "/blobs/" + manifest, repository + "/referrers/" + manifest} {
		add(identity.RegistryPull, http.MethodGet, path, "")
	}
	add(identity.RegistryList, http.MethodGet, "/v2/_catalog", "")
	add(identity.RegistryPull, http.MethodHead, repository+"/manifests/1", "")
	add(identity.RegistryPush, http.MethodPost, repository+"/blobs/uploads/", "")
	add(identity.RegistryPush, http.MethodPatch, repository+"/blobs/uploads/none", "x")
	add(identity.RegistryPush, http.MethodPut, repository+"/blobs/uploads/none", "x")
	add(identity.RegistryPush, http.MethodGet, repository+"/blobs/uploads/none", "")
	add(identity.RegistryPush, http.MethodPut, repository+"/manifests/9", "{}")
	add(identity.RegistryPush, http.MethodPut, repository+"/manifests/"+manifest, "{}")
	add("", http.MethodDelete, repository+"/manifests/"+manifest, "")
	add("", http.MethodDelete, repository+"/manifests/1", "")
	add("", http.MethodDelete, repository+"/blobs/"+manifest, "")
	elsewhere := http.Header{"X-Forwarded-For": {"192.0.2.1"}}
	return append(all,
		probe{action: identity.Health, what: "GET /healthz", method: http.MethodGet, path: "/healthz"},
		probe{action: identity.Metrics, what: "GET /metrics from elsewhere", method: http.MethodGet, path: "/metrics", header: elsewhere},
		probe{action: identity.ConsoleDoor, what: "console: the sign-in", method: http.MethodGet, path: "/sign-in"},
		probe{action: identity.ConsoleDoor, what: "console: the theme", method: http.MethodPost, path: "/theme", body: "theme=dark&next=/sign-in",
			header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}},
		probe{action: identity.ConsolePages, what: "console: the fleet", method: http.MethodGet, path: "/", session: true},
		probe{action: identity.ConsolePages, what: "console: a device that is not there", method: http.MethodGet, path: "/devices/none", session: true},
		probe{action: identity.ConsolePages, what: "console: alarms", method: http.MethodGet, path: "/alarms", session: true},
		probe{action: identity.ConsolePages, what: "console: models", method: http.MethodGet, path: "/models", session: true},
		probe{action: identity.ConsolePages, what: "console: the live page of a device that is not there", method: http.MethodGet, path: "/live/devices/none", session: true},
		probe{action: identity.ConsolePages, what: "console: a live stream with a faulty filter", method: http.MethodGet, path: "/live/fleet?page=x", session: true},
		probe{what: "console: the fleet, without a session", method: http.MethodGet, path: "/"},
		probe{what: "console: no page", method: http.MethodGet, path: "/none", session: true},
		probe{what: "GET /dunlin.v1.Nothing/There", method: http.MethodGet, path: "/dunlin.v1.Nothing/There"},
	), nil
}

// manifest gives the digest of the model's version.
func (w *world) manifest(ctx context.Context) (string, error) {
	versions, err := dunlinv1connect.NewModelServiceClient(w.admin, w.URL).ListModels(ctx, connect.NewRequest(&dunlinv1.ListModelsRequest{Model: w.Model}))
	if err != nil {
		return "", err
	}
	if n := len(versions.Msg.GetVersions()); n != 1 {
		return "", fmt.Errorf("model %s has %d versions, want 1", w.Model, n)
	}
	return versions.Msg.GetVersions()[0].GetDigest(), nil
}

// try asks for something in somebody's name.
func (w *world) try(ctx context.Context, c *caller, p probe) (allowed bool, detail string, err error) {
	body, method, path := p.body, p.method, p.path
	header := http.Header{}
	maps.Copy(header, p.header)
	if p.procedure != "" {
		method, path, body = http.MethodPost, p.procedure, "{}"
		if p.make != nil {
			if body, err = p.make(ctx); err != nil {
				return false, "", err
			}
		}
		header.Set("Content-Type", "application/json")
		if p.stream {
			header.Set("Content-Type", "application/connect+json")
			body = string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body)))) + body
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, w.DeviceURL+path, strings.NewReader(body))
	if err != nil {
		return false, "", err
	}
	req.Header = header
	if p.session && c.token != "" {
		req.AddCookie(console.SessionCookie("id", c.token, true))
	}
	resp, err := c.client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return false, "", err
		}
		return false, err.Error(), nil
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return false, "", err
	}
	detail = fmt.Sprintf("%d %.200s", resp.StatusCode, bytes.TrimSpace(answer))
	switch {
	case p.procedure != "":
		code, err := codeOf(resp, answer, p.stream)
		if err != nil {
			return false, "", err
		}
		switch code {
		case connect.CodeUnauthenticated.String(), connect.CodePermissionDenied.String(), connect.CodeResourceExhausted.String():
			return false, detail, nil
		}
		return !p.done || code == "", detail, nil
	case p.action == "":
		return resp.StatusCode < 300, detail, nil
	}
	return resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusTooManyRequests, detail, nil
}

// codeOf gives the code of an answer of the Connect protocol, "" where it is
// no error.
func codeOf(resp *http.Response, answer []byte, stream bool) (string, error) {
	var e struct {
		Code  string `json:"code"`
		Error *struct {
			Code string `json:"code"`
		} `json:"error"`
	}
	if !stream {
		if resp.StatusCode == http.StatusOK {
			return "", nil
		}
		if err := json.Unmarshal(answer, &e); err != nil || e.Code == "" {
			return "", fmt.Errorf("the answer is no error of Connect: %d %.200q", resp.StatusCode, answer)
		}
		return e.Code, nil
	}
	for len(answer) >= 5 {
		flags, n := answer[0], int(binary.BigEndian.Uint32(answer[1:]))
		if len(answer) < 5+n {
			break
		}
		if flags&2 != 0 { // the end of the stream
			if err := json.Unmarshal(answer[5:5+n], &e); err != nil {
				return "", err
			}
			if e.Error == nil {
				return "", nil
			}
			return e.Error.Code, nil
		}
		answer = answer[5+n:]
	}
	return "", errors.New("the stream has no end")
}
