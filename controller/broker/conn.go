package broker

import (
	"container/list"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/dunlin/dunlin/internal/pki"
)

// conn is a connection to the embedded broker.
type conn struct {
	net.Conn               // over TLS, once the handshake is done
	raw      net.Conn      // below TLS
	number   uint64        // greater than those of all earlier connections
	began    *list.Element // in the broker's list; guarded by its mu
	header   []byte        // read ahead, for Read to give out first
	ended    chan struct{} // closed when the broker has let go of the connection

	// What the connection's own goroutine found out. It is set before the
	// connection is entered among the sessions, and stays.
	certificate *x509.Certificate // that the client showed; nil: none
	device      string            // "": it enrols
	data        bool              // the device's second connection, for what it fetches
	user        string            // of one that enrols
	id          string            // of its client, in the server
	client      *mqtt.Client
	will        []byte    // nil: none
	until       time.Time // when it ends at the latest; zero: never

	established, refused bool         // used by the connection's own goroutine only
	denied               atomic.Bool  // a topic, once
	waiting              atomic.Int64 // bytes of FetchData that are not written yet
	enrols, fetches      bool         // counted among those that do; guarded by the broker's mu
}

// name says whose connection it is, as far as is known.
func (c *conn) name() string {
	if c.certificate != nil {
		if device, ok := pki.DeviceOf(c.certificate); ok {
			return "device:" + device
		}
	}
	return "nobody"
}

// readConnectHeader reads ahead the fixed header of the first packet, which the
// server then expects to be CONNECT, and refuses a large one before anything
// is allocated for it. The deadline it has stays until the server has the
// whole packet.
func (c *conn) readConnectHeader() error {
	var b [5]byte // a type, and a length of up to four bytes
	if _, err := io.ReadFull(c.Conn, b[:2]); err != nil {
		return fmt.Errorf("read CONNECT: %w", err)
	}
	n, size := 2, int(b[1]&0x7f)
	for shift := 7; b[n-1]&0x80 != 0; shift += 7 {
		if n == len(b) {
			return errors.New("the length of CONNECT has more than 4 bytes")
		}
		if _, err := io.ReadFull(c.Conn, b[n:n+1]); err != nil {
			return fmt.Errorf("read CONNECT: %w", err)
		}
		size |= int(b[n]&0x7f) << shift
		n++
	}
	if size > maxConnectPacket {
		return fmt.Errorf("CONNECT has %d bytes, the limit is %d", size, maxConnectPacket)
	}
	c.header = b[:n]
	return nil
}

func (c *conn) Read(p []byte) (int, error) {
	if len(c.header) > 0 {
		n := copy(p, c.header)
		c.header = c.header[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// Write bounds the time of a write, and closes the connection when one fails:
// it may have written a part of a packet, and the server would go on with the
// next one.
func (c *conn) Write(p []byte) (int, error) {
	err := c.Conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		c.Close()
	}
	return n, err
}

// Close closes what is below TLS. A goodbye of TLS would wait for a client
// that takes nothing, and MQTT has its own.
func (c *conn) Close() error { return c.raw.Close() }

// SetDeadline moves the read deadline only: the server moves both whenever it
// has read a packet, and a device that sends but does not take what it is sent
// would never be cut off. It moves it up to the end of the connection.
func (c *conn) SetDeadline(t time.Time) error {
	if !c.until.IsZero() && (t.IsZero() || t.After(c.until)) {
		t = c.until
	}
	return c.SetReadDeadline(t)
}
