package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/distribution/distribution/v3"
	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/models"
)

// Open opens a blob or manifest of a model's repository for a device that may
// pull it, and says how long it is. The error is *identity.DeniedError where
// the device may not, and ErrNotFound where there is none.
func (r *Registry) Open(ctx context.Context, device, model string, d digest.Digest, manifest bool) (*os.File, int64, error) {
	if err := models.CheckName(model); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	kind := "blobs"
	if manifest {
		kind = "manifests"
	}
	p := identity.Principal{Kind: identity.Device, Name: device}
	err := r.given(ctx, p, identity.RegistryPull, model)
	if denied, ok := errors.AsType[*identity.DeniedError](err); ok {
		r.refusals.Refused(ctx, identity.Refusal{
			Who: p.String(), Action: "registry.refused", Object: fmt.Sprintf("MQTT /v2/%s/%s/%s", model, kind, d), Reason: denied.Error(),
		})
	}
	if err != nil {
		return nil, 0, err
	}
	repo, err := r.repository(ctx, model)
	if err != nil {
		return nil, 0, err
	}
	if manifest {
		manifests, err := repo.Manifests(ctx)
		if err != nil {
			return nil, 0, fmt.Errorf("open manifests of %s: %w", model, err)
		}
		has, err := manifests.Exists(ctx, d)
		if err != nil {
			return nil, 0, fmt.Errorf("look up manifest %s: %w", d, err)
		}
		if !has {
			return nil, 0, fmt.Errorf("manifest %s of model %s: %w", d, model, ErrNotFound)
		}
	} else if _, err := repo.Blobs(ctx).Stat(ctx, d); errors.Is(err, distribution.ErrBlobUnknown) {
		return nil, 0, fmt.Errorf("blob %s of model %s: %w", d, model, ErrNotFound)
	} else if err != nil {
		return nil, 0, fmt.Errorf("look up blob %s: %w", d, err)
	}
	f, err := os.Open(r.blobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("blob %s of model %s: %w", d, model, ErrNotFound)
	} else if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// given says whether p may do this with a model: of devices those may that a
// deployment gives it to.
func (r *Registry) given(ctx context.Context, p identity.Principal, action, model string) error {
	if err := identity.Allow(p, action); err != nil || p.Kind != identity.Device {
		return err
	}
	given, err := r.versions.Given(ctx, p.Name, model)
	if err != nil {
		return fmt.Errorf("look up what device %s is given: %w", p.Name, err)
	}
	if !given {
		return &identity.DeniedError{Who: p, Action: action, Lacks: "has no deployment that gives it this"}
	}
	return nil
}
