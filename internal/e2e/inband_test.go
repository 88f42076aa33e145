package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// narrow is a slow way from devices to one port of the controller, at pathHost,
// that can be cut. It stands in for a network that lets nothing else through.
type narrow struct {
	to   string
	rate int // bytes a second to devices

	mu       sync.Mutex // guards what follows
	conns    map[net.Conn]bool
	toDevice int // bytes
}

func newNarrow(t *testing.T, to string, rate int) *narrow {
	t.Helper()
	_, port, err := net.SplitHostPort(to)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(pathHost, port))
	if err != nil {
		t.Fatal(err)
	}
	n := &narrow{to: to, rate: rate, conns: map[net.Conn]bool{}}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { n.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		n.cut()
		serving.Wait()
	})
	return n
}

func (n *narrow) serve(device net.Conn) {
	defer device.Close()
	server, err := net.Dial("tcp", n.to)
	if err != nil {
		return
	}
	defer server.Close()
	n.mu.Lock()
	n.conns[device], n.conns[server] = true, true
	n.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() {
		defer server.Close()
		_, _ = io.Copy(server, device) // until either ends
	})
	both.Go(func() {
		defer device.Close()
		buf := make([]byte, 2048)
		for {
			c, err := server.Read(buf)
			if err != nil {
				return
			}
			time.Sleep(time.Duration(c) * time.Second / time.Duration(n.rate)) // what it is slow by
			if _, err := device.Write(buf[:c]); err != nil {
				return
			}
			n.mu.Lock()
			n.toDevice += c
			n.mu.Unlock()
		}
	})
	both.Wait()
	n.mu.Lock()
	delete(n.conns, device)
	delete(n.conns, server)
	n.mu.Unlock()
}

func (n *narrow) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.conns {
		c.Close()
	}
}

func (n *narrow) passed() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.toDevice
}

// TestModelsArriveOverMQTTOnly has a device that reaches the MQTT port and
// nothing else: it joins, gets its model in spite of a cut, without what it had
// coming again, and serves it.
func TestModelsArriveOverMQTTOnly(t *testing.T) {
	f, err := NewFleet(programs, t.TempDir(), library)
	if err != nil {
		t.Fatal(err)
	}
	f.ControllerArgs = []string{"--hosts", pathHost + ",127.0.0.1"}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatal(err)
	}
	way := newNarrow(t, f.MQTT, 100_000)
	a := startAgent(t, f, "device-1", "--controller", "mqtts://"+strings.Replace(f.MQTT, "127.0.0.1", pathHost, 1))
	eventually(t, func() string {
		if d := devices(t, f); len(d) != 1 || !d[0].Connected {
			return fmt.Sprintf("device-1 is not connected: %+v", d)
		}
		return ""
	})
	info, err := os.Stat(digitsFile("v2"))
	if err != nil {
		t.Fatal(err)
	}
	size := int(info.Size())
	cli(t, f, "push", digitsFile("v2"), "digits:1")
	before := way.passed()
	apply(t, f, "digits", 1)
	eventually(t, func() string {
		if n := way.passed() - before; n < size/2 {
			return fmt.Sprintf("%d bytes of %d have passed", n, size)
		}
		return ""
	})
	if why := serves(t, a, 1); why == "" {
		t.Fatal("it serves already: the cut comes too late to say anything")
	}
	way.cut()
	eventually(t, func() string { return serves(t, a, 1) })
	// What was on its way at the cut, and messages beside the model.
	if n := way.passed() - before; n > size+64<<10 {
		t.Errorf("%d bytes have passed for a model of %d: what was there came again", n, size)
	}
	eventually(t, func() string {
		for _, e := range events(t, f) {
			if e.Event.Kind == "version.serving" {
				return ""
			}
		}
		return "the controller is not told that it serves"
	})
}

// TestModelsArriveOverMQTT has bundles come over MQTT by each broker: by a
// second connection, or by the only one.
func TestModelsArriveOverMQTT(t *testing.T) {
	onEachBroker(t, func(t *testing.T, f *Fleet) {
		a := startAgent(t, f, "device-1", "--delivery", "mqtt")
		cli(t, f, "push", digitsFile("v2"), "digits:1")
		cli(t, f, "push", digitsFile("v1"), "digits:2")
		apply(t, f, "digits", 1)
		eventually(t, func() string { return serves(t, a, 1) })
		apply(t, f, "digits", 2)
		eventually(t, func() string { return serves(t, a, 2) })
		b, err := os.ReadFile(a.Log)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), "no connection to the broker"); n > 0 {
			t.Errorf("the session was lost %d times", n)
		}
	})
}
