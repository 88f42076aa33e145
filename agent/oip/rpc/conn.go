package rpc

import (
	"context"
	"net"

	"google.golang.org/grpc/peer"
)

// listener gives connections that a handler can find by the address of its
// peer, which is all that grpc tells of them.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return conn{c}, nil
}

type conn struct{ net.Conn }

func (c conn) RemoteAddr() net.Addr { return remote{c.Conn.RemoteAddr(), c.Conn} }

type remote struct {
	net.Addr
	conn net.Conn
}

// connOf gives the connection of a call.
func connOf(ctx context.Context) net.Conn {
	if p, ok := peer.FromContext(ctx); ok {
		if r, ok := p.Addr.(remote); ok {
			return r.conn
		}
	}
	return nil
}
