package agent

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// handed keeps the files of sockets that were handed over, as they are gone
// with their program: were one collected, it would close its number, which is
// that of another file by then.
var handed []socket

// TestSockets has callers connect while nobody accepts, and one program after
// the other answer them.
func TestSockets(t *testing.T) {
	const address = "127.0.0.1:0"
	opened, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	l := newListener(opened, address, make(chan struct{}, 8))
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	kept, err := keep(l.address, l.Listener)
	if err != nil {
		t.Fatal(err)
	}
	l.pause()
	at := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a paused listener that is closed: %v", err)
	}
	caller, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatalf("nobody is refused while programs change: %v", err)
	}
	defer caller.Close()
	if _, err := caller.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}

	env, err := handOver([]string{"A=b", socketsEnv + "=old"}, []socket{kept})
	if err != nil {
		t.Fatal(err)
	}
	if len(env) != 2 || env[0] != "A=b" {
		t.Errorf("environment %q", env)
	}
	handed = append(handed, kept)
	_, value, _ := strings.Cut(env[1], "=")
	t.Setenv(socketsEnv, value)
	all := inherited()
	if len(all) != 1 || os.Getenv(socketsEnv) != "" {
		t.Fatalf("inherited %v, %q is left", all, os.Getenv(socketsEnv))
	}
	other, had, err := listenOn("127.0.0.2:0", all)
	if err != nil || had {
		t.Errorf("another address: %t, %v", had, err)
	} else {
		other.Close()
	}
	next, had, err := listenOn(address, all)
	if err != nil || !had {
		t.Fatalf("the same address: %t, %v", had, err)
	}
	defer next.Close()
	for _, k := range all {
		k.file.Close()
	}
	c, err := next.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Errorf("who waited said %q, %v", got, err)
	}

	for _, bad := range []string{"x", "1 127.0.0.1:0", "9999 127.0.0.1:0", ","} {
		t.Setenv(socketsEnv, bad)
		if all := inherited(); len(all) != 0 {
			t.Errorf("%q gives %v", bad, all)
		}
	}
}

// TestWatchKeepsNoSocket has a release end while its watcher still looks: its
// port is free for the next one at once.
func TestWatchKeepsNoSocket(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	kept, err := keep(l.Addr().String(), l)
	if err != nil {
		t.Fatal(err)
	}
	env, err := handOver(nil, []socket{kept})
	if err != nil {
		t.Fatal(err)
	}
	handed = append(handed, kept)
	_, value, _ := strings.Cut(env[0], "=")
	t.Setenv(socketsEnv, value)
	if err := Watch(nil); err == nil {
		t.Error("it watches nobody")
	}
	l.Close()
	again, err := net.Listen("tcp", l.Addr().String())
	if err != nil {
		kept.file.Close()
		t.Fatal(err)
	}
	again.Close()
}

func TestParting(t *testing.T) {
	h := &host{}
	s := httptest.NewServer(h.parting(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	defer s.Close()
	for _, leaving := range []bool{false, true} {
		h.leaving.Store(leaving)
		res, err := s.Client().Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.Close != leaving {
			t.Errorf("leaving %t: the connection closes: %t", leaving, res.Close)
		}
	}
}

func TestPeek(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte("data: /from/file\nupdate-probation: 7\nof-a-later-release: {a: 1}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"STATE_DIRECTORY": "/from/systemd"}
	getenv := func(key string) string { return env[key] }
	for want, args := range map[string][]string{
		"/from/systemd": {"--name", "x", "--of-a-later-release"},
		"/from/flag":    {"--config", file, "--data", "/from/flag"},
		"/from/equals":  {"-data=/from/equals", "--config=" + file},
		"/from/file":    {"--unknown", "--config", file},
	} {
		if got := peek("data", args, getenv); got != want {
			t.Errorf("%q: data is %q, want %q", args, got, want)
		}
	}
	if got := peek("update-probation", []string{"--config", file}, getenv); got != "7" {
		t.Errorf("update-probation of the file is %q", got)
	}
	env["DUNLIN_AGENT_DATA"] = "/from/environment"
	if got := peek("data", []string{"--config", file}, getenv); got != "/from/environment" {
		t.Errorf("data of the environment is %q", got)
	}
	if got := peek("data", []string{"--data"}, getenv); got != "/from/environment" {
		t.Errorf("data of a flag without a value is %q", got)
	}
}
