package dispatch

import (
	"fmt"
	"testing"

	"github.com/dunlin/dunlin/controller/store"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestPickSources(t *testing.T) {
	const digest = "sha256:1"
	holder := func(name string, state dunlinv1.VersionState) *store.Device {
		return &store.Device{Name: name, Info: &dunlinv1.DeviceInfo{SiteUrl: "https://" + name}, Reported: &dunlinv1.Reported{
			Versions: []*dunlinv1.VersionStatus{{Digest: "sha256:2", State: dunlinv1.VersionState_VERSION_STATE_RESIDENT}, {Digest: digest, State: state}},
		}}
	}
	var near []*store.Device
	for i := range 20 {
		near = append(near, holder(fmt.Sprint("has-", i), dunlinv1.VersionState_VERSION_STATE_RESIDENT))
	}
	near = append(near, holder("fetches", dunlinv1.VersionState_VERSION_STATE_ABSENT), holder("refuses", dunlinv1.VersionState_VERSION_STATE_QUARANTINED))
	for i := range 3 {
		near = append(near, &store.Device{Name: fmt.Sprint("cache-", i), Info: &dunlinv1.DeviceInfo{SiteUrl: "https://c", SiteCache: true}})
	}
	first := map[string]int{}
	for i := range 200 {
		picked := pickSources(fmt.Sprint("asks-", i), digest, near)
		if len(picked) != maxSources {
			t.Fatalf("%d sources, want %d", len(picked), maxSources)
		}
		for _, s := range picked {
			if s.Device[:4] != "has-" || s.Url != "https://"+s.Device {
				t.Errorf("%v is told of while others have it", s)
			}
		}
		first[picked[0].Device]++
		if again := pickSources(fmt.Sprint("asks-", i), digest, near); again[0].Device != picked[0].Device {
			t.Errorf("another order: %v, %v", again, picked)
		}
	}
	for name, n := range first {
		if n > 200/20*3 {
			t.Errorf("%s is the first for %d of 200", name, n)
		}
	}
	// Nobody has it: the caches, the same one first for everybody.
	caches := map[string]int{}
	for i := range 50 {
		picked := pickSources(fmt.Sprint("asks-", i), "sha256:3", near)
		if len(picked) != 3 || !picked[0].Cache {
			t.Fatalf("picked %v, want three caches", picked)
		}
		caches[picked[0].Device]++
	}
	if len(caches) != 1 {
		t.Errorf("several caches would fetch it: %v", caches)
	}
	for _, s := range pickSources("has-3", digest, near) {
		if s.Device == "has-3" {
			t.Error("a device is told of itself")
		}
	}
}
