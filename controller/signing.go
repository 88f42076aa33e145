package controller

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/controller/registry"
	"github.com/dunlin/dunlin/controller/store"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Files in the folder of keys.
const (
	keysFolder      = "keys"
	countersignFile = "countersign.pem"
	rootFile        = "trust-root.pem"
)

const (
	// trustLifetime is how long the documents that the controller makes count.
	// It makes the next one at half of it.
	trustLifetime = 2 * 365 * 24 * time.Hour
	// trustInterval is how often that is looked at.
	trustInterval = 24 * time.Hour
)

// signer signs versions for the controller, knows who else has, and keeps the
// trust document alive where the controller has its root key.
type signer struct {
	store *store.Store
	keys  string // folder
	key   crypto.Signer
	id    string // of key
	log   *slog.Logger
	now   func() time.Time
	// changed is called after devices have signatures to look at that they
	// had not.
	changed func()
	// trusted is called after there is a new trust document.
	trusted func()
}

// openSigner reads the controller's signing key, or makes it, and sees to the
// trust document.
func openSigner(ctx context.Context, data string, st *store.Store, log *slog.Logger, now func() time.Time, changed, trusted func()) (*signer, error) {
	s := &signer{store: st, keys: filepath.Join(data, keysFolder), log: log, now: now, changed: changed, trusted: trusted}
	if err := os.MkdirAll(s.keys, 0o700); err != nil {
		return nil, fmt.Errorf("make folder of keys: %w", err)
	}
	var err error
	if s.key, err = s.makeKey(countersignFile); err != nil {
		return nil, err
	}
	if s.id, err = signing.KeyID(s.key.Public()); err != nil {
		return nil, err
	}
	return s, s.upkeep(ctx)
}

// makeKey reads a key of the folder, or makes it.
func (s *signer) makeKey(name string) (crypto.Signer, error) {
	path := filepath.Join(s.keys, name)
	key, err := pki.ReadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = pki.NewKey(); err != nil {
		return nil, err
	}
	s.log.Info("made a key", "file", path)
	return key, pki.WriteKey(path, key)
}

// run sees to the trust document every day.
func (s *signer) run(ctx context.Context) error {
	t := time.NewTicker(trustInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := s.upkeep(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("cannot look after the trust document", "error", err)
		}
	}
}

// upkeep makes the first trust document, and the next one when the one in
// force is half over or lacks the controller's key. It needs the root key for
// that; where the root key is elsewhere, it says what is to be done there.
func (s *signer) upkeep(ctx context.Context) error {
	have, err := s.trust(ctx)
	if errors.Is(err, store.ErrNotFound) {
		root, err := s.makeKey(rootFile)
		if err != nil {
			return err
		}
		return s.issue(ctx, &dunlinv1.TrustDocument{}, root)
	}
	if err != nil {
		return fmt.Errorf("the stored trust document: %w", err)
	}
	known := slices.ContainsFunc(have.Controllers(), func(k signing.Key) bool { return k.ID == s.id })
	half := have.IssuedAt().Add(have.ExpiresAt().Sub(have.IssuedAt()) / 2)
	if known && s.now().Before(half) {
		return nil
	}
	root, err := pki.ReadKey(filepath.Join(s.keys, rootFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		id, err := signing.KeyID(root.Public())
		if err != nil {
			return err
		}
		if slices.ContainsFunc(have.Roots(), func(k signing.Key) bool { return k.ID == id }) {
			return s.issue(ctx, have.Document(), root)
		}
	}
	if !known {
		s.log.Warn("the trust document lacks the controller's key, so devices take nothing that it signs; add it with dunlin trust edit --add-controller-key", "document", have.Version(), "key", s.id)
	}
	if !s.now().Before(half) {
		s.log.Warn("the trust document should be renewed with dunlin trust edit; after it has expired, devices take nothing new", "document", have.Version(), "expires", have.ExpiresAt())
	}
	return nil
}

// issue makes the document after d, signed by root.
func (s *signer) issue(ctx context.Context, d *dunlinv1.TrustDocument, root crypto.Signer) error {
	now := s.now()
	d.Version++
	d.IssuedAt, d.ExpiresAt = timestamppb.New(now), timestamppb.New(now.Add(trustLifetime))
	for _, add := range []struct {
		key     crypto.Signer
		to      *[]*dunlinv1.TrustKey
		comment string
	}{{root, &d.RootKeys, "made by the controller"}, {s.key, &d.ControllerKeys, "controller"}} {
		k, err := signing.NewTrustKey(add.key.Public(), nil, add.comment)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(*add.to, func(o *dunlinv1.TrustKey) bool { return o.KeyId == k.KeyId }) {
			*add.to = append(*add.to, k)
		}
	}
	signed, err := signing.NewTrust(d)
	if err == nil {
		err = signing.SignTrust(signed, root)
	}
	if err == nil {
		err = s.store.AddTrust(ctx, "controller", signed)
	}
	if err != nil {
		return fmt.Errorf("make trust document %d: %w", d.Version, err)
	}
	s.trusted()
	s.log.Info("made a trust document", "document", d.Version, "expires", d.ExpiresAt.AsTime())
	return nil
}

// signAll signs the versions that the controller's key has not signed: those of
// before it, and those whose registration was cut short.
func (s *signer) signAll(ctx context.Context, reg *registry.Registry) error {
	versions, err := s.store.Unsigned(ctx, s.id)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if err := reg.Countersign(ctx, v.Model, v.Version, digest.Digest(v.Digest)); err != nil {
			// Devices refuse the version, and say so; the others go on.
			s.log.Error("cannot sign a version", "model", v.Model, "version", v.Version, "error", err)
		}
	}
	return nil
}

// Countersign implements registry.Signatures.
func (s *signer) Countersign(ctx context.Context, model string, version int64, m *models.Manifest) ([]byte, error) {
	have, err := s.store.Signatures(ctx, model, m.Digest.String())
	if err != nil || slices.ContainsFunc(have, func(o store.Signature) bool { return o.Signer == s.id }) {
		return nil, err
	}
	return signing.SignBundle(signing.Signer{Key: s.key}, model, version, m)
}

// trust gives the trust document in force.
func (s *signer) trust(ctx context.Context) (*signing.Trust, error) {
	signed, err := s.store.Trust(ctx)
	if err != nil {
		return nil, err
	}
	return signing.Advance(nil, []*dunlinv1.SignedTrust{signed})
}

// AddSignature implements registry.Signatures.
func (s *signer) AddSignature(ctx context.Context, n registry.NewSignature) error {
	by := s.id
	if n.By != "controller" {
		trust, err := s.trust(ctx)
		if err != nil {
			return err
		}
		by = n.Parsed.Signer()
		k, err := n.Parsed.Verify(trust.Publishers(), s.now())
		switch {
		case err == nil:
			by = k.ID
		case by == s.id, by != "" && slices.ContainsFunc(trust.Publishers(), func(k signing.Key) bool { return by == k.ID || by == k.Hint() }):
			// It would be shown as theirs, or keep the controller from signing.
			return fmt.Errorf("%w: signature of %s: it names key %s, whose it is not: %w", registry.ErrInvalid, n.Bundle, by, err)
		}
	}
	err := s.store.AddSignature(ctx, n.By, store.Signature{Model: n.Model, Digest: n.Bundle.String(), Manifest: n.Manifest.String(), Size: n.Size, Signer: by})
	if err == nil {
		s.changed()
	}
	return err
}

// RemoveSignature implements registry.Signatures.
func (s *signer) RemoveSignature(ctx context.Context, model string, manifest digest.Digest) error {
	return s.store.RemoveSignature(ctx, model, manifest.String())
}

// ListSignatures implements registry.Signatures.
func (s *signer) ListSignatures(ctx context.Context, model, bundle string) ([]registry.Signature, error) {
	found, err := s.store.Signatures(ctx, model, bundle)
	var all []registry.Signature
	for _, f := range found {
		all = append(all, registry.Signature{Manifest: digest.Digest(f.Manifest), Size: f.Size})
	}
	return all, err
}
