// Package store keeps the controller's state in one SQLite file; it is the only SQL.
package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"
)

// The errors that callers branch on; what they wrap says more.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	ErrRefused  = errors.New("refused") // the caller's token or state does not allow it
	ErrLimit    = errors.New("too much for now")
	ErrStale    = errors.New("stale") // an older session or sequence
	ErrNewer    = errors.New("written by a newer version")
	ErrState    = errors.New("not possible now") // as things are
)

// Options are what a Store needs beside its file.
type Options struct {
	// OnStep, where set, is called with "before NAME" and "after NAME" around
	// the commit of each transaction that changes something.
	OnStep func(step string)
	// Now is the clock; time.Now where nil.
	Now func() time.Time
}

// Store is safe for concurrent use. Each method is one transaction: it
// happened whole when the method gives no error, and not at all otherwise.
type Store struct {
	writer      *sql.DB // one connection
	reader      *sql.DB
	incarnation string
	onStep      func(string)
	now         func() time.Time
	refusals    refusals
	statements  map[string]*sql.Stmt // of writer
	close       func() error
}

const readers = 4

// Open opens the store at path, which it makes where there is none, and
// brings an older one up to date. One written by a newer version is ErrNewer.
func Open(ctx context.Context, path string, o Options) (*Store, error) {
	if o.OnStep == nil {
		o.OnStep = func(string) {}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	// SQLite would make it readable for all.
	f, err := os.OpenFile(abs, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{onStep: o.OnStep, now: o.Now}
	if s.writer, err = sql.Open("sqlite", dsn(abs, "_txlock", "immediate")); err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	s.writer.SetMaxOpenConns(1)
	if s.reader, err = sql.Open("sqlite", dsn(abs, "_pragma", "query_only(1)")); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", path, err), s.writer.Close())
	}
	s.reader.SetMaxOpenConns(readers)
	s.close = sync.OnceValue(func() error { return errors.Join(s.reader.Close(), s.writer.Close()) })
	if err := s.migrate(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", path, err), s.Close())
	}
	s.prepare(ctx)
	return s, nil
}

func dsn(path, key, value string) string {
	q := url.Values{"_pragma": {"journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "busy_timeout(10000)"}}
	q.Add(key, value)
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

// Close is idempotent.
func (s *Store) Close() error { return s.close() }

// Incarnation is made when the store is; generations carry it.
func (s *Store) Incarnation() string { return s.incarnation }

// migrate applies the migrations that are missing, each in a transaction of
// its own with the version that it leads to.
func (s *Store) migrate(ctx context.Context) error {
	var version int
	if err := s.writer.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return fmt.Errorf("schema version %d, this program knows up to %d: %w", version, len(migrations), ErrNewer)
	}
	for v := version; v < len(migrations); v++ {
		err := s.write(ctx, "migration", func(tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, migrations[v]); err != nil {
				return err
			}
			if v == 0 {
				if _, err := tx.ExecContext(ctx, "INSERT INTO meta (key, value) VALUES ('incarnation', ?)", rand.Text()); err != nil {
					return err
				}
			}
			if more := alongside[v]; more != nil {
				if err := more(ctx, tx); err != nil {
					return err
				}
			}
			_, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", v+1))
			return err
		})
		if err != nil {
			return fmt.Errorf("migration %d: %w", v+1, err)
		}
	}
	return s.reader.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = 'incarnation'").Scan(&s.incarnation)
}

var errDryRun = errors.New("dry run")

// write runs one step in a transaction and commits it.
func (s *Store) write(ctx context.Context, step string, do func(tx *sql.Tx) error) error {
	tx, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // after a panic too; after the commit it does nothing
	if err := do(tx); err != nil {
		return err
	}
	s.onStep("before " + step)
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	s.onStep("after " + step)
	return nil
}

// read runs queries that see one state of the store.
func (s *Store) read(ctx context.Context, do func(tx *sql.Tx) error) error {
	tx, err := s.reader.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback()
	return do(tx)
}

// each calls row for every row of a query; scan reads the row's columns.
func each(ctx context.Context, tx *sql.Tx, query string, args []any, row func(scan func(...any) error) error) error {
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Times are kept as nanoseconds since 1970; 0 is the zero time.
func instant(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// jsonText keeps small values (labels, lists) in a column.
func jsonText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // maps and slices of strings
	}
	return string(b)
}

func fromJSON(text string, v any) error {
	if err := json.Unmarshal([]byte(text), v); err != nil {
		return fmt.Errorf("decode column: %w", err)
	}
	return nil
}
