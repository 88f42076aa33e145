// Package pools exercises and measures pools of device memory, on whatever
// driver they are.
package pools

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/weights"
)

// piece bounds what is filled or compared at a time.
const piece = 16 << 20

// block is part of a pool's content, which its seed gives again.
type block struct {
	at   uintptr
	size int
	seed uint64
}

// each calls do with the block's bytes, piece by piece.
func (b block) each(do func(at uintptr, data []byte) error) error {
	source := rand.NewPCG(b.seed, uint64(b.size))
	buffer := make([]byte, 0, min(b.size, piece)+8)
	for from := 0; from < b.size; from += piece {
		buffer = buffer[:0]
		for size := min(b.size-from, piece); len(buffer) < size; {
			buffer = binary.NativeEndian.AppendUint64(buffer, source.Uint64())
		}
		if err := do(b.at+uintptr(from), buffer[:min(b.size-from, piece)]); err != nil {
			return err
		}
	}
	return nil
}

// fill allocates a block and writes it. A block without room is none.
func fill(p *weights.Pool, seed uint64, size int) (block, error) {
	at, err := p.Allocate(int64(size))
	if err != nil {
		return block{}, err
	}
	b := block{at, size, seed}
	if err := b.each(p.Write); err != nil {
		p.Free(at)
		return block{}, err
	}
	return b, nil
}

// ErrContent is the error of content that came back otherwise than it was.
var ErrContent = errors.New("content has changed")

func (b block) compare(p *weights.Pool) error {
	got := make([]byte, min(b.size, piece))
	return b.each(func(at uintptr, want []byte) error {
		if err := p.Read(got[:len(want)], at); err != nil {
			return err
		}
		if !bytes.Equal(got[:len(want)], want) {
			return fmt.Errorf("%w: within %d bytes at %#x", ErrContent, len(want), at)
		}
		return nil
	})
}

// Swap is how fast content of one size leaves and comes back. Times are
// medians.
type Swap struct {
	Size  int64
	In    time.Duration
	Limit time.Duration // of a bare copy of the same size, from pinned memory and in one piece
	Out   time.Duration
}

// Ratio gives the bandwidth of In as a part of the limit's.
func (s Swap) Ratio() float64 { return float64(s.Limit) / float64(s.In) }

// GBs gives the bandwidth of a time that the size took, in 10⁹ bytes a second.
func (s Swap) GBs(d time.Duration) float64 { return float64(s.Size) / float64(d.Nanoseconds()) }

// String gives the figures as words for a line.
func (s Swap) String() string {
	return fmt.Sprintf("in_gbs=%.2f limit_gbs=%.2f ratio=%.3f out_ms=%.2f", s.GBs(s.In), s.GBs(s.Limit), s.Ratio(), s.Out.Seconds()*1e3)
}

// MeasureSwap fills a pool with so many bytes and takes it out and in, in
// turn with the bare copy that bounds it, and compares the content at the end
// of each round. The device's memory has to hold the content and the copy's
// at once, and its arena the image.
func MeasureSwap(ctx context.Context, d *weights.Device, size int64, rounds int) (_ Swap, err error) {
	p, err := d.NewPool(size + size/4 + 64<<20)
	if err != nil {
		return Swap{}, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	// The runtime asks a GPU for all weights in one piece.
	b, err := fill(p, uint64(size), int(size))
	if err != nil {
		return Swap{}, err
	}
	defer p.Free(b.at)
	if err := p.Capture(); err != nil {
		return Swap{}, err
	}
	if !p.Stats().Pinned {
		return Swap{}, fmt.Errorf("swap %d bytes: the image is not in pinned memory", size)
	}
	var in, out, limit []time.Duration
	for round := range rounds + 1 {
		start := time.Now()
		if err := p.Out(); err != nil {
			return Swap{}, err
		}
		left := time.Since(start)
		bare, err := d.Measure(size, 3)
		if err != nil {
			return Swap{}, err
		}
		start = time.Now()
		if err := p.In(ctx); err != nil {
			return Swap{}, err
		}
		came := time.Since(start)
		if err := b.compare(p); err != nil {
			return Swap{}, err
		}
		if round > 0 { // the first one may find nothing recycled
			in, out, limit = append(in, came), append(out, left), append(limit, median(bare))
		}
	}
	return Swap{Size: size, In: median(in), Limit: median(limit), Out: median(out)}, nil
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// tenant is a pool of a sequence.
type tenant struct {
	pool     *weights.Pool
	blocks   []block
	captured bool
}

// file is a weights.File in memory.
type file struct{ data []byte }

func (f *file) WriteAt(b []byte, at int64) (int, error) {
	if more := int(at) + len(b) - len(f.data); more > 0 {
		f.data = append(f.data, make([]byte, more)...)
	}
	return copy(f.data[at:], b), nil
}

func (f *file) ReadAt(b []byte, at int64) (int, error) {
	if n := copy(b, f.data[min(int(at), len(f.data)):]); n < len(b) {
		return n, io.EOF
	}
	return len(b), nil
}

// Sequences loads, fills, captures, takes out and in, cancels and unloads
// pools of up to unit bytes each, in random order, and compares content and
// the device's ledger at every step; check, where not nil, does more. Nothing
// is left on the device but what is recycled.
func Sequences(ctx context.Context, d *weights.Device, seed uint64, steps int, unit int64, check func() error) (err error) {
	r := rand.New(rand.NewPCG(seed, 0))
	var all []*tenant
	unload := func(t *tenant) error {
		for _, b := range t.blocks {
			t.pool.Free(b.at)
		}
		return t.pool.Close()
	}
	defer func() {
		for _, t := range all {
			err = errors.Join(err, unload(t))
		}
		if s := d.Stats(); err == nil && (s.Reserved != 0 || s.Mapped != 0 || s.PinnedUsed != 0 || s.Pageable != 0) {
			err = fmt.Errorf("left on the device: %+v", s)
		}
	}()
	for step := range steps {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		what := r.IntN(10)
		if len(all) == 0 || (what == 0 && len(all) < 8) {
			p, err := d.NewPool(2 * unit)
			if err != nil {
				return err
			}
			t := &tenant{pool: p}
			all = append(all, t)
			for range 1 + r.IntN(6) {
				b, err := fill(p, r.Uint64(), 1+r.IntN(int(unit/6)))
				if err != nil {
					return err
				}
				t.blocks = append(t.blocks, b)
			}
		}
		i := r.IntN(len(all))
		t := all[i]
		if err := t.act(ctx, what, r); err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
		if what == 9 {
			all = slices.Delete(all, i, i+1)
			if err := unload(t); err != nil {
				return err
			}
		}
		if err := agree(d, all); err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
		if check != nil {
			if err := check(); err != nil {
				return fmt.Errorf("step %d: %w", step, err)
			}
		}
	}
	return nil
}

// act does one thing to a pool.
func (t *tenant) act(ctx context.Context, what int, r *rand.Rand) error {
	state := t.pool.Stats().State
	switch {
	case what <= 2 && !t.captured:
		if what == 2 && len(t.blocks) > 1 { // as a runtime frees what it has prepacked
			t.pool.Free(t.blocks[0].at)
			t.blocks = t.blocks[1:]
		}
		t.captured = true
		if r.IntN(4) == 0 {
			return t.pool.CaptureTo(&file{})
		}
		return t.pool.Capture()
	case what <= 5 && t.captured && state == weights.In:
		return t.pool.Out()
	case what == 6 && state == weights.Out:
		ctx, cancel := context.WithTimeout(ctx, time.Duration(r.IntN(3000))*time.Microsecond)
		defer cancel()
		err := t.pool.In(ctx)
		if now := t.pool.Stats(); err != nil && (now.State != weights.Out || now.Mapped != 0) {
			return fmt.Errorf("%v with %d bytes mapped after: %w", now.State, now.Mapped, err)
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	case state == weights.Out:
		if err := t.pool.In(ctx); err != nil {
			return err
		}
	}
	if t.pool.Stats().State == weights.Out {
		return nil
	}
	for _, b := range t.blocks {
		if err := b.compare(t.pool); err != nil {
			return err
		}
	}
	return nil
}

// agree compares the ledger with the pools.
func agree(d *weights.Device, all []*tenant) error {
	var reserved, mapped int64
	for _, t := range all {
		s := t.pool.Stats()
		reserved, mapped = reserved+s.Reserved, mapped+s.Mapped
	}
	s := d.Stats()
	if s.Reserved != reserved || s.Mapped != mapped || s.Mapped+s.Recycled != s.Physical || s.Pools != len(all) {
		return fmt.Errorf("ledger %+v, pools %d with %d bytes reserved and %d mapped", s, len(all), reserved, mapped)
	}
	return nil
}
