package models

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/models/serving"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// entryName is the path in a bundle of its ONNX file, whatever it was called
// before: a copy under another name is the same version.
const entryName = "model.onnx"

// File is one file of a bundle.
type File struct {
	Path   string // slash-separated, relative
	Size   int64
	Digest digest.Digest // SHA-256
}

// BundleFile is a file of a bundle that was packed here.
type BundleFile struct {
	File
	Source string // path of the local file
}

// Bundle is one version of a model, ready to be pushed: the files, config and
// chunk index first, then the manifest, which names them all. ConfigBytes are
// Config without its Costs.
type Bundle struct {
	Config                                 Config
	Files                                  []BundleFile // by path
	ConfigBytes, IndexBytes, ManifestBytes []byte
	Digest                                 digest.Digest // of ManifestBytes
}

// PackOptions are what an ONNX file does not say about its model.
type PackOptions struct {
	// Labels are the names of the classes, by index.
	Labels []string
	// Serving says how requests for the model are scheduled; nil leaves that
	// to the device.
	Serving *serving.Options
	// Reference is the path of a file with inputs and the outputs that they
	// have, as ParseReference reads it; empty: none.
	Reference string
}

// Pack inspects the ONNX file at onnxPath and makes a bundle of it and its
// external data. Nothing is copied: Files says where the contents are. The
// same bytes always give the same digest.
func Pack(ctx context.Context, onnxPath string, opts PackOptions) (*Bundle, error) {
	g, err := Inspect(onnxPath)
	if err != nil {
		return nil, err
	}
	b := &Bundle{Config: newConfig(g, opts)}
	if err := b.Config.check(); err != nil {
		return nil, err
	}
	b.Files = append(b.Files, BundleFile{File{Path: entryName}, onnxPath})
	if opts.Reference != "" {
		r, err := readReference(opts.Reference)
		if err == nil {
			err = r.Fits(g.Inputs, g.Outputs)
		}
		if err != nil {
			return nil, fmt.Errorf("reference %s: %w", opts.Reference, err)
		}
		b.Config.Reference = ReferenceFile
		b.Files = append(b.Files, BundleFile{File{Path: ReferenceFile}, opts.Reference})
	}
	for _, location := range g.External {
		if location == ReferenceFile {
			return nil, invalid("external data location %q: this name is the reference's in a bundle", location)
		}
		if location == entryName || strings.HasPrefix(location, entryName+"/") {
			return nil, invalid("external data location %q: this name is the ONNX file's in a bundle", location)
		}
		source := filepath.Join(filepath.Dir(onnxPath), filepath.FromSlash(location))
		b.Files = append(b.Files, BundleFile{File{Path: location}, source})
	}
	if b.ConfigBytes, err = json.Marshal(b.Config); err != nil {
		return nil, fmt.Errorf("encode config: %w", err)
	}
	if b.Config.Costs, err = EstimateCosts(onnxPath); err != nil {
		return nil, err
	}
	return b, b.seal(ctx)
}

// seal fills in what follows from the files and the config of a bundle.
func (b *Bundle) seal(ctx context.Context) error {
	slices.SortFunc(b.Files, func(a, b BundleFile) int { return strings.Compare(a.Path, b.Path) })
	index := &dunlinv1.ChunkIndex{}
	for i := range b.Files {
		f := &b.Files[i]
		entry, err := chunkFile(ctx, f.Source, f.Path)
		if err != nil {
			return err
		}
		f.Size = int64(entry.SizeBytes)
		f.Digest = digest.NewDigestFromBytes(digest.SHA256, entry.Sha256)
		index.Files = append(index.Files, entry)
	}
	var err error
	if b.IndexBytes, err = (proto.MarshalOptions{Deterministic: true}).Marshal(index); err != nil {
		return fmt.Errorf("encode chunk index: %w", err)
	}
	if b.ManifestBytes, err = json.Marshal(b.manifest()); err != nil {
		return fmt.Errorf("encode manifest: %w", err)
	}
	b.Digest = digest.FromBytes(b.ManifestBytes)
	return b.check()
}

func (b *Bundle) manifest() ocispec.Manifest {
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       describe(MediaTypeConfig, b.ConfigBytes),
	}
	for _, f := range b.Files {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType:   MediaTypeFile,
			Digest:      f.Digest,
			Size:        f.Size,
			Annotations: map[string]string{ocispec.AnnotationTitle: f.Path},
		})
	}
	m.Layers = append(m.Layers, describe(MediaTypeChunkIndex, b.IndexBytes))
	return m
}

func describe(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// check reads the bundle as its receivers will: what they would refuse is
// refused here.
func (b *Bundle) check() error {
	m, err := ParseManifest(b.ManifestBytes)
	if err != nil {
		return err
	}
	if _, err := ParseIndex(b.IndexBytes, m); err != nil {
		return err
	}
	_, err = ParseConfig(b.ConfigBytes)
	return err
}
