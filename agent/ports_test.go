package agent

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/proto/inference"
)

const goodKey = "a-key-of-the-tests-0001"

func keyFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A caller that announces a body, which nothing reads, and does not send it is
// answered and does not keep its connection.
func TestUnreadBodies(t *testing.T) {
	k, err := (&Serving{APIKeys: keyFile(t, goodKey)}).guard()
	if err != nil {
		t.Fatal(err)
	}
	h := k.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	server := httptest.NewServer(hurried(h, 50*time.Millisecond))
	defer server.Close()
	for path, want := range map[string]int{"/healthz": 204, "/v2/models/m/infer": 401} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		resp.Body.Close()
		if resp.StatusCode != want || !resp.Close {
			t.Errorf("%s: status %d, want %d; the connection closes: %t", path, resp.StatusCode, want, resp.Close)
		}
	}
}

func TestConnectionLimit(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if n := connectionLimit(); n > maxConnections || uint64(n) > limit.Cur/4*3 {
		t.Errorf("%d connections with %d files", n, limit.Cur)
	}
}

// Two listeners share what room there is; a connection that is closed, also
// twice, makes room for one other.
func TestListenersShareRoom(t *testing.T) {
	room := make(chan struct{}, 2)
	var ports [2]*listener
	accepted := make(chan net.Conn)
	var wg sync.WaitGroup
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ports[i] = newListener(l, "", room)
	}
	accept := func(l *listener) {
		wg.Go(func() {
			if c, err := l.Accept(); err == nil {
				accepted <- c
			}
		})
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	accept(ports[0])
	first := <-accepted
	accept(ports[1])
	second := <-accepted
	accept(ports[0]) // finds no room
	select {
	case <-accepted:
		t.Fatal("a third connection")
	case <-time.After(50 * time.Millisecond):
	}
	first.Close()
	first.Close()
	third := <-accepted
	if len(room) != 2 {
		t.Errorf("%d places are taken", len(room))
	}
	accept(ports[1])
	for _, l := range ports { // who waits for room is told
		l.Close()
	}
	wg.Wait()
	second.Close()
	third.Close()
	if len(room) != 0 {
		t.Errorf("%d places are taken when all have left", len(room))
	}
}

// A device's own certificate serves where the settings name none; clients show
// certificates, or keys; each may ask for its models, as often as it may.
func TestWhoMayAsk(t *testing.T) {
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.NewAuthority(key, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	issued := func(name string) *tls.Certificate {
		own, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		c, err := ca.IssueDevice(name, own.Public(), time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: own, Leaf: c}
	}
	serverKey, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	server, err := ca.IssueController([]string{"127.0.0.1"}, serverKey.Public(), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	serverKeyFile := filepath.Join(t.TempDir(), "key")
	if err := pki.WriteKey(serverKeyFile, serverKey); err != nil {
		t.Fatal(err)
	}
	const limitedKey = "a-key-of-one-model-only"
	rules := keyFile(t, goodKey+" name=operator\ncert=camera-* models=digits\n"+limitedKey+" name=slow models=digits rate=1/h burst=2\n")
	url, address := startAlone(t, Alone{File: digitsFile(t), Serving: Serving{
		APIKeys: rules, ClientCA: keyFile(t, string(pki.EncodeCertificates(ca.Certificate))),
		TLSCert: keyFile(t, string(pki.EncodeCertificates(server))), TLSKey: serverKeyFile,
	}})
	client := func(own *tls.Certificate) *http.Client {
		c := &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{
			RootCAs: pki.Pool(ca.Cross), GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if own == nil {
					return new(tls.Certificate), nil
				}
				return own, nil
			},
		}}}
		c.Transport.(*http.Transport).TLSClientConfig.RootCAs.AddCert(ca.Certificate)
		t.Cleanup(c.CloseIdleConnections)
		return c
	}
	anybody, camera, door := client(nil), client(issued("camera-1")), client(issued("door"))
	until(t, "ready", func() error { return status200(anybody, url+"/v2/health/ready", "") })
	for _, tt := range []struct {
		who       string
		client    *http.Client
		path, key string
		want      int
	}{
		{"anybody", anybody, "/v2/models/digits", "", 401},
		{"the operator", anybody, "/v2/models/digits", goodKey, 200},
		{"the operator", anybody, "/metrics", goodKey, 200},
		{"a camera", camera, "/v2/models/digits", "", 200},
		{"a camera", camera, "/v2/models/digits/config", "", 200},
		{"a camera", camera, "/v2/models/digits/stats", "", 200},
		{"a camera", camera, "/v2/models/words", "", 403},
		{"a camera", camera, "/v2/models/words/config", "", 403},
		{"a camera", camera, "/v2/models/words/stats", "", 403},
		{"a camera", camera, "/v2/models/words/ready", "", 403},
		{"a camera", camera, "/v2/models/words/trace/setting", "", 403},
		{"a camera", camera, "/metrics", "", 403},
		{"a door", door, "/v2/models/digits", "", 401},
		{"a door", door, "/healthz", "", 200},
		{"a slow one", anybody, "/v2/models/digits", limitedKey, 200},
		{"a slow one", anybody, "/v2/models/digits/ready", limitedKey, 200},
		{"a slow one", anybody, "/v2/models/digits", limitedKey, 429},
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if tt.key != "" {
			r.Header.Set("Authorization", "Bearer "+tt.key)
		}
		resp, err := tt.client.Do(r)
		if err != nil {
			t.Errorf("%s, %s: %v", tt.who, tt.path, err)
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.want || tt.want == 403 && strings.HasPrefix(tt.path, "/v2/models/words") && !strings.Contains(string(body), "words") ||
			tt.want == 429 && resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s, %s: status %d, want %d: %v %s", tt.who, tt.path, resp.StatusCode, tt.want, resp.Header, body)
		}
	}
	old := client(nil)
	old.Transport.(*http.Transport).TLSClientConfig.MaxVersion = tls.VersionTLS12
	if err := status200(old, url+"/healthz", ""); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("TLS 1.2: %v", err)
	}

	trust := camera.Transport.(*http.Transport).TLSClientConfig.Clone()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(trust)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	service := inference.NewGRPCInferenceServiceClient(conn)
	if _, err := service.ModelInfer(t.Context(), digitRequest()); err != nil {
		t.Errorf("gRPC, a camera: %v", err)
	}
	words := digitRequest()
	words.ModelName = "words"
	if _, err := service.ModelInfer(t.Context(), words); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), `"words"`) {
		t.Errorf("gRPC, a camera asks for words: %v", err)
	}
	for name, call := range map[string]func() error{
		"metadata": func() error {
			_, err := service.ModelMetadata(t.Context(), &inference.ModelMetadataRequest{Name: "words"})
			return err
		},
		"load": func() error {
			_, err := service.RepositoryModelLoad(t.Context(), &inference.RepositoryModelLoadRequest{ModelName: "words"})
			return err
		},
		"unload": func() error {
			_, err := service.RepositoryModelUnload(t.Context(), &inference.RepositoryModelUnloadRequest{ModelName: "words"})
			return err
		},
		"log settings": func() error {
			_, err := service.LogSettings(t.Context(), &inference.LogSettingsRequest{Settings: map[string]*inference.LogSettingsRequest_SettingValue{
				"log_info": {ParameterChoice: &inference.LogSettingsRequest_SettingValue_BoolParam{BoolParam: false}},
			}})
			return err
		},
		"trace settings": func() error {
			_, err := service.TraceSetting(t.Context(), &inference.TraceSettingRequest{Settings: map[string]*inference.TraceSettingRequest_SettingValue{
				"trace_level": {Value: []string{"OFF"}},
			}})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("gRPC, a camera, %s: %v", name, err)
		}
	}
	index, err := service.RepositoryIndex(t.Context(), &inference.RepositoryIndexRequest{})
	if err != nil || len(index.Models) != 1 {
		t.Errorf("gRPC, a camera, index: %v, %v", index, err)
	}
	// The messages of a stream count; it stays open when they are too many.
	write := func(text string) {
		if err := os.WriteFile(rules, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(limitedKey + " name=streamer rate=1/h burst=2\n")
	until(t, "the new rules", func() error {
		if err := status200(anybody, url+"/v2/models/digits", goodKey); err == nil {
			return fmt.Errorf("the old ones are in force")
		}
		return nil
	})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+limitedKey)
	stream, err := service.ModelStreamInfer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"", "", "may ask 1/h", "may ask 1/h"} {
		if err := stream.Send(digitRequest()); err != nil {
			t.Fatal(err)
		}
		got, err := stream.Recv()
		if err != nil || (want == "") != (got.ErrorMessage == "") || !strings.Contains(got.ErrorMessage, want) {
			t.Errorf("message %d: %v, %v", i, got.GetErrorMessage(), err)
		}
	}
	if _, err := service.ModelInfer(ctx, digitRequest()); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("gRPC beyond the rate: %v", err)
	}
}
