package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

// WholeFleet is the value of the scope claim that stands for no scope.
const WholeFleet = "*"

const (
	// issuerTimeout bounds a request to the issuer.
	issuerTimeout = 10 * time.Second
	// issuerEvery is how long an issuer that cannot be reached is left alone.
	issuerEvery = 10 * time.Second
)

// OIDCConfig says whose JWTs name users, and by which claims.
type OIDCConfig struct {
	Issuer   string // its URL; tokens and its own document must say the same
	ClientID string // audience that tokens must have
	// NameClaim, RoleClaim and ScopeClaim name claims. Without ScopeClaim
	// nobody has a scope; where it is named, a token must have it.
	NameClaim, RoleClaim, ScopeClaim string

	HTTP *http.Client // nil: one of its own
	Log  *slog.Logger
	Now  func() time.Time // nil: time.Now
}

// OIDC verifies JWTs of an OpenID Connect issuer. It asks the issuer for its
// keys when the first one comes. It is safe for concurrent use.
type OIDC struct {
	OIDCConfig

	// asking is held by the one who asks the issuer.
	asking chan struct{}

	mu       sync.Mutex // guards what follows
	verifier *oidc.IDTokenVerifier
	tried    time.Time
}

// NewOIDC asks nobody yet.
func NewOIDC(c OIDCConfig) *OIDC {
	if c.HTTP == nil {
		c.HTTP = &http.Client{Timeout: issuerTimeout}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &OIDC{OIDCConfig: c, asking: make(chan struct{}, 1)}
}

var errNoIssuer = fmt.Errorf("%w: the OpenID Connect issuer cannot be reached", ErrUnauthenticated)

// discover gives what verifies, and asks the issuer once for it.
func (o *OIDC) discover(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	select {
	case o.asking <- struct{}{}:
		defer func() { <-o.asking }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	o.mu.Lock()
	verifier, tried := o.verifier, o.tried
	o.mu.Unlock()
	if verifier != nil {
		return verifier, nil
	}
	if now := o.Now(); now.Sub(tried) < issuerEvery {
		return nil, errNoIssuer
	}
	// The keys are fetched, now and later, for everybody.
	provider, err := oidc.NewProvider(oidc.ClientContext(context.Background(), o.HTTP), o.Issuer)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.tried = o.Now()
		o.Log.Warn("cannot ask the OpenID Connect issuer", "issuer", o.Issuer, "error", err)
		return nil, errNoIssuer
	}
	o.verifier = provider.Verifier(&oidc.Config{ClientID: o.ClientID, Now: o.Now})
	return o.verifier, nil
}

// verify gives the user whom a JWT names.
func (o *OIDC) verify(ctx context.Context, raw string) (Principal, error) {
	o.mu.Lock()
	verifier := o.verifier
	o.mu.Unlock()
	if verifier == nil {
		var err error
		if verifier, err = o.discover(ctx); err != nil {
			return Principal{}, err
		}
	}
	token, err := verifier.Verify(ctx, raw)
	if _, ok := errors.AsType[*oidc.TokenExpiredError](err); ok {
		return Principal{}, errExpired
	}
	if err != nil {
		o.Log.Debug("a JWT was refused", "error", err)
		return Principal{}, errWrong
	}
	var claims map[string]any
	if err := token.Claims(&claims); err != nil {
		return Principal{}, errWrong
	}
	p, err := o.principal(claims)
	if err != nil {
		return Principal{}, fmt.Errorf("%w: the token of %s: %w", ErrUnauthenticated, o.Issuer, err)
	}
	p.Expires = token.Expiry
	return p, nil
}

// externalName keeps names to what is safe in messages and logs.
var externalName = regexp.MustCompile(`^[A-Za-z0-9._@|:/+=-]{1,200}$`)

// externalPrefix keeps them apart from local users.
const externalPrefix = "oidc:"

// principal gives the user whom verified claims name.
func (o *OIDC) principal(claims map[string]any) (Principal, error) {
	text := func(claim string) (string, error) {
		v, ok := claims[claim]
		if !ok {
			return "", fmt.Errorf("it has no claim %s", claim)
		}
		s, ok := v.(string)
		if !ok {
			return "", fmt.Errorf("claim %s is not text", claim)
		}
		return s, nil
	}
	name, err := text(o.NameClaim)
	if err != nil {
		return Principal{}, err
	}
	if !externalName.MatchString(name) {
		return Principal{}, fmt.Errorf("claim %s is %q, allowed are 1 to 200 of A-Z a-z 0-9 . _ @ | : / + = -", o.NameClaim, clip(name))
	}
	if verified, ok := claims["email_verified"].(bool); o.NameClaim == "email" && ok && !verified {
		return Principal{}, errors.New("its claim email is not verified")
	}
	role, err := text(o.RoleClaim)
	if err != nil {
		return Principal{}, err
	}
	if err := CheckRole(Role(role)); err != nil {
		return Principal{}, fmt.Errorf("claim %s: %w", o.RoleClaim, err)
	}
	p := Principal{Kind: User, Name: externalPrefix + name, Role: Role(role), External: true, SignedIn: true}
	if o.ScopeClaim == "" {
		return p, nil
	}
	scope, err := text(o.ScopeClaim)
	if err != nil {
		return Principal{}, err
	}
	if p.Scope, err = parseScope(scope); err != nil {
		return Principal{}, fmt.Errorf("claim %s: %w", o.ScopeClaim, err)
	}
	return p, nil
}

// parseScope reads "site=berlin,env=prod", or "*".
func parseScope(s string) (map[string]string, error) {
	if s == WholeFleet {
		return nil, nil
	}
	scope := map[string]string{}
	for part := range strings.SplitSeq(s, ",") {
		k, v, ok := strings.Cut(strings.TrimSpace(part), "=")
		if _, twice := scope[k]; !ok || k == "" || twice {
			return nil, fmt.Errorf("%q is not of the form KEY=VALUE,KEY=VALUE with each key once, or %s for the whole fleet", clip(s), WholeFleet)
		}
		scope[k] = v
	}
	return scope, nil
}
