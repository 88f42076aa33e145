package reconcile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// testBundle is a bundle whose files are made of the given chunks.
type testBundle struct {
	digest digest.Digest
	blobs  map[digest.Digest][]byte // everything, the manifest as well
	files  map[string][]byte
	size   int64
}

// block gives random bytes that make one chunk.
func block(rng *rand.Rand) []byte {
	b := make([]byte, models.MinChunk+rng.IntN(32<<10))
	whole := b[:len(b)/8*8]
	for i := 0; i < len(whole); i += 8 {
		binary.LittleEndian.PutUint64(whole[i:], rng.Uint64())
	}
	for i := len(whole); i < len(b); i++ {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func blocks(rng *rand.Rand, n int) [][]byte {
	all := make([][]byte, n)
	for i := range all {
		all[i] = block(rng)
	}
	return all
}

func pack(t testing.TB, files map[string][][]byte) *testBundle {
	t.Helper()
	b := &testBundle{blobs: map[digest.Digest][]byte{}, files: map[string][]byte{}}
	put := func(mediaType string, raw []byte) ocispec.Descriptor {
		d := digest.FromBytes(raw)
		b.blobs[d] = raw
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: models.ArtifactType}
	index := &dunlinv1.ChunkIndex{}
	entry := sortedKeys(files)[0]
	for _, name := range sortedKeys(files) {
		f := &dunlinv1.IndexedFile{Path: name}
		var whole []byte
		for _, c := range files[name] {
			sum := sha256.Sum256(c)
			f.Chunks = append(f.Chunks, &dunlinv1.Chunk{Offset: uint64(len(whole)), Length: uint32(len(c)), Sha256: sum[:]})
			whole = append(whole, c...)
		}
		sum := sha256.Sum256(whole)
		f.SizeBytes, f.Sha256 = uint64(len(whole)), sum[:]
		index.Files = append(index.Files, f)
		layer := put(models.MediaTypeFile, whole)
		layer.Annotations = map[string]string{ocispec.AnnotationTitle: name}
		m.Layers = append(m.Layers, layer)
		b.files[name] = whole
		b.size += int64(len(whole))
	}
	raw, err := proto.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	m.Layers = append(m.Layers, put(models.MediaTypeChunkIndex, raw))
	raw, err = json.Marshal(models.Config{
		Format: 1, Entry: entry, Opset: 17, IRVersion: 8, Operators: []string{"Add"},
		Inputs:  []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{1}}},
		Outputs: []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{1}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	m.Config = put(models.MediaTypeConfig, raw)
	if raw, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	b.digest = put(ocispec.MediaTypeImageManifest, raw).Digest
	return b
}

func (b *testBundle) blobOf(name string) digest.Digest { return digest.FromBytes(b.files[name]) }

// span is a range of bytes.
type span struct{ start, end int64 }

// testRegistry serves bundles over HTTP, counts, and misbehaves on demand.
type testRegistry struct {
	*httptest.Server
	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	asked    map[digest.Digest][]span // of blobs, by what was asked for
	served   int64                    // bytes of bodies
	noRanges bool
	refuses  atomic.Bool
	// fault sees a copy of the bytes before they are written, one call at a
	// time, and may change them.
	fault func(d digest.Digest, offset int64, p []byte) verdict
}

type verdict int

const (
	pass    verdict = iota
	cut             // cuts the connection
	stalled         // sends nothing more
)

func serveBundles(t testing.TB, bundles ...*testBundle) *testRegistry {
	r := &testRegistry{blobs: map[digest.Digest][]byte{}, asked: map[digest.Digest][]span{}}
	for _, b := range bundles {
		maps.Copy(r.blobs, b.blobs)
	}
	r.Server = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.Close)
	return r
}

func (r *testRegistry) registry() Registry {
	return Registry{URL: r.URL, Client: r.Client()}
}

func (r *testRegistry) serve(w http.ResponseWriter, req *http.Request) {
	if r.refuses.Load() {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	d := digest.Digest(path.Base(req.URL.Path))
	r.mu.Lock()
	raw, ok := r.blobs[d]
	start, end := int64(0), int64(len(raw))
	if s := req.Header.Get("Range"); s != "" && !r.noRanges {
		if n, err := fmt.Sscanf(s, "bytes=%d-%d", &start, &end); n == 2 && err == nil {
			end++
		}
	}
	r.asked[d] = append(r.asked[d], span{start, end})
	ranges := !r.noRanges
	r.mu.Unlock()
	switch {
	case !ok:
		w.WriteHeader(http.StatusNotFound)
		return
	case start >= end || end > int64(len(raw)):
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	case req.Header.Get("Range") != "" && ranges:
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, end-1, len(raw)))
		w.WriteHeader(http.StatusPartialContent)
	}
	const step = 16 << 10
	for start < end {
		p := bytes.Clone(raw[start:min(start+step, end)])
		switch r.judge(d, start, p) {
		case cut:
			panic(http.ErrAbortHandler)
		case stalled:
			<-req.Context().Done()
			return
		}
		n, err := w.Write(p)
		if err != nil {
			return
		}
		w.(http.Flusher).Flush()
		r.mu.Lock()
		r.served += int64(n)
		r.mu.Unlock()
		start += int64(n)
	}
}

func (r *testRegistry) judge(d digest.Digest, offset int64, p []byte) verdict {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fault == nil {
		return pass
	}
	return r.fault(d, offset, p)
}

// take gives what was asked of a blob since the last call.
func (r *testRegistry) take(d digest.Digest) []span {
	r.mu.Lock()
	defer r.mu.Unlock()
	spans := r.asked[d]
	delete(r.asked, d)
	return spans
}

func (r *testRegistry) servedBytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.served
}

func (r *testRegistry) setFault(f func(d digest.Digest, offset int64, p []byte) verdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = f
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A transfer may take any time while bytes arrive, and none without.
func TestStallIsByProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in, out := io.Pipe()
		r := newRemote(Registry{URL: "http://registry", Client: &http.Client{Transport: transport(func(req *http.Request) (*http.Response, error) {
			context.AfterFunc(req.Context(), func() { in.CloseWithError(req.Context().Err()) })
			return &http.Response{StatusCode: http.StatusOK, Body: in}, nil
		})}}, 30*time.Second)
		go func() {
			for range 100 {
				time.Sleep(29 * time.Second)
				_, _ = out.Write([]byte{1})
			}
		}()
		b, err := r.Get(t.Context(), Ref{Model: "m"}, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		got, err := io.ReadAll(b)
		if len(got) != 100 || !errors.Is(err, errStalled) {
			t.Errorf("read %d bytes, error %v; want 100 and a stall", len(got), err)
		}
	})
}

func TestStatusErrorsSayWhat(t *testing.T) {
	reg := serveBundles(t)
	r := newRemote(reg.registry(), time.Second)
	_, err := r.Get(t.Context(), Ref{Model: "m", Digest: "sha256:00"}, 0, 0)
	if err == nil || !strings.Contains(err.Error(), "404") || !strings.Contains(err.Error(), "does not have it") {
		t.Errorf("unknown blob: %v", err)
	}
	reg.refuses.Store(true)
	_, err = r.Get(t.Context(), Ref{Model: "m", Digest: "sha256:00"}, 0, 0)
	if err == nil || !strings.Contains(err.Error(), "refuses this device's certificate") {
		t.Errorf("refused: %v", err)
	}
}

func FuzzRangeStart(f *testing.F) {
	f.Add("bytes 5-9/100")
	f.Add("bytes */100")
	f.Add("bytes -1-/")
	f.Fuzz(func(t *testing.T, s string) {
		start, ok := rangeStart(s)
		if ok && (start < 0 || !strings.HasPrefix(s, "bytes ")) {
			t.Errorf("rangeStart(%q) = %d", s, start)
		}
	})
}
