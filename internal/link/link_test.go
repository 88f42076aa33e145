package link

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	brokerpackets "github.com/mochi-mqtt/server/v2/packets"
	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func desired(number uint64) *dunlinv1.Desired {
	document := []byte("document")
	sum := sha256.Sum256(document)
	return &dunlinv1.Desired{
		Generation: &dunlinv1.Generation{Incarnation: "i", Number: number},
		Sha256:     sum[:], SizeBytes: uint64(len(document)), Document: document,
	}
}

func TestSession(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	l := start(t, b.site, b.address, nil)

	within(t, l.Connected(), "signal of a new session")
	hello := next(t, b, Hello, new(dunlinv1.Hello))
	if hello.BootId != "boot" || hello.Session == "" || hello.Session != l.Session() || hello.Labels["site"] != "test" {
		t.Errorf("hello = %v, session %q", hello, l.Session())
	}
	if err := l.Send(Reported, &dunlinv1.Reported{Session: hello.Session, Sequence: 7}); err != nil {
		t.Fatal(err)
	}
	if r := next(t, b, Reported, new(dunlinv1.Reported)); r.Sequence != 7 {
		t.Errorf("reported = %v", r)
	}

	if err := b.Publish(Down("dev", Desired), []byte("\xff\xff"), false, 0); err != nil {
		t.Fatal(err)
	}
	b.send(t, Down("other", Desired), desired(9))
	b.send(t, Down("dev", Desired), desired(3))
	if m := within(t, l.Inbox(), "desired document"); !proto.Equal(m, desired(3)) {
		t.Errorf("inbox gave %v", m)
	}
	ack := &dunlinv1.Command{Command: &dunlinv1.Command_EventAck{EventAck: &dunlinv1.EventAck{OutboxId: "o", Sequence: 4}}}
	b.send(t, Down("dev", Command), ack)
	if m := within(t, l.Inbox(), "command"); !proto.Equal(m, ack) {
		t.Errorf("inbox gave %v", m)
	}
	if n := l.Malformed(); n != 1 {
		t.Errorf("%d malformed messages, want 1", n)
	}

	if err := l.Send(Reported, &dunlinv1.Reported{Sequence: 8}); err != nil {
		t.Fatal(err)
	}
	l.stop()
	if r := next(t, b, Reported, new(dunlinv1.Reported)); r.Sequence != 8 {
		t.Errorf("what was queued at the end came as %v", r)
	}
	if g := next(t, b, Gone, new(dunlinv1.Gone)); g.Session != hello.Session || g.BootId != "boot" {
		t.Errorf("gone = %v", g)
	}
	if err := l.Send(Reported, &dunlinv1.Reported{}); !errors.Is(err, ErrNotConnected) {
		t.Errorf("Send after the end: %v", err)
	}
	patient, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := b.cleared(patient); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-b.received:
		t.Errorf("after an orderly goodbye came %s", m.topic)
	default:
	}
}

func TestLostConnection(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	l := start(t, b.site, b.address, func(c *Config) {
		// This broker forgets a client that comes back while it cleans up
		// after the client's last connection.
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if err := b.cleared(ctx); err != nil {
				return nil, err
			}
			return new(net.Dialer).DialContext(ctx, network, address)
		}
	})
	last := ""
	for range 5 {
		within(t, l.Connected(), "signal of a new session")
		hello := next(t, b, Hello, new(dunlinv1.Hello))
		if hello.Session == last {
			t.Errorf("session %s began twice", last)
		}
		last = hello.Session
		b.cut(t)
		if g := next(t, b, Gone, new(dunlinv1.Gone)); g.Session != last || g.BootId != "boot" {
			t.Errorf("the will of session %s is %v", last, g)
		}
	}
}

func TestRefusedCredentials(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	b.rules.set(true, "")
	l := start(t, b.site, b.address, nil)
	if err := awaitState(t, l.Link, Refused); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("refused without a reason: %v", err)
	}
	for range 3 {
		within(t, l.attempts, "attempt to connect")
	}
	if n := l.log.count(slog.LevelWarn); n != 1 {
		t.Errorf("%d warnings were logged over several refusals, want 1", n)
	}
	if err := l.Send(Reported, &dunlinv1.Reported{}); !errors.Is(err, ErrNotConnected) {
		t.Errorf("Send: %v", err)
	}
	if len(b.received) != 0 {
		t.Error("the broker received a message from a refused device")
	}
	b.rules.set(false, "")
	within(t, l.Connected(), "session after the device was accepted")
	if s, err := l.State(); s != Connected || err != nil {
		t.Errorf("state %s, %v", s, err)
	}
}

// A certificate that one side does not take is named, and tried again.
func TestRefusedCertificate(t *testing.T) {
	for name, test := range map[string]struct {
		change func(s, other *site)
		want   string
	}{
		"expired":         {func(s, _ *site) { s.device = s.issue(t, time.Now().Add(-3*time.Hour)) }, "it has expired"},
		"other authority": {func(s, other *site) { s.device = other.device }, "does not know its authority"},
		"none":            {func(s, _ *site) { s.device = new(tls.Certificate) }, "certificate required"},
		"broker's expired": {func(s, _ *site) {
			*s.broker = *s.issue(t, time.Now().Add(-3*time.Hour))
		}, "certificate does not count now"},
		"broker's unknown":    {func(s, other *site) { *s.broker = *other.broker }, "authority that is not trusted"},
		"broker's other name": {func(s, _ *site) { *s.broker = *s.issue(t, time.Now()) }, "is not for it"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			test.change(s, newSite(t))
			l := start(t, s, s.deadBroker(t, func(net.Conn) {}), nil)
			if err := awaitState(t, l.Link, Refused); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("cause %v, want %q", err, test.want)
			}
			for range 3 {
				within(t, l.attempts, "attempt to connect")
			}
			if n := l.log.count(slog.LevelWarn); n != 1 {
				t.Errorf("%d warnings were logged over several refusals, want 1", n)
			}
		})
	}
}

func TestRefusedSubscription(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	b.rules.set(false, Down("dev", Command))
	l := start(t, b.site, b.address, nil)
	if err := awaitState(t, l.Link, Refused); err == nil || !strings.Contains(err.Error(), Down("dev", Command)) {
		t.Errorf("cause %v does not name the refused topic", err)
	}
}

func TestBrokerAway(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	l := start(t, b.site, b.address, nil)
	within(t, l.Connected(), "session")
	b.stop()
	if err := awaitState(t, l.Link, Unreachable); err == nil {
		t.Error("unreachable without a cause")
	}
	if id := l.Session(); id != "" {
		t.Errorf("session %s without a broker", id)
	}
	b = b.startBroker(t, b.address)
	within(t, l.Connected(), "session with the broker that came back")
	next(t, b, Hello, new(dunlinv1.Hello))
	if n := l.log.count(slog.LevelWarn); n != 1 {
		t.Errorf("%d warnings were logged for one outage", n)
	}
}

// A link that is to use another certificate connects once more, with it, and
// loses nothing that it took.
func TestReconnect(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	var certificate atomic.Pointer[tls.Certificate]
	certificate.Store(b.device)
	l := start(t, b.site, b.address, func(c *Config) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if err := b.cleared(ctx); err != nil { // see TestLostConnection
				return nil, err
			}
			return dial(ctx, network, address)
		}
		c.TLS = func() *tls.Config {
			s := *b.site
			s.device = certificate.Load()
			return s.client()
		}
	})
	within(t, l.Connected(), "session")
	first := next(t, b, Hello, new(dunlinv1.Hello)).Session
	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan uint64, 1)
	go func() {
		var n uint64
		for ctx.Err() == nil {
			if l.Send(Reported, &dunlinv1.Reported{Sequence: n + 1}) == nil {
				n++
			}
		}
		sent <- n
	}()
	var got uint64
	var others []message
	report := func() bool {
		m := within(t, b.received, "message")
		var r dunlinv1.Reported
		if m.topic != Up("dev", Reported) {
			others = append(others, m)
			return false
		}
		if err := proto.Unmarshal(m.payload, &r); err != nil || r.Sequence != got+1 {
			t.Fatalf("report %d after %d, %v", r.Sequence, got, err)
		}
		got++
		return true
	}
	for got < 100 {
		report()
	}
	other := b.issue(t, time.Now())
	certificate.Store(other)
	if err := l.Reconnect("mqtts://" + b.address); err != nil {
		t.Fatal(err)
	}
	for before := got; got < before+2000 || len(others) < 2; {
		report()
	}
	cancel()
	for n := within(t, sent, "end of the sender"); got < n; {
		report()
	}
	if len(l.attempts) != 2 || len(others) != 2 || others[0].topic != Up("dev", Gone) || others[1].topic != Up("dev", Hello) || l.Session() == first {
		t.Errorf("%d connections, in between came %v", len(l.attempts), others)
	}
	c, _ := b.Clients.Get("dev")
	if !c.Net.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Equal(other.Leaf) {
		t.Error("the certificate is the old one")
	}
	if err := l.Reconnect("tcp://127.0.0.1:1883"); err == nil {
		t.Error("another protocol is taken")
	}
}

// One of two agents with one identity is told to be quiet, and is so for a
// while.
func TestStandDown(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	l := start(t, b.site, b.address, func(c *Config) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if err := b.cleared(ctx); err != nil {
				return nil, err
			}
			return dial(ctx, network, address)
		}
	})
	l.quietFor = 300 * time.Millisecond // read when it is told to
	within(t, l.Connected(), "session")
	next(t, b, Hello, new(dunlinv1.Hello))
	down := func(boot string) {
		b.send(t, Down("dev", Command), &dunlinv1.Command{Command: &dunlinv1.Command_StandDown{StandDown: &dunlinv1.StandDown{BootId: boot, KeptHostname: "other-host"}}})
	}
	down("another boot")
	b.send(t, Down("dev", Command), &dunlinv1.Command{Command: &dunlinv1.Command_RenewNow{RenewNow: &dunlinv1.RenewNow{WithinMs: 5}}})
	if m, ok := within(t, l.Inbox(), "command").(*dunlinv1.Command); !ok || m.GetRenewNow().GetWithinMs() != 5 {
		t.Errorf("inbox gave %v", m)
	}
	begin := time.Now()
	down("boot")
	if err := awaitState(t, l.Link, StoodDown); err == nil || !strings.Contains(err.Error(), "other-host") {
		t.Errorf("cause: %v", err)
	}
	next(t, b, Gone, new(dunlinv1.Gone))
	if err := l.Reconnect("mqtts://" + b.address); err != nil { // does not end it
		t.Fatal(err)
	}
	within(t, l.Connected(), "session after a while")
	if d := time.Since(begin); d < 300*time.Millisecond {
		t.Errorf("it was quiet for %s", d)
	}
	next(t, b, Hello, new(dunlinv1.Hello))
	if len(l.attempts) != 2 {
		t.Errorf("%d connections", len(l.attempts))
	}
}

func TestHelloAgain(t *testing.T) {
	b := startBroker(t, "127.0.0.1:0")
	l := start(t, b.site, b.address, nil)
	within(t, l.Connected(), "session")
	session := next(t, b, Hello, new(dunlinv1.Hello)).Session
	epoch := &dunlinv1.Epoch{Incarnation: "i", BootId: "controller 1", HelloWithinMs: 20}
	again := &dunlinv1.Command{Command: &dunlinv1.Command_HelloAgain{HelloAgain: &dunlinv1.HelloAgain{}}}
	for _, ask := range []func(){
		func() { b.send(t, Down("dev", Command), again) },
		func() { b.send(t, EpochTopic, epoch) },
		// A long spread is overtaken by a command; an epoch that is known asks
		// for nothing.
		func() {
			b.send(t, EpochTopic, &dunlinv1.Epoch{Incarnation: "i", BootId: "controller 2", HelloWithinMs: 1 << 31})
			b.send(t, EpochTopic, &dunlinv1.Epoch{Incarnation: "i", BootId: "controller 2"})
			b.send(t, Down("dev", Desired), desired(1))
			within(t, l.Inbox(), "message after the epochs")
			b.send(t, Down("dev", Command), again)
		},
	} {
		ask()
		if h := next(t, b, Hello, new(dunlinv1.Hello)); h.Session != session {
			t.Errorf("hello of session %s, want %s", h.Session, session)
		}
		within(t, l.Connected(), "signal to report again")
	}
}

func TestSendTooLarge(t *testing.T) {
	l, err := New(Config{BrokerURL: "mqtts://127.0.0.1:1", Device: "dev"})
	if err != nil {
		t.Fatal(err)
	}
	m := &dunlinv1.Block{Data: make([]byte, MaxPayload)}
	if err := l.Send(Events, m); !errors.Is(err, ErrTooLarge) {
		t.Errorf("Send of %d bytes: %v", proto.Size(m), err)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []Config{
		{BrokerURL: "127.0.0.1:1883", Device: "dev"}, {BrokerURL: "mqtts://127.0.0.1", Device: "dev"},
		{BrokerURL: "ssl://127.0.0.1:1883", Device: "dev"}, {BrokerURL: "tcp://127.0.0.1:1883", Device: "dev"}, {BrokerURL: "mqtts://127.0.0.1:1883", Device: "a/b"},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("New(%+v) gave no error", c)
		}
	}
}

// deadBroker accepts a session byte by byte as a broker would, and then does
// what the test says.
func (s *site) deadBroker(t *testing.T, then func(net.Conn)) (address string) {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", s.server())
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			readPacket(c)
			c.Write([]byte{0x20, 2, 0, 0}) // CONNACK
			id := readPacket(c)            // SUBSCRIBE
			c.Write([]byte{0x90, 6, id[0], id[1], 0, 0, 0, 0})
			then(c)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		within(t, accepted, "end of the broker")
	})
	return listener.Addr().String()
}

func readPacket(r io.Reader) []byte {
	b := make([]byte, 1)
	io.ReadFull(r, b)
	length := 0
	for shift := 0; ; shift += 7 {
		if _, err := io.ReadFull(r, b); err != nil {
			return make([]byte, 2)
		}
		length |= int(b[0]&0x7f) << shift
		if b[0]&0x80 == 0 {
			break
		}
	}
	p := make([]byte, max(length, 2))
	io.ReadFull(r, p)
	return p
}

// A broker that takes nothing any more does not keep Run from ending.
func TestStopWhileWriteStalls(t *testing.T) {
	release := make(chan struct{})
	site := newSite(t)
	address := site.deadBroker(t, func(net.Conn) { <-release })
	defer close(release)
	l := start(t, site, address, nil)
	within(t, l.Connected(), "session")
	sent := make(chan error)
	go func() {
		big := &dunlinv1.Block{Data: make([]byte, MaxPayload-1<<10)}
		for { // until the buffers of connection and queue are full
			if err := l.Send(Events, big); err != nil {
				sent <- err
				return
			}
		}
	}()
	for end := time.Now().Add(patience); len(l.queue()) < sendQueue; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the queue did not fill")
		}
	}
	begin := time.Now()
	l.stop()
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("Run took %s to end", d)
	}
	if err := within(t, sent, "end of Send"); !errors.Is(err, ErrNotConnected) {
		t.Errorf("Send: %v", err)
	}
}

func (l *Link) queue() chan message {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session == nil {
		return nil
	}
	return l.session.out
}

// A packet above the limit ends the session instead of being read.
func TestPacketTooLong(t *testing.T) {
	release := make(chan struct{})
	site := newSite(t)
	address := site.deadBroker(t, func(c net.Conn) {
		c.Write([]byte{0x30, 0xff, 0xff, 0xff, 0x7f})
		<-release
	})
	defer close(release)
	l := start(t, site, address, nil)
	if err := awaitState(t, l.Link, Unreachable); err == nil || !strings.Contains(err.Error(), "allowed are") {
		t.Errorf("cause: %v", err)
	}
}

// What may go wrong when a stranger asks.
func TestEnrol(t *testing.T) {
	site := newSite(t)
	site.strangers = true
	b := site.startBroker(t, "127.0.0.1:0")
	q := &dunlinv1.EnrolRequest{Request: &dunlinv1.EnrolRequest_Time{Time: &dunlinv1.GetTimeRequest{Nonce: []byte("0123456789abcdef")}}}
	var mu sync.Mutex
	var answer []byte // nil: none
	if err := b.Subscribe(JoinUpFilter, 2, func(_ *mochi.Client, _ brokerpackets.Subscription, p brokerpackets.Packet) {
		user, nonce, err := ParseJoinUp(p.TopicName)
		got := new(dunlinv1.EnrolRequest)
		if err := errors.Join(err, proto.Unmarshal(p.Payload, got)); err != nil || user != RenewUser || !proto.Equal(got, q) {
			t.Errorf("%s: %v, %v", p.TopicName, got, err)
		}
		mu.Lock()
		defer mu.Unlock()
		if answer != nil {
			go b.Publish(JoinDown(user, nonce), answer, false, 0)
		}
	}); err != nil {
		t.Fatal(err)
	}
	nobody := *b.site
	nobody.device = new(tls.Certificate)
	cfg := Enrolment{BrokerURL: "mqtts://" + b.address, User: RenewUser, Password: RenewUser, TLS: nobody.client}
	ask := func(raw []byte, within time.Duration) (*dunlinv1.EnrolResponse, error) {
		mu.Lock()
		answer = raw
		mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		return Enrol(ctx, cfg, q)
	}
	want := &dunlinv1.EnrolResponse{Response: &dunlinv1.EnrolResponse_Error{Error: &dunlinv1.EnrolError{Code: 7, Message: "no"}}}
	raw, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	cfg.TLS = newSite(t).client
	if _, err := ask(raw, patience); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("another broker: %v", err)
	}
	cfg.TLS = nobody.client
	if got, err := ask(raw, patience); err != nil || !proto.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := ask([]byte{0xff}, patience); !errors.Is(err, errMalformed) {
		t.Errorf("malformed: %v", err)
	}
	if _, err := ask(nil, 200*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	b.rules.set(true, "")
	if _, err := ask(raw, patience); !errors.Is(err, ErrStranger) {
		t.Errorf("refused: %v", err)
	}
	cfg.BrokerURL = "tcp://" + b.address
	if _, err := ask(raw, patience); err == nil {
		t.Error("another protocol is taken")
	}
}
