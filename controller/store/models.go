package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/dunlin/dunlin/controller/fleet"
)

// Version is an immutable version of a model.
type Version struct {
	Model     string
	Version   int64
	Digest    string // of the bundle's manifest
	Source    string // digest of what was pushed, where the bundle was made from it; else empty
	Size      int64  // of the bundle's files
	Inputs    []string
	Outputs   []string
	Opset     int64
	Bundle    *fleet.Bundle // nil: not kept
	CreatedAt time.Time
	CreatedBy string
}

// Fleet gives what plans look at.
func (v *Version) Fleet() fleet.Version {
	f := fleet.Version{Model: v.Model, Version: v.Version, Digest: v.Digest, SizeBytes: uint64(max(v.Size, 0)), Bundle: v.Bundle}
	if v.Bundle != nil && v.Bundle.Release != nil {
		f.AgentVersion = v.Bundle.Release.Version
	}
	return f
}

// VersionExistsError says that a version exists with other bytes. It is an ErrExists.
type VersionExistsError struct {
	Model   string
	Version int64
	Digest  string // of what it is
}

func (e *VersionExistsError) Error() string {
	return fmt.Sprintf("model %s has version %d already, with digest %s: a version is immutable", e.Model, e.Version, e.Digest)
}

// Is says that the error is an ErrExists.
func (e *VersionExistsError) Is(target error) bool { return target == ErrExists }

const selectVersions = "SELECT model, version, digest, coalesce(source, ''), size, inputs, outputs, opset, bundle, created_at, created_by FROM versions "

func scanVersion(scan func(...any) error) (v Version, err error) {
	var inputs, outputs string
	var bundle sql.Null[string]
	var created int64
	if err := scan(&v.Model, &v.Version, &v.Digest, &v.Source, &v.Size, &inputs, &outputs, &v.Opset, &bundle, &created, &v.CreatedBy); err != nil {
		return v, err
	}
	v.CreatedAt = instant(created)
	if bundle.Valid {
		v.Bundle = &fleet.Bundle{}
		if err := fromJSON(bundle.V, v.Bundle); err != nil {
			return v, err
		}
	}
	return v, errors.Join(fromJSON(inputs, &v.Inputs), fromJSON(outputs, &v.Outputs))
}

// CreateVersion makes v a version of its model: v.Version, or the next one
// where that is 0. The same digest or source again gives the version that it
// has, whichever was asked for. A v.Version that has other bytes is a
// *VersionExistsError.
func (s *Store) CreateVersion(ctx context.Context, v Version) (made Version, created bool, err error) {
	err = s.write(ctx, "version", func(tx *sql.Tx) error {
		taken, err := scanVersion(tx.QueryRowContext(ctx, selectVersions+"WHERE model = ? AND version = ?", v.Model, v.Version).Scan)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		exists := err == nil
		have, err := scanVersion(tx.QueryRowContext(ctx, selectVersions+"WHERE model = ? AND (digest IN (?, ?) OR source IN (?, ?)) ORDER BY version LIMIT 1",
			v.Model, v.Digest, v.Source, v.Digest, v.Source).Scan)
		switch {
		case err != nil && !errors.Is(err, sql.ErrNoRows):
			return err
		case exists && (err != nil || taken.Version != have.Version):
			return &VersionExistsError{Model: v.Model, Version: v.Version, Digest: taken.Digest}
		case err == nil:
			made = have
			return nil
		}
		if v.Version == 0 {
			if err := tx.QueryRowContext(ctx, "SELECT coalesce(max(version), 0) + 1 FROM versions WHERE model = ?", v.Model).Scan(&v.Version); err != nil {
				return err
			}
		}
		v.CreatedAt = s.now().UTC()
		bundle := sql.Null[string]{Valid: v.Bundle != nil}
		if bundle.Valid {
			bundle.V = jsonText(v.Bundle)
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO versions (model, version, digest, source, size, inputs, outputs, opset, bundle, created_at, created_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
			v.Model, v.Version, v.Digest, sql.Null[string]{V: v.Source, Valid: v.Source != ""}, v.Size, jsonText(v.Inputs), jsonText(v.Outputs), v.Opset, bundle, nanos(v.CreatedAt), v.CreatedBy); err != nil {
			return fmt.Errorf("add version %d of model %s: %w", v.Version, v.Model, err)
		}
		made, created = v, true
		return s.audit(ctx, tx, AuditRecord{Who: v.CreatedBy, Action: "version.create", Object: fmt.Sprintf("model/%s:%d", v.Model, v.Version), After: v.Digest})
	})
	if err != nil {
		return Version{}, false, err
	}
	return made, created, nil
}

// Version gives one version, or ErrNotFound.
func (s *Store) Version(ctx context.Context, model string, version int64) (Version, error) {
	v, err := scanVersion(s.reader.QueryRowContext(ctx, selectVersions+"WHERE model = ? AND version = ?", model, version).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return v, fmt.Errorf("version %d of model %s: %w", version, model, ErrNotFound)
	}
	return v, err
}

// Versions gives the versions of a model, or of all where model is empty, by
// model, then version.
func (s *Store) Versions(ctx context.Context, model string) (versions []Version, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, selectVersions+"WHERE ? IN ('', model) ORDER BY model, version", []any{model}, func(scan func(...any) error) error {
			v, err := scanVersion(scan)
			versions = append(versions, v)
			return err
		})
	})
	return versions, err
}
