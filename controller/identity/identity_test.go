package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/internal/pki/pkitest"
)

type credentials struct {
	tokens map[[32]byte]Principal
	err    error
}

func (c *credentials) TokenOwner(_ context.Context, hash [32]byte) (string, Role, error) {
	if c.err != nil {
		return "", "", c.err
	}
	p, ok := c.tokens[hash]
	if !ok {
		return "", "", ErrUnknown
	}
	return p.Name, p.Role, nil
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
	a := New(&credentials{tokens: map[[32]byte]Principal{tokenHash: {Name: "ada", Role: Operator}}})
	authority := pkitest.Authority(t)
	shows := func(c *tls.Certificate, verified bool) func(*http.Request) {
		return func(r *http.Request) {
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c.Leaf}}
			if verified {
				r.TLS.VerifiedChains = [][]*x509.Certificate{{c.Leaf, authority.Certificate}}
			}
		}
	}
	ada := Principal{Kind: User, Name: "ada", Role: Operator}
	cam := Principal{Kind: Device, Name: "cam-1"}
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
		"device, not verified": {shows(pkitest.Device(t, authority, "cam-1"), false), Principal{}},
		"device, revoked":      {shows(pkitest.Device(t, authority, "cam-2"), true), Principal{}},
		"device, unknown":      {shows(pkitest.Device(t, authority, "cam-3"), true), Principal{}},
		"controller":           {shows(pkitest.Server(t, authority), true), Principal{}},
		"a user from a device": {func(r *http.Request) {
			shows(pkitest.Device(t, authority, "cam-1"), true)(r)
			r.Header.Set("Authorization", "Bearer "+token)
		}, ada},
		"nothing":              {func(*http.Request) {}, Principal{}},
		"wrong token":          {bearer("Bearer " + token + "x"), Principal{}},
		"empty bearer":         {bearer("Bearer "), Principal{}},
		"malformed basic":      {bearer("Basic !!!"), Principal{}},
		"another scheme":       {bearer("Digest " + token), Principal{}},
		"a token that is long": {bearer("Bearer " + strings.Repeat("x", 1<<16)), Principal{}},
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

func TestLookupFails(t *testing.T) {
	broken := errors.New("disk on fire")
	a := New(&credentials{err: broken})
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
	a := New(&credentials{})
	for _, s := range []string{"", "Bearer x", "Basic Y2FtLTE6eA==", "Basic", "Basic ::", "Bearer  "} {
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
