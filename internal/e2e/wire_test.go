package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	mqtt "github.com/eclipse/paho.mqtt.golang"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// joinByHand makes a device known that is no agent, and gives how it connects.
func joinByHand(t *testing.T, f *Fleet, name string) *tls.Config {
	t.Helper()
	token, err := f.JoinToken(within(t))
	if err != nil {
		t.Fatal(err)
	}
	key, csr := pkitest.Request(t, name)
	answer, err := dunlinv1connect.NewEnrollmentServiceClient(http.DefaultClient, f.URL).Join(within(t),
		connect.NewRequest(&dunlinv1.JoinRequest{JoinToken: token, Name: name, Csr: csr}))
	if err != nil {
		t.Fatal(err)
	}
	secure, err := pkitest.Joined{Key: key, Identity: answer.Msg.GetIdentity()}.TLS("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return secure
}

func dial(t *testing.T, f *Fleet, id string, secure *tls.Config) (mqtt.Client, error) {
	t.Helper()
	o := mqtt.NewClientOptions().AddBroker("ssl://" + f.MQTT).SetClientID(id).SetTLSConfig(secure).
		SetProtocolVersion(4).SetAutoReconnect(false).SetConnectRetry(false).SetConnectTimeout(limit)
	c := mqtt.NewClient(o)
	token := c.Connect()
	token.Wait()
	if token.Error() == nil {
		t.Cleanup(func() { c.Disconnect(0) })
	}
	return c, token.Error()
}

func send(t *testing.T, c mqtt.Client, topic string, payload []byte) {
	t.Helper()
	token := c.Publish(topic, 0, false, payload)
	token.Wait()
	if err := token.Error(); err != nil {
		t.Fatal(err)
	}
}

func eventBatch(t *testing.T, sequence uint64, kind string) []byte {
	t.Helper()
	b, err := proto.Marshal(&dunlinv1.EventBatch{OutboxId: "by-hand", Events: []*dunlinv1.Event{{Sequence: sequence, Kind: kind, Severity: dunlinv1.Severity_SEVERITY_INFO}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// storedEvent is what `dunlin get events -o json` says of one, as far as these tests read it.
type storedEvent struct {
	Device   string `json:"device"`
	OutboxID string `json:"outboxId"`
	Event    struct {
		Sequence string `json:"sequence"`
		Kind     string `json:"kind"`
	} `json:"event"`
}

func events(t *testing.T, f *Fleet) []storedEvent {
	t.Helper()
	var all struct {
		Events []storedEvent `json:"events"`
	}
	decode(t, cli(t, f, "get", "events", "--limit", "10000", "-o", "json"), &all)
	return all.Events
}

// TestStrangersAreRefused tries every way in that is not a device's own.
func TestStrangersAreRefused(t *testing.T) {
	onEachBroker(t, func(t *testing.T, f *Fleet) {
		a := startAgent(t, f, "device-1")
		eventually(t, func() string {
			if d := devices(t, f); len(d) != 1 || !d[0].Connected {
				return fmt.Sprintf("device-1 is not connected: %+v", d)
			}
			return ""
		})
		own := joinByHand(t, f, "mallory")
		mallory, err := dial(t, f, "mallory", own)
		if err != nil {
			t.Fatal(err)
		}
		ca := authority(t, f)
		foreign := pkitest.Authority(t)
		for name, secure := range map[string]*tls.Config{
			"no certificate":                  pkitest.ClientTLS(ca, nil),
			"another authority's certificate": pkitest.ClientTLS(ca, pkitest.Device(t, foreign, "device-1")),
		} {
			if _, err := dial(t, f, "device-1", secure); err == nil {
				t.Errorf("connected with %s", name)
			}
		}
		// Of another device's client id a broker may make the right one.
		if c, err := dial(t, f, "device-1", own); err == nil {
			c.Disconnect(100)
			if d := devices(t, f); len(d) != 2 || !d[0].Connected {
				t.Errorf("device-1 was pushed out: %+v", d)
			}
			if mallory, err = dial(t, f, "mallory", own); err != nil {
				t.Fatal(err)
			}
		}

		// A broker may grant a subscription that its rules forbid; nothing comes then.
		mallory.Subscribe(link.Down("device-1", "+"), 0, func(_ mqtt.Client, m mqtt.Message) {
			t.Errorf("another device's message arrived on %s", m.Topic())
		}).Wait()
		cli(t, f, "push", digitsFile("v1"), "digits:1")
		apply(t, f, "digits", 1) // a desired document for both
		eventually(t, func() string { return serves(t, a, 1) })
		forged := eventBatch(t, 1, "forged")
		for _, topic := range []string{link.Up("device-1", link.Events), link.Down("device-1", link.Command), link.EpochTopic,
			"dunlin/v1/0/mallory/up/events", "dunlin/v1/" + strconv.Itoa(int(link.Shard("device-1"))) + "/mallory/up/events"} {
			c, err := dial(t, f, "mallory", own)
			if err != nil {
				t.Fatal(err)
			}
			c.Publish(topic, 0, false, forged).Wait()
			c.Disconnect(100)
		}
		c, err := dial(t, f, "mallory", own)
		if err != nil {
			t.Fatal(err)
		}
		send(t, c, link.Up("mallory", link.Events), eventBatch(t, 1, "own"))
		eventually(t, func() string {
			for _, e := range events(t, f) {
				if e.Device == "mallory" && e.Event.Kind == "own" {
					return ""
				}
			}
			return "the device's own event has not arrived"
		})
		for _, e := range events(t, f) {
			if e.Event.Kind == "forged" {
				t.Errorf("a forged event is in the store: %+v", e)
			}
		}
	})
}

// TestMalformedPayloads sends noise on every topic that a device may publish on.
func TestMalformedPayloads(t *testing.T) {
	seed := mathrand.Uint64()
	t.Logf("seed %d", seed)
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	onEachBroker(t, func(t *testing.T, f *Fleet) {
		a := startAgent(t, f, "device-1")
		c, err := dial(t, f, "noisy", joinByHand(t, f, "noisy"))
		if err != nil {
			t.Fatal(err)
		}
		const each = 100
		kinds := []string{link.Hello, link.Reported, link.Events, link.Telemetry, link.Request, link.Fetch, link.Gone}
		for range each {
			for _, kind := range kinds {
				noise := make([]byte, 1+random.IntN(300))
				for i := range noise {
					noise[i] = byte(random.Uint32())
				}
				noise[0] = 0x07 // field 0, wire type 7: no protobuf message begins so
				send(t, c, link.Up("noisy", kind), noise)
			}
		}
		want := fmt.Sprint(each)
		for _, kind := range kinds {
			eventually(t, func() string {
				if got := metric(t, f.URL, `dunlin_controller_malformed_total{kind="`+kind+`"}`); got != want {
					return fmt.Sprintf("%s malformed payloads of kind %s are counted, want %s", got, kind, want)
				}
				return ""
			})
		}
		cli(t, f, "push", digitsFile("v1"), "digits:1")
		apply(t, f, "digits", 1)
		eventually(t, func() string { return serves(t, a, 1) })
	})
}

// metric gives the value of a series that an address exports, "" where it has none.
func metric(t *testing.T, url, series string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t), http.MethodGet, url+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), series+" "); ok {
			return v
		}
	}
	return ""
}

// TestEventsArriveExactlyOnce takes the controller away ten times, with its
// broker where that is embedded, and each time lets ten events happen: the
// worker is killed. The device answers all the while.
func TestEventsArriveExactlyOnce(t *testing.T) {
	onEachBroker(t, eventsArriveExactlyOnce)
}

func eventsArriveExactlyOnce(t *testing.T, f *Fleet) {
	a := startAgent(t, f, "device-1")
	cli(t, f, "push", digitsFile("v1"), "digits:1")
	apply(t, f, "digits", 1)
	cli(t, f, "rollout", "status", "digits", "--wait")
	load := startLoad(t, a.URL, "digits-route")
	const outages, each = 10, 10
	for range outages {
		f.Controller.Kill()
		for range each {
			killWorker(t, a)
			eventually(t, func() string { return serves(t, a, 1) })
		}
		if err := f.StartController(within(t)); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() string {
			if d := devices(t, f); len(d) != 1 || !d[0].Connected {
				return fmt.Sprintf("the device is not back: %+v", d)
			}
			return ""
		})
	}
	load.stop()
	eventually(t, func() string {
		if n := len(deaths(t, f)); n < outages*each {
			return fmt.Sprintf("%d events of %d have arrived", n, outages*each)
		}
		return ""
	})
	seen := map[string]int{}
	all := deaths(t, f)
	for _, e := range all {
		seen[e.OutboxID+"/"+e.Event.Sequence]++
	}
	if len(all) != outages*each || len(seen) != outages*each {
		t.Errorf("%d events with %d sequence numbers are in the store, want %d", len(all), len(seen), outages*each)
	}
	t.Logf("%d requests succeeded meanwhile", load.count())
}

func deaths(t *testing.T, f *Fleet) []storedEvent {
	t.Helper()
	var all []storedEvent
	for _, e := range events(t, f) {
		if e.Event.Kind == "worker.died" {
			all = append(all, e)
		}
	}
	return all
}

// killWorker kills the process that holds the runtime of an agent.
func killWorker(t *testing.T, a *Agent) {
	t.Helper()
	var killed int
	eventually(t, func() string {
		children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", a.PID()))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range children {
			b, err := os.ReadFile(path)
			if err != nil {
				continue // the thread has ended
			}
			for pid := range strings.FieldsSeq(string(b)) {
				command, _ := os.ReadFile("/proc/" + pid + "/cmdline")
				if strings.Contains(string(command), "\x00worker") {
					if killed, err = strconv.Atoi(pid); err != nil {
						t.Fatal(err)
					}
					if err := syscall.Kill(killed, syscall.SIGKILL); err == nil {
						return ""
					}
				}
			}
		}
		return "the agent has no worker"
	})
	eventually(t, func() string { // its parent has seen it end
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", killed)); err == nil {
			return "the worker is still there"
		}
		return ""
	})
}
