package broker

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
)

// conn is a connection to the embedded broker.
type conn struct {
	net.Conn
	number uint64        // greater than those of all earlier connections
	header []byte        // read ahead, for Read to give out first
	ended  chan struct{} // closed when the broker has let go of the connection

	// What the connection's own goroutine found out. It is set before the
	// connection is entered among the sessions, and stays.
	device string
	client *mqtt.Client
	will   []byte // nil: none

	established, refused bool // used by the connection's own goroutine only
}

// readConnectHeader reads ahead the fixed header of the first packet, which the
// server then expects to be CONNECT, and refuses a large one before anything
// is allocated for it. The deadline it sets stays until the server has the
// whole packet.
func (c *conn) readConnectHeader() error {
	if err := c.SetReadDeadline(time.Now().Add(connectTimeout)); err != nil {
		return err
	}
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
		c.Conn.Close()
	}
	return n, err
}

// SetDeadline moves the read deadline only: the server moves both whenever it
// has read a packet, and a device that sends but does not take what it is sent
// would never be cut off.
func (c *conn) SetDeadline(t time.Time) error { return c.Conn.SetReadDeadline(t) }
