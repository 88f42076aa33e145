package broker

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// The limits of a connection to an external broker.
const (
	// externalTimeout bounds each of opening the connection, CONNECT,
	// SUBSCRIBE and the write of one message.
	externalTimeout = 10 * time.Second
	// externalKeepalive is how long the connection may be silent before it is
	// tried with a ping.
	externalKeepalive = 30 * time.Second
	// externalQueue bounds the messages read ahead of the handler. When it is
	// full nothing more is read, and the broker holds messages back or drops
	// them.
	externalQueue = 256
	// A failed connection is followed by a pause of random length between 0
	// and a bound that doubles from minBackoff to maxBackoff. The doubling
	// begins anew after a connection that lasted maxBackoff.
	minBackoff = time.Second
	maxBackoff = 30 * time.Second
	// maxCuts bounds the devices that wait for their sessions to be ended.
	maxCuts = 1024
	// subackRefused is the return code of a refused subscription.
	subackRefused = 0x80
)

// ExternalConfig configures an External broker.
type ExternalConfig struct {
	// URL is mqtts://host:port, or mqtt:// or tcp:// for a connection without
	// TLS; the port is 8883 or 1883 if left out. Credentials do not belong in
	// it.
	URL string
	// TLS is for mqtts: whom the controller believes, and the certificate that
	// it shows, whose common name is ControllerUser.
	TLS *tls.Config
	// Username and Password are of the controller's account at a broker that
	// does not go by certificates.
	Username, Password string
	// DeviceTLS, if set, is how to connect as a device: Disconnect takes the
	// device's session over, and ends it.
	DeviceTLS func(device string) (*tls.Config, error)
	// ClientID is a random one if empty, so that nobody who can connect can
	// take over the controller's connection.
	ClientID string
	Log      *slog.Logger
	// OnConnect, if set, is called whenever a connection has begun and the
	// subscription stands. What devices sent since the connection before is
	// lost.
	OnConnect func()
}

// External is a connection to any MQTT 3.1.1 broker. It asks of the broker
// that it lets a device send and receive on the device's own topics only, and
// one that enrols on those of its conversation, that it keeps their wills, and
// that it refuses a device that is revoked. Messages on topics that are none
// of those, and too large ones, are dropped here whatever the broker let
// through.
type External struct {
	cfg     ExternalConfig
	address string
	backoff time.Duration           // minBackoff, less in tests
	session atomic.Pointer[session] // nil when not connected
	cuts    chan string             // devices to disconnect

	mu      sync.Mutex      // guards cutting
	cutting map[string]bool // those in cuts
}

// session is one connection, for which there is one client.
type session struct {
	client paho.Client
	lost   <-chan struct{}
}

type message struct {
	topic   string
	payload []byte
}

// NewExternal checks the configuration. It connects in Run.
func NewExternal(cfg ExternalConfig) (*External, error) {
	if cfg.Log == nil {
		return nil, errors.New("the external broker needs Log")
	}
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("broker URL: %w", err)
	}
	secure := u.Scheme == "mqtts"
	if !secure && u.Scheme != "mqtt" && u.Scheme != "tcp" || u.Hostname() == "" {
		return nil, fmt.Errorf("broker URL %s is not of the form mqtts://host:port", u.Redacted())
	}
	if secure != (cfg.TLS != nil) {
		return nil, fmt.Errorf("broker URL %s: the scheme must be mqtts with TLS, and mqtt or tcp without", u.Redacted())
	}
	if u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("broker URL %s has more than a host and a port; credentials go into user name and password", u.Redacted())
	}
	port := u.Port()
	switch {
	case port == "" && secure:
		port = "8883"
	case port == "":
		port = "1883"
	}
	if cfg.ClientID == "" {
		cfg.ClientID = "dunlin-controller-" + rand.Text()
	}
	return &External{
		cfg: cfg, address: net.JoinHostPort(u.Hostname(), port), backoff: minBackoff,
		cuts: make(chan string, maxCuts), cutting: map[string]bool{},
	}, nil
}

// Run implements Bus. It connects, again after each loss, until ctx is done.
func (e *External) Run(ctx context.Context, handle Handler) error {
	queue := make(chan message, externalQueue)
	var parts sync.WaitGroup
	parts.Go(func() { e.cutOff(ctx) })
	parts.Go(func() {
		for {
			select {
			case m := <-queue:
				handle(m.topic, m.payload)
			case <-ctx.Done():
				return
			}
		}
	})
	defer parts.Wait()

	bound := e.backoff
	for ctx.Err() == nil {
		began := time.Now()
		err := e.connect(ctx, queue)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) >= maxBackoff {
			bound = e.backoff
		}
		pause := mathrand.N(bound)
		e.cfg.Log.Warn("no connection to the MQTT broker", "broker", e.address, "error", err, "retry_in", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		bound = min(2*bound, maxBackoff)
	}
	return nil
}

// connect makes one connection, with a client of its own, and returns when it
// is lost or ctx is done.
func (e *External) connect(ctx context.Context, queue chan<- message) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)

	// Set before Connect's token is done: the connection, and what ends the
	// watch over its CONNECT.
	var nc net.Conn
	var unwatch func() bool
	opts := paho.NewClientOptions().
		AddBroker("tcp://" + e.address).
		SetClientID(e.cfg.ClientID).
		SetUsername(e.cfg.Username).
		SetPassword(e.cfg.Password).
		SetProtocolVersion(protocolVersion).
		SetCleanSession(true).
		SetAutoReconnect(false).
		SetConnectRetry(false).
		SetOrderMatters(true).
		SetKeepAlive(externalKeepalive).
		SetPingTimeout(externalTimeout).
		SetConnectTimeout(externalTimeout).
		SetWriteTimeout(externalTimeout).
		SetConnectionLostHandler(func(_ paho.Client, err error) { end(err) }).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) {
			if !isUp(m.Topic(), len(m.Payload())) {
				return
			}
			select {
			case queue <- message{m.Topic(), m.Payload()}:
			case <-ctx.Done():
			}
		}).
		SetCustomOpenConnectionFn(func(*url.URL, paho.ClientOptions) (net.Conn, error) {
			c, raw, err := e.dial(ctx, e.cfg.TLS)
			if err != nil {
				return nil, err
			}
			// CONNECT cannot be given up otherwise.
			nc, unwatch = raw, context.AfterFunc(ctx, func() { raw.Close() })
			return c, nil
		})
	client := paho.NewClient(opts)
	token := client.Connect()
	<-token.Done()
	if unwatch != nil {
		unwatch()
	}
	if err := token.Error(); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer func() {
		client.Disconnect(250)
		nc.Close()
	}()

	filters := map[string]byte{link.UpFilter: 0, link.JoinUpFilter: 0}
	subscription := client.SubscribeMultiple(filters, nil).(*paho.SubscribeToken)
	select {
	case <-subscription.Done():
	case <-time.After(externalTimeout):
		return errors.New("subscribe: no answer")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := subscription.Error(); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	// The error says nothing of a refusal.
	for filter := range filters {
		if code, ok := subscription.Result()[filter]; !ok || code == subackRefused {
			return fmt.Errorf("the broker refuses the controller the subscription to %s", filter)
		}
	}

	e.session.Store(&session{client: client, lost: ctx.Done()})
	defer e.session.Store(nil)
	e.cfg.Log.Info("connected to the MQTT broker", "broker", e.address)
	if e.cfg.OnConnect != nil {
		e.cfg.OnConnect()
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// Publish implements Bus. It returns when the message is written, and
// ErrNotConnected while there is no connection.
func (e *External) Publish(topic string, payload []byte) error {
	if err := checkPublish(topic, payload); err != nil {
		return err
	}
	s := e.session.Load()
	if s == nil {
		return ErrNotConnected
	}
	token := s.client.Publish(topic, 0, false, payload)
	select {
	case <-token.Done():
	case <-s.lost:
		return ErrNotConnected
	case <-time.After(externalTimeout):
		return fmt.Errorf("publish on %s: not written within %v", topic, externalTimeout)
	}
	if err := token.Error(); errors.Is(err, paho.ErrNotConnected) {
		return ErrNotConnected
	} else if err != nil {
		return fmt.Errorf("publish on %s: %w", topic, err)
	}
	return nil
}

// dial opens a connection, over TLS unless config is nil; raw is the one below.
func (e *External) dial(ctx context.Context, config *tls.Config) (nc, raw net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, externalTimeout)
	defer cancel()
	if raw, err = new(net.Dialer).DialContext(ctx, "tcp", e.address); err != nil {
		return nil, nil, err
	}
	if config == nil {
		return raw, raw, nil
	}
	secured := tls.Client(raw, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return secured, raw, nil
}

// Disconnect implements Bus. MQTT 3.1.1 has no means to end the session of
// another client but to connect as that client, which is done soon, with
// DeviceTLS. What keeps a revoked device from connecting again is the broker
// (see Mosquitto.Write).
func (e *External) Disconnect(device string) {
	if e.cfg.DeviceTLS == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cutting[device] {
		return
	}
	select {
	case e.cuts <- device:
		e.cutting[device] = true
	default:
		e.cfg.Log.Warn("cannot end the session of a device", "device", device, "error", "too many others wait")
	}
}

// cutOff ends sessions until ctx is done.
func (e *External) cutOff(ctx context.Context) {
	for {
		select {
		case device := <-e.cuts:
			e.mu.Lock()
			delete(e.cutting, device)
			e.mu.Unlock()
			if err := e.takeOver(ctx, device); err != nil && ctx.Err() == nil {
				e.cfg.Log.Warn("cannot end the session of a device", "device", device, "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// takeOver connects as a device, by which the broker ends the connection that
// the device has, and says goodbye.
func (e *External) takeOver(ctx context.Context, device string) error {
	config, err := e.cfg.DeviceTLS(device)
	if err != nil {
		return err
	}
	nc, raw, err := e.dial(ctx, config)
	if err != nil {
		return err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	if err := raw.SetDeadline(time.Now().Add(externalTimeout)); err != nil {
		return err
	}
	connect := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	connect.ProtocolName, connect.ProtocolVersion = "MQTT", protocolVersion
	connect.ClientIdentifier, connect.CleanSession, connect.Keepalive = device, true, uint16(externalKeepalive/time.Second)
	if err := connect.Write(nc); err != nil {
		return err
	}
	answer, err := packets.ReadPacket(io.LimitReader(nc, 4)) // CONNACK has no more
	if err != nil {
		return fmt.Errorf("read CONNACK: %w", err)
	}
	if ack, ok := answer.(*packets.ConnackPacket); !ok || ack.ReturnCode != packets.Accepted {
		return fmt.Errorf("connect: the broker answers %v", answer)
	}
	return packets.NewControlPacket(packets.Disconnect).Write(nc)
}
