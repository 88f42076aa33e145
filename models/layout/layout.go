// Package layout reads and writes OCI image layouts: bundles, the signatures
// that refer to them, and trust documents, in a folder or a tar file, as any
// OCI tool reads them.
//
// In index.json each bundle has the annotation org.opencontainers.image.ref.name
// with MODEL:VERSION; signatures are listed beside it by their artifact type.
package layout

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The limits of a layout.
const (
	// MaxIndexBytes bounds index.json.
	MaxIndexBytes = 4 << 20
	// maxEntries bounds the files of a tar file.
	maxEntries = 100_000
	// copyStep is how much is copied between two looks at the context.
	copyStep = 4 << 20
)

// AlteredError says that a blob is not what its digest promises.
type AlteredError struct {
	Digest digest.Digest
	Err    error
}

func (e *AlteredError) Error() string {
	return fmt.Sprintf("blob %s is damaged or was altered: %v", e.Digest, e.Err)
}

func (e *AlteredError) Unwrap() error { return e.Err }

// Layout is a layout that is read. It may be used by many goroutines.
type Layout struct {
	Index ocispec.Index

	root    *os.Root           // of a folder
	file    *os.File           // of a tar file
	entries map[string]section // by path in the tar file
}

type section struct{ offset, size int64 }

// Open opens the folder or tar file at path.
func Open(path string) (*Layout, error) {
	l, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("open OCI layout %s: %w", path, err)
	}
	return l, nil
}

func open(path string) (l *Layout, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	l = &Layout{}
	if info.IsDir() {
		l.root, err = os.OpenRoot(path)
	} else if l.file, err = os.Open(path); err == nil {
		l.entries, err = scan(l.file)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if err := l.readIndex(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Layout) readIndex() error {
	var kind ocispec.ImageLayout
	if err := l.json(ocispec.ImageLayoutFile, &kind); err != nil {
		return err
	}
	if kind.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%s: imageLayoutVersion is %.40q, this reads %s", ocispec.ImageLayoutFile, kind.Version, ocispec.ImageLayoutVersion)
	}
	return l.json(ocispec.ImageIndexFile, &l.Index)
}

func (l *Layout) json(name string, to any) error {
	f, size, err := l.find(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if size > MaxIndexBytes {
		return fmt.Errorf("%s has %d bytes, allowed are %d", name, size, MaxIndexBytes)
	}
	raw, err := io.ReadAll(io.LimitReader(f, size))
	if err == nil {
		err = json.Unmarshal(raw, to)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// scan finds the files of a tar file.
func scan(f *os.File) (map[string]section, error) {
	entries := map[string]section{}
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entries, nil
		} else if err != nil {
			return nil, fmt.Errorf("it is neither a folder nor a tar file: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if len(entries) == maxEntries {
			return nil, fmt.Errorf("it has more than %d files", maxEntries)
		}
		at, err := f.Seek(0, io.SeekCurrent) // the reader reads no further than it must
		if err != nil {
			return nil, err
		}
		entries[strings.TrimPrefix(h.Name, "./")] = section{at, h.Size}
	}
}

// Close closes it.
func (l *Layout) Close() error {
	if l.root != nil {
		return l.root.Close()
	}
	if l.file != nil {
		return l.file.Close()
	}
	return nil
}

// Blob is one that is read, from any place.
type Blob interface {
	io.Reader
	io.ReaderAt
	io.Closer
}

type part struct{ *io.SectionReader }

func (part) Close() error { return nil }

func (l *Layout) find(name string) (Blob, int64, error) {
	if l.file != nil {
		s, ok := l.entries[name]
		if !ok {
			return nil, 0, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		}
		return part{io.NewSectionReader(l.file, s.offset, s.size)}, s.size, nil
	}
	f, err := l.root.Open(filepath.FromSlash(name))
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

func blobPath(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return "", fmt.Errorf("digest %.80q is not sha256: and 64 hexadecimal digits", d)
	}
	return ocispec.ImageBlobsDir + "/sha256/" + d.Encoded(), nil
}

// Open opens a blob, which nobody has verified, and says how long it is. The
// error is fs.ErrNotExist where there is none.
func (l *Layout) Open(d digest.Digest) (Blob, int64, error) {
	name, err := blobPath(d)
	if err != nil {
		return nil, 0, err
	}
	return l.find(name)
}

// Small reads a blob of at most limit bytes and verifies it.
func (l *Layout) Small(d digest.Digest, limit int64) ([]byte, error) {
	b, size, err := l.Open(d)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if size > limit {
		return nil, &AlteredError{d, fmt.Errorf("it has %d bytes, allowed are %d", size, limit)}
	}
	raw, err := io.ReadAll(b)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	if got := digest.FromBytes(raw); got != d {
		return nil, &AlteredError{d, fmt.Errorf("it has digest %s", got)}
	}
	return raw, nil
}

// From gives a blob's bytes from an offset on.
type From func(ctx context.Context, offset int64) (io.ReadCloser, error)

// FromLayout gives those of a blob of another layout.
func FromLayout(l *Layout, d digest.Digest) From {
	return func(_ context.Context, offset int64) (io.ReadCloser, error) {
		b, size, err := l.Open(d)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.NewSectionReader(b, offset, size-offset), b}, nil
	}
}

// FromBytes gives those that are there.
func FromBytes(raw []byte) From {
	return func(_ context.Context, offset int64) (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(string(raw[offset:]))), nil
	}
}

// Writer writes a layout. Its methods are for one goroutine.
type Writer interface {
	// Put brings a blob in, unless it is there, and verifies it. An error is
	// *AlteredError where from gives other bytes.
	Put(ctx context.Context, d digest.Digest, size int64, from From) error
	// Commit adds manifests to the index, in place of those with the same
	// name or digest; only then does the layout hold them.
	Commit(manifests []ocispec.Descriptor) error
}

var layoutFile = []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`)

// merge adds manifests to an index.
func merge(index *ocispec.Index, manifests []ocispec.Descriptor) {
	for _, m := range manifests {
		name := m.Annotations[ocispec.AnnotationRefName]
		index.Manifests = slices.DeleteFunc(index.Manifests, func(o ocispec.Descriptor) bool {
			return o.Digest == m.Digest && o.Annotations[ocispec.AnnotationRefName] == name || name != "" && o.Annotations[ocispec.AnnotationRefName] == name
		})
		index.Manifests = append(index.Manifests, m)
	}
}

func newIndex() ocispec.Index {
	return ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
}

// Folder is a layout in a folder that is written. What a crash or an error has
// left of a blob is gone on with.
type Folder struct {
	dir   string
	index ocispec.Index
}

const partSuffix = ".part"

// CreateFolder opens the layout in dir for writing, or makes one there.
func CreateFolder(dir string) (*Folder, error) {
	fail := func(err error) (*Folder, error) { return nil, fmt.Errorf("write OCI layout %s: %w", dir, err) }
	if err := os.MkdirAll(filepath.Join(dir, ocispec.ImageBlobsDir, "sha256"), 0o755); err != nil {
		return fail(err)
	}
	f := &Folder{dir: dir, index: newIndex()}
	if _, err := os.Stat(filepath.Join(dir, ocispec.ImageIndexFile)); err == nil {
		have, err := open(dir)
		if err != nil {
			return fail(err)
		}
		f.index = have.Index
		return f, have.Close()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	if err := replace(filepath.Join(dir, ocispec.ImageLayoutFile), layoutFile); err != nil {
		return fail(err)
	}
	return f, nil
}

// Index is what the layout holds.
func (f *Folder) Index() ocispec.Index { return f.index }

// has says whether a blob is there, whole.
func (f *Folder) has(ctx context.Context, path string, d digest.Digest, size int64) (bool, error) {
	in, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer in.Close()
	h := sha256.New()
	err = copyVerified(ctx, h, h, d, size, in)
	if _, altered := errors.AsType[*AlteredError](err); altered {
		return false, nil
	}
	return err == nil, err
}

// Put implements Writer.
func (f *Folder) Put(ctx context.Context, d digest.Digest, size int64, from From) (err error) {
	name, err := blobPath(d)
	if err != nil {
		return err
	}
	path := filepath.Join(f.dir, name)
	if has, err := f.has(ctx, path, d, size); has || err != nil {
		return err
	}
	out, err := os.OpenFile(path+partSuffix, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err == nil {
			err = os.Rename(path+partSuffix, path)
		}
		if err == nil {
			err = syncFolder(filepath.Dir(path))
		}
	}()
	h := sha256.New()
	have, err := io.Copy(h, io.LimitReader(out, size))
	if err != nil {
		return err
	}
	in := io.NopCloser(strings.NewReader(""))
	if have < size {
		if in, err = from(ctx, have); err != nil {
			return err
		}
	}
	defer in.Close()
	if err := copyVerified(ctx, io.MultiWriter(out, h), h, d, size-have, in); err != nil {
		if _, altered := errors.AsType[*AlteredError](err); altered {
			err = errors.Join(err, out.Truncate(0)) // it may be the part that was there
		}
		return err
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	return out.Sync()
}

// copyVerified copies so many bytes, and says whether with them h is d's.
func copyVerified(ctx context.Context, w io.Writer, h hash.Hash, d digest.Digest, bytes int64, in io.Reader) error {
	for left := bytes; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(w, in, min(left, copyStep))
		left -= n
		if errors.Is(err, io.EOF) {
			return &AlteredError{d, fmt.Errorf("%d of its bytes are missing", left)}
		} else if err != nil {
			return err
		}
	}
	if got := digest.NewDigest(digest.SHA256, h); got != d {
		return &AlteredError{d, fmt.Errorf("it has digest %s", got)}
	}
	return nil
}

// Commit implements Writer.
func (f *Folder) Commit(manifests []ocispec.Descriptor) error {
	next := f.index
	next.Manifests = slices.Clone(next.Manifests)
	merge(&next, manifests)
	return f.setIndex(next)
}

func (f *Folder) setIndex(index ocispec.Index) error {
	raw, err := json.Marshal(index)
	if err == nil && len(raw) > MaxIndexBytes {
		err = fmt.Errorf("%s would have %d bytes, allowed are %d", ocispec.ImageIndexFile, len(raw), MaxIndexBytes)
	}
	if err == nil {
		err = replace(filepath.Join(f.dir, ocispec.ImageIndexFile), raw)
	}
	if err != nil {
		return fmt.Errorf("write OCI layout %s: %w", f.dir, err)
	}
	f.index = index
	return nil
}

// Keep takes manifests out of the index but those that keep says, and then
// every blob that is none of needed.
func (f *Folder) Keep(keep func(ocispec.Descriptor) bool, needed func(digest.Digest) bool) error {
	next := f.index
	next.Manifests = slices.DeleteFunc(slices.Clone(next.Manifests), func(d ocispec.Descriptor) bool { return !keep(d) })
	if err := f.setIndex(next); err != nil {
		return err
	}
	dir := filepath.Join(f.dir, ocispec.ImageBlobsDir, "sha256")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		d := digest.NewDigestFromEncoded(digest.SHA256, strings.TrimSuffix(e.Name(), partSuffix))
		if needed(d) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// replace replaces a file; after a crash there is the old or the new one.
func replace(path string, raw []byte) error {
	f, err := os.OpenFile(path+partSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+partSuffix, path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Tar is a layout in a tar file that is written, from its beginning to its end.
type Tar struct {
	path  string
	file  *os.File
	tar   *tar.Writer
	has   map[digest.Digest]bool
	index ocispec.Index
}

// CreateTar begins one that is to be at path. Close ends it.
func CreateTar(path string) (*Tar, error) {
	f, err := os.OpenFile(path+partSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return nil, err
	}
	t := &Tar{path: path, file: f, tar: tar.NewWriter(f), has: map[digest.Digest]bool{}, index: newIndex()}
	if err := t.write(ocispec.ImageLayoutFile, layoutFile); err != nil {
		return nil, errors.Join(err, t.Abort())
	}
	return t, nil
}

func (t *Tar) header(name string, size int64) error {
	return t.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644})
}

func (t *Tar) write(name string, raw []byte) error {
	if err := t.header(name, int64(len(raw))); err != nil {
		return err
	}
	_, err := t.tar.Write(raw)
	return err
}

// Put implements Writer. After an error the file is of no use.
func (t *Tar) Put(ctx context.Context, d digest.Digest, size int64, from From) error {
	name, err := blobPath(d)
	if err != nil || t.has[d] {
		return err
	}
	in, err := from(ctx, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := t.header(name, size); err != nil {
		return err
	}
	h := sha256.New()
	if err := copyVerified(ctx, io.MultiWriter(t.tar, h), h, d, size, in); err != nil {
		return err
	}
	t.has[d] = true
	return nil
}

// Commit implements Writer.
func (t *Tar) Commit(manifests []ocispec.Descriptor) error {
	merge(&t.index, manifests)
	return nil
}

// Close writes what is left, and gives the file its name.
func (t *Tar) Close() error {
	raw, err := json.Marshal(t.index)
	if err == nil {
		err = t.write(ocispec.ImageIndexFile, raw)
	}
	if err == nil {
		err = t.tar.Close()
	}
	if err == nil {
		err = t.file.Sync()
	}
	if err != nil {
		return errors.Join(err, t.Abort())
	}
	if err := t.file.Close(); err != nil {
		return err
	}
	if err := os.Rename(t.path+partSuffix, t.path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(t.path))
}

// Abort gives the file up.
func (t *Tar) Abort() error {
	return errors.Join(t.file.Close(), os.Remove(t.path+partSuffix))
}

var (
	_ Writer = (*Folder)(nil)
	_ Writer = (*Tar)(nil)
)
