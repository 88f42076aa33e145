package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

const (
	host  = "127.0.0.1"
	model = "net"
)

// bench is a fleet with one device, made by hand, that is given the model.
type bench struct {
	size
	fleet        *e2e.Fleet
	dir          string
	bytes, layer int64 // of the model, and of its last layer
	digests      map[string]digest.Digest
	blob         digest.Digest // the model's file
	device       *byhand.Device
	client       *http.Client
	wire         atomic.Int64     // bytes of its connections, both ways
	mqtt         reconcile.Source // nil: there is none
	closeMQTT    func()
	fetches      int
}

// prepare pushes the versions, and has the device given one of them.
func (b *bench) prepare(ctx context.Context) error {
	b.digests = map[string]digest.Digest{}
	for i, version := range []string{"base", "head", "insert"} {
		path := filepath.Join(b.dir, version+".onnx")
		raw := b.model(version)
		if version == "base" {
			b.bytes, b.blob = int64(len(raw)), digest.FromBytes(raw)
		}
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			return err
		}
		if _, err := b.fleet.CLI(ctx, "push", path, fmt.Sprintf("%s:%d", model, i+1)); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	var listed struct {
		Versions []struct{ Version, Digest string }
	}
	out, err := b.fleet.CLI(ctx, "get", "models", model, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &listed)
	}
	if err != nil {
		return err
	}
	for _, v := range listed.Versions {
		b.digests[map[string]string{"1": "base", "2": "head", "3": "insert"}[v.Version]] = digest.Digest(v.Digest)
	}
	if len(b.digests) != 3 {
		return fmt.Errorf("the controller has %d versions, not 3: %s", len(b.digests), out)
	}
	if err := b.join(ctx); err != nil {
		return err
	}
	document := filepath.Join(b.dir, "deployment.yaml")
	if err := os.WriteFile(document, []byte("apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: net}\nspec: {model: net, version: 1, selector: {}}\n"), 0o600); err != nil {
		return err
	}
	if _, err := b.fleet.CLI(ctx, "apply", "-f", document); err != nil {
		return err
	}
	for {
		status, err := b.given(ctx)
		if err != nil || status == http.StatusOK {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// model makes a version: layers that are multiplied one after another. In
// "head" the last one is another; "insert" has one more node before the
// first, so that all weights lie some bytes further on.
func (b *bench) model(version string) []byte {
	random := rand.NewChaCha8([32]byte{1})
	const rows = 1024
	columns := b.size.model * 1e6 / 4 / rows / b.layers
	m := onnxwriter.Model{
		Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float("x", -1, rows)},
	}
	input := "x"
	if version == "insert" {
		m.Nodes = append(m.Nodes, onnxwriter.Node{Op: "Identity", In: []string{"x"}, Out: []string{"shifted"}})
		input = "shifted"
	}
	for i := range b.layers {
		data := make([]byte, rows*columns*4)
		_, _ = random.Read(data)
		if i == b.layers-1 {
			b.layer = int64(len(data))
			if version == "head" {
				_, _ = random.Read(data)
			}
		}
		for at := 3; at < len(data); at += 4 {
			data[at] = 0x3f // floats between about 0.5 and 2
		}
		weight, out := fmt.Sprint("w", i), fmt.Sprint("y", i)
		m.Weights = append(m.Weights, onnxwriter.Weight{Name: weight, Type: tensor.Float32, Shape: []int64{rows, int64(columns)}, Data: data})
		m.Nodes = append(m.Nodes, onnxwriter.Node{Op: "MatMul", In: []string{input, weight}, Out: []string{out}})
		m.Outputs = append(m.Outputs, onnxwriter.Float(out, -1, int64(columns)))
	}
	return m.Marshal()
}

// join makes the device known, and its certificate a file for curl.
func (b *bench) join(ctx context.Context) error {
	made, err := dunlinv1connect.NewEnrollmentServiceClient(byhand.User(b.fleet.Token, nil), b.fleet.URL).
		CreateJoinToken(ctx, connect.NewRequest(&dunlinv1.CreateJoinTokenRequest{Uses: 1}))
	if err != nil {
		return err
	}
	token := made.Msg.GetJoinToken()
	pin, ok := pki.PinIn(token)
	if !ok {
		return errors.New("the join token has no pin")
	}
	secure := pki.ClientConfig(pki.Client{Trust: func() pki.Trust { return pki.Trust{Pin: &pin} }}, host)
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	if b.device, err = byhand.Join(ctx, dunlinv1connect.NewEnrollmentServiceClient(byhand.User("", secure), b.fleet.DeviceURL()), token, "delta", key); err != nil {
		return err
	}
	// As agent/identity has it, but that bytes are counted.
	b.client = &http.Client{Transport: &http.Transport{
		TLSClientConfig: b.device.TLS(host), MaxIdleConnsPerHost: 4, MaxConnsPerHost: 8, DisableCompression: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &counted{c, &b.wire}, nil
		},
	}}
	der, err := x509.MarshalPKCS8PrivateKey(b.device.Key)
	if err != nil {
		return err
	}
	for file, content := range map[string][]byte{
		"cert.pem": pki.EncodeCertificates(b.device.Chain...), "roots.pem": pki.EncodeCertificates(b.device.Roots...),
		"key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		if err := os.WriteFile(filepath.Join(b.dir, file), content, 0o600); err != nil {
			return err
		}
	}
	b.mqtt, b.closeMQTT, err = openMQTT(ctx, b)
	return err
}

func (b *bench) close() {
	b.client.CloseIdleConnections()
	if b.closeMQTT != nil {
		b.closeMQTT()
	}
}

// given says how the registry answers the device that asks for the model.
func (b *bench) given(ctx context.Context) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.fleet.DeviceURL()+"/v2/"+model+"/manifests/"+b.digests["base"].String(), nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := b.client.Do(req)
	if err != nil {
		return 0, err
	}
	raw, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK {
		return resp.StatusCode, err
	}
	m, err := models.ParseManifest(raw)
	if err == nil && (len(m.Files) != 1 || m.Files[0].Digest != b.blob) {
		err = fmt.Errorf("the bundle has the files %v, not the one of %s", m.Files, b.blob)
	}
	return resp.StatusCode, err
}

func (b *bench) registry() reconcile.Source {
	return reconcile.NewRemote(reconcile.Registry{URL: b.fleet.DeviceURL(), Client: b.client})
}

// fetch brings a version into a folder of bundles.
func (b *bench) fetch(ctx context.Context, folder string, from reconcile.Source, version string) error {
	return reconcile.Fetch(ctx, folder, from, model, b.digests[version], slog.New(slog.DiscardHandler))
}

// folder gives a new one.
func (b *bench) folder() string {
	b.fetches++
	return filepath.Join(b.dir, fmt.Sprint("device-", b.fetches))
}

// delta gives the bytes on the wire that a device needs that has the base.
func (b *bench) delta(ctx context.Context, version string) (int64, error) {
	folder := b.folder()
	defer os.RemoveAll(folder)
	if err := b.fetch(ctx, folder, b.registry(), "base"); err != nil {
		return 0, err
	}
	b.client.CloseIdleConnections() // a device that is idle has none
	before := b.wire.Load()
	err := b.fetch(ctx, folder, b.registry(), version)
	b.client.CloseIdleConnections()
	return b.wire.Load() - before, err
}

// whole gives the MB/s at which a device comes to have the whole model,
// verified and on disk.
func (b *bench) whole(ctx context.Context, from reconcile.Source) (float64, error) {
	folder := b.folder()
	defer os.RemoveAll(folder)
	began := time.Now()
	err := b.fetch(ctx, folder, from, "base")
	took := time.Since(began)
	b.client.CloseIdleConnections()
	return float64(b.bytes) / 1e6 / took.Seconds(), err
}

// curl gives the MB/s at which curl comes to have the same file on disk.
func (b *bench) curl(ctx context.Context) (float64, error) {
	path := filepath.Join(b.dir, "curl.onnx")
	defer os.Remove(path)
	file := func(name string) string { return filepath.Join(b.dir, name) }
	var said strings.Builder
	cmd := exec.CommandContext(ctx, "curl", "--silent", "--show-error", "--fail", "--tlsv1.3", "--cacert", file("roots.pem"), "--cert", file("cert.pem"), "--key", file("key.pem"),
		"--output", path, b.fleet.DeviceURL()+"/v2/"+model+"/blobs/"+b.blob.String())
	cmd.Stderr = &said
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("curl: %w: %s", err, said.String())
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	err = errors.Join(f.Sync(), f.Close())
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	raw, err := os.ReadFile(path)
	if err == nil && digest.FromBytes(raw) != b.blob {
		err = errors.New("curl fetched another file")
	}
	return float64(b.bytes) / 1e6 / took.Seconds(), err
}

// counted is a connection whose bytes are counted.
type counted struct {
	net.Conn
	bytes *atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.bytes.Add(int64(n))
	return n, err
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.bytes.Add(int64(n))
	return n, err
}
