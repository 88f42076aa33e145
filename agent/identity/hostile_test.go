package identity

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/identity/identitytest"
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
