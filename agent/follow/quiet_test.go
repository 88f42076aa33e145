package follow

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	mqtt "github.com/mochi-mqtt/server/v2/packets"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/sim"
	"github.com/dunlin/dunlin/agent/state"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/netem"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// packetBytes is what IPv4 and TCP with time stamps add to each packet; one that
// carries data is acknowledged by one that carries none.
const packetBytes = 52

// metered counts what travels over a connection, packets by the calls.
type metered struct {
	net.Conn
	bytes, packets *atomic.Int64
}

func (m metered) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	m.bytes.Add(int64(n))
	m.packets.Add(1)
	return n, err
}

func (m metered) Write(p []byte) (int, error) {
	m.bytes.Add(int64(len(p)))
	m.packets.Add(1)
	return m.Conn.Write(p)
}

// open lets everybody in.
type open struct{ mochi.HookBase }

func (*open) ID() string { return "open" }
func (*open) Provides(b byte) bool {
	return b == mochi.OnConnectAuthenticate || b == mochi.OnACLCheck
}
func (*open) OnConnectAuthenticate(*mochi.Client, mqtt.Packet) bool { return true }
func (*open) OnACLCheck(*mochi.Client, string, bool) bool           { return true }

// A device with four models that answer requests, and otherwise nothing new,
// has less than 50 KB an hour to say and to hear, with everything that TLS, TCP
// and IP add.
func TestQuietHour(t *testing.T) {
	_, total := quietHour(t, nil)
	if total >= 50_000 {
		t.Errorf("%d bytes in an hour, allowed are 50000", total)
	}
}

// An alarm stays raised for months where it is about something that wears out:
// that is no reason to say the same each minute.
func TestQuietHourWithAnAlarm(t *testing.T) {
	began := time.Date(2026, 11, 1, 12, 0, 0, 123456789, time.UTC)
	worn := &dunlinv1.Alarm{
		Kind: "disk_wear", Subject: "nvme0n1", Severity: dunlinv1.Severity_SEVERITY_WARNING, RaisedAt: timestamppb.New(began),
		Message: "81 % of the disk's rated writes are used up, 0.4 % an hour more: all of them in 48 hours",
		Method:  "theil-sen", Unit: "share", Threshold: new(1.0), SlopePerHour: new(0.004), HoursToThreshold: new(48.0),
	}
	for i := range 64 {
		worn.Samples = append(worn.Samples, &dunlinv1.AlarmSample{At: timestamppb.New(began.Add(time.Duration(i-64) * time.Minute)), Value: 0.8 + float64(i)/1e4})
	}
	payload, _ := quietHour(t, worn)
	if payload >= 50_000 {
		t.Errorf("%d bytes in an hour, allowed are 50000", payload)
	}
}

// quietHour gives the bytes that a device says and hears in an hour in which
// nothing changes, by TCP and with everything below it. An alarm is raised, where
// there is one; nothing but the hour's first sample with it may have what it
// rests on.
func quietHour(t *testing.T, raised *dunlinv1.Alarm) (payload, total int64) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		broker := mochi.New(&mochi.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler)})
		if err := broker.AddHook(new(open), nil); err != nil {
			t.Fatal(err)
		}
		if err := broker.Serve(); err != nil {
			t.Fatal(err)
		}
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		authority, err := pki.NewAuthority(key, time.Now(), 24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		own, err := authority.IssueBroker([]string{"broker"}, key.Public(), time.Now(), 24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		certificate := tls.Certificate{Certificate: pki.Raw(authority.Chain(own)), PrivateKey: key}
		var bytes, packets atomic.Int64
		network := netem.NewLink(netem.Conditions{RTT: 50 * time.Millisecond}, 1)
		roots := pki.Pool([]*x509.Certificate{authority.Certificate})
		l, err := link.New(link.Config{
			BrokerURL: "mqtts://broker:8883", Device: "edge-1", BootID: "boot", Log: slog.New(slog.DiscardHandler),
			TLS:   func() *tls.Config { return &tls.Config{RootCAs: roots, ServerName: "broker"} },
			Hello: func() *dunlinv1.Hello { return &dunlinv1.Hello{} },
			Dial: func(context.Context, string, string) (net.Conn, error) {
				near, far := network.Pipe()
				running.Go(func() {
					_ = broker.EstablishConnection("pipe", tls.Server(far, &tls.Config{Certificates: []tls.Certificate{certificate}}))
				})
				return metered{near, &bytes, &packets}, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		f := quietFollower(t, ctx, &running, raised)
		var samples, swaps, evidence atomic.Int64
		if err := broker.Subscribe(link.UpFilter, 1, func(_ *mochi.Client, _ mqtt.Subscription, p mqtt.Packet) {
			if _, kind, err := link.ParseUp(p.TopicName); err == nil && kind == link.Telemetry {
				samples.Add(1)
				var m dunlinv1.Telemetry
				if err := proto.Unmarshal(p.Payload, &m); err != nil || len(m.Models) != 4 || m.BootId != f.boot {
					t.Errorf("%v, %v", &m, err)
				} else if len(m.Models[0].Activations) > 0 {
					swaps.Add(1)
				}
				for _, a := range m.Alarms {
					if a.Message != raised.Message || !proto.Equal(a.RaisedAt, raised.RaisedAt) {
						t.Errorf("alarm %v", a)
					}
					if len(a.Samples) > 0 {
						evidence.Add(1)
					}
				}
				if raised != nil && len(m.Alarms) != 1 {
					t.Errorf("%d alarms", len(m.Alarms))
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		running.Go(func() { _ = newSession(l, f).run(ctx) })
		epoch := func() {
			raw, err := proto.Marshal(&dunlinv1.Epoch{Incarnation: "8f14e45fceea167a5a36dedd4bea2543"})
			if err != nil {
				t.Fatal(err)
			}
			if err := broker.Publish(link.EpochTopic, raw, false, 0); err != nil {
				t.Error(err)
			}
		}
		for range 10 {
			time.Sleep(time.Minute)
			epoch()
		}
		synctest.Wait()
		if n := evidence.Load(); raised != nil && n != 1 {
			t.Errorf("%d samples of ten minutes have what the alarm rests on, want the first", n)
		}
		bytes.Store(0)
		packets.Store(0)
		samples.Store(0)
		swaps.Store(0)
		for range 60 {
			time.Sleep(time.Minute)
			epoch()
		}
		synctest.Wait()
		if n := samples.Load(); n < 59 || n > 61 {
			t.Errorf("%d samples in an hour", n)
		}
		if n := swaps.Load(); n != 6 {
			t.Errorf("%d samples have the counts of swaps, want each tenth", n)
		}
		if n := evidence.Load(); raised != nil && n != 2 {
			t.Errorf("%d samples have what the alarm rests on, want one an hour", n)
		}
		payload, total = bytes.Load(), bytes.Load()+2*packetBytes*packets.Load()
		t.Logf("%d bytes in an hour, %d with headers and acknowledgements", payload, total)
		cancel()
		if err := broker.Close(); err != nil {
			t.Error(err)
		}
		running.Wait()
	})
	return payload, total
}

// quietFollower is one whose device has four models, of which one is asked each
// second.
func quietFollower(t *testing.T, ctx context.Context, running *sync.WaitGroup, raised *dunlinv1.Alarm) *Follower {
	set, err := profiles.Load()
	if err != nil {
		t.Fatal(err)
	}
	profile, err := set.Named("jetson-orin-nano-8gb")
	if err != nil {
		t.Fatal(err)
	}
	device, err := sim.New(sim.Config{Profile: profile, Seed: 1, Jitter: sim.DefaultJitter, Describe: func(engine.Spec) (sim.Model, error) {
		return sim.Model{
			Inputs:      []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 4}}},
			Outputs:     []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{-1, 10}}},
			WeightBytes: 20 << 20, Batch: true,
		}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { device.Close() })
	e := engine.New(engine.Config{Runtime: device, Memory: 50 << 20}) // weights come and go
	running.Go(func() { _ = e.Run(ctx) })
	var ids []engine.VersionID
	for n := range 4 {
		id := engine.VersionID{Model: fmt.Sprintf("detector-%d", n), Version: 12}
		if _, err := e.Load(ctx, engine.Spec{ID: id}); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	running.Go(func() {
		for n := 0; ; n++ {
			r, err := e.Infer(ctx, ids[n%4], engine.Request{Inputs: []tensor.Tensor{{Name: "x", Type: tensor.Float32, Shape: []int64{1, 4}, Data: make([]byte, 16)}}})
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			r.Release()
			if !sleep(ctx, time.Second) {
				return
			}
		}
	})
	store, err := state.NewMemory(state.Limits{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := &Follower{
		store: store, boot: "MTO6IJIZFRECDTNCK6X7XI46H3", figures: newFigures(0), outbox: make(chan struct{}, 1),
		cfg: Config{Versions: e.Versions, Log: slog.New(slog.DiscardHandler), Sample: func(context.Context) *dunlinv1.Telemetry {
			s := device.Sample()
			s.At = timestamppb.Now()
			if raised != nil {
				s.Alarms = []*dunlinv1.Alarm{proto.CloneOf(raised)}
			}
			return s
		}},
	}
	if f.Reconcile, err = reconcile.New(reconcile.Config{Dir: t.TempDir(), State: store, Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	return f
}
