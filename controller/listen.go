package controller

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"time"
)

// The limits of connections of which it is not known yet what they speak.
const (
	sniffTimeout = 10 * time.Second
	maxSniffing  = 1024
	acceptPause  = 100 * time.Millisecond
)

// splitter accepts connections that speak TLS, from anywhere, and in clear
// from this machine itself: on loopback nobody can listen in, and what runs
// there need not know the controller's authority. It says which by the first
// byte.
type splitter struct {
	net.Listener
	tls   *tls.Config
	ready chan net.Conn
	slots chan struct{}
	done  chan struct{}
	err   error // of accepting; set before done is closed
}

func split(l net.Listener, c *tls.Config) *splitter {
	s := &splitter{Listener: l, tls: c, ready: make(chan net.Conn), slots: make(chan struct{}, maxSniffing), done: make(chan struct{})}
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
		select {
		case s.slots <- struct{}{}:
			go func() { // ends within sniffTimeout, or with the listener
				defer func() { <-s.slots }()
				s.sniff(c)
			}()
		default:
			c.Close()
		}
	}
}

// tlsRecord is the first byte of a TLS handshake.
const tlsRecord = 0x16

func (s *splitter) sniff(c net.Conn) {
	first := make([]byte, 1)
	_ = c.SetReadDeadline(time.Now().Add(sniffTimeout))
	if _, err := io.ReadFull(c, first); err != nil {
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
