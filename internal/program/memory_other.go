//go:build !linux

package program

import "golang.org/x/sys/unix"

// HideMemory keeps what is in this process's memory, such as keys and tokens,
// out of core files.
func HideMemory() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) }
