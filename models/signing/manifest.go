package signing

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits of what belongs to one bundle.
const (
	MaxManifestBytes = 64 << 10 // of a signature's manifest
	MaxSignatures    = 32       // of one bundle
)

// NewManifest makes the manifest by which a registry keeps a signature of the
// bundle whose manifest has the digest and size of subject. Its config is the
// empty one.
func NewManifest(subject digest.Digest, size int64, signature []byte) ([]byte, error) {
	return json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: MediaType,
		Config:  ocispec.DescriptorEmptyJSON,
		Layers:  []ocispec.Descriptor{{MediaType: MediaType, Digest: digest.FromBytes(signature), Size: int64(len(signature))}},
		Subject: &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject, Size: size},
	})
}

// ParseManifest gives what the manifest of a signature is of, and the blob
// that holds it.
func ParseManifest(raw []byte) (subject, signature ocispec.Descriptor, err error) {
	if len(raw) > MaxManifestBytes {
		return subject, signature, fmt.Errorf("the signature's manifest has %d bytes, the limit is %d", len(raw), MaxManifestBytes)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return subject, signature, fmt.Errorf("the signature's manifest is not JSON: %w", err)
	}
	kind := m.ArtifactType
	if kind == "" {
		kind = m.Config.MediaType
	}
	switch {
	case m.Subject == nil:
		return subject, signature, errors.New("the signature's manifest has no subject")
	case kind != MediaType:
		return subject, signature, fmt.Errorf("artifactType is %.80q, what refers to a bundle is a signature (%s)", kind, MediaType)
	case len(m.Layers) != 1 || m.Layers[0].MediaType != MediaType:
		return subject, signature, fmt.Errorf("the signature's manifest has not exactly one layer of type %s", MediaType)
	case m.Layers[0].Size < 1 || m.Layers[0].Size > MaxSignatureBytes:
		return subject, signature, fmt.Errorf("the signature has %d bytes, allowed are 1 to %d", m.Layers[0].Size, MaxSignatureBytes)
	}
	for _, d := range []digest.Digest{m.Subject.Digest, m.Layers[0].Digest} {
		if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
			return subject, signature, fmt.Errorf("digest %.80q is not sha256: and 64 hexadecimal digits", d)
		}
	}
	return *m.Subject, m.Layers[0], nil
}
