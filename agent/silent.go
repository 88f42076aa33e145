package agent

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// listener bounds the connections, and knows those on which nothing has come
// yet. A server that stops waits for a first request on each of them, so they
// are closed first.
type listener struct {
	net.Listener
	address string        // as the setting has it
	room    chan struct{} // holds one for each connection; shared with other listeners
	closed  chan struct{}
	close   sync.Once
	paused  chan struct{}
	rest    sync.Once
	mu      sync.Mutex
	silent  map[*connection]struct{} // nil once they were closed
}

func newListener(l net.Listener, address string, room chan struct{}) *listener {
	return &listener{Listener: l, address: address, room: room, closed: make(chan struct{}), paused: make(chan struct{}), silent: map[*connection]struct{}{}}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// pause has Accept wait until the listener is closed: what comes waits in the
// socket.
func (l *listener) pause() {
	l.rest.Do(func() { close(l.paused) })
	if t, ok := l.Listener.(*net.TCPListener); ok {
		_ = t.SetDeadline(time.Unix(1, 0)) // ends an Accept that waits
	}
}

// Accept implements net.Listener. It waits until there is room for a connection.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case l.room <- struct{}{}:
	case <-l.paused:
		<-l.closed
		return nil, net.ErrClosed
	case <-l.closed:
		return nil, net.ErrClosed
	}
	accepted, err := l.Listener.Accept()
	if err != nil {
		<-l.room
		select {
		case <-l.paused:
			<-l.closed
			return nil, net.ErrClosed
		default:
		}
		return nil, err
	}
	c := &connection{Conn: accepted, listener: l}
	l.mu.Lock()
	stopped := l.silent == nil
	if !stopped {
		l.silent[c] = struct{}{}
	}
	l.mu.Unlock()
	if stopped {
		c.Close() // whoever reads from it gets an error
	}
	return c, nil
}

// closeSilent closes the silent connections, and those that are accepted from
// now on.
func (l *listener) closeSilent() {
	l.mu.Lock()
	silent := l.silent
	l.silent = nil
	l.mu.Unlock()
	for c := range silent {
		c.Close()
	}
}

// connection is one of a listener.
type connection struct {
	net.Conn
	listener *listener
	spoke    atomic.Bool
	close    sync.Once
}

func (c *connection) heard() {
	if c.spoke.Swap(true) {
		return
	}
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	delete(c.listener.silent, c)
}

// Read implements net.Conn.
func (c *connection) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.spoke.Load() {
		c.heard()
	}
	return n, err
}

// Close implements net.Conn.
func (c *connection) Close() error {
	c.heard()
	err := c.Conn.Close()
	c.close.Do(func() { <-c.listener.room })
	return err
}
