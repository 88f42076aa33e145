package broker

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"runtime"
)

// secure makes a connection one over TLS, and gives the certificate that the
// client showed, or nil.
type secure func(net.Conn) (net.Conn, *x509.Certificate, error)

// overTLS does the handshake of a server. Handshakes take turns computing, as
// many at a time as there are processors: of thousands at once each is done in
// its time, and messages do not wait for all of them. One that waits for its
// client holds up no other.
func overTLS(config *tls.Config) secure {
	turns := make(chan struct{}, runtime.GOMAXPROCS(0))
	return func(nc net.Conn) (net.Conn, *x509.Certificate, error) {
		t := &turnConn{Conn: nc, turns: turns}
		c := tls.Server(t, config)
		turns <- struct{}{}
		err := c.Handshake()
		<-turns
		t.turns = nil
		if err != nil {
			return nil, nil, fmt.Errorf("TLS handshake: %w", err)
		}
		if peers := c.ConnectionState().PeerCertificates; len(peers) > 0 {
			return c, peers[0], nil
		}
		return c, nil, nil
	}
}

// turnConn is the connection below a handshake.
type turnConn struct {
	net.Conn
	turns chan struct{} // of which one is held; nil after the handshake
}

func (c *turnConn) Read(p []byte) (int, error)  { return c.wait(c.Conn.Read, p) }
func (c *turnConn) Write(p []byte) (int, error) { return c.wait(c.Conn.Write, p) }

// wait gives the turn away while it waits for the network.
func (c *turnConn) wait(do func([]byte) (int, error), p []byte) (int, error) {
	turns := c.turns
	if turns == nil {
		return do(p)
	}
	<-turns
	defer func() { turns <- struct{}{} }()
	return do(p)
}
