package broker

import (
	"container/list"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// The limits of the embedded broker.
const (
	// defaultMaxConnections bounds the connections at one time, those of
	// enrolling devices apart. One beyond it ends the oldest of those that
	// have not said yet who they are, or is closed before anything is read
	// from it where there is none.
	defaultMaxConnections = 10_000
	// connectTimeout bounds the time from the opening of a connection to the
	// last byte of its CONNECT, the handshake of TLS included. Devices take 15 s
	// for each of the two, and on a link that loses packets they need that.
	connectTimeout = 30 * time.Second
	// authTimeout bounds the look at who connects.
	authTimeout = 5 * time.Second
	// takeoverTimeout bounds the wait for a device's older connection to end.
	// The new one is refused when its last message is still being handled.
	takeoverTimeout = 10 * time.Second
	// writeTimeout bounds one write to a device. One that has not taken it by
	// then is cut off.
	writeTimeout = time.Minute
	// maxKeepalive, in seconds, bounds the keepalive that a device asks for;
	// 0, for none, counts as more. A device silent for one and a half times
	// its keepalive is cut off.
	maxKeepalive = 300
	// maxEnrolling bounds the connections of enrolling devices at one time.
	// Half of them may be of link.RenewUser, whom anybody can say to be.
	maxEnrolling = 512
	// enrolTimeout bounds the time of each, from its opening.
	enrolTimeout = 2 * time.Minute
	// maxEnrolKeepalive is their maxKeepalive.
	maxEnrolKeepalive = 60
	// maxEnrolFilters bounds what each subscribes to.
	maxEnrolFilters = 4
	// maxEnrolClientID bounds the client id of each.
	maxEnrolClientID = 64
	// maxFetching bounds the second connections, by which devices fetch, at one
	// time, and each may have maxWaiting bytes of FetchData on their way: those
	// are not many enough to keep control messages waiting for their turn.
	maxFetching = 512
	maxWaiting  = 512 << 10
	// maxConnectPacket bounds the CONNECT packet, the only one that anybody
	// may send.
	maxConnectPacket = 4 << 10
	// maxPacket bounds every other packet: the largest payload with its
	// topic. A device that sends a larger one is cut off.
	maxPacket = link.MaxPayload + 256
	// maxWritesPending bounds the messages that wait for one device. Further
	// ones for it are dropped, and nobody waits for it.
	maxWritesPending = 512
)

// EmbeddedConfig configures an Embedded broker.
type EmbeddedConfig struct {
	// Listen is a TCP address, "127.0.0.1:8883"; port 0 takes a free one.
	Listen string
	// TLS is what pki.ServerConfig makes with tls.VerifyClientCertIfGiven.
	TLS *tls.Config
	// Auth knows the devices.
	Auth Authenticator
	Log  *slog.Logger
	// MaxConnections is 10,000 if 0. It leaves out enrolling devices, and the
	// second connections of those that fetch.
	MaxConnections int
	// Refused, if set, is told what the broker has refused: a connection, with
	// the object "broker", or, once for each connection, a message or a
	// subscription, with its topic. Who is "device:NAME" by the certificate,
	// or "nobody"; from is an address. It is called from many goroutines.
	Refused func(who, object, reason, from string)
}

// Embedded is an MQTT 3.1.1 broker for the controller and its devices only,
// in this process, over TLS. A device connects with its certificate, and its
// name as client id. It may have a will on its own topic "gone", at QoS 0 and
// not retained; it publishes on its own up topics and subscribes to its own
// down topics and the epoch. Of two connections of one device the newer stays.
// A second one, with link.DataClient as its client id and without a will, is
// for what a device fetches, and stays beside the first.
// A connection without a certificate is for enrolling only: by user name and
// password, without a will, for a few minutes. Sessions end with their
// connection, nothing is retained, and a publication at QoS 1 or 2 is taken as
// one at QoS 0, without an answer.
type Embedded struct {
	listener net.Listener
	secure   secure
	server   *mqtt.Server
	auth     Authenticator
	refused  func(who, object, reason, from string)
	log      *slog.Logger
	max      int
	drained  chan struct{} // capacity 1: some FetchData was written

	mu        sync.Mutex       // guards what follows
	conns     map[*conn]bool   // every open connection
	unknown   list.List        // the *conn that have not said who they are, oldest first
	sessions  map[string]*conn // by client id: the one connection of a device that passed authentication
	fetching  int              // second connections of devices
	enrolling map[string]int   // connections by the user that enrols
	accepted  uint64           // connections so far
	closing   bool             // no connection and no message is taken any more
}

// NewEmbedded opens the address to listen on. Connections wait until Run.
func NewEmbedded(cfg EmbeddedConfig) (*Embedded, error) {
	if cfg.TLS == nil || cfg.Auth == nil || cfg.Log == nil {
		return nil, errors.New("the embedded broker needs TLS, Auth and Log")
	}
	if cfg.MaxConnections < 0 {
		return nil, fmt.Errorf("max connections is %d, must not be negative", cfg.MaxConnections)
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen for MQTT: %w; --mqtt-listen chooses another address", err)
	}
	return newEmbedded(cfg, listener, overTLS(cfg.TLS)), nil
}

func newEmbedded(cfg EmbeddedConfig, listener net.Listener, secure secure) *Embedded {
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = defaultMaxConnections
	}
	if cfg.Refused == nil {
		cfg.Refused = func(_, _, _, _ string) {}
	}
	log := slog.New(newLimiter(cfg.Log.Handler()))
	capabilities := mqtt.NewDefaultServerCapabilities()
	capabilities.MaximumClients = int64(cfg.MaxConnections + maxEnrolling + maxFetching)
	capabilities.MaximumClientWritesPending = maxWritesPending
	capabilities.MaximumPacketSize = maxPacket
	capabilities.MaximumQos = 0
	capabilities.RetainAvailable = 0
	capabilities.SharedSubAvailable = 0
	capabilities.SubIDAvailable = 0
	capabilities.TopicAliasMaximum = 0
	capabilities.MinimumProtocolVersion = protocolVersion
	// Sessions end with their connection: the hook makes each a clean one,
	// and serve sees to it. The server's own expiry removes by client id,
	// which could be the id of a newer connection by then: it never comes.
	capabilities.MaximumSessionExpiryInterval = math.MaxUint32
	return &Embedded{
		listener: listener,
		secure:   secure,
		server: mqtt.New(&mqtt.Options{
			Capabilities: capabilities,
			Logger:       log,
			InlineClient: true,
			// The $SYS topics, which nobody may read, cost a stop of the
			// world each time. Ten years.
			SysTopicResendInterval: 10 * 365 * 24 * 3600,
		}),
		auth:      cfg.Auth,
		refused:   cfg.Refused,
		log:       log,
		max:       cfg.MaxConnections,
		conns:     map[*conn]bool{},
		drained:   make(chan struct{}, 1),
		sessions:  map[string]*conn{},
		enrolling: map[string]int{},
	}
}

// Addr is the address that devices connect to.
func (e *Embedded) Addr() net.Addr { return e.listener.Addr() }

// Close frees the address of a broker whose Run is never called. Run does so
// itself.
func (e *Embedded) Close() error {
	if err := e.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close the MQTT listener: %w", err)
	}
	return nil
}

// Run implements Bus.
func (e *Embedded) Run(ctx context.Context, handle Handler) error {
	defer e.Close()
	h := &hook{
		broker: e, handle: handle,
		device: func(cert *x509.Certificate) (device string, err error) {
			ctx, cancel := context.WithTimeout(ctx, authTimeout)
			defer cancel()
			apart(func() { device, err = e.auth.Device(ctx, cert) })
			return device, err
		},
		mayEnrol: func(user, password, from string) (may bool) {
			ctx, cancel := context.WithTimeout(ctx, authTimeout)
			defer cancel()
			apart(func() { may = e.auth.Enrolling(ctx, user, password, from) })
			return may
		},
	}
	if err := e.server.AddHook(h, nil); err != nil {
		return fmt.Errorf("start the embedded broker: %w", err)
	}
	if err := e.server.Serve(); err != nil {
		return fmt.Errorf("start the embedded broker: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { e.Close() })
	defer stop()

	var serving sync.WaitGroup
	e.accept(ctx, &serving)

	// Every connection ends before the server closes: the server would wait
	// for each to take a last packet.
	e.mu.Lock()
	e.closing = true
	for c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	serving.Wait()
	return e.server.Close()
}

// accept serves connections until the listener is closed. Other errors, such
// as too many open files, pass.
func (e *Embedded) accept(ctx context.Context, serving *sync.WaitGroup) {
	const minPause, maxPause = 5 * time.Millisecond, time.Second
	pause := minPause
	for {
		nc, err := e.listener.Accept()
		if err != nil && (ctx.Err() != nil || errors.Is(err, net.ErrClosed)) {
			return
		}
		if err != nil {
			e.log.Warn("accept an MQTT connection", "error", err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			pause = min(2*pause, maxPause)
			continue
		}
		pause = minPause
		c := e.admit(nc)
		if c == nil {
			e.log.Warn("MQTT connection refused", "remote", nc.RemoteAddr(), "reason", "too many connections")
			nc.Close()
			continue
		}
		serving.Go(func() { e.serve(c) })
	}
}

// admit enters a new connection, or returns nil when there are too many.
func (e *Embedded) admit(nc net.Conn) *conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing {
		return nil
	}
	if len(e.conns)-e.enrollingNow()-e.fetching >= e.max {
		oldest := e.unknown.Front()
		if oldest == nil {
			return nil
		}
		e.remove(oldest.Value.(*conn))
	}
	e.accepted++
	c := &conn{Conn: nc, raw: nc, number: e.accepted, ended: make(chan struct{})}
	c.began = e.unknown.PushBack(c)
	e.conns[c] = true
	return c
}

// remove closes a connection and counts it no more. mu is held.
func (e *Embedded) remove(c *conn) {
	c.Close()
	delete(e.conns, c)
	e.unknown.Remove(c.began)
	if c.fetches {
		c.fetches = false
		e.fetching--
	}
	if c.enrols {
		c.enrols = false
		e.enrolling[c.user]--
		if e.enrolling[c.user] == 0 {
			delete(e.enrolling, c.user)
		}
	}
}

// enrollingNow counts the connections of enrolling devices. mu is held.
func (e *Embedded) enrollingNow() (n int) {
	for _, of := range e.enrolling {
		n += of
	}
	return n
}

// known notes that a connection has said whose it is.
func (e *Embedded) known(c *conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unknown.Remove(c.began)
}

// enrol counts a connection among the enrolling ones, or says no when there
// are too many.
func (e *Embedded) enrol(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.conns[c] || e.enrollingNow() >= maxEnrolling || c.user == link.RenewUser && e.enrolling[c.user] >= maxEnrolling/2 {
		return false
	}
	e.unknown.Remove(c.began)
	c.enrols = true
	e.enrolling[c.user]++
	return true
}

// fetch counts a connection among the second ones of devices, or says no when
// there are too many.
func (e *Embedded) fetch(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.conns[c] || e.fetching >= maxFetching && e.sessions[c.id] == nil {
		return false
	}
	c.fetches = true
	e.fetching++
	return true
}

// serve owns a connection from its first byte to its end.
func (e *Embedded) serve(c *conn) {
	var err error
	apart(func() { err = e.open(c) })
	if err == nil {
		err = e.server.EstablishConnection("mqtt", c)
	}
	if err != nil && e.taking() && !c.refused {
		e.log.Warn("MQTT connection ended", "remote", c.raw.RemoteAddr(), "device", c.device, "error", err)
	}
	// The server forgets a client that read its last packet, but not one
	// that was lost before. No newer one can be there before ended is closed.
	if c.client != nil {
		if cl, ok := e.server.Clients.Get(c.id); ok && cl == c.client {
			e.server.Clients.Delete(c.id)
		}
	}
	e.mu.Lock()
	e.remove(c)
	if c.device != "" && e.sessions[c.id] == c {
		delete(e.sessions, c.id)
	}
	e.mu.Unlock()
	close(c.ended)
}

// apart does what takes a deep stack on a goroutine of its own, and waits for
// it: a stack that has grown stays that of its goroutine, and those that serve
// connections are there for as long as those.
func apart(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	<-done
}

// open does the handshake of a connection and reads the beginning of its
// CONNECT.
func (e *Embedded) open(c *conn) error {
	deadline := time.Now().Add(connectTimeout)
	if err := c.raw.SetDeadline(deadline); err != nil {
		return err
	}
	secured, certificate, err := e.secure(c.raw)
	if err != nil {
		if wrong, ok := errors.AsType[*tls.CertificateVerificationError](err); ok && e.taking() {
			e.refuse(c, "", wrong.Error())
		}
		return err
	}
	c.Conn, c.certificate = secured, certificate
	if certificate != nil {
		c.until = certificate.NotAfter
	} else {
		c.until = time.Now().Add(enrolTimeout)
	}
	return c.readConnectHeader()
}

// refuse says that a connection was turned away.
func (e *Embedded) refuse(c *conn, client, reason string) {
	e.log.Warn("MQTT connection refused", "remote", c.raw.RemoteAddr(), "client", client, "reason", reason)
	e.refused(c.name(), "broker", reason, c.raw.RemoteAddr().String())
	c.refused = true
}

// claim makes c the connection of its client id, after the end of an older one.
// It says no when there is a newer one, or when the older one does not end.
func (e *Embedded) claim(c *conn) bool {
	deadline := time.NewTimer(takeoverTimeout)
	defer deadline.Stop()
	for {
		e.mu.Lock()
		old := e.sessions[c.id]
		if old == nil {
			e.sessions[c.id] = c
		}
		e.mu.Unlock()
		if old == nil {
			return true
		}
		if old.number > c.number {
			return false
		}
		old.client.Stop(packets.ErrSessionTakenOver)
		select {
		case <-old.ended:
		case <-deadline.C:
			return false
		}
	}
}

// taking says whether messages are still handled.
func (e *Embedded) taking() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.closing
}

// Publish implements Bus.
func (e *Embedded) Publish(topic string, payload []byte) error {
	if err := checkPublish(topic, payload); err != nil {
		return err
	}
	if device, kind, err := link.ParseDown(topic); err == nil && kind == link.Data {
		if c := e.second(device); c != nil && c.client.State.Subscriptions.Len() > 0 {
			c.waiting.Add(int64(len(payload)))
		}
	}
	if err := e.server.Publish(topic, payload, false, 0); err != nil {
		return fmt.Errorf("publish on %s: %w", topic, err)
	}
	return nil
}

// second gives the connection by which a device fetches, or nil.
func (e *Embedded) second(device string) *conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sessions[link.DataClient(device)]
}

// SecondConnections says that devices may have one.
func (*Embedded) SecondConnections() bool { return true }

// Room says whether the connection by which a device fetches takes more of it:
// not while much that it was sent is not written yet.
func (e *Embedded) Room(device string) bool {
	c := e.second(device)
	return c == nil || c.waiting.Load() < maxWaiting
}

// Drained receives when there may be room where there was none.
func (e *Embedded) Drained() <-chan struct{} { return e.drained }

// Disconnect implements Bus. The device is cut off at once; what it sent
// before may still be with the handler.
func (e *Embedded) Disconnect(device string) {
	e.mu.Lock()
	own := []*conn{e.sessions[device], e.sessions[link.DataClient(device)]}
	e.mu.Unlock()
	for _, c := range own {
		if c != nil {
			c.client.Stop(packets.ErrAdministrativeAction)
		}
	}
}
