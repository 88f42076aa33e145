package broker

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"strings"

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
	broker   *Embedded
	handle   Handler
	device   func(*x509.Certificate) (string, error)
	mayEnrol func(user, password, from string) bool
}

func (h *hook) ID() string { return "dunlin" }

func (h *hook) SetOpts(*slog.Logger, *mqtt.HookOptions) {}

func (h *hook) Provides(b byte) bool {
	switch b {
	case mqtt.OnConnect, mqtt.OnConnectAuthenticate, mqtt.OnSessionEstablished, mqtt.OnACLCheck,
		mqtt.OnPublish, mqtt.OnDisconnect, mqtt.OnPacketEncode, mqtt.OnPacketSent:
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
	limit := uint16(maxKeepalive)
	if c, ok := cl.Net.Conn.(*conn); ok && c.certificate == nil {
		limit = maxEnrolKeepalive
	}
	if k := cl.State.Keepalive; k == 0 || k > limit {
		cl.State.Keepalive = limit
	}
	return nil
}

// OnConnectAuthenticate makes the client id and the will those of the device
// whose certificate it is, or lets a device enrol.
func (h *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	c, ok := cl.Net.Conn.(*conn)
	if !ok {
		return false
	}
	admit := h.connect
	if c.certificate == nil {
		admit = h.enrol
	}
	if reason := admit(c, cl, pk.Connect); reason != "" {
		h.broker.refuse(c, pk.Connect.ClientIdentifier, reason)
		return false
	}
	cl.Properties.Clean = true
	return true
}

// connect lets a device in, or says why not.
func (h *hook) connect(c *conn, cl *mqtt.Client, p packets.ConnectParams) string {
	h.broker.known(c)
	device, err := h.device(c.certificate)
	if err == nil {
		err = link.CheckDevice(device)
	}
	data := err == nil && p.ClientIdentifier == link.DataClient(device)
	switch user := string(p.Username); {
	case err != nil:
		return err.Error()
	case p.ClientIdentifier != device && !data:
		return "the client id is not " + device + ", the name in the certificate"
	case user != "" && user != device:
		return "the user name is not " + device + ", the name in the certificate"
	case p.WillFlag && data:
		return "the connection " + link.DataClient(device) + " may have no will"
	case p.WillFlag && p.WillTopic != link.Up(device, link.Gone):
		return "the topic of the will is not " + link.Up(device, link.Gone)
	}
	c.device, c.data, c.client, c.id = device, data, cl, p.ClientIdentifier
	if p.WillFlag {
		c.will = p.WillPayload
	}
	if data && !h.broker.fetch(c) {
		return fmt.Sprintf("%d devices fetch, the limit is %d", maxFetching, maxFetching)
	}
	if !h.broker.claim(c) {
		return "another connection of the device has not ended, or is newer"
	}
	return ""
}

// enrol lets a client without a certificate in, or says why not. Its client id
// is one of the broker's, so that nobody can take over its connection.
func (h *hook) enrol(c *conn, cl *mqtt.Client, p packets.ConnectParams) string {
	user := string(p.Username)
	if err := link.CheckEnrolUser(user); err != nil {
		return fmt.Sprintf("no certificate, and %.200s", err)
	}
	switch id := p.ClientIdentifier; {
	case len(id) > maxEnrolClientID || strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' }):
		return fmt.Sprintf("the client id is not up to %d characters of ASCII", maxEnrolClientID)
	case p.WillFlag:
		return "an enrolling device may have no will"
	case !h.mayEnrol(user, string(p.Password), c.RemoteAddr().String()):
		return "user " + user + " may not enrol, or the password is wrong"
	}
	c.user, c.client, c.id = user, cl, fmt.Sprint("enrolling:", c.number)
	cl.ID = c.id
	if !h.broker.enrol(c) {
		return "too many devices enrol"
	}
	return ""
}

// OnSessionEstablished looks again: Disconnect finds the session from now on,
// but a device removed since the first look would have escaped it.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	c := cl.Net.Conn.(*conn)
	if c.certificate != nil {
		if device, err := h.device(c.certificate); err != nil || device != c.device {
			cl.Stop(packets.ErrNotAuthorized)
			return
		}
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
	switch {
	case write && c.data:
		ok = link.DataMayPublish(c.device, topic)
	case c.data:
		ok = link.DataMaySubscribe(c.device, topic)
	case write && c.device != "":
		ok = link.DeviceMayPublish(c.device, topic)
	case write:
		ok = link.EnrollingMayPublish(c.user, topic)
	case c.device != "":
		ok = link.DeviceMaySubscribe(c.device, topic)
	default:
		_, has := cl.State.Subscriptions.Get(topic)
		ok = link.EnrollingMaySubscribe(c.user, topic) && (has || cl.State.Subscriptions.Len() < maxEnrolFilters)
	}
	if !ok && c.denied.CompareAndSwap(false, true) {
		h.broker.refused(c.name(), fmt.Sprintf("topic %.200q", topic), "the client may not use the topic", c.RemoteAddr().String())
	}
	return ok
}

// OnPublish hands what devices send to the controller, which alone may receive
// it, and lets through what the controller sends.
func (h *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if cl.Net.Inline {
		return pk, nil
	}
	limit := link.MaxPayload
	if c, ok := cl.Net.Conn.(*conn); ok && c.device == "" {
		limit = MaxEnrolPayload
	}
	if len(pk.Payload) > limit {
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

// OnPacketSent counts what is written of that which devices fetch.
func (h *hook) OnPacketSent(cl *mqtt.Client, pk packets.Packet, _ []byte) {
	c, ok := cl.Net.Conn.(*conn)
	if !ok || !c.data || pk.FixedHeader.Type != packets.Publish {
		return
	}
	c.waiting.Add(-int64(len(pk.Payload)))
	select {
	case h.broker.drained <- struct{}{}:
	default: // one is waiting already
	}
}
