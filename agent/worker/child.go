package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/weights"
)

// Where the child finds its end of the socket, and the region.
const (
	socketFD = 3
	regionFD = 4
)

// Child is the main of the child process and gives its exit status. It ends
// when the parent closes the socket or dies, and prints only to stderr.
func Child() int { return runChild(nil) }

// runChild calls opening, where not nil, with each file that is opened, before
// and after it.
func runChild(opening func(file string, opened bool)) int {
	return (&sessions{opening: opening}).run()
}

// run is Child for a side of the socket that has yet to find it.
func (c *sessions) run() int {
	box, err := enterSandbox()
	if err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return 1
	}
	// The Go side of this process only passes messages on.
	debug.SetMemoryLimit(childHeap)
	if err := ort.DieBySignal(); err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return 1
	}
	if err := lowerPriority(); err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return 1
	}
	s, memory, err := childSocket()
	if err != nil {
		fmt.Fprintf(os.Stderr, "dunlin-agent worker is started by dunlin-agent only: %v\n", err)
		return 2
	}
	c.socket, c.memory, c.box, c.cancels = s, memory, box, make(map[uint64]context.CancelFunc)
	if err := c.serve(); err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return 1
	}
	return 0
}

// childSocket gives the child's end of the socket and the region's memory.
func childSocket() (*socket, []byte, error) {
	file := os.NewFile(regionFD, "region")
	defer file.Close()
	r, err := mapRegion(file)
	if err != nil {
		return nil, nil, err
	}
	s, err := newSocket(os.NewFile(socketFD, "socket"))
	return s, r.memory, err
}

// childHeap is where the child's garbage collector begins to work harder.
const childHeap = 16 << 20

// idle is how long no run has used the memory that runs work in before it is
// given back to the system.
const idle = time.Second

// niceness is what the child adds to its parent's: where both want the same
// core, the parent's network must not wait until a model has run.
const niceness = 5

// idlest is the niceness of who gives way to everybody.
const idlest = 19

// lowerPriority does so for all threads there are, and so for all to come: a
// thread has the niceness of the one that began it. Others begin meanwhile,
// so it looks again until there was none without.
func lowerPriority() error {
	// The system call gives 20 less the niceness.
	raw, err := unix.Getpriority(unix.PRIO_PROCESS, os.Getpid())
	if err != nil {
		return fmt.Errorf("lower priority: %w", err)
	}
	wanted := min(20-raw+niceness, idlest)
	for again := true; again; {
		again = false
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("lower priority: %w", err)
		}
		for _, t := range threads {
			id, err := strconv.Atoi(t.Name())
			if err != nil {
				return fmt.Errorf("lower priority: %w", err)
			}
			if raw, err := unix.Getpriority(unix.PRIO_PROCESS, id); err != nil || 20-raw >= wanted {
				continue // it is done, or has ended
			}
			again = true
			if err := unix.Setpriority(unix.PRIO_PROCESS, id, wanted); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("lower priority: %w", err)
			}
			// The parent's threads may have short slices; those that compute
			// are to have the kernel's.
			if a, err := unix.SchedGetAttr(id, 0); err == nil && a.Policy == unix.SCHED_NORMAL {
				a.Runtime = 0
				_ = unix.SchedSetAttr(id, a, 0) // where it cannot be had, nothing is lost
			}
		}
	}
	return nil
}

// sessions is the child's side of the socket. Lanes run models; each other
// question is worked on by a goroutine of its own; the parent bounds how many
// there are.
type sessions struct {
	socket  *socket
	memory  []byte // of the region
	box     Sandbox
	opening func(file string, opened bool)
	watch   func(p *pools, done bool) // see pools
	lanes   *ort.Lanes                // set by init
	bench   bench
	pools   *pools // nil for none; set by init, as is
	device  *pools // these, or what could not be used as such

	mu      sync.Mutex                    // guards what follows
	cancels map[uint64]context.CancelFunc // of the questions being worked on
}

// serve answers until the parent is gone. The process is about to end then:
// what still runs is not waited for.
func (c *sessions) serve() error {
	if err := c.init(); err != nil {
		return err
	}
	for {
		m, lane, err := c.socket.receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch m.kind {
		case kindCancel:
			c.cancel(m.seq)
		case kindCancelRun:
			c.lanes.Cancel(m.number, m.seq)
		case kindLane:
			if err := c.lane(m.number, lane); err != nil {
				return err
			}
		default:
			ctx, cancel := context.WithCancel(context.Background())
			c.mu.Lock()
			c.cancels[m.seq] = cancel
			c.mu.Unlock()
			go func() {
				defer c.cancel(m.seq)
				if err := c.answer(ctx, m); err != nil {
					fmt.Fprintf(os.Stderr, "worker: %v\n", err)
					os.Exit(1)
				}
			}()
		}
	}
}

// init answers the first question, which opens the runtime.
func (c *sessions) init() error {
	m, _, err := c.socket.receive()
	if err != nil {
		return err
	}
	if m.kind != kindInit || len(m.strings) < 1 || len(m.strings) > 2 {
		return fmt.Errorf("%w: kind %d comes first", errMalformed, m.kind)
	}
	err = ort.Init(m.strings[0], int(m.number))
	var providers []string
	if err == nil {
		providers, err = ort.Providers()
	}
	if err != nil {
		return c.socket.send(failure(m.seq, err), nil)
	}
	found := []string{ort.Version()}
	if len(m.strings) == 2 {
		text, err := c.openPools(m.strings[1])
		if err != nil {
			return err
		}
		found = append(found, text)
	}
	c.lanes = ort.NewLanes(c.memory)
	if !c.box.confined { // in one that measures, what a long run needs would be gone before it is counted
		if err := ort.TrimWhenIdle(idle); err != nil {
			return err
		}
	}
	debug.FreeOSMemory()
	return c.socket.send(&message{kind: kindDone, seq: m.seq, number: c.box.number(), strings: append(found, providers...)}, nil)
}

// lane begins a lane on a copy of a socket's descriptor.
func (c *sessions) lane(number uint64, socket *os.File) error {
	defer socket.Close()
	fd, err := unix.FcntlInt(socket.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("add lane %d: %w", number, err)
	}
	return c.lanes.Add(number, fd)
}

func (c *sessions) cancel(seq uint64) {
	c.mu.Lock()
	cancel := c.cancels[seq]
	delete(c.cancels, seq)
	c.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// answer works on one question. Its error is that of the socket.
func (c *sessions) answer(ctx context.Context, m *message) error {
	switch m.kind {
	case kindActivate:
		done, err := c.activate(ctx, m)
		if err == nil {
			if err = c.socket.send(done, nil); !errors.Is(err, errTooLong) {
				return err
			}
			_ = c.close(m.session) // what stays is tried again
		}
		return c.socket.send(failure(m.seq, err), nil)
	case kindCompile:
		if c.opening != nil && len(m.strings) > 1 {
			c.opening(m.strings[1], false)
		}
		done, err := compileModel(ctx, m)
		if err == nil {
			if err = c.socket.send(done, nil); !errors.Is(err, errTooLong) {
				return err
			}
		}
		return c.socket.send(failure(m.seq, err), nil)
	case kindMeasure:
		done, err := c.bench.answer(ctx, m)
		if err == nil {
			if err = c.socket.send(done, nil); !errors.Is(err, errTooLong) {
				return err
			}
		}
		return c.socket.send(failure(m.seq, err), nil)
	case kindDeactivate:
		return c.done(m, c.close(m.session))
	case kindOut:
		return c.done(m, c.out(m.session))
	case kindIn:
		return c.done(m, c.in(ctx, m.session))
	case kindPooling:
		return c.socket.send(pooling(ctx, m.seq), nil)
	}
	return fmt.Errorf("%w: kind %d is not a question", errMalformed, m.kind)
}

// done answers what has no answer but whether it was done.
func (c *sessions) done(m *message, err error) error {
	if err != nil {
		return c.socket.send(failure(m.seq, err), nil)
	}
	return c.socket.send(&message{kind: kindDone, seq: m.seq}, nil)
}

func (c *sessions) activate(ctx context.Context, m *message) (*message, error) {
	n := len(m.strings)
	if n != 1 && n != 2 {
		return nil, fmt.Errorf("%w: activate has %d strings", errMalformed, n)
	}
	if m.threads > ort.MaxThreads {
		return nil, fmt.Errorf("%w: activate has %d threads, allowed are 0 to %d", errMalformed, m.threads, ort.MaxThreads)
	}
	if c.opening != nil {
		c.opening(m.strings[n-1], false)
		defer c.opening(m.strings[n-1], true)
	}
	if n == 2 && m.number == inPool {
		return c.fill(ctx, m)
	}
	before := ownMemory()
	start := time.Now()
	var s *ort.Session
	var err error
	set := ort.Setting{Threads: int(m.threads), Prepack: m.number == 1}
	switch {
	case n == 2:
		s, err = ort.Open(ctx, m.strings[0], m.strings[1], set)
	case set.Prepack && set.Threads <= 1: // others that it begins would give way for ever
		aside(func() { s, err = ort.OpenCompiled(ctx, m.strings[0], set) })
	default:
		s, err = ort.OpenCompiled(ctx, m.strings[0], set)
	}
	if err != nil {
		return nil, err
	}
	took := time.Since(start)
	grown := max(0, ownMemory()-before)
	c.lanes.Open(m.session, s)
	return &message{
		kind: kindDone, seq: m.seq, number: uint64(took), memory: uint64(grown),
		batch: s.Batch(), inputs: s.Inputs(), outputs: s.Outputs(),
	}, nil
}

// aside runs f on a thread of its own that gives way to all others: what f does
// makes something better that goes on without it.
func aside(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()                                         // and ends with it: priority does not come back
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), idlest) // it can be done without
		f()
	}()
	<-done
}

// ownMemory gives the bytes that this process has in memory and that are not
// those of a file; 0 where the system does not say.
func ownMemory() int64 {
	var size, resident, shared int64
	b, err := os.ReadFile("/proc/self/statm")
	if err == nil {
		_, err = fmt.Sscan(string(b), &size, &resident, &shared)
	}
	if err != nil {
		return 0
	}
	return (resident - shared) * int64(os.Getpagesize())
}

// maxReason bounds the text of a failure, which may quote a model.
const maxReason = 4 << 10

// failure answers a question that failed.
func failure(seq uint64, err error) *message {
	k := kindFailed
	switch {
	case errors.Is(err, context.Canceled):
		k = kindCancelled
	case errors.Is(err, weights.ErrFull): // the runtime calls it out of memory
	case ort.IsOutOfMemory(err), errors.Is(err, weights.ErrOutOfMemory):
		k = kindOutOfMemory
	}
	reason := err.Error()
	return &message{kind: k, seq: seq, strings: []string{reason[:min(len(reason), maxReason)]}}
}
