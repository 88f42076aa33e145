package broker

import (
	"log/slog"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// protocolVersion is the number that MQTT 3.1.1 has in CONNECT. It is the only
// version spoken: the next one brings topic aliases, delayed wills and shared
// subscriptions, each a way around a rule.
const protocolVersion = 4

// hook is where the server asks what is allowed and says what happened. Its
// methods are called on the goroutine of the connection they are about, except
// for OnACLCheck of a delivery and OnPacketEncode.
type hook struct {
	mqtt.HookBase
	broker       *Embedded
	handle       Handler
	authenticate func(device, secret string) bool
}

func (h *hook) ID() string { return "dunlin" }

func (h *hook) SetOpts(*slog.Logger, *mqtt.HookOptions) {}

func (h *hook) Provides(b byte) bool {
	switch b {
	case mqtt.OnConnect, mqtt.OnConnectAuthenticate, mqtt.OnSessionEstablished, mqtt.OnACLCheck,
		mqtt.OnPublish, mqtt.OnDisconnect, mqtt.OnPacketEncode:
		return true
	}
	return false
}

// OnConnect comes before the server looks at the keepalive.
func (h *hook) OnConnect(cl *mqtt.Client, pk packets.Packet) error {
	if pk.ProtocolVersion != protocolVersion {
		_ = h.broker.server.SendConnack(cl, packets.ErrUnsupportedProtocolVersion, false, nil)
		return packets.ErrUnsupportedProtocolVersion
	}
	if k := cl.State.Keepalive; k == 0 || k > maxKeepalive {
		cl.State.Keepalive = maxKeepalive
	}
	return nil
}

// OnConnectAuthenticate makes the client id and the will those of the device
// whose secret it is.
func (h *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	c, ok := cl.Net.Conn.(*conn)
	if !ok {
		return false
	}
	refuse := func(reason string) bool {
		h.broker.log.Warn("MQTT connection refused", "remote", c.RemoteAddr(), "client", pk.Connect.ClientIdentifier, "reason", reason)
		c.refused = true
		return false
	}
	device := string(pk.Connect.Username)
	if link.CheckDevice(device) != nil {
		return refuse("the user name is not the name of a device")
	}
	if pk.Connect.ClientIdentifier != device {
		return refuse("the client id is not the user name")
	}
	if pk.Connect.WillFlag && pk.Connect.WillTopic != link.Up(device, link.Gone) {
		return refuse("the topic of the will is not " + link.Up(device, link.Gone))
	}
	if !h.authenticate(device, string(pk.Connect.Password)) {
		return refuse("unknown device or wrong secret")
	}
	cl.Properties.Clean = true
	c.device, c.client = device, cl
	if pk.Connect.WillFlag {
		c.will = pk.Connect.WillPayload
	}
	if !h.broker.claim(c) {
		return refuse("another connection of the device has not ended, or is newer")
	}
	return true
}

// OnSessionEstablished looks again: Disconnect finds the session from now on,
// but a device removed since the first look would have escaped it.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, pk packets.Packet) {
	c := cl.Net.Conn.(*conn)
	if !h.authenticate(c.device, string(pk.Connect.Password)) {
		cl.Stop(packets.ErrNotAuthorized)
		return
	}
	c.established = true
}

// OnACLCheck is asked for each publication of a device, each filter it
// subscribes to, and each message it is to receive.
func (h *hook) OnACLCheck(cl *mqtt.Client, topic string, write bool) bool {
	c, ok := cl.Net.Conn.(*conn)
	if !ok {
		return false
	}
	if write {
		return link.DeviceMayPublish(c.device, topic)
	}
	return link.DeviceMaySubscribe(c.device, topic)
}

// OnPublish hands what devices send to the controller, which alone may receive
// it, and lets through what the controller sends.
func (h *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if cl.Net.Inline {
		return pk, nil
	}
	if len(pk.Payload) > link.MaxPayload {
		cl.Stop(packets.ErrPacketTooLarge)
		return pk, packets.ErrRejectPacket
	}
	if h.broker.taking() {
		h.handle(pk.TopicName, pk.Payload)
	}
	return pk, packets.CodeSuccessIgnore
}

// OnDisconnect hands over the will. The server's own way to the will is not
// used: it goes past OnPublish, and is not always taken when the server ends
// the connection.
func (h *hook) OnDisconnect(cl *mqtt.Client, _ error, _ bool) {
	c, ok := cl.Net.Conn.(*conn)
	if !ok || !c.established || c.will == nil || !h.broker.taking() {
		return
	}
	if cl.StopCause() == error(packets.CodeDisconnect) {
		return // the device said goodbye
	}
	h.handle(link.Up(c.device, link.Gone), c.will)
}

// OnPacketEncode keeps refusals within the codes that MQTT 3.1.1 has: clients
// take others for success.
func (h *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	if pk.FixedHeader.Type == packets.Connack && cl.Properties.ProtocolVersion <= protocolVersion && pk.ReasonCode > packets.Err3NotAuthorized.Code {
		pk.ReasonCode = packets.Err3NotAuthorized.Code
	}
	return pk
}
