package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// siteProfiles writes a folder with one profile.
func siteProfiles(t *testing.T, rule, more string) string {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf("name: site\ndescription: The test's\nmatch: %s\nproviders: [{name: CPUExecutionProvider}]\nmemory: {host_fraction: 0.25}\nstorage: {outbox_events: 7}\n%s", rule, more)
	if err := os.WriteFile(filepath.Join(dir, "site.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestClassify(t *testing.T) {
	generic := map[string]string{"amd64": "generic-x86-64", "arm64": "generic-arm64"}[runtime.GOARCH]
	site := siteProfiles(t, fmt.Sprintf(`{arch: %s, runtime: ">=1.0"}`, runtime.GOARCH), "")
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	probing := Serving{RuntimeLib: runtimeLibrary(t), Worker: []string{os.Args[0], "worker"}, Log: log}
	probing.FirmwareProfiles = site
	for _, tt := range []struct {
		name         string
		s            Serving
		info         *dunlinv1.DeviceInfo
		want, reason string
		also         []string
	}{
		{"nothing is known", Serving{Log: log}, &dunlinv1.DeviceInfo{Arch: runtime.GOARCH}, generic, "arch " + runtime.GOARCH, nil},
		{"a GPU", Serving{Log: log}, &dunlinv1.DeviceInfo{Arch: runtime.GOARCH, Gpus: []*dunlinv1.GpuInfo{{Name: "Tesla T4", ComputeCapability: "7.5"}}},
			"nvidia-t4", `gpu "Tesla T4", compute_capability "7.5"`, []string{"generic-nvidia-gpu", generic}},
		{"the site's, by the runtime", probing, &dunlinv1.DeviceInfo{Arch: runtime.GOARCH}, "site", "arch " + runtime.GOARCH + `, runtime "1.`, []string{generic}},
		{"the site's, without a runtime", Serving{FirmwareProfiles: site, Log: log}, &dunlinv1.DeviceInfo{Arch: runtime.GOARCH}, generic, "arch " + runtime.GOARCH, nil},
		{"another one that is asked for", Serving{FirmwareProfile: "nvidia-l4", Log: log}, &dunlinv1.DeviceInfo{Arch: runtime.GOARCH}, "nvidia-l4", "--firmware-profile", []string{generic}},
		{"the one that is asked for", Serving{FirmwareProfile: generic, Log: log}, &dunlinv1.DeviceInfo{Arch: runtime.GOARCH}, generic, "--firmware-profile", nil},
		{"one where none matches", Serving{FirmwareProfile: generic, Log: log}, &dunlinv1.DeviceInfo{Arch: "z80"}, generic, "--firmware-profile", nil},
	} {
		m, err := tt.s.classify(t.Context(), tt.info)
		if err != nil || m.Profile.Name != tt.want || !strings.HasPrefix(m.Reason, tt.reason) || !slices.Equal(m.Also, tt.also) {
			t.Errorf("%s: %q by %s, also %v, %v", tt.name, m.Profile.Name, m.Reason, m.Also, err)
		}
		if tt.info.FirmwareProfile != tt.want || tt.info.FirmwareProfileReason != m.Reason {
			t.Errorf("%s: %v", tt.name, tt.info)
		}
	}
	for want, s := range map[string]Serving{
		`firmware-profile: no firmware profile "l4", there are generic-arm64, `: {FirmwareProfile: "l4"},
		"site.yaml:3:9: match.ach: is not known":                                {FirmwareProfiles: siteProfiles(t, "{ach: arm64}", "")},
		"missing: no such file or directory":                                    {FirmwareProfiles: filepath.Join(site, "missing")},
	} {
		if _, err := s.classify(t.Context(), &dunlinv1.DeviceInfo{Arch: runtime.GOARCH}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := (&Serving{}).classify(t.Context(), &dunlinv1.DeviceInfo{Arch: "z80"}); err == nil || !strings.Contains(err.Error(), `"z80"`) || !strings.Contains(err.Error(), "--firmware-profile") {
		t.Errorf("unknown architecture: %v", err)
	}
}

func TestPermits(t *testing.T) {
	fp32 := []tensor.Info{{Name: "x", Type: tensor.Float32}}
	fp16 := []tensor.Info{{Name: "h", Type: tensor.Float16}}
	bytes := []tensor.Info{{Name: "image", Type: tensor.Uint8}, {Name: "text", Type: tensor.String}, {Name: "ids", Type: tensor.Int64}}
	few := profiles.Limits{Precisions: []string{"FP32"}}
	for _, tt := range []struct {
		limits profiles.Limits
		graph  models.Graph
		want   string // "": permitted
	}{
		{profiles.Limits{}, models.Graph{Opset: 99, Inputs: fp16, WeightTypes: []tensor.Type{tensor.BFloat16}}, ""},
		{profiles.Limits{MaxOpset: 17}, models.Graph{Opset: 17}, ""},
		{profiles.Limits{MaxOpset: 17}, models.Graph{Opset: 18}, "opset is 18, the firmware profile's limits.max_opset is 17"},
		{few, models.Graph{Inputs: fp32, Outputs: bytes, WeightTypes: []tensor.Type{tensor.Float32, tensor.Int64, tensor.Bool, 22}}, ""},
		{few, models.Graph{Inputs: fp16}, `"h" is of FP16, the firmware profile's limits.precisions are FP32`},
		{few, models.Graph{Inputs: fp32, Outputs: fp16}, `"h" is of FP16`},
		{few, models.Graph{WeightTypes: []tensor.Type{tensor.Float32, tensor.Int8}}, "it has weights of INT8"},
		{profiles.Limits{Precisions: []string{"FP32", "INT8"}}, models.Graph{WeightTypes: []tensor.Type{tensor.Float32, tensor.Int8}}, ""},
	} {
		err := permits(tt.limits, &tt.graph)
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, errNotPermitted) || !strings.Contains(err.Error(), tt.want) || passing(err)) {
			t.Errorf("%+v of %+v: %v, want %q", tt.limits, tt.graph, err, tt.want)
		}
	}
}

// A model that the class excludes is refused both when it is checked and when
// it is loaded, without a child that looks at it.
func TestNotPermitted(t *testing.T) {
	serving := Serving{RuntimeLib: runtimeLibrary(t), Worker: []string{os.Args[0], "worker"}, CacheMiB: 64, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	profile := profiles.Profile{Memory: profiles.Memory{HostFraction: 0.5}, Limits: profiles.Limits{MaxOpset: 7}}
	h, err := newHost(serving, profile, t.TempDir(), serving.workerConfig(1))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { h.worker.Supervise(ctx) })
	wg.Go(func() { h.engine.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	dir, err := filepath.Abs("../models/examples/digits")
	if err != nil {
		t.Fatal(err)
	}
	spec := engine.Spec{ID: engine.VersionID{Model: "digits", Version: 1}, Dir: dir, Entry: "v1.onnx"}
	if _, err := h.check(ctx, spec); !errors.Is(err, errNotPermitted) || !strings.Contains(err.Error(), "digits:1: the device's class does not permit it: opset is ") {
		t.Errorf("check: %v", err)
	}
	if _, err := h.engine.Load(ctx, spec); err == nil || !strings.Contains(err.Error(), "the device's class does not permit it: opset is ") {
		t.Errorf("load: %v", err)
	}
}

func TestLimits(t *testing.T) {
	l4 := profiles.Profile{
		Providers: []profiles.Provider{{Name: cudaProvider}, {Name: "CPUExecutionProvider"}}, Memory: profiles.Memory{DeviceFraction: 0.5},
		Storage: profiles.Storage{ReserveBytes: 5}, Power: profiles.Power{LimitWatts: 72}, Limits: profiles.Limits{MaxOpset: 20, Precisions: []string{"FP32"}},
		Hardware: profiles.Hardware{FP32GFLOPS: 30300, MemoryGBPerSecond: 300, OverheadMicros: 50},
	}
	pi := l4
	pi.Providers = l4.Providers[1:]
	pooled := worker.Runtime{Pooling: ort.Pooling{Works: true}, PoolBytes: 1000}
	bare := &dunlinv1.DeviceLimits{HostMemoryBytes: 77, DiskReserveBytes: 5, MaxOpset: 20, Precisions: []string{"FP32"}, Oversize: true}
	figures := proto.CloneOf(bare)
	figures.Fp32Gflops, figures.MemoryGbPerSecond, figures.RunOverheadSeconds, figures.ActiveWatts = 30300, 300, 50e-6, 72
	gpu := proto.CloneOf(figures)
	gpu.DeviceMemoryBytes = 500
	for _, tt := range []struct {
		name    string
		profile profiles.Profile
		found   worker.Runtime
		want    *dunlinv1.DeviceLimits
	}{{"on the GPU", l4, pooled, gpu}, {"on the CPU all the same", l4, worker.Runtime{}, bare}, {"on the CPU", pi, worker.Runtime{}, figures}} {
		h := &host{profile: tt.profile, budget: 77, serving: Serving{Oversize: "map"}}
		if got := h.limits(tt.found); !proto.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestProcessors(t *testing.T) {
	for _, tt := range []struct {
		affinity      string
		threads, want int
	}{{"", 0, 0}, {"", 3, 3}, {"0-3", 0, 4}, {"0-3", 2, 2}} {
		cfg := worker.Config{Threads: tt.threads}
		if err := processors(&cfg, &profiles.Profile{Affinity: tt.affinity}); err != nil || cfg.Threads != tt.want || (len(cfg.Affinity) > 0) != (tt.affinity != "") {
			t.Errorf("%+v: %+v, %v", tt, cfg, err)
		}
	}
}

func TestDoctorClass(t *testing.T) {
	lib, data := runtimeLibrary(t), t.TempDir()
	site := siteProfiles(t, fmt.Sprintf("{arch: %s, dmi: ['*/*'], device_tree: ['*']}", runtime.GOARCH), "")
	found, err := diagnose(t, "--data", data, "--runtime-lib", lib, "--firmware-profiles", site, "--firmware-profile", "site")
	if f := found["class"]; err != nil || f.Verdict != Pass || !strings.HasPrefix(f.Detail, "site, by --firmware-profile; generic-") || !strings.Contains(f.Detail, " would match too") {
		t.Errorf("%v, %v", f, err)
	}
	if f := found["providers"]; !strings.Contains(f.Detail, "by firmware profile site") {
		t.Error(f)
	}
	found, err = diagnose(t, "--data", data, "--runtime-lib", lib, "--firmware-profiles", siteProfiles(t, "{}", "thermal: {warn_celsius: 900}\n"))
	if f := found["class"]; !errors.Is(err, ErrUnhealthy) || f.Verdict != Fail || !strings.Contains(f.Detail, "site.yaml:7:11: thermal.warn_celsius: is 900, allowed are 0 and 20 to 150 degrees Celsius") {
		t.Errorf("%v, %v", f, err)
	}
}
