package layout

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// TrustType is the artifact type of trust documents: one layer, a
	// dunlin.v1.GetTrustResponse with all of them, the first one first.
	TrustType = "application/vnd.dunlin.trust.v1"
	// TrustName is the name of that artifact; no model is called so.
	TrustName = "dunlin-trust:documents"
	// MaxTrustBytes bounds the layer.
	MaxTrustBytes = 16 << 20
	// maxBundles bounds the bundles of one layout.
	maxBundles = 10_000
)

// Bundle is a bundle in a layout, with what is there of its signatures.
type Bundle struct {
	Model      string
	Version    int64
	Descriptor ocispec.Descriptor
	Manifest   *models.Manifest
	// Signatures are those of the manifest that are here; Blobs all else that
	// belongs to it: manifests, config, index, files and signatures.
	Signatures [][]byte
	Referrers  []ocispec.Descriptor
	Blobs      []ocispec.Descriptor
}

// Ref is MODEL:VERSION.
func (b *Bundle) Ref() string { return fmt.Sprintf("%s:%d", b.Model, b.Version) }

// Contents reads the documents of a layout: its bundles, and the trust
// documents, the first one first. They have the digests that they are listed
// by; who signed what is for the caller to judge. Other artifacts are ignored.
func (l *Layout) Contents() (bundles []*Bundle, trust []*dunlinv1.SignedTrust, err error) {
	type signature struct {
		manifest ocispec.Descriptor
		layer    ocispec.Descriptor
		raw      []byte
	}
	signatures := map[digest.Digest][]signature{}
	seen := map[digest.Digest]bool{}
	for _, d := range l.Index.Manifests {
		switch {
		case d.ArtifactType == signing.MediaType && !seen[d.Digest]:
			seen[d.Digest] = true
			raw, err := l.Small(d.Digest, signing.MaxManifestBytes)
			if err != nil {
				return nil, nil, fmt.Errorf("manifest of a signature: %w", err)
			}
			subject, layer, err := signing.ParseManifest(raw)
			if err != nil {
				return nil, nil, err
			}
			if len(signatures[subject.Digest]) == signing.MaxSignatures {
				return nil, nil, fmt.Errorf("bundle %s has more than %d signatures", subject.Digest, signing.MaxSignatures)
			}
			signed, err := l.Small(layer.Digest, layer.Size)
			if err != nil {
				return nil, nil, fmt.Errorf("signature: %w", err)
			}
			signatures[subject.Digest] = append(signatures[subject.Digest], signature{d, layer, signed})
		case d.ArtifactType == TrustType:
			if trust, err = l.trust(d.Digest); err != nil {
				return nil, nil, fmt.Errorf("trust documents: %w", err)
			}
		}
	}
	for _, d := range l.Index.Manifests {
		if d.ArtifactType == signing.MediaType || d.ArtifactType == TrustType {
			continue
		}
		name, version, err := models.ParseRef(d.Annotations[ocispec.AnnotationRefName])
		if err != nil || version == 0 {
			continue // it is somebody else's
		}
		if len(bundles) == maxBundles {
			return nil, nil, fmt.Errorf("more than %d bundles", maxBundles)
		}
		b := &Bundle{Model: name, Version: version, Descriptor: d}
		raw, err := l.Small(d.Digest, models.MaxManifestBytes)
		if err == nil {
			b.Manifest, err = models.ParseManifest(raw)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", b.Ref(), err)
		}
		b.Blobs = BlobsOf(b.Manifest, int64(len(raw)))
		for _, s := range signatures[d.Digest] {
			b.Signatures = append(b.Signatures, s.raw)
			b.Referrers = append(b.Referrers, s.manifest)
			b.Blobs = append(b.Blobs, s.manifest, s.layer)
		}
		bundles = append(bundles, b)
	}
	return bundles, trust, nil
}

// BlobsOf lists what belongs to a bundle, its manifest first, without
// signatures.
func BlobsOf(m *models.Manifest, size int64) []ocispec.Descriptor {
	all := []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageManifest, Digest: m.Digest, Size: size}, m.Config, m.Index}
	for _, f := range m.Files {
		all = append(all, ocispec.Descriptor{MediaType: models.MediaTypeFile, Digest: f.Digest, Size: f.Size})
	}
	return all
}

func (l *Layout) trust(manifest digest.Digest) ([]*dunlinv1.SignedTrust, error) {
	raw, err := l.Small(manifest, models.MaxManifestBytes)
	if err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, err
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != TrustType {
		return nil, fmt.Errorf("manifest %s has not exactly one layer of type %s", manifest, TrustType)
	}
	if raw, err = l.Small(m.Layers[0].Digest, MaxTrustBytes); err != nil {
		return nil, err
	}
	all := new(dunlinv1.GetTrustResponse)
	if err := proto.Unmarshal(raw, all); err != nil {
		return nil, err
	}
	return all.GetTrust(), nil
}

// TrustArtifact makes the artifact of trust documents: its blobs, the manifest
// last, and what lists it.
func TrustArtifact(trust []*dunlinv1.SignedTrust) (blobs map[digest.Digest][]byte, manifest ocispec.Descriptor, err error) {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(&dunlinv1.GetTrustResponse{Trust: trust})
	if err == nil && len(raw) > MaxTrustBytes {
		err = fmt.Errorf("they have %d bytes, allowed are %d", len(raw), MaxTrustBytes)
	}
	if err != nil {
		return nil, manifest, fmt.Errorf("trust documents: %w", err)
	}
	layer := ocispec.Descriptor{MediaType: TrustType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	m, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: TrustType,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		return nil, manifest, err
	}
	manifest = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: TrustType, Digest: digest.FromBytes(m), Size: int64(len(m)),
		Annotations: map[string]string{ocispec.AnnotationRefName: TrustName},
	}
	return map[digest.Digest][]byte{layer.Digest: raw, manifest.Digest: m, ocispec.DescriptorEmptyJSON.Digest: ocispec.DescriptorEmptyJSON.Data}, manifest, nil
}

// Missing says whether an error is that of a blob that is not there.
func Missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
