package ort

// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	binding "github.com/yalue/onnxruntime_go"

	"github.com/dunlin/dunlin/models/tensor"
)

// ErrClosed is the error of a Run after Close.
var ErrClosed = errors.New("session is closed")

// Run runs the model once and calls use with the outputs, in the order of
// their names; nil asks for all. The data of the outputs is the runtime's own
// and valid until use returns. The inputs are only read. Once ctx is done,
// the run ends after the node that is being computed, with ctx's cause as
// the error.
func (s *Session) Run(ctx context.Context, in []tensor.Tensor, outputs []string, use func([]tensor.Tensor) error) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.runs.Add(1)
	s.mu.Unlock()
	defer s.runs.Done()

	if outputs == nil {
		for _, o := range s.outputs {
			outputs = append(outputs, o.Name)
		}
	}
	cNames, err := s.outputNames(outputs)
	if err != nil {
		return err
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	cIn, err := s.pinInputs(in, &pins)
	if err != nil {
		return err
	}
	values := make([]*C.OrtValue, len(outputs))
	defer func() {
		for _, v := range values {
			if v != nil {
				C.ort_release_value(v)
			}
		}
	}()
	if err := s.run(ctx, cIn, cNames, values); err != nil {
		return err
	}
	results := make([]tensor.Tensor, len(outputs))
	for i, v := range values {
		if results[i], err = view(v); err != nil {
			return fmt.Errorf("output %q: %w", outputs[i], err)
		}
		results[i].Name = outputs[i]
	}
	return use(results)
}

func (s *Session) outputNames(outputs []string) ([]*C.char, error) {
	if len(outputs) == 0 {
		return nil, &Error{InvalidArgument, "no output is asked for"}
	}
	names := make([]*C.char, len(outputs))
	for i, name := range outputs {
		if !slices.ContainsFunc(s.outputs, func(o tensor.Info) bool { return o.Name == name }) {
			return nil, &Error{InvalidArgument, fmt.Sprintf("the model has no output %q", name)}
		}
		names[i] = s.names[name]
	}
	return names, nil
}

func (s *Session) run(ctx context.Context, in []C.struct_ort_tensor, names []*C.char, values []*C.OrtValue) error {
	var options *C.OrtRunOptions // the runtime's default
	if ctx.Done() != nil || s.shrink != "" {
		o, err := binding.NewRunOptions()
		if err != nil {
			return err
		}
		defer o.Destroy()
		if s.shrink != "" {
			if err := shrinkAfter(o, s.shrink); err != nil {
				return err
			}
		}
		defer whenDone(ctx, func() { o.Terminate() })()
		options = runOptionsPointer(o)
	}
	err := check(C.ort_run(s.pointer, options, unsafe.SliceData(in), C.size_t(len(in)),
		unsafe.SliceData(names), C.size_t(len(names)), unsafe.SliceData(values)))
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// pinInputs describes the inputs to C, which reads them in place.
func (s *Session) pinInputs(in []tensor.Tensor, pins *runtime.Pinner) ([]C.struct_ort_tensor, error) {
	for _, want := range s.inputs {
		if !slices.ContainsFunc(in, func(t tensor.Tensor) bool { return t.Name == want.Name }) {
			return nil, &Error{InvalidArgument, fmt.Sprintf("input %q is missing", want.Name)}
		}
	}
	all := make([]C.struct_ort_tensor, len(in))
	for i := range in {
		t := &in[i]
		if !slices.ContainsFunc(s.inputs, func(o tensor.Info) bool { return o.Name == t.Name }) {
			return nil, &Error{InvalidArgument, fmt.Sprintf("the model has no input %q", t.Name)}
		}
		if slices.ContainsFunc(in[:i], func(o tensor.Tensor) bool { return o.Name == t.Name }) {
			return nil, &Error{InvalidArgument, fmt.Sprintf("input %q is given twice", t.Name)}
		}
		if err := t.Check(); err != nil {
			return nil, &Error{InvalidArgument, err.Error()}
		}
		data := aligned(t)
		p, shape := unsafe.SliceData(data), unsafe.SliceData(t.Shape)
		if len(data) > 0 {
			pins.Pin(p)
		} else {
			p = nil
		}
		if len(t.Shape) > 0 {
			pins.Pin(shape)
		} else {
			shape = nil
		}
		all[i] = C.struct_ort_tensor{
			name:  s.names[t.Name],
			_type: C.int(t.Type),
			shape: (*C.int64_t)(shape),
			rank:  C.size_t(len(t.Shape)),
			data:  unsafe.Pointer(p),
			size:  C.size_t(len(data)),
		}
	}
	return all, nil
}

// aligned gives the tensor's data, or a copy where its elements do not begin
// at a multiple of their size.
func aligned(t *tensor.Tensor) []byte {
	size := uintptr(max(t.Type.Size(), 1))
	if uintptr(unsafe.Pointer(unsafe.SliceData(t.Data)))%size == 0 {
		return t.Data
	}
	words := make([]uint64, (len(t.Data)+7)/8)
	data := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), len(t.Data))
	copy(data, t.Data)
	return data
}

// view shows a value; its data lives as long as the value, a string tensor's
// is a copy.
func view(v *C.OrtValue) (tensor.Tensor, error) {
	if v == nil {
		return tensor.Tensor{}, errors.New("the model gave nothing")
	}
	var info C.struct_ort_info
	if err := check(C.ort_value_info(v, &info)); err != nil {
		return tensor.Tensor{}, err
	}
	if info.is_tensor == 0 {
		return tensor.Tensor{}, errors.New("is not a tensor")
	}
	shape, err := shapeOf(&info)
	if err != nil {
		return tensor.Tensor{}, err
	}
	t := tensor.Tensor{Type: tensor.Type(info._type), Shape: shape, Data: []byte{}}
	if t.Type == tensor.String {
		t.Data, err = readStrings(v, shape)
		return t, err
	}
	size, err := tensor.Bytes(t.Type, shape)
	if err != nil || size == 0 {
		return t, err
	}
	var data unsafe.Pointer
	if err := check(C.ort_value_data(v, &data)); err != nil {
		return tensor.Tensor{}, err
	}
	t.Data = unsafe.Slice((*byte)(data), size)
	return t, nil
}

func readStrings(v *C.OrtValue, shape []int64) ([]byte, error) {
	count, err := tensor.Elements(shape)
	if err != nil || count == 0 {
		return []byte{}, err
	}
	var size C.size_t
	if err := check(C.ort_strings_size(v, &size)); err != nil {
		return nil, err
	}
	content := make([]byte, size)
	bounds := make([]C.size_t, count, count+1) // where each element begins
	if err := check(C.ort_strings(v, unsafe.Pointer(unsafe.SliceData(content)), size, &bounds[0], C.size_t(count))); err != nil {
		return nil, err
	}
	bounds = append(bounds, size)
	data := make([]byte, 0, int(size)+4*int(count))
	for i := range count {
		data = tensor.AppendString(data, content[bounds[i]:bounds[i+1]])
	}
	return data, nil
}
