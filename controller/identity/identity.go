// Package identity says who is calling: users by token, devices by the
// certificates that the controller's own authorities issue.
package identity

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/dunlin/dunlin/internal/pki"
)

// Kind is what a principal is. The zero Kind is nobody.
type Kind int

// The kinds of principals.
const (
	User Kind = iota + 1
	Device
)

// Role says what a user may do. Each role may do what the one before it may.
type Role string

// The roles of users. Devices have none.
const (
	Viewer   Role = "viewer"   // reads
	Operator Role = "operator" // pushes, applies, deletes
	Admin    Role = "admin"    // makes and takes back identities
)

var ranks = map[Role]int{Viewer: 1, Operator: 2, Admin: 3}

// Principal is an authenticated caller. The zero Principal is nobody and may
// do nothing.
type Principal struct {
	Kind Kind
	Name string
	Role Role // of a user
	// Scope are labels that a device must have for a user to see and change it;
	// none: the whole fleet.
	Scope map[string]string
	// From is the address that the caller came from, host:port.
	From string
}

// May says whether p is a user whose role includes what r may do.
func (p Principal) May(r Role) bool {
	return p.Kind == User && ranks[r] > 0 && ranks[p.Role] >= ranks[r]
}

// String writes "user:NAME", "device:NAME" or "nobody".
func (p Principal) String() string {
	switch p.Kind {
	case User:
		return "user:" + p.Name
	case Device:
		return "device:" + p.Name
	default:
		return "nobody"
	}
}

// ErrUnknown is what Credentials answers for a token or device that it does
// not have.
var ErrUnknown = errors.New("unknown credentials")

// ErrRevoked is what Credentials answers for a certificate that was taken back.
var ErrRevoked = errors.New("revoked")

// ErrUnauthenticated is the error of missing or wrong credentials. It does
// not say which part was wrong.
var ErrUnauthenticated = errors.New("unauthenticated")

// Credentials looks hashed credentials up; store implements it.
type Credentials interface {
	// TokenOwner gives the user whose token has this hash.
	TokenOwner(ctx context.Context, hash [32]byte) (name string, role Role, err error)
	// CheckDevice says whether a device is known by a certificate that one of
	// the authorities has issued to it: ErrUnknown or ErrRevoked where it is not.
	CheckDevice(ctx context.Context, device string, cert *x509.Certificate) error
}

// Authenticator checks credentials. It is safe for concurrent use.
type Authenticator struct{ credentials Credentials }

// New gives an Authenticator over credentials.
func New(credentials Credentials) *Authenticator { return &Authenticator{credentials} }

// maxCredential bounds the length of a token or secret, and that of a name,
// that is looked at; longer ones are unauthenticated.
const maxCredential = 512

// FromRequest gives the principal of a request: a user by "Bearer TOKEN" or
// "Basic ANYTHING:TOKEN", a device by the certificate of its connection, which
// TLS has verified. Its error is ErrUnauthenticated, or that of looking the
// credentials up.
func (a *Authenticator) FromRequest(r *http.Request) (Principal, error) {
	header := r.Header.Get("Authorization")
	scheme, rest, _ := strings.Cut(header, " ")
	switch {
	case header == "" && r.TLS != nil && len(r.TLS.VerifiedChains) > 0:
		device, err := a.Device(r.Context(), r.TLS.PeerCertificates[0])
		if err != nil {
			return Principal{}, err
		}
		return Principal{Kind: Device, Name: device}, nil
	case header == "":
		return Principal{}, fmt.Errorf("%w: no credentials", ErrUnauthenticated)
	case strings.EqualFold(scheme, "Bearer"):
		return a.user(r.Context(), strings.TrimSpace(rest))
	case strings.EqualFold(scheme, "Basic"):
		_, token, ok := r.BasicAuth()
		if !ok {
			return Principal{}, fmt.Errorf("%w: malformed Basic credentials", ErrUnauthenticated)
		}
		return a.user(r.Context(), token)
	default:
		return Principal{}, fmt.Errorf("%w: the Authorization scheme is neither Bearer nor Basic", ErrUnauthenticated)
	}
}

// Device gives the device whose certificate it is, which TLS has verified.
// Where it is nobody's, or revoked, the error is ErrUnauthenticated and says
// why.
func (a *Authenticator) Device(ctx context.Context, cert *x509.Certificate) (string, error) {
	device, ok := pki.DeviceOf(cert)
	if !ok {
		return "", fmt.Errorf("%w: the certificate is not a device's", ErrUnauthenticated)
	}
	switch err := a.credentials.CheckDevice(ctx, device, cert); {
	case errors.Is(err, ErrUnknown), errors.Is(err, ErrRevoked):
		return "", fmt.Errorf("%w: %w", ErrUnauthenticated, err)
	case err != nil:
		return "", fmt.Errorf("look up device %s: %w", device, err)
	}
	return device, nil
}

func (a *Authenticator) user(ctx context.Context, token string) (Principal, error) {
	if token == "" || len(token) > maxCredential {
		return Principal{}, fmt.Errorf("%w: wrong credentials", ErrUnauthenticated)
	}
	// Found by its hash: timing tells nothing of a token that is not known.
	name, role, err := a.credentials.TokenOwner(ctx, Hash(token))
	switch {
	case errors.Is(err, ErrUnknown):
		return Principal{}, fmt.Errorf("%w: wrong credentials", ErrUnauthenticated)
	case err != nil:
		return Principal{}, fmt.Errorf("look up token: %w", err)
	}
	return Principal{Kind: User, Name: name, Role: role}, nil
}

// NewToken makes a token, prefix and 32 random bytes in base64url, and its
// hash.
func NewToken(prefix string) (token string, hash [32]byte) {
	var b [32]byte
	rand.Read(b[:]) // never fails
	token = prefix + base64.RawURLEncoding.EncodeToString(b[:])
	return token, Hash(token)
}

// Hash gives the SHA-256 of a token. It holds 32 random bytes, so
// a slow hash would add nothing.
func Hash(token string) [32]byte { return sha256.Sum256([]byte(token)) }

type contextKey struct{}

// WithPrincipal gives a context that carries p.
func WithPrincipal(ctx context.Context, p Principal) context.Context {
	return context.WithValue(ctx, contextKey{}, p)
}

// FromContext gives the principal that ctx carries, or nobody.
func FromContext(ctx context.Context) Principal {
	p, _ := ctx.Value(contextKey{}).(Principal)
	return p
}
