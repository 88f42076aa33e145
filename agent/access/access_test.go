package access

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/telemetry"
)

// clock is a time that a test sets.
type clock struct{ time.Time }

func (c *clock) now() time.Time       { return c.Time }
func (c *clock) pass(d time.Duration) { c.Time = c.Add(d) }
func newClock() *clock                { return &clock{time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)} }
func fileWith(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "keys")
	write(t, p, text)
	return p
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// guard gives one with a file of rules, its clock and its log.
func guard(t *testing.T, text string) (*Guard, *clock, *bytes.Buffer) {
	t.Helper()
	c, log := newClock(), new(bytes.Buffer)
	g, err := New(Config{Rules: fileWith(t, text), Log: slog.New(slog.NewTextHandler(log, nil)), Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return g, c, log
}

// get asks a guarded handler, and gives the status and the error.
func get(g *Guard, path, authorization, from string, model string) *httptest.ResponseRecorder {
	h := g.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if model != "" {
			if err := g.Model(r.Context(), model); err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	r := httptest.NewRequest(http.MethodGet, path, nil)
	r.RemoteAddr = from
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

const here = "127.0.0.1:4711"

func TestWhoIsLetIn(t *testing.T) {
	g, _, _ := guard(t, goodKey+"\n"+anotherKey+"\n")
	basic := func(pair string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(pair)) }
	n := 0
	for header, ok := range map[string]bool{
		"Bearer " + goodKey: true, "bearer " + goodKey: true, "Bearer " + anotherKey: true, basic("anyone:" + goodKey): true,
		"": false, "Bearer": false, "Bearer ": false, "Bearer # of the shop": false, goodKey: false, "Bearer " + goodKey + "1": false,
		basic(goodKey + ":"): false, basic(goodKey): false, "Basic !!!": false, "Digest " + goodKey: false,
	} {
		n++ // an address for each
		w := get(g, "/v2/models/m", header, fmt.Sprintf("10.0.0.%d:1", n), "m")
		if ok && w.Code != 204 || !ok && (w.Code != 401 || w.Header().Get("WWW-Authenticate") != "Bearer" || !strings.Contains(w.Body.String(), `{"error":"`)) {
			t.Errorf("%q: %d %v %s", header, w.Code, w.Header(), w.Body)
		}
	}
	for path, want := range map[string]int{
		"/v2/health/live": 204, "/v2/health/ready": 204, "/healthz": 204, "/metrics": 401, "/v2/models/m/infer": 401, "/v2/health/ready/../../models/m": 401,
	} {
		if w := get(g, path, "", here, ""); w.Code != want {
			t.Errorf("%s without a key: %d", path, w.Code)
		}
	}
	var none *Guard
	if w := get(none, "/v2/models/m", "", here, "m"); w.Code != 204 {
		t.Errorf("without a guard: %d", w.Code)
	}
	if ctx, err := none.Enter(t.Context(), "/x"); err != nil || none.Message(ctx) != nil || !none.Sees(ctx, "m") {
		t.Errorf("without a guard, gRPC: %v", err)
	}
}

func TestModels(t *testing.T) {
	g, _, _ := guard(t, goodKey+" name=camera-1 models=digits,vision*\n"+anotherKey+"\n")
	for _, tt := range []struct {
		path, key, model string
		want             int
		says             string
	}{
		{"/v2/models/digits", goodKey, "digits", 204, ""},
		{"/v2/models/vision-2", goodKey, "vision-2", 204, ""},
		{"/v2/models/words", goodKey, "words", 403, `API key "camera-1" may not ask for model "words", but for digits, vision*`},
		{"/v2/models/words", anotherKey, "words", 204, ""},
		{"/metrics", goodKey, "", 403, "this concerns all models"},
		{"/metrics", anotherKey, "", 204, ""},
	} {
		w := get(g, tt.path, "Bearer "+tt.key, here, tt.model)
		if w.Code != tt.want || !strings.Contains(strings.ReplaceAll(w.Body.String(), `\"`, `"`), tt.says) {
			t.Errorf("%s: %d %s", tt.path, w.Code, w.Body)
		}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(g)
	w := httptest.NewRecorder()
	telemetry.Handler(registry).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, line := range []string{`{name="camera-1",outcome="admitted"} 4`, `{name="camera-1",outcome="model"} 2`, `{name="key-251a2d1e",outcome="admitted"} 2`} {
		if !strings.Contains(w.Body.String(), "dunlin_access_requests_total"+line+"\n") {
			t.Errorf("no %s in %s", line, w.Body)
		}
	}
}

func TestRate(t *testing.T) {
	g, clock, _ := guard(t, goodKey+" name=camera-1 rate=2/s burst=3\n"+anotherKey+" name=camera-1 rate=2/s burst=3\n")
	ask := func(key string) *httptest.ResponseRecorder { return get(g, "/v2/models/m", "Bearer "+key, here, "m") }
	for i, key := range []string{goodKey, anotherKey, goodKey} { // two keys of one name share its rate
		if w := ask(key); w.Code != 204 {
			t.Errorf("request %d: %d", i, w.Code)
		}
	}
	w := ask(goodKey)
	if w.Code != 429 || w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), `may ask 2/s, with 3 at once`) {
		t.Errorf("beyond the burst: %d %v %s", w.Code, w.Header(), w.Body)
	}
	clock.pass(500 * time.Millisecond)
	if w := ask(anotherKey); w.Code != 204 {
		t.Errorf("half a second later: %d", w.Code)
	}
	if w := ask(goodKey); w.Code != 429 {
		t.Errorf("and again: %d", w.Code)
	}
	// The rate of a file that is read again counts from then on.
	clock.pass(lookEvery)
	write(t, g.rules.path, goodKey+" name=camera-1 rate=100/s burst=100\n")
	for i := range 3 {
		if w := ask(goodKey); w.Code != 204 {
			t.Errorf("request %d with another rate: %d %s", i, w.Code, w.Body)
		}
		clock.pass(lookEvery)
	}
}

func TestExpiry(t *testing.T) {
	g, clock, _ := guard(t, goodKey+" name=guest expires=2026-11-29\n")
	if w := get(g, "/v2", "Bearer "+goodKey, here, ""); w.Code != 204 {
		t.Errorf("on the last day: %d", w.Code)
	}
	clock.pass(12 * time.Hour)
	if w := get(g, "/v2", "Bearer "+goodKey, here, ""); w.Code != 401 || !strings.Contains(w.Body.String(), "may ask until 2026-11-30T00:00:00Z") {
		t.Errorf("after it: %d %s", w.Code, w.Body)
	}
}

func TestReadAgain(t *testing.T) {
	g, clock, log := guard(t, goodKey)
	status := func(key, from string) int { return get(g, "/v2", "Bearer "+key, from, "").Code }
	write(t, g.rules.path, anotherKey+" name=new\n")
	if status(goodKey, here) != 204 {
		t.Error("the file is looked at too often")
	}
	clock.pass(lookEvery)
	if status(anotherKey, here) != 204 || status(goodKey, here) != 401 {
		t.Error("a changed file is not read")
	}
	write(t, g.rules.path, "short\n")
	for range 3 {
		clock.pass(lookEvery)
		if status(anotherKey, here) != 204 {
			t.Error("a broken file took the keys away")
		}
	}
	if n := strings.Count(log.String(), "what it held before stays in force"); n != 1 || !strings.Contains(log.String(), ":1: the key has 5 characters") {
		t.Errorf("%d messages: %s", n, log)
	}
	if err := os.Remove(g.rules.path); err != nil {
		t.Fatal(err)
	}
	clock.pass(lookEvery)
	if status(anotherKey, here) != 204 {
		t.Error("a file that is gone took the keys away")
	}
	write(t, g.rules.path, goodKey+"\n")
	clock.pass(lookEvery)
	if status(goodKey, here) != 204 || status(anotherKey, here) != 401 {
		t.Error("a file that is whole again is not read")
	}
	if strings.Contains(log.String(), goodKey) || strings.Contains(log.String(), anotherKey) {
		t.Errorf("a key is in the log: %s", log)
	}
}

// Who guesses is not told any more whether a key is right; who has shown a
// right key from the same address before goes on.
func TestWrongKeysAreSlowed(t *testing.T) {
	g, clock, _ := guard(t, goodKey+"\n"+anotherKey+"\n")
	status := func(key, from string) int { return get(g, "/v2", "Bearer "+key, from, "").Code }
	const guesser, neighbour, elsewhere = "[2001:db8::1]:1", "[2001:db8::2]:2", "[2001:db8:0:1::1]:3"
	if status(goodKey, neighbour) != 204 {
		t.Fatal("the neighbour's first request")
	}
	for i := range wrongBurst {
		if got := status(fmt.Sprint("wrong-", i), guesser); got != 401 {
			t.Fatalf("guess %d: %d", i, got)
		}
	}
	w := get(g, "/v2", "Bearer "+anotherKey, guesser, "")
	if w.Code != 429 || w.Header().Get("Retry-After") != "5" {
		t.Errorf("a right key after too many wrong ones: %d %v", w.Code, w.Header())
	}
	if status(goodKey, neighbour) != 204 {
		t.Error("a neighbour is shut out")
	}
	if status(anotherKey, elsewhere) != 204 {
		t.Error("another network is shut out")
	}
	clock.pass(wrongEvery)
	if got := status("wrong", guesser); got != 401 {
		t.Errorf("a guess after a while: %d", got)
	}
	if got := status(anotherKey, guesser); got != 429 {
		t.Errorf("and at once another: %d", got)
	}
	for i := range 2 * maxPlaces {
		g.wrong.failed(netip.AddrFrom4([4]byte{byte(i >> 16), byte(i >> 8), byte(i), 1}), clock.now())
		g.wrong.passed(netip.AddrFrom4([4]byte{byte(i >> 16), byte(i >> 8), byte(i), 1}), [32]byte{})
	}
	if len(g.wrong.wrong) > maxPlaces || len(g.wrong.right) > maxPlaces {
		t.Errorf("%d and %d addresses are known", len(g.wrong.wrong), len(g.wrong.right))
	}
}

// state is a connection on which a client has shown a certificate.
func state(name string, until time.Time) *tls.ConnectionState {
	c := &x509.Certificate{Subject: pkix.Name{CommonName: name}, NotAfter: until}
	return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}, VerifiedChains: [][]*x509.Certificate{{c}}}
}

func TestCertificates(t *testing.T) {
	clock := newClock()
	some := func(rules string) *Guard {
		g, err := New(Config{Rules: rules, ClientCA: fileWith(t, authority(t)), Log: slog.New(slog.DiscardHandler), Now: clock.now})
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	every, named := some(""), some(fileWith(t, "cert=door name=front models=digits\ncert=camera-* rate=1/h\n"+goodKey))
	later := clock.Add(time.Hour)
	ask := func(g *Guard, s *tls.ConnectionState, authorization string) (name string, err error) {
		c, err := g.identify(authorization, here, s)
		if err == nil {
			err = g.admit(c)
		}
		if err != nil {
			return "", err
		}
		return c.name, nil
	}
	for _, tt := range []struct {
		guard *Guard
		state *tls.ConnectionState
		key   string
		name  string
		says  string
	}{
		{every, state("anybody", later), "", "anybody", ""},
		{every, state("", later), "", "", "has no common name"},
		{every, state("anybody", clock.Add(-1)), "", "", `the client certificate of "anybody" has expired`},
		{every, &tls.ConnectionState{}, "", "", "an API key is needed"},
		{every, nil, "", "", "an API key is needed"},
		{every, nil, goodKey, "", "is not one of this agent's"},
		{named, state("door", later), "", "front", ""},
		{named, state("camera-1", later), "", "camera-1", ""},
		{named, state("camera-1", later), "", "", `certificate "camera-1" may ask 1/h, with 1 at once`},
		{named, state("camera-2", later), "", "camera-2", ""},
		{named, state("window", later), "", "", `no line of this agent's file of API keys is for the client certificate of "window"`},
		{named, state("window", later), goodKey, "key-", ""}, // a key goes before a certificate
	} {
		authorization := ""
		if tt.key != "" {
			authorization = "Bearer " + tt.key
		}
		name, err := ask(tt.guard, tt.state, authorization)
		if tt.says == "" && (err != nil || !strings.HasPrefix(name, tt.name)) || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("want %q or %q: %q, %v", tt.name, tt.says, name, err)
		}
	}
}

// authority gives the certificate of one that has vouched for nobody.
func authority(t *testing.T) string {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	a, err := pki.NewAuthority(key, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return string(pki.EncodeCertificates(a.Certificate))
}

func TestCalls(t *testing.T) {
	g, clock, _ := guard(t, goodKey+" name=camera-1 models=digits rate=1/m burst=2\n")
	const infer, stream, check = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer", "/grpc.health.v1.Health/Check"
	caller := func(authorization string) context.Context {
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1}, AuthInfo: credentials.TLSInfo{}})
		if authorization != "" {
			ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", authorization))
		}
		return ctx
	}
	// Health is for everybody, but not that of a model.
	ctx, err := g.Enter(caller(""), check)
	if err != nil || oip.CodeOf(g.Model(ctx, "digits")) != oip.Unauthenticated {
		t.Errorf("health without a key: %v", err)
	}
	if _, err := g.Enter(caller(""), infer); oip.CodeOf(err) != oip.Unauthenticated {
		t.Errorf("without a key: %v", err)
	}
	ctx, err = g.Enter(caller("Bearer "+goodKey), infer)
	if err != nil || g.Model(ctx, "digits") != nil || oip.CodeOf(g.Model(ctx, "words")) != oip.Forbidden || g.Sees(ctx, "words") || !g.Sees(ctx, "digits") {
		t.Errorf("with a key: %v", err)
	}
	// Of a stream, messages count.
	ctx, err = g.Enter(caller("Bearer "+goodKey), stream)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Message(ctx); err != nil {
		t.Errorf("the first message: %v", err)
	}
	if err := g.Message(ctx); oip.CodeOf(err) != oip.TooOften {
		t.Errorf("the second one: %v", err)
	}
	// A key that is taken away ends what has begun.
	clock.pass(time.Hour)
	write(t, g.rules.path, anotherKey+"\n")
	if err := g.Message(ctx); oip.CodeOf(err) != oip.Unauthenticated {
		t.Errorf("with a key that is gone: %v", err)
	}
}

// What anybody may send gives a key or a refusal, and never the wrong rule.
func FuzzAuthorization(f *testing.F) {
	for _, text := range []string{"", "Bearer " + goodKey, "Basic YTpi", "basic YTo6Og==", "Bearer  x ", "\xff Basic"} {
		f.Add(text, "[::1%eth0]:1")
	}
	f.Fuzz(func(t *testing.T, authorization, remote string) {
		g, _, _ := guard(t, goodKey+"\n")
		c, err := g.identify(authorization, remote, nil)
		if err == nil {
			err = g.admit(c)
		}
		if err != nil && oip.CodeOf(err) != oip.Unauthenticated {
			t.Fatalf("%v", err)
		}
		if err == nil && !strings.Contains(authorization, goodKey) && !strings.HasPrefix(strings.ToLower(strings.TrimSpace(authorization)), "basic") {
			t.Fatalf("%q is let in", authorization)
		}
	})
}
