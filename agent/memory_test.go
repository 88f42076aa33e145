package agent

import (
	"testing"

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
	if n, err := (&Serving{MemoryMiB: 3}).memoryBudget(profile); n != 3<<20 || err != nil {
		t.Errorf("3 MiB are %d bytes, %v", n, err)
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
