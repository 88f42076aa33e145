package controller

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	"github.com/dunlin/dunlin/models"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

func TestMain(m *testing.M) {
	// The embedded registry starts one that nothing ends.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a running controller.
type world struct {
	t    *testing.T
	data string
	Addresses
	token string
	stop  func() error
}

func start(t *testing.T, data string, change ...func(*Config)) *world {
	t.Helper()
	c := DefaultConfig()
	c.Data, c.Listen, c.MQTTListen, c.Log = data, "127.0.0.1:0", "127.0.0.1:0", slog.New(slog.DiscardHandler)
	for _, f := range change {
		f(&c)
	}
	ready := make(chan Addresses, 1)
	c.OnReady = func(a Addresses) { ready <- a }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, c) }()
	w := &world{t: t, data: data}
	select {
	case w.Addresses = <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	w.stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Error(err)
		}
	})
	b, err := os.ReadFile(filepath.Join(data, AdminTokenFile))
	must(t, err)
	w.token = strings.TrimSpace(string(b))
	return w
}

var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

func (w *world) do(method, path string, body []byte, contentType string) (*http.Response, []byte) {
	w.t.Helper()
	url := path
	if strings.HasPrefix(path, "/") {
		url = w.URL + path
	}
	req, err := http.NewRequestWithContext(w.t.Context(), method, url, bytes.NewReader(body))
	must(w.t, err)
	req.Header.Set("Authorization", "Bearer "+w.token)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := client.Do(req)
	must(w.t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(w.t, err)
	return resp, text
}

func (w *world) auth() connect.ClientOption {
	return connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			req.Header().Set("Authorization", "Bearer "+w.token)
			return next(ctx, req)
		}
	}))
}

func call[Q, A any](t *testing.T, f func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), q *Q) *A {
	t.Helper()
	resp, err := f(t.Context(), connect.NewRequest(q))
	must(t, err)
	return resp.Msg
}

// push puts an ONNX file into the registry under a tag, as any OCI tool does.
func (w *world) push(model, tag, file string) {
	w.t.Helper()
	content, err := os.ReadFile(file)
	must(w.t, err)
	blob := func(b []byte) ocispec.Descriptor {
		d := digest.FromBytes(b)
		resp, text := w.do(http.MethodPost, "/v2/"+model+"/blobs/uploads/", nil, "")
		if resp.StatusCode != http.StatusAccepted {
			w.t.Fatalf("begin upload: %s %s", resp.Status, text)
		}
		to, err := resp.Location()
		must(w.t, err)
		q := to.Query()
		q.Set("digest", d.String())
		to.RawQuery = q.Encode()
		if resp, text := w.do(http.MethodPut, to.String(), b, "application/octet-stream"); resp.StatusCode != http.StatusCreated {
			w.t.Fatalf("upload: %s %s", resp.Status, text)
		}
		return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: int64(len(b))}
	}
	config := blob([]byte("{}"))
	config.MediaType = ocispec.MediaTypeEmptyJSON
	manifest := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/onnx", Config: config, Layers: []ocispec.Descriptor{blob(content)}}
	manifest.SchemaVersion = 2
	b, err := json.Marshal(manifest)
	must(w.t, err)
	if resp, text := w.do(http.MethodPut, "/v2/"+model+"/manifests/"+tag, b, ocispec.MediaTypeImageManifest); resp.StatusCode != http.StatusCreated {
		w.t.Fatalf("push manifest: %s %s", resp.Status, text)
	}
}

// device is an agent as far as the controller sees it.
type device struct {
	*link.Link
	cancel context.CancelFunc
	done   chan struct{}
}

// joined is a device that the controller knows.
type joined struct {
	pkitest.Joined
	*v1.JoinResponse
}

func (w *world) join(name string) joined {
	w.t.Helper()
	enrollment := v1connect.NewEnrollmentServiceClient(client, w.URL, w.auth())
	token := call(w.t, enrollment.CreateJoinToken, &v1.CreateJoinTokenRequest{}).JoinToken
	key, csr := pkitest.Request(w.t, name)
	answer := call(w.t, enrollment.Join, &v1.JoinRequest{JoinToken: token, Name: name, Csr: csr, Labels: map[string]string{"site": "demo"}})
	return joined{pkitest.Joined{Key: key, Identity: answer.Identity}, answer}
}

// https is who asks as the device.
func (w *world) https(j joined) *http.Client {
	w.t.Helper()
	secure, err := j.TLS("127.0.0.1")
	must(w.t, err)
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: secure}}
}

func (w *world) connect(url string, j joined) *device {
	w.t.Helper()
	secure, err := j.TLS("127.0.0.1")
	must(w.t, err)
	l, err := link.New(link.Config{
		BrokerURL: url, Device: j.Device, TLS: func() *tls.Config { return secure }, BootID: "boot", Log: slog.New(slog.DiscardHandler), MaxBackoff: 100 * time.Millisecond,
		Hello: func() *v1.Hello { return &v1.Hello{Info: &v1.DeviceInfo{Hostname: "host"}} },
	})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	d := &device{Link: l, cancel: cancel, done: make(chan struct{})}
	go func() { defer close(d.done); _ = l.Run(ctx) }()
	w.t.Cleanup(func() { cancel(); <-d.done })
	return d
}

// inbox waits for the first message that find takes.
func inbox[M proto.Message](t *testing.T, d *device, find func(M) bool) M {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case m := <-d.Inbox():
			if m, ok := m.(M); ok && find(m) {
				return m
			}
		case <-timeout:
			t.Fatal("the device got no such message")
		}
	}
}

func document(t *testing.T, m *v1.Desired) *v1.DesiredDocument {
	t.Helper()
	doc := &v1.DesiredDocument{}
	must(t, proto.Unmarshal(m.Document, doc))
	if sum := sha256.Sum256(m.Document); !bytes.Equal(sum[:], m.Sha256) {
		t.Error("the document has another digest than announced")
	}
	return doc
}

const digits = "../models/examples/digits/v1.onnx"

// The controller's part of the main job: push, join, apply, deliver, report.
func TestMainJob(t *testing.T) {
	w := start(t, t.TempDir())
	for _, path := range []string{"/healthz", "/metrics", "/v2/"} {
		if resp, _ := w.do(http.MethodGet, path, nil, ""); resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	w.push("digits", "latest", digits)
	w.push("digits", "1", digits) // the same bytes: nothing happens
	versions := call(t, v1connect.NewModelServiceClient(client, w.URL, w.auth()).ListModels, &v1.ListModelsRequest{}).Versions
	if len(versions) != 1 || versions[0].Version != 1 || versions[0].CreatedBy != "user:admin" || len(versions[0].Inputs) == 0 {
		t.Fatalf("got %v", versions)
	}

	joined := w.join("dev")
	d := w.connect(joined.BrokerUrl, joined)
	inbox(t, d, func(*v1.Desired) bool { return true })
	objects := v1connect.NewObjectServiceClient(client, w.URL, w.auth())
	change := call(t, objects.Apply, &v1.ApplyRequest{Documents: `apiVersion: dunlin/v1
kind: Deployment
metadata: {name: digits}
spec: {model: digits, version: 1, selector: {site: demo}}
---
apiVersion: dunlin/v1
kind: Route
metadata: {name: answer}
spec: {targets: [{model: digits, weight: 1}]}
`}).Changes[0]
	m := inbox(t, d, func(m *v1.Desired) bool { return len(document(t, m).Versions) == 1 })
	doc := document(t, m)
	if v := doc.Versions[0]; v.Model != "digits" || v.Digest != versions[0].Digest || v.SizeBytes != versions[0].SizeBytes || len(doc.Routes) != 1 {
		t.Errorf("got %v", doc)
	}

	// The device pulls with its own credentials, and may do nothing else.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, joined.RegistryUrl+"/v2/digits/manifests/"+versions[0].Digest, nil)
	must(t, err)
	resp, err := w.https(joined).Do(req)
	must(t, err)
	text, err := io.ReadAll(resp.Body)
	must(t, errors.Join(err, resp.Body.Close()))
	if _, err := models.ParseManifest(text); err != nil {
		t.Errorf("%s: %v", resp.Status, err)
	}

	watch := connect.NewRequest(&v1.WatchRolloutRequest{Id: change.Rollout})
	watch.Header().Set("Authorization", "Bearer "+w.token)
	stream, err := v1connect.NewRolloutServiceClient(client, w.URL).WatchRollout(t.Context(), watch)
	must(t, err)
	must(t, d.Send(link.Reported, &v1.Reported{Session: d.Session(), Sequence: 1, Observed: m.Generation, Versions: []*v1.VersionStatus{{
		Model: "digits", Version: 1, Serving: true, State: v1.VersionState_VERSION_STATE_RESIDENT,
	}}}))
	var last *v1.Rollout
	for stream.Receive() {
		last = stream.Msg().Rollout
	}
	must(t, errors.Join(stream.Err(), stream.Close()))
	if last.GetState() != v1.RolloutState_ROLLOUT_STATE_SUCCEEDED {
		t.Errorf("ended with %v", last)
	}
	must(t, d.Send(link.Events, &v1.EventBatch{OutboxId: "o", Events: []*v1.Event{{Sequence: 1, Kind: "version.resident"}}}))
	inbox(t, d, func(c *v1.Command) bool { return c.GetEventAck().GetSequence() == 1 })

	devices := v1connect.NewDeviceServiceClient(client, w.URL, w.auth())
	got := call(t, devices.ListDevices, &v1.ListDevicesRequest{}).Devices
	if len(got) != 1 || !got[0].Connected || got[0].Info.Hostname != "host" || !proto.Equal(got[0].Desired, m.Generation) || got[0].Labels["site"] != "demo" {
		t.Errorf("got %v", got)
	}
	deployments := call(t, objects.ListDeployments, &v1.ListDeploymentsRequest{}).Deployments
	if len(deployments) != 1 || deployments[0].Devices != 1 || deployments[0].Ready != 1 {
		t.Errorf("got %v", deployments)
	}

	// Removed, it is cut off and cannot come back.
	call(t, devices.RemoveDevice, &v1.RemoveDeviceRequest{Device: "dev"})
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); d.Session() != ""; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("a removed device is still connected")
		}
	}
	resp, err = w.https(joined).Do(req)
	must(t, err)
	must(t, resp.Body.Close())
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a removed device pulls: %s", resp.Status)
	}
}

// What was applied before a restart reaches a device that comes after it.
func TestRestart(t *testing.T) {
	data := t.TempDir()
	w := start(t, data)
	w.push("digits", "1", digits)
	dev := w.join("dev")
	call(t, v1connect.NewObjectServiceClient(client, w.URL, w.auth()).Apply, &v1.ApplyRequest{Documents: "apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: digits}\nspec: {model: digits, version: 1, selector: {}}\n"})
	token := w.token
	must(t, w.stop())
	w = start(t, data)
	if w.token != token {
		t.Error("a new administrator's token though the old one is valid")
	}
	d := w.connect(w.Broker, dev)
	inbox(t, d, func(m *v1.Desired) bool { return len(document(t, m).Versions) == 1 })
}

func TestAdminToken(t *testing.T) {
	data := t.TempDir()
	w := start(t, data)
	path := filepath.Join(data, AdminTokenFile)
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
	must(t, w.stop())
	must(t, os.WriteFile(path, []byte("not a token"), 0o600))
	if w = start(t, data); w.token == "not a token" {
		t.Error("an invalid token stays")
	}
	who := call(t, v1connect.NewAuthServiceClient(client, w.URL, w.auth()).WhoAmI, &v1.WhoAmIRequest{})
	if who.Role != "admin" || who.RegistryUrl != w.URL {
		t.Errorf("got %v", who)
	}
}

func TestDataFolderIsLocked(t *testing.T) {
	w := start(t, t.TempDir())
	c := DefaultConfig()
	c.Data, c.Listen, c.MQTTListen, c.Log = w.data, "127.0.0.1:0", "127.0.0.1:0", slog.New(slog.DiscardHandler)
	if err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("got %v", err)
	}
}

// A busy address ends Run with an error, and frees all that it took.
func TestAddressTaken(t *testing.T) {
	w := start(t, t.TempDir())
	c := DefaultConfig()
	c.Data, c.Listen, c.MQTTListen, c.Log = t.TempDir(), strings.TrimPrefix(w.URL, "http://"), "127.0.0.1:0", slog.New(slog.DiscardHandler)
	for range 2 { // the second would find the folder locked
		if err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Fatalf("got %v", err)
		}
	}
}

// A stop does not wait for those who watch or are connected.
func TestStop(t *testing.T) {
	w := start(t, t.TempDir())
	w.push("digits", "1", digits)
	dev := w.join("dev")
	d := w.connect(w.Broker, dev)
	inbox(t, d, func(*v1.Desired) bool { return true })
	id := call(t, v1connect.NewObjectServiceClient(client, w.URL, w.auth()).Apply, &v1.ApplyRequest{Documents: "apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: digits}\nspec: {model: digits, version: 1, selector: {}}\n"}).Changes[0].Rollout
	watch := connect.NewRequest(&v1.WatchRolloutRequest{Id: id})
	watch.Header().Set("Authorization", "Bearer "+w.token)
	stream, err := v1connect.NewRolloutServiceClient(client, w.URL).WatchRollout(t.Context(), watch)
	must(t, err)
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	begin := time.Now()
	must(t, w.stop())
	if took := time.Since(begin); took > stopGrace-time.Second {
		t.Errorf("the stop took %s", took)
	}
	for stream.Receive() {
	}
	if code := connect.CodeOf(stream.Err()); code != connect.CodeUnavailable {
		t.Errorf("the watch ended with %v", stream.Err())
	}
}

func TestLoadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	must(t, os.WriteFile(file, []byte("data: from-file\nlisten: 127.0.0.1:1\nlog-level: debug\n"), 0o600))
	env := map[string]string{"DUNLIN_CONTROLLER_LISTEN": "127.0.0.1:2", "DUNLIN_CONTROLLER_MQTT_LISTEN": "127.0.0.1:3"}
	c, err := LoadConfig([]string{"--config", file, "--mqtt-listen=[::1]:4"}, func(k string) string { return env[k] }, io.Discard)
	must(t, err)
	if c.Data != "from-file" || c.Listen != "127.0.0.1:2" || c.MQTTListen != "[::1]:4" || c.LogLevel != "debug" || c.LogFormat != "text" {
		t.Errorf("got %+v", c)
	}
	var help bytes.Buffer
	if _, err := LoadConfig([]string{"--help"}, func(string) string { return "" }, &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "-mqtt-listen") {
		t.Errorf("got %v, %s", err, &help)
	}
}

// TestBrokerURL: agents take the address of an external broker in one form.
func TestBrokerURL(t *testing.T) {
	for given, want := range map[string]string{
		"mqtt://localhost": "tcp://localhost:1883", "mqtt://127.0.0.1:1884": "tcp://127.0.0.1:1884", "tcp://[::1]:1": "tcp://[::1]:1",
		"mqtts://broker": "mqtts://broker:8883", "mqtts://10.0.0.1:1": "mqtts://10.0.0.1:1",
	} {
		b, err := openBus(t.Context(), Config{BrokerURL: given}, testTrust(t), slog.New(slog.DiscardHandler))
		must(t, err)
		if b.url != want {
			t.Errorf("%s: devices are told %s, want %s", given, b.url, want)
		}
	}
}

// testAuthorities is one that a test made.
type testAuthorities struct {
	*pki.Authority
	certificate *tls.Certificate
}

func (a testAuthorities) Roots() []*x509.Certificate { return []*x509.Certificate{a.Certificate} }

func (a testAuthorities) BrokerCertificate() (*tls.Certificate, error) { return a.certificate, nil }

func (a testAuthorities) ClientTLS(serverName string) *tls.Config {
	return pki.ClientConfig(pki.Client{
		Trust:       func() pki.Trust { return pki.Trust{Roots: a.Roots()} },
		Certificate: func() *tls.Certificate { return a.certificate },
	}, serverName)
}

func (a testAuthorities) DeviceTLS(string, string) (*tls.Config, error) {
	return nil, errors.New("no device")
}

func (a testAuthorities) CRLs(context.Context) ([][]byte, error) {
	crl, err := a.Revoke(nil, 1, time.Now(), time.Hour)
	return [][]byte{crl}, err
}

// testTrust is for 127.0.0.1.
func testTrust(t *testing.T) brokerTrust {
	t.Helper()
	key, err := pki.NewKey()
	must(t, err)
	a, err := pki.NewAuthority(key, time.Now(), time.Hour)
	must(t, err)
	leaf, err := a.IssueController([]string{"127.0.0.1"}, key.Public(), time.Now(), time.Hour)
	must(t, err)
	return brokerTrust{
		authorities: testAuthorities{a, &tls.Certificate{Certificate: pki.Raw(a.Chain(leaf)), PrivateKey: key}},
		auth:        noDevices{},
		revoked:     func(context.Context) ([]string, error) { return []string{"gone"}, nil },
		joinTokens:  func(context.Context) (map[string]string, error) { return nil, nil },
	}
}

type noDevices struct{}

func (noDevices) Device(context.Context, *x509.Certificate) (string, error) {
	return "", errors.New("no device")
}

func (noDevices) Enrolling(context.Context, string, string, string) bool { return false }

func TestLoadConfigFaults(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	must(t, os.WriteFile(file, []byte("data: x\ncolour: red\n"), 0o600))
	none := func(string) string { return "" }
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{[]string{"--listen", "0.0.0.0:80", "--mqtt-listen", "example.com", "--data", "", "x"}, []string{
			`unexpected argument "x"`, "data is missing", `mqtt-listen "example.com" is not host:port`}},
		{[]string{"--listen", "x"}, []string{`listen "x" is not host:port`}},
		{[]string{"--config", file, "--listen", "1.1.1.1:1"}, []string{"colour"}},
		{[]string{"--config", "/does/not/exist"}, []string{"/does/not/exist"}},
		{[]string{"--broker-url", "mqtt://10.0.0.1:1883"}, []string{`broker-url "10.0.0.1:1883" is not on loopback`}},
		{[]string{"--broker-url", "http://127.0.0.1"}, []string{"is not mqtts://host:port"}},
		{[]string{"--broker-url", "mqtts://:1883"}, []string{"broker-url"}},
		{[]string{"--mosquitto-dir", "x"}, []string{"need broker-url"}},
		{[]string{"--broker-url", "mqtt://localhost", "--mosquitto-dir", "x"}, []string{"mosquitto-dir needs a broker-url mqtts://host:port"}},
		{[]string{"--log-level", "loud", "--log-format", "xml"}, []string{`log-level "loud"`, `log-format "xml"`}},
		{[]string{"--oidc-client-id", "dunlin"}, []string{"oidc-client-id needs oidc-issuer"}},
		{[]string{"--oidc-issuer", "https://a.example", "--oidc-role-claim", ""}, []string{"oidc-issuer needs oidc-client-id", "oidc-issuer needs oidc-role-claim"}},
		{[]string{"--oidc-issuer", "http://a.example", "--oidc-client-id", "x"}, []string{`oidc-issuer "http://a.example" is not https`}},
		{[]string{"--oidc-issuer", "https://user:secret@a.example", "--oidc-client-id", "x"}, []string{"oidc-issuer is not https://host[/path]"}},
		{[]string{"--telemetry-hours", "0", "--telemetry-days", "401", "--event-days", "-1"}, []string{"telemetry-hours is 0, allowed are 1 to 744", "telemetry-days is 401", "event-days is -1, allowed are 0 to 3650"}},
		{[]string{"--nonsense"}, []string{"nonsense"}},
	} {
		_, err := LoadConfig(tt.args, none, io.Discard)
		for _, want := range tt.want {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("%v: %q is not in: %v", tt.args, want, err)
			}
		}
	}
}
