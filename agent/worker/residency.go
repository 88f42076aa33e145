package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
)

// Image is a version as it was compiled for this device.
type Image struct {
	File    string // that ort.OpenCompiled opens; it stays until Release
	Info    engine.Info
	Release func() // nil where nobody waits for it
}

// version is one that is loaded: it can be opened in every child.
type version struct {
	spec  engine.Spec
	info  engine.Info
	image Image         // without a file where it could not be compiled
	files int64         // bytes on disk, where there may be pools
	lane  chan struct{} // holds one while what it has open in the child changes

	// Guarded by Worker.mu.
	enough  context.CancelFunc // ends the prepacking that goes on; nil for none
	active  bool               // every child is to have it open
	set     engine.Setting     // by which they are to
	session *session           // that it runs on, in the child that is ready; nil for none
	warm    *session           // that has stayed there while its weights are out of its pool
	out     uint64             // Worker.outs when they left
	failure error              // of an active one that the child could not open
	guilt   guilt

	unpooled atomic.Pointer[process] // the child that could not open it in a pool

	// What is known of its outputs: the bytes of the largest ones so far that
	// did not fit a packet, which the next ones may need too, and whether they
	// had other shapes than the model says.
	room       atomic.Uint64
	surprising atomic.Bool
}

// session is one that the child has open for a version.
type session struct {
	number uint64
	set    engine.Setting
	bound  bool // it is prepacked, or is not, whatever set says

	// Of one with its weights in a pool: that it is, what it takes there, and
	// its bytes on the host.
	pooled bool
	need   engine.Need
	host   int64

	// Guarded by Worker.mu.
	spent  bool          // a run found too little memory: it does not stay
	users  int           // runs that have it
	unused chan struct{} // closed when there are none any more; nil until somebody waits
}

// Load makes a version ready to be activated: it is compiled where it can be,
// and described, in a short-lived child of its own. Nothing of it is in the
// child that serves. A version in quarantine stays there until it is unloaded.
func (w *Worker) Load(ctx context.Context, s engine.Spec) (engine.Info, error) {
	p, err := w.acquire(ctx)
	if err != nil {
		return engine.Info{}, err
	}
	w.mu.Lock()
	v, quarantined := w.loaded[s.ID], w.quarantined[s.ID]
	w.mu.Unlock()
	if v != nil {
		return v.info, nil
	}
	if quarantined != nil {
		return engine.Info{}, quarantined
	}
	image, err := w.compile(ctx, p.runtime, s)
	if err != nil {
		return engine.Info{}, err
	}
	v = &version{spec: s, info: image.Info, image: image, lane: make(chan struct{}, 1)}
	if w.cfg.Pools != "" {
		files, err := estimate(s)
		if err != nil {
			v.release()
			return engine.Info{}, err
		}
		if v.files = files.Weights; p.runtime.Pooling.Works {
			v.info.Need = engine.Need{Weights: (v.files/granule + 1) * granule, Workspace: image.Info.Need.Workspace}
		}
	}
	w.mu.Lock()
	other := w.loaded[s.ID]
	if other == nil {
		w.loaded[s.ID] = v
	}
	w.mu.Unlock()
	if other != nil { // somebody was faster
		v.release()
		return other.info, nil
	}
	return v.info, nil
}

// release gives up the image of a version that is not loaded any more.
func (v *version) release() {
	if v.image.Release != nil {
		v.image.Release()
	}
}

// compile gives the image of a version, without a file where there is none.
func (w *Worker) compile(ctx context.Context, r Runtime, s engine.Spec) (Image, error) {
	if w.cfg.Compile != nil {
		image, err := w.cfg.Compile(ctx, r, s)
		if !errors.Is(err, ort.ErrNotCompilable) {
			return image, err
		}
		w.cfg.Log.Info("model is not compiled; it is opened as it is", "model", s.ID.Model, "version", s.ID.Version, "reason", err)
	}
	if err := take(ctx, w.checking); err != nil {
		return Image{}, err
	}
	defer func() { <-w.checking }()
	cfg := w.cfg
	cfg.Threads = 1 // others are being served
	info, err := Check(ctx, cfg, s)
	if err != nil {
		return Image{}, err
	}
	info.Need, err = estimate(s)
	return Image{Info: info}, err
}

// estimate takes what a version's files take on disk for what its weights
// take in memory.
func estimate(s engine.Spec) (n engine.Need, err error) {
	err = filepath.WalkDir(s.Dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			n.Weights += info.Size()
		}
		return err
	})
	if err != nil {
		return n, fmt.Errorf("size of %s: %w", s.ID, err)
	}
	return n, nil
}

// remove forgets a version, which is to be released then; it is called with mu
// held. What the child has open of it stays open.
func (w *Worker) remove(v *version) {
	delete(w.loaded, v.spec.ID)
	v.active, v.session, v.warm = false, nil, nil
}

// Activate has a version be open in this child and all that follow, with the
// threads of a setting, and gives what it takes there; one that is open already
// stays as it is. engine.ErrOutOfMemory says that there was no room. A death of
// the child meanwhile is like one of Run.
func (w *Worker) Activate(ctx context.Context, id engine.VersionID, set engine.Setting) (engine.Need, error) {
	var need engine.Need
	set.Prepack = false
	err := w.change(ctx, id, func(u use) error {
		v := u.version
		w.mu.Lock()
		active, failed, s := v.active, v.failure != nil, v.session
		w.mu.Unlock()
		if s != nil || active && !failed { // also where a Deactivate was given up
			if need = v.image.Info.Need; s != nil && s.pooled {
				need = s.need
			}
			return w.commit(u, func() { v.active = true })
		}
		s, taken, err := w.comeIn(ctx, u, set)
		if err != nil {
			return err
		}
		need = taken
		return w.commit(u, func() { v.active, v.set, v.session, v.warm, v.failure = true, set, s, nil, nil })
	})
	if err == nil {
		w.cool(ctx)
	}
	return need, err
}

// Set has a version run by a setting in this child and all that follow: with
// so many threads, with its weights laid out anew or as they are in the file.
// It goes on running meanwhile. The version must be active. One that was not
// compiled is prepacked in any case, and one in a pool runs as the device does.
func (w *Worker) Set(ctx context.Context, id engine.VersionID, set engine.Setting) error {
	return w.reset(ctx, id, func(*version) engine.Setting { return set })
}

// prepackAgain is Set for a version that is to be prepacked, and not so yet in
// this child. It leaves one alone that has left meanwhile, and come back.
func (w *Worker) prepackAgain(ctx context.Context, id engine.VersionID) error {
	return w.reset(ctx, id, func(v *version) engine.Setting { return v.set })
}

// reset is Set for what which gives, which is called with mu held.
func (w *Worker) reset(ctx context.Context, id engine.VersionID, which func(*version) engine.Setting) error {
	return w.change(ctx, id, func(u use) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		w.mu.Lock()
		set := which(u.version)
		u.version.enough = cancel
		w.mu.Unlock()
		defer func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			u.version.enough = nil
		}()
		return w.switchOver(ctx, u, set)
	})
}

// leave ends the Set of a version that is about to go out.
func (w *Worker) leave(id engine.VersionID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if v := w.loaded[id]; v != nil && v.enough != nil {
		v.enough()
	}
}

// switchOver opens a version by a setting beside the session that it has, and
// has runs go over to that one.
func (w *Worker) switchOver(ctx context.Context, u use, set engine.Setting) error {
	v := u.version
	w.mu.Lock()
	before := v.session
	w.mu.Unlock()
	if before == nil {
		return fmt.Errorf("%w: its weights are out", engine.ErrNotLoaded)
	}
	if before.is(set) {
		return w.commit(u, func() { v.set = set })
	}
	s, _, err := w.open(ctx, u, set)
	if err != nil {
		return err
	}
	if err := w.commit(u, func() { v.session, v.set = s, set }); err != nil {
		return err
	}
	return w.close(u.process, v, before)
}

// is says whether a session that is opened by a setting would be no other.
func (s *session) is(set engine.Setting) bool {
	return s.pooled || s.set.Threads == set.Threads && (s.bound || s.set.Prepack == set.Prepack)
}

// Deactivate closes a version in this child and all that follow, when the
// runs that go on are over, and gives its memory back to the system; one in a
// pool gives the device's back, and stays open. A Set that goes on ends
// with context.Canceled.
func (w *Worker) Deactivate(ctx context.Context, id engine.VersionID) error {
	w.leave(id)
	err := w.change(ctx, id, func(u use) error { return w.deactivate(u, true) })
	if err != nil && !errors.Is(err, engine.ErrNotLoaded) {
		w.mu.Lock()
		if v := w.loaded[id]; v != nil { // no child to come is to have it
			v.active, v.set = false, engine.Setting{}
		}
		w.mu.Unlock()
	}
	w.cool(ctx)
	return err
}

// deactivate keeps the session open, if stay, where it is in a pool and has
// not run out of memory: what it has worked in is then given back too.
func (w *Worker) deactivate(u use, stay bool) error {
	v := u.version
	var s *session
	err := w.commit(u, func() {
		s = v.session
		stay = stay && s != nil && s.pooled && !s.spent
		v.active, v.set, v.session, v.failure = false, engine.Setting{}, nil, nil
	})
	if err != nil || s == nil {
		return err
	}
	if stay {
		err = w.goOut(u, s)
	} else {
		err = w.close(u.process, v, s)
	}
	return errors.Join(err, u.process.region.trim())
}

// Unload forgets a version, and closes it where it is active. One that was in
// quarantine may be loaded again afterwards.
func (w *Worker) Unload(ctx context.Context, id engine.VersionID) error {
	_, err := w.acquire(ctx)
	if err != nil && !errors.Is(err, engine.ErrUnavailable) {
		return err
	}
	w.mu.Lock()
	quarantined, v := w.quarantined[id] != nil, w.loaded[id]
	delete(w.quarantined, id)
	if err != nil && v != nil { // no child has it, and none to come is to have it
		w.remove(v)
	}
	w.mu.Unlock()
	if err != nil && v != nil {
		v.release()
	}
	if quarantined || err != nil {
		return nil
	}
	w.leave(id)
	return w.change(ctx, id, func(u use) error {
		err := w.deactivate(u, false)
		if err == nil {
			err = w.drop(u)
		}
		if errors.Is(err, errSucceeded) {
			return err
		}
		w.mu.Lock()
		w.remove(u.version)
		w.mu.Unlock()
		u.version.release()
		return err
	})
}

// errSucceeded is the error of what was not committed because another child
// has succeeded the one that it was done in.
var errSucceeded = errors.New("another worker process has succeeded this one")

// commit makes a change to a version known, unless another child than u's is,
// or will be, the current one: that one has not heard of it.
func (w *Worker) commit(u use, change func()) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.current != u.process || w.loaded[u.version.spec.ID] != u.version {
		return errSucceeded
	}
	change()
	return nil
}

// change has f change what a version has open in the child, one change of it
// at a time, again where the child dies or has died.
func (w *Worker) change(ctx context.Context, id engine.VersionID, f func(use) error) error {
	w.mu.Lock()
	v := w.loaded[id]
	w.mu.Unlock()
	if v != nil {
		if err := take(ctx, v.lane); err != nil {
			return err
		}
		defer func() { <-v.lane }()
	}
	for g := (guilt{}); ; {
		u, err := w.begin(ctx, id, g, false)
		if err != nil {
			return err
		}
		if u.version != v { // it was loaded anew meanwhile
			w.end(u, false)
			return engine.ErrNotLoaded
		}
		err = f(u)
		w.end(u, false)
		if _, died := errors.AsType[*DeathError](err); died {
			if err = w.again(&g, id, u.process, err); err != nil {
				return err
			}
		} else if !errors.Is(err, errSucceeded) {
			return err
		}
	}
}

// open has the child open a version's model as a new session, and gives what
// it takes.
func (w *Worker) open(ctx context.Context, u use, set engine.Setting) (*session, engine.Need, error) {
	w.mu.Lock()
	w.sessions++
	s := &session{number: w.sessions, set: set}
	w.mu.Unlock()
	need, err := u.process.activate(ctx, u.version, s)
	return s, need, err
}

// activate has the child open a version's model as a session, and gives what
// it takes. A compiled file that the runtime refuses is not missed where the
// model itself is there, nor is a pool.
func (p *process) activate(ctx context.Context, v *version, s *session) (need engine.Need, err error) {
	for _, path := range v.paths(p.runtime.Pooling.Works) {
		if p.runtime.Sandbox.Landlock > 0 && !p.reads.hold(path) {
			// The next one has the version among those that it may read.
			p.stderr.log.Info("another worker process takes the place of this one, which may not read a model", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "path", path)
			p.kill(verdictReplaced)
			<-p.dead
			return need, p.death
		}
	}
	if p.runtime.Pooling.Works && !s.set.Prepack && v.unpooled.Load() != p {
		need, err := p.fill(ctx, v, s)
		_, died := errors.AsType[*DeathError](err)
		if err == nil || died || errors.Is(err, engine.ErrOutOfMemory) {
			return need, err
		}
		if ctx.Err() != nil {
			return need, context.Cause(ctx)
		}
		v.unpooled.Store(p)
		p.stderr.log.Warn("model cannot be opened in a pool; its weights stay on the host", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "error", err)
	}
	original := []string{v.spec.Dir, v.spec.Entry}
	m := &message{kind: kindActivate, session: s.number, threads: uint64(s.set.Threads), strings: original}
	if v.image.File != "" {
		m.strings = []string{v.image.File}
	}
	if s.set.Prepack {
		m.number = 1
	}
	quiet := p.quiet()
	_, grown, err := p.load(ctx, v.spec.ID, m)
	if _, died := errors.AsType[*DeathError](err); err != nil && !died && len(m.strings) == 1 &&
		ctx.Err() == nil && !errors.Is(err, engine.ErrOutOfMemory) {
		p.stderr.log.Warn("compiled model cannot be opened; the model itself is", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "error", err)
		m.strings = original
		_, grown, err = p.load(ctx, v.spec.ID, m)
	}
	if err != nil {
		return need, err
	}
	need = v.image.Info.Need
	compiled := len(m.strings) == 1
	s.bound = !compiled // the runtime prepacks by itself
	if !need.Measured && quiet && p.quiet() {
		need.Measured, need.Session = true, grown
		if !compiled { // its weights are the child's own
			need.Session = max(0, grown-need.Weights)
		}
	}
	return need, nil
}

// close closes a session that no run can begin with any more, when those that
// go on are over.
func (w *Worker) close(p *process, v *version, s *session) error {
	if !w.drain(p, s) {
		return nil
	}
	return p.closeSession(v, s)
}

// drain waits until the runs that go on with a session are over, and says
// whether its child still lives.
func (w *Worker) drain(p *process, s *session) bool {
	unused := make(chan struct{})
	w.mu.Lock()
	if s.unused = unused; s.users == 0 {
		close(unused)
	}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		s.unused = nil
		w.mu.Unlock()
	}()
	select {
	case <-unused:
		return true
	case <-p.dead:
		return false
	}
}

// reload brings back what was active and makes the child the current one.
func (w *Worker) reload(ctx context.Context, p *process) error {
	// Versions come in only while a child is current, so none does meanwhile.
	type opened struct {
		version *version
		session *session
		failure error
	}
	var all []opened
	w.mu.Lock()
	for _, v := range w.loaded {
		if v.active {
			w.sessions++
			all = append(all, opened{version: v, session: &session{number: w.sessions, set: engine.Setting{Threads: v.set.Threads}}})
		}
		v.session, v.warm = nil, nil
	}
	w.mu.Unlock()
	slices.SortFunc(all, func(a, b opened) int { return a.version.spec.ID.Compare(b.version.spec.ID) })
	for i := range all {
		o := &all[i]
		limited, cancel := context.WithTimeout(ctx, CheckLimit)
		_, err := p.activate(limited, o.version, o.session)
		cancel()
		if _, died := errors.AsType[*DeathError](err); died || ctx.Err() != nil {
			return err
		}
		if err == nil {
			continue
		}
		o.session, o.failure = nil, fmt.Errorf("activate %s again: %w", o.version.spec.ID, err)
		if !errors.Is(err, engine.ErrOutOfMemory) { // there may be memory later
			w.lose(o.version, o.failure)
		}
	}
	var left []opened // what went out while there was no child
	w.update(func() {
		w.current, w.failure = p, nil
		for _, o := range all {
			if w.loaded[o.version.spec.ID] == o.version && o.version.active {
				o.version.session, o.version.failure = o.session, o.failure
			} else if o.session != nil {
				left = append(left, o)
			}
		}
	})
	for _, o := range left {
		if err := w.close(p, o.version, o.session); err != nil {
			return err
		}
	}
	return nil
}

// rebuild prepacks again what was prepacked before the child was started, one
// version after the other, until the child is dead. What has waited for the
// child runs first: prepacking takes a core for as long as some runs do.
func (w *Worker) rebuild(ctx context.Context, p *process) {
	pause := time.NewTimer(w.cfg.rebuildAfter)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-p.dead:
		return
	case <-ctx.Done():
		return
	}
	var again []*version
	w.mu.Lock()
	for _, v := range w.loaded {
		if v.set.Prepack && v.session != nil {
			again = append(again, v)
		}
	}
	w.mu.Unlock()
	slices.SortFunc(again, func(a, b *version) int { return a.spec.ID.Compare(b.spec.ID) })
	for _, v := range again {
		began := time.Now()
		err := w.prepackAgain(ctx, v.spec.ID)
		if p.isDead() || ctx.Err() != nil {
			return
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, engine.ErrNotLoaded) {
			continue // it has left
		}
		if err != nil {
			w.cfg.Log.Warn("weights are not prepacked again; runs may be slower", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "error", err)
			continue
		}
		w.cfg.Log.Debug("weights prepacked again", "model", v.spec.ID.Model, "version", v.spec.ID.Version, "took", time.Since(began).Round(time.Millisecond))
	}
}

// whileAlive runs f while the child lives; the function that it gives ends f
// and waits for it.
func whileAlive(ctx context.Context, f func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { f(ctx) })
	return func() { cancel(); wg.Wait() }
}
