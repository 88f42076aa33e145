package reconcile

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

// errNoTrust is the error of a device that does not know yet whom to trust.
var errNoTrust = errors.New("there is no trust document yet by which its signatures could count")

// admit says whether the device takes a bundle with this manifest as the
// version; where it does not, the error is a *signing.RefusedError.
func (d *download) admit(ctx context.Context, m *models.Manifest) error {
	trust := d.trust()
	d.judged = trust
	switch trust {
	case nil:
		return errNoTrust
	case signing.TrustAll:
		return nil
	}
	if d.remote == nil {
		return errNoSource
	}
	var signatures [][]byte
	var broken []error
	for _, s := range d.signatures {
		raw, wrong, err := d.signature(ctx, s)
		if err != nil {
			return err
		}
		if wrong != nil {
			broken = append(broken, wrong)
			continue
		}
		signatures = append(signatures, raw)
	}
	err := trust.Admit(d.id.Model, d.id.Version, m, signatures, d.now())
	if r, ok := errors.AsType[*signing.RefusedError](err); ok && broken != nil {
		err = &signing.RefusedError{Reason: fmt.Sprintf("%s; %v", r.Reason, errors.Join(broken...))}
	}
	return err
}

// signature fetches a signature by the digest of its manifest. It is wrong
// where it is not in the registry, or not what it should be; another error is
// one of the way there.
func (d *download) signature(ctx context.Context, of digest.Digest) (raw []byte, wrong, err error) {
	raw, err = d.signed(ctx, d.ref(of, true), "signature's manifest", signing.MaxManifestBytes)
	if err == nil {
		_, layer, malformed := signing.ParseManifest(raw)
		if malformed != nil {
			return nil, malformed, nil
		}
		raw, err = d.signed(ctx, d.ref(layer.Digest, false), "signature", layer.Size)
	}
	_, altered := errors.AsType[*VerifyError](err)
	if altered || errors.Is(err, ErrAbsent) {
		return nil, err, nil
	}
	return raw, nil, err
}

// signed reads a document of a signature from those near that have it, or else
// from remote.
func (d *download) signed(ctx context.Context, r Ref, what string, limit int64) ([]byte, error) {
	for _, s := range d.near {
		if raw, err := small(ctx, s, r, what, limit); err == nil {
			return raw, nil
		}
	}
	return small(ctx, d.remote, r, what, limit)
}
