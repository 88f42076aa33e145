package broker

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
)

// fuzzSeeds are sequences of packets, from before and after CONNECT.
func fuzzSeeds() [][]byte {
	connect := encode(connectPacket("a", withWill(link.Up("a", link.Gone), "gone")))
	seeds := [][]byte{nil, {0}, {0x10}, {0x10, 0}, {0x10, 0xff, 0xff, 0xff, 0xff}, []byte("GET / HTTP/1.1\r\n\r\n"), connect, connect[:10], slices.Repeat(connect, 2)}
	three := encode(connectPacket("a", func(c *packets.ConnectPacket) { c.ProtocolName, c.ProtocolVersion = "MQIsdp", 3 }))
	seeds = append(seeds, connect5("a"), three)
	for _, p := range []packets.ControlPacket{
		publishPacket(link.Up("a", link.Hello), "x", 0), publishPacket(link.Up("a", link.Hello), "x", 1), publishPacket(link.Up("a", link.Hello), "x", 2),
		publishPacket(link.Up("b", link.Hello), "forged", 0), publishPacket(link.EpochTopic, "forged", 0), publishPacket("", "", 0), publishPacket("$SYS/x", "x", 0),
		subscribePacket(0, link.Down("a", "+"), link.EpochTopic), subscribePacket(2, "#", "$share/g/#", "+/+", ""),
		packets.NewControlPacket(packets.Unsubscribe), packets.NewControlPacket(packets.Pingreq), packets.NewControlPacket(packets.Disconnect),
		packets.NewControlPacket(packets.Puback), packets.NewControlPacket(packets.Pubrec), packets.NewControlPacket(packets.Pubrel), packets.NewControlPacket(packets.Pubcomp),
	} {
		seeds = append(seeds, slices.Concat(connect, encode(p), encode(packets.NewControlPacket(packets.Pingreq))))
	}
	return append(seeds,
		slices.Concat(connect, []byte{0xf0, 0}),                   // AUTH, of MQTT 5
		slices.Concat(connect, []byte{0x20, 2, 0, 0}),             // CONNACK, to the broker
		slices.Concat(connect, []byte{0x36, 2, 0, 0}),             // PUBLISH at QoS 3
		slices.Concat(connect, []byte{0x30, 0x7f}),                // PUBLISH, cut short
		slices.Concat(connect, []byte{0x82, 5, 0, 1, 0xff, 0xff}), // a filter longer than its packet
		slices.Concat(connect, []byte{0x30, 0xff, 0xff, 0xff, 0x7f}),
	)
}

// enrolSeeds are those of a client without a certificate.
func enrolSeeds() [][]byte {
	connect := encode(enrolPacket(joinUser))
	seeds := [][]byte{connect, connect[:10], encode(enrolPacket(link.RenewUser)), encode(connectPacket("a"))}
	for _, p := range []packets.ControlPacket{
		publishPacket(link.JoinUp(joinUser, "n"), "x", 0), publishPacket(link.JoinUp(link.RenewUser, "n"), "forged", 0),
		publishPacket(link.Up("a", link.Hello), "forged", 0), publishPacket(link.JoinDown(joinUser, "n"), "forged", 0),
		subscribePacket(0, link.JoinDown(joinUser, "n")), subscribePacket(0, link.JoinDown(joinUser, "+"), "#", link.JoinUpFilter),
	} {
		seeds = append(seeds, slices.Concat(connect, encode(p), encode(packets.NewControlPacket(packets.Pingreq))))
	}
	return seeds
}

// hostile gives a running broker bytes over a connection of its own, and
// checks that the broker ends it, still works, and lets nothing forged through.
type hostile struct {
	broker *Embedded
	inbox  inbox
}

func newHostile(t testing.TB) *hostile {
	in := newInbox()
	// The handler checks while it runs: nothing is kept.
	handle := func(topic string, payload []byte) {
		enrols := (link.EnrollingMayPublish(joinUser, topic) || link.EnrollingMayPublish(link.RenewUser, topic)) && len(payload) <= MaxEnrolPayload
		if !enrols && !link.DeviceMayPublish("a", topic) && topic != link.Up("probe", link.Hello) || len(payload) > link.MaxPayload {
			t.Errorf("the handler got %d bytes on %s", len(payload), topic)
		}
		if strings.Contains(topic, "probe") {
			in.handle(topic, payload)
		}
	}
	e, p, _ := startPiped(t, newAccounts("a", "probe"), handle, io.Discard)
	c := p.dial(t, "probe")
	c.mustConnect(connectPacket("probe")) // the broker runs
	c.Close()
	return &hostile{broker: e, inbox: in}
}

// serve lets the broker serve one connection as if it had been accepted.
func (h *hostile) serve(t testing.TB, device string) (net.Conn, <-chan struct{}) {
	near, far := net.Pipe()
	c := h.broker.admit(shows(far, device))
	if c == nil {
		t.Fatal("not admitted")
	}
	go h.broker.serve(c)
	return near, c.ended
}

func (h *hostile) try(t testing.TB, data []byte, anonymous bool) {
	device := "a"
	if anonymous {
		device = ""
	}
	near, ended := h.serve(t, device)
	go io.Copy(io.Discard, near)
	near.SetWriteDeadline(time.Now().Add(patience))
	near.Write(data)
	near.Close()
	wait(t, "the connection has ended", ended)
}

func (h *hostile) probe(t testing.TB) {
	near, ended := h.serve(t, "probe")
	r := newRawClient(t, near)
	r.mustConnect(connectPacket("probe"))
	r.send(publishPacket(link.Up("probe", link.Hello), "alive", 0))
	h.inbox.want(t, link.Up("probe", link.Hello), "alive")
	near.Close()
	wait(t, "the connection has ended", ended)
}

func FuzzConnection(f *testing.F) {
	for _, s := range fuzzSeeds() {
		f.Add(s, false)
	}
	for _, s := range enrolSeeds() {
		f.Add(s, true)
	}
	h := newHostile(f)
	f.Fuzz(func(t *testing.T, data []byte, anonymous bool) {
		h.try(t, data, anonymous)
		h.probe(t)
	})
}

// TestHostileBytes sends mutations of the seeds.
func TestHostileBytes(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	h := newHostile(t)
	for i := range 2000 {
		anonymous := i%4 == 0
		seeds, connect := fuzzSeeds(), encode(connectPacket("a"))
		if anonymous {
			seeds, connect = enrolSeeds(), encode(enrolPacket(joinUser))
		}
		data := slices.Clone(seeds[r.IntN(len(seeds))])
		from := 0
		if bytes.HasPrefix(data, connect[:2]) && r.IntN(2) == 0 {
			from = min(len(data), len(connect)) // leave CONNECT whole
		}
		for range r.IntN(8) {
			if from >= len(data) {
				break
			}
			switch k := from + r.IntN(len(data)-from); r.IntN(4) {
			case 0:
				data[k] ^= 1 << r.IntN(8)
			case 1:
				data[k] = byte(r.Uint32())
			case 2:
				data = slices.Delete(data, k, k+1)
			default:
				data = slices.Insert(data, k, byte(r.Uint32()))
			}
		}
		h.try(t, data, anonymous)
		if i%100 == 0 {
			h.probe(t)
		}
	}
	h.probe(t)
}
