// Package inband fetches bundles over MQTT, for devices that reach nothing but
// their broker, and decides when to.
//
// The device pulls: it asks for the blocks that it lacks, as many at a time as
// come in time, and asks again for those that do not come. A stream outlives
// the connections that it is read by: after a cut only what was on its way is
// asked for again.
package inband

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// DefaultStall is how long nothing may come before a stream is given up.
	DefaultStall = 2 * time.Minute
	// idleAfter is how long a connection stays without anything to ask for.
	idleAfter = 10 * time.Second
	// A line that cannot be opened is tried again after a random part of a
	// bound that doubles.
	firstOpenWait, lastOpenWait = time.Second, 30 * time.Second
	// maxBlob bounds how long the controller may say that a blob is.
	maxBlob = 1 << 50
	// streams may be read at a time: the second one fills the way while the
	// first one's end is awaited.
	streams = 2
)

// Line carries requests and answers; *link.DataLine is one.
type Line interface {
	Shared() bool
	Ask(*dunlinv1.FetchRequest) error
	Answers() <-chan *dunlinv1.FetchData
	Done() <-chan struct{}
	Err() error
	Close()
}

var _ Line = (*link.DataLine)(nil)

// Config is what a Fetcher works with.
type Config struct {
	// Open opens a line; one is open at a time.
	Open  func(context.Context) (Line, error)
	Stall time.Duration // 0: DefaultStall
	Log   *slog.Logger
}

// Fetcher is a source of bundles over MQTT. Run must run; the other methods may
// be called concurrently.
type Fetcher struct {
	cfg  Config
	kick chan struct{} // capacity 1: a stream began, ended, or was read from

	mu       sync.Mutex // guards what follows
	flow     *flow
	progress time.Time // when something came last, or was to come
}

var _ reconcile.Source = (*Fetcher)(nil)

// New makes a Fetcher.
func New(cfg Config) *Fetcher {
	if cfg.Stall == 0 {
		cfg.Stall = DefaultStall
	}
	return &Fetcher{cfg: cfg, kick: make(chan struct{}, 1), flow: newFlow()}
}

// String implements reconcile.Source.
func (*Fetcher) String() string { return "the controller, over MQTT" }

// Streams implements reconcile.Source.
func (*Fetcher) Streams() int { return streams }

// refusedError is the error of what the controller does not give.
type refusedError struct{ answer string }

func (e *refusedError) Error() string {
	if e.answer == "refused" {
		return "the controller does not give it to this device over MQTT: no deployment says so"
	}
	return fmt.Sprintf("the controller answers %.80q over MQTT", e.answer)
}

var (
	errStalled = errors.New("nothing came over MQTT")
	errClosed  = errors.New("read after close")
)

// Get implements reconcile.Source. What it gives goes on through cuts of the
// connection.
func (f *Fetcher) Get(ctx context.Context, r reconcile.Ref, offset, length int64) (*reconcile.Body, error) {
	if _, err := bytesOf(r.Digest); err != nil {
		return nil, err
	}
	if offset < 0 || length < 0 || offset > maxBlob || length > maxBlob {
		return nil, fmt.Errorf("bytes %d from %d on, allowed are 0 to %d", length, offset, int64(maxBlob))
	}
	f.mu.Lock()
	if len(f.flow.streams) == 0 {
		f.progress = time.Now()
	}
	s := f.flow.add(r, offset, length)
	f.mu.Unlock()
	signal(f.kick)
	b := &body{fetcher: f, ctx: ctx, stream: s}
	// What is not there is an error of Get.
	if err := b.await(); err != nil {
		b.Close()
		return nil, err
	}
	return &reconcile.Body{ReadCloser: b, Offset: offset, Whole: length == 0}, nil
}

func bytesOf(d digest.Digest) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("digest %q is not SHA-256", d)
	}
	return hex.DecodeString(d.Encoded())
}

// body reads a stream.
type body struct {
	fetcher *Fetcher
	ctx     context.Context // of the one request, as that of an HTTP one
	stream  *stream
	closed  bool
}

// await waits until there is something to read, or nothing can follow.
func (b *body) await() error {
	f, s := b.fetcher, b.stream
	timer := time.NewTimer(f.cfg.Stall)
	defer timer.Stop()
	for {
		f.mu.Lock()
		_, _, has := s.part()
		done := s.failed == nil && (has || s.sized && s.at >= s.to)
		err, quiet := s.failed, time.Since(f.progress)
		f.mu.Unlock()
		if err != nil || done {
			return err
		}
		if quiet >= f.cfg.Stall {
			return fmt.Errorf("%w for %s", errStalled, f.cfg.Stall)
		}
		timer.Reset(f.cfg.Stall - quiet)
		select {
		case <-s.ready:
		case <-timer.C:
		case <-b.ctx.Done():
			return context.Cause(b.ctx)
		}
	}
}

func (b *body) Read(p []byte) (int, error) {
	if b.closed {
		return 0, errClosed
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		b.fetcher.mu.Lock()
		n, end := b.stream.read(p)
		b.fetcher.mu.Unlock()
		if n > 0 {
			signal(b.fetcher.kick) // there may be more to ask for
			return n, nil
		}
		if end {
			return 0, io.EOF
		}
		if err := b.await(); err != nil {
			return 0, err
		}
	}
}

func (b *body) Close() error {
	b.closed = true
	b.fetcher.mu.Lock()
	b.fetcher.flow.remove(b.stream)
	b.fetcher.mu.Unlock()
	signal(b.fetcher.kick)
	return nil
}

// Run asks for what is wanted until ctx is done.
func (f *Fetcher) Run(ctx context.Context) error {
	bound := firstOpenWait
	for ctx.Err() == nil {
		if !f.wanted() {
			select {
			case <-f.kick:
			case <-ctx.Done():
			}
			continue
		}
		line, err := f.cfg.Open(ctx)
		if err == nil {
			err = f.serve(ctx, line)
			line.Close()
			bound = firstOpenWait
			if err == nil {
				continue // nothing was wanted any more
			}
		}
		if ctx.Err() != nil {
			break
		}
		f.cfg.Log.Debug("no line for fetching over MQTT", "error", err)
		select {
		case <-time.After(rand.N(bound)):
		case <-ctx.Done():
		}
		bound = min(2*bound, lastOpenWait)
	}
	return nil
}

func (f *Fetcher) wanted() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.flow.streams) > 0
}

// serve asks by one line until it ends, ctx does, or, without an error, nothing
// was wanted for a while.
func (f *Fetcher) serve(ctx context.Context, line Line) error {
	f.mu.Lock()
	f.flow.begin(time.Now(), line.Shared())
	f.mu.Unlock()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var idleSince time.Time
	for {
		now := time.Now()
		f.mu.Lock()
		f.flow.expire(now)
		requests := f.flow.next(now)
		at := f.flow.wake(now)
		idle := len(f.flow.streams) == 0
		f.mu.Unlock()
		for _, m := range requests {
			if err := line.Ask(m); err != nil {
				return err
			}
		}
		switch {
		case !idle:
			idleSince = time.Time{}
		case idleSince.IsZero():
			idleSince = now
		case now.Sub(idleSince) >= idleAfter:
			return nil
		}
		if idle {
			at = idleSince.Add(idleAfter)
		}
		if !at.IsZero() {
			timer.Reset(time.Until(at))
		} else {
			timer.Stop()
		}
		select {
		case m := <-line.Answers():
			f.take(m, line.Answers())
		case <-f.kick:
		case <-timer.C:
		case <-line.Done():
			return line.Err()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// take takes in an answer, and those that came with it.
func (f *Fetcher) take(m *dunlinv1.FetchData, more <-chan *dunlinv1.FetchData) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		now := time.Now()
		if f.flow.arrived(m, now) {
			f.progress = now
		}
		select {
		case m = <-more:
		default:
			return
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
