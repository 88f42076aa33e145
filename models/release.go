package models

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// AgentModel is the reserved name of the model whose versions are releases of
// the agent program. Their bundles hold binaries and nothing else.
const AgentModel = "dunlin-agent"

// The files of a release: OS-ARCH/ReleaseFile, and its signature beside it.
const (
	ReleaseFile      = "dunlin-agent"
	ReleaseSignature = ReleaseFile + ".sig"
	// MaxReleaseFile bounds a binary, and MaxReleaseSignature a signature.
	MaxReleaseFile      = 512 << 20
	MaxReleaseSignature = 1 << 20
	maxReleaseBinaries  = 16
)

// Release says what a bundle of the agent program is.
type Release struct {
	Version  string   `json:"version"`  // of the program: "0.8.0"
	Binaries []string `json:"binaries"` // what there is one for, in order: "linux-amd64"
}

// ReleaseBinary is a binary that is to be part of a release.
type ReleaseBinary struct {
	OS, Arch          string
	Source, Signature string // paths of the local files
}

// PlatformOf is what the folder of a release's binary is called.
func PlatformOf(os, arch string) string { return os + "-" + arch }

// PackRelease makes a bundle of signed binaries of one version of the agent.
// Whether they are what they are said to be is for its receivers.
func PackRelease(ctx context.Context, version string, binaries []ReleaseBinary) (*Bundle, error) {
	r := &Release{Version: version}
	b := &Bundle{Config: Config{Format: configFormat, Release: r}}
	for _, from := range binaries {
		p := PlatformOf(from.OS, from.Arch)
		r.Binaries = append(r.Binaries, p)
		b.Files = append(b.Files,
			BundleFile{File{Path: p + "/" + ReleaseFile}, from.Source}, BundleFile{File{Path: p + "/" + ReleaseSignature}, from.Signature})
	}
	slices.Sort(r.Binaries)
	if err := r.check(); err != nil {
		return nil, err
	}
	config := struct {
		Format  int      `json:"format"`
		Release *Release `json:"release"`
	}{configFormat, r}
	var err error
	if b.ConfigBytes, err = json.Marshal(config); err != nil {
		return nil, fmt.Errorf("encode config: %w", err)
	}
	if err := b.seal(ctx); err != nil {
		return nil, err
	}
	m, err := ParseManifest(b.ManifestBytes)
	if err != nil {
		return nil, err
	}
	return b, r.Fits(m)
}

// check says what is wrong with the release itself.
func (r *Release) check() error {
	if _, err := ParseRelease(r.Version); err != nil {
		return invalid("version: %v", err)
	}
	if n := len(r.Binaries); n < 1 || n > maxReleaseBinaries {
		return invalid("a release has %d binaries, allowed are 1 to %d", n, maxReleaseBinaries)
	}
	for i, p := range r.Binaries {
		os, arch, ok := strings.Cut(p, "-")
		if !ok || !platformWord(os) || !platformWord(arch) {
			return invalid("binaries[%d] %q is not OS-ARCH, as linux-amd64", i, shorten(p))
		}
		if i > 0 && r.Binaries[i-1] >= p {
			return invalid("binaries[%d] %q is not in order, or is there twice", i, p)
		}
	}
	return nil
}

func platformWord(s string) bool {
	const most = 16
	return s != "" && len(s) <= most && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789") == ""
}

// Fits says whether a bundle has exactly the files of the release.
func (r *Release) Fits(m *Manifest) error {
	if got, want := len(m.Files), 2*len(r.Binaries); got != want {
		return invalid("the bundle has %d files, a release of %d binaries has %d", got, len(r.Binaries), want)
	}
	for _, p := range r.Binaries {
		for name, most := range map[string]int64{ReleaseFile: MaxReleaseFile, ReleaseSignature: MaxReleaseSignature} {
			f, ok := m.File(p + "/" + name)
			if !ok {
				return invalid("the bundle lacks %s/%s", p, name)
			}
			if f.Size > most {
				return invalid("%s has %d bytes, allowed are %d", f.Path, f.Size, most)
			}
		}
	}
	return nil
}

// ParseRelease reads the version of a program: "0.7.0".
func ParseRelease(s string) (numbers [3]uint64, err error) {
	parts := strings.Split(s, ".")
	for i := range numbers {
		if len(parts) == len(numbers) {
			numbers[i], err = strconv.ParseUint(parts[i], 10, 32)
		}
		if len(parts) != len(numbers) || err != nil || strconv.FormatUint(numbers[i], 10) != parts[i] {
			return numbers, fmt.Errorf("%.80q is not three numbers, as 0.7.0", s)
		}
	}
	return numbers, nil
}

// CompareReleases orders two versions of the form "0.7.0"; what has another
// form is below all that have it.
func CompareReleases(a, b string) int {
	x, errX := ParseRelease(a)
	y, errY := ParseRelease(b)
	switch {
	case errX != nil && errY != nil:
		return 0
	case errX != nil:
		return -1
	case errY != nil:
		return 1
	}
	return cmp.Or(cmp.Compare(x[0], y[0]), cmp.Compare(x[1], y[1]), cmp.Compare(x[2], y[2]))
}

// ChunkFile cuts the local file at source as a bundle's files are cut, and
// describes it as path.
func ChunkFile(ctx context.Context, source, path string) (*dunlinv1.IndexedFile, error) {
	return chunkFile(ctx, source, path)
}
