package link

import (
	"fmt"
	"net"
)

// maxPacket bounds an MQTT packet from the broker. The client allocates
// whatever length a packet announces, so a longer one ends the connection.
const maxPacket = MaxPayload + 4<<10

// boundedConn follows the packets that are read through it, and fails where
// one is longer than maxPacket. One goroutine may read at a time.
type boundedConn struct {
	net.Conn
	frame framing
}

func (c *boundedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if e := c.frame.follow(p[:n]); e != nil {
		return 0, e
	}
	return n, err
}

// framing is where in an MQTT packet a stream of bytes is.
type framing struct {
	inLength bool // the type byte was read, the length is not complete
	length   uint32
	digits   uint // bytes of the length that were read
	left     uint32
}

func (f *framing) follow(p []byte) error {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(f.left, uint32(len(p)))
			f.left -= n
			p = p[n:]
			continue
		}
		b := p[0]
		p = p[1:]
		if !f.inLength {
			*f = framing{inLength: true}
			continue
		}
		f.length |= uint32(b&0x7f) << (7 * f.digits)
		f.digits++
		if f.length > maxPacket || f.digits == 4 && b&0x80 != 0 {
			return fmt.Errorf("the broker sent a packet of %d bytes or more, allowed are %d", f.length, maxPacket)
		}
		if b&0x80 == 0 {
			*f = framing{left: f.length}
		}
	}
	return nil
}
