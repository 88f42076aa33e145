// Package pkitest makes authorities and certificates for tests.
package pkitest

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// lifetime is that of what is made here.
const lifetime = 365 * 24 * time.Hour

// Key makes a key.
func Key(tb testing.TB) crypto.Signer {
	tb.Helper()
	key, err := pki.NewKey()
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// Authority makes an authority.
func Authority(tb testing.TB) *pki.Authority {
	tb.Helper()
	a, err := pki.NewAuthority(Key(tb), time.Now(), 10*lifetime)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

// Device makes a device's key and certificate.
func Device(tb testing.TB, a *pki.Authority, name string) *tls.Certificate {
	tb.Helper()
	key := Key(tb)
	leaf, err := a.IssueDevice(name, key.Public(), time.Now(), lifetime)
	if err != nil {
		tb.Fatal(err)
	}
	return &tls.Certificate{Certificate: pki.Raw(a.Chain(leaf)), PrivateKey: key, Leaf: leaf}
}

// Server makes the controller's key and certificate, for localhost.
func Server(tb testing.TB, a *pki.Authority) *tls.Certificate {
	tb.Helper()
	key := Key(tb)
	leaf, err := a.IssueController([]string{"localhost", "127.0.0.1", "::1"}, key.Public(), time.Now(), lifetime)
	if err != nil {
		tb.Fatal(err)
	}
	return &tls.Certificate{Certificate: pki.Raw(a.Chain(leaf)), PrivateKey: key, Leaf: leaf}
}

// Request makes a key and a certificate request for it.
func Request(tb testing.TB, device string) (key crypto.Signer, csr []byte) {
	tb.Helper()
	key = Key(tb)
	csr, err := pki.Request(key, device)
	if err != nil {
		tb.Fatal(err)
	}
	return key, csr
}

// ServerTLS is a server of a, to which devices of a may show certificates.
func ServerTLS(tb testing.TB, a *pki.Authority) *tls.Config {
	tb.Helper()
	server := Server(tb, a)
	return pki.ServerConfig(func() (*tls.Certificate, error) { return server, nil },
		func() []*x509.Certificate { return []*x509.Certificate{a.Certificate} }, tls.VerifyClientCertIfGiven)
}

// ClientTLS is a client that trusts a, and shows own where it is not nil.
func ClientTLS(a *pki.Authority, own *tls.Certificate) *tls.Config {
	return pki.ClientConfig(pki.Client{
		Trust:       func() pki.Trust { return pki.Trust{Roots: []*x509.Certificate{a.Certificate}} },
		Certificate: func() *tls.Certificate { return own },
	}, "localhost")
}

// AsDevice names the device whose certificate a request comes with, where
// Showing stands before the handler.
const AsDevice = "Test-As-Device"

// Showing has requests come as over TLS with the certificate of a device.
func Showing(tb testing.TB, a *pki.Authority, next http.Handler) http.Handler {
	tb.Helper()
	key := Key(tb)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if name := r.Header.Get(AsDevice); name != "" {
			leaf, err := a.IssueDevice(name, key.Public(), time.Now(), lifetime)
			if err != nil {
				tb.Error(err)
				return
			}
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{leaf, a.Certificate}}}
		}
		next.ServeHTTP(w, r)
	})
}

// Joined is a device as a controller knows it: its key, and what the
// controller answered to its join.
type Joined struct {
	Key      crypto.Signer
	Identity *dunlinv1.Identity
}

// TLS is how the device connects to a host.
func (j Joined) TLS(host string) (*tls.Config, error) {
	roots, err := pki.ParseCertificates(j.Identity.GetRoots())
	if err != nil {
		return nil, err
	}
	own := &tls.Certificate{Certificate: j.Identity.GetCertificates(), PrivateKey: j.Key}
	return pki.ClientConfig(pki.Client{
		Trust: func() pki.Trust { return pki.Trust{Roots: roots} }, Certificate: func() *tls.Certificate { return own },
	}, host), nil
}
