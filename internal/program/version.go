package program

import "runtime/debug"

// version is the version that this source is, or will be when it is released.
// A build of another one says so: -ldflags "-X
// github.com/dunlin/dunlin/internal/program.version=0.7.1".
var version = "0.7.0"

// Version gives the version of this program: three numbers, as 0.7.0, of which
// the second is raised when something is added (docs/updates.md).
func Version() string { return version }

// Revision gives what the build recorded of the source; empty where that is
// nothing.
func Revision() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return s.Value[:12]
			}
		}
	}
	return ""
}
