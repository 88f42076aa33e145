package reconcile

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	near "github.com/dunlin/dunlin/agent/site"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
)

// member is a device of a fleet.
type member struct {
	fleet *pki.Authority
	own   *tls.Certificate
}

func (m member) TLSCertificate() (*tls.Certificate, error) { return m.own, nil }
func (m member) Roots() []*x509.Certificate                { return []*x509.Certificate{m.fleet.Certificate} }
func (m member) Now() time.Time                            { return time.Now() }

// testSite has devices that fetch from each other.
type testSite struct {
	testing.TB
	fleet *pki.Authority
}

func newFleet(t testing.TB) testSite { return testSite{t, pkitest.Authority(t)} }

func (s testSite) member(name string) member {
	return member{s.fleet, pkitest.Device(s, s.fleet, name)}
}

// shelf makes a device that gives what it has; a cache where bytes is not 0.
func (s testSite) shelf(name string, own *bundles, bytes int64, reg *testRegistry) (*Shelf, string) {
	s.Helper()
	origin := NewRemote(reg.registry())
	shelf, err := NewShelf(ShelfConfig{
		Bundles: own.dir, Cache: filepath.Join(s.TempDir(), "site"), CacheBytes: bytes, Origin: func() Source { return origin }, Log: testLog(s),
	})
	if err != nil {
		s.Fatal(err)
	}
	server, err := near.Listen("127.0.0.1:0", testLog(s))
	if err != nil {
		s.Fatal(err)
	}
	url, err := server.URL()
	if err != nil {
		s.Fatal(err)
	}
	open := func(ctx context.Context, model string, d digest.Digest, manifest bool) (io.ReadSeeker, io.Closer, error) {
		c, err := shelf.Open(ctx, Ref{model, d, manifest})
		if err != nil {
			return nil, nil, err
		}
		return c, c, nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := server.Run(ctx, s.member(name), open); err != nil {
			s.Error(err)
		}
	})
	running.Go(func() { _ = shelf.Run(ctx) })
	s.Cleanup(func() { cancel(); running.Wait() })
	return shelf, url
}

// A hundred devices of a site want the same new bundle: one copy of it comes
// over the link of the site, though half of them ask while it is on its way.
func TestSiteFetchesOnce(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 4), "model.data": blocks(rng, 1)})
	reg := serveBundles(t, b)
	s := newFleet(t)
	_, url := s.shelf("cache", testStore(t), 64<<20, reg)
	client := near.NewClient(s.member("one-of-many"), "cache")
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	for range 100 {
		store := testStore(t)
		d := newDownload(t, store, reg, b)
		d.near = []Source{NewPeer(url, client, true)}
		wg.Go(func() {
			if err := d.run(context.Background()); err != nil {
				t.Error(err)
				return
			}
			checkInstalled(t, store, b)
		})
	}
	wg.Wait()
	if got := reg.servedBytes(); got > b.size+b.size/5 {
		t.Errorf("the registry gave %d bytes for bundles of %d", got, b.size)
	}
}

// What a device has complete it gives to others, and nobody asks the registry.
func TestPeersGiveWhatTheyHave(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 8)})
	reg := serveBundles(t, b)
	own := testStore(t)
	if err := newDownload(t, own, reg, b).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := newFleet(t)
	_, url := s.shelf("peer", own, 0, reg)
	before := reg.servedBytes()
	store := testStore(t)
	d := newDownload(t, store, reg, b)
	d.near = []Source{NewPeer(url, near.NewClient(s.member("asks"), "peer"), false)}
	d.gate = &gate{link: Link{Metered: true}, meter: testMeter(t), now: time.Now} // what comes from the site is free
	if err := d.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, store, b)
	if got := reg.servedBytes() - before; got != 0 {
		t.Errorf("the registry gave %d bytes", got)
	}
	if n := d.fetched.Load(); n < b.size {
		t.Errorf("%d bytes travelled of %d", n, b.size)
	}
}

// While a device fetches for itself, the others of its site get of it what has
// come.
func TestShelfGivesWhatComes(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 40)})
	reg := serveBundles(t, b)
	own := testStore(t)
	s := newFleet(t)
	shelf, url := s.shelf("first", own, 0, reg)
	first := newDownload(t, own, reg, b)
	first.prepare()
	half := make(chan struct{})
	wrote := 0
	first.wrote = func() {
		if wrote++; wrote == 5 {
			close(half)
		}
	}
	_, ended := shelf.begin(first)
	var wg sync.WaitGroup
	wg.Go(func() {
		err := first.run(context.Background())
		ended(err)
		if err != nil {
			t.Error(err)
		}
	})
	<-half
	store := testStore(t)
	second := newDownload(t, store, reg, b)
	second.remote = nil
	second.near = []Source{NewPeer(url, near.NewClient(s.member("second"), "first"), false)}
	if err := second.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, store, b)
	wg.Wait()
}

// Whatever is wrong with those near, the registry has the bundle.
func TestBadPeersAreGivenUp(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 30)})
	good := serveBundles(t, b)
	s := newFleet(t)
	has := func(fault func(d digest.Digest, offset int64, p []byte) verdict) Source {
		reg := serveBundles(t, b)
		reg.setFault(fault)
		p := NewPeer(reg.URL, reg.Client(), false).(*peer)
		p.stall = 100 * time.Millisecond
		return p
	}
	_, url := s.shelf("other", testStore(t), 0, good)
	peers := map[string]Source{
		"wrong bytes": has(func(d digest.Digest, offset int64, p []byte) verdict {
			if d == b.blobOf("model.onnx") && offset > 100<<10 {
				p[0]++
			}
			return pass
		}),
		"wrong manifest": has(func(d digest.Digest, offset int64, p []byte) verdict { p[0]++; return pass }),
		"cuts": has(func(d digest.Digest, offset int64, p []byte) verdict {
			if offset > 500<<10 {
				return cut
			}
			return pass
		}),
		"stalls": has(func(d digest.Digest, offset int64, p []byte) verdict {
			if offset > 500<<10 {
				return stalled
			}
			return pass
		}),
		"has nothing":       NewPeer(url, near.NewClient(s.member("asks"), "other"), false),
		"is somebody else":  NewPeer(url, near.NewClient(s.member("asks"), "another"), false),
		"of another fleet":  NewPeer(url, near.NewClient(newFleet(t).member("asks"), "other"), false),
		"nobody is there":   NewPeer("https://127.0.0.1:1", near.NewClient(s.member("asks"), "other"), false),
		"is the registry's": has(nil), // a good one
	}
	for name, p := range peers {
		t.Run(name, func(t *testing.T) {
			store := testStore(t)
			d := newDownload(t, store, good, b)
			d.near = []Source{p}
			if err := d.run(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkInstalled(t, store, b)
			if kept := slices.Contains(d.near, p); kept != (name == "is the registry's") {
				t.Errorf("still asked: %t", kept)
			}
		})
	}
}

// A cache keeps within its bound, drops what was asked for longest ago, and
// does not give what does not fit.
func TestCacheIsBounded(t *testing.T) {
	rng := seeded(t)
	var all []*testBundle
	for i := range 4 {
		all = append(all, pack(t, map[string][][]byte{"model.onnx": blocks(rng, 4+i)}))
	}
	large := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 40)})
	reg := serveBundles(t, append(all, large)...)
	s := newFleet(t)
	bound := all[2].size + all[3].size
	shelf, url := s.shelf("cache", testStore(t), bound, reg)
	client := near.NewClient(s.member("asks"), "cache")
	fetch := func(b *testBundle) *download {
		t.Helper()
		store := testStore(t)
		d := newDownload(t, store, reg, b)
		d.near = []Source{NewPeer(url, client, true)}
		if err := d.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		checkInstalled(t, store, b)
		for deadline := time.Now().Add(10 * time.Second); len(shelf.coming()) > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the flight does not end")
			}
		}
		return d
	}
	for _, b := range all {
		fetch(b)
		whole, _, err := shelf.cache.list()
		if err != nil {
			t.Fatal(err)
		}
		var total int64
		for _, d := range whole {
			total += shelf.manifest(shelf.cache.path(d)).Size
		}
		if total > bound {
			t.Errorf("keeps %d bytes, allowed are %d", total, bound)
		}
	}
	before := reg.servedBytes()
	fetch(all[3])
	if got := reg.servedBytes() - before; got != 0 {
		t.Errorf("%d bytes came again of what was kept", got)
	}
	if d := fetch(large); len(d.near) != 0 {
		t.Error("a bundle that does not fit came from the cache")
	}
	left := shelf.cache.path(large.digest) + partSuffix // as by a crash
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	again, err := NewShelf(shelf.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := again.Open(t.Context(), Ref{"m", all[3].digest, true}); err != nil {
		t.Errorf("after a start: %v", err)
	} else {
		c.Close()
	}
	if _, err := os.Stat(left); err == nil {
		t.Error("a part is left over after a start")
	}
}

func testMeter(t testing.TB) *meter {
	return &meter{kept: &keptTraffic{}, log: testLog(t), pending: map[string]int64{}}
}

// keptTraffic keeps traffic in memory.
type keptTraffic struct {
	mu   sync.Mutex
	days map[string]int64
}

func (k *keptTraffic) Traffic(_ context.Context, days string) (n int64, _ error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for day, bytes := range k.days {
		if len(day) >= len(days) && day[:len(days)] == days {
			n += bytes
		}
	}
	return n, nil
}

func (k *keptTraffic) AddTraffic(_ context.Context, day string, bytes int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.days == nil {
		k.days = map[string]int64{}
	}
	k.days[day] += bytes
	return nil
}
