package controller

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/internal/pki/pkitest"
)

// One port speaks TLS, with HTTP/2, and in clear with what is on this machine;
// one that says nothing keeps nobody waiting.
func TestSplit(t *testing.T) {
	ca := pkitest.Authority(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := split(listener, pkitest.ServerTLS(t, ca))
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	server := &http.Server{Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Proto)
		if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
			_, _ = io.WriteString(w, " "+r.TLS.PeerCertificates[0].Subject.CommonName)
		}
	})}
	done := make(chan error, 1)
	go func() { done <- server.Serve(s) }()
	defer func() {
		server.Close()
		<-done
	}()
	silent, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for want, client := range map[string]*tls.Config{
		"HTTP/1.1":     nil,
		"HTTP/2.0":     pkitest.ClientTLS(ca, nil),
		"HTTP/2.0 cam": pkitest.ClientTLS(ca, pkitest.Device(t, ca, "cam")),
	} {
		url := "http://" + listener.Addr().String()
		transport := &http.Transport{TLSClientConfig: client, ForceAttemptHTTP2: true}
		if client != nil {
			url = "https://" + listener.Addr().String()
		}
		c := &http.Client{Transport: transport, Timeout: 30 * time.Second}
		resp, err := c.Get(url)
		if err != nil {
			t.Errorf("%s: %v", want, err)
			continue
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		transport.CloseIdleConnections()
		if string(b) != want || err != nil {
			t.Errorf("got %q, %v, want %q", b, err, want)
		}
	}
	if c, err := tls.Dial("tcp", listener.Addr().String(), &tls.Config{MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true}); err == nil {
		c.Close()
		t.Error("TLS 1.2 is spoken")
	}
}

// Those who say nothing keep nobody out, however many they are.
func TestSplitIsNotFilled(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := split(listener, pkitest.ServerTLS(t, pkitest.Authority(t)))
	defer listener.Close()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", listener.Addr().String())
		must(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	first := dial()
	for range maxSniffing {
		dial()
	}
	_, err = dial().Write([]byte("GET"))
	must(t, err)
	c, err := s.Accept()
	must(t, err)
	c.Close()
	if _, err := first.Read(make([]byte, 1)); err == nil {
		t.Error("the one that was silent for longest is not closed")
	}
}

func TestHosts(t *testing.T) {
	c := DefaultConfig()
	c.Listen, c.Hosts = "10.0.0.1:443", "dunlin.example.com, 10.0.0.2"
	got := c.hosts()
	if len(got) < 6 || got[0] != "dunlin.example.com" || got[1] != "10.0.0.2" || got[2] != "10.0.0.1" {
		t.Errorf("%q", got)
	}
	c.Hosts, c.Listen = "", "0.0.0.0:443"
	if got := c.hosts(); got[0] == "0.0.0.0" {
		t.Errorf("%q", got)
	}
}

// A device on a link that loses packets takes half a minute for its handshake,
// and is given it.
func TestSlowHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := pkitest.Authority(t)
		listener := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		server := newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") }), slog.New(slog.DiscardHandler))
		done := make(chan error, 1)
		go func() { done <- server.Serve(split(listener, pkitest.ServerTLS(t, ca))) }()
		near, far := net.Pipe()
		defer func() {
			near.Close()
			server.Close()
			<-done
		}()
		listener.conns <- far
		c := tls.Client(&late{near, 14 * time.Second}, pkitest.ClientTLS(ca, nil))
		if err := c.Handshake(); err != nil { // by two writes
			t.Error(err)
		}
	})
}

// pipeListener is a network without sockets.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// late is a connection on which what is written takes its time.
type late struct {
	net.Conn
	by time.Duration
}

func (l *late) Write(p []byte) (int, error) {
	time.Sleep(l.by)
	return l.Conn.Write(p)
}
