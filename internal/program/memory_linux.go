package program

import (
	"errors"

	"golang.org/x/sys/unix"
)

// HideMemory keeps what is in this process's memory, such as keys and tokens,
// out of core files, and out of reach of other processes of the same user:
// those cannot trace it, nor read its memory and environment in /proc. Its
// children make no core files either; the rest does not count for them.
func HideMemory() error {
	return errors.Join(unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}), unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}
