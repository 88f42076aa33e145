package repository

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
)

// unload unloads all versions of a model, for a caller who waits for its turn
// as long as wait lasts.
func (r *Repository) unload(ctx, wait context.Context, m *model) error {
	if err := m.take(ctx, wait); err != nil {
		return err
	}
	defer m.yield()
	r.mu.Lock()
	m.changes++
	m.wanted, m.serves, m.reason, m.tried = false, 0, "", ""
	var loaded []*version
	for n, v := range m.versions {
		v.lost = nil
		switch {
		case v.item != nil:
			loaded = append(loaded, v)
		case v.reason != unloaded:
			delete(m.versions, n)
		}
	}
	r.publish()
	r.mu.Unlock()
	err := r.unloadVersions(ctx, loaded)
	r.clean(m)
	if err == nil && loaded != nil {
		r.cfg.Log.Info("model unloaded", "model", m.name)
	}
	return err
}

// unloadVersions unloads loaded versions, all at the same time. The caller has
// their model's turn.
func (r *Repository) unloadVersions(ctx context.Context, versions []*version) error {
	r.mu.Lock()
	for _, v := range versions {
		v.state, v.reason = stateUnloading, ""
	}
	r.mu.Unlock()
	errs := make([]error, len(versions))
	var wg sync.WaitGroup
	for n, v := range versions {
		wg.Go(func() {
			err := r.cfg.Engine.Unload(ctx, v.item.spec.ID)
			if errors.Is(err, engine.ErrNotLoaded) {
				err = nil
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			v.state, v.reason = stateUnavailable, unloaded
			if errs[n] = err; err != nil {
				v.reason = err.Error()
			} else {
				v.item = nil
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// revive unloads a version that is lost and loads it again, unless the model
// is loaded or unloaded meanwhile.
func (r *Repository) revive(ctx context.Context, l lost) {
	r.mu.Lock()
	m := r.models[l.id.Model]
	if m == nil {
		r.mu.Unlock()
		return
	}
	m.calls++
	r.mu.Unlock()
	defer r.release(m)
	dropped := false
	r.retry(ctx, m, func() error {
		if err := m.take(ctx, ctx); err != nil {
			return err
		}
		defer m.yield()
		defer r.clean(m)
		if !dropped {
			if err := r.drop(ctx, m, l); err != nil {
				return err
			}
			dropped = true
		}
		v := m.versions[l.id.Version]
		if v == nil || v.lost == nil {
			return nil
		}
		return r.reload(ctx, m, v)
	})
}

// drop takes a lost version out of the engine, unless it is there no more.
func (r *Repository) drop(ctx context.Context, m *model, l lost) error {
	v := m.versions[l.id.Version]
	if v == nil || v.item == nil || v.item.id != l.id {
		return nil
	}
	r.mu.Lock()
	first := v.reason == ""
	v.state, v.reason = stateUnavailable, "lost: "+l.reason.Error()
	m.serves = m.highest()
	r.publish()
	r.mu.Unlock()
	quarantined := errors.Is(l.reason, engine.ErrQuarantined)
	switch {
	case first && quarantined:
		r.cfg.Log.Error("version put into quarantine; loading it again by hand gives it another try", "model", m.name, "version", l.id.Version, "error", l.reason)
	case first:
		r.cfg.Log.Error("version lost; it is loaded again", "model", m.name, "version", l.id.Version, "error", l.reason)
	}
	if err := r.cfg.Engine.Unload(ctx, v.item.spec.ID); err != nil && !errors.Is(err, engine.ErrNotLoaded) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v.item, v.lost = nil, v.item
	if quarantined {
		v.lost = nil
	}
	return nil
}

// reload loads a lost version again.
func (r *Repository) reload(ctx context.Context, m *model, v *version) error {
	if err := r.slot(ctx); err != nil {
		return err
	}
	defer func() { <-r.slots }()
	i := v.lost
	err := r.examine(ctx, i)
	if err == nil {
		err = r.run(ctx, r.cfg.Engine.Load, i)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		err = i.failed(err)
		v.reason = err.Error()
		if !passing(err) {
			v.lost = nil
		}
		return err
	}
	*v = version{state: stateReady, item: i}
	m.serves = m.highest()
	r.publish()
	r.cfg.Log.Info("model loaded", "model", m.name, "version", i.spec.ID.Version, "took", i.took.Round(time.Millisecond))
	return nil
}
