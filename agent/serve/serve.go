// Package serve answers a request by its route: a policy turns the name that
// it asks for into a version, and the engine runs that. It is the oip.Backend
// of an agent.
package serve

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models/triton"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The headers of an answer.
const (
	HeaderVersion    = "Dunlin-Model-Version"  // what answered: "digits:2"
	HeaderGeneration = "Dunlin-Generation"     // of the routes that it was found by
	HeaderRule       = "Dunlin-Route-Rule"     // of a route, the rule that matched
	HeaderFallback   = "Dunlin-Route-Fallback" // where a fallback has answered, why the target did not
	HeaderCascade    = "Dunlin-Route-Cascade"  // where the route has a cascade, what came of it: "small", "large", "failed", "fault"
)

// maxResolves bounds how often a request is resolved again because the
// version it was sent to had just left.
const maxResolves = 4

// Requests for a model of which one version takes the place of another, and
// nothing serves meanwhile, wait: so many at a time, so long at most. Who is
// refused is told to come back after changeRetry.
const (
	maxWaiting  = 1024
	maxWait     = 30 * time.Second
	changeRetry = time.Second
)

// Engine runs versions.
type Engine interface {
	Infer(ctx context.Context, id engine.VersionID, q engine.Request) (engine.Result, error)
	// Info describes a loaded version.
	Info(id engine.VersionID) (engine.Info, bool)
	// Versions lists the loaded versions by name and number.
	Versions() []engine.Status
	// Admits says why no request is taken in; nil: they are.
	Admits() error
	// Backlog says how much there is to do.
	Backlog() engine.Backlog
}

// Server is an oip.Backend. It may be used concurrently: a request takes the
// table of routes as it is, without a lock.
type Server struct {
	engine Engine
	heat   func() (celsius float64, known bool) // nil: nobody knows
	change sync.Mutex                           // held to replace the table
	table  atomic.Pointer[table]
	places chan struct{} // holds one for each request that waits for a version
	mirror mirror
}

// table says where requests go. It never changes, but for what it remembers.
type table struct {
	generation string
	routes     map[string]*route
	labels     map[string]string // of the device
	live       func() policy.Figures
	targets    map[string]bool  // the models that routes ask for
	serving    map[string]int64 // version by model
	fallback   map[string]int64 // what stands by for it, by model
	changing   map[string]bool  // models that nothing serves just now
	changed    chan struct{}    // closed when another table takes its place
	headers    *sync.Map        // of answers, by answered; its values never change
}

// answered is what the headers of an answer depend on.
type answered struct {
	id   engine.VersionID
	rule string // "": it was not found by a route
	// fallback is why its target did not answer; "": it did.
	fallback string
	cascade  string // what came of the cascade; "": there was none
}

// header gives the headers of an answer.
func (t *table) header(a answered) map[string]string {
	if h, ok := t.headers.Load(a); ok {
		return h.(map[string]string)
	}
	h := map[string]string{HeaderVersion: a.id.String()}
	if t.generation != "" {
		h[HeaderGeneration] = t.generation
	}
	if a.rule != "" {
		h[HeaderRule] = a.rule
	}
	if a.fallback != "" {
		h[HeaderFallback] = a.fallback
	}
	if a.cascade != "" {
		h[HeaderCascade] = a.cascade
	}
	t.headers.Store(a, h)
	return h
}

// New gives a server that knows no names yet. Heat gives the temperature of
// the device in degrees Celsius, and must be quick; it may be nil.
func New(e Engine, heat func() (celsius float64, known bool)) *Server {
	s := &Server{engine: e, heat: heat, places: make(chan struct{}, maxWaiting), mirror: newMirror()}
	s.table.Store(&table{changed: make(chan struct{}), headers: new(sync.Map), live: s.figures})
	return s
}

// SetServing replaces the versions that answer for their models.
func (s *Server) SetServing(versions map[string]int64) {
	s.replace(func(t *table) { t.serving = maps.Clone(versions) })
}

// SetStandby says which loaded versions stand by for those that serve, by model:
// a request whose run fails is run once more, by what stands by. Of the models
// that are changing nothing serves for the moment; their requests wait.
func (s *Server) SetStandby(fallback map[string]int64, changing map[string]bool) {
	s.replace(func(t *table) { t.fallback, t.changing = maps.Clone(fallback), maps.Clone(changing) })
}

// SetRoutes replaces all routes, and the labels of the device that their rules
// look at. A route that is not valid is kept as a name whose requests are
// refused with the reason.
func (s *Server) SetRoutes(generation string, routes []*dunlinv1.DesiredRoute, labels map[string]string) {
	compiled := make(map[string]*route, len(routes))
	models := map[string]bool{}
	for _, r := range routes {
		c := newRoute(r)
		for _, t := range c.targets {
			models[t.Model] = true
		}
		for i := range c.counts {
			for _, f := range c.policy.Fallbacks(i - 1) {
				models[f.Model] = true
			}
			if shadow := c.policy.Shadow(i - 1); shadow != nil {
				models[shadow.Model] = true
			}
			if cascade := c.policy.Cascade(i - 1); cascade != nil {
				models[cascade.Model] = true
			}
		}
		compiled[r.GetName()] = c
	}
	labels = maps.Clone(labels)
	s.replace(func(t *table) {
		for name, r := range compiled {
			r.resume(t.routes[name])
		}
		t.generation, t.routes, t.targets, t.labels = generation, compiled, models, labels
	})
}

func (s *Server) replace(change func(*table)) {
	s.change.Lock()
	defer s.change.Unlock()
	last := s.table.Load()
	next := *last
	next.headers, next.changed = new(sync.Map), make(chan struct{})
	change(&next)
	s.table.Store(&next)
	close(last.changed)
}

// Ready says that the engine takes in no requests, or which route or serving
// model cannot be answered, and why.
func (s *Server) Ready(context.Context) error {
	if err := s.engine.Admits(); err != nil {
		return err
	}
	t := s.table.Load()
	for _, name := range slices.Sorted(maps.Keys(t.routes)) {
		if err := s.unready(t, name); err != nil {
			return fmt.Errorf("route %s: %w", name, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.serving)) {
		if _, err := s.loaded(t, policy.Target{Model: name}); err != nil {
			return err
		}
	}
	return nil
}

// unready says why a route cannot be answered.
func (s *Server) unready(t *table, name string) error {
	r := t.routes[name]
	if r.broken != nil {
		return r.broken
	}
	for _, target := range r.targets {
		if _, err := s.loaded(t, target); err != nil {
			return err
		}
	}
	return nil
}

// loaded gives the version that a target means now, which must be loaded.
func (s *Server) loaded(t *table, target policy.Target) (engine.VersionID, error) {
	id, err := t.version(target)
	if err != nil {
		return id, err
	}
	if _, ok := s.engine.Info(id); !ok {
		return id, fmt.Errorf("%s: %w", id, engine.ErrNotLoaded)
	}
	return id, nil
}

var errNoVersion = errors.New("no version serves")

// version gives the version that a target means.
func (t *table) version(target policy.Target) (engine.VersionID, error) {
	id := engine.VersionID{Model: target.Model, Version: target.Version}
	if id.Version == 0 {
		id.Version = t.serving[id.Model]
	}
	if id.Version == 0 {
		return id, fmt.Errorf("model %s: %w", id.Model, errNoVersion)
	}
	return id, nil
}

// unknown is the error of a name that is neither a route's nor a model's.
func unknown(name string) error {
	return oip.Errorf(oip.NotFound, "unknown model %q: no route and no model on this device has this name", name)
}

// knows says whether a model of this name serves, or did just now, or a route
// asks for it.
func (t *table) knows(model string) bool {
	return t.serving[model] != 0 || t.targets[model] || t.changing[model]
}

// Model describes what answers to a name: a route's model, or the model
// itself with all of its loaded versions. The inputs of a route are those of
// its first target.
func (s *Server) Model(_ context.Context, name string, version int64) (oip.Model, error) {
	t := s.table.Load()
	if version != 0 {
		id := engine.VersionID{Model: name, Version: version}
		info, ok := s.engine.Info(id)
		if !ok {
			return oip.Model{}, missing(t, id)
		}
		return describe(name, []int64{version}, info), nil
	}
	if r, ok := t.routes[name]; ok {
		if err := s.unready(t, name); err != nil {
			return oip.Model{Name: name, NotReady: err.Error()}, nil
		}
		var first engine.Info
		var versions []int64
		for i, target := range r.targets {
			id, err := t.version(target)
			if err != nil {
				return oip.Model{}, err
			}
			versions = append(versions, id.Version)
			if i == 0 {
				first, _ = s.engine.Info(id)
			}
		}
		slices.Sort(versions)
		return describe(name, slices.Compact(versions), first), nil
	}
	if !t.knows(name) {
		return oip.Model{}, unknown(name)
	}
	id, err := s.loaded(t, policy.Target{Model: name})
	if err != nil {
		return oip.Model{Name: name, NotReady: err.Error()}, nil
	}
	info, _ := s.engine.Info(id)
	var versions []int64
	for _, v := range s.engine.Versions() {
		if v.ID.Model == name {
			versions = append(versions, v.ID.Version)
		}
	}
	return describe(name, versions, info), nil
}

func describe(name string, versions []int64, info engine.Info) oip.Model {
	return oip.Model{
		Name: name, Versions: versions, Inputs: info.Inputs, Outputs: info.Outputs, Labels: info.Labels,
		Config: triton.Config(name, info.Inputs, info.Outputs, info.Options, info.Labels),
	}
}

// missing is the error of a version that was asked for by its number and is
// not loaded.
func missing(t *table, id engine.VersionID) error {
	switch {
	case !t.knows(id.Model):
		return unknown(id.Model)
	case t.serving[id.Model] == id.Version:
		return oip.Errorf(oip.Unavailable, "%s: %w", id, engine.ErrNotLoaded)
	default:
		return oip.Errorf(oip.NotFound, "model %s has no version %d on this device", id.Model, id.Version)
	}
}

// Infer runs a request on the version that its name resolves to. Where that
// version has just left, the request is resolved again, and where one is on its
// way, it waits for that: a switch to another version fails no request. Nor does
// a version that another one stands by for. What its target does not answer
// goes to the fallbacks of its route.
func (s *Server) Infer(ctx context.Context, c oip.Call) (oip.Answer, error) {
	s.mirror.enters()
	defer s.mirror.leaves()
	var by choice
	a, err := s.infer(ctx, c, &by)
	by.count()
	if m := by.mirrored; m != nil {
		<-m.copied
		id, _ := s.table.Load().version(m.target)
		if err == nil && id != (engine.VersionID{Model: a.Model, Version: a.Version}) {
			s.mirror.follows(m, &a)
		} else {
			s.mirror.drop(m)
		}
	}
	return a, err
}

// infer tells by which choice the request was answered, or refused at last.
func (s *Server) infer(ctx context.Context, c oip.Call, by *choice) (oip.Answer, error) {
	random := rand.Uint64()
	began := time.Now()
	for try := 1; ; try++ {
		t := s.table.Load()
		m := by.mirrored
		id, err := t.resolve(c, random, by)
		if by.mirrored = m; err == nil {
			if m == nil {
				by.mirrored = s.mirror.take(by, c, random)
			}
			var a oip.Answer
			if a, err = s.runTarget(ctx, t, c, id, began, by); err == nil {
				return a, nil
			}
			left := errors.Is(err, engine.ErrDraining) || errors.Is(err, engine.ErrNotLoaded)
			if left && try < maxResolves && s.table.Load() != t {
				continue
			}
		}
		changing := errors.Is(err, errNoVersion) && t.changing[id.Model]
		a, err := s.fallBack(ctx, t, c, began, by, id, err)
		if err == nil || !changing {
			return a, err
		}
		if err := s.wait(ctx, t, id.Model, began.Add(maxWait)); err != nil {
			return oip.Answer{}, err
		}
		try--
	}
}

// run runs a request on a version, and where the version is broken on the one
// that stands by for it.
func (s *Server) run(ctx context.Context, t *table, c oip.Call, id engine.VersionID, resident bool, by *choice) (oip.Answer, error) {
	q := engine.Request{Inputs: c.Inputs, Outputs: c.Outputs, Priority: c.Priority, Timeout: c.Timeout, Resident: resident}
	r, err := s.engine.Infer(ctx, id, q)
	if err == nil {
		return t.answer(id, r, by), nil
	}
	if back := t.standby(c, id); back != id && broken(err) && ctx.Err() == nil {
		q.Resident = false
		if r, err := s.engine.Infer(ctx, back, q); err == nil {
			return t.answer(back, r, by), nil
		}
	}
	return oip.Answer{}, err
}

func (t *table) answer(id engine.VersionID, r engine.Result, by *choice) oip.Answer {
	return oip.Answer{
		Model: id.Model, Version: id.Version, Outputs: r.Outputs, Labels: r.Labels,
		Header:  t.header(answered{id, by.rule(), by.fallback, by.cascade}),
		Times:   oip.Times{Queue: r.Queue, Input: r.Input, Infer: r.Infer, Output: r.Output},
		Release: r.Release,
	}
}

// standby gives the version that stands by for one; where none does, or the
// request has named the version, it gives id.
func (t *table) standby(c oip.Call, id engine.VersionID) engine.VersionID {
	if back := t.fallback[id.Model]; back != 0 && c.Version == 0 && id.Version == t.serving[id.Model] {
		id.Version = back
	}
	return id
}

// broken says whether an error is one of the version, and not of the request,
// or of how much there is to do.
func broken(err error) bool {
	if _, refused := errors.AsType[*engine.RefusedError](err); refused {
		return false
	}
	return !errors.Is(err, engine.ErrInvalidInput) && !errors.Is(err, engine.ErrNotResident) && !errors.Is(err, engine.ErrDraining) && !errors.Is(err, engine.ErrStopped) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}

// wait waits for another table, as nothing serves the model just now.
func (s *Server) wait(ctx context.Context, t *table, model string, until time.Time) error {
	refused := &oip.Error{Code: oip.Unavailable, Err: fmt.Errorf("model %s: one version takes the place of another", model), RetryAfter: changeRetry}
	select {
	case s.places <- struct{}{}:
	default:
		return refused
	}
	defer func() { <-s.places }()
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-t.changed:
		return nil
	case <-timer.C:
		return refused
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// resolve gives the version that answers a request, and by which choice.
func (t *table) resolve(r oip.Call, random uint64, by *choice) (engine.VersionID, error) {
	*by = choice{}
	if r.Version != 0 {
		return engine.VersionID{Model: r.Model, Version: r.Version}, nil
	}
	target := policy.Target{Model: r.Model}
	if route, ok := t.routes[r.Model]; ok {
		if route.broken != nil {
			return engine.VersionID{}, oip.Errorf(oip.Unavailable, "%w", route.broken)
		}
		*by = choice{route: route, decision: route.policy.Decide(&policy.Request{
			Parameters: r.Parameters, Headers: r.Headers, Inputs: r.Inputs, Labels: t.labels, Live: t.live,
		}, random)}
		target = by.decision.Target
	} else if !t.knows(r.Model) {
		return engine.VersionID{}, unknown(r.Model)
	}
	id, err := t.version(target)
	if err != nil {
		return id, oip.Errorf(oip.Unavailable, "%w", err)
	}
	return id, nil
}

// classify gives an engine's error the code that callers get.
func classify(t *table, r oip.Call, id engine.VersionID, err error) error {
	if refused, ok := errors.AsType[*engine.RefusedError](err); ok {
		code := oip.Unavailable
		if errors.Is(err, engine.ErrExpired) {
			code = oip.Expired
		}
		return &oip.Error{Code: code, Err: err, RetryAfter: refused.RetryAfter}
	}
	switch {
	case errors.Is(err, engine.ErrInvalidInput):
		return oip.Errorf(oip.InvalidArgument, "%w", err)
	case errors.Is(err, engine.ErrNotLoaded) && r.Version != 0:
		return missing(t, id)
	case errors.Is(err, engine.ErrNotLoaded), errors.Is(err, engine.ErrDraining), errors.Is(err, engine.ErrStopped), errors.Is(err, engine.ErrUnavailable),
		errors.Is(err, engine.ErrTooLarge), errors.Is(err, engine.ErrOutOfMemory), errors.Is(err, engine.ErrQuarantined), errors.Is(err, engine.ErrStalled):
		return oip.Errorf(oip.Unavailable, "%w", err)
	default:
		return err
	}
}
