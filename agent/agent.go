// Package agent wires the parts of a device's agent and runs them.
package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/program"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// What there is in the data folder.
const (
	stateFile     = "state.db"
	bundlesFolder = "bundles"
)

// runtimeWait is the wait before the runtime is looked at again that did not
// start.
const runtimeWait = time.Second

// drainTime is how long requests may take to end when the agent stops.
const drainTime = 5 * time.Second

// agent holds what the parts of a running agent share.
type agent struct {
	cfg       Config
	profile   profiles.Profile
	store     *state.Store
	worker    *worker.Worker
	engine    *engine.Engine
	front     *serve.Server
	reconcile *reconcile.Reconciler
	sampler   *device.Sampler
	outbox    chan struct{} // an event was appended
	described chan struct{} // closed when info says all that can be found out
	loads     atomic.Bool   // models can be loaded

	mu       sync.Mutex // guards what follows
	info     *dunlinv1.DeviceInfo
	identity state.Identity
	link     *link.Link // nil until the device has joined
}

// Run runs an agent until ctx is done, and gives nil then, or until a part of
// it fails. It serves what is on the device whether or not the controller can
// be reached.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	lock, err := program.LockFolder(cfg.Data)
	if err != nil {
		return err
	}
	defer lock.Close()
	profile, err := profiles.Match(runtime.GOARCH)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("%w; --listen chooses another address", err)
	}
	defer listener.Close()
	store, err := state.Open(ctx, filepath.Join(cfg.Data, stateFile), state.Limits{Events: profile.Storage.OutboxEvents})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	a, err := newAgent(ctx, cfg, profile, store, "http://"+listener.Addr().String())
	if err != nil {
		return err
	}
	return a.run(ctx, listener)
}

// newAgent puts the parts together; url is where the device answers.
func newAgent(ctx context.Context, cfg Config, profile profiles.Profile, store *state.Store, url string) (*agent, error) {
	a := &agent{
		cfg: cfg, profile: profile, store: store, sampler: device.NewSampler(cfg.Data), outbox: make(chan struct{}, 1), described: make(chan struct{}),
		info: device.Info(cfg.Data),
	}
	a.info.FirmwareProfile, a.info.AgentVersion, a.info.ServingUrl = profile.Name, program.Version(), url
	var err error
	if a.identity, err = store.Identity(ctx); err != nil && !errors.Is(err, state.ErrNone) {
		return nil, err
	}
	a.worker = worker.New(a.workerConfig(profile.Threads))
	a.engine = engine.New(engine.Config{Runtime: a.worker, Log: cfg.Log})
	a.front = serve.New(a.engine)
	a.reconcile, err = reconcile.New(reconcile.Config{
		Dir: filepath.Join(cfg.Data, bundlesFolder), Registry: a.registry, Reserve: uint64(profile.Storage.ReserveBytes),
		State: store, Engine: a.engine, Check: a.check, Passing: passing, Front: a.front, Event: a.event, Log: cfg.Log,
	})
	return a, err
}

// run starts the parts and stops them in reverse order: requests first, then
// what changes the device, then what runs models.
func (a *agent) run(ctx context.Context, listener net.Listener) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	var above, under sync.WaitGroup
	defer under.Wait()
	defer stopBelow()
	defer above.Wait()
	part := func(wg *sync.WaitGroup, ctx context.Context, name string, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				fail(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	part(&under, below, "worker", a.worker.Supervise)
	part(&under, below, "engine", a.engine.Run)
	part(&above, ctx, "reconcile", a.reconcile.Run)
	part(&above, ctx, "runtime", a.runtime)
	part(&above, ctx, "controller", a.control)

	server := &http.Server{
		Handler: a.handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(a.cfg.Log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	a.cfg.Log.Info("agent started", "url", "http://"+listener.Addr().String(), "data", a.cfg.Data, "agent_version", program.Version())
	select {
	case <-ctx.Done():
	case err := <-served:
		fail(fmt.Errorf("serve: %w", err))
		return context.Cause(ctx)
	}
	drain, cancel := context.WithTimeout(below, drainTime)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		server.Close()
	}
	<-served
	a.cfg.Log.Info("agent stops")
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// control joins where that has not been done, and then talks to the
// controller.
func (a *agent) control(ctx context.Context) error {
	if a.cfg.Controller == "" && !joined(a.registered()) {
		a.cfg.Log.Info("no controller is named: serving what is on the device")
		<-ctx.Done()
		return nil
	}
	select {
	case <-a.described:
	case <-ctx.Done():
		return nil
	}
	id, err := join(ctx, a.cfg, a.store, a.deviceInfo())
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.identity = id
	a.mu.Unlock()
	if err := errors.Join(program.CheckURL(id.BrokerURL, "tcp"), program.CheckURL(id.RegistryURL, "http")); err != nil {
		return err
	}
	l, err := link.New(link.Config{
		BrokerURL: id.BrokerURL, Device: id.Device, Secret: id.Secret, BootID: rand.Text(), Log: a.cfg.Log,
		Hello: func() *dunlinv1.Hello {
			return &dunlinv1.Hello{HaveGeneration: a.reconcile.Generation(), Info: a.deviceInfo(), Labels: a.cfg.Labels}
		},
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.link = l
	a.mu.Unlock()
	return newSession(l, a).run(ctx)
}

func (a *agent) registered() state.Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.identity
}

func (a *agent) registry() reconcile.Registry {
	id := a.registered()
	return reconcile.Registry{URL: id.RegistryURL, Device: id.Device, Secret: id.Secret}
}

func (a *agent) workerConfig(threads int) worker.Config {
	return worker.Config{
		Command: a.cfg.Worker, RuntimeLib: a.cfg.RuntimeLib, Threads: threads, Log: a.cfg.Log,
		OnDeath: func(d worker.Death) {
			for _, id := range append(d.InFlight, engine.VersionID{})[:max(len(d.InFlight), 1)] {
				a.event(&dunlinv1.Event{
					Kind: "worker.died", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: id.Model, Version: id.Version, Message: d.Err.Error(),
				})
			}
		},
		OnLost: func(id engine.VersionID, reason error) {
			a.cfg.Log.Error("version lost", "model", id.Model, "version", id.Version, "error", reason)
			a.event(&dunlinv1.Event{
				Kind: "version.lost", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: id.Model, Version: id.Version, Message: reason.Error(),
			})
			a.reconcile.Lost(id)
		},
	}
}

// check loads a version in a process of its own.
func (a *agent) check(ctx context.Context, s engine.Spec) (engine.Info, error) {
	cfg := a.workerConfig(1)
	cfg.OnDeath, cfg.OnLost = nil, nil
	return worker.Check(ctx, cfg, s)
}

// passing says whether an error of loading is not the version's own.
func passing(err error) bool { return errors.Is(err, engine.ErrUnavailable) }

// runtime waits until models can be loaded, and adds the runtime to what the
// device says of itself.
func (a *agent) runtime(ctx context.Context) error {
	described := sync.OnceFunc(func() { close(a.described) })
	defer described()
	for try := 1; ; try++ {
		found, err := a.worker.Runtime(ctx)
		if err == nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			info := proto.CloneOf(a.info)
			info.RuntimeVersion, info.Providers = found.Version, usable(a.profile, found.Providers)
			a.info = info
			a.loads.Store(true)
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if try == 1 {
			a.cfg.Log.Error("no model can be loaded; see dunlin-agent doctor", "error", err)
		}
		described()
		if !sleep(ctx, runtimeWait) {
			return nil
		}
	}
}

// deviceInfo gives what the device says of itself; nobody changes it.
func (a *agent) deviceInfo() *dunlinv1.DeviceInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.info
}

// backend answers inference.
type backend struct {
	*serve.Server
	agent *agent
}

// Ready says whether all that the device should serve can be answered.
func (b backend) Ready(ctx context.Context) bool {
	report := b.agent.reconcile.Report()
	if report == nil || !b.agent.loads.Load() || !b.Server.Ready(ctx) {
		return false
	}
	serves := map[string]bool{}
	for _, v := range report.Versions {
		serves[v.Model] = serves[v.Model] || v.Serving
	}
	for _, v := range report.Versions {
		if v.Deployment != "" && !serves[v.Model] {
			return false
		}
	}
	return !slices.ContainsFunc(report.Routes, func(r *dunlinv1.RouteStatus) bool { return !r.Ready })
}

// event keeps an event for the controller.
func (a *agent) event(e *dunlinv1.Event) {
	if _, err := a.store.Append(context.Background(), e); err != nil {
		a.cfg.Log.Error("event lost", "kind", e.Kind, "model", e.Model, "version", e.Version, "error", err)
		return
	}
	signal(a.outbox)
}
