// Package oip speaks the Open Inference Protocol, version 2, over HTTP: it
// decodes requests, hands them to a Backend, and encodes the answers, as
// Triton's clients expect them.
//
// Tensors travel as JSON, flat or nested, or by the binary tensor data
// extension. In JSON, floating-point data may hold NaN, Infinity and
// -Infinity, in both directions: that is not JSON proper, but it is what
// Triton and its clients read and write. FP16 and BF16 travel only as binary
// data.
package oip

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/dunlin/dunlin/models/tensor"
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
	// Ready says whether all that should be served can be.
	Ready(ctx context.Context) bool
	// Model describes what answers to a name. Version 0 leaves the version to
	// the backend.
	Model(ctx context.Context, name string, version int64) (Model, error)
	Infer(ctx context.Context, r Request) (Response, error)
}

// Model is what answers to a name.
type Model struct {
	Name     string
	Versions []int64
	Inputs   []tensor.Info
	Outputs  []tensor.Info
	// NotReady says why it cannot answer; it is empty where it can.
	NotReady string
}

// Request asks for an inference.
type Request struct {
	Model   string
	Version int64 // 0: the backend's choice
	// Inputs may share memory with the whole request; nobody writes to it.
	Inputs  []tensor.Tensor
	Outputs []string // nil: all
}

// Response answers a Request.
type Response struct {
	Model   string
	Version int64
	// Outputs are those that were asked for, in that order.
	Outputs []tensor.Tensor
	Header  map[string]string // sent along as HTTP headers
}

// Code says what kind of error a caller gets.
type Code int

// The codes, and the HTTP status of each.
const (
	Internal        Code = iota // 500
	InvalidArgument             // 400
	Cancelled                   // 400
	NotReady                    // 400: the answer of the ready endpoints
	NotFound                    // 404
	NotAllowed                  // 405
	TooLarge                    // 413
	Unsupported                 // 501
	Unavailable                 // 503, with Retry-After
)

func (c Code) status() int {
	switch c {
	case InvalidArgument, Cancelled, NotReady:
		return http.StatusBadRequest
	case NotFound:
		return http.StatusNotFound
	case NotAllowed:
		return http.StatusMethodNotAllowed
	case TooLarge:
		return http.StatusRequestEntityTooLarge
	case Unsupported:
		return http.StatusNotImplemented
	case Unavailable:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

// Error is an error with a code.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an *Error; its verbs are those of fmt.Errorf.
func Errorf(code Code, format string, args ...any) error {
	return &Error{code, fmt.Errorf(format, args...)}
}

func codeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Cancelled
	case errors.Is(err, context.DeadlineExceeded):
		return Unavailable
	default:
		return Internal
	}
}
