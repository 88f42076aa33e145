package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/estimate"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	profilesFolder = "profiles"
	// lookEvery is how often it is looked for versions without a profile.
	lookEvery = 2 * time.Second
	// measureAgain is the wait after measuring has failed for the first time; it
	// doubles each time, to measureSeldom at most.
	measureAgain  = time.Minute
	measureSeldom = 6 * time.Hour
	// maxSpecs bounds the versions whose files are remembered.
	maxSpecs = 1024
	// measureShare is the part of the available memory that measuring may take.
	measureShare = 0.5
	// othersShare is how much of the processors' time others may have while the
	// energy of runs is measured.
	othersShare = 0.05
)

// profiler measures the versions that are loaded, one at a time and when the
// device has nothing else to do, keeps what it finds, and has the engine use
// it.
type profiler struct {
	host     *host
	firmware profiles.Profile
	store    *profile.Store
	duty     float64
	log      *slog.Logger
	machine  machine
	// measured, where not nil, tells the controller of a version's profile;
	// errUnreported: not yet.
	measured func(engine.VersionID, *dunlinv1.ModelProfile) error
	// controller, where not nil, gives the incarnation of the store that is to
	// know of the profiles; "" for none yet.
	controller func() string
	// bench measures a version; nil is measure.
	bench func(context.Context, task) (*dunlinv1.ModelProfile, error)

	given map[engine.VersionID]*dunlinv1.ModelProfile // to the engine, by Info.ID
	wait  map[engine.VersionID]time.Time              // until when a version is left alone
	told  map[string]string                           // what the controller was told of each version
	tries map[engine.VersionID]int                    // that have failed in a row
	mute  time.Time                                   // until when the controller is told nothing
	work  *work                                       // nil: nothing is measured

	mu    sync.Mutex // guards what follows
	specs map[engine.VersionID]engine.Spec
}

// task is a version to be measured.
type task struct {
	status  engine.Status
	spec    engine.Spec
	runtime worker.Runtime
}

// work is a version that is being measured, and what comes out of it.
type work struct {
	task
	key  profile.Key
	stop context.CancelFunc
	left bool          // it has gone: what comes out is of no use
	done chan struct{} // closed when p and err are set
	p    *dunlinv1.ModelProfile
	err  error
}

// newProfiler gives nil where the settings want none.
func newProfiler(h *host, firmware profiles.Profile, data string) (*profiler, error) {
	if h.serving.Profile != "on" {
		return nil, nil
	}
	store, err := profile.OpenStore(filepath.Join(data, profilesFolder))
	if err != nil {
		return nil, err
	}
	f := &profiler{
		host: h, firmware: firmware, store: store, duty: float64(h.serving.ProfileDuty) / 100, log: h.serving.Log,
		machine: h.serving.machine, told: store.Told(),
		given: make(map[engine.VersionID]*dunlinv1.ModelProfile), wait: make(map[engine.VersionID]time.Time),
		tries: make(map[engine.VersionID]int),
		specs: make(map[engine.VersionID]engine.Spec),
	}
	f.bench = f.measure
	return f, nil
}

// noted remembers where the files of the versions are that are compiled.
func (f *profiler) noted(compile func(context.Context, worker.Runtime, engine.Spec) (worker.Image, error)) func(context.Context, worker.Runtime, engine.Spec) (worker.Image, error) {
	return func(ctx context.Context, r worker.Runtime, s engine.Spec) (worker.Image, error) {
		f.mu.Lock()
		for old := range f.specs {
			if len(f.specs) < maxSpecs {
				break
			}
			delete(f.specs, old) // any: it is noted again when it is loaded again
		}
		f.specs[s.ID] = s
		f.mu.Unlock()
		return compile(ctx, r, s)
	}
}

func (f *profiler) spec(id engine.VersionID) (engine.Spec, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.specs[id]
	return s, ok
}

// run looks after profiles until ctx is done. All but measuring goes on in it.
func (f *profiler) run(ctx context.Context) error {
	found, err := f.host.worker.Runtime(ctx)
	for err != nil {
		if !sleep(ctx, runtimeWait) {
			return nil
		}
		found, err = f.host.worker.Runtime(ctx)
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	defer func() {
		if f.work != nil {
			f.work.stop()
			<-f.work.done
		}
	}()
	for {
		f.look(ctx, found)
		var done chan struct{}
		if f.work != nil {
			done = f.work.done
		}
		select {
		case <-ctx.Done():
			return nil
		case <-done:
			f.finish(ctx)
		case <-tick.C:
		}
	}
}

// look gives the engine what is known of the versions that have been loaded,
// and begins to measure the one with the most requests of those of which
// nothing is, unless one is being measured. That one is left when it goes.
func (f *profiler) look(ctx context.Context, found worker.Runtime) {
	versions := f.host.engine.Versions()
	f.forget(versions)
	if f.work != nil && !slices.ContainsFunc(versions, func(v engine.Status) bool { return v.Info.ID == f.work.status.Info.ID && !v.Draining }) {
		f.work.left = true
		f.work.stop()
	}
	var next *task
	for _, v := range versions {
		id := v.Info.ID
		spec, ok := f.spec(id)
		if given := f.given[id]; given != nil && !profile.Due(given, time.Now()) || v.Draining || !ok || time.Now().Before(f.wait[id]) {
			continue
		}
		p, err := f.stored(spec, found)
		switch {
		case err == nil:
			f.give(ctx, v, p)
		case !errors.Is(err, fs.ErrNotExist):
			f.later(id, err)
		case next == nil || v.Figures.Success.Count > next.status.Figures.Success.Count:
			next = &task{v, spec, found}
		}
	}
	f.tell()
	if next != nil && f.work == nil {
		f.begin(ctx, *next)
	}
}

// forget drops what is remembered of versions that have gone.
func (f *profiler) forget(versions []engine.Status) {
	there := make(map[engine.VersionID]bool, len(versions))
	for _, v := range versions {
		there[v.Info.ID] = true
	}
	for id := range f.given {
		if !there[id] {
			delete(f.given, id)
		}
	}
	for id := range f.wait {
		if !there[id] {
			delete(f.wait, id)
			delete(f.tries, id)
		}
	}
}

// key gives what a version's profile depends on.
func (f *profiler) key(spec engine.Spec, found worker.Runtime) (profile.Key, error) {
	digest, err := f.host.cache.Digest(spec.Dir, spec.Entry)
	if err != nil {
		return profile.Key{}, err
	}
	cores, err := f.cores()
	if err != nil {
		return profile.Key{}, err
	}
	info := f.machine.Info() // the driver may have come after the agent
	return profile.Key{
		ModelDigest: "sha256:" + digest, RuntimeVersion: found.Version, DriverVersion: info.DriverVersion,
		FirmwareProfile: f.firmware.Name, CPUModel: info.CpuModel, Cores: uint32(cores),
	}, nil
}

// cores gives how many processors runs may have.
func (f *profiler) cores() (int, error) {
	cfg := f.host.serving.workerConfig(f.firmware.Threads)
	err := processors(&cfg, &f.firmware)
	return cmp.Or(cfg.Threads, runtime.NumCPU()), err
}

// provider gives what the host runs models on.
func provider(found worker.Runtime) string {
	if found.Pooling.Works {
		return cudaProvider
	}
	return profile.CPU
}

// stored gives a version's profile; fs.ErrNotExist: it is to be measured.
func (f *profiler) stored(spec engine.Spec, found worker.Runtime) (*dunlinv1.ModelProfile, error) {
	key, err := f.key(spec, found)
	if err != nil {
		return nil, err
	}
	p, err := f.store.Get(key, time.Now())
	if r := p.GetRecommended(); err == nil && r != nil && r.Provider != provider(found) {
		return nil, fmt.Errorf("model profile %s: measured on %s: %w", key.ModelDigest, r.Provider, fs.ErrNotExist)
	}
	return p, err
}

// give has the engine use a profile.
func (f *profiler) give(ctx context.Context, v engine.Status, p *dunlinv1.ModelProfile) {
	if now, ok := f.host.engine.Info(v.ID); !ok || now.ID != v.Info.ID {
		return // it has been replaced: the next look is for that one
	}
	if t, ok := tuning(p); ok {
		if err := f.host.engine.Tune(ctx, v.Info.ID, t); err != nil {
			if ctx.Err() == nil && !errors.Is(err, engine.ErrNotLoaded) && !errors.Is(err, engine.ErrDraining) {
				f.log.Warn("a model runs without what was measured of it", "model", v.ID.Model, "version", v.ID.Version, "error", err)
			}
		}
	}
	f.given[v.Info.ID] = p
	delete(f.tries, v.Info.ID)
}

// tuning gives what a profile recommends; false: nothing.
func tuning(p *dunlinv1.ModelProfile) (engine.Tuning, bool) {
	r := p.GetRecommended()
	if r == nil {
		return engine.Tuning{}, false
	}
	var points []estimate.Point
	for _, l := range p.Latency {
		points = append(points, estimate.Point{Rows: int(l.Rows), Seconds: l.Seconds})
	}
	return engine.Tuning{
		MaxBatchSize: int(r.Batch), Instances: int(r.Instances), Threads: int(r.Threads), Prepack: new(r.Prepacked),
		Latency: estimate.FitLatency(points),
	}, true
}

// begin begins to measure a version.
func (f *profiler) begin(ctx context.Context, t task) {
	key, err := f.key(t.spec, t.runtime)
	if err != nil {
		f.later(t.status.Info.ID, err)
		return
	}
	ctx, stop := context.WithCancel(ctx)
	w := &work{task: t, key: key, stop: stop, done: make(chan struct{})}
	f.work = w
	go func() { // finish and leave wait for it
		defer close(w.done)
		w.p, w.err = f.bench(ctx, t)
	}()
}

// later leaves a version alone that could not be measured, the longer the more
// often that happens.
func (f *profiler) later(id engine.VersionID, err error) {
	wait := min(measureAgain<<min(f.tries[id], 16), measureSeldom)
	f.tries[id]++
	f.wait[id] = time.Now().Add(wait)
	f.log.Warn("a model is not measured yet", "model", id.Model, "version", id.Version, "again_in", wait, "error", err)
}

// finish waits for what is being measured, and keeps and uses what comes out.
func (f *profiler) finish(ctx context.Context) {
	w := f.work
	<-w.done
	w.stop()
	f.work = nil
	if w.left {
		return
	}
	id, p := w.status.Info.ID, w.p
	if w.err != nil {
		if ctx.Err() == nil {
			f.later(id, w.err)
		}
		return
	}
	log := f.log.With("model", id.Model, "version", id.Version)
	w.key.Name(p)
	p.Model, p.Version = id.Model, id.Version
	if err := f.store.Put(p); err != nil {
		log.Warn("what was measured of a model is not kept: it is measured again after the next start", "error", err)
	}
	r := p.Recommended
	log.Info("model measured", "took", time.Duration(p.MeasuredSeconds*float64(time.Second)).Round(time.Millisecond), "points", len(p.Points), "provider", r.GetProvider(),
		"batch", r.GetBatch(), "instances", r.GetInstances(), "threads", r.GetThreads(), "prepacked", r.GetPrepacked(), "unmeasured", p.Unmeasured)
	f.give(ctx, w.status, p)
	f.tell()
}

// tell has the controller know of each profile that the engine was given: once
// for each of its stores, version and measurement.
func (f *profiler) tell() {
	if f.controller == nil || f.measured == nil {
		return
	}
	incarnation := f.controller()
	if incarnation == "" || time.Now().Before(f.mute) {
		return
	}
	changed, there := false, make(map[string]bool, len(f.given))
	for _, id := range slices.SortedFunc(maps.Keys(f.given), engine.VersionID.Compare) {
		p := f.given[id]
		id.Generation = 0
		there[id.String()] = true
		stamp := fmt.Sprintf("%s %s %d", incarnation, p.ModelDigest, p.MeasuredAt.AsTime().UnixNano())
		if f.told[id.String()] == stamp {
			continue
		}
		if err := f.measured(id, p); errors.Is(err, errUnreported) {
			continue
		} else if err != nil {
			f.mute = time.Now().Add(measureAgain)
			f.log.Warn("the controller is told later what was measured", "model", id.Model, "version", id.Version, "error", err)
			continue
		}
		f.told[id.String()], changed = stamp, true
	}
	if !changed {
		return
	}
	if err := f.store.SetTold(f.told, func(version string) bool { return there[version] }); err != nil {
		f.log.Warn("which profiles the controller knows is not kept: it is told again", "error", err)
	}
}

// quiet is the engine as measuring looks at it: not idle either while it is
// throttled, or a version is compiled or comes in.
type quiet struct{ *host }

func (q quiet) Idle() time.Duration {
	if q.compiling.Load() > 0 || q.engine.Throttled() != (engine.Throttle{}) ||
		slices.ContainsFunc(q.engine.Versions(), func(v engine.Status) bool { return v.Residency == "entering" }) {
		return 0
	}
	return q.engine.Idle()
}

func (q quiet) Busy() <-chan struct{} { return q.engine.Busy() }

// measure measures a version in a process of its own, in idle time.
func (f *profiler) measure(ctx context.Context, t task) (*dunlinv1.ModelProfile, error) {
	image, err := f.host.compile(ctx, t.runtime, t.spec)
	if err != nil && !errors.Is(err, ort.ErrNotCompilable) {
		return nil, err
	}
	if image.Release != nil {
		defer image.Release()
	}
	gate := profile.NewIdle(quiet{f.host}, f.duty)
	subject, err := f.subject(t, image)
	if err != nil {
		return nil, err
	}
	cfg := f.host.serving.workerConfig(1)
	cfg.CheckMemory, cfg.Eager = f.host.serving.compileMemory, f.host.serving.eager
	if onGPU(&f.firmware) {
		cfg.ProviderOptions = f.firmware.Providers[0].Options
	}
	if err := processors(&cfg, &f.firmware); err != nil {
		return nil, err
	}
	var p *dunlinv1.ModelProfile
	// The process begins when the device is idle, too.
	_, err = gate.Do(ctx, func(context.Context) error { return nil })
	if err == nil {
		err = worker.Measure(ctx, cfg, t.spec, image.File, func(ctx context.Context, m *worker.Measuring) (err error) {
			gate.Hold(m)
			p, err = profile.Run(ctx, m, gate, subject)
			return err
		})
	}
	if errors.Is(err, profile.ErrGivenUp) {
		return profile.Unmeasured(subject, err, time.Now()), nil
	}
	return p, err
}

// subject says what there is to choose from.
func (f *profiler) subject(t task, image worker.Image) (profile.Subject, error) {
	need := t.status.Need
	if image.File != "" {
		need = image.Info.Need
	}
	s := profile.Subject{Weights: need.Weights, Session: need.Session, Prepacked: need.Prepacked}
	cores, err := f.cores()
	if err != nil {
		return s, err
	}
	on := provider(t.runtime)
	s.Space = profile.Space{Providers: []string{on}, Cores: cores, Batch: 1, Prepack: need.Prepacked > 0}
	s.Compared = slices.DeleteFunc(slices.Clone(usable(f.firmware, t.runtime.Providers)), func(p string) bool { return p == on })
	if o := t.status.Info.Options; o.MaxBatchSize > 0 {
		s.Space.Batch = profile.MaxBatch
		if t.spec.Options != nil {
			s.Space.Batch = o.MaxBatchSize // somebody has said so
		}
	}
	room := f.measureRoom(f.host.engine.Memory())
	s.Space.Fits = func(set profile.Setting) bool {
		all := need.Weights + need.Session + need.Workspace*int64(set.Batch)*int64(set.Instances)
		if set.Prepacked {
			all += need.Prepacked
		}
		return room <= 0 || set.Batch == 1 && set.Instances == 1 || all <= room
	}
	if m, ok := f.machine.(metered); ok && readEnergy(m).ok {
		s.Meter = func() func(time.Duration) float64 {
			before := readEnergy(m)
			return func(cpu time.Duration) float64 { return joules(before, readEnergy(m), cpu) }
		}
	}
	return s, nil
}

// measureRoom is what measuring may take of the memory, so that nobody's
// weights have to leave for it; 0 sets no bound.
func (f *profiler) measureRoom(models engine.Memory) int64 {
	room := int64(0)
	if models.Budget > 0 {
		room = max(models.Budget-models.Used, 1)
	}
	if available, total, err := f.machine.Memory(); err == nil {
		slack := max(int64((float64(available)-spareFraction*float64(total))*measureShare), 1)
		if room == 0 || slack < room {
			room = slack
		}
	}
	return room
}

// metered is a machine that gives its energy now, as often as it is asked.
type metered interface {
	// Energy gives the joules that the device has taken since some moment, and
	// the ticks of all processors' time, of which busy were not idle.
	Energy() (joules float64, busy, total uint64, ok bool)
}

// tick is the unit of the processors' time in /proc/stat, USER_HZ.
const tick = 10 * time.Millisecond

// energy is what a metered gives.
type energy struct {
	joules      float64
	busy, total uint64
	ok          bool
}

func readEnergy(m metered) (e energy) {
	e.joules, e.busy, e.total, e.ok = m.Energy()
	return e
}

// joules gives the energy between two readings; 0 where the device cannot tell,
// or where others had more than a small part of the processors' time, and a
// tick, than who computed for cpu.
func joules(before, after energy, cpu time.Duration) float64 {
	if !before.ok || !after.ok || after.busy < before.busy || after.total <= before.total {
		return 0
	}
	others := float64(after.busy-before.busy) - cpu.Seconds()/tick.Seconds()
	if others > 1+othersShare*float64(after.total-before.total) {
		return 0
	}
	return max(after.joules-before.joules, 0)
}

// profileEvent tells the controller of a profile; of one that is too large for
// an event, without the last of its points.
func profileEvent(id engine.VersionID, digest string, p *dunlinv1.ModelProfile) *dunlinv1.Event {
	p = proto.CloneOf(p)
	p.Model, p.Version, p.Digest = id.Model, id.Version, digest
	r := p.Recommended
	e := &dunlinv1.Event{
		Kind: "profile.measured", Severity: dunlinv1.Severity_SEVERITY_INFO, Model: id.Model, Version: id.Version, Profile: p,
		Message: fmt.Sprintf("recommended: batch %d, %d instances, %d threads, %s", r.GetBatch(), r.GetInstances(), r.GetThreads(), r.GetProvider()),
	}
	if p.Unmeasured != "" && r == nil {
		e.Severity, e.Message = dunlinv1.Severity_SEVERITY_WARNING, "not measured: "+p.Unmeasured
	}
	// The outbox adds its number and the time.
	for proto.Size(e) > state.MaxEvent-64 && len(p.Points) > 0 {
		p.Points = p.Points[:len(p.Points)-1]
	}
	return e
}

// errUnreported is the error of telling of a version that the controller has
// not been told of itself.
var errUnreported = errors.New("the version is not reported yet")

// profiled tells the controller of a version's profile.
func (a *agent) profiled(id engine.VersionID, p *dunlinv1.ModelProfile) error {
	digest := ""
	for _, v := range a.follow.Reconcile.Report().GetVersions() {
		if v.Model == id.Model && v.Version == id.Version && v.State == dunlinv1.VersionState_VERSION_STATE_RESIDENT {
			digest = v.Digest
		}
	}
	if digest == "" {
		return errUnreported
	}
	return a.follow.Append(profileEvent(id, digest, p))
}

// checkProfiles says how many models have been measured.
func checkProfiles(data string) Finding {
	n, err := profile.Count(filepath.Join(data, profilesFolder))
	switch {
	case err != nil:
		return Finding{"profiles", Warn, err.Error(), "run the doctor as the user that the agent runs as"}
	case n == 1:
		return Finding{Check: "profiles", Verdict: Pass, Detail: "1 model has been measured on this device"}
	}
	return Finding{Check: "profiles", Verdict: Pass, Detail: fmt.Sprintf("%d models have been measured on this device", n)}
}
