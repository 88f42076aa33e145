package controller

import (
	"bytes"
	"crypto"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// signerWorld is a data folder with a clock.
type signerWorld struct {
	t     *testing.T
	data  string
	store *store.Store
	now   time.Time
}

func newSignerWorld(t *testing.T) *signerWorld {
	w := &signerWorld{t: t, data: t.TempDir(), now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	var err error
	if w.store, err = store.Open(t.Context(), filepath.Join(w.data, storeFile), store.Options{Now: func() time.Time { return w.now }}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.store.Close() })
	return w
}

func (w *signerWorld) open() *signer {
	w.t.Helper()
	s, err := openSigner(w.t.Context(), w.data, w.store, slog.New(slog.DiscardHandler), func() time.Time { return w.now }, func() {}, func() {})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// trust gives what a device has that follows from the first document on.
func (w *signerWorld) trust() *signing.Trust {
	w.t.Helper()
	chain, err := w.store.TrustSince(w.t.Context(), 0)
	if err != nil {
		w.t.Fatal(err)
	}
	tr, err := signing.Advance(nil, chain)
	if err != nil {
		w.t.Fatal(err)
	}
	return tr
}

func (w *signerWorld) file(name string) string { return filepath.Join(w.data, keysFolder, name) }

func TestFirstTrust(t *testing.T) {
	w := newSignerWorld(t)
	for range 2 { // a second start changes nothing
		s := w.open()
		tr := w.trust()
		if tr.Version() != 1 || len(tr.Roots()) != 1 || len(tr.Controllers()) != 1 || tr.Controllers()[0].ID != s.id || !tr.ExpiresAt().Equal(w.now.Add(trustLifetime)) {
			t.Errorf("document %v", tr.Document())
		}
	}
	for _, name := range []string{countersignFile, rootFile} {
		if info, err := os.Stat(w.file(name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if err := os.WriteFile(w.file(countersignFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openSigner(t.Context(), w.data, w.store, slog.New(slog.DiscardHandler), time.Now, func() {}, func() {}); err == nil {
		t.Error("a spoilt key is passed over")
	}
}

// The document is renewed at half of its time, while the root key is here.
func TestTrustRenewed(t *testing.T) {
	w := newSignerWorld(t)
	s := w.open()
	upkeep := func(want uint64) {
		t.Helper()
		if err := s.upkeep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := w.trust().Version(); got != want {
			t.Errorf("document %d, want %d", got, want)
		}
	}
	w.now = w.now.Add(trustLifetime/2 - time.Second)
	upkeep(1)
	w.now = w.now.Add(time.Second)
	upkeep(2)
	if got := w.trust().ExpiresAt(); !got.Equal(w.now.Add(trustLifetime)) {
		t.Errorf("expires %s", got)
	}
	if err := os.Rename(w.file(rootFile), w.file("away")); err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(2 * trustLifetime)
	upkeep(2)
	// Another root key than the document's makes nothing.
	stranger, err := pki.NewKey()
	if err == nil {
		err = pki.WriteKey(w.file(rootFile), stranger)
	}
	if err != nil {
		t.Fatal(err)
	}
	upkeep(2)
	if err := os.Rename(w.file("away"), w.file(rootFile)); err != nil {
		t.Fatal(err)
	}
	upkeep(3)
}

// A new signing key comes into the document beside the old one.
func TestSigningKeyRotated(t *testing.T) {
	w := newSignerWorld(t)
	old := w.open().id
	if err := os.Remove(w.file(countersignFile)); err != nil {
		t.Fatal(err)
	}
	fresh := w.open().id
	keys := w.trust().Controllers()
	if old == fresh || len(keys) != 2 || keys[0].ID != old || keys[1].ID != fresh {
		t.Errorf("keys %v, want %s and %s", keys, old, fresh)
	}
}

// Versions of before the present key are signed at the start; one that cannot
// be is left out.
func TestUnsigned(t *testing.T) {
	w := newSignerWorld(t)
	s := w.open()
	v, _, err := w.store.CreateVersion(t.Context(), store.Version{Model: "m", Digest: "sha256:1", CreatedBy: "x"})
	if err == nil {
		err = w.store.AddSignature(t.Context(), "x", store.Signature{Model: "m", Digest: v.Digest, Manifest: "a", Signer: "another"})
	}
	if err != nil {
		t.Fatal(err)
	}
	for want := 1; want >= 0; want-- {
		unsigned, err := w.store.Unsigned(t.Context(), s.id)
		if err != nil || len(unsigned) != want {
			t.Errorf("%v, %v, want %d", unsigned, err, want)
		}
		if err := w.store.AddSignature(t.Context(), "controller", store.Signature{Model: "m", Digest: v.Digest, Manifest: "b", Signer: s.id}); err != nil {
			t.Fatal(err)
		}
	}
}

// Only the document after the newest goes into the store.
func TestTrustStale(t *testing.T) {
	w := newSignerWorld(t)
	w.open()
	root, err := pki.ReadKey(w.file(rootFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		version uint64
		want    error
	}{{1, store.ErrStale}, {3, store.ErrStale}, {2, nil}, {2, store.ErrStale}} {
		d := w.trust().Document()
		d.Version = test.version
		if err := w.store.AddTrust(t.Context(), "x", signed(t, d, root)); !errors.Is(err, test.want) {
			t.Errorf("document %d: %v, want %v", test.version, err, test.want)
		}
	}
}

func signed(t *testing.T, d *dunlinv1.TrustDocument, key crypto.Signer) *dunlinv1.SignedTrust {
	t.Helper()
	s, err := signing.NewTrust(d)
	if err == nil {
		err = signing.SignTrust(s, key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Nobody takes the place of the controller's signature, or a publisher's name,
// with one that is not theirs.
func TestForeignSignature(t *testing.T) {
	w := newSignerWorld(t)
	s := w.open()
	root, err := pki.ReadKey(w.file(rootFile))
	must(t, err)
	publisher, err := pki.NewKey()
	must(t, err)
	k, err := signing.NewTrustKey(publisher.Public(), nil, "ada")
	must(t, err)
	d := w.trust().Document()
	d.Version, d.PublisherKeys = 2, append(d.PublisherKeys, k)
	must(t, w.store.AddTrust(t.Context(), "x", signed(t, d, root)))
	stranger, err := pki.NewKey()
	must(t, err)
	m := &models.Manifest{Digest: digest.FromString("m"), Files: []models.File{{Path: "model.onnx", Digest: digest.FromString("f"), Size: 1}}}
	add := func(by crypto.Signer, names string) error {
		t.Helper()
		raw, err := signing.SignBundle(signing.Signer{Key: by}, "m", 1, m)
		must(t, err)
		parsed, err := signing.Parse(raw)
		must(t, err)
		if names != "" {
			parsed, err = signing.Parse(bytes.Replace(raw, []byte(parsed.Signer()), []byte(names), 1))
			must(t, err)
		}
		return s.AddSignature(t.Context(), registry.NewSignature{
			Signature: registry.Signature{Manifest: digest.FromString(names)}, Model: "m", Bundle: m.Digest, By: "user:op", Parsed: parsed,
		})
	}
	for _, names := range []string{s.id, k.KeyId, w.trust().Publishers()[0].Hint()} {
		if err := add(stranger, names); !errors.Is(err, registry.ErrInvalid) {
			t.Errorf("a signature that names %s: %v", names, err)
		}
	}
	must(t, add(publisher, ""))
	must(t, add(stranger, "")) // its key may come into the document
	if raw, err := s.Countersign(t.Context(), "m", 1, m); err != nil || raw == nil {
		t.Errorf("the controller's own: %q, %v", raw, err)
	}
}
