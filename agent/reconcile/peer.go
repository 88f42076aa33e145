package reconcile

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// A source near that is slower than this is given up: the registry is faster.
// A cache may have to wait for the registry itself.
const (
	peerStall  = 10 * time.Second
	peerRate   = 64 << 10 // bytes a second of an answer
	cacheStall = 30 * time.Second
	cacheRate  = 2 << 10
)

// NewPeer gives the device of the same site that answers at a URL; cache says
// that it gets what it does not have.
func NewPeer(url string, client *http.Client, cache bool) Source {
	p := &peer{remote: newRemote(Registry{URL: url, Client: client}, peerStall), rate: peerRate}
	if cache {
		p.stall, p.rate = cacheStall, cacheRate
	}
	return p
}

// NewRemote gives a registry.
func NewRemote(r Registry) Source { return newRemote(r, defaultStall) }

type peer struct {
	*remote
	rate int64
}

func (*peer) Streams() int { return 2 }

// Get is the registry's, and ends when the answer takes too long.
func (p *peer) Get(ctx context.Context, r Ref, offset, length int64) (*Body, error) {
	most := p.stall + time.Duration(length/p.rate)*time.Second
	ctx, cancel := context.WithTimeoutCause(ctx, most, fmt.Errorf("%d bytes took more than %s", length, most))
	b, err := p.remote.Get(ctx, r, offset, length)
	if err != nil {
		cancel()
		return nil, err
	}
	b.ReadCloser = closing{b.ReadCloser, cancel}
	return b, nil
}

type closing struct {
	io.ReadCloser
	also func()
}

func (c closing) Close() error {
	defer c.also()
	return c.ReadCloser.Close()
}

func inMemory(raw []byte) *Content {
	return &Content{bytes.NewReader(raw), io.NopCloser(nil), int64(len(raw))}
}
