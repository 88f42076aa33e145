package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
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
	// The Go side of this process only passes messages on.
	debug.SetMemoryLimit(childHeap)
	if err := ort.DieBySignal(); err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return 1
	}
	s, err := childSocket()
	if err != nil {
		fmt.Fprintf(os.Stderr, "dunlin-agent worker is started by dunlin-agent only: %v\n", err)
		return 2
	}
	c := &sessions{socket: s, loading: loading, open: make(map[uint64]*ort.Session), cancels: make(map[uint64]context.CancelFunc)}
	if err := c.serve(); err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return 1
	}
	return 0
}

func childSocket() (*socket, error) {
	file := os.NewFile(regionFD, "region")
	defer file.Close()
	r, err := mapRegion(file)
	if err != nil {
		return nil, err
	}
	return newSocket(os.NewFile(socketFD, "socket"), r, initLimit, true)
}

// childHeap is where the child's garbage collector begins to work harder.
const childHeap = 16 << 20

// initLimit bounds a message until kindInit says the limit.
const initLimit = maxPacket

// sessions is the child's side of the socket. Each question is worked on by
// a goroutine of its own; the parent bounds how many there are.
type sessions struct {
	socket  *socket
	loading func(entry string)

	mu      sync.Mutex // guards what follows
	open    map[uint64]*ort.Session
	cancels map[uint64]context.CancelFunc // of the questions being worked on
}

// serve answers until the parent is gone. The process is about to end then:
// what still runs is not waited for.
func (c *sessions) serve() error {
	if err := c.init(); err != nil {
		return err
	}
	for {
		m, release, err := c.socket.receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if m.kind == kindCancel {
			c.cancel(m.seq)
			release()
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		c.mu.Lock()
		c.cancels[m.seq] = cancel
		c.mu.Unlock()
		go func() {
			defer release()
			defer c.cancel(m.seq)
			if err := c.answer(ctx, m); err != nil {
				fmt.Fprintf(os.Stderr, "worker: %v\n", err)
				os.Exit(1)
			}
		}()
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
	c.socket.limit = m.limit
	err = ort.Init(m.strings[0], int(m.number))
	var providers []string
	if err == nil {
		providers, err = ort.Providers()
	}
	if err != nil {
		return c.socket.send(failure(m.seq, err), slot{})
	}
	debug.FreeOSMemory()
	return c.socket.send(&message{kind: kindDone, seq: m.seq, strings: append([]string{ort.Version()}, providers...)}, slot{})
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
		if err != nil {
			return c.socket.send(failure(m.seq, err), slot{})
		}
		return c.socket.send(done, slot{})
	case kindRun:
		return c.run(ctx, m)
	case kindUnload:
		c.mu.Lock()
		s := c.open[m.session]
		delete(c.open, m.session)
		c.mu.Unlock()
		if s != nil {
			s.Close()
		}
		return c.socket.send(&message{kind: kindDone, seq: m.seq}, slot{})
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
	c.mu.Lock()
	c.open[m.session] = s
	c.mu.Unlock()
	return &message{kind: kindDone, seq: m.seq, number: uint64(took), inputs: s.Inputs(), outputs: s.Outputs()}, nil
}

func (c *sessions) run(ctx context.Context, m *message) error {
	c.mu.Lock()
	s := c.open[m.session]
	c.mu.Unlock()
	if s == nil {
		return c.socket.send(failure(m.seq, errors.New("session is not open")), slot{})
	}
	var sending error
	err := s.Run(ctx, m.tensors, m.strings, func(out []tensor.Tensor) error {
		for i := range out { // an output that is an input lies where the answer will
			if c.socket.region.holds(&out[i]) {
				out[i].Data = bytes.Clone(out[i].Data)
			}
		}
		err := c.socket.send(&message{kind: kindDone, seq: m.seq, tensors: out}, m.slot)
		if sending = err; err != nil {
			err = fmt.Errorf("outputs: %w", err)
		}
		return err
	})
	if err != nil && !errors.Is(sending, errSocket) {
		return c.socket.send(failure(m.seq, err), slot{})
	}
	return sending
}

// maxReason bounds the text of a failure, which may quote a model.
const maxReason = 4 << 10

// failure answers a question that failed.
func failure(seq uint64, err error) *message {
	k := kindFailed
	if errors.Is(err, context.Canceled) {
		k = kindCancelled
	} else if e, ok := errors.AsType[*ort.Error](err); ok && e.Code == ort.InvalidArgument {
		k = kindRefused
	}
	reason := err.Error()
	return &message{kind: k, seq: seq, strings: []string{reason[:min(len(reason), maxReason)]}}
}
