package main

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// What is measured of many devices works with a few, and what does not depend
// on the machine is within its bounds.
func TestFewDevices(t *testing.T) {
	root, err := e2e.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "dunlin-controller")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./cmd/dunlin-controller")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w, err := begin(t.Context(), size{devices: 120, models: 12, viewers: 6, load: 3 * time.Second}, program, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.stop(); err != nil {
			t.Error(err)
		}
	}()
	f, err := w.measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if f.missed > 0 || len(f.live) == 0 || len(f.ttfb) == 0 {
		t.Errorf("of the live updates %d came and %d did not; %d pages", len(f.live), f.missed, len(f.ttfb))
	}
	if f.first > 250<<10 || f.next > 30<<10 {
		t.Errorf("a first visit takes %d bytes, a later one %d; the limits are 250 and 30 KiB", f.first, f.next)
	}
}
