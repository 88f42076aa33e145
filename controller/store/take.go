package store

import (
	"context"
	"database/sql"
	"errors"
	"slices"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The statements that each message of a device needs are prepared once.
const (
	helloQuery  = "SELECT own_labels, session, info FROM devices WHERE name = ?"
	helloUpdate = `UPDATE devices SET connected = 1, last_heard_at = ?, own_labels = ?, session = ?,
		report_number = CASE WHEN session = ? THEN report_number ELSE 0 END,
		info = CASE WHEN ? > 0 THEN ? ELSE info END, trust_version = ?, root_ids = ? WHERE name = ?`
	deviceQuery  = selectDevices + "WHERE name = ?"
	reportUpdate = `UPDATE devices SET connected = 1, last_heard_at = ?, reported = ?, report_number = ?
		WHERE name = ? AND session = ? AND report_number < ?`
	goneUpdate  = "UPDATE devices SET connected = 0, last_heard_at = ? WHERE name = ? AND session = ? AND connected = 1"
	outboxQuery = `SELECT EXISTS (SELECT 1 FROM devices WHERE name = ?1), EXISTS (SELECT 1 FROM outboxes WHERE device = ?1 AND outbox = ?2),
		EXISTS (SELECT 1 FROM outboxes WHERE device = ?1 AND outbox = ?2 AND restored = 1),
		coalesce((SELECT last_sequence FROM outboxes WHERE device = ?1 AND outbox = ?2), (SELECT max(sequence) FROM events WHERE device = ?1 AND outbox = ?2))`
	eventInsert = "INSERT INTO events (device, outbox, sequence, received_at, event) VALUES (?, ?, ?, ?, ?)"
	outboxPut   = `INSERT INTO outboxes (device, outbox, last_sequence, heard_at) VALUES (?, ?, ?, ?)
		ON CONFLICT (device, outbox) DO UPDATE SET last_sequence = excluded.last_sequence, heard_at = excluded.heard_at, restored = 0`
	desiredQuery = "SELECT EXISTS (SELECT 1 FROM devices WHERE name = ?1), EXISTS (SELECT 1 FROM desired WHERE device = ?1 AND sha256 = ?2)"
	desiredPut   = `INSERT INTO desired (device, number, sha256, document) VALUES (?, ?, ?, ?)
		ON CONFLICT (device) DO UPDATE SET number = excluded.number, sha256 = excluded.sha256, document = excluded.document`
	partPut = `INSERT INTO rollout_devices (rollout, device, phase, reason, bytes_present, bytes_total, detail) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (rollout, device) DO UPDATE SET phase = excluded.phase, reason = excluded.reason, bytes_present = excluded.bytes_present,
		bytes_total = excluded.bytes_total, detail = excluded.detail`
)

// prepare prepares them for the writer's connection. One that the schema does
// not know fails where it is used.
func (s *Store) prepare(ctx context.Context) {
	s.statements = map[string]*sql.Stmt{}
	for _, query := range []string{helloQuery, helloUpdate, deviceQuery, reportUpdate, goneUpdate, outboxQuery, eventInsert, outboxPut, desiredQuery, desiredPut, partPut} {
		if stmt, err := s.writer.PrepareContext(ctx, query); err == nil {
			s.statements[query] = stmt
		}
	}
}

// statement is a query in a transaction.
type statement interface {
	ExecContext(ctx context.Context, args ...any) (sql.Result, error)
	QueryRowContext(ctx context.Context, args ...any) *sql.Row
}

// prepared gives one of the prepared statements for a transaction that writes.
func (s *Store) prepared(ctx context.Context, tx *sql.Tx, query string) statement {
	if stmt := s.statements[query]; stmt != nil {
		return tx.StmtContext(ctx, stmt)
	}
	return unprepared{tx, query}
}

type unprepared struct {
	tx    *sql.Tx
	query string
}

func (u unprepared) ExecContext(ctx context.Context, args ...any) (sql.Result, error) {
	return u.tx.ExecContext(ctx, u.query, args...)
}

func (u unprepared) QueryRowContext(ctx context.Context, args ...any) *sql.Row {
	return u.tx.QueryRowContext(ctx, u.query, args...)
}

// Inbound is what a device sent: exactly one of its pointers is set.
type Inbound struct {
	Device string
	Hello  *dunlinv1.Hello
	Report *dunlinv1.Reported
	Events *dunlinv1.EventBatch
	Gone   *dunlinv1.Gone
}

// Taken is what came of an Inbound.
type Taken struct {
	Err      error // as Hello, Report, AddEvents or Gone give it
	Device   *Device
	Changed  bool
	Stored   uint64
	Measured bool
}

// Take takes in what devices sent, in order, in one transaction: when it
// gives no error, each message without an error of its own is kept, as Hello,
// Report, AddEvents and Gone keep it. A message that fails otherwise than with
// ErrNotFound or ErrStale fails alone.
func (s *Store) Take(ctx context.Context, in []Inbound) (taken []Taken, err error) {
	if len(in) == 1 {
		t, err := s.takeAlone(ctx, in[0])
		return []Taken{t}, err
	}
	taken = make([]Taken, len(in))
	superseded := supersededReports(in)
	// A statement that is bound to a context costs as much again.
	inner := context.WithoutCancel(ctx)
	err = s.write(ctx, "take", func(tx *sql.Tx) error {
		for i, m := range in {
			if superseded[i] > 0 {
				continue
			}
			taken[i] = s.take(inner, tx, m)
			if err := taken[i].Err; err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrStale) {
				return errAlone
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		for i, by := range slices.Backward(superseded) {
			if by > 0 {
				taken[i].Err = taken[by].Err
			}
		}
		return nil
	})
	if errors.Is(err, errAlone) {
		for i, m := range in {
			if taken[i], err = s.takeAlone(ctx, m); err != nil {
				taken[i] = Taken{Err: err}
			}
		}
		return taken, ctx.Err()
	}
	return taken, err
}

var errAlone = errors.New("to be taken in one by one")

func (s *Store) takeAlone(ctx context.Context, m Inbound) (t Taken, err error) {
	err = s.write(ctx, m.step(), func(tx *sql.Tx) error {
		t = s.take(ctx, tx, m)
		return t.Err
	})
	if t.Err != nil {
		return t, nil
	}
	return t, err
}

func (m Inbound) step() string {
	switch {
	case m.Hello != nil:
		return "hello"
	case m.Report != nil:
		return "report"
	case m.Events != nil:
		return "events"
	}
	return "gone"
}

func (s *Store) take(ctx context.Context, tx *sql.Tx, m Inbound) (t Taken) {
	switch {
	case m.Hello != nil:
		t.Device, t.Changed, t.Err = s.hello(ctx, tx, m.Device, m.Hello)
	case m.Report != nil:
		t.Err = s.report(ctx, tx, m.Device, m.Report)
	case m.Events != nil:
		t.Stored, t.Measured, t.Err = s.addEvents(ctx, tx, m.Device, m.Events.GetOutboxId(), m.Events.GetEvents())
	default:
		t.Err = s.gone(ctx, tx, m.Device, m.Gone.GetSession())
	}
	return t
}

// supersededReports says which reports need not be written: a later one of the
// same session, of which it gives the position, takes their place in the same
// transaction. 0: they need.
func supersededReports(in []Inbound) []int {
	superseded := make([]int, len(in))
	last := make(map[string]int, len(in)) // by device, where nothing begins or ends a session after it
	for i, m := range in {
		switch {
		case m.Hello != nil, m.Gone != nil:
			delete(last, m.Device)
		case m.Report != nil:
			if j, ok := last[m.Device]; ok && in[j].Report.GetSession() == m.Report.GetSession() && in[j].Report.GetSequence() < m.Report.GetSequence() {
				superseded[j] = i
			}
			last[m.Device] = i
		}
	}
	return superseded
}
