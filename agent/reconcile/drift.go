package reconcile

import (
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
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Files of installed bundles can change behind the agent's back. Each is looked
// at every half minute: by its size, its time of change and its inode. Where the
// last two are others than before, its content is hashed. Slowly, all content is
// hashed all the time, so that a disk that rots is found out too. A bundle that
// is not as it should be is not opened any more; what is loaded of it goes on
// serving, while the parts that are wrong are fetched again. Before a bundle is
// opened, its files are those that were verified, or are verified again.

const (
	inspectEvery = 30 * time.Second
	// changedRate and scrubRate are how many bytes a second are hashed of files
	// that look changed, and of all others; scrubEvery is how often the latter
	// begins anew.
	changedRate = 64 << 20
	scrubRate   = 2 << 20
	scrubEvery  = 24 * time.Hour
	hashStep    = 1 << 20
)

// finding is a file of an installed bundle that is not as it should be.
type finding struct {
	digest     digest.Digest
	file       string // as the bundle calls it; documents by their names
	want, have string
}

// part is one file of an installed bundle.
type part struct {
	path   string // relative to the bundle's folder
	name   string
	size   int64
	digest digest.Digest
}

// stamp tells a file from what it was.
type stamp struct {
	size    int64
	changed int64 // nanoseconds since 1970
	inode   uint64
}

// inspector looks at installed bundles. One goroutine uses it.
type inspector struct {
	folder *bundles
	list   func() []digest.Digest // of the bundles that must be whole
	seen   map[digest.Digest]map[string]stamp
	scrub  scrub
	rate   int64 // at which changed files are hashed; 0: as fast as can be
}

// scrub is how far the hashing of all content is.
type scrub struct {
	began time.Time
	todo  []digest.Digest
	parts []part // of the first of todo that are left
	file  *os.File
	hash  hash.Hash
}

// inspect looks at the bundles until ctx is done.
func (r *Reconciler) inspect(ctx context.Context) {
	i := &inspector{folder: r.folder, list: r.whole, seen: map[digest.Digest]map[string]stamp{}, rate: changedRate}
	defer i.scrub.close()
	every := r.cfg.Inspect
	if every == 0 {
		every = inspectEvery
	}
	look, step := time.NewTimer(0), time.NewTimer(every)
	defer look.Stop()
	defer step.Stop()
	for {
		var found []finding
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			found = i.look(ctx)
			look.Reset(every)
		case <-step.C:
			n, f := i.step(time.Now())
			if f != nil {
				found = append(found, *f)
			}
			pause := every
			if n > 0 {
				pause = time.Duration(n * int64(time.Second) / scrubRate)
			}
			step.Reset(pause)
		}
		for _, f := range found {
			select {
			case r.found <- f:
			case <-ctx.Done():
				return
			}
		}
	}
}

// whole gives the bundles that are on disk and are not being changed.
func (r *Reconciler) whole() []digest.Digest {
	if all := r.installed.Load(); all != nil {
		return *all
	}
	return nil
}

// parts lists what an installed bundle is made of.
func (b *bundles) parts(d digest.Digest) ([]part, *finding) {
	raw, err := os.ReadFile(filepath.Join(b.path(d), manifestFile))
	if err == nil && digest.FromBytes(raw) != d {
		return nil, &finding{d, manifestFile, d.String(), digest.FromBytes(raw).String()}
	}
	var m *models.Manifest
	if err == nil {
		m, err = models.ParseManifest(raw)
	}
	if err != nil {
		return nil, &finding{d, manifestFile, d.String(), absence(err)}
	}
	all := []part{{configFile, configFile, m.Config.Size, m.Config.Digest}, {indexFile, indexFile, m.Index.Size, m.Index.Digest}}
	for _, f := range m.Files {
		all = append(all, part{filepath.Join(filesFolder, filepath.FromSlash(f.Path)), f.Path, f.Size, f.Digest})
	}
	return all, nil
}

// absence says what there is in place of a file that cannot be read.
func absence(err error) string {
	if errors.Is(err, fs.ErrNotExist) {
		return "missing"
	}
	return "unreadable"
}

// look gives what is wrong by the looks of the files.
func (i *inspector) look(ctx context.Context) (found []finding) {
	list := i.list()
	for d := range i.seen {
		if !slices.Contains(list, d) {
			delete(i.seen, d) // what comes in its place is other files
		}
	}
	for _, d := range list {
		parts, wrong := i.folder.parts(d)
		if wrong != nil {
			found = append(found, *wrong)
			continue
		}
		if i.seen[d] == nil {
			i.seen[d] = map[string]stamp{}
		}
		for _, p := range parts {
			if have, ok := i.like(ctx, d, p); !ok {
				found = append(found, finding{d, p.name, p.digest.String(), have})
			}
		}
	}
	return found
}

// looks is what a verified file looked like. The time of its inode's last change
// cannot be set as one likes.
type looks struct {
	Size    int64  `json:"size"`
	Changed int64  `json:"changed"` // nanoseconds since 1970
	Inode   uint64 `json:"inode"`
	Status  int64  `json:"status"` // when content or inode changed, nanoseconds since 1970
}

func looksOf(path string) (looks, error) {
	var s unix.Stat_t
	if err := unix.Lstat(path, &s); err != nil {
		return looks{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if s.Mode&unix.S_IFMT != unix.S_IFREG {
		return looks{}, fmt.Errorf("%s is not a file", path)
	}
	return looks{s.Size, s.Mtim.Nano(), s.Ino, s.Ctim.Nano()}, nil
}

// remember keeps what the files in a bundle's folder look like, which have just
// been verified. What cannot be kept is only verified once more.
func remember(dir string, all map[string]looks) {
	path := filepath.Join(dir, looksFile)
	raw, err := json.Marshal(all)
	if err == nil {
		err = os.WriteFile(path, raw, 0o600)
	}
	if err != nil {
		_ = os.Remove(path)
	}
}

// verify says which file of an installed bundle is not as it should be, nil for
// none. Files that look as when they were verified are not read again; the others
// are hashed as fast as can be.
func (b *bundles) verify(ctx context.Context, d digest.Digest, m *models.Manifest) (*finding, error) {
	dir := b.path(d)
	before, now := map[string]looks{}, map[string]looks{}
	if raw, err := os.ReadFile(filepath.Join(dir, looksFile)); err == nil && json.Unmarshal(raw, &before) != nil {
		before = nil // written halfway
	}
	changed := false
	for _, f := range m.Files {
		path := filepath.Join(dir, filesFolder, filepath.FromSlash(f.Path))
		look, err := looksOf(path)
		if err != nil {
			return &finding{d, f.Path, f.Digest.String(), absence(err)}, nil
		}
		if known, ok := before[f.Path]; !ok || known != look {
			changed = true
			sum, err := hashFile(ctx, path, 0)
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				return nil, err
			}
			if sum != f.Digest {
				return &finding{d, f.Path, f.Digest.String(), sum.String()}, nil
			}
		}
		now[f.Path] = look
	}
	if changed {
		remember(dir, now)
	}
	return nil, nil
}

// damagedError is the error of a bundle that is not as it should be, and was not
// opened.
type damagedError struct{ finding }

func (e *damagedError) Error() string {
	return fmt.Sprintf("file %s: want %s, have %s", e.file, e.want, e.have)
}

// like says whether a file looks as it did, or has the content that it should
// have.
func (i *inspector) like(ctx context.Context, d digest.Digest, p part) (have string, ok bool) {
	path := filepath.Join(i.folder.path(d), p.path)
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return absence(err), false
	case !info.Mode().IsRegular():
		return "not a file", false
	case info.Size() != p.size:
		return fmt.Sprintf("%d bytes instead of %d", info.Size(), p.size), false
	}
	now := stamp{size: info.Size(), changed: info.ModTime().UnixNano(), inode: inode(info)}
	if before, known := i.seen[d][p.path]; known && before != now {
		sum, err := hashFile(ctx, path, i.rate)
		if ctx.Err() != nil {
			return "", true
		}
		if err != nil {
			return absence(err), false
		}
		if sum != p.digest {
			return sum.String(), false
		}
	}
	i.seen[d][p.path] = now
	return "", true
}

func inode(info fs.FileInfo) uint64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return s.Ino
	}
	return 0
}

// hashFile hashes a file at so many bytes a second.
func hashFile(ctx context.Context, path string, rate int64) (digest.Digest, error) {
	f, err := openPlain(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	for ctx.Err() == nil {
		n, err := io.CopyN(sum, f, hashStep)
		if errors.Is(err, io.EOF) {
			return digest.NewDigest(digest.SHA256, sum), nil
		} else if err != nil {
			return "", err
		}
		if rate == 0 {
			continue
		}
		pause := time.NewTimer(time.Duration(n * int64(time.Second) / rate))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
	return "", context.Cause(ctx)
}

// openPlain opens a file, and no link or device in its place.
func openPlain(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

func (s *scrub) close() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// step hashes some more of all content, and gives how many bytes that were; 0
// says that there is nothing to do for now.
func (i *inspector) step(now time.Time) (bytes int64, found *finding) {
	s := &i.scrub
	if len(s.todo) == 0 {
		if !s.began.IsZero() && now.Sub(s.began) < scrubEvery {
			return 0, nil
		}
		if s.todo = slices.Clone(i.list()); len(s.todo) == 0 {
			return 0, nil
		}
		s.began = now
	}
	d := s.todo[0]
	next := func() {
		s.close()
		s.todo, s.parts = s.todo[1:], nil
	}
	if !slices.Contains(i.list(), d) { // it has gone, or is being repaired
		next()
		return 1, nil
	}
	if s.file == nil {
		if s.parts == nil {
			parts, wrong := i.folder.parts(d)
			if wrong != nil {
				next()
				return 1, wrong
			}
			s.parts = parts
		}
		f, err := openPlain(filepath.Join(i.folder.path(d), s.parts[0].path))
		if err != nil {
			p := s.parts[0]
			next()
			return 1, &finding{d, p.name, p.digest.String(), absence(err)}
		}
		s.file, s.hash = f, sha256.New()
	}
	n, err := io.CopyN(s.hash, s.file, hashStep)
	switch p := s.parts[0]; {
	case err == nil:
	case !errors.Is(err, io.EOF):
		next()
		return n + 1, &finding{d, p.name, p.digest.String(), absence(err)}
	default:
		s.close()
		if s.parts = s.parts[1:]; len(s.parts) == 0 {
			next()
		}
		if sum := digest.NewDigest(digest.SHA256, s.hash); sum != p.digest {
			return n + 1, &finding{d, p.name, p.digest.String(), sum.String()}
		}
	}
	return n + 1, nil
}

// damage is what is wrong with a version's bundle.
type damage struct {
	finding
	since time.Time
}

// damaged takes in a finding, and gives the versions that it is news of. The
// bundle is repaired as soon as can be.
func (c *core) damaged(f finding, now time.Time) (news []*version) {
	for _, v := range c.sorted() {
		if v.digest == f.digest && v.stage != absent && v.busy != fetching && v.busy != removing && v.damage == nil {
			v.damage, v.checked = &damage{f, now}, false
			news = append(news, v)
		}
	}
	return news
}

// repair begins to repair what is damaged and needed.
func (c *core) repair(acts []action, versions []*version, now time.Time) []action {
	for _, v := range versions {
		if v.damage != nil && v.busy == idle && v.stage != absent && !now.Before(v.notBefore) && c.needed(v) && !c.bundleBusy(v) {
			acts = c.begin(acts, repairing, v)
		}
	}
	return acts
}

// repaired takes in that a bundle is whole again.
func (c *core) repaired(d digest.Digest) {
	for _, v := range c.versions {
		if v.digest == d {
			v.damage = nil
		}
	}
}

// unseal makes an installed bundle one that is being fetched, without what
// stands in the place of a file and is none.
func (b *bundles) unseal(d digest.Digest) error {
	part := b.path(d) + partSuffix
	if err := os.Rename(b.path(d), part); errors.Is(err, fs.ErrNotExist) {
		return nil // as it was, when a repair was cut short
	} else if err != nil {
		return err
	}
	err := filepath.WalkDir(part, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Type().IsRegular() {
			return err
		}
		return os.Remove(path)
	})
	return errors.Join(err, syncFolder(b.dir))
}

// drifts lists what is other than it should be.
func (r *Reconciler) drifts() []*dunlinv1.Drift {
	var all []*dunlinv1.Drift
	for _, v := range r.core.sorted() {
		if v.damage == nil {
			continue
		}
		all = append(all, &dunlinv1.Drift{
			Kind: "file", Subject: v.id.String() + " " + v.damage.file, Want: v.damage.want, Have: v.damage.have,
			Since: timestamppb.New(v.damage.since), Repair: "fetched again",
		})
	}
	return append(all, r.outside...)
}

// Drifted says what of the device, other than its bundles, is not as it should
// be: what was said before does not count any more.
func (r *Reconciler) Drifted(all []*dunlinv1.Drift) {
	for {
		select {
		case r.outsides <- all:
			return
		default:
		}
		select {
		case <-r.outsides:
		default:
		}
	}
}

// discover takes in a finding.
func (r *Reconciler) discover(f finding) {
	for _, v := range r.core.damaged(f, time.Now()) {
		r.cfg.Log.Error("a file has changed on the disk; it is fetched again", "model", v.id.Model, "version", v.id.Version, "file", f.file, "want", f.want, "have", f.have)
		r.event("drift.found", dunlinv1.Severity_SEVERITY_WARNING, v.key, fmt.Sprintf("file %s: want %s, have %s", f.file, f.want, f.have))
	}
}

// outsideChanged takes in what has drifted other than bundles, and tells news.
func (r *Reconciler) outsideChanged(all []*dunlinv1.Drift) {
	known := map[string]bool{}
	for _, d := range r.outside {
		known[d.Kind+" "+d.Subject+" "+d.Have] = true
	}
	for _, d := range all {
		if !known[d.Kind+" "+d.Subject+" "+d.Have] {
			r.cfg.Log.Warn("drift", "kind", d.Kind, "subject", d.Subject, "want", d.Want, "have", d.Have)
			r.event("drift.found", dunlinv1.Severity_SEVERITY_WARNING, key{}, strings.TrimSpace(fmt.Sprintf("%s %s: want %s, have %s", d.Kind, d.Subject, d.Want, d.Have)))
		}
	}
	r.outside = all
}

// mend brings a damaged bundle back to what it should be. Until that has been
// done nothing opens it.
func (r *Reconciler) mend(ctx context.Context, d *download) error {
	if err := r.folder.unseal(d.digest); err != nil {
		return err
	}
	return r.fetch(ctx, d)
}
