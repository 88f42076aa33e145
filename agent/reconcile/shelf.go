package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
)

const (
	// maxFlights bounds the bundles that a cache fetches for its site at a
	// time; devices that want more go to the registry.
	maxFlights = 4
	// maxDocument bounds what a cache passes on that is of no bundle, such as
	// signatures, and maxDocuments how many it remembers.
	maxDocument  = 1 << 20
	maxDocuments = 64
	// maxKnown bounds the manifests that are remembered.
	maxKnown = 256
)

// ShelfConfig says what a Shelf has.
type ShelfConfig struct {
	Bundles    string // folder of the device's own bundles
	Cache      string // folder of those that it keeps for its site
	CacheBytes int64  // most bytes of them; 0: it keeps none
	Reserve    uint64 // bytes of the disk that they leave free
	Origin     func() Source
	Log        *slog.Logger
}

// Shelf gives the other devices of a site what this one has of bundles: those
// on its disk, and, while they come, the parts that are verified. As a cache
// it fetches what it is asked for and does not have, once for all who ask, and
// keeps it until the room is needed for what was asked for later. Its methods
// may be called concurrently.
type Shelf struct {
	cfg   ShelfConfig
	own   *bundles
	cache *bundles // nil: it keeps none
	gates *gates   // nil: everything may travel

	room      chan struct{} // held by who makes room in the cache
	documents *lru.Cache[digest.Digest, []byte]

	mu      sync.Mutex                  // guards what follows
	running context.Context             // nil: nothing can be fetched
	flights map[digest.Digest]*flight   // by bundle
	known   map[string]*models.Manifest // by folder of a verified bundle
	used    map[digest.Digest]time.Time // when a kept bundle was asked for last
	passing map[digest.Digest]*passed   // what is being fetched to be passed on
	work    sync.WaitGroup
}

// flight is a bundle that comes: for the site, or for the device itself.
type flight struct {
	*download
	of    *models.Manifest // nil: not known before the download has opened
	own   bool
	ended chan struct{} // closed when it has ended, with err
	err   error
}

// NewShelf opens the folders. Bundles that were not complete are dropped.
func NewShelf(cfg ShelfConfig) (*Shelf, error) {
	s := &Shelf{
		cfg: cfg, room: make(chan struct{}, 1), flights: map[digest.Digest]*flight{},
		known: map[string]*models.Manifest{}, used: map[digest.Digest]time.Time{}, passing: map[digest.Digest]*passed{},
	}
	var err error
	if s.documents, err = lru.New[digest.Digest, []byte](maxDocuments); err != nil {
		return nil, err
	}
	if s.own, err = openBundles(cfg.Bundles); err != nil || cfg.CacheBytes == 0 {
		return s, err
	}
	if s.cache, err = openBundles(cfg.Cache); err != nil {
		return nil, err
	}
	whole, part, err := s.cache.list()
	if err != nil {
		return nil, err
	}
	for _, d := range part {
		if err := s.cache.remove(d); err != nil {
			return nil, err
		}
	}
	for _, d := range whole {
		if info, err := os.Stat(s.cache.path(d)); err == nil {
			s.used[d] = info.ModTime()
		}
	}
	return s, nil
}

// Run lets the shelf fetch until ctx is done, and waits for what it began.
func (s *Shelf) Run(ctx context.Context) error {
	s.mu.Lock()
	s.running = ctx
	s.mu.Unlock()
	<-ctx.Done()
	s.mu.Lock()
	s.running = nil
	s.mu.Unlock()
	s.work.Wait()
	return nil
}

// Content is one document or file. Its size is known at once; Read waits for
// what is still to come.
type Content struct {
	io.ReadSeeker
	io.Closer
	Size int64
}

// Open gives what r names; ErrAbsent where the shelf does not have it. ctx is
// that of the reads, too.
func (s *Shelf) Open(ctx context.Context, r Ref) (*Content, error) {
	if c, err := s.stored(r); err == nil {
		return c, nil
	} else if !errors.Is(err, ErrAbsent) {
		return nil, err
	}
	for _, f := range s.coming() {
		if c, err := f.open(ctx, r); err == nil {
			return c, nil
		} else if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		} else if !errors.Is(err, ErrAbsent) {
			s.cfg.Log.Debug("not given", "digest", r.Digest, "error", err)
		}
	}
	if raw, ok := s.documents.Get(r.Digest); ok {
		return inMemory(raw), nil
	}
	if s.cache == nil {
		return nil, ErrAbsent
	}
	return s.pass(ctx, r)
}

// stored gives what is of a verified bundle on disk.
func (s *Shelf) stored(r Ref) (*Content, error) {
	for _, b := range []*bundles{s.own, s.cache} {
		if b == nil {
			continue
		}
		whole, _, err := b.list()
		if err != nil {
			return nil, err
		}
		for _, d := range whole {
			dir := b.path(d)
			m := s.manifest(dir)
			if m == nil {
				continue
			}
			path, ok := place(m, r)
			if !ok {
				continue
			}
			f, err := os.OpenInRoot(dir, path)
			if err != nil {
				continue // it is being removed
			}
			info, err := f.Stat()
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			if b == s.cache {
				s.use(d)
			}
			return &Content{f, f, info.Size()}, nil
		}
	}
	return nil, ErrAbsent
}

// manifest gives that of a verified bundle, from memory where it can.
func (s *Shelf) manifest(dir string) *models.Manifest {
	s.mu.Lock()
	m := s.known[dir]
	s.mu.Unlock()
	if m != nil {
		return m
	}
	found, err := readBundle(dir)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= maxKnown { // most are gone by then
		clear(s.known)
	}
	s.known[dir] = found.manifest
	return found.manifest
}

// place says where in a bundle's folder is what r names.
func place(m *models.Manifest, r Ref) (string, bool) {
	switch {
	case r.Manifest:
		return manifestFile, r.Digest == m.Digest
	case r.Digest == m.Config.Digest:
		return configFile, true
	case r.Digest == m.Index.Digest:
		return indexFile, true
	}
	for _, f := range m.Files {
		if f.Digest == r.Digest {
			return filepath.Join(filesFolder, filepath.FromSlash(f.Path)), true
		}
	}
	return "", false
}

// use notes that a kept bundle was asked for.
func (s *Shelf) use(d digest.Digest) {
	now := time.Now()
	s.mu.Lock()
	due := now.Sub(s.used[d]) > time.Minute
	s.used[d] = now
	s.mu.Unlock()
	if due { // for the next start; it may be gone
		_ = os.Chtimes(s.cache.path(d), now, now)
	}
}

// coming gives the flights, those for the site first.
func (s *Shelf) coming() []*flight {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*flight
	for _, f := range s.flights {
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b *flight) int { return cmp.Compare(a.digest, b.digest) })
	return all
}

// begin says that the device itself fetches a bundle: others can have of it
// what has come. ended must be called when it has ended. Where the bundle is
// on its way for the site, near gives it.
func (s *Shelf) begin(d *download) (near Source, ended func(error)) {
	if s == nil {
		return nil, func(error) {}
	}
	if s.cache != nil {
		d.others = []*bundles{s.cache}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[d.digest]; f != nil {
		return onFlight{f}, func(error) {}
	}
	f := &flight{download: d, own: true, ended: make(chan struct{})}
	s.flights[d.digest] = f
	return nil, func(err error) { s.land(f, err) }
}

func (s *Shelf) land(f *flight, err error) {
	s.mu.Lock()
	delete(s.flights, f.digest)
	s.mu.Unlock()
	f.err = err
	close(f.ended)
}

// passed is a document that is fetched once for all who ask for it.
type passed struct {
	done chan struct{}
	raw  []byte
	err  error
}

// pass fetches what no bundle here has: a bundle's manifest begins a flight,
// and what is small is passed on.
func (s *Shelf) pass(ctx context.Context, r Ref) (*Content, error) {
	for {
		s.mu.Lock()
		p := s.passing[r.Digest]
		first := p == nil
		if first {
			p = &passed{done: make(chan struct{})}
			s.passing[r.Digest] = p
		}
		s.mu.Unlock()
		if first {
			p.raw, p.err = s.passOnce(ctx, r)
			s.mu.Lock()
			delete(s.passing, r.Digest)
			s.mu.Unlock()
			close(p.done)
		}
		select {
		case <-p.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		switch {
		case p.err == nil:
			return inMemory(p.raw), nil
		case first || !errors.Is(p.err, context.Canceled): // else who asked first has left
			return nil, p.err
		}
	}
}

func (s *Shelf) passOnce(ctx context.Context, r Ref) ([]byte, error) {
	if raw, ok := s.documents.Get(r.Digest); ok {
		return raw, nil
	}
	origin := s.cfg.Origin()
	if origin == nil {
		return nil, ErrAbsent
	}
	g := s.gates.of(nil)
	if err := g.pass(ctx, 0); err != nil {
		return nil, err
	}
	raw, err := small(ctx, origin, r, "document", maxDocument)
	g.count(len(raw))
	if err != nil {
		return nil, err
	}
	if m, err := models.ParseManifest(raw); r.Manifest && err == nil {
		return raw, s.fly(r, m, origin, g)
	}
	s.documents.Add(r.Digest, raw)
	return raw, nil
}

// fly begins to fetch a bundle, where nobody has begun.
func (s *Shelf) fly(r Ref, m *models.Manifest, origin Source, g *gate) error {
	if m.Size > s.cfg.CacheBytes {
		return fmt.Errorf("%w: the bundle has %d bytes, the cache %d", ErrAbsent, m.Size, s.cfg.CacheBytes)
	}
	d := &download{
		store: s.cache, others: []*bundles{s.own}, remote: origin, gate: g, id: engine.VersionID{Model: r.Model}, digest: m.Digest,
		// Who asks verifies whose the bundle is; here it is never opened.
		trust: func() *signing.Trust { return signing.TrustAll }, now: time.Now,
		reserve: s.cfg.Reserve, free: freeSpace, log: s.cfg.Log,
	}
	d.prepare()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.flights[m.Digest] != nil:
		return nil
	case s.running == nil || s.running.Err() != nil || len(s.flights) >= maxFlights:
		return fmt.Errorf("%w: %d bundles are on their way", ErrAbsent, len(s.flights))
	}
	f := &flight{download: d, of: m, ended: make(chan struct{})}
	s.flights[m.Digest] = f
	ctx := s.running
	s.work.Go(func() {
		err := s.makeRoom(ctx, m)
		if err == nil {
			err = d.run(ctx)
		}
		if err == nil {
			s.use(m.Digest)
			s.cfg.Log.Info("kept for the site", "model", r.Model, "digest", m.Digest, "bytes", m.Size)
		} else if ctx.Err() == nil {
			s.cfg.Log.Warn("not fetched for the site", "model", r.Model, "digest", m.Digest, "error", err)
		}
		s.land(f, err)
		if err != nil { // a part is taken up by nobody
			if err := s.cache.remove(m.Digest); err != nil {
				s.cfg.Log.Error("left over in the cache", "digest", m.Digest, "error", err)
			}
		}
	})
	return nil
}

// makeRoom removes the kept bundles that were asked for longest ago, until
// there is room for one more.
func (s *Shelf) makeRoom(ctx context.Context, m *models.Manifest) error {
	select {
	case s.room <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-s.room }()
	whole, _, err := s.cache.list()
	if err != nil {
		return err
	}
	sizes := map[digest.Digest]int64{}
	total := m.Size
	for _, d := range whole {
		if k := s.manifest(s.cache.path(d)); k != nil {
			sizes[d] = k.Size
			total += k.Size
		}
	}
	s.mu.Lock()
	for _, f := range s.flights {
		if !f.own && f.digest != m.Digest {
			total += f.of.Size
		}
	}
	slices.SortFunc(whole, func(a, b digest.Digest) int { return s.used[a].Compare(s.used[b]) })
	s.mu.Unlock()
	for _, d := range whole {
		if total <= s.cfg.CacheBytes {
			return nil
		}
		if err := s.cache.remove(d); err != nil {
			return err
		}
		total -= sizes[d]
		s.mu.Lock()
		delete(s.used, d)
		delete(s.known, s.cache.path(d))
		s.mu.Unlock()
		s.cfg.Log.Info("not kept any more", "digest", d, "bytes", sizes[d])
	}
	if total > s.cfg.CacheBytes {
		return fmt.Errorf("%w: the cache has %d bytes, what is on its way needs %d", errNoRoom, s.cfg.CacheBytes, total)
	}
	return nil
}

// open gives what r names as it comes.
func (f *flight) open(ctx context.Context, r Ref) (*Content, error) {
	m := f.of
	if m == nil && r.Manifest && r.Digest != f.digest {
		return nil, ErrAbsent
	}
	if m != nil {
		if _, ok := place(m, r); !ok {
			return nil, ErrAbsent
		}
	}
	select {
	case <-f.ready:
	case <-f.ended:
		if f.err != nil {
			return nil, f.err
		}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	m = f.manifest
	path, ok := place(m, r)
	if !ok {
		return nil, ErrAbsent
	}
	for i, file := range m.Files {
		if !r.Manifest && file.Digest == r.Digest {
			c := &comingFile{ctx: ctx, flight: f, file: i, path: path, size: file.Size}
			return &Content{c, c, file.Size}, nil
		}
	}
	raw, err := f.read(path)
	if err != nil {
		return nil, err
	}
	return inMemory(raw), nil
}

// folders are where the bundle may be: it is renamed when it is complete.
func (f *flight) folders() [2]string {
	return [2]string{f.part(), f.store.path(f.digest)}
}

func (f *flight) read(path string) (raw []byte, err error) {
	for _, dir := range f.folders() {
		if raw, err = os.ReadFile(filepath.Join(dir, path)); err == nil {
			return raw, nil
		}
	}
	return nil, err
}

// comingFile reads a file of a bundle that comes, chunk by chunk when they
// have been verified.
type comingFile struct {
	ctx    context.Context
	flight *flight
	file   int
	path   string
	size   int64
	at     int64
	open   *os.File
}

func (c *comingFile) Read(p []byte) (int, error) {
	if c.at >= c.size {
		return 0, io.EOF
	}
	f := c.flight
	pieces := f.pieces[f.first[c.file]:f.first[c.file+1]]
	i := sort.Search(len(pieces), func(i int) bool { return pieces[i].offset > c.at }) - 1
	if err := f.awaitComing(c.ctx, f.first[c.file]+i); err != nil {
		return 0, err
	}
	if c.open == nil {
		var err error
		for _, dir := range f.folders() {
			if c.open, err = os.OpenInRoot(dir, c.path); err == nil {
				break
			}
		}
		if err != nil {
			return 0, err
		}
	}
	p = p[:min(int64(len(p)), pieces[i].offset+int64(pieces[i].length)-c.at)]
	n, err := c.open.ReadAt(p, c.at)
	c.at += int64(n)
	return n, err
}

// awaitComing is await for a download of somebody else.
func (f *flight) awaitComing(ctx context.Context, piece int) error {
	for {
		f.mu.Lock()
		have, moved := f.pieces[piece].have, f.moved
		f.mu.Unlock()
		if have {
			return nil
		}
		select {
		case <-moved:
		case <-f.ended:
			if f.err != nil {
				return f.err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *comingFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += c.at
	case io.SeekEnd:
		offset += c.size
	}
	if offset < 0 {
		return 0, fmt.Errorf("seek to %d", offset)
	}
	c.at = offset
	return offset, nil
}

func (c *comingFile) Close() error {
	if c.open == nil {
		return nil
	}
	return c.open.Close()
}

// onFlight is the source of a bundle that is on its way for the site.
type onFlight struct{ *flight }

func (onFlight) String() string { return "the cache of this device" }
func (onFlight) Streams() int   { return 1 }

func (f onFlight) Get(ctx context.Context, r Ref, offset, length int64) (*Body, error) {
	c, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	if _, err := c.Seek(offset, io.SeekStart); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	type body struct {
		io.Reader
		io.Closer
	}
	if length == 0 {
		length = c.Size
	}
	return &Body{ReadCloser: body{io.LimitReader(c, length), c}, Offset: offset, Whole: offset == 0 && length >= c.Size}, nil
}
