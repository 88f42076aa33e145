package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
)

func wait(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
}

func TestExternalOutlivesItsBroker(t *testing.T) {
	m := newMosquitto(t)
	e, connected := m.external(nil)
	in := newInbox()
	if err := e.Publish(link.EpochTopic, nil); !errors.Is(err, ErrNotConnected) {
		t.Errorf("publish before Run: %v", err)
	}
	start(t, e, in.handle) // before the broker is there
	for i := range 3 {
		m.start()
		wait(t, "connected", connected)
		a := mustDial(t, m.address(), credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"))
		a.publish(link.Up("a", link.Hello), fmt.Sprint(i))
		in.want(t, link.Up("a", link.Hello), fmt.Sprint(i))
		mustPublish(t, e, link.Down("a", link.Desired), fmt.Sprint(i))
		a.inbox.want(t, link.Down("a", link.Desired), fmt.Sprint(i))
		m.stop()
		a.wantCut()
		eventually(t, "publishing fails", func() bool { return errors.Is(e.Publish(link.EpochTopic, nil), ErrNotConnected) })
	}
}

// retries is a slog.Handler that keeps the pauses that were announced, and
// the errors before them.
type retries struct {
	mu     sync.Mutex
	pauses []time.Duration
	errs   []string
}

func (r *retries) Enabled(context.Context, slog.Level) bool { return true }
func (r *retries) WithAttrs([]slog.Attr) slog.Handler       { return r }
func (r *retries) WithGroup(string) slog.Handler            { return r }
func (r *retries) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "retry_in":
			r.pauses = append(r.pauses, a.Value.Duration())
		case "error":
			r.errs = append(r.errs, a.Value.String())
		}
		return true
	})
	return nil
}

func (r *retries) get() ([]time.Duration, []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.pauses), slices.Clone(r.errs)
}

// runExternal runs an External against an address until it has failed n times,
// and returns what it said.
func runExternal(t *testing.T, n int, cfg ExternalConfig) ([]time.Duration, []string) {
	t.Helper()
	var r retries
	cfg.Log = slog.New(&r)
	e, err := NewExternal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.backoff = time.Microsecond
	stop := start(t, e, newInbox().handle)
	eventually(t, fmt.Sprintf("%d attempts", n), func() bool { p, _ := r.get(); return len(p) >= n })
	stop()
	return r.get()
}

func TestExternalBackoff(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody is there
	pauses, _ := runExternal(t, 20, ExternalConfig{URL: "tcp://" + l.Addr().String()})
	low, high := 0, 0
	for i, p := range pauses {
		bound := time.Microsecond << i
		if p < 0 || p >= bound {
			t.Errorf("pause %d is %v, must be below %v", i, p, bound)
		}
		if p < bound/2 {
			low++
		} else {
			high++
		}
	}
	// One in a million would be by chance.
	if low == 0 || high < 2 {
		t.Errorf("the pauses are not spread over 0 to their bounds: %v", pauses)
	}
}

func TestExternalRefused(t *testing.T) {
	e, err := NewEmbedded(EmbeddedConfig{Listen: "127.0.0.1:0", TLS: serverTLS(), Auth: newAccounts("a"), Log: testLog(io.Discard)})
	if err != nil {
		t.Fatal(err)
	}
	start(t, e, newInbox().handle)
	address := "mqtts://" + e.Addr().String()
	for name, tc := range map[string]struct {
		cfg  ExternalConfig
		want string
	}{
		"the certificate":  {ExternalConfig{URL: address, TLS: clientTLS(certificateOf(ControllerUser))}, "not Authorized"},
		"the subscription": {ExternalConfig{URL: address, TLS: clientTLS(certificateOf("a")), ClientID: "a"}, "refuses the controller the subscription"},
		"the server":       {ExternalConfig{URL: address, TLS: pki.ClientConfig(pki.Client{Trust: func() pki.Trust { return pki.Trust{} }}, "127.0.0.1")}, "TLS handshake"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.cfg.OnConnect = func() { t.Error("connected") }
			_, errs := runExternal(t, 3, tc.cfg)
			for _, got := range errs {
				if !strings.Contains(strings.ToLower(got), strings.ToLower(tc.want)) {
					t.Errorf("error %q, want %q in it", got, tc.want)
				}
			}
		})
	}
}

// TestExternalEndsWhileItWaits for a broker that says nothing at all, or
// nothing after CONNACK.
func TestExternalEndsWhileItWaits(t *testing.T) {
	for name, answer := range map[string]packets.ControlPacket{"for CONNACK": nil, "for SUBACK": packets.NewControlPacket(packets.Connack)} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			waiting := make(chan struct{})
			go func() {
				nc, err := l.Accept()
				if err != nil {
					return
				}
				defer nc.Close()
				packets.ReadPacket(nc) // CONNECT
				if answer != nil {
					nc.Write(encode(answer))
					packets.ReadPacket(nc) // SUBSCRIBE
				}
				close(waiting)
				io.Copy(io.Discard, nc)
			}()
			e, err := NewExternal(ExternalConfig{URL: "tcp://" + l.Addr().String(), Log: testLog(t.Output())})
			if err != nil {
				t.Fatal(err)
			}
			stop := start(t, e, newInbox().handle)
			wait(t, "the broker has its packet", waiting)
			began := time.Now()
			stop()
			if took := time.Since(began); took >= externalTimeout {
				t.Errorf("the end took %v", took)
			}
		})
	}
}

// TestExternalTrustsNoBroker: this one lets everything through.
func TestExternalTrustsNoBroker(t *testing.T) {
	m := newMosquitto(t)
	conf, err := os.ReadFile(filepath.Join(m.Dir, mosquittoConf))
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for line := range strings.Lines(string(conf)) {
		if !strings.HasPrefix(line, "acl_file") && !strings.HasPrefix(line, "message_size_limit") && !strings.HasPrefix(line, "max_packet_size") {
			open = append(open, line)
		}
	}
	m.configure(strings.Join(open, ""))
	m.start()
	e, connected := m.external(nil)
	in := newInbox()
	start(t, e, in.handle)
	wait(t, "connected", connected)
	a := mustDial(t, m.address(), credentials{device: "a"})
	wrongShard := fmt.Sprintf("dunlin/v1/%d/a/up/hello", (link.Shard("a")+1)%link.Shards)
	for _, topic := range []string{wrongShard, "dunlin/v1/x/y/up/z", "dunlin/v1/0//up/hello", link.Up("a", "unknown")} {
		a.publish(topic, "x")
	}
	a.publish(link.Up("a", link.Hello), strings.Repeat("x", link.MaxPayload+1))
	a.publish(link.Up("a", link.Hello), "right")
	in.want(t, link.Up("a", link.Hello), "right")
}

func TestExternalSlowHandler(t *testing.T) {
	m := newMosquitto(t)
	m.start()
	e, connected := m.external(nil)
	const n = 4 * externalQueue
	gate := make(chan struct{})
	in := newInbox()
	stop := start(t, e, func(topic string, payload []byte) {
		<-gate
		in.handle(topic, payload)
	})
	wait(t, "connected", connected)
	a := mustDial(t, m.address(), credentials{device: "a"})
	for i := range n {
		a.publish(link.Up("a", link.Hello), fmt.Sprint(i))
	}
	mustPublish(t, e, link.EpochTopic, "the way down is free")
	close(gate)
	for i := range n {
		in.want(t, link.Up("a", link.Hello), fmt.Sprint(i))
	}
	stop()
}

// TestExternalDisconnect: each device waits once to be disconnected, and not
// too many do; one that cannot be is logged.
func TestExternalDisconnect(t *testing.T) {
	var out syncBuffer
	asked := map[string]int{}
	e, err := NewExternal(ExternalConfig{
		URL: "mqtt://127.0.0.1:1", Log: testLog(&out),
		DeviceTLS: func(device string) (*tls.Config, error) {
			asked[device]++
			return nil, errors.New("none")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, name := range devices(maxCuts) {
			e.Disconnect(name)
		}
	}
	e.Disconnect("one-more")
	stop := start(t, e, newInbox().handle)
	eventually(t, "all have been asked for", func() bool { return strings.Count(out.String(), "error=none") == maxCuts })
	stop()
	if n := strings.Count(out.String(), "too many others wait"); n != 1 || len(asked) != maxCuts || asked["one-more"] != 0 {
		t.Errorf("%d refused, %d asked for", n, len(asked))
	}
	new(External).Disconnect("x") // which does nothing without DeviceTLS
}

func TestNewExternalRefuses(t *testing.T) {
	log := testLog(io.Discard)
	for _, url := range []string{"", "127.0.0.1:1883", "http://127.0.0.1", "mqtts://127.0.0.1", "mqtts://", "mqtt://", "mqtt://:1883", "mqtt://u:p@127.0.0.1",
		"mqtt://127.0.0.1/x", "mqtt://127.0.0.1?x=y", "mqtt://127.0.0.1:port", "tcp://%zz"} {
		_, err := NewExternal(ExternalConfig{URL: url, Log: log})
		if err == nil || strings.Contains(err.Error(), ":p@") {
			t.Errorf("%q: %v", url, err)
		}
	}
	if _, err := NewExternal(ExternalConfig{URL: "mqtt://127.0.0.1"}); err == nil {
		t.Error("no log: no error")
	}
	if _, err := NewExternal(ExternalConfig{URL: "mqtt://127.0.0.1", TLS: serverTLS(), Log: log}); err == nil {
		t.Error("TLS for mqtt: no error")
	}
	if e, err := NewExternal(ExternalConfig{URL: "mqtts://broker", TLS: serverTLS(), Log: log}); err != nil || e.address != "broker:8883" {
		t.Errorf("%v: %v", e, err)
	}
	e, err := NewExternal(ExternalConfig{URL: "mqtt://[::1]", Log: log})
	if err != nil || e.address != "[::1]:1883" || len(e.cfg.ClientID) < 30 {
		t.Errorf("address %q, client id %q: %v", e.address, e.cfg.ClientID, err)
	}
}
