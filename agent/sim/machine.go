package sim

import (
	"fmt"
	"path"
	"runtime"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// agentBytes is what an agent has of anonymous memory that has leaked nothing.
const agentBytes = 64 << 20

// leastWindow is the least time between two samples of which rates are taken;
// who asks earlier gets those of the sample before.
const leastWindow = 100 * time.Millisecond

// reading is what was counted at the end of the last window, and what the rates
// in it were; nil before there was one.
type reading struct {
	at                  moment
	joules, busy, moved float64

	utilisation, watts, received *float64
}

// Info describes the device by what its profile says, or has assumed for it.
func (d *Device) Info() *dunlinv1.DeviceInfo {
	p, hw := &d.cfg.Profile, &d.cfg.Profile.Hardware
	info := &dunlinv1.DeviceInfo{
		Hostname: p.Name, Os: runtime.GOOS, Arch: p.Match.Arch, CpuCount: uint32(hw.Cores), MemoryBytes: uint64(hw.HostBytes), DiskBytes: diskBytes,
		CpuModel: p.Description, FirmwareProfile: p.Name, FirmwareProfileReason: "simulated", Simulated: true,
		Board: plain(p.Match.DeviceTree, plain(p.Match.DMI, p.Description)),
	}
	if d.gpu {
		gpu := &dunlinv1.GpuInfo{Name: d.GPU(), Uuid: d.uuid(), MemoryBytes: uint64(hw.DeviceBytes), UnifiedMemory: p.Memory.Unified}
		if !d.discrete() {
			gpu.MemoryBytes = uint64(hw.HostBytes)
		}
		info.Gpus = append(info.Gpus, gpu)
	}
	return info
}

// uuid names the GPU as NVML does.
func (d *Device) uuid() string {
	return fmt.Sprintf("GPU-51000000-0000-4000-%04x-%012x", 0x8000|d.cfg.Seed>>48&0x3fff, d.cfg.Seed&(1<<48-1))
}

// plain gives the first of some patterns that only one string matches, as that
// is what a device is called.
func plain(patterns []string, none string) string {
	for _, p := range patterns {
		if ok, err := path.Match(p, p); ok && err == nil && !strings.ContainsAny(p, `*?[\`) {
			return p
		}
	}
	return none
}

// GPU names the GPU that models run on; "" where they run on the processor.
func (d *Device) GPU() string {
	if !d.gpu {
		return ""
	}
	return plain(d.cfg.Profile.Match.GPU, d.cfg.Profile.Description)
}

// Capacity is how many bytes all models together may have where they run.
func (d *Device) Capacity() int64 { return d.capacity }

// Memory gives the bytes of the host's memory that programs can have, those
// that models hold among them, which leave when they have to, and those that
// there are. A device that has shut down gives an error.
func (d *Device) Memory() (available, total uint64, err error) {
	d.lock()
	defer d.unlock()
	if err := d.down(); err != nil {
		return 0, 0, err
	}
	free, total := d.free()
	return free, total, nil
}

func (d *Device) free() (free, total uint64) {
	total = uint64(d.cfg.Profile.Hardware.HostBytes)
	taken := uint64(systemPart*float64(total) + d.core.faults.leak)
	return total - min(taken, total), total
}

// Sample gives the device's figures now; rates and shares are those since the
// last sample that was not just before. What the class does not have, or its
// profile does not say, is absent, and all is of a device that has shut down.
func (d *Device) Sample() *dunlinv1.Telemetry {
	d.lock()
	defer d.unlock()
	c := &d.core
	t := &dunlinv1.Telemetry{At: timestamppb.New(time.Now())}
	if d.down() != nil {
		t.Faults = append(t.Faults, d.down().Error())
		return t
	}
	free, total := d.free()
	used := total - free
	if !d.discrete() {
		used = min(used+uint64(c.used), total)
	}
	t.MemoryUsedBytes, t.MemoryTotalBytes = new(used), new(total)
	t.AgentAnonymousBytes = new(uint64(agentBytes + c.faults.leak))
	t.DiskFreeBytes = new(uint64(max(diskBytes/2-c.faults.filled, 0)))

	d.rate()
	utilisation, watts := copied(d.last.utilisation), copied(d.last.watts)
	if watts == nil && c.most > 0 {
		watts = new(c.power())
	}
	if d.gpu {
		if c.faults.lost {
			t.Faults = append(t.Faults, "nvml: GPU is lost")
		} else {
			t.Gpus = append(t.Gpus, d.sampleGPU(utilisation, watts))
		}
	} else {
		t.CpuUtilisation = utilisation
	}
	if !d.discrete() {
		if watts != nil {
			t.PowerWatts, t.EnergyJoules, t.PowerSource = watts, new(c.joules), "simulated"
		}
		if c.resistance > 0 {
			t.Temperatures = append(t.Temperatures, &dunlinv1.Temperature{Sensor: "cpu-thermal", Celsius: c.celsius})
		}
	}
	return t
}

// rate takes the rates of the time since the last window, where that is long
// enough for one.
func (d *Device) rate() {
	c, last := &d.core, &d.last
	if c.now-last.at < leastWindow {
		return
	}
	seconds := (c.now - last.at).Seconds()
	r := reading{at: c.now, joules: c.joules, busy: c.busy, moved: c.moved}
	r.utilisation = new(min((c.busy-last.busy)/seconds, 1))
	r.received = new((c.moved - last.moved) / seconds)
	if c.most > 0 {
		r.watts = new((c.joules - last.joules) / seconds)
	}
	d.last = r
}

// copied gives a figure that the caller may change.
func copied(v *float64) *float64 {
	if v == nil {
		return nil
	}
	return new(*v)
}

// sampleGPU is the GPU's part of a sample.
func (d *Device) sampleGPU(utilisation, watts *float64) *dunlinv1.GpuTelemetry {
	c, f := &d.core, &d.core.faults
	g := &dunlinv1.GpuTelemetry{Uuid: d.uuid(), Utilisation: utilisation}
	if watts != nil {
		limit := c.most
		if f.cap > 0 {
			limit = min(limit, f.cap)
		}
		g.PowerWatts, g.EnergyJoules, g.PowerLimitWatts = watts, new(c.joules), new(limit)
	}
	if c.resistance > 0 {
		g.Celsius = new(c.celsius)
		if c.slowdown > 0 {
			g.SlowdownCelsius = new(c.slowdown)
		}
	}
	if len(c.processor.jobs) > 0 {
		if c.slowed {
			g.ThrottleReasons = append(g.ThrottleReasons, "sw_thermal")
		}
		if c.capClock() < 1 {
			g.ThrottleReasons = append(g.ThrottleReasons, "sw_power_cap")
		}
	}
	if !d.discrete() {
		return g
	}
	total := uint64(d.cfg.Profile.Hardware.DeviceBytes)
	g.MemoryTotalBytes, g.MemoryUsedBytes = new(total), new(min(total-uint64(d.capacity)+uint64(c.used), total))
	g.EccCorrected, g.EccUncorrected = count(f.corrected), count(f.uncorrected)
	g.RemappedRowsCorrected, g.RemappedRowsUncorrected = new(uint32(f.remapped)), new(uint32(f.remappedUncorrected))
	g.RemapPending, g.RemapFailed = new(f.pending), new(f.failed)
	g.XidCount = new(uint64(f.xids))
	if f.xids > 0 {
		g.LastXid = new(uint64(f.lastXID))
	}
	g.PcieRxBytesPerSecond = copied(d.last.received)
	return g
}

// count is how many of something there are that grows steadily; a sum that is
// a whole number but for rounding counts as one.
func count(sum float64) *uint64 { return new(uint64(sum + 1e-6)) }
