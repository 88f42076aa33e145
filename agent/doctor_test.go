package agent

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// diagnose runs the doctor and gives its verdicts by check.
func diagnose(t *testing.T, args ...string) (map[string]Finding, error) {
	t.Helper()
	var out strings.Builder
	err := Doctor(t.Context(), append(args, "-o", "json"), env(), &out, io.Discard)
	var findings []Finding
	if e := json.Unmarshal([]byte(out.String()), &findings); e != nil {
		t.Fatalf("%v: %v: %s", err, e, &out)
	}
	byCheck := map[string]Finding{}
	for _, f := range findings {
		if f.Verdict != Pass && f.Remedy == "" {
			t.Errorf("%v has no remedy", f)
		}
		byCheck[f.Check] = f
	}
	return byCheck, err
}

func expect(t *testing.T, findings map[string]Finding, want map[string]Verdict) {
	t.Helper()
	for check, verdict := range want {
		if f := findings[check]; f.Verdict != verdict {
			t.Errorf("%s: %v, want %s", check, f, verdict)
		}
	}
}

func TestDoctor(t *testing.T) {
	data := t.TempDir()
	lib := runtimeLibrary(t)
	found, err := diagnose(t, "--data", filepath.Join(data, "not", "yet"), "--runtime-lib", lib)
	if err != nil {
		t.Error(err)
	}
	expect(t, found, map[string]Verdict{"runtime": Pass, "providers": Pass, "disk": Pass, "identity": Warn, "clock": Pass, "broker": Warn, "registry": Warn})
	if f := found["sandbox"]; f.Verdict == Fail || !strings.Contains(f.Detail, "limits") {
		t.Errorf("sandbox: %v", f)
	}
	if f := found["runtime"]; !strings.Contains(f.Detail, "ONNX Runtime 1.") {
		t.Errorf("runtime: %v", f)
	}

	c := startControl(t)
	cfg := testConfig(t, c)
	cfg.Data = data
	store := openState(t, data)
	id, err := identity.Open(t.Context(), cfg.identity(store))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Join(t.Context(), &dunlinv1.DeviceInfo{}); err != nil {
		t.Fatal(err)
	}
	_, signed := testTrust(t)
	trust, err := signing.Advance(nil, []*dunlinv1.SignedTrust{signed})
	if err == nil {
		err = store.SetTrust(t.Context(), trust)
	}
	if err != nil {
		t.Fatal(err)
	}
	found, err = diagnose(t, "--data", data, "--runtime-lib", lib)
	if err != nil {
		t.Error(err)
	}
	expect(t, found, map[string]Verdict{"identity": Pass, "clock": Pass, "broker": Pass, "registry": Pass})
	if f := found["identity"]; !strings.Contains(f.Detail, "edge-1; key ECDSA P-256 in a file; certificate until 20") || !strings.Contains(f.Detail, "by Dunlin CA ") || !strings.Contains(f.Detail, "; trust document 1") {
		t.Errorf("identity: %v", f)
	}
	for after, want := range map[time.Duration]Verdict{0: Pass, 200 * 24 * time.Hour: Pass, 300 * 24 * time.Hour: Warn, 400 * 24 * time.Hour: Fail} {
		if f := checkIdentity(id, time.Now().Add(after)); f.Verdict != want || want != Pass && f.Remedy == "" {
			t.Errorf("after %s: %v, want %s", after, f, want)
		}
	}
	if f := found["clock"]; !strings.Contains(f.Detail, "controller's") {
		t.Errorf("clock: %v", f)
	}

	c.Remove()
	found, err = diagnose(t, "--data", data, "--runtime-lib", lib)
	if !errors.Is(err, ErrUnhealthy) {
		t.Errorf("got %v", err)
	}
	expect(t, found, map[string]Verdict{"broker": Pass, "registry": Fail})

	c.stopBroker()
	c.http.Close()
	found, err = diagnose(t, "--data", data, "--runtime-lib", filepath.Join(data, "missing.so"))
	if !errors.Is(err, ErrUnhealthy) {
		t.Errorf("got %v", err)
	}
	expect(t, found, map[string]Verdict{"runtime": Fail, "clock": Warn, "broker": Fail, "registry": Fail})
}

func openState(t *testing.T, data string) *state.Store {
	t.Helper()
	store, err := state.Open(t.Context(), filepath.Join(data, stateFile), state.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}

func TestDoctorClock(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", now.Format(http.TimeFormat))
	}))
	defer server.Close()
	anyone := func(string) *tls.Config { return nil }
	tests := []struct {
		at   time.Time
		want Verdict
	}{
		{now, Pass}, {now.Add(30 * time.Second), Pass}, {now.Add(32 * time.Second), Warn}, {now.Add(-time.Hour), Warn},
		{time.Unix(0, 0), Fail},
	}
	for _, tt := range tests {
		if f := checkClock(t.Context(), server.URL, anyone, func() time.Time { return tt.at }); f.Verdict != tt.want {
			t.Errorf("at %v: %v, want %s", tt.at, f, tt.want)
		}
	}
}

func TestDoctorWeights(t *testing.T) {
	lib := runtimeLibrary(t)
	for args, want := range map[string]Verdict{lib: Pass, "/missing.so": Warn, "": Warn} {
		found, _ := diagnose(t, "--data", t.TempDir(), "--runtime-lib", args)
		// With a GPU it depends on the library's providers.
		if f := found["weights"]; f.Verdict != want && !strings.Contains(f.Detail, "CUDA") || f.Detail == "" {
			t.Errorf("%q: %v, want %s", args, f, want)
		}
	}
}

func TestDoctorKnowsWhatIsNoBroker(t *testing.T) {
	c := startControl(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", c.TLS())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Read(make([]byte, 100))
		_, _ = conn.Write([]byte{0xd0, 0}) // PINGRESP
	}()
	c.BrokerURL = func() string { return "mqtts://" + l.Addr().String() }
	cfg := testConfig(t, c)
	cfg.Data = t.TempDir()
	id, err := identity.Open(t.Context(), cfg.identity(openState(t, cfg.Data)))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Join(t.Context(), &dunlinv1.DeviceInfo{}); err != nil {
		t.Fatal(err)
	}
	if f := checkBroker(t.Context(), id); f.Verdict != Fail {
		t.Errorf("got %v", f)
	}
}

func TestDoctorPrintsATable(t *testing.T) {
	var out strings.Builder
	err := Doctor(t.Context(), []string{"--data", t.TempDir()}, env(), &out, io.Discard)
	if !errors.Is(err, ErrUnhealthy) || !strings.Contains(out.String(), "fail  runtime") || !strings.Contains(out.String(), "-> ") {
		t.Errorf("%v:\n%s", err, &out)
	}
	if err := Doctor(t.Context(), []string{"-o", "xml"}, env(), &out, io.Discard); err == nil || errors.Is(err, ErrUnhealthy) {
		t.Errorf("-o xml: %v", err)
	}
}

func TestSandboxFinding(t *testing.T) {
	if f := sandboxFinding(worker.Sandbox{Landlock: 7, Seccomp: true, Limits: true}); f.Verdict != Pass || f.Detail != "Landlock ABI 7, seccomp, limits" {
		t.Errorf("got %v", f)
	}
	if f := sandboxFinding(worker.Sandbox{Seccomp: true, Limits: true}); f.Verdict != Warn || !strings.Contains(f.Detail, "without Landlock") || f.Remedy == "" {
		t.Errorf("got %v", f)
	}
}
