package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
)

// login makes the environment that of somebody who is logged in to a
// controller of the test's own.
func login(t *testing.T) (url string) {
	t.Helper()
	url, token, stop, err := startController(filepath.Join(t.TempDir(), "controller"), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	t.Setenv("DUNLIN_URL", url)
	t.Setenv("DUNLIN_TOKEN", token)
	return url
}

// dunlin runs one command line.
func dunlin(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return dunlinWith(t, "", args...)
}

// dunlinWith runs one command line with an input.
func dunlinWith(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(stdin), &out, &err)
	return code, out.String(), err.String()
}

func must(t *testing.T, args ...string) string {
	t.Helper()
	code, out, err := dunlin(t, args...)
	if code != exitOK {
		t.Fatalf("dunlin %s: exit code %d\n%s", strings.Join(args, " "), code, err)
	}
	return out
}

// signalWriter tells when something was written to it.
type signalWriter struct {
	once    sync.Once
	written chan struct{}
}

func (s *signalWriter) Write(p []byte) (int, error) {
	s.once.Do(func() { close(s.written) })
	return len(p), nil
}

const deployment = `apiVersion: dunlin/v1
kind: Deployment
metadata: {name: digits}
spec:
  model: digits
  version: %d
  selector: {site: demo}
  rollout: {deadline: 10m}
`

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestRolloutWatch lets a newer rollout begin, then interrupts, while the
// command watches.
func TestRolloutWatch(t *testing.T) {
	url := login(t)
	digits := filepath.Join("..", "..", "models", "examples", "digits")
	must(t, "push", filepath.Join(digits, "v1.onnx"), "digits")
	must(t, "push", filepath.Join(digits, "v2.onnx"), "digits")
	// A device that is there and does not come to its end holds the rollout.
	d, err := joinDevice(url, "cam-1", strings.TrimSpace(must(t, "join-token", "create", "--label", "site=demo")), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.cancel(); d.running.Wait() })

	watch := func(ctx context.Context) (code <-chan int, seen <-chan struct{}) {
		s := &signalWriter{written: make(chan struct{})}
		c := make(chan int, 1)
		go func() {
			c <- run(ctx, []string{"rollout", "status", "digits", "--wait"}, strings.NewReader(""), &bytes.Buffer{}, s)
		}()
		return c, s.written
	}
	must(t, "apply", "-f", writeFile(t, fmt.Sprintf(deployment, 1)))
	code, seen := watch(t.Context())
	<-seen
	must(t, "apply", "-f", writeFile(t, fmt.Sprintf(deployment, 2)))
	if got := <-code; got != exitRolloutFailed {
		t.Errorf("superseded: exit code %d", got)
	}

	ctx, cancel := context.WithCancel(t.Context())
	code, seen = watch(ctx)
	<-seen
	cancel()
	if got := <-code; got != exitError {
		t.Errorf("interrupted: exit code %d", got)
	}
}

// TestRolloutWatchOutlivesRestart stops the controller while the command
// watches, and starts it again; then it stays away.
func TestRolloutWatchOutlivesRestart(t *testing.T) {
	data := filepath.Join(t.TempDir(), "controller")
	url, token, stop, err := startController(data, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop() })
	t.Setenv("DUNLIN_URL", url)
	t.Setenv("DUNLIN_TOKEN", token)
	digits := filepath.Join("..", "..", "models", "examples", "digits")
	must(t, "push", filepath.Join(digits, "v1.onnx"), "digits")
	must(t, "push", filepath.Join(digits, "v2.onnx"), "digits")
	d, err := joinDevice(url, "cam-1", strings.TrimSpace(must(t, "join-token", "create", "--label", "site=demo")), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.cancel(); d.running.Wait() })
	must(t, "apply", "-f", writeFile(t, fmt.Sprintf(deployment, 1)))

	var text lockedBuffer
	code := make(chan int, 1)
	go func() {
		code <- run(t.Context(), []string{"rollout", "status", "digits", "--wait"}, strings.NewReader(""), io.Discard, &text)
	}()
	text.waitFor(t, "running")
	stop()
	text.waitFor(t, "trying again")
	if _, _, stop, err = startController(data, strings.TrimPrefix(url, "http://")); err != nil {
		t.Fatal(err)
	}
	// The device does not find its broker any more; whether the rollout ends
	// without it or is superseded is the controller's to say.
	must(t, "apply", "-f", writeFile(t, fmt.Sprintf(deployment, 2)))
	if got := <-code; got != exitOK && got != exitRolloutFailed {
		t.Errorf("exit code %d: %s", got, text.String())
	}

	stop()
	stop = func() {}
	if code, _, text := dunlin(t, "rollout", "status", "digits", "--wait"); code != exitError || !strings.Contains(text, "Is the controller running") {
		t.Errorf("nobody there from the start: exit code %d, %s", code, text)
	}
}

// TestRolloutWatchGivesUp lets the controller stay away in the middle.
func TestRolloutWatchGivesUp(t *testing.T) {
	data := filepath.Join(t.TempDir(), "controller")
	url, token, stop, err := startController(data, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop() })
	t.Setenv("DUNLIN_URL", url)
	t.Setenv("DUNLIN_TOKEN", token)
	must(t, "push", filepath.Join("..", "..", "models", "examples", "digits", "v1.onnx"), "digits")
	d, err := joinDevice(url, "cam-1", strings.TrimSpace(must(t, "join-token", "create", "--label", "site=demo")), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.cancel(); d.running.Wait() })
	must(t, "apply", "-f", writeFile(t, fmt.Sprintf(deployment, 1)))
	ctl, err := new(cli).client()
	if err != nil {
		t.Fatal(err)
	}
	var text lockedBuffer
	c := &cli{out: io.Discard, err: &text, watchGrace: watchPause / 2}
	done := make(chan error, 1)
	go func() {
		_, err := c.waitRollout(t.Context(), ctl, "digits", following{until: ended})
		done <- err
	}()
	text.waitFor(t, "running")
	stop()
	if err := <-done; err == nil || exitCode(err) != exitError {
		t.Errorf("got %v", err)
	}
}

// lockedBuffer is a buffer that can be read while it is written to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(l.String(), text); {
		if time.Now().After(deadline) {
			t.Fatalf("no %q after %s: %s", text, patience, l.String())
		}
		<-time.After(time.Millisecond)
	}
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("x"), exitError},
		{usagef("x"), exitUsage},
		{fmt.Errorf("y: %w", usagef("x")), exitUsage},
		{connect.NewError(connect.CodePermissionDenied, errors.New("x")), exitNotAllowed},
		{fmt.Errorf("y: %w", connect.NewError(connect.CodeUnauthenticated, errors.New("x"))), exitNotAllowed},
		{connect.NewError(connect.CodeNotFound, errors.New("x")), exitError},
		{codeError{code: exitTimeout}, exitTimeout},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
	text := message(fmt.Errorf("push digits: %w", connect.NewError(connect.CodeUnauthenticated, errors.New("no credentials"))))
	if want := "push digits: no credentials\nrun: dunlin login URL"; text != want {
		t.Errorf("message %q, want %q", text, want)
	}
	text = message(fmt.Errorf("get devices: %w", connect.NewError(connect.CodeUnimplemented, errors.New(""))))
	if want := "get devices: what answers there does not know this call\n"; !strings.HasPrefix(text, want) {
		t.Errorf("message %q, want %q", text, want)
	}
}

func TestCheckURL(t *testing.T) {
	for in, want := range map[string]string{
		"http://127.0.0.1:8080":          "http://127.0.0.1:8080",
		"http://127.0.0.1:8080/":         "http://127.0.0.1:8080",
		"http://localhost:1":             "http://localhost:1",
		"http://[::1]:1":                 "http://[::1]:1",
		"https://dunlin.example":         "https://dunlin.example",
		"https://dunlin.example/base/":   "https://dunlin.example/base",
		"http://dunlin.example":          "",
		"http://10.1.2.3:8080":           "",
		"http://localhost.evil.example":  "",
		"http://127.0.0.1.evil.example":  "",
		"http://0.0.0.0:8080":            "",
		"https://user:pw@dunlin.example": "",
		"https://dunlin.example?x=y":     "",
		"ftp://127.0.0.1":                "",
		"https://:8080":                  "",
		"127.0.0.1:8080":                 "",
		"":                               "",
	} {
		got, err := checkURL(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

// TestJSONIsStable: protojson varies its spaces from build to build.
func TestJSONIsStable(t *testing.T) {
	login(t)
	out := must(t, "get", "devices", "-o", "json")
	if out != "{\n  \"devices\": []\n}\n" || !json.Valid([]byte(out)) {
		t.Errorf("got %q", out)
	}
}
