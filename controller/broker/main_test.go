package broker

import (
	"bytes"
	"cmp"
	"context"
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
	secrets map[string]string
}

func newAccounts(devices ...string) *accounts {
	a := &accounts{secrets: map[string]string{}}
	for _, d := range devices {
		a.secrets[d] = secretOf(d)
	}
	return a
}

func secretOf(device string) string { return "secret of " + device }

func (a *accounts) AuthenticateDevice(_ context.Context, device, secret string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	want, ok := a.secrets[device]
	return ok && want == secret
}

func (a *accounts) remove(device string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.secrets, device)
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

// credentials are what a client connects with. The zero values of user and
// client id are the device, that of the secret the device's.
type credentials struct {
	device, user, secret, clientID string
	anonymous                      bool
	willTopic, will                string
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
		AddBroker("tcp://" + address).
		SetClientID(cmp.Or(cr.clientID, cr.device)).
		SetProtocolVersion(4).
		SetAutoReconnect(false).
		SetConnectTimeout(patience).
		SetWriteTimeout(patience).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { c.inbox.handle(m.Topic(), m.Payload()) }).
		SetConnectionLostHandler(func(paho.Client, error) { close(c.cut) }).
		SetCustomOpenConnectionFn(func(uri *url.URL, _ paho.ClientOptions) (net.Conn, error) {
			nc, err := net.Dial("tcp", uri.Host)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.conn = nc
			return nc, err
		})
	if !cr.anonymous {
		opts.SetUsername(cmp.Or(cr.user, cr.device)).SetPassword(cmp.Or(cr.secret, secretOf(cr.device)))
	}
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
