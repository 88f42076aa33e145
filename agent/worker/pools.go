package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/weights"
)

// inPool is the number of a kindActivate whose weights go into a pool.
const inPool = 2

const (
	// The addresses of a pool, which cost nothing, are so many times what its
	// model has on disk, and so much more: some weights are there twice while
	// a session is made.
	poolFactor, poolRoom = 4, 64 << 20
	// granule is in what pieces a device's memory comes, for estimates.
	granule = 2 << 20
	// recycledBytes is how much of a GPU's memory is kept for the next pool,
	// at most; of a smaller device an eighth.
	recycledBytes = 512 << 20
)

// poolSettings are what a child is to know of its pools.
type poolSettings struct {
	Device  string // Config.Pools
	Bytes   int64  // of a fake
	Pinned  int64
	Options map[string]string // Config.ProviderOptions
}

// poolsFound is what it says of them.
type poolsFound struct {
	ort.Pooling
	Bytes int64 // see Runtime.PoolBytes
}

// holding is what a session in a pool takes, in bytes.
type holding struct {
	Weights int64 // of the device, while they are in
	Session int64 // of the device, besides
	Image   int64 // of the host
}

// pools is a device in whose memory the child keeps weights.
type pools struct {
	device *weights.Device
	fake   *weights.Fake // which it is; nil for a GPU
	place  ort.Placement
	watch  func(p *pools, done bool) // of a test; told before and after each change, and with nil before it is opened

	mu   sync.Mutex // guards what follows
	all  map[uint64]tenant
	left []*weights.Pool // without a session; the driver did not take all back
}

// tenant is a session in a pool. While it is being changed it is not in all.
type tenant struct {
	session *ort.Session
	pool    *weights.Pool
	out     bool // no lane may run it
}

// open opens the device that the settings name, and tries whether the runtime
// puts weights there.
func (p *pools) open(ctx context.Context, s poolSettings, found *poolsFound) error {
	settings := weights.Settings{Pinned: s.Pinned, Recycled: recycledBytes}
	var driver weights.Driver
	var err error
	if s.Device == FakePools {
		if p.fake, err = weights.NewFake(weights.FakeConfig{Capacity: s.Bytes}); err != nil {
			return err
		}
		driver, settings.Recycled = p.fake, s.Bytes/8
	} else {
		number, ok := strings.CutPrefix(s.Device, "cuda:")
		gpu, err := strconv.Atoi(number)
		if !ok || err != nil || gpu < 0 {
			return fmt.Errorf("pools: %q is neither cuda:N nor %s", s.Device, FakePools)
		}
		driver, p.place = weights.CUDA(gpu), ort.Placement{CUDA: true, Device: gpu, Options: s.Options}
	}
	if p.device, err = weights.Open(driver, settings); err != nil {
		return err
	}
	found.Device = p.device.Info().Name
	if p.device.Info().Integrated {
		return errors.New("CPU and GPU share their memory: weights that are out would stay in it as images")
	}
	pool, err := p.device.NewPool(ort.ProbeBytes)
	if err != nil {
		return err
	}
	err = ort.ProbePool(ctx, pool, p.place)
	if err = errors.Join(err, p.close(pool)); err != nil {
		return err
	}
	free, _, err := p.device.Memory()
	found.Bytes = free + p.device.Stats().Recycled - settings.Recycled
	return err
}

// change begins one of the pools; the function that it gives ends it.
func (p *pools) change() func() {
	p.mu.Lock()
	left := p.left
	p.left = nil
	p.mu.Unlock()
	if p.watch != nil {
		p.watch(p, false)
	}
	for _, pool := range left {
		_ = p.close(pool) // it is left again
	}
	return func() {
		if p.watch != nil {
			p.watch(p, true)
		}
	}
}

// close closes a pool whose session is closed. What the driver does not take
// back is tried again at the next change.
func (p *pools) close(pool *weights.Pool) error {
	err := pool.Close()
	if err != nil {
		p.mu.Lock()
		p.left = append(p.left, pool)
		p.mu.Unlock()
	}
	return err
}

// take takes the session of a number out of all.
func (p *pools) take(number uint64) (tenant, bool) {
	if p == nil {
		return tenant{}, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	t, ok := p.all[number]
	delete(p.all, number)
	return t, ok
}

// put puts it back.
func (p *pools) put(number uint64, t tenant) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all[number] = t
}

// fill answers a kindActivate that opens a session in a pool.
func (c *sessions) fill(ctx context.Context, m *message) (*message, error) {
	p := c.pools
	if p == nil {
		return nil, fmt.Errorf("%w: there are no pools", errMalformed)
	}
	defer p.change()()
	start := time.Now()
	taken, err := p.taken()
	if err != nil {
		return nil, err
	}
	pool, err := p.device.NewPool(int64(m.memory))
	if err != nil {
		return nil, err
	}
	before := ownMemory()
	s, err := ort.OpenPooled(ctx, m.strings[0], m.strings[1], pool, p.place)
	grown := max(0, ownMemory()-before)
	if err != nil {
		_ = p.close(pool)
		return nil, err
	}
	err = pool.Capture()
	now := taken
	if err == nil {
		now, err = p.taken()
	}
	stats := pool.Stats()
	h := holding{Weights: stats.Mapped, Session: max(0, now-taken), Image: stats.Image}
	var text []byte
	if err == nil {
		text, err = json.Marshal(h)
	}
	if err != nil {
		s.Close()
		_ = p.close(pool)
		return nil, err
	}
	p.put(m.session, tenant{session: s, pool: pool})
	c.lanes.Open(m.session, s)
	return &message{
		kind: kindDone, seq: m.seq, number: uint64(time.Since(start)), memory: uint64(grown), strings: []string{string(text)},
		batch: s.Batch(), inputs: s.Inputs(), outputs: s.Outputs(),
	}, nil
}

// taken gives how many bytes of the device's memory are taken by others than
// pools; 0 for a fake, which has no others.
func (p *pools) taken() (int64, error) {
	if p.fake != nil {
		return 0, nil
	}
	free, total, err := p.device.Memory()
	return total - free - p.device.Stats().Physical, err
}

// out answers kindOut. After an error the session can only be closed.
func (c *sessions) out(number uint64) error {
	t, ok := c.pools.take(number)
	if !ok || t.out {
		return c.absent(number, t, ok, "in")
	}
	defer c.pools.change()()
	c.lanes.Take(number)
	t.out = true
	err := t.pool.Out()
	c.pools.put(number, t)
	return err
}

// in answers kindIn. After an error the weights are out.
func (c *sessions) in(ctx context.Context, number uint64) error {
	t, ok := c.pools.take(number)
	if !ok || !t.out {
		return c.absent(number, t, ok, "out")
	}
	defer c.pools.change()()
	err := t.pool.In(ctx)
	if err == nil {
		t.out = false
		c.lanes.Open(number, t.session)
	}
	c.pools.put(number, t)
	return err
}

// absent is the error of a session whose weights are not where they should be.
func (c *sessions) absent(number uint64, t tenant, ok bool, where string) error {
	if ok {
		c.pools.put(number, t)
	}
	return fmt.Errorf("%w: session %d has no weights in a pool that are %s", errMalformed, number, where)
}

// close answers kindDeactivate. Its error says that memory of a pool is yet
// to be given back.
func (c *sessions) close(number uint64) error {
	t, ok := c.pools.take(number)
	if !ok {
		c.lanes.Close(number)
		return nil
	}
	defer c.pools.change()()
	c.lanes.Take(number)
	t.session.Close()
	return c.pools.close(t.pool)
}

// openPools sets the pools as the settings in JSON say, and gives what was
// found in JSON.
func (c *sessions) openPools(text string) (string, error) {
	var s poolSettings
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return "", fmt.Errorf("%w: %w", errMalformed, err)
	}
	if c.watch != nil {
		c.watch(nil, false)
	}
	var found poolsFound
	c.device = &pools{watch: c.watch, all: make(map[uint64]tenant)}
	if err := c.device.open(context.Background(), s, &found); err == nil {
		c.pools, found.Works = c.device, true
	} else {
		found.Reason = err.Error()
		found.Reason = found.Reason[:min(len(found.Reason), maxReason)]
		if d := c.device.device; d != nil {
			_ = d.Close() // where even that fails, it stays open and unused
		}
	}
	b, err := json.Marshal(found)
	return string(b), err
}
