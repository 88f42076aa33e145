// Package netem is a bad network in user space: a link with latency, little
// bandwidth, lost packets and cuts, for tests and simulated fleets. What is
// sent over it goes in packets, of which each is lost, queued and delayed by
// itself; a TCP of our own (tcp.go) repairs that as the kernel's does, and takes
// the time that it takes. All chances come from a seed, and all time is package
// time's, so that tests run in simulated time.
package netem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Conditions are what a link is like, both ways.
type Conditions struct {
	RTT           time.Duration // there and back, without queues
	Loss          float64       // part of the packets that is lost, each way
	BitsPerSecond int64         // each way; 0: no bound
	// Corrupt is the part of the segments in which a bit is another when they
	// arrive, and no checksum has noticed.
	Corrupt float64
	Down    bool // nothing arrives
}

// Check says which of the conditions a link cannot have.
func (c Conditions) Check() error {
	var errs []error
	if c.RTT < 0 || c.RTT > maxRTT {
		errs = append(errs, fmt.Errorf("rtt: is %v, allowed are 0s to %v", c.RTT, maxRTT))
	}
	if !(c.Loss >= 0 && c.Loss <= 1) {
		errs = append(errs, fmt.Errorf("loss: is %v, allowed are 0 to 1", c.Loss))
	}
	if !(c.Corrupt >= 0 && c.Corrupt <= 1) {
		errs = append(errs, fmt.Errorf("corrupt: is %v, allowed are 0 to 1", c.Corrupt))
	}
	if c.BitsPerSecond < 0 {
		errs = append(errs, fmt.Errorf("bits per second: is %d, allowed are 0 and more", c.BitsPerSecond))
	}
	return errors.Join(errs...)
}

const maxRTT = time.Minute

// Link is the way between a device and the rest of the world, which all its
// connections share. Its methods may be called concurrently.
type Link struct {
	plain bool // connections are those of the kernel, and can only be reset

	mu        sync.Mutex // guards what follows, and what its connections are
	cond      Conditions
	lanes     [2]lane // there, and back
	open      map[io.Closer]func(error)
	transfers int
}

// lane is one way of a link.
type lane struct {
	rng    *rand.Rand
	busy   time.Time // until when what was sent before leaves
	flying []packet  // in the order in which they arrive
	timer  *time.Timer
}

// packet arrives at a moment.
type packet struct {
	at      time.Time
	deliver func()
}

const (
	// queueBytes is what waits before the link at most; what comes then is lost.
	queueBytes = 32 << 10
	// headerBytes are those of IP and TCP, with the usual options.
	headerBytes = 52
)

// NewLink gives a link whose chances come from a seed.
func NewLink(c Conditions, seed uint64) *Link {
	l := &Link{cond: c, open: map[io.Closer]func(error){}}
	for i := range l.lanes {
		l.lanes[i].rng = rand.New(rand.NewPCG(seed, uint64(i)))
	}
	return l
}

// Plain gives a link over which connections are as good as the network below:
// they cost nothing, can be reset, and it can be down.
func Plain() *Link {
	l := NewLink(Conditions{}, 0)
	l.plain = true
	return l
}

// Set changes the conditions, also for what is connected. Of a plain link only
// Down counts, and connections are reset by it.
func (l *Link) Set(c Conditions) {
	l.mu.Lock()
	l.cond = c
	l.mu.Unlock()
	if l.plain && c.Down {
		l.Reset()
	}
}

// Conditions gives those in force.
func (l *Link) Conditions() Conditions {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cond
}

// ErrReset is the error of a connection that was reset.
var ErrReset = errors.New("connection reset by the emulated link")

// Reset ends all connections at once, at both ends.
func (l *Link) Reset() {
	l.mu.Lock()
	ends := make([]func(error), 0, len(l.open))
	for _, end := range l.open {
		ends = append(ends, end)
	}
	l.mu.Unlock()
	for _, end := range ends {
		end(ErrReset)
	}
}

// Open counts the connections.
func (l *Link) Open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// send has a packet arrive, or not. It is called with the lock.
func (l *Link) send(way int, size int, deliver func()) {
	lane := &l.lanes[way]
	now := time.Now()
	leaves := now
	if lane.busy.After(now) {
		leaves = lane.busy
	}
	if bits := l.cond.BitsPerSecond; bits > 0 {
		if waits := leaves.Sub(now).Seconds() * float64(bits) / 8; waits > queueBytes {
			return
		}
		leaves = leaves.Add(time.Duration(float64(size+headerBytes) * 8 / float64(bits) * float64(time.Second)))
		lane.busy = leaves
	}
	if l.cond.Down || lane.rng.Float64() < l.cond.Loss {
		return
	}
	at := leaves.Add(l.cond.RTT / 2)
	if n := len(lane.flying); n > 0 && !at.After(lane.flying[n-1].at) {
		at = lane.flying[n-1].at.Add(1) // one after the other
	}
	lane.flying = append(lane.flying, packet{at, deliver})
	if len(lane.flying) == 1 {
		l.arm(way)
	}
}

// arm has the first packet of a lane arrive.
func (l *Link) arm(way int) {
	lane := &l.lanes[way]
	wait := time.Until(lane.flying[0].at)
	if lane.timer == nil {
		lane.timer = time.AfterFunc(wait, func() { l.arrive(way) })
	} else {
		lane.timer.Reset(wait)
	}
}

func (l *Link) arrive(way int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lane := &l.lanes[way]
	for len(lane.flying) > 0 && !lane.flying[0].at.After(time.Now()) {
		p := lane.flying[0]
		lane.flying[0] = packet{}
		lane.flying = lane.flying[1:]
		p.deliver()
	}
	if len(lane.flying) > 0 {
		l.arm(way)
	}
}

// Dialer gives a function that connects over the link to whatever dial
// connects to; nil dials TCP.
func (l *Link) Dialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) func(ctx context.Context, network, address string) (net.Conn, error) {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if l.plain {
			return l.dialPlain(ctx, dial, network, address)
		}
		beyond, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		near, far, err := l.connect(ctx)
		if err != nil {
			beyond.Close()
			return nil, &net.OpError{Op: "dial", Net: network, Err: err}
		}
		go splice(far, beyond) // until one of the two ends
		return near, nil
	}
}

// splice passes on what comes at either of two connections, until both have
// ended.
func splice(a, b net.Conn) {
	var wg sync.WaitGroup
	pass := func(to, from net.Conn) {
		_, _ = io.Copy(to, from)
		to.Close()
	}
	wg.Go(func() { pass(a, b) })
	wg.Go(func() { pass(b, a) })
	wg.Wait()
}

// Serve accepts connections until l is closed, and passes each on over the link
// to what dial connects to.
func (k *Link) Serve(l net.Listener, dial func(ctx context.Context) (net.Conn, error)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	over := k.Dialer(func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) })
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer c.Close()
			ctx, cancel := context.WithTimeout(context.Background(), serveTimeout)
			defer cancel()
			if there, err := over(ctx, "tcp", ""); err == nil {
				splice(c, there)
			}
		})
	}
}

// serveTimeout bounds how long Serve tries to connect.
const serveTimeout = time.Minute

// plainConn is one over a plain link.
type plainConn struct {
	net.Conn
	link  *Link
	reset atomic.Bool
}

// Read implements net.Conn.
func (c *plainConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, c.failed(err)
}

// Write implements net.Conn.
func (c *plainConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	return n, c.failed(err)
}

// failed gives ErrReset in place of the error of a connection that was closed
// here: others tell it from one that they have closed themselves.
func (c *plainConn) failed(err error) error {
	if err != nil && c.reset.Load() {
		return ErrReset
	}
	return err
}

func (l *Link) dialPlain(ctx context.Context, dial func(ctx context.Context, network, address string) (net.Conn, error), network, address string) (net.Conn, error) {
	if l.Conditions().Down {
		<-ctx.Done()
		return nil, &net.OpError{Op: "dial", Net: network, Err: context.Cause(ctx)}
	}
	below, err := dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &plainConn{Conn: below, link: l}
	l.mu.Lock()
	l.open[c] = func(error) {
		c.reset.Store(true)
		c.Close()
	}
	l.mu.Unlock()
	return c, nil
}

// Close implements net.Conn.
func (c *plainConn) Close() error {
	c.link.mu.Lock()
	delete(c.link.open, c)
	c.link.mu.Unlock()
	return c.Conn.Close()
}

// Transfer takes the time in which so many bytes arrive over a connection of
// their own, by the goodput that TCP reaches under the conditions, without
// sending any. While the link is down it waits for half a minute, and gives an
// error then.
func (l *Link) Transfer(ctx context.Context, bytes int64) error {
	const stall = 30 * time.Second
	l.mu.Lock()
	l.transfers++
	c, sharing := l.cond, l.transfers
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.transfers--
		l.mu.Unlock()
	}()
	wait := stall
	if !c.Down {
		wait = time.Duration(float64(bytes) / c.Goodput() * float64(sharing) * float64(time.Second))
	}
	if wait <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if c.Down {
		return fmt.Errorf("no byte arrived for %s: the link is down", stall)
	}
	return nil
}

// Goodput is about how many bytes a second TCP gets through, +Inf without a
// bound: the bandwidth, or what lost packets leave by Mathis et al., "The
// Macroscopic Behavior of the TCP Congestion Avoidance Algorithm", 1997.
func (c Conditions) Goodput() float64 {
	rate := math.Inf(1)
	if c.BitsPerSecond > 0 {
		rate = float64(c.BitsPerSecond) / 8 * mss / (mss + headerBytes) * (1 - c.Loss)
	}
	if c.Loss > 0 && c.RTT > 0 {
		rate = min(rate, mss/c.RTT.Seconds()/math.Sqrt(2*c.Loss/3))
	}
	return rate
}
