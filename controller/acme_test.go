package controller

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/acme"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// pebble is Let's Encrypt's own ACME server for tests.
const pebble = "github.com/letsencrypt/pebble/v2/cmd/"

const (
	pebbleVersion = "@v2.10.3"
	acmeName      = "dunlin.example.com"
	acmePatience  = time.Minute
)

// acmeServer is a running ACME server that takes every name for this machine.
type acmeServer struct {
	directory string
	ca        string // file of the root by which it is known
	roots     *x509.CertPool
	stop      func()
}

// freeAddress gives a port that nothing listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, l.Close())
	return l.Addr().String()
}

func portOf(t *testing.T, address string) int {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", address)
	must(t, err)
	return a.Port
}

// eventually waits for what other programs or goroutines do.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(acmePatience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %s: %s", acmePatience, what)
		}
	}
}

// startACME starts an ACME server that asks at an address.
func startACME(t *testing.T, asks string) *acmeServer {
	t.Helper()
	dir := t.TempDir()
	install := exec.CommandContext(t.Context(), "go", "install", pebble+"pebble"+pebbleVersion, pebble+"pebble-challtestsrv"+pebbleVersion)
	install.Env = append(os.Environ(), "GOBIN="+dir, "GOOS=", "GOARCH=")
	if out, err := install.CombinedOutput(); err != nil {
		if regexp.MustCompile(`dial tcp|no such host|i/o timeout|proxyconnect|module lookup disabled`).Match(out) {
			t.Skipf("no ACME server to test with, because the proxy of Go modules cannot be reached: %s", out)
		}
		t.Fatalf("%v\n%s", err, out)
	}
	ca := pkitest.Authority(t)
	own := pair{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	own.write(t, pkitest.Server(t, ca))
	s := &acmeServer{ca: filepath.Join(dir, "ca.pem"), roots: x509.NewCertPool()}
	must(t, pki.WriteFile(s.ca, pki.EncodeCertificates(ca.Certificate), 0o644))

	address, management, dns := freeAddress(t), freeAddress(t), freeAddress(t)
	config, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": address, "managementListenAddress": management, "certificate": own.cert, "privateKey": own.key,
		"tlsPort": portOf(t, asks), "httpPort": portOf(t, asks), "retryAfter": map[string]int{"authz": 1, "order": 1},
		"keyAlgorithm": "ecdsa", "profiles": map[string]any{"default": map[string]any{"description": "90 days", "validityPeriod": 90 * 24 * 3600}},
	}})
	must(t, err)
	file := filepath.Join(dir, "pebble.json")
	must(t, os.WriteFile(file, config, 0o600))
	var stops []func()
	run := func(name string, args ...string) {
		c := exec.CommandContext(t.Context(), filepath.Join(dir, name), args...)
		c.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1", "PEBBLE_WFE_NONCEREJECT=0", "PEBBLE_AUTHZREUSE=0")
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		must(t, c.Start())
		stops = append(stops, func() {
			_ = c.Process.Kill()
			_ = c.Wait()
			if t.Failed() {
				t.Logf("%s:\n%s", name, out.String())
			}
		})
	}
	stopped := false
	s.stop = func() {
		if !stopped {
			for _, f := range stops {
				f()
			}
		}
		stopped = true
	}
	t.Cleanup(s.stop)
	run("pebble-challtestsrv", "-dnsserver", dns, "-management", freeAddress(t), "-defaultIPv6", "", "-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", "")
	run("pebble", "-config", file, "-dnsserver", dns)

	s.directory = "https://" + address + "/dir"
	known := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pki.Pool([]*x509.Certificate{ca.Certificate})}}}
	get := func(url string) []byte {
		resp, err := known.Get(url)
		if err != nil {
			return nil
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return b
	}
	eventually(t, "the ACME server answers", func() bool {
		return get(s.directory) != nil && s.roots.AppendCertsFromPEM(get("https://"+management+"/roots/0"))
	})
	eventually(t, "the name server answers", func() bool {
		c, err := net.Dial("tcp", dns)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return s
}

// Certificates by ACME: issued, served under their name and no other, kept
// over a restart, renewed before their end.
func TestACME(t *testing.T) {
	listen := freeAddress(t)
	server := startACME(t, listen)
	data := t.TempDir()
	configure := func(c *Config) {
		c.Listen, c.ACMEDomains, c.ACMEDirectory, c.ACMECA, c.ACMEEmail = listen, acmeName, server.directory, server.ca, "ops@example.com"
		c.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	isPublic := func() bool { // to who knows the public authority only
		c, err := tls.Dial("tcp", listen, &tls.Config{ServerName: acmeName, RootCAs: server.roots})
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	isOwn := func(c *x509.Certificate) bool { return c.Subject.CommonName == pki.ControllerName }

	w := start(t, data, configure)
	eventually(t, "a certificate is issued", isPublic)
	first := shown(t, w.DeviceURL, strings.ToUpper(acmeName))
	if got := shown(t, w.Broker, acmeName); !got.Equal(first) {
		t.Errorf("the broker shows %s", got.Subject)
	}
	for _, url := range []string{w.DeviceURL, w.Broker} {
		for _, name := range []string{"", "localhost", "other.example.com"} {
			if got := shown(t, url, name); !isOwn(got) {
				t.Errorf("%s, asked for %q, shows %s", url, name, got.Subject)
			}
		}
	}
	// Devices that know the own authority connect as before.
	inbox(t, w.connect("mqtts://"+local(t, w.Broker), w.join("dev")), func(*v1.Desired) bool { return true })
	_, text := w.do(http.MethodGet, "/metrics", nil, "")
	if !strings.Contains(string(text), `dunlin_controller_certificate_expiry_seconds{name="`+acmeName+`",use="acme"} 1.`) {
		t.Error("no metric of the certificate's end")
	}
	// An ACME server may ask on one port only, and where there is nothing to
	// ask, gets no answer.
	for url, want := range map[string]string{w.DeviceURL: "internal error", w.Broker: "no application protocol"} {
		c, err := tls.Dial("tcp", local(t, url), &tls.Config{ServerName: acmeName, InsecureSkipVerify: true, NextProtos: []string{acme.ALPNProto}})
		if err == nil {
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s, asked by %s: %v, want %s", url, acme.ALPNProto, err, want)
		}
	}
	must(t, w.stop())
	info, err := os.Stat(filepath.Join(data, acmeFolder))
	must(t, err)
	kept, err := os.Stat(filepath.Join(data, acmeFolder, acmeName))
	must(t, err)
	if info.Mode().Perm() != 0o700 || kept.Mode().Perm() != 0o600 {
		t.Errorf("modes %s, %s", info.Mode(), kept.Mode())
	}

	// One that is kept, and near its end, is renewed.
	key := pkitest.Key(t)
	old, err := pkitest.Authority(t).IssueController([]string{acmeName}, key.Public(), time.Now().Add(-time.Hour), time.Hour+10*time.Minute)
	must(t, err)
	der, err := x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
	must(t, err)
	content := append(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), pki.EncodeCertificates(old)...)
	must(t, os.WriteFile(filepath.Join(data, acmeFolder, acmeName), content, 0o600))
	w = start(t, data, configure)
	eventually(t, "the certificate is renewed", isPublic)
	second := shown(t, w.Broker, acmeName)
	if second.Equal(first) {
		t.Error("the first certificate again")
	}
	must(t, w.stop())

	// And used without the server.
	server.stop()
	w = start(t, data, configure)
	eventually(t, "the certificate is there", func() bool { return shown(t, w.DeviceURL, acmeName).Equal(second) })
}

// While there is no certificate, clients are answered, as by the own authority.
func TestACMEServerAway(t *testing.T) {
	var log bytes.Buffer
	w := start(t, t.TempDir(), func(c *Config) {
		c.ACMEDomains, c.ACMEDirectory = acmeName, "https://"+freeAddress(t)+"/dir"
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	for _, url := range []string{w.DeviceURL, w.Broker} {
		got := shown(t, url, acmeName)
		if err := got.VerifyHostname(acmeName); err != nil || got.Subject.CommonName != pki.ControllerName {
			t.Errorf("%s shows %s: %v", url, got.Subject, err)
		}
	}
	_, text := w.do(http.MethodGet, "/metrics", nil, "")
	if !strings.Contains(string(text), `dunlin_controller_certificate_expiry_seconds{name="`+acmeName+`",use="acme"} 0`) {
		t.Error("no metric of the missing certificate")
	}
	must(t, w.stop())
	if got := log.String(); !strings.Contains(got, "issues no certificate") || !strings.Contains(got, acmeName) {
		t.Errorf("the log: %s", got)
	}
}

func TestACMEFaults(t *testing.T) {
	for _, tt := range []struct {
		change func(*Config)
		want   string // "": none
	}{
		{func(c *Config) { c.ACMEDomains = " A.example.com, b.example.com" }, ""},
		{func(c *Config) { c.ACMEDomains, c.ACMEEmail = acmeName, "ops@example.com" }, ""},
		{func(c *Config) { c.ACMEEmail = "ops@example.com" }, "need acme-domains"},
		{func(c *Config) { c.ACMEDirectory = "https://10.0.0.1/dir" }, "need acme-domains"},
		{func(c *Config) { c.ACMEDomains, c.TLSCert, c.TLSKey = acmeName, "c", "k" }, "one excludes the other"},
		{func(c *Config) { c.ACMEDomains = "localhost" }, `acme-domains: "localhost"`},
		{func(c *Config) { c.ACMEDomains = "10.0.0.1" }, `acme-domains: "10.0.0.1"`},
		{func(c *Config) { c.ACMEDomains = "*.example.com" }, `acme-domains: "*.example.com"`},
		{func(c *Config) { c.ACMEDomains = strings.Repeat("a.example.com,", 17) }, "has 17 names, the limit is 16"},
		{func(c *Config) { c.ACMEDomains, c.ACMEDirectory = acmeName, "http://10.0.0.1/dir" }, "acme-directory"},
		{func(c *Config) { c.ACMEDomains, c.ACMEEmail = acmeName, "Ops <ops@example.com>" }, "acme-email"},
	} {
		c := DefaultConfig()
		tt.change(&c)
		err := errors.Join(c.checkACME()...)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
	}
	c := DefaultConfig()
	c.Hosts, c.ACMEDomains = "edge.example.com", "Dunlin.example.com"
	if got := c.hosts(); got[0] != "edge.example.com" || got[1] != acmeName {
		t.Errorf("hosts %q", got)
	}
}
