package reconcile

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/models/signing"
)

func newDepot(t testing.TB) *Depot {
	t.Helper()
	p, err := NewDepot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Many devices have one bundle after it has travelled once, each by its own
// trust; a device that trusts nobody who has signed it does not have it.
func TestDepot(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 30)})
	reg := serveBundles(t, b)
	s, stranger := newSite(t), newSite(t)
	signature, _ := reg.sign(s.key, b, "m", 1)
	p := newDepot(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			disk := p.Disk(DiskConfig{Bytes: 1 << 30})
			d := newDownload(t, nil, reg, b)
			d.signatures = append(d.signatures, signature)
			trust := s.trust
			if i%4 == 0 {
				trust = stranger.trust
			}
			d.trust = func() *signing.Trust { return trust }
			d.now = time.Now
			err := disk.fetch(t.Context(), d)
			_, refused := errors.AsType[*signing.RefusedError](err)
			if refused != (i%4 == 0) || !refused && err != nil || disk.Has(b.digest) == refused {
				t.Errorf("device %d: %v", i, err)
			}
			if !refused && (d.present.Load() != b.size || d.total.Load() != b.size || disk.Free() != 1<<30-uint64(b.size)) {
				t.Errorf("device %d has %d of %d bytes, %d are free", i, d.present.Load(), d.total.Load(), disk.Free())
			}
		})
	}
	wg.Wait()
	if got := reg.servedBytes(); got > 2*b.size {
		t.Errorf("%d bytes travelled for a bundle of %d", got, b.size)
	}
}

// What another bundle on the disk has does not travel; a cut download goes on,
// and after a crash begins again; a full disk is found out before.
func TestDisk(t *testing.T) {
	rng := seeded(t)
	common := blocks(rng, 20)
	b := pack(t, map[string][][]byte{"m.onnx": append(blocks(rng, 20), common...)})
	other := pack(t, map[string][][]byte{"m.onnx": append(blocks(rng, 2), common...)})
	reg := serveBundles(t, b, other)
	var arrived, most int64
	cut := errors.New("cut")
	disk := newDepot(t).Disk(DiskConfig{Bytes: 1 << 30, Transfer: func(_ context.Context, n int64) error {
		if arrived+n > most {
			return cut
		}
		arrived += n
		return nil
	}})
	d := newDownload(t, nil, reg, b)
	kept := &keptTraffic{}
	m := &meter{kept: kept, log: testLog(t), pending: map[string]int64{}}
	d.gate = &gate{meter: m, now: time.Now}
	most = 300 << 10
	if err := disk.fetch(t.Context(), d); !errors.Is(err, cut) || arrived == 0 || d.present.Load() != arrived || disk.Has(b.digest) {
		t.Fatalf("cut: %v after %d bytes", err, arrived)
	}
	before := arrived
	most += b.size
	if err := disk.fetch(t.Context(), d); err != nil || arrived != b.size {
		t.Errorf("going on after %d: %v, %d of %d bytes", before, err, arrived, b.size)
	}
	m.store(t.Context())
	if counted, err := kept.Traffic(t.Context(), ""); err != nil || counted != arrived || d.fetched.Load() != arrived {
		t.Errorf("%d bytes have arrived, %d are counted for the link and %d for the version: %v", arrived, counted, d.fetched.Load(), err)
	}
	arrived, most = 0, 1<<30
	if err := disk.fetch(t.Context(), newDownload(t, nil, reg, other)); err != nil || arrived >= other.size/2 || arrived == 0 {
		t.Errorf("of the other %d of %d bytes travelled: %v", arrived, other.size, err)
	}
	if err := disk.remove(b.digest); err != nil {
		t.Fatal(err)
	}
	arrived, most = 0, 300<<10
	d = newDownload(t, nil, reg, b)
	if err := disk.fetch(t.Context(), d); !errors.Is(err, cut) {
		t.Fatal(err)
	}
	disk.Crash()
	if _, part, _ := disk.list(); len(part) != 0 {
		t.Errorf("after a crash there is %v", part)
	}
	disk.Fill(1<<30 - uint64(other.size) - 10)
	if err := disk.fetch(t.Context(), d); !errors.Is(err, errNoRoom) || !strings.Contains(err.Error(), "10 are free") {
		t.Errorf("on a full disk: %v", err)
	}
}

// A device with a simulated disk serves what it should, and still does after a
// start.
func TestDeviceWithDisk(t *testing.T) {
	rng := seeded(t)
	v1, v2 := pack(t, map[string][][]byte{"m.onnx": blocks(rng, 3)}), pack(t, map[string][][]byte{"m.onnx": blocks(rng, 3)})
	reg := serveBundles(t, v1, v2)
	disk := newDepot(t).Disk(DiskConfig{Bytes: 1 << 30})
	d := startDeviceOn(t, reg, disk)
	d.Desire(desired(1, nil, v1.want("m", 1)))
	d.untilServing("m", 1)
	d.restart()
	d.untilServing("m", 1)
	d.Desire(desired(2, nil, v2.want("m", 2)))
	d.untilServing("m", 2)
	if !disk.Has(v2.digest) {
		t.Error("it is not on the disk")
	}
}
