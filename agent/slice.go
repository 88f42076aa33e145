package agent

import (
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// slice is how long a thread of the agent runs before the kernel looks for
// another one. What the agent does at a time takes less; in return it runs
// soon after it wakes, also on a core on which a model computes.
const slice = 100 * time.Microsecond

// shortSlices gives all threads of this process, and so those to come, short
// slices. Linux takes the wish from 6.12 on (sched_setattr(2), sched_runtime of
// SCHED_OTHER), and older ones ignore it, as does the agent where it is
// refused.
func shortSlices() {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		a, err := unix.SchedGetAttr(id, 0)
		if err != nil || a.Policy != unix.SCHED_NORMAL {
			continue
		}
		a.Runtime = uint64(slice)
		_ = unix.SchedSetAttr(id, a, 0) // see above
	}
}
