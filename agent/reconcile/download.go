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
	"sync"
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

func isVerify(err error) bool {
	_, wrong := errors.AsType[*VerifyError](err)
	return wrong
}

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
	others []*bundles // which may have chunks too
	remote Source     // asked last, or alone; nil: none is known
	near   []Source   // of its site, which are asked first
	gate   *gate      // what remote is asked through; nil: always
	id     engine.VersionID
	digest digest.Digest
	// Whom the device trusts, and the manifests that hold the signatures.
	trust      func() *signing.Trust
	now        func() time.Time // at which signatures are to count
	signatures []digest.Digest
	judged     *signing.Trust // by which admit judged last
	program    *programOf     // a release of the agent, of which a part is wanted; nil: a model
	reserve    uint64
	free       func(dir string) (uint64, error)
	wrote      func() // called after each chunk written, one call at a time; for tests
	log        *slog.Logger

	present, total atomic.Int64 // bytes of the bundle's files
	fetched        atomic.Int64 // bytes that travelled here, whole chunks or not
	fromSite       atomic.Int64 // of these, those that came from devices of the site

	opened   bool // manifest, pieces and missing are known
	manifest *models.Manifest
	pieces   []piece
	first    []int // of each file, its first piece; then their number
	longest  int   // of the pieces
	reused   bool
	root     *os.Root
	whole    follower
	ready    chan struct{} // closed when it is opened; nil: nobody waits for that

	mu      sync.Mutex                  // guards what follows, and what changes in pieces
	missing map[[sha256.Size]byte][]int // positions in pieces, by what is missing
	files   map[int]*os.File
	moved   chan struct{} // closed when the next piece is there
}

func (d *download) part() string { return d.store.path(d.digest) + partSuffix }

// begun says whether there is something of it on the disk.
func (d *download) begun() bool {
	_, err := os.Stat(filepath.Join(d.part(), filesFolder))
	return err == nil
}

// run goes on with the download until the bundle is verified and installed.
// After an error other than *VerifyError it may be called again, and asks
// only for what is still missing. errNoRoom says that the disk has not
// enough: it is then as it was before, but for the bundle's documents. A
// *WaitError says what is to be waited for.
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
	if err := d.makeRoom(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	hashed := make(chan error, 1)
	go func() {
		err := d.follow(ctx)
		if err != nil {
			cancel(err)
		}
		hashed <- err
	}()
	if err = d.fill(ctx); err != nil {
		cancel(err)
	}
	if wrong := <-hashed; err == nil || isVerify(wrong) {
		err = wrong
	}
	if err != nil {
		return err
	}
	return d.finish()
}

// fill copies what other bundles have, and asks for the rest.
func (d *download) fill(ctx context.Context) error {
	if !d.reused {
		if err := d.reuse(ctx); err != nil {
			return err
		}
		d.reused = true
	}
	return d.fetch(ctx)
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
	if d.program == nil { // a program is admitted by a signature of its own
		if err := d.admit(ctx, m); err != nil {
			return err
		}
	}
	if raw, err = d.document(ctx, configFile, "config", d.ref(m.Config.Digest, false), m.Config.Size); err != nil {
		return err
	}
	cfg, err := models.ParseConfig(raw)
	if err != nil {
		return &VerifyError{File: "config", Err: err}
	}
	if _, ok := m.File(cfg.Entry); !ok && d.program == nil {
		return &VerifyError{File: "config", Err: fmt.Errorf("entry %q is not one of the bundle's files", cfg.Entry)}
	}
	if raw, err = d.document(ctx, indexFile, "chunk index", d.ref(m.Index.Digest, false), m.Index.Size); err != nil {
		return err
	}
	index, err := models.ParseIndex(raw, m)
	if err != nil {
		return &VerifyError{File: "chunk index", Err: err}
	}
	if d.program != nil {
		if m, index, err = d.program.narrow(cfg, m, index); err != nil {
			return err
		}
	}
	d.manifest = m
	d.total.Store(m.Size)
	d.lay(index)
	if err := d.rehash(ctx); err != nil {
		return err
	}
	d.opened = true
	if d.ready != nil {
		close(d.ready)
	}
	return nil
}

// prepare lets others wait until it is opened.
func (d *download) prepare() {
	if d.ready == nil {
		d.ready = make(chan struct{})
	}
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
	raw, err := d.small(ctx, r, what, limit)
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
	d.pieces, d.first, d.longest = nil, nil, 0
	d.missing, d.moved = map[[sha256.Size]byte][]int{}, make(chan struct{})
	for _, f := range index.Files { // they are in the manifest's order
		d.first = append(d.first, len(d.pieces))
		for _, c := range f.Chunks {
			p := piece{file: position[f.Path], offset: int64(c.Offset), length: int(c.Length), sum: [sha256.Size]byte(c.Sha256)}
			d.missing[p.sum] = append(d.missing[p.sum], len(d.pieces))
			d.pieces = append(d.pieces, p)
			d.longest = max(d.longest, p.length)
		}
	}
	d.first = append(d.first, len(d.pieces))
}

// rehash marks the pieces that the part has already.
func (d *download) rehash(ctx context.Context) error {
	var have int64
	buf := make([]byte, d.longest)
	for i := range d.pieces {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		p := &d.pieces[i]
		f, err := d.file(p.file)
		if err != nil {
			return err
		}
		data := buf[:p.length]
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
	d.mu.Lock()
	defer d.mu.Unlock()
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

// put writes a verified chunk wherever it is missing. Two calls must not put
// the same chunk at a time.
func (d *download) put(sum [sha256.Size]byte, data []byte) error {
	d.mu.Lock()
	at := d.missing[sum]
	d.mu.Unlock()
	for _, i := range at {
		p := &d.pieces[i]
		f, err := d.file(p.file)
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(data, p.offset); err != nil {
			if errors.Is(err, unix.ENOSPC) {
				err = fmt.Errorf("%w: %w", errNoRoom, err)
			}
			return err
		}
		writeBack(f, p.offset, int64(p.length))
		d.mu.Lock()
		p.have = true
		close(d.moved)
		d.moved = make(chan struct{})
		d.present.Add(int64(p.length))
		if d.wrote != nil {
			d.wrote()
		}
		d.mu.Unlock()
	}
	d.mu.Lock()
	delete(d.missing, sum)
	d.mu.Unlock()
	return nil
}

// lacks gives the bytes that have to travel.
func (d *download) lacks() (n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, at := range d.missing {
		n += int64(d.pieces[at[0]].length)
	}
	return n
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
	buf := make([]byte, d.longest)
	if d.program != nil {
		return d.reuseProgram(ctx, buf)
	}
	for _, s := range append([]*bundles{d.store}, d.others...) {
		dirs, err := s.folders(d.digest, s == d.store)
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
				if err := d.reuseFile(ctx, filepath.Join(dir, filesFolder), f, buf); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (d *download) reuseFile(ctx context.Context, dir string, from *dunlinv1.IndexedFile, buf []byte) error {
	f, err := os.OpenInRoot(dir, filepath.FromSlash(from.Path))
	if err != nil {
		return nil // not there yet, or not any more
	}
	defer f.Close()
	for _, c := range from.Chunks {
		sum := [sha256.Size]byte(c.Sha256)
		if d.missing[sum] == nil || int(c.Length) > len(buf) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		data := buf[:c.Length]
		if n, _ := f.ReadAt(data, int64(c.Offset)); n < len(data) || sha256.Sum256(data) != sum {
			continue
		}
		if err := d.put(sum, data); err != nil {
			return err
		}
	}
	return nil
}

// finish makes the verified files durable and installs the bundle.
func (d *download) finish() error {
	for i, want := range d.manifest.Files {
		f, err := d.file(i)
		if err != nil {
			return err
		}
		if err := f.Truncate(want.Size); err != nil {
			return err
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
