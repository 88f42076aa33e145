package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/console"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// everybody lets everybody in.
type everybody struct{ mochi.HookBase }

// Provides implements mochi.Hook.
func (*everybody) Provides(b byte) bool {
	return b == mochi.OnConnectAuthenticate || b == mochi.OnACLCheck
}

// OnConnectAuthenticate implements mochi.Hook.
func (*everybody) OnConnectAuthenticate(*mochi.Client, packets.Packet) bool { return true }

// OnACLCheck implements mochi.Hook.
func (*everybody) OnACLCheck(*mochi.Client, string, bool) bool { return true }

// device is a simulated one: it says hello, reports and sends telemetry, and
// observes what it should have.
type device struct {
	name     string
	mu       sync.Mutex // guards what follows
	sequence uint64
	observed *v1.Generation
	probe    int64 // version of the model by which changes are found again
}

// world is a controller that is a process, and a broker in this one that its
// devices are at: what they say goes by MQTT, without TLS and one connection.
type world struct {
	size
	controller *e2e.Process
	broker     *mochi.Server
	url        string
	devices    []*device
	byDesired  map[string]*device // by topic
	cookies    []*http.Cookie     // of sessions
	stopLoad   context.CancelFunc
	loads      sync.WaitGroup
	sent       atomic.Int64
}

const (
	perUser  = 12 // viewers
	patience = 30 * time.Second
)

func begin(ctx context.Context, s size, program, dir string) (w *world, err error) {
	w = &world{size: s, byDesired: map[string]*device{}, stopLoad: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.stop())
		}
	}()
	data := filepath.Join(dir, "controller")
	if err := os.Mkdir(data, 0o700); err != nil {
		return w, err
	}
	fmt.Fprintln(os.Stderr, "filling the store")
	if err := fill(ctx, s, filepath.Join(data, "controller.db")); err != nil {
		return w, err
	}
	capabilities := mochi.NewDefaultServerCapabilities()
	capabilities.MaximumClientWritesPending = 1 << 16
	w.broker = mochi.New(&mochi.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler), Capabilities: capabilities, SysTopicResendInterval: math.MaxInt32})
	listener := listeners.NewTCP(listeners.Config{ID: "tcp", Address: "127.0.0.1:0"})
	for _, err := range []error{w.broker.AddHook(new(everybody), nil), w.broker.AddListener(listener), w.broker.Serve()} {
		if err != nil {
			return w, err
		}
	}
	for i := range s.devices {
		d := &device{name: name(i)}
		w.devices = append(w.devices, d)
		w.byDesired[link.Down(d.name, link.Desired)] = d
	}
	if err := w.broker.Subscribe("dunlin/v1/#", 1, w.down); err != nil {
		return w, err
	}
	address, err := e2e.FreeAddress()
	if err != nil {
		return w, err
	}
	w.url = "http://" + address
	w.controller, err = e2e.Start("controller", filepath.Join(dir, "controller.log"), []string{"GOMAXPROCS=2"}, program,
		"--data", data, "--listen", address, "--broker-url", "mqtt://"+listener.Address())
	if err != nil {
		return w, err
	}
	if err := w.controller.Wait(ctx, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, "GET", w.url+"/healthz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}); err != nil {
		return w, fmt.Errorf("%w: %s", err, w.controller.LogTail(5))
	}
	token, err := os.ReadFile(filepath.Join(data, "admin-token"))
	if err != nil {
		return w, err
	}
	if err := w.signIn(ctx, strings.TrimSpace(string(token))); err != nil {
		return w, err
	}
	load, stop := context.WithCancel(context.Background())
	w.stopLoad = stop
	return w, w.connect(load)
}

func (w *world) stop() (err error) {
	w.stopLoad()
	w.loads.Wait()
	if w.controller != nil {
		err = w.controller.Stop()
	}
	if w.broker != nil {
		err = errors.Join(err, w.broker.Close())
	}
	return err
}

func name(i int) string { return fmt.Sprintf("cam-%05d", i) }

// fill puts devices and models into a store.
func fill(ctx context.Context, s size, file string) (err error) {
	st, err := store.Open(ctx, file, store.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	issuer, err := pki.NewAuthority(key, time.Now(), 24*time.Hour)
	if err != nil {
		return err
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader) // they all have one: nobody connects by it
	if err != nil {
		return err
	}
	for i := range s.devices {
		_, hash := identity.NewToken("")
		if _, err := st.CreateJoinToken(ctx, "user:bench", hash, store.JoinToken{
			UsesLeft: 1, ExpiresAt: time.Now().Add(time.Hour), Labels: map[string]string{"site": fmt.Sprint("site-", i%40), "line": fmt.Sprint(i % 100), "fleet": "bench"},
		}); err != nil {
			return err
		}
		if _, err := st.Join(ctx, store.Join{Token: hash, Device: name(i), Key: fmt.Sprint(i), Issue: func() (*x509.Certificate, error) {
			return issuer.IssueDevice(name(i), own.Public(), time.Now(), 24*time.Hour)
		}}); err != nil {
			return err
		}
	}
	for i := range s.models {
		for v := range int64(3) {
			sum := sha256.Sum256(fmt.Append(nil, i, v))
			if _, _, err := st.CreateVersion(ctx, store.Version{
				Model: fmt.Sprintf("model-%03d", i), Version: v + 1, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: 4 << 20,
				Inputs: []string{"image:FP32[-1,3,224,224]"}, Outputs: []string{"probabilities:FP32[-1,1000]"}, Opset: 17, CreatedBy: "user:bench",
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// signIn makes the sessions of the viewers.
func (w *world) signIn(ctx context.Context, token string) error {
	users := v1connect.NewUserServiceClient(byhand.User(token, nil), w.url)
	for i := range (w.viewers + perUser - 1) / perUser {
		user := fmt.Sprint("viewer-", i)
		if _, err := users.CreateUser(ctx, connect.NewRequest(&v1.CreateUserRequest{Name: user, Role: "operator"})); err != nil {
			return err
		}
		made, err := users.CreateToken(ctx, connect.NewRequest(&v1.CreateTokenRequest{User: user, Comment: "bench"}))
		if err != nil {
			return err
		}
		w.cookies = append(w.cookies, console.SessionCookie(made.Msg.GetInfo().GetId(), made.Msg.GetToken(), false))
	}
	return nil
}

func (w *world) up(d *device, kind string, m proto.Message) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	w.sent.Add(1)
	return w.broker.Publish(link.Up(d.name, kind), b, false, 0)
}

// report sends what a device does; d.mu is not held.
func (w *world) report(i int, d *device) error {
	d.mu.Lock()
	d.sequence++
	r := &v1.Reported{Session: d.name, Sequence: d.sequence, Observed: d.observed}
	probe := d.probe
	d.mu.Unlock()
	for k := range 2 {
		r.Versions = append(r.Versions, &v1.VersionStatus{Model: fmt.Sprintf("model-%03d", (i+k*7)%w.models), Version: int64(1 + i%3), State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true})
	}
	if probe > 0 {
		r.Versions = append(r.Versions, &v1.VersionStatus{Model: "probe", Version: probe, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true})
	}
	return w.up(d, link.Reported, r)
}

// down takes what devices are sent.
func (w *world) down(_ *mochi.Client, _ packets.Subscription, p packets.Packet) {
	d := w.byDesired[p.TopicName]
	if d == nil {
		return
	}
	m := &v1.Desired{}
	if proto.Unmarshal(bytes.Clone(p.Payload), m) != nil {
		return
	}
	d.mu.Lock()
	d.observed = m.GetGeneration()
	d.mu.Unlock()
	var i int
	_, _ = fmt.Sscanf(d.name, "cam-%d", &i) // it made the name
	w.loads.Go(func() { _ = w.report(i, d) })
}

func (w *world) telemetry(i int, d *device) error {
	used := uint64(3+i%4) << 30
	return w.up(d, link.Telemetry, &v1.Telemetry{
		At: timestamppb.Now(), CpuUtilisation: new(float64(i%90) / 100), MemoryUsedBytes: &used, MemoryTotalBytes: new(uint64(8 << 30)), DiskFreeBytes: new(uint64(20 << 30)), BootId: d.name,
		Models: []*v1.ModelTelemetry{{Model: fmt.Sprintf("model-%03d", i%w.models), Version: int64(1 + i%3), Succeeded: uint64(i), Resident: true, MemoryBytes: 1 << 30}},
	})
}

// connect has all devices say hello, and goes on with a sample of each a
// minute and a report of each every three.
func (w *world) connect(load context.Context) error {
	fmt.Fprintln(os.Stderr, "devices connect")
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	hello := link.Up(w.devices[0].name, link.Hello)
	for end := time.Now().Add(patience); len(w.broker.Topics.Subscribers(hello).Subscriptions) == 0; <-tick.C {
		if time.Now().After(end) {
			return fmt.Errorf("the controller has not subscribed to %s after %v", hello, patience)
		}
	}
	for i, d := range w.devices {
		<-tick.C
		info := &v1.DeviceInfo{Hostname: "host-" + d.name, FirmwareProfile: []string{"raspberry-pi-5", "jetson-orin-nano", "x86-64"}[i%3], Simulated: true, AgentVersion: "0.9.0"}
		if err := w.up(d, link.Hello, &v1.Hello{BootId: d.name, Session: d.name, Info: info}); err != nil {
			return err
		}
		if err := errors.Join(w.report(i, d), w.telemetry(i, d)); err != nil {
			return err
		}
	}
	w.loads.Go(func() {
		every := time.NewTicker(time.Minute / time.Duration(len(w.devices)))
		defer every.Stop()
		for n := 0; ; n++ {
			select {
			case <-load.Done():
				return
			case <-every.C:
			}
			i := n % len(w.devices)
			_ = w.telemetry(i, w.devices[i]) // of a broker in this process that is there
			if n%3 == 0 {
				_ = w.report(i, w.devices[i])
			}
		}
	})
	return nil
}
