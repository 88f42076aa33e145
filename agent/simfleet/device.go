package simfleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/follow"
	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/agent/sim"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/update"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/netem"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Device is a simulated device of a fleet. What is on its disk outlives its
// agent: keys, state and bundles.
type Device struct {
	Name  string
	Class string // name of its firmware profile

	fleet   *Fleet
	profile profiles.Profile
	seed    uint64
	keys    identity.Keys
	disk    *reconcile.Disk // nil: bundles are in a folder
	net     *netem.Link
	program *update.Simulated
	slow    atomic.Int64  // nanoseconds that a write to the disk takes
	full    atomic.Bool   // nothing can be written to the disk
	skew    atomic.Int64  // nanoseconds by which its clock is ahead
	again   chan outage   // to reboot
	running atomic.Uint64 // how often it has started

	answered, failed atomic.Uint64 // requests
	since, took      atomic.Int64  // nanoseconds: when a document came, and until it served what that wants

	mu    sync.Mutex // guards what follows
	store *state.Memory
	agent *agent // nil while it is off
	last  error  // that ended its agent
}

// agent is one run of a device's agent.
type agent struct {
	device *sim.Device
	engine *engine.Engine
	front  *front
	follow *follow.Follower
}

// outage is how long a device is off; where it crashed, what was not synced is
// lost.
type outage struct {
	crash bool
	off   time.Duration
}

// errNoSpace is the error of a write to a disk that is full.
var errNoSpace = errors.New("no space left on the simulated device")

// write is what each change of the state costs.
func (d *Device) write(ctx context.Context) error {
	if d.full.Load() {
		return errNoSpace
	}
	if slow := time.Duration(d.slow.Load()); slow > 0 {
		return sleep(ctx, slow)
	}
	return nil
}

// now is the device's own clock.
func (d *Device) now() time.Time { return time.Now().Add(time.Duration(d.skew.Load())) }

// run runs the device until ctx is done: its agent, and after each outage the
// next.
func (d *Device) run(ctx context.Context) {
	for ctx.Err() == nil {
		next := d.boot(ctx)
		if next.off > 0 && sleep(ctx, next.off) != nil {
			return
		}
	}
}

// boot runs one agent until ctx is done, or it ends, or the device is to
// reboot.
func (d *Device) boot(ctx context.Context) outage {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a, err := d.start(ctx)
	if err != nil {
		d.ended(err)
		return outage{off: restartWait}
	}
	defer a.device.Close()
	d.mu.Lock()
	d.agent = a
	d.mu.Unlock()
	d.running.Add(1)
	var wg sync.WaitGroup
	failed := make(chan error, 4)
	for _, part := range []func(context.Context) error{a.engine.Run, a.follow.Reconcile.Run, a.follow.Run, d.program.Run} {
		wg.Go(func() {
			if err := part(ctx); err != nil && ctx.Err() == nil {
				failed <- err
			}
		})
	}
	if d.fleet.cfg.RequestsPerSecond > 0 {
		wg.Go(func() { d.traffic(ctx, a) })
	}
	next := outage{off: restartWait}
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	case <-a.device.Down():
		err = errors.New("the simulated device has shut down: it is too hot")
		next.off = coolWait
	case next = <-d.again:
		err = nil
		if next.crash {
			d.crash()
		}
	}
	cancel()
	wg.Wait()
	a.follow.Identity.Close()
	d.mu.Lock()
	d.agent = nil
	d.mu.Unlock()
	if err != nil {
		d.ended(err)
	}
	return next
}

const (
	// restartWait is the wait before an agent that ended starts again.
	restartWait = time.Second
	// coolWait is how long a device is off that was too hot.
	coolWait = 5 * time.Minute
)

// crash cuts everything at once: no good-bye is heard, and what the disk had
// not taken is lost.
func (d *Device) crash() {
	d.net.Reset()
	if d.disk != nil {
		d.disk.Crash()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.store = d.store.Crash()
}

// ended notes why an agent ended by itself.
func (d *Device) ended(err error) {
	d.mu.Lock()
	d.last = err
	d.mu.Unlock()
	d.fleet.cfg.Log.Warn("a device's agent has ended", "device", d.Name, "error", err)
}

// start puts the parts of an agent together.
func (d *Device) start(ctx context.Context) (*agent, error) {
	f := d.fleet
	log := slog.New(slog.DiscardHandler)
	if f.cfg.Agents != nil {
		log = f.cfg.Agents.With("device", d.Name)
	}
	a := &agent{}
	var err error
	if a.device, err = sim.New(sim.Config{Profile: d.profile, Script: f.cfg.Script, Seed: d.seed, Jitter: sim.DefaultJitter, Describe: f.describe}); err != nil {
		return nil, err
	}
	budget := modelBytes(a.device)
	a.engine = engine.New(engine.Config{Runtime: a.device, Memory: budget, Log: log, Retired: func(id engine.VersionID, f engine.Figures) { a.follow.Retired(id, f) }})
	a.front = &front{Server: serve.New(a.engine, nil), device: d}
	ready := make(chan struct{})
	close(ready)
	d.mu.Lock()
	store := &watched{d.store, d}
	d.mu.Unlock()
	a.follow, err = follow.New(ctx, follow.Config{
		Store: store, Info: d.info(a.device, budget), Ready: ready, Labels: f.labels(d), Log: log,
		Identity: identity.Config{
			Keys: &d.keys, State: store, Name: d.Name, Controller: f.cfg.Controller, JoinToken: f.cfg.JoinToken,
			Labels: f.labels(d), Roots: f.cfg.Roots, System: f.cfg.System, Log: log, Now: d.now,
		},
		Reconcile: reconcile.Config{
			Disk: d.disk, Dir: filepath.Join(f.cfg.Dir, d.Name), Reserve: uint64(d.profile.Storage.ReserveBytes), Engine: a.engine,
			Check: func(_ context.Context, s engine.Spec) (engine.Info, error) { return a.device.Inspect(s) },
			Passing: func(err error) bool {
				return errors.Is(err, engine.ErrUnavailable) || errors.Is(err, engine.ErrOutOfMemory)
			},
			Front: a.front, Standby: a.front.SetStandby, Log: log,
		},
		Sample:  func(context.Context) *dunlinv1.Telemetry { return a.device.Sample() },
		Program: d.program, Versions: a.engine.Versions, IdleWatts: d.profile.Power.IdleWatts, Dial: d.net.Dialer(f.cfg.Dial),
	})
	if err != nil {
		a.device.Close()
		return nil, err
	}
	a.device.OnLost(func(id engine.VersionID, reason error) {
		a.follow.Event(&dunlinv1.Event{Kind: "version.lost", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: id.Model, Version: id.Version, Message: reason.Error()})
		a.follow.Reconcile.Lost(id, reason)
	})
	a.device.OnCrash(func(running []engine.VersionID) {
		for _, id := range append(running, engine.VersionID{})[:max(len(running), 1)] {
			a.follow.Event(&dunlinv1.Event{Kind: "worker.died", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: id.Model, Version: id.Version, Message: "the simulated worker crashed"})
		}
	})
	return a, nil
}

// newProgram gives what stands for a device's program, and outlives its agents.
func (d *Device) newProgram() *update.Simulated {
	u := update.NewSimulated(program.Version())
	u.Take = updateTime
	u.Became = func(version string) {
		if a := d.live(); a != nil {
			a.follow.Describe(func(info *dunlinv1.DeviceInfo) { info.AgentVersion = version })
		}
	}
	u.Event = func(e *dunlinv1.Event) {
		if a := d.live(); a != nil {
			a.follow.Event(e)
		}
	}
	return u
}

// updateTime is how long a release of the agent takes to be fetched, and to
// prove itself.
const updateTime = 10 * time.Second

// modelBytes is what models may take of a device's memory.
func modelBytes(d *sim.Device) int64 {
	budget := d.Capacity()
	if part := d.Profile().Memory.HostFraction; part > 0 && d.GPU() == "" {
		budget = int64(float64(budget) * part)
	}
	return budget
}

// info is what a device says of itself, as agents do.
func (d *Device) info(device *sim.Device, budget int64) *dunlinv1.DeviceInfo {
	p := device.Profile()
	info := device.Info()
	info.Hostname, info.AgentVersion, info.RuntimeVersion = d.Name, d.program.Status().GetAgentVersion(), "simulated"
	for _, provider := range p.Providers {
		info.Providers = append(info.Providers, provider.Name)
	}
	info.WeightPools = "none: models run on the CPU"
	info.Limits = &dunlinv1.DeviceLimits{
		HostMemoryBytes: uint64(budget), DiskReserveBytes: uint64(p.Storage.ReserveBytes), MaxOpset: p.Limits.MaxOpset, Precisions: p.Limits.Precisions,
		Fp32Gflops: p.Hardware.FP32GFLOPS, MemoryGbPerSecond: p.Hardware.MemoryGBPerSecond,
		RunOverheadSeconds: p.Hardware.OverheadMicros / 1e6, ActiveWatts: p.Power.LimitWatts,
	}
	if gpu := device.GPU(); gpu != "" {
		info.WeightPools, info.Limits.DeviceMemoryBytes = "cuda:0 "+gpu, uint64(budget)
	}
	return info
}

// watched is a state that tells of new desired documents.
type watched struct {
	*state.Memory
	device *Device
}

// SetDesired is state.Store's.
func (w *watched) SetDesired(ctx context.Context, d state.Desired) error {
	err := w.Memory.SetDesired(ctx, d)
	w.device.since.Store(time.Now().UnixNano())
	if on := w.device.fleet.cfg.OnDesired; on != nil && err == nil {
		on(w.device, d)
	}
	return err
}

// front answers requests, and notes when a version began to serve.
type front struct {
	*serve.Server
	device *Device
}

// SetServing implements reconcile.Front.
func (f *front) SetServing(versions map[string]int64) {
	f.Server.SetServing(versions)
	f.device.took.Store(time.Now().UnixNano() - f.device.since.Load())
	if on := f.device.fleet.cfg.OnServing; on != nil {
		on(f.device, versions)
	}
}

// Reboot has the device's agent end and start again after some time; in a
// crash it says no good-bye, and what was not synced is lost. One that is on
// its way counts.
func (d *Device) Reboot(crash bool, off time.Duration) {
	select {
	case d.again <- outage{crash, off}:
	default:
	}
}

// Net is the device's link to the network.
func (d *Device) Net() *netem.Link { return d.net }

// Starts counts how often its agent was started.
func (d *Device) Starts() uint64 { return d.running.Load() }

// Err is what its agent ended with last; nil where it never did.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}

func (d *Device) live() *agent {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.agent
}

// Joined says whether the device has a certificate.
func (d *Device) Joined() bool {
	a := d.live()
	return a != nil && a.follow.Identity.Joined()
}

// Connected says whether it has a session with the broker.
func (d *Device) Connected() bool {
	a := d.live()
	if a == nil {
		return false
	}
	l := a.follow.Link()
	if l == nil {
		return false
	}
	s, _ := l.State()
	return s == link.Connected
}

// Report is what it runs; nil while it is off.
func (d *Device) Report() *dunlinv1.Reported {
	if a := d.live(); a != nil {
		return a.follow.Reconcile.Report()
	}
	return nil
}

// Converged says why it does not run what its newest desired document wants;
// nil: it does.
func (d *Device) Converged() error {
	r := d.Report()
	if r == nil {
		return errors.New("it is off")
	}
	if r.Observed == nil {
		return errors.New("it has no desired document")
	}
	for _, v := range r.Versions {
		if v.Deployment != "" && !v.Serving {
			return fmt.Errorf("%s:%d does not serve: %v %s", v.Model, v.Version, v.State, v.Reason)
		}
	}
	for _, route := range r.Routes {
		if !route.Ready {
			return fmt.Errorf("route %s is not ready: %s", route.Name, route.Reason)
		}
	}
	return nil
}

// Waiting counts events that the controller has not acknowledged, as far as one
// message holds them.
func (d *Device) Waiting() (int, error) {
	d.mu.Lock()
	store := d.store
	d.mu.Unlock()
	events, err := store.Pending(context.Background(), maxWaiting)
	return len(events), err
}

const maxWaiting = 100

// sleep waits, or gives why ctx ended first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
