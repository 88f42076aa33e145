package console

import (
	"bytes"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/onnxwriter"
	"github.com/dunlin/dunlin/models/tensor"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// push packs an ONNX file, uploads it, and makes it a version.
func (w *world) push(t *testing.T, model, file string) {
	t.Helper()
	bundle, err := models.Pack(t.Context(), file, models.PackOptions{})
	must(t, err)
	user := byhand.User(w.token, nil)
	put := func(method, to, kind string, b []byte, want int) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, to, bytes.NewReader(b))
		must(t, err)
		req.Header.Set("Content-Type", kind)
		resp, err := user.Do(req)
		must(t, err)
		must(t, resp.Body.Close())
		if resp.StatusCode != want {
			t.Fatalf("%s %s: got %s", method, to, resp.Status)
		}
		return resp
	}
	blobs := [][]byte{bundle.ConfigBytes, bundle.IndexBytes}
	for _, f := range bundle.Files {
		b, err := os.ReadFile(f.Source)
		must(t, err)
		blobs = append(blobs, b)
	}
	base := w.URL + "/v2/" + model
	for _, b := range blobs {
		at, err := put("POST", base+"/blobs/uploads/", "", nil, http.StatusAccepted).Location()
		must(t, err)
		q := at.Query()
		q.Set("digest", digest.FromBytes(b).String())
		at.RawQuery = q.Encode()
		put("PUT", at.String(), "application/octet-stream", b, http.StatusCreated)
	}
	put("PUT", base+"/manifests/"+bundle.Digest.String(), ocispec.MediaTypeImageManifest, bundle.ManifestBytes, http.StatusCreated)
	_, err = v1connect.NewModelServiceClient(user, w.URL).CreateVersion(t.Context(), connect.NewRequest(&v1.CreateVersionRequest{Model: model, Digest: bundle.Digest.String()}))
	must(t, err)
}

// named writes a model whose input and output have the given names.
func named(t *testing.T, input, output string) string {
	t.Helper()
	m := onnxwriter.Model{
		Opset: 17, Inputs: []onnxwriter.Value{onnxwriter.Float(input, -1, 2)}, Outputs: []onnxwriter.Value{onnxwriter.Float(output, -1, 2)},
		Weights: []onnxwriter.Weight{{Name: "w", Type: tensor.Float32, Shape: []int64{2}, Data: make([]byte, 8)}},
		Nodes:   []onnxwriter.Node{{Op: "Add", In: []string{input, "w"}, Out: []string{output}}},
	}
	path := filepath.Join(t.TempDir(), "model.onnx")
	must(t, os.WriteFile(path, m.Marshal(), 0o600))
	return path
}

// Models are found, looked at and deleted, by keyboard too, and the names that
// their files have are text.
func TestModels(t *testing.T) {
	w := start(t)
	b := open(t)
	both := func(path, until, what string) {
		t.Helper()
		b.do(t, chromedp.Navigate(w.URL+path))
		for _, theme := range []string{"light", "dark"} {
			b.do(t, chromedp.Click(`button[value=`+theme+`]`), chromedp.WaitVisible(`html[data-theme=`+theme+`] `+until))
			b.clean(t, what+", "+theme)
			b.picture(t, strings.ReplaceAll(what, " ", "-")+"-"+theme)
		}
	}
	b.do(t, chromedp.Navigate(w.URL+"/sign-in?next="+url.QueryEscape("/models")), chromedp.WaitVisible("#password"),
		chromedp.SendKeys("#name", "ada"), chromedp.SendKeys("#password", password+"\r"), chromedp.WaitVisible(".empty"))
	both("/models", ".empty", "no model")
	digits := filepath.Join("..", "..", "..", "models", "examples", "digits")
	w.push(t, "digits", filepath.Join(digits, "v1.onnx"))
	w.push(t, "digits", filepath.Join(digits, "v2.onnx"))
	w.push(t, "names", named(t, script, "مرحبا 🐦"))
	w.push(t, "names", named(t, strings.Repeat("long", 200), "p"))
	w.device(t, "cam-1", nil, &v1.Reported{}, &v1.Telemetry{})
	w.up(t, "cam-1", link.Reported, &v1.Reported{Session: "cam-1", Sequence: 2, Versions: []*v1.VersionStatus{
		{Model: "digits", Version: 2, State: v1.VersionState_VERSION_STATE_RESIDENT, Serving: true}, {Model: "names", Version: 1, State: v1.VersionState_VERSION_STATE_QUARANTINED, Reason: script}}})
	both("/models", `a[href="/models/digits"]`, "models")
	both("/models/digits", "#v2", "model")
	both("/models/names", "#v1", "names")
	var text string
	b.do(t, chromedp.Text("#v1", &text))
	for _, part := range []string{script, "مرحبا 🐦"} {
		if !strings.Contains(text, part) {
			t.Errorf("the page lacks %q in %q", part, text)
		}
	}
	// By keyboard: open what is folded, go on to its button, press it.
	var at string
	b.do(t, chromedp.Focus("#v2 summary"), chromedp.KeyEvent(kb.Enter), chromedp.WaitVisible("#v2 .danger"), chromedp.KeyEvent(kb.Tab), chromedp.WaitVisible("#v2 .danger:focus"),
		chromedp.KeyEvent(kb.Enter), chromedp.WaitNotPresent("#v2"), chromedp.WaitVisible("#v1"), chromedp.Location(&at))
	if at != w.URL+"/models/names" {
		t.Errorf("got %s", at)
	}
	b.clean(t, "deleted")
}
