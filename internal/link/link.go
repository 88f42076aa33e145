// Package link is the wire between an agent and the controller: the topics,
// and the agent's typed protobuf session over MQTT.
package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// DefaultKeepAlive is how often a silent connection is probed.
	DefaultKeepAlive = time.Minute
	// DefaultMaxBackoff bounds the wait before a new attempt to connect.
	DefaultMaxBackoff = time.Minute
	// connectTimeout bounds dialling and, separately, the broker's answers to
	// CONNECT and SUBSCRIBE, of connections for data and enrolment. Those of
	// sessions are bounded by leastOpening at first, as it is quicker to begin
	// anew than to wait for a TCP that has lost its packets, and by openingStep
	// more with each failure, up to mostOpening: a link may just be slow.
	connectTimeout = 15 * time.Second
	leastOpening   = 10 * time.Second
	openingStep    = 5 * time.Second
	mostOpening    = 30 * time.Second
	// writeTimeout bounds a write without progress; after it the session ends.
	writeTimeout = 10 * time.Second
	// probeAfter is the wait for more before the broker is asked for a sign of
	// life, and probeLook how often it is looked whether that has come.
	probeAfter = time.Second
	probeLook  = 500 * time.Millisecond
	// A session without a sign of life ends after probePatience, and the next
	// after twice the time, up to mostPatience: a link may just be slow.
	probePatience = 15 * time.Second
	mostPatience  = time.Minute
	// goodbyeTimeout bounds the sending of Gone at an orderly stop.
	goodbyeTimeout = time.Second
	// sendQueue bounds the messages that wait to be written; when it is full,
	// Send waits.
	sendQueue = 16
	// maxHelloWithin bounds the time over which a new controller may spread
	// the hellos of its devices.
	maxHelloWithin = 5 * time.Minute
	// refusedEvery bounds how often a refusal that lasts is logged.
	refusedEvery = time.Minute
	// StandDownFor is how long a link that was told to stand down is quiet.
	StandDownFor = time.Hour
)

var (
	// ErrNotConnected is the error of sending without a session.
	ErrNotConnected = errors.New("not connected to the broker")
	// ErrTooLarge is the error of sending a message above MaxPayload.
	ErrTooLarge = errors.New("message too large")
)

// Config says how an agent connects.
type Config struct {
	BrokerURL string // "mqtts://host:port"
	Device    string // also user name and client id
	// TLS gives the newest configuration, with the device's certificate, for
	// a connection. It must be quick.
	TLS    func() *tls.Config
	BootID string // of this run of the agent
	Log    *slog.Logger
	// Hello gives what the agent says of itself at the start of a session;
	// boot id and session are filled in here. It must be quick, and may be
	// called from several goroutines.
	Hello func() *dunlinv1.Hello
	// OnState is told of each change of the state, one at a time; nil: not.
	OnState    func(State, error)
	KeepAlive  time.Duration // 0: DefaultKeepAlive
	MaxBackoff time.Duration // 0: DefaultMaxBackoff
	// Dial opens the connection below TLS; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// State says how the link is.
type State int

// The states of a link.
const (
	Connecting  State = iota // before the first answer of the broker
	Connected                // a session is open
	Unreachable              // the last attempt failed, or the connection was lost
	StoodDown                // another agent has the device's identity, and is kept
	Refused                  // broker and device refuse each other's certificate, or the broker the client id or the subscriptions
)

// States are all of them.
var States = []State{Connecting, Connected, Unreachable, StoodDown, Refused}

func (s State) String() string {
	return [...]string{"connecting", "connected", "unreachable", "stood down", "refused"}[s]
}

// Link keeps a session with the broker open. Its methods may be called
// concurrently.
type Link struct {
	cfg       Config
	opening   time.Duration // bounds the next session's opening; Run's
	patience  time.Duration // of its probe; Run's
	inbox     *inbox
	connected chan struct{}
	wake      chan struct{} // the session is to end, or the wait for the next
	malformed atomic.Uint64
	sending   atomic.Int64  // calls of Send that may enqueue
	quietFor  time.Duration // StandDownFor, but in tests

	mu      sync.Mutex // guards what follows
	broker  broker
	session *session // nil without one
	state   State
	cause   error
	warned  time.Time // when a refusal was logged last
	quiet   error     // why to stand down next; nil: not
	epoch   string    // the controller's boot id that hello was said to
	data    *DataLine // that shares the session; nil: none
}

// broker is where one is.
type broker struct{ url, address string }

// New checks cfg; Run connects.
func New(cfg Config) (*Link, error) {
	b, err := parseBroker(cfg.BrokerURL)
	if err != nil {
		return nil, err
	}
	if err := CheckDevice(cfg.Device); err != nil {
		return nil, err
	}
	if cfg.KeepAlive == 0 {
		cfg.KeepAlive = DefaultKeepAlive
	}
	if cfg.MaxBackoff == 0 {
		cfg.MaxBackoff = DefaultMaxBackoff
	}
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	return &Link{cfg: cfg, opening: leastOpening, patience: probePatience, broker: b, inbox: newInbox(), connected: make(chan struct{}, 1), wake: make(chan struct{}, 1), quietFor: StandDownFor}, nil
}

func parseBroker(brokerURL string) (broker, error) {
	u, err := url.Parse(brokerURL)
	if err != nil {
		return broker{}, fmt.Errorf("broker URL: %w", err)
	}
	if u.Scheme != "mqtts" || u.Port() == "" {
		return broker{}, fmt.Errorf("broker URL %q is not mqtts://host:port", brokerURL)
	}
	return broker{brokerURL, u.Host}, nil
}

// Reconnect ends the session in good order and begins another at once, with
// what Config.TLS gives then, and at another broker where the URL is new. One
// that stands down stays quiet.
func (l *Link) Reconnect(brokerURL string) error {
	b, err := parseBroker(brokerURL)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.broker = b
	l.mu.Unlock()
	l.signalWake()
	return nil
}

// standDown ends the session in good order, and has the next begin after
// StandDownFor.
func (l *Link) standDown(cause error) {
	l.mu.Lock()
	l.quiet = cause
	l.mu.Unlock()
	l.signalWake()
}

func (l *Link) signalWake() {
	select {
	case l.wake <- struct{}{}:
	default: // one is waiting already
	}
}

// Inbox gives the controller's messages: *dunlinv1.Desired, *dunlinv1.Block,
// and *dunlinv1.Command with an EventAck, RenewNow or TelemetryLease. Epoch and HelloAgain are
// answered here (see Connected), and StandDown, too. Of several Desired only the newest waits; when too
// many others wait, new ones are dropped (see Dropped). The channel is never
// closed.
func (l *Link) Inbox() <-chan proto.Message { return l.inbox.out }

// Connected receives when a session began, or when the controller asked to be
// told everything again: it has had Hello, and what it lacks now is the
// reported state and the events that are not acknowledged. Signals that
// nobody took merge into one.
func (l *Link) Connected() <-chan struct{} { return l.connected }

// Session gives the id of the open session, or "".
func (l *Link) Session() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session == nil {
		return ""
	}
	return l.session.id
}

// State says how the link is, and why where it is neither Connecting nor
// Connected.
func (l *Link) State() (State, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state, l.cause
}

// Malformed counts the messages that were dropped because they could not be
// decoded.
func (l *Link) Malformed() uint64 { return l.malformed.Load() }

// Dropped counts the messages that were dropped because the inbox was full.
func (l *Link) Dropped() uint64 { return l.inbox.dropped.Load() }

// Send queues a message on the device's topic of that kind. It waits while
// the queue is full, but no longer than the session lasts: a write without
// progress ends it. Without a session the error is ErrNotConnected. A nil
// error is no promise of delivery.
func (l *Link) Send(kind string, m proto.Message) error {
	payload, err := encode(kind, m)
	if err != nil {
		return err
	}
	l.sending.Add(1) // before the look at the session: see session.write
	defer l.sending.Add(-1)
	l.mu.Lock()
	s := l.session
	l.mu.Unlock()
	if s == nil || !s.enqueue(message{Up(l.cfg.Device, kind), payload, kind != Telemetry && kind != Fetch}) {
		return fmt.Errorf("send %s: %w", kind, ErrNotConnected)
	}
	return nil
}

func encode(kind string, m proto.Message) ([]byte, error) {
	payload, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("send %s: %w", kind, err)
	}
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("send %s: %w: %d bytes, allowed are %d", kind, ErrTooLarge, len(payload), MaxPayload)
	}
	return payload, nil
}

// Run keeps a session open until ctx ends, then says Gone and disconnects.
// It may be called once. Its error is always that of ctx.
func (l *Link) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { l.inbox.run(ctx) })

	wait := backoff{max: l.cfg.MaxBackoff}
	for {
		if err := l.rest(ctx); err != nil {
			return err
		}
		if !l.pause(ctx, wait.next()) {
			return ctx.Err()
		}
		s, err := l.open(ctx)
		if err != nil {
			l.opening = min(l.opening+openingStep, mostOpening)
		} else {
			l.opening = leastOpening
			l.setState(Connected, nil)
			begin := time.Now()
			err = l.serve(ctx, s)
			wait.lasted(time.Since(begin))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, errLeft) {
			wait = backoff{max: l.cfg.MaxBackoff}
			continue
		}
		l.setState(stateOf(err), err)
	}
}

// errLeft is the error of a session that the link itself has ended.
var errLeft = errors.New("left")

// rest stands down, where that was asked for.
func (l *Link) rest(ctx context.Context) error {
	l.mu.Lock()
	cause := l.quiet
	l.quiet = nil
	l.mu.Unlock()
	if cause == nil {
		return nil
	}
	l.setState(StoodDown, cause)
	if !sleep(ctx, l.quietFor) {
		return ctx.Err()
	}
	return nil
}

// pause waits, or less where the link is woken, and says whether ctx lasted
// that long.
func (l *Link) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.wake:
	case <-ctx.Done():
		return false
	}
	return true
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// setState notes the state, and logs it where it changed; a refusal that
// lasts is logged again now and then.
func (l *Link) setState(s State, cause error) {
	l.mu.Lock()
	changed := l.state != s
	say := changed
	l.state, l.cause = s, cause
	if s == Refused {
		now := time.Now()
		if say = now.Sub(l.warned) >= refusedEvery; say {
			l.warned = now
		}
	}
	l.mu.Unlock()
	if changed && l.cfg.OnState != nil {
		l.cfg.OnState(s, cause)
	}
	if !say {
		return
	}
	log := l.cfg.Log.With("device", l.cfg.Device, "broker", l.at().url)
	switch s {
	case Connected:
		log.Info("connected to the broker")
	case StoodDown:
		log.Warn("quiet", "error", cause, "for", l.quietFor)
	case Refused:
		log.Warn("the connection to the broker is refused; trying on", "error", cause)
	default:
		log.Warn("no connection to the broker; trying on", "error", cause)
	}
}

func (l *Link) at() broker {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.broker
}

// hello encodes Hello for a session.
func (l *Link) hello(session string) (message, error) {
	h := new(dunlinv1.Hello)
	if l.cfg.Hello != nil {
		h = proto.CloneOf(l.cfg.Hello())
	}
	h.BootId, h.Session = l.cfg.BootID, session
	payload, err := encode(Hello, h)
	return message{Up(l.cfg.Device, Hello), payload, true}, err
}

func (l *Link) gone(session string) message {
	payload, err := encode(Gone, &dunlinv1.Gone{BootId: l.cfg.BootID, Session: session})
	if err != nil {
		panic(err) // two short strings that were checked or made here
	}
	return message{Up(l.cfg.Device, Gone), payload, false}
}

// serve says hello, lets the session be used until it ends or ctx does, and
// takes it down. Its error says why the session ended.
func (l *Link) serve(ctx context.Context, s *session) error {
	defer s.close()
	h, err := l.hello(s.id)
	if err != nil {
		return err
	}
	s.enqueue(h)
	var wg sync.WaitGroup
	written := make(chan struct{})
	wg.Go(func() {
		defer close(written)
		s.write(l.gone(s.id), &l.sending)
	})
	wg.Go(func() { l.repeatHello(s) })
	var answered bool
	wg.Go(func() { answered = s.probe(l.patience) })
	l.setSession(s)
	l.signalConnected()

	leave := func(cause error) {
		l.setSession(nil)
		close(s.leaving)
		cut := time.AfterFunc(goodbyeTimeout, func() { s.conn.Close() })
		<-written
		cut.Stop()
		s.end(cause)
	}
	select {
	case <-s.ended:
		l.setSession(nil)
	case <-l.wake:
		leave(errLeft)
	case <-ctx.Done():
		leave(ctx.Err())
	}
	wg.Wait()
	switch {
	case answered:
		l.patience = probePatience
	case errors.Is(s.cause, errSilent):
		l.patience = min(2*l.patience, mostPatience)
	}
	return s.cause
}

func (l *Link) setSession(s *session) {
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()
}

func (l *Link) signalConnected() {
	select {
	case l.connected <- struct{}{}:
	default: // one is waiting already
	}
}

// repeatHello says hello again when the controller asks for it, after a
// random part of the time that it allows.
func (l *Link) repeatHello(s *session) {
	var due time.Time
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case within := <-s.helloAgain:
			at := time.Now().Add(jitter(min(within, maxHelloWithin)))
			if due.IsZero() || at.Before(due) {
				due = at
				timer.Reset(time.Until(due))
			}
		case <-timer.C:
			due = time.Time{}
			h, err := l.hello(s.id)
			if err != nil {
				s.end(err)
				return
			}
			if s.enqueue(h) {
				l.signalConnected()
			}
		case <-s.ended:
			return
		}
	}
}

// receive takes in one message. It must not wait: the connection's reader
// calls it.
func (l *Link) receive(s *session, topic string, payload []byte) {
	m, err := decode(l.cfg.Device, topic, payload)
	if err != nil {
		l.malformed.Add(1)
		l.cfg.Log.Debug("dropped a malformed message", "device", l.cfg.Device, "topic", topic, "error", err)
		return
	}
	switch m := m.(type) {
	case *dunlinv1.FetchData:
		l.mu.Lock()
		d := l.data
		l.mu.Unlock()
		if d == nil || d.session != s {
			return // of a line that is closed
		}
		select {
		case d.answers <- m:
		default:
			l.inbox.dropped.Add(1)
		}
	case *dunlinv1.Epoch:
		l.mu.Lock()
		again := l.epoch != m.BootId
		l.epoch = m.BootId
		l.mu.Unlock()
		if again {
			s.askHello(time.Duration(m.HelloWithinMs) * time.Millisecond)
		}
	case *dunlinv1.Command:
		if m.GetHelloAgain() != nil {
			s.askHello(0)
			return
		}
		if d := m.GetStandDown(); d != nil {
			if d.BootId == l.cfg.BootID {
				l.standDown(fmt.Errorf("another agent, on host %q, uses the identity of this device, and is kept", d.KeptHostname))
			}
			return
		}
		l.inbox.put(m)
	default:
		l.inbox.put(m)
	}
}
