package weights

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// TestSanitized runs random sequences on the C alone, built with the address
// and the undefined behaviour sanitizers, and in threads with the thread
// sanitizer.
func TestSanitized(t *testing.T) {
	build := func(sanitizers string) (exe string) {
		exe = filepath.Join(t.TempDir(), "sequences")
		cmd := exec.CommandContext(t.Context(), "cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize="+sanitizers, "-fno-sanitize-recover=all",
			"-o", exe, "testdata/sequences.c", "pool.c", "ranges.c", "driver_fake.c", "-lpthread")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return exe
	}
	run := func(exe, seed, count string) {
		out, err := exec.CommandContext(t.Context(), exe, seed, count).CombinedOutput()
		t.Logf("seed %s: %s", seed, out)
		if err != nil {
			t.Error(err)
		}
	}
	exe := build("address,undefined")
	for _, seed := range []string{"1", "2", "3"} {
		run(exe, seed, "1500")
	}
	run(exe, "0", "0")
	run(build("thread"), "0", "0")
}
