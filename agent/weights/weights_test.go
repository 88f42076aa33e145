package weights

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"pgregory.net/rapid"
)

const page = 4096

// open opens a device on a fake one, both for the time of a test, at whose end
// nothing may be left.
func open(t testing.TB, c FakeConfig, s Settings) (*Fake, *Device) {
	t.Helper()
	fake, err := NewFake(c)
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(fake, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		expectNothing(t, fake)
		fake.Close()
	})
	return fake, d
}

func newPool(t testing.TB, d *Device, reserve int64) *Pool {
	t.Helper()
	p, err := d.NewPool(reserve)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

func expectNothing(t fataler, fake *Fake) {
	t.Helper()
	c := fake.Count()
	c.Calls, c.Copies = 0, 0
	if c != (FakeCount{}) {
		t.Fatalf("left behind: %+v", c)
	}
	if b := fake.Breach(); b != "" {
		t.Fatalf("breach: %s", b)
	}
}

// expectLedger compares the device's books with what the driver has given.
func expectLedger(t fataler, fake *Fake, d *Device) {
	t.Helper()
	l, c := d.Stats(), fake.Count()
	if l.Reserved != c.Reserved || l.Physical != c.Created || l.Mapped != c.Mapped || l.Pinned != c.Pinned || l.Pools != c.Reservations {
		t.Fatalf("ledger %+v, driver %+v", l, c)
	}
	if l.Mapped+l.Recycled != l.Physical {
		t.Fatalf("ledger %+v: physical memory is neither mapped nor recycled", l)
	}
	if b := fake.Breach(); b != "" {
		t.Fatalf("breach: %s", b)
	}
}

// block is one that a test has filled.
type block struct {
	at   uintptr
	data []byte
}

func content(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, size+8)
	for len(b) < size {
		b = binary.NativeEndian.AppendUint64(b, r.Uint64())
	}
	return b[:size]
}

// fill allocates and writes a block.
func fill(p *Pool, seed uint64, size int) (block, error) {
	at, err := p.Allocate(int64(size))
	if err != nil {
		return block{}, err
	}
	b := block{at, content(seed, size)}
	return b, p.Write(at, b.data)
}

func mustFill(t testing.TB, p *Pool, sizes ...int) []block {
	t.Helper()
	var all []block
	for i, size := range sizes {
		b, err := fill(p, uint64(i), size)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func expectContent(t fataler, p *Pool, blocks []block) {
	t.Helper()
	for _, b := range blocks {
		got := make([]byte, len(b.data))
		if err := p.Read(got, b.at); err != nil {
			t.Fatalf("%v", err)
		}
		if !bytes.Equal(got, b.data) {
			t.Fatalf("block of %d bytes at %#x has changed", len(b.data), b.at)
		}
		if b.at%256 != 0 {
			t.Fatalf("block at %#x is not aligned", b.at)
		}
	}
}

func mustClose(t testing.TB, p *Pool, blocks []block) {
	t.Helper()
	for _, b := range blocks {
		p.Free(b.at)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOutAndIn(t *testing.T) {
	fake, d := open(t, FakeConfig{Capacity: 1 << 20, Granularity: page}, Settings{Pinned: 1 << 20, Recycled: 1 << 20})
	p := newPool(t, d, 1<<30)
	blocks := mustFill(t, p, 1, 300, 5*page, 100*page, 0, 7)
	if err := p.Out(); !errors.Is(err, ErrState) {
		t.Errorf("out before capture: %v", err)
	}
	if err := p.Capture(); err != nil {
		t.Fatal(err)
	}
	in := p.Stats()
	if in.State != In || !in.Pinned || in.Blocks != 6 || in.Image < 105*page || in.Mapped < in.Image || in.Mapped > in.Image+in.Image/8+page {
		t.Errorf("captured: %+v", in)
	}
	if _, err := p.Allocate(1); !errors.Is(err, ErrState) {
		t.Errorf("allocate after capture: %v", err)
	}
	calls := 0
	for i := range 3 {
		if err := p.Out(); err != nil {
			t.Fatal(err)
		}
		expectLedger(t, fake, d)
		if s := p.Stats(); s.State != Out || s.Mapped != 0 {
			t.Errorf("out: %+v", s)
		}
		if err := p.Read(make([]byte, 1), blocks[0].at); !errors.Is(err, ErrState) {
			t.Errorf("read while out: %v", err)
		}
		before := fake.Count().Calls
		if err := p.In(t.Context()); err != nil {
			t.Fatal(err)
		}
		if used := fake.Count().Calls - before; i == 0 {
			calls = used
		} else if used != calls {
			t.Errorf("came in by %d calls, before by %d", used, calls)
		}
		expectLedger(t, fake, d)
		expectContent(t, p, blocks)
		if s := p.Stats(); s != in {
			t.Errorf("in: %+v, before %+v", s, in)
		}
	}
	if err := p.Close(); !errors.Is(err, ErrInUse) {
		t.Errorf("close in use: %v", err)
	}
	if err := d.Close(); !errors.Is(err, ErrInUse) {
		t.Errorf("close device in use: %v", err)
	}
	mustClose(t, p, blocks)
	if err := p.Out(); !errors.Is(err, ErrClosed) {
		t.Errorf("out after close: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

// TestRecycled sees that handles go from pool to pool, up to the bound, and
// back to the driver where it runs out.
func TestRecycled(t *testing.T) {
	fake, d := open(t, FakeConfig{Capacity: 64 * page, Granularity: page}, Settings{Recycled: 32 * page, Largest: 8 * page})
	a, b := newPool(t, d, 1<<20), newPool(t, d, 1<<20)
	inA := mustFill(t, a, 40*page)
	if err := a.Capture(); err != nil {
		t.Fatal(err)
	}
	if a.Stats().Pinned || d.Stats().Pageable != a.Stats().Image {
		t.Errorf("no arena, and yet: %+v, %+v", a.Stats(), d.Stats())
	}
	if err := a.Out(); err != nil {
		t.Fatal(err)
	}
	if l := d.Stats(); l.Recycled != 32*page || l.Physical != 32*page {
		t.Errorf("recycled: %+v", l)
	}
	expectLedger(t, fake, d)
	// Other sizes: what is recycled has to go.
	var inB []block
	for range 60 {
		inB = append(inB, mustFill(t, b, page-256)...)
	}
	expectLedger(t, fake, d)
	_, err := b.Allocate(16 * page)
	if !errors.Is(err, ErrOutOfMemory) || !strings.Contains(err.Error(), fmt.Sprint(64*page)) {
		t.Errorf("beyond capacity: %v", err)
	}
	if err := b.Capture(); err != nil {
		t.Fatal(err)
	}
	err = a.In(t.Context())
	if !errors.Is(err, ErrOutOfMemory) || !strings.Contains(err.Error(), fmt.Sprintf("%d bytes are needed, and %d of the device's %d are free", 40*page, 64*page-b.Stats().Mapped, 64*page)) {
		t.Errorf("in beyond capacity: %v", err)
	}
	if s := a.Stats(); s.State != Out || s.Mapped != 0 {
		t.Errorf("after that: %+v", s)
	}
	expectLedger(t, fake, d)
	if err := b.Out(); err != nil {
		t.Fatal(err)
	}
	if err := a.In(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectContent(t, a, inA)
	mustClose(t, a, inA)
	mustClose(t, b, inB)
}

func TestFull(t *testing.T) {
	_, d := open(t, FakeConfig{Capacity: 1 << 20, Granularity: page}, Settings{})
	p := newPool(t, d, 3*page-5)
	blocks := mustFill(t, p, page, page)
	for _, size := range []int64{2 * page, 1 << 40} {
		if _, err := p.Allocate(size); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), fmt.Sprint(3*page)) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	p.Free(blocks[0].at)
	blocks = append(blocks[1:], mustFill(t, p, page/2, page/2, page)...)
	expectContent(t, p, blocks)
	mustClose(t, p, blocks)
	if _, err := d.NewPool(0); err == nil {
		t.Error("a pool without addresses")
	}
}

// TestTrim sees that memory without blocks is not kept: what a runtime has
// freed while it filled the pool.
func TestTrim(t *testing.T) {
	fake, d := open(t, FakeConfig{Capacity: 1 << 20, Granularity: page}, Settings{Largest: page})
	p := newPool(t, d, 1<<20)
	blocks := mustFill(t, p, page, 20*page, 3*page, 30*page)
	p.Free(blocks[1].at)
	p.Free(blocks[3].at)
	kept := []block{blocks[0], blocks[2]}
	if err := p.Capture(); err != nil {
		t.Fatal(err)
	}
	if s := p.Stats(); s.Mapped != 4*page || s.Image != 4*page {
		t.Errorf("captured: %+v", s)
	}
	expectLedger(t, fake, d)
	if err := errors.Join(p.Out(), p.In(t.Context())); err != nil {
		t.Fatal(err)
	}
	expectContent(t, p, kept)
	mustClose(t, p, kept)
}

// file is a File in memory.
type file struct {
	data []byte
	err  error
}

func (f *file) WriteAt(b []byte, at int64) (int, error) {
	if n := int(at) + len(b); n > len(f.data) {
		f.data = append(f.data, make([]byte, n-len(f.data))...)
	}
	return copy(f.data[at:], b), f.err
}

func (f *file) ReadAt(b []byte, at int64) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n := copy(b, f.data[min(int(at), len(f.data)):])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func TestCaptureToFile(t *testing.T) {
	fake, d := open(t, FakeConfig{Capacity: 64 << 20, Granularity: page, Integrated: true}, Settings{Recycled: 64 << 20, Largest: 1 << 20})
	if !d.Info().Integrated {
		t.Error("not integrated")
	}
	p := newPool(t, d, 64<<20)
	blocks := mustFill(t, p, 3*page+1, staging+5, 2*staging)
	f := &file{err: errors.New("disk full")}
	if err := p.CaptureTo(f); !errors.Is(err, f.err) {
		t.Errorf("capture to a full disk: %v", err)
	}
	f.err = nil
	if err := p.CaptureTo(f); err != nil {
		t.Fatal(err)
	}
	if s, l := p.Stats(), d.Stats(); int64(len(f.data)) != s.Image || l.Pageable != 0 || l.PinnedUsed != 0 {
		t.Errorf("captured %d bytes: %+v, %+v", len(f.data), s, l)
	}
	if err := errors.Join(p.Out(), p.In(t.Context()), p.In(t.Context())); err != nil {
		t.Fatal(err)
	}
	expectContent(t, p, blocks)
	whole := f.data
	f.data = whole[:len(whole)-1]
	if err := errors.Join(p.Out(), p.In(t.Context())); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("in from a short file: %v", err)
	}
	if s := p.Stats(); s.State != Out || s.Mapped != 0 {
		t.Errorf("after that: %+v", s)
	}
	expectLedger(t, fake, d)
	f.data = whole
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("nobody asks for it any more")
	cancel(why)
	if err := p.In(ctx); !errors.Is(err, why) {
		t.Errorf("in, cancelled: %v", err)
	}
	if err := p.In(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectContent(t, p, blocks)
	mustClose(t, p, blocks)
}

// TestCancel cancels arrivals after each number of calls that one takes.
func TestCancel(t *testing.T) {
	fake, d := open(t, FakeConfig{Capacity: 256 << 20, Granularity: page}, Settings{Recycled: 256 << 20, Largest: 256 << 10})
	p := newPool(t, d, 256<<20)
	blocks := mustFill(t, p, 6<<20)
	if err := p.Capture(); err != nil {
		t.Fatal(err)
	}
	cancelled, partly, why := 0, 0, errors.New("nobody asks for it any more")
	for calls := range 120 {
		if err := p.Out(); err != nil {
			t.Fatal(err)
		}
		before := fake.Count().Calls
		ctx, cancel := context.WithCancelCause(t.Context())
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			for fake.Count().Calls < before+calls && ctx.Err() == nil {
				runtime.Gosched()
			}
			cancel(why)
		}()
		err := p.In(ctx)
		cancel(nil)
		<-watched
		switch s := p.Stats(); {
		case err == nil && s.State == In:
			expectContent(t, p, blocks)
		case errors.Is(err, why) && s.State == Out && s.Mapped == 0:
			cancelled++
			if fake.Count().Calls > before {
				partly++
			}
		default:
			t.Fatalf("%v: %+v", err, s)
		}
		expectLedger(t, fake, d)
	}
	t.Logf("%d of 120 cancelled, %d of them on their way", cancelled, partly)
	if partly < 10 {
		t.Errorf("only %d arrivals were cancelled on their way", partly)
	}
	if err := p.In(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectContent(t, p, blocks)
	mustClose(t, p, blocks)
	// What has been begun is what an arrival that is cancelled waits for.
	if n := fake.Count().Copies; n != 4 {
		t.Errorf("%d copies were under way at a time", n)
	}
}

// machine is a device with pools in a random sequence of calls, any of which
// the driver may fail.
type machine struct {
	fake  *Fake
	d     *Device
	pools []*tenant
	seed  uint64
}

type tenant struct {
	pool     *Pool
	blocks   []block
	captured bool
	image    bool // on the host
	closing  bool // a Close has failed: it has no content
}

func (m *machine) pick(t *rapid.T) *tenant {
	if len(m.pools) == 0 {
		t.Skip("no pool")
	}
	return m.pools[rapid.IntRange(0, len(m.pools)-1).Draw(t, "pool")]
}

// state checks a pool after a call that ended with err and should have led to
// want.
func (m *machine) state(t *rapid.T, p *tenant, err error, want, otherwise State) {
	s := p.pool.Stats()
	if err == nil && s.State != want {
		t.Fatalf("%v, not %v", s.State, want)
	}
	if err != nil && s.State != want && s.State != otherwise {
		t.Fatalf("%v after %v, not %v or %v", s.State, err, want, otherwise)
	}
	if err == nil && want == Out && s.Mapped != 0 {
		t.Fatalf("%d bytes are mapped", s.Mapped)
	}
}

func (m *machine) check(t *rapid.T) {
	expectLedger(t, m.fake, m.d)
	var mapped, pinned, pageable int64
	for _, p := range m.pools {
		s := p.pool.Stats()
		mapped += s.Mapped
		switch {
		case s.Pinned:
			pinned += max((s.Image+255)/256*256, 256)
		case p.image:
			pageable += s.Image
		}
		if s.State != Out && s.Mapped < s.Used {
			t.Fatalf("%+v", s)
		}
		if s.Blocks != len(p.blocks) {
			t.Fatalf("%d blocks, not %d", s.Blocks, len(p.blocks))
		}
	}
	if l := m.d.Stats(); l.Mapped != mapped || l.PinnedUsed != pinned || l.Pageable != pageable {
		t.Fatalf("pools have %d bytes mapped and images of %d and %d, the ledger has %+v", mapped, pinned, pageable, l)
	}
}

func TestSequences(t *testing.T) {
	done := make(map[string]int)
	defer func() {
		t.Logf("%v", done)
		for _, what := range []string{"captured", "not captured", "out", "not out", "in", "not in", "closed", "not closed"} {
			if done[what] < 10 && !t.Failed() {
				t.Errorf("%q came up %d times", what, done[what])
			}
		}
	}()
	count := func(err error, what string) {
		if err != nil {
			what = "not " + what
		}
		done[what]++
	}
	sequence := func(t *rapid.T) {
		fake, err := NewFake(FakeConfig{Capacity: 96 * page, Granularity: page})
		if err != nil {
			t.Fatal(err)
		}
		defer fake.Close()
		settings := Settings{
			Pinned:   page * int64(rapid.IntRange(0, 40).Draw(t, "pinned")),
			Recycled: page * int64(rapid.IntRange(0, 100).Draw(t, "recycled")),
			Largest:  page << rapid.IntRange(0, 4).Draw(t, "largest"),
		}
		d, err := Open(fake, settings)
		if err != nil {
			t.Fatal(err)
		}
		m := &machine{fake: fake, d: d}
		// Where the sequence has failed already, nothing may panic besides.
		defer func() {
			fake.Fail("", 0, 0, 0)
			for _, p := range m.pools {
				for _, b := range p.blocks {
					p.pool.Free(b.at)
				}
				_ = p.pool.Close()
			}
			_ = d.Close()
		}()
		calls := append(fake.Calls(), "")
		// arm has one of the next few calls fail, now and then.
		arm := func(t *rapid.T) {
			if rapid.IntRange(0, 3).Draw(t, "arm") == 0 {
				fake.Fail("", rapid.IntRange(1, 8).Draw(t, "n"), 1, CodeUnknown)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"": m.check,
			"load": func(t *rapid.T) {
				if len(m.pools) > 6 {
					t.Skip("enough pools")
				}
				pool, err := d.NewPool(page * int64(rapid.IntRange(1, 64).Draw(t, "reserve")))
				if err == nil {
					m.pools = append(m.pools, &tenant{pool: pool})
				}
			},
			"allocate": func(t *rapid.T) {
				p := m.pick(t)
				m.seed++
				at, err := p.pool.Allocate(int64(rapid.IntRange(0, 20*page).Draw(t, "size")))
				if p.captured && err == nil {
					t.Fatal("allocated after capture")
				}
				if err != nil {
					return
				}
				for _, b := range p.blocks {
					if at < b.at+uintptr(len(b.data)) && b.at < at+1 {
						t.Fatalf("%#x is given twice", at)
					}
				}
				p.blocks = append(p.blocks, block{at: at})
				data := content(m.seed, rapid.IntRange(0, 255).Draw(t, "bytes"))
				fake.Fail("", 0, 0, 0)
				if err := p.pool.Write(at, data); len(data) > 0 && err != nil && !errors.Is(err, ErrState) {
					if !strings.Contains(err.Error(), "outside") {
						t.Fatal(err)
					}
					return
				} else if err == nil {
					p.blocks[len(p.blocks)-1].data = data
				}
			},
			"free": func(t *rapid.T) {
				p := m.pick(t)
				if len(p.blocks) == 0 || p.captured {
					t.Skip("no block")
				}
				i := rapid.IntRange(0, len(p.blocks)-1).Draw(t, "block")
				p.pool.Free(p.blocks[i].at)
				p.blocks = slices.Delete(p.blocks, i, i+1)
			},
			"capture": func(t *rapid.T) {
				p := m.pick(t)
				before := p.pool.Stats().State
				var err error
				arm(t)
				toFile := rapid.Bool().Draw(t, "file")
				if toFile {
					err = p.pool.CaptureTo(&file{})
				} else {
					err = p.pool.Capture()
				}
				if p.captured && err == nil {
					t.Fatal("captured again")
				}
				if p.closing && err == nil {
					t.Fatal("captured what is lost")
				}
				if p.captured || p.closing {
					return
				}
				count(err, "captured")
				m.state(t, p, err, In, before)
				p.captured = err == nil
				p.image = p.captured && !toFile
			},
			"out": func(t *rapid.T) {
				p := m.pick(t)
				before := p.pool.Stats().State
				arm(t)
				err := p.pool.Out()
				if !p.captured && !errors.Is(err, ErrState) {
					t.Fatalf("out before capture: %v", err)
				}
				if p.captured {
					count(err, "out")
					m.state(t, p, err, Out, before)
				}
			},
			"in": func(t *rapid.T) {
				p := m.pick(t)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				if rapid.IntRange(0, 4).Draw(t, "cancel") == 0 {
					go cancel()
				}
				arm(t)
				err := p.pool.In(ctx)
				if !p.captured && err == nil {
					t.Fatal("in before capture")
				}
				if p.captured {
					count(err, "in")
					m.state(t, p, err, In, Out)
				}
			},
			"unload": func(t *rapid.T) {
				p := m.pick(t)
				if len(p.blocks) > 0 {
					if err := p.pool.Close(); !errors.Is(err, ErrInUse) {
						t.Fatalf("closed in use: %v", err)
					}
				}
				for _, b := range p.blocks {
					p.pool.Free(b.at)
				}
				p.blocks = nil
				p.closing = true
				err := p.pool.Close()
				count(err, "closed")
				p.captured, p.image = false, false
				if s := p.pool; err != nil && s.Stats().State != Out {
					t.Fatalf("%v after a close that failed", s.Stats().State)
				}
				if err == nil {
					m.pools = slices.DeleteFunc(m.pools, func(o *tenant) bool { return o == p })
				}
			},
			"read": func(t *rapid.T) {
				fake.Fail("", 0, 0, 0)
				for _, p := range m.pools {
					if p.pool.Stats().State != Out {
						expectContent(t, p.pool, p.blocks)
					}
				}
			},
			"fail": func(t *rapid.T) {
				fake.Fail(rapid.SampledFrom(calls).Draw(t, "call"), rapid.IntRange(1, 20).Draw(t, "n"), rapid.IntRange(1, 4).Draw(t, "times"),
					rapid.SampledFrom([]int{CodeOutOfMemory, CodeUnknown}).Draw(t, "code"))
			},
		})
		fake.Fail("", 0, 0, 0)
		// All that is captured comes in, one by one, and is whole.
		for _, p := range m.pools {
			if p.captured && p.pool.Stats().State == In {
				expectContent(t, p.pool, p.blocks)
				if err := p.pool.Out(); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, p := range m.pools {
			if !p.captured || p.closing {
				continue
			}
			if err := p.pool.In(context.Background()); err != nil && !errors.Is(err, ErrOutOfMemory) {
				t.Fatal(err)
			} else if err == nil {
				expectContent(t, p.pool, p.blocks)
			}
			if err := p.pool.Out(); err != nil {
				t.Fatal(err)
			}
			m.check(t)
		}
		for _, p := range m.pools {
			for _, b := range p.blocks {
				p.pool.Free(b.at)
			}
			p.blocks = nil
			if err := p.pool.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		expectNothing(t, fake)
	}
	for range 20 { // each of 100 sequences
		rapid.Check(t, sequence)
	}
}

// journey takes one pool through all there is. Each step may fail; it gives
// the first error.
func journey(t *testing.T, fake *Fake) error {
	var errs error
	d, err := Open(fake, Settings{Pinned: 8 * page, Recycled: 4 * page, Largest: 2 * page})
	if err != nil {
		fake.Fail("", 0, 0, 0)
		return err
	}
	note := func(err error) bool { errs = errors.Join(errs, err); expectLedger(t, fake, d); return err == nil }
	var blocks []block
	p, err := d.NewPool(32 * page)
	if note(err) {
		for i, size := range []int{100, 3 * page, 2 * page, 10} {
			at, err := p.Allocate(int64(size))
			if !note(err) {
				continue
			}
			b := block{at: at}
			if data := content(uint64(i), size); note(p.Write(at, data)) {
				b.data = data
			}
			blocks = append(blocks, b)
		}
		if len(blocks) > 2 {
			p.Free(blocks[1].at)
			blocks = slices.Delete(blocks, 1, 2)
		}
		captured := note(p.Capture())
		if !captured {
			captured = note(p.Capture())
		}
		for range 2 {
			if !captured {
				break
			}
			note(p.Out())
			note(p.In(t.Context()))
		}
		fake.Fail("", 0, 0, 0)
		if captured {
			if err := p.In(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if p.Stats().State != Out {
			expectContent(t, p, blocks)
		}
		mustClose(t, p, blocks)
	}
	fake.Fail("", 0, 0, 0)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return errs
}

// TestEveryCallFails has each call of a journey fail, once or from then on.
func TestEveryCallFails(t *testing.T) {
	run := func(n, times, code int) (calls int, err error) {
		fake, e := NewFake(FakeConfig{Capacity: 20 * page, Granularity: page})
		if e != nil {
			t.Fatal(e)
		}
		defer fake.Close()
		fake.Fail("", n, times, code)
		err = journey(t, fake)
		calls = fake.Count().Calls
		if n == 0 {
			expectNothing(t, fake)
			return calls, err
		}
		// A device that could not be opened, nor closed again, is the driver's
		// to end; all others leave nothing.
		if c := fake.Count(); c.Created != 0 || c.Mapped != 0 || c.Reserved != 0 || fake.Breach() != "" {
			t.Errorf("call %d fails %d times: left behind %+v; %s", n, times, c, fake.Breach())
		}
		return calls, err
	}
	calls, err := run(0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d calls", calls)
	failed := 0
	for n := 1; n <= calls; n++ {
		for _, times := range []int{1, 2, 1 << 30} {
			for _, code := range []int{CodeOutOfMemory, CodeUnknown} {
				if _, err := run(n, times, code); err != nil {
					failed++
				}
			}
		}
	}
	if failed < calls {
		t.Errorf("only %d journeys saw their failure", failed)
	}
}

// TestTouchingWhatIsOut is a crash of the process that does.
func TestTouchingWhatIsOut(t *testing.T) {
	const child = "DUNLIN_TEST_TOUCH"
	if os.Getenv(child) != "" {
		_, d := open(t, FakeConfig{Capacity: 1 << 20, Granularity: page}, Settings{})
		p := newPool(t, d, 1<<20)
		b := mustFill(t, p, 100)[0]
		host := unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&b.at))), len(b.data))
		if !bytes.Equal(host, b.data) {
			t.Fatal("the fake's memory is not this process's")
		}
		if err := errors.Join(p.Capture(), p.Out(), p.In(t.Context())); err != nil || !bytes.Equal(host, b.data) {
			t.Fatal("not back", err)
		}
		if err := p.Out(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("about to touch")
		fmt.Println(bytes.Count(host, []byte{0}))
		os.Exit(0)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTouchingWhatIsOut$")
	cmd.Env = append(os.Environ(), child+"=1", "GOTRACEBACK=crash")
	out, err := cmd.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || !strings.Contains(string(out), "about to touch") || !strings.Contains(string(out), "SIGSEGV") {
		t.Fatalf("%v\n%s", err, out)
	}
	if w := exit.Sys().(syscall.WaitStatus); !w.Signaled() {
		t.Errorf("ended by %v", err)
	}
}

// TestManyAtOnce lets pools of one device come and go side by side in less
// memory than they need.
func TestManyAtOnce(t *testing.T) {
	fake, d := open(t, FakeConfig{Capacity: 40 * page, Granularity: page}, Settings{Pinned: 40 * page, Recycled: 10 * page, Largest: 4 * page})
	var wait sync.WaitGroup
	for i := range 6 {
		wait.Go(func() {
			p, err := d.NewPool(1 << 20)
			if err != nil {
				t.Error(err)
				return
			}
			b, err := fill(p, uint64(i), 4*page)
			if err == nil {
				err = p.Capture()
			}
			if err != nil {
				t.Error(err)
				return
			}
			for range 200 {
				if err := p.Out(); err != nil {
					t.Error(err)
				}
				if err := p.In(context.Background()); err != nil && !errors.Is(err, ErrOutOfMemory) {
					t.Error(err)
				} else if err == nil {
					got := make([]byte, len(b.data))
					if err := p.Read(got, b.at); err != nil || !bytes.Equal(got, b.data) {
						t.Error("content has changed", err)
					}
				}
				p.Stats()
				d.Stats()
			}
			p.Free(b.at)
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	expectLedger(t, fake, d)
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []FakeConfig{{}, {Capacity: 1, Granularity: 3}, {Capacity: 1, Granularity: 6000}} {
		if f, err := NewFake(c); err == nil {
			f.Close()
			t.Errorf("%+v was taken", c)
		}
	}
	fake, err := NewFake(FakeConfig{Capacity: page})
	if err != nil {
		t.Fatal(err)
	}
	defer fake.Close()
	if _, err := Open(fake, Settings{Pinned: -1}); err == nil {
		t.Error("negative setting")
	}
	fake.Fail("host_alloc", 1, 1, CodeOutOfMemory)
	if _, err := Open(fake, Settings{Pinned: page}); !errors.Is(err, ErrOutOfMemory) || !strings.Contains(err.Error(), "4096") {
		t.Errorf("no pinned memory: %v", err)
	}
	expectNothing(t, fake)
	d, err := Open(CUDA(0), Settings{})
	if err == nil {
		t.Logf("%+v", d.Info())
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	} else if !errors.Is(err, ErrNoGPU) {
		t.Errorf("CUDA: %v", err)
	}
}

func TestMeasure(t *testing.T) {
	_, d := open(t, FakeConfig{Capacity: 1 << 20, Granularity: page}, Settings{})
	took, err := d.Measure(100_000, 3)
	if err != nil || len(took) != 3 || slices.Min(took) <= 0 {
		t.Errorf("%v, %v", took, err)
	}
	if _, err := d.Measure(2<<20, 1); !errors.Is(err, ErrOutOfMemory) {
		t.Errorf("too much: %v", err)
	}
	free, total, err := d.Memory()
	if err != nil || free != 1<<20 || total != 1<<20 {
		t.Errorf("%d of %d, %v", free, total, err)
	}
}
