package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dunlin/dunlin/models"
)

// Manifest is a manifest in a model's repository.
type Manifest struct {
	Model  string
	Digest digest.Digest
}

// The embedded registry's files, as paths below the registry's folder. A
// repository links to the blobs and manifests that it has; the content of both
// lies in one place for all.

func blobFile(d digest.Digest) string {
	return path.Join(storageDir, "blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data")
}

func repositoryFolder(model string) string { return path.Join(storageDir, "repositories", model) }

func layerLink(model string, d digest.Digest) string {
	return path.Join(repositoryFolder(model), "_layers", d.Algorithm().String(), d.Encoded(), "link")
}

func manifestLink(model string, d digest.Digest) string {
	return path.Join(repositoryFolder(model), "_manifests", "revisions", d.Algorithm().String(), d.Encoded(), "link")
}

func tagsFolder(model string) string { return path.Join(repositoryFolder(model), "_manifests", "tags") }

// blobsOf gives the blobs that a manifest names, the config first.
func blobsOf(manifest []byte) ([]digest.Digest, error) {
	var m struct {
		Config ocispec.Descriptor   `json:"config"`
		Layers []ocispec.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(manifest, &m); err != nil {
		return nil, fmt.Errorf("the manifest is not JSON: %w", err)
	}
	var blobs []digest.Digest
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if d.Digest == "" {
			continue
		}
		if err := d.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("digest %.100q: %w", d.Digest, err)
		}
		blobs = append(blobs, d.Digest)
	}
	return blobs, nil
}

func readBlobsOf(root string, d digest.Digest) ([]digest.Digest, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %.100q: %w", d, err)
	}
	file := filepath.Join(root, filepath.FromSlash(blobFile(d)))
	if info, err := os.Stat(file); err != nil {
		return nil, err
	} else if info.Size() > maxManifest {
		return nil, fmt.Errorf("manifest %s has %d bytes, the limit is %d", d, info.Size(), maxManifest)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return blobsOf(b)
}

// Files gives the files of a registry's folder, by name and with slashes,
// that hold manifests and all that they name: what a copy of the registry
// needs. All are there.
func Files(root string, manifests []Manifest) ([]string, error) {
	files := map[string]bool{}
	kept := map[string]map[string]bool{} // by model, the digests of its manifests
	for _, m := range manifests {
		if err := models.CheckName(m.Model); err != nil {
			return nil, err
		}
		blobs, err := readBlobsOf(root, m.Digest)
		if err != nil {
			return nil, fmt.Errorf("manifest %s of model %s: %w", m.Digest, m.Model, err)
		}
		files[blobFile(m.Digest)], files[manifestLink(m.Model, m.Digest)] = true, true
		for _, b := range blobs {
			files[blobFile(b)], files[layerLink(m.Model, b)] = true, true
		}
		if kept[m.Model] == nil {
			kept[m.Model] = map[string]bool{}
		}
		kept[m.Model][m.Digest.String()] = true
	}
	for model, digests := range kept {
		tags, err := tagsOf(root, model)
		if err != nil {
			return nil, err
		}
		for tag, d := range tags {
			if digests[d] {
				files[path.Join(tagsFolder(model), tag, "current", "link")] = true
			}
		}
	}
	names := make([]string, 0, len(files))
	for f := range files {
		if _, err := os.Stat(filepath.Join(root, filepath.FromSlash(f))); err != nil {
			return nil, err
		}
		names = append(names, f)
	}
	slices.Sort(names)
	return names, nil
}

// FileDigest gives the digest that the content of a file must have; false:
// the file is none that is named by its content.
func FileDigest(file string) (digest.Digest, bool) {
	parts := strings.Split(file, "/")
	if n := len(parts); n >= 5 && parts[n-1] == "data" && parts[n-5] == "blobs" {
		d := digest.NewDigestFromEncoded(digest.Algorithm(parts[n-4]), parts[n-2])
		return d, d.Validate() == nil
	}
	return "", false
}

// tagsOf gives what the tags of a model point to.
func tagsOf(root, model string) (map[string]string, error) {
	dir := filepath.Join(root, filepath.FromSlash(tagsFolder(model)))
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	tags := make(map[string]string, len(entries))
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name(), "current", "link"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is being made, or taken away
		}
		if err != nil {
			return nil, err
		}
		tags[e.Name()] = strings.TrimSpace(string(b))
	}
	return tags, nil
}
