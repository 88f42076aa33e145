package netem

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// This file is the TCP of emulated links: retransmission time-outs by RFC
// 6298, selective acknowledgements, losses found by the order of transmission
// (RFC 8985 without its allowance for reordering, as nothing is reordered
// here), congestion control by RFC 5681. It does without delayed
// acknowledgements, tail loss probes and window scaling.
const (
	mss           = 1448
	firstWindow   = 10 // segments, RFC 6928
	sendBuffer    = 64 << 10
	receiveBuffer = 256 << 10
	firstRTO      = time.Second
	leastRTO      = 200 * time.Millisecond // Linux's
	mostRTO       = 2 * time.Minute
	// mostRetries is how often in a row a time-out may end without an answer.
	mostRetries = 15
	// mostProbes is how far the wait for a peer grows that answers and takes
	// nothing: it doubles as often.
	mostProbes = 8
)

// errGone is the error of a connection whose other end does not answer.
var errGone = errors.New("connection timed out on the emulated link")

// end is one end of a connection. What it is made of is guarded by the link's
// lock; ready is broadcast when Read or Write may go on.
type end struct {
	link  *Link
	way   int // that it sends by
	peer  *end
	ready *sync.Cond
	err   error // that ended it
	ended bool  // Close was called

	// What it sends.
	unsent   bytes.Buffer
	queue    []*segment // sent and not acknowledged, by sequence
	next     uint64     // sequence of what is sent next
	held     int        // bytes in queue
	inFlight int        // segments in queue that are neither lost nor acknowledged selectively
	sent     uint64     // how many segments were transmitted
	newest   uint64     // of those that were acknowledged, the last that was transmitted
	window   int        // bytes that the peer takes
	cwnd     float64    // segments
	ssthresh float64
	recover  uint64 // losses below this sequence have been counted
	srtt     time.Duration
	rttvar   time.Duration
	rto      time.Duration
	retries  int
	timer    *time.Timer
	fin      bool // is in queue, or was acknowledged
	done     bool // nothing is sent any more

	// What it receives.
	expects uint64
	early   map[uint64]*segment
	arrived bytes.Buffer
	closed  bool // the peer's end has arrived
	quiet   bool // the window that was told last has no room for a segment

	readBy, writeBy deadline
}

// segment is data, or the end of it.
type segment struct {
	sequence uint64
	data     []byte
	fin      bool
	number   uint64 // of its last transmission
	at       time.Time
	again    bool // was transmitted more than once
	lost     bool
	sacked   bool
}

func (s *segment) end() uint64 {
	if s.fin {
		return s.sequence + 1
	}
	return s.sequence + uint64(len(s.data))
}

// deadline is that of Read or Write.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func newEnd(l *Link, way int) *end {
	e := &end{link: l, way: way, window: receiveBuffer, cwnd: firstWindow, ssthresh: 1 << 30, rto: firstRTO, early: map[uint64]*segment{}}
	e.ready = sync.NewCond(&l.mu)
	return e
}

// Pipe gives both ends of a connection that is open already; near sends by the
// way there.
func (l *Link) Pipe() (near, far net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pipe()
}

func (l *Link) pipe() (near, far *end) {
	near, far = newEnd(l, 0), newEnd(l, 1)
	near.peer, far.peer = far, near
	l.open[near] = func(err error) {
		l.mu.Lock()
		defer l.mu.Unlock()
		near.fail(err)
		far.fail(err)
	}
	return near, far
}

// connect opens a connection: its first packet travels there and back, and is
// sent again, after a second and then twice the time before.
func (l *Link) connect(ctx context.Context) (near, far *end, err error) {
	answered := make(chan struct{})
	var once sync.Once
	for wait := firstRTO; ; wait *= 2 {
		l.mu.Lock()
		l.send(0, 0, func() {
			l.send(1, 0, func() { once.Do(func() { close(answered) }) })
		})
		l.mu.Unlock()
		t := time.NewTimer(wait)
		select {
		case <-answered:
			t.Stop()
			l.mu.Lock()
			defer l.mu.Unlock()
			near, far = l.pipe()
			return near, far, nil
		case <-ctx.Done():
			t.Stop()
			return nil, nil, context.Cause(ctx)
		case <-t.C:
		}
	}
}

// fail ends this end. It is called with the lock.
func (e *end) fail(err error) {
	if e.err == nil {
		e.err = err
	}
	e.over()
	e.ready.Broadcast()
}

// over forgets what is of no use any more: the connection when both ends are
// over, since one may not know of the other yet.
func (e *end) over() {
	if e.timer != nil {
		e.timer.Stop()
	}
	if e.done = true; !e.peer.done {
		return
	}
	if e.way == 0 {
		delete(e.link.open, e)
	} else {
		delete(e.link.open, e.peer)
	}
}

// pump sends what may be sent. It is called with the lock.
func (e *end) pump() {
	if e.err != nil {
		return
	}
	for _, s := range e.queue {
		if e.inFlight >= int(e.cwnd) {
			break
		}
		if s.lost {
			s.lost = false
			e.transmit(s)
		}
	}
	for e.inFlight < int(e.cwnd) && e.unsent.Len() > 0 && (e.held+min(mss, e.unsent.Len()) <= e.window || len(e.queue) == 0 && e.retries > 0) {
		s := &segment{sequence: e.next, data: bytes.Clone(e.unsent.Next(mss))}
		e.add(s)
	}
	if e.ended && !e.fin && e.unsent.Len() == 0 {
		e.fin = true
		e.add(&segment{sequence: e.next, fin: true})
	}
	if (len(e.queue) > 0 || e.unsent.Len() > 0) && e.timer == nil {
		e.arm()
	}
}

func (e *end) add(s *segment) {
	e.queue = append(e.queue, s)
	e.next = s.end()
	e.held += len(s.data)
	e.transmit(s)
}

func (e *end) transmit(s *segment) {
	s.again = s.number > 0
	e.sent++
	s.number, s.at = e.sent, time.Now()
	e.inFlight++
	data := s.data
	if len(data) > 0 && e.link.cond.Corrupt > 0 && e.link.lanes[e.way].rng.Float64() < e.link.cond.Corrupt {
		data = bytes.Clone(data)
		data[e.link.lanes[e.way].rng.IntN(len(data))] ^= 1
	}
	e.link.send(e.way, len(s.data), func() { e.peer.receive(&segment{sequence: s.sequence, data: data, fin: s.fin}) })
}

// arm has the oldest segment time out.
func (e *end) arm() {
	wait := min(e.rto<<min(e.retries, 16), mostRTO)
	if e.timer == nil {
		e.timer = time.AfterFunc(wait, e.timeout)
	} else {
		e.timer.Reset(wait)
	}
}

func (e *end) timeout() {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	if e.err != nil || len(e.queue) == 0 && e.unsent.Len() == 0 {
		return
	}
	if e.retries++; e.retries > mostRetries {
		e.fail(errGone)
		return
	}
	if len(e.queue) > 0 {
		if e.retries == 1 {
			e.ssthresh = max(float64(e.inFlight)/2, 2)
		}
		for _, s := range e.queue {
			if !s.sacked {
				s.lost = true
			}
		}
		e.inFlight, e.cwnd, e.recover = 0, 1, e.next
	}
	e.pump()
	e.arm()
}

// receive takes a segment in, and acknowledges what there is.
func (e *end) receive(s *segment) {
	if e.err != nil && !e.ended {
		return
	}
	if s.sequence >= e.expects && (s.fin || e.arrived.Len()+len(s.data) <= receiveBuffer) {
		e.early[s.sequence] = s
	}
	for {
		s := e.early[e.expects]
		if s == nil {
			break
		}
		delete(e.early, s.sequence)
		e.expects = s.end()
		if s.fin {
			e.closed = true
		} else if !e.ended {
			e.arrived.Write(s.data)
		}
	}
	e.ready.Broadcast()
	e.acknowledge()
}

func (e *end) acknowledge() {
	room := receiveBuffer - e.arrived.Len()
	e.quiet = room < mss
	to, early := e.expects, make([]uint64, 0, len(e.early))
	for at := range e.early {
		early = append(early, at)
	}
	slices.Sort(early)
	e.link.send(e.way, 0, func() { e.peer.acknowledged(to, early, room) })
}

// acknowledged takes in what has arrived at the peer.
func (e *end) acknowledged(to uint64, early []uint64, window int) {
	if e.err != nil {
		return
	}
	e.window = window
	e.retries = min(e.retries, mostProbes) // it is there, if it takes nothing
	now := time.Now()
	arrived := 0
	delivered := func(s *segment) {
		if !s.lost {
			e.inFlight--
		}
		s.lost = false
		e.newest = max(e.newest, s.number)
		if !s.again {
			e.measure(now.Sub(s.at))
		}
		arrived++
	}
	for len(e.queue) > 0 && e.queue[0].end() <= to {
		s := e.queue[0]
		e.queue[0] = nil
		e.queue = e.queue[1:]
		e.held -= len(s.data)
		if !s.sacked {
			delivered(s)
		}
	}
	for _, s := range e.queue {
		if _, ok := slices.BinarySearch(early, s.sequence); ok && !s.sacked {
			s.sacked = true
			delivered(s)
		}
	}
	for _, s := range e.queue {
		if s.sacked || s.lost || s.number >= e.newest {
			continue
		}
		s.lost = true // what was transmitted after it has arrived
		e.inFlight--
		if s.sequence >= e.recover {
			e.ssthresh = max(e.cwnd/2, 2)
			e.cwnd, e.recover = e.ssthresh, e.next
		}
	}
	if arrived > 0 {
		e.retries = 0
		if to >= e.recover {
			if e.cwnd < e.ssthresh {
				e.cwnd += float64(arrived)
			} else {
				e.cwnd += float64(arrived) / e.cwnd
			}
		}
	}
	switch {
	case len(e.queue) == 0 && e.fin && e.closed:
		e.over()
	case len(e.queue) == 0 && e.unsent.Len() == 0 && e.timer != nil:
		e.timer.Stop()
		e.timer = nil
	case arrived > 0 && e.timer != nil:
		e.arm()
	}
	e.ready.Broadcast()
	e.pump()
}

// measure takes in a round trip.
func (e *end) measure(rtt time.Duration) {
	if e.srtt == 0 {
		e.srtt, e.rttvar = rtt, rtt/2
	} else {
		e.rttvar = (3*e.rttvar + (e.srtt - rtt).Abs()) / 4
		e.srtt = (7*e.srtt + rtt) / 8
	}
	e.rto = min(max(e.srtt+4*e.rttvar, leastRTO), mostRTO)
}

// Read implements net.Conn.
func (e *end) Read(p []byte) (int, error) {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	for {
		switch {
		case e.ended:
			return 0, net.ErrClosed
		case e.arrived.Len() > 0:
			n, _ := e.arrived.Read(p)
			if e.quiet && receiveBuffer-e.arrived.Len() >= mss {
				e.acknowledge() // there is room again
			}
			return n, nil
		case e.err != nil:
			return 0, e.err
		case e.closed:
			return 0, io.EOF
		case e.readBy.passed():
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		}
		e.ready.Wait()
	}
}

// Write implements net.Conn. What it has taken is sent as the link allows.
func (e *end) Write(p []byte) (n int, err error) {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	for {
		switch {
		case e.ended:
			return n, net.ErrClosed
		case e.err != nil:
			return n, e.err
		case e.writeBy.passed():
			return n, os.ErrDeadlineExceeded
		case len(p) == 0:
			return n, nil
		}
		if room := sendBuffer - e.unsent.Len() - e.held; room > 0 {
			m := min(room, len(p))
			e.unsent.Write(p[:m])
			n, p = n+m, p[m:]
			e.pump()
			continue
		}
		e.ready.Wait()
	}
}

// Close implements net.Conn. What was written is still sent.
func (e *end) Close() error {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	if e.ended {
		return net.ErrClosed
	}
	e.ended = true
	e.arrived.Reset()
	for _, d := range []*deadline{&e.readBy, &e.writeBy} {
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	e.ready.Broadcast()
	e.pump()
	return nil
}

func (e *end) set(d *deadline, at time.Time) {
	d.at = at
	if d.timer != nil {
		d.timer.Stop()
	}
	if !at.IsZero() {
		d.timer = time.AfterFunc(time.Until(at), func() {
			e.link.mu.Lock()
			defer e.link.mu.Unlock()
			e.ready.Broadcast()
		})
	}
	e.ready.Broadcast()
}

// SetDeadline implements net.Conn.
func (e *end) SetDeadline(t time.Time) error {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	e.set(&e.readBy, t)
	e.set(&e.writeBy, t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (e *end) SetReadDeadline(t time.Time) error {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	e.set(&e.readBy, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (e *end) SetWriteDeadline(t time.Time) error {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	e.set(&e.writeBy, t)
	return nil
}

// address is that of both ends.
type address struct{}

func (address) Network() string { return "netem" }
func (address) String() string  { return "netem" }

// LocalAddr implements net.Conn.
func (*end) LocalAddr() net.Addr { return address{} }

// RemoteAddr implements net.Conn.
func (*end) RemoteAddr() net.Addr { return address{} }
