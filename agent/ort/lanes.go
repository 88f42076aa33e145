package ort

// #include <stdlib.h>
// #include "lanes.h"
import "C"

import (
	"fmt"
	"sync"
	"syscall"
	"unsafe"

	"github.com/dunlin/dunlin/models/tensor"
)

// Lanes run sessions for another process: each lane is a socket, and a thread
// that Go knows nothing of answers the packets that come over it, one after
// the other (packet.go). They live as long as the process. The methods may be
// called from many goroutines at a time.
type Lanes struct {
	c *C.struct_lanes

	mu       sync.Mutex // guards what follows
	sessions map[uint64]*Session
}

// MaxLanes bounds the numbers of lanes, which begin at 0.
const MaxLanes = C.LANES_MAX

// NewLanes gives lanes that share memory with the other process: a mapping
// that is never undone. Init must have succeeded before there is a lane.
func NewLanes(memory []byte) *Lanes {
	return &Lanes{
		c:        C.lanes_new(unsafe.Pointer(unsafe.SliceData(memory)), C.size_t(len(memory))),
		sessions: make(map[uint64]*Session),
	}
}

// Add starts a lane on a SOCK_SEQPACKET socket in blocking mode, which it
// takes over. The lane ends when the other end is closed.
func (l *Lanes) Add(number uint64, socket int) error {
	if failed := C.lanes_add(l.c, C.size_t(number), C.int(socket)); failed != 0 {
		return fmt.Errorf("add lane %d: %w", number, syscall.Errno(failed))
	}
	return nil
}

// Open has a session answer to a number, and takes it over.
func (l *Lanes) Open(number uint64, s *Session) {
	names := func(infos []tensor.Info) []*C.char {
		all := make([]*C.char, len(infos))
		for i, info := range infos {
			all[i] = s.names[info.Name]
		}
		return all
	}
	in, out := names(s.inputs), names(s.outputs)
	arenas := C.CString(s.shrink)
	defer C.free(unsafe.Pointer(arenas))
	C.lanes_open(l.c, C.uint64_t(number), s.pointer, arenas,
		unsafe.SliceData(in), C.size_t(len(in)), unsafe.SliceData(out), C.size_t(len(out)))
	l.mu.Lock()
	l.sessions[number] = s
	l.mu.Unlock()
}

// Take gives back the session of a number when the runs that go on are over;
// lanes refuse the number from then on. It gives nil where there is none.
func (l *Lanes) Take(number uint64) *Session {
	l.mu.Lock()
	s := l.sessions[number]
	delete(l.sessions, number)
	l.mu.Unlock()
	if s != nil {
		C.lanes_close(l.c, C.uint64_t(number))
	}
	return s
}

// Close closes the session of a number when the runs that go on are over. It
// does nothing where there is none.
func (l *Lanes) Close(number uint64) {
	if s := l.Take(number); s != nil {
		s.Close()
	}
}

// Cancel ends a run after the node that is being computed, also one that the
// lane has yet to hear of.
func (l *Lanes) Cancel(lane, sequence uint64) {
	C.lanes_cancel(l.c, C.size_t(lane), C.uint64_t(sequence))
}
