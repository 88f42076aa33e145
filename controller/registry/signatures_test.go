package registry

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

// signatures keeps signatures in memory, and signs with a key of its own.
type signatures struct {
	key   crypto.Signer
	mu    sync.Mutex
	kept  []NewSignature
	crash error // what the next AddSignature fails with
}

func newSignatures(t testing.TB) *signatures {
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return &signatures{key: key}
}

func (s *signatures) Countersign(_ context.Context, model string, version int64, m *models.Manifest) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.kept {
		if k.Model == model && k.Bundle == m.Digest && k.By == "controller" {
			return nil, nil
		}
	}
	return signing.SignBundle(signing.Signer{Key: s.key}, model, version, m)
}

func (s *signatures) AddSignature(_ context.Context, n NewSignature) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.crash; err != nil {
		s.crash = nil
		return err
	}
	if !slices.ContainsFunc(s.kept, func(k NewSignature) bool { return k.Model == n.Model && k.Manifest == n.Manifest }) {
		s.kept = append(s.kept, n)
	}
	return nil
}

func (s *signatures) RemoveSignature(_ context.Context, model string, manifest digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = slices.DeleteFunc(s.kept, func(k NewSignature) bool { return k.Model == model && k.Manifest == manifest })
	return nil
}

func (s *signatures) ListSignatures(_ context.Context, model, bundle string) (all []Signature, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.kept {
		if k.Model == model && k.Bundle.String() == bundle {
			all = append(all, k.Signature)
		}
	}
	return all, nil
}

// by says who has pushed the signatures of a bundle.
func (s *signatures) by(bundle digest.Digest) (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.kept {
		if k.Bundle == bundle {
			all = append(all, k.By)
		}
	}
	return all
}

// signedBundle pushes a bundle without making it a version, and gives its
// manifest.
func (f *fixture) signedBundle() *models.Manifest {
	f.t.Helper()
	b := f.bundle("digits", digits("v1.onnx"))
	if res := f.do("PUT", "/v2/digits/manifests/"+b.Digest.String(), b.ManifestBytes, ociManifest); res.status != http.StatusCreated {
		f.t.Fatalf("%d %s", res.status, res.body)
	}
	m, err := models.ParseManifest(b.ManifestBytes)
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func sign(t testing.TB, key crypto.Signer, model string, version int64, m *models.Manifest) []byte {
	t.Helper()
	raw, err := signing.SignBundle(signing.Signer{Key: key}, model, version, m)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// pushSignature pushes a signature as the manifest says.
func (f *fixture) pushSignature(m ocispec.Manifest, signature []byte) response {
	f.t.Helper()
	f.putBlob("digits", []byte("{}"))
	f.putBlob("digits", signature)
	raw := f.encode(m)
	return f.do("PUT", "/v2/digits/manifests/"+digest.FromBytes(raw).String(), raw, ociManifest)
}

func signatureManifest(t testing.TB, of digest.Digest, signature []byte) (m ocispec.Manifest) {
	t.Helper()
	raw, err := signing.NewManifest(of, 100, signature)
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (f *fixture) referrers(of digest.Digest, query string) (index ocispec.Index, res response) {
	f.t.Helper()
	res = f.do("GET", "/v2/digits/referrers/"+of.String()+query, nil)
	if res.status != http.StatusOK || res.header.Get("Content-Type") != ocispec.MediaTypeImageIndex {
		f.t.Fatalf("%d %v %s", res.status, res.header, res.body)
	}
	if err := json.Unmarshal(res.body, &index); err != nil {
		f.t.Fatal(err)
	}
	return index, res
}

func TestPushSignature(t *testing.T) {
	f := start(t)
	m := f.signedBundle()
	signature := sign(t, f.signatures.key, "digits", 1, m)
	res := f.pushSignature(signatureManifest(t, m.Digest, signature), signature)
	if res.status != http.StatusCreated || res.header.Get("OCI-Subject") != m.Digest.String() {
		t.Fatalf("%d %v %s", res.status, res.header, res.body)
	}
	if by := f.signatures.by(m.Digest); fmt.Sprint(by) != "[user:ada]" {
		t.Errorf("signatures by %v", by)
	}
	if _, _, err := f.registry.Ingest(t.Context(), "digits", m.Digest.String(), 1, "user:ada"); err != nil {
		t.Fatal(err)
	}
	if by := f.signatures.by(m.Digest); fmt.Sprint(by) != "[user:ada controller]" {
		t.Errorf("signatures by %v", by)
	}
	if _, _, err := f.registry.Ingest(t.Context(), "digits", m.Digest.String(), 1, "user:ada"); err != nil {
		t.Fatal(err)
	}
	for query, want := range map[string]int{"": 2, "?artifactType=" + url.QueryEscape(signing.MediaType): 2, "?artifactType=other": 0} {
		index, res := f.referrers(m.Digest, query)
		if len(index.Manifests) != want || (query != "") != (res.header.Get("OCI-Filters-Applied") == "artifactType") {
			t.Errorf("%s: %d referrers, %v", query, len(index.Manifests), res.header)
		}
	}
	if index, _ := f.referrers(digest.FromString("unknown"), ""); len(index.Manifests) != 0 {
		t.Errorf("referrers of what is not there: %v", index)
	}
	if res := f.do("GET", "/v2/digits/referrers/teapot", nil); res.status != http.StatusBadRequest {
		t.Errorf("%d %s", res.status, res.body)
	}
	if res := f.do("POST", "/v2/digits/referrers/"+m.Digest.String(), nil); res.status != http.StatusMethodNotAllowed {
		t.Errorf("%d %s", res.status, res.body)
	}
}

// A registration that is cut short between the version and its signature is
// made whole when it is done again, and by Countersign.
func TestCountersignAgain(t *testing.T) {
	f := start(t)
	m := f.signedBundle()
	for _, again := range []func() error{
		func() error {
			_, _, err := f.registry.Ingest(t.Context(), "digits", m.Digest.String(), 0, "x")
			return err
		},
		func() error { return f.registry.Countersign(t.Context(), "digits", 1, m.Digest) },
	} {
		f.signatures.kept, f.signatures.crash = nil, context.Canceled
		if _, _, err := f.registry.Ingest(t.Context(), "digits", m.Digest.String(), 0, "x"); err == nil {
			t.Fatal("no error")
		}
		if err := again(); err != nil {
			t.Fatal(err)
		}
		if by := f.signatures.by(m.Digest); fmt.Sprint(by) != "[controller]" {
			t.Errorf("signatures by %v", by)
		}
	}
}

func TestPushSignatureRefused(t *testing.T) {
	f := start(t)
	m := f.signedBundle()
	key := f.signatures.key
	good := sign(t, key, "digits", 1, m)
	manifest := func(signature []byte, change func(*ocispec.Manifest)) ocispec.Manifest {
		sm := signatureManifest(t, m.Digest, signature)
		if change != nil {
			change(&sm)
		}
		return sm
	}
	otherFiles := *m
	otherFiles.Files = slices.Clone(m.Files)
	otherFiles.Files[0].Digest = digest.FromString("x")
	otherManifest := *m
	otherManifest.Digest = digest.FromString("x")
	for name, test := range map[string]struct {
		signature []byte
		change    func(*ocispec.Manifest)
		message   string
	}{
		"not a signature":  {[]byte("{}"), nil, "mediaType"},
		"another kind":     {good, func(m *ocispec.Manifest) { m.ArtifactType = "application/x" }, "artifactType"},
		"unknown subject":  {good, func(m *ocispec.Manifest) { m.Subject.Digest = digest.FromString("x") }, "push it first"},
		"two layers":       {good, func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) }, "exactly one layer"},
		"another size":     {good, func(m *ocispec.Manifest) { m.Layers[0].Size++ }, "the manifest says"},
		"too large":        {good, func(m *ocispec.Manifest) { m.Layers[0].Size = signing.MaxSignatureBytes + 1 }, "allowed are"},
		"missing blob":     {good, func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.FromString("x") }, "push it first"},
		"another model":    {sign(t, key, "letters", 1, m), nil, `it is of "letters:1" instead of digits:VERSION`},
		"other files":      {sign(t, key, "digits", 1, &otherFiles), nil, "it is of"},
		"another manifest": {sign(t, key, "digits", 1, &otherManifest), nil, "it is of manifest"},
	} {
		res := f.pushSignature(manifest(test.signature, test.change), test.signature)
		if res.status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, res.status, res.body)
			continue
		}
		if _, message := res.message(t); !strings.Contains(message, test.message) {
			t.Errorf("%s: %s", name, message)
		}
	}
	if res := f.do("PUT", "/v2/digits/manifests/"+digest.FromString("x").String(), f.encode(manifest(good, nil)), ociManifest); res.status != http.StatusBadRequest {
		t.Errorf("wrong digest: %d %s", res.status, res.body)
	}
	for name, set := range map[string]func(*http.Request){
		"viewer": func(r *http.Request) { r.SetBasicAuth("", viewerToken) },
		"device": device("cam-1"),
	} {
		raw := f.encode(manifest(good, nil))
		if res := f.do("PUT", "/v2/digits/manifests/"+digest.FromBytes(raw).String(), raw, ociManifest, set); res.status != http.StatusForbidden {
			t.Errorf("%s: %d", name, res.status)
		}
		if res := f.do("GET", "/v2/digits/referrers/"+m.Digest.String(), nil, set); res.status != http.StatusOK {
			t.Errorf("%s: %d", name, res.status)
		}
	}
	if by := f.signatures.by(m.Digest); by != nil {
		t.Errorf("signatures by %v", by)
	}
	for i := range maxPushed + 1 {
		signature := sign(t, key, "digits", int64(i+1), m)
		res := f.pushSignature(manifest(signature, nil), signature)
		if ok := res.status == http.StatusCreated; ok != (i < maxPushed) {
			t.Errorf("signature %d: %d %s", i+1, res.status, res.body)
		}
	}
}

// oras attaches a signature and finds it, by the referrers API.
func TestORASReferrers(t *testing.T) {
	f := start(t)
	m := f.signedBundle()
	repo, err := remote.NewRepository(strings.TrimPrefix(f.server.URL, "http://") + "/digits")
	if err != nil {
		t.Fatal(err)
	}
	repo.PlainHTTP = true
	repo.Client = &auth.Client{Credential: auth.StaticCredential(repo.Reference.Registry, auth.Credential{Username: "x", Password: operatorToken})}
	subject, err := repo.Resolve(t.Context(), m.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	layer, err := oras.PushBytes(t.Context(), repo, signing.MediaType, sign(t, f.signatures.key, "digits", 1, m))
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := oras.PackManifest(t.Context(), repo, oras.PackManifestVersion1_1, signing.MediaType, oras.PackManifestOptions{
		Subject: &subject, Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		t.Fatal(err)
	}
	var found []ocispec.Descriptor
	err = repo.Referrers(t.Context(), subject, signing.MediaType, func(some []ocispec.Descriptor) error {
		found = append(found, some...)
		return nil
	})
	if err != nil || len(found) != 1 || found[0].Digest != pushed.Digest || found[0].Size != pushed.Size || found[0].ArtifactType != signing.MediaType {
		t.Errorf("found %v, error %v; pushed %v", found, err, pushed)
	}
	if res := f.do("GET", "/v2/digits/tags/list", nil); strings.Contains(string(res.body), "sha256-") {
		t.Errorf("oras did not find the referrers API: %s", res.body)
	}
	// What else refers to a bundle is refused.
	if _, err := oras.PackManifest(t.Context(), repo, oras.PackManifestVersion1_1, "application/x", oras.PackManifestOptions{Subject: &subject}); err == nil {
		t.Error("taken")
	}
}
