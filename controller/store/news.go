package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Cursor is up to where somebody has been told of the events of devices and
// the decisions in rollouts.
type Cursor struct {
	Event    int64 `json:"event"`
	Decision int64 `json:"decision"`
}

// News is one event of a device or one decision in a rollout.
type News struct {
	Cursor // to keep once it has been told
	// An event has Device, its labels and Event.
	Device string
	Labels map[string]string
	Event  *dunlinv1.Event
	// A decision has its rollout, whose devices are left out, and the selector
	// of its deployment, nil where that is gone.
	Rollout  *fleet.Rollout
	Decision *fleet.Decision
	Selector map[string]string
}

// Cursor gives what is kept under a name; where there is nothing yet, it
// begins with what comes from now on, and is kept.
func (s *Store) Cursor(ctx context.Context, name string) (c Cursor, err error) {
	err = s.write(ctx, "cursor", func(tx *sql.Tx) error {
		var text string
		err := tx.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = ?", cursorKey(name)).Scan(&text)
		if err == nil {
			return fromJSON(text, &c)
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if err := tx.QueryRowContext(ctx, "SELECT coalesce((SELECT max(id) FROM events), 0), coalesce((SELECT max(id) FROM decided), 0)").Scan(&c.Event, &c.Decision); err != nil {
			return err
		}
		return putCursor(ctx, tx, name, c)
	})
	return c, err
}

// SetCursor keeps a cursor under a name.
func (s *Store) SetCursor(ctx context.Context, name string, c Cursor) error {
	return s.write(ctx, "cursor", func(tx *sql.Tx) error { return putCursor(ctx, tx, name, c) })
}

func cursorKey(name string) string { return "cursor " + name }

func putCursor(ctx context.Context, tx *sql.Tx, name string, c Cursor) error {
	_, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", cursorKey(name), jsonText(c))
	return err
}

// News gives what came after a cursor, decisions first, at most limit of each.
func (s *Store) News(ctx context.Context, after Cursor, limit int) (news []News, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		at := after
		err := each(ctx, tx, `SELECT decided.id, decided.rollout, decision FROM decided JOIN decisions ON decisions.rollout = decided.rollout AND decisions.number = decided.number
			WHERE decided.id > ? ORDER BY decided.id LIMIT ?`, []any{after.Decision, limit}, func(scan func(...any) error) error {
			n := News{Rollout: &fleet.Rollout{}, Decision: &fleet.Decision{}}
			var text string
			if err := scan(&at.Decision, &n.Rollout.Number, &text); err != nil {
				return err
			}
			n.Cursor = at
			news = append(news, n)
			return fromJSON(text, n.Decision)
		})
		if err != nil {
			return err
		}
		for i := range news {
			found := news[i].Rollout
			err := tx.QueryRowContext(ctx, "SELECT deployment, model, from_version, to_version, state, reason FROM rollouts WHERE number = ?", found.Number).
				Scan(&found.Deployment, &found.Model, &found.From, &found.To, &found.State, &found.Reason)
			if err != nil {
				return fmt.Errorf("rollout %d: %w", found.Number, err)
			}
			var text string
			err = tx.QueryRowContext(ctx, "SELECT yaml FROM objects WHERE kind = ? AND name = ?", fleet.KindDeployment, found.Deployment).Scan(&text)
			if errors.Is(err, sql.ErrNoRows) {
				continue
			}
			if err != nil {
				return err
			}
			if parsed, err := fleet.Parse(text); err == nil && len(parsed) == 1 && parsed[0].Deployment != nil {
				news[i].Selector = parsed[0].Deployment.Selector
			}
		}
		return each(ctx, tx, `SELECT id, device, own_labels, token_labels, event FROM events JOIN devices ON devices.name = device
			WHERE id > ? ORDER BY id LIMIT ?`, []any{after.Event, limit}, func(scan func(...any) error) error {
			n := News{Event: &dunlinv1.Event{}}
			var own, token string
			var blob []byte
			if err := scan(&at.Event, &n.Device, &own, &token, &blob); err != nil {
				return err
			}
			n.Cursor = at
			if n.Labels, err = merge(own, token); err != nil {
				return fmt.Errorf("labels of device %s: %w", n.Device, err)
			}
			if err := proto.Unmarshal(blob, n.Event); err != nil {
				return err
			}
			news = append(news, n)
			return nil
		})
	})
	return news, err
}
