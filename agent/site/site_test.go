package site

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
)

type member struct {
	roots []*x509.Certificate
	own   *tls.Certificate
	now   func() time.Time
}

func (m member) TLSCertificate() (*tls.Certificate, error) {
	if m.own == nil {
		return nil, errors.New("has not joined")
	}
	return m.own, nil
}
func (m member) Roots() []*x509.Certificate { return m.roots }
func (m member) Now() time.Time             { return m.now() }

func of(t *testing.T, fleet *pki.Authority, name string) member {
	return member{[]*x509.Certificate{fleet.Certificate}, pkitest.Device(t, fleet, name), time.Now}
}

// serve runs a server that has one blob of a model.
func serve(t *testing.T, id Identity, blob []byte) string {
	t.Helper()
	s, err := Listen("127.0.0.1:0", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx, id, func(_ context.Context, model string, d digest.Digest, manifest bool) (io.ReadSeeker, io.Closer, error) {
			if model != "digits" || manifest || d != digest.FromBytes(blob) {
				return nil, nil, fs.ErrNotExist
			}
			return bytes.NewReader(blob), io.NopCloser(nil), nil
		}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	url, err := s.URL()
	if err != nil {
		t.Fatal(err)
	}
	return url
}

func get(t *testing.T, c *http.Client, url, ranged string) (int, []byte, error) {
	t.Helper()
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ranged != "" {
		req.Header.Set("Range", ranged)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// Devices of the fleet are answered, by whichever address, and nobody else.
func TestOnlyTheFleetIsAnswered(t *testing.T) {
	fleet, foreign := pkitest.Authority(t), pkitest.Authority(t)
	blob := []byte("some weights")
	url := serve(t, of(t, fleet, "holder"), blob)
	path := "/v2/digits/blobs/" + digest.FromBytes(blob).String()

	asks := NewClient(of(t, fleet, "asks"), "holder")
	if status, body, err := get(t, asks, url+path, ""); err != nil || status != http.StatusOK || !bytes.Equal(body, blob) {
		t.Errorf("a device of the fleet: %d %q, %v", status, body, err)
	}
	if status, body, err := get(t, asks, url+path, "bytes=5-6"); err != nil || status != http.StatusPartialContent || string(body) != "we" {
		t.Errorf("a part: %d %q, %v", status, body, err)
	}
	for _, other := range []string{"/v2/other/blobs/" + digest.FromBytes(blob).String(), "/v2/digits/manifests/" + digest.FromBytes(blob).String(),
		"/v2/digits/blobs/sha256:00", "/v2/Digits/blobs/" + digest.FromBytes(blob).String(), "/v2/", "/"} {
		if status, _, err := get(t, asks, url+other, ""); err != nil || status != http.StatusNotFound {
			t.Errorf("%s: %d, %v", other, status, err)
		}
	}
	resp, err := asks.Post(url+path, "", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %s", resp.Status)
	}

	stranger := func(own *tls.Certificate) *http.Client {
		return &http.Client{Transport: &http.Transport{TLSClientConfig: pkitest.ClientTLS(fleet, own)}}
	}
	controller := pkitest.Server(t, fleet)
	late := of(t, fleet, "late")
	late.now = func() time.Time { return time.Now().Add(100 * 365 * 24 * time.Hour) }
	for name, c := range map[string]*http.Client{
		"no certificate":                  NewClient(member{roots: []*x509.Certificate{fleet.Certificate}, now: time.Now}, "holder"),
		"a certificate of another fleet":  NewClient(member{[]*x509.Certificate{fleet.Certificate}, pkitest.Device(t, foreign, "asks"), time.Now}, "holder"),
		"who expects another device":      NewClient(of(t, fleet, "asks"), "another"),
		"who knows another fleet":         NewClient(member{[]*x509.Certificate{foreign.Certificate}, pkitest.Device(t, fleet, "asks"), time.Now}, "holder"),
		"whose clock says it has expired": NewClient(late, "holder"),
		"who takes it for the controller": stranger(pkitest.Device(t, fleet, "asks")),
		"no TLS":                          http.DefaultClient,
	} {
		at := url
		if name == "no TLS" {
			at = "http" + strings.TrimPrefix(url, "https")
		}
		if status, body, err := get(t, c, at+path, ""); err == nil && status == http.StatusOK {
			t.Errorf("%s: answered %q", name, body)
		}
	}
	// The controller has a certificate of the fleet, and is no device.
	id := of(t, fleet, "x")
	id.own = controller
	if status, _, err := get(t, NewClient(id, "holder"), url+path, ""); err != nil || status != http.StatusForbidden {
		t.Errorf("the controller: %d, %v", status, err)
	}
	// The server's own clock counts for certificates.
	late.own = pkitest.Device(t, fleet, "late-holder")
	if status, _, err := get(t, NewClient(of(t, fleet, "asks"), "late-holder"), serve(t, late, blob)+path, ""); err == nil {
		t.Errorf("an expired certificate: %d", status)
	}
}

// More than may be answered at a time wait, and more than may wait are sent
// away.
func TestTurns(t *testing.T) {
	places, waiting := make(chan struct{}, 1), make(chan struct{}, 1)
	if !turn(t.Context(), places, waiting) {
		t.Fatal("no place")
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan bool)
	go func() { got <- turn(ctx, places, waiting) }()
	for len(waiting) == 0 {
		time.Sleep(time.Millisecond)
	}
	if turn(t.Context(), places, waiting) {
		t.Error("a third has a place")
	}
	<-places
	if !<-got {
		t.Error("the one that waited has none")
	}
	go func() { got <- turn(ctx, places, waiting) }()
	cancel()
	if <-got {
		t.Error("one that left has a place")
	}
}

// pipes is a listener of connections in memory.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (pipes) Close() error   { return nil }
func (pipes) Addr() net.Addr { return &net.TCPAddr{} }

// TestSlowClients has clients that send no end of a request, or ask again after
// a while: nobody holds a connection for ever, and nobody is cut off.
func TestSlowClients(t *testing.T) {
	for name, request := range map[string]string{
		"no body comes": "GET /v2/digits/blobs/sha256:00 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
		"no end of it":  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
		"no header":     "GET / HTTP/1.1\r\n",
		"two answers":   "",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conns := make(pipes)
				server := (&Server{log: slog.New(slog.DiscardHandler)}).server(member{}, nil)
				ended := make(chan error)
				go func() { ended <- server.Serve(conns) }()
				client, other := net.Pipe()
				conns <- other
				began := time.Now()
				if request != "" {
					if _, err := client.Write([]byte(request)); err != nil {
						t.Fatal(err)
					}
					_, _ = io.ReadAll(client) // an answer or none, and the end
					if took := time.Since(began); took > bodyTime+5*time.Second {
						t.Errorf("the connection lasted %s", took)
					}
				} else {
					in := bufio.NewReader(client)
					for range 2 {
						if _, err := client.Write([]byte("GET /v2/digits/blobs/sha256:00 HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
							t.Fatal(err)
						}
						resp, err := http.ReadResponse(in, nil)
						if err != nil {
							t.Fatal(err)
						}
						if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusForbidden {
							t.Errorf("%s, %v", resp.Status, err)
						}
						time.Sleep(writeTime + time.Second)
					}
				}
				client.Close()
				close(conns)
				server.Close()
				<-ended
			})
		})
	}
}
