package agent

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// simDevice is the class that the tests simulate.
const simDevice = "jetson-orin-nano-8gb"

// script writes one, and gives its path.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "faults.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSimulationConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(file, []byte("sim-device: "+simDevice+"\nsim-seed: 7\nsim-script: "+script(t, "- {at: 1m, xid: 79}")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := ParseAlone([]string{"--config", file, "m.onnx"}, env("DUNLIN_AGENT_SIM_SEED", "8"), io.Discard)
	if err != nil || cfg.SimDevice != simDevice || cfg.SimSeed != 8 || len(cfg.script) != 1 {
		t.Errorf("%+v, %v", cfg.Simulation, err)
	}
	for want, args := range map[string][]string{
		`sim-device: no firmware profile "teapot"`:                    {"--sim-device", "teapot"},
		"sim-script, sim-seed: have a meaning with --sim-device only": {"--sim-seed", "1"},
		"sim-seed: is -1, allowed are 0 to":                           {"--sim-device", simDevice, "--sim-seed", "-1"},
		"faults.yaml:1:17: xid: is 0":                                 {"--sim-device", simDevice, "--sim-script", script(t, "- {at: 1m, xid: 0}")},
		"firmware-profile: has no meaning with --sim-device":          {"--sim-device", simDevice, "--firmware-profile", simDevice},
		"no such file": {"--sim-device", simDevice, "--sim-script", "/missing"},
	} {
		if _, err := ParseAlone(append(args, "m.onnx"), env(), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
}

// simulatedConfig is for a device that has neither runtime nor worker.
func simulatedConfig(t *testing.T, c *control, text string) Config {
	t.Helper()
	cfg := Config{
		Data: filepath.Join(t.TempDir(), "data"), Controller: c.http.URL, JoinToken: c.Token, Name: "edge-1",
		Serving: Serving{
			Listen: "127.0.0.1:0", Worker: []string{"/missing"}, Simulation: Simulation{SimDevice: simDevice},
			Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
		},
	}
	if text != "" {
		cfg.SimScript = script(t, text)
	}
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// A device that is simulated answers by REST like any other.
func TestSimulatedAlone(t *testing.T) {
	url, _ := startAlone(t, Alone{File: digitsFile(t), Serving: Serving{Simulation: Simulation{SimDevice: simDevice}}})
	until(t, "ready", func() error { return status200(http.DefaultClient, url+"/v2/health/ready", "") })
	body := `{"inputs":[{"name":"image","datatype":"FP32","shape":[2,1,8,8],"data":[` + strings.TrimSuffix(strings.Repeat("1,", 128), ",") + `]}]}`
	resp, err := http.Post(url+"/v2/models/digits/infer", "", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Outputs []struct {
			Name  string
			Shape []int64
			Data  []float64
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || len(answer.Outputs) != 2 {
		t.Fatalf("%+v, %v", answer, err)
	}
	for _, o := range answer.Outputs {
		if len(o.Shape) == 0 || o.Shape[0] != 2 || slices.ContainsFunc(o.Data, func(v float64) bool { return v != 0 }) {
			t.Errorf("%+v", o)
		}
	}
}

// A simulated device joins, says what it is, fetches, serves, and outlives the
// crash of its worker, which it tells of.
func TestSimulatedAgent(t *testing.T) {
	c := startControl(t)
	cfg := simulatedConfig(t, c, "- {at: 1500ms, worker: crash}")
	stop := startAgent(t, cfg)
	c.until("says hello", func(m proto.Message) bool {
		h, ok := m.(*dunlinv1.Hello)
		if i := h.GetInfo(); ok && (!i.Simulated || i.FirmwareProfile != simDevice || i.RuntimeVersion != "simulated" || i.Arch != "arm64" || len(i.Gpus) != 1 || !i.Gpus[0].UnifiedMemory ||
			!strings.HasPrefix(i.WeightPools, "cuda:0 ") || i.Limits.GetFp32Gflops() < 1000 || i.Limits.DeviceMemoryBytes == 0 ||
			!slices.Equal(i.Providers, []string{"CUDAExecutionProvider", "CPUExecutionProvider"})) {
			t.Errorf("hello: %v", h)
		}
		return ok
	})
	c.send("edge-1", link.Desired, desired(t, 1, nil, c.push(digits+"v1.onnx", "digits", 1)))
	c.until("serves version 1", serves("digits", 1))
	c.until("tells of a crash", func(m proto.Message) bool {
		b, _ := m.(*dunlinv1.EventBatch)
		return slices.ContainsFunc(b.GetEvents(), func(e *dunlinv1.Event) bool { return e.Kind == "worker.died" })
	})
	stop()
	if _, err := os.Stat(filepath.Join(cfg.Data, cacheFolder)); !os.IsNotExist(err) {
		t.Errorf("there is a folder of compiled models: %v", err)
	}
}

// A simulated device that gets too hot takes its agent with it.
func TestSimulatedShutdown(t *testing.T) {
	c := startControl(t)
	cfg := simulatedConfig(t, c, "")
	if err := cfg.simulate(); err != nil {
		t.Fatal(err)
	}
	class, err := cfg.classify(t.Context(), cfg.sim.Info())
	if err != nil || class.Profile.Name != simDevice {
		t.Fatal(class, err)
	}
	s := newSimulated(cfg.sim, class.Profile, cfg.workerConfig(1))
	done := make(chan error, 1)
	go func() { done <- s.Supervise(t.Context()) }()
	if err := cfg.sim.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "shut down") {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
}
