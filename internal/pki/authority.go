package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"
)

// The names in certificates. A device's certificate has its name as common
// name, which brokers take for the user name, and "dunlin:device:NAME" as URI;
// the controller's have ControllerName and "dunlin:controller".
const (
	ControllerName = "dunlin.controller"
	uriScheme      = "dunlin"
	devicePrefix   = "device:"
	controllerURI  = "controller"
	brokerURI      = "broker"
	brokerName     = "dunlin.broker"
)

// skew is how far back certificates begin, for clocks that are slow.
const skew = time.Hour

// Authority is a certificate authority that can issue. It is safe for
// concurrent use.
type Authority struct {
	Certificate *x509.Certificate
	// Cross are certificates of the same key by which older authorities vouch
	// for this one.
	Cross []*x509.Certificate
	key   crypto.Signer
}

// NewAuthority makes an authority that signs itself.
func NewAuthority(key crypto.Signer, now time.Time, lifetime time.Duration) (*Authority, error) {
	id, err := ID(key.Public())
	if err != nil {
		return nil, err
	}
	template := authorityTemplate(id, now, now.Add(lifetime))
	cert, err := issue(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make authority: %w", err)
	}
	return &Authority{Certificate: cert, key: key}, nil
}

// authorityTemplate has a subject of its own for each key, so that chains of
// several authorities are built without guessing.
func authorityTemplate(id string, now, end time.Time) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Dunlin CA " + id[:16]},
		NotBefore: now.Add(-skew), NotAfter: end,
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1, // another one, cross-signed
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
}

// LoadAuthority puts an authority together from its certificate and key.
func LoadAuthority(cert *x509.Certificate, cross []*x509.Certificate, key crypto.Signer) (*Authority, error) {
	id, err := ID(key.Public())
	if err != nil {
		return nil, err
	}
	if !cert.IsCA || id != CertificateID(cert) {
		return nil, errors.New("the certificate is not an authority's, or the key is not its key")
	}
	return &Authority{Certificate: cert, Cross: cross, key: key}, nil
}

// ID is the name of the authority's key.
func (a *Authority) ID() string { return CertificateID(a.Certificate) }

// Vouch makes a certificate by which those who trust a trust its successor.
func (a *Authority) Vouch(successor *x509.Certificate, now time.Time) (*x509.Certificate, error) {
	end := a.Certificate.NotAfter
	if successor.NotAfter.Before(end) {
		end = successor.NotAfter
	}
	template := authorityTemplate(CertificateID(successor), now, end)
	template.MaxPathLen, template.MaxPathLenZero = 0, true
	return issue(template, a.Certificate, successor.PublicKey, a.key)
}

// Chain gives a leaf of a's with what is needed to verify it from any root:
// the leaf, the cross certificates, and a's own.
func (a *Authority) Chain(leaf *x509.Certificate) []*x509.Certificate {
	return append(append([]*x509.Certificate{leaf}, a.Cross...), a.Certificate)
}

// IssueDevice makes a device's certificate.
func (a *Authority) IssueDevice(device string, public crypto.PublicKey, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	if err := CheckPublicKey(public); err != nil {
		return nil, err
	}
	return issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: device}, URIs: []*url.URL{{Scheme: uriScheme, Opaque: devicePrefix + device}},
		NotBefore: now.Add(-skew), NotAfter: earlier(now.Add(lifetime), a.Certificate.NotAfter),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.Certificate, public, a.key)
}

// IssueController makes a certificate with which the controller answers under
// hosts, which are names and addresses, and with which it calls a broker.
func (a *Authority) IssueController(hosts []string, public crypto.PublicKey, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	template := serverTemplate(hosts, now, earlier(now.Add(lifetime), a.Certificate.NotAfter))
	template.Subject, template.URIs = pkix.Name{CommonName: ControllerName}, []*url.URL{{Scheme: uriScheme, Opaque: controllerURI}}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	return issue(template, a.Certificate, public, a.key)
}

// Sign signs a message with the authority's key.
func (a *Authority) Sign(message []byte) ([]byte, error) { return Sign(a.key, message) }

// Revoke makes a list of revoked certificates (a CRL, DER).
func (a *Authority) Revoke(entries []x509.RevocationListEntry, number int64, now time.Time, lifetime time.Duration) ([]byte, error) {
	return x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(number), ThisUpdate: now.Add(-skew), NextUpdate: now.Add(lifetime), RevokedCertificateEntries: entries,
	}, a.Certificate, a.key)
}

// IssueBroker makes a certificate with which a broker beside the controller
// answers under hosts. It is good for nothing else.
func (a *Authority) IssueBroker(hosts []string, public crypto.PublicKey, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	template := serverTemplate(hosts, now, earlier(now.Add(lifetime), a.Certificate.NotAfter))
	template.Subject, template.URIs = pkix.Name{CommonName: brokerName}, []*url.URL{{Scheme: uriScheme, Opaque: brokerURI}}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	return issue(template, a.Certificate, public, a.key)
}

func serverTemplate(hosts []string, now, end time.Time) *x509.Certificate {
	template := &x509.Certificate{NotBefore: now.Add(-skew), NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	return template
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func issue(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	var serial [16]byte
	rand.Read(serial[:]) // never fails
	serial[0] &= 0x7f    // positive, in 16 bytes
	template.SerialNumber = new(big.Int).SetBytes(serial[:])
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Issued gives the moment at which a certificate of an authority was made.
func Issued(c *x509.Certificate) time.Time { return c.NotBefore.Add(skew) }

// DeviceOf gives the device whose certificate it is; false for every other.
func DeviceOf(c *x509.Certificate) (string, bool) {
	name, ok := strings.CutPrefix(identityOf(c), devicePrefix)
	return name, ok && name == c.Subject.CommonName
}

// IsController says whether a certificate is one of the controller's.
func IsController(c *x509.Certificate) bool { return identityOf(c) == controllerURI }

func identityOf(c *x509.Certificate) string {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != uriScheme {
		return ""
	}
	return c.URIs[0].Opaque
}

// maxRequest bounds a certificate request.
const maxRequest = 8 << 10

// Request makes a certificate request (PKCS #10, DER) for a key.
func Request(key crypto.Signer, device string) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: device}}, key)
}

// ParseRequest gives the key that a certificate request is for, whose owner
// has signed it.
func ParseRequest(csr []byte) (crypto.PublicKey, error) {
	if len(csr) > maxRequest {
		return nil, fmt.Errorf("csr has %d bytes, the limit is %d", len(csr), maxRequest)
	}
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("csr is not a certificate request in DER: %w", err)
	}
	if err := CheckPublicKey(r.PublicKey); err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr is not signed by its key: %w", err)
	}
	return r.PublicKey, nil
}

// VerifyChain says whether the first of certs is vouched for, at a time, by
// one of roots through the others.
func VerifyChain(certs, roots []*x509.Certificate, at time.Time, usage x509.ExtKeyUsage) error {
	if len(certs) == 0 {
		return errors.New("no certificate")
	}
	o := x509.VerifyOptions{Roots: Pool(roots), Intermediates: Pool(certs[1:]), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage}}
	_, err := certs[0].Verify(o)
	return err
}

// Pool is a set of certificates as crypto/x509 wants it.
func Pool(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool
}

// Within gives at, or the nearest moment at which all of certs count.
func Within(at time.Time, certs []*x509.Certificate) time.Time {
	for _, c := range certs {
		if at.Before(c.NotBefore) {
			at = c.NotBefore
		}
	}
	for _, c := range certs {
		if at.After(c.NotAfter) {
			at = c.NotAfter
		}
	}
	return at
}

// Same says whether two lists hold the same certificates in the same order.
func Same(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, func(x, y *x509.Certificate) bool { return bytes.Equal(x.Raw, y.Raw) })
}
