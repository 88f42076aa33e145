package simfleet

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dunlin/dunlin/internal/program"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSettings(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("- {at: 1s, loss: 0.5}"), 0o600); err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := func(string) string { return "" }
	s, err := parse([]string{"--controller", "https://127.0.0.1:1", "--join-token", "@" + token, "--devices", "10", "--class", "jetson-orin-nano-8gb=30,raspberry-pi-5=70",
		"--script", script, "--seed", "7", "--label", "site=a", "--for", "10m", "--requests-per-second", "0.5"}, none, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	c := s.cfg
	if c.JoinToken != "secret" || c.Devices != 10 || c.Seed != 7 || len(c.Classes) != 2 || c.Classes[0].Weight != 30 || c.Classes[1].Profile.Name != "raspberry-pi-5" ||
		len(c.Faults) != 1 || c.Labels["site"] != "a" || s.end != 10*time.Minute || c.RequestsPerSecond != 0.5 || c.Agents != nil {
		t.Errorf("%+v", c)
	}
	if _, err := parse([]string{"--help"}, none, io.Discard); err == nil {
		t.Error("help is no error")
	}
	_, err = parse([]string{"--controller", "ftp://x", "--devices", "0", "--class", "toaster", "--seed", "-1", "--for", "never", "--requests-per-second", "many", "--metrics-listen", "0.0.0.0:1"}, none, io.Discard)
	if !errors.Is(err, program.ErrUsage) {
		t.Error(err)
	}
	for _, want := range []string{"controller: ", "join-token: is missing", "class: ", "toaster", "seed: is -1", "for: is \"never\"", "requests-per-second: is \"many\"", "metrics-listen: ", "devices: is 0"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}

// lines gives what is written to it, line by line.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// A fleet that cannot join says so, in words and in metrics.
func TestTell(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	set := settings{Class: "raspberry-pi-5=2,jetson-orin-nano-8gb=1"}
	classes, err := set.classes()
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(Config{Controller: "https://127.0.0.1:1", JoinToken: "x", Devices: 9, Classes: classes, Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	of := map[string]int{}
	for _, d := range f.Devices() {
		of[d.Class]++
	}
	if of["raspberry-pi-5"] != 6 || of["jetson-orin-nano-8gb"] != 3 {
		t.Errorf("classes %v", of)
	}
	out := new(lines)
	done := make(chan error, 1)
	go func() { done <- f.tell(ctx, "127.0.0.1:0", out) }()
	var url string
	for end := time.Now().Add(time.Minute); url == "" && time.Now().Before(end); time.Sleep(time.Millisecond) {
		_, rest, _ := strings.Cut(out.String(), "metrics at ")
		url = strings.TrimSpace(rest)
	}
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if err != nil || !strings.Contains(string(raw), "\ndunlin_simulated_devices{state=\"all\"} 9\n") || !strings.Contains(string(raw), "dunlin_simulated_devices{state=\"converged\"} 0") {
		t.Errorf("%v\n%s", err, raw)
	}
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "9 of 9 devices do not run what they should: sim-0: ") {
		t.Errorf("ended by %v", err)
	}
	if !strings.Contains(out.String(), "0 of 9 devices joined") {
		t.Errorf("said %s", out)
	}
}
