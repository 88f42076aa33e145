// Package access is who may ask an agent for inference: API keys and client
// certificates, what each may ask for, and how often.
package access

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/oip/rest"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/proto/inference"
)

// Config configures a Guard. At least one of Rules and ClientCA is there.
type Config struct {
	Rules    string // file of rules; "": every certificate of ClientCA may ask for everything
	ClientCA string // PEM file of who vouches for clients' certificates; "": they have none
	Log      *slog.Logger
	Now      func() time.Time // nil: time.Now
}

// Guard lets in who has a key or a certificate that the rules know. The files
// are read again when they change. A nil Guard lets everybody in. It is safe
// for concurrent use.
type Guard struct {
	rules   *file[rules]               // nil: there are none
	roots   *file[[]*x509.Certificate] // nil: there are no client certificates
	now     func() time.Time
	wrong   attempts
	mu      sync.Mutex         // guards what follows
	buckets map[string]*bucket // by the caller's name
	asked   *prometheus.CounterVec
}

// bucket is what a caller has left of its rate.
type bucket struct {
	limiter *rate.Limiter
	rule    *Rule // whose rate it has
}

// maxBuckets bounds the callers whose rates are known. Only patterns of
// certificates give more callers than there are rules.
const maxBuckets = 4096

// New reads the files.
func New(cfg Config) (*Guard, error) {
	g := &Guard{now: cfg.Now, buckets: make(map[string]*bucket)}
	if g.now == nil {
		g.now = time.Now
	}
	g.asked = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "dunlin_access_requests_total", Help: "Requests by the name of who asks, empty where that is not known, and by what became of them.",
	}, []string{"name", "outcome"})
	var err error
	if cfg.Rules != "" {
		parse := func(text []byte) (rules, error) { return parseRules(cfg.Rules, text) }
		if g.rules, err = open(cfg.Rules, parse, cfg.Log, g.now); err != nil {
			return nil, fmt.Errorf("api-keys: %w", err)
		}
	}
	if cfg.ClientCA != "" {
		if g.roots, err = open(cfg.ClientCA, pki.DecodeCertificates, cfg.Log, g.now); err != nil {
			return nil, fmt.Errorf("client-ca: %w", err)
		}
	}
	return g, nil
}

// TLS gives what a listener speaks with the newest certificate: TLS 1.3, and
// clients may show a certificate of the file of authorities.
func (g *Guard) TLS(certificate func() (*tls.Certificate, error)) *tls.Config {
	var roots func() []*x509.Certificate
	if g != nil && g.roots != nil {
		roots = g.roots.newest
	}
	// Without one they may have a key, or ask for the agent's health.
	return pki.ServerConfig(certificate, roots, tls.VerifyClientCertIfGiven)
}

// Describe implements prometheus.Collector.
func (g *Guard) Describe(ch chan<- *prometheus.Desc) { g.asked.Describe(ch) }

// Collect implements prometheus.Collector.
func (g *Guard) Collect(ch chan<- prometheus.Metric) { g.asked.Collect(ch) }

// credential is by what somebody asks: a key or a certificate.
type credential struct {
	key         [sha256.Size]byte
	certificate *x509.Certificate // nil: it is the key
	from        netip.Addr
}

// caller is who asks. It lasts as long as a request or a stream.
type caller struct {
	credential
	name string
	rule atomic.Pointer[Rule] // as it was when the last message came
}

type callerKey struct{}

// The outcomes that are counted.
const (
	admitted = "admitted"
	unknown  = "unknown" // no key or certificate, or one of nobody
	slowed   = "slowed"  // it came from an address that many wrong keys came from
	expired  = "expired"
	tooOften = "rate"
	noModel  = "model" // of those admitted, what asked for a model that it may not have
)

func (g *Guard) count(name, outcome string) { g.asked.WithLabelValues(name, outcome).Inc() }

var errNoKey = oip.Errorf(oip.Unauthenticated, "an API key is needed: Authorization: Bearer KEY; or a client certificate")

// key reads the value of an Authorization header: "Bearer KEY", or "Basic"
// with the key as the password.
func key(authorization string) (string, bool) {
	scheme, key, _ := strings.Cut(strings.TrimSpace(authorization), " ")
	key = strings.TrimSpace(key)
	if strings.EqualFold(scheme, "Basic") {
		pair, err := base64.StdEncoding.DecodeString(key)
		_, key, ok := strings.Cut(string(pair), ":")
		return key, err == nil && ok
	}
	return key, strings.EqualFold(scheme, "Bearer")
}

// identify says by what somebody asks.
func (g *Guard) identify(authorization, remote string, state *tls.ConnectionState) (*caller, error) {
	c := &caller{}
	if at, err := netip.ParseAddrPort(remote); err == nil {
		c.from = place(at.Addr())
	}
	if authorization != "" {
		text, ok := key(authorization)
		if !ok {
			g.count("", unknown)
			return nil, errNoKey
		}
		c.key = sha256.Sum256([]byte(text))
	} else if state != nil && len(state.VerifiedChains) > 0 && g.roots != nil {
		c.certificate = state.PeerCertificates[0]
	} else {
		g.count("", unknown)
		return nil, errNoKey
	}
	return c, nil
}

// admit looks a caller up in the newest rules, and takes one request from its
// rate.
func (g *Guard) admit(c *caller) error {
	now := g.now()
	if err := g.look(c, now); err != nil {
		return err
	}
	rule := c.rule.Load()
	if wait := g.take(c.name, rule, now); wait > 0 {
		g.count(c.name, tooOften)
		return &oip.Error{Code: oip.TooOften, Err: fmt.Errorf("%s may ask %s, with %d at once", rule.what(c.name), rule.Rate, rule.Burst), RetryAfter: wait}
	}
	g.count(c.name, admitted)
	return nil
}

// look gives a caller its rule.
func (g *Guard) look(c *caller, now time.Time) error {
	rule, err := g.find(c, now)
	if err != nil {
		return err
	}
	if !rule.Expires.IsZero() && !now.Before(rule.Expires) {
		g.count(c.name, expired)
		return oip.Errorf(oip.Unauthenticated, "%s may ask until %s, which is over", rule.what(c.name), rule.Expires.Format(time.RFC3339))
	}
	c.rule.Store(rule)
	return nil
}

// all is the rule of whom no rule restricts.
var all = &Rule{}

// find gives the rule for a caller, whose name it sets.
func (g *Guard) find(c *caller, now time.Time) (*Rule, error) {
	if c.certificate != nil {
		common := c.certificate.Subject.CommonName
		c.name = strings.ToValidUTF8(common[:min(len(common), maxName)], "")
		if now.After(c.certificate.NotAfter) { // since the connection began
			g.count(c.name, expired)
			return nil, oip.Errorf(oip.Unauthenticated, "the client certificate of %.64q has expired", c.name)
		}
		if common == "" {
			g.count("", unknown)
			return nil, oip.Errorf(oip.Unauthenticated, "the client certificate has no common name")
		}
		if g.rules == nil {
			return all, nil
		}
		r := g.rules.newest().certificateOf(common)
		if r == nil {
			g.count("", unknown)
			return nil, oip.Errorf(oip.Unauthenticated, "no line of this agent's file of API keys is for the client certificate of %.64q", c.name)
		}
		if r.Name != "" {
			c.name = r.Name
		}
		return r, nil
	}
	if wait := g.wrong.wait(c.from, c.key, now); wait > 0 {
		g.count("", slowed)
		return nil, &oip.Error{Code: oip.TooOften, Err: fmt.Errorf("too many wrong API keys came from %s", c.from), RetryAfter: wait}
	}
	var r *Rule
	if g.rules != nil {
		r = g.rules.newest().key(c.key)
	}
	if r == nil {
		g.wrong.failed(c.from, now)
		g.count("", unknown)
		return nil, oip.Errorf(oip.Unauthenticated, "the API key is not one of this agent's")
	}
	g.wrong.passed(c.from, c.key)
	c.name = r.Name
	return r, nil
}

// take takes one request from a caller's rate. Where there is none, it says
// when there will be.
func (g *Guard) take(name string, r *Rule, now time.Time) time.Duration {
	if r.Rate.Count == 0 {
		return 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.buckets[name]
	switch {
	case b == nil:
		makeRoom(g.buckets, maxBuckets)
		b = &bucket{rate.NewLimiter(r.Rate.limit(), r.Burst), r}
		g.buckets[name] = b
	case b.rule != r: // the file has been read again, or the name has two keys
		b.limiter.SetLimitAt(now, r.Rate.limit())
		b.limiter.SetBurstAt(now, r.Burst)
		b.rule = r
	}
	if b.limiter.AllowN(now, 1) {
		return 0
	}
	return untilOne(b.limiter, now)
}

// untilOne says how long a limiter needs to allow one more.
func untilOne(l *rate.Limiter, now time.Time) time.Duration {
	return max(time.Millisecond, time.Duration((1-l.TokensAt(now))/float64(l.Limit())*float64(time.Second)))
}

// makeRoom takes something out of a map that has as much as it may.
func makeRoom[K comparable, V any](m map[K]V, most int) {
	for k := range m {
		if len(m) < most {
			return
		}
		delete(m, k)
	}
}

// Model says whether the caller of a request may ask for a model; with "",
// for what concerns all of them.
func (g *Guard) Model(ctx context.Context, model string) error {
	if g == nil {
		return nil
	}
	c, _ := ctx.Value(callerKey{}).(*caller)
	if c == nil { // it asks for the agent's health
		return errNoKey
	}
	r := c.rule.Load()
	switch {
	case r.allows(model):
		return nil
	case model == "":
		g.count(c.name, noModel)
		return oip.Errorf(oip.Forbidden, "%s may ask for models %s, and this concerns all models", r.what(c.name), strings.Join(r.Models, ", "))
	}
	g.count(c.name, noModel)
	return oip.Errorf(oip.Forbidden, "%s may not ask for model %.64q, but for %s", r.what(c.name), model, strings.Join(r.Models, ", "))
}

// Sees says whether the caller of a request may know of a model.
func (g *Guard) Sees(ctx context.Context, model string) bool {
	if g == nil {
		return true
	}
	c, _ := ctx.Value(callerKey{}).(*caller)
	return c != nil && c.rule.Load().allows(model)
}

// open paths and methods are answered to everybody: what orchestrators ask to
// see whether the agent lives.
func openPath(path string) bool {
	return path == "/healthz" || path == "/v2/health/live" || path == "/v2/health/ready"
}

func openMethod(method string) bool {
	switch method {
	case "/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady", "/grpc.health.v1.Health/Check":
		return true
	}
	return false
}

// metricsPath shows figures of all models.
const metricsPath = "/metrics"

// Handler lets next answer requests that may be.
func (g *Guard) Handler(next http.Handler) http.Handler {
	if g == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if openPath(r.URL.Path) {
			next.ServeHTTP(w, r)
			return
		}
		c, err := g.identify(r.Header.Get("Authorization"), r.RemoteAddr, r.TLS)
		if err == nil {
			err = g.admit(c)
		}
		ctx := context.WithValue(r.Context(), callerKey{}, c)
		if err == nil && r.URL.Path == metricsPath {
			err = g.Model(ctx, "")
		}
		if err != nil {
			if oip.CodeOf(err) == oip.Unauthenticated {
				w.Header().Set("WWW-Authenticate", "Bearer")
			}
			rest.WriteError(w, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// Enter is Handler for a call of gRPC, before its message is read: it gives
// the context of the call.
func (g *Guard) Enter(ctx context.Context, method string) (context.Context, error) {
	if g == nil {
		return ctx, nil
	}
	var authorization, remote string
	if values := metadata.ValueFromIncomingContext(ctx, "authorization"); len(values) > 0 {
		authorization = values[0]
	}
	var state *tls.ConnectionState
	if p, ok := peer.FromContext(ctx); ok {
		remote = p.Addr.String()
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			state = &info.State
		}
	}
	// Who asks for the health of a model has to say who it is.
	if openMethod(method) && authorization == "" && (state == nil || len(state.VerifiedChains) == 0) {
		return ctx, nil
	}
	c, err := g.identify(authorization, remote, state)
	switch {
	case err != nil:
	case method == inference.GRPCInferenceService_ModelStreamInfer_FullMethodName: // its messages count
		err = g.look(c, g.now())
	default:
		err = g.admit(c)
	}
	if err != nil {
		return ctx, err
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

// Message counts one more message of a stream that Enter let in, and says
// whether its caller may still send one.
func (g *Guard) Message(ctx context.Context) error {
	if g == nil {
		return nil
	}
	c, _ := ctx.Value(callerKey{}).(*caller)
	if c == nil {
		return errNoKey
	}
	return g.admit(c)
}
