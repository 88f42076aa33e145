package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// testBroker is one implementation of Bus, running, as the contract test sees it.
type testBroker struct {
	bus     Bus
	address string // where devices connect
	enrol   string // where those without a certificate do
	inbox   inbox  // what the handler got
	remove  func(device string)
}

// TestContract holds both implementations to the same contract.
func TestContract(t *testing.T) {
	t.Run("embedded", func(t *testing.T) { testContract(t, startEmbedded) })
	t.Run("mosquitto", func(t *testing.T) { testContract(t, startMosquittoBus) })
}

func startEmbedded(t *testing.T, names ...string) *testBroker {
	a := newAccounts(names...)
	e, err := NewEmbedded(EmbeddedConfig{Listen: "127.0.0.1:0", TLS: serverTLS(), Auth: a, Log: testLog(t.Output())})
	if err != nil {
		t.Fatal(err)
	}
	in := newInbox()
	start(t, e, in.handle)
	return &testBroker{bus: e, address: e.Addr().String(), enrol: e.Addr().String(), inbox: in, remove: a.remove}
}

func startMosquittoBus(t *testing.T, _ ...string) *testBroker {
	m := newMosquitto(t)
	_, id, _ := strings.Cut(joinUser, ".")
	m.files.JoinTokens[id] = must(HashPassword(passwordOf(joinUser)))
	if err := m.Setup(m.port, m.enrol, m.files); err != nil {
		t.Fatal(err)
	}
	m.runnable()
	m.start()
	e, connected := m.external(nil)
	in := newInbox()
	start(t, e, in.handle)
	wait(t, "External has connected", connected)
	return &testBroker{bus: e, address: m.address(), enrol: "127.0.0.1:" + strconv.Itoa(m.enrol), inbox: in, remove: func(device string) {
		m.revoke(device)
		m.write()
	}}
}

// mosquitto is a Mosquitto process with files of its own.
type mosquitto struct {
	Mosquitto
	t           *testing.T
	port, enrol int
	files       MosquittoFiles
	revoked     []x509.RevocationListEntry
	process     *exec.Cmd
}

func newMosquitto(t *testing.T) *mosquitto {
	t.Helper()
	m := &mosquitto{Mosquitto: Mosquitto{Dir: t.TempDir()}, t: t, port: freePort(t), enrol: freePort(t)}
	m.files = MosquittoFiles{
		Roots: []*x509.Certificate{trusted().Certificate}, Certificate: certificateOf(ControllerUser), JoinTokens: map[string]string{},
	}
	m.list(trusted(), 1)
	if err := m.Setup(m.port, m.enrol, m.files); err != nil {
		t.Fatal(err)
	}
	m.runnable()
	t.Cleanup(m.stop)
	return m
}

// runnable lets root start it, which could not read its files otherwise.
func (m *mosquitto) runnable() {
	if os.Getuid() == 0 {
		m.configure(m.Config(m.port, m.enrol) + "user root\n")
	}
}

func (m *mosquitto) configure(text string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.Dir, mosquittoConf), []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// list makes an authority's list of all certificates revoked so far.
func (m *mosquitto) list(a *pki.Authority, number int64) {
	m.files.CRLs = [][]byte{must(a.Revoke(m.revoked, number, time.Now(), time.Hour))}
}

// revoke revokes a device and its certificate.
func (m *mosquitto) revoke(device string) {
	m.revoked = append(m.revoked, x509.RevocationListEntry{SerialNumber: certificateOf(device).Leaf.SerialNumber, RevocationTime: time.Now()})
	m.list(trusted(), int64(1+len(m.revoked)))
	m.files.Revoked = append(m.files.Revoked, device)
}

func (m *mosquitto) write() {
	m.t.Helper()
	if err := m.Write(m.files); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mosquitto) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(m.port)) }

func (m *mosquitto) start() {
	m.t.Helper()
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		path = "/usr/sbin/mosquitto"
	}
	if _, err := os.Stat(path); err != nil {
		m.t.Fatal("no mosquitto: run make test, which installs it")
	}
	m.process = exec.Command(path, "-c", filepath.Join(m.Dir, mosquittoConf))
	m.process.Stdout, m.process.Stderr = m.t.Output(), m.t.Output()
	m.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.process.Start(); err != nil {
		m.t.Fatal(err)
	}
	eventually(m.t, "mosquitto listens", func() bool {
		c, err := net.Dial("tcp", m.address())
		if err == nil {
			c.Close()
		}
		_, noPID := os.Stat(filepath.Join(m.Dir, mosquittoPID))
		return err == nil && noPID == nil
	})
}

func (m *mosquitto) stop() {
	if m.process != nil {
		m.process.Process.Kill()
		m.process.Wait()
		m.process = nil
	}
}

// external makes an External for this Mosquitto that tells of its connections.
func (m *mosquitto) external(change func(*ExternalConfig)) (*External, chan struct{}) {
	m.t.Helper()
	connected := make(chan struct{}, 100)
	cfg := ExternalConfig{
		URL: "mqtts://" + m.address(), TLS: clientTLS(certificateOf(ControllerUser)),
		DeviceTLS: func(device string) (*tls.Config, error) {
			return clientTLS(issue(trusted(), certified.key, device)), nil
		},
		Log: testLog(m.t.Output()), OnConnect: func() { connected <- struct{}{} },
	}
	if change != nil {
		change(&cfg)
	}
	e, err := NewExternal(cfg)
	if err != nil {
		m.t.Fatal(err)
	}
	e.backoff = 20 * time.Millisecond
	return e, connected
}

func testContract(t *testing.T, start func(t *testing.T, names ...string) *testBroker) {
	t.Run("a device sends and receives", func(t *testing.T) {
		b := start(t, "a", "b")
		a := mustDial(t, b.address, credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"), link.EpochTopic)
		other := mustDial(t, b.address, credentials{device: "b"})
		other.mustSubscribe(link.Down("b", link.Desired), link.Down("b", link.Command), link.Down("b", link.Block), link.Down("b", link.Data))

		for _, kind := range []string{link.Hello, link.Reported, link.Events, link.Telemetry, link.Request, link.Fetch, link.Gone} {
			a.publish(link.Up("a", kind), "this is "+kind)
			b.inbox.want(t, link.Up("a", kind), "this is "+kind)
		}
		for _, kind := range []string{link.Desired, link.Command, link.Block, link.Data} {
			for name, c := range map[string]*client{"a": a, "b": other} {
				mustPublish(t, b.bus, link.Down(name, kind), kind+" for "+name)
				c.inbox.want(t, link.Down(name, kind), kind+" for "+name)
			}
		}
		mustPublish(t, b.bus, link.EpochTopic, "epoch")
		a.inbox.want(t, link.EpochTopic, "epoch")
	})

	t.Run("wrong credentials are refused", func(t *testing.T) {
		b := start(t, "a", "b")
		for name, cr := range map[string]credentials{
			"no certificate":              {device: "a", anonymous: true},
			"no certificate, a user name": {device: "a", anonymous: true, user: "a", password: "x"},
			"another authority's":         {device: "a", certificate: issue(newAuthority(), certified.key, "a")},
			"expired":                     {device: "a", certificate: expired("a")},
		} {
			if _, err := dial(t, b.address, cr); err == nil {
				t.Errorf("%s: connected", name)
			}
		}
	})

	t.Run("another device's client id does no harm", func(t *testing.T) {
		b := start(t, "a", "b")
		a := mustDial(t, b.address, credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"))
		if thief, err := dial(t, b.address, credentials{device: "b", clientID: "a"}); err == nil {
			thief.publish(link.Up("a", link.Hello), "forged")
			thief.subscribe(link.Down("a", "+"))
		}
		mustPublish(t, b.bus, link.Down("a", link.Desired), "still here")
		a.inbox.want(t, link.Down("a", link.Desired), "still here")
		a.publish(link.Up("a", link.Hello), "still here")
		b.inbox.want(t, link.Up("a", link.Hello), "still here")
	})

	t.Run("publications outside the subtree reach nobody", func(t *testing.T) {
		b := start(t, "a", "b")
		a := mustDial(t, b.address, credentials{device: "a"})
		other := mustDial(t, b.address, credentials{device: "b"})
		other.mustSubscribe(link.Down("b", "+"), link.EpochTopic)
		wrongShard := fmt.Sprintf("dunlin/v1/%d/a/up/hello", (link.Shard("a")+1)%link.Shards)
		for _, topic := range []string{
			link.Up("b", link.Hello), link.Up("b", link.Gone), link.Down("b", link.Desired), link.Down("a", link.Desired),
			link.EpochTopic, wrongShard, link.Up("a", "unknown"), link.Up("a", link.Hello) + "/x", "dunlin/v1/a/up/hello",
			"x", "/", "$SYS/broker/uptime", "$share/g/" + link.Up("a", link.Hello),
		} {
			a.publish(topic, "outside")
		}
		a.publish(link.Up("a", link.Hello), "inside")
		b.inbox.want(t, link.Up("a", link.Hello), "inside")
		mustPublish(t, b.bus, link.Down("b", link.Desired), "real")
		other.inbox.want(t, link.Down("b", link.Desired), "real")
	})

	t.Run("subscriptions outside the subtree bring nothing", func(t *testing.T) {
		b := start(t, "a", "b")
		a := mustDial(t, b.address, credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"))
		spy := mustDial(t, b.address, credentials{device: "b"})
		spy.subscribe("#", "+/+/+/+/+/+", "dunlin/#", link.UpFilter, "dunlin/v1/+/+/down/+", link.Down("a", "+"),
			link.Down("a", link.Desired), link.Up("a", "+"), link.Up("b", link.Hello), "$share/g/"+link.Down("a", "+"), "$SYS/#")
		spy.mustSubscribe(link.Down("b", "+"))

		mustPublish(t, b.bus, link.Down("a", link.Desired), "for a")
		a.inbox.want(t, link.Down("a", link.Desired), "for a")
		a.publish(link.Up("a", link.Hello), "from a")
		b.inbox.want(t, link.Up("a", link.Hello), "from a")
		mustPublish(t, b.bus, link.Down("b", link.Desired), "for b")
		spy.inbox.want(t, link.Down("b", link.Desired), "for b")
	})

	t.Run("a will arrives when a device vanishes", func(t *testing.T) {
		b := start(t, "a")
		a := mustDial(t, b.address, credentials{device: "a", willTopic: link.Up("a", link.Gone), will: "gone 1"})
		a.publish(link.Up("a", link.Hello), "1")
		b.inbox.want(t, link.Up("a", link.Hello), "1")
		a.vanish()
		b.inbox.want(t, link.Up("a", link.Gone), "gone 1")
	})

	t.Run("no will after a goodbye", func(t *testing.T) {
		b := start(t, "a")
		nc, err := tls.Dial("tcp", b.address, clientTLS(certificateOf("a")))
		if err != nil {
			t.Fatal(err)
		}
		raw := newRawClient(t, nc)
		raw.mustConnect(connectPacket("a", withWill(link.Up("a", link.Gone), "gone 1")))
		raw.send(publishPacket(link.Up("a", link.Hello), "1", 0), packets.NewControlPacket(packets.Disconnect))
		raw.wantClosed() // the broker has read it all
		a := mustDial(t, b.address, credentials{device: "a"})
		a.publish(link.Up("a", link.Hello), "2")
		b.inbox.want(t, link.Up("a", link.Hello), "1")
		b.inbox.want(t, link.Up("a", link.Hello), "2")
	})

	t.Run("a will elsewhere reaches nobody", func(t *testing.T) {
		b := start(t, "a", "b")
		other := mustDial(t, b.address, credentials{device: "b"})
		other.mustSubscribe(link.Down("b", "+"))
		for _, topic := range []string{link.Up("b", link.Gone), link.Down("b", link.Desired), "dunlin/v1/0/a/up/gone"} {
			if a, err := dial(t, b.address, credentials{device: "a", willTopic: topic, will: "forged"}); err == nil {
				a.subscribe(link.Down("a", "+")) // the session stands
				a.vanish()
			}
		}
		a := mustDial(t, b.address, credentials{device: "a"})
		a.publish(link.Up("a", link.Hello), "real")
		b.inbox.want(t, link.Up("a", link.Hello), "real")
		mustPublish(t, b.bus, link.Down("b", link.Desired), "real")
		other.inbox.want(t, link.Down("b", link.Desired), "real")
	})

	t.Run("the newer connection of a device stays", func(t *testing.T) {
		b := start(t, "a")
		will := credentials{device: "a", willTopic: link.Up("a", link.Gone), will: "gone"}
		old := mustDial(t, b.address, will)
		old.mustSubscribe(link.Down("a", "+"))
		for range 10 {
			next := mustDial(t, b.address, will)
			next.mustSubscribe(link.Down("a", "+"))
			old.wantCut()
			b.inbox.want(t, link.Up("a", link.Gone), "gone")
			mustPublish(t, b.bus, link.Down("a", link.Desired), "for the newer")
			next.inbox.want(t, link.Down("a", link.Desired), "for the newer")
			next.publish(link.Up("a", link.Hello), "from the newer")
			b.inbox.want(t, link.Up("a", link.Hello), "from the newer")
			old = next
		}
	})

	t.Run("a session ends with its connection", func(t *testing.T) {
		b := start(t, "a")
		a := mustDial(t, b.address, credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"))
		a.paho.Disconnect(uint(patience / time.Millisecond))
		a = mustDial(t, b.address, credentials{device: "a"})
		mustPublish(t, b.bus, link.Down("a", link.Desired), "missed")
		a.mustSubscribe(link.Down("a", link.Command))
		mustPublish(t, b.bus, link.Down("a", link.Desired), "missed too")
		mustPublish(t, b.bus, link.Down("a", link.Command), "taken")
		a.inbox.want(t, link.Down("a", link.Command), "taken")
	})

	t.Run("a revoked device is cut off", func(t *testing.T) {
		b := start(t, "a", "b")
		a := mustDial(t, b.address, credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"))
		other := mustDial(t, b.address, credentials{device: "b"})
		b.remove("a")
		b.bus.Disconnect("a")
		b.bus.Disconnect("nobody")
		eventually(t, "the revoked device is refused", func() bool {
			_, err := dial(t, b.address, credentials{device: "a"})
			return err != nil
		})
		a.wantCut()
		other.publish(link.Up("b", link.Hello), "unharmed")
		b.inbox.want(t, link.Up("b", link.Hello), "unharmed")
	})

	t.Run("a device without a certificate enrols", func(t *testing.T) {
		b := start(t, "a")
		enrol := func(user, password string) (*dunlinv1.EnrolResponse, error) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			return link.Enrol(ctx, link.Enrolment{
				BrokerURL: "mqtts://" + b.enrol, User: user, Password: password, TLS: func() *tls.Config { return clientTLS(nil) },
			}, &dunlinv1.EnrolRequest{})
		}
		if _, err := enrol(joinUser, "another"); !errors.Is(err, link.ErrStranger) {
			t.Errorf("a wrong token: %v", err)
		}
		for _, user := range []string{joinUser, link.RenewUser} {
			var asked sync.WaitGroup
			asked.Go(func() {
				select {
				case m := <-b.inbox:
					of, nonce, err := link.ParseJoinUp(m.topic)
					if err == nil {
						err = b.bus.Publish(link.JoinDown(of, nonce), nil)
					}
					if err != nil || of != user {
						t.Errorf("%s asked on %s: %v", user, m.topic, err)
					}
				case <-time.After(patience):
				}
			})
			if _, err := enrol(user, passwordOf(user)); err != nil {
				t.Error(err)
			}
			asked.Wait()
		}
	})

	t.Run("the largest payload passes and a larger one does not", func(t *testing.T) {
		b := start(t, "a")
		largest := strings.Repeat("x", link.MaxPayload)
		a := mustDial(t, b.address, credentials{device: "a"})
		a.mustSubscribe(link.Down("a", "+"))
		a.publish(link.Up("a", link.Telemetry), largest)
		b.inbox.want(t, link.Up("a", link.Telemetry), largest)
		mustPublish(t, b.bus, link.Down("a", link.Desired), largest)
		a.inbox.want(t, link.Down("a", link.Desired), largest)

		if err := b.bus.Publish(link.Down("a", link.Desired), []byte(largest+"x")); err == nil {
			t.Error("the controller sent too large a payload")
		}
		for _, size := range []int{link.MaxPayload + 1, link.MaxPayload + 1024, 2 << 20} {
			c := mustDial(t, b.address, credentials{device: "a"})
			c.paho.Publish(link.Up("a", link.Telemetry), 0, false, strings.Repeat("y", size)).WaitTimeout(patience)
		}
		c := mustDial(t, b.address, credentials{device: "a"})
		c.publish(link.Up("a", link.Hello), "alive")
		b.inbox.want(t, link.Up("a", link.Hello), "alive")
	})

	t.Run("the controller sends on down topics only", func(t *testing.T) {
		b := start(t, "a")
		for _, topic := range []string{"", "x", link.Up("a", link.Hello), link.Down("a", "+"), link.Down("a", "unknown"), "dunlin/v1/0/a/down/#"} {
			if err := b.bus.Publish(topic, nil); err == nil || errors.Is(err, ErrNotConnected) {
				t.Errorf("publish on %q: %v", topic, err)
			}
		}
	})

	t.Run("many devices at once, each in order", func(t *testing.T) {
		const messages = 50
		names := devices(20)
		b := start(t, names...)
		var clients []*client
		for _, n := range names {
			c := mustDial(t, b.address, credentials{device: n})
			c.mustSubscribe(link.Down(n, "+"))
			clients = append(clients, c)
		}
		var all sync.WaitGroup
		for i, c := range clients {
			all.Go(func() {
				for k := range messages {
					token := c.paho.Publish(link.Up(names[i], link.Telemetry), 0, false, strconv.Itoa(k))
					if token.WaitTimeout(patience); token.Error() != nil {
						t.Errorf("publish: %v", token.Error())
					}
				}
			})
			all.Go(func() {
				for k := range messages {
					if err := b.bus.Publish(link.Down(names[i], link.Desired), []byte(strconv.Itoa(k))); err != nil {
						t.Errorf("publish: %v", err)
					}
				}
			})
		}
		all.Wait()
		next := map[string]int{}
		for range messages * len(names) {
			select {
			case m := <-b.inbox:
				if want := strconv.Itoa(next[m.topic]); string(m.payload) != want {
					t.Fatalf("%s: got %s, want %s", m.topic, m.payload, want)
				}
				next[m.topic]++
			case <-time.After(patience):
				t.Fatalf("messages are missing: %v", next)
			}
		}
		for i, c := range clients {
			for k := range messages {
				c.inbox.want(t, link.Down(names[i], link.Desired), strconv.Itoa(k))
			}
		}
	})
}

func mustPublish(t testing.TB, bus Bus, topic, payload string) {
	t.Helper()
	if err := bus.Publish(topic, []byte(payload)); err != nil {
		t.Fatalf("publish on %s: %v", topic, err)
	}
}
