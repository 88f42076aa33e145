// Package reconcile drives a device to its desired state: it fetches and
// verifies the bundles of the wanted versions, checks and loads them, and
// switches the models over to them. Whatever fails, the version that served
// before goes on serving; wherever it is killed, the next start continues.
//
// Signatures are verified before anything but the manifest is fetched: see
// package signing. A version that fails verification, its check or its load is in quarantine
// until another digest is wanted of its model, or the agent starts again: it
// then gets one more try, behind the good version. One that the device went back
// from gets none: see Probation. Everything else that fails is tried again, with
// growing waits.
package reconcile

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Engine loads versions and unloads them after their last request.
type Engine interface {
	Load(ctx context.Context, s engine.Spec) (engine.Info, error)
	Unload(ctx context.Context, id engine.VersionID) error
}

// Store keeps what a device should run, and runs; see state.Store.
type Store interface {
	Desired(context.Context) (state.Desired, error)
	SetDesired(context.Context, state.Desired) error
	Versions(context.Context) ([]state.Version, error)
	PutVersion(context.Context, state.Version) error
	DeleteVersion(ctx context.Context, model string, version int64) error
	Traffic
}

// Front answers requests. Both calls take effect at once for the requests
// that come after them.
type Front interface {
	SetServing(versions map[string]int64) // by model
	// Labels are those of the device that rules look at.
	SetRoutes(generation string, routes []*dunlinv1.DesiredRoute, labels map[string]string)
}

// Config configures a Reconciler.
type Config struct {
	Dir      string          // holds the bundles
	Disk     *Disk           // holds them for a simulated device; nil: Dir does
	Registry func() Registry // asked at the begin of each download
	// Origin gives what is asked in place of the registry, which it is given;
	// nil: the registry.
	Origin  func(registry Source, at Registry) Source
	Reserve uint64        // bytes of the disk that downloads leave free
	Stall   time.Duration // how long a transfer may go without a byte; 30 s where 0
	// Link gives what bounds the bytes that travel; nil: nothing does.
	Link func() Link
	// Near asks who of the device's site has a bundle; nil: nobody is asked.
	Near func(ctx context.Context, model string, bundle digest.Digest) []Source
	// Shelf is what the device gives others of its site; nil: nothing.
	Shelf *Shelf
	State Store
	// Trust gives the trust document by which signatures of bundles count. No
	// bundle is taken while it gives nil.
	Trust func() *signing.Trust
	// Now is the time at which signatures are to count; time.Now where nil.
	Now    func() time.Time
	Engine Engine
	// Check tries to load a version that never served here, in a place where
	// that can do no harm.
	Check func(ctx context.Context, s engine.Spec) (engine.Info, error)
	// Passing says whether an error of Check or of Engine.Load is none of the
	// version's fault: it is tried again, and not put into quarantine.
	Passing func(error) bool
	Front   Front
	// Standby, where not nil, is told which loaded versions stand by for those
	// that serve, by model, and of which models nothing serves for the moment
	// that one version takes the place of another. It takes effect as Front's
	// calls do.
	Standby func(fallback map[string]int64, changing map[string]bool)
	// Counts, where not nil, gives those of a loaded version; without, only time
	// tells whether a version has proven itself.
	Counts    func(engine.VersionID) (Counts, bool)
	Probation Probation     // DefaultProbation where it is zero
	Inspect   time.Duration // how often installed bundles are looked at; 30 s where 0
	// Agent is told which release of the agent is wanted, nil for none, at the
	// start and with each document; it must not wait. nil: nobody is.
	Agent func(*dunlinv1.DesiredAgent)
	// Event keeps an event for the controller; it must not wait for it.
	Event func(*dunlinv1.Event)
	Log   *slog.Logger
}

// Reconciler is the one owner of what a device runs. Run runs it; the other
// methods may be called concurrently with it and never wait for it.
type Reconciler struct {
	cfg       Config
	folder    *bundles // Config.Dir; nil where the disk is simulated
	bundles   storage  // folder, or Config.Disk
	desires   chan *dunlinv1.Desired
	retries   chan struct{}
	trusted   chan struct{}
	lost      chan lost
	changed   chan struct{}
	found     chan finding // by inspect
	outsides  chan []*dunlinv1.Drift
	installed atomic.Pointer[[]digest.Digest] // for inspect
	report    atomic.Pointer[dunlinv1.Reported]
	have      atomic.Pointer[dunlinv1.Generation]

	// What follows is Run's.
	core      *core
	remote    *remote
	downloads map[key]*download
	gates     *gates
	cancels   map[key]context.CancelFunc
	ended     chan ending
	running   sync.WaitGroup
	refused   [sha256.Size]byte // the last document that was refused
	refusal   *dunlinv1.DesiredRefusal
	saved     map[key]state.Version
	unsaved   bool              // the state file could not be written
	outside   []*dunlinv1.Drift // what others have found
	fallback  map[string]int64
	changing  map[string]bool
}

// ending is how an op of a version ended.
type ending struct {
	key      key
	op       op
	err      error
	progress bool
}

// progressEvery is how often a report says how far downloads are.
const progressEvery = time.Second

// The wait before another try: a random part, at least half, of a bound that
// doubles with each failure in a row.
const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// New opens the folder of bundles. Run does the rest.
func New(cfg Config) (*Reconciler, error) {
	var folder *bundles
	var held storage = cfg.Disk
	if cfg.Disk == nil {
		var err error
		if folder, err = openBundles(cfg.Dir); err != nil {
			return nil, fmt.Errorf("open bundles: %w", err)
		}
		held = folder
	}
	if cfg.Stall == 0 {
		cfg.Stall = defaultStall
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	core := newCore()
	if cfg.Probation != (Probation{}) {
		core.probation = cfg.Probation
	}
	g := &gates{link: cfg.Link, meter: &meter{kept: cfg.State, log: cfg.Log, pending: map[string]int64{}}, now: func() time.Time { return cfg.Now().Local() }}
	if cfg.Shelf != nil {
		cfg.Shelf.gates = g
	}
	return &Reconciler{
		cfg: cfg, folder: folder, bundles: held, gates: g, core: core,
		found: make(chan finding), outsides: make(chan []*dunlinv1.Drift, 1),
		desires: make(chan *dunlinv1.Desired, 1), retries: make(chan struct{}, 1), trusted: make(chan struct{}, 1), changed: make(chan struct{}, 1), lost: make(chan lost, maxLost),
		downloads: map[key]*download{}, cancels: map[key]context.CancelFunc{}, ended: make(chan ending),
		saved: map[key]state.Version{},
	}, nil
}

// Desire hands over a desired document, whole. Of those that wait only the
// newest is kept.
func (r *Reconciler) Desire(d *dunlinv1.Desired) {
	for {
		select {
		case r.desires <- d:
			return
		default:
		}
		select {
		case <-r.desires:
		default:
		}
	}
}

// Retry makes what waits after a failure due at once: the network is back.
func (r *Reconciler) Retry() { signal(r.retries) }

// TrustChanged has what was refused for its signatures looked at again.
func (r *Reconciler) TrustChanged() { signal(r.trusted) }

// maxLost bounds the lost versions that wait to be looked at; the caller of
// Lost waits when there are more.
const maxLost = 1024

// Lost says that a loaded version cannot run any more, and why. It is unloaded,
// and checked before it is loaded again; after engine.ErrQuarantined it is not.
func (r *Reconciler) Lost(id engine.VersionID, reason error) { r.lost <- lost{id, reason} }

type lost struct {
	id     engine.VersionID
	reason error
}

// Changed receives when Report has changed.
func (r *Reconciler) Changed() <-chan struct{} { return r.changed }

// Report gives what the device runs, without session and sequence; nil until
// Run has read what is on disk. The caller must not change it.
func (r *Reconciler) Report() *dunlinv1.Reported { return r.report.Load() }

// Generation gives the newest generation that is stored; nil for none.
func (r *Reconciler) Generation() *dunlinv1.Generation { return r.have.Load() }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run works until ctx is done, and returns when all it started has ended.
func (r *Reconciler) Run(ctx context.Context) error {
	if err := r.restore(ctx); err != nil {
		return fmt.Errorf("restore what the device ran: %w", err)
	}
	defer r.running.Wait()
	if r.folder != nil {
		r.running.Go(func() { r.inspect(ctx) })
	}
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		r.judge()
		r.act(ctx)
		r.publish()
		wake.Reset(r.pause())
		select {
		case d := <-r.desires:
			r.accept(ctx, d)
		case e := <-r.ended:
			r.finish(ctx, e)
		case l := <-r.lost:
			r.condemn(l)
		case f := <-r.found:
			r.discover(f)
		case all := <-r.outsides:
			r.outsideChanged(all)
		case <-r.retries:
			r.core.retry()
		case <-r.trusted:
			r.core.reconsider()
			r.core.retry()
		case <-wake.C:
		case <-ctx.Done():
			go func() {
				r.running.Wait()
				close(r.ended)
			}()
			for range r.ended { // what was begun ends with ctx; the next start finds out how far it came
			}
			r.core.stopped()
			r.save(context.WithoutCancel(ctx))
			return nil
		}
	}
}

// pause gives how long Run may wait for something to happen.
func (r *Reconciler) pause() time.Duration {
	now := time.Now()
	pause := time.Hour
	if at := r.core.wake(now); !at.IsZero() {
		pause = at.Sub(now)
	}
	for _, v := range r.core.versions {
		if v.busy == fetching {
			pause = min(pause, progressEvery)
		}
	}
	if r.unsaved {
		pause = min(pause, firstRetry)
	}
	if r.cfg.Counts != nil && len(r.core.onProbation()) > 0 {
		pause = min(pause, judgeEvery)
	}
	return pause
}

// restore takes over what is stored and on disk, without asking anybody.
func (r *Reconciler) restore(ctx context.Context) error {
	now := time.Now()
	d, err := r.cfg.State.Desired(ctx)
	if err == nil {
		doc := new(dunlinv1.DesiredDocument)
		if err := proto.Unmarshal(d.Document, doc); err != nil {
			return fmt.Errorf("stored desired document: %w", err)
		}
		r.core.setDesired(doc, now)
		r.wantAgent(doc)
		r.have.Store(&dunlinv1.Generation{Incarnation: d.Incarnation, Number: d.Number})
	} else if !errors.Is(err, state.ErrNone) {
		return err
	}
	rows, err := r.cfg.State.Versions(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		k := key{engine.VersionID{Model: row.Model, Version: row.Version}, digest.Digest(row.Digest)}
		if k.digest.Validate() != nil {
			continue
		}
		v := r.core.add(k, row.Since)
		v.good, v.since, v.admitted, v.trials = row.LastGood, row.Since, row.Admitted, row.Trials
		v.resumes = row.Resumes && row.Admitted
		if r.core.desired[row.Model] != v { // else the document says them
			for _, text := range row.Signatures {
				v.signatures = append(v.signatures, digest.Digest(text))
			}
		}
		if row.Reverted {
			v.quarantine, v.reverted = row.Reason, true
		}
		r.saved[k] = row
	}
	known := map[digest.Digest]bool{}
	for _, v := range r.core.versions {
		known[v.digest] = true
		b, err := r.bundles.open(v.digest)
		switch {
		case err == nil:
			v.size = uint64(b.manifest.Size)
			if v.admitted { // else it may be here under another name only
				v.stage = stored
			} else {
				v.gone()
			}
		case errors.Is(err, fs.ErrNotExist):
			v.gone()
			if row, ok := r.saved[v.key]; ok && v.admitted && row.State != dunlinv1.VersionState_VERSION_STATE_ABSENT {
				r.tellGone(v, err)
			}
		default:
			return err
		}
	}
	whole, part, err := r.bundles.list()
	if err != nil {
		return err
	}
	for _, d := range append(whole, part...) {
		if !known[d] {
			if err := r.bundles.remove(d); err != nil {
				return err
			}
		}
	}
	for _, v := range r.core.interrupted(now) {
		r.tellReverted(v)
	}
	return nil
}

// tellGone says that a bundle that was on the disk is not there at the start.
func (r *Reconciler) tellGone(v *version, err error) {
	have := "missing"
	if errors.Is(err, errDamaged) {
		have = "damaged"
	}
	r.cfg.Log.Error("a bundle is not on the disk any more", "model", v.id.Model, "version", v.id.Version, "digest", v.digest, "last_good", v.good, "error", err)
	r.event("drift.found", dunlinv1.Severity_SEVERITY_WARNING, v.key, fmt.Sprintf("bundle: want %s, have %s", v.digest, have))
}

// judge looks at the versions on probation.
func (r *Reconciler) judge() {
	counts := r.cfg.Counts
	if counts == nil {
		counts = func(engine.VersionID) (Counts, bool) { return Counts{}, false }
	}
	reverted, proven := r.core.judge(counts, time.Now())
	for _, v := range reverted {
		r.tellReverted(v)
	}
	for _, v := range proven {
		r.cfg.Log.Info("version has proven itself", "model", v.id.Model, "version", v.id.Version)
	}
}

// tellReverted says that the device goes back from a version.
func (r *Reconciler) tellReverted(v *version) {
	back := "none"
	if to := r.core.fallback(v); to != nil {
		back = to.id.String()
	}
	r.cfg.Log.Error("the device goes back from a version, which is put into quarantine",
		"model", v.id.Model, "version", v.id.Version, "digest", v.digest, "back_to", back, "reason", v.quarantine)
	r.event("version.reverted", dunlinv1.Severity_SEVERITY_ERROR, v.key, fmt.Sprintf("back to %s: %s", back, v.quarantine))
}

// standby tells who answers requests what stands by.
func (r *Reconciler) standby() {
	if r.cfg.Standby == nil {
		return
	}
	fallback := map[string]int64{}
	for _, v := range r.core.onProbation() {
		if back := r.core.fallback(v); back != nil && back.ready() && back.id != v.id {
			fallback[v.id.Model] = back.id.Version
		}
	}
	if !maps.Equal(fallback, r.fallback) || !maps.Equal(r.core.changing, r.changing) {
		r.fallback, r.changing = fallback, maps.Clone(r.core.changing)
		r.cfg.Standby(fallback, r.changing)
	}
}

// floors refuses what stands by, or has been loaded otherwise, and is wanted
// below its model's floor: it would come to serve without another load.
func (r *Reconciler) floors() {
	trust := r.cfg.Trust()
	if trust == nil {
		return
	}
	for _, model := range sortedKeys(r.core.desired) {
		want, have := r.core.desired[model], r.core.serving[model]
		if have == nil || have == want || !want.ready() || want.quarantine != "" {
			continue
		}
		if err := trust.CheckFloor(want.id.Model, want.id.Version); err != nil {
			want.quarantine, want.refused, want.since = err.Error(), true, time.Now()
			r.tellQuarantined(want)
		}
	}
}

// tellQuarantined says that a version is in quarantine.
func (r *Reconciler) tellQuarantined(v *version) {
	r.cfg.Log.Error("version put into quarantine", "model", v.id.Model, "version", v.id.Version, "digest", v.digest, "reason", v.quarantine)
	kind := "version.quarantined"
	if v.refused {
		kind = "bundle.refused"
	}
	r.event(kind, dunlinv1.Severity_SEVERITY_ERROR, v.key, v.quarantine)
}

// act does what is to be done now, and begins what takes time.
func (r *Reconciler) act(ctx context.Context) {
	r.floors()
	for {
		acts := r.core.next(time.Now())
		for _, a := range acts {
			switch a.op {
			case serving, withdrawing:
				r.save(ctx) // that it is tried, before it is
				if a.op == withdrawing {
					r.standby()
				}
				r.cfg.Front.SetServing(r.serving())
				if a.op == serving {
					r.tellServing(a.key)
				}
			case routing:
				r.cfg.Front.SetRoutes(r.generation(), r.routes(), r.core.labels)
			case cancelling:
				r.cancels[a.key]()
			default:
				r.save(ctx) // before an old version leaves, the new one must be the stored one
				r.begin(ctx, a)
			}
		}
		r.save(ctx)
		r.standby()
		if len(acts) == 0 {
			return
		}
	}
}

// tellServing says that a version serves, and for which it stands in.
func (r *Reconciler) tellServing(k key) {
	log, message := r.cfg.Log.With("model", k.id.Model, "version", k.id.Version), ""
	if v := r.core.versions[k]; !v.good && r.core.desired[k.id.Model] != v {
		if good := r.core.proven(v); good != nil && (good.stage == absent || good.damage != nil) {
			log, message = log.With("stands_in_for", good.id.Version), fmt.Sprintf("stands in for %s, which is fetched again", good.id)
		}
	}
	log.Info("serving")
	r.event("version.serving", dunlinv1.Severity_SEVERITY_INFO, k, message)
}

func (r *Reconciler) wantAgent(doc *dunlinv1.DesiredDocument) {
	if r.cfg.Agent != nil {
		r.cfg.Agent(doc.Agent)
	}
}

func (r *Reconciler) serving() map[string]int64 {
	versions := map[string]int64{}
	for model, v := range r.core.serving {
		versions[model] = v.id.Version
	}
	return versions
}

func (r *Reconciler) routes() []*dunlinv1.DesiredRoute {
	routes := make([]*dunlinv1.DesiredRoute, 0, len(r.core.inForce))
	for _, name := range sortedKeys(r.core.inForce) {
		routes = append(routes, r.core.inForce[name])
	}
	return routes
}

func (r *Reconciler) generation() string {
	g := r.have.Load()
	return fmt.Sprintf("%s/%d", g.GetIncarnation(), g.GetNumber())
}

// begin starts an op that takes time.
func (r *Reconciler) begin(ctx context.Context, a action) {
	ctx, cancel := context.WithCancel(ctx)
	r.cancels[a.key] = cancel
	var work func() (bool, error)
	switch a.op {
	case fetching:
		d := r.download(a.key)
		work = func() (bool, error) {
			before := d.present.Load()
			err := r.fetch(ctx, d)
			return d.present.Load() > before, err
		}
	case repairing:
		delete(r.downloads, a.key) // what it knows of the files is not so any more
		d := r.download(a.key)
		work = func() (bool, error) {
			err := r.mend(ctx, d)
			return d.fetched.Load() > 0, err
		}
	case checking, loading:
		v := r.core.versions[a.key]
		good := v.good || v.resumes
		work = func() (bool, error) { return false, r.load(ctx, a, good) }
	case unloading:
		work = func() (bool, error) {
			err := r.cfg.Engine.Unload(ctx, a.key.id)
			if errors.Is(err, engine.ErrNotLoaded) {
				err = nil
			}
			return false, err
		}
	case removing:
		if r.unsaved {
			work = func() (bool, error) { return false, errors.New("the state file cannot be written") }
			break
		}
		delete(r.downloads, a.key)
		work = func() (bool, error) {
			if a.keepFiles {
				return false, nil
			}
			return false, r.bundles.remove(a.key.digest)
		}
	}
	r.running.Go(func() {
		progress, err := work()
		r.ended <- ending{key: a.key, op: a.op, err: err, progress: progress}
	})
}

// download gives the download of a version, which may have begun before.
func (r *Reconciler) download(k key) *download {
	origin := r.origin()
	d := r.downloads[k]
	if d == nil || d.opened && !d.begun() { // somebody has removed what had come
		d = &download{
			store: r.folder, id: k.id, digest: k.digest, trust: r.cfg.Trust, now: r.cfg.Now, reserve: r.cfg.Reserve, free: freeSpace, log: r.cfg.Log,
		}
		d.prepare()
		d.total.Store(int64(r.core.versions[k].size))
		r.downloads[k] = d
	}
	v := r.core.versions[k]
	d.remote, d.gate, d.signatures = origin, r.gates.of(v.delivery), v.signatures
	return d
}

// errNoSource is the error of a device that does not know yet where bundles
// come from.
var errNoSource = errors.New("no registry is known yet")

// origin gives where bundles come from in the end; nil while that is not known.
func (r *Reconciler) origin() Source {
	registry := r.cfg.Registry()
	if registry.URL == "" {
		return nil
	}
	if r.remote == nil || r.remote.Registry != registry {
		r.remote = newRemote(registry, r.cfg.Stall)
	}
	return r.over(r.remote, registry)
}

// over gives what is asked in place of a registry.
func (r *Reconciler) over(registry Source, at Registry) Source {
	if r.cfg.Origin != nil {
		return r.cfg.Origin(registry, at)
	}
	return registry
}

// fetch brings a bundle onto the disk, unless another version has it already.
func (r *Reconciler) fetch(ctx context.Context, d *download) error {
	b, err := r.bundles.open(d.digest)
	if err == nil {
		return d.admit(ctx, b.manifest) // it was taken as the other version
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if d.remote == nil && (r.cfg.Near == nil || r.cfg.Disk != nil) {
		return errNoSource
	}
	here, ended := r.cfg.Shelf.begin(d)
	d.near = nil
	if here != nil {
		d.near = []Source{here}
	} else if r.cfg.Near != nil {
		d.near = r.cfg.Near(ctx, d.id.Model, d.digest)
	}
	defer r.gates.meter.store(ctx)
	if r.cfg.Disk != nil {
		err = r.cfg.Disk.fetch(ctx, d)
	} else {
		err = d.run(ctx)
	}
	ended(err)
	return err
}

// errLost is the error of a bundle that is not on disk any more.
var errLost = errors.New("the bundle is lost and must be fetched again")

// load loads a stored version for good, or to check it. One below its model's
// floor is loaded only where it is good, the last that served.
func (r *Reconciler) load(ctx context.Context, a action, good bool) error {
	if trust := r.cfg.Trust(); trust != nil && !good {
		if err := trust.CheckFloor(a.key.id.Model, a.key.id.Version); err != nil {
			return err
		}
	}
	b, err := r.bundles.open(a.key.digest)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errLost, err)
	} else if err != nil {
		return err
	}
	if r.folder != nil {
		wrong, err := r.folder.verify(ctx, a.key.digest, b.manifest)
		if err != nil {
			return err
		}
		if wrong != nil {
			return &damagedError{*wrong}
		}
	}
	spec := engine.Spec{ID: a.key.id, Dir: b.dir, Entry: b.config.Entry, Options: b.config.Serving, Labels: b.config.LabelsByOutput()}
	if a.op == checking {
		_, err = r.cfg.Check(ctx, spec)
	} else {
		_, err = r.cfg.Engine.Load(ctx, spec)
	}
	if err != nil {
		err = &loadError{err: err, dir: b.dir}
	}
	return err
}

// loadError is an error of the runtime. It speaks of files as the bundle
// does: where they are on this device says nothing to its readers.
type loadError struct {
	err error
	dir string
}

func (e *loadError) Error() string {
	return strings.ReplaceAll(e.err.Error(), e.dir+string(filepath.Separator), "")
}

func (e *loadError) Unwrap() error { return e.err }

// finish takes in how an op ended.
func (r *Reconciler) finish(ctx context.Context, e ending) {
	r.cancels[e.key]()
	delete(r.cancels, e.key)
	v := r.core.versions[e.key]
	log := r.cfg.Log.With("model", e.key.id.Model, "version", e.key.id.Version)
	o := outcome{err: e.err, progress: e.progress, lost: errors.Is(e.err, errLost), noRoom: errors.Is(e.err, errNoRoom), noMemory: errors.Is(e.err, engine.ErrOutOfMemory)}
	wrong, damaged := errors.AsType[*damagedError](e.err)
	if e.err != nil {
		bound := min(firstRetry<<min(v.failures, 10), lastRetry)
		if e.progress {
			bound = firstRetry
		}
		o.wait = bound/2 + rand.N(bound/2)
		_, o.refused = errors.AsType[*signing.RefusedError](e.err)
		o.waits, _ = errors.AsType[*WaitError](e.err)
		if damaged {
			o.wait = 0 // for the repair
		}
		o.permanent = o.refused && !r.outdated(e) || r.permanent(e)
	}
	r.core.done(e.key, o, time.Now())
	if damaged {
		r.discover(wrong.finding)
	}
	switch {
	case e.err != nil && v.reverted:
		r.tellReverted(v)
	case e.err != nil && v.quarantine != "":
		r.tellQuarantined(v)
	case e.err != nil && v.waitsFor != "":
		log.Info("download waits", "for", v.waitsFor, "until", v.notBefore.Round(time.Second))
	case e.err != nil && v.failure != "":
		log.Warn("failed, trying again", "op", e.op, "error", e.err, "in", o.wait.Round(time.Millisecond))
	case e.err == nil && e.op == repairing:
		delete(r.downloads, e.key)
		log.Info("repaired")
		r.event("drift.repaired", dunlinv1.Severity_SEVERITY_INFO, e.key, "")
	case e.err == nil && e.op == fetching:
		v.size = cmp.Or(uint64(r.downloads[e.key].total.Load()), v.size)
		d := r.downloads[e.key]
		v.fetched = uint64(d.fetched.Load())
		delete(r.downloads, e.key)
		log.Info("stored", "bytes", v.size, "fetched", v.fetched, "from_site", d.fromSite.Load())
		r.event("version.stored", dunlinv1.Severity_SEVERITY_INFO, e.key, "")
	default:
		log.Debug("done", "op", e.op, "error", e.err)
	}
	if v.quarantine != "" {
		delete(r.downloads, e.key)
	}
	if e.op == removing && r.core.versions[e.key] == nil {
		r.forget(ctx, e.key)
	}
}

// condemn takes in a version that is lost.
func (r *Reconciler) condemn(l lost) {
	v := r.core.lost(l.id, l.reason.Error(), errors.Is(l.reason, engine.ErrQuarantined), time.Now())
	switch {
	case v == nil:
	case v.reverted:
		r.tellReverted(v)
	default:
		r.tellQuarantined(v)
	}
}

// outdated says whether a fetch was refused by a trust document, or for
// signatures, that have changed since it began.
func (r *Reconciler) outdated(e ending) bool {
	d := r.downloads[e.key]
	return (e.op == fetching || e.op == repairing) && (d.judged != r.cfg.Trust() || !slices.Equal(d.signatures, r.core.versions[e.key].signatures))
}

// permanent says whether an op that failed would fail again.
func (r *Reconciler) permanent(e ending) bool {
	switch e.op {
	case fetching:
		_, wrong := errors.AsType[*VerifyError](e.err)
		return wrong
	case checking, loading:
		_, tried := errors.AsType[*loadError](e.err)
		return tried && !errors.Is(e.err, context.Canceled) &&
			!errors.Is(e.err, engine.ErrDraining) && !errors.Is(e.err, engine.ErrStopped) && !r.cfg.Passing(e.err)
	}
	return false
}

func (r *Reconciler) event(kind string, severity dunlinv1.Severity, k key, message string) {
	r.cfg.Event(&dunlinv1.Event{Kind: kind, Severity: severity, Model: k.id.Model, Version: k.id.Version, Message: message})
}
