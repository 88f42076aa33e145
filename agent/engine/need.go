package engine

import "errors"

// Need is what a version takes of the device's memory, in bytes.
type Need struct {
	// Weights come in when the version is activated, and leave when it is
	// deactivated.
	Weights int64
	// Session is what else an activated version takes, whether it runs or not.
	Session int64
	// Prepacked is what Setting.Prepack adds; 0 where it does not make runs faster.
	Prepacked int64
	// Workspace is what a run takes, for each of its rows.
	Workspace int64
	// Mapped says that the weights lie in a file that is mapped: the system can
	// take their memory back and read them again.
	Mapped bool
	// Measured says that the figures were measured on this device; otherwise
	// they are estimates.
	Measured bool
}

// ErrOutOfMemory is the error of a run or an activation for which the device
// had too little memory.
var ErrOutOfMemory = errors.New("out of memory")

// ErrStalled is the cause by which the engine cancels a run that makes no
// progress. A Runtime whose model does not hear of it ends that by force.
var ErrStalled = errors.New("the run has stalled")

// ErrQuarantined is the error of a version that is not run any more because
// it has harmed the process that ran it.
var ErrQuarantined = errors.New("version is in quarantine")
