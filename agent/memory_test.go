package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
)

func TestMemoryBudget(t *testing.T) {
	profile := profiles.Profile{Memory: profiles.Memory{HostFraction: 0.5}}
	half, err := (&Serving{}).memoryBudget(profile)
	if err != nil || half <= 0 {
		t.Fatal(half, err)
	}
	profile.Memory.HostFraction = 1
	if whole, err := (&Serving{}).memoryBudget(profile); err != nil || whole-2*half > 1 || whole < 2*half {
		t.Errorf("half of the memory is %d, all of it %d, %v", half, whole, err)
	}
	profile.Memory.HostBytes = 5 << 20
	if n, err := (&Serving{}).memoryBudget(profile); n != 5<<20 || err != nil {
		t.Errorf("at most 5 MiB are %d bytes, %v", n, err)
	}
	for _, tt := range []struct {
		memory       profiles.Memory
		budget, want int64
	}{{profiles.Memory{}, 1 << 30, 256 << 20}, {profiles.Memory{}, 1 << 40, maxPinned}, {profiles.Memory{PinnedBytes: 100}, 1 << 30, 100}, {profiles.Memory{PinnedBytes: 100, Unified: true}, 1 << 30, 0}} {
		if got := pinnedBytes(tt.memory, tt.budget); got != tt.want {
			t.Errorf("%+v of %d: %d pinned, want %d", tt.memory, tt.budget, got, tt.want)
		}
	}
	if n, err := (&Serving{MemoryMiB: 3}).memoryBudget(profile); n != 3<<20 || err != nil {
		t.Errorf("3 MiB are %d bytes, %v", n, err)
	}
}

func TestDeviceBudget(t *testing.T) {
	for _, tt := range []struct {
		mib        int
		memory     profiles.Memory
		free, want int64
	}{
		{0, profiles.Memory{}, 100 << 20, 95 << 20}, {50, profiles.Memory{}, 100 << 20, 50 << 20}, {200, profiles.Memory{}, 100 << 20, 95 << 20}, {0, profiles.Memory{}, -5, 1},
		{0, profiles.Memory{DeviceFraction: 0.5}, 100 << 20, 50 << 20}, {0, profiles.Memory{DeviceFraction: 1, DeviceBytes: 10 << 20}, 100 << 20, 10 << 20},
		{5, profiles.Memory{DeviceBytes: 10 << 20}, 100 << 20, 5 << 20},
	} {
		if got := (&Serving{MemoryMiB: tt.mib}).deviceBudget(tt.memory, tt.free); got != tt.want {
			t.Errorf("%d free, %d MiB asked for: %d, want %d", tt.free, tt.mib, got, tt.want)
		}
	}
}

// TestPools has a profile ask for a GPU that the machine, or the runtime of
// the tests, does not have: that is said, and the rest is as without.
func TestPools(t *testing.T) {
	serving := Serving{RuntimeLib: runtimeLibrary(t), Worker: []string{os.Args[0], "worker"}, CacheMiB: 64}
	for _, tt := range []struct {
		providers []profiles.Provider
		pools     string
	}{{[]profiles.Provider{{Name: "CPUExecutionProvider"}}, ""}, {[]profiles.Provider{{Name: "CUDAExecutionProvider"}, {Name: "CPUExecutionProvider"}}, "cuda:0"}} {
		profile := profiles.Profile{Providers: tt.providers, Memory: profiles.Memory{HostFraction: 0.5}}
		h, err := newHost(serving, profile, t.TempDir(), serving.workerConfig(1))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { h.worker.Supervise(ctx) })
		found, err := h.worker.Runtime(ctx)
		text := h.weightPools(found)
		if err != nil || h.pools != tt.pools || found.Pooling.Works || h.pooled() != 0 ||
			!strings.HasPrefix(text, "none: ") || (tt.pools != "") != (found.Pooling.Reason != "") {
			t.Errorf("%v: %q, %q, %+v, %v", tt.providers, h.pools, text, found, err)
		}
		cancel()
		wg.Wait()
	}
}

func TestObservedBudget(t *testing.T) {
	for _, tt := range []struct{ configured, held, available, total, want int64 }{
		{100, 0, 1000, 1000, 100}, // there is more than enough
		{800, 0, 500, 1000, 450},  // 50 stay free
		{800, 300, 500, 1000, 750},
		{800, 0, 10, 1000, 1},
	} {
		if got := observedBudget(tt.configured, tt.held, tt.available, tt.total); got != tt.want {
			t.Errorf("of %d configured, %d held, %d available of %d: %d, want %d", tt.configured, tt.held, tt.available, tt.total, got, tt.want)
		}
	}
}

// A model that is larger than the budget is refused with the numbers, before it
// is looked at any further, or allowed and said so.
func TestLargerThanMemory(t *testing.T) {
	dir, err := filepath.Abs("../models/examples/digits")
	if err != nil {
		t.Fatal(err)
	}
	spec := engine.Spec{ID: engine.VersionID{Model: "digits", Version: 2}, Dir: dir, Entry: "v2.onnx"}
	var log strings.Builder
	h := &host{budget: 1000, serving: Serving{Oversize: "refuse", Log: slog.New(slog.NewTextHandler(&log, nil))}}
	refused := h.fits(worker.Runtime{}, spec)
	if !errors.Is(refused, engine.ErrTooLarge) || !strings.Contains(refused.Error(), "the budget is 1000") || passing(refused) {
		t.Error(refused)
	}
	h.serving.Oversize = "map"
	if err := h.fits(worker.Runtime{}, spec); err != nil || !strings.Contains(log.String(), "stay in their file") {
		t.Error(err, log.String())
	}
	h.budget, h.serving.Oversize = 1<<30, "refuse"
	if err := h.fits(worker.Runtime{}, spec); err != nil {
		t.Error(err)
	}
}
