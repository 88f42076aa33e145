package agent

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/internal/telemetry"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// still is a machine that stands still.
type still struct {
	info   *dunlinv1.DeviceInfo
	sample *dunlinv1.Telemetry
}

func (m still) Info() *dunlinv1.DeviceInfo               { return m.info }
func (m still) Sample() *dunlinv1.Telemetry              { return m.sample }
func (still) Memory() (available, total uint64, _ error) { return 3 << 30, 4 << 30, nil }
func (still) Close() error                               { return nil }

// TestMachineMetrics: what a load generator for Triton reads is there, and what
// is absent is not.
func TestMachineMetrics(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(machineMetrics{still{sample: &dunlinv1.Telemetry{
		CpuUtilisation: new(0.5), PowerSource: "ina3221 VDD_IN", PowerWatts: new(6.5),
		Temperatures: []*dunlinv1.Temperature{{Sensor: "nvme Composite", Celsius: 40}, {Sensor: "nvme Composite", Celsius: 41}},
		Faults:       []string{"nvml: GPU 1: GPU is lost"},
		Gpus: []*dunlinv1.GpuTelemetry{{
			Uuid: "GPU-7", Utilisation: new(0.37), PowerWatts: new(123.5), PowerLimitWatts: new(400.0), MemoryUsedBytes: new(uint64(1 << 30)), MemoryTotalBytes: new(uint64(40 << 30)),
			EnergyJoules: new(987654.5), Celsius: new(41.0), SmClockMhz: new(uint32(1410)), ThrottleReasons: []string{"sw_thermal"}, RemapPending: new(true), RemapFailed: new(false),
			XidCount: new(uint64(0)), Processes: []*dunlinv1.GpuProcess{{Pid: 12, MemoryBytes: 5}},
		}, {Index: 1}},
	}}})
	const want = `dunlin_device_celsius{sensor="nvme Composite"} 40
dunlin_device_cpu_utilisation 0.5
dunlin_device_power_watts{source="ina3221 VDD_IN"} 6.5
dunlin_device_telemetry_faults 1
dunlin_gpu_celsius{gpu_uuid="GPU-7",of="gpu"} 41
dunlin_gpu_clock_hertz{gpu_uuid="GPU-7",of="sm"} 1.41e+09
dunlin_gpu_process_memory_bytes{gpu_uuid="GPU-7",pid="12"} 5
dunlin_gpu_remap_failed{gpu_uuid="GPU-7"} 0
dunlin_gpu_remap_pending{gpu_uuid="GPU-7"} 1
dunlin_gpu_throttled{gpu_uuid="GPU-7",reason="sw_thermal"} 1
dunlin_gpu_xid_errors_total{gpu_uuid="GPU-7"} 0
nv_energy_consumption{gpu_uuid="GPU-7"} 987654.5
nv_gpu_memory_total_bytes{gpu_uuid="GPU-7"} 4.294967296e+10
nv_gpu_memory_used_bytes{gpu_uuid="GPU-7"} 1.073741824e+09
nv_gpu_power_limit{gpu_uuid="GPU-7"} 400
nv_gpu_power_usage{gpu_uuid="GPU-7"} 123.5
nv_gpu_utilization{gpu_uuid="GPU-7"} 0.37
`
	answer := httptest.NewRecorder()
	telemetry.Handler(r).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	var got strings.Builder
	for line := range strings.Lines(answer.Body.String()) {
		if !strings.HasPrefix(line, "#") {
			got.WriteString(line)
		}
	}
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

func TestMachineFindings(t *testing.T) {
	gpu := &dunlinv1.DeviceInfo{DriverVersion: "550.54.15", Gpus: []*dunlinv1.GpuInfo{{Index: 0, Name: "NVIDIA L4"}}}
	for _, tt := range []struct {
		info    *dunlinv1.DeviceInfo
		sample  *dunlinv1.Telemetry
		verdict Verdict
		detail  string
	}{
		{&dunlinv1.DeviceInfo{}, &dunlinv1.Telemetry{}, Warn, "no GPU"},
		{gpu, &dunlinv1.Telemetry{}, Pass, "0: NVIDIA L4; driver 550.54.15, CUDA unknown"},
		{gpu, &dunlinv1.Telemetry{Faults: []string{"nvml: GPU 0: GPU is lost"}}, Warn, "GPU is lost"},
	} {
		got := machineFindings(tt.info, tt.sample)
		if len(got) != 2 || got[0].Check != "nvml" || got[0].Verdict != tt.verdict || !strings.Contains(got[0].Detail, tt.detail) || got[1].Check != "telemetry" {
			t.Errorf("%v: %v", tt, got)
		}
	}
}

// TestMachineMemory: the budget is a part of what the machine has.
func TestMachineMemory(t *testing.T) {
	s := Serving{machine: still{}}
	if _, total, err := s.memory(); total != 4<<30 || err != nil {
		t.Error(total, err)
	}
	want := float64(3<<30) - spareFraction*float64(4<<30)
	if got := s.compileMemory(); float64(got) > want+1 || float64(got) < want-1 {
		t.Errorf("compiling may take %d", got)
	}
}
