package worker

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// slotUnit is what the region is shared out in.
const slotUnit = 64 << 10

// region is memory that parent and child both have mapped. The parent gives
// each run a slot for its inputs and its outputs; pages that were used once
// are there for the next one.
type region struct {
	memory []byte

	// The parent's side only.
	file   *os.File   // closed once the child has it
	mu     sync.Mutex // guards what follows
	taken  []bool     // of each unit
	slots  int        // that are taken
	lent   uint64     // bytes of slots whose outputs are being read
	closed bool
}

// slot is a part of a region that one run has for itself; none where room
// is 0.
type slot struct{ place, room uint64 }

// newRegion makes the parent's region of at least size bytes. Its seals keep
// the child from cutting it, so that to read it never faults. The child may
// write to it at any time: only numbers that mean nothing here are read in
// place.
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
		if r.taken[first+i] == taken {
			panic("worker: a slot was taken or given back twice")
		}
		r.taken[first+i] = taken
	}
}

// lend says whether a slot may be kept while its outputs are read. Half of
// the region stays for runs, however slow the readers are.
func (r *region) lend(s slot) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lent+s.room > uint64(len(r.memory))/2 {
		return false
	}
	r.lent += s.room
	return true
}

// give takes a slot back; lent says that it was lent.
func (r *region) give(s slot, lent bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mark(int(s.place/slotUnit), int(s.room/slotUnit), false)
	r.slots--
	if lent {
		r.lent -= s.room
	}
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

// bytes gives a slot's.
func (r *region) bytes(s slot) []byte {
	return r.memory[s.place : s.place+s.room : s.place+s.room]
}
