// Package profile finds out how a version runs best on this device: which
// setting to measure next, how often, when that hurts nobody, and what follows
// from it; and keeps what was found. It opens no model: what it asks for is
// measured by a Bench.
package profile

import (
	"errors"
	"time"
)

// CPU is ONNX Runtime's name of the execution provider that every device has,
// and that the others are compared with.
const CPU = "CPUExecutionProvider"

// Setting is a way to run a version.
type Setting struct {
	Provider  string // ONNX Runtime's name of it
	Batch     int    // rows of a run
	Instances int    // runs at a time
	Threads   int    // of a run
	Prepacked bool   // with weights laid out anew
}

// Result is what was measured with a setting.
type Result struct {
	Runs          int
	P50, P95, P99 time.Duration // of one run, with as many at a time as there are instances
	RowsPerSecond float64
	// Workspace is what the runs that went on at a time worked in together, in
	// bytes, and Peak that with weights and sessions; 0: not known.
	Workspace, Peak int64
	// JoulesPerRow is 0 where the device cannot tell.
	JoulesPerRow float64
	// Err says why the version cannot be run so; nothing else is set then.
	Err error
}

// Slice is a short while of runs with one setting, one after the other on each
// instance.
type Slice struct {
	Times []time.Duration // of each run
	Wall  time.Duration   // from the begin of the first to the end of the last
	CPU   time.Duration   // that the process computed meanwhile
}

// Ready is what it took to make a setting ready.
type Ready struct {
	Run       time.Duration // a run, not the first one
	Session   int64         // bytes that the session takes, without its weights
	Workspace int64         // bytes that runs on all instances worked in
}

// ErrDead is the error of a Bench that answers nothing any more.
var ErrDead = errors.New("what measures has ended")

// ErrGivenUp is the error of a Gate that has not opened for too long.
var ErrGivenUp = errors.New("the device was never idle for long enough")
