package device

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxb200"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxh100"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxh200"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/server"
	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// rig is a server that the vendor simulates, with the functions that it lacks.
// Each function can be made to fail, to hang, or to be absent.
type rig struct {
	*server.Server
	began time.Time

	mu      sync.Mutex
	fails   map[string]nvml.Return   // by function: what it returns
	only    nvml.Device              // if set, the one that fails
	hangs   map[string]chan struct{} // it returns when that is closed
	lacks   map[string]bool          // symbols
	calls   map[string]int
	symbols map[string]bool // that were looked up
	events  chan nvml.EventData
	inits   int // less shutdowns
	parts   []*server.Device
}

func newRig(s *server.Server, gpus int) *rig {
	s.Devices = s.Devices[:gpus]
	r := &rig{
		Server: s, began: time.Now(), fails: map[string]nvml.Return{}, hangs: map[string]chan struct{}{}, lacks: map[string]bool{},
		calls: map[string]int{}, symbols: map[string]bool{}, events: make(chan nvml.EventData, 16),
	}
	r.wrapServer()
	for _, d := range s.Devices {
		r.fill(d.(*server.Device))
	}
	return r
}

// call notes a call, hangs where it should, and gives what the call is to
// return.
func (r *rig) call(name string, d nvml.Device) nvml.Return {
	r.mu.Lock()
	r.calls[name]++
	hang, ret := r.hangs[name], r.fails[name]
	if r.only != nil && d != r.only {
		hang, ret = nil, nvml.SUCCESS
	}
	r.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return ret
}

func (r *rig) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

// wrap makes a function of the rig: what fails gives rubbish beside the error.
func wrap[T any](r *rig, name string, d nvml.Device, call func() (T, nvml.Return), rubbish T) func() (T, nvml.Return) {
	return func() (T, nvml.Return) {
		if ret := r.call(name, d); ret != nvml.SUCCESS {
			return rubbish, ret
		}
		return call()
	}
}

func always[T any](v T) func() (T, nvml.Return) {
	return func() (T, nvml.Return) { return v, nvml.SUCCESS }
}

func (r *rig) wrapServer() {
	s := r.Server
	s.LookupSymbolFunc = func(symbol string) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.symbols[symbol] = true
		if r.lacks[symbol] {
			return errors.New("undefined symbol")
		}
		return nil
	}
	s.InitFunc = func() nvml.Return {
		ret := r.call("Init", nil)
		if ret == nvml.SUCCESS {
			r.set(func() { r.inits++ })
		}
		return ret
	}
	s.ShutdownFunc = func() nvml.Return {
		r.set(func() { r.inits-- })
		return r.call("Shutdown", nil)
	}
	s.SystemGetDriverVersionFunc = wrap(r, "SystemGetDriverVersion", nil, s.SystemGetDriverVersionFunc, "rubbish")
	s.SystemGetCudaDriverVersionFunc = wrap(r, "SystemGetCudaDriverVersion", nil, s.SystemGetCudaDriverVersionFunc, 77070)
	s.DeviceGetCountFunc = wrap(r, "DeviceGetCount", nil, s.DeviceGetCountFunc, 77)
	byIndex := s.DeviceGetHandleByIndexFunc
	s.DeviceGetHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) {
		d, ret := byIndex(i)
		return wrap(r, "DeviceGetHandleByIndex", d, func() (nvml.Device, nvml.Return) { return d, ret }, nil)()
	}
	byUUID := s.DeviceGetHandleByUUIDFunc
	s.DeviceGetHandleByUUIDFunc = func(uuid string) (nvml.Device, nvml.Return) {
		d, ret := byUUID(uuid)
		return wrap(r, "DeviceGetHandleByUUID", d, func() (nvml.Device, nvml.Return) { return d, ret }, nil)()
	}
	s.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) {
		if ret := r.call("EventSetCreate", nil); ret != nvml.SUCCESS {
			return nil, ret
		}
		return &mock.EventSet{
			FreeFunc: func() nvml.Return { return r.call("Free", nil) },
			WaitFunc: func(ms uint32) (nvml.EventData, nvml.Return) {
				if ret := r.call("Wait", nil); ret != nvml.SUCCESS {
					return nvml.EventData{EventType: nvml.EventTypeXidCriticalError, EventData: 77}, ret
				}
				select {
				case e := <-r.events:
					return e, nvml.SUCCESS
				case <-time.After(time.Duration(ms) * time.Millisecond):
					return nvml.EventData{}, nvml.ERROR_TIMEOUT
				}
			},
		}, nvml.SUCCESS
	}
}

// fill gives a GPU what the vendor's simulation lacks.
func (r *rig) fill(d *server.Device) {
	d.GetUUIDFunc = wrap(r, "GetUUID", d, d.GetUUIDFunc, "rubbish")
	d.GetNameFunc = wrap(r, "GetName", d, d.GetNameFunc, "rubbish")
	d.GetMemoryInfoFunc = wrap(r, "GetMemoryInfo", d, func() (nvml.Memory, nvml.Return) {
		return nvml.Memory{Total: d.MemoryInfo.Total, Used: 3 << 30, Free: d.MemoryInfo.Total - 3<<30}, nvml.SUCCESS
	}, nvml.Memory{Total: 77, Used: 77})
	d.GetPciInfoFunc = wrap(r, "GetPciInfo", d, func() (p nvml.PciInfo, ret nvml.Return) {
		for i := range d.PciBusID {
			p.BusId[i] = int8(d.PciBusID[i])
		}
		return p, nvml.SUCCESS
	}, nvml.PciInfo{BusId: [32]int8{'r'}})
	capability := d.GetCudaComputeCapabilityFunc
	d.GetCudaComputeCapabilityFunc = func() (int, int, nvml.Return) {
		if ret := r.call("GetCudaComputeCapability", d); ret != nvml.SUCCESS {
			return 7, 7, ret
		}
		return capability()
	}
	d.GetMigModeFunc = func() (int, int, nvml.Return) {
		if ret := r.call("GetMigMode", d); ret != nvml.SUCCESS {
			return 1, 1, ret
		}
		return d.MigMode, d.MigMode, nvml.SUCCESS
	}
	d.GetMaxMigDeviceCountFunc = wrap(r, "GetMaxMigDeviceCount", d, always(7), 77)
	d.GetMigDeviceHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) {
		if ret := r.call("GetMigDeviceHandleByIndex", d); ret != nvml.SUCCESS {
			return nil, ret
		}
		if i >= len(r.parts) {
			return nil, nvml.ERROR_NOT_FOUND
		}
		return r.parts[i], nvml.SUCCESS
	}
	d.GetUtilizationRatesFunc = wrap(r, "GetUtilizationRates", d, always(nvml.Utilization{Gpu: 37, Memory: 12}), nvml.Utilization{Gpu: 77, Memory: 77})
	d.GetPowerUsageFunc = wrap(r, "GetPowerUsage", d, always[uint32](123456), 77)
	d.GetEnforcedPowerLimitFunc = wrap(r, "GetEnforcedPowerLimit", d, always[uint32](400000), 77)
	d.GetTotalEnergyConsumptionFunc = wrap(r, "GetTotalEnergyConsumption", d, always[uint64](987654321), 77)
	d.GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) {
		return wrap(r, "GetTemperature", d, always[uint32](41), 77)()
	}
	d.GetTemperatureThresholdFunc = func(nvml.TemperatureThresholds) (uint32, nvml.Return) {
		return wrap(r, "GetTemperatureThreshold", d, always[uint32](92), 77)()
	}
	d.GetClockInfoFunc = func(c nvml.ClockType) (uint32, nvml.Return) {
		return wrap(r, "GetClockInfo", d, always(map[nvml.ClockType]uint32{nvml.CLOCK_SM: 1410, nvml.CLOCK_MEM: 1215}[c]), 77)()
	}
	d.GetCurrentClocksEventReasonsFunc = wrap(r, "GetCurrentClocksEventReasons", d, always[uint64](nvml.ClocksEventReasonSwPowerCap|nvml.ClocksEventReasonSwThermalSlowdown), 1)
	d.GetCurrentClocksThrottleReasonsFunc = wrap(r, "GetCurrentClocksThrottleReasons", d, always[uint64](nvml.ClocksEventReasonSwPowerCap|nvml.ClocksEventReasonSwThermalSlowdown), 1)
	d.GetTotalEccErrorsFunc = func(e nvml.MemoryErrorType, _ nvml.EccCounterType) (uint64, nvml.Return) {
		return wrap(r, "GetTotalEccErrors", d, always(map[nvml.MemoryErrorType]uint64{nvml.MEMORY_ERROR_TYPE_CORRECTED: 11, nvml.MEMORY_ERROR_TYPE_UNCORRECTED: 2}[e]), 77)()
	}
	d.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) {
		if ret := r.call("GetRemappedRows", d); ret != nvml.SUCCESS {
			return 77, 77, true, true, ret
		}
		return 3, 1, true, false, nvml.SUCCESS
	}
	d.GetPcieReplayCounterFunc = wrap(r, "GetPcieReplayCounter", d, always(5), 77)
	d.GetPcieThroughputFunc = func(c nvml.PcieUtilCounter) (uint32, nvml.Return) {
		return wrap(r, "GetPcieThroughput", d, always(map[nvml.PcieUtilCounter]uint32{nvml.PCIE_UTIL_TX_BYTES: 4, nvml.PCIE_UTIL_RX_BYTES: 8}[c]), 77)()
	}
	d.GetFieldValuesFunc = func(fields []nvml.FieldValue) nvml.Return {
		ret := r.call("GetFieldValues", d)
		moved := uint64(time.Since(r.began).Milliseconds()) // so that the rate is 1000 of them a second
		for i := range fields {
			f := &fields[i]
			v := map[uint32]uint64{
				nvml.FI_DEV_MEMORY_TEMP: 55, nvml.FI_DEV_RETIRED_SBE: 4, nvml.FI_DEV_RETIRED_DBE: 1,
				nvml.FI_DEV_PCIE_COUNT_TX_BYTES: 4 * moved, nvml.FI_DEV_PCIE_COUNT_RX_BYTES: 8 * moved,
			}[f.FieldId]
			f.ValueType, f.NvmlReturn = uint32(nvml.VALUE_TYPE_UNSIGNED_LONG_LONG), uint32(nvml.SUCCESS)
			if ret != nvml.SUCCESS {
				v = 77
			}
			binary.NativeEndian.PutUint64(f.Value[:], v)
		}
		return ret
	}
	d.GetComputeRunningProcessesFunc = wrap(r, "GetComputeRunningProcesses", d, always([]nvml.ProcessInfo{
		{Pid: 100, UsedGpuMemory: 1 << 30}, {Pid: 101, UsedGpuMemory: 2 << 30}, {Pid: 102, UsedGpuMemory: math.MaxUint64},
	}), []nvml.ProcessInfo{{Pid: 77, UsedGpuMemory: 77}})
	d.GetGraphicsRunningProcessesFunc = wrap(r, "GetGraphicsRunningProcesses", d, always([]nvml.ProcessInfo{{Pid: 100, UsedGpuMemory: 1 << 30}}), []nvml.ProcessInfo{{Pid: 78, UsedGpuMemory: 78}})
	d.GetSupportedEventTypesFunc = wrap(r, "GetSupportedEventTypes", d, always[uint64](nvml.EventTypeXidCriticalError), nvml.EventTypeXidCriticalError)
	d.RegisterEventsFunc = func(uint64, nvml.EventSet) nvml.Return { return r.call("RegisterEvents", d) }
}

// open opens a device that has nothing but the GPUs.
func (r *rig) open(t *testing.T) *Device {
	d := Open(Config{Dir: t.TempDir(), Root: t.TempDir(), NVML: r})
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if r.inits != 0 {
			t.Errorf("%d inits without a shutdown", r.inits)
		}
	})
	return d
}

// clean gives what a sample says when nothing is wrong.
func (r *rig) clean() (all []*dunlinv1.GpuTelemetry) {
	for i, d := range r.Devices {
		all = append(all, &dunlinv1.GpuTelemetry{
			Index: uint32(i), Uuid: d.(*server.Device).UUID, Utilisation: new(0.37), MemoryUtilisation: new(0.12),
			MemoryUsedBytes: new(uint64(3 << 30)), MemoryTotalBytes: new(d.(*server.Device).MemoryInfo.Total),
			PowerWatts: new(123.456), PowerLimitWatts: new(400.0), EnergyJoules: new(987654.321), Celsius: new(41.0), MemoryCelsius: new(55.0), SlowdownCelsius: new(92.0),
			SmClockMhz: new(uint32(1410)), MemoryClockMhz: new(uint32(1215)), ThrottleReasons: []string{"sw_power_cap", "sw_thermal"},
			EccCorrected: new(uint64(11)), EccUncorrected: new(uint64(2)), RetiredPages: new(uint32(5)), RemappedRowsCorrected: new(uint32(3)), RemappedRowsUncorrected: new(uint32(1)),
			RemapPending: new(true), RemapFailed: new(false), PcieTxBytesPerSecond: new(4000.0), PcieRxBytesPerSecond: new(8000.0), PcieReplays: new(uint64(5)),
			XidCount: new(uint64(0)), Processes: []*dunlinv1.GpuProcess{{Pid: 101, MemoryBytes: 2 << 30}, {Pid: 100, MemoryBytes: 1 << 30}},
		})
	}
	return all
}

// sampleAfter lets time pass and takes a sample.
func sampleAfter(d *Device, wait time.Duration) *dunlinv1.Telemetry {
	time.Sleep(wait)
	return d.Sample()
}

func differ(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := gocmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

var servers = map[string]func() *server.Server{"A100": dgxa100.New, "H100": dgxh100.New, "H200": dgxh200.New, "B200": dgxb200.New}

func TestServers(t *testing.T) {
	for name, simulated := range servers {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(simulated(), 8)
				d := r.open(t)
				info := d.Info()
				if len(info.Gpus) != 8 || info.DriverVersion != r.DriverVersion || info.CudaVersion != map[string]string{"B200": "12.6"}[name] && info.CudaVersion != "12.4" {
					t.Fatalf("driver %q, CUDA %q, GPUs %v", info.DriverVersion, info.CudaVersion, info.Gpus)
				}
				for i, g := range info.Gpus {
					s := r.Devices[i].(*server.Device)
					differ(t, "GPU", g, &dunlinv1.GpuInfo{
						Index: uint32(i), Name: s.Config.Name, Uuid: s.UUID, ComputeCapability: fmt.Sprintf("%d.%d", s.Config.CudaMajor, s.Config.CudaMinor),
						MemoryBytes: s.Config.MemoryMB << 20, PciBusId: s.PciBusID,
					})
				}
				d.Sample()
				got := sampleAfter(d, time.Second)
				differ(t, "figures", got.Gpus, r.clean())
				if len(got.Faults) > 0 || got.PowerWatts != nil || got.EnergyJoules != nil || got.CpuUtilisation != nil || got.MemoryTotalBytes != nil || got.DiskWear != nil {
					t.Errorf("of nothing there is %v", got)
				}
			})
		})
	}
}

func TestMIG(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxa100.New(), 2)
		r.Devices[1].(*server.Device).MigMode = nvml.DEVICE_MIG_ENABLE
		for i := range 3 {
			part := dgxa100.NewDevice(i)
			part.GetNameFunc = always(fmt.Sprintf("NVIDIA A100-SXM4-40GB MIG %dg.5gb", i+1))
			part.GetUUIDFunc = always(fmt.Sprintf("MIG-%d", i))
			r.parts = append(r.parts, part)
		}
		r.parts[2].GetNameFunc = func() (string, nvml.Return) { return "rubbish", nvml.ERROR_UNKNOWN }
		info := r.open(t).Info()
		if info.Gpus[0].MigEnabled || len(info.Gpus[0].MigDevices) > 0 || !info.Gpus[1].MigEnabled {
			t.Errorf("enabled: %v", info.Gpus)
		}
		differ(t, "parts", info.Gpus[1].MigDevices, []string{"NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100-SXM4-40GB MIG 2g.5gb", "MIG-2"})
	})
}

// TestErrors has each function that is called fail with each error there is:
// what the others say stays, nothing is made up, and when the error is over
// everything is as before.
func TestErrors(t *testing.T) {
	functions := map[string]int{}
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxh100.New(), 2)
		r.Devices[1].(*server.Device).MigMode = nvml.DEVICE_MIG_ENABLE
		r.parts = append(r.parts, r.Devices[0].(*server.Device))
		d := r.open(t)
		d.Sample()
		sampleAfter(d, time.Second)
		r.set(func() { functions = maps.Clone(r.calls) })
		// These are called only where others cannot be.
		functions["GetCurrentClocksThrottleReasons"], functions["GetPcieThroughput"], functions["DeviceGetHandleByUUID"] = 1, 1, 1
		functions["Shutdown"], functions["Free"] = 1, 1
	})
	if len(functions) < 30 {
		t.Fatalf("only %d functions are called: %v", len(functions), functions)
	}
	for _, name := range slices.Sorted(maps.Keys(functions)) {
		t.Run(name, func(t *testing.T) {
			for ret := range messages {
				synctest.Test(t, func(t *testing.T) { failing(t, name, ret) })
			}
		})
	}
	t.Logf("%d functions x %d errors", len(functions), len(messages))
}

func failing(t *testing.T, name string, ret nvml.Return) {
	r := newRig(dgxh100.New(), 2)
	switch name {
	case "GetCurrentClocksThrottleReasons":
		r.lacks["nvmlDeviceGetCurrentClocksEventReasons"] = true
	case "GetPcieThroughput":
		r.lacks["nvmlDeviceGetFieldValues"] = true
	}
	d := r.open(t)
	d.Sample()
	sampleAfter(d, time.Second)
	before := d.Info()
	clean := r.clean()
	if r.lacks["nvmlDeviceGetFieldValues"] {
		for _, g := range clean {
			g.MemoryCelsius, g.RetiredPages = nil, nil
		}
	}
	differ(t, "before", d.Sample().Gpus, clean)

	r.set(func() { r.fails[name] = ret })
	if name == "DeviceGetHandleByUUID" { // it is asked for those that are not under their index
		r.set(func() { r.fails["DeviceGetHandleByIndex"] = ret })
	}
	var faults []string
	for range 6 { // the first may still find a session from before
		got := sampleAfter(d, 10*time.Second)
		for _, g := range got.Gpus {
			invented(t, name, ret, g, clean)
		}
		faults = got.Faults
		if len(got.Gpus) < 2 && len(got.Faults) == 0 {
			t.Errorf("%s, %v: %d GPUs and no fault", name, ret, len(got.Gpus))
		}
		if len(got.Gpus) == 2 && loses(ret) && len(got.Faults) == 0 && functionOfSample(name) {
			t.Errorf("%s, %v: no fault", name, ret)
		}
	}
	for _, f := range faults {
		if !strings.HasPrefix(f, "nvml: ") || !strings.Contains(f, message(ret)) && !strings.Contains(f, "nothing") {
			t.Errorf("%s, %v: fault %q", name, ret, f)
		}
	}
	differ(t, "inventory", withoutFree(d.Info()), withoutFree(before))

	r.set(func() { clear(r.fails) })
	for range 2 { // a session may only be found broken now, and a new one has nothing to compare counters with
		sampleAfter(d, 2*lastAgain)
	}
	got := sampleAfter(d, 10*time.Second)
	differ(t, fmt.Sprintf("%s, %v: after it is over", name, ret), got.Gpus, clean)
	if len(got.Faults) > 0 {
		t.Errorf("%s, %v: faults after it is over: %v", name, ret, got.Faults)
	}
}

// functionOfSample says whether each sample calls a function of each GPU.
func functionOfSample(name string) bool {
	return strings.HasPrefix(name, "Get") && !slices.Contains([]string{
		"GetUUID", "GetName", "GetPciInfo", "GetCudaComputeCapability", "GetMigMode", "GetMaxMigDeviceCount", "GetMigDeviceHandleByIndex", "GetSupportedEventTypes",
	}, name)
}

func withoutFree(info *dunlinv1.DeviceInfo) *dunlinv1.DeviceInfo {
	info.DiskBytes, info.MemoryBytes = 0, 0
	return info
}

// invented reports figures that are not those of the GPU.
func invented(t *testing.T, name string, ret nvml.Return, got *dunlinv1.GpuTelemetry, clean []*dunlinv1.GpuTelemetry) {
	t.Helper()
	i := slices.IndexFunc(clean, func(g *dunlinv1.GpuTelemetry) bool { return g.Uuid == got.Uuid && g.Index == got.Index })
	if i < 0 {
		t.Errorf("%s, %v: no such GPU: %v", name, ret, got)
		return
	}
	want := clean[i].ProtoReflect()
	got.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Name() == "processes" { // one of two lists may be there
			for _, p := range got.Processes {
				if !slices.ContainsFunc(clean[i].Processes, func(q *dunlinv1.GpuProcess) bool { return p.Pid == q.Pid && p.MemoryBytes == q.MemoryBytes }) {
					t.Errorf("%s, %v: process %v", name, ret, p)
				}
			}
		} else if !want.Has(f) || !v.Equal(want.Get(f)) {
			t.Errorf("%s, %v: %s is %v, want %v", name, ret, f.Name(), v, want.Get(f))
		}
		return true
	})
}

// TestSymbols: no function is called that the library lacks, which would end
// the process.
func TestSymbols(t *testing.T) {
	all := map[string]bool{}
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxa100.New(), 1)
		r.Devices[0].(*server.Device).MigMode = nvml.DEVICE_MIG_ENABLE
		d := r.open(t)
		d.Sample()
		r.set(func() { all = maps.Clone(r.symbols) })
	})
	all["nvmlDeviceGetCurrentClocksThrottleReasons"], all["nvmlDeviceGetPcieThroughput"] = true, true
	for symbol := range all {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(dgxa100.New(), 1)
			r.lacks[symbol] = true
			if symbol == "nvmlDeviceGetCurrentClocksThrottleReasons" {
				r.lacks["nvmlDeviceGetCurrentClocksEventReasons"] = true
			}
			d := r.open(t)
			d.Sample()
			for _, g := range sampleAfter(d, time.Second).Gpus {
				if g.Uuid == "" && symbol == "nvmlDeviceGetUUID" {
					g.Uuid, g.XidCount = r.clean()[0].Uuid, nil
				}
				invented(t, symbol, nvml.ERROR_FUNCTION_NOT_FOUND, g, r.clean())
			}
			function := strings.TrimPrefix(strings.TrimPrefix(symbol, "nvmlDevice"), "nvml")
			for _, name := range []string{function, "Device" + function, strings.Replace(function, "EventSet", "", 1)} {
				if r.calls[name] > 0 && symbol != "nvmlDeviceGetCount" || symbol == "nvmlDeviceGetCount" && r.calls["DeviceGetCount"] > 0 {
					t.Errorf("%s is called, and the library lacks %s", name, symbol)
				}
			}
		})
	}
}

// TestLost follows a GPU that falls off the bus, beside one that stays.
func TestLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		r := newRig(dgxh200.New(), 2)
		d := Open(Config{Dir: t.TempDir(), Root: t.TempDir(), NVML: r, Log: slog.New(slog.NewTextHandler(&log, nil))})
		defer d.Close()
		d.Sample()
		clean := r.clean()
		differ(t, "before", sampleAfter(d, time.Second).Gpus, clean)

		r.set(func() {
			r.only = r.Devices[1]
			for name := range r.calls {
				r.fails[name] = nvml.ERROR_GPU_IS_LOST
			}
		})
		for i := range 20 {
			got := sampleAfter(d, 10*time.Second)
			if len(got.Gpus) != 1 || got.Gpus[0].Uuid != clean[0].Uuid || got.Gpus[0].PowerWatts == nil {
				t.Fatalf("sample %d: %v", i, got.Gpus)
			}
			if len(got.Faults) == 0 || !strings.Contains(got.Faults[0], "GPU is lost") {
				t.Fatalf("sample %d: faults %q", i, got.Faults)
			}
		}
		if n := len(d.Info().Gpus); n != 2 {
			t.Errorf("the inventory has %d GPUs", n)
		}
		// It comes back under another index, and is the same.
		r.set(func() {
			clear(r.fails)
			r.Devices[0], r.Devices[1] = r.Devices[1], r.Devices[0]
		})
		sampleAfter(d, lastAgain)
		got := sampleAfter(d, 10*time.Second)
		slices.SortFunc(got.Gpus, func(a, b *dunlinv1.GpuTelemetry) int { return cmp.Compare(a.Index, b.Index) })
		differ(t, "back", got.Gpus, clean)
		if lines := strings.Split(strings.TrimSpace(log.String()), "\n"); len(lines) != 2 || !strings.Contains(lines[0], "GPU is lost") || !strings.Contains(lines[1], "answer again") {
			t.Errorf("log:\n%s", &log)
		}
	})
}

// TestReload follows a driver that is unloaded and loaded again: nothing is
// asked of NVML but whether it starts, ever more seldom.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxa100.New(), 8)
		d := r.open(t)
		d.Sample()
		for _, name := range []string{"GetUtilizationRates", "GetPowerUsage"} {
			r.set(func() { r.fails[name] = nvml.ERROR_UNINITIALIZED })
		}
		if got := sampleAfter(d, time.Second); len(got.Gpus) > 0 || len(got.Faults) != 1 || !strings.Contains(got.Faults[0], "not initialized") {
			t.Fatalf("unloaded: %v", got)
		}
		r.set(func() {
			clear(r.fails)
			clear(r.calls)
			r.fails["Init"] = nvml.ERROR_DRIVER_NOT_LOADED
		})
		for range 60 * 60 {
			if got := sampleAfter(d, time.Second); len(got.Gpus) > 0 || len(got.Faults) != 1 {
				t.Fatalf("unloaded: %v", got)
			}
		}
		if n := r.calls["Init"]; n < 60 || n > 70 {
			t.Errorf("%d starts in an hour", n)
		}
		if n := r.calls["GetPowerUsage"]; n > 0 {
			t.Errorf("GPUs are asked %d times", n)
		}
		r.set(func() { clear(r.fails) })
		back := time.Now()
		for len(sampleAfter(d, time.Second).Gpus) < 8 {
			if time.Since(back) > lastAgain {
				t.Fatal("not back after the longest wait")
			}
		}
		differ(t, "back", sampleAfter(d, time.Second).Gpus, r.clean())
	})
}

// TestHang has calls that do not return: a sample waits for one once, and no
// second one is lost to it.
func TestHang(t *testing.T) {
	for _, name := range []string{"GetPowerUsage", "Init", "Wait", "Shutdown"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(dgxa100.New(), 2)
				d := r.open(t)
				d.Sample()
				differ(t, "before", sampleAfter(d, time.Second).Gpus, r.clean())
				hang := make(chan struct{})
				r.set(func() {
					r.hangs[name] = hang
					if name != "GetPowerUsage" { // they are called at the end and the begin of a session
						r.fails["DeviceGetCount"], r.fails["GetUtilizationRates"] = nvml.ERROR_UNINITIALIZED, nvml.ERROR_UNINITIALIZED
					}
				})
				sampleAfter(d, 2*eventWait)
				start, waited := time.Now(), time.Duration(0)
				for range 100 {
					before := time.Now()
					got := sampleAfter(d, 10*time.Second)
					waited += time.Since(before) - 10*time.Second
					if len(got.Gpus) > 0 || len(got.Faults) != 1 {
						t.Fatalf("after %v: %v", time.Since(start), got)
					}
				}
				if waited > callLimit {
					t.Errorf("samples waited for %v", waited)
				}
				r.set(func() {
					if n := r.calls[name]; name != "Shutdown" && n > 10 {
						t.Errorf("%d calls", n)
					}
					clear(r.calls)
					clear(r.fails)
					delete(r.hangs, name)
					close(hang)
				})
				sampleAfter(d, lastAgain+eventWait)
				got := sampleAfter(d, 10*time.Second)
				differ(t, "after", got.Gpus, r.clean())
				if len(got.Faults) > 0 {
					t.Errorf("after: %v", got.Faults)
				}
			})
		})
	}
}

// TestHangAtOpen: an agent starts all the same.
func TestHangAtOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxa100.New(), 1)
		hang := make(chan struct{})
		r.hangs["Init"] = hang
		start := time.Now()
		d := r.open(t)
		if took := time.Since(start); took != beginLimit {
			t.Errorf("Open took %v", took)
		}
		if got := d.Sample(); len(got.Gpus) > 0 || len(got.Faults) != 1 || time.Since(start) != beginLimit {
			t.Errorf("after %v: %v", time.Since(start), got)
		}
		if err := d.Close(); err == nil {
			t.Error("Close has not waited for the call, and does not say so")
		}
		r.set(func() { delete(r.hangs, "Init") })
		close(hang)
		synctest.Wait()
		if n := r.calls["DeviceGetCount"]; n > 0 {
			t.Error("it is asked after the end")
		}
	})
}

func TestAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxa100.New(), 1)
		r.fails["Init"] = nvml.ERROR_LIBRARY_NOT_FOUND
		d := r.open(t)
		for range 10 {
			if got := sampleAfter(d, time.Minute); len(got.Gpus) > 0 || len(got.Faults) > 0 {
				t.Fatal(got)
			}
		}
		if n := r.calls["Init"]; n != 1 {
			t.Errorf("the library is looked for %d times", n)
		}
	})
}

func TestXID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(dgxb200.New(), 2)
		d := r.open(t)
		for i, code := range []uint64{31, 79} {
			r.events <- nvml.EventData{Device: r.Devices[1], EventType: nvml.EventTypeXidCriticalError, EventData: code}
			got := sampleAfter(d, time.Second).Gpus
			if *got[0].XidCount != 0 || got[0].LastXid != nil || *got[1].XidCount != uint64(i+1) || *got[1].LastXid != code {
				t.Errorf("after %d: %v", code, got)
			}
		}
		// What was counted outlives a session.
		r.set(func() { r.fails["GetUtilizationRates"] = nvml.ERROR_UNINITIALIZED })
		sampleAfter(d, time.Second)
		r.set(func() { clear(r.fails) })
		if got := sampleAfter(d, 10*time.Second).Gpus; len(got) != 2 || *got[1].XidCount != 2 || *got[1].LastXid != 79 {
			t.Errorf("in the next session: %v", got)
		}
	})
}

// TestSentinels: what NVML says where it has no value is none.
func TestSentinels(t *testing.T) {
	for _, kind := range []nvml.ValueType{
		nvml.VALUE_TYPE_UNSIGNED_INT, nvml.VALUE_TYPE_UNSIGNED_LONG, nvml.VALUE_TYPE_UNSIGNED_LONG_LONG, nvml.VALUE_TYPE_SIGNED_LONG_LONG, nvml.VALUE_TYPE_SIGNED_INT,
		nvml.VALUE_TYPE_UNSIGNED_SHORT, nvml.VALUE_TYPE_DOUBLE, 99,
	} {
		synctest.Test(t, func(t *testing.T) { sentinels(t, kind) })
	}
}

func sentinels(t *testing.T, kind nvml.ValueType) {
	const none32, none64 = math.MaxUint32, math.MaxUint64
	r := newRig(dgxa100.New(), 1)
	g := r.Devices[0].(*server.Device)
	g.GetUtilizationRatesFunc = always(nvml.Utilization{Gpu: none32, Memory: 101})
	g.GetMemoryInfoFunc = always(nvml.Memory{Total: none64, Used: none64})
	g.GetPowerUsageFunc = always[uint32](none32)
	g.GetEnforcedPowerLimitFunc = always[uint32](0)
	g.GetTotalEnergyConsumptionFunc = always[uint64](none64)
	g.GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) { return none32, nvml.SUCCESS }
	g.GetTemperatureThresholdFunc = func(nvml.TemperatureThresholds) (uint32, nvml.Return) { return 0, nvml.SUCCESS }
	g.GetClockInfoFunc = func(nvml.ClockType) (uint32, nvml.Return) { return none32, nvml.SUCCESS }
	g.GetCurrentClocksEventReasonsFunc = always[uint64](none64)
	g.GetTotalEccErrorsFunc = func(nvml.MemoryErrorType, nvml.EccCounterType) (uint64, nvml.Return) { return none64, nvml.SUCCESS }
	g.GetRemappedRowsFunc = func() (int, int, bool, bool, nvml.Return) { return none32, -1, false, false, nvml.SUCCESS }
	g.GetPcieReplayCounterFunc = always(none32)
	g.GetPcieThroughputFunc = func(nvml.PcieUtilCounter) (uint32, nvml.Return) { return none32, nvml.SUCCESS }
	g.GetSupportedEventTypesFunc = always[uint64](0)
	g.GetComputeRunningProcessesFunc = always([]nvml.ProcessInfo{{Pid: 7, UsedGpuMemory: none64}})
	g.GetGraphicsRunningProcessesFunc = g.GetComputeRunningProcessesFunc
	g.GetFieldValuesFunc = func(fields []nvml.FieldValue) nvml.Return {
		for i := range fields {
			fields[i].ValueType, fields[i].NvmlReturn = uint32(kind), uint32(nvml.SUCCESS)
			binary.NativeEndian.PutUint64(fields[i].Value[:], none64) // not a number, where it is a double
		}
		return nvml.SUCCESS
	}
	d := r.open(t)
	d.Sample()
	got := sampleAfter(d, time.Second)
	differ(t, "figures", got.Gpus, []*dunlinv1.GpuTelemetry{{Uuid: g.UUID, RemapPending: new(false), RemapFailed: new(false)}})
	if info := d.Info().Gpus[0]; info.MemoryBytes != 0 || info.UnifiedMemory {
		t.Errorf("inventory: %v", info)
	}
}

func TestFieldValue(t *testing.T) {
	value := func(kind nvml.ValueType, bits uint64) nvml.FieldValue {
		f := nvml.FieldValue{ValueType: uint32(kind)}
		binary.NativeEndian.PutUint64(f.Value[:], bits)
		return f
	}
	for _, tt := range []struct {
		field nvml.FieldValue
		want  float64
	}{
		{value(nvml.VALUE_TYPE_DOUBLE, math.Float64bits(2.5)), 2.5},
		{value(nvml.VALUE_TYPE_UNSIGNED_INT, 7), 7},
		{value(nvml.VALUE_TYPE_UNSIGNED_LONG, 8), 8},
		{value(nvml.VALUE_TYPE_UNSIGNED_LONG_LONG, 9), 9},
		{value(nvml.VALUE_TYPE_SIGNED_LONG_LONG, 10), 10},
		{value(nvml.VALUE_TYPE_SIGNED_INT, 11), 11},
		{value(nvml.VALUE_TYPE_UNSIGNED_SHORT, 12), 12},
	} {
		if got, ok := fieldValue(tt.field); !ok || got != tt.want {
			t.Errorf("%v: %v, %v", tt.field, got, ok)
		}
	}
}

func TestMessages(t *testing.T) {
	for ret := nvml.Return(1); ret <= nvml.ERROR_RESET_TYPE_NOT_SUPPORTED; ret++ {
		if message(ret) == fmt.Sprintf("error %d", int(ret)) {
			t.Errorf("no words for %d", int(ret))
		}
	}
	if got := message(4711); got != "error 4711" {
		t.Error(got)
	}
}

// TestPCIeCounters: a counter that has begun anew gives no rate.
func TestPCIeCounters(t *testing.T) {
	var c counter
	at := time.Unix(1000, 0)
	for _, tt := range []struct {
		count uint64
		want  *float64
	}{{100, nil}, {300, new(200.0)}, {50, nil}, {50, new(0.0)}} {
		at = at.Add(time.Second)
		if got := c.rate(tt.count, at); (got == nil) != (tt.want == nil) || got != nil && *got != *tt.want {
			t.Errorf("at %d: %v", tt.count, got)
		}
	}
}
