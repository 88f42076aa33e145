package inband

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/agent/reconcile"
)

// fake is a source that works, or not.
type fake struct {
	name string
	err  error
	asks int
}

func (f *fake) String() string { return f.name }
func (f *fake) Streams() int   { return 1 }
func (f *fake) Get(context.Context, reconcile.Ref, int64, int64) (*reconcile.Body, error) {
	f.asks++
	if f.err != nil {
		return nil, f.err
	}
	return &reconcile.Body{ReadCloser: io.NopCloser(strings.NewReader(f.name))}, nil
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestFallsBackAndComesBack takes the registry away for an hour: bundles come
// over MQTT after a while, and by HTTPS again some time after it is back.
func TestFallsBackAndComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		https, mqtt := &fake{name: "https"}, &fake{name: "mqtt"}
		down := &net.OpError{Op: "dial", Err: errors.New("connection refused")}
		connected, probes := true, 0
		var events []string
		d := NewDelivery(DeliveryConfig{Mode: Auto, MQTT: mqtt, Log: slog.New(slog.DiscardHandler), Connected: func() bool { return connected },
			Event: func(over bool, why string) {
				events = append(events, map[bool]string{true: "over: " + why, false: "back"}[over])
			}})
		s := d.Over(https, reconcile.Registry{URL: "https://registry", Client: &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			probes++
			if https.err != nil {
				return nil, https.err
			}
			return &http.Response{StatusCode: http.StatusForbidden, Body: http.NoBody}, nil // it answers
		})}})
		read := func() string {
			b, err := s.Get(t.Context(), reconcile.Ref{}, 0, 0)
			if err != nil {
				return "error"
			}
			got, err := io.ReadAll(b)
			if err != nil {
				return "error"
			}
			return string(got)
		}
		want := func(want string) {
			t.Helper()
			if got := read(); got != want {
				t.Fatalf("%s after %d events: read from %q, want %q", time.Now(), len(events), got, want)
			}
		}
		want("https")
		https.err = down
		want("error")
		time.Sleep(fallAfter / 2)
		want("error")
		https.err = nil // a short outage
		want("https")
		https.err = down
		want("error")
		time.Sleep(fallAfter - time.Second)
		want("error")
		if len(events) != 0 {
			t.Fatalf("events %v before %s", events, fallAfter)
		}
		connected = false
		time.Sleep(2 * time.Second)
		want("error") // the controller is away: nothing works
		if len(events) != 0 {
			t.Fatalf("events %v without a session", events)
		}
		connected = true
		want("error")
		want("mqtt")
		if len(events) != 1 || !strings.Contains(events[0], "refused") || s.String() != "mqtt" {
			t.Fatalf("events %v, source %s", events, s)
		}
		began := time.Now()
		for time.Since(began) < time.Hour {
			want("mqtt")
			time.Sleep(5 * time.Second)
		}
		if probes < 4 || probes > 8 {
			t.Errorf("the registry was tried %d times in an hour", probes)
		}
		https.err = nil
		began = time.Now()
		for read() == "mqtt" {
			if time.Since(began) > lastProbe+time.Minute {
				t.Fatalf("still over MQTT %s after the registry is back", time.Since(began))
			}
			time.Sleep(5 * time.Second)
		}
		want("https")
		if len(events) != 2 || events[1] != "back" {
			t.Errorf("events %v", events)
		}
	})
}

// TestAnswersAreNoOutage: a registry that refuses, or lacks something, is there.
func TestAnswersAreNoOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		https, mqtt := &fake{name: "https", err: reconcile.ErrAbsent}, &fake{name: "mqtt"}
		d := NewDelivery(DeliveryConfig{Mode: Auto, MQTT: mqtt, Log: slog.New(slog.DiscardHandler), Connected: func() bool { return true },
			Event: func(bool, string) { t.Error("the way changed") }})
		s := d.Over(https, reconcile.Registry{})
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for range 100 {
			if _, err := s.Get(t.Context(), reconcile.Ref{}, 0, 0); !errors.Is(err, reconcile.ErrAbsent) {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		https.err = errors.New("given up")
		for range 100 { // by this device itself
			if _, err := s.Get(ended, reconcile.Ref{}, 0, 0); err == nil {
				t.Fatal("no error")
			}
			time.Sleep(time.Second)
		}
		if mqtt.asks != 0 {
			t.Errorf("MQTT was asked %d times", mqtt.asks)
		}
	})
}

func TestModes(t *testing.T) {
	https, mqtt := &fake{name: "https"}, &fake{name: "mqtt"}
	for _, c := range []struct {
		mode Mode
		only bool
		want string
	}{{Auto, false, "https"}, {Auto, true, "mqtt"}, {HTTPS, true, "https"}, {MQTT, false, "mqtt"}} {
		d := NewDelivery(DeliveryConfig{Mode: c.mode, Only: c.only, MQTT: mqtt, Log: slog.New(slog.DiscardHandler)})
		if got := d.Over(https, reconcile.Registry{}).String(); got != c.want {
			t.Errorf("%s, joined over MQTT %t: from %s, want %s", c.mode, c.only, got, c.want)
		}
	}
}
