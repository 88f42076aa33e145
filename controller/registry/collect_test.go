package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// age makes all files of the registry that take says yes to two hours old.
func (f *fixture) age(take func(path string) bool) {
	f.t.Helper()
	old := time.Now().Add(-2 * time.Hour)
	err := filepath.WalkDir(filepath.Join(f.root, filepath.FromSlash(storageDir)), func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || take != nil && !take(p) {
			return err
		}
		return os.Chtimes(p, old, old)
	})
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) collect() Collected {
	f.t.Helper()
	c, err := f.registry.Collect(context.Background(), time.Now().Add(-time.Hour))
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

func (f *fixture) has(path string) bool {
	f.t.Helper()
	switch res := f.do("GET", path, nil); res.status {
	case http.StatusOK:
		return true
	case http.StatusNotFound:
		return false
	default:
		f.t.Fatalf("%s: %d %s", path, res.status, res.body)
		return false
	}
}

// whole checks that a version can be read with all that it names.
func (f *fixture) whole(model, version string) {
	f.t.Helper()
	res := f.do("GET", "/v2/"+model+"/manifests/"+version, nil)
	if res.status != http.StatusOK {
		f.t.Errorf("%s:%s: %d %s", model, version, res.status, res.body)
		return
	}
	blobs, err := blobsOf(res.body)
	if err != nil {
		f.t.Error(err)
	}
	for _, d := range blobs {
		if res := f.do("GET", "/v2/"+model+"/blobs/"+d.String(), nil); res.status != http.StatusOK || digest.FromBytes(res.body) != d {
			f.t.Errorf("%s:%s: blob %s: %d", model, version, d, res.status)
		}
	}
	signed, err := f.signatures.ListSignatures(context.Background(), model, digest.FromBytes(f.do("GET", "/v2/"+model+"/manifests/"+version, nil).body).String())
	if err != nil || len(signed) == 0 {
		f.t.Errorf("%s:%s has no signature: %v", model, version, err)
	}
	for _, s := range signed {
		if !f.has("/v2/" + model + "/manifests/" + s.Manifest.String()) {
			f.t.Errorf("signature of %s:%s is gone", model, version)
		}
	}
}

// TestCollect deletes what no version refers to once it is old, and nothing
// else.
func TestCollect(t *testing.T) {
	f := start(t)
	if c := f.collect(); c != (Collected{}) {
		t.Errorf("of nothing: %+v", c)
	}
	f.do("PUT", "/v2/digits/manifests/latest", f.plain("digits", read1(t, digits("v1.onnx"))), ociManifest)
	f.do("PUT", "/v2/digits/manifests/2", f.plain("digits", read1(t, digits("v2.onnx"))), ociManifest)
	f.do("PUT", "/v2/other/manifests/1", f.plain("other", read1(t, digits("v1.onnx"))), ociManifest)
	orphan := f.putBlob("digits", []byte("nobody wants this"))
	// Pushed by digest, and never made a version.
	lone := f.plain("digits", []byte("not even a model"))
	loneAt := "/v2/digits/manifests/" + digest.FromBytes(lone).String()
	if res := f.do("PUT", loneAt, lone, ociManifest); res.status != http.StatusCreated {
		t.Fatalf("push by digest: %d %s", res.status, res.body)
	}
	loneBlob := "/v2/digits/blobs/" + digest.FromString("not even a model").String()

	if c := f.collect(); c != (Collected{}) {
		t.Errorf("what is young: %+v", c)
	}
	// An old blob stays while a young manifest names it.
	f.age(func(p string) bool { return !strings.Contains(p, digest.FromBytes(lone).Encoded()) })
	if c := f.collect(); c != (Collected{Links: 1, Blobs: 1, Bytes: orphan.Size}) {
		t.Errorf("the orphan alone: %+v", c)
	}
	if !f.has(loneAt) || !f.has(loneBlob) || f.has("/v2/digits/blobs/"+orphan.Digest.String()) {
		t.Error("something else than the orphan went")
	}
	f.age(nil)
	if c := f.collect(); c.Manifests != 1 || c.Links != 1 || c.Blobs != 2 {
		t.Errorf("the manifest and its layer: %+v", c)
	}
	if f.has(loneAt) || f.has(loneBlob) {
		t.Error("the manifest of no version is still there")
	}
	for range 2 {
		f.whole("digits", "1")
		f.whole("digits", "latest")
		f.whole("digits", "2")
		f.whole("other", "1")
		if c := f.collect(); c != (Collected{}) {
			t.Errorf("again: %+v", c)
		}
		f.open() // what is left is a registry
	}

	// A version that is let go stays for the grace time, and what others have
	// too stays.
	bundle := digest.Digest(f.versions.digests["digits"][0])
	source := digest.Digest(f.versions.sources[bundle.String()])
	f.versions.digests["digits"][0] = ""
	for _, d := range []digest.Digest{bundle, source} {
		if err := f.registry.LetGo(t.Context(), "digits", d); err != nil {
			t.Fatal(err)
		}
		if err := f.registry.Untag(t.Context(), "digits", d); err != nil {
			t.Fatal(err)
		}
	}
	if tags := string(f.do("GET", "/v2/digits/tags/list", nil).body); strings.TrimSpace(tags) != `{"name":"digits","tags":["2"]}` {
		t.Errorf("tags: %s", tags)
	}
	signature := f.signatures.kept[slices.IndexFunc(f.signatures.kept, func(s NewSignature) bool { return s.Model == "digits" && s.Bundle == bundle })]
	f.age(func(p string) bool { return strings.Contains(p, signature.Manifest.Encoded()) })
	if c := f.collect(); c.Manifests != 1 || !f.has("/v2/digits/manifests/"+bundle.String()) {
		t.Errorf("within the grace time: %+v", c)
	}
	if kept, err := f.signatures.ListSignatures(t.Context(), "digits", bundle.String()); err != nil || len(kept) != 0 {
		t.Errorf("a signature that is gone is still listed: %v, %v", kept, err)
	}
	f.age(nil)
	if c := f.collect(); c.Manifests != 2 || c.Links == 0 {
		t.Errorf("after the grace time: %+v", c)
	}
	f.whole("digits", "2")
	f.whole("other", "1")

	// Where what is kept cannot be read, nothing goes.
	file := f.registry.blobPath(digest.Digest(f.versions.digests["other"][0]))
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	f.putBlob("digits", []byte("nobody wants this"))
	f.age(nil)
	if c, err := f.registry.Collect(t.Context(), time.Now()); !errors.Is(err, fs.ErrNotExist) || c != (Collected{}) {
		t.Errorf("got %+v, %v", c, err)
	}
}

// TestCollectWhilePushing pushes what is old garbage already, as clients do
// that look for it first: what they were told is there must be there when they
// name it, while the collector runs without a pause.
func TestCollectWhilePushing(t *testing.T) {
	f := start(t)
	const pushers, rounds, contents = 3, 15, 3
	var pushing, collecting sync.WaitGroup
	var deleted int
	stop := make(chan struct{})
	collecting.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := f.registry.Collect(context.Background(), time.Now().Add(-time.Hour))
			if err != nil {
				t.Error(err)
			}
			deleted += c.Blobs
		}
	})
	var found atomic.Int64
	// Models have blobs in common, so that content stays where a link goes.
	push := func(model string, content []byte) {
		layer := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(content), Size: int64(len(content))}
		m := f.encode(ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.example.onnx",
			Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{layer},
		})
		at := "/v2/" + model + "/manifests/" + digest.FromBytes(m).String()
		if f.do("HEAD", at, nil).status == http.StatusOK {
			found.Add(1)
		} else {
			for _, b := range [][]byte{[]byte("{}"), content} {
				if f.do("HEAD", "/v2/"+model+"/blobs/"+digest.FromBytes(b).String(), nil).status == http.StatusOK {
					found.Add(1)
				} else {
					f.putBlob(model, b)
				}
			}
			if res := f.do("PUT", at, m, ociManifest); res.status != http.StatusCreated {
				t.Errorf("%s: %d %s", model, res.status, res.body)
			}
		}
		for _, path := range []string{at, "/v2/" + model + "/blobs/" + layer.Digest.String(), "/v2/" + model + "/blobs/" + ocispec.DescriptorEmptyJSON.Digest.String()} {
			if !f.has(path) {
				t.Errorf("%s is gone", path)
			}
		}
		// From here on it is old garbage, and nobody else pushes to the model.
		old := time.Now().Add(-2 * time.Hour)
		for _, d := range []digest.Digest{digest.FromBytes(m), layer.Digest, ocispec.DescriptorEmptyJSON.Digest} {
			for _, link := range []string{layerLink(model, d), manifestLink(model, d), blobFile(d)} {
				_ = os.Chtimes(filepath.Join(f.root, filepath.FromSlash(link)), old, old) // it may be gone
			}
		}
	}
	for i := range pushers {
		pushing.Go(func() {
			for round := range rounds {
				push(fmt.Sprint("model", i), fmt.Append(nil, "content ", round%contents))
			}
		})
	}
	pushing.Wait()
	close(stop)
	collecting.Wait()
	t.Logf("%d times something was found, %d times content was deleted", found.Load(), deleted)
}

// hooked calls removing before a signature is removed.
type hooked struct {
	Signatures
	removing func()
}

func (h hooked) RemoveSignature(ctx context.Context, model string, manifest digest.Digest) error {
	h.removing()
	return h.Signatures.RemoveSignature(ctx, model, manifest)
}

// TestCollectNewModel pushes what is garbage to a model that is not there yet
// when the collector begins.
func TestCollectNewModel(t *testing.T) {
	f := start(t)
	content := []byte("that of two models")
	lone := f.plain("old", content)
	if res := f.do("PUT", "/v2/old/manifests/"+digest.FromBytes(lone).String(), lone, ociManifest); res.status != http.StatusCreated {
		t.Fatalf("push by digest: %d %s", res.status, res.body)
	}
	f.age(nil)
	f.registry.signatures = hooked{f.signatures, sync.OnceFunc(func() { f.putBlob("new", content) })}
	f.collect()
	if !f.has("/v2/new/blobs/" + digest.FromBytes(content).String()) {
		t.Error("what the new model has is gone")
	}
	if f.has("/v2/old/blobs/" + digest.FromBytes(content).String()) {
		t.Error("nothing was collected")
	}
}

// TestClaims: nobody holds what is claimed, and nothing that is held is claimed.
func TestClaims(t *testing.T) {
	var c claims
	release, err := c.hold(t.Context(), "a", "b", "a")
	if err != nil {
		t.Fatal(err)
	}
	if c.claim("a") != nil || c.claim("b") != nil {
		t.Error("what is held was claimed")
	}
	end := c.claim("c")
	if end == nil || c.claim("c") != nil {
		t.Error("a claim counts once")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.hold(ctx, "c"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	waited := make(chan error)
	go func() {
		release, err := c.hold(context.Background(), "a", "c")
		if err == nil {
			release()
		}
		waited <- err
	}()
	end()
	if err := <-waited; err != nil {
		t.Error(err)
	}
	release()
	release()
	if end := c.claim("a"); end == nil {
		t.Error("what was released is still held")
	} else {
		end()
	}
	if len(c.held) != 0 || len(c.claimed) != 0 {
		t.Errorf("left are %v, %v", c.held, c.claimed)
	}
}
