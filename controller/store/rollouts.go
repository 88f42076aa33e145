package store

import (
	"context"
	"database/sql"
	"fmt"
	"slices"

	"github.com/dunlin/dunlin/controller/fleet"
)

// MaxRollouts bounds the rollouts of one deployment that are kept; beyond it
// the oldest are forgotten.
const MaxRollouts = 100

func rollouts(ctx context.Context, tx *sql.Tx, where string, args ...any) (all []fleet.Rollout, err error) {
	err = each(ctx, tx, "SELECT number, deployment, model, from_version, to_version, max_failed, deadline, state, reason, started_at, ended_at FROM rollouts "+where, args, func(scan func(...any) error) error {
		var r fleet.Rollout
		var started, ended int64
		if err := scan(&r.Number, &r.Deployment, &r.Model, &r.From, &r.To, &r.Strategy.MaxFailed, &r.Strategy.Deadline, &r.State, &r.Reason, &started, &ended); err != nil {
			return err
		}
		r.StartedAt, r.EndedAt = instant(started), instant(ended)
		all = append(all, r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range all {
		r := &all[i]
		err := each(ctx, tx, "SELECT device, phase, reason, bytes_present, bytes_total FROM rollout_devices WHERE rollout = ? ORDER BY device", []any{r.Number}, func(scan func(...any) error) error {
			var d fleet.RolloutDevice
			if err := scan(&d.Device, &d.Phase, &d.Reason, &d.BytesPresent, &d.BytesTotal); err != nil {
				return err
			}
			r.Devices = append(r.Devices, d)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Rollouts gives the rollouts of a deployment, or of all where deployment is
// empty, newest first.
func (s *Store) Rollouts(ctx context.Context, deployment string, limit int) (all []fleet.Rollout, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		all, err = rollouts(ctx, tx, "WHERE ? IN ('', deployment) ORDER BY number DESC LIMIT ?", deployment, limit)
		return err
	})
	return all, err
}

// Rollout gives a rollout by its ID, or ErrNotFound.
func (s *Store) Rollout(ctx context.Context, id string) (r fleet.Rollout, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		found, err := rollouts(ctx, tx, "WHERE deployment || '-' || number = ?", id)
		if err == nil && len(found) == 0 {
			return fmt.Errorf("rollout %s: %w", id, ErrNotFound)
		}
		if err == nil {
			r = found[0]
		}
		return err
	})
	return r, err
}

func (s *Store) startRollout(ctx context.Context, tx *sql.Tx, by string, r fleet.Rollout) (fleet.Rollout, error) {
	if err := s.supersede(ctx, tx, by, r.Deployment, "a newer rollout took over"); err != nil {
		return r, err
	}
	err := tx.QueryRowContext(ctx, `INSERT INTO rollouts (deployment, model, from_version, to_version, max_failed, deadline, state, reason, started_at, ended_at)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING number`,
		r.Deployment, r.Model, r.From, r.To, r.Strategy.MaxFailed, r.Strategy.Deadline, r.State, r.Reason, nanos(r.StartedAt), nanos(r.EndedAt)).Scan(&r.Number)
	if err != nil {
		return r, fmt.Errorf("start rollout of %s: %w", r.Deployment, err)
	}
	if _, err = tx.ExecContext(ctx, "DELETE FROM rollouts WHERE number IN (SELECT number FROM rollouts WHERE deployment = ? ORDER BY number DESC LIMIT -1 OFFSET ?)", r.Deployment, MaxRollouts); err != nil {
		return r, err
	}
	var before string
	if r.From > 0 {
		before = fmt.Sprintf("%s:%d", r.Model, r.From)
	}
	return r, s.audit(ctx, tx, AuditRecord{Who: by, Action: "rollout.start", Object: "rollout/" + r.ID(), Before: before, After: fmt.Sprintf("%s:%d", r.Model, r.To)})
}

func (s *Store) supersede(ctx context.Context, tx *sql.Tx, by, deployment, reason string) error {
	running, err := rollouts(ctx, tx, "WHERE deployment = ? AND state = 1", deployment)
	if err != nil {
		return err
	}
	for _, r := range running {
		if err := s.saveRollout(ctx, tx, by, r, r.Supersede(s.now().UTC(), reason)); err != nil {
			return err
		}
	}
	return nil
}

// SaveRollout replaces a running rollout by what a step made of it. One that
// does not run any more, because a newer one took over, is ErrStale.
func (s *Store) SaveRollout(ctx context.Context, before, after fleet.Rollout) error {
	return s.write(ctx, "rollout", func(tx *sql.Tx) error {
		return s.saveRollout(ctx, tx, "controller", before, after)
	})
}

func (s *Store) saveRollout(ctx context.Context, tx *sql.Tx, by string, before, after fleet.Rollout) error {
	if err := changedOne(tx.ExecContext(ctx, "UPDATE rollouts SET state = ?, reason = ?, ended_at = ? WHERE number = ? AND state = 1",
		after.State, after.Reason, nanos(after.EndedAt), after.Number)); err != nil {
		return fmt.Errorf("rollout %s: %w", after.ID(), err)
	}
	for _, d := range before.Devices {
		if slices.ContainsFunc(after.Devices, func(a fleet.RolloutDevice) bool { return a.Device == d.Device }) {
			continue
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM rollout_devices WHERE rollout = ? AND device = ?", after.Number, d.Device); err != nil {
			return err
		}
	}
	had := make(map[string]fleet.RolloutDevice, len(before.Devices))
	for _, d := range before.Devices {
		had[d.Device] = d
	}
	for _, d := range after.Devices {
		if had[d.Device] == d {
			continue
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO rollout_devices (rollout, device, phase, reason, bytes_present, bytes_total) VALUES (?, ?, ?, ?, ?, ?)
			ON CONFLICT (rollout, device) DO UPDATE SET phase = excluded.phase, reason = excluded.reason, bytes_present = excluded.bytes_present, bytes_total = excluded.bytes_total`,
			after.Number, d.Device, d.Phase, d.Reason, int64(d.BytesPresent), int64(d.BytesTotal)); err != nil {
			return err
		}
	}
	if after.State == fleet.Running {
		return nil
	}
	return s.audit(ctx, tx, AuditRecord{Who: by, Action: "rollout.end", Object: "rollout/" + after.ID(), Before: before.State.String(), After: after.State.String(), Reason: after.Reason})
}
