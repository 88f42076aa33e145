package worker

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// memory is what a run shares with the child for its tensors: a slot of the
// region, or, where none is free or large enough, a memfd of its own. Either
// is sealed against being cut.
type memory struct {
	bytes  []byte // nil for none
	region *region
	slot   slot
	file   *os.File // of a memfd, until the child has it
	lent   bool
}

// allocate gives memory of at least size bytes.
func allocate(r *region, size uint64) (memory, error) {
	if s := r.take(size); s.room > 0 {
		return memory{bytes: r.bytes(s), region: r, slot: s}, nil
	}
	fd, err := unix.MemfdCreate("dunlin-tensors", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return memory{}, fmt.Errorf("create shared memory: %w", err)
	}
	file := os.NewFile(uintptr(fd), "memfd")
	err = file.Truncate(int64(size))
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	var bytes []byte
	if err == nil {
		bytes, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	}
	if err != nil {
		file.Close()
		return memory{}, fmt.Errorf("create shared memory of %d bytes: %w", size, err)
	}
	return memory{bytes: bytes, file: file}, nil
}

// attached gives the control message that a memfd travels in, nil for a slot.
func (m *memory) attached() []byte {
	if m.file == nil {
		return nil
	}
	return unix.UnixRights(int(m.file.Fd()))
}

// sent says that the child has it.
func (m *memory) sent() {
	if m.file != nil {
		m.file.Close()
		m.file = nil
	}
}

// lend says whether the memory may be kept while its outputs are read.
func (m *memory) lend() bool {
	m.lent = m.region == nil || m.region.lend(m.slot)
	return m.lent
}

// give gives the memory back. It is not used afterwards.
func (m *memory) give() {
	m.sent()
	switch {
	case m.bytes == nil:
	case m.region != nil:
		m.region.give(m.slot, m.lent)
	default:
		unix.Munmap(m.bytes)
	}
	m.bytes = nil
}
