package registry

import (
	"context"
	"errors"
	"fmt"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
)

// Versions keeps which bundle is which version of a model. The store behind
// it is the only truth: integer tags are resolved by it.
type Versions interface {
	// CreateVersion makes a bundle a version of its model: the version that
	// the digest has already, or Want, or, where Want is 0, the next one.
	// It answers ErrVersionExists where Want is taken by another digest.
	CreateVersion(ctx context.Context, v NewVersion) (version int64, created bool, err error)
	// VersionDigest gives the digest of the version's bundle; ok is false
	// where there is no such version.
	VersionDigest(ctx context.Context, model string, version int64) (digest string, ok bool, err error)
	// Given says whether a device is to have a version of a model: only then it
	// reads that model's repository.
	Given(ctx context.Context, device, model string) (bool, error)
	// Manifests gives all that must stay: the manifests of versions, those that
	// bundles were made from, and those of the versions' signatures.
	Manifests(ctx context.Context) ([]Manifest, error)
}

// NewVersion is a checked bundle whose blobs and manifest are stored.
type NewVersion struct {
	Model  string
	Digest string // of the bundle's manifest
	Source string // of the pushed manifest; differs from Digest where the bundle was made from a plain artifact
	Want   int64  // 0: the next one
	By     string // who pushed it
	// What the bundle holds. WeightBytes and Costs of the config are those of
	// the model itself.
	Manifest    *models.Manifest
	Config      *models.Config
	WeightTypes []tensor.Type
}

// ErrVersionExists says that a version is taken by another bundle.
type ErrVersionExists struct {
	Model   string
	Version int64
	Have    string // digest of the bundle that it is
}

func (e ErrVersionExists) Error() string {
	return fmt.Sprintf("version %d of model %s exists with other content (%s) and versions are immutable: push as a new version", e.Version, e.Model, e.Have)
}

var (
	// ErrInvalid is the error of what is pushed and cannot be a model version.
	ErrInvalid = errors.New("invalid model")
	// ErrNotFound is the error of a manifest or blob that was not pushed.
	ErrNotFound = errors.New("not in the registry")
)
