package broker

import (
	"bytes"
	"crypto/x509"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/eclipse/paho.mqtt.golang/packets"
	mochi "github.com/mochi-mqtt/server/v2/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// pipes is a net.Listener whose connections are pipes, for tests in which time
// is not real.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// shown is a connection whose client has shown a certificate, or none.
type shown struct {
	net.Conn
	certificate *x509.Certificate
}

// shows makes a connection one of a device, "" for one without a certificate.
func shows(nc net.Conn, device string) net.Conn {
	if device == "" {
		return shown{nc, nil}
	}
	return shown{nc, certificateOf(device).Leaf}
}

// showing stands in for TLS.
func showing(nc net.Conn) (net.Conn, *x509.Certificate, error) {
	return nc, nc.(shown).certificate, nil
}

// dial opens a connection of a device, "" for one without a certificate, on
// which the test speaks MQTT itself.
func (p *pipes) dial(t testing.TB, device string) *rawClient {
	t.Helper()
	near, far := net.Pipe()
	select {
	case p.conns <- shows(far, device):
	case <-p.done:
		t.Fatal("the listener is closed")
	}
	return newRawClient(t, near)
}

// rawClient writes and reads packets.
type rawClient struct {
	t testing.TB
	net.Conn
	packets chan packets.ControlPacket // closed with the connection
}

// newRawClient reads what comes on a connection all the time.
func newRawClient(t testing.TB, nc net.Conn) *rawClient {
	r := &rawClient{t: t, Conn: nc, packets: make(chan packets.ControlPacket, 10_000)}
	go func() {
		defer close(r.packets)
		for {
			p, err := packets.ReadPacket(nc)
			if err != nil {
				return
			}
			r.packets <- p
		}
	}()
	t.Cleanup(func() { nc.Close() })
	return r
}

func encode(p packets.ControlPacket) []byte {
	var b bytes.Buffer
	p.Write(&b)
	return b.Bytes()
}

// send writes packets; the broker may have closed the connection.
func (r *rawClient) send(ps ...packets.ControlPacket) {
	for _, p := range ps {
		r.Conn.Write(encode(p))
	}
}

// next is the next packet, nil when the broker closed the connection.
func (r *rawClient) next() packets.ControlPacket { return <-r.packets }

// wantClosed reads until the broker closes the connection.
func (r *rawClient) wantClosed() {
	for range r.packets {
	}
}

// connect sends CONNECT and returns the code of the answer, -1 for none.
func (r *rawClient) connect(c *packets.ConnectPacket) int {
	r.t.Helper()
	r.send(c)
	switch p := r.next().(type) {
	case *packets.ConnackPacket:
		return int(p.ReturnCode)
	case nil:
		return -1
	default:
		r.t.Fatalf("got %v for CONNECT", p)
		return -1
	}
}

func (r *rawClient) mustConnect(c *packets.ConnectPacket) {
	r.t.Helper()
	if code := r.connect(c); code != 0 {
		r.t.Fatalf("CONNECT: code %d", code)
	}
}

// roundtrip returns when the broker has handled what was sent before.
func (r *rawClient) roundtrip() {
	r.t.Helper()
	r.send(packets.NewControlPacket(packets.Pingreq))
	for {
		switch r.next().(type) {
		case *packets.PingrespPacket:
			return
		case nil:
			r.t.Fatal("the connection is closed")
		}
	}
}

func connectPacket(device string, change ...func(*packets.ConnectPacket)) *packets.ConnectPacket {
	c := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	c.ProtocolName, c.ProtocolVersion = "MQTT", 4
	c.ClientIdentifier, c.CleanSession, c.Keepalive = device, true, 60
	for _, f := range change {
		f(c)
	}
	return c
}

// joinUser is the user of a join token.
var joinUser = link.JoinUser("0a1b2c3d4e5f")

// enrolPacket is the CONNECT of a device that enrols.
func enrolPacket(user string, change ...func(*packets.ConnectPacket)) *packets.ConnectPacket {
	return connectPacket("any", append([]func(*packets.ConnectPacket){func(c *packets.ConnectPacket) {
		c.UsernameFlag, c.Username = true, user
		c.PasswordFlag, c.Password = true, []byte(passwordOf(user))
	}}, change...)...)
}

// connect5 is a CONNECT of MQTT 5 without a fault.
func connect5(device string) []byte {
	p := mochi.Packet{
		FixedHeader:     mochi.FixedHeader{Type: mochi.Connect},
		ProtocolVersion: 5,
		Connect: mochi.ConnectParams{
			ProtocolName: []byte("MQTT"), ClientIdentifier: device, Clean: true, Keepalive: 60,
		},
	}
	var b bytes.Buffer
	if err := p.ConnectEncode(&b); err != nil {
		panic(err)
	}
	return b.Bytes()
}

func withWill(topic, payload string) func(*packets.ConnectPacket) {
	return func(c *packets.ConnectPacket) {
		c.WillFlag, c.WillTopic, c.WillMessage = true, topic, []byte(payload)
	}
}

func publishPacket(topic, payload string, qos byte) *packets.PublishPacket {
	p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	p.TopicName, p.Payload, p.Qos = topic, []byte(payload), qos
	if qos > 0 {
		p.MessageID = 7
	}
	return p
}

func subscribePacket(qos byte, filters ...string) *packets.SubscribePacket {
	s := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
	s.MessageID = 1
	for _, f := range filters {
		s.Topics = append(s.Topics, f)
		s.Qoss = append(s.Qoss, qos)
	}
	return s
}

// startPiped runs an embedded broker over pipes.
func startPiped(t testing.TB, auth Authenticator, handle Handler, log io.Writer, change ...func(*EmbeddedConfig)) (*Embedded, *pipes, func()) {
	t.Helper()
	cfg := EmbeddedConfig{Auth: auth, Log: testLog(log)}
	for _, f := range change {
		f(&cfg)
	}
	p := newPipes()
	e := newEmbedded(cfg, p, showing)
	return e, p, start(t, e, handle)
}
