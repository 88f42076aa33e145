package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
)

// Manifest is a manifest in the registry that the store refers to.
type Manifest struct {
	Model  string
	Digest string
}

// Copied is what Copy made.
type Copied struct {
	Schema      int
	Incarnation string
	Manifests   []Manifest // by model, then digest
}

// Copy writes one state of the store at path into a new file, also while
// another process uses the store. It changes nothing there: an older schema
// stays as it is. One written by a newer version is ErrNewer.
func Copy(ctx context.Context, path, into string) (c Copied, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy store %s: %w", path, err)
		}
	}()
	db, err := openPlain(path)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", into); err != nil {
		return c, err
	}
	copied, err := openPlain(into)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, copied.Close()) }()
	if c.Schema, err = checkSchema(ctx, copied); err != nil {
		return c, err
	}
	if err := copied.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = 'incarnation'").Scan(&c.Incarnation); err != nil {
		return c, err
	}
	tx, err := copied.BeginTx(ctx, nil)
	if err != nil {
		return c, err
	}
	defer tx.Rollback()
	c.Manifests, err = manifests(ctx, tx, c.Schema)
	return c, err
}

// openPlain opens a file that exists, and changes nothing by that.
func openPlain(path string) (*sql.DB, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	q := url.Values{"mode": {"rw"}, "_pragma": {"busy_timeout(10000)"}}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: abs, RawQuery: q.Encode()}).String())
	if err == nil {
		db.SetMaxOpenConns(1)
	}
	return db, err
}

func checkSchema(ctx context.Context, db *sql.DB) (version int, err error) {
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return 0, err
	}
	if version > len(migrations) {
		return version, fmt.Errorf("schema version %d, this program knows up to %d: %w", version, len(migrations), ErrNewer)
	}
	if version < 1 {
		return version, errors.New("it is no store of a controller")
	}
	return version, nil
}

// signaturesSince is the first schema that has signatures.
const signaturesSince = 3

func manifests(ctx context.Context, tx *sql.Tx, schema int) (all []Manifest, err error) {
	query := "SELECT model, digest FROM versions UNION SELECT model, source FROM versions WHERE source IS NOT NULL"
	if schema >= signaturesSince {
		query += " UNION SELECT model, manifest FROM signatures WHERE EXISTS (SELECT 1 FROM versions WHERE versions.model = signatures.model AND versions.digest = signatures.digest)"
	}
	err = each(ctx, tx, query+" ORDER BY 1, 2", nil, func(scan func(...any) error) error {
		var m Manifest
		err := scan(&m.Model, &m.Digest)
		all = append(all, m)
		return err
	})
	return all, err
}

// Manifests gives the manifests of all versions and of their signatures, by
// model, then digest.
func (s *Store) Manifests(ctx context.Context) (all []Manifest, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		all, err = manifests(ctx, tx, len(migrations))
		return err
	})
	return all, err
}

// Restored makes the store at path, a copy of another one, ready to take that
// one's place: it is checked, brought up to date, and has a new incarnation,
// so that devices take its generations, which it counts again from where the
// copy was made, for newer than those that they have. What the other store
// acknowledged after the copy was made cannot come again: an outbox that goes
// on beyond what is known of it is taken up there once, with a gap.
func Restored(ctx context.Context, path string, o Options) (incarnation string, err error) {
	db, err := openPlain(path)
	if err != nil {
		return "", err
	}
	var found []string
	_, err = checkSchema(ctx, db)
	if err == nil {
		var rows *sql.Rows
		if rows, err = db.QueryContext(ctx, "PRAGMA integrity_check(5)"); err == nil {
			for rows.Next() {
				var line string
				err = errors.Join(err, rows.Scan(&line))
				found = append(found, line)
			}
			err = errors.Join(err, rows.Err(), rows.Close())
		}
	}
	if err = errors.Join(err, db.Close()); err != nil {
		return "", fmt.Errorf("check store: %w", err)
	}
	if len(found) != 1 || found[0] != "ok" {
		return "", fmt.Errorf("check store: it is damaged: %s", strings.Join(found, "; "))
	}
	s, err := Open(ctx, path, o)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	next := rand.Text()
	err = s.write(ctx, "restored", func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE meta SET value = ? WHERE key = 'incarnation'", next); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE outboxes SET restored = 1"); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE devices SET connected = 0"); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: "controller", Action: "store.restore", Object: "store/" + next, Before: s.incarnation, After: next})
	})
	return next, err
}
