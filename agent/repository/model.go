package repository

import (
	"context"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/proto/inference"
)

// The states of a version, as the protocol writes them.
const (
	stateReady       = "READY"
	stateUnavailable = "UNAVAILABLE"
	stateLoading     = "LOADING"
	stateUnloading   = "UNLOADING"
)

// unloaded is the reason of a version that was unloaded because somebody
// wanted that.
const unloaded = "unloaded"

// model is what there is to know about one model.
type model struct {
	name string
	turn chan struct{} // holds one while a load or unload works on the model

	// What follows is guarded by Repository.mu. Only who has the turn changes
	// versions, serves, reason, tried, loading and staged.
	versions map[int64]*version
	serves   int64  // the version that answers for the model; 0: none
	reason   string // why the last load failed; empty where it did not
	tried    string // key of the plan that was last loaded, or could not be
	loading  bool
	staged   []*staged // folders of versions
	wanted   bool      // the model should be served
	busy     bool      // what follows the folder works on the model, or waits to try again
	calls    int       // that use the model
	changes  int       // how often callers have asked for it to be loaded or unloaded
}

// version is one version of a model, loaded or not.
type version struct {
	state, reason string
	item          *item // what the engine holds; nil: nothing
	lost          *item // what it held, and should again
}

// item is what is loaded for a version.
type item struct {
	spec   engine.Spec
	id     engine.VersionID       // that the runtime has it by, once it is loaded
	stamp  string                 // of its files, when they were read
	files  func() (string, error) // gives their stamp now
	config *inference.ModelConfig // nil: there is none
	staged *staged                // where its files came from a caller
	took   time.Duration          // to load it
}

func (i *item) same(o *item) bool { return i.stamp == o.stamp && reflect.DeepEqual(i.spec, o.spec) }

// unchanged says whether its files are those that were loaded.
func (i *item) unchanged() bool {
	now, err := i.files()
	return err == nil && now == i.stamp
}

// take waits for the turn until one of the contexts is done.
func (m *model) take(ctx, wait context.Context) error {
	select {
	case m.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-wait.Done():
		return context.Cause(wait)
	}
}

func (m *model) yield() { <-m.turn }

// holds says whether the engine holds a version.
func (m *model) holds() bool {
	for _, v := range m.versions {
		if v.item != nil {
			return true
		}
	}
	return false
}

// highest gives the highest version that can run, 0 for none.
func (m *model) highest() int64 {
	var highest int64
	for n, v := range m.versions {
		if v.state == stateReady {
			highest = max(highest, n)
		}
	}
	return highest
}

// why says why the model does not serve.
func (m *model) why() string {
	switch {
	case m.reason != "":
		return m.reason
	case m.loading || m.busy:
		return "is being loaded"
	}
	for _, n := range slices.Sorted(maps.Keys(m.versions)) {
		if v := m.versions[n]; v.reason != "" {
			return "version " + strconv.FormatInt(n, 10) + ": " + v.reason
		}
	}
	return "is not loaded"
}

// publish tells the front what serves. The caller holds r.mu.
func (r *Repository) publish() {
	serving := make(map[string]int64, len(r.models))
	for name, m := range r.models {
		if m.serves != 0 {
			serving[name] = m.serves
		}
	}
	r.cfg.Front.SetServing(serving)
}

// Index lists the models of the folder and those that are loaded, with the
// versions that are loaded, were, or could not be. A model that nobody asked
// for has neither version nor state.
func (r *Repository) Index(context.Context) ([]*inference.RepositoryIndexResponse_ModelIndex, error) {
	names, _, err := r.folder.names()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, m := range r.models {
		if m.holds() || m.wanted || m.loading {
			names = append(names, name)
		}
	}
	var list []*inference.RepositoryIndexResponse_ModelIndex
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		m := r.models[name]
		switch {
		case m == nil:
			list = append(list, &inference.RepositoryIndexResponse_ModelIndex{Name: name})
			continue
		case len(m.versions) > 0:
		case m.reason != "":
			list = append(list, &inference.RepositoryIndexResponse_ModelIndex{Name: name, State: stateUnavailable, Reason: m.reason})
		case m.loading || m.busy:
			list = append(list, &inference.RepositoryIndexResponse_ModelIndex{Name: name, State: stateLoading})
		default:
			list = append(list, &inference.RepositoryIndexResponse_ModelIndex{Name: name})
		}
		for _, n := range slices.Sorted(maps.Keys(m.versions)) {
			v := m.versions[n]
			at := &inference.RepositoryIndexResponse_ModelIndex{Name: name, Version: strconv.FormatInt(n, 10), State: v.state, Reason: v.reason}
			if v.state == stateReady && m.reason != "" {
				at.Reason = "serves on; the last load failed: " + m.reason
			}
			list = append(list, at)
		}
	}
	return list, nil
}
