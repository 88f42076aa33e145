package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/models/layout"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// importsFolder holds what was imported and is not installed yet, as an OCI
	// image layout.
	importsFolder = "imports"
	// importsEvery is how often a running agent looks for what was imported.
	importsEvery = 3 * time.Second
	// importsWait bounds the wait for another process that works there.
	importsWait = 10 * time.Second
)

// Import takes bundles in from an OCI image layout, for the agent that runs on
// this device, or will: where a desired document wants one of them, it comes
// from here and not from the network. Everything is verified as if it had come
// from there. args are the program's arguments.
func Import(ctx context.Context, args []string, getenv func(string) string, out, help io.Writer) error {
	about, err := aboutPath(ctx, program.Source{
		Program: "dunlin-agent import", Synopsis: "PATH", Args: args, Getenv: getenv, Help: help,
		Notes: "Takes model versions in from the OCI image layout at PATH, a folder or a tar file, as dunlin bundle export writes it.\n" + commands,
	})
	if err != nil || about == nil {
		return err
	}
	store, path := about.store, about.path
	defer store.Close()
	taken, err := importFrom(ctx, about.data, path, store, time.Now())
	if _, ok := errors.AsType[*signing.RefusedError](err); ok {
		_, lost := store.Append(ctx, &dunlinv1.Event{
			Kind: "import.refused", Severity: dunlinv1.Severity_SEVERITY_ERROR, Message: fmt.Sprintf("%s: %v", filepath.Base(path), err),
		})
		err = errors.Join(err, lost)
	}
	if err != nil {
		return fmt.Errorf("import %s: %w", path, err)
	}
	for _, b := range taken {
		if _, err := fmt.Fprintf(out, "%s %s\n", b.Ref(), b.Manifest.Digest); err != nil {
			return err
		}
	}
	return nil
}

// importFrom verifies all documents first, then the room on the disk, and then
// copies. What is taken in counts at the very end.
func importFrom(ctx context.Context, data, path string, store *state.Store, now time.Time) (_ []*layout.Bundle, err error) {
	from, err := layout.Open(path)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	bundles, chain, err := from.Contents()
	if err != nil {
		return nil, err
	}
	if len(bundles) == 0 {
		return nil, fmt.Errorf("it holds no model versions: none of its manifests has an annotation %s with MODEL:VERSION", ocispec.AnnotationRefName)
	}
	trust, err := store.Trust(ctx)
	if errors.Is(err, state.ErrNone) {
		return nil, errors.New("the device does not know whom to trust: it has joined no controller yet")
	} else if err != nil {
		return nil, err
	}
	if trust, err = signing.Advance(trust, newer(trust, chain)); err != nil {
		return nil, &signing.RefusedError{Reason: err.Error()}
	}
	var manifests []ocispec.Descriptor
	var blobs []ocispec.Descriptor
	for _, d := range from.Index.Manifests {
		if d.ArtifactType == layout.TrustType && len(chain) > 0 {
			trustBlobs, descriptor, err := layout.TrustArtifact(chain)
			if err != nil {
				return nil, err
			}
			manifests = append(manifests, descriptor)
			for d, raw := range trustBlobs {
				blobs = append(blobs, ocispec.Descriptor{Digest: d, Size: int64(len(raw)), Data: raw})
			}
		}
	}
	for _, b := range bundles {
		if err := trust.Admit(b.Model, b.Version, b.Manifest, b.Signatures, now); err != nil {
			return nil, fmt.Errorf("refused: %s: %w", b.Ref(), err)
		}
		manifests = append(append(manifests, b.Descriptor), b.Referrers...)
		blobs = append(blobs, b.Blobs...)
	}
	dir := filepath.Join(data, importsFolder)
	unlock, err := lockImports(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, giveTo(data, dir)) // also what is left of one that failed
		unlock()
	}()
	if err := checkImportRoom(dir, blobs); err != nil {
		return nil, err
	}
	to, err := layout.CreateFolder(dir)
	if err != nil {
		return nil, err
	}
	for _, b := range blobs {
		source := layout.FromLayout(from, b.Digest)
		if b.Data != nil {
			source = layout.FromBytes(b.Data)
		}
		if err := to.Put(ctx, b.Digest, b.Size, source); err != nil {
			return nil, err
		}
	}
	if err := to.Commit(manifests); err != nil {
		return nil, err
	}
	return bundles, nil
}

// newer leaves out of a chain of trust documents those before the one that is
// had.
func newer(have *signing.Trust, chain []*dunlinv1.SignedTrust) []*dunlinv1.SignedTrust {
	return slices.DeleteFunc(slices.Clone(chain), func(s *dunlinv1.SignedTrust) bool {
		d, err := signing.ParseTrustDocument(s)
		return err == nil && d.GetVersion() < have.Version()
	})
}

// lockImports keeps others out of the folder, which it makes.
func lockImports(ctx context.Context, dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(importsWait)
	for {
		lock, err := program.LockFolder(dir)
		if err == nil {
			return func() { lock.Close() }, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("another import goes on: %w", err)
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return nil, ctx.Err()
		}
	}
}

// checkImportRoom refuses an import that does not fit on the disk.
func checkImportRoom(dir string, blobs []ocispec.Descriptor) error {
	need := int64(0)
	for _, b := range blobs {
		info, err := os.Stat(filepath.Join(dir, ocispec.ImageBlobsDir, "sha256", b.Digest.Encoded()))
		if err != nil || info.Size() != b.Size {
			need += b.Size
		}
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	// It is written twice: here, and as the bundle.
	if free := int64(s.Bavail) * s.Bsize; free/2 < need {
		return fmt.Errorf("not enough room on disk: the import needs %d bytes, twice until it is installed, %d are free", need, free)
	}
	return nil
}

// giveTo makes what root has imported the agent's.
func giveTo(data, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(data)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || owner.Uid == 0 {
		return nil
	}
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(owner.Uid), int(owner.Gid))
	})
}

// imports is the folder of what was imported, as the agent reads it.
type imports struct{ dir string }

// source gives the folder as a source, where a bundle was imported as a whole.
func (i *imports) source(bundle digest.Digest) reconcile.Source {
	l, err := layout.Open(i.dir)
	if err != nil {
		return nil // there is none, mostly
	}
	defer l.Close()
	if !slices.ContainsFunc(l.Index.Manifests, func(d ocispec.Descriptor) bool { return d.Digest == bundle }) {
		return nil
	}
	return i
}

func (i *imports) path(d digest.Digest) (string, bool) {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return "", false
	}
	return filepath.Join(i.dir, ocispec.ImageBlobsDir, "sha256", d.Encoded()), true
}

// String implements reconcile.Source.
func (*imports) String() string { return "what was imported" }

// Streams implements reconcile.Source.
func (*imports) Streams() int { return 2 }

// Get implements reconcile.Source.
func (i *imports) Get(_ context.Context, r reconcile.Ref, offset, _ int64) (*reconcile.Body, error) {
	path, ok := i.path(r.Digest)
	if !ok {
		return nil, reconcile.ErrAbsent
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, reconcile.ErrAbsent
	} else if err != nil {
		return nil, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &reconcile.Body{ReadCloser: f, Offset: offset}, nil
}

// followImports has the reconciler look again when something was imported, and
// removes what is installed, until ctx is done.
func (a *agent) followImports(ctx context.Context) error {
	var last time.Time
	for {
		if err := a.lookAtImports(ctx, &last); err != nil && ctx.Err() == nil {
			a.cfg.Log.Warn("what was imported", "error", err)
		}
		if !sleep(ctx, importsEvery) {
			return nil
		}
	}
}

// lookAtImports looks once; last is when the index was written that was seen.
func (a *agent) lookAtImports(ctx context.Context, last *time.Time) error {
	info, err := os.Stat(filepath.Join(a.imports.dir, ocispec.ImageIndexFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	l, err := layout.Open(a.imports.dir)
	if err != nil {
		return err
	}
	defer l.Close()
	if !info.ModTime().Equal(*last) { // the clock may have been set back
		*last = info.ModTime()
		bundles, chain, err := l.Contents()
		if err != nil {
			return err
		}
		if have := a.follow.Trust(); have != nil && len(chain) > 0 {
			if err := a.follow.TakeTrust(ctx, newer(have, chain)); err != nil {
				return err
			}
		}
		for _, b := range bundles {
			a.cfg.Log.Info("imported", "model", b.Model, "version", b.Version)
		}
		a.follow.Reconcile.Retry()
	}
	return a.pruneImports(l)
}

// pruneImports removes those bundles that are installed.
func (a *agent) pruneImports(l *layout.Layout) error {
	installed := func(d ocispec.Descriptor) bool {
		_, err := os.Stat(filepath.Join(a.cfg.Data, bundlesFolder, d.Digest.Encoded()))
		return err == nil
	}
	if !slices.ContainsFunc(l.Index.Manifests, installed) {
		return nil
	}
	lock, err := program.LockFolder(a.imports.dir)
	if err != nil {
		return nil // an import goes on; the next look does it
	}
	defer lock.Close()
	if l, err = layout.Open(a.imports.dir); err != nil { // an import may have ended meanwhile
		return err
	}
	defer l.Close()
	bundles, _, err := l.Contents()
	if err != nil {
		return err
	}
	keep, needed := map[digest.Digest]bool{}, map[digest.Digest]bool{}
	for _, b := range bundles {
		if installed(b.Descriptor) {
			continue
		}
		keep[b.Descriptor.Digest] = true
		for _, r := range b.Referrers {
			keep[r.Digest] = true
		}
		for _, d := range b.Blobs {
			needed[d.Digest] = true
		}
	}
	to, err := layout.CreateFolder(a.imports.dir)
	if err != nil {
		return err
	}
	return to.Keep(func(d ocispec.Descriptor) bool { return keep[d.Digest] }, func(d digest.Digest) bool { return needed[d] })
}
