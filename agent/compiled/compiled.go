// Package compiled keeps models that were compiled for this device, so that
// each is compiled once: a folder of files that are verified before they are
// given out, bounded in size, and whole after a crash at any moment.
package compiled

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/tensor"
)

// Format is the version of what this package writes, and part of each key.
const Format = 1

// FileName is the name of the compiled model in the folder that build gets.
const FileName = "model.ort"

// Names in the cache's folder; an entry's folder has its key's name.
const (
	entryName     = "entry.json"
	digestsName   = "digests.json"
	temporary     = "tmp-" // begins the name of what a crash may leave
	maxEntryBytes = 16 << 20
)

// ErrNone is the error of Get where there is no entry. What else the error
// says is why one was removed.
var ErrNone = errors.New("not in the cache of compiled models")

// Key is what a compiled model depends on. Two that differ in anything have
// different entries.
type Key struct {
	Model    string `json:"model"`    // what Digest gives
	Runtime  string `json:"runtime"`  // the runtime's version
	Provider string `json:"provider"` // the execution provider that it is compiled for
	CPU      string `json:"cpu"`      // what CPU gives
	Options  string `json:"options"`  // how the runtime was asked to compile
}

// name gives the name of the entry's folder.
func (k Key) name() string {
	h := sha256.New()
	for _, s := range []string{fmt.Sprint(Format), k.Model, k.Runtime, k.Provider, k.CPU, k.Options} {
		var size [8]byte
		binary.LittleEndian.PutUint64(size[:], uint64(len(s)))
		h.Write(size[:])
		h.Write([]byte(s))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Model is what is known of a compiled model: what it takes and gives, and
// what it needs.
type Model struct {
	Inputs  []tensor.Info
	Outputs []tensor.Info
	Batch   bool
	Need    engine.Need
	// Prepack says that a prepacked session runs faster.
	Prepack bool
	// Run is how long a run of one row takes on one thread; 0: not known.
	Run time.Duration
}

// Entry is a compiled model that its holder may use until Release.
type Entry struct {
	Model
	// File is the compiled model's path, and Size its bytes. Nobody writes to
	// it; after Release it may go.
	File string
	Size int64

	cache *Cache
	item  *item
	once  sync.Once
}

// Release ends the use of the entry. It may be called more than once.
func (e *Entry) Release() {
	e.once.Do(func() {
		e.cache.mu.Lock()
		e.item.users--
		gone := e.cache.evict()
		e.cache.mu.Unlock()
		e.cache.discard(gone)
	})
}

// Remove removes the entry from the cache, for a file that is good by its
// checksums and yet of no use, and releases it. Other holders keep theirs.
func (e *Entry) Remove() {
	e.cache.mu.Lock()
	var gone []*item
	if e.cache.items[e.item.name] == e.item {
		gone = e.cache.take(e.item)
	}
	e.cache.mu.Unlock()
	e.cache.discard(gone)
	e.Release()
}

// Cache is a folder of entries. Its methods may be called from many
// goroutines at a time; one process at a time has the folder.
type Cache struct {
	dir   string
	limit int64

	mu      sync.Mutex // guards what follows
	items   map[string]*item
	work    map[string]chan struct{} // names that somebody verifies or builds; closed when done
	total   int64                    // bytes of items
	removed int                      // folders moved away so far
	digests map[string]digest        // by path
}

// item is an entry's folder. Its fields are guarded by Cache.mu.
type item struct {
	name  string
	bytes int64
	used  time.Time
	users int
	// model is set once the entry has been verified.
	model *record
}

// Open opens the cache in a folder, which it makes where there is none, and
// removes what a crash has left. limit bounds the bytes of all entries, by
// removing those that were not used for the longest time; entries in use stay
// beyond it.
func Open(dir string, limit int64) (*Cache, error) {
	if limit <= 0 {
		return nil, fmt.Errorf("open cache of compiled models %s: limit of %d bytes is not positive", dir, limit)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open cache of compiled models: %w", err)
	}
	c := &Cache{dir: dir, limit: limit, items: make(map[string]*item), work: make(map[string]chan struct{})}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open cache of compiled models: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), temporary) {
			if err := os.RemoveAll(path); err != nil {
				return nil, fmt.Errorf("open cache of compiled models: %w", err)
			}
			continue
		}
		if !e.IsDir() {
			continue
		}
		i := &item{name: e.Name()}
		if info, err := os.Stat(filepath.Join(path, entryName)); err == nil {
			i.bytes, i.used = info.Size(), info.ModTime()
		}
		if info, err := os.Stat(filepath.Join(path, FileName)); err == nil {
			i.bytes += info.Size()
		}
		c.items[i.name] = i
		c.total += i.bytes
	}
	c.digests = readDigests(filepath.Join(dir, digestsName))
	c.mu.Lock()
	gone := c.evict()
	c.mu.Unlock()
	c.discard(gone)
	return c, nil
}

// Bytes gives the bytes of all entries.
func (c *Cache) Bytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}

// begin waits until nobody works on a name and has the caller do so, until it
// calls end.
func (c *Cache) begin(ctx context.Context, name string) (end func(), err error) {
	for {
		c.mu.Lock()
		busy := c.work[name]
		if busy == nil {
			done := make(chan struct{})
			c.work[name] = done
			c.mu.Unlock()
			return func() {
				c.mu.Lock()
				delete(c.work, name)
				c.mu.Unlock()
				close(done)
			}, nil
		}
		c.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Get gives the entry of a key. The first time in this process it reads the
// whole file: one that is damaged, cut or of another key is removed, and the
// error, which is ErrNone, says so.
func (c *Cache) Get(ctx context.Context, key Key) (*Entry, error) {
	end, err := c.begin(ctx, key.name())
	if err != nil {
		return nil, err
	}
	defer end()
	return c.get(ctx, key)
}

// get does so for who works on the key's name.
func (c *Cache) get(ctx context.Context, key Key) (*Entry, error) {
	name := key.name()
	c.mu.Lock()
	i := c.items[name]
	verified := i != nil && i.model != nil
	c.mu.Unlock()
	if i == nil {
		return nil, ErrNone
	}
	if !verified {
		r, err := verify(ctx, filepath.Join(c.dir, name), key)
		if err != nil && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		c.mu.Lock()
		if err != nil {
			gone := c.take(i)
			c.mu.Unlock()
			c.discard(gone)
			return nil, fmt.Errorf("%w: removed %s: %w", ErrNone, name, err)
		}
		i.model = r
		c.mu.Unlock()
	}
	now := time.Now()
	c.mu.Lock()
	if c.items[name] != i { // a holder has removed it
		c.mu.Unlock()
		return nil, ErrNone
	}
	i.users++
	i.used = now
	e := c.entry(i)
	c.mu.Unlock()
	// So that the next process knows the order; without it, it guesses.
	_ = os.Chtimes(filepath.Join(c.dir, name, entryName), now, now)
	return e, nil
}

// entry gives an item to one who uses it. mu is held.
func (c *Cache) entry(i *item) *Entry {
	return &Entry{Model: i.model.Model, File: filepath.Join(c.dir, i.name, FileName), Size: i.model.Size, cache: c, item: i}
}

// Put gives the entry of a key, and has build make it where there is none: it
// writes FileName into the folder that it gets and says what is known of the
// model. Of several callers at a time one builds; where that fails, the next
// one does. What build leaves in an entry's folder besides counts for nothing.
func (c *Cache) Put(ctx context.Context, key Key, build func(dir string) (Model, error)) (*Entry, error) {
	end, err := c.begin(ctx, key.name())
	if err != nil {
		return nil, err
	}
	defer end()
	e, err := c.get(ctx, key)
	if !errors.Is(err, ErrNone) {
		return e, err
	}
	dir, err := os.MkdirTemp(c.dir, temporary)
	if err != nil {
		return nil, fmt.Errorf("put compiled model: %w", err)
	}
	defer os.RemoveAll(dir)
	m, err := build(dir)
	if err != nil {
		return nil, err
	}
	i, err := c.install(ctx, key, dir, m)
	if err != nil {
		return nil, fmt.Errorf("put compiled model: %w", err)
	}
	c.mu.Lock()
	c.items[i.name] = i
	c.total += i.bytes
	e = c.entry(i)
	gone := c.evict()
	c.mu.Unlock()
	c.discard(gone)
	return e, nil
}

// install makes an entry of what was built in a folder. It is there whole or
// not at all: it gets its name when all of it is on disk.
func (c *Cache) install(ctx context.Context, key Key, dir string, m Model) (*item, error) {
	f, err := os.Open(filepath.Join(dir, FileName))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > c.limit {
		return nil, fmt.Errorf("it has %d bytes, more than the cache's limit of %d", info.Size(), c.limit)
	}
	r := &record{Key: key, Format: Format, Model: m, Size: info.Size()}
	if r.Sums, err = sums(ctx, f, r.Size); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	bytes, err := r.write(filepath.Join(dir, entryName))
	if err != nil {
		return nil, err
	}
	if err := syncDir(dir); err != nil {
		return nil, err
	}
	name := key.name()
	// A folder of this name is one that could not be moved away.
	if err := os.RemoveAll(filepath.Join(c.dir, name)); err != nil {
		return nil, err
	}
	if err := os.Rename(dir, filepath.Join(c.dir, name)); err != nil {
		return nil, err
	}
	return &item{name: name, bytes: r.Size + bytes, used: time.Now(), users: 1, model: r}, syncDir(c.dir)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// evict takes out entries until the rest is within the limit, and gives them.
// mu is held.
func (c *Cache) evict() []*item {
	var gone []*item
	for c.total > c.limit {
		var oldest *item
		for _, i := range c.items {
			if i.users == 0 && c.work[i.name] == nil && (oldest == nil || i.used.Before(oldest.used)) {
				oldest = i
			}
		}
		if oldest == nil {
			break
		}
		gone = append(gone, c.take(oldest)...)
	}
	return gone
}

// take takes an entry out and moves its folder to where it is nobody's. mu is
// held: a rename waits for no data.
func (c *Cache) take(i *item) []*item {
	delete(c.items, i.name)
	c.total -= i.bytes
	c.removed++
	away := fmt.Sprintf("%sgone-%d", temporary, c.removed)
	if os.Rename(filepath.Join(c.dir, i.name), filepath.Join(c.dir, away)) != nil {
		return nil // somebody else has removed it
	}
	return []*item{{name: away}}
}

// discard deletes the folders of entries that were taken out. What fails is
// left for the next Open.
func (c *Cache) discard(gone []*item) {
	for _, i := range gone {
		_ = os.RemoveAll(filepath.Join(c.dir, i.name))
	}
}
