package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDrifts(t *testing.T) {
	dir := t.TempDir()
	settings, library, real := filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "lib.so"), filepath.Join(dir, "lib.so.1")
	for _, path := range []string{settings, real} {
		if err := os.WriteFile(path, []byte("one"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(real, library); err != nil {
		t.Fatal(err)
	}
	if files := watchedFiles("", ""); len(files) != 0 {
		t.Errorf("nothing is %v", files)
	}
	files := watchedFiles(settings, library)
	now := time.Unix(1e9, 0)
	if got := drifts(files, now); len(got) != 0 {
		t.Errorf("before anything has changed: %v", got)
	}
	// A touch changes no setting; the same name is another library.
	if err := os.Chtimes(settings, now, now); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lib.so.2"), []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(library); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("lib.so.2", library); err != nil {
		t.Fatal(err)
	}
	got := drifts(files, now)
	if len(got) != 1 || got[0].Kind != "runtime" || got[0].Subject != library || !strings.HasPrefix(got[0].Want, "lib.so.1 of 3 bytes") || !strings.HasPrefix(got[0].Have, "lib.so.2 of 3 bytes") {
		t.Errorf("another library: %v", got)
	}
	if err := os.WriteFile(settings, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	got = drifts(files, now.Add(time.Minute))
	if len(got) != 2 || got[0].Kind != "setting" || !got[0].Since.AsTime().Equal(now.Add(time.Minute)) || !got[1].Since.AsTime().Equal(now) || got[0].Repair != "" {
		t.Errorf("other settings: %v", got)
	}
	if err := os.Remove(settings); err != nil {
		t.Fatal(err)
	}
	if got = drifts(files, now); len(got) != 2 || got[0].Have != "missing" {
		t.Errorf("no settings: %v", got)
	}
	if err := os.WriteFile(settings, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got = drifts(files, now); len(got) != 1 {
		t.Errorf("the settings are back: %v", got)
	}
}
