package store

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/controller/fleet"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
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
// has, whichever was asked for. A v.Version that has other bytes, or had them
// before it was deleted, is a *VersionExistsError.
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
		var deleted string
		err = tx.QueryRowContext(ctx, "SELECT digest FROM deleted_versions WHERE model = ? AND version = ?", v.Model, v.Version).Scan(&deleted)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if err == nil && deleted != v.Digest {
			return &VersionExistsError{Model: v.Model, Version: v.Version, Digest: deleted}
		}
		if v.Version == 0 {
			if err := tx.QueryRowContext(ctx, "SELECT coalesce(max(version), 0) + 1 FROM (SELECT version FROM versions WHERE model = ? UNION ALL SELECT version FROM deleted_versions WHERE model = ?)", v.Model, v.Model).Scan(&v.Version); err != nil {
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

// DeleteVersion takes a version away. It is ErrState, with the reason, while
// a deployment or a route names it, the newest rollout of a deployment leads to
// it or back to it, or a device should have it.
func (s *Store) DeleteVersion(ctx context.Context, by, model string, version int64) (v Version, err error) {
	// Looked at outside of the transaction: what no object names comes into no
	// further document.
	name := fmt.Sprintf("%s:%d", model, version)
	device, err := s.desires(ctx, model, version)
	if err != nil {
		return v, err
	}
	if device != "" {
		return v, fmt.Errorf("version %s: %w: device %s should have it", name, ErrState, device)
	}
	err = s.write(ctx, "delete version", func(tx *sql.Tx) error {
		v, err = scanVersion(tx.QueryRowContext(ctx, selectVersions+"WHERE model = ? AND version = ?", model, version).Scan)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("version %s: %w", name, ErrNotFound)
		}
		if err != nil {
			return err
		}
		stored, err := objects(ctx, tx)
		if err != nil {
			return err
		}
		for _, o := range stored {
			if names(o.Object, model, version) {
				return fmt.Errorf("version %s: %w: %s %s names it", name, ErrState, o.Kind(), o.Name())
			}
			if o.Deployment == nil {
				continue
			}
			newest, err := rollouts(ctx, tx, "WHERE deployment = ? ORDER BY number DESC LIMIT 1", o.Name())
			if err != nil {
				return err
			}
			for _, r := range newest {
				if r.Model == model && r.To == version || cmp.Or(r.FromModel, r.Model) == model && r.From == version {
					return fmt.Errorf("version %s: %w: rollout %s may come back to it", name, ErrState, r.ID())
				}
			}
		}
		if _, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO deleted_versions (model, version, digest) VALUES (?, ?, ?)", model, version, v.Digest); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM versions WHERE model = ? AND version = ?", model, version); err != nil {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "version.delete", Object: "model/" + name, Before: v.Digest})
	})
	return v, err
}

// names says whether an object names a version of a model.
func names(o fleet.Object, model string, version int64) bool {
	if d := o.Deployment; d != nil {
		return d.Model == model && d.Version == version
	}
	if o.Route != nil {
		for _, t := range o.Route.All() {
			if t.Model == model && t.Version == version {
				return true
			}
		}
	}
	return false
}

// desires names a device that should have a version; empty: there is none.
func (s *Store) desires(ctx context.Context, model string, version int64) (device string, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT device, document FROM desired ORDER BY device", nil, func(scan func(...any) error) error {
			var name string
			var b []byte
			if err := scan(&name, &b); err != nil || device != "" {
				return err
			}
			var doc dunlinv1.DesiredDocument
			if err := proto.Unmarshal(b, &doc); err != nil {
				return fmt.Errorf("desired document of device %s: %w", name, err)
			}
			agent := model == fleet.AgentModel && doc.GetAgent().GetVersion() == version
			if agent || slices.ContainsFunc(doc.GetVersions(), func(v *dunlinv1.DesiredVersion) bool {
				return v.GetModel() == model && v.GetVersion() == version
			}) {
				device = name
			}
			return nil
		})
	})
	return device, err
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
