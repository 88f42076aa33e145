package worker

import (
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models/tensor"
)

// slotUnit is what the region is shared out in.
const slotUnit = 64 << 10

// region is memory that parent and child both have mapped. The parent gives
// each request a slot for its inputs and then its outputs; pages that were
// used once are there for the next request. Messages that find no slot
// travel in a memfd of their own.
type region struct {
	memory []byte

	// The parent's side only.
	file   *os.File   // closed once the child has it
	mu     sync.Mutex // guards what follows
	taken  []bool     // of each unit
	slots  int        // that are taken
	closed bool
}

// slot is a part of a region that one request has for itself; none where
// room is 0.
type slot struct{ place, room uint64 }

// newRegion makes the parent's region of at least size bytes. Its seals keep
// the child from cutting it, so that to read it never faults; what is read is
// copied before it is looked at, for the child may still write.
func newRegion(size int) (*region, error) {
	units := (size + slotUnit - 1) / slotUnit
	fd, err := unix.MemfdCreate("dunlin-region", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create shared memory: %w", err)
	}
	file := os.NewFile(uintptr(fd), "region")
	if err := file.Truncate(int64(units) * slotUnit); err != nil {
		file.Close()
		return nil, fmt.Errorf("size shared memory: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		file.Close()
		return nil, fmt.Errorf("seal shared memory: %w", err)
	}
	r, err := mapRegion(file)
	if err != nil {
		file.Close()
		return nil, err
	}
	r.file, r.taken = file, make([]bool, units)
	return r, nil
}

// mapRegion maps a region that is there already.
func mapRegion(file *os.File) (*region, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("shared memory: %w", err)
	}
	memory, err := unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map shared memory: %w", err)
	}
	return &region{memory: memory}, nil
}

// take gives a slot of at least size bytes, the first that is free, or none.
func (r *region) take(size uint64) slot {
	need := int((size + slotUnit - 1) / slotUnit)
	r.mu.Lock()
	defer r.mu.Unlock()
	if need == 0 || size > uint64(len(r.memory)) || r.closed {
		return slot{}
	}
	free := 0
	for i, taken := range r.taken {
		if free++; taken {
			free = 0
		}
		if free == need {
			first := i + 1 - need
			r.mark(first, need, true)
			r.slots++
			return slot{uint64(first) * slotUnit, uint64(need) * slotUnit}
		}
	}
	return slot{}
}

func (r *region) mark(first, units int, taken bool) {
	for i := range units {
		r.taken[first+i] = taken
	}
}

// give takes a slot back.
func (r *region) give(s slot) {
	if s.room == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mark(int(s.place/slotUnit), int(s.room/slotUnit), false)
	r.slots--
	r.unmap()
}

// close gives no more slots, and unmaps the region once all are back.
func (r *region) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.file.Close()
	r.closed = true
	r.unmap()
}

// unmap is called with mu held.
func (r *region) unmap() {
	if r.closed && r.slots == 0 && r.memory != nil {
		unix.Munmap(r.memory)
		r.memory = nil
	}
}

// trim gives the region's pages back to the system when nobody uses them.
func (r *region) trim() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.slots > 0 || r.closed {
		return nil
	}
	return unix.Madvise(r.memory, unix.MADV_REMOVE)
}

// slice gives the bytes from place on, nil where they are not in the region.
func (r *region) slice(place, size uint64) []byte {
	if place > uint64(len(r.memory)) || size > uint64(len(r.memory))-place {
		return nil
	}
	return r.memory[place : place+size : place+size]
}

// holds says whether a tensor's data lies in the region.
func (r *region) holds(t *tensor.Tensor) bool {
	data, start := uintptr(unsafe.Pointer(unsafe.SliceData(t.Data))), uintptr(unsafe.Pointer(unsafe.SliceData(r.memory)))
	return len(t.Data) > 0 && data >= start && data-start < uintptr(len(r.memory))
}
