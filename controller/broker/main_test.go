package broker

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds each wait for something that must happen.
const patience = 30 * time.Second

// eventually waits until ok says yes.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// accounts is an Authenticator over a map.
type accounts struct {
	mu      sync.Mutex
	devices map[string]bool
}

func newAccounts(devices ...string) *accounts {
	a := &accounts{devices: map[string]bool{}}
	for _, d := range devices {
		a.devices[d] = true
	}
	return a
}

func (a *accounts) Device(_ context.Context, cert *x509.Certificate) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if name := cert.Subject.CommonName; a.devices[name] {
		return name, nil
	}
	return "", errors.New("the device is revoked or unknown")
}

func (a *accounts) Enrolling(_ context.Context, user, password, from string) bool {
	return from != "" && password == passwordOf(user)
}

func (a *accounts) remove(device string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.devices, device)
}

// passwordOf gives the password of a user that enrols.
func passwordOf(user string) string {
	if user == link.RenewUser {
		return user
	}
	return "token of " + user
}

// certified holds keys and certificates of the authority that all tests trust.
// They count in real time and in that of a synctest bubble.
var certified struct {
	mu        sync.Mutex
	authority *pki.Authority
	key       crypto.Signer // everybody's: making keys takes time
	issued    map[string]*tls.Certificate
}

// certificateOf gives a device's certificate; that of ControllerUser is the
// controller's, for 127.0.0.1.
func certificateOf(device string) *tls.Certificate {
	c := &certified
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.authority == nil {
		c.authority, c.key, c.issued = newAuthority(), must(pki.NewKey()), map[string]*tls.Certificate{}
	}
	if c.issued[device] == nil {
		c.issued[device] = issue(c.authority, c.key, device)
	}
	return c.issued[device]
}

// trusted is the authority of certificateOf.
func trusted() *pki.Authority {
	certificateOf(ControllerUser)
	return certified.authority
}

var longAgo = time.Date(1999, time.December, 1, 0, 0, 0, 0, time.UTC)

const century = 100 * 365 * 24 * time.Hour

func newAuthority() *pki.Authority {
	return must(pki.NewAuthority(must(pki.NewKey()), longAgo, century))
}

func issue(a *pki.Authority, key crypto.Signer, device string) *tls.Certificate {
	var leaf *x509.Certificate
	if device == ControllerUser {
		leaf = must(a.IssueController([]string{"127.0.0.1"}, key.Public(), longAgo, century))
	} else {
		leaf = must(a.IssueDevice(device, key.Public(), longAgo, century))
	}
	return &tls.Certificate{Certificate: pki.Raw(a.Chain(leaf)), PrivateKey: key, Leaf: leaf}
}

// expired is a device's certificate that counts no more.
func expired(device string) *tls.Certificate {
	key := must(pki.NewKey())
	leaf := must(trusted().IssueDevice(device, key.Public(), longAgo, time.Hour))
	return &tls.Certificate{Certificate: pki.Raw(trusted().Chain(leaf)), PrivateKey: key, Leaf: leaf}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func serverTLS() *tls.Config {
	return pki.ServerConfig(func() (*tls.Certificate, error) { return certificateOf(ControllerUser), nil },
		func() []*x509.Certificate { return []*x509.Certificate{trusted().Certificate} }, tls.VerifyClientCertIfGiven)
}

// clientTLS shows a certificate, or none.
func clientTLS(own *tls.Certificate) *tls.Config {
	return pki.ClientConfig(pki.Client{
		Trust:       func() pki.Trust { return pki.Trust{Roots: []*x509.Certificate{trusted().Certificate}} },
		Certificate: func() *tls.Certificate { return own },
	}, "127.0.0.1")
}

// syncBuffer is a log to look into.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func testLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// inbox is a Handler's messages, in order of arrival.
type inbox chan message

func newInbox() inbox { return make(inbox, 10_000) }

func (in inbox) handle(topic string, payload []byte) { in <- message{topic, payload} }

// want takes the next message, which must be this one.
func (in inbox) want(t testing.TB, topic, payload string) {
	t.Helper()
	select {
	case m := <-in:
		if m.topic != topic || string(m.payload) != payload {
			t.Fatalf("got %.80q on %s, want %.80q on %s", m.payload, m.topic, payload, topic)
		}
	case <-time.After(patience):
		t.Fatalf("%.80q on %s has not come within %v", payload, topic, patience)
	}
}

// start runs a bus until the test ends, or until stop is called.
func start(t testing.TB, bus Bus, handle Handler) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- bus.Run(ctx, handle) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Errorf("Run has not ended within %v", patience)
		}
	})
	t.Cleanup(stop)
	return stop
}

// credentials are what a client connects with. The zero value of the client id
// is the device, that of the certificate the device's.
type credentials struct {
	device, user, password, clientID string
	certificate                      *tls.Certificate
	anonymous                        bool // no certificate
	willTopic, will                  string
}

// client is a device's MQTT client.
type client struct {
	t     testing.TB
	paho  paho.Client
	inbox inbox
	cut   chan struct{} // closed when the broker has ended the connection
	mu    sync.Mutex
	conn  net.Conn
}

// dial connects a device, or returns the error.
func dial(t testing.TB, address string, cr credentials) (*client, error) {
	t.Helper()
	c := &client{t: t, inbox: newInbox(), cut: make(chan struct{})}
	opts := paho.NewClientOptions().
		AddBroker("tcp://" + address). // which is over TLS all the same
		SetClientID(cmp.Or(cr.clientID, cr.device)).
		SetUsername(cr.user).
		SetPassword(cr.password).
		SetProtocolVersion(4).
		SetAutoReconnect(false).
		SetConnectTimeout(patience).
		SetWriteTimeout(patience).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { c.inbox.handle(m.Topic(), m.Payload()) }).
		SetConnectionLostHandler(func(paho.Client, error) { close(c.cut) }).
		SetCustomOpenConnectionFn(func(uri *url.URL, _ paho.ClientOptions) (net.Conn, error) {
			own := cr.certificate
			if own == nil && !cr.anonymous {
				own = certificateOf(cr.device)
			}
			nc, err := tls.Dial("tcp", uri.Host, clientTLS(own))
			if err != nil {
				return nil, err
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.conn = nc.NetConn()
			return nc, nil
		})
	if cr.willTopic != "" {
		opts.SetWill(cr.willTopic, cr.will, 0, false)
	}
	c.paho = paho.NewClient(opts)
	token := c.paho.Connect()
	if !token.WaitTimeout(patience) {
		t.Fatalf("connect as %s: no answer", cr.device)
	}
	if err := token.Error(); err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.paho.Disconnect(250) })
	return c, nil
}

func mustDial(t testing.TB, address string, cr credentials) *client {
	t.Helper()
	c, err := dial(t, address, cr)
	if err != nil {
		t.Fatalf("connect as %s: %v", cr.device, err)
	}
	return c
}

func (c *client) publish(topic, payload string) {
	c.t.Helper()
	token := c.paho.Publish(topic, 0, false, payload)
	if !token.WaitTimeout(patience) || token.Error() != nil {
		c.t.Fatalf("publish on %s: %v", topic, token.Error())
	}
}

// subscribe returns the granted QoS of each filter, 0x80 for a refused one.
func (c *client) subscribe(filters ...string) map[string]byte {
	c.t.Helper()
	granted := map[string]byte{}
	for _, f := range filters {
		token := c.paho.Subscribe(f, 0, nil).(*paho.SubscribeToken)
		if !token.WaitTimeout(patience) {
			c.t.Fatalf("subscribe to %s: no answer", f)
		}
		if len(token.Result()) != 1 {
			c.t.Fatalf("subscribe to %s: %v, %v", f, token.Result(), token.Error())
		}
		for _, code := range token.Result() { // the key has no $share
			granted[f] = code
		}
	}
	return granted
}

func (c *client) mustSubscribe(filters ...string) {
	c.t.Helper()
	for f, code := range c.subscribe(filters...) {
		if code != 0 {
			c.t.Fatalf("subscribe to %s: code %#x", f, code)
		}
	}
}

// vanish ends the connection without a goodbye.
func (c *client) vanish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn.Close()
}

func (c *client) wantCut() {
	c.t.Helper()
	select {
	case <-c.cut:
	case <-time.After(patience):
		c.t.Fatalf("not cut off within %v", patience)
	}
}

func devices(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("dev-%d", i)
	}
	return slices.Clip(names)
}
