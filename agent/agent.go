// Package agent wires the parts of a device's agent and runs them.
package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/follow"
	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/program"
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
	cfg     Config
	profile profiles.Profile
	follow  *follow.Follower
	imports *imports
	giver   *giver // nil: it gives others of its site nothing
	watch   *watch
	update  updater
	before  []string // models that were served before the last change of programs
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
	files := watchedFiles(cfg.file, cfg.RuntimeLib)
	a, err := newAgent(ctx, cfg, profile, info, store, l.url())
	if err != nil {
		return err
	}
	if l.had {
		a.hold = a.awaitServed
	}
	return a.run(ctx, l, a.metrics(l), part{"alarms", a.watch.run}, part{"imports", a.followImports}, part{"site", a.giver.run}, part{"reconcile", a.follow.Reconcile.Run}, part{"controller", a.follow.Run}, part{"update", a.runUpdates},
		part{"drift", func(ctx context.Context) error { return a.watchDrift(ctx, files) }})
}

// newAgent puts the parts together; info describes the device, and url is where
// it answers.
func newAgent(ctx context.Context, cfg Config, profile profiles.Profile, info *dunlinv1.DeviceInfo, store *state.Store, url string) (_ *agent, err error) {
	a := &agent{cfg: cfg, profile: profile}
	travels, err := cfg.linkOf(profile.Link)
	if err != nil {
		return nil, err
	}
	if a.giver, err = a.newGiver(info); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			a.giver.close()
		}
	}()
	info.AgentVersion, info.ServingUrl = program.Version(), url
	w := cfg.Serving.workerConfig(profile.Threads)
	w.OnDeath, w.OnLost = a.died, a.lost
	w.Folders = []string{filepath.Join(cfg.Data, bundlesFolder)}
	if a.host, err = newHost(cfg.Serving, profile, cfg.Data, w); err != nil {
		return nil, err
	}
	info.Limits = a.limits(worker.Runtime{})
	a.source, a.opened = following{a}, a.describe
	a.watch = a.newWatch(cfg.machine, profile, a.event)
	if f := a.host.profiler; f != nil {
		f.measured, f.controller = a.profiled, func() string { return a.follow.Reconcile.Generation().GetIncarnation() }
	}
	a.imports = &imports{dir: filepath.Join(cfg.Data, importsFolder)}
	if a.update, err = a.newUpdater(); err != nil {
		return nil, err
	}
	a.follow, err = follow.New(ctx, follow.Config{
		Delivery: inband.Mode(cfg.Delivery), Local: a.imports.source,
		Store: store, Identity: cfg.identity(store), Info: info, Ready: a.tried, Labels: cfg.Labels,
		Program: a.update, Sample: a.watch.telemetry, Versions: a.engine.Versions, IdleWatts: profile.Power.IdleWatts, MaxBackoff: cfg.maxBackoff, Log: cfg.Log,
		Reconcile: reconcile.Config{
			Dir: filepath.Join(cfg.Data, bundlesFolder), Reserve: uint64(profile.Storage.ReserveBytes),
			Link: func() reconcile.Link { return travels }, Shelf: a.giver.of(),
			Engine: a.engine, Check: a.check, Passing: passing, Front: a.front, Standby: a.front.SetStandby, Log: cfg.Log,
		},
	})
	if err == nil {
		a.retired = a.follow.Retired
	}
	return a, err
}

// event keeps an event for the controller.
func (a *agent) event(e *dunlinv1.Event) { a.follow.Event(e) }

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
	a.follow.Reconcile.Lost(id, reason)
}

// passing says whether an error of loading is not the version's own.
func passing(err error) bool {
	return errors.Is(err, engine.ErrUnavailable) || errors.Is(err, engine.ErrOutOfMemory)
}

// describe adds the runtime to what the device says of itself.
func (a *agent) describe(found worker.Runtime) {
	a.follow.Describe(func(info *dunlinv1.DeviceInfo) {
		info.RuntimeVersion, info.Providers = found.Version, usable(a.profile, found.Providers)
		info.WeightPools, info.Limits = a.weightPools(found), a.limits(found)
	})
}

// following is the source of the models of a device that follows a controller.
type following struct{ agent *agent }

// Ready says what of that which the controller wants is not served.
func (d following) Ready() error {
	report := d.agent.follow.Reconcile.Report()
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
	for _, v := range d.agent.follow.Reconcile.Report().GetVersions() {
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
