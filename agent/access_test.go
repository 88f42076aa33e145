package agent

import (
	"bufio"
	"encoding/base64"
	"fmt"
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

func TestKeys(t *testing.T) {
	s := Serving{APIKeys: keyFile(t, "# of the shop\n\n  "+goodKey+"  \nanother-key-of-the-tests\n")}
	k, err := s.loadKeys()
	if err != nil {
		t.Fatal(err)
	}
	basic := func(pair string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(pair)) }
	for header, ok := range map[string]bool{
		"Bearer " + goodKey: true, "bearer " + goodKey: true, "Bearer another-key-of-the-tests": true, basic("anyone:" + goodKey): true,
		"": false, "Bearer": false, "Bearer ": false, "Bearer # of the shop": false, goodKey: false, "Bearer " + goodKey + "1": false,
		basic(goodKey + ":"): false, "Basic !!!": false, "Digest " + goodKey: false,
	} {
		if err := k.allow(header); (err == nil) != ok {
			t.Errorf("%q: %v", header, err)
		}
	}
	var none *keys
	if err := none.allow(""); err != nil {
		t.Errorf("without keys: %v", err)
	}
}

func TestKeyFaults(t *testing.T) {
	var many strings.Builder
	for n := range maxKeys + 1 {
		fmt.Fprintf(&many, "key-number-%06d\n", n)
	}
	for content, want := range map[string]string{
		"":                                 "holds no key",
		"# only words\n":                   "holds no key",
		goodKey + "\nshort\n":              ":2: the key has 5 characters, at least 16",
		many.String():                      "more than 1024 keys",
		strings.Repeat("#", maxKeysFile+1): "allowed are 1048576",
	} {
		s := Serving{APIKeys: keyFile(t, content)}
		if _, err := s.loadKeys(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", content, err, want)
		}
	}
	s := Serving{APIKeys: filepath.Join(t.TempDir(), "none")}
	if _, err := s.loadKeys(); err == nil {
		t.Error("a file that is not there was taken")
	}
}

func TestKeyHandler(t *testing.T) {
	k, err := (&Serving{APIKeys: keyFile(t, goodKey)}).loadKeys()
	if err != nil {
		t.Fatal(err)
	}
	h := k.handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	for _, tt := range []struct {
		path, header string
		want         int
	}{
		{"/v2/models/m/infer", "", 401}, {"/v2/models/m/infer", "Bearer wrong", 401}, {"/v2/models/m/infer", "Bearer " + goodKey, 204},
		{"/metrics", "", 401}, {"/v2/health/live", "", 204}, {"/v2/health/ready", "", 204}, {"/healthz", "", 204},
		{"/v2/health/ready/../../models/m", "", 401},
	} {
		r := httptest.NewRequest(http.MethodGet, tt.path, nil)
		if tt.header != "" {
			r.Header.Set("Authorization", tt.header)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.want || tt.want == 401 && (w.Header().Get("WWW-Authenticate") != "Bearer" || !strings.Contains(w.Body.String(), `{"error":"`)) {
			t.Errorf("%s with %q: %d %v %s", tt.path, tt.header, w.Code, w.Header(), w.Body)
		}
	}
}

// A caller that announces a body, which nothing reads, and does not send it is
// answered and does not keep its connection.
func TestUnreadBodies(t *testing.T) {
	k, err := (&Serving{APIKeys: keyFile(t, goodKey)}).loadKeys()
	if err != nil {
		t.Fatal(err)
	}
	h := k.handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
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
		ports[i] = newListener(l, room)
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
