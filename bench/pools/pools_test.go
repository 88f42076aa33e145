package pools

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/dunlin/dunlin/agent/weights"
)

func open(t *testing.T, s weights.Settings) (*weights.Fake, *weights.Device) {
	t.Helper()
	fake, err := weights.NewFake(weights.FakeConfig{Capacity: 64 << 20, Granularity: 4096})
	if err != nil {
		t.Fatal(err)
	}
	d, err := weights.Open(fake, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		fake.Close()
	})
	return fake, d
}

func TestSequences(t *testing.T) {
	fake, d := open(t, weights.Settings{Pinned: 1 << 20, Recycled: 2 << 20, Largest: 256 << 10})
	for seed := range uint64(4) {
		err := Sequences(t.Context(), d, seed, 300, 600<<10, func() error {
			s, c := d.Stats(), fake.Count()
			if s.Reserved != c.Reserved || s.Mapped != c.Mapped || s.Physical != c.Created || fake.Breach() != "" {
				return fmt.Errorf("ledger %+v, driver %+v, %s", s, c, fake.Breach())
			}
			return nil
		})
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	fake.Fail("map", 5, 1, weights.CodeUnknown)
	if err := Sequences(t.Context(), d, 1, 300, 600<<10, nil); err == nil {
		t.Error("a driver that fails has passed")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if err := Sequences(ctx, d, 1, 1, 4096, nil); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestMeasureSwap(t *testing.T) {
	_, d := open(t, weights.Settings{Pinned: 8 << 20, Recycled: 16 << 20})
	s, err := MeasureSwap(t.Context(), d, 5<<20, 2)
	if err != nil || s.In <= 0 || s.Out <= 0 || s.Limit <= 0 || s.Size != 5<<20 {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := MeasureSwap(t.Context(), d, 9<<20, 2); err == nil {
		t.Error("measured without pinned memory")
	}
	if s := d.Stats(); s.Mapped != 0 || s.Reserved != 0 || s.PinnedUsed != 0 {
		t.Errorf("left: %+v", s)
	}
}

func TestChangedContent(t *testing.T) {
	_, d := open(t, weights.Settings{})
	p, err := d.NewPool(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	b, err := fill(p, 1, 100_001)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.compare(p); err != nil {
		t.Error(err)
	}
	one := make([]byte, 1)
	if err := p.Read(one, b.at+100_000); err != nil {
		t.Fatal(err)
	}
	one[0] ^= 1
	if err := p.Write(b.at+100_000, one); err != nil {
		t.Fatal(err)
	}
	if err := b.compare(p); !errors.Is(err, ErrContent) {
		t.Errorf("a changed bit: %v", err)
	}
	p.Free(b.at)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
