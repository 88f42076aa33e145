package weights

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// TestSanitized runs random sequences on the C alone, built with the address
// and the undefined behaviour sanitizers.
func TestSanitized(t *testing.T) {
	exe := filepath.Join(t.TempDir(), "sequences")
	build := exec.CommandContext(t.Context(), "cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
		"-o", exe, "testdata/sequences.c", "pool.c", "ranges.c", "driver_fake.c", "-lpthread")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, seed := range []string{"1", "2", "3"} {
		out, err := exec.CommandContext(t.Context(), exe, seed, "1500").CombinedOutput()
		t.Logf("seed %s: %s", seed, out)
		if err != nil {
			t.Fatal(err)
		}
	}
}
