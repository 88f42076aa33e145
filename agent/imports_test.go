package agent

import (
	"bytes"
	"crypto"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/layout"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// stick writes versions of model "m", signed by key, and trust documents.
func stick(t *testing.T, key crypto.Signer, trust []*dunlinv1.SignedTrust, versions ...int64) (dir string, bundles []digest.Digest) {
	t.Helper()
	dir = t.TempDir()
	w, err := layout.CreateFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(raw []byte) ocispec.Descriptor {
		t.Helper()
		d := ocispec.Descriptor{Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		if err := w.Put(t.Context(), d.Digest, d.Size, layout.FromBytes(raw)); err != nil {
			t.Fatal(err)
		}
		return d
	}
	var all []ocispec.Descriptor
	for _, version := range versions {
		config, index, file := blob([]byte("{}")), blob([]byte("index")), blob(fmt.Appendf(nil, "weights of version %d", version))
		raw := fmt.Appendf(nil, `{"schemaVersion":2,"artifactType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"mediaType":%q,"digest":%q,"size":%d},
{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.title":"m.onnx"}}]}`, models.ArtifactType, models.MediaTypeConfig, config.Digest, config.Size,
			models.MediaTypeChunkIndex, index.Digest, index.Size, models.MediaTypeFile, file.Digest, file.Size)
		m, err := models.ParseManifest(raw)
		if err != nil {
			t.Fatal(err)
		}
		signature, err := signing.SignBundle(signing.Signer{Key: key}, "m", version, m)
		if err != nil {
			t.Fatal(err)
		}
		blob(signature)
		manifest, err := signing.NewManifest(m.Digest, int64(len(raw)), signature)
		if err != nil {
			t.Fatal(err)
		}
		bundle, referrer := blob(raw), blob(manifest)
		bundle.ArtifactType, bundle.Annotations = models.ArtifactType, map[string]string{ocispec.AnnotationRefName: fmt.Sprint("m:", version)}
		referrer.ArtifactType = signing.MediaType
		all = append(all, bundle, referrer)
		bundles = append(bundles, m.Digest)
	}
	if trust != nil {
		blobs, manifest, err := layout.TrustArtifact(trust)
		if err != nil {
			t.Fatal(err)
		}
		for _, raw := range blobs {
			blob(raw)
		}
		all = append(all, manifest)
	}
	if err := w.Commit(all); err != nil {
		t.Fatal(err)
	}
	return dir, bundles
}

// trusting makes a state that trusts what a chain leads to.
func trusting(t *testing.T, chain ...*dunlinv1.SignedTrust) *state.Store {
	t.Helper()
	s, err := state.Open(t.Context(), filepath.Join(t.TempDir(), stateFile), state.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if len(chain) == 0 {
		return s
	}
	trust, err := signing.Advance(nil, chain)
	if err == nil {
		err = s.SetTrust(t.Context(), trust)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestImportVerifies: what a stick brings counts by the trust document that the
// device has, or by a later one that the stick brings; a refusal takes nothing.
func TestImportVerifies(t *testing.T) {
	key, first := testTrust(t)
	second := nextTrust(t, key, first, func(d *dunlinv1.TrustDocument) { d.ModelFloors = []*dunlinv1.ModelFloor{{Model: "m", Version: 2}} })
	third := nextTrust(t, key, second, nil)
	expired := nextTrust(t, key, first, func(d *dunlinv1.TrustDocument) { d.ExpiresAt.Seconds = d.IssuedAt.Seconds + 1 })
	stranger, theirs := testTrust(t)
	chain := func(all ...*dunlinv1.SignedTrust) []*dunlinv1.SignedTrust { return all }
	for name, c := range map[string]struct {
		device, stick []*dunlinv1.SignedTrust
		key           crypto.Signer
		version       int64
		refused       string // "": it is taken
	}{
		"the same trust":               {chain(first), chain(first), key, 1, ""},
		"no trust on the stick":        {chain(first), nil, key, 1, ""},
		"older trust on the stick":     {chain(first, second, third), chain(first, second), key, 2, ""},
		"newer trust on the stick":     {chain(first), chain(first, second, third), key, 2, ""},
		"below the device's floor":     {chain(first, second), chain(first), key, 1, "below"},
		"below the stick's floor":      {chain(first), chain(first, second), key, 1, "below"},
		"trust with a gap":             {chain(first), chain(third), key, 2, "missing before it"},
		"trust of somebody else":       {chain(first), chain(theirs), stranger, 1, "another one than that of this number"},
		"signed by somebody else":      {chain(first), chain(first), stranger, 1, "signed by no controller's key"},
		"trust that has expired":       {chain(first, expired), chain(first), key, 1, "expired"},
		"a device that has not joined": {nil, chain(first), key, 1, "has joined no controller"},
	} {
		t.Run(name, func(t *testing.T) {
			data := t.TempDir()
			dir, bundles := stick(t, c.key, c.stick, c.version)
			taken, err := importFrom(t.Context(), data, dir, trusting(t, c.device...), time.Now())
			source := (&imports{dir: filepath.Join(data, importsFolder)}).source(bundles[0])
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("error %v, want one that says %q", err, c.refused)
				}
				if source != nil {
					t.Error("it is there all the same")
				}
				return
			}
			if err != nil || len(taken) != 1 || taken[0].Version != c.version {
				t.Fatalf("taken %v, %v", taken, err)
			}
			if source == nil {
				t.Fatal("it is not there")
			}
			body, err := source.Get(t.Context(), reconcile.Ref{Model: "m", Digest: taken[0].Manifest.Files[0].Digest}, 8, 0)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(body)
			if err != nil || string(got) != fmt.Sprintf("of version %d", c.version) || body.Offset != 8 {
				t.Errorf("read %q from %d on, %v", got, body.Offset, err)
			}
			if err := body.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestImportIsAllOrNothing: where one version is refused, or one byte is wrong,
// the others are not taken; a second import adds to the first.
func TestImportIsAllOrNothing(t *testing.T) {
	key, trust := testTrust(t)
	s := trusting(t, trust)
	data := t.TempDir()
	take := func(dir string) error {
		_, err := importFrom(t.Context(), data, dir, s, time.Now())
		return err
	}
	all := func() *imports { return &imports{dir: filepath.Join(data, importsFolder)} }
	dir, bundles := stick(t, key, nil, 1, 2)
	paths, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		altered := bytes.Clone(raw)
		altered[len(raw)/2] ^= 1
		if err := os.WriteFile(path, altered, 0o600); err != nil {
			t.Fatal(err)
		}
		data = t.TempDir() // what a try has brought in right stays for the next one
		if err := take(dir); err == nil || !strings.Contains(err.Error(), "damaged or was altered") {
			t.Errorf("%s altered: %v", raw, err)
		}
		for _, d := range bundles {
			if all().source(d) != nil {
				t.Errorf("%s altered: something was taken", raw)
			}
		}
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := take(dir); err != nil {
		t.Fatal(err)
	}
	more, third := stick(t, key, nil, 3)
	if err := take(more); err != nil {
		t.Fatal(err)
	}
	for _, d := range append(bundles, third...) {
		if all().source(d) == nil {
			t.Errorf("%s is not there", d)
		}
	}
	if err := take(t.TempDir()); err == nil {
		t.Error("an empty folder is taken for a layout")
	}
}

// TestFailedImportByRoot: what root has begun to import is the agent's, also where
// that failed.
func TestFailedImportByRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	key, trust := testTrust(t)
	data := t.TempDir()
	const agent = 65534
	if err := os.Chown(data, agent, agent); err != nil {
		t.Fatal(err)
	}
	dir, _ := stick(t, key, nil, 1)
	weights := filepath.Join(dir, "blobs", "sha256", digest.FromString("weights of version 1").Encoded())
	if err := os.WriteFile(weights, []byte("weights of version 2"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := importFrom(t.Context(), data, dir, trusting(t, trust), time.Now()); err == nil {
		t.Fatal("it was taken")
	}
	if err := filepath.WalkDir(filepath.Join(data, importsFolder), func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err == nil && info.Sys().(*syscall.Stat_t).Uid != agent {
			t.Errorf("%s is not the agent's", path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestPruneKeepsWhatComesMeanwhile has an import end after the agent has looked:
// only what is installed is removed.
func TestPruneKeepsWhatComesMeanwhile(t *testing.T) {
	key, trust := testTrust(t)
	store, data := trusting(t, trust), t.TempDir()
	take := func(version int64) digest.Digest {
		dir, bundles := stick(t, key, nil, version)
		if _, err := importFrom(t.Context(), data, dir, store, time.Now()); err != nil {
			t.Fatal(err)
		}
		return bundles[0]
	}
	a := &agent{imports: &imports{dir: filepath.Join(data, importsFolder)}}
	a.cfg.Data = data
	first := take(1)
	seen, err := layout.Open(a.imports.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer seen.Close()
	second := take(2)
	if err := os.MkdirAll(filepath.Join(data, bundlesFolder, first.Encoded()), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := a.pruneImports(seen); err != nil {
		t.Fatal(err)
	}
	if a.imports.source(first) != nil || a.imports.source(second) == nil {
		t.Errorf("of the installed one there is %v, of the other one %v", a.imports.source(first), a.imports.source(second))
	}
}
