package controller

import (
	"context"
	"crypto/tls"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/mail"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
)

// acmeFolder is that in the data folder of the ACME account and of what it
// was issued.
const acmeFolder = "acme"

// maxACMEDomains bounds the names, each of which has a certificate of its own:
// public authorities issue so many in a week.
const maxACMEDomains = 16

// After a refusal the next attempt waits between half and all of a time that
// doubles from the first to the last. autocert remembers a refusal for a
// minute, and Let's Encrypt takes five in an hour.
const (
	firstACMEWait = 4 * time.Minute
	lastACMEWait  = 4 * time.Hour
	acmeTimeout   = 30 * time.Second
)

// acmeDomains are the names for which certificates are asked for.
func (c *Config) acmeDomains() []string { return listed(strings.ToLower(c.ACMEDomains)) }

func (c *Config) checkACME() (faults []error) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	domains := c.acmeDomains()
	if len(domains) == 0 {
		if c.ACMEEmail != "" || c.ACMECA != "" || c.ACMEDirectory != acme.LetsEncryptURL {
			fault("acme-directory, acme-email and acme-ca need acme-domains")
		}
		return faults
	}
	if c.TLSCert != "" {
		fault("acme-domains and tls-cert: one excludes the other")
	}
	if len(domains) > maxACMEDomains {
		fault("acme-domains has %d names, the limit is %d", len(domains), maxACMEDomains)
	}
	for _, d := range domains {
		if !hostPattern.MatchString(d) || net.ParseIP(d) != nil || !strings.Contains(d, ".") {
			fault("acme-domains: %q is not a name that the public can know", d)
		}
	}
	if err := program.CheckURL(c.ACMEDirectory, "https"); err != nil {
		fault("acme-directory %w", err)
	}
	if c.ACMEEmail != "" {
		if a, err := mail.ParseAddress(c.ACMEEmail); err != nil || a.Address != c.ACMEEmail {
			fault("acme-email %q is not an address name@host", c.ACMEEmail)
		}
	}
	return faults
}

// acmeCertificates are those that an ACME server issues. Handshakes never wait
// for it: they get what is there.
type acmeCertificates struct {
	manager *autocert.Manager
	domains []string
	ca      *untilClosed

	mu    sync.Mutex      // guards what follows
	there map[string]bool // the domains that have a certificate
}

func newACME(c Config) (*acmeCertificates, error) {
	dir := filepath.Join(c.Data, acmeFolder)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("folder of ACME: %w", err)
	}
	secure := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.ACMECA != "" {
		roots, err := pki.ReadCertificates(c.ACMECA)
		if err != nil {
			return nil, fmt.Errorf("acme-ca: %w", err)
		}
		secure.RootCAs = pki.Pool(roots)
	}
	a := &acmeCertificates{domains: c.acmeDomains(), there: map[string]bool{}}
	a.ca = &untilClosed{
		transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: secure, ForceAttemptHTTP2: true, IdleConnTimeout: acmeTimeout},
		closed:    make(chan struct{}),
	}
	a.manager = &autocert.Manager{
		Prompt: autocert.AcceptTOS, Cache: autocert.DirCache(dir), HostPolicy: autocert.HostWhitelist(a.domains...), Email: c.ACMEEmail,
		Client: &acme.Client{
			DirectoryURL: c.ACMEDirectory, UserAgent: "dunlin-controller/" + program.Version(),
			HTTPClient: &http.Client{Transport: a.ca, Timeout: acmeTimeout},
		},
	}
	return a, nil
}

// untilClosed sends requests until it is closed: autocert renews by timers
// that nothing stops, and which then come to nothing.
type untilClosed struct {
	transport *http.Transport
	closed    chan struct{}
}

func (u *untilClosed) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case <-u.closed:
		return nil, fs.ErrClosed
	default:
		return u.transport.RoundTrip(r)
	}
}

// run gets the certificates that are missing; autocert renews those that are
// there. It is to be run once.
func (a *acmeCertificates) run(ctx context.Context, log *slog.Logger) error {
	defer a.ca.transport.CloseIdleConnections()
	defer close(a.ca.closed)
	bound := firstACMEWait
	for {
		missing := 0
		for _, d := range a.domains {
			if a.certificate(d) != nil {
				continue
			}
			err := a.obtain(ctx, d)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				missing++
				log.Warn("the ACME server issues no certificate; is this controller reached at port 443 of that name?", "name", d, "error", err)
			}
		}
		if missing == 0 {
			<-ctx.Done()
			return nil
		}
		wait := bound/2 + mathrand.N(bound/2)
		log.Info("asking the ACME server again", "in", wait.Round(time.Second))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		bound = min(2*bound, lastACMEWait)
	}
}

// obtain gets a domain's certificate, from the folder or from the server.
func (a *acmeCertificates) obtain(ctx context.Context, domain string) error {
	done := make(chan error, 1)
	go func() { // autocert gives it 5 minutes, and less once ca is closed
		_, err := a.manager.GetCertificate(hello(domain))
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil {
			a.mu.Lock()
			a.there[domain] = true
			a.mu.Unlock()
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hello is a client that takes ECDSA. Those of TLS 1.3, which all do, would be
// taken for ones that want RSA, with a certificate of their own.
func hello(domain string) *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{ServerName: domain, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}}
}

// certificate gives a name's newest certificate; nil: it has none.
func (a *acmeCertificates) certificate(name string) *tls.Certificate {
	name = strings.ToLower(name)
	a.mu.Lock()
	there := a.there[name]
	a.mu.Unlock()
	if !there {
		return nil
	}
	c, err := a.manager.GetCertificate(hello(name))
	if err != nil {
		return nil
	}
	return c
}

// answering has a listener answer the ACME server's question whether a name
// leads to it (TLS-ALPN-01), and everything else as before.
func (a *acmeCertificates) answering(c *tls.Config) *tls.Config {
	question := &tls.Config{
		MinVersion: tls.VersionTLS12, // RFC 8737 lets servers speak no more
		NextProtos: []string{acme.ALPNProto}, GetCertificate: a.manager.GetCertificate, SessionTicketsDisabled: true,
	}
	ordinary := c.GetConfigForClient
	c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Equal(h.SupportedProtos, question.NextProtos) {
			return question, nil
		}
		return ordinary(h)
	}
	return c
}
