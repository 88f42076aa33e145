package identity

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/identity/identitytest"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// A device asks nobody whom a controller or registry sends it to: neither its
// join token nor what it fetches goes over a connection without TLS.
func TestRedirectIsNotFollowed(t *testing.T) {
	var asked atomic.Int32
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { asked.Add(1) }))
	t.Cleanup(plain.Close)
	c := identitytest.New(t, time.Now)
	mux := http.NewServeMux()
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL, http.StatusTemporaryRedirect)
	})
	c.Serve(mux)
	d := join(t, newConfig(t, c))
	url, client := d.Registry()
	resp, err := client.Get(url + "/away")
	if err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusTemporaryRedirect {
			t.Errorf("answer %s", resp.Status)
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("the other server was asked %d times without TLS", n)
	}

	// The same of a join.
	c = identitytest.New(t, time.Now)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	s.TLS = c.TLS()
	s.StartTLS()
	t.Cleanup(s.Close)
	c.Registry = s.URL
	d = open(t, newConfig(t, c))
	d.stored.ControllerURL = s.URL
	if _, err := d.service(d.Stranger).join(t.Context(), &dunlinv1.JoinRequest{JoinToken: c.Token}); err == nil {
		t.Error("joined by a redirect")
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("the join token went to the other server %d times", n)
	}
}

// A next key that cannot be read, or used, does not keep the device from
// renewing: it is nobody's yet.
func TestNextKeyIsBroken(t *testing.T) {
	c := serve(t)
	for name, content := range map[string]string{
		"empty": "", "half": "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49", "of a TPM": tpmBlock + "\nAAAA\n-----END TSS2 PRIVATE KEY-----\n",
	} {
		cfg := newConfig(t, c)
		cfg.Name = "edge-" + strings.ReplaceAll(name, " ", "-")
		d := join(t, cfg)
		if err := os.WriteFile(filepath.Join(cfg.Dir, nextKeyFile), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		before := pki.CertificateID(d.Certificate())
		if err := d.renew(t.Context()); err != nil || pki.CertificateID(d.Certificate()) == before {
			t.Errorf("%s: renewed: %v", name, err)
		}
		if again := open(t, cfg); !again.Certificate().Equal(d.Certificate()) {
			t.Errorf("%s: another certificate after a start", name)
		}
	}
}

// However often the controller, or a broker in its name, asks for it, a device
// renews once a minute at most, and once an hour where it refused the trust
// document: it would be asked again with each connection.
func TestRenewStorm(t *testing.T) {
	for name, test := range map[string]struct {
		trust error
		every time.Duration
	}{
		"trust taken":   {nil, askedEvery},
		"trust refused": {errors.New("it is of another root"), refusedEvery},
	} {
		w := &watch{at: time.Now()}
		c := serveAt(t, w)
		cfg := newConfig(t, c)
		d := join(t, cfg)
		d.cfg.TakeTrust = func(context.Context, []*dunlinv1.SignedTrust) error { return test.trust }
		storm := func() (renewed int) {
			for range 10 {
				d.RenewWithin(0)
				if d.plan.due(w.now()).After(w.now()) {
					continue
				}
				if err := d.renew(t.Context()); err != nil {
					t.Fatal(err)
				}
				renewed++
			}
			return renewed
		}
		if n := storm(); n != 1 {
			t.Errorf("%s: renewed %d times at once", name, n)
		}
		w.add(test.every - time.Second)
		if n := storm(); n != 0 {
			t.Errorf("%s: renewed %d times within %s", name, n, test.every)
		}
		w.add(time.Second)
		if n := storm(); n != 1 {
			t.Errorf("%s: renewed %d times after %s", name, n, test.every)
		}
	}
}

// A device of the time of secrets has a registry, but nobody who asks it: until
// it has joined it has none.
func TestNoRegistryBeforeJoin(t *testing.T) {
	cfg := newConfig(t, serve(t))
	if err := cfg.State.SetIdentity(t.Context(), state.Identity{Device: "edge-1", ControllerURL: "http://c", BrokerURL: "tcp://b:1", RegistryURL: "http://r"}); err != nil {
		t.Fatal(err)
	}
	d := open(t, cfg)
	if url, client := d.Registry(); url != "" || client != nil {
		t.Errorf("registry %q, client %v", url, client)
	}
	if err := d.Join(t.Context(), &dunlinv1.DeviceInfo{}); err != nil {
		t.Fatal(err)
	}
	if url, client := d.Registry(); url != cfg.Controller || client == nil {
		t.Errorf("after a join: registry %q, client %v", url, client)
	}
}
