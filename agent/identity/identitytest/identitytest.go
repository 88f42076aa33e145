// Package identitytest is the part of a controller that gives devices their
// identity, for tests: an authority, join tokens, certificates.
package identitytest

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// Lifetime is that of an authority.
const Lifetime = 10 * 365 * 24 * time.Hour

// Controller gives identities. Its fields are set before it is used.
type Controller struct {
	dunlinv1connect.UnimplementedEnrollmentServiceHandler
	Token     string // the join token
	BrokerURL func() string
	Registry  string // URL; Serve sets it
	Now       func() time.Time
	Lifetime  time.Duration // of a device's certificate
	Grace     time.Duration // after its end

	t      testing.TB
	server *tls.Certificate

	mu        sync.Mutex // guards what follows
	authority *pki.Authority
	devices   map[string]string // key IDs by name
	calls     int
	cut       int
}

// New makes a controller that answers under 127.0.0.1.
func New(t testing.TB, now func() time.Time) *Controller {
	t.Helper()
	c := &Controller{
		t: t, Now: now, Lifetime: 365 * 24 * time.Hour, Grace: 90 * 24 * time.Hour,
		BrokerURL: func() string { return "mqtts://127.0.0.1:8883" }, Registry: "https://127.0.0.1:8443",
		devices: map[string]string{},
	}
	c.Rotate()
	c.Token = pki.AppendPin("dunlin_join_test", pki.PinOf(c.Authority().Certificate))
	return c
}

// Rotate makes another authority, which those before it vouch for.
func (c *Controller) Rotate() {
	c.t.Helper()
	next, err := pki.NewAuthority(c.key(), c.Now(), Lifetime)
	c.ok(err)
	if old := c.Authority(); old != nil {
		cross, err := old.Vouch(next.Certificate, c.Now())
		c.ok(err)
		next.Cross = append([]*x509.Certificate{cross}, old.Cross...)
	}
	key := c.key()
	leaf, err := next.IssueController([]string{"127.0.0.1"}, key.Public(), c.Now(), Lifetime)
	c.ok(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.authority = next
	c.server = &tls.Certificate{Certificate: pki.Raw(next.Chain(leaf)), PrivateKey: key}
}

// Authority gives the one that issues now.
func (c *Controller) Authority() *pki.Authority {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.authority
}

func (c *Controller) key() crypto.Signer {
	c.t.Helper()
	key, err := pki.NewKey()
	c.ok(err)
	return key
}

func (c *Controller) ok(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// TLS is the server's side of its connections.
func (c *Controller) TLS() *tls.Config {
	cfg := pki.ServerConfig(func() (*tls.Certificate, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.server, nil
	}, func() []*x509.Certificate { return []*x509.Certificate{c.Authority().Certificate} }, tls.VerifyClientCertIfGiven)
	each := cfg.GetConfigForClient
	cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		cfg, err := each(h)
		if err == nil {
			cfg.Time = c.Now
		}
		return cfg, err
	}
	return cfg
}

// Serve answers over HTTPS, for what mux does not have a handler for yet, and
// is the registry's URL from then on.
func (c *Controller) Serve(mux *http.ServeMux) *httptest.Server {
	mux.Handle(dunlinv1connect.NewEnrollmentServiceHandler(c))
	s := httptest.NewUnstartedServer(mux)
	s.TLS = c.TLS()
	s.StartTLS()
	c.t.Cleanup(s.Close)
	c.Registry = s.URL
	return s
}

// Device says which device a connection is, if it is one that was not removed.
func (c *Controller) Device(s *tls.ConnectionState) (string, bool) {
	if s == nil || len(s.PeerCertificates) == 0 {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name, ok := pki.DeviceOf(s.PeerCertificates[0])
	return name, ok && c.devices[name] == pki.CertificateID(s.PeerCertificates[0])
}

// Remove forgets all devices.
func (c *Controller) Remove() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.devices)
}

// Key gives the ID of a device's key.
func (c *Controller) Key(device string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.devices[device]
}

// Calls counts the calls until now.
func (c *Controller) Calls() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls
}

// Cut has so many calls take effect, and their answers lost.
func (c *Controller) Cut(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = n
}

// lost counts a call, and says whether its answer is to be lost. The caller
// holds mu.
func (c *Controller) lost() {
	if c.cut > 0 {
		c.cut--
		panic(http.ErrAbortHandler)
	}
}

var errUnknown = connect.NewError(connect.CodePermissionDenied, errors.New("the token is not known"))

// Join implements the service.
func (c *Controller) Join(_ context.Context, r *connect.Request[dunlinv1.JoinRequest]) (*connect.Response[dunlinv1.JoinResponse], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if r.Msg.JoinToken != c.Token {
		return nil, errUnknown
	}
	public, err := pki.ParseRequest(r.Msg.Csr)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	id, err := pki.ID(public)
	c.ok(err)
	if have, known := c.devices[r.Msg.Name]; known && have != id {
		return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("another device has this name"))
	}
	identity := c.issue(r.Msg.Name, public)
	c.lost()
	return connect.NewResponse(&dunlinv1.JoinResponse{
		Device: r.Msg.Name, Shard: link.Shard(r.Msg.Name), BrokerUrl: c.BrokerURL(), RegistryUrl: c.Registry, Identity: identity,
	}), nil
}

// issue makes a device's certificate. The caller holds mu.
func (c *Controller) issue(device string, public crypto.PublicKey) *dunlinv1.Identity {
	leaf, err := c.authority.IssueDevice(device, public, c.Now(), c.Lifetime)
	c.ok(err)
	c.devices[device] = pki.CertificateID(leaf)
	return &dunlinv1.Identity{
		Certificates: pki.Raw(c.authority.Chain(leaf)), Roots: [][]byte{c.authority.Certificate.Raw}, Now: timestamppb.New(c.Now()),
	}
}
