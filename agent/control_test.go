package agent

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/identity/identitytest"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(worker.Child())
	}
	os.Exit(m.Run())
}

// control is the little of a controller that an agent sees: it lets devices
// join, has a broker, and a registry.
type control struct {
	*identitytest.Controller
	t    testing.TB
	http *httptest.Server
	up   chan proto.Message // what devices say, but for telemetry
	key  crypto.Signer      // signs versions, and the trust document
	// samples is the telemetry of devices, as far as there is room for it.
	samples chan *dunlinv1.Telemetry

	mu      sync.Mutex
	broker  *mochi.Server
	address string // of the broker
	blobs   map[digest.Digest][]byte
}

// devices lets those in that have joined.
type devices struct {
	mochi.HookBase
	control *control
}

func (d *devices) ID() string { return "devices" }
func (d *devices) Provides(b byte) bool {
	return b == mochi.OnConnectAuthenticate || b == mochi.OnACLCheck
}
func (d *devices) OnConnectAuthenticate(cl *mochi.Client, p packets.Packet) bool {
	s := cl.Net.Conn.(*tls.Conn).ConnectionState()
	device, ok := d.control.Device(&s)
	return ok && device == string(p.Connect.Username)
}
func (d *devices) OnACLCheck(*mochi.Client, string, bool) bool { return true }

func startControl(t testing.TB) *control {
	t.Helper()
	key, trust := testTrust(t)
	c := &control{Controller: identitytest.New(t, time.Now), t: t, key: key, up: make(chan proto.Message, 4096), samples: make(chan *dunlinv1.Telemetry, 256), blobs: map[digest.Digest][]byte{}}
	c.Trust = []*dunlinv1.SignedTrust{trust}
	c.BrokerURL = func() string {
		c.mu.Lock()
		defer c.mu.Unlock()
		return "mqtts://" + c.address
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/v2/", c.registry)
	mux.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	c.http = c.Serve(mux)
	c.startBroker("127.0.0.1:0")
	t.Cleanup(c.stopBroker)
	return c
}

func (c *control) startBroker(address string) {
	c.t.Helper()
	b := mochi.New(&mochi.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler)})
	tcp := listeners.NewTCP(listeners.Config{ID: "tcp", Address: address, TLSConfig: c.TLS()})
	for _, err := range []error{
		b.AddHook(&devices{control: c}, nil), b.AddListener(tcp),
		b.Subscribe(link.UpFilter, 1, func(_ *mochi.Client, _ packets.Subscription, p packets.Packet) { c.heard(p.TopicName, p.Payload) }),
		b.Serve(),
	} {
		if err != nil {
			c.t.Fatal(err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.broker, c.address = b, tcp.Address()
}

func (c *control) stopBroker() {
	c.mu.Lock()
	b := c.broker
	c.broker = nil
	c.mu.Unlock()
	if b != nil {
		b.Close()
	}
}

func (c *control) heard(topic string, payload []byte) {
	_, kind, err := link.ParseUp(topic)
	if err != nil {
		c.t.Error(err)
		return
	}
	m := map[string]proto.Message{
		link.Hello: &dunlinv1.Hello{}, link.Reported: &dunlinv1.Reported{}, link.Events: &dunlinv1.EventBatch{},
		link.Gone: &dunlinv1.Gone{}, link.Request: &dunlinv1.BlockRequest{}, link.Telemetry: &dunlinv1.Telemetry{},
	}[kind]
	if m == nil {
		return
	}
	if err := proto.Unmarshal(payload, m); err != nil {
		c.t.Errorf("%s: %v", topic, err)
		return
	}
	if t, ok := m.(*dunlinv1.Telemetry); ok {
		select {
		case c.samples <- t:
		default:
		}
		return
	}
	c.up <- m
}

func (c *control) send(device, kind string, m proto.Message) {
	c.t.Helper()
	payload, err := proto.Marshal(m)
	if err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	b := c.broker
	c.mu.Unlock()
	if b != nil {
		_ = b.Publish(link.Down(device, kind), payload, false, 0)
	}
}

func (c *control) registry(w http.ResponseWriter, r *http.Request) {
	if _, ok := c.Device(r.TLS); !ok {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.URL.Path == "/v2/" {
		return
	}
	raw, ok := c.blobs[digest.Digest(path.Base(r.URL.Path))]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw))
}

// push puts an ONNX file into the registry and gives its version.
func (c *control) push(onnx, model string, version int64) *dunlinv1.DesiredVersion {
	c.t.Helper()
	return c.pushWith(onnx, model, version, models.PackOptions{})
}

func (c *control) pushWith(onnx, model string, version int64, options models.PackOptions) *dunlinv1.DesiredVersion {
	c.t.Helper()
	b, err := models.Pack(c.t.Context(), onnx, options)
	if err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, raw := range [][]byte{b.ConfigBytes, b.IndexBytes, b.ManifestBytes} {
		c.blobs[digest.FromBytes(raw)] = raw
	}
	var size int64
	for _, f := range b.Files {
		raw, err := os.ReadFile(f.Source)
		if err != nil {
			c.t.Fatal(err)
		}
		c.blobs[f.Digest] = raw
		size += f.Size
	}
	m, err := models.ParseManifest(b.ManifestBytes)
	if err != nil {
		c.t.Fatal(err)
	}
	signature, err := signing.SignBundle(signing.Signer{Key: c.key}, model, version, m)
	if err != nil {
		c.t.Fatal(err)
	}
	manifest, err := signing.NewManifest(b.Digest, int64(len(b.ManifestBytes)), signature)
	if err != nil {
		c.t.Fatal(err)
	}
	c.blobs[digest.FromBytes(signature)], c.blobs[digest.FromBytes(manifest)] = signature, manifest
	return &dunlinv1.DesiredVersion{
		Deployment: model, Model: model, Version: version, Digest: b.Digest.String(), SizeBytes: uint64(size),
		Signatures: []string{digest.FromBytes(manifest).String()},
	}
}

// runtimeLibrary gives the path of ONNX Runtime.
func runtimeLibrary(t testing.TB) string {
	t.Helper()
	if lib := os.Getenv("DUNLIN_ORT_LIB"); lib != "" {
		return lib
	}
	found, err := filepath.Glob("../.cache/onnxruntime/libonnxruntime.so.*")
	if err != nil || len(found) == 0 {
		t.Fatal("no ONNX Runtime library: run make runtime")
	}
	lib, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return lib
}

func testConfig(t testing.TB, c *control) Config {
	t.Helper()
	cfg := Config{
		Data: filepath.Join(t.TempDir(), "data"), Controller: c.http.URL, JoinToken: c.Token, Name: "edge-1",
		Labels: map[string]string{"site": "test"}, Serving: Serving{Listen: "127.0.0.1:0", GRPCListen: "127.0.0.1:0", RuntimeLib: runtimeLibrary(t), Worker: []string{os.Args[0], "worker"},
			Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))},
	}
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// patience bounds a wait for what must come: what is done in idle time only
// takes its time where other tests keep the processors busy.
const patience = 3 * time.Minute

// until takes what the device says until ok.
func (c *control) until(what string, ok func(proto.Message) bool) {
	c.t.Helper()
	deadline := time.After(patience)
	var last []string
	for {
		select {
		case m := <-c.up:
			if ok(m) {
				return
			}
			last = append(last, fmt.Sprintf("%s %v", m.ProtoReflect().Descriptor().Name(), m))
		case <-deadline:
			c.t.Fatalf("never %s; heard:\n%s", what, strings.Join(last, "\n"))
		}
	}
}
