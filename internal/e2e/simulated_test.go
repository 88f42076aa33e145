package e2e

import (
	"encoding/json"
	"fmt"
	"regexp"
	"testing"

	"github.com/dunlin/dunlin/models/examples/digits"
)

// simulatedClass is the class of the simulated devices.
const simulatedClass = "jetson-orin-nano-8gb"

// TestSimulatedDevice has a simulated device of another architecture follow a
// controller.
func TestSimulatedDevice(t *testing.T) {
	f := newFleet(t)
	faults := write(t, "faults.yaml", []byte("- {at: 0s, nvml: lost, leak_bytes_per_hour: 1000}\n"))
	a := startAgent(t, f, "sim-1", "--sim-device", simulatedClass, "--sim-script", faults, "--runtime-lib", "/missing")
	cli(t, f, "push", digitsFile("v2"), "digits:1")
	apply(t, f, "digits", 1)
	cli(t, f, "rollout", "status", "digits", "--wait")
	images, _ := digits.HeldOut()
	answer, err := Classify(within(t), a.URL, "digits-route", images[:3])
	if err != nil || answer.Version != "1" || fmt.Sprint(answer.Labels) != "[0 0 0]" {
		t.Errorf("%+v, %v", answer, err)
	}
	if out := cli(t, f, "get", "devices"); !regexp.MustCompile(`(?m)^sim-1 +online +digits:1 +- +arm64 +` + simulatedClass + ` \(simulated\) +simulated `).MatchString(out) {
		t.Errorf("get devices printed\n%s", out)
	}
	var got struct {
		Devices []struct {
			Info      struct{ Simulated bool }
			Telemetry struct{ MemoryTotalBytes json.Number }
		}
	}
	decode(t, cli(t, f, "get", "devices", "-o", "json"), &got)
	if len(got.Devices) != 1 || !got.Devices[0].Info.Simulated || got.Devices[0].Telemetry.MemoryTotalBytes == "" {
		t.Errorf("devices %+v", got)
	}
}
