// Package inband gives devices the blobs of their models over MQTT, block by
// block as they ask for them.
//
// Devices take turns, one block each, so that one that asks for much does not
// keep the others waiting. A device whose connection has not taken what it was
// sent is passed over, and beyond some number of devices a request is answered
// "busy", with the time after which to ask again: data never queues up before
// control messages.
package inband

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/bits"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of what is on its way.
const (
	// maxDevices bounds the devices that have blocks outstanding.
	maxDevices = 256
	// maxBlocks bounds the blocks that one device has outstanding.
	maxBlocks = 2 * link.MaxWanted
	// requestQueue bounds the requests that wait to be looked at. Further ones
	// are dropped, and asked again.
	requestQueue = 1024
	// readers look at requests.
	readers = 4
	// grantFor is how long a device that may read a blob may go on to.
	grantFor = 10 * time.Second
	// maxGrants bounds what is remembered of that.
	maxGrants = 4096
	// busyLeast and busyMost bound the wait that a busy answer asks for.
	busyLeast, busyMost = time.Second, 3 * time.Second
	// stuckRetry is how often devices that were passed over are looked at
	// again where the bus says nothing.
	stuckRetry = time.Second
)

// The errors of FetchData.
const (
	Unknown = "unknown" // the blob, or the block of it, is not there
	Refused = "refused" // no deployment gives the device the model
	Busy    = "busy"
)

// Bus sends to the devices.
type Bus interface {
	Publish(topic string, payload []byte) error
}

// pacer is a Bus that says when a device takes no more.
type pacer interface {
	SecondConnections() bool
	Room(device string) bool
	Drained() <-chan struct{}
}

// A Blob is read from any place. It is closed once.
type Blob interface {
	io.ReaderAt
	io.Closer
}

// Registry has the blobs.
type Registry interface {
	// Open opens a blob or manifest of a model's repository for a device, and
	// says how long it is. The error is ErrUnknown or ErrRefused where the
	// device gets none.
	Open(ctx context.Context, device, model string, d digest.Digest, manifest bool) (Blob, int64, error)
}

// The errors of a Registry.
var (
	ErrUnknown = errors.New("no such blob")
	ErrRefused = errors.New("no deployment gives the device this model")
)

// Config is what a Server works with.
type Config struct {
	Bus      Bus
	Registry Registry
	Log      *slog.Logger
	// Malformed is told of requests that are dropped because of that.
	Malformed func(device string, err error)
}

// Server answers requests. It is safe for concurrent use.
type Server struct {
	cfg      Config
	pace     pacer // nil: the bus has none
	requests chan request

	mu     sync.Mutex // guards what follows; not held while anything is read or sent
	lines  map[string]*line
	turn   []*line // those with blocks outstanding, the next one first
	grants map[grantKey]*grant
	wake   chan struct{} // capacity 1: there is something to send
}

type request struct {
	device  string
	payload []byte
}

// line is what one device has outstanding.
type line struct {
	device string
	blocks []*block // first in, first out
	queued map[blockKey]*block
}

type blockKey struct {
	grant  grantKey
	number uint64
	size   uint32
}

type block struct {
	blockKey
	id uint64
	of *grant
}

type grantKey struct {
	device, model string
	sum           [32]byte
	manifest      bool
}

// grant is an open blob that a device may read.
type grant struct {
	key   grantKey
	size  int64
	until time.Time
	file  Blob // closed by the last user
	users int  // guarded by the server's mu; the map of grants is one
}

// New makes a Server; Run starts it.
func New(cfg Config) *Server {
	s := &Server{
		cfg: cfg, requests: make(chan request, requestQueue),
		lines: map[string]*line{}, grants: map[grantKey]*grant{}, wake: make(chan struct{}, 1),
	}
	s.pace, _ = cfg.Bus.(pacer)
	return s
}

// Handle takes in a request of a device. It never waits. It keeps payload.
func (s *Server) Handle(device string, payload []byte) {
	select {
	case s.requests <- request{device, payload}:
	default: // the device asks again
	}
}

// Run answers until ctx is done.
func (s *Server) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for {
				select {
				case r := <-s.requests:
					s.take(ctx, r)
				case <-ctx.Done():
					return
				}
			}
		})
	}
	wg.Go(func() { s.send(ctx) })
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.turn {
		for _, b := range l.blocks {
			s.leave(b.of)
		}
	}
	for _, g := range s.grants {
		s.leave(g)
	}
	s.turn, s.lines, s.grants = nil, map[string]*line{}, map[grantKey]*grant{}
	return nil
}

// take looks at a request, and puts the blocks in line that it is for.
func (s *Server) take(ctx context.Context, r request) {
	m := new(dunlinv1.FetchRequest)
	err := proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(r.payload, m)
	if err == nil {
		err = link.CheckFetch(m)
	}
	if err == nil && len(m.Wanted) > 0 {
		err = models.CheckName(m.Model)
	}
	if err != nil {
		s.cfg.Malformed(r.device, err)
		return
	}
	if len(m.Wanted) == 0 {
		s.answer(r.device, &dunlinv1.FetchData{Id: m.Id, SecondConnection: s.pace != nil && s.pace.SecondConnections()})
		return
	}
	if !s.admits(r.device) {
		s.busy(r.device, m)
		return
	}
	g, err := s.grant(ctx, grantKey{r.device, m.Model, [32]byte(m.Sha256), m.Manifest})
	switch {
	case errors.Is(err, ErrUnknown):
		s.answer(r.device, &dunlinv1.FetchData{Id: m.Id, Block: m.First, Error: Unknown})
	case errors.Is(err, ErrRefused):
		s.answer(r.device, &dunlinv1.FetchData{Id: m.Id, Block: m.First, Error: Refused})
	case err != nil:
		if ctx.Err() == nil {
			s.cfg.Log.Error("cannot read what a device fetches over MQTT", "device", r.device, "model", m.Model, "error", err)
		}
		s.busy(r.device, m)
	default:
		if !s.enqueue(r.device, m, g) {
			s.busy(r.device, m)
		}
		s.mu.Lock()
		s.leave(g)
		s.mu.Unlock()
	}
}

func (s *Server) busy(device string, m *dunlinv1.FetchRequest) {
	wait := busyLeast + mathrand.N(busyMost-busyLeast)
	s.answer(device, &dunlinv1.FetchData{Id: m.Id, Block: m.First, Error: Busy, RetryMs: uint32(wait.Milliseconds())})
}

// admits says whether a device may have blocks outstanding.
func (s *Server) admits(device string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines[device] != nil || len(s.lines) < maxDevices
}

// grant opens a blob for a device, or gives the one that is open. The caller
// leaves it.
func (s *Server) grant(ctx context.Context, k grantKey) (*grant, error) {
	now := time.Now()
	s.mu.Lock()
	g := s.grants[k]
	if g != nil && now.Before(g.until) {
		g.users++
		s.mu.Unlock()
		return g, nil
	}
	s.mu.Unlock()
	file, size, err := s.cfg.Registry.Open(ctx, k.device, k.model, digest.NewDigestFromBytes(digest.SHA256, k.sum[:]), k.manifest)
	if err != nil {
		return nil, err
	}
	g = &grant{key: k, size: size, until: now.Add(grantFor), file: file, users: 2} // the map, and the caller
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.grants) >= maxGrants {
		s.expire(now)
	}
	if old := s.grants[k]; old != nil {
		s.leave(old)
	} else if len(s.grants) >= maxGrants {
		g.users-- // it is not remembered
		return g, nil
	}
	s.grants[k] = g
	return g, nil
}

// expire forgets the grants that have run out. mu is held.
func (s *Server) expire(now time.Time) {
	for k, g := range s.grants {
		if !now.Before(g.until) {
			delete(s.grants, k)
			s.leave(g)
		}
	}
}

// leave lets go of a grant. mu is held.
func (s *Server) leave(g *grant) {
	if g.users--; g.users == 0 {
		_ = g.file.Close() // it was only read
	}
}

// enqueue puts the blocks of a request in line. It says no, and puts in none,
// where there are too many.
func (s *Server) enqueue(device string, m *dunlinv1.FetchRequest, g *grant) bool {
	count := uint64((g.size + int64(m.BlockBytes) - 1) / int64(m.BlockBytes))
	var beyond []uint64
	s.mu.Lock()
	l := s.lines[device]
	if l == nil {
		l = &line{device: device, queued: map[blockKey]*block{}}
	}
	wanted := 0
	for _, b := range m.Wanted {
		wanted += bits.OnesCount8(b)
	}
	if len(l.blocks)+wanted > maxBlocks || s.lines[device] == nil && len(s.lines) >= maxDevices {
		s.mu.Unlock()
		return false
	}
	for i := range 8 * len(m.Wanted) {
		if m.Wanted[i/8]>>(i%8)&1 == 0 {
			continue
		}
		k := blockKey{g.key, m.First + uint64(i), m.BlockBytes}
		if k.number >= count {
			beyond = append(beyond, k.number)
			continue
		}
		if q := l.queued[k]; q != nil {
			q.id = m.Id // the device has given up the request before
			continue
		}
		b := &block{k, m.Id, g}
		l.queued[k] = b
		g.users++
		l.blocks = append(l.blocks, b)
	}
	if len(l.blocks) > 0 && s.lines[device] == nil {
		s.lines[device] = l
		s.turn = append(s.turn, l)
	}
	s.mu.Unlock()
	signal(s.wake)
	for _, n := range beyond {
		s.answer(device, &dunlinv1.FetchData{Id: m.Id, Block: n, BlobBytes: uint64(g.size), Error: Unknown})
	}
	return true
}

// next takes the next block in turn, of a device that has room for it; nil: none.
func (s *Server) next() (b *block, device string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range s.turn {
		l := s.turn[0]
		s.turn = s.turn[1:]
		if s.pace != nil && !s.pace.Room(l.device) {
			s.turn = append(s.turn, l)
			continue
		}
		b, l.blocks = l.blocks[0], l.blocks[1:]
		delete(l.queued, b.blockKey)
		if len(l.blocks) > 0 {
			s.turn = append(s.turn, l)
		} else {
			delete(s.lines, l.device)
		}
		return b, l.device
	}
	return nil, ""
}

// send sends blocks, one after the other, until ctx is done.
func (s *Server) send(ctx context.Context) {
	var drained <-chan struct{}
	if s.pace != nil {
		drained = s.pace.Drained()
	}
	tick := time.NewTicker(stuckRetry)
	defer tick.Stop()
	buf := make([]byte, link.MaxBlock)
	for ctx.Err() == nil {
		b, device := s.next()
		if b == nil {
			select {
			case <-s.wake:
			case <-drained:
			case <-tick.C:
				s.mu.Lock()
				s.expire(time.Now())
				s.mu.Unlock()
			case <-ctx.Done():
			}
			continue
		}
		offset := int64(b.number) * int64(b.size)
		data := buf[:min(int64(b.size), b.of.size-offset)]
		_, err := b.of.file.ReadAt(data, offset)
		s.mu.Lock()
		s.leave(b.of)
		s.mu.Unlock()
		if err != nil && !errors.Is(err, io.EOF) {
			s.cfg.Log.Error("cannot read what a device fetches over MQTT", "device", device, "model", b.grant.model, "error", err)
			continue // the device asks again
		}
		s.answer(device, &dunlinv1.FetchData{Id: b.id, Block: b.number, Data: data, BlobBytes: uint64(b.of.size)})
	}
}

// answer sends to a device. What is lost is asked for again.
func (s *Server) answer(device string, m *dunlinv1.FetchData) {
	payload, err := proto.Marshal(m)
	if err == nil {
		err = s.cfg.Bus.Publish(link.Down(device, link.Data), payload)
	}
	if err != nil {
		s.cfg.Log.Debug("data not published", "device", device, "error", err)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
