package main

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/weights"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/internal/e2e"
)

// TestRun checks a fake device as it would a GPU, with a folder that has no
// provider.
func TestRun(t *testing.T) {
	fake, err := weights.NewFake(weights.FakeConfig{Capacity: 64 << 20, Granularity: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer fake.Close()
	var out strings.Builder
	if err := run(t.Context(), fake, "", &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "gpu: device=fake ") || !strings.Contains(last, " sequences=pass ") ||
		!strings.Contains(last, " swap=pass") || !strings.HasSuffix(last, " provider=absent") {
		t.Error(last)
	}
	if fake.Breach() != "" {
		t.Error(fake.Breach())
	}
	out.Reset()
	fake.Fail("access", 40, 1, weights.CodeUnknown)
	if err := run(t.Context(), fake, "", &out); !errors.Is(err, errFailed) || !strings.Contains(out.String(), " sequences=fail") || !strings.Contains(out.String(), " swap=pass") {
		t.Errorf("%v\n%s", err, &out)
	}
	if err := checkProvider(t.Context(), t.TempDir(), &out); err == nil || !strings.Contains(err.Error(), "libonnxruntime.so") {
		t.Errorf("without a provider: %v", err)
	}
}

// TestCheckNet has the provider's check done by the CPU, on a fake device.
func TestCheckNet(t *testing.T) {
	root, err := e2e.Root()
	if err != nil {
		t.Fatal(err)
	}
	library, err := e2e.RuntimeLibrary(t.Context(), root, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if err := ort.Init(library, 0); err != nil {
		t.Fatal(err)
	}
	fake, err := weights.NewFake(weights.FakeConfig{Capacity: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer fake.Close()
	var out strings.Builder
	if err := checkNet(t.Context(), fake, ort.Placement{}, t.TempDir(), zoo.MLP(1), &out); err != nil || !strings.Contains(out.String(), "mlp: ") {
		t.Errorf("%v\n%s", err, &out)
	}
	// The CPU reads most of these weights elsewhere: that is found.
	if err := checkNet(t.Context(), fake, ort.Placement{}, t.TempDir(), zoo.MobileNet(1), &out); err == nil || !strings.Contains(err.Error(), "in the pool") {
		t.Errorf("%v\n%s", err, &out)
	}
}

func TestNoGPU(t *testing.T) {
	if _, err := os.Stat("/dev/nvidia0"); err == nil {
		t.Skip("there is a GPU here")
	}
	var out strings.Builder
	if err := run(t.Context(), weights.CUDA(0), "", &out); err != nil || !strings.HasPrefix(out.String(), "gpu: no GPU") {
		t.Errorf("%v: %s", err, &out)
	}
}
