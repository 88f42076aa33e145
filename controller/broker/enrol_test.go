package broker

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
)

func TestWhoMayEnrol(t *testing.T) {
	const refused = 5
	for name, tc := range map[string]struct {
		packet *packets.ConnectPacket
		code   int
	}{
		"by a join token":        {enrolPacket(joinUser), 0},
		"renews":                 {enrolPacket(link.RenewUser), 0},
		"no client id":           {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.ClientIdentifier = "" }), 0},
		"a device's client id":   {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.ClientIdentifier = "a" }), 0},
		"not a clean session":    {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.CleanSession, c.ClientIdentifier = false, "x" }), 0},
		"wrong token":            {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.Password = []byte("x") }), refused},
		"no token":               {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.PasswordFlag, c.Password = false, nil }), refused},
		"no user name":           {connectPacket("a"), refused},
		"a device's name":        {enrolPacket("a"), refused},
		"the controller's name":  {enrolPacket(ControllerUser), refused},
		"a wildcard":             {enrolPacket(link.JoinUser("+")), refused},
		"a long client id":       {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.ClientIdentifier = strings.Repeat("x", 65) }), refused},
		"a client id with words": {enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.ClientIdentifier = "a b" }), refused},
		"a will":                 {enrolPacket(joinUser, withWill(link.JoinUp(joinUser, "n"), "x")), refused},
		"a will of a device":     {enrolPacket(joinUser, withWill(link.Up("a", link.Gone), "x")), refused},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := newInbox()
				_, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
				defer stop()
				c := p.dial(t, "")
				if code := c.connect(tc.packet); code != tc.code {
					t.Errorf("code %d, want %d", code, tc.code)
				}
				c.Close()
				synctest.Wait()
				if len(in) > 0 {
					t.Errorf("%d messages for the handler", len(in))
				}
			})
		})
	}
}

func TestEnrolmentConversation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
		defer stop()
		device := p.dial(t, "a")
		device.mustConnect(connectPacket("a"))
		device.send(subscribePacket(0, link.Down("a", "+")))
		device.next()

		// Two of one token, with one client id, which is a device's.
		var both []*rawClient
		for _, nonce := range []string{"n1", "n2"} {
			c := p.dial(t, "")
			c.mustConnect(enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.ClientIdentifier = "a" }))
			both = append(both, c)
			c.send(subscribePacket(0, link.JoinDown(joinUser, nonce)))
			if ack := c.next().(*packets.SubackPacket); !slices.Equal(ack.ReturnCodes, []byte{0}) {
				t.Fatalf("subscribe: %v", ack.ReturnCodes)
			}
			c.send(publishPacket(link.JoinUp(joinUser, nonce), "request "+nonce, 0))
			in.want(t, link.JoinUp(joinUser, nonce), "request "+nonce)
		}
		for i, nonce := range []string{"n1", "n2"} {
			mustPublish(t, e, link.JoinDown(joinUser, nonce), "answer "+nonce)
			if got := both[i].next().(*packets.PublishPacket); got.TopicName != link.JoinDown(joinUser, nonce) || string(got.Payload) != "answer "+nonce {
				t.Errorf("got %v", got)
			}
		}
		// The device's own connection has stood all the while.
		mustPublish(t, e, link.Down("a", link.Desired), "x")
		if got := device.next().(*packets.PublishPacket); string(got.Payload) != "x" {
			t.Errorf("got %v", got)
		}
		for _, c := range both {
			c.Close()
		}
		synctest.Wait()
		if n := e.server.Clients.Len(); n != 2 || len(e.conns) != 1 || len(e.enrolling) != 0 { // with the controller's own
			t.Errorf("%d clients, %d connections, %v enrolling are kept", n, len(e.conns), e.enrolling)
		}
	})
}

func TestEnrollingDevicesKeepToTheirTopics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newInbox()
		e, p, stop := startPiped(t, newAccounts("a"), in.handle, t.Output())
		defer stop()
		other := link.JoinUser("ffffffffffff")
		c := p.dial(t, "")
		c.mustConnect(enrolPacket(joinUser))
		refused := []string{"#", "+/#", link.UpFilter, link.JoinUpFilter, link.EpochTopic, link.Down("a", "+"), link.Down("a", link.Desired),
			link.JoinDown(joinUser, "+"), link.JoinDown("+", "n"), link.JoinDown(other, "n"), link.JoinDown(link.RenewUser, "n"),
			link.JoinUp(joinUser, "n"), "dunlin/v1/join/" + joinUser + "/#", "$share/g/" + link.JoinDown(joinUser, "n")}
		var granted []string
		for i := range maxEnrolFilters {
			granted = append(granted, link.JoinDown(joinUser, fmt.Sprint("n", i)))
		}
		c.send(subscribePacket(0, slices.Concat(refused, granted, granted, []string{link.JoinDown(joinUser, "more")})...))
		ack := c.next().(*packets.SubackPacket)
		want := slices.Concat(slices.Repeat([]byte{0x80}, len(refused)), make([]byte, 2*len(granted)), []byte{0x80})
		if !slices.Equal(ack.ReturnCodes, want) {
			t.Errorf("codes %x, want %x", ack.ReturnCodes, want)
		}
		for _, topic := range []string{link.Up("a", link.Hello), link.Down("a", link.Desired), link.EpochTopic, link.JoinDown(joinUser, "n"),
			link.JoinUp(other, "n"), link.JoinUp(link.RenewUser, "n"), link.JoinUp("a", "n"), link.JoinUp(joinUser, "n") + "/x"} {
			c.send(publishPacket(topic, "forged", 0))
		}
		c.send(publishPacket(link.JoinUp(joinUser, "n"), strings.Repeat("x", MaxEnrolPayload), 0))
		in.want(t, link.JoinUp(joinUser, "n"), strings.Repeat("x", MaxEnrolPayload))

		// A device has no part in conversations.
		device := p.dial(t, "a")
		device.mustConnect(connectPacket("a"))
		device.send(subscribePacket(0, link.JoinDown(joinUser, "n0"), link.JoinDown("a", "n"), link.JoinUpFilter))
		if ack := device.next().(*packets.SubackPacket); !slices.Equal(ack.ReturnCodes, []byte{0x80, 0x80, 0x80}) {
			t.Errorf("codes %x for a device", ack.ReturnCodes)
		}
		device.send(publishPacket(link.JoinUp(joinUser, "n0"), "forged", 0))
		device.roundtrip()

		// Too large a message ends it.
		go c.send(publishPacket(link.JoinUp(joinUser, "n"), strings.Repeat("x", MaxEnrolPayload+1), 0))
		c.wantClosed()
		synctest.Wait()
		if len(in) > 0 {
			t.Errorf("the handler got %v", <-in)
		}
		if err := e.Publish(link.JoinDown(joinUser, "+"), nil); err == nil {
			t.Error("the controller sent on a filter")
		}
	})
}

// TestEnrolmentEnds: though it sends all the time.
func TestEnrolmentEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startPiped(t, newAccounts(), newInbox().handle, t.Output())
		defer stop()
		began := time.Now()
		c := p.dial(t, "")
		c.mustConnect(enrolPacket(joinUser))
		for range int(enrolTimeout/time.Second) + 1 {
			c.send(publishPacket(link.JoinUp(joinUser, "n"), "x", 0))
			time.Sleep(time.Second)
		}
		c.wantClosed()
		if took := time.Since(began); took < enrolTimeout || took > enrolTimeout+time.Second {
			t.Errorf("ended after %v, want %v", took, enrolTimeout)
		}
	})
}

func TestEnrollingDevicesMayNotBeSilentForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, p, stop := startPiped(t, newAccounts(), newInbox().handle, t.Output())
		defer stop()
		c := p.dial(t, "")
		c.mustConnect(enrolPacket(joinUser, func(c *packets.ConnectPacket) { c.Keepalive = 300 }))
		began := time.Now()
		c.wantClosed()
		if took, want := time.Since(began), maxEnrolKeepalive*3/2*time.Second; took != want {
			t.Errorf("cut off after %v of silence, want %v", took, want)
		}
	})
}

// TestEnrollingDevicesAreBounded, and take no device's place.
func TestEnrollingDevicesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 2
		e, p, stop := startPiped(t, newAccounts(devices(limit)...), newInbox().handle, t.Output(), func(c *EmbeddedConfig) { c.MaxConnections = limit })
		defer stop()
		var open []*rawClient
		enrol := func(user string) int {
			c := p.dial(t, "")
			open = append(open, c)
			return c.connect(enrolPacket(user))
		}
		for i := range maxEnrolling {
			want := 0
			if i >= maxEnrolling/2 {
				want = 5 // the other half is for those with a token
			}
			if code := enrol(link.RenewUser); code != want {
				t.Fatalf("renewal %d: code %d, want %d", i, code, want)
			}
		}
		for i := range maxEnrolling/2 + 1 {
			want := 0
			if i == maxEnrolling/2 {
				want = 5
			}
			if code := enrol(joinUser); code != want {
				t.Fatalf("join %d: code %d, want %d", i, code, want)
			}
		}
		for _, name := range devices(limit) {
			p.dial(t, name).mustConnect(connectPacket(name))
		}
		for _, c := range open {
			c.Close()
		}
		synctest.Wait()
		if len(e.enrolling) != 0 || len(e.conns) != limit || e.unknown.Len() != 0 {
			t.Errorf("%v enrolling, %d connections, %d unknown are left", e.enrolling, len(e.conns), e.unknown.Len())
		}
	})
}
