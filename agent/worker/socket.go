package worker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPacket bounds one packet on the socket.
const maxPacket = 32 << 10

// maxCopied is the size of a message up to which it is cheaper to copy it
// through the socket than to share it.
const maxCopied = 8 << 10

// attached begins the packet of a message that travels in a memfd.
const attached = 0

// writeLimit is how long the other end may leave the socket full; then it
// counts as hung.
const writeLimit = 10 * time.Second

// socket carries messages over a SOCK_SEQPACKET socket pair: small ones in
// its packets, others in a slot of the region, and those that have none, or
// one too small, in a memfd of their own, which both ends drop when it is
// read: the only bound on a message is the limit. Many goroutines may send;
// one receives.
type socket struct {
	conn    *net.UnixConn
	region  *region
	limit   uint64 // bytes of a message
	trusted bool   // the other end is: what it shares is used in place, not copied
	buffer  []byte // of receive
	oob     []byte
}

// newSocket takes over one end of a socket pair.
func newSocket(end *os.File, r *region, limit uint64, trusted bool) (*socket, error) {
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
	return &socket{
		conn: conn, region: r, limit: limit, trusted: trusted,
		buffer: make([]byte, maxPacket), oob: make([]byte, unix.CmsgLen(4)),
	}, nil
}

// errTooLarge is the error of a message over the limit.
var errTooLarge = errors.New("tensors are too large")

// errSocket is wrapped by an error of the socket itself.
var errSocket = errors.New("worker socket")

// send sends a message, in the slot where that fits and helps; it has copied
// it when it returns. With an error that does not wrap errSocket, nothing was
// sent.
func (s *socket) send(m *message, in slot) error {
	header, size := m.header()
	if size > s.limit {
		return fmt.Errorf("%w: %d bytes, more than %d", errTooLarge, size, s.limit)
	}
	if size > maxCopied && size <= in.room {
		memory := s.region.slice(in.place, size)
		m.pieces(header, func(part []byte, at uint64) error { copy(memory[at:], part); return nil })
		header, _ = (&message{kind: kindShared, seq: m.seq, number: size, slot: in}).header()
		return s.write(header, nil)
	}
	if size > maxPacket {
		return s.sendAttached(m, header, size)
	}
	packet := header
	if len(m.tensors) > 0 {
		packet = make([]byte, size)
		m.pieces(header, func(part []byte, at uint64) error { copy(packet[at:], part); return nil })
	}
	return s.write(packet, nil)
}

func (s *socket) sendAttached(m *message, header []byte, size uint64) error {
	fd, err := unix.MemfdCreate("dunlin-tensors", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("create shared memory: %w", err)
	}
	memory := os.NewFile(uintptr(fd), "memfd")
	defer memory.Close()
	if err := memory.Truncate(int64(size)); err != nil {
		return fmt.Errorf("size shared memory: %w", err)
	}
	err = m.pieces(header, func(part []byte, at uint64) error {
		_, err := memory.WriteAt(part, int64(at))
		return err
	})
	if err != nil {
		return fmt.Errorf("fill shared memory: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal shared memory: %w", err)
	}
	return s.write(binary.LittleEndian.AppendUint64([]byte{attached}, size), unix.UnixRights(fd))
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

// receive waits for a message. A kindShared from an end that is not trusted
// is given as it is, for shared to read. release gives its tensors' memory back; it is
// never nil. io.EOF says that the other end is gone.
func (s *socket) receive() (m *message, release func(), err error) {
	n, oobn, flags, _, err := s.conn.ReadMsgUnix(s.buffer, s.oob)
	if err != nil {
		return nil, nil, err
	}
	memory, err := passed(s.oob[:oobn])
	if memory != nil {
		defer memory.Close()
	}
	packet := s.buffer[:n]
	switch {
	case err != nil:
		return nil, nil, err
	case n == 0:
		return nil, nil, io.EOF
	case flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0:
		return nil, nil, fmt.Errorf("%w: packet of more than %d bytes", errMalformed, maxPacket)
	case packet[0] != attached && memory != nil:
		return nil, nil, fmt.Errorf("%w: a descriptor that it does not mention", errMalformed)
	case packet[0] != attached:
		m, err = decode(bytes.Clone(packet))
		if err == nil && m.kind == kindShared && s.trusted {
			m, err = decode(s.region.slice(m.slot.place, m.number))
		}
		return m, func() {}, err
	case memory == nil || n != 9:
		return nil, nil, fmt.Errorf("%w: memory is not attached", errMalformed)
	}
	size := binary.LittleEndian.Uint64(packet[1:])
	if size > s.limit {
		return nil, nil, fmt.Errorf("%w: %d bytes, more than %d", errMalformed, size, s.limit)
	}
	return s.load(memory, int(size))
}

// shared reads the message that a kindShared announces in a slot. The copy
// is the message: the other end may still write to the original.
func (s *socket) shared(m *message, in slot) (*message, error) {
	if in.room == 0 || m.slot != in || m.number > in.room {
		return nil, fmt.Errorf("%w: %d bytes in another slot", errMalformed, m.number)
	}
	inner, err := decode(bytes.Clone(s.region.slice(in.place, m.number)))
	if err == nil && (inner.seq != m.seq || inner.kind < kindDone || inner.kind == kindShared) {
		err = fmt.Errorf("%w: another message in the slot", errMalformed)
	}
	return inner, err
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
	if err != nil || len(fds) != 1 { // the buffer has room for one: the kernel closes others
		return nil, fmt.Errorf("%w: control message", errMalformed)
	}
	return os.NewFile(uintptr(fds[0]), "memfd"), nil
}

// load reads a message out of a memfd. An end that does not trust the other
// one copies it, since what it maps the other may change or cut.
func (s *socket) load(memory *os.File, size int) (*message, func(), error) {
	fd := int(memory.Fd())
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil {
		return nil, nil, fmt.Errorf("%w: what is attached is not shared memory", errMalformed)
	}
	if !s.trusted {
		b := make([]byte, size)
		if n, err := memory.ReadAt(b, 0); err != nil {
			return nil, nil, fmt.Errorf("%w: shared memory has %d of %d bytes", errMalformed, n, size)
		}
		m, err := decode(b)
		return m, func() {}, err
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil, fmt.Errorf("map shared memory: %w", err)
	}
	m, err := decode(b)
	if err != nil {
		unix.Munmap(b)
		return nil, nil, err
	}
	return m, func() { unix.Munmap(b) }, nil
}

func (s *socket) close() error { return s.conn.Close() }
