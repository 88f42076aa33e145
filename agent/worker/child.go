package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/ort"
)

// Where the child finds its end of the socket, and the region.
const (
	socketFD = 3
	regionFD = 4
)

// Child is the main of the child process and gives its exit status. It ends
// when the parent closes the socket or dies, and prints only to stderr.
func Child() int { return runChild(nil) }

// runChild calls loading, where not nil, before each load.
func runChild(loading func(entry string)) int {
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
	c := &sessions{socket: s, memory: memory, box: box, loading: loading, cancels: make(map[uint64]context.CancelFunc)}
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

// lowerPriority does so for all threads there are, and so for all to come: a
// thread has the niceness of the one that began it. Others begin meanwhile,
// so it looks again until there was none without.
func lowerPriority() error {
	const idlest = 19
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
	loading func(entry string)
	lanes   *ort.Lanes // set by init

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
	if m.kind != kindInit || len(m.strings) != 1 {
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
	c.lanes = ort.NewLanes(c.memory)
	if err := ort.TrimWhenIdle(idle); err != nil {
		return err
	}
	debug.FreeOSMemory()
	return c.socket.send(&message{kind: kindDone, seq: m.seq, number: c.box.number(), strings: append([]string{ort.Version()}, providers...)}, nil)
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
	case kindLoad:
		done, err := c.load(ctx, m)
		if err == nil {
			if err = c.socket.send(done, nil); !errors.Is(err, errTooLong) {
				return err
			}
			c.lanes.Close(m.session)
		}
		return c.socket.send(failure(m.seq, err), nil)
	case kindCompile:
		if c.loading != nil && len(m.strings) > 1 {
			c.loading(m.strings[1])
		}
		done, err := compileModel(ctx, m)
		if err == nil {
			if err = c.socket.send(done, nil); !errors.Is(err, errTooLong) {
				return err
			}
		}
		return c.socket.send(failure(m.seq, err), nil)
	case kindUnload:
		c.lanes.Close(m.session)
		return c.socket.send(&message{kind: kindDone, seq: m.seq}, nil)
	}
	return fmt.Errorf("%w: kind %d is not a question", errMalformed, m.kind)
}

func (c *sessions) load(ctx context.Context, m *message) (*message, error) {
	if len(m.strings) != 2 {
		return nil, fmt.Errorf("%w: load has %d strings", errMalformed, len(m.strings))
	}
	if c.loading != nil {
		c.loading(m.strings[1])
	}
	start := time.Now()
	s, err := ort.Open(ctx, m.strings[0], m.strings[1])
	if err != nil {
		return nil, err
	}
	took := time.Since(start)
	c.lanes.Open(m.session, s)
	return &message{kind: kindDone, seq: m.seq, number: uint64(took), batch: s.Batch(), inputs: s.Inputs(), outputs: s.Outputs()}, nil
}

// maxReason bounds the text of a failure, which may quote a model.
const maxReason = 4 << 10

// failure answers a question that failed.
func failure(seq uint64, err error) *message {
	k := kindFailed
	if errors.Is(err, context.Canceled) {
		k = kindCancelled
	}
	reason := err.Error()
	return &message{kind: k, seq: seq, strings: []string{reason[:min(len(reason), maxReason)]}}
}
