package worker

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// All threads of a child may use the processors of its settings only; this
// process may use what it might before.
func TestAffinity(t *testing.T) {
	var before, after unix.CPUSet
	if err := unix.SchedGetaffinity(os.Getpid(), &before); err != nil {
		t.Fatal(err)
	}
	last := -1
	for n := range 1024 {
		if before.IsSet(n) {
			last = n
		}
	}
	cfg := testConfig(t, "")
	cfg.Affinity = []int{last}
	w := start(t, cfg)
	if _, err := w.Runtime(t.Context()); err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", w.PID()))
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		if want := fmt.Sprintf("\nCpus_allowed_list:\t%d\n", last); !strings.Contains(string(b), want) {
			t.Errorf("%s: not %q", task, want)
		}
	}
	if err := unix.SchedGetaffinity(os.Getpid(), &after); err != nil || after != before {
		t.Errorf("this process: %v, before %v, %v", after, before, err)
	}
	cfg.Affinity = []int{1023}
	if before.IsSet(1023) {
		return
	}
	if _, err := Probe(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "processors [1023]") {
		t.Errorf("a processor that is not there: %v", err)
	}
}
