package main

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// TestMeasure is a short run: it holds what the figures take for granted.
func TestMeasure(t *testing.T) {
	root, err := e2e.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	programs, err := e2e.Build(t.Context(), root, dir)
	if err != nil {
		t.Fatal(err)
	}
	f, err := measure(t.Context(), size{devices: 50, revoked: 5, rotating: 10, clients: 16, spread: time.Second}, programs, filepath.Join(dir, "fleet"), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	if len(f.revoke) != 5 || f.lost != 0 || f.events == 0 || f.enrolPerSecond <= 0 || f.connectPerSecond <= 0 || f.bareConnection <= 0 {
		t.Errorf("measured %+v", f)
	}
	if f.renewals > 2*f.size.rotating {
		t.Errorf("%d devices renewed %d times", f.size.rotating, f.renewals)
	}
}
