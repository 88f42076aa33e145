package device

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// gpu is a GPU in one session.
type gpu struct {
	handle  nvml.Device
	info    *dunlinv1.GpuInfo
	listens bool // its XID errors are counted
	fields  [len(fieldIDs)]nvml.FieldValue
	sent    counter // bytes over PCIe
	got     counter
}

// counter is a count at a time.
type counter struct {
	count uint64
	at    time.Time
}

// fieldIDs are the figures that are asked for in one call.
var fieldIDs = [...]uint32{
	nvml.FI_DEV_MEMORY_TEMP, nvml.FI_DEV_RETIRED_SBE, nvml.FI_DEV_RETIRED_DBE, nvml.FI_DEV_PCIE_COUNT_TX_BYTES, nvml.FI_DEV_PCIE_COUNT_RX_BYTES,
}

func cloneInfo(g *dunlinv1.GpuInfo) *dunlinv1.GpuInfo { return proto.CloneOf(g) }

// describe asks a GPU what else it is.
func (s *session) describe(h nvml.Device, index uint32, uuid string) *dunlinv1.GpuInfo {
	a := asker{s: s}
	g := &dunlinv1.GpuInfo{Index: index, Uuid: uuid}
	g.Name, _ = ask(&a, "nvmlDeviceGetName", h.GetName)
	if c, ok := ask(&a, "nvmlDeviceGetCudaComputeCapability", func() ([2]int, nvml.Return) {
		major, minor, ret := h.GetCudaComputeCapability()
		return [2]int{major, minor}, ret
	}); ok && c[0] > 0 {
		g.ComputeCapability = fmt.Sprintf("%d.%d", c[0], c[1])
	}
	if p, ok := ask(&a, "nvmlDeviceGetPciInfo", h.GetPciInfo); ok {
		g.PciBusId = busID(p)
	}
	m, ok := ask(&a, "nvmlDeviceGetMemoryInfo", h.GetMemoryInfo)
	if ok && known(m.Total) {
		g.MemoryBytes = m.Total
	}
	// One without memory of its own does not answer that.
	g.UnifiedMemory = !ok && a.last == nvml.ERROR_NOT_SUPPORTED && s.has("nvmlDeviceGetMemoryInfo")
	s.parts(&a, h, g)
	return g
}

// parts names what a GPU is divided into.
func (s *session) parts(a *asker, h nvml.Device, g *dunlinv1.GpuInfo) {
	mode, ok := ask(a, "nvmlDeviceGetMigMode", func() (int, nvml.Return) {
		now, _, ret := h.GetMigMode()
		return now, ret
	})
	if g.MigEnabled = ok && mode == nvml.DEVICE_MIG_ENABLE; !g.MigEnabled {
		return
	}
	count, _ := ask(a, "nvmlDeviceGetMaxMigDeviceCount", h.GetMaxMigDeviceCount)
	for i := range min(count, maxParts) {
		part, ok := ask(a, "nvmlDeviceGetMigDeviceHandleByIndex", func() (nvml.Device, nvml.Return) { return h.GetMigDeviceHandleByIndex(i) })
		if !ok {
			continue // places between parts are empty
		}
		name, _ := ask(a, "nvmlDeviceGetName", part.GetName)
		uuid, _ := ask(a, "nvmlDeviceGetUUID", part.GetUUID)
		if name = cmp.Or(name, uuid); name != "" {
			g.MigDevices = append(g.MigDevices, name)
		}
	}
}

func busID(p nvml.PciInfo) string {
	var b strings.Builder
	for _, c := range p.BusId {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return strings.ToValidUTF8(b.String(), "?")
}

// sample asks a GPU for its figures. The error is the one after which it says
// nothing more, or the last one where it has said nothing.
func (s *session) sample(g *gpu) (*dunlinv1.GpuTelemetry, nvml.Return) {
	a := asker{s: s}
	h := g.handle
	t := &dunlinv1.GpuTelemetry{Index: g.info.Index, Uuid: g.info.Uuid}
	if u, ok := ask(&a, "nvmlDeviceGetUtilizationRates", h.GetUtilizationRates); ok {
		t.Utilisation, t.MemoryUtilisation = share(u.Gpu), share(u.Memory)
	}
	if m, ok := ask(&a, "nvmlDeviceGetMemoryInfo", h.GetMemoryInfo); ok && m.Total > 0 && known(m.Total) {
		t.MemoryTotalBytes = new(m.Total)
		if m.Used <= m.Total {
			t.MemoryUsedBytes = new(m.Used)
		}
	}
	t.PowerWatts = milli(ask(&a, "nvmlDeviceGetPowerUsage", h.GetPowerUsage))
	if w := milli(ask(&a, "nvmlDeviceGetEnforcedPowerLimit", h.GetEnforcedPowerLimit)); w != nil && *w > 0 {
		t.PowerLimitWatts = w
	}
	t.EnergyJoules = milli(ask(&a, "nvmlDeviceGetTotalEnergyConsumption", h.GetTotalEnergyConsumption))
	t.Celsius = degrees(ask(&a, "nvmlDeviceGetTemperature", func() (uint32, nvml.Return) { return h.GetTemperature(nvml.TEMPERATURE_GPU) }))
	if c := degrees(ask(&a, "nvmlDeviceGetTemperatureThreshold", func() (uint32, nvml.Return) {
		return h.GetTemperatureThreshold(nvml.TEMPERATURE_THRESHOLD_SLOWDOWN)
	})); c != nil && *c > 0 {
		t.SlowdownCelsius = c
	}
	t.SmClockMhz = clock(ask(&a, "nvmlDeviceGetClockInfo", func() (uint32, nvml.Return) { return h.GetClockInfo(nvml.CLOCK_SM) }))
	t.MemoryClockMhz = clock(ask(&a, "nvmlDeviceGetClockInfo", func() (uint32, nvml.Return) { return h.GetClockInfo(nvml.CLOCK_MEM) }))
	t.ThrottleReasons = reasons(s.clockReasons(&a, h))
	t.EccCorrected = count(ask(&a, "nvmlDeviceGetTotalEccErrors", func() (uint64, nvml.Return) {
		return h.GetTotalEccErrors(nvml.MEMORY_ERROR_TYPE_CORRECTED, nvml.AGGREGATE_ECC)
	}))
	t.EccUncorrected = count(ask(&a, "nvmlDeviceGetTotalEccErrors", func() (uint64, nvml.Return) {
		return h.GetTotalEccErrors(nvml.MEMORY_ERROR_TYPE_UNCORRECTED, nvml.AGGREGATE_ECC)
	}))
	if r, ok := ask(&a, "nvmlDeviceGetRemappedRows", func() (r rows, ret nvml.Return) {
		r.corrected, r.uncorrected, r.pending, r.failed, ret = h.GetRemappedRows()
		return r, ret
	}); ok {
		t.RemappedRowsCorrected, t.RemappedRowsUncorrected = small(r.corrected), small(r.uncorrected)
		t.RemapPending, t.RemapFailed = new(r.pending), new(r.failed)
	}
	if n, ok := ask(&a, "nvmlDeviceGetPcieReplayCounter", h.GetPcieReplayCounter); ok {
		if n := small(n); n != nil {
			t.PcieReplays = new(uint64(*n))
		}
	}
	s.fields(&a, g, t)
	if t.PcieTxBytesPerSecond == nil && g.sent.at.IsZero() {
		t.PcieTxBytesPerSecond = kilobytes(ask(&a, "nvmlDeviceGetPcieThroughput", func() (uint32, nvml.Return) { return h.GetPcieThroughput(nvml.PCIE_UTIL_TX_BYTES) }))
		t.PcieRxBytesPerSecond = kilobytes(ask(&a, "nvmlDeviceGetPcieThroughput", func() (uint32, nvml.Return) { return h.GetPcieThroughput(nvml.PCIE_UTIL_RX_BYTES) }))
	}
	t.Processes = s.processes(&a, h)
	if g.listens {
		x := s.xids.of(g.info.Uuid)
		t.XidCount = new(x.count)
		if x.count > 0 {
			t.LastXid = new(x.last)
		}
	}
	if a.lost != nvml.SUCCESS {
		return nil, a.lost
	}
	if !a.answered {
		return nil, a.last
	}
	return t, nvml.SUCCESS
}

type rows struct {
	corrected, uncorrected int
	pending, failed        bool
}

// clockReasons asks by the function's newer name, or by the older one.
func (s *session) clockReasons(a *asker, h nvml.Device) (uint64, bool) {
	if s.has("nvmlDeviceGetCurrentClocksEventReasons") {
		return ask(a, "nvmlDeviceGetCurrentClocksEventReasons", h.GetCurrentClocksEventReasons)
	}
	return ask(a, "nvmlDeviceGetCurrentClocksThrottleReasons", h.GetCurrentClocksThrottleReasons)
}

// reasonNames are those of a mask's bits, from the lowest.
var reasonNames = [...]string{
	"gpu_idle", "applications_clocks", "sw_power_cap", "hw_slowdown", "sync_boost", "sw_thermal", "hw_thermal", "hw_power_brake", "display_clocks", "board_limit", "reliability",
}

func reasons(mask uint64, ok bool) (names []string) {
	if !ok || !known(mask) {
		return nil
	}
	for bit := range 64 {
		switch {
		case mask>>bit&1 == 0:
		case bit < len(reasonNames):
			names = append(names, reasonNames[bit])
		default:
			names = append(names, fmt.Sprintf("bit_%d", bit))
		}
	}
	return names
}

// fields asks for the figures of fieldIDs.
func (s *session) fields(a *asker, g *gpu, t *dunlinv1.GpuTelemetry) {
	for i, id := range fieldIDs {
		g.fields[i] = nvml.FieldValue{FieldId: id, NvmlReturn: uint32(nvml.ERROR_NO_DATA)}
	}
	now := time.Now()
	if _, ok := ask(a, "nvmlDeviceGetFieldValues", func() (struct{}, nvml.Return) { return struct{}{}, g.handle.GetFieldValues(g.fields[:]) }); !ok {
		return
	}
	field := func(i int) (float64, bool) { return fieldValue(g.fields[i]) }
	if c, ok := field(0); ok && c > 0 && c <= maxDegrees { // GPUs without a sensor there say 0
		t.MemoryCelsius = new(c)
	}
	single, ok1 := field(1)
	double, ok2 := field(2)
	if (ok1 || ok2) && single+double < math.MaxUint32 {
		t.RetiredPages = new(uint32(single + double))
	}
	if n, ok := field(3); ok {
		t.PcieTxBytesPerSecond = g.sent.rate(uint64(n), now)
	}
	if n, ok := field(4); ok {
		t.PcieRxBytesPerSecond = g.got.rate(uint64(n), now)
	}
}

// rate gives the growth per second since the last time; nil the first time, and
// where the counter has begun anew.
func (c *counter) rate(count uint64, now time.Time) *float64 {
	before := *c
	*c = counter{count, now}
	if before.at.IsZero() || count < before.count || !now.After(before.at) {
		return nil
	}
	return new(float64(count-before.count) / now.Sub(before.at).Seconds())
}

// fieldValue reads a value by its type; false where there is none, or it is
// below 0.
func fieldValue(f nvml.FieldValue) (v float64, ok bool) {
	if nvml.Return(f.NvmlReturn) != nvml.SUCCESS {
		return 0, false
	}
	word, long := binary.NativeEndian.Uint32(f.Value[:]), binary.NativeEndian.Uint64(f.Value[:])
	switch nvml.ValueType(f.ValueType) {
	case nvml.VALUE_TYPE_DOUBLE:
		v = math.Float64frombits(long)
	case nvml.VALUE_TYPE_UNSIGNED_INT:
		v, ok = float64(word), known(word)
		return v, ok
	case nvml.VALUE_TYPE_UNSIGNED_LONG, nvml.VALUE_TYPE_UNSIGNED_LONG_LONG:
		v, ok = float64(long), known(long)
		return v, ok
	case nvml.VALUE_TYPE_SIGNED_LONG_LONG:
		v = float64(int64(long))
	case nvml.VALUE_TYPE_SIGNED_INT:
		v = float64(int32(word))
	case nvml.VALUE_TYPE_UNSIGNED_SHORT:
		short := binary.NativeEndian.Uint16(f.Value[:])
		return float64(short), known(short)
	default:
		return 0, false
	}
	return v, v >= 0 && !math.IsInf(v, 0)
}

// processes gives what processes have of the GPU's memory. Those of which it
// is not known are left out.
func (s *session) processes(a *asker, h nvml.Device) []*dunlinv1.GpuProcess {
	memory := map[uint32]uint64{}
	add := func(found []nvml.ProcessInfo, _ bool) {
		for _, p := range found {
			if known(p.UsedGpuMemory) {
				memory[p.Pid] = max(memory[p.Pid], p.UsedGpuMemory) // some are in both lists
			}
		}
	}
	add(ask(a, "nvmlDeviceGetComputeRunningProcesses", h.GetComputeRunningProcesses))
	add(ask(a, "nvmlDeviceGetGraphicsRunningProcesses", h.GetGraphicsRunningProcesses))
	var all []*dunlinv1.GpuProcess
	for pid, n := range memory {
		all = append(all, &dunlinv1.GpuProcess{Pid: pid, MemoryBytes: n})
	}
	slices.SortFunc(all, func(p, q *dunlinv1.GpuProcess) int {
		return cmp.Or(cmp.Compare(q.MemoryBytes, p.MemoryBytes), cmp.Compare(p.Pid, q.Pid))
	})
	return all[:min(len(all), maxProcesses)]
}

const (
	maxDegrees = 250
	maxMHz     = 100_000
)

// known says whether a value is one: all ones stand for none.
func known[T uint16 | uint32 | uint64](v T) bool { return v != ^T(0) }

// share makes one of a percentage.
func share(percent uint32) *float64 {
	if percent > 100 {
		return nil
	}
	return new(float64(percent) / 100)
}

// milli gives thousandths as wholes.
func milli[T uint32 | uint64](v T, ok bool) *float64 {
	if !ok || !known(v) {
		return nil
	}
	return new(float64(v) / 1000)
}

func degrees(v uint32, ok bool) *float64 {
	if !ok || v > maxDegrees {
		return nil
	}
	return new(float64(v))
}

func clock(v uint32, ok bool) *uint32 {
	if !ok || v > maxMHz {
		return nil
	}
	return new(v)
}

func count(v uint64, ok bool) *uint64 {
	if !ok || !known(v) {
		return nil
	}
	return new(v)
}

// small gives what the binding has made an int of from 32 bits.
func small(v int) *uint32 {
	if v < 0 || v >= math.MaxUint32 {
		return nil
	}
	return new(uint32(v))
}

// kilobytes gives bytes, of which NVML counts a thousand to one of its KB.
func kilobytes(v uint32, ok bool) *float64 {
	if !ok || !known(v) {
		return nil
	}
	return new(float64(v) * 1000)
}
