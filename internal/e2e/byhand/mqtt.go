package byhand

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// answerLimit bounds the wait for an answer of the broker.
const answerLimit = 30 * time.Second

// Conn is one connection to a broker, whose packets its owner writes. It is
// not a client: nothing is sent again, and nothing that the broker refuses is
// hidden.
type Conn struct {
	conn    net.Conn
	message func(topic string, payload []byte)
	answers chan packets.ControlPacket // to SUBSCRIBE and PINGREQ
	done    chan struct{}

	mu sync.Mutex // guards writes, and what follows
	id uint16
}

// RefusedError is a broker's answer to CONNECT that is a refusal.
type RefusedError struct{ Code byte }

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the broker refuses the connection: %s", packets.ConnackReturnCodes[e.Code])
}

// Login is what CONNECT says.
type Login struct{ ClientID, User, Password string }

// Connect opens a connection and waits for CONNACK. message is called for each
// message that comes; it may be nil.
func Connect(ctx context.Context, address string, secure *tls.Config, login Login, message func(topic string, payload []byte)) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	conn, err := (&tls.Dialer{Config: secure}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	p := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	p.ProtocolName, p.ProtocolVersion, p.CleanSession, p.Keepalive = "MQTT", 4, true, 60
	p.ClientIdentifier, p.Username, p.Password = login.ClientID, login.User, []byte(login.Password)
	p.UsernameFlag, p.PasswordFlag = login.User != "", login.Password != ""
	err = p.Write(conn)
	var answer packets.ControlPacket
	if err == nil {
		answer, err = packets.ReadPacket(conn)
	}
	if err == nil {
		ack, ok := answer.(*packets.ConnackPacket)
		switch {
		case !ok:
			err = fmt.Errorf("the answer to CONNECT is %s", answer)
		case ack.ReturnCode != packets.Accepted:
			err = &RefusedError{ack.ReturnCode}
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &Conn{conn: conn, message: message, answers: make(chan packets.ControlPacket, 16), done: make(chan struct{})}
	go c.read() // until Close, or until the broker ends it
	return c, nil
}

func (c *Conn) read() {
	defer close(c.done)
	defer c.conn.Close()
	for {
		p, err := packets.ReadPacket(c.conn)
		if err != nil {
			return
		}
		switch p := p.(type) {
		case *packets.PublishPacket:
			if c.message != nil {
				c.message(p.TopicName, p.Payload)
			}
		case *packets.SubackPacket, *packets.PingrespPacket:
			select {
			case c.answers <- p:
			default: // nobody asked
			}
		}
	}
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close ends the connection and waits for its reader.
func (c *Conn) Close() {
	c.conn.Close()
	<-c.done
}

// ErrEnded is the error of using a connection that the broker has ended.
var ErrEnded = errors.New("the broker has ended the connection")

func (c *Conn) write(p packets.ControlPacket) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := p.Write(c.conn); err != nil {
		return fmt.Errorf("%w: %w", ErrEnded, err)
	}
	return nil
}

// Publish writes a message at QoS 0, of whose fate MQTT says nothing.
func (c *Conn) Publish(topic string, payload []byte) error {
	p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	p.TopicName, p.Payload = topic, payload
	return c.write(p)
}

// Subscribe says whether the broker grants a subscription.
func (c *Conn) Subscribe(filter string) (granted bool, err error) {
	p := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
	p.Topics, p.Qoss = []string{filter}, []byte{0}
	c.mu.Lock()
	c.id++
	p.MessageID = c.id
	c.mu.Unlock()
	if err := c.write(p); err != nil {
		return false, err
	}
	for {
		answer, err := c.answer()
		if err != nil {
			return false, err
		}
		if ack, ok := answer.(*packets.SubackPacket); ok && ack.MessageID == p.MessageID {
			return len(ack.ReturnCodes) == 1 && ack.ReturnCodes[0] <= 2, nil
		}
	}
}

// Ping waits until the broker has read all that was written before.
func (c *Conn) Ping() error {
	if err := c.write(packets.NewControlPacket(packets.Pingreq)); err != nil {
		return err
	}
	for {
		answer, err := c.answer()
		if err != nil {
			return err
		}
		if _, ok := answer.(*packets.PingrespPacket); ok {
			return nil
		}
	}
}

func (c *Conn) answer() (packets.ControlPacket, error) {
	timer := time.NewTimer(answerLimit)
	defer timer.Stop()
	select {
	case p := <-c.answers:
		return p, nil
	case <-c.done:
		return nil, ErrEnded
	case <-timer.C:
		return nil, fmt.Errorf("the broker does not answer within %s", answerLimit)
	}
}
