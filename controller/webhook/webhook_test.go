package webhook

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/store"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// news is a source with what a test puts in.
type news struct {
	mu      sync.Mutex
	all     []store.News
	cursors map[string]store.Cursor
}

func (n *news) add(one store.News) {
	n.mu.Lock()
	defer n.mu.Unlock()
	one.Cursor = store.Cursor{Event: int64(len(n.all) + 1), Decision: int64(len(n.all) + 1)}
	n.all = append(n.all, one)
}

func (n *news) News(_ context.Context, after store.Cursor, limit int) ([]store.News, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.all[after.Event:min(int(after.Event)+limit, len(n.all))]), nil
}

func (n *news) Cursor(_ context.Context, name string) (store.Cursor, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cursors[name], nil
}

func (n *news) SetCursor(_ context.Context, name string, c store.Cursor) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cursors[name] = c
	return nil
}

func event(kind, site string, severity dunlinv1.Severity) store.News {
	return store.News{Device: "cam-" + site, Labels: map[string]string{"site": site}, Event: &dunlinv1.Event{Kind: kind, Severity: severity, At: timestamppb.Now(), Message: "it says so"}}
}

func decision(kind fleet.DecisionKind) store.News {
	return store.News{Rollout: &fleet.Rollout{Number: 7, Deployment: "digits", Model: "digits", From: 1, To: 2}, Selector: map[string]string{"site": "berlin"},
		Decision: &fleet.Decision{Kind: kind, Wave: 1, By: "gate", Reason: "p99", Devices: []string{"cam-berlin"}, At: time.Now()}}
}

// endpoint is a real server that is told.
type endpoint struct {
	*httptest.Server
	mu     sync.Mutex
	got    []Message
	answer func(n int) int // status of the n-th request, from 1
	tries  int
	bad    []string
	news   chan struct{}
}

const secret = "a secret of some length"

func serve(t *testing.T, answer func(n int) int) *endpoint {
	e := &endpoint{answer: answer, news: make(chan struct{}, 1)}
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		e.mu.Lock()
		defer e.mu.Unlock()
		e.tries++
		status := http.StatusNoContent
		if e.answer != nil {
			status = e.answer(e.tries)
		}
		var m Message
		at := time.Unix(0, 0)
		if s, _, ok := strings.Cut(strings.TrimPrefix(r.Header.Get(SignatureHeader), "t="), ","); ok {
			var n int64
			_ = json.Unmarshal([]byte(s), &n)
			at = time.Unix(n, 0)
		}
		switch {
		case err != nil, json.Unmarshal(body, &m) != nil:
			e.bad = append(e.bad, "body")
		case r.Header.Get(SignatureHeader) != Sign(secret, at, body) || time.Since(at) > time.Minute:
			e.bad = append(e.bad, "signature "+r.Header.Get(SignatureHeader))
		case r.Header.Get(DeliveryHeader) != m.ID || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json":
			e.bad = append(e.bad, "headers")
		}
		if status < 300 {
			e.got = append(e.got, m)
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
		select {
		case e.news <- struct{}{}:
		default:
		}
	}))
	t.Cleanup(e.Close)
	return e
}

// wait waits until the endpoint took n messages, and gives their kinds.
func (e *endpoint) wait(t *testing.T, n int) (kinds []string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		e.mu.Lock()
		kinds = nil
		for _, m := range e.got {
			kinds = append(kinds, m.Kind)
		}
		bad := e.bad
		e.mu.Unlock()
		if len(bad) > 0 {
			t.Fatalf("wrong: %v", bad)
		}
		if len(kinds) >= n {
			return kinds
		}
		select {
		case <-e.news:
		case <-deadline:
			t.Fatalf("told are only %v", kinds)
		}
	}
}

func run(t *testing.T, source Source, hooks ...Hook) (s *Sender, stop func()) {
	s = New(source, hooks, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	s.timing = timing{look: time.Millisecond, call: 5 * time.Second, retry: time.Millisecond, longest: 5 * time.Millisecond, giveUp: time.Hour}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

// TestDelivery tells two endpoints, each what it wants and in order, signed;
// one that is down for a while misses nothing, and what was told is not told
// again after a restart.
func TestDelivery(t *testing.T) {
	source := &news{cursors: map[string]store.Cursor{}}
	all := serve(t, func(n int) int {
		if n%3 == 1 {
			return http.StatusBadGateway
		}
		return http.StatusOK
	})
	some := serve(t, nil)
	hooks := []Hook{
		{Name: "all", URL: all.URL, Secret: secret},
		{Name: "some", URL: some.URL, Secret: secret, Kinds: []string{"alarm.*", "rollout.halt"}, Severity: "warning", Selector: map[string]string{"site": "berlin"}},
	}
	_, stop := run(t, source, hooks...)
	source.add(event("alarm.raised", "berlin", dunlinv1.Severity_SEVERITY_WARNING))
	source.add(event("alarm.raised", "rome", dunlinv1.Severity_SEVERITY_ERROR))
	source.add(event("alarm.raised", "berlin", dunlinv1.Severity_SEVERITY_INFO))
	source.add(event("worker.died", "berlin", dunlinv1.Severity_SEVERITY_ERROR))
	source.add(decision(fleet.DecideStart))
	source.add(decision(fleet.DecideHalt))
	want := []string{"alarm.raised", "alarm.raised", "alarm.raised", "worker.died", "rollout.start", "rollout.halt"}
	if got := all.wait(t, len(want)); !slices.Equal(got, want) {
		t.Errorf("told %v", got)
	}
	if got := some.wait(t, 2); !slices.Equal(got, []string{"alarm.raised", "rollout.halt"}) {
		t.Errorf("told %v", got)
	}
	halt := some.got[1]
	if halt.Rollout != "digits-7" || halt.Version != 2 || halt.FromVersion != 1 || halt.Severity != "error" || halt.By != "gate" || halt.Message != "p99" || halt.Devices[0] != "cam-berlin" {
		t.Errorf("the halt is told as %+v", halt)
	}
	for _, name := range []string{"webhook all", "webhook some"} {
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			if c, err := source.Cursor(t.Context(), name); err != nil || c.Event == 6 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: what was told is not kept", name)
			}
		}
	}
	stop()
	_, stop = run(t, source, hooks...)
	source.add(decision(fleet.DecideRollBack))
	if got := all.wait(t, len(want)+1); got[len(want)] != "rollout.roll_back" || len(got) != len(want)+1 {
		t.Errorf("told %v", got)
	}
	stop()
}

// dropped gives what the metric of dropped messages counts.
func dropped(t *testing.T, metrics *prometheus.Registry) float64 {
	t.Helper()
	families, err := metrics.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "dunlin_controller_webhook_dropped_total" {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatal("there is no such metric")
	return 0
}

// TestDropped: what an endpoint refuses, redirects or does not take for too
// long is dropped and counted, and holds up neither what follows nor others.
func TestDropped(t *testing.T) {
	for name, answer := range map[string]int{"refused": http.StatusBadRequest, "elsewhere": http.StatusFound, "down": http.StatusServiceUnavailable} {
		t.Run(name, func(t *testing.T) {
			source := &news{cursors: map[string]store.Cursor{}}
			var sick sync.Once
			e := serve(t, nil)
			down := true
			e.answer = func(int) int { // e.mu is held
				if down {
					return answer
				}
				return http.StatusOK
			}
			metrics := prometheus.NewRegistry()
			s := New(source, []Hook{{Name: "x", URL: e.URL, Secret: secret}}, metrics, slog.New(slog.DiscardHandler))
			s.timing = timing{look: time.Millisecond, call: time.Second, retry: time.Millisecond, longest: time.Millisecond, giveUp: time.Hour}
			clock := time.Now()
			var mu sync.Mutex
			s.now = func() time.Time { mu.Lock(); defer mu.Unlock(); return clock }
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			defer func() { cancel(); <-done }()
			source.add(event("first", "berlin", dunlinv1.Severity_SEVERITY_INFO))
			for deadline := time.Now().Add(10 * time.Second); dropped(t, metrics) == 0; {
				if time.Now().After(deadline) {
					t.Fatal("not dropped")
				}
				e.mu.Lock()
				tried := e.tries >= 3
				e.mu.Unlock()
				if tried {
					sick.Do(func() { mu.Lock(); clock = clock.Add(2 * time.Hour); mu.Unlock() })
				}
				time.Sleep(time.Millisecond)
			}
			e.mu.Lock()
			down, e.bad = false, nil
			tries := e.tries
			e.mu.Unlock()
			if answer < 500 && tries != 1 {
				t.Errorf("%d tries", tries)
			}
			mu.Lock()
			clock = time.Now()
			mu.Unlock()
			source.add(event("second", "berlin", dunlinv1.Severity_SEVERITY_INFO))
			if got := e.wait(t, 1); !slices.Equal(got, []string{"second"}) {
				t.Errorf("told %v", got)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		file := filepath.Join(dir, name)
		must(t, os.WriteFile(file, []byte(text), mode))
		must(t, os.Chmod(file, mode))
		return file
	}
	key := write("key", "0123456789abcdef\n", 0o600)
	good := write("good.yaml", "webhooks:\n  - {name: pager, url: 'https://hooks.example.com/x', secret-file: "+key+", kinds: ['rollout.*'], severity: warning, selector: {site: a}}\n  - {name: local, url: 'http://127.0.0.1:9', secret: 'sixteen letters!'}\n", 0o600)
	hooks, err := Load(good)
	must(t, err)
	if len(hooks) != 2 || hooks[0].Secret != "0123456789abcdef" || hooks[0].Selector["site"] != "a" || hooks[1].Name != "local" {
		t.Errorf("read %+v", hooks)
	}
	open := write("open-key", "0123456789abcdef", 0o640)
	const ok = "secret: 0123456789abcdef"
	for text, want := range map[string]string{
		"webhooks: []": "webhooks has 0 entries",
		"hooks: []":    "hooks",
		"webhooks: [{name: A B, url: 'https://a.example', " + ok + "}]":                               "webhooks[0].name",
		"webhooks: [{name: a, url: 'http://a.example', " + ok + "}]":                                  "webhooks[0].url: http:// is for this machine itself",
		"webhooks: [{name: a, url: 'ftp://a.example', " + ok + "}]":                                   "webhooks[0].url",
		"webhooks: [{name: a, url: 'https://u:p@a.example', " + ok + "}]":                             "webhooks[0].url",
		"webhooks: [{name: a, url: 'https://a.example'}]":                                             "either secret or secret-file",
		"webhooks: [{name: a, url: 'https://a.example', secret: short}]":                              "it has 5 characters, allowed are 16 to 1024",
		"webhooks: [{name: a, url: 'https://a.example', secret-file: " + open + "}]":                  "has mode 0640: others may read it",
		"webhooks: [{name: a, url: 'https://a.example', " + ok + ", severity: loud}]":                 `severity: "loud"`,
		"webhooks: [{name: a, url: 'https://a.example', " + ok + ", kinds: ['[']}]":                   `kinds: "["`,
		"webhooks: [{name: a, url: 'https://a.example', " + ok + ", colour: red}]":                    "colour",
		"webhooks:\n- &x {name: a, url: 'https://a.example', " + ok + "}\n- *x":                       `"a" is there twice`,
		"webhooks: [{name: a, url: 'https://a.example', secret: {secret-that-must-not-be-shown: 1}}]": "",
	} {
		_, err := Load(write("bad.yaml", text, 0o600))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "must-not-be-shown") {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	if _, err := Load(write("open.yaml", "webhooks: []", 0o604)); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others may read: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "absent")); err == nil {
		t.Error("an absent file was read")
	}
}
