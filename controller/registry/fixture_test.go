package registry

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	"github.com/dunlin/dunlin/models"
)

const (
	operatorToken = "operator-token"
	viewerToken   = "viewer-token"
)

// credentials knows an operator, a viewer and the device cam-1.
type credentials struct{}

func (credentials) TokenOwner(_ context.Context, hash [32]byte) (identity.Grant, error) {
	switch hash {
	case identity.Hash(operatorToken):
		return identity.Grant{User: "ada", UserRole: identity.Operator}, nil
	case identity.Hash(viewerToken):
		return identity.Grant{User: "eve", UserRole: identity.Viewer}, nil
	}
	return identity.Grant{}, identity.ErrUnknown
}

func (credentials) TokenUsed(context.Context, [32]byte, time.Time) error { return nil }

func (credentials) CheckDevice(_ context.Context, device string, _ *x509.Certificate) error {
	if device == "cam-1" {
		return nil
	}
	return identity.ErrUnknown
}

// device has a request come with a device's certificate.
func device(name string) func(*http.Request) {
	return func(r *http.Request) {
		r.Header.Del("Authorization")
		r.Header.Set(pkitest.AsDevice, name)
	}
}

// versions keeps versions in memory, under the rules of Versions.
type versions struct {
	mu         sync.Mutex
	digests    map[string][]string // by model; version N at N-1
	last       NewVersion
	sources    map[string]string // by bundle, what it was made from
	signatures *signatures
	crash      error             // what the next CreateVersion fails with
	given      map[string]string // a model for each device; nil: everything
}

func (v *versions) Given(_ context.Context, device, model string) (bool, error) {
	return v.given == nil || v.given[device] == model, nil
}

func (v *versions) CreateVersion(_ context.Context, n NewVersion) (int64, bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.crash; err != nil {
		v.crash = nil
		return 0, false, err
	}
	have := v.digests[n.Model]
	for i, d := range have {
		if d == n.Digest {
			return int64(i + 1), false, nil
		}
	}
	if n.Want > 0 && n.Want <= int64(len(have)) && have[n.Want-1] != "" {
		return 0, false, ErrVersionExists{n.Model, n.Want, have[n.Want-1]}
	}
	if n.Want == 0 {
		n.Want = int64(len(have) + 1)
	}
	for int64(len(have)) < n.Want {
		have = append(have, "")
	}
	have[n.Want-1] = n.Digest
	v.digests[n.Model] = have
	if v.sources == nil {
		v.sources = map[string]string{}
	}
	v.sources[n.Digest] = n.Source
	v.last = n
	return n.Want, true, nil
}

func (v *versions) VersionDigest(_ context.Context, model string, version int64) (string, bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	have := v.digests[model]
	if version < 1 || version > int64(len(have)) || have[version-1] == "" {
		return "", false, nil
	}
	return have[version-1], true, nil
}

func (v *versions) Manifests(ctx context.Context) (all []Manifest, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for model, digests := range v.digests {
		for _, d := range digests {
			if d != "" {
				all = append(all, Manifest{model, digest.Digest(d)}, Manifest{model, digest.Digest(v.sources[d])})
				kept, err := v.signatures.ListSignatures(ctx, model, d)
				if err != nil {
					return nil, err
				}
				for _, s := range kept {
					all = append(all, Manifest{model, s.Manifest})
				}
			}
		}
	}
	return all, nil
}

func (v *versions) count() (n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, d := range v.digests {
		n += len(d)
	}
	return n
}

// fixture is a registry behind a real HTTP server.
type fixture struct {
	t          testing.TB
	registry   *Registry
	versions   *versions
	signatures *signatures
	server     *httptest.Server
	root       string
	log        *bytes.Buffer
	refusals   refusals
}

// refusals keeps what was refused.
type refusals struct {
	mu  sync.Mutex
	all []identity.Refusal
}

func (r *refusals) Refused(ctx context.Context, one identity.Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := identity.FromContext(ctx)
	one.Who, one.From = p.String(), p.From
	r.all = append(r.all, one)
}

func start(t testing.TB) *fixture {
	f := &fixture{t: t, versions: &versions{digests: map[string][]string{}}, signatures: newSignatures(t), root: t.TempDir(), log: &bytes.Buffer{}}
	f.versions.signatures = f.signatures
	f.open()
	return f
}

// open starts the registry, again where it ran before.
func (f *fixture) open() {
	f.t.Helper()
	if f.server != nil {
		f.server.Close()
	}
	r, err := New(Config{
		Root: f.root, Auth: identity.New(credentials{}, identity.Options{}), Refusals: &f.refusals, Versions: f.versions, Signatures: f.signatures,
		Log: slog.New(slog.NewTextHandler(&lockedWriter{w: f.log}, &slog.HandlerOptions{Level: slog.LevelInfo})),
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.registry = r
	f.server = httptest.NewServer(pkitest.Showing(f.t, pkitest.Authority(f.t), r))
	f.t.Cleanup(f.server.Close)
}

type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

type response struct {
	status int
	header http.Header
	body   []byte
}

// message gives the code and message of an error in the API's shape.
func (r response) message(t testing.TB) (code, message string) {
	t.Helper()
	var e struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(r.body, &e); err != nil || len(e.Errors) != 1 {
		t.Fatalf("status %d, not an error of the API: %q", r.status, r.body)
	}
	return e.Errors[0].Code, e.Errors[0].Message
}

func (f *fixture) do(method, path string, body []byte, set ...func(*http.Request)) response {
	f.t.Helper()
	if strings.HasPrefix(path, "/") {
		path = f.server.URL + path
	}
	req, err := http.NewRequestWithContext(context.Background(), method, path, bytes.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	req.SetBasicAuth("token", operatorToken)
	for _, s := range set {
		s(req)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return response{res.StatusCode, res.Header, b}
}

func header(key, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(key, value) }
}

var ociManifest = header("Content-Type", ocispec.MediaTypeImageManifest)

func (f *fixture) putBlob(model string, b []byte) ocispec.Descriptor {
	f.t.Helper()
	res := f.do("POST", "/v2/"+model+"/blobs/uploads/", nil)
	if res.status != http.StatusAccepted {
		f.t.Fatalf("start upload: %d %s", res.status, res.body)
	}
	d := digest.FromBytes(b)
	res = f.do("PUT", f.location(res)+"&digest="+d.String(), b, header("Content-Type", "application/octet-stream"))
	if res.status != http.StatusCreated {
		f.t.Fatalf("upload: %d %s", res.status, res.body)
	}
	return ocispec.Descriptor{Digest: d, Size: int64(len(b))}
}

func (f *fixture) location(res response) string {
	f.t.Helper()
	l := res.header.Get("Location")
	if !strings.HasPrefix(l, "/v2/") {
		f.t.Fatalf("location %q is not relative to the host", l)
	}
	return f.server.URL + l
}

// plain gives a manifest as another tool makes it: one layer, an empty config.
func (f *fixture) plain(model string, layer []byte) []byte {
	f.t.Helper()
	config := f.putBlob(model, []byte("{}"))
	config.MediaType = "application/vnd.oci.empty.v1+json"
	l := f.putBlob(model, layer)
	l.MediaType = "application/octet-stream"
	return f.encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: "application/vnd.example.onnx", Config: config, Layers: []ocispec.Descriptor{l},
	})
}

func (f *fixture) encode(v any) []byte {
	f.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

// bundle packs a model and pushes its blobs.
func (f *fixture) bundle(model, path string) *models.Bundle {
	f.t.Helper()
	b, err := models.Pack(context.Background(), path, models.PackOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	f.putBlob(model, b.ConfigBytes)
	f.putBlob(model, b.IndexBytes)
	for _, file := range b.Files {
		f.putBlob(model, read1(f.t, file.Source))
	}
	return b
}

func read1(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func digits(name string) string {
	return filepath.Join("..", "..", "models", "examples", "digits", name)
}
