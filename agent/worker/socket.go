package worker

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/ort"
)

// maxPacket bounds one packet on any of the sockets.
const maxPacket = ort.MaxPacket

// writeLimit is how long the other end may leave the socket full; then it
// counts as hung.
const writeLimit = 10 * time.Second

// socket carries messages, one in a packet, over a SOCK_SEQPACKET socket
// pair. Many goroutines may send; one receives.
type socket struct {
	conn   *net.UnixConn
	buffer []byte // of receive
	oob    []byte
}

// socketPair gives two ends of a SOCK_SEQPACKET socket pair with room for
// packets of maxPacket bytes.
func socketPair() (ours, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs = os.NewFile(uintptr(pair[0]), "socket"), os.NewFile(uintptr(pair[1]), "socket")
	for _, end := range pair {
		if err := unix.SetsockoptInt(end, unix.SOL_SOCKET, unix.SO_SNDBUF, 2*maxPacket); err != nil {
			ours.Close()
			theirs.Close()
			return nil, nil, fmt.Errorf("size socket: %w", err)
		}
	}
	return ours, theirs, nil
}

// connect takes over one end of a socket pair.
func connect(end *os.File) (*net.UnixConn, error) {
	defer end.Close()
	c, err := net.FileConn(end)
	if err != nil {
		return nil, err
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%s is not a Unix socket", end.Name())
	}
	return conn, nil
}

// newSocket takes over one end of a socket pair.
func newSocket(end *os.File) (*socket, error) {
	conn, err := connect(end)
	if err != nil {
		return nil, err
	}
	// The control message has room for one descriptor: the kernel closes others.
	return &socket{conn: conn, buffer: make([]byte, maxPacket), oob: make([]byte, unix.CmsgLen(4))}, nil
}

// errTooLong is the error of a message that does not fit a packet.
var errTooLong = errors.New("message is too long")

// errSocket is wrapped by an error of the socket itself.
var errSocket = errors.New("worker socket")

// send sends a message, with kindLane and the lane's socket. With an error
// that does not wrap errSocket, nothing was sent.
func (s *socket) send(m *message, lane *os.File) error {
	packet := m.encode()
	if len(packet) > maxPacket {
		return fmt.Errorf("%w: %d bytes, more than %d", errTooLong, len(packet), maxPacket)
	}
	var oob []byte
	if lane != nil {
		oob = unix.UnixRights(int(lane.Fd()))
	}
	return s.write(packet, oob)
}

func (s *socket) write(packet, oob []byte) error {
	err := s.conn.SetWriteDeadline(time.Now().Add(writeLimit))
	if err == nil {
		_, _, err = s.conn.WriteMsgUnix(packet, oob, nil)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errSocket, err)
	}
	return nil
}

// receive waits for a message. With kindLane comes the lane's socket, which is
// the caller's then. io.EOF says that the other end is gone.
func (s *socket) receive() (m *message, lane *os.File, err error) {
	n, oobn, flags, _, err := s.conn.ReadMsgUnix(s.buffer, s.oob)
	if err != nil {
		return nil, nil, err
	}
	lane, err = passed(s.oob[:oobn])
	defer func() {
		if err != nil && lane != nil {
			lane.Close()
			lane = nil
		}
	}()
	switch {
	case err != nil:
		return nil, lane, err
	case n == 0:
		return nil, lane, io.EOF
	case flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0:
		return nil, lane, fmt.Errorf("%w: packet of more than %d bytes", errMalformed, maxPacket)
	}
	if m, err = decode(s.buffer[:n]); err == nil && (m.kind == kindLane) != (lane != nil) {
		err = fmt.Errorf("%w: kind %d, and a descriptor comes with it: %t", errMalformed, m.kind, lane != nil)
	}
	return m, lane, err
}

// passed gives the file of a control message, nil where there is none.
func passed(oob []byte) (*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	control, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(control) != 1 {
		return nil, fmt.Errorf("%w: control message", errMalformed)
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("%w: control message", errMalformed)
	}
	return os.NewFile(uintptr(fds[0]), "socket"), nil
}

func (s *socket) close() error { return s.conn.Close() }
