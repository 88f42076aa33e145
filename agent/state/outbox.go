package state

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of the outbox.
const (
	// DefaultOutboxEvents and DefaultOutboxBytes bound the events that wait to
	// be acknowledged. Where an event would exceed them, the oldest collapse
	// into a "gap".
	DefaultOutboxEvents = 10000
	DefaultOutboxBytes  = 8 << 20
	// MaxMessage bounds the message of an event; a longer one is cut.
	MaxMessage = 4 << 10
	// MaxEvent bounds an encoded event; a larger one is refused.
	MaxEvent = 8 << 10
	// MaxBatchBytes bounds the events that Pending gives at once, so that they
	// fit into one message.
	MaxBatchBytes = 96 << 10
)

// GapKind is the kind of the event that stands for events that were lost
// because the outbox was full.
const GapKind = "gap"

func (l Limits) orDefaults() Limits {
	return Limits{cmp.Or(l.Events, DefaultOutboxEvents), cmp.Or(l.Bytes, DefaultOutboxBytes)}
}

func (l Limits) check() error {
	if l.Events < 2 {
		return fmt.Errorf("outbox events: %d is below 2", l.Events)
	}
	if l.Bytes < 2*MaxEvent {
		return fmt.Errorf("outbox bytes: %d is below %d", l.Bytes, 2*MaxEvent)
	}
	return nil
}

// OutboxID names this outbox; it is made with the file and never changes.
func (s *Store) OutboxID() string { return s.outboxID }

// Append stores a copy of e with the next sequence, and gives that sequence.
// Without a time, e gets the present one. Where the outbox is full, the
// oldest events are lost to a "gap" event: its sequence is that of the last
// lost one, and its message says from which to which.
func (s *Store) Append(ctx context.Context, e *dunlinv1.Event) (uint64, error) {
	e = stamped(e)
	err := s.tx(ctx, "append event", func(tx *sql.Tx) error {
		m, err := readMeta(ctx, tx)
		if err != nil {
			return err
		}
		e.Sequence = m.last + 1
		m.last++
		if err := m.insert(ctx, tx, e.Sequence, e); err != nil {
			return err
		}
		for m.events > s.limits.Events || m.bytes > s.limits.Bytes {
			if err := m.collapse(ctx, tx, e.At); err != nil {
				return err
			}
		}
		return m.write(ctx, tx)
	})
	return e.Sequence, err
}

// Pending gives the oldest events that are not acknowledged, in order: at
// most limit, and no more than fit into one message.
func (s *Store) Pending(ctx context.Context, limit int) ([]*dunlinv1.Event, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT event FROM outbox ORDER BY sequence LIMIT ?`, max(limit, 0))
	if err != nil {
		return nil, fmt.Errorf("read outbox: %w", err)
	}
	defer rows.Close()
	var events []*dunlinv1.Event
	size := 0
	for rows.Next() {
		var b sql.RawBytes
		if err := rows.Scan(&b); err != nil {
			return nil, fmt.Errorf("read outbox: %w", err)
		}
		if size += len(b) + 8; size > MaxBatchBytes { // 8: tag and length of an event in its batch
			break
		}
		e := new(dunlinv1.Event)
		if err := proto.Unmarshal(b, e); err != nil {
			return nil, fmt.Errorf("read outbox: event after %d others: %w", len(events), err)
		}
		events = append(events, e)
	}
	return events, wrap("read outbox", rows.Err())
}

// Ack forgets the events up to and including sequence. One for another
// outbox, or for a sequence that was never given, is refused and changes
// nothing.
func (s *Store) Ack(ctx context.Context, outboxID string, sequence uint64) error {
	if outboxID != s.outboxID {
		return fmt.Errorf("acknowledge events: outbox %q is not this one (%s)", outboxID, s.outboxID)
	}
	return s.tx(ctx, "acknowledge events", func(tx *sql.Tx) error {
		m, err := readMeta(ctx, tx)
		if err != nil {
			return err
		}
		if sequence > m.last {
			return fmt.Errorf("sequence %d was never given, the last is %d", sequence, m.last)
		}
		if err := m.remove(ctx, tx, sequence); err != nil {
			return err
		}
		// A gap that grew since the events were sent has only lost those after
		// the acknowledged ones.
		gap, err := readRow(ctx, tx)
		if err != nil {
			return err
		}
		if gap != nil && gap.first < gap.event.Sequence && gap.first <= sequence {
			if err := m.remove(ctx, tx, gap.event.Sequence); err != nil {
				return err
			}
			if err := m.insert(ctx, tx, sequence+1, gapEvent(sequence+1, gap.event.Sequence, gap.event.At)); err != nil {
				return err
			}
		}
		return m.write(ctx, tx)
	})
}

func gapEvent(first, last uint64, at *timestamppb.Timestamp) *dunlinv1.Event {
	return &dunlinv1.Event{
		Sequence: last, At: at, Kind: GapKind, Severity: dunlinv1.Severity_SEVERITY_WARNING,
		Message: fmt.Sprintf("events %d to %d were lost: the outbox was full", first, last),
	}
}

// meta is the row of outbox_meta, changed in memory and written back at the
// end of the transaction.
type meta struct {
	last   uint64
	events int
	bytes  int64
}

func readMeta(ctx context.Context, tx *sql.Tx) (*meta, error) {
	var m meta
	var last int64
	err := tx.QueryRowContext(ctx, `SELECT last, events, bytes FROM outbox_meta`).Scan(&last, &m.events, &m.bytes)
	m.last = uint64(last)
	return &m, err
}

func (m *meta) write(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, `UPDATE outbox_meta SET last = ?, events = ?, bytes = ?`, int64(m.last), m.events, m.bytes)
	return err
}

func (m *meta) insert(ctx context.Context, tx *sql.Tx, first uint64, e *dunlinv1.Event) error {
	b, err := encodeEvent(e)
	if err != nil {
		return err
	}
	m.events++
	m.bytes += int64(len(b))
	_, err = tx.ExecContext(ctx, `INSERT INTO outbox VALUES (?, ?, ?)`, int64(e.Sequence), int64(first), b)
	return err
}

// remove deletes all rows up to and including sequence.
func (m *meta) remove(ctx context.Context, tx *sql.Tx, sequence uint64) error {
	var events int
	var bytes int64
	err := tx.QueryRowContext(ctx, `SELECT count(*), coalesce(sum(length(event)), 0) FROM outbox WHERE sequence <= ?`, int64(sequence)).
		Scan(&events, &bytes)
	if err != nil {
		return err
	}
	m.events -= events
	m.bytes -= bytes
	_, err = tx.ExecContext(ctx, `DELETE FROM outbox WHERE sequence <= ?`, int64(sequence))
	return err
}

// collapse puts one gap in place of the two oldest events, the older of which
// may be a gap already. An outbox over its limits has at least two: no event
// is larger than half of them.
func (m *meta) collapse(ctx context.Context, tx *sql.Tx, at *timestamppb.Timestamp) error {
	oldest, err := readRow(ctx, tx)
	if err != nil {
		return err
	}
	var last int64
	if err := tx.QueryRowContext(ctx, `SELECT sequence FROM outbox ORDER BY sequence LIMIT 1 OFFSET 1`).Scan(&last); err != nil {
		return err
	}
	if err := m.remove(ctx, tx, uint64(last)); err != nil {
		return err
	}
	return m.insert(ctx, tx, oldest.first, gapEvent(oldest.first, uint64(last), at))
}

type row struct {
	first uint64
	event *dunlinv1.Event
}

// readRow gives the oldest row, or nil where there is none.
func readRow(ctx context.Context, tx *sql.Tx) (*row, error) {
	var first int64
	var b []byte
	err := tx.QueryRowContext(ctx, `SELECT first, event FROM outbox ORDER BY sequence LIMIT 1`).Scan(&first, &b)
	if err == sql.ErrNoRows {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := &row{first: uint64(first), event: new(dunlinv1.Event)}
	if err := proto.Unmarshal(b, r.event); err != nil {
		return nil, fmt.Errorf("outbox: oldest event: %w", err)
	}
	return r, nil
}

// stamped gives a copy of an event as the outbox keeps it.
func stamped(e *dunlinv1.Event) *dunlinv1.Event {
	e = proto.CloneOf(e)
	if len(e.Message) > MaxMessage {
		e.Message = strings.ToValidUTF8(e.Message[:MaxMessage-len("...")], "") + "..."
	}
	if e.At == nil {
		e.At = timestamppb.Now()
	}
	return e
}

func encodeEvent(e *dunlinv1.Event) ([]byte, error) {
	b, err := proto.Marshal(e)
	if err == nil && len(b) > MaxEvent {
		err = fmt.Errorf("event %q has %d bytes, allowed are %d", e.Kind, len(b), MaxEvent)
	}
	return b, err
}
