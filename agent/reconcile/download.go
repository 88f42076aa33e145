package reconcile

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// chunkRetries is how often a chunk or document whose bytes are wrong is
// asked for again before the bundle is refused.
const chunkRetries = 2

// VerifyError says that the bytes of a bundle are not those that its digest
// promises, however often they are asked for.
type VerifyError struct {
	File   string // path in the bundle, or "manifest", "config", "chunk index"
	Offset int64
	Err    error
}

func (e *VerifyError) Error() string {
	return fmt.Sprintf("verify %s at offset %d: %v", e.File, e.Offset, e.Err)
}

func (e *VerifyError) Unwrap() error { return e.Err }

// errNoRoom is the error of a download that would fill the disk.
var errNoRoom = errors.New("not enough room on disk")

// piece is one chunk of one of the bundle's files.
type piece struct {
	file   int // position in the manifest
	offset int64
	length int
	sum    [sha256.Size]byte
	have   bool
	tries  int // answers with wrong bytes so far
}

// download brings one bundle onto the disk. It holds what is known of the
// part on disk between calls of run; a new one finds out by hashing it.
type download struct {
	store  *bundles
	remote Source // nil: none is known
	id     engine.VersionID
	digest digest.Digest
	// Whom the device trusts, and the manifests that hold the signatures.
	trust      func() *signing.Trust
	now        func() time.Time // at which signatures are to count
	signatures []digest.Digest
	judged     *signing.Trust // by which admit judged last
	reserve    uint64
	free       func(dir string) (uint64, error)
	wrote      func() // called after each chunk written; for tests
	log        *slog.Logger

	present, total atomic.Int64 // bytes of the bundle's files

	opened   bool // manifest, pieces and missing are known
	manifest *models.Manifest
	pieces   []piece
	missing  map[[sha256.Size]byte][]int // positions in pieces, by what is missing
	reused   bool
	buf      []byte // as long as the longest chunk
	root     *os.Root
	files    map[int]*os.File
}

func (d *download) part() string { return d.store.path(d.digest) + partSuffix }

// run goes on with the download until the bundle is verified and installed.
// After an error other than *VerifyError it may be called again, and asks
// only for what is still missing. errNoRoom says that the disk has not enough.
func (d *download) run(ctx context.Context) (err error) {
	if err := os.MkdirAll(filepath.Join(d.part(), filesFolder), 0o700); err != nil {
		return err
	}
	if d.root, err = os.OpenRoot(filepath.Join(d.part(), filesFolder)); err != nil {
		return err
	}
	d.files = map[int]*os.File{}
	defer func() {
		for _, f := range d.files {
			err = errors.Join(err, f.Close())
		}
		err = errors.Join(err, d.root.Close())
		d.files, d.root = nil, nil
	}()
	if !d.opened {
		if err := d.open(ctx); err != nil {
			return err
		}
	}
	if err := d.checkRoom(); err != nil {
		return err
	}
	if !d.reused {
		if err := d.reuse(ctx); err != nil {
			return err
		}
		d.reused = true
	}
	for i := range d.manifest.Files {
		if err := d.fetch(ctx, i); err != nil {
			return err
		}
	}
	return d.finish(ctx)
}

// open reads the bundle's documents and finds out which chunks are there.
func (d *download) open(ctx context.Context) error {
	raw, err := d.document(ctx, manifestFile, "manifest", d.ref(d.digest, true), models.MaxManifestBytes)
	if err != nil {
		return err
	}
	m, err := models.ParseManifest(raw)
	if err != nil {
		return &VerifyError{File: "manifest", Err: err}
	}
	if err := d.admit(ctx, m); err != nil {
		return err
	}
	if raw, err = d.document(ctx, configFile, "config", d.ref(m.Config.Digest, false), m.Config.Size); err != nil {
		return err
	}
	cfg, err := models.ParseConfig(raw)
	if err != nil {
		return &VerifyError{File: "config", Err: err}
	}
	if _, ok := m.File(cfg.Entry); !ok {
		return &VerifyError{File: "config", Err: fmt.Errorf("entry %q is not one of the bundle's files", cfg.Entry)}
	}
	if raw, err = d.document(ctx, indexFile, "chunk index", d.ref(m.Index.Digest, false), m.Index.Size); err != nil {
		return err
	}
	index, err := models.ParseIndex(raw, m)
	if err != nil {
		return &VerifyError{File: "chunk index", Err: err}
	}
	d.manifest = m
	d.total.Store(m.Size)
	d.lay(index)
	if err := d.rehash(ctx); err != nil {
		return err
	}
	d.opened = true
	return nil
}

func (d *download) ref(of digest.Digest, manifest bool) Ref {
	return Ref{Model: d.id.Model, Digest: of, Manifest: manifest}
}

// document gives one of the bundle's documents from the part, or else from
// its source.
func (d *download) document(ctx context.Context, name, what string, r Ref, limit int64) ([]byte, error) {
	path := filepath.Join(d.part(), name)
	if info, err := os.Stat(path); err == nil && info.Size() <= limit {
		if raw, err := os.ReadFile(path); err == nil && digest.FromBytes(raw) == r.Digest {
			return raw, nil
		}
	}
	raw, err := small(ctx, d.remote, r, what, limit)
	if err != nil {
		return nil, err
	}
	return raw, os.WriteFile(path, raw, 0o600)
}

// lay lists the pieces of all files; all of them are missing.
func (d *download) lay(index *dunlinv1.ChunkIndex) {
	position := map[string]int{}
	for i, f := range d.manifest.Files {
		position[f.Path] = i
	}
	d.pieces, d.missing = nil, map[[sha256.Size]byte][]int{}
	longest := 0
	for _, f := range index.Files {
		for _, c := range f.Chunks {
			p := piece{file: position[f.Path], offset: int64(c.Offset), length: int(c.Length), sum: [sha256.Size]byte(c.Sha256)}
			d.missing[p.sum] = append(d.missing[p.sum], len(d.pieces))
			d.pieces = append(d.pieces, p)
			longest = max(longest, p.length)
		}
	}
	d.buf = make([]byte, longest)
}

// rehash marks the pieces that the part has already.
func (d *download) rehash(ctx context.Context) error {
	var have int64
	for i := range d.pieces {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		p := &d.pieces[i]
		f, err := d.file(p.file)
		if err != nil {
			return err
		}
		data := d.buf[:p.length]
		if n, err := f.ReadAt(data, p.offset); n < len(data) {
			if errors.Is(err, io.EOF) {
				continue
			}
			return err
		}
		if sha256.Sum256(data) == p.sum {
			p.have = true
			have += int64(p.length)
		}
	}
	for sum, at := range d.missing {
		var left []int
		for _, i := range at {
			if !d.pieces[i].have {
				left = append(left, i)
			}
		}
		if d.missing[sum] = left; len(left) == 0 {
			delete(d.missing, sum)
		}
	}
	d.present.Store(have)
	return nil
}

// file gives one of the part's files, open for reading and writing.
func (d *download) file(i int) (*os.File, error) {
	if f := d.files[i]; f != nil {
		return f, nil
	}
	path := filepath.FromSlash(d.manifest.Files[i].Path)
	if err := d.root.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	d.files[i] = f
	return f, nil
}

// put writes a verified chunk wherever it is missing.
func (d *download) put(sum [sha256.Size]byte, data []byte) error {
	for _, i := range d.missing[sum] {
		p := &d.pieces[i]
		f, err := d.file(p.file)
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(data, p.offset); err != nil {
			return err
		}
		p.have = true
		d.present.Add(int64(p.length))
		if d.wrote != nil {
			d.wrote()
		}
	}
	delete(d.missing, sum)
	return nil
}

// checkRoom refuses a download that would take the disk's reserve.
func (d *download) checkRoom() error {
	free, err := d.free(d.store.dir)
	if err != nil {
		return fmt.Errorf("free space of %s: %w", d.store.dir, err)
	}
	if need := uint64(d.total.Load() - d.present.Load()); free < need+d.reserve {
		return fmt.Errorf("%w: the download needs %d bytes, %d are free, and %d of them are kept in reserve", errNoRoom, need, free, d.reserve)
	}
	return nil
}

// freeSpace gives the bytes that are free for this process in dir's file system.
func freeSpace(dir string) (uint64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, err
	}
	return s.Bavail * uint64(s.Bsize), nil
}

// reuse copies missing chunks from the other bundles on disk, which other
// goroutines may be writing to or removing.
func (d *download) reuse(ctx context.Context) error {
	dirs, err := d.store.folders(d.digest)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if len(d.missing) == 0 {
			return nil
		}
		index, err := readIndex(dir)
		if err != nil {
			d.log.Debug("no chunks to reuse", "folder", dir, "error", err)
			continue
		}
		for _, f := range index.Files {
			if err := d.reuseFile(ctx, filepath.Join(dir, filesFolder), f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *download) reuseFile(ctx context.Context, dir string, from *dunlinv1.IndexedFile) error {
	f, err := os.OpenInRoot(dir, filepath.FromSlash(from.Path))
	if err != nil {
		return nil // not there yet, or not any more
	}
	defer f.Close()
	for _, c := range from.Chunks {
		sum := [sha256.Size]byte(c.Sha256)
		if d.missing[sum] == nil || int(c.Length) > len(d.buf) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		data := d.buf[:c.Length]
		if n, _ := f.ReadAt(data, int64(c.Offset)); n < len(data) || sha256.Sum256(data) != sum {
			continue
		}
		if err := d.put(sum, data); err != nil {
			return err
		}
	}
	return nil
}

// fetch gets what is missing of one file.
func (d *download) fetch(ctx context.Context, file int) error {
	if _, err := d.file(file); err != nil { // makes an empty file, too
		return err
	}
	first := 0
	for first < len(d.pieces) && d.pieces[first].file != file {
		first++
	}
	last := first
	for last < len(d.pieces) && d.pieces[last].file == file {
		last++
	}
	pieces := d.pieces[first:last]
	ref := d.ref(d.manifest.Files[file].Digest, false)
	for {
		start, end := nextRange(pieces)
		if start == end {
			return nil
		}
		if err := d.fetchRange(ctx, ref, pieces, start, end); err != nil {
			return err
		}
	}
}

// Missing chunks that are nearer to each other than mergeGap are asked for in
// one request of at most maxRange bytes (or one chunk): the bytes between
// them cost less than a round trip.
const (
	mergeGap = 64 << 10
	maxRange = 8 << 20
)

// nextRange gives the range of bytes to ask for next, empty when none is
// missing. The pieces are in the order of their offsets.
func nextRange(pieces []piece) (start, end int64) {
	for i := range pieces {
		p := &pieces[i]
		if p.have {
			continue
		}
		switch pieceEnd := p.offset + int64(p.length); {
		case start == end:
			start, end = p.offset, pieceEnd
		case p.offset-end >= mergeGap || pieceEnd-start > maxRange:
			return start, end
		default:
			end = pieceEnd
		}
	}
	return start, end
}

func (d *download) fetchRange(ctx context.Context, ref Ref, pieces []piece, start, end int64) error {
	b, err := d.remote.Get(ctx, ref, start, end-start)
	if err != nil {
		return err
	}
	defer b.Close()
	at := b.Offset
	for i := range pieces {
		p := &pieces[i]
		if p.have || p.offset < at {
			continue
		}
		if p.offset >= end && !b.Whole {
			break
		}
		data := d.buf[:p.length]
		if _, err = io.CopyN(io.Discard, b, p.offset-at); err == nil {
			_, err = io.ReadFull(b, data)
		}
		if err != nil {
			return fmt.Errorf("%s after byte %d: %w", d.manifest.Files[p.file].Path, at, err)
		}
		at = p.offset + int64(p.length)
		if got := sha256.Sum256(data); got != p.sum {
			if p.tries++; p.tries > chunkRetries {
				return &VerifyError{File: d.manifest.Files[p.file].Path, Offset: p.offset,
					Err: fmt.Errorf("chunk of %d bytes has SHA-256 %x, want %x", p.length, got, p.sum)}
			}
			continue
		}
		if err := d.put(p.sum, data); err != nil {
			return err
		}
	}
	return nil
}

// finish verifies the files as a whole, makes them durable and installs the
// bundle.
func (d *download) finish(ctx context.Context) error {
	for i, want := range d.manifest.Files {
		f, err := d.file(i)
		if err != nil {
			return err
		}
		if err := f.Truncate(want.Size); err != nil {
			return err
		}
		h := sha256.New()
		if err := copyAll(ctx, h, io.NewSectionReader(f, 0, want.Size)); err != nil {
			return err
		}
		if got := digest.NewDigest(digest.SHA256, h); got != want.Digest {
			return &VerifyError{File: want.Path, Err: fmt.Errorf("the whole file has digest %s, want %s", got, want.Digest)}
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	err := filepath.WalkDir(d.part(), func(path string, e fs.DirEntry, err error) error {
		if err != nil || (!e.IsDir() && filepath.Dir(path) != d.part()) {
			return err // files of the model are durable already
		}
		return syncFolder(path) // works for the documents as well
	})
	if err != nil {
		return err
	}
	return d.store.install(d.digest)
}

// copyAll copies until the end of r or of ctx.
func copyAll(ctx context.Context, w io.Writer, r io.Reader) error {
	const step = 4 << 20
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if _, err := io.CopyN(w, r, step); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
