package store

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/dunlin/dunlin/controller/fleet"
)

// The limits of rollouts.
const (
	// MaxRollouts bounds the rollouts of one deployment that are kept; beyond
	// it the oldest are forgotten. The newest alone tells the last good version.
	MaxRollouts = 100
	// MaxDecisions bounds the decisions of one rollout that are kept; beyond it
	// the oldest are forgotten, but for the first.
	MaxDecisions = 1000
)

// openStates are those of a rollout that has not ended.
const openStates = "(1, 5, 6, 7)"

// rolloutDetail is what a rollout has besides its columns, and deviceDetail
// what a device's part has. They are kept as JSON.
type (
	rolloutDetail struct {
		FromModel     string             `json:"fromModel,omitempty"`
		Waves         []fleet.Wave       `json:"waves,omitempty"`
		Soak          time.Duration      `json:"soak,omitempty"`
		MinSample     uint64             `json:"minSample,omitempty"`
		Gates         []fleet.Gate       `json:"gates,omitempty"`
		OnFailure     fleet.OnFailure    `json:"onFailure,omitempty"`
		AwayAfter     time.Duration      `json:"awayAfter,omitempty"`
		Wave          int                `json:"wave,omitempty"`
		WaveStartedAt time.Time          `json:"waveStartedAt,omitzero"`
		WaveReadyAt   time.Time          `json:"waveReadyAt,omitzero"`
		Promoted      bool               `json:"promoted,omitempty"`
		Results       []fleet.GateResult `json:"results,omitempty"`

		Since    time.Time            `json:"since,omitzero"`
		Cause    string               `json:"cause,omitempty"`
		Anew     bool                 `json:"anew,omitempty"`
		Discount []fleet.ClassFigures `json:"discount,omitempty"`
	}
	deviceDetail struct {
		Class       string    `json:"class,omitempty"`
		Wave        int       `json:"wave,omitempty"`
		AdmittedAt  time.Time `json:"admittedAt,omitzero"`
		ReadyAt     time.Time `json:"readyAt,omitzero"`
		BehindSince time.Time `json:"behindSince,omitzero"`
		Excused     bool      `json:"excused,omitempty"`
		Forgiven    bool      `json:"forgiven,omitempty"`
		Joined      bool      `json:"joined,omitempty"`
	}
)

func detailOf(r fleet.Rollout) rolloutDetail {
	s := r.Strategy
	return rolloutDetail{
		FromModel: r.FromModel, Waves: s.Waves, Soak: s.Soak, MinSample: s.MinSample, Gates: s.Gates, OnFailure: s.OnFailure, AwayAfter: s.AwayAfter,
		Wave: r.Wave, WaveStartedAt: r.WaveStartedAt, WaveReadyAt: r.WaveReadyAt, Promoted: r.Promoted, Results: finite(r.Gates),
		Since: r.Since, Cause: r.Cause, Anew: r.Anew, Discount: r.Discount,
	}
}

// finite leaves out figures that JSON cannot write.
func finite(results []fleet.GateResult) []fleet.GateResult {
	number := func(x *float64) *float64 {
		if x == nil || math.IsNaN(*x) || math.IsInf(*x, 0) {
			return nil
		}
		return x
	}
	results = slices.Clone(results)
	for i := range results {
		r := &results[i]
		r.New, r.Old, r.Value = number(r.New), number(r.Old), number(r.Value)
	}
	return results
}

func (d rolloutDetail) to(r *fleet.Rollout) {
	s := &r.Strategy
	s.Waves, s.Soak, s.MinSample, s.Gates, s.OnFailure, s.AwayAfter = d.Waves, d.Soak, d.MinSample, d.Gates, d.OnFailure, d.AwayAfter
	r.FromModel, r.Wave, r.WaveStartedAt, r.WaveReadyAt, r.Promoted, r.Gates = d.FromModel, d.Wave, d.WaveStartedAt, d.WaveReadyAt, d.Promoted, d.Results
	r.Since, r.Cause, r.Anew, r.Discount = d.Since, d.Cause, d.Anew, d.Discount
}

func deviceDetailOf(d fleet.RolloutDevice) deviceDetail {
	return deviceDetail{
		Class: d.Class, Wave: d.Wave, AdmittedAt: d.AdmittedAt, ReadyAt: d.ReadyAt, BehindSince: d.BehindSince,
		Excused: d.Excused, Forgiven: d.Forgiven, Joined: d.Joined,
	}
}

func (d deviceDetail) to(r *fleet.RolloutDevice) {
	r.Class, r.Wave, r.AdmittedAt, r.ReadyAt, r.BehindSince = d.Class, d.Wave, d.AdmittedAt, d.ReadyAt, d.BehindSince
	r.Excused, r.Forgiven, r.Joined = d.Excused, d.Forgiven, d.Joined
}

// rolloutHeads gives rollouts without their devices.
func rolloutHeads(ctx context.Context, tx *sql.Tx, where string, args ...any) (all []fleet.Rollout, err error) {
	err = each(ctx, tx, "SELECT number, deployment, model, from_version, to_version, max_failed, deadline, state, reason, started_at, ended_at, detail FROM rollouts "+where, args, func(scan func(...any) error) error {
		var r fleet.Rollout
		var started, ended int64
		var text string
		if err := scan(&r.Number, &r.Deployment, &r.Model, &r.From, &r.To, &r.Strategy.MaxFailed, &r.Strategy.Deadline, &r.State, &r.Reason, &started, &ended, &text); err != nil {
			return err
		}
		r.StartedAt, r.EndedAt = instant(started), instant(ended)
		var detail rolloutDetail
		if err := fromJSON(text, &detail); err != nil {
			return fmt.Errorf("rollout %s: %w", r.ID(), err)
		}
		detail.to(&r)
		all = append(all, r)
		return nil
	})
	return all, err
}

func rollouts(ctx context.Context, tx *sql.Tx, where string, args ...any) (all []fleet.Rollout, err error) {
	if all, err = rolloutHeads(ctx, tx, where, args...); err != nil {
		return nil, err
	}
	for i := range all {
		if err := withDevices(ctx, tx, &all[i]); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func withDevices(ctx context.Context, tx *sql.Tx, r *fleet.Rollout) error {
	return each(ctx, tx, "SELECT device, phase, reason, bytes_present, bytes_total, detail FROM rollout_devices WHERE rollout = ? ORDER BY device", []any{r.Number}, func(scan func(...any) error) error {
		var d fleet.RolloutDevice
		var text string
		if err := scan(&d.Device, &d.Phase, &d.Reason, &d.BytesPresent, &d.BytesTotal, &text); err != nil {
			return err
		}
		if text != "{}" {
			var detail deviceDetail
			if err := fromJSON(text, &detail); err != nil {
				return fmt.Errorf("rollout %s, device %s: %w", r.ID(), d.Device, err)
			}
			detail.to(&d)
		}
		r.Devices = append(r.Devices, d)
		return nil
	})
}

// Rollouts gives the rollouts of a deployment, or of all where deployment is
// empty, newest first.
func (s *Store) Rollouts(ctx context.Context, deployment string, limit int) (all []fleet.Rollout, err error) {
	return s.RolloutsWithin(ctx, deployment, limit, math.MaxInt)
}

// RolloutsWithin gives rollouts as Rollouts does, yet only the newest with
// their devices: those that begin before so many devices are read.
func (s *Store) RolloutsWithin(ctx context.Context, deployment string, limit, devices int) (all []fleet.Rollout, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		if all, err = rolloutHeads(ctx, tx, "WHERE ? IN ('', deployment) ORDER BY number DESC LIMIT ?", deployment, limit); err != nil {
			return err
		}
		for i := range all {
			if devices <= 0 {
				break
			}
			if err := withDevices(ctx, tx, &all[i]); err != nil {
				return err
			}
			devices -= len(all[i].Devices)
		}
		return nil
	})
	return all, err
}

// Rollout gives a rollout by its ID, or ErrNotFound.
func (s *Store) Rollout(ctx context.Context, id string) (r fleet.Rollout, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		r, err = findRollout(ctx, tx, id, "")
		return err
	})
	return r, err
}

// findRollout gives a rollout by its ID, or the newest of a deployment.
func findRollout(ctx context.Context, tx *sql.Tx, id, deployment string) (r fleet.Rollout, err error) {
	var found []fleet.Rollout
	if id != "" {
		found, err = rollouts(ctx, tx, "WHERE deployment || '-' || number = ?", id)
	} else {
		found, err = rollouts(ctx, tx, "WHERE deployment = ? ORDER BY number DESC LIMIT 1", deployment)
	}
	switch {
	case err != nil:
		return r, err
	case len(found) == 0 && id != "":
		return r, fmt.Errorf("rollout %s: %w", id, ErrNotFound)
	case len(found) == 0:
		return r, fmt.Errorf("rollout of deployment %q: %w", deployment, ErrNotFound)
	}
	return found[0], nil
}

// Decisions gives what was decided in a rollout, by its ID, oldest first.
func (s *Store) Decisions(ctx context.Context, id string) (all []fleet.Decision, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT decision FROM decisions JOIN rollouts ON rollouts.number = rollout WHERE deployment || '-' || rollout = ? ORDER BY decisions.number", []any{id}, func(scan func(...any) error) error {
			var text string
			if err := scan(&text); err != nil {
				return err
			}
			var d fleet.Decision
			if err := fromJSON(text, &d); err != nil {
				return fmt.Errorf("decision of rollout %s: %w", id, err)
			}
			all = append(all, d)
			return nil
		})
	})
	return all, err
}

func saveDecisions(ctx context.Context, tx *sql.Tx, rollout int64, decisions []fleet.Decision) error {
	if len(decisions) == 0 {
		return nil
	}
	var last int64
	if err := tx.QueryRowContext(ctx, "SELECT coalesce(max(number), 0) FROM decisions WHERE rollout = ?", rollout).Scan(&last); err != nil {
		return err
	}
	for _, d := range decisions {
		last++
		d.Gates = finite(d.Gates)
		if _, err := tx.ExecContext(ctx, "INSERT INTO decisions (rollout, number, at, decision) VALUES (?, ?, ?, ?)", rollout, last, nanos(d.At), jsonText(d)); err != nil {
			return fmt.Errorf("decision %d: %w", last, err)
		}
	}
	_, err := tx.ExecContext(ctx, "DELETE FROM decisions WHERE rollout = ? AND number > 1 AND number <= ?", rollout, last-MaxDecisions+1)
	return err
}

func (s *Store) startRollout(ctx context.Context, tx *sql.Tx, by string, r fleet.Rollout) (fleet.Rollout, error) {
	if err := s.supersede(ctx, tx, by, r.Deployment, "a newer rollout took over"); err != nil {
		return r, err
	}
	err := tx.QueryRowContext(ctx, `INSERT INTO rollouts (deployment, model, from_version, to_version, max_failed, deadline, state, reason, started_at, ended_at, detail)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING number`,
		r.Deployment, r.Model, r.From, r.To, r.Strategy.MaxFailed, r.Strategy.Deadline, r.State, r.Reason, nanos(r.StartedAt), nanos(r.EndedAt), jsonText(detailOf(r))).Scan(&r.Number)
	if err != nil {
		return r, fmt.Errorf("start rollout of %s: %w", r.Deployment, err)
	}
	if _, err = tx.ExecContext(ctx, "DELETE FROM rollouts WHERE number IN (SELECT number FROM rollouts WHERE deployment = ? ORDER BY number DESC LIMIT -1 OFFSET ?)", r.Deployment, MaxRollouts); err != nil {
		return r, err
	}
	var before string
	if r.From > 0 {
		before = fmt.Sprintf("%s:%d", r.Back(), r.From)
	}
	after := fmt.Sprintf("%s:%d", r.Model, r.To)
	return r, s.audit(ctx, tx, AuditRecord{Who: by, Action: "rollout.start", Object: "rollout/" + r.ID(), Before: before, After: after})
}

// supersede ends what a deployment has open.
func (s *Store) supersede(ctx context.Context, tx *sql.Tx, by, deployment, reason string) error {
	open, err := rollouts(ctx, tx, "WHERE deployment = ? AND state IN "+openStates, deployment)
	if err != nil {
		return err
	}
	for _, r := range open {
		after := r.Supersede(s.now().UTC(), reason)
		decision := fleet.Decision{At: after.EndedAt, Kind: fleet.DecideSupersede, Wave: r.Wave, By: by, Reason: reason}
		if err := s.saveRollout(ctx, tx, by, r, after, []fleet.Decision{decision}); err != nil {
			return err
		}
	}
	return nil
}

// SaveRollout replaces a rollout that has not ended by what a step made of it,
// and keeps what was decided, in one transaction. Only the devices that changed
// are written. Where the store has another state of it than before, because a
// newer one took over or an operator asked for something, it is ErrStale.
func (s *Store) SaveRollout(ctx context.Context, before, after fleet.Rollout, decisions []fleet.Decision) error {
	return s.write(ctx, "rollout", func(tx *sql.Tx) error {
		if before.State.Ended() {
			return fmt.Errorf("rollout %s: %w", before.ID(), ErrStale)
		}
		return s.saveRollout(ctx, tx, "controller", before, after, decisions)
	})
}

func (s *Store) saveRollout(ctx context.Context, tx *sql.Tx, by string, before, after fleet.Rollout, decisions []fleet.Decision) error {
	if err := changedOne(tx.ExecContext(ctx, "UPDATE rollouts SET state = ?, reason = ?, ended_at = ?, detail = ? WHERE number = ? AND state = ? AND detail = ?",
		after.State, after.Reason, nanos(after.EndedAt), jsonText(detailOf(after)), after.Number, before.State, jsonText(detailOf(before)))); err != nil {
		return fmt.Errorf("rollout %s: %w", after.ID(), err)
	}
	if err := s.saveParts(ctx, tx, before, after); err != nil {
		return fmt.Errorf("rollout %s: %w", after.ID(), err)
	}
	if err := saveDecisions(ctx, tx, after.Number, decisions); err != nil {
		return fmt.Errorf("rollout %s: %w", after.ID(), err)
	}
	if !after.State.Ended() || before.State == after.State {
		return nil
	}
	return s.audit(ctx, tx, AuditRecord{Who: by, Action: "rollout.end", Object: "rollout/" + after.ID(), Before: before.State.String(), After: after.State.String(), Reason: after.Reason})
}

// saveParts writes the devices' parts that changed. Both are by name.
func (s *Store) saveParts(ctx context.Context, tx *sql.Tx, before, after fleet.Rollout) error {
	put := s.prepared(ctx, tx, partPut)
	had := before.Devices
	drop := func(d fleet.RolloutDevice) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM rollout_devices WHERE rollout = ? AND device = ?", after.Number, d.Device)
		return err
	}
	for _, d := range after.Devices {
		for len(had) > 0 && had[0].Device < d.Device {
			if err := drop(had[0]); err != nil {
				return err
			}
			had = had[1:]
		}
		same := false
		if len(had) > 0 && had[0].Device == d.Device {
			same, had = had[0] == d, had[1:]
		}
		if same {
			continue
		}
		if _, err := put.ExecContext(ctx, after.Number, d.Device, d.Phase, d.Reason, int64(min(d.BytesPresent, math.MaxInt64)), int64(min(d.BytesTotal, math.MaxInt64)), jsonText(deviceDetailOf(d))); err != nil {
			return err
		}
	}
	for _, d := range had {
		if err := drop(d); err != nil {
			return err
		}
	}
	return nil
}

// ControlRollout does what an operator asks of a rollout, by its ID or the
// newest of a deployment, and keeps the decision and an audit record in the
// same transaction. It is ErrState where the command makes no sense now. The
// deployment must be permitted by each of may; of one that is gone, its last
// rollout can still be looked at, and no more.
func (s *Store) ControlRollout(ctx context.Context, by, id, deployment string, c fleet.Command, reason string, may ...Permit) (after fleet.Rollout, err error) {
	err = s.write(ctx, "rollout control", func(tx *sql.Tx) error {
		before, err := findRollout(ctx, tx, id, deployment)
		if err != nil {
			return err
		}
		stored, err := objects(ctx, tx)
		if err != nil {
			return err
		}
		o, ok := byName(stored)[[2]string{fleet.KindDeployment, before.Deployment}]
		if !ok {
			return fmt.Errorf("cannot %s rollout %s: its deployment %s is gone: %w", c, before.ID(), before.Deployment, ErrState)
		}
		if err := permit(may, o); err != nil {
			return err
		}
		var newest int64
		if err := tx.QueryRowContext(ctx, "SELECT max(number) FROM rollouts WHERE deployment = ?", before.Deployment).Scan(&newest); err != nil {
			return err
		}
		if newest != before.Number {
			return fmt.Errorf("cannot %s rollout %s: %s-%d is newer: %w", c, before.ID(), before.Deployment, newest, ErrState)
		}
		var decision fleet.Decision
		if after, decision, err = before.Command(s.now().UTC(), c, by, reason); err != nil {
			return fmt.Errorf("%w: %w", err, ErrState)
		}
		if err := s.saveRollout(ctx, tx, by, before, after, []fleet.Decision{decision}); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "rollout." + string(c), Object: "rollout/" + after.ID(), Before: before.State.String(), After: after.State.String(), Reason: reason})
	})
	return after, err
}

// Tally is what was counted of both versions of a rollout on one device.
type Tally struct {
	New Count `json:"new"`
	Old Count `json:"old"`
}

// Count is what was counted of one version on a device: Sum, up to the moment
// when the device's own counts of its boot were Last.
type Count struct {
	Boot string        `json:"boot,omitempty"`
	Last fleet.Figures `json:"last"`
	Sum  fleet.Figures `json:"sum"`
}

// SaveTallies keeps what was counted on devices of a rollout; those that have no
// part in it are left out.
func (s *Store) SaveTallies(ctx context.Context, rollout int64, tallies map[string]Tally) error {
	if len(tallies) == 0 {
		return nil
	}
	return s.write(ctx, "figures", func(tx *sql.Tx) error {
		for device, t := range tallies {
			if _, err := tx.ExecContext(ctx, "UPDATE rollout_devices SET figures = ? WHERE rollout = ? AND device = ?", jsonText(t), rollout, device); err != nil {
				return err
			}
		}
		return nil
	})
}

// Tallies gives what was counted on the devices of a rollout.
func (s *Store) Tallies(ctx context.Context, rollout int64) (map[string]Tally, error) {
	tallies := map[string]Tally{}
	err := s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT device, figures FROM rollout_devices WHERE rollout = ? AND figures <> ''", []any{rollout}, func(scan func(...any) error) error {
			var device, text string
			if err := scan(&device, &text); err != nil {
				return err
			}
			var t Tally
			if err := fromJSON(text, &t); err != nil {
				return fmt.Errorf("figures of rollout %d, device %s: %w", rollout, device, err)
			}
			tallies[device] = t
			return nil
		})
	})
	return tallies, err
}
