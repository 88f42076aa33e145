package broker

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// Tests in a synctest bubble have their own time: a wait of minutes takes
// none, and one that would never end fails the test.

func TestDeadlineBeforeConnect(t *testing.T) {
	whole := encode(connectPacket("a"))
	for name, sent := range map[string][]byte{
		"nothing":           nil,
		"half a header":     whole[:1],
		"half a CONNECT":    whole[:len(whole)/2],
		"all but one byte":  whole[:len(whole)-1],
		"a length promised": {packets.Connect << 4, 0xff, 0x1f},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, t.Output())
				defer stop()
				began := time.Now()
				c := p.dial(t, "a")
				c.Write(sent)
				c.wantClosed()
				if took := time.Since(began); took != connectTimeout {
					t.Errorf("closed after %v, want %v", took, connectTimeout)
				}
			})
		})
	}
}

func TestTrickledConnectEndsAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, t.Output())
		defer stop()
		began := time.Now()
		c := p.dial(t, "a")
		for _, b := range encode(connectPacket("a")) { // ten bytes until then
			if _, err := c.Write([]byte{b}); err != nil {
				break
			}
			time.Sleep(connectTimeout / 10)
		}
		c.wantClosed()
		if took := time.Since(began); took < connectTimeout || took > connectTimeout+connectTimeout/10 {
			t.Errorf("closed after %v, want %v", took, connectTimeout)
		}
	})
}

func TestFirstPacketMustBeAReasonableConnect(t *testing.T) {
	for name, sent := range map[string][]byte{
		"PUBLISH":               encode(publishPacket(link.Up("a", link.Hello), "x", 0)),
		"HTTP":                  []byte("GET / HTTP/1.1\r\n\r\n"),
		"a length of 256 MB":    {packets.Connect << 4, 0xff, 0xff, 0xff, 0x7f},
		"an endless length":     {packets.Connect << 4, 0xff, 0xff, 0xff, 0xff, 0xff},
		"one byte too large":    {packets.Connect << 4, 0x81, 0x20}, // maxConnectPacket + 1
		"flags on CONNECT":      {packets.Connect<<4 | 1, 0},
		"MQTT 5":                connect5("a"),
		"a large will, refused": encode(connectPacket("a", withWill(link.Up("a", link.Gone), strings.Repeat("x", maxConnectPacket)))),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, p, stop := startPiped(t, newAccounts("a"), newInbox().handle, t.Output())
				defer stop()
				began := time.Now()
				c := p.dial(t, "a")
				c.Write(sent)
				c.wantClosed()
				if took := time.Since(began); took != 0 {
					t.Errorf("closed after %v, want at once", took)
				}
			})
		})
	}
}

func TestConnectionLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 3
		_, p, stop := startPiped(t, newAccounts(devices(10)...), newInbox().handle, t.Output(), func(c *EmbeddedConfig) { c.MaxConnections = limit })
		defer stop()
		var open []*rawClient
		for i := range limit {
			c := p.dial(t, fmt.Sprintf("dev-%d", i))
			c.mustConnect(connectPacket(fmt.Sprintf("dev-%d", i)))
			open = append(open, c)
		}
		c := p.dial(t, "dev-9")
		if code := c.connect(connectPacket("dev-9")); code != -1 {
			t.Fatalf("connection %d: code %d, want it closed", limit+1, code)
		}
		open[0].roundtrip()
		open[0].Close()
		synctest.Wait()
		p.dial(t, "dev-9").mustConnect(connectPacket("dev-9"))
	})
}

// faulty is a listener that first fails for a while.
type faulty struct {
	net.Listener
	errs  []error
	calls atomic.Int32
}

func (f *faulty) Accept() (net.Conn, error) {
	if i := int(f.calls.Add(1)) - 1; i < len(f.errs) {
		return nil, f.errs[i]
	}
	return f.Listener.Accept()
}

func TestAcceptSurvivesErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := func(errno syscall.Errno) error { return &net.OpError{Op: "accept", Net: "tcp", Err: errno} }
		p := newPipes()
		f := &faulty{Listener: p, errs: slices.Repeat([]error{fail(syscall.EMFILE), fail(syscall.ENFILE), fail(syscall.ECONNABORTED), fail(syscall.ENOBUFS)}, 5)}
		e := newEmbedded(EmbeddedConfig{Auth: newAccounts("a"), Log: testLog(t.Output())}, f, showing)
		stop := start(t, e, newInbox().handle)
		defer stop()
		began := time.Now()
		p.dial(t, "a").mustConnect(connectPacket("a"))
		if int(f.calls.Load()) < len(f.errs) {
			t.Errorf("%d calls of Accept, want more than %d", f.calls.Load(), len(f.errs))
		}
		// It did not spin, and did not sleep for long.
		if took := time.Since(began); took < 5*time.Second || took > 30*time.Second {
			t.Errorf("%d errors took %v", len(f.errs), took)
		}
	})
}

func TestAcceptErrorsDoNotHoldTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Listener: newPipes(), errs: slices.Repeat([]error{syscall.EMFILE}, 10_000)}
		e := newEmbedded(EmbeddedConfig{Auth: newAccounts(), Log: testLog(t.Output())}, f, showing)
		stop := start(t, e, newInbox().handle)
		time.Sleep(time.Minute)
		began := time.Now()
		stop()
		if took := time.Since(began); took > time.Second {
			t.Errorf("the end took %v", took)
		}
	})
}

func TestConnectIsBoundToTheIdentity(t *testing.T) {
	const refused = 5 // not authorised, MQTT 3.1.1
	gone := link.Up("a", link.Gone)
	for name, tc := range map[string]struct {
		change func(*packets.ConnectPacket)
		code   int
	}{
		"right":                      {func(*packets.ConnectPacket) {}, 0},
		"right, with a will":         {withWill(gone, "x"), 0},
		"right, not a clean session": {func(c *packets.ConnectPacket) { c.CleanSession = false }, 0},
		"another's client id":        {func(c *packets.ConnectPacket) { c.ClientIdentifier = "b" }, refused},
		"a client id of its own":     {func(c *packets.ConnectPacket) { c.ClientIdentifier = "x" }, refused},
		"no client id":               {func(c *packets.ConnectPacket) { c.ClientIdentifier = "" }, refused},
		"the server's client id":     {func(c *packets.ConnectPacket) { c.ClientIdentifier = "inline" }, refused},
		"another's name":             {func(c *packets.ConnectPacket) { c.ClientIdentifier, c.UsernameFlag, c.Username = "b", true, "b" }, refused},
		"another's user name":        {func(c *packets.ConnectPacket) { c.UsernameFlag, c.Username = true, "b" }, refused},
		"its own user name":          {func(c *packets.ConnectPacket) { c.UsernameFlag, c.Username = true, "a" }, 0},
		"the user name of renewals":  {func(c *packets.ConnectPacket) { c.UsernameFlag, c.Username = true, link.RenewUser }, refused},
		"a will on another's topic":  {withWill(link.Up("b", link.Gone), "x"), refused},
		"a will on a down topic":     {withWill(link.Down("a", link.Desired), "x"), refused},
		"a will on another up kind":  {withWill(link.Up("a", link.Hello), "x"), refused},
		"a will on the epoch":        {withWill(link.EpochTopic, "x"), refused},
		"a will at QoS 1":            {func(c *packets.ConnectPacket) { withWill(gone, "x")(c); c.WillQos = 1 }, refused},
		"a retained will":            {func(c *packets.ConnectPacket) { withWill(gone, "x")(c); c.WillRetain = true }, refused},
		"MQTT 3.1":                   {func(c *packets.ConnectPacket) { c.ProtocolName, c.ProtocolVersion = "MQIsdp", 3 }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newInbox()
				_, p, stop := startPiped(t, newAccounts("a", "b"), in.handle, t.Output())
				defer stop()
				c := p.dial(t, "a")
				if code := c.connect(connectPacket("a", tc.change)); code != tc.code {
					t.Errorf("code %d, want %d", code, tc.code)
				}
				c.Close()
				synctest.Wait()
				if (len(in) > 0) != (name == "right, with a will") {
					t.Errorf("%d messages for the handler", len(in))
				}
			})
		})
	}
}

func TestKeepaliveIsBounded(t *testing.T) {
	for _, tc := range []struct {
		keepalive uint16
		silence   time.Duration
	}{{0, 450 * time.Second}, {65535, 450 * time.Second}, {301, 450 * time.Second}, {300, 450 * time.Second}, {60, 90 * time.Second}} {
		t.Run(fmt.Sprint(tc.keepalive), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newInbox()
				_, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
				defer stop()
				c := p.dial(t, "a")
				c.mustConnect(connectPacket("a", withWill(link.Up("a", link.Gone), "gone"), func(c *packets.ConnectPacket) { c.Keepalive = tc.keepalive }))
				time.Sleep(tc.silence - time.Second)
				c.roundtrip()
				began := time.Now()
				c.wantClosed()
				if took := time.Since(began); took != tc.silence {
					t.Errorf("cut off after %v of silence, want %v", took, tc.silence)
				}
				in.want(t, link.Up("a", link.Gone), "gone")
			})
		})
	}
}
