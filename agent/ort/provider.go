package ort

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	binding "github.com/yalue/onnxruntime_go"
)

// The execution providers that models can be opened on, by ONNX Runtime's
// names.
const (
	CPUProvider  = "CPUExecutionProvider"
	CUDAProvider = "CUDAExecutionProvider"
)

// OpenReference opens a model as Open does, on the CPU, with each of its
// operators as the graph has it: what others compute is compared with what it
// computes.
func OpenReference(ctx context.Context, dir, entry string) (*Session, error) {
	return openOn(ctx, dir, entry, Setting{}, func(o *binding.SessionOptions) error {
		return o.SetGraphOptimizationLevel(binding.GraphOptimizationLevelDisableAll)
	})
}

// OpenOn opens a model as Open does, on a provider: the CPU's or CUDA's, on the
// first GPU and with its options, see Placement.
func OpenOn(ctx context.Context, provider, dir, entry string, set Setting, options map[string]string) (*Session, error) {
	switch provider {
	case CPUProvider:
		return Open(ctx, dir, entry, set)
	case CUDAProvider:
		s, err := openOn(ctx, dir, entry, set, func(o *binding.SessionOptions) error { return addCUDA(o, Placement{CUDA: true, Options: options}) })
		if err == nil {
			s.shrink = "gpu:0"
		}
		return s, err
	}
	return nil, fmt.Errorf("open model: execution provider %q is not supported", provider)
}

// openOn has f change what the session's options are.
func openOn(ctx context.Context, dir, entry string, set Setting, f func(*binding.SessionOptions) error) (*Session, error) {
	if !filepath.IsLocal(entry) {
		return nil, fmt.Errorf("open model: entry %q leaves the model's folder", entry)
	}
	path := filepath.Join(dir, entry)
	var refused error
	session, err := create(ctx, path, set.Threads, nil, func(o *binding.SessionOptions) (*binding.DynamicAdvancedSession, error) {
		if refused = f(o); refused != nil {
			return nil, refused
		}
		return binding.NewDynamicAdvancedSession(path, nil, nil, o)
	})
	if refused != nil {
		err = errors.New(clean(refused.Error())) // whole: create cuts it
	}
	if err != nil {
		return nil, fmt.Errorf("open model: %w", err)
	}
	s, err := newSession(session, nil)
	Trim()
	if err != nil {
		return nil, fmt.Errorf("open model: %w", err)
	}
	return s, nil
}
