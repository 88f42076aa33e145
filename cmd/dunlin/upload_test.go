package main

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// breaker is a TCP proxy that cuts its first connections after a number of
// bytes from the client, as a bad link does.
type breaker struct {
	url   string
	bytes atomic.Int64 // from clients
}

func newBreaker(t *testing.T, target string, cuts []int64) *breaker {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &breaker{url: "http://" + l.Addr().String()}
	var open sync.WaitGroup
	open.Go(func() {
		for i := 0; ; i++ {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			var from io.Reader = in
			if i < len(cuts) {
				from = io.LimitReader(in, cuts[i])
			}
			open.Go(func() {
				n, _ := io.Copy(out, from)
				b.bytes.Add(n)
				in.Close()
				out.Close()
			})
			open.Go(func() { _, _ = io.Copy(in, out); in.Close() })
		}
	})
	t.Cleanup(func() { l.Close(); http.DefaultClient.CloseIdleConnections(); open.Wait() })
	return b
}

func randomBlob(t *testing.T, size int) blob {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	_, _ = r.Read(b)
	return bytesBlob("blob", b)
}

func newUploader(t *testing.T, base string) *uploader {
	t.Helper()
	c, err := newClient(settings{Token: os.Getenv("DUNLIN_TOKEN")})
	if err != nil {
		t.Fatal(err)
	}
	c.http.Transport = &http.Transport{}
	t.Cleanup(c.http.CloseIdleConnections)
	return &uploader{http: c.http, base: base + "/v2/digits", authorization: bearer(c.Token).header()}
}

// stored says whether the registry has exactly the blob's bytes.
func stored(t *testing.T, u *uploader, at string, b blob) bool {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, at+"/v2/digits/blobs/"+b.digest.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", u.authorization)
	res, err := u.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := b.open()
	if err != nil {
		t.Fatal(err)
	}
	want, err := io.ReadAll(io.NewSectionReader(r, 0, b.size))
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode == http.StatusOK && bytes.Equal(got, want)
}

func TestUploadOverBrokenConnections(t *testing.T) {
	at := login(t)
	// It is cut within the first chunk, between chunks, and in the last.
	cuts := []int64{1 << 20, 3 << 20, 9 << 20, 1 << 18}
	b := newBreaker(t, strings.TrimPrefix(at, "http://"), cuts)
	u := newUploader(t, b.url)
	blob := randomBlob(t, 20<<20)
	p := newProgress(io.Discard, false, "push")
	p.total = blob.size
	if err := u.put(t.Context(), blob, p); err != nil {
		t.Fatal(err)
	}
	if !stored(t, u, at, blob) {
		t.Error("the registry does not have what was sent")
	}
	if p.sent != blob.size || p.reused != 0 {
		t.Errorf("progress says %d sent, %d reused, of %d", p.sent, p.reused, blob.size)
	}
	u.http.CloseIdleConnections()
	// What the registry kept of a cut chunk is not sent again: at most what
	// was in flight at each cut.
	if n := b.bytes.Load(); n > blob.size+int64(len(cuts))*uploadChunk/2 {
		t.Errorf("%d bytes were sent for a blob of %d", n, blob.size)
	}
	again := newProgress(io.Discard, false, "push")
	if err := u.put(t.Context(), blob, again); err != nil || again.reused != blob.size || again.sent != 0 {
		t.Errorf("again: %v, %d sent, %d reused", err, again.sent, again.reused)
	}
}

// TestUploadFaults answers some requests in the registry's place.
func TestUploadFaults(t *testing.T) {
	at := login(t)
	target, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	blob := randomBlob(t, 1000)
	for name, c := range map[string]struct {
		method string
		status int
		times  int32
		header string // Location
		want   string
		code   int
	}{
		"busy at the start": {method: "POST", status: 503, times: 2},
		"busy at the look":  {method: "HEAD", status: 500, times: 1},
		"lost":              {method: "PATCH", status: 404, times: 2},
		"wrong range":       {method: "PATCH", status: 416, times: 1},
		"wrong at the end":  {method: "PUT", status: 400, times: 1},
		"busy for ever":     {method: "POST", status: 503, times: 1 << 20, want: "503 Service Unavailable", code: exitError},
		"lost for ever":     {method: "PATCH", status: 404, times: 1 << 20, want: "lost the upload", code: exitError},
		"not allowed":       {method: "POST", status: 403, times: 1, want: "403", code: exitNotAllowed},
		"not logged in":     {method: "HEAD", status: 401, times: 1, want: "401", code: exitNotAllowed},
		"sent to elsewhere": {method: "POST", status: 202, times: 1, header: "http://192.0.2.1/steal", want: "another host", code: exitError},
		"redirected":        {method: "POST", status: 307, times: 1, header: "http://192.0.2.1/steal", want: "307", code: exitError},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}
			var left atomic.Int32
			left.Store(c.times)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == c.method && left.Add(-1) >= 0 {
					if c.header != "" {
						w.Header().Set("Location", c.header)
					}
					w.WriteHeader(c.status)
					return
				}
				proxy.ServeHTTP(w, r)
			}))
			t.Cleanup(server.Close)
			u := newUploader(t, server.URL)
			b := bytesBlob(name, append([]byte(name), make([]byte, blob.size)...))
			p := newProgress(io.Discard, false, "push")
			err := u.put(t.Context(), b, p)
			if c.want == "" {
				if err != nil || !stored(t, u, at, b) || p.sent != b.size {
					t.Errorf("%v, %d sent", err, p.sent)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || exitCode(err) != c.code {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
			if p.sent != 0 {
				t.Errorf("progress counts %d bytes of a failed upload", p.sent)
			}
		})
	}
}
