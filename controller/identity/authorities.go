package identity

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/internal/pki"
)

// The lifetimes of what the controller issues.
const (
	authorityLifetime = 20 * 365 * 24 * time.Hour
	serverLifetime    = 90 * 24 * time.Hour
	crlLifetime       = 7 * 24 * time.Hour
	// DeviceLifetime is how long a device's certificate counts; devices renew
	// when half of it is over.
	DeviceLifetime = 365 * 24 * time.Hour
	// Grace is how long after its end a certificate can still be renewed.
	Grace = 180 * 24 * time.Hour
	// MaxGrace bounds a grace period that is configured.
	MaxGrace = 2 * 365 * 24 * time.Hour
)

// MaxAuthorities bounds the authorities that count at one time: a device takes
// 8, of which some may be of another authority's, and as many certificates of
// a server, one by each older authority among them.
const MaxAuthorities = 4

// ErrAuthorities says that there are MaxAuthorities already.
var ErrAuthorities = fmt.Errorf("there are %d authorities, the limit: retire one first", MaxAuthorities)

// AuthorityRecord is a certificate authority as the store keeps it.
type AuthorityRecord struct {
	Certificate *x509.Certificate
	Cross       []*x509.Certificate // by which older ones vouch for it
	Active      bool                // it issues
}

// AuthorityStore keeps certificate authorities; store implements it.
type AuthorityStore interface {
	// Authorities gives them, the oldest first.
	Authorities(ctx context.Context) ([]AuthorityRecord, error)
	// AddAuthority adds one, which is the active one from then on.
	AddAuthority(ctx context.Context, by string, r AuthorityRecord) error
	RemoveAuthority(ctx context.Context, by, id string, force bool) error
}

// Authorities are the controller's certificate authorities. All of them
// count; the active one issues. It is safe for concurrent use.
type Authorities struct {
	store AuthorityStore
	dir   string // holds a key file for each
	hosts []string
	now   func() time.Time

	changing sync.Mutex // one change at a time

	mu     sync.Mutex // guards what follows
	all    []*pki.Authority
	active *pki.Authority
	server issued
	broker issued
	crl    int64 // number of the last one
}

// issued is a certificate of the controller's or of a broker beside it.
type issued struct {
	certificate *tls.Certificate // nil: to be issued
	by          *pki.Authority
	renew       time.Time // when it is issued anew
}

// OpenAuthorities reads the authorities, and makes the first one where there
// is none. The controller answers under hosts.
func OpenAuthorities(ctx context.Context, store AuthorityStore, dir string, hosts []string, now func() time.Time) (*Authorities, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("folder of the authorities: %w", err)
	}
	a := &Authorities{store: store, dir: dir, hosts: hosts, now: now}
	records, err := store.Authorities(ctx)
	if err != nil {
		return nil, err
	}
	if len(records) == 0 {
		_, err := a.Rotate(ctx, "controller")
		return a, err
	}
	return a, a.load(records)
}

func (a *Authorities) load(records []AuthorityRecord) error {
	var all []*pki.Authority
	var active *pki.Authority
	for _, r := range records {
		key, err := pki.ReadKey(a.keyFile(pki.CertificateID(r.Certificate)))
		if err != nil {
			return fmt.Errorf("authority %s: %w", r.Certificate.Subject.CommonName, err)
		}
		one, err := pki.LoadAuthority(r.Certificate, r.Cross, key)
		if err != nil {
			return fmt.Errorf("authority %s: %w", r.Certificate.Subject.CommonName, err)
		}
		all = append(all, one)
		if r.Active {
			active = one
		}
	}
	if active == nil {
		return fmt.Errorf("none of the %d authorities is the active one", len(all))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all, a.active = all, active
	return nil
}

func (a *Authorities) keyFile(id string) string { return filepath.Join(a.dir, id+".key") }

// Rotate makes a new authority, for which all others vouch, and which issues
// from now on; ErrAuthorities where there are too many.
func (a *Authorities) Rotate(ctx context.Context, by string) (*pki.Authority, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	if len(a.list()) >= MaxAuthorities {
		return nil, ErrAuthorities
	}
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	next, err := pki.NewAuthority(key, a.now(), authorityLifetime)
	if err != nil {
		return nil, err
	}
	for _, old := range a.list() {
		cross, err := old.Vouch(next.Certificate, a.now())
		if err != nil {
			return nil, fmt.Errorf("authority %s cannot vouch for its successor: %w", old.ID(), err)
		}
		next.Cross = append(next.Cross, cross)
	}
	// A key without a record is never used; a record without a key would be.
	if err := pki.WriteKey(a.keyFile(next.ID()), key); err != nil {
		return nil, err
	}
	if err := a.store.AddAuthority(ctx, by, AuthorityRecord{Certificate: next.Certificate, Cross: next.Cross, Active: true}); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all, a.active = append(slices.Clone(a.all), next), next
	return next, nil
}

// Retire takes an authority out, and its key away.
func (a *Authorities) Retire(ctx context.Context, by, id string, force bool) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	if err := a.store.RemoveAuthority(ctx, by, id, force); err != nil {
		return err
	}
	a.mu.Lock()
	a.all = slices.DeleteFunc(slices.Clone(a.all), func(one *pki.Authority) bool { return one.ID() == id })
	a.mu.Unlock()
	return os.Remove(a.keyFile(id))
}

func (a *Authorities) list() []*pki.Authority {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.all
}

// All gives the authorities, the oldest first, and the active one.
func (a *Authorities) All() (all []*pki.Authority, active *pki.Authority) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.all, a.active
}

// Roots gives the certificates of all authorities, the oldest first.
func (a *Authorities) Roots() []*x509.Certificate {
	var roots []*x509.Certificate
	for _, one := range a.list() {
		roots = append(roots, one.Certificate)
	}
	return roots
}

// Pin is the fingerprint of the active authority.
func (a *Authorities) Pin() pki.Pin {
	_, active := a.All()
	return pki.PinOf(active.Certificate)
}

// IssueDevice makes a device's certificate.
func (a *Authorities) IssueDevice(device string, key crypto.PublicKey, lifetime time.Duration) (*x509.Certificate, error) {
	_, active := a.All()
	return active.IssueDevice(device, key, a.now(), lifetime)
}

// Chain gives a leaf with what leads from it to every authority.
func (a *Authorities) Chain(leaf *x509.Certificate) []*x509.Certificate {
	for _, one := range a.list() {
		if leaf.CheckSignatureFrom(one.Certificate) == nil {
			return one.Chain(leaf)
		}
	}
	return []*x509.Certificate{leaf}
}

// ServerCertificate gives the certificate by which the controller answers, and
// by which it calls a broker. It is issued anew in time, and when the
// authority changes.
func (a *Authorities) ServerCertificate() (*tls.Certificate, error) {
	return a.certificate(&a.server, (*pki.Authority).IssueController)
}

// BrokerCertificate gives that of a broker beside the controller, which is good
// for nothing but to answer: whoever has its key is not the controller.
func (a *Authorities) BrokerCertificate() (*tls.Certificate, error) {
	return a.certificate(&a.broker, (*pki.Authority).IssueBroker)
}

// issuer makes a server's certificate.
type issuer func(a *pki.Authority, hosts []string, key crypto.PublicKey, now time.Time, lifetime time.Duration) (*x509.Certificate, error)

func (a *Authorities) certificate(have *issued, issue issuer) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	// Round leaves the wall clock, which may have been set.
	now := a.now().Round(0)
	if have.certificate != nil && have.by == a.active && now.Before(have.renew) && now.After(have.certificate.Leaf.NotBefore) {
		return have.certificate, nil
	}
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	leaf, err := issue(a.active, a.hosts, key.Public(), now, serverLifetime)
	if err != nil {
		return nil, fmt.Errorf("issue a server's certificate: %w", err)
	}
	*have = issued{
		certificate: &tls.Certificate{Certificate: pki.Raw(a.active.Chain(leaf)), PrivateKey: key, Leaf: leaf},
		by:          a.active, renew: now.Add(serverLifetime / 2),
	}
	return have.certificate, nil
}

// ClientTLS is how the controller connects to a server beside it.
func (a *Authorities) ClientTLS(serverName string) *tls.Config {
	return pki.ClientConfig(pki.Client{
		Trust: func() pki.Trust { return pki.Trust{Roots: a.Roots(), System: true} },
		Certificate: func() *tls.Certificate {
			own, err := a.ServerCertificate()
			if err != nil {
				return nil
			}
			return own
		},
		Now: a.now,
	}, serverName)
}

// SignTime says what time it is, with a certificate that tells whose word it is.
func (a *Authorities) SignTime(nonce []byte) (now time.Time, signature []byte, chain [][]byte, err error) {
	server, err := a.ServerCertificate()
	if err != nil {
		return time.Time{}, nil, nil, err
	}
	now = a.now()
	signature, err = pki.Sign(server.PrivateKey.(crypto.Signer), pki.TimeMessage(nonce, now))
	return now, signature, server.Certificate, err
}

// CRLs gives a list of the revoked certificates for each authority, DER.
func (a *Authorities) CRLs(revoked []x509.RevocationListEntry) ([][]byte, error) {
	a.mu.Lock()
	a.crl = max(a.crl+1, a.now().Unix()) // it only grows, also over restarts
	number, all := a.crl, a.all
	a.mu.Unlock()
	var lists [][]byte
	for _, one := range all {
		// Serial numbers are random: an authority may name those of others.
		der, err := one.Revoke(revoked, number, a.now(), crlLifetime)
		if err != nil {
			return nil, fmt.Errorf("list of revoked certificates: %w", err)
		}
		lists = append(lists, der)
	}
	return lists, nil
}
