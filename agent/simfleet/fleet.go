// Package simfleet is a fleet of simulated devices in one process: of each the
// half of an agent that follows the controller is the real one, with its
// identity, connection, reconciler, engine and outbox; its machine, what runs
// models, its disk and its network are simulated. Faults come by a script, and
// all chances from one seed.
package simfleet

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/sim"
	"github.com/dunlin/dunlin/agent/state"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/netem"
)

// MaxDevices bounds a fleet.
const MaxDevices = 100000

// Share is a class and its part of a fleet, relative to the other parts.
type Share struct {
	Profile profiles.Profile
	Weight  int
}

// Config configures a Fleet.
type Config struct {
	Controller string // as an agent's
	JoinToken  string
	Roots      []*x509.Certificate
	System     bool

	Devices int
	Name    string // of a device, before its number: "sim" gives "sim-0"
	Classes []Share
	Labels  map[string]string // of each device, beside "sim"
	Seed    uint64
	Script  []sim.Event // what befalls each device, since its start
	Faults  []Fault     // what befalls the fleet
	// RequestsPerSecond are asked of each model that a device serves.
	RequestsPerSecond float64
	// AtOnce is how many devices start at one time; 0: defaultAtOnce.
	AtOnce int
	// Net is what the devices' links are like until the faults change it.
	Net netem.Conditions
	// Dir holds the bundles, once for all devices. With Download each device
	// downloads them by itself, over its own link, into a folder of its own.
	Dir      string
	Download bool
	// Dial opens connections; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// OnDesired is called when a device has stored a desired document, and
	// OnServing when what it serves has changed, by model. They must be quick;
	// nil: nobody is told.
	OnDesired func(*Device, state.Desired)
	OnServing func(d *Device, versions map[string]int64)
	Log       *slog.Logger
	Agents    *slog.Logger // of the devices; nil: they log nothing
}

const defaultAtOnce = 64

// Fleet is a fleet of simulated devices.
type Fleet struct {
	cfg     Config
	devices []*Device
	began   time.Time
	models  sync.Map // what ONNX files are like, by path
}

// New makes the devices; Run starts them.
func New(cfg Config) (*Fleet, error) {
	if cfg.Devices < 1 || cfg.Devices > MaxDevices {
		return nil, fmt.Errorf("devices: is %d, allowed are 1 to %d", cfg.Devices, MaxDevices)
	}
	if cfg.Name == "" {
		cfg.Name = "sim"
	}
	if err := link.CheckDevice(fmt.Sprint(cfg.Name, "-", cfg.Devices)); err != nil {
		return nil, err
	}
	if cfg.AtOnce == 0 {
		cfg.AtOnce = defaultAtOnce
	}
	sum := 0
	for _, c := range cfg.Classes {
		if c.Weight < 1 {
			return nil, fmt.Errorf("class %s: its part is %d, allowed are 1 and more", c.Profile.Name, c.Weight)
		}
		sum += c.Weight
	}
	if sum == 0 {
		return nil, errors.New("no class is named")
	}
	depot, err := reconcile.NewDepot(filepath.Join(cfg.Dir, "bundles"))
	if err != nil {
		return nil, err
	}
	f := &Fleet{cfg: cfg}
	emulated := cfg.Net != netem.Conditions{} || slices.ContainsFunc(cfg.Faults, func(f Fault) bool { return f.network() })
	for i := range cfg.Devices {
		d := &Device{Name: fmt.Sprint(cfg.Name, "-", i), fleet: f, again: make(chan outage, 1)}
		// The classes are dealt so that each run of devices has about its part of
		// each.
		at := int(uint64(i) * 2654435761 % uint64(sum))
		for _, c := range cfg.Classes {
			if at -= c.Weight; at < 0 {
				d.profile, d.Class = c.Profile, c.Profile.Name
				break
			}
		}
		d.seed = f.seedOf(d.Name)
		if d.net = netem.Plain(); emulated {
			d.net = netem.NewLink(cfg.Net, d.seed)
		}
		if !cfg.Download {
			d.disk = depot.Disk(reconcile.DiskConfig{Bytes: diskBytes, Transfer: d.transfer})
		}
		if d.store, err = state.NewMemory(state.Limits{Events: d.profile.Storage.OutboxEvents}, d.write); err != nil {
			return nil, err
		}
		f.devices = append(f.devices, d)
	}
	return f, nil
}

// diskBytes is the room that a device has for bundles.
const diskBytes = 32 << 30

// seedOf gives what the chances of one device come from.
func (f *Fleet) seedOf(name string) uint64 {
	h := fnv.New64a()
	fmt.Fprint(h, f.cfg.Seed, name)
	return h.Sum64()
}

func (f *Fleet) labels(*Device) map[string]string {
	labels := map[string]string{"sim": "true"}
	maps.Copy(labels, f.cfg.Labels)
	return labels
}

// Devices are all of them.
func (f *Fleet) Devices() []*Device { return f.devices }

// Run starts the devices, some at a time, so that those join first that come
// first, and runs them and the faults until ctx is done.
func (f *Fleet) Run(ctx context.Context) error {
	f.began = time.Now()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { f.carryOut(ctx) })
	room := make(chan struct{}, f.cfg.AtOnce)
	for _, d := range f.devices {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		wg.Go(func() { d.run(ctx) })
		wg.Go(func() {
			defer func() { <-room }()
			for !d.Connected() && d.Err() == nil && sleep(ctx, startLook) == nil {
			}
		})
	}
	<-ctx.Done()
	return nil
}

// startLook is how often a device that starts is looked at.
const startLook = 5 * time.Millisecond

// describe says what a version is like, of which each file is read once.
func (f *Fleet) describe(s engine.Spec) (sim.Model, error) {
	path := filepath.Join(s.Dir, s.Entry)
	if m, ok := f.models.Load(path); ok {
		return m.(sim.Model), nil
	}
	m, err := sim.Read(s)
	if err == nil {
		f.models.Store(path, m)
	}
	return m, err
}

// transfer takes the time in which bytes arrive over the device's link and are
// written to its disk.
func (d *Device) transfer(ctx context.Context, bytes int64) error {
	if d.full.Load() {
		return errNoSpace
	}
	if err := d.net.Transfer(ctx, bytes); err != nil {
		return err
	}
	if rate := d.profile.Hardware.StorageMBPerSecond; rate > 0 {
		return sleep(ctx, time.Duration(float64(bytes)/(rate*1e6)*float64(time.Second)))
	}
	return nil
}

// Status counts the devices of a fleet.
type Status struct {
	Devices, Joined, Connected, Converged, Failed int
	Starts, Answered, Unanswered                  uint64 // of agents; requests
	// From the newest document to what it wants to be served, of half of the
	// devices that have switched, and of all but one in a hundred.
	SwitchP50, SwitchP99 time.Duration
	// Reason is why one of those that have not converged has not.
	Reason string
}

// Connected counts the devices that are connected.
func (f *Fleet) Connected() int {
	n := 0
	for _, d := range f.devices {
		if d.Connected() {
			n++
		}
	}
	return n
}

// Status looks at all devices.
func (f *Fleet) Status() Status {
	s := Status{Devices: len(f.devices)}
	var took []time.Duration
	for _, d := range f.devices {
		answered, failed := d.Requests()
		s.Starts, s.Answered, s.Unanswered = s.Starts+d.Starts(), s.Answered+answered, s.Unanswered+failed
		if t := time.Duration(d.took.Load()); t > 0 {
			took = append(took, t)
		}
		if d.Joined() {
			s.Joined++
		}
		if d.Connected() {
			s.Connected++
		}
		if d.Err() != nil {
			s.Failed++
		}
		if err := d.Converged(); err == nil {
			s.Converged++
		} else if s.Reason == "" {
			s.Reason = fmt.Sprintf("%s: %v", d.Name, err)
			if err := d.Err(); err != nil {
				s.Reason += fmt.Sprintf(" (its agent ended: %v)", err)
			}
		}
	}
	if n := len(took); n > 0 {
		slices.Sort(took)
		s.SwitchP50, s.SwitchP99 = took[n/2], took[min(n*99/100, n-1)]
	}
	return s
}

// random gives chances that come from the seed and a name.
func (f *Fleet) random(name string) *rand.Rand {
	return rand.New(rand.NewPCG(f.cfg.Seed, f.seedOf(name)))
}
