package reconcile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/dunlin/dunlin/models/signing"
)

// Depot holds the bundles of all simulated devices of one process: each is
// fetched, verified and stored once, by the download that real devices have.
// Its methods may be called concurrently.
type Depot struct {
	bundles *bundles

	mu    sync.Mutex // guards what follows
	here  map[digest.Digest]*deposit
	small map[Ref][]byte
	busy  map[any]chan struct{} // what is being fetched, by digest or Ref; closed at the end
}

// deposit is a bundle and its chunks.
type deposit struct {
	*bundle
	chunks map[[sha256.Size]byte]int64 // lengths
}

// NewDepot opens a depot in a folder.
func NewDepot(dir string) (*Depot, error) {
	b, err := openBundles(dir)
	if err != nil {
		return nil, err
	}
	return &Depot{bundles: b, here: map[digest.Digest]*deposit{}, small: map[Ref][]byte{}, busy: map[any]chan struct{}{}}, nil
}

// once has one caller at a time do what makes have true; the others wait for
// it, and try themselves where it failed.
func (p *Depot) once(ctx context.Context, key any, have func() bool, do func() error) error {
	for {
		p.mu.Lock()
		if have() {
			p.mu.Unlock()
			return nil
		}
		busy := p.busy[key]
		if busy == nil {
			busy = make(chan struct{})
			p.busy[key] = busy
			p.mu.Unlock()
			err := do()
			p.mu.Lock()
			delete(p.busy, key)
			p.mu.Unlock()
			close(busy)
			if err != nil {
				return err
			}
			continue
		}
		p.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// get gives a bundle, which d fetches where nobody has yet. Whether the device
// may take it is not looked at.
func (p *Depot) get(ctx context.Context, d *download) (*deposit, error) {
	var found *deposit
	err := p.once(ctx, d.digest, func() bool { found = p.here[d.digest]; return found != nil }, func() error {
		if _, err := p.bundles.open(d.digest); err != nil {
			all := func() *signing.Trust { return signing.TrustAll }
			real := &download{store: p.bundles, remote: d.remote, id: d.id, digest: d.digest, trust: all, now: d.now, free: freeSpace, log: d.log}
			real.prepare()
			if err := real.run(ctx); err != nil {
				return err
			}
		}
		return p.take(d.digest)
	})
	return found, err
}

// take reads a bundle that is stored.
func (p *Depot) take(of digest.Digest) error {
	b, err := p.bundles.open(of)
	if err != nil {
		return err
	}
	index, err := readIndex(p.bundles.path(of))
	if err != nil {
		return err
	}
	d := &deposit{b, map[[sha256.Size]byte]int64{}}
	for _, f := range index.Files {
		for _, c := range f.Chunks {
			d.chunks[[sha256.Size]byte(c.Sha256)] = int64(c.Length)
		}
	}
	p.mu.Lock()
	p.here[of] = d
	p.mu.Unlock()
	return nil
}

// shared is a Source that asks for each document once for all devices.
type shared struct {
	Source
	depot *Depot
}

// Get implements Source. Parts are not kept.
func (s shared) Get(ctx context.Context, r Ref, offset, length int64) (*Body, error) {
	if length != 0 {
		return s.Source.Get(ctx, r, offset, length)
	}
	var found []byte
	err := s.depot.once(ctx, r, func() bool { found = s.depot.small[r]; return found != nil }, func() error {
		raw, err := readAll(ctx, s.Source, r, maxShared)
		if err != nil {
			return err
		}
		if r.Digest != digest.FromBytes(raw) {
			return &VerifyError{File: r.Digest.String(), Err: fmt.Errorf("%d bytes do not have that digest", len(raw))}
		}
		s.depot.mu.Lock()
		defer s.depot.mu.Unlock()
		s.depot.small[r] = raw
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &Body{ReadCloser: io.NopCloser(bytes.NewReader(found)), Whole: true}, nil
}

// maxShared bounds a document that is kept for all devices; what is longer
// fails.
const maxShared = 1 << 20

// DiskConfig says what a simulated disk is like.
type DiskConfig struct {
	Bytes uint64 // room for bundles
	// Transfer takes the time in which so many bytes arrive and are written; an
	// error is one of the way there. nil: no time.
	Transfer func(ctx context.Context, bytes int64) error
}

// Disk is the disk of a simulated device: it knows which bundles it has, and
// their bytes are in a Depot. It survives its agent.
type Disk struct {
	depot *Depot
	cfg   DiskConfig

	mu     sync.Mutex // guards what follows
	whole  map[digest.Digest]*deposit
	part   map[digest.Digest]int64 // bytes that have arrived
	filled uint64                  // by something else
}

// transferStep is how many bytes arrive between two looks at a download.
const transferStep = 256 << 10

// Disk gives a new one, which is empty.
func (p *Depot) Disk(cfg DiskConfig) *Disk {
	return &Disk{depot: p, cfg: cfg, whole: map[digest.Digest]*deposit{}, part: map[digest.Digest]int64{}}
}

// Crash loses what had not been made durable: downloads that are not complete.
func (k *Disk) Crash() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.part)
}

// Fill has something else take so many bytes; 0 gives them back.
func (k *Disk) Fill(bytes uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.filled = bytes
}

// Free gives the bytes that bundles may still take.
func (k *Disk) Free() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.free()
}

func (k *Disk) free() uint64 {
	used := k.filled
	for _, d := range k.whole {
		used += uint64(d.manifest.Size)
	}
	for _, n := range k.part {
		used += uint64(n)
	}
	return k.cfg.Bytes - min(used, k.cfg.Bytes)
}

// Has says whether a verified bundle is there.
func (k *Disk) Has(of digest.Digest) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.whole[of] != nil
}

func (k *Disk) open(of digest.Digest) (*bundle, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.whole[of]; d != nil {
		return d.bundle, nil
	}
	return nil, fmt.Errorf("bundle %s: %w", of, fs.ErrNotExist)
}

func (k *Disk) list() (whole, part []digest.Digest, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.whole)), slices.Sorted(maps.Keys(k.part)), nil
}

func (k *Disk) remove(of digest.Digest) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.whole, of)
	delete(k.part, of)
	return nil
}

// fetch is download.run for a simulated disk: what the bundle is, and whether
// the device may take it, is as for a real one; chunks that other bundles hold
// do not travel.
func (k *Disk) fetch(ctx context.Context, d *download) error {
	d.remote = shared{d.remote, k.depot}
	b, err := k.depot.get(ctx, d)
	if err != nil {
		return err
	}
	if err := d.admit(ctx, b.manifest); err != nil {
		return err
	}
	left := k.begin(d, b)
	if left > 0 {
		if err := d.gate.pass(ctx, left); err != nil {
			return err
		}
	}
	if free := k.Free(); free < uint64(left)+d.reserve {
		return fmt.Errorf("%w: the download needs %d bytes, %d are free, and %d of them are kept in reserve", errNoRoom, left, free, d.reserve)
	}
	for left > 0 {
		n := min(left, transferStep)
		if k.cfg.Transfer != nil {
			if err := k.cfg.Transfer(ctx, n); err != nil {
				return err
			}
		} else if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		left -= n
		d.present.Add(n)
		d.fetched.Add(n)
		if err := d.gate.take(ctx, int(n)); err != nil {
			return err
		}
		k.mu.Lock()
		k.part[d.digest] += n
		k.mu.Unlock()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.part, d.digest)
	k.whole[d.digest] = b
	return nil
}

// begin goes on with a download, and gives how many bytes have to travel still.
func (k *Disk) begin(d *download, b *deposit) (left int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	have := k.part[d.digest]
	left = b.manifest.Size
	for sum, length := range b.chunks {
		for _, other := range k.whole {
			if _, ok := other.chunks[sum]; ok {
				left -= length
				break
			}
		}
	}
	left = max(left-have, 0)
	k.part[d.digest] = have
	d.total.Store(b.manifest.Size)
	d.present.Store(b.manifest.Size - left)
	return left
}
