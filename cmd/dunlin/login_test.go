package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/oauth2-proxy/mockoidc"

	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/internal/pki"
)

// nobody is logged in, whatever the machine's settings are.
func nobody(t *testing.T) {
	t.Helper()
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	for _, name := range []string{"DUNLIN_URL", "DUNLIN_TOKEN", "DUNLIN_CA", "DUNLIN_CONTEXT"} {
		t.Setenv(name, "")
	}
}

func write(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newAuthority(t *testing.T) *pki.Authority {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	a, err := pki.NewAuthority(key, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestLoginTLS: a controller with a certificate of its own authority is known
// by a file, by a fingerprint or by DUNLIN_CA, and afterwards by what is stored.
func TestLoginTLS(t *testing.T) {
	backend, token, stop, err := startController(t.TempDir(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	authority, stranger := newAuthority(t), newAuthority(t)
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := authority.IssueController([]string{"127.0.0.1"}, key.Public(), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	to, err := url.Parse(backend)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }})
	server.TLS = pki.ServerConfig(func() (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: pki.Raw(authority.Chain(leaf)), PrivateKey: key}, nil
	}, nil, tls.NoClientCert)
	server.StartTLS()
	t.Cleanup(server.Close)

	pem := func(a *pki.Authority) string { return write(t, string(pki.EncodeCertificates(a.Certificate))) }
	fingerprint := func(c *x509.Certificate) string {
		pin := pki.PinOf(c)
		return hex.EncodeToString(pin[:])
	}
	for name, test := range map[string]struct {
		args  []string
		env   string
		works bool
		part  string
	}{
		"nothing":              {nil, "", false, "is known by --ca"},
		"file":                 {[]string{"--ca", pem(authority)}, "", true, "as admin"},
		"another's file":       {[]string{"--ca", pem(stranger)}, "", false, "certificate"},
		"no file":              {[]string{"--ca", "/does/not/exist"}, "", false, "no such file"},
		"fingerprint":          {[]string{"--ca-fingerprint", fingerprint(authority.Certificate)}, "", true, "as admin"},
		"upper-case":           {[]string{"--ca-fingerprint", strings.ToUpper(fingerprint(authority.Certificate))}, "", true, "as admin"},
		"another fingerprint":  {[]string{"--ca-fingerprint", fingerprint(stranger.Certificate)}, "", false, "by --ca-fingerprint: "},
		"the leaf's":           {[]string{"--ca-fingerprint", fingerprint(leaf)}, "", false, "by --ca-fingerprint: "},
		"environment":          {nil, pem(authority), true, "as admin"},
		"another's there":      {nil, pem(stranger), false, "certificate"},
		"flag and environment": {[]string{"--ca", pem(authority)}, pem(stranger), true, "as admin"},
	} {
		t.Run(name, func(t *testing.T) {
			nobody(t)
			t.Setenv("DUNLIN_CA", test.env)
			code, _, stderr := dunlinWith(t, token, append([]string{"login", server.URL}, test.args...)...)
			if (code == exitOK) != test.works || !strings.Contains(stderr, test.part) {
				t.Fatalf("exit code %d, %s", code, stderr)
			}
			if !test.works {
				return
			}
			t.Setenv("DUNLIN_CA", "")
			if code, stdout, stderr := dunlinWith(t, "", "whoami"); code != exitOK || !strings.Contains(stdout, server.URL) {
				t.Errorf("by what is stored: exit code %d, %s", code, stderr)
			}
			// With another token than the stored one, and at another login.
			t.Setenv("DUNLIN_URL", server.URL)
			t.Setenv("DUNLIN_TOKEN", token)
			if code, _, stderr := dunlinWith(t, "", "get", "devices"); code != exitOK {
				t.Errorf("by the environment's token: exit code %d, %s", code, stderr)
			}
			if code, _, stderr := dunlinWith(t, token, "login", server.URL+"/"); code != exitOK {
				t.Errorf("logged in again: exit code %d, %s", code, stderr)
			}
			// It counts for this controller only.
			t.Setenv("DUNLIN_URL", strings.Replace(server.URL, "127.0.0.1", "localhost", 1))
			if code, _, stderr := dunlinWith(t, "", "get", "devices"); code == exitOK {
				t.Errorf("at another URL: %s", stderr)
			}
		})
	}
}

// person is a user of a mockoidc provider.
type person struct {
	mockoidc.MockUser
	claims map[string]string
}

func (p *person) Claims(_ []string, c *mockoidc.IDTokenClaims) (jwt.Claims, error) {
	all := jwt.MapClaims{"iss": c.Issuer, "aud": c.Audience, "sub": c.Subject, "exp": c.ExpiresAt.Unix(), "nonce": c.Nonce}
	for k, v := range p.claims {
		all[k] = v
	}
	return all, nil
}

// provider starts an OpenID Connect provider; its client has no secret.
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
	err = m.AddMiddleware(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := r.ParseForm(); err == nil && !r.Form.Has("client_secret") {
				r.Form.Set("client_secret", m.ClientSecret)
			}
			next.ServeHTTP(w, r)
		})
	})
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
	t.Cleanup(func() { _ = m.Shutdown() })
	return m
}

// TestLoginOIDC signs in at a provider as a browser would.
func TestLoginOIDC(t *testing.T) {
	m := provider(t)
	backend, _, stop, err := startController(t.TempDir(), "127.0.0.1:0", func(c *controller.Config) {
		c.OIDCIssuer, c.OIDCClientID = m.Issuer(), m.ClientID
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	good := map[string]string{"dunlin_role": "operator", "dunlin_scope": "site=berlin"}
	get := func(t *testing.T, url string) (status int, page string) {
		t.Helper()
		resp, err := http.Get(url)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return resp.StatusCode, string(b)
	}
	for name, test := range map[string]struct {
		claims  map[string]string
		browser func(t *testing.T, page string)
		code    int
		part    string
	}{
		"signed in": {good, func(t *testing.T, page string) {
			if status, text := get(t, page); status != http.StatusOK || !strings.Contains(text, "You may close this page") {
				t.Errorf("the page says %d %s", status, text)
			}
		}, exitOK, "as oidc:ada (operator of site=berlin)"},
		"somebody else comes first": {good, func(t *testing.T, page string) {
			u, err := url.Parse(page)
			if err != nil {
				t.Error(err)
				return
			}
			callback := u.Query().Get("redirect_uri")
			for _, query := range []string{"", "?code=stolen", "?code=stolen&state=guessed", "?error=denied&state="} {
				if status, _ := get(t, callback+query); status != http.StatusBadRequest {
					t.Errorf("%s: status %d", query, status)
				}
			}
			get(t, page)
		}, exitOK, "as oidc:ada"},
		"refused there": {good, func(t *testing.T, page string) {
			u, err := url.Parse(page)
			if err != nil {
				t.Error(err)
				return
			}
			get(t, u.Query().Get("redirect_uri")+"?error=access_denied&error_description=no%1b&state="+url.QueryEscape(u.Query().Get("state")))
		}, exitError, "it refuses: access_denied no\uFFFD"},
		"a code that is none": {good, func(t *testing.T, page string) {
			u, err := url.Parse(page)
			if err != nil {
				t.Error(err)
				return
			}
			get(t, u.Query().Get("redirect_uri")+"?code=none&state="+url.QueryEscape(u.Query().Get("state")))
		}, exitError, "sign in at " + m.Issuer()},
		"has no role": {map[string]string{}, func(t *testing.T, page string) { get(t, page) }, exitNotAllowed, "refuses the token; nothing was stored: the token of " + m.Issuer() + ": it has no claim dunlin_role"},
	} {
		t.Run(name, func(t *testing.T) {
			nobody(t)
			user := &person{claims: test.claims}
			user.Subject = "ada"
			m.UserQueue = &mockoidc.UserQueue{}
			m.QueueUser(user)
			stderr, w := io.Pipe()
			var said strings.Builder
			var reading sync.WaitGroup
			reading.Go(func() {
				lines := bufio.NewScanner(stderr)
				for lines.Scan() {
					said.WriteString(lines.Text() + "\n")
					if strings.HasPrefix(lines.Text(), m.AuthorizationEndpoint()) {
						if !strings.Contains(lines.Text(), "code_challenge_method=S256") {
							t.Errorf("no PKCE: %s", lines.Text())
						}
						test.browser(t, lines.Text())
					}
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			code := run(ctx, []string{"login", backend, "--oidc"}, strings.NewReader(""), io.Discard, w)
			_ = w.Close()
			reading.Wait()
			if code != test.code || !strings.Contains(said.String(), test.part) {
				t.Fatalf("exit code %d, want %d with %q: %s", code, test.code, test.part, &said)
			}
			if code, stdout, stderr := dunlinWith(t, "", "whoami"); (code == exitOK) != (test.code == exitOK) || code == exitOK && !strings.Contains(stdout, "oidc:ada") {
				t.Errorf("whoami: %d %s %s", code, stdout, stderr)
			}
		})
	}
	nobody(t)
	plainController, _, stop2, err := startController(t.TempDir(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop2)
	if code, _, stderr := dunlinWith(t, "", "login", plainController, "--oidc"); code != exitError || !strings.Contains(stderr, "has no OpenID Connect provider") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}
