package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// TestORAS pushes and pulls with a generic OCI client.
func TestORAS(t *testing.T) {
	f := start(t)
	repo, err := remote.NewRepository(strings.TrimPrefix(f.server.URL, "http://") + "/digits")
	if err != nil {
		t.Fatal(err)
	}
	repo.PlainHTTP = true
	repo.Client = &auth.Client{Credential: auth.StaticCredential(repo.Reference.Registry, auth.Credential{Username: "ada", Password: operatorToken})}
	ctx := t.Context()
	push := func(file, tag string) (ocispec.Descriptor, error) {
		src := memory.New()
		layer, err := oras.PushBytes(ctx, src, "application/octet-stream", read1(t, digits(file)))
		if err != nil {
			t.Fatal(err)
		}
		layer.Annotations = map[string]string{ocispec.AnnotationTitle: file}
		d, err := oras.PackManifest(ctx, src, oras.PackManifestVersion1_1, "application/vnd.example.onnx", oras.PackManifestOptions{
			Layers:              []ocispec.Descriptor{layer},
			ManifestAnnotations: map[string]string{ocispec.AnnotationCreated: time.Now().Format(time.RFC3339)},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := src.Tag(ctx, d, tag); err != nil {
			t.Fatal(err)
		}
		return oras.Copy(ctx, src, tag, repo, tag, oras.DefaultCopyOptions)
	}
	if _, err := push("v1.onnx", "latest"); err != nil {
		t.Fatal(err)
	}
	if _, err := push("v2.onnx", "latest"); err != nil {
		t.Fatal(err)
	}
	if _, err := push("v2.onnx", "2"); err != nil {
		t.Fatal(err)
	}
	if _, err := push("v1.onnx", "2"); err == nil || !strings.Contains(err.Error(), "version 2 of model digits exists") {
		t.Errorf("other bytes under version 2: %v", err)
	}
	if n := f.versions.count(); n != 2 {
		t.Errorf("%d versions, want 2", n)
	}
	for tag, file := range map[string]string{"1": "v1.onnx", "2": "v2.onnx", "latest": "v2.onnx"} {
		dst := memory.New()
		d, err := oras.Copy(ctx, repo, tag, dst, "", oras.DefaultCopyOptions)
		if err != nil {
			t.Fatalf("pull %s: %v", tag, err)
		}
		want, err := models.Pack(ctx, digits(file), models.PackOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if d.Digest != want.Digest {
			t.Errorf("pulled %s is %s, want the bundle of %s, %s", tag, d.Digest, file, want.Digest)
		}
		// A pulled bundle pushed elsewhere is the same bundle.
		other, err := remote.NewRepository(repo.Reference.Registry + "/copy-" + strings.TrimSuffix(file, ".onnx"))
		if err != nil {
			t.Fatal(err)
		}
		other.PlainHTTP, other.Client = true, repo.Client
		if err := dst.Tag(ctx, d, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := oras.Copy(ctx, dst, "x", other, "1", oras.DefaultCopyOptions); err != nil {
			t.Errorf("push of a bundle: %v", err)
		}
	}
}

func (f *fixture) putManifest(model string, b []byte) string {
	f.t.Helper()
	d := digest.FromBytes(b).String()
	if res := f.do("PUT", "/v2/"+model+"/manifests/"+d, b, ociManifest); res.status != http.StatusCreated {
		f.t.Fatalf("put manifest: %d %s", res.status, res.body)
	}
	return d
}

func TestIngest(t *testing.T) {
	f := start(t)
	ctx := t.Context()
	b := f.bundle("digits", digits("v2.onnx"))
	if _, _, err := f.registry.Ingest(ctx, "digits", b.Digest.String(), 0, "ada"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a manifest that was not pushed: %v", err)
	}
	d := f.putManifest("digits", b.ManifestBytes)
	if f.versions.count() != 0 {
		t.Error("a push by digest became a version")
	}
	n, created, err := f.registry.Ingest(ctx, "digits", d, 0, "ada")
	if n != 1 || !created || err != nil {
		t.Fatalf("got version %d, %t, %v", n, created, err)
	}
	n, created, err = f.registry.Ingest(ctx, "digits", d, 0, "ada")
	if n != 1 || created || err != nil {
		t.Errorf("again: version %d, %t, %v", n, created, err)
	}
	if n, created, err = f.registry.Ingest(ctx, "digits", d, 1, "ada"); n != 1 || created || err != nil {
		t.Errorf("again as version 1: version %d, %t, %v", n, created, err)
	}
	other := f.putManifest("digits", f.bundle("digits", digits("v1.onnx")).ManifestBytes)
	_, _, err = f.registry.Ingest(ctx, "digits", other, 1, "ada")
	if e, ok := errors.AsType[ErrVersionExists](err); !ok || e != (ErrVersionExists{"digits", 1, d}) {
		t.Errorf("another bundle as version 1: %v", err)
	}
	for _, c := range []struct {
		model, digest string
		want          int64
	}{{"Digits", d, 0}, {"digits", "sha256:x", 0}, {"digits", "", 0}, {"digits", d, -1}, {"digits", d, models.MaxVersion + 1}} {
		if _, _, err := f.registry.Ingest(ctx, c.model, c.digest, c.want, "ada"); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// TestBundleThatLies pushes bundles whose parts do not agree.
func TestBundleThatLies(t *testing.T) {
	for name, c := range map[string]struct {
		config func(*models.Config)
		index  func(*dunlinv1.ChunkIndex)
		want   string
	}{
		"chunk":                       {index: func(i *dunlinv1.ChunkIndex) { i.Files[0].Chunks[0].Sha256[0] ^= 1 }, want: "chunk 0 of model.onnx"},
		"length":                      {index: func(i *dunlinv1.ChunkIndex) { i.Files[0].Chunks[0].Length-- }, want: "chunk"},
		"file":                        {index: func(i *dunlinv1.ChunkIndex) { i.Files[0].Sha256[0] ^= 1 }, want: "model.onnx"},
		"input":                       {config: func(c *models.Config) { c.Inputs[0].Name = "other" }, want: "the config says"},
		"opset":                       {config: func(c *models.Config) { c.Opset++ }, want: "the config says"},
		"reference that is not there": {config: func(c *models.Config) { c.Reference = models.ReferenceFile }, want: "is not a file of the bundle"},
		"reference of another name":   {config: func(c *models.Config) { c.Reference = "model.onnx" }, want: "reference is"},
		"entry":                       {config: func(c *models.Config) { c.Entry = "other.onnx" }, want: "entry"},
		"escapes":                     {config: func(c *models.Config) { c.Entry = "../../upload-secret" }, want: "entry"},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t)
			b := f.bundle("digits", digits("v2.onnx"))
			var m ocispec.Manifest
			if err := json.Unmarshal(b.ManifestBytes, &m); err != nil {
				t.Fatal(err)
			}
			replace := func(d *ocispec.Descriptor, b []byte) {
				n := f.putBlob("digits", b)
				d.Digest, d.Size = n.Digest, n.Size
			}
			if c.config != nil {
				c.config(&b.Config)
				replace(&m.Config, f.encode(b.Config))
			}
			if c.index != nil {
				var i dunlinv1.ChunkIndex
				if err := proto.Unmarshal(b.IndexBytes, &i); err != nil {
					t.Fatal(err)
				}
				c.index(&i)
				bytes, err := proto.Marshal(&i)
				if err != nil {
					t.Fatal(err)
				}
				for n := range m.Layers {
					if m.Layers[n].MediaType == models.MediaTypeChunkIndex {
						replace(&m.Layers[n], bytes)
					}
				}
			}
			d := f.putManifest("digits", f.encode(m))
			_, _, err := f.registry.Ingest(t.Context(), "digits", d, 0, "ada")
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
			if f.versions.count() != 0 {
				t.Error("it became a version")
			}
		})
	}
}

// TestIngestAfterCrash lets the registration fail after everything was
// stored, starts the registry again, and ingests again.
func TestIngestAfterCrash(t *testing.T) {
	f := start(t)
	manifest := f.plain("digits", read1(t, digits("v1.onnx")))
	f.versions.crash = errors.New("killed")
	res := f.do("PUT", "/v2/digits/manifests/latest", manifest, ociManifest)
	if code, message := res.message(t); res.status != http.StatusInternalServerError || code != "UNKNOWN" || strings.Contains(message, "killed") {
		t.Errorf("got %d %s %s", res.status, code, message)
	}
	left := filepath.Join(f.root, ingestDir, "left")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	f.open()
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the ingest folder was not cleared: %v", err)
	}
	res = f.do("PUT", "/v2/digits/manifests/latest", manifest, ociManifest)
	if res.status != http.StatusCreated || res.header.Get("Dunlin-Version") != "digits:1" {
		t.Errorf("again: %d %s", res.status, res.body)
	}
	if !strings.Contains(f.log.String(), "killed") {
		t.Error("the log does not say why the first push failed")
	}
}

// TestUploadGoesOnAfterRestart sends a file in two parts, with a restart
// between them.
func TestUploadGoesOnAfterRestart(t *testing.T) {
	f := start(t)
	model := read1(t, digits("v2.onnx"))
	half := len(model) / 2
	octets := header("Content-Type", "application/octet-stream")
	res := f.do("POST", "/v2/digits/blobs/uploads/", nil)
	res = f.do("PATCH", f.location(res), model[:half], octets)
	if res.status != http.StatusAccepted {
		t.Fatalf("first half: %d %s", res.status, res.body)
	}
	location := res.header.Get("Location")
	f.open()
	res = f.do("GET", location, nil)
	if res.status != http.StatusNoContent || !strings.HasSuffix(res.header.Get("Range"), "-"+strconv.Itoa(half-1)) {
		t.Fatalf("where it stands: %d %s, want %d bytes", res.status, res.header.Get("Range"), half)
	}
	res = f.do("PATCH", f.location(res), model[half:], octets)
	if res.status != http.StatusAccepted {
		t.Fatalf("second half: %d %s", res.status, res.body)
	}
	d := digest.FromBytes(model)
	res = f.do("PUT", f.location(res)+"&digest="+d.String(), nil)
	if res.status != http.StatusCreated {
		t.Fatalf("finish: %d %s", res.status, res.body)
	}
	if res := f.do("GET", "/v2/digits/blobs/"+d.String(), nil); !bytes.Equal(res.body, model) {
		t.Error("the blob is not what was sent")
	}
}

func TestPurge(t *testing.T) {
	f := start(t)
	f.registry.purge(t.Context(), time.Now().Add(time.Hour)) // nothing there yet
	upload := f.location(f.do("POST", "/v2/digits/blobs/uploads/", nil))
	f.registry.purge(t.Context(), time.Now().Add(-uploadAge))
	if res := f.do("GET", upload, nil); res.status != http.StatusNoContent {
		t.Errorf("a new upload was deleted: %d", res.status)
	}
	f.registry.purge(t.Context(), time.Now().Add(time.Hour))
	if res := f.do("GET", upload, nil); res.status != http.StatusNotFound {
		t.Errorf("an old upload was not deleted: %d", res.status)
	}
}

// TestLog checks that what clients do wrong is not logged as an error.
func TestLog(t *testing.T) {
	f := start(t)
	f.do("GET", "/v2/digits/blobs/"+digest.FromString("absent").String(), nil)
	f.do("HEAD", "/v2/digits/manifests/latest", nil)
	f.do("PUT", "/v2/digits/manifests/latest", []byte("{}"), ociManifest)
	if s := f.log.String(); s != "" {
		t.Errorf("logged: %s", s)
	}
}

func FuzzParsePath(f *testing.F) {
	for _, s := range []string{"/v2/", "/v2/digits/manifests/1", "/v2/digits/blobs/uploads/x", "/v2/a/b/tags/list", "/v2//manifests/", "/", "/v2/blobs/uploads/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		target, err := parsePath(path)
		if err != nil {
			return
		}
		if target.kind != "" && models.CheckName(target.model) != nil {
			t.Errorf("%q: took model %q", path, target.model)
		}
	})
}

// FuzzPutManifest sends manifests of any bytes: none may be answered with an
// internal error, and none may become a version, as the registry is empty.
func FuzzPutManifest(f *testing.F) {
	v := &versions{digests: map[string][]string{}}
	r, err := New(Config{Root: f.TempDir(), Auth: identity.New(credentials{}, identity.Options{}), Refusals: new(refusals), Versions: v, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{}`), "latest", ocispec.MediaTypeImageManifest)
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{"size":3,"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}]}`), "1", "")
	f.Add([]byte(`{"artifactType":"`+models.ArtifactType+`","layers":[]}`), "x", "text/plain")
	f.Add([]byte(`{"manifests":[]}`), "2", ocispec.MediaTypeImageIndex)
	f.Fuzz(func(t *testing.T, body []byte, tag, mediaType string) {
		req := httptest.NewRequest(http.MethodPut, "/v2/digits/manifests/x", bytes.NewReader(body))
		req.URL.Path = "/v2/digits/manifests/" + tag
		req.Header.Set("Content-Type", mediaType)
		req.SetBasicAuth("x", operatorToken)
		w := httptest.NewRecorder()
		r.ServeHTTP(w, req)
		if w.Code >= 500 || v.count() != 0 {
			t.Errorf("%d %s, %d versions", w.Code, w.Body, v.count())
		}
	})
}

// A reference is checked again here: whoever pushed may have made it by hand.
func TestIngestReference(t *testing.T) {
	image := strings.TrimSuffix(strings.Repeat("0,", 64), ",")
	good := `{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [` + image + `]}],
		"outputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [0]}]}`
	path := filepath.Join(t.TempDir(), "reference.json")
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := models.Pack(t.Context(), digits("v1.onnx"), models.PackOptions{Reference: path})
	if err != nil {
		t.Fatal(err)
	}
	f := start(t)
	f.putBlob("digits", b.ConfigBytes)
	f.putBlob("digits", b.IndexBytes)
	for _, file := range b.Files {
		f.putBlob("digits", read1(t, file.Source))
	}
	if _, _, err := f.registry.Ingest(t.Context(), "digits", f.putManifest("digits", b.ManifestBytes), 0, "ada"); err != nil {
		t.Fatal(err)
	}
	// The same with another output: a file of the same size, of one chunk.
	bad := []byte(strings.Replace(good, "label", "lable", 1))
	sum := sha256.Sum256(bad)
	var index dunlinv1.ChunkIndex
	var m ocispec.Manifest
	if err := errors.Join(proto.Unmarshal(b.IndexBytes, &index), json.Unmarshal(b.ManifestBytes, &m)); err != nil {
		t.Fatal(err)
	}
	for _, file := range index.Files {
		if file.Path == models.ReferenceFile {
			file.Sha256, file.Chunks[0].Sha256 = sum[:], sum[:]
		}
	}
	raw, err := proto.Marshal(&index)
	if err != nil {
		t.Fatal(err)
	}
	for i := range m.Layers {
		switch l := &m.Layers[i]; {
		case l.Annotations[ocispec.AnnotationTitle] == models.ReferenceFile:
			l.Digest = f.putBlob("digits", bad).Digest
		case l.MediaType == models.MediaTypeChunkIndex:
			n := f.putBlob("digits", raw)
			l.Digest, l.Size = n.Digest, n.Size
		}
	}
	if _, _, err := f.registry.Ingest(t.Context(), "digits", f.putManifest("digits", f.encode(m)), 0, "ada"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), `the model has no output "lable"`) {
		t.Errorf("a reference that does not fit: %v", err)
	}
}
