package controller

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Certificates are warned of in time, once a day, and so is a clock that is
// before the authority.
func TestCertificateWatch(t *testing.T) {
	start := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	key := pkitest.Key(t)
	ca, err := pki.NewAuthority(key, start, 20*365*day)
	must(t, err)
	leaf := func(lifetime time.Duration) *x509.Certificate {
		c, err := ca.IssueController([]string{"a.example.com"}, key.Public(), start, lifetime)
		must(t, err)
		return c
	}
	year, week := leaf(365*day), leaf(7*day)
	var failure error
	uses := []use{{"authority", ca.Certificate.Subject.CommonName, ca.Certificate}, {"tls-cert", "", year}, {"acme", "a.example.com", nil}}
	var log bytes.Buffer
	w := newCertificateWatch(func() []use { return uses }, func() error { return failure }, func() []*x509.Certificate { return nil }, slog.New(slog.NewTextHandler(&log, nil)))
	for _, step := range []struct {
		name string
		at   time.Duration
		do   func()
		want []string // in the log, a line each
	}{
		{"years before", -5 * 365 * day, nil, []string{"clock of this machine is wrong.*2025-01-02 00:00:00.*2029-12-31 23:00:00"}},
		{"a day later", -5*365*day + day, nil, []string{"clock of this machine is wrong"}},
		{"a minute later", -5*365*day + day + time.Minute, nil, nil},
		{"the clock is set", 0, nil, nil},
		{"a slow clock", -time.Minute, nil, nil},
		{"issued", 6 * day, func() { uses[2].leaf = week }, []string{"a new certificate is in use.*name=a.example.com", "acme a.example.com ends 2030-01-08"}}, // less than a quarter is left
		{"renewed", 6 * day, func() { uses[2].leaf = leaf(30 * day) }, []string{"a new certificate is in use.*name=a.example.com"}},
		{"15 days before", 350 * day, func() { uses = uses[:2] }, nil},
		{"14 days before", 351 * day, nil, []string{"tls-cert ends 2031-01-01 00:00:00"}},
		{"an hour later", 351*day + time.Hour, nil, nil},
		{"the next day", 352 * day, nil, []string{"tls-cert ends"}},
		{"unreadable", 352 * day, func() { failure = errors.New("no key") }, []string{"stays in use.*no key"}},
		{"readable", 352 * day, func() { failure = nil }, nil},
		{"unreadable again", 352 * day, func() { failure = errors.New("no key") }, []string{"stays in use.*no key"}},
		{"after it", 366 * day, func() { failure = nil }, []string{"tls-cert has ended 2031-01-01"}},
		{"a year before", 19 * 365 * day, func() { uses = uses[:1] }, []string{"authority Dunlin CA [0-9a-f]* ends"}},
		{"years after", 40 * 365 * day, nil, []string{"authority Dunlin CA [0-9a-f]* has ended .*, and it is 2069-12-22"}},
	} {
		if step.do != nil {
			step.do()
		}
		log.Reset()
		w.look(start.Add(step.at))
		expectLines(t, step.name, log.String(), step.want)
	}
}

// Other authorities that devices must know are noticed, once.
func TestCertificateWatchRoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var roots atomic.Value
		var told atomic.Int32
		roots.Store([]*x509.Certificate{})
		w := newCertificateWatch(func() []use { return nil }, func() error { return nil }, func() []*x509.Certificate { return roots.Load().([]*x509.Certificate) }, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- w.run(ctx, func(context.Context) { told.Add(1) }) }()
		for want := range int32(3) {
			time.Sleep(2 * certificatesEvery)
			synctest.Wait()
			if got := told.Load(); got != want {
				t.Errorf("told %d times, want %d", got, want)
			}
			roots.Store([]*x509.Certificate{{Raw: []byte{byte(want)}}})
		}
		cancel()
		must(t, <-done)
	})
}

// expectLines compares a log with a pattern for each of its lines.
func expectLines(t *testing.T, when, log string, want []string) {
	t.Helper()
	lines := strings.FieldsFunc(log, func(r rune) bool { return r == '\n' })
	ok := len(lines) == len(want)
	for i := range want {
		ok = ok && regexp.MustCompile(want[i]).MatchString(lines[i])
	}
	if !ok {
		t.Errorf("%s: the log is\n%swant %q", when, log, want)
	}
}

// A controller whose clock is years slow says so when it starts.
func TestStartBeforeTheAuthority(t *testing.T) {
	data := t.TempDir()
	st, err := store.Open(t.Context(), filepath.Join(data, storeFile), store.Options{})
	must(t, err)
	_, err = identity.OpenAuthorities(t.Context(), st, filepath.Join(data, authoritiesFolder), []string{"localhost"}, func() time.Time { return time.Now().Add(5 * 365 * day) })
	must(t, errors.Join(err, st.Close()))
	var log bytes.Buffer
	w := start(t, data, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	must(t, w.stop())
	if got := log.String(); strings.Count(got, "the clock of this machine is wrong") != 1 {
		t.Errorf("the log: %s", got)
	}
}

// pair is a certificate in files.
type pair struct{ cert, key string }

func (p pair) write(t *testing.T, c *tls.Certificate) {
	t.Helper()
	chain, err := pki.ParseCertificates(c.Certificate)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	must(t, err)
	must(t, pki.WriteFile(p.cert, pki.EncodeCertificates(chain...), 0o644))
	must(t, pki.WriteFile(p.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
}

func issued(t *testing.T, ca *pki.Authority, hosts ...string) *tls.Certificate {
	t.Helper()
	key := pkitest.Key(t)
	leaf, err := ca.IssueController(hosts, key.Public(), time.Now(), 365*day)
	must(t, err)
	return &tls.Certificate{Certificate: pki.Raw(ca.Chain(leaf)), PrivateKey: key, Leaf: leaf}
}

// local is the address of a port of this machine, whatever name its URL has.
func local(t *testing.T, rawURL string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	must(t, err)
	return "127.0.0.1:" + u.Port()
}

// shown gives the certificate that a port shows to who asks for a name.
func shown(t *testing.T, url, name string) *x509.Certificate {
	t.Helper()
	c, err := tls.Dial("tcp", local(t, url), &tls.Config{ServerName: name, InsecureSkipVerify: true})
	must(t, err)
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0]
}

// A running controller takes a new certificate of another authority on both
// ports, without a connection lost, and keeps the one it has where the new one
// is broken. Clients that ask for another name are answered as by its own.
func TestConfiguredCertificate(t *testing.T) {
	dir := t.TempDir()
	ca := pkitest.Authority(t)
	files, roots := pair{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}, filepath.Join(dir, "roots.pem")
	must(t, pki.WriteFile(roots, pki.EncodeCertificates(ca.Certificate), 0o644))
	first, second := issued(t, ca, "dunlin.example.com"), issued(t, ca, "dunlin.example.com", "127.0.0.1")
	files.write(t, first)
	w := start(t, filepath.Join(dir, "data"), func(c *Config) { c.TLSCert, c.TLSKey, c.TLSCA = files.cert, files.key, roots })

	expect := func(when string, want map[string]*tls.Certificate) { // nil: the own authority's
		t.Helper()
		for name, c := range want {
			for _, url := range []string{w.DeviceURL, w.Broker} {
				got := shown(t, url, name)
				if c != nil && !got.Equal(c.Leaf) || c == nil && (got.Subject.CommonName != pki.ControllerName || ca.Certificate.Equal(got) || got.CheckSignatureFrom(ca.Certificate) == nil) {
					t.Errorf("%s, %s, asked for %q: got %s", when, url, name, got.Subject)
				}
			}
		}
	}
	metrics := func(want ...string) {
		t.Helper()
		_, text := w.do(http.MethodGet, "/metrics", nil, "")
		for _, line := range want {
			if !strings.Contains(string(text), "\n"+line+"\n") {
				t.Errorf("no metric %s", line)
			}
		}
	}
	expiry := func(c *tls.Certificate) string {
		return fmt.Sprintf(`dunlin_controller_certificate_expiry_seconds{name="",use="tls-cert"} %v`, float64(c.Leaf.NotAfter.Unix()))
	}
	expect("at first", map[string]*tls.Certificate{"dunlin.example.com": first, "": nil, "localhost": nil})
	metrics(expiry(first), "dunlin_controller_certificate_unreadable 0")

	// A device and a client that keep their connections.
	device := w.join("dev")
	d := w.connect(w.Broker, device)
	inbox(t, d, func(*v1.Desired) bool { return true })
	conn, err := tls.Dial("tcp", local(t, w.DeviceURL), &tls.Config{RootCAs: pki.Pool([]*x509.Certificate{ca.Certificate}), ServerName: "dunlin.example.com"})
	must(t, err)
	defer conn.Close()
	conns := make(chan net.Conn, 1)
	conns <- conn
	kept := &http.Client{Transport: &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
		select {
		case c := <-conns:
			return c, nil
		default:
			return nil, errors.New("the connection is lost")
		}
	}}}
	defer kept.CloseIdleConnections()
	session := d.Session()
	alive := func(when string) {
		t.Helper()
		resp, err := kept.Get("https://dunlin.example.com/healthz")
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %v %s", when, err, resp.Status)
		}
		if got := d.Session(); got != session {
			t.Errorf("%s: the device's session %q, was %q", when, got, session)
		}
	}
	alive("at first")

	files.write(t, second)
	expect("replaced", map[string]*tls.Certificate{"dunlin.example.com": second, "": second, "localhost": nil})
	metrics(expiry(second))
	alive("replaced")

	must(t, os.WriteFile(files.key, []byte("no key"), 0o600))
	expect("broken", map[string]*tls.Certificate{"dunlin.example.com": second, "localhost": nil})
	metrics(expiry(second), "dunlin_controller_certificate_unreadable 1")
	must(t, os.Remove(files.cert))
	expect("gone", map[string]*tls.Certificate{"dunlin.example.com": second})
	metrics("dunlin_controller_certificate_unreadable 1")
	alive("gone")
	// Other authorities of it reach the devices.
	other := pkitest.Authority(t)
	must(t, pki.WriteFile(roots, pki.EncodeCertificates(ca.Certificate, other.Certificate), 0o644))
	if got := w.join("other").Joined.Identity.GetRoots(); len(got) != 3 || !bytes.Equal(got[2], other.Certificate.Raw) {
		t.Errorf("a device that joins learns of %d authorities", len(got))
	}
	files.write(t, first)
	expect("mended", map[string]*tls.Certificate{"dunlin.example.com": first})
	metrics(expiry(first), "dunlin_controller_certificate_unreadable 0")
}
