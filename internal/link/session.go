package link

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/pki"
)

type message struct {
	topic   string
	payload []byte
	matters bool // the session is probed after it
}

// session is one connection to the broker. Its client is never used again.
type session struct {
	id         string
	conn       net.Conn // below TLS: closing it waits for nothing
	bounded    *boundedConn
	said       chan struct{} // something that matters was written; the probe waits for it
	client     mqtt.Client
	out        chan message
	helloAgain chan time.Duration // holds one wish at most
	leaving    chan struct{}      // closed when what is queued, and Gone, are the last to write

	once  sync.Once
	ended chan struct{} // closed when the session ended; cause says why
	cause error
}

var errSubscription = errors.New("subscription refused")

// open connects and subscribes.
func (l *Link) open(ctx context.Context) (*session, error) {
	at := l.at()
	conn, secure, err := dial(ctx, l.cfg.Dial, at.address, l.cfg.TLS(), l.opening)
	if err != nil {
		return nil, refusal(fmt.Errorf("connect: %w", err))
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	s := &session{
		id: rand.Text(), conn: conn, bounded: &boundedConn{Conn: secure}, said: make(chan struct{}, 1), out: make(chan message, sendQueue), helloAgain: make(chan time.Duration, 1),
		leaving: make(chan struct{}), ended: make(chan struct{}),
	}
	will := l.gone(s.id)
	device := l.cfg.Device
	s.client = mqtt.NewClient(mqtt.NewClientOptions().AddBroker(at.url).
		SetClientID(device).SetUsername(device).
		SetProtocolVersion(4).SetCleanSession(true).SetOrderMatters(true).
		SetAutoReconnect(false).SetConnectRetry(false).
		SetKeepAlive(l.cfg.KeepAlive).SetConnectTimeout(l.opening).SetWriteTimeout(writeTimeout).
		SetBinaryWill(will.topic, will.payload, 0, false).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) { l.receive(s, m.Topic(), m.Payload()) }).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) { s.end(err) }).
		SetCustomOpenConnectionFn(func(*url.URL, mqtt.ClientOptions) (net.Conn, error) { return s.bounded, nil }))
	connect := s.client.Connect()
	<-connect.Done()
	if err := connect.Error(); err != nil {
		conn.Close()
		return nil, refusal(fmt.Errorf("connect: %w", err))
	}
	if err := s.subscribe(device, l.opening); err != nil {
		s.close()
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	return s, nil
}

func (s *session) subscribe(device string, within time.Duration) error {
	filters := map[string]byte{EpochTopic: 0}
	for _, kind := range controlKinds {
		filters[Down(device, kind)] = 0
	}
	return s.subscribeTo(filters, within)
}

func (s *session) subscribeTo(filters map[string]byte, within time.Duration) error {
	return subscribe(s.client, s.ended, &s.cause, filters, within)
}

// subscribe subscribes on a connection; cause says why it ended once ended is
// closed.
func subscribe(client mqtt.Client, ended <-chan struct{}, cause *error, filters map[string]byte, within time.Duration) error {
	token := client.SubscribeMultiple(filters, nil).(*mqtt.SubscribeToken)
	select {
	case <-token.Done():
	case <-ended:
		return *cause
	case <-time.After(within):
		return fmt.Errorf("no answer within %s", within)
	}
	if err := token.Error(); err != nil {
		return err
	}
	// A refusal is in the result only.
	for filter, code := range token.Result() {
		if code > 2 {
			return fmt.Errorf("%w: %s", errSubscription, filter)
		}
	}
	return nil
}

// dial opens a connection with TLS, and gives what is below it too.
func dial(ctx context.Context, below func(context.Context, string, string) (net.Conn, error), address string, cfg *tls.Config, within time.Duration) (conn net.Conn, secure *tls.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if conn, err = below(ctx, "tcp", address); err != nil {
		return nil, nil, err
	}
	secure = tls.Client(conn, cfg)
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, secure, nil
}

// errCertificate is the error of a connection on which one side does not take
// the other's certificate.
var errCertificate = errors.New("certificate refused")

// refusal says more of an error where it is about the device's identity.
func refusal(err error) error {
	if reason, ok := pki.Refusal(err); ok {
		return fmt.Errorf("%w: %s", errCertificate, reason)
	}
	if errors.Is(err, packets.ErrorRefusedNotAuthorised) || errors.Is(err, packets.ErrorRefusedBadUsernameOrPassword) {
		return fmt.Errorf("the broker does not let this device in: it was removed, or its certificate is revoked: %w", err)
	}
	return err
}

// stateOf says what an error of a session makes of the link.
func stateOf(err error) State {
	for _, refusal := range []error{
		errCertificate, errSubscription, packets.ErrorRefusedBadUsernameOrPassword, packets.ErrorRefusedNotAuthorised, packets.ErrorRefusedIDRejected,
	} {
		if errors.Is(err, refusal) {
			return Refused
		}
	}
	return Unreachable
}

// end marks the session as ended; the first cause counts.
func (s *session) end(cause error) {
	s.once.Do(func() {
		s.cause = cause
		close(s.ended)
	})
}

// close takes the connection down, cleanly where it still stands.
func (s *session) close() {
	s.end(net.ErrClosed)
	s.client.Disconnect(uint(goodbyeTimeout / time.Millisecond))
}

// enqueue gives m to the writer, and says whether the session took it.
func (s *session) enqueue(m message) bool {
	select {
	case <-s.ended:
		return false
	default:
	}
	select {
	case s.out <- m:
		return true
	case <-s.ended:
		return false
	}
}

// write publishes what is enqueued until the session ends, or, when it is to
// be left, what is in the queue by then, or being put there, and last goodbye.
// It is the only one to publish: a second publisher would wait for the first
// without regard to the end of the session.
func (s *session) write(goodbye message, sending *atomic.Int64) {
	for {
		var m message
		select {
		case m = <-s.out:
		case <-s.ended:
			return
		case <-s.leaving:
			select {
			case m = <-s.out:
			default:
				if sending.Load() > 0 {
					runtime.Gosched()
					continue
				}
				s.publish(goodbye) // if it fails, the will says the same
				return
			}
		}
		err := s.publish(m)
		if m.matters {
			select {
			case s.said <- struct{}{}:
			default: // the probe has not come to it yet
			}
		}
		if err != nil {
			select { // the client tells the better cause, but a little later
			case <-s.ended:
			case <-time.After(goodbyeTimeout):
				s.end(fmt.Errorf("publish %s: %w", m.topic, err))
			}
			return
		}
	}
}

// errSilent is the error of a session on which nothing comes through any more.
var errSilent = errors.New("the broker does not answer")

// probe sees to it that what matters comes through: TCP on a link that loses
// packets waits twice as long with each that it loses, until what is left of a
// minute is spent doing nothing. A new connection begins anew. It asks for a sign
// of life once something was written, and ends the session where none comes
// within patience; answered says whether one has come at all.
func (s *session) probe(patience time.Duration) (answered bool) {
	for {
		select {
		case <-s.said:
		case <-s.ended:
			return answered
		}
		if !s.wait(probeAfter) {
			return answered
		}
		had := s.bounded.pongs.Load()
		if err := s.bounded.ping(); err != nil {
			return answered // the client tells
		}
		for asked := time.Now(); s.bounded.pongs.Load() == had; {
			if time.Since(asked) >= patience {
				s.end(fmt.Errorf("%w for %s", errSilent, patience))
				return answered
			}
			if !s.wait(probeLook) {
				return answered
			}
		}
		answered, patience = true, probePatience
	}
}

// wait says whether the session lasts so long.
func (s *session) wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.ended:
		return false
	}
}

// publish returns when m is written to the connection, or the session ended.
func (s *session) publish(m message) error {
	token := s.client.Publish(m.topic, 0, false, m.payload)
	select {
	case <-token.Done():
		return token.Error()
	case <-s.ended:
		return s.cause
	}
}

// askHello asks for Hello after a random part of d; of two wishes that were
// not heard yet, the more urgent one stays. Only the connection's reader may
// call it.
func (s *session) askHello(d time.Duration) {
	select {
	case waiting := <-s.helloAgain:
		d = min(d, waiting)
	default:
	}
	s.helloAgain <- d // its only sender is here, so there is room
}

// backoff gives the waits between attempts: a random part ("full jitter") of
// a bound that doubles with each attempt. A session brings it down to
// briefBackoff, and one that lasted longer than the bound to the start.
type backoff struct {
	max   time.Duration
	bound time.Duration // 0: before the first attempt
}

const (
	firstWait   = 100 * time.Millisecond
	baseBackoff = time.Second
	// briefBackoff bounds the wait after a session that did not last: the
	// broker is there, but so may be all the other devices.
	briefBackoff = 4 * time.Second
)

func (b *backoff) next() time.Duration {
	if b.bound == 0 {
		b.bound = min(baseBackoff, b.max)
		return jitter(min(firstWait, b.max))
	}
	d := jitter(b.bound)
	b.bound = min(2*b.bound, b.max)
	return d
}

func (b *backoff) lasted(d time.Duration) {
	b.bound = min(b.bound, briefBackoff)
	if d >= b.bound {
		b.bound = min(baseBackoff, b.max)
	}
}

// jitter gives a random part of d.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return mathrand.N(d)
}
