// Package sim is a simulated device of a class: a machine that has telemetry,
// and a runtime for models, for tests and for fleets of simulated agents. What
// it does comes from its profile's figures, its seed and the script of its
// faults. It starts no goroutine: many thousand fit one process.
package sim

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
)

// DefaultJitter is a Config.Jitter as of a device that does other things too.
const DefaultJitter = 0.02

// Config configures a Device.
type Config struct {
	Profile profiles.Profile
	// Script are the faults to come, in any order.
	Script []Event
	// Seed makes the jitter, the runs that fail, and the GPU's UUID.
	Seed uint64
	// Jitter is by how much of its time a run lasts longer: it has a Lomax
	// distribution of this scale and the shape 2.5, whose mean is two thirds of
	// the scale, and which has a variance but no third moment. At most ten times
	// the run; 0: none.
	Jitter float64
	// Describe tells what a version is like; nil reads its ONNX file.
	Describe func(engine.Spec) (Model, error)
}

// Device is an engine.Runtime and a machine. It is on from New on, by package
// time's clock. Its methods may be called from many goroutines at a time.
type Device struct {
	cfg      Config
	gpu      bool  // models run on one
	capacity int64 // bytes of the memory that they run in, less what the system takes
	began    time.Time
	off      chan struct{} // closed when the device has shut down, or Close was called

	mu     sync.Mutex // guards what follows
	core   core
	timer  *time.Timer // nil until something is to come
	armed  moment      // when it fires
	closed bool
	last   reading
	died   func([]engine.VersionID)
	gone   func(engine.VersionID, error)
}

// What a device has besides what its profile says.
const (
	systemPart = 0.1      // of the memory, taken by the system
	diskBytes  = 64 << 30 // of which half is taken
)

var (
	errDown    = fmt.Errorf("%w: the simulated device has shut down: it is too hot", engine.ErrUnavailable)
	errClosed  = fmt.Errorf("%w: the simulated device is closed", engine.ErrUnavailable)
	errCrashed = fmt.Errorf("%w: the simulated worker crashed", engine.ErrNotLoaded)
)

// assumed gives a profile figures in place of those that it does not have, as
// far as a device cannot be without them. Power is left as it is: a class
// without has no sensor for it.
func assumed(p profiles.Profile) profiles.Profile {
	set(&p.Match.Arch, "amd64")
	hw := &p.Hardware
	set(&hw.Cores, 8)
	set(&hw.HostBytes, max(8<<30, 2*hw.DeviceBytes))
	set(&hw.DeviceBytes, hw.HostBytes)
	set(&hw.FP32GFLOPS, 100)
	set(&hw.MemoryGBPerSecond, 20)
	set(&hw.LinkGBPerSecond, 16)
	set(&hw.StorageMBPerSecond, 500)
	set(&p.Power.IdleWatts, p.Power.LimitWatts/5)
	set(&p.Thermal.SlowdownCelsius, 90)
	set(&p.Thermal.WarnCelsius, p.Thermal.SlowdownCelsius-5)
	set(&p.Thermal.ShutdownCelsius, p.Thermal.SlowdownCelsius+15)
	return p
}

// set sets what is not set.
func set[T comparable](to *T, v T) { *to = cmp.Or(*to, v) }

// New gives a Device of a class. All that is wrong with the Config is reported
// together.
func New(cfg Config) (*Device, error) {
	cfg.Profile = assumed(cfg.Profile)
	p, hw := &cfg.Profile, &cfg.Profile.Hardware
	d := &Device{cfg: cfg, began: time.Now(), off: make(chan struct{}), armed: never}
	d.gpu = len(p.Providers) > 0 && p.Providers[0].Name != "CPUExecutionProvider"
	memory, bus := hw.HostBytes, hw.StorageMBPerSecond*1e6
	if d.discrete() {
		memory, bus = hw.DeviceBytes, hw.LinkGBPerSecond*1e9
	}
	d.capacity = memory - int64(systemPart*float64(memory))
	var errs []error
	for _, f := range []struct {
		name  string
		value float64
	}{
		{"hardware.cores", float64(hw.Cores)}, {"hardware.host_bytes", float64(hw.HostBytes)}, {"hardware.device_bytes", float64(hw.DeviceBytes)},
		{"hardware.fp32_gflops", hw.FP32GFLOPS}, {"hardware.memory_gb_per_second", hw.MemoryGBPerSecond},
		{"hardware.link_gb_per_second", hw.LinkGBPerSecond}, {"hardware.storage_mb_per_second", hw.StorageMBPerSecond},
		{"power.idle_watts", p.Power.IdleWatts}, {"power.limit_watts", p.Power.LimitWatts},
	} {
		if !(f.value >= 0) {
			errs = append(errs, fmt.Errorf("profile %s: %s: is %v, allowed are 0 and more", p.Name, f.name, f.value))
		}
	}
	if !(cfg.Jitter >= 0) {
		errs = append(errs, fmt.Errorf("jitter: is %v, allowed are 0 and more", cfg.Jitter))
	}
	for i, e := range cfg.Script {
		if err := e.check(); err != nil {
			errs = append(errs, fmt.Errorf("script event %d: %w", i, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	d.core = core{
		idle: p.Power.IdleWatts, most: max(p.Power.LimitWatts, p.Power.IdleWatts), busBytes: bus,
		versions: map[engine.VersionID]*version{}, faults: faults{ambient: ambientCelsius},
		all: newQuality(), qualities: map[string]*quality{},
		script: slices.SortedStableFunc(slices.Values(cfg.Script), func(a, b Event) int { return cmp.Compare(a.At, b.At) }),
	}
	c := &d.core
	if c.most > 0 {
		c.slowdown, c.shutdown = p.Thermal.SlowdownCelsius, p.Thermal.ShutdownCelsius
		c.resistance = settledPart * max(p.Thermal.WarnCelsius-ambientCelsius, 1) / c.most
	}
	c.celsius = c.balance()
	c.settle()
	return d, nil
}

// Profile is that of the Config, with what was assumed in place of what it does
// not say.
func (d *Device) Profile() profiles.Profile { return d.cfg.Profile }

// discrete says that models run in a memory that is not the host's.
func (d *Device) discrete() bool { return d.gpu && !d.cfg.Profile.Memory.Unified }

// Down is closed when the device has shut down, or was closed.
func (d *Device) Down() <-chan struct{} {
	d.lock()
	defer d.unlock()
	return d.off
}

// BadRelease says whether a release of the agent that is tried now does not do.
func (d *Device) BadRelease() bool {
	d.lock()
	defer d.unlock()
	return d.core.faults.badRelease
}

// Close switches the device off: what goes on fails.
func (d *Device) Close() error {
	d.lock()
	defer d.unlock()
	d.closed = true
	d.core.end(errClosed)
	return nil
}

// OnCrash has f be told of each crash in the script from now on, and of the
// versions that ran then. It must be quick, and is called by whoever uses the
// device, or by its timer.
func (d *Device) OnCrash(f func(running []engine.VersionID)) {
	d.lock()
	defer d.unlock()
	d.died = f
}

// OnLost has f be told of each version that is put into quarantine from now on,
// since its runs crash the worker. It is called as OnCrash's is, after that.
func (d *Device) OnLost(f func(engine.VersionID, error)) {
	d.lock()
	defer d.unlock()
	d.gone = f
}

// lock takes the state to the present.
func (d *Device) lock() {
	d.mu.Lock()
	d.core.advance(time.Since(d.began))
}

// unlock has the device go on by itself.
func (d *Device) unlock() {
	deaths, died := d.core.deaths, d.died
	lost, gone := d.core.lost, d.gone
	d.core.deaths, d.core.lost = nil, nil
	if d.core.down {
		select {
		case <-d.off:
		default:
			close(d.off)
		}
	}
	d.arm()
	d.mu.Unlock()
	if died != nil {
		for _, running := range deaths {
			died(running)
		}
	}
	if gone != nil {
		for _, id := range lost {
			gone(id, quarantined(id))
		}
	}
}

// arm has the timer fire when something happens.
func (d *Device) arm() {
	next := d.core.next()
	if next == d.armed && next > d.core.now {
		return
	}
	d.armed = next
	switch {
	case next == never:
		if d.timer != nil {
			d.timer.Stop()
		}
	case d.timer == nil:
		d.timer = time.AfterFunc(next-d.core.now, d.wake)
	default:
		d.timer.Reset(next - d.core.now)
	}
}

func (d *Device) wake() {
	d.lock()
	d.armed = 0 // it has fired
	d.unlock()
}

// down says why the device does not answer.
func (d *Device) down() error {
	switch {
	case d.closed:
		return errClosed
	case d.core.down:
		return errDown
	}
	return nil
}
