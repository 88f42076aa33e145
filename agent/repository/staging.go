package repository

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unicode"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/triton"
	"github.com/dunlin/dunlin/proto/inference"
)

// Limits of what a caller may bring along.
const (
	maxStagedFiles = models.MaxFiles
	maxStagedBytes = 4 << 30 // of one load
	maxStagedPath  = 255     // bytes
)

// errDisk is the error of files that could not be written.
var errDisk = errors.New("files cannot be written")

// staging is the folder of what callers bring along; nil where there is none.
type staging struct {
	dir  string
	root *os.Root
}

// newStaging gives the folder, empty.
func newStaging(dir string) (*staging, error) {
	if dir == "" {
		return nil, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("folder for overrides: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("folder for overrides: %w", err)
	}
	s := &staging{dir, root}
	entries, err := fs.ReadDir(root.FS(), ".")
	for _, e := range entries {
		err = errors.Join(err, root.RemoveAll(e.Name()))
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("empty the folder for overrides: %w", err)
	}
	return s, nil
}

func (s *staging) close() {
	if s != nil {
		s.root.Close()
	}
}

// override is what a caller brought along for one load; nil for nothing.
type override struct {
	config *inference.ModelConfig // nil: the folder's
	staged *staged                // nil: the folder's files
}

// discard removes what an override brought that is not used.
func (o *override) discard() {
	if o != nil && o.staged != nil {
		_ = o.staged.remove() // at the next start the folder is emptied
	}
}

// staged is a folder in the staging folder.
type staged struct {
	staging *staging
	name    string
}

func (s *staged) dir() string { return filepath.Join(s.staging.dir, s.name) }

func (s *staged) remove() error { return s.staging.root.RemoveAll(s.name) }

// override reads the configuration of o and writes its files. What it gives
// shares no memory with o.
func (s *staging) override(o oip.Override) (*override, error) {
	if o.Config == nil && o.Files == nil {
		return nil, nil
	}
	if o.Config == nil {
		return nil, oip.Errorf(oip.InvalidArgument, "files can be given with the parameter config only")
	}
	config, err := triton.ParseJSON(o.Config)
	if err != nil {
		return nil, oip.Errorf(oip.InvalidArgument, "parameter config: %w", err)
	}
	over := &override{config: config}
	if o.Files == nil {
		return over, nil
	}
	if s == nil {
		return nil, oip.Errorf(oip.Unsupported, "this server has no folder for files that callers bring along")
	}
	var size int64
	for name, content := range o.Files {
		if err := checkStagedPath(name); err != nil {
			return nil, oip.Errorf(oip.InvalidArgument, "%w", err)
		}
		size += int64(len(content))
	}
	if len(o.Files) > maxStagedFiles || size > maxStagedBytes {
		return nil, oip.Errorf(oip.TooLarge, "%d files with %d bytes, allowed are %d with %d", len(o.Files), size, maxStagedFiles, int64(maxStagedBytes))
	}
	over.staged = &staged{s, rand.Text()}
	if err := s.write(over.staged.name, o.Files); err != nil {
		over.discard()
		return nil, err
	}
	return over, nil
}

// checkStagedPath says whether a file can have this path in a model's folder.
func checkStagedPath(p string) error {
	switch {
	case p == "" || len(p) > maxStagedPath:
		return fmt.Errorf("file %.80q: the path has %d bytes, allowed are 1 to %d", p, len(p), maxStagedPath)
	case !filepath.IsLocal(p) || path.Clean(p) != p || p == "." || strings.Contains(p, `\`) || strings.ContainsFunc(p, unicode.IsControl):
		return fmt.Errorf("file %q: the path is not one of a file in the model's folder", p)
	}
	return nil
}

// write makes a folder with these files.
func (s *staging) write(name string, files map[string][]byte) error {
	if err := s.root.Mkdir(name, 0o700); err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	root, err := s.root.OpenRoot(name)
	if err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	defer root.Close()
	for _, p := range slices.Sorted(maps.Keys(files)) {
		err := root.MkdirAll(path.Dir(p), 0o700)
		if err == nil {
			err = root.WriteFile(p, files[p], 0o600)
		}
		switch {
		case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, fs.ErrExist):
			return oip.Errorf(oip.InvalidArgument, "file %q: another file is where its folder would be, or the other way round", p)
		case err != nil:
			return fmt.Errorf("%w: %w", errDisk, err)
		}
	}
	return nil
}
