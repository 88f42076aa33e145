package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/dunlin/dunlin/controller/fleet"
)

// StoredObject is an object and when it last changed.
type StoredObject struct {
	fleet.Object
	UpdatedAt time.Time
}

// Change is what happened, or would happen, to one object.
type Change struct {
	Kind, Name    string
	Before, After string // canonical YAML; empty: there is none
	Rollout       string // ID of the rollout that it started; empty: none
}

func objects(ctx context.Context, tx *sql.Tx) (all []StoredObject, err error) {
	err = each(ctx, tx, "SELECT kind, name, yaml, updated_at FROM objects ORDER BY kind, name", nil, func(scan func(...any) error) error {
		var kind, name, text string
		var updated int64
		if err := scan(&kind, &name, &text, &updated); err != nil {
			return err
		}
		parsed, err := fleet.Parse(text)
		if err != nil {
			return fmt.Errorf("stored %s %s: %w", kind, name, err)
		}
		for _, o := range parsed {
			all = append(all, StoredObject{o, instant(updated)})
		}
		return nil
	})
	return all, err
}

// byName gives objects by kind and name.
func byName(stored []StoredObject) map[[2]string]fleet.Object {
	by := make(map[[2]string]fleet.Object, len(stored))
	for _, o := range stored {
		by[[2]string{o.Kind(), o.Name()}] = o.Object
	}
	return by
}

// Objects gives all objects of a kind by name.
func (s *Store) Objects(ctx context.Context, kind string) (all []StoredObject, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		all, err = objects(ctx, tx)
		return err
	})
	return slices.DeleteFunc(all, func(o StoredObject) bool { return o.Kind() != kind }), err
}

// Permit says whether an object that is there may be changed or deleted.
type Permit func(fleet.Object) error

func permit(may []Permit, objects ...fleet.Object) error {
	for _, o := range objects {
		for _, p := range may {
			if err := p(o); err != nil {
				return err
			}
		}
	}
	return nil
}

// Apply makes objects what they say, and starts a rollout for each deployment
// whose devices or version change. Its error is fleet.Faults where the objects
// do not fit the models, devices and deployments that there are. With dryRun
// it only says what it would do. The objects that they replace must be
// permitted by each of may.
func (s *Store) Apply(ctx context.Context, by string, apply []fleet.Object, dryRun bool, may ...Permit) (changes []Change, err error) {
	err = s.write(ctx, "apply", func(tx *sql.Tx) error {
		stored, err := objects(ctx, tx)
		if err != nil {
			return err
		}
		before := byName(stored)
		for _, o := range apply {
			if old, ok := before[[2]string{o.Kind(), o.Name()}]; ok {
				if err := permit(may, old); err != nil {
					return err
				}
			}
		}
		if err := check(ctx, tx, before, apply); err != nil {
			return err
		}
		changes = nil
		for _, o := range apply {
			old, exists := before[[2]string{o.Kind(), o.Name()}]
			c := Change{Kind: o.Kind(), Name: o.Name(), After: o.YAML()}
			if exists {
				c.Before = old.YAML()
			}
			if c.Before != c.After {
				if c.Rollout, err = s.put(ctx, tx, by, old, o, c.Before, c.After, dryRun); err != nil {
					return err
				}
			}
			changes = append(changes, c)
		}
		if dryRun {
			return errDryRun
		}
		return nil
	})
	if err != nil && !errors.Is(err, errDryRun) {
		return nil, err
	}
	return changes, nil
}

func (s *Store) put(ctx context.Context, tx *sql.Tx, by string, old, o fleet.Object, before, text string, dryRun bool) (rollout string, err error) {
	if _, err := tx.ExecContext(ctx, "INSERT INTO objects (kind, name, yaml, updated_at) VALUES (?, ?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET yaml = excluded.yaml, updated_at = excluded.updated_at",
		o.Kind(), o.Name(), text, s.now().UnixNano()); err != nil {
		return "", fmt.Errorf("put %s %s: %w", o.Kind(), o.Name(), err)
	}
	if err := s.audit(ctx, tx, AuditRecord{Who: by, Action: "object.apply", Object: o.Kind() + "/" + o.Name(), Before: before, After: text}); err != nil {
		return "", err
	}
	d := o.Deployment
	if d == nil {
		return "", nil
	}
	r := fleet.Rollout{Deployment: d.Name, Model: d.Model, To: d.Version, Strategy: d.Rollout, State: fleet.Running, StartedAt: s.now().UTC()}
	if was := old.Deployment; was != nil {
		newest, err := rolloutHeads(ctx, tx, "WHERE deployment = ? ORDER BY number DESC LIMIT 1", d.Name)
		if err != nil {
			return "", err
		}
		if was.Model == d.Model && was.Version == d.Version && maps.Equal(was.Selector, d.Selector) && !stuck(newest) {
			return "", nil
		}
		var model string
		if len(newest) == 0 {
			model, r.From = was.Model, was.Version
		} else {
			model, r.From = fleet.LastGood(newest)
		}
		if r.From > 0 && model != d.Model {
			r.FromModel = model
		}
	}
	r, err = s.startRollout(ctx, tx, by, r)
	if err != nil || dryRun {
		return "", err
	}
	return r.ID(), nil
}

// stuck says whether the newest rollout did not bring the devices to the
// version, and will not by itself: a changed document then starts another one,
// though it wants the same version. The same document again starts none.
func stuck(newest []fleet.Rollout) bool {
	return len(newest) > 0 && slices.Contains([]fleet.State{fleet.Failed, fleet.Halted, fleet.RollingBack, fleet.RolledBack, fleet.Aborted}, newest[0].State)
}

// check says how objects do not fit what there is.
func check(ctx context.Context, tx *sql.Tx, before map[[2]string]fleet.Object, apply []fleet.Object) error {
	var faults fleet.Faults
	after := map[string]fleet.Deployment{}
	for _, o := range before {
		if o.Deployment != nil {
			after[o.Name()] = *o.Deployment
		}
	}
	known := func(o fleet.Object, path, model string, version int64) error {
		var models, versions int
		if err := tx.QueryRowContext(ctx, "SELECT count(*), count(*) FILTER (WHERE version = ?) FROM versions WHERE model = ?", version, model).Scan(&models, &versions); err != nil {
			return err
		}
		switch {
		case models == 0:
			faults = append(faults, o.Fault(path+".model", "there is no model %q", model))
		case version != 0 && versions == 0:
			faults = append(faults, o.Fault(path+".version", "model %s has no version %d", model, version))
		}
		return nil
	}
	for _, o := range apply {
		if d := o.Deployment; d != nil {
			after[d.Name] = *d
			if err := known(o, "spec", d.Model, d.Version); err != nil {
				return err
			}
			continue
		}
		if o.Route == nil {
			continue
		}
		for field, t := range o.Route.All() {
			if err := known(o, field, t.Model, t.Version); err != nil {
				return err
			}
		}
	}
	stored, err := devices(ctx, tx, "")
	if err != nil {
		return err
	}
	var all []fleet.Device
	for _, d := range stored {
		all = append(all, d.Fleet())
	}
	deployments := slices.Collect(maps.Values(after))
	for _, o := range apply {
		if o.Deployment == nil {
			continue
		}
		if c, ok := fleet.FindConflict(*o.Deployment, deployments, all); ok {
			faults = append(faults, o.Fault("spec.selector", "deployment %s of the same model %s matches device %s too", c.First, c.Model, c.Device))
		}
	}
	if len(faults) > 0 {
		return faults
	}
	return nil
}

// Delete takes an object away and ends its rollout. One that is not there is
// ErrNotFound. It must be permitted by each of may.
func (s *Store) Delete(ctx context.Context, by, kind, name string, may ...Permit) (c Change, err error) {
	err = s.write(ctx, "delete", func(tx *sql.Tx) error {
		c = Change{Kind: kind, Name: name}
		err := tx.QueryRowContext(ctx, "DELETE FROM objects WHERE kind = ? AND name = ? RETURNING yaml", kind, name).Scan(&c.Before)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("%s %s: %w", kind, name, ErrNotFound)
		}
		if err != nil {
			return err
		}
		objects, err := fleet.Parse(c.Before)
		if err != nil {
			return fmt.Errorf("stored %s %s: %w", kind, name, err)
		}
		if err := permit(may, objects...); err != nil {
			return err
		}
		if kind == fleet.KindDeployment {
			if err := s.supersede(ctx, tx, by, name, "the deployment was deleted"); err != nil {
				return err
			}
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "object.delete", Object: kind + "/" + name, Before: c.Before})
	})
	return c, err
}
