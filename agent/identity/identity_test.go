package identity

import (
	"crypto"
	"crypto/x509"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/agent/identity/identitytest"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func serve(t *testing.T) *identitytest.Controller {
	t.Helper()
	c := identitytest.New(t, time.Now)
	c.Serve(http.NewServeMux())
	return c
}

func newConfig(t *testing.T, c *identitytest.Controller) Config {
	t.Helper()
	dir := t.TempDir()
	store, err := state.Open(t.Context(), filepath.Join(dir, "state.db"), state.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return Config{
		Dir: dir, State: store, Name: "edge-1", Controller: c.Registry, JoinToken: c.Token, Now: c.Now,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
}

func open(t *testing.T, cfg Config) *Device {
	t.Helper()
	d, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

func join(t *testing.T, cfg Config) *Device {
	t.Helper()
	d := open(t, cfg)
	if err := d.Join(t.Context(), &dunlinv1.DeviceInfo{}); err != nil {
		t.Fatal(err)
	}
	return d
}

// A join whose answer is lost is the same join when it is repeated, and what
// came of it is there after a start.
func TestJoin(t *testing.T) {
	c := serve(t)
	c.Cut(2)
	cfg := newConfig(t, c)
	d := join(t, cfg)
	if c.Calls("Join") != 3 {
		t.Errorf("%d joins", c.Calls("Join"))
	}
	info, err := os.Stat(filepath.Join(cfg.Dir, keyFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key: %v %v", info, err)
	}
	cfg.JoinToken = "" // once joined, nothing more is needed
	again := join(t, cfg)
	if !again.Joined() || c.Calls("Join") != 3 || again.Certificate().SerialNumber.Cmp(d.Certificate().SerialNumber) != 0 {
		t.Errorf("after a start: %v, %d joins", again.Stored(), c.Calls("Join"))
	}
	var h dunlinv1.Hello
	again.Introduce(&h)
	if root := pki.PinOf(c.Authority().Certificate); len(h.RootIds) != 1 || [32]byte(h.RootIds[0]) != root || len(h.CertificateSerial) != 16 {
		t.Errorf("hello %v", &h)
	}
	url, client := again.Registry()
	resp, err := client.Get(url + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.TLS.Version != 0x0304 {
		t.Errorf("TLS %x", resp.TLS.Version)
	}
	if err := os.Remove(filepath.Join(cfg.Dir, keyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not the key") {
		t.Errorf("without the key: %v", err)
	}
}

func TestJoinIsRefused(t *testing.T) {
	c := serve(t)
	other := identitytest.New(t, time.Now)
	for name, test := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no token":    {func(cfg *Config) { cfg.JoinToken = "" }, "no join token"},
		"wrong token": {func(cfg *Config) { cfg.JoinToken = "x" + cfg.JoinToken }, "not known"},
		"other name":  {func(cfg *Config) { join(t, *cfg); cfg.Dir = t.TempDir(); cfg.State = newConfig(t, c).State }, "has this name"},
	} {
		cfg := newConfig(t, c)
		test.change(&cfg)
		if err := open(t, cfg).Join(t.Context(), &dunlinv1.DeviceInfo{}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	// Nobody is told the token who is not the one that it names.
	calls := c.Calls("Join")
	cfg := newConfig(t, c)
	cfg.JoinToken = other.Token
	d := open(t, cfg)
	d.stored.ControllerURL = cfg.Controller
	_, err := d.service(d.Stranger).join(t.Context(), new(dunlinv1.JoinRequest))
	if c.Calls("Join") != calls || err == nil || !strings.Contains(messageOf(err), "the join token names") || strings.Contains(messageOf(err), "unavailable") {
		t.Errorf("%v after %d calls", err, c.Calls("Join")-calls)
	}
	// One that an authority vouches for which the device is told of is taken.
	cfg.JoinToken, cfg.Roots = c.Token[:strings.Index(c.Token, ".")], []*x509.Certificate{c.Authority().Certificate}
	if err := open(t, cfg).Join(t.Context(), &dunlinv1.DeviceInfo{}); err == nil || c.Calls("Join") != calls+1 {
		t.Errorf("by --ca: %v after %d calls", err, c.Calls("Join")-calls)
	}
}

func TestCheck(t *testing.T) {
	now := time.Now()
	key := func() crypto.Signer {
		k, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	mine := key()
	a, other := identitytest.New(t, time.Now).Authority(), identitytest.New(t, time.Now).Authority()
	issue := func(device string, k crypto.Signer) *x509.Certificate {
		c, err := a.IssueDevice(device, k.Public(), now, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server, err := a.IssueController([]string{"edge-1"}, mine.Public(), now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	good := issue("edge-1", mine)
	roots := []*x509.Certificate{a.Certificate}
	for name, test := range map[string]struct {
		chain, roots     []*x509.Certificate
		broker, registry string
		want             string // "": it is taken
	}{
		"good":          {a.Chain(good), roots, "mqtts://b:1", "https://r", ""},
		"other key":     {a.Chain(issue("edge-1", key())), roots, "mqtts://b:1", "https://r", "another key"},
		"other device":  {a.Chain(issue("edge-2", mine)), roots, "mqtts://b:1", "https://r", `for "edge-2"`},
		"a controller":  {a.Chain(server), roots, "mqtts://b:1", "https://r", "dunlin.controller"},
		"other root":    {a.Chain(good), []*x509.Certificate{other.Certificate}, "mqtts://b:1", "https://r", "not one of its roots'"},
		"no root":       {a.Chain(good), nil, "mqtts://b:1", "https://r", "at least one"},
		"nothing":       {nil, roots, "mqtts://b:1", "https://r", "at least one"},
		"plain MQTT":    {a.Chain(good), roots, "tcp://127.0.0.1:1", "https://r", "mqtts://"},
		"plain HTTP":    {a.Chain(good), roots, "mqtts://b:1", "http://127.0.0.1", "https://"},
		"itself a root": {a.Chain(good), []*x509.Certificate{good}, "mqtts://b:1", "https://r", "not an authority"},
	} {
		_, err := check("edge-1", mine.Public(), now, &dunlinv1.Identity{Certificates: pki.Raw(test.chain), Roots: pki.Raw(test.roots)}, test.broker, test.registry)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	// A clock that is wrong does not make the answer wrong.
	for _, at := range []time.Time{time.Unix(0, 0), now.Add(100 * 365 * 24 * time.Hour)} {
		if _, err := check("edge-1", mine.Public(), at, &dunlinv1.Identity{Certificates: pki.Raw(a.Chain(good)), Roots: pki.Raw(roots)}, "mqtts://b:1", "https://r"); err != nil {
			t.Errorf("at %s: %v", at, err)
		}
	}
}
