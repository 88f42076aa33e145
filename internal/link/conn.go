package link

import (
	"fmt"
	"net"
	"sync/atomic"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// maxPacket bounds an MQTT packet from the broker. The client allocates
// whatever length a packet announces, so a longer one ends the connection.
const maxPacket = MaxPayload + 4<<10

// boundedConn follows the packets that are read through it, and fails where
// one is longer than maxPacket. One goroutine may read at a time.
type boundedConn struct {
	net.Conn
	frame framing
	pongs atomic.Uint64 // that have come
}

// ping asks the broker for a sign of life, which comes after all that it has
// sent before. The client writes whole packets, so this one is between two.
func (c *boundedConn) ping() error {
	_, err := c.Conn.Write([]byte{packets.Pingreq << 4, 0})
	return err
}

func (c *boundedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	e := c.frame.follow(p[:n])
	if c.pongs.Add(c.frame.pongs); e != nil {
		return 0, e
	}
	c.frame.pongs = 0
	return n, err
}

// framing is where in an MQTT packet a stream of bytes is.
type framing struct {
	inLength bool // the type byte was read, the length is not complete
	length   uint32
	digits   uint // bytes of the length that were read
	left     uint32
	pongs    uint64 // PINGRESPs that have begun
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
			pongs := f.pongs
			if b == packets.Pingresp<<4 {
				pongs++
			}
			*f = framing{inLength: true, pongs: pongs}
			continue
		}
		f.length |= uint32(b&0x7f) << (7 * f.digits)
		f.digits++
		if f.length > maxPacket || f.digits == 4 && b&0x80 != 0 {
			return fmt.Errorf("the broker sent a packet of %d bytes or more, allowed are %d", f.length, maxPacket)
		}
		if b&0x80 == 0 {
			*f = framing{left: f.length, pongs: f.pongs}
		}
	}
	return nil
}
