// Package agent wires the parts of a device's agent and runs them.
package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/inference"
)

// What there is in the data folder.
const (
	stateFile     = "state.db"
	bundlesFolder = "bundles"
	cacheFolder   = "compiled"
)

// agent is a host whose models are those that a controller wants, and holds
// what its parts share.
type agent struct {
	*host
	cfg         Config
	profile     profiles.Profile
	store       *state.Store
	identity    *identity.Device
	reconcile   *reconcile.Reconciler
	fetcher     *inband.Fetcher
	delivery    *inband.Delivery
	imports     *imports
	watch       *watch
	outbox      chan struct{}                 // an event was appended
	stoodDown   bool                          // as the store has it; linkState's
	trust       atomic.Pointer[signing.Trust] // nil: none yet
	takingTrust sync.Mutex                    // held while a trust document is taken
	lacks       error                         // why it cannot be the device that it was; nil: it can

	mu   sync.Mutex // guards what follows
	info *dunlinv1.DeviceInfo
	link *link.Link // nil until the device has joined
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
	if err := cfg.simulate(); err != nil {
		return err
	}
	defer cfg.openMachine(cfg.Data)()
	info := cfg.machine.Info()
	class, err := cfg.classify(ctx, info)
	if err != nil {
		return err
	}
	profile := class.Profile
	cfg.sampleBy(profile)
	l, err := listen(&cfg.Serving)
	if err != nil {
		return err
	}
	defer l.close()
	store, err := state.Open(ctx, filepath.Join(cfg.Data, stateFile), state.Limits{Events: profile.Storage.OutboxEvents})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	a, err := newAgent(ctx, cfg, profile, info, store, l.url())
	if err != nil {
		return err
	}
	return a.run(ctx, l, a.metrics(l), part{"alarms", a.watch.run}, part{"imports", a.followImports}, part{"in-band delivery", a.fetcher.Run}, part{"reconcile", a.reconcile.Run}, part{"controller", a.control})
}

// newAgent puts the parts together; info describes the device, and url is where
// it answers.
func newAgent(ctx context.Context, cfg Config, profile profiles.Profile, info *dunlinv1.DeviceInfo, store *state.Store, url string) (*agent, error) {
	a := &agent{
		cfg: cfg, profile: profile, store: store, outbox: make(chan struct{}, 1),
		info: info,
	}
	a.info.AgentVersion, a.info.ServingUrl = program.Version(), url
	var err error
	trust, err := store.Trust(ctx)
	if err != nil && !errors.Is(err, state.ErrNone) {
		return nil, err
	}
	a.trust.Store(trust)
	if a.identity, err = identity.Open(ctx, a.identityConfig()); err != nil {
		if _, none := store.Desired(ctx); none != nil {
			return nil, err
		}
		a.identity, a.lacks = identity.New(a.identityConfig()), err
	}
	w := cfg.Serving.workerConfig(profile.Threads)
	w.OnDeath, w.OnLost = a.died, a.lost
	w.Folders = []string{filepath.Join(cfg.Data, bundlesFolder)}
	if a.host, err = newHost(cfg.Serving, profile, cfg.Data, w); err != nil {
		return nil, err
	}
	a.info.Limits = a.limits(worker.Runtime{})
	a.source, a.opened = following{a}, a.describe
	a.watch = a.newWatch(cfg.machine, profile, a.event)
	if f := a.host.profiler; f != nil {
		f.measured, f.controller = a.profiled, func() string { return a.reconcile.Generation().GetIncarnation() }
	}
	a.imports = &imports{dir: filepath.Join(cfg.Data, importsFolder)}
	a.fetcher = a.newFetcher()
	a.delivery = a.newDelivery()
	a.reconcile, err = reconcile.New(reconcile.Config{
		Origin: a.origin,
		Dir:    filepath.Join(cfg.Data, bundlesFolder), Registry: a.registry, Reserve: uint64(profile.Storage.ReserveBytes),
		State: store, Now: a.identity.Now, Trust: a.trust.Load, Engine: a.engine, Check: a.check, Passing: passing, Front: a.front, Event: a.event, Log: cfg.Log,
	})
	return a, err
}

// died tells the controller of a death of the worker process.
func (a *agent) died(d worker.Death) {
	for _, id := range append(d.InFlight, engine.VersionID{})[:max(len(d.InFlight), 1)] {
		a.event(&dunlinv1.Event{
			Kind: "worker.died", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: id.Model, Version: id.Version, Message: d.Err.Error(),
		})
	}
}

// lost tells the controller, and the reconciler, of a version that is not
// loaded any more.
func (a *agent) lost(id engine.VersionID, reason error) {
	a.cfg.Log.Error("version lost", "model", id.Model, "version", id.Version, "error", reason)
	a.event(&dunlinv1.Event{
		Kind: "version.lost", Severity: dunlinv1.Severity_SEVERITY_ERROR, Model: id.Model, Version: id.Version, Message: reason.Error(),
	})
	a.reconcile.Lost(id, reason)
}

// control joins where that has not been done, and then talks to the
// controller.
func (a *agent) control(ctx context.Context) error {
	if a.cfg.Controller == "" && a.lacks == nil && !a.identity.Joined() {
		a.cfg.Log.Info("no controller is named: serving what is on the device")
		<-ctx.Done()
		return nil
	}
	select {
	case <-a.tried:
	case <-ctx.Done():
		return nil
	}
	err := a.lacks
	if err == nil {
		err = a.identity.Join(ctx, a.deviceInfo())
	}
	if err != nil {
		if _, none := a.store.Desired(ctx); none != nil {
			return err
		}
		// It followed a controller before: it had a secret, or a key.
		a.cfg.Log.Error("serving what is on the device, until it is started with what it needs", "error", err)
		<-ctx.Done()
		return nil
	}
	l, err := a.newLink()
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.link = l
	a.mu.Unlock()
	if err := a.store.SetStoodDown(ctx, time.Time{}, ""); err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { a.identity.Run(ctx) })
	wg.Go(func() { a.reconnect(ctx, l) })
	return newSession(l, a).run(ctx)
}

// reconnect has the link use what the device's identity is now.
func (a *agent) reconnect(ctx context.Context, l *link.Link) {
	for {
		select {
		case <-a.identity.Changed():
			if err := l.Reconnect(a.identity.Stored().BrokerURL); err != nil {
				a.cfg.Log.Error("the connection stays the old one", "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// linkState keeps for the doctor that the link is quiet, and tells the
// identity that somebody answers. The link calls it, once at a time.
func (a *agent) linkState(s link.State, cause error) {
	if s == link.Connected || s == link.Refused {
		a.identity.Reached()
	}
	var until time.Time
	text := ""
	if s == link.StoodDown {
		until, text = time.Now().Add(link.StandDownFor), cause.Error()
	} else if !a.stoodDown {
		return
	}
	a.stoodDown = s == link.StoodDown
	if err := a.store.SetStoodDown(context.Background(), until, text); err != nil {
		a.cfg.Log.Error("the state of the connection is not kept", "error", err)
	}
}

// newLink makes the link of a device that has joined.
func (a *agent) newLink() (*link.Link, error) {
	id := a.identity.Stored()
	return link.New(link.Config{
		BrokerURL: id.BrokerURL, Device: id.Device, BootID: rand.Text(), Log: a.cfg.Log,
		TLS: a.identity.BrokerTLS, OnState: a.linkState,
		Hello: func() *dunlinv1.Hello {
			h := &dunlinv1.Hello{HaveGeneration: a.reconcile.Generation(), Info: a.deviceInfo(), Labels: a.cfg.Labels}
			a.identity.Introduce(h)
			return h
		},
	})
}

func (a *agent) registry() reconcile.Registry {
	url, client := a.identity.Registry()
	return reconcile.Registry{URL: url, Client: client}
}

// passing says whether an error of loading is not the version's own.
func passing(err error) bool {
	return errors.Is(err, engine.ErrUnavailable) || errors.Is(err, engine.ErrOutOfMemory)
}

// describe adds the runtime to what the device says of itself.
func (a *agent) describe(found worker.Runtime) {
	a.mu.Lock()
	defer a.mu.Unlock()
	info := proto.CloneOf(a.info)
	info.RuntimeVersion, info.Providers = found.Version, usable(a.profile, found.Providers)
	info.WeightPools, info.Limits = a.weightPools(found), a.limits(found)
	a.info = info
}

// deviceInfo gives what the device says of itself; nobody changes it.
func (a *agent) deviceInfo() *dunlinv1.DeviceInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.info
}

// following is the source of the models of a device that follows a controller.
type following struct{ agent *agent }

// Ready says what of that which the controller wants is not served.
func (d following) Ready() error {
	report := d.agent.reconcile.Report()
	if report == nil {
		return errors.New("the state of the device is not known yet")
	}
	serves := map[string]bool{}
	for _, v := range report.Versions {
		serves[v.Model] = serves[v.Model] || v.Serving
	}
	for _, v := range report.Versions {
		if v.Deployment != "" && !serves[v.Model] {
			return fmt.Errorf("model %s of deployment %s does not serve", v.Model, v.Deployment)
		}
	}
	for _, r := range report.Routes {
		if !r.Ready {
			return fmt.Errorf("route %s is not ready", r.Name)
		}
	}
	return nil
}

// Index lists the versions on the device.
func (d following) Index(context.Context) ([]*inference.RepositoryIndexResponse_ModelIndex, error) {
	var all []*inference.RepositoryIndexResponse_ModelIndex
	for _, v := range d.agent.reconcile.Report().GetVersions() {
		entry := &inference.RepositoryIndexResponse_ModelIndex{Name: v.Model, Version: strconv.FormatInt(v.Version, 10), State: "UNAVAILABLE", Reason: v.Reason}
		if v.State == dunlinv1.VersionState_VERSION_STATE_RESIDENT {
			entry.State, entry.Reason = "READY", ""
		}
		all = append(all, entry)
	}
	return all, nil
}

// Load refuses: a model that is loaded here by hand would be gone with the
// next document.
func (d following) Load(_ context.Context, model string, _ oip.Override) error {
	return d.refuse(model)
}

// Unload refuses as Load does.
func (d following) Unload(_ context.Context, model string) error { return d.refuse(model) }

func (following) refuse(model string) error {
	return oip.Errorf(oip.Forbidden, "model %q: the controller decides what this device serves; change its deployment with dunlin apply", model)
}

// event keeps an event for the controller.
func (a *agent) event(e *dunlinv1.Event) {
	if _, err := a.store.Append(context.Background(), e); err != nil {
		a.cfg.Log.Error("event lost", "kind", e.Kind, "model", e.Model, "version", e.Version, "error", err)
		return
	}
	signal(a.outbox)
}
