package broker

import (
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// TestSecondConnection holds the rules of the connection by which a device
// fetches: beside the first one, bound to the identity, and for nothing else.
func TestSecondConnection(t *testing.T) {
	b := startEmbedded(t, "a", "b")
	bus := b.bus.(*Embedded)
	first := mustDial(t, b.address, credentials{device: "a", willTopic: link.Up("a", link.Gone), will: "gone"})
	first.mustSubscribe(link.Down("a", link.Desired))
	old := mustDial(t, b.address, credentials{device: "a", clientID: link.DataClient("a")})
	old.mustSubscribe(link.Down("a", link.Data))
	second := mustDial(t, b.address, credentials{device: "a", clientID: link.DataClient("a")})
	old.wantCut() // of two of them the newer stays
	second.mustSubscribe(link.Down("a", link.Data))

	for name, cr := range map[string]credentials{
		"another device's": {device: "b", clientID: link.DataClient("a")},
		"a will":           {device: "a", clientID: link.DataClient("a"), willTopic: link.Up("a", link.Gone), will: "forged"},
		"no certificate":   {device: "a", clientID: link.DataClient("a"), anonymous: true},
		"another suffix":   {device: "a", clientID: "a.other"},
	} {
		if _, err := dial(t, b.address, cr); err == nil {
			t.Errorf("%s: connected", name)
		}
	}
	for filter, code := range second.subscribe(link.Down("a", link.Desired), link.Down("a", "+"), link.Down("a", "#"), link.EpochTopic, link.Down("b", link.Data)) {
		if code == 0 {
			t.Errorf("the second connection may subscribe to %s", filter)
		}
	}
	second.publish(link.Up("a", link.Hello), "forged")
	second.publish(link.Up("b", link.Fetch), "forged")
	second.publish(link.Up("a", link.Fetch), "request")
	b.inbox.want(t, link.Up("a", link.Fetch), "request")
	mustPublish(t, bus, link.Down("a", link.Data), "block")
	second.inbox.want(t, link.Down("a", link.Data), "block")
	mustPublish(t, bus, link.Down("a", link.Desired), "document")
	first.inbox.want(t, link.Down("a", link.Desired), "document") // and no block before it

	b.remove("a")
	bus.Disconnect("a")
	first.wantCut()
	second.wantCut()
	b.inbox.want(t, link.Up("a", link.Gone), "gone")
}

// TestRoomForData: a device that takes nothing has no room after a while, and
// has it again when it took what was on its way. Others have theirs.
func TestRoomForData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, p, stop := startPiped(t, newAccounts("a", "b"), newInbox().handle, t.Output())
		defer stop()
		near, far := net.Pipe()
		p.conns <- shows(far, "a")
		for _, p := range []packets.ControlPacket{connectPacket(link.DataClient("a")), subscribePacket(0, link.Down("a", link.Data))} {
			near.Write(encode(p))
			if _, err := packets.ReadPacket(near); err != nil {
				t.Fatal(err)
			}
		}
		block := strings.Repeat("x", link.MaxBlock)
		sent := 0
		for e.Room("a") {
			if sent += len(block); sent > 2*maxWaiting {
				t.Fatalf("there is room for more than %d bytes", sent)
			}
			mustPublish(t, e, link.Down("a", link.Data), block)
		}
		if sent < maxWaiting {
			t.Errorf("there is no room after %d bytes, want %d", sent, maxWaiting)
		}
		if !e.Room("b") {
			t.Error("another device has no room")
		}
		synctest.Wait()
		select {
		case <-e.Drained():
			t.Error("something was written")
		default:
		}
		if _, err := packets.ReadPacket(near); err != nil {
			t.Fatal(err)
		}
		<-e.Drained()
		if !e.Room("a") {
			t.Error("there is no room after a block was taken")
		}
		near.Close()
		synctest.Wait()
		if !e.Room("a") || e.fetching != 0 {
			t.Errorf("what was on its way counts for the next connection; %d fetch", e.fetching)
		}
	})
}

// TestSecondConnectionsAreBounded lets as many devices fetch as may, beside as
// many connections as there may be.
func TestSecondConnectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		names := devices(maxFetching + 1)
		_, p, stop := startPiped(t, newAccounts(names...), newInbox().handle, t.Output(), func(c *EmbeddedConfig) { c.MaxConnections = 2 })
		defer stop()
		var all []*rawClient
		for _, name := range names[:maxFetching] {
			c := p.dial(t, name)
			c.mustConnect(connectPacket(link.DataClient(name)))
			all = append(all, c)
		}
		last := names[maxFetching]
		if code := p.dial(t, last).connect(connectPacket(link.DataClient(last))); code == 0 {
			t.Errorf("device %d fetches, the limit is %d", maxFetching+1, maxFetching)
		}
		p.dial(t, last).mustConnect(connectPacket(last)) // which are counted apart
		all[0].Close()
		synctest.Wait()
		p.dial(t, last).mustConnect(connectPacket(link.DataClient(last)))
	})
}
