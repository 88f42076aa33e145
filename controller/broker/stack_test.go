package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"runtime"
	"runtime/debug"
	"testing"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// deep looks a device up with as deep a stack as a database does.
type deep struct{ *accounts }

func (d deep) Device(ctx context.Context, cert *x509.Certificate) (string, error) {
	var frame [24 << 10]byte
	dig(frame[:])
	return d.accounts.Device(ctx, cert)
}

//go:noinline
func dig(frame []byte) {
	for i := range frame {
		frame[i] = 1
	}
}

// A connection is there for days, its handshake for milliseconds: the stacks
// that the handshake and the look at the device need do not stay.
func TestAConnectionKeepsNoStackOfItsHandshake(t *testing.T) {
	const connections, most = 100, 24 << 10
	var devices []string
	for i := range connections + 1 {
		devices = append(devices, fmt.Sprint("device-", i))
		certificateOf(devices[i])
	}
	_, p, stop := startTLS(t, deep{newAccounts(devices...)}, serverTLS())
	defer stop()
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it takes a part of the stacks back, some time
	connect := func(device string) {
		c := tls.Client(p.raw(t), clientTLS(certificateOf(device)))
		if _, err := c.Write(encode(connectPacket(device))); err != nil {
			t.Fatal(err)
		}
		if answer, err := packets.ReadPacket(c); err != nil || answer.(*packets.ConnackPacket).ReturnCode != 0 {
			t.Fatalf("CONNECT was answered by %v, %v", answer, err)
		}
	}
	connect(devices[0]) // what the first one has others share
	before := stacks()
	for _, device := range devices[1:] {
		connect(device)
	}
	if each := (stacks() - before) / connections; each > most {
		t.Errorf("a connection has %d bytes of stacks, want %d at most", each, most)
	} else {
		t.Logf("a connection has %d bytes of stacks", each)
	}
}

func stacks() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.StackInuse)
}
