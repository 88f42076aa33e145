// Package oip is the Open Inference Protocol, version 2, with the extensions
// of Triton, apart from how it travels: rest and rpc decode requests for it
// and encode its answers. It checks them, brings tensors from and to shared
// memory, classifies, traces, and hands the rest to a Backend.
package oip

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// The limits of a request. One that exceeds a limit is refused with an error
// that names it.
const (
	DefaultMaxBody = 64 << 20 // bytes, after decompression
	// DefaultMaxBodies bounds the bytes of all requests at a time; one that
	// finds too little left is refused as Unavailable.
	DefaultMaxBodies = 4 * DefaultMaxBody
	MaxTensors       = 1024 // inputs, and requested outputs
	MaxDims          = 32   // dimensions of a tensor
	MaxName          = 1024 // bytes of the name of a tensor, and of a request id
)

// Backend answers requests. Its methods may be called concurrently. Their
// errors are reported by their Code, where they are or wrap an *Error.
type Backend interface {
	// Ready says why not all that should be served can be, nil where it can.
	Ready(ctx context.Context) error
	// Model describes what answers to a name. Version 0 leaves the version to
	// the backend.
	Model(ctx context.Context, name string, version int64) (Model, error)
	Infer(ctx context.Context, c Call) (Answer, error)
	// Statistics gives the figures of one version, of all versions of a model
	// where version is 0, or of all models where name is empty.
	Statistics(ctx context.Context, name string, version int64) ([]*inference.ModelStatistics, error)
}

// Repository is where models come from. Its methods may be called
// concurrently.
type Repository interface {
	// Index lists what there is, by name and version.
	Index(ctx context.Context) ([]*inference.RepositoryIndexResponse_ModelIndex, error)
	// Load loads a model, or loads it anew, and returns when it can be used.
	Load(ctx context.Context, model string, o Override) error
	// Unload returns when the model is not there any more.
	Unload(ctx context.Context, model string) error
}

// Access says what the caller of a request may ask for, who is in the
// request's context.
type Access interface {
	// Model says why the caller may not ask for a model; with "", for what
	// concerns all models.
	Model(ctx context.Context, model string) error
	// Sees says whether the caller may know that a model is there.
	Sees(ctx context.Context, model string) bool
}

// Override replaces parts of a model in the repository for one load.
type Override struct {
	Config []byte            // JSON of inference.ModelConfig; nil: the repository's
	Files  map[string][]byte // content by path within the model's folder; nil: the repository's
}

// Model is what answers to a name.
type Model struct {
	Name     string
	Versions []int64
	Inputs   []tensor.Info
	Outputs  []tensor.Info
	Config   *inference.ModelConfig
	Labels   map[string][]string // names of the classes, by output
	// NotReady says why it cannot answer; it is empty where it can.
	NotReady string
}

// Call asks a Backend for an inference.
type Call struct {
	Model   string
	Version int64 // 0: the backend's choice
	// Inputs may share memory with the whole request; nobody writes to it.
	Inputs   []tensor.Tensor
	Outputs  []string      // nil: all
	Priority int           // 1 is the highest; 0: the model's default
	Timeout  time.Duration // bounds the wait in a queue; 0: the model's
	// Parameters are those of the request, and Headers its HTTP headers, or the
	// metadata of its RPC; nil: there are none. They are read where they are
	// asked for, until Infer returns.
	Parameters, Headers Values
}

// Values are what a request carries under names, beside its tensors. A boolean
// is "true" or "false", a number as it is written; what has no such text, as a
// list, is not there.
type Values interface {
	// Get gives the value of a name; that of a header by any case of letters.
	Get(name string) (string, bool)
	// All gives every name and value, of a name that is there twice the last
	// one last; names of headers in lower case.
	All() iter.Seq2[string, string]
}

// Answer is what a Backend gave.
type Answer struct {
	Model   string // that answered, which is not the name asked for behind a route
	Version int64
	// Outputs are those that were asked for, in that order.
	Outputs []tensor.Tensor
	Header  map[string]string // sent along as HTTP headers and gRPC metadata
	Labels  map[string][]string
	Times   Times
	// Release, where not nil, is called once when Outputs are not used any more.
	Release func()
}

// Times says where the time of an inference went.
type Times struct{ Queue, Input, Infer, Output time.Duration }

// Code says what kind of error a caller gets.
type Code int

// The codes, with the HTTP status and the gRPC code of each.
const (
	Internal        Code = iota // 500 INTERNAL
	InvalidArgument             // 400 INVALID_ARGUMENT
	Cancelled                   // 400 CANCELLED
	NotReady                    // 400 of the ready endpoints; UNAVAILABLE
	Unauthenticated             // 401 UNAUTHENTICATED
	Forbidden                   // 403 PERMISSION_DENIED
	NotFound                    // 404 NOT_FOUND
	NotAllowed                  // 405; not in gRPC
	TooLarge                    // 413 RESOURCE_EXHAUSTED
	TooOften                    // 429 RESOURCE_EXHAUSTED, with Retry-After
	Unsupported                 // 501 UNIMPLEMENTED
	Unavailable                 // 503 UNAVAILABLE, with Retry-After
	Expired                     // 503 DEADLINE_EXCEEDED, with Retry-After
)

// Error is an error with a code.
type Error struct {
	Code Code
	Err  error
	// RetryAfter says when the same request may succeed; 0 where that is not
	// known.
	RetryAfter time.Duration
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an *Error; its verbs are those of fmt.Errorf.
func Errorf(code Code, format string, args ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, args...)}
}

// CodeOf gives the code of an error: its own, or one by its cause.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Cancelled
	case errors.Is(err, context.DeadlineExceeded):
		return Expired
	default:
		return Internal
	}
}
