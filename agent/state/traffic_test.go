package state

import (
	"context"
	"fmt"
	"testing"
)

func TestTraffic(t *testing.T) {
	file, err := Open(t.Context(), t.TempDir()+"/state.db", Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	memory, err := NewMemory(Limits{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	testTraffic(t, file)
	testTraffic(t, memory)
}

func testTraffic(t *testing.T, s interface {
	Traffic(context.Context, string) (int64, error)
	AddTraffic(context.Context, string, int64) error
}) {
	for i := range 70 {
		day := fmt.Sprintf("2026-%02d-%02d", 1+i/28, 1+i%28)
		for _, n := range []int64{1, 9} {
			if err := s.AddTraffic(t.Context(), day, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	for days, want := range map[string]int64{"2026-03-01": 10, "2026-02": 280, "2026-01": 200, "2026-01-01": 0, "2025": 0, "2026": keptDays * 10} {
		if got, err := s.Traffic(t.Context(), days); err != nil || got != want {
			t.Errorf("%s: %d bytes, %v; want %d", days, got, err, want)
		}
	}
}
