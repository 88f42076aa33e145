package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Pin is the SHA-256 of the public key of a certificate authority.
type Pin [sha256.Size]byte

// PinOf gives the pin of an authority's certificate.
func PinOf(c *x509.Certificate) Pin { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// pinMark stands between a join token's secret and its pin.
const pinMark = "."

// AppendPin makes the last part of a join token.
func AppendPin(token string, p Pin) string {
	return token + pinMark + base64.RawURLEncoding.EncodeToString(p[:])
}

// PinIn gives the pin that a join token ends with; false: it has none.
func PinIn(token string) (p Pin, ok bool) {
	_, text, ok := strings.Cut(token, pinMark)
	b, err := base64.RawURLEncoding.DecodeString(text)
	if !ok || err != nil || len(b) != len(p) {
		return Pin{}, false
	}
	return Pin(b), true
}

// Trust is whom a client believes.
type Trust struct {
	Roots []*x509.Certificate // of the controller's authorities
	Pin   *Pin                // of an authority that the server shows itself
	// System lets the system's roots count too.
	System bool
	// AnyTime has certificates count before and after their time, for a clock
	// that is known to be wrong.
	AnyTime bool
}

// Client says how a program connects.
type Client struct {
	Trust func() Trust
	// Certificate is the client's own; nil, or giving nil: none.
	Certificate func() *tls.Certificate
	Now         func() time.Time // nil: time.Now
}

// ClientConfig gives TLS 1.3 for connections to a server name, or address.
func ClientConfig(c Client, serverName string) *tls.Config {
	now := c.Now
	if now == nil {
		now = time.Now
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: serverName, Time: now,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c.Certificate != nil {
				if own := c.Certificate(); own != nil {
					return own, nil
				}
			}
			return new(tls.Certificate), nil
		},
		// VerifyConnection verifies, by roots that may change.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			return verifyServer(c.Trust(), s.PeerCertificates, serverName, now())
		},
	}
}

func verifyServer(t Trust, certs []*x509.Certificate, name string, now time.Time) error {
	if len(certs) == 0 {
		return errors.New("the server shows no certificate")
	}
	if name == "" { // for which crypto/x509 would take every certificate
		return errors.New("the server has no name that its certificate could be for")
	}
	roots := t.Roots
	if t.Pin != nil {
		for _, c := range certs[1:] {
			if PinOf(c) == *t.Pin && c.IsCA {
				roots = append(roots[:len(roots):len(roots)], c)
			}
		}
	}
	if t.AnyTime {
		now = Within(now, certs)
	}
	o := x509.VerifyOptions{DNSName: name, CurrentTime: now, Intermediates: Pool(certs[1:]), Roots: Pool(roots)}
	_, err := certs[0].Verify(o)
	if err != nil && t.System {
		if o.Roots, _ = x509.SystemCertPool(); o.Roots == nil {
			return err
		}
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok || len(roots) == 0 {
			_, err = certs[0].Verify(o)
		}
	}
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok && t.Pin != nil {
		return fmt.Errorf("the server is not vouched for by the authority that the join token names: %w", err)
	}
	return err
}

// ServerConfig gives TLS 1.3 with the newest certificate. Clients may show a
// certificate of one of roots; one that counts for none ends the connection.
func ServerConfig(certificate func() (*tls.Certificate, error), roots func() []*x509.Certificate, auth tls.ClientAuthType) *tls.Config {
	var trusted pools
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			own, err := certificate()
			if err != nil {
				return nil, err
			}
			// Without session tickets each connection shows its certificate.
			c := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*own}, SessionTicketsDisabled: true, NextProtos: []string{"h2", "http/1.1"}}
			if roots != nil {
				c.ClientAuth, c.ClientCAs = auth, trusted.of(roots())
			}
			return c, nil
		},
	}
}

// pools makes a pool of the same certificates once: connections keep theirs, and
// there may be thousands. It is safe for concurrent use.
type pools struct {
	mu    sync.Mutex // guards what follows
	certs []*x509.Certificate
	pool  *x509.CertPool // nil: none yet; never changed
}

func (p *pools) of(certs []*x509.Certificate) *x509.CertPool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pool == nil || !Same(p.certs, certs) {
		p.certs, p.pool = slices.Clone(certs), Pool(certs)
	}
	return p.pool
}

// Files is a certificate in files, which is read again when they change. It
// is safe for concurrent use.
type Files struct{ kept[*tls.Certificate] }

// NewFiles reads a certificate and its key from PEM files.
func NewFiles(cert, key string) (*Files, error) {
	f := &Files{kept[*tls.Certificate]{paths: []string{cert, key}, read: func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("certificate %s, key %s: %w", cert, key, err)
		}
		return &pair, nil
	}}}
	return f, f.Err()
}

// Certificate gives the newest certificate. Files that are changed and
// cannot be read leave the one before in use: there is never an error.
func (f *Files) Certificate() (*tls.Certificate, error) { return f.newest(), nil }

// RootsFile are authorities in a file, which is read again when it changes.
// It is safe for concurrent use.
type RootsFile struct{ kept[[]*x509.Certificate] }

// NewRootsFile reads the certificates of a PEM file, at most limit, all of
// them of authorities.
func NewRootsFile(path string, limit int) (*RootsFile, error) {
	f := &RootsFile{kept[[]*x509.Certificate]{paths: []string{path}, read: func() ([]*x509.Certificate, error) {
		certs, err := ReadCertificates(path)
		if err == nil && len(certs) > limit {
			err = fmt.Errorf("%s holds %d certificates, the limit is %d", path, len(certs), limit)
		}
		for _, c := range certs {
			if err == nil && !c.IsCA {
				err = fmt.Errorf("%s: %q is not an authority", path, c.Subject)
			}
		}
		return certs, err
	}}}
	return f, f.Err()
}

// Roots gives the newest certificates. A file that is changed and cannot be
// read leaves those before in use.
func (f *RootsFile) Roots() []*x509.Certificate { return f.newest() }

// kept is what stands in files.
type kept[T any] struct {
	paths []string
	read  func() (T, error)

	mu    sync.Mutex // guards what follows
	value T
	tried []version // of the files when they were read last
	err   error     // of that
	again time.Time // when files that cannot be read are read again as they are
}

// version tells one content of a file from another.
type version struct {
	changed time.Time
	size    int64
}

// retryEvery is how often unchanged files that could not be read are tried:
// the permission to may have come.
const retryEvery = 5 * time.Second

func (k *kept[T]) newest() T {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.look(time.Now())
	return k.value
}

// Err says why the files as they are now are not in use; nil: they are.
func (k *kept[T]) Err() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.look(time.Now())
	return k.err
}

func (k *kept[T]) look(now time.Time) {
	found := make([]version, len(k.paths))
	for i, path := range k.paths {
		info, err := os.Stat(path)
		if err != nil {
			k.err, k.again = err, now
			return
		}
		found[i] = version{info.ModTime(), info.Size()}
	}
	if slices.Equal(found, k.tried) && (k.err == nil || now.Before(k.again)) {
		return
	}
	value, err := k.read()
	k.tried, k.err, k.again = found, err, now.Add(retryEvery)
	if err == nil {
		k.value = value
	}
}
