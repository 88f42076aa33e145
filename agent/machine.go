package agent

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/agent/device"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// machine is the device that the agent runs on, or what stands for one. Its
// methods may be called concurrently.
type machine interface {
	// Info describes it, without what the agent adds.
	Info() *dunlinv1.DeviceInfo
	// Sample gives its figures now; the caller may change what it gets. It may
	// take some seconds where a GPU hangs.
	Sample() *dunlinv1.Telemetry
	// Memory gives the bytes of memory that programs can still have, and those
	// that there are.
	Memory() (available, total uint64, err error)
	Close() error
}

// openMachine finds out what the device is, unless the settings already have
// one, and gives what closes it.
func (s *Serving) openMachine(data string) (closeIt func()) {
	if s.machine == nil {
		s.machine = device.Open(device.Config{Dir: data, Log: s.Log})
	}
	return func() {
		if err := s.machine.Close(); err != nil {
			s.Log.Warn("device not closed", "error", err)
		}
	}
}

// sampleBy has the firmware profile say which figures are looked for.
func (s *Serving) sampleBy(profile profiles.Profile) {
	if d, ok := s.machine.(*device.Device); ok {
		d.Use(profile.Telemetry)
	}
}

// memory is that of the machine.
func (s *Serving) memory() (available, total uint64, err error) {
	if s.machine == nil {
		return device.Memory()
	}
	return s.machine.Memory()
}

// examineMachine says which GPUs there are, and which figures can be had.
func examineMachine(cfg Config, profile profiles.Profile) []Finding {
	cfg.sampleBy(profile)
	return machineFindings(cfg.machine.Info(), cfg.machine.Sample())
}

func machineFindings(info *dunlinv1.DeviceInfo, t *dunlinv1.Telemetry) []Finding {
	gpus := Finding{Check: "nvml", Verdict: Pass}
	var names []string
	for _, g := range info.Gpus {
		names = append(names, fmt.Sprintf("%d: %s", g.Index, g.Name))
	}
	switch {
	case len(t.Faults) > 0:
		gpus.Verdict, gpus.Detail = Warn, strings.Join(t.Faults, "; ")
		gpus.Remedy = "see the kernel's log; reset the GPU or load its driver again: the agent finds it when it answers"
	case len(names) == 0 && info.DriverVersion != "":
		gpus.Detail = fmt.Sprintf("driver %s, and no GPU of NVIDIA's", info.DriverVersion)
	case len(names) == 0:
		gpus.Verdict, gpus.Detail, gpus.Remedy = Warn, "no GPU of NVIDIA's, or no driver", "install the NVIDIA driver, if this device has an NVIDIA GPU"
	default:
		gpus.Detail = fmt.Sprintf("%s; driver %s, CUDA %s", strings.Join(names, ", "), cmp.Or(info.DriverVersion, "unknown"), cmp.Or(info.CudaVersion, "unknown"))
	}
	figures := Finding{Check: "telemetry", Verdict: Pass, Detail: fmt.Sprintf("%d temperatures, power: %s", len(t.Temperatures), cmp.Or(t.PowerSource, "none"))}
	return []Finding{gpus, figures}
}

// figure describes one of the device's.
func figure(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// gpuFigure describes one of a GPU's.
func gpuFigure(name, help string, labels ...string) *prometheus.Desc {
	return figure(name, help, append([]string{"gpu_uuid"}, labels...)...)
}

// What is exported of the device; what it does not have is left out. The names
// with nv_ are Triton's.
var (
	nvUtilisation = gpuFigure("nv_gpu_utilization", "Share of time in which the GPU computed, 0 to 1.")
	nvPower       = gpuFigure("nv_gpu_power_usage", "Power of the GPU in watts.")
	nvPowerLimit  = gpuFigure("nv_gpu_power_limit", "Power limit of the GPU in watts.")
	nvMemoryUsed  = gpuFigure("nv_gpu_memory_used_bytes", "Memory of the GPU that is in use.")
	nvMemoryTotal = gpuFigure("nv_gpu_memory_total_bytes", "Memory of the GPU.")
	nvEnergy      = gpuFigure("nv_energy_consumption", "Energy of the GPU in joules since its driver was loaded.")

	gpuMemoryUtilisation = gpuFigure("dunlin_gpu_memory_utilisation", "Share of time in which the GPU's memory was read or written, 0 to 1.")
	gpuCelsius           = gpuFigure("dunlin_gpu_celsius", "Temperature of the GPU, of its memory, and the one at which it slows down.", "of")
	gpuClock             = gpuFigure("dunlin_gpu_clock_hertz", "Clock of the GPU's processors (sm) and of its memory.", "of")
	gpuThrottle          = gpuFigure("dunlin_gpu_throttled", "1 for each reason for which the GPU's clocks are low now.", "reason")
	gpuECC               = gpuFigure("dunlin_gpu_ecc_errors_total", "Memory errors of the GPU, corrected and uncorrected.", "kind")
	gpuRetired           = gpuFigure("dunlin_gpu_retired_pages", "Pages of memory that the GPU does not use any more.")
	gpuRemapped          = gpuFigure("dunlin_gpu_remapped_rows", "Rows of memory that were replaced after errors, corrected and uncorrected.", "kind")
	gpuRemapPending      = gpuFigure("dunlin_gpu_remap_pending", "1 while a row waits to be replaced at the next reset.")
	gpuRemapFailed       = gpuFigure("dunlin_gpu_remap_failed", "1 if a row could not be replaced.")
	gpuPCIe              = gpuFigure("dunlin_gpu_pcie_bytes_per_second", "Bytes over PCIe to the GPU (rx) and from it (tx).", "direction")
	gpuReplays           = gpuFigure("dunlin_gpu_pcie_replays_total", "Repeated transfers over PCIe.")
	gpuXIDs              = gpuFigure("dunlin_gpu_xid_errors_total", "XID errors since the agent's start.")
	gpuLastXID           = gpuFigure("dunlin_gpu_last_xid", "Number of the last XID error.")
	gpuProcesses         = gpuFigure("dunlin_gpu_process_memory_bytes", "Memory of the GPU that a process has.", "pid")

	deviceCPU       = figure("dunlin_device_cpu_utilisation", "Share of all cores in use since the last sample, 0 to 1.")
	deviceMemory    = figure("dunlin_device_memory_bytes", "Memory of the host, used and total.", "kind")
	deviceDisk      = figure("dunlin_device_disk_free_bytes", "Free space where the agent's data lies.")
	deviceDiskWear  = figure("dunlin_device_disk_wear", "Share of the disk's rated writes that is used up.")
	deviceAnonymous = figure("dunlin_device_agent_anonymous_bytes", "Anonymous memory of the agent and its worker.")
	deviceCelsius   = figure("dunlin_device_celsius", "Temperature at a sensor.", "sensor")
	devicePower     = figure("dunlin_device_power_watts", "Power of the device or of its processor, as the source says.", "source")
	deviceEnergy    = figure("dunlin_device_energy_joules_total", "Energy of the device or of its processor, as the source says.", "source")
	deviceFaults    = figure("dunlin_device_telemetry_faults", "Sources of figures that do not answer now.")

	machineDescs = []*prometheus.Desc{
		nvUtilisation, nvPower, nvPowerLimit, nvMemoryUsed, nvMemoryTotal, nvEnergy,
		gpuMemoryUtilisation, gpuCelsius, gpuClock, gpuThrottle, gpuECC, gpuRetired, gpuRemapped, gpuRemapPending, gpuRemapFailed, gpuPCIe, gpuReplays, gpuXIDs, gpuLastXID, gpuProcesses,
		deviceCPU, deviceMemory, deviceDisk, deviceDiskWear, deviceAnonymous, deviceCelsius, devicePower, deviceEnergy, deviceFaults,
	}
)

// machineMetrics collects the figures of the device.
type machineMetrics struct{ machine machine }

// Describe implements prometheus.Collector.
func (machineMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range machineDescs {
		ch <- d
	}
}

type number interface{ ~uint32 | ~uint64 | ~float64 }

// export sends a figure unless it is absent.
func export[T number](ch chan<- prometheus.Metric, d *prometheus.Desc, kind prometheus.ValueType, v *T, labels ...string) {
	if v != nil {
		ch <- prometheus.MustNewConstMetric(d, kind, float64(*v), labels...)
	}
}

func exportBool(ch chan<- prometheus.Metric, d *prometheus.Desc, v *bool, labels ...string) {
	if v == nil {
		return
	}
	n := 0.0
	if *v {
		n = 1
	}
	export(ch, d, prometheus.GaugeValue, &n, labels...)
}

// Collect implements prometheus.Collector.
func (m machineMetrics) Collect(ch chan<- prometheus.Metric) {
	const gauge, counter = prometheus.GaugeValue, prometheus.CounterValue
	t := m.machine.Sample()
	export(ch, deviceCPU, gauge, t.CpuUtilisation)
	export(ch, deviceMemory, gauge, t.MemoryUsedBytes, "used")
	export(ch, deviceMemory, gauge, t.MemoryTotalBytes, "total")
	export(ch, deviceDisk, gauge, t.DiskFreeBytes)
	export(ch, deviceDiskWear, gauge, t.DiskWear)
	export(ch, deviceAnonymous, gauge, t.AgentAnonymousBytes)
	export(ch, devicePower, gauge, t.PowerWatts, t.PowerSource)
	export(ch, deviceEnergy, counter, t.EnergyJoules, t.PowerSource)
	export(ch, deviceFaults, gauge, new(float64(len(t.Faults))))
	seen := map[string]bool{}
	for _, c := range t.Temperatures {
		if !seen[c.Sensor] { // chips of the same name are one to Prometheus: the first
			seen[c.Sensor] = true
			export(ch, deviceCelsius, gauge, &c.Celsius, c.Sensor)
		}
	}
	for _, g := range t.Gpus {
		gpu := cmp.Or(g.Uuid, strconv.FormatUint(uint64(g.Index), 10))
		export(ch, nvUtilisation, gauge, g.Utilisation, gpu)
		export(ch, nvPower, gauge, g.PowerWatts, gpu)
		export(ch, nvPowerLimit, gauge, g.PowerLimitWatts, gpu)
		export(ch, nvMemoryUsed, gauge, g.MemoryUsedBytes, gpu)
		export(ch, nvMemoryTotal, gauge, g.MemoryTotalBytes, gpu)
		export(ch, nvEnergy, counter, g.EnergyJoules, gpu)
		export(ch, gpuMemoryUtilisation, gauge, g.MemoryUtilisation, gpu)
		export(ch, gpuCelsius, gauge, g.Celsius, gpu, "gpu")
		export(ch, gpuCelsius, gauge, g.MemoryCelsius, gpu, "memory")
		export(ch, gpuCelsius, gauge, g.SlowdownCelsius, gpu, "slowdown")
		export(ch, gpuClock, gauge, hertz(g.SmClockMhz), gpu, "sm")
		export(ch, gpuClock, gauge, hertz(g.MemoryClockMhz), gpu, "memory")
		for _, reason := range g.ThrottleReasons {
			export(ch, gpuThrottle, gauge, new(1.0), gpu, reason)
		}
		export(ch, gpuECC, counter, g.EccCorrected, gpu, "corrected")
		export(ch, gpuECC, counter, g.EccUncorrected, gpu, "uncorrected")
		export(ch, gpuRetired, gauge, g.RetiredPages, gpu)
		export(ch, gpuRemapped, gauge, g.RemappedRowsCorrected, gpu, "corrected")
		export(ch, gpuRemapped, gauge, g.RemappedRowsUncorrected, gpu, "uncorrected")
		exportBool(ch, gpuRemapPending, g.RemapPending, gpu)
		exportBool(ch, gpuRemapFailed, g.RemapFailed, gpu)
		export(ch, gpuPCIe, gauge, g.PcieTxBytesPerSecond, gpu, "tx")
		export(ch, gpuPCIe, gauge, g.PcieRxBytesPerSecond, gpu, "rx")
		export(ch, gpuReplays, counter, g.PcieReplays, gpu)
		export(ch, gpuXIDs, counter, g.XidCount, gpu)
		export(ch, gpuLastXID, gauge, g.LastXid, gpu)
		for _, p := range g.Processes {
			export(ch, gpuProcesses, gauge, &p.MemoryBytes, gpu, strconv.FormatUint(uint64(p.Pid), 10))
		}
	}
}

func hertz(megahertz *uint32) *float64 {
	if megahertz == nil {
		return nil
	}
	return new(float64(*megahertz) * 1e6)
}
