package rest

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

func TestEndpoints(t *testing.T) {
	b := &echo{inputs: []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 64}}, {Name: "s", Type: tensor.Int64}}}
	server := serve(t, oip.Config{Backend: b, Version: "1.2.3"})
	const echoMetadata = `{"name":"echo","versions":["1","2"],"platform":"onnxruntime_onnx",` +
		`"inputs":[{"name":"x","datatype":"FP32","shape":[-1,64]},{"name":"s","datatype":"INT64","shape":[]}],` +
		`"outputs":[{"name":"x","datatype":"FP32","shape":[-1,64]},{"name":"s","datatype":"INT64","shape":[]}]}`
	for _, tt := range []struct {
		request string
		status  int
		body    string // "" where it is empty, "error" where it is an error
	}{
		{"GET /v2", 200, `{"name":"dunlin","version":"1.2.3","extensions":["binary_tensor_data","classification","parameters","schedule_policy","model_configuration","statistics"]}`},
		{"GET /v2/", 200, `{"name":"dunlin","version":"1.2.3","extensions":["binary_tensor_data","classification","parameters","schedule_policy","model_configuration","statistics"]}`},
		{"GET /v2/health/live", 200, ""},
		{"GET /v2/health/live/", 200, ""},
		{"HEAD /v2/health/live", 200, ""},
		{"GET /v2/health/ready", 200, ""},
		{"GET /v2/models/echo", 200, echoMetadata},
		{"GET /v2/models/echo/versions/2", 200, echoMetadata},
		{"GET /v2/models/echo/ready", 200, ""},
		{"GET /v2/models/echo/versions/1/ready", 200, ""},
		{"GET /v2/models/echo/versions/3/ready", 404, "error"},
		{"GET /v2/models/other", 404, "error"},
		{"GET /v2/models/other/ready", 404, "error"},
		{"GET /v2/models/echo/versions/0", 400, "error"},
		{"GET /v2/models/echo/versions/x/ready", 400, "error"},
		{"GET /v2/models/echo/versions", 404, "error"},
		{"GET /v2/models/echo/else", 404, "error"},
		{"GET /v2/models/other/config", 404, "error"},
		{"GET /v2/models/echo/versions/1/trace/setting", 404, "error"},
		{"GET /v2/models/", 404, "error"},
		{"GET /v2x", 404, "error"},
		{"POST /v2/models/echo/generate", 404, "error"},
		{"POST /v2/models/echo/config", 405, "error"},
		{"POST /v2/models/echo/stats", 405, "error"},
		{"GET /v2/repository/index", 405, "error"},
		{"GET /v2/repository/models/echo/load", 405, "error"},
		{"GET /v2/repository/models/echo/else", 404, "error"},
		{"POST /v2/repository", 404, "error"},
		{"POST /v2/repository/a/b/models/echo/load", 404, "error"},
		{"POST /v2/repository/a/models/echo/load", 501, "error"},
		{"POST /v2/repository/a/index", 501, "error"},
		{"POST /v2/repository/index", 501, "error"},
		{"POST /v2/repository/models/echo/load", 501, "error"},
		{"POST /v2/repository/models/echo/unload", 501, "error"},
		{"POST /v2/systemsharedmemory/status", 405, "error"},
		{"GET /v2/systemsharedmemory/region/r/register", 405, "error"},
		{"POST /v2/systemsharedmemory/register", 404, "error"},
		{"POST /v2/systemsharedmemory/region//register", 404, "error"},
		{"GET /v2/systemsharedmemory", 404, "error"},
		{"POST /v2/systemsharedmemory/unregister", 501, "error"},
		{"GET /v2/systemsharedmemory/status", 200, "[]"},
		{"GET /v2/systemsharedmemory/region/r/status", 404, "error"},
		{"GET /v2/cudasharedmemory/status", 200, "[]"},
		{"GET /v2/cudasharedmemory/region/r/status", 404, "error"},
		{"POST /v2/cudasharedmemory/region/r/register", 501, "error"},
		{"POST /v2/cudasharedmemory/region/r/unregister", 200, ""},
		{"POST /v2/cudasharedmemory/unregister", 200, ""},
		{"PUT /v2/logging", 405, "error"},
		{"PUT /v2/trace/setting", 405, "error"},
		{"GET /v2/models", 404, "error"},
		{"GET /v1", 404, "error"},
		{"GET /", 404, "error"},
		{"GET /v2/models/echo/infer", 405, "error"},
		{"POST /v2/health/live", 405, "error"},
		{"DELETE /v2/models/echo", 405, "error"},
	} {
		method, path, _ := strings.Cut(tt.request, " ")
		w := do(t, server, method, path, "")
		if w.Code != tt.status {
			t.Errorf("%s: status %d, want %d", tt.request, w.Code, tt.status)
		}
		if tt.body == "error" {
			errorOf(t, w)
		} else if w.Body.String() != tt.body {
			t.Errorf("%s: body %s, want %s", tt.request, w.Body, tt.body)
		}
		if w.Code == 405 && w.Header.Get("Allow") == "" {
			t.Errorf("%s: no Allow header", tt.request)
		}
	}

	b.unready, b.notReady = errors.New("it is being loaded"), "it is being loaded"
	for request, status := range map[string]int{
		"GET /v2/health/live": 200, "GET /v2/health/ready": 400, "GET /v2/models/echo/ready": 400, "GET /v2/models/echo": 503,
	} {
		method, path, _ := strings.Cut(request, " ")
		w := do(t, server, method, path, "")
		if w.Code != status {
			t.Errorf("not ready: %s: status %d, want %d", request, w.Code, status)
		}
		if status == 400 || status == 503 {
			if msg := errorOf(t, w); strings.Contains(path, "echo") && !strings.Contains(msg, b.notReady) {
				t.Errorf("not ready: %s: error %q does not say why", request, msg)
			}
		}
		if (w.Header.Get("Retry-After") != "") != (status == 503) {
			t.Errorf("not ready: %s: Retry-After is %q", request, w.Header.Get("Retry-After"))
		}
	}
}

func TestBackendErrors(t *testing.T) {
	for _, tt := range []struct {
		err    error
		status int
	}{
		{oip.Errorf(oip.NotFound, "x"), 404},
		{fmt.Errorf("wrapped: %w", oip.Errorf(oip.Unavailable, "x")), 503},
		{oip.Errorf(oip.Unsupported, "x"), 501},
		{oip.Errorf(oip.InvalidArgument, "x"), 400},
		{oip.Errorf(oip.Cancelled, "x"), 400},
		{context.Canceled, 400},
		{context.DeadlineExceeded, 503},
		{errors.New("x"), 500},
	} {
		b := &echo{answer: func(context.Context, oip.Call) (oip.Answer, error) { return oip.Answer{}, tt.err }}
		w := do(t, serve(t, oip.Config{Backend: b}), "POST", "/v2/models/echo/infer", `{"inputs":[]}`)
		if w.Code != tt.status || errorOf(t, w) != tt.err.Error() {
			t.Errorf("%v: status %d, body %s; want %d", tt.err, w.Code, w.Body, tt.status)
		}
	}
}

func TestInferJSON(t *testing.T) {
	b := &echo{}
	server := serve(t, oip.Config{Backend: b})
	w := do(t, server, "POST", "/v2/models/echo/versions/2/infer", `{
		"id": "request \u0031", "unknown": {"a": [null, 1.5e3]}, "parameters": {"priority": 3},
		"inputs": [
			{"name": "f", "data": [[1, -2.5], [NaN, -Infinity]], "shape": [2, 2], "datatype": "FP32", "parameters": {"content_type": "np"}},
			{"name": "b", "shape": [2], "datatype": "BOOL", "data": [true, false]},
			{"name": "s", "shape": [1, 2], "datatype": "BYTES", "data": [["a\"\u00e9", ""]]},
			{"name": "n", "shape": [], "datatype": "INT8", "data": [-128]},
			{"name": "u", "shape": [1], "datatype": "UINT64", "data": [18446744073709551615]},
			{"name": "e", "shape": [0, 3], "datatype": "FP64", "data": []}
		]}`)
	want := `{"model_name":"digits","model_version":"2","id":"request 1","outputs":[` +
		`{"name":"f","datatype":"FP32","shape":[2,2],"data":[1,-2.5,NaN,-Infinity]},` +
		`{"name":"b","datatype":"BOOL","shape":[2],"data":[true,false]},` +
		`{"name":"s","datatype":"BYTES","shape":[1,2],"data":["a\"é",""]},` +
		`{"name":"n","datatype":"INT8","shape":[],"data":[-128]},` +
		`{"name":"u","datatype":"UINT64","shape":[1],"data":[18446744073709551615]},` +
		`{"name":"e","datatype":"FP64","shape":[0,3],"data":[]}]}`
	if w.Code != 200 || w.Body.String() != want {
		t.Errorf("status %d, body\n%s, want\n%s", w.Code, w.Body, want)
	}
	if h := w.Header; h.Get("Content-Type") != "application/json" || h.Get("Dunlin-Generation") != "i/7" ||
		h.Get(headerLength) != "" || h.Get("Content-Length") != fmt.Sprint(len(want)) {
		t.Errorf("headers %v", h)
	}
	if b.got.Model != "echo" || b.got.Version != 2 || b.got.Outputs != nil {
		t.Errorf("the backend got %+v", b.got)
	}
}

func TestInferBinary(t *testing.T) {
	b := &echo{}
	server := serve(t, oip.Config{Backend: b})
	const head = `{"parameters":{"binary_data_output":true},` +
		`"inputs":[{"name":"a","shape":[2],"datatype":"FP16","parameters":{"binary_data_size":4}},` +
		`{"name":"b","shape":[1],"datatype":"INT32","data":[7]},` +
		`{"name":"c","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":6}}],` +
		`"outputs":[{"name":"c"},{"name":"b","parameters":{"binary_data":false}},{"name":"a","parameters":{"classification":0}}]}`
	const data = "\x01\x02\x03\x04" + "\x02\x00\x00\x00\xff\xfe"
	w := do(t, server, "POST", "/v2/models/echo/infer", head+data, headerLength, fmt.Sprint(len(head)))
	wantHead := `{"model_name":"digits","model_version":"2","outputs":[` +
		`{"name":"c","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":6}},` +
		`{"name":"b","datatype":"INT32","shape":[1],"data":[7]},` +
		`{"name":"a","datatype":"FP16","shape":[2],"parameters":{"binary_data_size":4}}]}`
	if want := wantHead + data[4:] + data[:4]; w.Code != 200 || w.Body.String() != want {
		t.Errorf("status %d, body\n%q, want\n%q", w.Code, w.Body, want)
	}
	if h := w.Header; h.Get("Content-Type") != "application/octet-stream" || h.Get(headerLength) != fmt.Sprint(len(wantHead)) ||
		h.Get("Content-Length") != fmt.Sprint(w.Body.Len()) {
		t.Errorf("headers %v", h)
	}
	if diff := cmp.Diff([]string{"c", "b", "a"}, b.got.Outputs); diff != "" {
		t.Error(diff)
	}
	// C++ clients send the header for pure JSON too.
	const pure = `{"inputs":[{"name":"b","shape":[1],"datatype":"INT32","data":[7]}]}`
	if w := do(t, server, "POST", "/v2/models/echo/infer", pure, headerLength, fmt.Sprint(len(pure))); w.Code != 200 || w.Header.Get(headerLength) != "" {
		t.Errorf("pure JSON with a header length: status %d, %s", w.Code, w.Body)
	}
}

func TestInferRaw(t *testing.T) {
	for _, tt := range []struct {
		typ    tensor.Type
		shape  []int64
		body   string
		want   []int64 // nil where it is refused
		status int
	}{
		{tensor.Uint8, []int64{3}, "abc", []int64{3}, 200},
		{tensor.Uint8, []int64{3}, "abcd", nil, 400},
		{tensor.Uint8, []int64{-1}, "", []int64{0}, 200},
		{tensor.Float32, []int64{-1, 2}, strings.Repeat("x", 24), []int64{3, 2}, 200},
		{tensor.Float32, []int64{-1, 2}, strings.Repeat("x", 23), nil, 400},
		{tensor.Float32, []int64{-1, 0}, "", nil, 400},
		{tensor.Uint8, []int64{-1, 2, -1}, "abcd", []int64{1, 2, 2}, 200},
		{tensor.Uint8, []int64{2, -1, -1}, "abcd", nil, 400},
		{tensor.String, []int64{1}, "abc", []int64{1}, 200},
		{tensor.String, []int64{-1}, "abc", []int64{1}, 200},
		{tensor.String, []int64{2}, "abc", nil, 400},
	} {
		b := &echo{inputs: []tensor.Info{{Name: "x", Type: tt.typ, Shape: tt.shape}}}
		w := do(t, serve(t, oip.Config{Backend: b}), "POST", "/v2/models/echo/infer", tt.body, headerLength, "0")
		if w.Code != tt.status {
			t.Errorf("%v%v: status %d, body %s", tt.typ, tt.shape, w.Code, w.Body)
			continue
		}
		if tt.status != 200 {
			errorOf(t, w)
			continue
		}
		if diff := cmp.Diff(tt.want, b.got.Inputs[0].Shape); diff != "" {
			t.Errorf("%v%v: shape %s", tt.typ, tt.shape, diff)
		}
		if !strings.HasSuffix(w.Body.String(), tt.body) || w.Header.Get(headerLength) == "" {
			t.Errorf("%v%v: body %q is not answered as binary data", tt.typ, tt.shape, w.Body)
		}
	}
	two := &echo{inputs: []tensor.Info{{Name: "x", Type: tensor.Uint8}, {Name: "y", Type: tensor.Uint8}}}
	if w := do(t, serve(t, oip.Config{Backend: two}), "POST", "/v2/models/echo/infer", "a", headerLength, "0"); w.Code != 400 {
		t.Errorf("a model with two inputs: status %d", w.Code)
	}
}

// The bodies of all requests together are bounded, however long they take.
func TestBodiesTogether(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	b := &echo{answer: func(context.Context, oip.Call) (oip.Answer, error) {
		begun <- struct{}{}
		<-goOn
		return oip.Answer{}, nil
	}}
	core := oip.New(oip.Config{Backend: b, MaxBody: 200, MaxBodies: int64(2*len(small) - 1)})
	server := httptest.NewServer(New(core))
	defer server.Close()
	infer := func(body io.Reader) reply { return send(t, server, "POST", "/v2/models/echo/infer", body) }
	for range 2 { // a refusal costs nothing in the long run
		first := make(chan int)
		go func() { first <- infer(strings.NewReader(small)).Code }()
		<-begun
		for name, body := range map[string]io.Reader{"known length": strings.NewReader(small), "chunked": io.MultiReader(strings.NewReader(small))} {
			if w := infer(body); w.Code != 503 || w.Header.Get("Retry-After") == "" {
				t.Errorf("%s: status %d, body %s", name, w.Code, w.Body)
			}
		}
		goOn <- struct{}{}
		if code := <-first; code != 200 {
			t.Errorf("the first: status %d", code)
		}
	}
	if err := core.Hold(int64(2*len(small) - 1)); err != nil {
		t.Errorf("at the end: %v", err)
	}
}

const small = `{"inputs":[{"name":"b","shape":[1],"datatype":"INT32","data":[7]}]}`

func TestBodies(t *testing.T) {
	b := &echo{}
	server := serve(t, oip.Config{Backend: b, MaxBody: 200})
	var gz, zl bytes.Buffer
	g := gzip.NewWriter(&gz)
	z := zlib.NewWriter(&zl)
	for _, w := range []io.WriteCloser{g, z} {
		io.WriteString(w, small)
		w.Close()
	}
	var bomb bytes.Buffer
	g = gzip.NewWriter(&bomb)
	io.WriteString(g, strings.Repeat(" ", 1<<16))
	g.Close()
	type onlyReader struct{ io.Reader } // hides the length, so the body comes in chunks
	for name, tt := range map[string]struct {
		body     io.Reader
		encoding string
		status   int
	}{
		"plain":                    {strings.NewReader(small), "", 200},
		"chunked":                  {onlyReader{strings.NewReader(small)}, "", 200},
		"gzip":                     {&gz, "gzip", 200},
		"deflate":                  {&zl, "deflate", 200},
		"not gzip":                 {strings.NewReader(small), "gzip", 400},
		"unknown encoding":         {strings.NewReader(small), "br", 400},
		"none":                     {http.NoBody, "", 400},
		"too large":                {strings.NewReader(small + strings.Repeat(" ", 200)), "", 413},
		"too large and chunked":    {onlyReader{strings.NewReader(small + strings.Repeat(" ", 200))}, "", 413},
		"too large when inflated":  {&bomb, "gzip", 413},
		"as large as it may be":    {strings.NewReader(small + strings.Repeat(" ", 200-len(small))), "", 200},
		"as large, and in chunks":  {onlyReader{strings.NewReader(small + strings.Repeat(" ", 200-len(small)))}, "", 200},
		"chunked, no body at all":  {onlyReader{strings.NewReader("")}, "", 400},
		"identity is no encoding ": {strings.NewReader(small), "identity", 200},
	} {
		r, err := http.NewRequestWithContext(t.Context(), "POST", server.URL+"/v2/models/echo/infer", tt.body)
		if err != nil {
			t.Fatal(err)
		}
		if tt.encoding != "" {
			r.Header.Set("Content-Encoding", tt.encoding)
		}
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tt.status {
			t.Errorf("%s: status %d, body %s, %v; want %d", name, resp.StatusCode, body, err, tt.status)
		}
		if tt.status == 413 && !strings.Contains(string(body), "200") {
			t.Errorf("%s: body %s does not name the limit", name, body)
		}
	}
}
