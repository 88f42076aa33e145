package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"

	"github.com/distribution/distribution/v3"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

// maxPushed bounds the signatures of one bundle that are pushed: the rest of
// signing.MaxSignatures is left to the controller's own.
const maxPushed = signing.MaxSignatures / 2

// Signatures keeps which signatures there are of a bundle, and makes the
// controller's own.
type Signatures interface {
	// Countersign gives the controller's signature of a version; nil where it
	// is kept already.
	Countersign(ctx context.Context, model string, version int64, m *models.Manifest) ([]byte, error)
	// AddSignature keeps a signature that is stored; again, it changes nothing.
	AddSignature(ctx context.Context, s NewSignature) error
	// ListSignatures gives those of a bundle, oldest first.
	ListSignatures(ctx context.Context, model, bundle string) ([]Signature, error)
	// RemoveSignature forgets the signature that a manifest is, if it is one.
	RemoveSignature(ctx context.Context, model string, manifest digest.Digest) error
}

// Signature is a signature as the registry holds it.
type Signature struct {
	Manifest digest.Digest // of the signature's manifest
	Size     int64         // of that
}

// NewSignature is a signature whose form has been checked, of what is stored.
type NewSignature struct {
	Signature
	Model  string
	Bundle digest.Digest // of the bundle's manifest
	By     string        // who pushed it
	Parsed *signing.Signature
}

// Countersign puts the controller's own signature beside a version, unless it
// is there.
func (r *Registry) Countersign(ctx context.Context, model string, version int64, bundle digest.Digest) error {
	repo, err := r.repository(ctx, model)
	if err != nil {
		return err
	}
	m, _, err := bundleManifest(ctx, repo, bundle)
	if err != nil {
		return err
	}
	return r.countersign(ctx, repo, model, version, m)
}

func (r *Registry) countersign(ctx context.Context, repo distribution.Repository, model string, version int64, m *models.Manifest) error {
	raw, err := r.signatures.Countersign(ctx, model, version, m)
	if err != nil || raw == nil {
		return err
	}
	parsed, err := signing.Parse(raw)
	if err != nil {
		return err
	}
	_, size, err := bundleManifest(ctx, repo, m.Digest)
	if err != nil {
		return err
	}
	manifest, err := signing.NewManifest(m.Digest, size, raw)
	if err != nil {
		return err
	}
	release, err := r.relyOnPushed(ctx, model, manifest)
	if err != nil {
		return err
	}
	defer release()
	blobs := repo.Blobs(ctx)
	if _, err := blobs.Put(ctx, ocispec.MediaTypeEmptyJSON, ocispec.DescriptorEmptyJSON.Data); err != nil {
		return err
	}
	if _, err := blobs.Put(ctx, signing.MediaType, raw); err != nil {
		return err
	}
	if err := storeManifest(ctx, repo, ocispec.MediaTypeImageManifest, manifest); err != nil {
		return err
	}
	return r.signatures.AddSignature(ctx, NewSignature{
		Signature: Signature{digest.FromBytes(manifest), int64(len(manifest))}, Model: model, Bundle: m.Digest, By: "controller", Parsed: parsed,
	})
}

// bundleManifest reads the manifest of a bundle that was pushed, and says how
// long it is.
func bundleManifest(ctx context.Context, repo distribution.Repository, d digest.Digest) (*models.Manifest, int64, error) {
	_, payload, err := readManifest(ctx, repo, d)
	if err != nil {
		return nil, 0, err
	}
	m, err := models.ParseManifest(payload)
	if err != nil {
		return nil, 0, invalid(err)
	}
	return m, int64(len(payload)), nil
}

// refersTo says whether a manifest has a subject.
func refersTo(manifest []byte) bool {
	var m struct {
		Subject *json.RawMessage `json:"subject"`
	}
	return json.Unmarshal(manifest, &m) == nil && m.Subject != nil
}

// putSignature takes the manifest of a signature, whose blobs are here, and
// gives the digest of the bundle that it is of.
func (r *Registry) putSignature(ctx context.Context, t target, manifest []byte, p identity.Principal) (digest.Digest, error) {
	d := digest.FromBytes(manifest)
	if d.String() != t.ref {
		return "", apiError{http.StatusBadRequest, "DIGEST_INVALID", fmt.Sprintf("the manifest has digest %s, it was pushed as %s", d, t.ref)}
	}
	subject, layer, err := signing.ParseManifest(manifest)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	repo, err := r.repository(ctx, t.model)
	if err != nil {
		return "", err
	}
	for _, rely := range []func() (func(), error){
		func() (func(), error) { return r.relyOnManifest(ctx, t.model, subject.Digest) },
		func() (func(), error) { return r.relyOnPushed(ctx, t.model, manifest) },
	} {
		release, err := rely()
		if err != nil {
			return "", err
		}
		defer release()
	}
	m, _, err := bundleManifest(ctx, repo, subject.Digest)
	if err != nil {
		return "", err
	}
	raw, err := read(ctx, repo, "the signature", layer)
	if err != nil {
		return "", err
	}
	parsed, err := signing.Parse(raw)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	statement, err := parsed.Statement()
	if err == nil {
		err = statement.Fits(m)
	}
	if err == nil {
		if name, version, refErr := models.ParseRef(statement.Name); refErr != nil || name != t.model || version == 0 {
			err = fmt.Errorf("it is of %.80q instead of %s:VERSION", statement.Name, t.model)
		}
	}
	if err != nil {
		return "", fmt.Errorf("%w: signature of %s: %w", ErrInvalid, subject.Digest, err)
	}
	have, err := r.signatures.ListSignatures(ctx, t.model, m.Digest.String())
	if err != nil {
		return "", err
	}
	if len(have) >= maxPushed && !slices.ContainsFunc(have, func(s Signature) bool { return s.Manifest == d }) {
		return "", fmt.Errorf("%w: bundle %s has %d signatures, the limit is %d", ErrInvalid, m.Digest, len(have), maxPushed)
	}
	if err := storeManifest(ctx, repo, ocispec.MediaTypeImageManifest, manifest); err != nil {
		return "", fmt.Errorf("store signature %s of model %s: %w", d, t.model, err)
	}
	return m.Digest, r.signatures.AddSignature(ctx, NewSignature{
		Signature: Signature{d, int64(len(manifest))}, Model: t.model, Bundle: m.Digest, By: p.String(), Parsed: parsed,
	})
}

// getReferrers lists the signatures of a bundle.
func (r *Registry) getReferrers(w http.ResponseWriter, req *http.Request, t target) {
	if d := digest.Digest(t.ref); d.Validate() != nil {
		r.fail(w, req, apiError{http.StatusBadRequest, "DIGEST_INVALID", fmt.Sprintf("%.80q is not a digest", t.ref)})
		return
	}
	signatures, err := r.signatures.ListSignatures(req.Context(), t.model, t.ref)
	if err != nil {
		r.fail(w, req, fmt.Errorf("list signatures of %s: %w", t.ref, err))
		return
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	kind := req.URL.Query().Get("artifactType")
	if kind != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	for _, s := range signatures {
		if kind == "" || kind == signing.MediaType {
			index.Manifests = append(index.Manifests, ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageManifest, ArtifactType: signing.MediaType, Digest: s.Manifest, Size: s.Size,
			})
		}
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(index) // an error here is the client's going away
}
