// Package device finds out what a device is and how it is doing: from NVML,
// where there is a GPU of NVIDIA's, and from what the kernel says below /proc
// and /sys. A figure that the device does not have is absent and never zero.
package device

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// sampleEvery is the least time between two samples; who asks earlier gets
	// the last one once more.
	sampleEvery = 100 * time.Millisecond
	// rateEvery is the least time over which the use of the processor and RAPL's
	// power are taken anew, so that it matters little who else samples.
	rateEvery = 5 * time.Second
	// maxFaults bounds those of a sample.
	maxFaults = 16
)

// Config says which device it is.
type Config struct {
	// Dir is a folder on the file system that holds the agent's data.
	Dir string
	// Sources are as for Use.
	Sources []string
	// Log is told once when GPUs stop to answer, and when they do again; nil:
	// nobody is.
	Log *slog.Logger
	// Root is the folder in which proc and sys lie; "": that of the system.
	Root string
	// NVML is the library for NVIDIA's GPUs; nil: the driver's, where there is
	// one.
	NVML nvml.Interface
}

// Device is the device that the program runs on. Its methods may be called
// concurrently.
type Device struct {
	root root
	dir  string
	gpus *client

	// mu makes samples one after the other, which takes as long as they wait
	// for NVML (callLimit); it guards what follows.
	mu      sync.Mutex
	use     sources
	last    processor
	lastAt  time.Time
	busy    *float64 // share of the processor in use until lastAt; nil: not known
	sensors sensors
	newest  *dunlinv1.Telemetry
	at      time.Time // of newest
	closed  bool
}

// sources are where figures may come from.
type sources struct{ nvml, jetson, hwmon, thermal, rapl bool }

func choose(names []string) sources {
	has := func(name string) bool { return names == nil || slices.Contains(names, name) }
	return sources{nvml: has("nvml"), jetson: has("jetson"), hwmon: has("hwmon"), thermal: has("thermal"), rapl: has("rapl")}
}

// Open finds out what there is. GPUs are looked for whatever the sources are,
// and waited for at most beginLimit. Close ends what it has begun.
func Open(cfg Config) *Device {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.NVML == nil {
		cfg.NVML = nvml.New()
	}
	d := &Device{root: root(strings.TrimSuffix(cfg.Root, "/")), dir: cfg.Dir, gpus: newClient(cfg.NVML, cfg.Log)}
	d.last, _ = d.root.processor()
	d.lastAt, d.sensors.dir = time.Now(), cfg.Dir
	d.gpus.open()
	d.Use(cfg.Sources)
	return d
}

// Use chooses what is sampled beside processor, memory and disk, by the names
// of a firmware profile: "nvml", "jetson", "hwmon", "thermal" and "rapl". nil
// chooses all, and a list without names none.
func (d *Device) Use(names []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.use = choose(names)
	d.sensors.scan(d.root, d.use)
	d.newest = nil
	if !d.use.nvml {
		d.gpus.end()
	}
}

// Close lets go of NVML. It waits for a call that is under way for at most
// callLimit and says so where that was not enough. Samples of a closed device
// are without GPUs.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed, d.newest = true, nil
	if !d.gpus.end() {
		return fmt.Errorf("nvml: a call has not returned within %v", callLimit)
	}
	return nil
}

// Info describes the device. What cannot be found out stays empty.
func (d *Device) Info() *dunlinv1.DeviceInfo {
	info := &dunlinv1.DeviceInfo{Os: runtime.GOOS, Arch: runtime.GOARCH, CpuCount: uint32(runtime.NumCPU()), Board: readBoard(string(d.root)).String()}
	info.Hostname, _ = os.Hostname()
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		info.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if raw, err := d.root.text("/proc/cpuinfo"); err == nil {
		info.CpuModel = cpuModel(raw)
	}
	if info.CpuModel == "" { // boards describe themselves here
		info.CpuModel = info.Board
	}
	if m, err := d.root.memory(); err == nil {
		info.MemoryBytes = m.total
	}
	if _, size, err := Disk(d.dir); err == nil {
		info.DiskBytes = size
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	info.DriverVersion, info.CudaVersion, info.Gpus = d.gpus.inventory()
	if j := d.root.tegra(); j != nil {
		i := slices.IndexFunc(info.Gpus, (*dunlinv1.GpuInfo).GetUnifiedMemory)
		if i < 0 {
			j.Index = uint32(len(info.Gpus))
			info.Gpus, i = append(info.Gpus, j), len(info.Gpus)
		}
		info.Gpus[i].MemoryBytes = info.MemoryBytes
	}
	for _, g := range info.Gpus {
		if g.UnifiedMemory && g.MemoryBytes == 0 {
			g.MemoryBytes = info.MemoryBytes
		}
	}
	return info
}

// Memory is as the function of that name.
func (d *Device) Memory() (available, total uint64, err error) { return d.root.available() }

// Sample gives the device's figures now, or, within sampleEvery, those of the
// last sample. Rates are those since the sample before, by whoever asked for it,
// or since Open. The use of the processor and RAPL's power are taken over
// rateEvery at least, and until then what they were last. The anonymous memory is that
// of this process and its children. A figure that cannot be had is absent;
// where a source has stopped to answer, the faults say so. The caller may
// change what it gets.
func (d *Device) Sample() *dunlinv1.Telemetry {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if d.newest == nil || now.Sub(d.at) >= sampleEvery {
		d.newest, d.at = d.sample(now), now
	}
	return proto.CloneOf(d.newest)
}

func (d *Device) sample(now time.Time) *dunlinv1.Telemetry {
	t := &dunlinv1.Telemetry{At: timestamppb.New(now)}
	if p, err := d.root.processor(); err == nil {
		long := now.Sub(d.lastAt) >= rateEvery
		if long || d.busy == nil {
			d.busy = utilisation(d.last, p)
		}
		if long {
			d.last, d.lastAt = p, now
		}
		if d.busy != nil {
			t.CpuUtilisation = new(*d.busy)
		}
	}
	if m, err := d.root.memory(); err == nil {
		t.MemoryUsedBytes, t.MemoryTotalBytes = new(m.used), new(m.total)
	}
	if free, _, err := Disk(d.dir); err == nil {
		t.DiskFreeBytes = new(free)
	}
	t.AgentAnonymousBytes = d.root.anonymous()
	if d.use.nvml && !d.closed {
		t.Gpus, t.Faults = d.gpus.sample()
	}
	d.sensors.sample(d.root, d.use, now, d.gpus.integrated(), t)
	t.Faults = t.Faults[:min(len(t.Faults), maxFaults)]
	return t
}

// Energy gives counters as they are now, whatever Sample gives and without an
// effect on it: the joules of EnergyJoules, and the ticks that the processor's
// cores were busy and that there were, since the system's start. ok is false
// where one of them is not to be had. It waits for a sample that is being taken.
func (d *Device) Energy() (joules float64, busy, total uint64, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, err := d.root.processor()
	if err != nil || len(d.sensors.total) > 0 { // rails have power, and no energy
		return 0, p.busy, p.total, false
	}
	joules, _, ok = d.sensors.energy(d.root, func(string, error) {})
	if !ok {
		joules = 0
	}
	return joules, p.busy, p.total, ok
}
