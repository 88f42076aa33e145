package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
)

func TestPlainArtifactBecomesVersion(t *testing.T) {
	f := start(t)
	v1 := f.plain("digits", read1(t, digits("v1.onnx")))
	for range 2 { // the same bytes again change nothing
		res := f.do("PUT", "/v2/digits/manifests/latest", v1, ociManifest)
		if res.status != http.StatusCreated || res.header.Get("Dunlin-Version") != "digits:1" {
			t.Fatalf("push: %d %s %s", res.status, res.header, res.body)
		}
		if got, want := res.header.Get("Docker-Content-Digest"), digest.FromBytes(v1).String(); got != want {
			t.Errorf("the answer speaks of %s, pushed was %s", got, want)
		}
	}
	last := f.versions.last
	if last.By != "user:ada" || last.Source != digest.FromBytes(v1).String() || len(last.Config.Inputs) == 0 || last.Config.Costs == nil || last.Config.Costs.FLOPs.PerRow == 0 ||
		!slices.Contains(last.WeightTypes, tensor.Float32) || last.Config.WeightBytes == 0 {
		t.Errorf("registered as %+v", last)
	}
	v2 := f.plain("digits", read1(t, digits("v2.onnx")))
	if res := f.do("PUT", "/v2/digits/manifests/2", v2, ociManifest); res.header.Get("Dunlin-Version") != "digits:2" {
		t.Fatalf("push of version 2: %d %s", res.status, res.body)
	}

	// Version, name and digest lead to the same bundle, and it is whole.
	want, err := models.Pack(t.Context(), digits("v1.onnx"), models.PackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"1", "latest", want.Digest.String()} {
		res := f.do("GET", "/v2/digits/manifests/"+ref, nil)
		if res.status != http.StatusOK || !bytes.Equal(res.body, want.ManifestBytes) {
			t.Errorf("manifest %s: %d %s, want %s", ref, res.status, res.body, want.ManifestBytes)
		}
		if d := res.header.Get("Docker-Content-Digest"); d != want.Digest.String() {
			t.Errorf("manifest %s has digest %s", ref, d)
		}
	}
	m, err := models.ParseManifest(want.ManifestBytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{m.Config.Digest, m.Index.Digest, m.Files[0].Digest} {
		res := f.do("GET", "/v2/digits/blobs/"+d.String(), nil)
		if res.status != http.StatusOK || digest.FromBytes(res.body) != d {
			t.Errorf("blob %s: %d", d, res.status)
		}
	}
	// What was pushed can be read as it was.
	if res := f.do("GET", "/v2/digits/manifests/"+digest.FromBytes(v1).String(), nil); !bytes.Equal(res.body, v1) {
		t.Errorf("the pushed manifest: %d %s", res.status, res.body)
	}
	res := f.do("GET", "/v2/digits/tags/list", nil)
	if got := strings.TrimSpace(string(res.body)); got != `{"name":"digits","tags":["1","2","latest"]}` {
		t.Errorf("tags: %s", got)
	}
	if res := f.do("GET", "/v2/digits/manifests/3", nil); res.status != http.StatusNotFound {
		t.Errorf("version 3: %d", res.status)
	}
}

func TestVersionIsImmutable(t *testing.T) {
	f := start(t)
	v1 := f.plain("digits", read1(t, digits("v1.onnx")))
	v2 := f.plain("digits", read1(t, digits("v2.onnx")))
	if res := f.do("PUT", "/v2/digits/manifests/1", v1, ociManifest); res.status != http.StatusCreated {
		t.Fatalf("push: %d %s", res.status, res.body)
	}
	res := f.do("PUT", "/v2/digits/manifests/1", v2, ociManifest)
	code, message := res.message(t)
	if res.status != http.StatusConflict || code != "DENIED" || !strings.Contains(message, "version 1 of model digits exists") {
		t.Errorf("other bytes under version 1: %d %s %s", res.status, code, message)
	}
	if res := f.do("GET", "/v2/digits/manifests/"+digest.FromBytes(v2).String(), nil); res.status != http.StatusNotFound {
		t.Errorf("what was refused was stored: %d", res.status)
	}
	if res := f.do("PUT", "/v2/digits/manifests/1", v1, ociManifest); res.status != http.StatusCreated {
		t.Errorf("the same bytes under version 1: %d %s", res.status, res.body)
	}
	for _, path := range []string{"manifests/1", "manifests/" + digest.FromBytes(v1).String(), "blobs/" + digest.FromString("{}").String()} {
		res := f.do("DELETE", "/v2/digits/"+path, nil)
		if code, _ := res.message(t); res.status != http.StatusMethodNotAllowed || code != "UNSUPPORTED" {
			t.Errorf("DELETE %s: %d %s", path, res.status, code)
		}
	}
	if f.versions.count() != 1 {
		t.Errorf("%d versions", f.versions.count())
	}
}

func TestBadModelsAreRefused(t *testing.T) {
	f := start(t)
	model := read1(t, digits("v2.onnx"))
	for name, c := range map[string]struct {
		layer []byte
		want  string
	}{
		"empty":     {nil, "empty"},
		"text":      {[]byte("hello, I am not a model\n"), "not an ONNX model"},
		"truncated": {model[:len(model)/2], "truncated"},
	} {
		t.Run(name, func(t *testing.T) {
			res := f.do("PUT", "/v2/digits/manifests/latest", f.plain("digits", c.layer), ociManifest)
			code, message := res.message(t)
			if res.status != http.StatusBadRequest || code != "MANIFEST_INVALID" || !strings.Contains(message, c.want) {
				t.Errorf("got %d %s %q, want it to say %q", res.status, code, message, c.want)
			}
		})
	}
	two := f.plain("digits", model)
	var m ocispec.Manifest
	if err := json.Unmarshal(two, &m); err != nil {
		t.Fatal(err)
	}
	m.Layers = append(m.Layers, m.Layers[0])
	res := f.do("PUT", "/v2/digits/manifests/latest", f.encode(m), ociManifest)
	if _, message := res.message(t); !strings.Contains(message, "exactly one layer") {
		t.Errorf("two layers: %d %s", res.status, message)
	}
	m.Layers = []ocispec.Descriptor{{MediaType: "x/y", Digest: digest.FromString("absent"), Size: 6}}
	res = f.do("PUT", "/v2/digits/manifests/latest", f.encode(m), ociManifest)
	if code, message := res.message(t); code != "MANIFEST_BLOB_UNKNOWN" || res.status != http.StatusBadRequest {
		t.Errorf("an absent layer: %d %s %s", res.status, code, message)
	}
	m.Layers = []ocispec.Descriptor{f.putBlob("digits", model)}
	m.Layers[0].Size--
	res = f.do("PUT", "/v2/digits/manifests/latest", f.encode(m), ociManifest)
	if _, message := res.message(t); !strings.Contains(message, "bytes, blob") {
		t.Errorf("a wrong size: %d %s", res.status, message)
	}
	// Blobs belong to a repository: another model's do not count.
	other := f.plain("other", model)
	res = f.do("PUT", "/v2/digits2/manifests/latest", other, ociManifest)
	if code, _ := res.message(t); code != "MANIFEST_BLOB_UNKNOWN" {
		t.Errorf("another model's blobs: %d %s", res.status, code)
	}
	if f.versions.count() != 0 {
		t.Errorf("%d versions were registered", f.versions.count())
	}
	if left, err := os.ReadDir(filepath.Join(f.root, ingestDir)); err != nil || len(left) != 0 {
		t.Errorf("left in the ingest folder: %v, %v", left, err)
	}
}

func TestManifestLimit(t *testing.T) {
	f := start(t)
	for _, ref := range []string{"latest", digest.FromString("x").String()} {
		res := f.do("PUT", "/v2/digits/manifests/"+ref, bytes.Repeat([]byte(" "), maxManifest+1), ociManifest)
		code, message := res.message(t)
		if res.status != http.StatusRequestEntityTooLarge || code != "SIZE_INVALID" || !strings.Contains(message, fmt.Sprint(maxManifest)) {
			t.Errorf("%s: %d %s %s", ref, res.status, code, message)
		}
	}
}

func TestNamesAndPaths(t *testing.T) {
	f := start(t)
	for path, want := range map[string]int{
		"/v2/":                              http.StatusOK,
		"/v2/_catalog":                      http.StatusOK,
		"/v2/team/digits/manifests/1":       http.StatusBadRequest,
		"/v2/Digits/manifests/1":            http.StatusBadRequest,
		"/v2/-digits/blobs/uploads/":        http.StatusBadRequest,
		"/v2/digits":                        http.StatusNotFound,
		"/v2/digits/manifests":              http.StatusNotFound,
		"/v2/digits/referrers/sha256:abc":   http.StatusBadRequest,
		"/v3/digits/manifests/1":            http.StatusNotFound,
		"/v2/digits/manifests/0":            http.StatusBadRequest,
		"/v2/digits/manifests/007":          http.StatusBadRequest,
		"/v2/digits/manifests/sha256:short": http.StatusBadRequest,
	} {
		if res := f.do("GET", path, nil); res.status != want {
			t.Errorf("GET %s: %d %s, want %d", path, res.status, res.body, want)
		}
	}
	for _, tag := range []string{"0", "007", "-1", "a%20b", "99999999999999999999"} {
		res := f.do("PUT", "/v2/digits/manifests/"+tag, []byte("{}"), ociManifest)
		if code, _ := res.message(t); res.status != http.StatusBadRequest || code != "TAG_INVALID" {
			t.Errorf("PUT tag %s: %d %s", tag, res.status, res.body)
		}
	}
}

func TestAuthorization(t *testing.T) {
	f := start(t)
	v1 := f.plain("digits", read1(t, digits("v1.onnx")))
	if res := f.do("PUT", "/v2/digits/manifests/1", v1, ociManifest); res.status != http.StatusCreated {
		t.Fatalf("push: %d", res.status)
	}
	nobody := func(r *http.Request) { r.Header.Del("Authorization") }
	basic := func(u, p string) func(*http.Request) { return func(r *http.Request) { r.SetBasicAuth(u, p) } }
	bearer := header("Authorization", "Bearer "+operatorToken)
	const ok, unauthorized, denied = "ok", "UNAUTHORIZED", "DENIED"
	for name, c := range map[string]struct {
		as         func(*http.Request)
		pull, push string
	}{
		"operator":       {basic("token", operatorToken), ok, ok},
		"operator token": {bearer, ok, ok},
		"viewer":         {basic("token", viewerToken), ok, denied},
		"device":         {device("cam-1"), ok, denied},
		"nobody":         {nobody, unauthorized, unauthorized},
		"wrong secret":   {basic("cam-1", "x"), unauthorized, unauthorized},
		"another device": {device("cam-2"), unauthorized, unauthorized},
	} {
		check := func(want string, res response) {
			t.Helper()
			if want == ok {
				if res.status >= 300 {
					t.Errorf("%s: %d %s", name, res.status, res.body)
				}
				return
			}
			code, _ := res.message(t)
			status := map[string]int{unauthorized: 401, denied: 403}[want]
			if code != want || res.status != status {
				t.Errorf("%s: %d %s, want %d %s", name, res.status, code, status, want)
			}
			if challenge := res.header.Get("WWW-Authenticate"); (want == unauthorized) != (challenge == `Basic realm="dunlin"`) {
				t.Errorf("%s: %d with challenge %q", name, res.status, challenge)
			}
		}
		f.refusals.all = nil
		f.versions.given = map[string]string{"cam-1": "digits"}
		check(c.pull, f.do("GET", "/v2/", nil, c.as))
		check(c.pull, f.do("GET", "/v2/digits/manifests/1", nil, c.as))
		check(c.pull, f.do("GET", "/v2/digits/blobs/"+digest.FromString("{}").String(), nil, c.as))
		check(c.push, f.do("POST", "/v2/digits/blobs/uploads/", nil, c.as))
		check(c.push, f.do("PUT", "/v2/digits/manifests/1", v1, ociManifest, c.as))
		check(c.push, f.do("PUT", "/v2/digits/manifests/"+digest.FromBytes(v1).String(), v1, ociManifest, c.as))
		if want := map[string]int{ok + ok: 0, ok + denied: 3, unauthorized + unauthorized: 6}[c.pull+c.push]; len(f.refusals.all) != want {
			t.Errorf("%s: %d refusals are noted, want %d", name, len(f.refusals.all), want)
		}
		for _, r := range f.refusals.all {
			if r.Action != "registry.refused" || r.Reason == "" || !strings.Contains(r.Object, " /v2/") || !strings.HasPrefix(r.From, "127.0.0.1:") || (r.Who == "nobody") != (c.pull != ok) {
				t.Errorf("%s: noted as %+v", name, r)
			}
		}
	}
	// A device reads what it is given, and does not learn what else there is.
	f.versions.given = map[string]string{"cam-1": "words", "cam-2": "digits"}
	for _, path := range []string{"/v2/_catalog", "/v2/digits/manifests/1", "/v2/digits/manifests/" + digest.FromBytes(v1).String(), "/v2/digits/blobs/" + digest.FromString("{}").String(),
		"/v2/digits/tags/list", "/v2/digits/referrers/" + digest.FromBytes(v1).String()} {
		res := f.do("GET", path, nil, device("cam-1"))
		if code, _ := res.message(t); res.status != http.StatusForbidden || code != denied {
			t.Errorf("a device's GET %s: %d %s", path, res.status, res.body)
		}
	}
	if res := f.do("GET", "/v2/_catalog", nil); res.status != http.StatusOK {
		t.Errorf("an operator's catalogue: %d", res.status)
	}
	f.versions.given = nil
	// What an operator began, a device may not look at, go on with, or end.
	upload := f.location(f.do("POST", "/v2/digits/blobs/uploads/", nil))
	for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
		if res := f.do(method, upload, nil, device("cam-1")); res.status != http.StatusForbidden {
			t.Errorf("a device's %s of an upload: %d", method, res.status)
		}
	}
	if res := f.do("DELETE", upload, nil); res.status != http.StatusNoContent {
		t.Errorf("the operator cannot give the upload up: %d %s", res.status, res.body)
	}
}

func TestRange(t *testing.T) {
	f := start(t)
	model := read1(t, digits("v2.onnx"))
	d := f.putBlob("digits", model).Digest
	for spec, want := range map[string][]byte{
		"bytes=0-9":                            model[:10],
		"bytes=1000-1999":                      model[1000:2000],
		"bytes=-7":                             model[len(model)-7:],
		fmt.Sprintf("bytes=%d-", len(model)-1): model[len(model)-1:],
	} {
		res := f.do("GET", "/v2/digits/blobs/"+d.String(), nil, header("Range", spec), device("cam-1"))
		if res.status != http.StatusPartialContent || !bytes.Equal(res.body, want) {
			t.Errorf("%s: %d, %d bytes, want %d", spec, res.status, len(res.body), len(want))
		}
	}
	if res := f.do("GET", "/v2/digits/blobs/"+d.String(), nil, header("Range", "bytes=9999999-")); res.status != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("a range beyond the end: %d", res.status)
	}
}

// Guessing is slowed here as everywhere, and is answered in the API's shape.
func TestGuessing(t *testing.T) {
	f := start(t)
	wrong := func(r *http.Request) { r.SetBasicAuth("token", "guess") }
	if res := f.do("GET", "/v2/", nil); res.status != http.StatusOK {
		t.Fatalf("the right token: %d", res.status)
	}
	n := 0
	res := f.do("GET", "/v2/", nil, wrong)
	for ; res.status == http.StatusUnauthorized && n < 100; n++ {
		res = f.do("GET", "/v2/", nil, wrong)
	}
	if code, _ := res.message(t); res.status != http.StatusTooManyRequests || code != "TOOMANYREQUESTS" || res.header.Get("Retry-After") == "" {
		t.Errorf("after %d guesses: %d %s, Retry-After %q", n, res.status, code, res.header.Get("Retry-After"))
	}
	if res := f.do("GET", "/v2/", nil); res.status != http.StatusOK {
		t.Errorf("a token that was in before: %d", res.status)
	}
}
