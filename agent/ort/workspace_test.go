package ort

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// TestWorkspace works in many threads, built with sanitizers.
func TestWorkspace(t *testing.T) {
	for _, sanitizers := range []string{"address,undefined", "thread"} {
		exe := filepath.Join(t.TempDir(), "workspace")
		build := exec.Command("cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fsanitize="+sanitizers,
			"-fno-sanitize-recover=all", "-o", exe, "testdata/workspace.c", "workspace.c")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, seed := range []string{"1", "100", "200"} {
			if out, err := exec.Command(exe, seed).CombinedOutput(); err != nil || string(out) != "ok\n" {
				t.Errorf("%s, seed %s: %v\n%s", sanitizers, seed, err, out)
			}
		}
	}
}
