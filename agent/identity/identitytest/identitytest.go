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
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
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
	Trust     []*dunlinv1.SignedTrust
	BrokerURL func() string
	Registry  string // URL; Serve sets it
	Now       func() time.Time
	Lifetime  time.Duration              // of a device's certificate
	Grace     time.Duration              // after its end
	Tamper    func(answer proto.Message) // changes answers; nil: nobody does
	Nonce     []byte                     // of the last question for the time, for Tamper

	t      testing.TB
	server *tls.Certificate

	mu        sync.Mutex // guards what follows
	authority *pki.Authority
	roots     []*x509.Certificate // all that there were
	devices   map[string][]string // key IDs by name
	calls     map[string]int      // by method
	cut       int
}

// New makes a controller that answers under 127.0.0.1.
func New(t testing.TB, now func() time.Time) *Controller {
	t.Helper()
	c := &Controller{
		t: t, Now: now, Lifetime: 365 * 24 * time.Hour, Grace: 90 * 24 * time.Hour,
		BrokerURL: func() string { return "mqtts://127.0.0.1:8883" }, Registry: "https://127.0.0.1:8443",
		devices: map[string][]string{}, calls: map[string]int{},
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
	c.authority, c.roots = next, append(c.roots[:len(c.roots):len(c.roots)], next.Certificate)
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
	}, func() []*x509.Certificate {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.roots
	}, tls.VerifyClientCertIfGiven)
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
	return name, ok && slices.Contains(c.devices[name], pki.CertificateID(s.PeerCertificates[0]))
}

// Remove forgets all devices.
func (c *Controller) Remove() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.devices)
}

// Calls counts the calls of a method until now.
func (c *Controller) Calls(method string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[method]
}

// Cut has so many calls take effect, and their answers lost.
func (c *Controller) Cut(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = n
}

// answer is the last of each call. The caller holds mu.
func answer[M any, P interface {
	*M
	proto.Message
}](c *Controller, m P) (*connect.Response[M], error) {
	if c.cut > 0 {
		c.cut--
		panic(http.ErrAbortHandler)
	}
	if c.Tamper != nil {
		c.Tamper(m)
	}
	return connect.NewResponse((*M)(m)), nil
}

func refuse(why string) error { return connect.NewError(connect.CodePermissionDenied, errors.New(why)) }

// Join implements the service.
func (c *Controller) Join(_ context.Context, r *connect.Request[dunlinv1.JoinRequest]) (*connect.Response[dunlinv1.JoinResponse], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls["Join"]++
	if r.Msg.JoinToken != c.Token {
		return nil, refuse("the token is not known")
	}
	public, err := pki.ParseRequest(r.Msg.Csr)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	id, err := pki.ID(public)
	c.ok(err)
	if have, known := c.devices[r.Msg.Name]; known && !slices.Contains(have, id) {
		return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("another device has this name"))
	}
	return answer(c, &dunlinv1.JoinResponse{
		Device: r.Msg.Name, Shard: link.Shard(r.Msg.Name), BrokerUrl: c.BrokerURL(), RegistryUrl: c.Registry, Identity: c.issue(r.Msg.Name, public),
	})
}

// Renew implements the service. Keys before the newest go on counting, since
// the answer with its certificate may have been lost.
func (c *Controller) Renew(_ context.Context, r *connect.Request[dunlinv1.RenewRequest]) (*connect.Response[dunlinv1.RenewResponse], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls["Renew"]++
	old, err := x509.ParseCertificate(r.Msg.Certificate)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	device, ok := pki.DeviceOf(old)
	if !ok || !slices.Contains(c.devices[device], pki.CertificateID(old)) {
		return nil, refuse("the device is not known")
	}
	if c.Now().After(old.NotAfter.Add(c.Grace)) {
		return nil, refuse("the certificate has expired too long ago")
	}
	if err := pki.VerifyChain([]*x509.Certificate{old}, c.roots, pki.Within(c.Now(), []*x509.Certificate{old}), x509.ExtKeyUsageClientAuth); err != nil {
		return nil, refuse(err.Error())
	}
	if err := pki.Verify(old.PublicKey, pki.RenewalMessage(r.Msg.Certificate, r.Msg.Csr), r.Msg.Signature); err != nil {
		return nil, refuse(err.Error())
	}
	public, err := pki.ParseRequest(r.Msg.Csr)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return answer(c, &dunlinv1.RenewResponse{Identity: c.issue(device, public), BrokerUrl: c.BrokerURL(), RegistryUrl: c.Registry})
}

// GetTime implements the service.
func (c *Controller) GetTime(_ context.Context, r *connect.Request[dunlinv1.GetTimeRequest]) (*connect.Response[dunlinv1.GetTimeResponse], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls["GetTime"]++
	c.Nonce = r.Msg.Nonce
	return answer(c, SignTime(c.t, c.authority, c.Nonce, c.Now()))
}

// SignTime makes an answer of an authority about the time.
func SignTime(t testing.TB, a *pki.Authority, nonce []byte, now time.Time) *dunlinv1.GetTimeResponse {
	t.Helper()
	signature, err := a.Sign(pki.TimeMessage(nonce, now))
	if err != nil {
		t.Fatal(err)
	}
	return &dunlinv1.GetTimeResponse{Now: timestamppb.New(now), Signature: signature, Certificates: pki.Raw(a.Chain(a.Certificate))}
}

// issue makes a device's certificate. The caller holds mu.
func (c *Controller) issue(device string, public crypto.PublicKey) *dunlinv1.Identity {
	leaf, err := c.authority.IssueDevice(device, public, c.Now(), c.Lifetime)
	c.ok(err)
	c.devices[device] = append(c.devices[device], pki.CertificateID(leaf))
	return &dunlinv1.Identity{Certificates: pki.Raw(c.authority.Chain(leaf)), Roots: pki.Raw(c.roots), Trust: c.Trust, Now: timestamppb.New(c.Now())}
}
