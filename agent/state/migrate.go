package state

import (
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"net/url"
)

// migrations bring a file from version i to i+1. They only ever grow at the
// end: a migration that was released is never changed.
var migrations = []string{
	`CREATE TABLE identity (
		one            INTEGER PRIMARY KEY CHECK (one = 1),
		device         TEXT NOT NULL,
		secret         TEXT NOT NULL,
		controller_url TEXT NOT NULL,
		broker_url     TEXT NOT NULL,
		registry_url   TEXT NOT NULL
	) STRICT;
	CREATE TABLE desired (
		one         INTEGER PRIMARY KEY CHECK (one = 1),
		incarnation TEXT NOT NULL,
		number      INTEGER NOT NULL,
		sha256      BLOB NOT NULL,
		document    BLOB NOT NULL
	) STRICT;
	CREATE TABLE versions (
		model     TEXT NOT NULL,
		version   INTEGER NOT NULL,
		digest    TEXT NOT NULL,
		state     INTEGER NOT NULL,
		reason    TEXT NOT NULL,
		since     INTEGER NOT NULL, -- nanoseconds since 1970
		last_good INTEGER NOT NULL,
		PRIMARY KEY (model, version)
	) STRICT, WITHOUT ROWID;
	CREATE TABLE outbox (
		sequence INTEGER PRIMARY KEY,
		first    INTEGER NOT NULL, -- below sequence only for a gap: first to sequence were lost
		event    BLOB NOT NULL
	) STRICT;
	CREATE TABLE outbox_meta (
		one    INTEGER PRIMARY KEY CHECK (one = 1),
		id     TEXT NOT NULL,
		last   INTEGER NOT NULL, -- sequence given last
		events INTEGER NOT NULL, -- rows of outbox
		bytes  INTEGER NOT NULL  -- sum of the lengths of its events
	) STRICT;`,
	// A device that had a secret joins again.
	`ALTER TABLE identity DROP COLUMN secret;
	ALTER TABLE identity ADD COLUMN certificates BLOB NOT NULL DEFAULT x''; -- DER, one after another
	ALTER TABLE identity ADD COLUMN roots BLOB NOT NULL DEFAULT x'';
	CREATE TABLE clock (
		one      INTEGER PRIMARY KEY CHECK (one = 1),
		answered INTEGER NOT NULL, -- last time that the controller said, nanoseconds since 1970
		seen     INTEGER NOT NULL  -- last time by the device's own clock
	) STRICT;
	CREATE TABLE stood_down (
		one   INTEGER PRIMARY KEY CHECK (one = 1),
		until INTEGER NOT NULL, -- nanoseconds since 1970
		cause TEXT NOT NULL
	) STRICT;
	CREATE TABLE trust (
		one     INTEGER PRIMARY KEY CHECK (one = 1),
		version INTEGER NOT NULL,
		signed  BLOB NOT NULL -- an encoded SignedTrust
	) STRICT;
	-- What is there was taken before there were signatures.
	ALTER TABLE versions ADD COLUMN admitted INTEGER NOT NULL DEFAULT 1;`,
	`CREATE TABLE traffic (
		day   TEXT PRIMARY KEY, -- "2006-01-02", in the device's zone
		bytes INTEGER NOT NULL  -- that travelled over its link
	) STRICT, WITHOUT ROWID;`,
	`ALTER TABLE versions ADD COLUMN trials INTEGER NOT NULL DEFAULT 0;
	ALTER TABLE versions ADD COLUMN resumes INTEGER NOT NULL DEFAULT 0;
	ALTER TABLE versions ADD COLUMN reverted INTEGER NOT NULL DEFAULT 0;`,
	`ALTER TABLE versions ADD COLUMN signatures TEXT NOT NULL DEFAULT ''; -- digests, a space between two`,
}

// readable is the schema version that a program must know to work with a file
// of the newest one. An agent that goes back to the release before opens the
// file that the newer one has changed: so a migration only adds, tables or
// columns with defaults to tables whose rows are written by column, and
// readable stays. Where that cannot be, readable becomes the new version, the
// release before refuses the file, and the changelog says that there is no way
// back.
const readable = 2

// cacheKiB is the size of the page cache. The tables are small and mostly
// written: a larger one would only cost memory.
const cacheKiB = 128

func dataSource(path string) string {
	q := url.Values{"_txlock": {"immediate"}}
	for _, p := range []string{
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)",
		fmt.Sprintf("cache_size(-%d)", cacheKiB), "wal_autocheckpoint(64)", "journal_size_limit(1048576)", "temp_store(FILE)",
	} {
		q.Add("_pragma", p)
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

func (s *Store) migrate(ctx context.Context) error {
	var have int
	if err := s.db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&have); err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	var from int
	if err := s.db.QueryRowContext(ctx, `PRAGMA application_id`).Scan(&from); err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if have > len(migrations) && from > 0 && from <= len(migrations) {
		return nil // a newer program has only added to it
	}
	if have > len(migrations) {
		return fmt.Errorf("has schema version %d, this program knows up to %d: start the newer dunlin-agent that wrote it", have, len(migrations))
	}
	for i := have; i < len(migrations); i++ {
		err := s.tx(ctx, fmt.Sprintf("migrate to schema version %d", i+1), func(tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, migrations[i]); err != nil {
				return err
			}
			if i == 0 {
				if _, err := tx.ExecContext(ctx, `INSERT INTO outbox_meta VALUES (1, ?, 0, 0, 0)`, rand.Text()); err != nil {
					return err
				}
			}
			_, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA user_version = %d`, i+1))
			return err
		})
		if err != nil {
			return err
		}
	}
	if from != readable {
		if _, err := s.db.ExecContext(ctx, fmt.Sprintf(`PRAGMA application_id = %d`, readable)); err != nil {
			return fmt.Errorf("write schema version: %w", err)
		}
	}
	return nil
}
