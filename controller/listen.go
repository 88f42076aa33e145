package controller

import (
	"container/list"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// The limits of connections of which it is not known yet what they speak. One
// more than maxSniffing ends the one that has been silent for longest. A first
// byte, the handshake and the headers of a request may each take openTimeout: on
// a link that loses packets they do.
const (
	openTimeout = 30 * time.Second
	maxSniffing = 1024
	acceptPause = 100 * time.Millisecond
)

// splitter accepts connections that speak TLS, from anywhere, and in clear
// from this machine itself: on loopback nobody can listen in, and what runs
// there need not know the controller's authority. It says which by the first
// byte.
type splitter struct {
	net.Listener
	tls   *tls.Config
	ready chan net.Conn
	done  chan struct{}
	err   error // of accepting; set before done is closed

	mu     sync.Mutex // guards silent
	silent list.List  // the net.Conn that have said nothing yet, oldest first
}

func split(l net.Listener, c *tls.Config) *splitter {
	s := &splitter{Listener: l, tls: c, ready: make(chan net.Conn), done: make(chan struct{})}
	go s.run() // until the listener is closed
	return s
}

func (s *splitter) run() {
	defer close(s.done)
	for {
		c, err := s.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			s.err = err
			return
		}
		if err != nil { // too many open files, say: it passes
			time.Sleep(acceptPause)
			continue
		}
		at := s.enter(c)
		go s.sniff(c, at) // ends within openTimeout, or with the listener
	}
}

// enter notes a connection that has said nothing yet.
func (s *splitter) enter(c net.Conn) *list.Element {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.silent.Len() >= maxSniffing {
		s.silent.Remove(s.silent.Front()).(net.Conn).Close()
	}
	return s.silent.PushBack(c)
}

func (s *splitter) leave(at *list.Element) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent.Remove(at) // nothing, if it is not there any more
}

// tlsRecord is the first byte of a TLS handshake.
const tlsRecord = 0x16

func (s *splitter) sniff(c net.Conn, at *list.Element) {
	first := make([]byte, 1)
	_ = c.SetReadDeadline(time.Now().Add(openTimeout))
	_, err := io.ReadFull(c, first)
	s.leave(at)
	if err != nil {
		c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	var conn net.Conn = &peeked{Conn: c, first: first}
	switch {
	case first[0] == tlsRecord:
		conn = tls.Server(conn, s.tls)
	case !fromLoopback(c):
		c.Close()
		return
	}
	select {
	case s.ready <- conn:
	case <-s.done:
		conn.Close()
	}
}

func fromLoopback(c net.Conn) bool {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	return ok && a.IP.IsLoopback()
}

func (s *splitter) Accept() (net.Conn, error) {
	select {
	case c := <-s.ready:
		return c, nil
	case <-s.done:
		return nil, s.err
	}
}

// peeked is a connection of which the first byte was read.
type peeked struct {
	net.Conn
	first []byte
}

func (p *peeked) Read(b []byte) (int, error) {
	if len(p.first) > 0 && len(b) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}
