package identity

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/oauth2-proxy/mockoidc"
)

// provider starts an OpenID Connect provider with a key of its own.
func provider(t *testing.T) *mockoidc.MockOIDC {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	m, err := mockoidc.NewServer(key)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(listener, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func sign(t *testing.T, m *mockoidc.MockOIDC, claims jwt.MapClaims) string {
	t.Helper()
	token, err := m.Keypair.SignJWT(claims)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func bearerOf(t *testing.T, a *Authenticator, token string) (Principal, error) {
	t.Helper()
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	return a.FromRequest(r)
}

func TestOIDC(t *testing.T) {
	m, stranger := provider(t), provider(t)
	clock := &clock{at: time.Now()}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	config := OIDCConfig{
		Issuer: m.Issuer(), ClientID: m.ClientID, NameClaim: "sub", RoleClaim: "dunlin_role", ScopeClaim: "dunlin_scope",
		HTTP: client, Log: slog.New(slog.DiscardHandler), Now: clock.now,
	}
	guarded := 0
	authenticator := func(c OIDCConfig) *Authenticator {
		return New(&credentials{}, Options{OIDC: NewOIDC(c), Guard: NewGuard(func() time.Time {
			guarded++
			return time.Unix(int64(guarded)*60, 0) // no guess is too many here
		}), Now: clock.now})
	}
	a := authenticator(config)
	until := clock.now().Add(time.Hour).Truncate(time.Second)
	good := jwt.MapClaims{
		"iss": m.Issuer(), "aud": m.ClientID, "sub": "8f3c|1", "exp": until.Unix(), "dunlin_role": "operator", "dunlin_scope": "site=berlin,env=prod",
	}
	with := func(change jwt.MapClaims) jwt.MapClaims {
		c := maps.Clone(good)
		for k, v := range change {
			if c[k] = v; v == nil {
				delete(c, k)
			}
		}
		return c
	}
	p, err := bearerOf(t, a, sign(t, m, good))
	want := Principal{Kind: User, Name: "oidc:8f3c|1", Role: Operator, Scope: map[string]string{"site": "berlin", "env": "prod"}, From: "192.0.2.1:1234", Expires: until.UTC(), External: true, SignedIn: true}
	if p.Expires = p.Expires.UTC(); err != nil || !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, %v, want %+v", p, err, want)
	}
	if p, err := bearerOf(t, a, sign(t, m, with(jwt.MapClaims{"dunlin_scope": "*"}))); err != nil || p.Scope != nil {
		t.Errorf("the whole fleet: %+v, %v", p, err)
	}
	if p, err := bearerOf(t, a, sign(t, m, with(jwt.MapClaims{"aud": []string{"other", m.ClientID}}))); err != nil || p.Role != Operator {
		t.Errorf("several audiences: %+v, %v", p, err)
	}
	none, err := jwt.NewWithClaims(jwt.SigningMethodNone, good).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	hmac, err := jwt.NewWithClaims(jwt.SigningMethodHS256, good).SignedString([]byte("key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ token, part string }{
		"other audience":     {sign(t, m, with(jwt.MapClaims{"aud": "other"})), "wrong credentials"},
		"other issuer":       {sign(t, m, with(jwt.MapClaims{"iss": stranger.Issuer()})), "wrong credentials"},
		"a stranger's key":   {sign(t, stranger, good), "wrong credentials"},
		"not signed":         {none, "wrong credentials"},
		"a secret's":         {hmac, "wrong credentials"},
		"altered":            {strings.Replace(sign(t, m, good), ".", ".e", 1), "wrong credentials"},
		"no JWT":             {"a.b.c", "wrong credentials"},
		"expired":            {sign(t, m, with(jwt.MapClaims{"exp": clock.now().Add(-time.Second).Unix()})), "expired"},
		"no expiry":          {sign(t, m, with(jwt.MapClaims{"exp": nil})), "expired"},
		"not yet":            {sign(t, m, with(jwt.MapClaims{"nbf": clock.now().Add(time.Hour).Unix()})), "wrong credentials"},
		"no role":            {sign(t, m, with(jwt.MapClaims{"dunlin_role": nil})), "no claim dunlin_role"},
		"another role":       {sign(t, m, with(jwt.MapClaims{"dunlin_role": "root"})), `role "root"`},
		"roles":              {sign(t, m, with(jwt.MapClaims{"dunlin_role": []string{"admin"}})), "claim dunlin_role is not text"},
		"no scope":           {sign(t, m, with(jwt.MapClaims{"dunlin_scope": nil})), "no claim dunlin_scope"},
		"an empty scope":     {sign(t, m, with(jwt.MapClaims{"dunlin_scope": ""})), "KEY=VALUE"},
		"a scope that is no": {sign(t, m, with(jwt.MapClaims{"dunlin_scope": "site=a,site=b"})), "KEY=VALUE"},
		"no name":            {sign(t, m, with(jwt.MapClaims{"sub": nil})), "no claim sub"},
		"a name of lines":    {sign(t, m, with(jwt.MapClaims{"sub": "a\nb"})), "claim sub"},
	} {
		p, err := bearerOf(t, a, test.token)
		if p.Kind != 0 || !errors.Is(err, ErrUnauthenticated) || !strings.Contains(err.Error(), test.part) {
			t.Errorf("%s: got %v, %v, want %q", name, p, err, test.part)
		}
	}

	byMail := config
	byMail.NameClaim, byMail.ScopeClaim = "email", ""
	a = authenticator(byMail)
	if p, err := bearerOf(t, a, sign(t, m, with(jwt.MapClaims{"email": "ada@example.com", "dunlin_scope": nil}))); err != nil || p.Name != "oidc:ada@example.com" || p.Scope != nil {
		t.Errorf("by mail: %+v, %v", p, err)
	}
	if _, err := bearerOf(t, a, sign(t, m, with(jwt.MapClaims{"email": "ada@example.com", "email_verified": false}))); !errors.Is(err, ErrUnauthenticated) {
		t.Errorf("by a mail that is not verified: %v", err)
	}
}

// An issuer that is away when the controller starts is asked again, and not
// more often than that.
func TestOIDCIssuerAway(t *testing.T) {
	m := provider(t)
	asked, away := 0, true
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		if away {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		resp, err := http.Get(m.Addr() + r.URL.Path)
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		_, _ = io.Copy(w, resp.Body)
	}))
	t.Cleanup(proxy.Close)
	at, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	clock := &clock{at: time.Now()}
	a := New(&credentials{}, Options{Now: clock.now, OIDC: NewOIDC(OIDCConfig{
		Issuer: m.Issuer(), ClientID: m.ClientID, NameClaim: "sub", RoleClaim: "dunlin_role", Log: slog.New(slog.DiscardHandler), Now: clock.now,
		HTTP: &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(at)}},
	})})
	token := sign(t, m, jwt.MapClaims{"iss": m.Issuer(), "aud": m.ClientID, "sub": "ada", "exp": clock.now().Add(time.Hour).Unix(), "dunlin_role": "viewer"})
	for range 30 { // and this counts as no guess
		if _, err := bearerOf(t, a, token); !errors.Is(err, errNoIssuer) {
			t.Fatalf("got %v", err)
		}
	}
	if asked != 1 {
		t.Errorf("the issuer was asked %d times", asked)
	}
	away = false
	clock.add(issuerEvery)
	if p, err := bearerOf(t, a, token); err != nil || p.Name != "oidc:ada" {
		t.Errorf("got %v, %v", p, err)
	}
}

func FuzzOIDC(f *testing.F) {
	o := NewOIDC(OIDCConfig{NameClaim: "sub", RoleClaim: "role", ScopeClaim: "scope"})
	f.Add("ada", "viewer", "site=berlin")
	f.Add("a\x00", "", "=,=")
	f.Fuzz(func(t *testing.T, name, role, scope string) {
		p, err := o.principal(map[string]any{"sub": name, "role": role, "scope": scope})
		if err == nil && (CheckRole(p.Role) != nil || !externalName.MatchString(name) || len(p.Scope) == 0 && scope != WholeFleet) {
			t.Errorf("%q %q %q: took %+v", name, role, scope, p)
		}
	})
}
