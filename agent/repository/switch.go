package repository

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/models/triton"
)

// bring loads what is fresh beside what is there, and then puts what is newer
// in the place of what has its number. What it has done when something fails,
// it undoes.
func (r *Repository) bring(ctx context.Context, m *model, fresh, newer []*item) (err error) {
	for _, i := range fresh { // those that could not be unloaded before
		if v := m.versions[i.spec.ID.Version]; v != nil && v.item != nil {
			if err := r.unloadVersions(ctx, []*version{v}); err != nil {
				return err
			}
		}
	}
	r.mu.Lock()
	for _, i := range fresh {
		v := m.version(i.spec.ID.Version)
		v.state, v.reason = stateLoading, ""
	}
	r.mu.Unlock()
	var undo []func(context.Context)
	defer func() {
		if err == nil {
			return
		}
		r.mu.Lock()
		for _, i := range fresh {
			v := m.versions[i.spec.ID.Version]
			v.state, v.reason = stateUnavailable, err.Error()
		}
		r.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackLimit)
		defer cancel()
		for _, f := range slices.Backward(undo) {
			f(ctx)
		}
	}()
	for _, i := range slices.Concat(fresh, newer) {
		if err := r.examine(ctx, i); err != nil {
			return i.failed(err)
		}
	}
	for _, i := range fresh {
		if err := r.run(ctx, r.cfg.Engine.Load, i); err != nil {
			return i.failed(err)
		}
		undo = append(undo, func(ctx context.Context) { r.withdraw(ctx, m, i) })
	}
	for _, i := range newer {
		old := m.versions[i.spec.ID.Version].item
		if err := r.swap(ctx, m, i); err != nil {
			return i.failed(err)
		}
		undo = append(undo, func(ctx context.Context) { r.restore(ctx, m, old, i) })
	}
	return nil
}

// failed gives the error of an item. It speaks of files as the folder does.
func (i *item) failed(err error) error {
	return &itemError{fmt.Errorf("version %d: %w", i.spec.ID.Version, err), i.spec.Dir}
}

type itemError struct {
	err error
	dir string
}

func (e *itemError) Error() string {
	return strings.ReplaceAll(e.err.Error(), e.dir+string(filepath.Separator), "")
}

func (e *itemError) Unwrap() error { return e.err }

// examine looks at a version before it comes near the others.
func (r *Repository) examine(ctx context.Context, i *item) error {
	graph, err := models.Inspect(filepath.Join(i.spec.Dir, i.spec.Entry))
	if err != nil {
		return fmt.Errorf("%s: %w", i.spec.Entry, err)
	}
	if err := triton.CheckModel(i.config, graph.Inputs, graph.Outputs); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	for output := range i.spec.Labels {
		if !slices.ContainsFunc(graph.Outputs, func(o tensor.Info) bool { return o.Name == output }) {
			return fmt.Errorf("configuration: output %q, which has labels, is not one of the model", output)
		}
	}
	if r.cfg.Check == nil {
		return nil
	}
	_, err = r.cfg.Check(ctx, i.spec)
	return err
}

// withdraw unloads what a failed load has loaded, and nobody has seen.
func (r *Repository) withdraw(ctx context.Context, m *model, i *item) {
	err := r.cfg.Engine.Unload(ctx, i.spec.ID)
	if err == nil || errors.Is(err, engine.ErrNotLoaded) {
		return
	}
	r.cfg.Log.Error("a version cannot be unloaded", "model", m.name, "version", i.spec.ID.Version, "error", err)
	r.mu.Lock()
	defer r.mu.Unlock()
	m.versions[i.spec.ID.Version].item = i // a later load or unload tries again
}

// run has the engine load an item.
func (r *Repository) run(ctx context.Context, load func(context.Context, engine.Spec) (engine.Info, error), i *item) error {
	began := time.Now()
	info, err := load(ctx, i.spec)
	i.id, i.took = info.ID, time.Since(began)
	return err
}

// restore puts a version back, unless its files are not there any more: the
// new one, which could be loaded, stays then.
func (r *Repository) restore(ctx context.Context, m *model, old, i *item) {
	log := r.cfg.Log.With("model", m.name, "version", i.spec.ID.Version)
	if !old.unchanged() {
		log.Warn("the load failed, but this version stays at its new files: the old ones are gone")
		return
	}
	if err := r.swap(ctx, m, old); err != nil {
		log.Error("a version cannot be put back", "error", err)
	}
}

// swap puts a version in the place of the one of its number.
func (r *Repository) swap(ctx context.Context, m *model, i *item) error {
	if err := r.run(ctx, r.cfg.Engine.Replace, i); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	*m.version(i.spec.ID.Version) = version{state: stateReady, item: i}
	return nil
}
