package agent

import (
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A process of its own has all of its threads, also those that are started
// later, wish for short slices, where the kernel knows of them.
func TestShortSlices(t *testing.T) {
	const inside = "DUNLIN_TEST_SLICES"
	if os.Getenv(inside) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestShortSlices$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	before, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	shortSlices()
	slices := make(chan uint64)
	for range 8 {
		go func() {
			runtime.LockOSThread() // and ends it
			a, err := unix.SchedGetAttr(0, 0)
			if err != nil {
				t.Error(err)
				a = before
			}
			slices <- a.Runtime
		}()
	}
	for range 8 {
		if got := <-slices; got != uint64(slice) && before.Runtime != 0 { // 0: the kernel knows of no slices
			t.Errorf("a thread's slice is %d ns", got)
		}
	}
}
