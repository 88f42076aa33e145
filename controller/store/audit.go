package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/audit"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of the audit log.
const (
	// MaxAudit bounds the audit records that are kept; beyond it the oldest are
	// forgotten, and the hash of the last of them is kept as the anchor.
	MaxAudit = 100_000
	// maxAuditText bounds what was before and after, in bytes; a longer text is
	// cut and its SHA-256 named. maxAuditName does so for the other texts.
	maxAuditText = 64 << 10
	maxAuditName = 1 << 10
	// maxAuditPage bounds the texts of one page, in bytes, but for its first
	// record.
	maxAuditPage = 4 << 20
)

// auditAnchor is the key in meta of the last record that was forgotten.
const auditAnchor = "audit_anchor"

// AuditRecord is one change, or one refusal, and who made it. The action is a
// dotted lower-case name, the object KIND/NAME. No field may hold a secret.
type AuditRecord struct {
	At                  time.Time // zero: now
	Who, Action, Object string
	Before, After       string
	Refused             bool
	Reason              string
	From                string // host:port; empty: that of the caller in the context
	Count               uint64 // like refusals; 0 is 1
}

// audit writes a record in the transaction of the change that it is of.
func (s *Store) audit(ctx context.Context, tx *sql.Tx, r AuditRecord) error {
	if r.From == "" {
		r.From = identity.FromContext(ctx).From
	}
	if r.At.IsZero() {
		r.At = s.now()
	}
	anchor, head, err := auditEnds(ctx, tx)
	if err == nil {
		head, err = appendAudit(ctx, tx, head, r)
	}
	if err == nil && head.Number > MaxAudit+anchor.Number {
		err = forgetAudit(ctx, tx, head.Number-MaxAudit)
	}
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return nil
}

// auditEnds gives the points before the oldest and at the newest record.
func auditEnds(ctx context.Context, tx *sql.Tx) (anchor, head audit.Point, err error) {
	var text string
	err = tx.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = ?", auditAnchor).Scan(&text)
	if err == nil {
		anchor, err = audit.ParsePoint(text)
	} else if errors.Is(err, sql.ErrNoRows) { // none has been forgotten
		err = nil
	}
	if err != nil {
		return anchor, head, err
	}
	head, err = auditPoint(tx.QueryRowContext(ctx, "SELECT number, hash FROM audit_log ORDER BY number DESC LIMIT 1"))
	if errors.Is(err, sql.ErrNoRows) {
		return anchor, anchor, nil
	}
	return anchor, head, err
}

func auditPoint(row *sql.Row) (p audit.Point, err error) {
	var hash []byte
	err = row.Scan(&p.Number, &hash)
	copy(p.Hash[:], hash)
	return p, err
}

// appendAudit writes the record after head and gives the new head.
func appendAudit(ctx context.Context, tx *sql.Tx, head audit.Point, r AuditRecord) (audit.Point, error) {
	m := &dunlinv1.AuditRecord{
		Number: head.Number + 1, At: auditTime(r.At.UnixNano()), Refused: r.Refused, Count: max(r.Count, 1),
		Who: cut(r.Who, maxAuditName), Action: cut(r.Action, maxAuditName), Object: cut(r.Object, maxAuditName), Reason: cut(r.Reason, maxAuditName), From: cut(r.From, maxAuditName),
		Before: cut(r.Before, maxAuditText), After: cut(r.After, maxAuditText),
	}
	head = audit.Point{Number: m.Number, Hash: audit.Hash(head.Hash, m)}
	_, err := tx.ExecContext(ctx, "INSERT INTO audit_log (number, at, who, action, object, refused, before, after, reason, source, count, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
		m.Number, r.At.UnixNano(), m.Who, m.Action, m.Object, m.Refused, m.Before, m.After, m.Reason, m.From, m.Count, head.Hash[:])
	return head, err
}

// forgetAudit forgets the records up to last, which becomes the anchor.
func forgetAudit(ctx context.Context, tx *sql.Tx, last uint64) error {
	// The record itself may have been taken away, which must not stop others.
	anchor, err := auditPoint(tx.QueryRowContext(ctx, "SELECT number, hash FROM audit_log WHERE number <= ? ORDER BY number DESC LIMIT 1", last))
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", auditAnchor, anchor.String()); err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, "DELETE FROM audit_log WHERE number <= ?", last)
	return err
}

// auditTime gives the time of a record by the nanoseconds that are kept.
func auditTime(ns int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(0, ns)) }

// cut makes a text valid UTF-8, which messages need, of at most limit bytes.
func cut(text string, limit int) string {
	if valid := strings.ToValidUTF8(text, string(utf8.RuneError)); len(valid) <= limit {
		return valid
	}
	end := fmt.Sprintf("... (cut: %d bytes with the SHA-256 %x)", len(text), sha256.Sum256([]byte(text)))
	start := strings.ToValidUTF8(text[:min(len(text), limit-len(end))], "") // its end may be half a character
	return start + end
}

// AuditPage is a part of the audit log.
type AuditPage struct {
	Records []*dunlinv1.AuditRecord // oldest first
	// Anchor is before the oldest record that is kept, Head at the newest.
	Anchor, Head audit.Point
}

var errPageFull = errors.New("the page is full")

// ListAudit gives the records after a number, at most limit and at least one
// where there is one; or, with newest, the newest.
func (s *Store) ListAudit(ctx context.Context, after uint64, limit int, newest bool) (page AuditPage, err error) {
	query := "SELECT number, at, who, action, object, refused, before, after, reason, source, count, hash FROM audit_log WHERE number > ? ORDER BY number LIMIT ?"
	if newest {
		query = strings.Replace(query, "number LIMIT", "number DESC LIMIT", 1)
		after = 0
	}
	err = s.read(ctx, func(tx *sql.Tx) error {
		var err error
		if page.Anchor, page.Head, err = auditEnds(ctx, tx); err != nil {
			return err
		}
		size := 0
		err = each(ctx, tx, query, []any{int64(min(after, 1<<62)), limit}, func(scan func(...any) error) error {
			m := &dunlinv1.AuditRecord{}
			var at int64
			if err := scan(&m.Number, &at, &m.Who, &m.Action, &m.Object, &m.Refused, &m.Before, &m.After, &m.Reason, &m.From, &m.Count, &m.Hash); err != nil {
				return err
			}
			m.At = auditTime(at)
			if size += len(m.Before) + len(m.After) + len(m.Object) + len(m.Reason); size > maxAuditPage && len(page.Records) > 0 {
				return errPageFull
			}
			page.Records = append(page.Records, m)
			return nil
		})
		if errors.Is(err, errPageFull) {
			return nil
		}
		return err
	})
	if newest {
		slices.Reverse(page.Records)
	}
	return page, err
}

// chainAudit moves the records of the table before the chain into it.
func chainAudit(ctx context.Context, tx *sql.Tx) error {
	var head audit.Point
	last := int64(-1 << 63)
	for {
		var some []AuditRecord
		err := each(ctx, tx, "SELECT id, at, who, action, object, detail FROM audit WHERE id > ? ORDER BY id LIMIT 1000", []any{last}, func(scan func(...any) error) error {
			var r AuditRecord
			var at int64
			err := scan(&last, &at, &r.Who, &r.Action, &r.Object, &r.After)
			r.At = time.Unix(0, at)
			some = append(some, r)
			return err
		})
		if err != nil {
			return err
		}
		if len(some) == 0 {
			_, err := tx.ExecContext(ctx, "DROP TABLE audit")
			return err
		}
		for _, r := range some {
			if head, err = appendAudit(ctx, tx, head, r); err != nil {
				return err
			}
		}
	}
}
