package state

import (
	"context"
	"database/sql"
)

// keptDays is for how many days there is traffic: those of this month and of
// the one before.
const keptDays = 62

// Traffic gives the bytes that have travelled on the days that begin with a
// text: one day, "2006-01-02", or those of a month, "2006-01".
func (s *Store) Traffic(ctx context.Context, days string) (int64, error) {
	var n int64
	err := s.db.QueryRowContext(ctx, `SELECT coalesce(sum(bytes), 0) FROM traffic WHERE substr(day, 1, length(?1)) = ?1`, days).Scan(&n)
	return n, wrap("read traffic", err)
}

// AddTraffic adds to the bytes of a day. The oldest days are forgotten.
func (s *Store) AddTraffic(ctx context.Context, day string, bytes int64) error {
	return s.tx(ctx, "store traffic", func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `INSERT INTO traffic VALUES (?, ?) ON CONFLICT (day) DO UPDATE SET bytes = bytes + excluded.bytes`, day, bytes); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM traffic WHERE day NOT IN (SELECT day FROM traffic ORDER BY day DESC LIMIT ?)`, keptDays)
		return err
	})
}
