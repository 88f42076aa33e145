package repository

import (
	"context"
	"slices"
	"time"
)

// rollbackLimit bounds how long what a failed load has changed may take to be
// changed back.
const rollbackLimit = time.Minute

// insist loads a model as the folder has it, and tries again while only the
// runtime is at fault and no caller has asked for something else.
func (r *Repository) insist(ctx context.Context, m *model) {
	defer r.idle(m)
	r.mu.Lock()
	changes := m.changes
	r.mu.Unlock()
	r.retry(ctx, m, func() error {
		if err := m.take(ctx, ctx); err != nil {
			return err
		}
		defer m.yield()
		r.mu.Lock()
		overtaken := m.changes != changes
		r.mu.Unlock()
		if overtaken {
			return nil
		}
		return r.loadNow(ctx, m, nil)
	})
}

// retry calls try until it succeeds or fails for good, and logs that.
func (r *Repository) retry(ctx context.Context, m *model, try func() error) {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := try()
		switch {
		case err == nil || ctx.Err() != nil:
			return
		case !passing(err):
			r.cfg.Log.Error("model cannot be loaded", "model", m.name, "error", err)
			return
		case wait == firstRetry:
			r.cfg.Log.Warn("model cannot be loaded yet; it is tried again", "model", m.name, "error", err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// load loads a model for a caller, who waits for its turn as long as wait
// lasts. What over holds is then the model's.
func (r *Repository) load(ctx, wait context.Context, m *model, over *override) error {
	if err := m.take(ctx, wait); err != nil {
		over.discard()
		return err
	}
	defer m.yield()
	r.mu.Lock()
	m.changes++
	r.mu.Unlock()
	err := r.loadNow(ctx, m, over)
	if err == nil {
		r.mu.Lock()
		m.wanted = true
		r.mu.Unlock()
	}
	return err
}

// loadNow loads a model. The caller has its turn.
func (r *Repository) loadNow(ctx context.Context, m *model, over *override) error {
	r.mu.Lock()
	m.loading = true
	if over != nil && over.staged != nil {
		m.staged = append(m.staged, over.staged)
	}
	r.mu.Unlock()
	var key string
	var gone []*version
	err := r.slot(ctx)
	if err == nil {
		p := r.folder.plan(m.name, over)
		key = p.key()
		if err = p.err; err == nil {
			gone, err = r.change(ctx, m, p)
		}
		<-r.slots
	}
	if err := r.unloadVersions(ctx, gone); err != nil {
		r.cfg.Log.Warn("old version cannot be unloaded", "model", m.name, "error", err)
	}
	r.mu.Lock()
	m.loading, m.reason, m.tried = false, "", key
	if err != nil {
		m.reason = err.Error()
	}
	r.mu.Unlock()
	r.clean(m)
	return err
}

// clean removes the folders that callers brought and that no version needs
// any more. The caller has the model's turn.
func (r *Repository) clean(m *model) {
	r.mu.Lock()
	used := map[*staged]bool{}
	for _, v := range m.versions {
		for _, i := range []*item{v.item, v.lost} {
			if i != nil && i.staged != nil {
				used[i.staged] = true
			}
		}
	}
	var left []*staged
	m.staged = slices.DeleteFunc(m.staged, func(s *staged) bool {
		if !used[s] {
			left = append(left, s)
		}
		return !used[s]
	})
	r.mu.Unlock()
	for _, s := range left {
		if err := s.remove(); err != nil {
			r.cfg.Log.Warn("files of a model that was unloaded cannot be removed", "model", m.name, "error", err)
		}
	}
}

// slot waits for one of the slots of loads.
func (r *Repository) slot(ctx context.Context) error {
	select {
	case r.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// change makes the versions that serve those of the plan, and gives those that
// are to be unloaded, or leaves all as it is. The caller has the model's turn
// and a slot.
func (r *Repository) change(ctx context.Context, m *model, p *plan) (gone []*version, err error) {
	var fresh, newer []*item
	for _, i := range p.items {
		v := m.versions[i.spec.ID.Version]
		switch {
		case v == nil || v.item == nil || v.state != stateReady:
			fresh = append(fresh, i)
		case !v.item.same(i):
			newer = append(newer, i)
		default:
			i.id = v.item.id
		}
	}
	if len(fresh)+len(newer) > 0 {
		for _, w := range p.warnings {
			r.cfg.Log.Warn(w, "model", m.name)
		}
		for _, n := range p.notes {
			r.cfg.Log.Info(n, "model", m.name)
		}
		if err := r.bring(ctx, m, fresh, newer); err != nil {
			return nil, err
		}
	}
	r.mu.Lock()
	for n, v := range m.versions {
		switch {
		case slices.ContainsFunc(p.items, func(i *item) bool { return i.spec.ID.Version == n }):
		case v.item == nil:
			delete(m.versions, n)
		default:
			gone = append(gone, v)
		}
	}
	for _, i := range p.items {
		*m.version(i.spec.ID.Version) = version{state: stateReady, item: i}
		m.serves = i.spec.ID.Version
	}
	r.publish()
	r.mu.Unlock()
	for _, i := range slices.Concat(fresh, newer) {
		r.cfg.Log.Info("model loaded", "model", m.name, "version", i.spec.ID.Version, "took", i.took.Round(time.Millisecond))
	}
	return gone, nil
}

// version gives the entry of a version. The caller holds Repository.mu.
func (m *model) version(n int64) *version {
	v := m.versions[n]
	if v == nil {
		v = &version{}
		m.versions[n] = v
	}
	return v
}
