package store

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// GapKind is the kind of an event that stands for all events of its outbox
// from the one after the last stored up to its own sequence.
const GapKind = "gap"

// The limits of events.
const (
	// MaxEvents bounds the events of a device that are kept; Prune forgets
	// the oldest beyond it.
	MaxEvents = 10000
	// MaxOutboxes bounds the outboxes of a device whose position is kept;
	// beyond it the one that was heard least recently is forgotten.
	MaxOutboxes = 8
)

// DeviceEvent is a stored event.
type DeviceEvent struct {
	Device     string
	OutboxID   string
	Event      *dunlinv1.Event
	ReceivedAt time.Time
}

// AddEvents stores the events that continue an outbox and gives the sequence
// up to which all are stored now. Events that are stored already are passed
// over. Where a sequence is missing it stops, unless the event after the hole
// is a gap: the device sends again from what it is told is stored, so every
// event is stored exactly once and nothing is lost unnoticed. An outbox of
// which nothing is known starts with the first event that it sends: what came
// before was acknowledged, by another store or before the device was removed.
// Of a device that is not known it is ErrNotFound.
//
// The profile that an event carries is kept as the device's newest of that
// version, and not with the event; measured says whether one told something
// new of what a version needs.
func (s *Store) AddEvents(ctx context.Context, device, outbox string, events []*dunlinv1.Event) (stored uint64, measured bool, err error) {
	err = s.write(ctx, "events", func(tx *sql.Tx) error {
		stored, measured, err = s.addEvents(ctx, tx, device, outbox, events)
		return err
	})
	return stored, measured, err
}

// restoredGap stands for the events that only the store before had.
func restoredGap(first, last uint64, at int64) *dunlinv1.Event {
	return &dunlinv1.Event{
		Sequence: last, At: timestamppb.New(instant(at)), Kind: GapKind, Severity: dunlinv1.Severity_SEVERITY_WARNING,
		Message: fmt.Sprintf("events %d to %d came after the copy was made from which the controller was restored", first, last),
	}
}

func (s *Store) addEvents(ctx context.Context, tx *sql.Tx, device, outbox string, events []*dunlinv1.Event) (stored uint64, measured bool, err error) {
	var known, kept, restored bool
	var last sql.Null[int64]
	if err := s.prepared(ctx, tx, outboxQuery).QueryRowContext(ctx, device, outbox).Scan(&known, &kept, &restored, &last); err != nil {
		return 0, false, err
	}
	if !known {
		return 0, false, fmt.Errorf("device %s: %w", device, ErrNotFound)
	}
	if !last.Valid && len(events) > 0 {
		last.V = int64(min(max(events[0].GetSequence(), 1), math.MaxInt64)) - 1
	}
	stored = uint64(last.V)
	now, profiles := s.now().UnixNano(), false
	if restored && len(events) > 0 && events[0].GetSequence() > stored+1 && events[0].GetKind() != GapKind {
		events = append([]*dunlinv1.Event{restoredGap(stored+1, events[0].GetSequence()-1, now)}, events...)
	}
	for _, e := range events {
		if e.GetSequence() <= stored {
			continue
		}
		if e.GetSequence() > stored+1 && e.GetKind() != GapKind || e.GetSequence() > math.MaxInt64 {
			break
		}
		if p := e.GetProfile(); p != nil {
			news, err := s.putProfile(ctx, tx, device, p)
			if err != nil {
				return 0, false, err
			}
			measured, profiles = measured || news, true
			e = proto.CloneOf(e)
			e.Profile = nil
		}
		blob, err := proto.Marshal(e)
		if err != nil {
			return 0, false, fmt.Errorf("encode event %d: %w", e.GetSequence(), err)
		}
		if _, err := s.prepared(ctx, tx, eventInsert).ExecContext(ctx, device, outbox, int64(e.GetSequence()), now, blob); err != nil {
			return 0, false, fmt.Errorf("add event %d of device %s: %w", e.GetSequence(), device, err)
		}
		stored = e.GetSequence()
	}
	if stored == uint64(last.V) {
		return stored, measured, nil
	}
	if profiles {
		if err := boundProfiles(ctx, tx, device); err != nil {
			return 0, false, err
		}
	}
	if _, err := s.prepared(ctx, tx, outboxPut).ExecContext(ctx, device, outbox, int64(stored), now); err != nil {
		return 0, false, err
	}
	if !kept { // there is one more
		_, err = tx.ExecContext(ctx, "DELETE FROM outboxes WHERE device = ? AND outbox IN (SELECT outbox FROM outboxes WHERE device = ? ORDER BY heard_at DESC, outbox LIMIT -1 OFFSET ?)", device, device, MaxOutboxes)
	}
	return stored, measured, err
}

// Events gives the newest events first, of a device or, where device is
// empty, of all.
func (s *Store) Events(ctx context.Context, device string, limit int) ([]DeviceEvent, error) {
	if device != "" {
		return s.events(ctx, "WHERE device = ? ORDER BY id DESC LIMIT ?", device, limit)
	}
	return s.events(ctx, "ORDER BY id DESC LIMIT ?", limit)
}

// EventsOf gives the newest events of some devices first.
func (s *Store) EventsOf(ctx context.Context, devices []string, limit int) ([]DeviceEvent, error) {
	return s.events(ctx, "WHERE device IN (SELECT value FROM json_each(?)) ORDER BY id DESC LIMIT ?", jsonText(devices), limit)
}

func (s *Store) events(ctx context.Context, where string, args ...any) (events []DeviceEvent, err error) {
	query := "SELECT device, outbox, received_at, event FROM events " + where
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, query, args, func(scan func(...any) error) error {
			e := DeviceEvent{Event: &dunlinv1.Event{}}
			var received int64
			var blob []byte
			if err := scan(&e.Device, &e.OutboxID, &received, &blob); err != nil {
				return err
			}
			e.ReceivedAt = instant(received)
			events = append(events, e)
			return proto.Unmarshal(blob, e.Event)
		})
	})
	return events, err
}

// Prune forgets the oldest events of each device beyond MaxEvents, and the
// certificates that tell nothing any more: those that expired longer ago than
// the longest grace period. It looks all of both through.
func (s *Store) Prune(ctx context.Context) error {
	var full []string
	var expired bool
	long := s.now().Add(-identity.MaxGrace).UnixNano()
	err := s.read(ctx, func(tx *sql.Tx) error {
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM certificates WHERE not_after < ?)", long).Scan(&expired); err != nil {
			return err
		}
		return each(ctx, tx, "SELECT device FROM events GROUP BY device HAVING count(*) > ?", []any{MaxEvents}, func(scan func(...any) error) error {
			var device string
			err := scan(&device)
			full = append(full, device)
			return err
		})
	})
	if err != nil || len(full) == 0 && !expired {
		return err
	}
	return s.write(ctx, "prune", func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM certificates WHERE not_after < ?", long); err != nil {
			return err
		}
		for _, device := range full {
			if _, err := tx.ExecContext(ctx, "DELETE FROM events WHERE device = ? AND id <= (SELECT id FROM events WHERE device = ? ORDER BY id DESC LIMIT 1 OFFSET ?)", device, device, MaxEvents); err != nil {
				return err
			}
		}
		return nil
	})
}
