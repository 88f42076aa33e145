package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == bareCommand {
		if err := bareBroker(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

// TestMeasure is a short run: it holds what the figures take for granted.
func TestMeasure(t *testing.T) {
	root, err := e2e.Root()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	programs, err := e2e.Build(t.Context(), root, dir)
	if err != nil {
		t.Fatal(err)
	}
	f, err := measure(t.Context(), size{devices: 100, idle: time.Second, quiet: time.Second}, programs, self, root, filepath.Join(dir, "fleet"), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	f.print(t.Output())
	for _, s := range []spread{f.fanout, f.serving, f.known, f.bare} {
		if s.p50 <= 0 || s.p99 < s.p50 || s.all < s.p99 {
			t.Errorf("a spread of %v", s)
		}
	}
	if f.join <= 0 || f.connect <= 0 || f.reconnect <= 0 || f.cpu <= 0 || f.memory <= 0 || f.serving.p50 < f.fanout.p50 || f.known.p50 < f.serving.p50 {
		t.Errorf("measured %+v", f)
	}
}
