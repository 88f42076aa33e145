// Package access tries who may do what against running programs: every kind of
// identity against every call, route and topic. What should come out is what
// the tables say that the programs and the documentation go by:
// identity.Allow, link.DeviceMayPublish and its like, agent/access.Routes.
package access

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// Controller is one that runs on this machine, without devices, and has
// version 1 of a model.
type Controller struct {
	URL, DeviceURL string // in clear, and over TLS
	MQTT           string // host:port of its broker
	EnrolMQTT      string // of that for devices that enrol
	Data           string // its folder
	Token          string // the administrator's
	Model          string
}

// Result is how it came out.
type Result struct {
	Tried int      // cells of the matrix
	Wrong []string // those that came out other than the tables say
}

// Add puts two results together.
func (r *Result) Add(o Result) {
	r.Tried += o.Tried
	r.Wrong = append(r.Wrong, o.Wrong...)
}

func (r *Result) cell(who, what string, allowed, want bool, detail string) {
	r.Tried++
	if allowed != want {
		word := map[bool]string{true: "allowed", false: "refused"}
		r.Wrong = append(r.Wrong, fmt.Sprintf("%s: %s: %s, want %s (%s)", who, what, word[allowed], word[want], detail))
	}
}

const (
	host     = "127.0.0.1"
	lifetime = 365 * 24 * time.Hour
	password = "correct horse battery"
	// nonce tells the conversations of enrolling devices apart.
	nonce = "1234567890abcdef"
)

// caller is one identity over HTTPS.
type caller struct {
	name      string
	principal identity.Principal // whom the controller should take it for
	// dead says that its certificate ends every connection.
	dead   bool
	client *http.Client
	token  string           // "": it has none
	device *tls.Certificate // nil: it is a user
}

// world is who there is.
type world struct {
	Controller
	roots          []*x509.Certificate
	callers        []*caller
	device, other  *byhand.Device
	revoked        *byhand.Device
	joinToken      string
	admin          *http.Client
	foreign, stale *tls.Certificate
	viewerToken    string
}

// Try tries everything at a controller and its broker.
func Try(ctx context.Context, c Controller) (r Result, err error) {
	w, err := people(ctx, c)
	if err != nil {
		return r, fmt.Errorf("make identities: %w", err)
	}
	calls, err := w.calls(ctx)
	if err != nil {
		return r, err
	}
	r.Add(calls)
	topics, err := w.topics(ctx)
	r.Add(topics)
	return r, err
}

// people makes every identity.
func people(ctx context.Context, c Controller) (*world, error) {
	w := &world{Controller: c, admin: byhand.User(c.Token, nil)}
	var err error
	if w.roots, err = pki.ReadCertificates(filepath.Join(c.Data, "ca.pem")); err != nil {
		return nil, err
	}
	enrolment := dunlinv1connect.NewEnrollmentServiceClient(w.admin, c.URL)
	made, err := enrolment.CreateJoinToken(ctx, connect.NewRequest(&dunlinv1.CreateJoinTokenRequest{Uses: 10}))
	if err != nil {
		return nil, err
	}
	w.joinToken = made.Msg.GetJoinToken()
	for name, device := range map[string]**byhand.Device{"own": &w.device, "other": &w.other, "revoked": &w.revoked} {
		key, err := pki.NewKey()
		if err != nil {
			return nil, err
		}
		if *device, err = byhand.Join(ctx, enrolment, w.joinToken, name, key); err != nil {
			return nil, err
		}
	}
	if _, err := dunlinv1connect.NewDeviceServiceClient(w.admin, c.URL).RevokeDevice(ctx, connect.NewRequest(&dunlinv1.RevokeDeviceRequest{Device: w.revoked.Name})); err != nil {
		return nil, err
	}
	if w.foreign, w.stale, err = w.impostors(); err != nil {
		return nil, err
	}

	// Each has an address of its own: wrong credentials count against the one
	// that they come from.
	add := func(name string, p identity.Principal, token string, own *tls.Certificate, dead bool) {
		w.callers = append(w.callers, &caller{name: name, principal: p, dead: dead, device: own, token: token, client: byhand.UserFrom(net.IPv4(127, 0, 1, byte(1+len(w.callers))), token, byhand.TLS(w.roots, own, host))})
	}
	wrong, _ := identity.NewToken("dunlin_")
	add("nobody", identity.Principal{}, "", nil, false)
	add("wrong token", identity.Principal{}, wrong, nil, false)
	users := dunlinv1connect.NewUserServiceClient(w.admin, c.URL)
	berlin := map[string]string{"site": "berlin"}
	for _, u := range []struct {
		name  string
		role  identity.Role
		scope map[string]string
		valid time.Duration
	}{
		{"expired", identity.Admin, nil, time.Nanosecond},
		{"viewer", identity.Viewer, nil, time.Hour}, {"operator", identity.Operator, nil, time.Hour}, {"admin2", identity.Admin, nil, time.Hour},
		{"operator-berlin", identity.Operator, berlin, time.Hour}, {"admin-berlin", identity.Admin, berlin, time.Hour},
		{"somebody", identity.Viewer, nil, time.Hour},
	} {
		if _, err := users.CreateUser(ctx, connect.NewRequest(&dunlinv1.CreateUserRequest{Name: u.name, Role: string(u.role), Scope: u.scope, Password: password})); err != nil {
			return nil, err
		}
		t, err := users.CreateToken(ctx, connect.NewRequest(&dunlinv1.CreateTokenRequest{User: u.name, ValidFor: durationpb.New(u.valid)}))
		if err != nil {
			return nil, err
		}
		p := identity.Principal{Kind: identity.User, Name: u.name, Role: u.role, Scope: u.scope}
		switch u.name {
		case "expired":
			p = identity.Principal{}
		case "viewer":
			w.viewerToken = t.Msg.GetToken()
		case "somebody": // whom others speak about
			continue
		}
		add(u.name, p, t.Msg.GetToken(), nil, false)
	}
	device := func(d *byhand.Device) identity.Principal {
		return identity.Principal{Kind: identity.Device, Name: d.Name}
	}
	add("device", device(w.device), "", w.device.Certificate(), false)
	add("other device", device(w.other), "", w.other.Certificate(), false)
	add("revoked device", identity.Principal{}, "", w.revoked.Certificate(), false)
	add("expired certificate", identity.Principal{}, "", w.stale, true)
	add("certificate of another authority", identity.Principal{}, "", w.foreign, true)
	return w, nil
}

// impostors gives certificates for the name of the device: one of another
// authority, and one of the controller's that has expired.
func (w *world) impostors() (foreign, stale *tls.Certificate, err error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, nil, err
	}
	other, err := pki.NewAuthority(key, time.Now(), lifetime)
	if err != nil {
		return nil, nil, err
	}
	caKey, err := pki.ReadKey(filepath.Join(w.Data, "ca", pki.CertificateID(w.roots[0])+".key"))
	if err != nil {
		return nil, nil, err
	}
	own, err := pki.LoadAuthority(w.roots[0], nil, caKey)
	if err != nil {
		return nil, nil, err
	}
	issue := func(a *pki.Authority, at time.Time) *tls.Certificate {
		leaf, e := a.IssueDevice(w.device.Name, key.Public(), at, lifetime)
		if e != nil {
			err = errors.Join(err, e)
			return nil
		}
		return &tls.Certificate{Certificate: pki.Raw(a.Chain(leaf)), PrivateKey: key, Leaf: leaf}
	}
	foreign, stale = issue(other, time.Now()), issue(own, time.Now().Add(-2*lifetime))
	return foreign, stale, err
}

// user is the MQTT user of whoever has the join token.
func (w *world) user() string { return link.TokenUser(w.joinToken) }
