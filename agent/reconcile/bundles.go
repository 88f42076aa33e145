package reconcile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The names in a bundle's folder. The folder of a verified bundle is called
// by the hexadecimal digits of its digest; while it is being fetched it has
// the suffix partSuffix, and goneSuffix while it is being removed. A rename
// separates the three, so that a crash leaves no half of anything that is
// called verified.
const (
	manifestFile = "manifest.json"
	configFile   = "config.json"
	indexFile    = "chunks.pb"
	looksFile    = "verified.json" // what its files looked like when they were verified
	filesFolder  = "files"
	partSuffix   = ".part"
	goneSuffix   = ".gone"
)

// bundles is the folder that holds the bundles of a device. One digest must
// not be used by two calls at a time.
type bundles struct {
	dir string
}

// storage is where a device's bundles are: a folder, or a simulated disk.
type storage interface {
	open(digest.Digest) (*bundle, error)
	list() (whole, part []digest.Digest, err error)
	remove(digest.Digest) error
}

// openBundles makes the folder where it is missing and finishes removals
// that a crash cut short.
func openBundles(dir string) (*bundles, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	b := &bundles{dir: dir}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), goneSuffix) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
		}
	}
	return b, nil
}

func (b *bundles) path(d digest.Digest) string { return filepath.Join(b.dir, d.Encoded()) }

// bundle is a verified bundle on disk.
type bundle struct {
	dir      string // absolute folder of the bundle's files
	config   *models.Config
	manifest *models.Manifest
}

// open gives the verified bundle of a digest; its error is fs.ErrNotExist
// where there is none. A bundle whose files have not the sizes that its
// manifest says, as after a repair of the file system, is removed; one that
// cannot be read just now is not.
func (b *bundles) open(d digest.Digest) (*bundle, error) {
	dir := b.path(d)
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	found, err := readBundle(dir)
	if err == nil {
		return found, nil
	}
	for _, scarce := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, scarce) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: bundle %s %w (%w)", fs.ErrNotExist, d, errDamaged, errors.Join(err, b.remove(d)))
}

var errDamaged = errors.New("is damaged")

func readBundle(dir string) (*bundle, error) {
	raw, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, err
	}
	m, err := models.ParseManifest(raw)
	if err != nil {
		return nil, err
	}
	if m.Digest.Encoded() != strings.TrimSuffix(filepath.Base(dir), partSuffix) {
		return nil, fmt.Errorf("its manifest has digest %s", m.Digest)
	}
	raw, err = os.ReadFile(filepath.Join(dir, configFile))
	if err != nil {
		return nil, err
	}
	if got := digest.FromBytes(raw); got != m.Config.Digest {
		return nil, fmt.Errorf("its config has digest %s", got)
	}
	cfg, err := models.ParseConfig(raw)
	if err != nil {
		return nil, err
	}
	if _, ok := m.File(cfg.Entry); !ok {
		return nil, fmt.Errorf("its config's entry %q is not one of its files", cfg.Entry)
	}
	found := &bundle{dir: filepath.Join(dir, filesFolder), config: cfg, manifest: m}
	for _, f := range m.Files {
		info, err := os.Stat(filepath.Join(found.dir, filepath.FromSlash(f.Path)))
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() || info.Size() != f.Size {
			return nil, fmt.Errorf("file %s has %d bytes, its manifest says %d", f.Path, info.Size(), f.Size)
		}
	}
	return found, nil
}

// readIndex reads the chunk index in the folder of a bundle, whole or part.
func readIndex(dir string) (*dunlinv1.ChunkIndex, error) {
	raw, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, err
	}
	m, err := models.ParseManifest(raw)
	if err != nil {
		return nil, err
	}
	if raw, err = os.ReadFile(filepath.Join(dir, indexFile)); err != nil {
		return nil, err
	}
	return models.ParseIndex(raw, m)
}

// list gives the digests of the verified bundles and of the partial ones.
func (b *bundles) list() (whole, part []digest.Digest, err error) {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		name, isPart := strings.CutSuffix(e.Name(), partSuffix)
		d := digest.NewDigestFromEncoded(digest.SHA256, name)
		if d.Validate() != nil || !e.IsDir() {
			continue
		}
		if isPart {
			part = append(part, d)
		} else {
			whole = append(whole, d)
		}
	}
	return whole, part, nil
}

// folders gives the folders of all bundles, verified ones first, without those
// of one digest where that is said.
func (b *bundles) folders(of digest.Digest, without bool) ([]string, error) {
	whole, part, err := b.list()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, d := range whole {
		dirs = append(dirs, b.path(d))
	}
	for _, d := range part {
		dirs = append(dirs, b.path(d)+partSuffix)
	}
	return slices.DeleteFunc(dirs, func(dir string) bool {
		return without && strings.TrimSuffix(filepath.Base(dir), partSuffix) == of.Encoded()
	}), nil
}

// install gives a complete part its final name. All files must be on disk.
func (b *bundles) install(d digest.Digest) error {
	if err := os.Rename(b.path(d)+partSuffix, b.path(d)); err != nil {
		return err
	}
	return syncFolder(b.dir)
}

// remove removes a bundle, whole or part.
func (b *bundles) remove(d digest.Digest) error {
	gone := b.path(d) + goneSuffix
	for _, dir := range []string{b.path(d), b.path(d) + partSuffix} {
		if err := os.RemoveAll(gone); err != nil {
			return err
		}
		if err := os.Rename(dir, gone); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if err := os.RemoveAll(gone); err != nil {
			return err
		}
	}
	return nil
}

// syncFolder makes the names in a folder durable.
func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
