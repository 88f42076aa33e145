package agent

import (
	"net"
	"sync"
	"sync/atomic"
)

// listener knows the connections on which nothing has come yet. A server that
// stops waits for a first request on each of them, so they are closed first.
type listener struct {
	net.Listener
	mu     sync.Mutex
	silent map[*connection]struct{} // nil once they were closed
}

func newListener(l net.Listener) *listener {
	return &listener{Listener: l, silent: map[*connection]struct{}{}}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if err != nil {
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
	return c.Conn.Close()
}
