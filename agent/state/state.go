// Package state keeps what an agent must know after a crash in one SQLite
// file: its identity, the last desired document, the state of each model
// version, whose signatures count, and the outbox of events.
package state

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// MaxDocument bounds a desired document; a larger one is refused.
const MaxDocument = 1 << 20

// ErrNone is the error of asking for what has not been stored yet.
var ErrNone = errors.New("not stored")

// Store is an open state file. Its methods may be called concurrently; each
// is one transaction, on disk when it returns.
type Store struct {
	db       *sql.DB
	outboxID string
	limits   Limits
}

// Limits bound the outbox. Where an event would exceed one, the oldest events
// collapse into one "gap" event.
type Limits struct {
	Events int   // 0: DefaultOutboxEvents
	Bytes  int64 // 0: DefaultOutboxBytes
}

// Identity is who the agent is, and whom it talks to.
type Identity struct {
	Device        string
	ControllerURL string
	BrokerURL     string
	RegistryURL   string
	// Certificates is the device's own and those up to a root, and Roots the
	// controller's authorities, in DER one after another; empty until the
	// device has joined.
	Certificates, Roots []byte
}

// Desired is the newest desired document that the agent has accepted.
type Desired struct {
	Incarnation string
	Number      uint64
	SHA256      []byte
	Document    []byte // an encoded dunlinv1.DesiredDocument
}

// Version is what the agent knows of one model version.
type Version struct {
	Model   string
	Version int64
	Digest  string
	State   dunlinv1.VersionState
	Reason  string
	Since   time.Time
	// LastGood marks the version of its model that has proven itself last;
	// at most one of a model has it.
	LastGood bool
	// Admitted says that its bundle's signatures have been verified.
	Admitted bool
	// Signatures are the digests of the manifests of its signatures, for another
	// time.
	Signatures []string
	// Trials is in how many starts of the agent it began a probation that it has
	// not come to the end of.
	Trials int
	// Resumes says that the agent ended as it was asked to while the version was
	// on probation: it serves first at the next start.
	Resumes bool
	// Reverted says that the device went back from it, and will not try it again
	// by itself.
	Reverted bool
}

// Open opens the state file at path, and creates it (mode 0600) where there
// is none. It brings older files up to date and refuses those of a newer
// program.
func Open(ctx context.Context, path string, limits Limits) (*Store, error) {
	s, err := open(ctx, path, limits.orDefaults())
	if err != nil {
		return nil, fmt.Errorf("open state %s: %w", path, err)
	}
	return s, nil
}

func open(ctx context.Context, path string, limits Limits) (*Store, error) {
	if err := limits.check(); err != nil {
		return nil, err
	}
	// SQLite gives its other files (-wal, -shm) the mode of the first.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = f.Chmod(0o600)
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", dataSource(path))
	if err != nil {
		return nil, err
	}
	// One connection: SQLite has one writer anyway, and each connection has
	// caches of its own.
	db.SetMaxOpenConns(1)
	s := &Store{db: db, limits: limits}
	if err := s.migrate(ctx); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if err := db.QueryRowContext(ctx, `SELECT id FROM outbox_meta`).Scan(&s.outboxID); err != nil {
		return nil, errors.Join(fmt.Errorf("read outbox id: %w", err), db.Close())
	}
	return s, nil
}

// Close closes the file. It may be called again.
func (s *Store) Close() error { return s.db.Close() }

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Identity gives the stored identity, or ErrNone.
func (s *Store) Identity(ctx context.Context) (Identity, error) {
	var i Identity
	err := s.db.QueryRowContext(ctx, `SELECT device, controller_url, broker_url, registry_url, certificates, roots FROM identity`).
		Scan(&i.Device, &i.ControllerURL, &i.BrokerURL, &i.RegistryURL, &i.Certificates, &i.Roots)
	return i, none("identity", err)
}

// SetIdentity stores the identity in place of an earlier one.
func (s *Store) SetIdentity(ctx context.Context, i Identity) error {
	_, err := s.db.ExecContext(ctx, `INSERT OR REPLACE INTO identity (one, device, controller_url, broker_url, registry_url, certificates, roots) VALUES (1, ?, ?, ?, ?, ?, ?)`,
		i.Device, i.ControllerURL, i.BrokerURL, i.RegistryURL, append([]byte{}, i.Certificates...), append([]byte{}, i.Roots...))
	return wrap("store identity", err)
}

// Clock is what the device knows of the time.
type Clock struct {
	Answered time.Time // the last time that the controller said
	Seen     time.Time // the last time by the device's own clock
}

// Clock gives the stored times; zero ones where there are none.
func (s *Store) Clock(ctx context.Context) (Clock, error) {
	var answered, seen int64
	err := s.db.QueryRowContext(ctx, `SELECT answered, seen FROM clock`).Scan(&answered, &seen)
	if errors.Is(err, sql.ErrNoRows) {
		return Clock{}, nil
	}
	return Clock{time.Unix(0, answered).UTC(), time.Unix(0, seen).UTC()}, wrap("read clock", err)
}

// SetClock stores the times in place of earlier ones.
func (s *Store) SetClock(ctx context.Context, c Clock) error {
	_, err := s.db.ExecContext(ctx, `INSERT OR REPLACE INTO clock VALUES (1, ?, ?)`, c.Answered.UnixNano(), c.Seen.UnixNano())
	return wrap("store clock", err)
}

// StoodDown says until when the agent does not talk to the controller, and
// why; the zero time where it does.
func (s *Store) StoodDown(ctx context.Context) (until time.Time, cause string, err error) {
	var nanoseconds int64
	err = s.db.QueryRowContext(ctx, `SELECT until, cause FROM stood_down`).Scan(&nanoseconds, &cause)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, "", nil
	}
	return time.Unix(0, nanoseconds).UTC(), cause, wrap("read stood_down", err)
}

// SetStoodDown stores what StoodDown gives.
func (s *Store) SetStoodDown(ctx context.Context, until time.Time, cause string) error {
	if until.IsZero() {
		_, err := s.db.ExecContext(ctx, `DELETE FROM stood_down`)
		return wrap("store stood_down", err)
	}
	_, err := s.db.ExecContext(ctx, `INSERT OR REPLACE INTO stood_down VALUES (1, ?, ?)`, until.UnixNano(), cause)
	return wrap("store stood_down", err)
}

// Desired gives the stored desired document, or ErrNone.
func (s *Store) Desired(ctx context.Context) (Desired, error) {
	var d Desired
	var number int64
	err := s.db.QueryRowContext(ctx, `SELECT incarnation, number, sha256, document FROM desired`).
		Scan(&d.Incarnation, &number, &d.SHA256, &d.Document)
	d.Number = uint64(number)
	return d, none("desired document", err)
}

func (d *Desired) check() error {
	if len(d.Document) > MaxDocument {
		return fmt.Errorf("store desired document: has %d bytes, allowed are %d", len(d.Document), MaxDocument)
	}
	return nil
}

// SetDesired stores the document in place of an earlier one. Which of two is
// newer is the caller's to decide.
func (s *Store) SetDesired(ctx context.Context, d Desired) error {
	if err := d.check(); err != nil {
		return err
	}
	document := d.Document
	if document == nil {
		document = []byte{} // an empty document, not NULL
	}
	_, err := s.db.ExecContext(ctx, `INSERT OR REPLACE INTO desired VALUES (1, ?, ?, ?, ?)`,
		d.Incarnation, int64(d.Number), d.SHA256, document)
	return wrap("store desired document", err)
}

// Versions gives all stored versions, by model and version.
func (s *Store) Versions(ctx context.Context) ([]Version, error) {
	rows, err := s.db.QueryContext(ctx,
		`SELECT model, version, digest, state, reason, since, last_good, admitted, trials, resumes, reverted, signatures FROM versions ORDER BY model, version`)
	if err != nil {
		return nil, fmt.Errorf("read versions: %w", err)
	}
	defer rows.Close()
	var versions []Version
	for rows.Next() {
		var v Version
		var since int64
		var signatures string
		if err := rows.Scan(&v.Model, &v.Version, &v.Digest, &v.State, &v.Reason, &since, &v.LastGood, &v.Admitted, &v.Trials, &v.Resumes, &v.Reverted, &signatures); err != nil {
			return nil, fmt.Errorf("read versions: %w", err)
		}
		if signatures != "" {
			v.Signatures = strings.Split(signatures, " ")
		}
		v.Since = time.Unix(0, since).UTC()
		versions = append(versions, v)
	}
	return versions, wrap("read versions", rows.Err())
}

// PutVersion stores v in place of what was known of the same model and
// version. With LastGood set, no other version of the model keeps it.
func (s *Store) PutVersion(ctx context.Context, v Version) error {
	return s.tx(ctx, fmt.Sprintf("store version %s:%d", v.Model, v.Version), func(tx *sql.Tx) error {
		if v.LastGood {
			if _, err := tx.ExecContext(ctx, `UPDATE versions SET last_good = 0 WHERE model = ?`, v.Model); err != nil {
				return err
			}
		}
		_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO versions (model, version, digest, state, reason, since, last_good, admitted, trials, resumes, reverted, signatures) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			v.Model, v.Version, v.Digest, int32(v.State), v.Reason, v.Since.UnixNano(), v.LastGood, v.Admitted, v.Trials, v.Resumes, v.Reverted, strings.Join(v.Signatures, " "))
		return err
	})
}

// DeleteVersion forgets a version; one that is not stored is no error.
func (s *Store) DeleteVersion(ctx context.Context, model string, version int64) error {
	_, err := s.db.ExecContext(ctx, `DELETE FROM versions WHERE model = ? AND version = ?`, model, version)
	return wrap(fmt.Sprintf("delete version %s:%d", model, version), err)
}

// tx runs f in one transaction.
func (s *Store) tx(ctx context.Context, what string, f func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return wrap(what, err)
	}
	if err := f(tx); err != nil {
		tx.Rollback() // the transaction is lost either way; err says why
		return wrap(what, err)
	}
	return wrap(what, tx.Commit())
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

func none(what string, err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNone
	}
	return wrap("read "+what, err)
}
