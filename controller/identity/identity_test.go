package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/dunlin/dunlin/internal/pki/pkitest"
)

type credentials struct {
	tokens  map[[32]byte]Grant
	err     error
	used    int
	usedErr error
}

func (c *credentials) TokenOwner(_ context.Context, hash [32]byte) (Grant, error) {
	if c.err != nil {
		return Grant{}, c.err
	}
	g, ok := c.tokens[hash]
	if !ok {
		return Grant{}, ErrUnknown
	}
	return g, nil
}

func (c *credentials) TokenUsed(_ context.Context, hash [32]byte, at time.Time) error {
	g := c.tokens[hash]
	g.LastUsed = at
	c.tokens[hash] = g
	c.used++
	return c.usedErr
}

func (c *credentials) CheckDevice(_ context.Context, device string, cert *x509.Certificate) error {
	switch {
	case c.err != nil:
		return c.err
	case device == "cam-2":
		return ErrRevoked
	case device != "cam-1":
		return ErrUnknown
	}
	return nil
}

func TestFromRequest(t *testing.T) {
	token, tokenHash := NewToken("dunlin_")
	a := New(&credentials{tokens: map[[32]byte]Grant{tokenHash: {User: "ada", UserRole: Operator}}}, Options{})
	authority := pkitest.Authority(t)
	shows := func(c *tls.Certificate, verified bool) func(*http.Request) {
		return func(r *http.Request) {
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c.Leaf}}
			if verified {
				r.TLS.VerifiedChains = [][]*x509.Certificate{{c.Leaf, authority.Certificate}}
			}
		}
	}
	const from = "192.0.2.1:1234"
	ada := Principal{Kind: User, Name: "ada", Role: Operator, From: from}
	cam := Principal{Kind: Device, Name: "cam-1", From: from}
	nobody := Principal{From: from}
	bearer := func(s string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("Authorization", s) }
	}
	basic := func(u, p string) func(*http.Request) { return func(r *http.Request) { r.SetBasicAuth(u, p) } }
	for name, c := range map[string]struct {
		set  func(*http.Request)
		want Principal
	}{
		"bearer":               {bearer("Bearer " + token), ada},
		"bearer lower case":    {bearer("bearer " + token), ada},
		"basic token":          {basic("anything", token), ada},
		"basic token, no name": {basic("", token), ada},
		"device":               {shows(pkitest.Device(t, authority, "cam-1"), true), cam},
		"device, not verified": {shows(pkitest.Device(t, authority, "cam-1"), false), nobody},
		"device, revoked":      {shows(pkitest.Device(t, authority, "cam-2"), true), nobody},
		"device, unknown":      {shows(pkitest.Device(t, authority, "cam-3"), true), nobody},
		"controller":           {shows(pkitest.Server(t, authority), true), nobody},
		"a user from a device": {func(r *http.Request) {
			shows(pkitest.Device(t, authority, "cam-1"), true)(r)
			r.Header.Set("Authorization", "Bearer "+token)
		}, ada},
		"nothing":              {func(*http.Request) {}, nobody},
		"wrong token":          {bearer("Bearer " + token + "x"), nobody},
		"empty bearer":         {bearer("Bearer "), nobody},
		"malformed basic":      {bearer("Basic !!!"), nobody},
		"another scheme":       {bearer("Digest " + token), nobody},
		"a token that is long": {bearer("Bearer " + strings.Repeat("x", 1<<16)), nobody},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		c.set(r)
		got, err := a.FromRequest(r)
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
		if (c.want.Kind == 0) != errors.Is(err, ErrUnauthenticated) {
			t.Errorf("%s: got error %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), token) {
			t.Errorf("%s: the error tells the token: %v", name, err)
		}
	}
}

// A connection outlives the certificate that it began with, which counts no
// longer for that.
func TestCertificateEndsOnConnection(t *testing.T) {
	now := time.Now()
	a := New(&credentials{}, Options{Now: func() time.Time { return now }})
	leaf := pkitest.Device(t, pkitest.Authority(t), "cam-1").Leaf
	r := httptest.NewRequest("GET", "/", nil)
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{leaf}}}
	if p, err := a.FromRequest(r); err != nil || p.Name != "cam-1" {
		t.Errorf("got %v, %v", p, err)
	}
	now = leaf.NotAfter.Add(time.Second)
	if p, err := a.FromRequest(r); !errors.Is(err, ErrUnauthenticated) || p.Kind != 0 {
		t.Errorf("got %v, %v", p, err)
	}
}

func TestLookupFails(t *testing.T) {
	broken := errors.New("disk on fire")
	a := New(&credentials{err: broken}, Options{})
	for _, set := range []func(*http.Request){
		func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") },
		func(r *http.Request) {
			leaf := pkitest.Device(t, pkitest.Authority(t), "cam-1").Leaf
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{leaf}}}
		},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		set(r)
		if p, err := a.FromRequest(r); !errors.Is(err, broken) || errors.Is(err, ErrUnauthenticated) || p.Kind != 0 {
			t.Errorf("got %v, %v; want nobody and the lookup's error", p, err)
		}
	}
}

func TestMay(t *testing.T) {
	roles := []Role{Viewer, Operator, Admin}
	for i, have := range roles {
		for j, need := range roles {
			if got := (Principal{Kind: User, Role: have}).May(need); got != (i >= j) {
				t.Errorf("%s may %s: %t", have, need, got)
			}
		}
	}
	for _, p := range []Principal{{}, {Kind: Device, Name: "cam-1"}, {Kind: Device, Role: Admin}, {Kind: User, Role: "root"}, {Role: Admin}} {
		if p.May(Viewer) {
			t.Errorf("%+v may view", p)
		}
	}
	if (Principal{Kind: User, Role: Admin}).May("") {
		t.Error("a role that does not exist was granted")
	}
}

func TestNewToken(t *testing.T) {
	a, ha := NewToken("dunlin_")
	b, hb := NewToken("dunlin_")
	if a == b || ha == hb || Hash(a) != ha || !strings.HasPrefix(a, "dunlin_") || len(a) != len("dunlin_")+43 {
		t.Errorf("tokens %q, %q", a, b)
	}
}

func TestContext(t *testing.T) {
	if p := FromContext(t.Context()); p.Kind != 0 || p.String() != "nobody" {
		t.Errorf("an empty context carries %v", p)
	}
	p := Principal{Kind: User, Name: "ada", Role: Viewer}
	if got := FromContext(WithPrincipal(t.Context(), p)); !reflect.DeepEqual(got, p) || got.String() != "user:ada" {
		t.Errorf("got %v", got)
	}
}

func FuzzFromRequest(f *testing.F) {
	now := time.Unix(0, 0)
	o := NewOIDC(OIDCConfig{Issuer: "https://a.example", ClientID: "a", NameClaim: "sub", RoleClaim: "role", Log: slog.New(slog.DiscardHandler)})
	o.verifier = oidc.NewVerifier(o.Issuer, new(oidc.StaticKeySet), &oidc.Config{ClientID: o.ClientID})
	a := New(&credentials{}, Options{OIDC: o, Now: func() time.Time {
		now = now.Add(time.Minute) // so that no guess is too many
		return now
	}})
	for _, s := range []string{"", "Bearer x", "Basic Y2FtLTE6eA==", "Basic", "Basic ::", "Bearer  ", "Bearer eyJhbGciOiJSUzI1NiJ9.e30.AA", "Bearer ..", "Bearer eyJhbGciOiJub25lIn0.e30."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", header)
		if p, err := a.FromRequest(r); !errors.Is(err, ErrUnauthenticated) || p.Kind != 0 {
			t.Errorf("%q: %v, %v", header, p, err)
		}
	})
}
