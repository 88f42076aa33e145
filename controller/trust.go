package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
)

// What is in the data folder for those who verify the controller.
const (
	authoritiesFolder = "ca"
	// CAFile has the certificates of the controller's authorities, PEM.
	CAFile = "ca.pem"
)

// maxExtraRoots bounds the authorities beside the own ones: devices take 8 in
// all.
const maxExtraRoots = 8 - identity.MaxAuthorities

// trust is who vouches for whom: the controller's own authorities, and
// another one where a certificate of that is configured, or asked for by ACME.
type trust struct {
	*identity.Authorities
	data  string
	files *pki.Files        // nil: none is configured
	extra *pki.RootsFile    // the authority of files; nil: none is configured
	acme  *acmeCertificates // nil: no names for it
	store *store.Store

	mu      sync.Mutex // guards what follows
	crls    [][]byte
	listed  []x509.RevocationListEntry // in crls
	issuers []*x509.Certificate        // of crls
	renew   time.Time                  // when crls are made anew
}

// crlRenewal is how long a list of revoked certificates is given out.
const crlRenewal = 24 * time.Hour

// CRLs implements authorities.
func (t *trust) CRLs(ctx context.Context) ([][]byte, error) {
	revoked, err := t.store.Revoked(ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	// Round leaves the wall clock, which may have been set.
	now := time.Now().Round(0)
	same := func(a, b x509.RevocationListEntry) bool { return a.SerialNumber.Cmp(b.SerialNumber) == 0 }
	if roots := t.Roots(); now.After(t.renew) || now.Before(t.renew.Add(-crlRenewal)) || !slices.EqualFunc(revoked, t.listed, same) || !pki.Same(roots, t.issuers) {
		if t.crls, err = t.Authorities.CRLs(revoked); err != nil {
			return nil, err
		}
		t.listed, t.issuers, t.renew = revoked, roots, now.Add(crlRenewal)
	}
	return t.crls, nil
}

// DeviceTLS implements authorities. Its certificate counts for a few minutes,
// and is none that the store knows.
func (t *trust) DeviceTLS(device, serverName string) (*tls.Config, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	leaf, err := t.IssueDevice(device, key.Public(), 5*time.Minute)
	if err != nil {
		return nil, fmt.Errorf("connect as device %s: %w", device, err)
	}
	c := t.ClientTLS(serverName)
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: pki.Raw(t.Chain(leaf)), PrivateKey: key, Leaf: leaf}, nil
	}
	return c, nil
}

// forBroker gives what a broker goes by.
func (t *trust) forBroker(auth broker.Authenticator, refused func(who, object, reason, from string)) brokerTrust {
	return brokerTrust{
		authorities: t, server: t.serverTLS(), auth: auth, refused: refused,
		revoked: t.store.RevokedDevices, joinTokens: t.store.BrokerTokens,
	}
}

func openTrust(ctx context.Context, c Config, st *store.Store) (*trust, error) {
	own, err := identity.OpenAuthorities(ctx, st, filepath.Join(c.Data, authoritiesFolder), c.hosts(), time.Now)
	if err != nil {
		return nil, err
	}
	t := &trust{Authorities: own, data: c.Data, store: st}
	if c.TLSCert != "" {
		if t.files, err = pki.NewFiles(c.TLSCert, c.TLSKey); err != nil {
			return nil, fmt.Errorf("tls-cert, tls-key: %w", err)
		}
	}
	if c.TLSCA != "" {
		if t.extra, err = pki.NewRootsFile(c.TLSCA, maxExtraRoots); err != nil {
			return nil, fmt.Errorf("tls-ca: %w", err)
		}
	}
	if len(c.acmeDomains()) > 0 {
		if t.acme, err = newACME(c); err != nil {
			return nil, err
		}
	}
	return t, t.write()
}

// write keeps CAFile true.
func (t *trust) write() error {
	return pki.WriteFile(filepath.Join(t.data, CAFile), pki.EncodeCertificates(t.deviceRoots()...), 0o644)
}

// deviceRoots are those by which devices and users know the controller.
func (t *trust) deviceRoots() []*x509.Certificate {
	return append(t.Roots(), t.extraRoots()...)
}

func (t *trust) extraRoots() []*x509.Certificate {
	if t.extra == nil {
		return nil
	}
	return t.extra.Roots()
}

// trusted gives what a device should have, for the dispatcher.
func (t *trust) trusted() (version uint64, roots [][]byte) {
	version, err := t.store.TrustVersion(context.Background())
	if err != nil { // devices say hello again
		return 0, nil
	}
	for _, c := range t.deviceRoots() {
		pin := pki.PinOf(c)
		roots = append(roots, pin[:])
	}
	return version, roots
}

// foreign gives the certificate of another authority for what a client asks
// for, a name or "" for an address; nil: none counts for that, and the own
// authority's, by which devices know the controller, does.
func (t *trust) foreign(name string) *tls.Certificate {
	var c *tls.Certificate
	switch {
	case t.acme != nil:
		c = t.acme.certificate(name)
	case t.files != nil:
		c, _ = t.files.Certificate()
	}
	if c == nil || time.Now().After(c.Leaf.NotAfter) ||
		name != "" && c.Leaf.VerifyHostname(name) != nil || name == "" && len(c.Leaf.IPAddresses) == 0 {
		return nil
	}
	return c
}

// serverTLS is how the controller answers: devices may show a certificate.
func (t *trust) serverTLS() *tls.Config {
	c := pki.ServerConfig(t.ServerCertificate, t.Roots, tls.VerifyClientCertIfGiven)
	own := c.GetConfigForClient
	c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := own(h)
		if foreign := t.foreign(h.ServerName); err == nil && foreign != nil {
			c.Certificates = []tls.Certificate{*foreign}
		}
		return c, err
	}
	return c
}

// listenerTLS is that for --listen, where an ACME server asks too.
func (t *trust) listenerTLS() *tls.Config {
	if t.acme == nil {
		return t.serverTLS()
	}
	return t.acme.answering(t.serverTLS())
}

// publicAddress is an address that others reach the listener at.
func publicAddress(host string, a net.Addr) string {
	return net.JoinHostPort(host, strconv.Itoa(a.(*net.TCPAddr).Port))
}

// changed tells those who do not ask, before a change of who may connect is
// answered.
func (t *trust) changed(ctx context.Context, b *bus) error {
	err := t.write()
	if b.changed != nil {
		err = errors.Join(err, b.changed(ctx))
	}
	return err
}
