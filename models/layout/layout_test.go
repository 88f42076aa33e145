package layout

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

// fill writes a bundle of a large file and a signature to w.
func fill(t *testing.T, w Writer) (bundle digest.Digest, file []byte) {
	t.Helper()
	file = bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	blob := func(raw []byte) ocispec.Descriptor {
		t.Helper()
		d := ocispec.Descriptor{Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		if err := w.Put(t.Context(), d.Digest, d.Size, FromBytes(raw)); err != nil {
			t.Fatal(err)
		}
		return d
	}
	config, index, data := blob([]byte(`{"c":1}`)), blob([]byte("index")), blob(file)
	raw := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","artifactType":"` + models.ArtifactType + `",
"config":{"mediaType":"` + models.MediaTypeConfig + `","digest":"` + config.Digest.String() + `","size":7},
"layers":[{"mediaType":"` + models.MediaTypeChunkIndex + `","digest":"` + index.Digest.String() + `","size":5},
{"mediaType":"` + models.MediaTypeFile + `","digest":"` + data.Digest.String() + `","size":1048576,"annotations":{"org.opencontainers.image.title":"m.onnx"}}]}`)
	manifest := blob(raw)
	manifest.MediaType, manifest.ArtifactType = ocispec.MediaTypeImageManifest, models.ArtifactType
	manifest.Annotations = map[string]string{ocispec.AnnotationRefName: "m:3"}
	signature := []byte("signature")
	blob(signature)
	blob(ocispec.DescriptorEmptyJSON.Data)
	signed, err := signing.NewManifest(manifest.Digest, manifest.Size, signature)
	if err != nil {
		t.Fatal(err)
	}
	referrer := blob(signed)
	referrer.MediaType, referrer.ArtifactType = ocispec.MediaTypeImageManifest, signing.MediaType
	if err := w.Commit([]ocispec.Descriptor{manifest, referrer}); err != nil {
		t.Fatal(err)
	}
	return manifest.Digest, file
}

func folder(t *testing.T) (*Folder, string) {
	t.Helper()
	dir := t.TempDir()
	f, err := CreateFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f, dir
}

// TestRoundTrip writes both forms and reads them, with this package and, for
// what refers to what, with another one.
func TestRoundTrip(t *testing.T) {
	f, dir := folder(t)
	bundle, file := fill(t, f)
	tarred := filepath.Join(t.TempDir(), "x.tar")
	w, err := CreateTar(tarred)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, tarred} {
		l, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		bundles, trust, err := l.Contents()
		if err != nil || len(bundles) != 1 || len(trust) != 0 {
			t.Fatalf("%s: %d bundles, %d trust documents, %v", path, len(bundles), len(trust), err)
		}
		b := bundles[0]
		if b.Ref() != "m:3" || b.Manifest.Digest != bundle || len(b.Signatures) != 1 || string(b.Signatures[0]) != "signature" || len(b.Blobs) != 6 {
			t.Errorf("%s: %+v", path, b)
		}
		blob, size, err := l.Open(b.Manifest.Files[0].Digest)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(blob); err != nil || size != 1<<20 || !bytes.Equal(got, file) {
			t.Errorf("%s: %d bytes of %d, %v", path, len(got), size, err)
		}
		if _, _, err := l.Open(digest.FromString("nothing")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: what is not there: %v", path, err)
		}
	}

	fromFolder, err := oci.NewFromFS(t.Context(), os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	fromTar, err := oci.NewFromTar(t.Context(), tarred)
	if err != nil {
		t.Fatal(err)
	}
	for name, store := range map[string]content.ReadOnlyGraphStorage{"folder": fromFolder, "tar": fromTar} {
		resolver := store.(content.Resolver)
		d, err := resolver.Resolve(t.Context(), "m:3")
		if err != nil || d.Digest != bundle {
			t.Fatalf("%s: resolve: %v, %v", name, d, err)
		}
		referrers, err := store.Predecessors(t.Context(), d)
		if err != nil || len(referrers) != 1 {
			t.Errorf("%s: referrers: %v, %v", name, referrers, err)
		}
	}
}

// TestPutGoesOn cuts the copying of a blob, and gives back a part that differs.
func TestPutGoesOn(t *testing.T) {
	f, dir := folder(t)
	raw := bytes.Repeat([]byte("abcdefgh"), 3<<20) // more than two steps
	d := digest.FromBytes(raw)
	var offsets []int64
	from := func(raw []byte) From {
		return func(_ context.Context, offset int64) (io.ReadCloser, error) {
			offsets = append(offsets, offset)
			return io.NopCloser(bytes.NewReader(raw[offset:])), nil
		}
	}
	put := func(from From) error { return f.Put(t.Context(), d, int64(len(raw)), from) }
	broken := func(_ context.Context, offset int64) (io.ReadCloser, error) {
		offsets = append(offsets, offset)
		return io.NopCloser(io.MultiReader(bytes.NewReader(raw[offset:10<<20]), readerFunc(func([]byte) (int, error) { return 0, errors.New("pulled out") }))), nil
	}
	if err := put(broken); err == nil || !strings.Contains(err.Error(), "pulled out") {
		t.Fatalf("cut short: %v", err)
	}
	if err := put(from(raw)); err != nil {
		t.Fatal(err)
	}
	if len(offsets) != 2 || offsets[0] != 0 || offsets[1] != 10<<20 {
		t.Errorf("asked from %v on, want 0 and %d", offsets, 10<<20)
	}
	if err := put(from(nil)); err != nil || len(offsets) != 2 {
		t.Errorf("what is there is asked for again: %v, %v", offsets, err)
	}

	// Of one that does not have its digest nothing stays.
	other := digest.FromString("other")
	err := f.Put(t.Context(), other, 5, FromBytes([]byte("wrong")))
	if altered, ok := errors.AsType[*AlteredError](err); !ok || altered.Digest != other {
		t.Errorf("wrong bytes: %v", err)
	}
	if err := f.Put(t.Context(), other, 5, FromBytes([]byte("other"))); err != nil {
		t.Errorf("right bytes after wrong ones: %v", err)
	}
	if err := f.Put(t.Context(), digest.FromString("longer"), 6, FromBytes([]byte("long"))); err == nil {
		t.Error("a blob that is too short is taken")
	}
	if _, err := os.Stat(filepath.Join(dir, "blobs", "sha256", d.Encoded())); err != nil {
		t.Error(err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestAlteredLayouts changes one byte of each document.
func TestAlteredLayouts(t *testing.T) {
	f, dir := folder(t)
	fill(t, f)
	blobs := filepath.Join(dir, "blobs", "sha256")
	entries, err := os.ReadDir(blobs)
	if err != nil {
		t.Fatal(err)
	}
	changed := 0
	for _, e := range entries {
		path := filepath.Join(blobs, e.Name())
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(raw, []byte("schemaVersion")) && string(raw) != "signature" {
			continue // whoever copies it verifies it
		}
		altered := bytes.Clone(raw)
		altered[len(altered)/2] ^= 1
		if err := os.WriteFile(path, altered, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := l.Contents(); err == nil || !strings.Contains(err.Error(), "was altered") {
			t.Errorf("%s altered: %v", e.Name(), err)
		} else if _, ok := errors.AsType[*AlteredError](err); !ok {
			t.Errorf("%s altered: %v", e.Name(), err)
		}
		changed++
		l.Close()
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if changed != 3 {
		t.Errorf("%d documents were changed, want 3", changed)
	}
}

// TestKeep removes a bundle and what belongs to it.
func TestKeep(t *testing.T) {
	f, dir := folder(t)
	fill(t, f)
	if err := f.Keep(func(ocispec.Descriptor) bool { return false }, func(digest.Digest) bool { return false }); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	if err != nil || len(left) != 0 || len(f.Index().Manifests) != 0 {
		t.Errorf("%d blobs and %d manifests are left, %v", len(left), len(f.Index().Manifests), err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte(`{"imageLayoutVersion":"1.0.0"}`), []byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:x","annotations":{"org.opencontainers.image.ref.name":"m:1"}}]}`))
	f.Fuzz(func(t *testing.T, kind, index []byte) {
		dir := t.TempDir()
		for name, raw := range map[string][]byte{ocispec.ImageLayoutFile: kind, ocispec.ImageIndexFile: index} {
			if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		l, err := Open(dir)
		if err != nil {
			return
		}
		defer l.Close()
		_, _, _ = l.Contents() // whatever it says, it does not fail otherwise
	})
}

func FuzzScan(f *testing.F) {
	f.Add([]byte("no tar file"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := filepath.Join(t.TempDir(), "x.tar")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := Open(path); err == nil {
			_, _, _ = l.Contents()
			l.Close()
		}
	})
}
