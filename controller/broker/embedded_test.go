package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
)

func TestNewestConnectionWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
		defer stop()
		// Many at once: one stays, and it is whole.
		var all []*rawClient
		for range 50 {
			c := p.dial(t, "a")
			all = append(all, c)
			go c.send(connectPacket("a"), subscribePacket(0, link.Down("a", "+")))
		}
		synctest.Wait()
		mustPublish(t, e, link.Down("a", link.Desired), "hello")
		synctest.Wait()
		last := all[len(all)-1]
		for _, c := range all {
			got := 0
			for len(c.packets) > 0 {
				if _, ok := (<-c.packets).(*packets.PublishPacket); ok {
					got++
				}
			}
			if want := map[bool]int{true: 1}[c == last]; got != want {
				t.Errorf("connection got %d messages, want %d", got, want)
			}
		}
		if n := e.server.Clients.Len(); n != 2 { // with the controller's own
			t.Errorf("%d clients, want 2", n)
		}
	})
}

// TestOlderConnectionThatDoesNotEnd: its handler is busy; the new one is
// refused rather than let in beside it.
func TestOlderConnectionThatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		_, p, stop := startPiped(t, newAccounts("a"), func(string, []byte) { <-release }, t.Output())
		defer stop()
		old := p.dial(t, "a")
		old.mustConnect(connectPacket("a"))
		old.send(publishPacket(link.Up("a", link.Hello), "x", 0))
		began := time.Now()
		if code := p.dial(t, "a").connect(connectPacket("a")); code != 5 {
			t.Errorf("code %d, want 5", code)
		}
		if took := time.Since(began); took != takeoverTimeout {
			t.Errorf("took %v, want %v", took, takeoverTimeout)
		}
		close(release)
		p.dial(t, "a").mustConnect(connectPacket("a"))
	})
}

// authFunc is an Authenticator of devices only.
type authFunc func(device string) error

func (f authFunc) Device(_ context.Context, cert *x509.Certificate) (string, error) {
	return cert.Subject.CommonName, f(cert.Subject.CommonName)
}

func (f authFunc) Enrolling(context.Context, string, string, string) bool { return false }

// TestRemovedWhileConnecting: the device is removed, and Disconnect called,
// between the look at its certificate and its session.
func TestRemovedWhileConnecting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		var e *Embedded
		var looks int
		auth := authFunc(func(device string) error {
			looks++
			if looks == 1 {
				e.Disconnect(device) // finds no session yet
				return nil
			}
			return errors.New("revoked")
		})
		e, p, stop := startPiped(t, auth, in.handle, t.Output())
		defer stop()
		_ = e
		c := p.dial(t, "a")
		c.send(connectPacket("a", withWill(link.Up("a", link.Gone), "gone")), publishPacket(link.Up("a", link.Hello), "x", 0))
		c.wantClosed()
		synctest.Wait()
		if looks != 2 || len(in) != 0 {
			t.Errorf("%d looks, %d messages; want 2 and 0", looks, len(in))
		}
	})
}

func TestDisconnectDropsWhatWasReadAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e *Embedded
		var handled int
		var p *pipes
		handle := func(string, []byte) {
			handled++
			e.Disconnect("a")
		}
		e, p, stop := startPiped(t, newAccounts("a"), handle, t.Output())
		defer stop()
		c := p.dial(t, "a")
		c.mustConnect(connectPacket("a"))
		c.Write(slices.Repeat(encode(publishPacket(link.Up("a", link.Hello), "x", 0)), 10)) // in one buffer
		c.wantClosed()
		synctest.Wait()
		if handled != 1 {
			t.Errorf("%d messages handled, want 1", handled)
		}
	})
}

func TestSubscriptionsOutsideTheSubtreeAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startPiped(t, newAccounts("a", "b"), newInbox().handle, t.Output())
		defer stop()
		c := p.dial(t, "a")
		c.mustConnect(connectPacket("a"))
		refused := []string{"#", "+/#", "$SYS/#", link.UpFilter, link.Up("a", link.Hello), link.Down("b", "+"), link.Down("b", link.Desired),
			"$share/g/" + link.Down("a", link.Desired), "$share/g/#", "dunlin/v1/+/a/down/+", link.Down("a", "x")}
		granted := []string{link.Down("a", "+"), link.Down("a", "#"), link.Down("a", link.Desired), link.EpochTopic}
		c.send(subscribePacket(0, slices.Concat(refused, granted)...))
		ack := c.next().(*packets.SubackPacket)
		want := slices.Concat(slices.Repeat([]byte{0x80}, len(refused)), make([]byte, len(granted)))
		if !slices.Equal(ack.ReturnCodes, want) {
			t.Errorf("codes %x, want %x", ack.ReturnCodes, want)
		}
	})
}

// TestEverythingIsQoS0: a subscription is granted QoS 0 whatever it asks for,
// a message published at QoS 1 or 2 arrives and is not acknowledged.
func TestEverythingIsQoS0(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
		defer stop()
		for qos := range byte(3) {
			c := p.dial(t, "a")
			c.mustConnect(connectPacket("a"))
			c.send(subscribePacket(qos, link.Down("a", "+")))
			if ack := c.next().(*packets.SubackPacket); !slices.Equal(ack.ReturnCodes, []byte{0}) {
				t.Errorf("subscribe at QoS %d: granted %v", qos, ack.ReturnCodes)
			}
			c.send(publishPacket(link.Up("a", link.Hello), fmt.Sprint(qos), qos))
			in.want(t, link.Up("a", link.Hello), fmt.Sprint(qos))
			mustPublish(t, e, link.Down("a", link.Desired), "x")
			if got := c.next().(*packets.PublishPacket); got.Qos != 0 || string(got.Payload) != "x" {
				t.Errorf("got %v, want QoS 0", got)
			}
			c.Close()
			synctest.Wait()
		}
	})
}

func TestNothingIsRetained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
		defer stop()
		c := p.dial(t, "a")
		c.mustConnect(connectPacket("a"))
		retained := publishPacket(link.Up("a", link.Hello), "x", 0)
		retained.Retain = true
		c.send(retained)
		c.roundtrip()
		in.want(t, link.Up("a", link.Hello), "x")
		for topic := range e.server.Topics.Retained.GetAll() {
			if !strings.HasPrefix(topic, "$SYS/") {
				t.Errorf("retained: %s", topic)
			}
		}
	})
}

func TestSessionsEndWithTheirConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, t.Output())
		defer stop()
		lasting := func(c *packets.ConnectPacket) { c.CleanSession = false }
		c := p.dial(t, "a")
		c.mustConnect(connectPacket("a", lasting))
		c.send(subscribePacket(1, link.Down("a", "+")))
		c.next()
		c.Close()
		synctest.Wait()
		if n := e.server.Clients.Len(); n != 1 { // the controller's own
			t.Errorf("%d clients are kept, want 1", n)
		}
		if got := e.server.Topics.Subscribers(link.Down("a", link.Desired)).Subscriptions; len(got) != 0 {
			t.Errorf("subscriptions are kept: %v", got)
		}
		c = p.dial(t, "a")
		c.send(connectPacket("a", lasting))
		if ack := c.next().(*packets.ConnackPacket); ack.ReturnCode != 0 || ack.SessionPresent {
			t.Errorf("CONNACK %v, want no session present", ack)
		}
		c.Close()
		synctest.Wait()
		if len(e.conns)+len(e.sessions) != 0 {
			t.Errorf("%d connections and %d sessions are kept", len(e.conns), len(e.sessions))
		}
	})
}

// TestLostBeforeConnack: the server keeps a client whose CONNACK it could not
// write; the broker does not.
func TestLostBeforeConnack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, t.Output())
		defer stop()
		near, far := net.Pipe()
		p.conns <- shows(far, "a")
		near.Write(encode(connectPacket("a")))
		near.Close() // nobody reads the CONNACK
		synctest.Wait()
		if n := e.server.Clients.Len(); n != 1 {
			t.Errorf("%d clients are kept, want 1", n)
		}
		p.dial(t, "a").mustConnect(connectPacket("a"))
	})
}

// TestOversizedPacketIsNotReadFirst: its length is enough.
func TestOversizedPacketIsNotReadFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, t.Output())
		defer stop()
		c := p.dial(t, "a")
		c.mustConnect(connectPacket("a"))
		began := time.Now()
		c.Write([]byte{packets.Publish << 4, 0xff, 0xff, 0xff, 0x7f})
		c.wantClosed()
		if took := time.Since(began); took != 0 {
			t.Errorf("closed after %v, want at once", took)
		}
	})
}

func TestOversizedPacketEndsTheConnection(t *testing.T) {
	for _, size := range []int{link.MaxPayload + 1, maxPacket, maxPacket + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newInbox()
				_, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
				defer stop()
				c := p.dial(t, "a")
				c.mustConnect(connectPacket("a", withWill(link.Up("a", link.Gone), "gone")))
				go c.send(publishPacket(link.Up("a", link.Hello), strings.Repeat("x", size), 0))
				c.wantClosed()
				in.want(t, link.Up("a", link.Gone), "gone")
			})
		})
	}
}

// TestSlowConsumer: one device takes nothing. Neither the controller nor
// another device waits for it, what waits for it is bounded, and it is cut off
// though it goes on sending.
func TestSlowConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts("slow", "fast"), in.handle, t.Output())
		defer stop()
		fast := p.dial(t, "fast")
		fast.mustConnect(connectPacket("fast"))
		fast.send(subscribePacket(0, link.Down("fast", "+")))
		fast.next()

		near, far := net.Pipe()
		p.conns <- shows(far, "slow")
		for _, p := range []packets.ControlPacket{connectPacket("slow", withWill(link.Up("slow", link.Gone), "gone")), subscribePacket(0, link.Down("slow", "+"))} {
			near.Write(encode(p))
			if _, err := packets.ReadPacket(near); err != nil { // the answer; nothing after it
				t.Fatal(err)
			}
		}
		began := time.Now()
		for i := range 4 * maxWritesPending {
			mustPublish(t, e, link.Down("slow", link.Desired), "x")
			mustPublish(t, e, link.Down("fast", link.Desired), fmt.Sprint(i))
			if got := fast.next().(*packets.PublishPacket); string(got.Payload) != fmt.Sprint(i) {
				t.Fatalf("got %s, want %d", got.Payload, i)
			}
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("publishing waited %v for the slow device", took)
		}
		if dropped := atomic.LoadInt64(&e.server.Info.MessagesDropped); dropped < 2*maxWritesPending {
			t.Errorf("%d messages dropped, want those beyond %d", dropped, maxWritesPending)
		}
		// It sends all the while, which moves the deadline for reading only.
		for time.Since(began) < 10*writeTimeout {
			if _, err := near.Write(encode(publishPacket(link.Up("slow", link.Telemetry), "t", 0))); err != nil {
				break
			}
			time.Sleep(time.Second)
		}
		if took := time.Since(began); took < writeTimeout || took > writeTimeout+2*time.Second {
			t.Errorf("cut off after %v, want %v", took, writeTimeout)
		}
		got := ""
		for got != "gone" {
			got = string((<-in).payload)
		}
	})
}

// TestBackpressure: while the handler is busy with a device's message, no more
// is read from that device, and others go on.
func TestBackpressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		var fast, slow atomic.Int32
		handle := func(topic string, _ []byte) {
			if device, _, _ := link.ParseUp(topic); device == "slow" {
				slow.Add(1)
				<-gate
			} else {
				fast.Add(1)
			}
		}
		_, p, stop := startPiped(t, newAccounts("slow", "fast"), handle, t.Output())
		defer stop()
		a, b := p.dial(t, "slow"), p.dial(t, "fast")
		a.mustConnect(connectPacket("slow"))
		b.mustConnect(connectPacket("fast"))
		const n = 100
		large := strings.Repeat("x", 4096)
		var written atomic.Int32
		go func() {
			for range n {
				a.send(publishPacket(link.Up("slow", link.Hello), large, 0))
				written.Add(1)
			}
		}()
		for range n {
			b.send(publishPacket(link.Up("fast", link.Hello), large, 0))
		}
		synctest.Wait()
		if fast.Load() != n || slow.Load() != 1 || written.Load() > 3 {
			t.Errorf("handled %d of the fast device and %d of the slow one, which wrote %d", fast.Load(), slow.Load(), written.Load())
		}
		close(gate)
		synctest.Wait()
		if slow.Load() != n {
			t.Errorf("handled %d of the slow device, want %d", slow.Load(), n)
		}
	})
}

// TestEnd: Run ends with devices connected, half connected, and stalled; they
// are closed, and no will is handed over.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts(devices(20)...), in.handle, t.Output())
		var all []*rawClient
		for i, name := range devices(20) {
			c := p.dial(t, name)
			if i%4 > 0 {
				c.mustConnect(connectPacket(name, withWill(link.Up(name, link.Gone), "gone")))
			}
			all = append(all, c)
		}
		near, far := net.Pipe() // stalled: it does not read its CONNACK
		p.conns <- shows(far, "dev-0")
		near.Write(encode(connectPacket("dev-0")))
		synctest.Wait()
		began := time.Now()
		stop()
		if took := time.Since(began); took != 0 {
			t.Errorf("the end took %v", took)
		}
		for _, c := range all {
			c.wantClosed()
		}
		if len(in) != 0 || len(e.conns) != 0 || len(e.sessions) != 0 {
			t.Errorf("%d messages, %d connections, %d sessions are left", len(in), len(e.conns), len(e.sessions))
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestEndHandlesNoMore: what was read ahead of a busy handler is left.
func TestEndHandlesNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		var handled atomic.Int32
		_, p, stop := startPiped(t, newAccounts("a"), func(string, []byte) {
			handled.Add(1)
			<-gate
		}, t.Output())
		c := p.dial(t, "a")
		c.mustConnect(connectPacket("a"))
		c.Write(slices.Repeat(encode(publishPacket(link.Up("a", link.Hello), "x", 0)), 10)) // in one buffer
		synctest.Wait()
		go stop()
		synctest.Wait()
		close(gate)
		stop()
		if handled.Load() != 1 {
			t.Errorf("%d messages handled, want 1", handled.Load())
		}
	})
}

func TestEndWhileDevicesComeAndGo(t *testing.T) {
	names := devices(8)
	e, err := NewEmbedded(EmbeddedConfig{Listen: "127.0.0.1:0", TLS: serverTLS(), Auth: newAccounts(names...), Log: testLog(io.Discard)})
	if err != nil {
		t.Fatal(err)
	}
	var handled atomic.Int32
	stop := start(t, e, func(string, []byte) { handled.Add(1) })
	var coming sync.WaitGroup
	for _, name := range names {
		coming.Go(func() {
			for {
				nc, err := tls.Dial("tcp", e.Addr().String(), clientTLS(certificateOf(name)))
				if err != nil {
					return // the end
				}
				nc.Write(slices.Concat(encode(connectPacket(name, withWill(link.Up(name, link.Gone), "gone"))),
					encode(subscribePacket(0, link.Down(name, "+"))), encode(publishPacket(link.Up(name, link.Hello), "x", 0))))
				packets.ReadPacket(nc)
				nc.Close()
			}
		})
		coming.Go(func() {
			for handled.Load() < 200 {
				mustPublish(t, e, link.Down(name, link.Desired), "x")
				e.Disconnect(name)
			}
		})
	}
	eventually(t, "200 messages", func() bool { return handled.Load() >= 200 })
	stop()
	after := handled.Load()
	coming.Wait()
	if handled.Load() != after {
		t.Error("a message was handled after the end")
	}
}

func TestNewEmbeddedRefuses(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log := testLog(io.Discard)
	for name, cfg := range map[string]EmbeddedConfig{
		"no authenticator":      {Listen: "127.0.0.1:0", TLS: serverTLS(), Log: log},
		"no TLS":                {Listen: "127.0.0.1:0", Auth: newAccounts(), Log: log},
		"no log":                {Listen: "127.0.0.1:0", TLS: serverTLS(), Auth: newAccounts()},
		"an address in use":     {Listen: l.Addr().String(), TLS: serverTLS(), Auth: newAccounts(), Log: log},
		"negative limit":        {Listen: "127.0.0.1:0", TLS: serverTLS(), Auth: newAccounts(), Log: log, MaxConnections: -1},
		"an address that isn't": {Listen: "x", TLS: serverTLS(), Auth: newAccounts(), Log: log},
	} {
		if _, err := NewEmbedded(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
