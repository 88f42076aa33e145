package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	brokerpackets "github.com/mochi-mqtt/server/v2/packets"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// site is who can know each other in a test: an authority, a broker with a
// certificate for 127.0.0.1, and the device "dev".
type site struct {
	authority *pki.Authority
	broker    *tls.Certificate
	device    *tls.Certificate
	strangers bool // those without a certificate may connect
}

func newSite(t *testing.T) *site {
	t.Helper()
	ok := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := pki.NewKey()
	ok(err)
	a, err := pki.NewAuthority(key, time.Now(), time.Hour)
	ok(err)
	brokerKey, err := pki.NewKey()
	ok(err)
	broker, err := a.IssueController([]string{"127.0.0.1"}, brokerKey.Public(), time.Now(), time.Hour)
	ok(err)
	s := &site{authority: a, broker: &tls.Certificate{Certificate: pki.Raw(a.Chain(broker)), PrivateKey: brokerKey}}
	s.device = s.issue(t, time.Now())
	return s
}

// issue makes a device's certificate that lasts an hour.
func (s *site) issue(t *testing.T, at time.Time) *tls.Certificate {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	device, err := s.authority.IssueDevice("dev", key.Public(), at, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: pki.Raw(s.authority.Chain(device)), PrivateKey: key, Leaf: device}
}

// server is the broker's side of TLS.
func (s *site) server() *tls.Config {
	auth := tls.RequireAndVerifyClientCert
	if s.strangers {
		auth = tls.VerifyClientCertIfGiven
	}
	return pki.ServerConfig(func() (*tls.Certificate, error) { return s.broker, nil },
		func() []*x509.Certificate { return []*x509.Certificate{s.authority.Certificate} }, auth)
}

// client is the device's side of TLS.
func (s *site) client() *tls.Config {
	return pki.ClientConfig(pki.Client{
		Trust:       func() pki.Trust { return pki.Trust{Roots: []*x509.Certificate{s.authority.Certificate}} },
		Certificate: func() *tls.Certificate { return s.device },
	}, "127.0.0.1")
}

// rules is the broker's hook: who may connect and subscribe.
type rules struct {
	mochi.HookBase
	mu      sync.Mutex
	refused bool   // nobody may connect
	denied  string // filter that may not be subscribed
}

func (r *rules) ID() string { return "rules" }
func (r *rules) Provides(b byte) bool {
	return bytes.Contains([]byte{mochi.OnConnectAuthenticate, mochi.OnACLCheck}, []byte{b})
}
func (r *rules) OnConnectAuthenticate(cl *mochi.Client, p brokerpackets.Packet) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	certs := cl.Net.Conn.(*tls.Conn).ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return !r.refused && string(p.Connect.Username) == RenewUser && string(p.Connect.Password) == RenewUser
	}
	device, ok := pki.DeviceOf(certs[0])
	return ok && !r.refused && string(p.Connect.Username) == device && (p.Connect.ClientIdentifier == device || p.Connect.ClientIdentifier == DataClient(device)) && !p.Connect.PasswordFlag
}
func (r *rules) OnACLCheck(_ *mochi.Client, topic string, write bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return write || topic != r.denied
}
func (r *rules) set(refused bool, denied string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refused, r.denied = refused, denied
}

type testBroker struct {
	*mochi.Server
	*site
	rules    *rules
	address  string
	received chan message
	stop     func() // may be called again
}

func startBroker(t *testing.T, address string) *testBroker {
	t.Helper()
	return newSite(t).startBroker(t, address)
}

func (s *site) startBroker(t *testing.T, address string) *testBroker {
	t.Helper()
	b := &testBroker{
		Server:   mochi.New(&mochi.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler)}),
		site:     s,
		rules:    &rules{},
		received: make(chan message, 1024),
	}
	tcp := listeners.NewTCP(listeners.Config{ID: "t", Address: address, TLSConfig: s.server()})
	for _, err := range []error{
		b.AddHook(b.rules, nil), b.AddListener(tcp),
		b.Subscribe(UpFilter, 1, func(_ *mochi.Client, _ brokerpackets.Subscription, p brokerpackets.Packet) {
			b.received <- message{topic: p.TopicName, payload: bytes.Clone(p.Payload)}
		}),
		b.Serve(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	b.stop = sync.OnceFunc(func() { b.Close() })
	t.Cleanup(b.stop)
	b.address = tcp.Address()
	return b
}

// next gives the next message that the broker received, which must be of kind.
func next[M proto.Message](t *testing.T, b *testBroker, kind string, m M) M {
	t.Helper()
	got := within(t, b.received, "message of kind "+kind)
	if got.topic != Up("dev", kind) {
		t.Fatalf("the broker received %s, want kind %s", got.topic, kind)
	}
	if err := proto.Unmarshal(got.payload, m); err != nil {
		t.Fatal(err)
	}
	return m
}

func (b *testBroker) send(t *testing.T, topic string, m proto.Message) {
	t.Helper()
	payload, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Publish(topic, payload, false, 0); err != nil {
		t.Fatal(err)
	}
}

// cut closes the device's connection as a fault of the network does.
func (b *testBroker) cut(t *testing.T) {
	t.Helper()
	c, ok := b.Clients.Get("dev")
	if !ok {
		t.Fatal("the broker does not know the device")
	}
	c.Net.Conn.Close()
}

// cleared waits until the broker is done with the device's last connection.
func (b *testBroker) cleared(ctx context.Context) error {
	for {
		if _, ok := b.Clients.Get("dev"); !ok {
			return nil
		}
		if !sleep(ctx, time.Millisecond) {
			return ctx.Err()
		}
	}
}

func within[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s within %s", what, patience)
		panic("unreachable")
	}
}

// awaitState waits until the link is in a state.
func awaitState(t *testing.T, l *Link, want State) error {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s, err := l.State()
		if s == want {
			return err
		}
		if time.Now().After(end) {
			t.Fatalf("link is %s (%v), not %s within %s", s, err, want, patience)
		}
	}
}

// logged counts log records by level.
type logged struct {
	slog.Handler
	mu     sync.Mutex
	levels map[slog.Level]int
}

func newLogged() *logged {
	return &logged{Handler: slog.DiscardHandler, levels: map[slog.Level]int{}}
}
func (h *logged) Enabled(context.Context, slog.Level) bool { return true }
func (h *logged) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h *logged) Handle(_ context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.levels[r.Level]++
	return nil
}
func (h *logged) count(l slog.Level) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.levels[l]
}

// running is a link whose Run was started.
type running struct {
	*Link
	attempts chan struct{} // receives at each attempt to connect
	log      *logged
	stop     func() // ends Run and waits for it; may be called again
}

func start(t *testing.T, s *site, address string, change func(*Config)) *running {
	t.Helper()
	r := &running{attempts: make(chan struct{}, 1024), log: newLogged()}
	cfg := Config{
		BrokerURL: "mqtts://" + address, Device: "dev", TLS: s.client, BootID: "boot", Log: slog.New(r.log),
		Hello:      func() *dunlinv1.Hello { return &dunlinv1.Hello{Labels: map[string]string{"site": "test"}} },
		MaxBackoff: 20 * time.Millisecond,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			r.attempts <- struct{}{}
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}
	if change != nil {
		change(&cfg)
	}
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Link = l
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.Run(ctx); err != context.Canceled {
			t.Errorf("Run: %v", err)
		}
	}()
	r.stop = func() {
		cancel()
		within(t, done, "end of Run")
	}
	t.Cleanup(r.stop)
	return r
}
