package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestARM64 has the agent of `make cross`, with the runtime library of arm64,
// follow a controller and serve the digits: emulated, on other machines than
// arm64. An NVML library of its own shows that the functions of one that is
// opened at run time are found.
func TestARM64(t *testing.T) {
	dir := t.TempDir()
	if _, err := Run(t.Context(), nil, "sh", filepath.Join(root, "internal/cross/build.sh")); err != nil {
		t.Fatal(err)
	}
	out, err := Run(t.Context(), nil, "sh", filepath.Join(root, "agent/ort/fetch-runtime.sh"), "arm64")
	if err != nil {
		t.Fatal(err)
	}
	agent, nvml := filepath.Join(root, "bin/linux-arm64/dunlin-agent"), filepath.Join(dir, "libnvidia-ml.so.1")
	if _, err := Run(t.Context(), nil, "sh", filepath.Join(root, "internal/cross/cc.sh"), "-shared", "-o", nvml, filepath.Join(root, "internal/cross/nvml.c")); err != nil {
		t.Fatal(err)
	}
	emulated, err := armRun(dir, nvml)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "dunlin-agent")
	script := "#!/bin/sh\nexec " + strings.Join(append(emulated, agent), " ") + " \"$@\"\n"
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	by := "--worker-by=" + strings.Join(emulated, " ")

	f, err := NewFleet(Programs{Agent: program, Controller: programs.Controller, CLI: programs.CLI}, filepath.Join(dir), strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	a := startAgent(t, f, "arm", "--label", "site=here", by)
	var got []float64
	for v := 1; v <= 2; v++ {
		cli(t, f, "push", digitsFile(fmt.Sprintf("v%d", v)), "digits")
		apply(t, f, "digits", v)
		cli(t, f, "rollout", "status", "digits", "--wait")
		if problem := serves(t, a, v); problem != "" {
			t.Fatalf("%s\n%s", problem, a.LogTail(30))
		}
		got = append(got, accuracy(t, a.URL))
	}
	if got[0] < 0.9 || got[1] < got[0]+0.03 {
		t.Errorf("accuracy %.3f, then %.3f; the model card says 0.922 and 0.982", got[0], got[1])
	}
	var all struct {
		Devices []struct {
			Info struct {
				Arch, FirmwareProfile, RuntimeVersion string
			}
		}
	}
	decode(t, cli(t, f, "get", "devices", "-o", "json"), &all)
	if len(all.Devices) != 1 || all.Devices[0].Info.Arch != "arm64" || all.Devices[0].Info.FirmwareProfile != "generic-arm64" || all.Devices[0].Info.RuntimeVersion == "" {
		t.Errorf("devices %s", cmp.Diff(nil, all))
	}
	out, _ = Run(within(t), nil, program, "doctor", "--data", a.Data, "--runtime-lib", f.Runtime, by) // some checks fail where an agent runs
	if !strings.Contains(out, "driver 580.1.2") {
		t.Errorf("the NVML library is not found:\n%s", out)
	}
}

// armRun gives what a program for arm64 is to be started by here, with nvml
// among its libraries; nothing on arm64 itself.
func armRun(dir, nvml string) ([]string, error) {
	if runtime.GOARCH == "arm64" {
		return []string{"env", "LD_LIBRARY_PATH=" + filepath.Dir(nvml)}, nil
	}
	// ONNX Runtime reads what the kernel says of the processor, and the
	// kernel speaks of another one.
	prefix := filepath.Join(dir, "arm64")
	var cpuinfo strings.Builder
	for n := range runtime.NumCPU() {
		fmt.Fprintf(&cpuinfo, "processor\t: %d\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"+
			"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n", n)
	}
	if err := os.MkdirAll(filepath.Join(prefix, "proc"), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(prefix, "proc/cpuinfo"), []byte(cpuinfo.String()), 0o644); err != nil {
		return nil, err
	}
	if err := os.Symlink("/usr/aarch64-linux-gnu/lib", filepath.Join(prefix, "lib")); err != nil {
		return nil, err
	}
	return []string{"qemu-aarch64", "-L", prefix, "-E", "LD_LIBRARY_PATH=" + filepath.Dir(nvml)}, nil
}
