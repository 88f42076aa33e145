package simfleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/dunlin/dunlin/internal/strictyaml"
)

// Limits of a script of a fleet's faults.
const (
	// MaxScript bounds its bytes.
	MaxScript = 64 << 10
	maxFaults = 1000
	maxAt     = 365 * 24 * time.Hour
	maxSkew   = 100 * 365 * 24 * time.Hour
)

// Fault is something that befalls a part of the fleet. Of what it names, what
// lasts is undone after For, where that is not 0.
type Fault struct {
	At    time.Duration // since the fleet's start
	For   time.Duration
	Part  float64       // of the devices, 0 to 1, by chance; 0: all
	Class string        // only devices of this class; "": of all
	Over  time.Duration // the devices are met one after the other in this time

	// Of the network.
	RTT           *time.Duration
	Loss          *float64
	BitsPerSecond *int64
	Corrupt       *float64
	Down          bool
	Cut           bool // connections are reset once

	// Of the device.
	Reboot, Crash bool
	Off           time.Duration // how long it is off then
	Skew          *time.Duration
	DiskWrite     *time.Duration // how long a write takes
	DiskFull      bool
}

// entry is a Fault in a script's YAML.
type entry struct {
	At            string   `yaml:"at"`
	For           string   `yaml:"for"`
	Part          *float64 `yaml:"part"`
	Class         string   `yaml:"class"`
	Over          string   `yaml:"over"`
	RTT           string   `yaml:"rtt"`
	Loss          *float64 `yaml:"loss"`
	KbitPerSecond *float64 `yaml:"kbit_per_second"`
	Corrupt       *float64 `yaml:"corrupt"`
	Network       string   `yaml:"network"`
	Power         string   `yaml:"power"`
	Off           string   `yaml:"off"`
	ClockSkew     string   `yaml:"clock_skew"`
	DiskWrite     string   `yaml:"disk_write"`
	Disk          string   `yaml:"disk"`
}

// ParseScript reads the faults of a fleet; all that is wrong with what could be
// read is reported together. name is the file's, for errors.
func ParseScript(name string, raw []byte) ([]Fault, error) {
	if len(raw) > MaxScript {
		return nil, fmt.Errorf("%s: it has %d bytes, the limit is %d", name, len(raw), MaxScript)
	}
	var entries []entry
	if err := strictyaml.Decode(raw, &entries); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(entries) > maxFaults {
		return nil, fmt.Errorf("%s: it has %d entries, the limit is %d", name, len(entries), maxFaults)
	}
	var faults []Fault
	var errs []error
	for i, e := range entries {
		f, err := e.fault()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: entry %d: %w", name, i+1, err))
		}
		faults = append(faults, f)
	}
	return faults, errors.Join(errs...)
}

// ReadScript is ParseScript for a file.
func ReadScript(path string) ([]Fault, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, MaxScript+1))
	if err != nil {
		return nil, err
	}
	return ParseScript(path, raw)
}

func (e *entry) fault() (f Fault, err error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	duration := func(name, text string, least, most time.Duration) *time.Duration {
		if text == "" {
			return nil
		}
		d, err := time.ParseDuration(text)
		if err != nil || d < least || d > most {
			bad("%s: is %q, it must be a duration like 90s or 1h30m, from %v to %v", name, text, least, most)
		}
		return &d
	}
	value := func(d *time.Duration) time.Duration {
		if d == nil {
			return 0
		}
		return *d
	}
	if e.At == "" {
		bad("at: is missing, it is the time since the start, like 10m")
	}
	f.At, f.For, f.Over = value(duration("at", e.At, 0, maxAt)), value(duration("for", e.For, 0, maxAt)), value(duration("over", e.Over, 0, maxAt))
	f.Off, f.Class = value(duration("off", e.Off, 0, maxAt)), e.Class
	f.RTT, f.Skew = duration("rtt", e.RTT, 0, time.Minute), duration("clock_skew", e.ClockSkew, -maxSkew, maxSkew)
	f.DiskWrite = duration("disk_write", e.DiskWrite, 0, time.Minute)
	f.Loss, f.Corrupt, f.Part = e.Loss, e.Corrupt, 1
	if e.Part != nil {
		if f.Part = *e.Part; !(f.Part > 0 && f.Part <= 1) {
			bad("part: is %v, it must be above 0, and at most 1", f.Part)
		}
	}
	for name, v := range map[string]*float64{"loss": e.Loss, "corrupt": e.Corrupt} {
		if v != nil && !(*v >= 0 && *v <= 1) {
			bad("%s: is %v, allowed are 0 to 1", name, *v)
		}
	}
	if k := e.KbitPerSecond; k != nil {
		if !(*k >= 0 && *k <= 1e9) {
			bad("kbit_per_second: is %v, allowed are 0, for no bound, to 1e9", *k)
		}
		f.BitsPerSecond = new(int64(*k * 1000))
	}
	word := func(name, text string, known map[string]*bool, words string) {
		if text == "" {
			return
		}
		set, ok := known[text]
		if !ok {
			bad("%s: is %q, it must be %s", name, text, words)
			return
		}
		*set = true
	}
	word("network", e.Network, map[string]*bool{"down": &f.Down, "cut": &f.Cut}, "down or cut")
	word("power", e.Power, map[string]*bool{"reboot": &f.Reboot, "crash": &f.Crash}, "reboot or crash")
	word("disk", e.Disk, map[string]*bool{"full": &f.DiskFull}, "full")
	if e.Off != "" && !f.Reboot && !f.Crash {
		bad("off: has a meaning with power only")
	}
	if f.RTT == nil && f.Loss == nil && f.BitsPerSecond == nil && f.Corrupt == nil && f.Skew == nil && f.DiskWrite == nil && e.Network+e.Power+e.Disk == "" {
		bad("no fault is named, known are rtt, loss, kbit_per_second, corrupt, network, power, clock_skew, disk_write, disk")
	}
	return f, errors.Join(errs...)
}

// network says whether a fault changes more than a plain link can.
func (f *Fault) network() bool {
	return f.RTT != nil || f.Loss != nil || f.BitsPerSecond != nil || f.Corrupt != nil
}

// stroke is a fault that meets a device, or its end.
type stroke struct {
	at     time.Duration
	device int
	fault  int
	end    bool
}

// strokes says which devices a script meets, and when; it is the same each time.
func (f *Fleet) strokes() []stroke {
	var all []stroke
	for i, fault := range f.cfg.Faults {
		random := f.random(fmt.Sprint("fault ", i))
		for n, d := range f.devices {
			meets, part := random.Float64(), random.Float64()
			if fault.Class != "" && fault.Class != d.Class || meets >= fault.Part {
				continue
			}
			at := fault.At + time.Duration(part*float64(fault.Over))
			all = append(all, stroke{at: at, device: n, fault: i})
			if fault.For > 0 {
				all = append(all, stroke{at: at + fault.For, device: n, fault: i, end: true})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b stroke) int { return cmp.Compare(a.at, b.at) })
	return all
}

// carryOut has the faults befall the fleet.
func (f *Fleet) carryOut(ctx context.Context) {
	for _, s := range f.strokes() {
		if wait := s.at - time.Since(f.began); wait > 0 && sleep(ctx, wait) != nil {
			return
		}
		if ctx.Err() != nil {
			return
		}
		f.devices[s.device].Meet(f.cfg.Faults[s.fault], s.end)
	}
}

// Meet has a fault befall the device at once, or end; the network is as usual
// then. Which devices a fault is for, and when, is not looked at.
func (d *Device) Meet(f Fault, end bool) {
	c, usual := d.net.Conditions(), d.fleet.cfg.Net
	set(&c.RTT, f.RTT, end, usual.RTT)
	set(&c.Loss, f.Loss, end, usual.Loss)
	set(&c.BitsPerSecond, f.BitsPerSecond, end, usual.BitsPerSecond)
	set(&c.Corrupt, f.Corrupt, end, usual.Corrupt)
	if f.Down {
		c.Down = !end
	}
	d.net.Set(c)
	if f.Skew != nil {
		d.skew.Store(int64(of(*f.Skew, end)))
	}
	if f.DiskWrite != nil {
		d.slow.Store(int64(of(*f.DiskWrite, end)))
	}
	if f.DiskFull {
		d.full.Store(!end)
	}
	if end {
		return
	}
	if f.Cut {
		d.net.Reset()
	}
	if f.Reboot || f.Crash {
		d.Reboot(f.Crash, f.Off)
	}
}

// set sets a condition that a fault names, and at its end to what is usual.
func set[T any](to, v *T, end bool, usual T) {
	if v == nil {
		return
	}
	if *to = *v; end {
		*to = usual
	}
}

// of gives a time, and at a fault's end none.
func of(d time.Duration, end bool) time.Duration {
	if end {
		return 0
	}
	return d
}
