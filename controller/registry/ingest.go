package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"mime"
	"os"
	"path/filepath"
	"strconv"

	"github.com/distribution/distribution/v3"
	_ "github.com/distribution/distribution/v3/manifest/ocischema" // registers the manifest's type
	_ "github.com/distribution/distribution/v3/manifest/schema2"   // registers the manifest's type
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// ingestDir is the folder under the registry's that holds links to the
	// files of the bundles that are being looked at.
	ingestDir = "ingest"
	// storageDir is where the embedded registry keeps its files.
	storageDir = "docker/registry/v2"
	// plainName is what the ONNX file of a plain artifact is called while a
	// bundle is made of it.
	plainName = "model.onnx"
)

// pushed is a manifest that asks to become a version.
type pushed struct {
	model     string
	mediaType string
	manifest  []byte
	want      int64
	by        string
}

// version is what it became.
type version struct {
	version int64
	created bool
	digest  digest.Digest // of the bundle's manifest
}

// checked is a bundle whose files are in the registry and are what it says.
type checked struct {
	manifest    *models.Manifest
	config      *models.Config
	weightTypes []tensor.Type
	// Of a bundle that was made from a plain artifact: what is to be stored.
	manifestBytes, configBytes, indexBytes []byte
}

// Ingest makes the manifest that was pushed under digest a version of model:
// want, or the next one where want is 0. It checks that the bundle is whole
// and true. Doing it again gives the same answer with created false. Its
// errors are ErrInvalid, ErrNotFound, ErrVersionExists, or internal.
func (r *Registry) Ingest(ctx context.Context, model, manifestDigest string, want int64, by string) (int64, bool, error) {
	if err := models.CheckName(model); err != nil {
		return 0, false, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	d, err := digest.Parse(manifestDigest)
	if err != nil {
		return 0, false, fmt.Errorf("%w: digest %q: %w", ErrInvalid, manifestDigest, err)
	}
	repo, err := r.repository(ctx, model)
	if err != nil {
		return 0, false, err
	}
	release, err := r.relyOnManifest(ctx, model, d)
	if err != nil {
		return 0, false, err
	}
	defer release()
	mediaType, payload, err := readManifest(ctx, repo, d)
	if err != nil {
		return 0, false, err
	}
	v, err := r.ingest(ctx, pushed{model: model, mediaType: mediaType, manifest: payload, want: want, by: by})
	return v.version, v.created, err
}

// readManifest reads a manifest that was pushed.
func readManifest(ctx context.Context, repo distribution.Repository, d digest.Digest) (mediaType string, payload []byte, err error) {
	manifests, err := repo.Manifests(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("open manifests of %s: %w", repo.Named(), err)
	}
	m, err := manifests.Get(ctx, d)
	if _, unknown := errors.AsType[distribution.ErrManifestUnknownRevision](err); unknown {
		return "", nil, fmt.Errorf("manifest %s of model %s: %w: push it first", d, repo.Named(), ErrNotFound)
	}
	if err == nil {
		mediaType, payload, err = m.Payload()
	}
	if err != nil {
		return "", nil, fmt.Errorf("read manifest %s of model %s: %w", d, repo.Named(), err)
	}
	return mediaType, payload, nil
}

func (r *Registry) repository(ctx context.Context, model string) (distribution.Repository, error) {
	name, err := reference.WithName(model)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	repo, err := r.namespace.Repository(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("open repository %s: %w", model, err)
	}
	return repo, nil
}

// ingest checks, then stores, then registers. What it stores is addressed by
// content, so that it can be cut short and done again at any point.
func (r *Registry) ingest(ctx context.Context, p pushed) (version, error) {
	if p.want < 0 || p.want > models.MaxVersion {
		return version{}, fmt.Errorf("%w: version %d, allowed are 0 to %d", ErrInvalid, p.want, int64(models.MaxVersion))
	}
	repo, err := r.repository(ctx, p.model)
	if err != nil {
		return version{}, err
	}
	if t, _, err := mime.ParseMediaType(p.mediaType); p.mediaType != "" && (err != nil || t == ocispec.MediaTypeImageIndex) {
		return version{}, fmt.Errorf("%w: media type %q is not that of an OCI image manifest", ErrInvalid, p.mediaType)
	}
	release, err := r.relyOnPushed(ctx, p.model, p.manifest)
	if err != nil {
		return version{}, err
	}
	defer release()
	c, err := r.check(ctx, repo, p.manifest)
	if err != nil {
		return version{}, err
	}
	if c.manifestBytes != nil {
		made, err := r.relyOnPushed(ctx, p.model, c.manifestBytes)
		if err != nil {
			return version{}, err
		}
		defer made()
	}
	if release := c.config.Release != nil; release != (p.model == models.AgentModel) {
		if release {
			return version{}, fmt.Errorf("%w: a release of the agent goes by the name %s, not %s", ErrInvalid, models.AgentModel, p.model)
		}
		return version{}, fmt.Errorf("%w: the name %s is for releases of the agent: push them with dunlin push-agent", ErrInvalid, models.AgentModel)
	}
	d := c.manifest.Digest
	if p.want > 0 {
		have, ok, err := r.versions.VersionDigest(ctx, p.model, p.want)
		if err != nil {
			return version{}, fmt.Errorf("look up version %d of model %s: %w", p.want, p.model, err)
		}
		if ok && have != d.String() {
			return version{}, ErrVersionExists{Model: p.model, Version: p.want, Have: have}
		}
	}
	if err := store(ctx, repo, p, c); err != nil {
		return version{}, fmt.Errorf("store bundle %s of model %s: %w", d, p.model, err)
	}
	n, created, err := r.versions.CreateVersion(ctx, NewVersion{
		Model: p.model, Digest: d.String(), Source: digest.FromBytes(p.manifest).String(),
		Want: p.want, By: p.by, Manifest: c.manifest, Config: c.config, WeightTypes: c.weightTypes,
	})
	if err != nil {
		return version{}, fmt.Errorf("register bundle %s of model %s: %w", d, p.model, err)
	}
	if err := r.countersign(ctx, repo, p.model, n, c.manifest); err != nil {
		return version{}, fmt.Errorf("sign version %d of model %s: %w", n, p.model, err)
	}
	// For those who list tags; reading a version goes by Versions.
	if err := r.tag(ctx, p.model, strconv.FormatInt(n, 10), d); err != nil {
		return version{}, err
	}
	if created {
		r.log.InfoContext(ctx, "new model version", slog.String("model", p.model), slog.Int64("version", n), slog.String("digest", d.String()), slog.String("by", p.by))
	}
	return version{n, created, d}, nil
}

func (r *Registry) tag(ctx context.Context, model, tag string, d digest.Digest) error {
	repo, err := r.repository(ctx, model)
	if err != nil {
		return err
	}
	release, err := r.claims.hold(ctx, tagsName(model), d.String())
	if err != nil {
		return err
	}
	defer release()
	if err := repo.Tags(ctx).Tag(ctx, tag, ocispec.Descriptor{Digest: d}); err != nil {
		return fmt.Errorf("tag %s of model %s as %s: %w", d, model, tag, err)
	}
	return nil
}

// store puts the pushed manifest and, where a bundle was made from it, the
// bundle's own blobs and manifest.
func store(ctx context.Context, repo distribution.Repository, p pushed, c *checked) error {
	if c.manifestBytes != nil {
		blobs := repo.Blobs(ctx)
		if _, err := blobs.Put(ctx, models.MediaTypeConfig, c.configBytes); err != nil {
			return err
		}
		if _, err := blobs.Put(ctx, models.MediaTypeChunkIndex, c.indexBytes); err != nil {
			return err
		}
		if err := storeManifest(ctx, repo, ocispec.MediaTypeImageManifest, c.manifestBytes); err != nil {
			return err
		}
	}
	return storeManifest(ctx, repo, p.mediaType, p.manifest)
}

func storeManifest(ctx context.Context, repo distribution.Repository, mediaType string, b []byte) error {
	m, _, err := distribution.UnmarshalManifest(mediaType, b)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	manifests, err := repo.Manifests(ctx)
	if err != nil {
		return err
	}
	_, err = manifests.Put(ctx, m)
	if v, ok := errors.AsType[distribution.ErrManifestVerification](err); ok {
		return fmt.Errorf("%w: %w", ErrInvalid, v)
	}
	return err
}

// check says whether a manifest is that of a bundle whose files are all here
// and are what it says, or of a plain artifact that a bundle can be made of.
func (r *Registry) check(ctx context.Context, repo distribution.Repository, b []byte) (*checked, error) {
	var kind struct {
		ArtifactType string               `json:"artifactType"`
		Config       ocispec.Descriptor   `json:"config"`
		Layers       []ocispec.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(b, &kind); err != nil {
		return nil, fmt.Errorf("%w: the manifest is not JSON: %w", ErrInvalid, err)
	}
	if len(kind.Layers) == 1 && kind.Layers[0].Size == 0 {
		return nil, fmt.Errorf("%w: empty file: the only layer has 0 bytes", ErrInvalid)
	}
	if kind.ArtifactType == models.ArtifactType || kind.Config.MediaType == models.MediaTypeConfig {
		return r.checkBundle(ctx, repo, b)
	}
	if layer, ok := models.IsPlain(b); ok {
		return r.fromPlain(ctx, repo, layer)
	}
	return nil, fmt.Errorf("%w: the manifest is neither of artifact type %s nor has exactly one layer, an ONNX file", ErrInvalid, models.ArtifactType)
}

// stat checks that a blob is in the repository with the size that the
// manifest says.
func stat(ctx context.Context, repo distribution.Repository, what string, d digest.Digest, size int64) (ocispec.Descriptor, error) {
	if err := d.Validate(); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%w: %s: digest %q: %w", ErrInvalid, what, d, err)
	}
	have, err := repo.Blobs(ctx).Stat(ctx, d)
	if errors.Is(err, distribution.ErrBlobUnknown) {
		return ocispec.Descriptor{}, fmt.Errorf("%s, blob %s: %w: push it first", what, d, ErrNotFound)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("look up blob %s: %w", d, err)
	}
	if have.Size != size {
		return ocispec.Descriptor{}, fmt.Errorf("%w: %s: the manifest says %d bytes, blob %s has %d", ErrInvalid, what, size, d, have.Size)
	}
	return have, nil
}

// read gives a blob whose size ParseManifest has bounded.
func read(ctx context.Context, repo distribution.Repository, what string, desc ocispec.Descriptor) ([]byte, error) {
	if _, err := stat(ctx, repo, what, desc.Digest, desc.Size); err != nil {
		return nil, err
	}
	b, err := repo.Blobs(ctx).Get(ctx, desc.Digest)
	if err != nil {
		return nil, fmt.Errorf("read blob %s: %w", desc.Digest, err)
	}
	return b, nil
}

func (r *Registry) checkBundle(ctx context.Context, repo distribution.Repository, b []byte) (*checked, error) {
	m, err := models.ParseManifest(b)
	if err != nil {
		return nil, invalid(err)
	}
	configBytes, err := read(ctx, repo, "the config", m.Config)
	if err != nil {
		return nil, err
	}
	config, err := models.ParseConfig(configBytes)
	if err != nil {
		return nil, invalid(err)
	}
	indexBytes, err := read(ctx, repo, "the chunk index", m.Index)
	if err != nil {
		return nil, err
	}
	index, err := models.ParseIndex(indexBytes, m)
	if err != nil {
		return nil, invalid(err)
	}

	sources := make(map[string]digest.Digest, len(m.Files))
	for _, f := range m.Files {
		have, err := stat(ctx, repo, "file "+f.Path, f.Digest, f.Size)
		if err != nil {
			return nil, err
		}
		sources[f.Path] = have.Digest
	}
	dir, remove, err := r.link(sources)
	if err != nil {
		return nil, err
	}
	defer remove()
	// The registry verified each file by its digest; agents verify and share
	// chunks, so those must be true too.
	for _, f := range index.GetFiles() {
		if err := verifyChunks(ctx, filepath.Join(dir, filepath.FromSlash(f.GetPath())), f); err != nil {
			return nil, err
		}
	}
	if config.Release != nil {
		if err := r.checkRelease(ctx, dir, m, config.Release); err != nil {
			return nil, err
		}
		return &checked{manifest: m, config: config}, nil
	}
	if _, ok := sources[config.Entry]; !ok {
		return nil, fmt.Errorf("%w: config: entry %q is not a file of the bundle", ErrInvalid, config.Entry)
	}
	// Inspected again here: requests are checked against the config, and
	// whoever pushed may have made it by hand.
	entry := filepath.Join(dir, filepath.FromSlash(config.Entry))
	g, err := models.Inspect(entry)
	if err != nil {
		return nil, invalid(err)
	}
	said, err := signature(config.Inputs, config.Outputs, config.Opset, config.Opsets)
	if err != nil {
		return nil, err
	}
	is, err := signature(g.Inputs, g.Outputs, g.Opset, g.Opsets)
	if err != nil {
		return nil, err
	}
	if said != is {
		return nil, fmt.Errorf("%w: the config says %s, the model is %s", ErrInvalid, said, is)
	}
	config.WeightBytes = g.WeightBytes
	if config.Costs, err = models.EstimateCosts(entry); err != nil {
		return nil, err
	}
	if config.Reference != "" {
		ref, err := models.ReadReference(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: config: reference %q is not a file of the bundle", ErrInvalid, config.Reference)
		}
		if err == nil {
			err = ref.Fits(config.Inputs, config.Outputs)
		}
		if err != nil {
			return nil, invalid(err)
		}
	}
	return &checked{manifest: m, config: config, weightTypes: g.WeightTypes}, nil
}

// signature writes what requests and runtimes go by, as a config does.
func signature(inputs, outputs []tensor.Info, opset int64, opsets map[string]int64) (string, error) {
	b, err := json.Marshal(models.Config{Inputs: inputs, Outputs: outputs, Opset: opset, Opsets: opsets})
	if err != nil {
		return "", fmt.Errorf("encode signature: %w", err)
	}
	return string(b), nil
}

// verifyChunks checks that a file is what its chunks say.
func verifyChunks(ctx context.Context, path string, f *dunlinv1.IndexedFile) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open file %s of the bundle: %w", f.GetPath(), err)
	}
	defer file.Close()
	h := sha256.New()
	for i, c := range f.GetChunks() {
		if err := ctx.Err(); err != nil {
			return err
		}
		h.Reset()
		if _, err := io.Copy(h, io.NewSectionReader(file, int64(c.GetOffset()), int64(c.GetLength()))); err != nil {
			return fmt.Errorf("read file %s of the bundle: %w", f.GetPath(), err)
		}
		if !bytes.Equal(h.Sum(nil), c.GetSha256()) {
			return fmt.Errorf("%w: chunk index: chunk %d of %s, at byte %d, is not what the file has there", ErrInvalid, i, f.GetPath(), c.GetOffset())
		}
	}
	return nil
}

// invalid makes ErrInvalid of what is wrong with the content.
func invalid(err error) error {
	if errors.Is(err, models.ErrInvalid) {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return err
}

// fromPlain makes a bundle of an ONNX file.
func (r *Registry) fromPlain(ctx context.Context, repo distribution.Repository, layer ocispec.Descriptor) (*checked, error) {
	have, err := stat(ctx, repo, "the only layer", layer.Digest, layer.Size)
	if err != nil {
		return nil, err
	}
	dir, remove, err := r.link(map[string]digest.Digest{plainName: have.Digest})
	if err != nil {
		return nil, err
	}
	defer remove()
	file := filepath.Join(dir, plainName)
	bundle, err := models.Pack(ctx, file, models.PackOptions{})
	if err != nil {
		return nil, invalid(err)
	}
	g, err := models.Inspect(file)
	if err != nil {
		return nil, invalid(err)
	}
	m, err := models.ParseManifest(bundle.ManifestBytes)
	if err != nil {
		return nil, invalid(err)
	}
	return &checked{
		manifest: m, config: &bundle.Config, weightTypes: g.WeightTypes,
		manifestBytes: bundle.ManifestBytes, configBytes: bundle.ConfigBytes, indexBytes: bundle.IndexBytes,
	}, nil
}

// link makes a folder of hard links to blobs, by path in the folder. It lies
// on the registry's own file system; remove takes it away.
func (r *Registry) link(blobs map[string]digest.Digest) (dir string, remove func(), err error) {
	parent := filepath.Join(r.root, ingestDir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", nil, fmt.Errorf("make ingest folder: %w", err)
	}
	dir, err = os.MkdirTemp(parent, "")
	if err != nil {
		return "", nil, fmt.Errorf("make ingest folder: %w", err)
	}
	remove = func() {
		if err := os.RemoveAll(dir); err != nil {
			r.log.Warn("cannot remove ingest folder", slog.Any("error", err))
		}
	}
	for path, d := range blobs {
		to := filepath.Join(dir, filepath.FromSlash(path))
		err := os.MkdirAll(filepath.Dir(to), 0o700)
		if err == nil {
			err = os.Link(r.blobPath(d), to)
		}
		if err != nil {
			remove()
			return "", nil, fmt.Errorf("link blob %s: %w", d, err)
		}
	}
	return dir, remove, nil
}

func (r *Registry) blobPath(d digest.Digest) string {
	return filepath.Join(r.root, filepath.FromSlash(blobFile(d)))
}
