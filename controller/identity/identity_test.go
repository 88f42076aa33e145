package identity

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

type credentials struct {
	tokens  map[[32]byte]Grant
	devices map[string][32]byte
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

func (c *credentials) DeviceSecret(_ context.Context, device string) ([32]byte, error) {
	if c.err != nil {
		return [32]byte{}, c.err
	}
	h, ok := c.devices[device]
	if !ok {
		return [32]byte{}, ErrUnknown
	}
	return h, nil
}

func TestFromRequest(t *testing.T) {
	token, tokenHash := NewToken("dunlin_")
	secret, secretHash := NewToken("")
	other, otherHash := NewToken("")
	a := New(&credentials{
		tokens:  map[[32]byte]Grant{tokenHash: {User: "ada", UserRole: Operator}},
		devices: map[string][32]byte{"cam-1": secretHash, "cam-2": otherHash},
	}, Options{})
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
		"bearer":                 {bearer("Bearer " + token), ada},
		"bearer lower case":      {bearer("bearer " + token), ada},
		"basic token":            {basic("anything", token), ada},
		"basic token, no name":   {basic("", token), ada},
		"device":                 {basic("cam-1", secret), cam},
		"nothing":                {func(*http.Request) {}, nobody},
		"wrong token":            {bearer("Bearer " + token + "x"), nobody},
		"empty bearer":           {bearer("Bearer "), nobody},
		"device secret bearer":   {bearer("Bearer " + secret), nobody},
		"other device's secret":  {basic("cam-1", other), nobody},
		"unknown device":         {basic("cam-9", secret), nobody},
		"empty secret":           {basic("cam-1", ""), nobody},
		"malformed basic":        {bearer("Basic !!!"), nobody},
		"another scheme":         {bearer("Digest " + token), nobody},
		"a token that is long":   {bearer("Bearer " + strings.Repeat("x", 1<<16)), nobody},
		"the hash is no secret":  {basic("cam-1", string(secretHash[:])), nobody},
		"zero hash's absent one": {basic("cam-9", ""), nobody},
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
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error tells the secret: %v", name, err)
		}
	}
	if !a.AuthenticateDevice(t.Context(), "cam-1", secret) || a.AuthenticateDevice(t.Context(), "cam-2", secret) {
		t.Error("AuthenticateDevice: wrong answer")
	}
	// A user's token is not a device's secret.
	if a.AuthenticateDevice(t.Context(), "cam-1", token) {
		t.Error("AuthenticateDevice took a user's token")
	}
}

func TestLookupFails(t *testing.T) {
	broken := errors.New("disk on fire")
	a := New(&credentials{err: broken}, Options{})
	for _, set := range []func(*http.Request){
		func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") },
		func(r *http.Request) { r.SetBasicAuth("cam-1", "x") },
	} {
		r := httptest.NewRequest("GET", "/", nil)
		set(r)
		if p, err := a.FromRequest(r); !errors.Is(err, broken) || errors.Is(err, ErrUnauthenticated) || p.Kind != 0 {
			t.Errorf("got %v, %v; want nobody and the lookup's error", p, err)
		}
	}
	if a.AuthenticateDevice(t.Context(), "cam-1", "x") {
		t.Error("a device whose secret cannot be looked up was let in")
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
	_, hash := NewToken("")
	now := time.Unix(0, 0)
	o := NewOIDC(OIDCConfig{Issuer: "https://a.example", ClientID: "a", NameClaim: "sub", RoleClaim: "role", Log: slog.New(slog.DiscardHandler)})
	o.verifier = oidc.NewVerifier(o.Issuer, new(oidc.StaticKeySet), &oidc.Config{ClientID: o.ClientID})
	a := New(&credentials{devices: map[string][32]byte{"cam-1": hash}}, Options{OIDC: o, Now: func() time.Time {
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
