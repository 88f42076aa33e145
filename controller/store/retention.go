package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// pruneStep bounds the records that are forgotten in one transaction.
const pruneStep = 5000

// PruneEvents forgets events that came before a time, a bounded part of them
// in one call; again says whether there are more. What is known of outboxes
// stays, so none comes again.
func (s *Store) PruneEvents(ctx context.Context, before time.Time) (again bool, err error) {
	var old int
	err = s.reader.QueryRowContext(ctx, "SELECT count(*) FROM (SELECT 1 FROM events WHERE received_at < ? LIMIT ?)", before.UnixNano(), pruneStep+1).Scan(&old)
	if err != nil || old == 0 {
		return false, err
	}
	err = s.write(ctx, "prune events", func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE received_at < ? ORDER BY received_at LIMIT ?)", before.UnixNano(), pruneStep)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("forget events: %w", err)
	}
	return old > pruneStep, nil
}

// PruneAudit forgets the audit records before the first one of a time or
// later, a bounded part of them in one call; again says whether there are
// more. The last of them becomes the anchor.
func (s *Store) PruneAudit(ctx context.Context, before time.Time) (again bool, err error) {
	var first, last sql.Null[uint64]
	// The times of records need not rise: only what is before all younger ones
	// goes, so that the chain stays whole.
	err = s.reader.QueryRowContext(ctx, `SELECT (SELECT min(number) FROM audit_log),
		coalesce((SELECT min(number) FROM audit_log WHERE at >= ?), (SELECT max(number) FROM audit_log)) - 1`, before.UnixNano()).Scan(&first, &last)
	if err != nil || !first.Valid || last.V < first.V {
		return false, err
	}
	until := min(last.V, first.V+pruneStep-1)
	err = s.write(ctx, "prune audit", func(tx *sql.Tx) error { return forgetAudit(ctx, tx, until) })
	if err != nil {
		return false, fmt.Errorf("forget audit records: %w", err)
	}
	return until < last.V, nil
}
