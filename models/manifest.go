package models

import (
	"encoding/json"
	"fmt"
	"path"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Manifest describes a bundle in a registry.
type Manifest struct {
	Digest digest.Digest
	Config ocispec.Descriptor
	Index  ocispec.Descriptor
	Files  []File // as the manifest orders them
	Size   int64  // sum of the sizes of the files
}

// File gives the file at a path in the bundle.
func (m *Manifest) File(path string) (File, bool) {
	for _, f := range m.Files {
		if f.Path == path {
			return f, true
		}
	}
	return File{}, false
}

// ParseManifest reads the manifest of a bundle: an OCI image manifest of
// ArtifactType with a config, one chunk index and 1 to MaxFiles files of
// different local paths. Properties that OCI does not define are ignored.
func ParseManifest(b []byte) (*Manifest, error) {
	oci, err := parseOCI(b)
	if err != nil {
		return nil, err
	}
	if oci.ArtifactType != ArtifactType {
		return nil, invalid("manifest has artifactType %q instead of %q", shorten(oci.ArtifactType), ArtifactType)
	}
	if oci.Config.MediaType != MediaTypeConfig {
		return nil, invalid("manifest's config has mediaType %q instead of %q", shorten(oci.Config.MediaType), MediaTypeConfig)
	}
	if err := checkDescriptor(oci.Config, MaxConfigBytes); err != nil {
		return nil, fmt.Errorf("manifest's config: %w", err)
	}
	m := &Manifest{Digest: digest.FromBytes(b), Config: oci.Config}
	files, folders := map[string]bool{}, map[string]bool{}
	for i, layer := range oci.Layers {
		switch layer.MediaType {
		case MediaTypeChunkIndex:
			if m.Index.Digest != "" {
				return nil, invalid("manifest has more than one chunk index")
			}
			if err := checkDescriptor(layer, MaxIndexBytes); err != nil {
				return nil, fmt.Errorf("manifest's chunk index: %w", err)
			}
			m.Index = layer
		case MediaTypeFile:
			if len(m.Files) == MaxFiles {
				return nil, invalid("manifest has more than %d files", MaxFiles)
			}
			if err := checkDescriptor(layer, MaxBundleBytes-m.Size); err != nil {
				return nil, fmt.Errorf("manifest's layer %d: %w", i, err)
			}
			p := layer.Annotations[ocispec.AnnotationTitle]
			if err := checkPath(p); err != nil {
				return nil, fmt.Errorf("manifest's layer %d: annotation %s: %w", i, ocispec.AnnotationTitle, err)
			}
			if files[p] {
				return nil, invalid("manifest has two files %q", p)
			}
			files[p] = true
			for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
				folders[dir] = true
			}
			m.Files = append(m.Files, File{Path: p, Size: layer.Size, Digest: layer.Digest})
			m.Size += layer.Size
		default:
			return nil, invalid("manifest's layer %d has mediaType %q, which a bundle does not have", i, shorten(layer.MediaType))
		}
	}
	if len(m.Files) == 0 {
		return nil, invalid("manifest has no files")
	}
	if m.Index.Digest == "" {
		return nil, invalid("manifest has no chunk index")
	}
	for _, f := range m.Files {
		if folders[f.Path] {
			return nil, invalid("manifest has %q as a file and as a folder", f.Path)
		}
	}
	return m, nil
}

// IsPlain says whether a manifest is that of a plain artifact, one that
// another tool pushed: an OCI manifest of any type but ArtifactType, with
// exactly one layer, which then is to be inspected as an ONNX file.
func IsPlain(manifest []byte) (layer ocispec.Descriptor, ok bool) {
	oci, err := parseOCI(manifest)
	if err != nil || oci.ArtifactType == ArtifactType || oci.Config.MediaType == MediaTypeConfig || len(oci.Layers) != 1 {
		return ocispec.Descriptor{}, false
	}
	layer = oci.Layers[0]
	return layer, checkDescriptor(layer, MaxBundleBytes) == nil
}

func parseOCI(b []byte) (*ocispec.Manifest, error) {
	if len(b) > MaxManifestBytes {
		return nil, invalid("manifest has %d bytes, allowed are %d", len(b), MaxManifestBytes)
	}
	var oci ocispec.Manifest
	if err := json.Unmarshal(b, &oci); err != nil {
		return nil, invalid("manifest is not valid JSON: %v", err)
	}
	if oci.SchemaVersion != 2 {
		return nil, invalid("manifest has schemaVersion %d instead of 2", oci.SchemaVersion)
	}
	// The property is optional.
	if oci.MediaType != "" && oci.MediaType != ocispec.MediaTypeImageManifest {
		return nil, invalid("manifest has mediaType %q instead of %q", shorten(oci.MediaType), ocispec.MediaTypeImageManifest)
	}
	return &oci, nil
}

func checkDescriptor(d ocispec.Descriptor, most int64) error {
	if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm() != digest.SHA256 {
		return invalid("digest %q is not sha256: and 64 hexadecimal digits", shorten(string(d.Digest)))
	}
	if d.Size < 1 || d.Size > most {
		return invalid("size %d, allowed are 1 to %d", d.Size, most)
	}
	return nil
}
