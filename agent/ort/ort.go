// Package ort runs models in ONNX Runtime. It opens the runtime's shared
// library at run time and is the only package that calls it: through the
// binding onnxruntime_go, and through a shim where the binding cannot.
package ort

// #cgo CFLAGS: -O2 -Wall -Wextra -Werror -fexceptions
// #cgo LDFLAGS: -ldl
// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	binding "github.com/yalue/onnxruntime_go"
	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/models/tensor"
)

// Code is ONNX Runtime's own number for a kind of error.
type Code int

// InvalidArgument is the code of a request that does not fit the model.
const InvalidArgument Code = 2

// Error is an error that ONNX Runtime gave.
type Error struct {
	Code    Code
	Message string
}

// Error gives the runtime's message.
func (e *Error) Error() string { return e.Message }

// check turns a status into an error and releases it.
func check(s *C.OrtStatus) error {
	if s == nil {
		return nil
	}
	defer C.ort_release_status(s)
	return &Error{Code(C.ort_status_code(s)), clean(C.GoString(C.ort_status_message(s)))}
}

// clean makes text of a message, which may quote the model's bytes, and leaves
// out where in its own source the runtime gave up:
// "/src/file.h:46 void f(const T&) What is wrong" becomes "What is wrong".
func clean(message string) string {
	message = strings.TrimSpace(strings.ToValidUTF8(message, "\uFFFD"))
	place := sourceLine.FindStringIndex(message)
	if place == nil {
		return message
	}
	depth := 0
	for i, c := range message[place[1]:] {
		switch c {
		case '(':
			depth++
		case ')':
			if depth--; depth == 0 {
				rest := strings.TrimPrefix(message[place[1]+i+1:], " const")
				return message[:place[0]] + strings.TrimSpace(rest)
			}
		}
	}
	return message
}

var sourceLine = regexp.MustCompile(`/\S+\.(h|cc|cpp|hpp):\d+ `)

// environment is the runtime of this process: there can be one only.
var environment struct {
	sync.Mutex
	library string
	err     error
}

// Init opens ONNX Runtime's shared library, version 1.24 or later. All
// sessions share one pool of so many threads, 0 for one per core, which do
// not spin when they have nothing to do. A process can open one library
// only: a second Init gives the first one's error, and one of its own for
// another library.
func Init(library string, threads int) error {
	environment.Lock()
	defer environment.Unlock()
	if environment.library == "" {
		environment.library = library
		environment.err = open(library, threads)
	}
	if environment.library != library {
		return fmt.Errorf("open ONNX Runtime %s: this process has opened %s", library, environment.library)
	}
	return environment.err
}

func open(library string, threads int) error {
	if library == "" {
		return errors.New("no ONNX Runtime library is named: give its path by --runtime-lib or DUNLIN_ORT_LIB")
	}
	if err := checkBinding(); err != nil {
		return fmt.Errorf("open ONNX Runtime: %w", err)
	}
	// The runtime has one environment, which lives as long as somebody has it:
	// the binding gets the one that the shim has made, with its threads.
	path := C.CString(library)
	defer C.free(unsafe.Pointer(path))
	if message := C.ort_init(path, C.int(threads)); message != nil {
		defer C.free(unsafe.Pointer(message))
		return fmt.Errorf("open ONNX Runtime: %s", C.GoString(message))
	}
	binding.SetSharedLibraryPath(library)
	// Every failure comes back as an error; none needs a line in a log.
	err := binding.InitializeEnvironment(binding.WithLogLevelFatal())
	if err == nil {
		err = binding.DisableTelemetry()
	}
	if err != nil {
		return fmt.Errorf("open ONNX Runtime: %w", err)
	}
	return nil
}

// Version gives the runtime's version, "1.30.0". Init must have succeeded.
func Version() string { return binding.GetVersion() }

// Providers gives the execution providers that the library was built with.
// Init must have succeeded.
func Providers() ([]string, error) {
	var names **C.char
	var count C.int
	if err := check(C.ort_providers(&names, &count)); err != nil {
		return nil, err
	}
	defer C.ort_release_providers(names, count)
	var all []string
	for _, n := range unsafe.Slice(names, count) {
		all = append(all, C.GoString(n))
	}
	return all, nil
}

// DieBySignal has a fault in this process, whether in ONNX Runtime or in Go,
// kill it by its signal, so that the parent learns which one it was: Go's own
// handlers print traces of Go code and turn every fault into exit status 2.
func DieBySignal() error {
	if r, err := C.ort_die_by_signal(); r != 0 {
		return fmt.Errorf("reset signal handlers: %w", err)
	}
	return nil
}

// Session is a loaded model. Its methods may be called from many goroutines
// at a time.
type Session struct {
	session         *binding.DynamicAdvancedSession
	pointer         *C.OrtSession // session's own
	inputs, outputs []tensor.Info
	batch           bool
	mapped          []byte             // the file that the runtime reads in place; nil for Open's
	shrink          string             // the arenas that a run leaves as it found them, "gpu:0"
	names           map[string]*C.char // of inputs and outputs
	alarm           runtime.Cleanup

	mu     sync.Mutex
	closed bool           // guarded by mu
	runs   sync.WaitGroup // added to under mu while not closed
}

// Setting says how a session is opened. The zero value is that of most.
type Setting struct {
	// Threads are those that compute a run: 0 for the pool that all sessions
	// share (Init); n for the one that began it and n-1 of the session's own,
	// which do not spin when they have nothing to do. With 1 there is no pool,
	// and what a run costs to hand over to one is saved. At most MaxThreads.
	Threads int
	// Prepack has OpenCompiled lay weights out anew, which makes the runs of
	// some models faster and takes memory of the process; Open does so always.
	Prepack bool
}

// MaxThreads bounds Setting.Threads.
const MaxThreads = 256

// Open loads the .onnx file entry of the folder dir, from which its external
// data is read too. It gives up soon after ctx is done. Init must have
// succeeded.
func Open(ctx context.Context, dir, entry string, set Setting) (*Session, error) {
	if !filepath.IsLocal(entry) {
		return nil, fmt.Errorf("open model: entry %q leaves the model's folder", entry)
	}
	path := filepath.Join(dir, entry)
	session, err := create(ctx, path, set.Threads, nil, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		// The binding needs names of inputs and outputs for its own Run only.
		return binding.NewDynamicAdvancedSession(path, nil, nil, o)
	})
	if err != nil {
		return nil, fmt.Errorf("open model: %w", err)
	}
	s, err := newSession(session, nil)
	C.ort_trim_heap() // loading leaves much behind
	if err != nil {
		return nil, fmt.Errorf("open model: %w", err)
	}
	return s, nil
}

// newSession takes over a session and what it has mapped.
func newSession(session *binding.DynamicAdvancedSession, mapped []byte) (*Session, error) {
	s := &Session{session: session, pointer: sessionPointer(session), mapped: mapped, names: make(map[string]*C.char)}
	s.alarm = runtime.AddCleanup(s, func(struct{}) { panic("ort: a session was never closed") }, struct{}{})
	var err error
	if s.inputs, err = s.describe(0); err == nil {
		s.outputs, err = s.describe(1)
	}
	if err == nil {
		s.batch, err = s.findBatch()
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// create has f make a session of the file at path, by the options that all
// sessions have, its threads (Setting) and the entries of its configuration.
// It gives up soon after ctx is done.
func create(ctx context.Context, path string, threads int, entries map[string]string, f func(*binding.SessionOptions) (*binding.DynamicAdvancedSession, error)) (*binding.DynamicAdvancedSession, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	options, err := binding.NewSessionOptions()
	if err != nil {
		return nil, err
	}
	defer options.Destroy()
	if err := options.SetGraphOptimizationLevel(binding.GraphOptimizationLevelEnableAll); err != nil {
		return nil, err
	}
	if err := options.AddSessionConfigEntry("session.use_env_allocators", "1"); err != nil {
		return nil, err // see workspace.h
	}
	for key, value := range entries {
		if err := options.AddSessionConfigEntry(key, value); err != nil {
			return nil, err
		}
	}
	pointer := sessionOptionsPointer(options)
	if err := setThreads(options, threads); err != nil {
		return nil, err
	}
	defer whenDone(ctx, func() { check(C.ort_cancel_load(pointer)) })()
	session, err := f(options)
	if err == nil {
		return session, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if reason := errors.Unwrap(err); reason != nil {
		err = reason // what the runtime says, without the binding's "Error creating C session"
	}
	return nil, errors.New(clean(strings.TrimPrefix(err.Error(), "Load model from "+path+" failed:")))
}

// setThreads says which threads compute the runs of a session.
func setThreads(o *binding.SessionOptions, n int) error {
	switch {
	case n < 0 || n > MaxThreads:
		return fmt.Errorf("threads: %d is not between 0 and %d", n, MaxThreads)
	case n == 0:
		return check(C.ort_share_threads(sessionOptionsPointer(o)))
	}
	if err := o.AddSessionConfigEntry("session.intra_op.allow_spinning", "0"); err != nil {
		return err
	}
	return o.SetIntraOpNumThreads(n)
}

// whenDone calls f once ctx is done, unless the function that it gives was
// called before; that one returns when f does not run any more.
func whenDone(ctx context.Context, f func()) (release func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(over); f() })
	return func() {
		if !stop() {
			<-over
		}
	}
}

// describe reads the session's inputs, or its outputs.
func (s *Session) describe(outputs C.int) ([]tensor.Info, error) {
	kind := "input"
	if outputs != 0 {
		kind = "output"
	}
	var count C.size_t
	if err := check(C.ort_count(s.pointer, outputs, &count)); err != nil {
		return nil, err
	}
	all := make([]tensor.Info, 0, count)
	for i := range count {
		var name *C.char
		var info C.struct_ort_info
		if err := check(C.ort_describe(s.pointer, outputs, i, &name, &info)); err != nil {
			C.free(unsafe.Pointer(name))
			return nil, err
		}
		n := C.GoString(name)
		if s.names[n] != nil {
			C.free(unsafe.Pointer(name)) // an input that is an output too
		} else {
			s.names[n] = name
		}
		if info.is_tensor == 0 {
			return nil, fmt.Errorf("%s %q is not a tensor; only tensors are supported", kind, n)
		}
		if t := tensor.Type(info._type); !t.Known() {
			return nil, fmt.Errorf("%s %q has unsupported element %s", kind, n, t)
		}
		shape, err := shapeOf(&info)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", kind, n, err)
		}
		all = append(all, tensor.Info{Name: n, Type: tensor.Type(info._type), Shape: shape})
	}
	return all, nil
}

// shapeOf gives a shape that is nil for a rank that the model leaves open.
func shapeOf(info *C.struct_ort_info) ([]int64, error) {
	if info.rank > C.ORT_MAX_RANK {
		return nil, fmt.Errorf("has %d dimensions, more than %d", info.rank, C.ORT_MAX_RANK)
	}
	if info.known == 0 {
		return nil, nil
	}
	shape := make([]int64, info.rank)
	for i := range shape {
		shape[i] = max(int64(info.shape[i]), -1)
	}
	return shape, nil
}

// Inputs gives what the model takes, without its initialisers. A shape is
// nil where the model leaves the number of dimensions open.
func (s *Session) Inputs() []tensor.Info { return s.inputs }

// Outputs gives what the model gives, its shapes as those of Inputs.
func (s *Session) Outputs() []tensor.Info { return s.outputs }

// Close waits for the runs that go on and gives the model's memory back.
func (s *Session) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	s.mu.Unlock()
	s.runs.Wait()
	s.alarm.Stop()
	s.session.Destroy()
	if s.mapped != nil {
		unix.Munmap(s.mapped)
	}
	for _, name := range s.names {
		C.free(unsafe.Pointer(name))
	}
	C.ort_trim_heap() // what others work in stays
}

// Trim gives the system back what runs have worked in, and what else is free
// of the C heap. A run that begins after it gets its memory anew; one that
// goes on may wait for it, for less than a millisecond.
func Trim() { C.ort_trim() }

// TrimWhenIdle has a thread of this process give back what no run has worked
// in for the interval, or up to twice as long, also while others run. It is
// called once.
func TrimWhenIdle(interval time.Duration) error {
	if failed := C.ort_trim_when_idle(C.int64_t(interval)); failed != 0 {
		return fmt.Errorf("trim when idle: %w", unix.Errno(failed))
	}
	return nil
}

// outOfMemory has what ONNX Runtime, the C library and CUDA say, in lower case.
var outOfMemory = []string{
	"bad_alloc", "bad allocation", "failed to allocate memory", "out of memory", "out_of_memory",
	"cannot allocate memory", "alloc_failed", "is smaller than requested bytes",
}

// OutOfMemoryText says whether the text of a failure, of Run, of a load, or of
// a lane, is that of one for want of memory.
func OutOfMemoryText(text string) bool {
	text = strings.ToLower(text)
	return slices.ContainsFunc(outOfMemory, func(s string) bool { return strings.Contains(text, s) })
}

// poisoned has the errors after which CUDA does nothing more in a process, as
// ONNX Runtime and weights write them.
var poisoned = regexp.MustCompile(`\bCUDA(?: failure |_ERROR_[A-Z_]+ \()(?:214|700|702|71[0-9])\b`)

// PoisonedText says whether the text of a failure is that of a GPU which does
// nothing more for the process that it occurred in.
func PoisonedText(text string) bool { return poisoned.MatchString(text) }

// IsOutOfMemory does so for an error.
func IsOutOfMemory(err error) bool {
	return err != nil && (errors.Is(err, unix.ENOMEM) || OutOfMemoryText(err.Error()))
}
