package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
)

// startTLS runs an embedded broker over pipes, with TLS.
func startTLS(t *testing.T, auth Authenticator, config *tls.Config, change ...func(*EmbeddedConfig)) (*Embedded, *pipes, func()) {
	t.Helper()
	cfg := EmbeddedConfig{Auth: auth, Log: testLog(t.Output())}
	for _, f := range change {
		f(&cfg)
	}
	p := newPipes()
	e := newEmbedded(cfg, p, overTLS(config))
	return e, p, start(t, e, newInbox().handle)
}

// raw opens a connection below TLS.
func (p *pipes) raw(t *testing.T) net.Conn {
	t.Helper()
	near, far := net.Pipe()
	p.conns <- far
	t.Cleanup(func() { near.Close() })
	return near
}

// secured opens a connection over TLS, or gives the error of the handshake,
// which with TLS 1.3 is that of the first answer.
func (p *pipes) secured(t *testing.T, config *tls.Config, packet *packets.ConnectPacket) (*rawClient, error) {
	t.Helper()
	c := tls.Client(p.raw(t), config)
	if err := c.Handshake(); err != nil {
		return nil, err
	}
	go c.Write(encode(packet))
	answer, err := packets.ReadPacket(c)
	if err != nil {
		return nil, err
	}
	if ack := answer.(*packets.ConnackPacket); ack.ReturnCode != 0 {
		return nil, fmt.Errorf("code %d", ack.ReturnCode)
	}
	return newRawClient(t, c), nil
}

func TestWhatCertificatesDo(t *testing.T) {
	foreign := newAuthority()
	old := clientTLS(certificateOf("a"))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for name, tc := range map[string]struct {
		config *tls.Config
		packet *packets.ConnectPacket
		want   string // in the error; "": connected
	}{
		"a device":                {clientTLS(certificateOf("a")), connectPacket("a"), ""},
		"enrols":                  {clientTLS(nil), enrolPacket(joinUser), ""},
		"no certificate":          {clientTLS(nil), connectPacket("a"), "code 5"},
		"another device's":        {clientTLS(certificateOf("b")), connectPacket("a"), "code 5"},
		"an unknown device's":     {clientTLS(certificateOf("c")), connectPacket("c"), "code 5"},
		"a name that is a filter": {clientTLS(issue(trusted(), certified.key, "+")), connectPacket("+"), "code 5"},
		"the controller's":        {clientTLS(certificateOf(ControllerUser)), connectPacket(ControllerUser), "code 5"},
		"a device's, to enrol":    {clientTLS(certificateOf("a")), enrolPacket(joinUser), "code 5"},
		"expired":                 {clientTLS(expired("a")), connectPacket("a"), "certificate"},
		"another authority's":     {clientTLS(issue(foreign, certified.key, "a")), connectPacket("a"), "certificate"},
		"TLS 1.2":                 {old, connectPacket("a"), "protocol version"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, p, stop := startTLS(t, newAccounts("a", "b", "+"), serverTLS())
				defer stop()
				c, err := p.secured(t, tc.config, tc.packet)
				if tc.want == "" {
					if err != nil {
						t.Fatal(err)
					}
					c.roundtrip()
				} else if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("error %v, want %q in it", err, tc.want)
				}
			})
		})
	}
}

// TestHalfOpenHandshakes: they end at their deadline, hold up nobody, and make
// room for those who come later.
func TestHalfOpenHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 20
		e, p, stop := startTLS(t, newAccounts("a"), serverTLS(), func(c *EmbeddedConfig) { c.MaxConnections = limit })
		defer stop()
		began := time.Now()
		first := p.raw(t)
		var all []net.Conn
		for i := range 3 * limit {
			nc := p.raw(t)
			all = append(all, nc)
			switch i % 3 {
			case 1:
				nc.Write([]byte{0x16, 3, 1}) // half of a header
			case 2:
				go tls.Client(&deaf{Conn: nc}, clientTLS(nil)).Handshake() // takes the answer, and says no more
			}
		}
		if _, err := io.ReadAll(first); err != nil || time.Since(began) != 0 {
			t.Errorf("the oldest has not made room: %v after %v", err, time.Since(began))
		}
		c, err := p.secured(t, clientTLS(certificateOf("a")), connectPacket("a"))
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("a device waited %v", took)
		}
		e.mu.Lock()
		if len(e.conns) != limit {
			t.Errorf("%d connections, want %d", len(e.conns), limit)
		}
		e.mu.Unlock()
		time.Sleep(connectTimeout)
		synctest.Wait()
		c.roundtrip()
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.conns) != 1 || e.unknown.Len() != 0 {
			t.Errorf("%d connections, %d unknown are left", len(e.conns), e.unknown.Len())
		}
		for _, nc := range all {
			nc.Close()
		}
	})
}

// TestSlowHandshakes: a device on a link that loses packets may need all of the
// time that it takes for itself, 15 s for the handshake and as much for CONNECT.
func TestSlowHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startTLS(t, newAccounts("a"), serverTLS())
		defer stop()
		c := tls.Client(&late{p.raw(t), 7 * time.Second}, clientTLS(certificateOf("a")))
		if err := c.Handshake(); err != nil { // by two writes
			t.Fatal(err)
		}
		time.Sleep(7 * time.Second)
		r := newRawClient(t, c)
		defer r.Close()
		r.mustConnect(connectPacket("a")) // by one
	})
}

// late is a connection on which what is written takes its time.
type late struct {
	net.Conn
	by time.Duration
}

func (l *late) Write(p []byte) (int, error) {
	time.Sleep(l.by)
	return l.Conn.Write(p)
}

// deaf reads what it is sent and answers with nothing after its first write.
type deaf struct {
	net.Conn
	written bool
}

func (d *deaf) Write(p []byte) (int, error) {
	if d.written {
		return len(p), nil
	}
	d.written = true
	return d.Conn.Write(p)
}

// TestHandshakesTakeTurns: no more of them compute at once than there are
// processors, and one that waits for its client is none of them.
func TestHandshakesTakeTurns(t *testing.T) {
	var mu sync.Mutex
	var now, most int
	config := pki.ServerConfig(func() (*tls.Certificate, error) {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		runtime.Gosched()
		mu.Lock()
		now--
		mu.Unlock()
		return certificateOf(ControllerUser), nil
	}, nil, tls.NoClientCert)
	secure := overTLS(config)
	var all sync.WaitGroup
	for range 20 * runtime.GOMAXPROCS(0) {
		near, far := net.Pipe()
		all.Go(func() {
			defer far.Close()
			if _, cert, err := secure(far); err != nil || cert != nil {
				t.Errorf("%v, %v", cert, err)
			}
		})
		all.Go(func() {
			defer near.Close()
			if err := tls.Client(near, clientTLS(nil)).Handshake(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if most > runtime.GOMAXPROCS(0) {
		t.Errorf("%d computed at once, want at most %d", most, runtime.GOMAXPROCS(0))
	}
}

// TestSessionEndsWithItsCertificate.
func TestSessionEndsWithItsCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := must(pki.NewKey())
		leaf := must(trusted().IssueDevice("a", key.Public(), time.Now(), time.Hour))
		_, p, stop := startTLS(t, newAccounts("a"), serverTLS())
		defer stop()
		c, err := p.secured(t, clientTLS(&tls.Certificate{Certificate: pki.Raw(trusted().Chain(leaf)), PrivateKey: key}), connectPacket("a"))
		if err != nil {
			t.Fatal(err)
		}
		for range 59 {
			time.Sleep(time.Minute)
			c.roundtrip()
		}
		began := time.Now()
		c.wantClosed()
		if took := time.Since(began); took != time.Minute {
			t.Errorf("ended after %v, want %v", took, time.Minute)
		}
	})
}

// TestSessionsAreNotResumed: each connection shows its certificate.
func TestSessionsAreNotResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startTLS(t, newAccounts("a"), serverTLS())
		defer stop()
		config := clientTLS(certificateOf("a"))
		config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for range 2 {
			c, err := p.secured(t, config, connectPacket("a"))
			if err != nil {
				t.Fatal(err)
			}
			if c.Conn.(*tls.Conn).ConnectionState().DidResume {
				t.Error("a session was resumed")
			}
			c.Close()
		}
	})
}

// TestStalledClientsDoNotHoldTheEnd: TLS would say goodbye to those that take
// nothing.
func TestStalledClientsDoNotHoldTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startTLS(t, newAccounts("a"), serverTLS())
		silent := tls.Client(p.raw(t), clientTLS(certificateOf("a")))
		if err := silent.Handshake(); err != nil {
			t.Fatal(err)
		}
		stalled := tls.Client(p.raw(t), clientTLS(certificateOf("a")))
		if err := stalled.Handshake(); err != nil {
			t.Fatal(err)
		}
		go stalled.Write(encode(connectPacket("a")))
		synctest.Wait() // the broker writes CONNACK, and nobody reads
		began := time.Now()
		stop()
		if took := time.Since(began); took != 0 {
			t.Errorf("the end took %v", took)
		}
	})
}

// TestRefusals are told with who, what, why and from where.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []string
		_, p, stop := startTLS(t, newAccounts("a"), serverTLS(), func(c *EmbeddedConfig) {
			c.Refused = func(who, object, reason, from string) {
				told = append(told, who+" | "+object+" | "+reason+" | "+from)
			}
		})
		defer stop()
		want := func(parts ...string) {
			t.Helper()
			synctest.Wait()
			if len(told) != 1 || slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(told[0], p) }) {
				t.Errorf("told %q, want %q", told, parts)
			}
			told = nil
		}
		p.secured(t, clientTLS(certificateOf("b")), connectPacket("b"))
		want("device:b | broker | the device is revoked or unknown | pipe")
		p.secured(t, clientTLS(nil), connectPacket("b"))
		want("nobody | broker | no certificate", "pipe")
		p.secured(t, clientTLS(nil), enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.Password = []byte("guess") }))
		want("nobody | broker | user " + joinUser + " may not enrol")
		p.secured(t, clientTLS(expired("a")), connectPacket("a"))
		want("nobody | broker | ", "expired")
		c, err := p.secured(t, clientTLS(certificateOf("a")), connectPacket("a"))
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			c.send(publishPacket(link.Up("b", link.Hello), "forged", 0), subscribePacket(0, "#"))
		}
		want("device:a | topic " + fmt.Sprintf("%q", link.Up("b", link.Hello)))
		p.raw(t).Close()
		synctest.Wait()
		if len(told) > 0 {
			t.Errorf("told of one that said nothing: %q", told)
		}
	})
}

// TestSlowAuthenticatorIsGivenUp.
func TestSlowAuthenticatorIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startPiped(t, slowAuth{}, newInbox().handle, t.Output())
		defer stop()
		for device, packet := range map[string]*packets.ConnectPacket{"a": connectPacket("a"), "": enrolPacket(joinUser)} {
			began := time.Now()
			if code := p.dial(t, device).connect(packet); code != 5 {
				t.Errorf("code %d, want 5", code)
			}
			if took := time.Since(began); took != authTimeout {
				t.Errorf("took %v, want %v", took, authTimeout)
			}
		}
	})
}

type slowAuth struct{}

func (slowAuth) Device(ctx context.Context, _ *x509.Certificate) (string, error) {
	<-ctx.Done()
	return "", errors.New("no answer")
}

func (slowAuth) Enrolling(ctx context.Context, _, _, _ string) bool {
	<-ctx.Done()
	return false
}
