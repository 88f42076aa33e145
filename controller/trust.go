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
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// What is in the data folder for those who verify the controller.
const (
	authoritiesFolder = "ca"
	// CAFile has the certificates of the controller's authorities, PEM.
	CAFile = "ca.pem"
)

// trust is who vouches for whom: the controller's own authorities, and
// another one where a certificate of its own is configured.
type trust struct {
	*identity.Authorities
	data  string
	files *pki.Files          // nil: the certificate is of the controller's own authority
	extra []*x509.Certificate // the authority of files
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
	same := func(a, b x509.RevocationListEntry) bool { return a.SerialNumber.Cmp(b.SerialNumber) == 0 }
	if roots := t.Roots(); time.Now().After(t.renew) || !slices.EqualFunc(revoked, t.listed, same) || !pki.Same(roots, t.issuers) {
		if t.crls, err = t.Authorities.CRLs(revoked); err != nil {
			return nil, err
		}
		t.listed, t.issuers, t.renew = revoked, roots, time.Now().Add(crlRenewal)
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
		if t.extra, err = pki.ReadCertificates(c.TLSCA); err != nil {
			return nil, fmt.Errorf("tls-ca: %w", err)
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
	return append(t.Roots(), t.extra...)
}

// trusted gives what a device should have, for the dispatcher.
func (t *trust) trusted() (version uint64, roots [][]byte) {
	for _, c := range t.deviceRoots() {
		pin := pki.PinOf(c)
		roots = append(roots, pin[:])
	}
	return version, roots
}

// documents gives the signed trust documents from a version on.
func (t *trust) documents(context.Context, uint64) ([]*v1.SignedTrust, error) { return nil, nil }

// certificate is that by which the controller answers.
func (t *trust) certificate() (*tls.Certificate, error) {
	if t.files != nil {
		return t.files.Certificate()
	}
	return t.ServerCertificate()
}

// serverTLS is how the controller answers: devices may show a certificate.
func (t *trust) serverTLS() *tls.Config {
	return pki.ServerConfig(t.certificate, t.Roots, tls.VerifyClientCertIfGiven)
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
