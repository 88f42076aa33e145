// Package byhand speaks to a controller and its broker as a device that is no
// agent, message by message, and as users: for tests and benchmarks.
package byhand

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// Device is a device that has joined.
type Device struct {
	Name  string
	Key   crypto.Signer
	Chain []*x509.Certificate // its own first
	Roots []*x509.Certificate
	Trust uint64 // version of the newest trust document that it was given; it looks at no signature
}

// Join makes a device known by its token. The token's pin, or what the client
// of enrolment trusts, says who the controller is.
func Join(ctx context.Context, enrolment dunlinv1connect.EnrollmentServiceClient, token, name string, key crypto.Signer) (*Device, error) {
	csr, err := pki.Request(key, name)
	if err != nil {
		return nil, err
	}
	return JoinBy(ctx, enrolment, token, name, key, csr)
}

// JoinBy is Join with a certificate request that was made before.
func JoinBy(ctx context.Context, enrolment dunlinv1connect.EnrollmentServiceClient, token, name string, key crypto.Signer, csr []byte) (*Device, error) {
	answer, err := enrolment.Join(ctx, connect.NewRequest(&dunlinv1.JoinRequest{JoinToken: token, Name: name, Csr: csr}))
	if err != nil {
		return nil, fmt.Errorf("%s joins: %w", name, err)
	}
	return granted(name, key, answer.Msg.GetIdentity())
}

func granted(name string, key crypto.Signer, id *dunlinv1.Identity) (*Device, error) {
	d := &Device{Name: name, Key: key}
	var err error
	if d.Chain, err = pki.ParseCertificates(id.GetCertificates()); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if d.Roots, err = pki.ParseCertificates(id.GetRoots()); err != nil {
		return nil, fmt.Errorf("%s: roots: %w", name, err)
	}
	if len(d.Chain) == 0 {
		return nil, fmt.Errorf("%s was given no certificate", name)
	}
	for _, signed := range id.GetTrust() {
		var document dunlinv1.TrustDocument
		if err := proto.Unmarshal(signed.GetDocument(), &document); err != nil {
			return nil, fmt.Errorf("%s: trust document: %w", name, err)
		}
		d.Trust = max(d.Trust, document.GetVersion())
	}
	return d, nil
}

// Renew gives the device with a certificate for a new key.
func (d *Device) Renew(ctx context.Context, enrolment dunlinv1connect.EnrollmentServiceClient) (*Device, error) {
	next, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := pki.Request(next, d.Name)
	if err != nil {
		return nil, err
	}
	old := d.Chain[0].Raw
	signature, err := pki.Sign(d.Key, pki.RenewalMessage(old, csr))
	if err != nil {
		return nil, err
	}
	answer, err := enrolment.Renew(ctx, connect.NewRequest(&dunlinv1.RenewRequest{Certificate: old, Csr: csr, Signature: signature}))
	if err != nil {
		return nil, fmt.Errorf("%s renews: %w", d.Name, err)
	}
	return granted(d.Name, next, answer.Msg.GetIdentity())
}

// Certificate is what the device shows.
func (d *Device) Certificate() *tls.Certificate {
	return &tls.Certificate{Certificate: pki.Raw(d.Chain), PrivateKey: d.Key, Leaf: d.Chain[0]}
}

// TLS is how the device connects to a host.
func (d *Device) TLS(host string) *tls.Config { return TLS(d.Roots, d.Certificate(), host) }

// TLS is how a client connects to a host that one of roots vouches for; own
// may be nil.
func TLS(roots []*x509.Certificate, own *tls.Certificate, host string) *tls.Config {
	return pki.ClientConfig(pki.Client{
		Trust: func() pki.Trust { return pki.Trust{Roots: roots} }, Certificate: func() *tls.Certificate { return own },
	}, host)
}

// User is an HTTP client that shows a token where it is not "". It connects
// anew for each request where it speaks TLS.
func User(token string, secure *tls.Config) *http.Client { return UserFrom(nil, token, secure) }

// UserFrom is User from an address of this machine; nil: any.
func UserFrom(from net.IP, token string, secure *tls.Config) *http.Client {
	return &http.Client{Transport: bearer{token, &http.Transport{DialContext: DialFrom(from), TLSClientConfig: secure, DisableKeepAlives: secure != nil}}}
}

// DialFrom connects from an address of this machine; nil: any.
func DialFrom(from net.IP) func(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := &net.Dialer{}
	if from != nil {
		dialer.LocalAddr = &net.TCPAddr{IP: from}
	}
	return dialer.DialContext
}

type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+b.token)
	}
	return b.next.RoundTrip(r)
}
