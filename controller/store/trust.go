package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// AddTrust makes a signed trust document, which the caller has verified, the
// one in force. One that is not the next is ErrStale.
func (s *Store) AddTrust(ctx context.Context, by string, signed *dunlinv1.SignedTrust) error {
	document, err := signing.ParseTrustDocument(signed)
	if err != nil {
		return fmt.Errorf("add trust document: %w", err)
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(signed)
	if err != nil {
		return fmt.Errorf("encode trust document: %w", err)
	}
	return s.write(ctx, "trust", func(tx *sql.Tx) error {
		before, have := "", uint64(0)
		switch had, err := newestTrust(ctx, tx); {
		case err == nil:
			d, err := signing.ParseTrustDocument(had)
			if err != nil {
				return fmt.Errorf("trust document in force: %w", err)
			}
			before, have = signing.Describe(d), d.GetVersion()
		case !errors.Is(err, ErrNotFound):
			return err
		}
		if document.GetVersion() != have+1 && have != 0 {
			return fmt.Errorf("trust document %d is not the next after %d: %w", document.GetVersion(), have, ErrStale)
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO trust (version, signed) VALUES (?, ?)", int64(document.GetVersion()), raw); err != nil {
			return fmt.Errorf("add trust document %d: %w", document.GetVersion(), err)
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "trust.put", Object: fmt.Sprintf("trust/%d", document.GetVersion()), Before: before, After: signing.Describe(document)})
	})
}

// Trust gives the signed trust document in force, or ErrNotFound.
func (s *Store) Trust(ctx context.Context) (signed *dunlinv1.SignedTrust, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		signed, err = newestTrust(ctx, tx)
		return err
	})
	return signed, err
}

func newestTrust(ctx context.Context, tx *sql.Tx) (*dunlinv1.SignedTrust, error) {
	var raw []byte
	err := tx.QueryRowContext(ctx, "SELECT signed FROM trust ORDER BY version DESC LIMIT 1").Scan(&raw)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("trust document: %w", ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return decodeTrust(raw)
}

func decodeTrust(raw []byte) (*dunlinv1.SignedTrust, error) {
	signed := new(dunlinv1.SignedTrust)
	if err := proto.Unmarshal(raw, signed); err != nil {
		return nil, fmt.Errorf("decode trust document: %w", err)
	}
	return signed, nil
}

// TrustVersion gives the version of the newest trust document; 0: there is none.
func (s *Store) TrustVersion(ctx context.Context) (version uint64, err error) {
	err = s.reader.QueryRowContext(ctx, "SELECT coalesce(max(version), 0) FROM trust").Scan(&version)
	return version, err
}

// TrustSince gives the signed trust documents after a version, oldest first.
func (s *Store) TrustSince(ctx context.Context, version uint64) (chain []*dunlinv1.SignedTrust, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		return each(ctx, tx, "SELECT signed FROM trust WHERE version > ? ORDER BY version", []any{int64(min(version, 1<<62))}, func(scan func(...any) error) error {
			var raw []byte
			if err := scan(&raw); err != nil {
				return err
			}
			signed, err := decodeTrust(raw)
			chain = append(chain, signed)
			return err
		})
	})
	return chain, err
}

// Signature is one of a bundle.
type Signature struct {
	Model     string
	Digest    string // of the bundle's manifest
	Manifest  string // digest of the signature's
	Size      int64  // of the signature's manifest
	Signer    string // the key in the trust document, or else what the signature says
	CreatedAt time.Time
}

// AddSignature keeps a signature of a bundle; one that is kept changes nothing.
func (s *Store) AddSignature(ctx context.Context, by string, sig Signature) error {
	return s.write(ctx, "signature", func(tx *sql.Tx) error {
		r, err := tx.ExecContext(ctx, "INSERT INTO signatures (model, digest, manifest, size, signer, created_at) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			sig.Model, sig.Digest, sig.Manifest, sig.Size, sig.Signer, s.now().UnixNano())
		if err != nil {
			return fmt.Errorf("add signature %s of model %s: %w", sig.Manifest, sig.Model, err)
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return err
		}
		return s.audit(ctx, tx, AuditRecord{Who: by, Action: "signature.create", Object: "model/" + sig.Model, After: fmt.Sprintf("%s of %s by key %s", sig.Manifest, sig.Digest, sig.Signer)})
	})
}

// RemoveSignature forgets the signature that a manifest is, if it is one.
func (s *Store) RemoveSignature(ctx context.Context, model, manifest string) error {
	return s.write(ctx, "remove signature", func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM signatures WHERE model = ? AND manifest = ?", model, manifest)
		return err
	})
}

// Signatures gives the signatures of a bundle, or of all of a model's, or of
// all where both are empty, oldest first.
func (s *Store) Signatures(ctx context.Context, model, digest string) (all []Signature, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		query := "SELECT model, digest, manifest, size, signer, created_at FROM signatures WHERE ? IN ('', model) AND ? IN ('', digest) ORDER BY created_at, manifest"
		return each(ctx, tx, query, []any{model, digest}, func(scan func(...any) error) error {
			var sig Signature
			var created int64
			if err := scan(&sig.Model, &sig.Digest, &sig.Manifest, &sig.Size, &sig.Signer, &created); err != nil {
				return err
			}
			sig.CreatedAt = instant(created)
			all = append(all, sig)
			return nil
		})
	})
	return all, err
}

// signaturesOf gives the digests of the newest manifests that hold a bundle's
// signatures, as many as devices look at.
func signaturesOf(ctx context.Context, tx *sql.Tx, model, digest string) (manifests []string, err error) {
	query := "SELECT manifest FROM signatures WHERE model = ? AND digest = ? ORDER BY created_at DESC, manifest LIMIT ?"
	err = each(ctx, tx, query, []any{model, digest, signing.MaxSignatures}, func(scan func(...any) error) error {
		var manifest string
		err := scan(&manifest)
		manifests = append(manifests, manifest)
		return err
	})
	return manifests, err
}

// Unsigned gives the versions of whose bundles there is no signature by a signer.
func (s *Store) Unsigned(ctx context.Context, signer string) (versions []Version, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		query := selectVersions + "WHERE NOT EXISTS (SELECT 1 FROM signatures WHERE signatures.model = versions.model AND signatures.digest = versions.digest AND signer = ?) ORDER BY model, version"
		return each(ctx, tx, query, []any{signer}, func(scan func(...any) error) error {
			v, err := scanVersion(scan)
			versions = append(versions, v)
			return err
		})
	})
	return versions, err
}
