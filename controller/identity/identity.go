// Package identity says who is calling and what they may do: users by token,
// password or OpenID Connect, devices by the certificates that the controller's
// own authorities issue; one table of rules; and a guard that slows guessing.
package identity

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

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

// CheckRole says whether r is a role.
func CheckRole(r Role) error {
	if ranks[r] == 0 {
		return fmt.Errorf("role %q is none of %s, %s, %s", clip(string(r)), Viewer, Operator, Admin)
	}
	return nil
}

// Lesser gives the role that may do less.
func Lesser(a, b Role) Role {
	if ranks[a] < ranks[b] {
		return a
	}
	return b
}

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
	// Expires is when the credentials do; zero: never.
	Expires time.Time
	// External is true for a user whom OpenID Connect names.
	External bool
	// SignedIn is true for a user who did so lately: by a password, or by OpenID
	// Connect.
	SignedIn bool
}

// May says whether p is a user whose role includes what r may do.
func (p Principal) May(r Role) bool {
	return p.Kind == User && ranks[r] > 0 && ranks[p.Role] >= ranks[r]
}

// Covers says whether labels, of a device or of a selector, put it within the
// scope of p.
func (p Principal) Covers(labels map[string]string) bool {
	for k, v := range p.Scope {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// Narrow gives a selector that matches what the given one does within the
// scope of p; false: that is nothing.
func (p Principal) Narrow(selector map[string]string) (map[string]string, bool) {
	return both(selector, p.Scope)
}

// both gives the labels that hold where a and b do; false: they contradict
// each other.
func both(a, b map[string]string) (map[string]string, bool) {
	if len(a)+len(b) == 0 {
		return nil, true
	}
	all := make(map[string]string, len(a)+len(b))
	maps.Copy(all, a)
	for k, v := range b {
		if have, ok := all[k]; ok && have != v {
			return nil, false
		}
		all[k] = v
	}
	return all, true
}

// LabelsText writes labels as k=v, by key; none as "".
func LabelsText(labels map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, k+"="+labels[k])
	}
	return strings.Join(parts, ",")
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

var userName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

// CheckUser says whether a local user may have a name.
func CheckUser(name string) error {
	if !userName.MatchString(name) {
		return fmt.Errorf("name %q: allowed are 1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit", clip(name))
	}
	return nil
}

// clip shortens a value from outside for a message.
func clip(s string) string {
	if len(s) <= 100 {
		return s
	}
	return strings.ToValidUTF8(s[:100], "") + "..."
}

// ErrUnknown is what Credentials answers for a token or device that it does
// not have.
var ErrUnknown = errors.New("unknown credentials")

// ErrRevoked is what Credentials answers for a certificate that was taken back.
var ErrRevoked = errors.New("revoked")

// ErrUnauthenticated is the error of missing or wrong credentials. It does
// not say which part was wrong.
var ErrUnauthenticated = errors.New("unauthenticated")

// errWrong is a guess; errExpired is none.
var (
	errWrong   = fmt.Errorf("%w: wrong credentials", ErrUnauthenticated)
	errExpired = fmt.Errorf("%w: the token has expired", ErrUnauthenticated)
)

// Grant is what is kept of a token and of its user.
type Grant struct {
	User      string
	UserRole  Role
	UserScope map[string]string
	Role      Role // of the token; "": the user's
	Scope     map[string]string
	ExpiresAt time.Time // zero: never
	LastUsed  time.Time // to the hour; zero: never
	Login     bool      // the token was given for a password
}

// principal gives who shows the token: never more than the user may.
func (g Grant) principal(now time.Time) (Principal, error) {
	if !g.ExpiresAt.IsZero() && !now.Before(g.ExpiresAt) {
		return Principal{}, errExpired
	}
	p := Principal{Kind: User, Name: g.User, Role: g.UserRole, Expires: g.ExpiresAt, SignedIn: g.Login}
	if g.Role != "" {
		p.Role = Lesser(g.Role, g.UserRole)
	}
	var ok bool
	if p.Scope, ok = both(g.UserScope, g.Scope); !ok {
		return Principal{}, fmt.Errorf("%w: the scopes of the token and of its user have nothing in common", ErrUnauthenticated)
	}
	return p, nil
}

// Credentials looks hashed credentials up; store implements it.
type Credentials interface {
	// TokenOwner gives what is kept of the token that has this hash.
	TokenOwner(ctx context.Context, hash [32]byte) (Grant, error)
	// TokenUsed keeps when a token was used last.
	TokenUsed(ctx context.Context, hash [32]byte, at time.Time) error
	// CheckDevice says whether a device is known by a certificate that one of
	// the authorities has issued to it: ErrUnknown or ErrRevoked where it is not.
	CheckDevice(ctx context.Context, device string, cert *x509.Certificate) error
}

// Options are what an Authenticator may have beside its credentials.
type Options struct {
	OIDC  *OIDC  // nil: nobody signs in by OpenID Connect
	Guard *Guard // nil: one of its own
	Log   *slog.Logger
	Now   func() time.Time // nil: time.Now
}

// Authenticator checks credentials. It is safe for concurrent use.
type Authenticator struct {
	credentials Credentials
	oidc        *OIDC
	guard       *Guard
	log         *slog.Logger
	now         func() time.Time
	passwords   passwords
}

// New gives an Authenticator over credentials.
func New(credentials Credentials, o Options) *Authenticator {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Guard == nil {
		o.Guard = NewGuard(o.Now)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Authenticator{credentials: credentials, oidc: o.OIDC, guard: o.Guard, log: o.Log, now: o.Now, passwords: newPasswords()}
}

// Guard is what slows guessing here; whoever checks credentials by other ways
// asks it too.
func (a *Authenticator) Guard() *Guard { return a.guard }

// OIDC says who signs users in beside the controller; nil: nobody.
func (a *Authenticator) OIDC() *OIDC { return a.oidc }

// The longest token or secret, name, and token of OpenID Connect that is
// looked at; longer ones are unauthenticated.
const (
	maxCredential = 512
	maxJWT        = 16 << 10
)

// FromRequest gives the principal of a request: a user by "Bearer TOKEN" or
// "Basic ANYTHING:TOKEN", a device by the certificate of its connection, which
// TLS has verified. Its error is ErrUnauthenticated, a LimitedError where too
// many credentials from there were wrong, or that of looking them up; the
// principal then is nobody, with the address that the request came from.
func (a *Authenticator) FromRequest(r *http.Request) (Principal, error) {
	p, err := a.fromRequest(r)
	if err == nil {
		known(r)
	}
	p.From = r.RemoteAddr
	return p, err
}

func (a *Authenticator) fromRequest(r *http.Request) (Principal, error) {
	header := r.Header.Get("Authorization")
	scheme, rest, _ := strings.Cut(header, " ")
	attempt := Attempt{From: r.RemoteAddr}
	switch {
	case header == "" && r.TLS != nil && len(r.TLS.VerifiedChains) > 0:
		device, err := a.Device(r.Context(), r.TLS.PeerCertificates[0])
		if err != nil {
			return Principal{}, err
		}
		return Principal{Kind: Device, Name: device}, nil
	case header == "":
		return Principal{}, fmt.Errorf("%w: credentials are missing", ErrUnauthenticated)
	case strings.EqualFold(scheme, "Bearer"):
		attempt.Credential = strings.TrimSpace(rest)
	case strings.EqualFold(scheme, "Basic"):
		var ok bool
		if _, attempt.Credential, ok = r.BasicAuth(); !ok {
			return Principal{}, fmt.Errorf("%w: malformed Basic credentials", ErrUnauthenticated)
		}
	default:
		return Principal{}, fmt.Errorf("%w: the Authorization scheme is neither Bearer nor Basic", ErrUnauthenticated)
	}
	if err := a.guard.Check(attempt); err != nil {
		return Principal{}, err
	}
	p, err := a.user(r.Context(), attempt.Credential)
	switch {
	case err == nil:
		a.guard.Right(attempt)
	case errors.Is(err, errWrong):
		a.guard.Wrong(attempt)
	}
	return p, err
}

// Device gives the device whose certificate it is, which TLS has verified.
// Where it is nobody's, or revoked, the error is ErrUnauthenticated and says
// why.
func (a *Authenticator) Device(ctx context.Context, cert *x509.Certificate) (string, error) {
	device, ok := pki.DeviceOf(cert)
	if !ok {
		return "", fmt.Errorf("%w: the certificate is not a device's", ErrUnauthenticated)
	}
	if a.now().After(cert.NotAfter) { // TLS has looked only when the connection began
		return "", fmt.Errorf("%w: the certificate has expired", ErrUnauthenticated)
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
	// Three parts are a JWT; no token of Dunlin's has a dot.
	if a.oidc != nil && strings.Count(token, ".") == 2 && len(token) <= maxJWT {
		return a.oidc.verify(ctx, token)
	}
	if token == "" || len(token) > maxCredential {
		return Principal{}, errWrong
	}
	// Found by its hash: timing tells nothing of a token that is not known.
	hash := Hash(token)
	grant, err := a.credentials.TokenOwner(ctx, hash)
	switch {
	case errors.Is(err, ErrUnknown):
		return Principal{}, errWrong
	case err != nil:
		return Principal{}, fmt.Errorf("look up token: %w", err)
	}
	now := a.now()
	p, err := grant.principal(now)
	if err != nil {
		return Principal{}, err
	}
	if hour := now.Truncate(time.Hour); grant.LastUsed.Before(hour) {
		// Who may come in does so on a full disk too.
		if err := a.credentials.TokenUsed(ctx, hash, hour); err != nil && ctx.Err() == nil {
			a.log.Warn("cannot keep when a token was used", "user", p.Name, "error", err)
		}
	}
	return p, nil
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
