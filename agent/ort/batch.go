package ort

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"strings"
	"unsafe"

	"github.com/dunlin/dunlin/models/tensor"
)

// Batch says that the rows of the inputs are independent requests: in the
// graph, the first dimension of each input and output is open and has one and
// the same name, that name says batch, and no other dimension has it. "n",
// "b", "bs", "bsz" and what begins with "batch" say so, in capitals or not.
func (s *Session) Batch() bool { return s.batch }

func (s *Session) findBatch() (bool, error) {
	var all [][]string
	for outputs, infos := range [][]tensor.Info{s.inputs, s.outputs} {
		for i, info := range infos {
			names, err := s.symbols(C.int(outputs), C.size_t(i), info.Shape)
			if err != nil {
				return false, err
			}
			all = append(all, names)
		}
	}
	return len(s.inputs) > 0 && len(s.outputs) > 0 && isBatch(all), nil
}

// symbols gives the names of a tensor's dimensions, "" where one is not open
// or has none.
func (s *Session) symbols(outputs C.int, i C.size_t, shape []int64) ([]string, error) {
	var theirs [C.ORT_MAX_RANK]*C.char
	if err := check(C.ort_symbols(s.pointer, outputs, i, &theirs[0])); err != nil {
		return nil, err
	}
	names := make([]string, len(shape))
	for d, name := range theirs {
		if d < len(shape) && shape[d] < 0 {
			names[d] = C.GoString(name)
		}
		C.free(unsafe.Pointer(name))
	}
	return names, nil
}

// isBatch judges the names of the dimensions of all inputs and outputs.
func isBatch(tensors [][]string) bool {
	for _, names := range tensors {
		if len(names) == 0 || names[0] != tensors[0][0] {
			return false
		}
		for _, name := range names[1:] {
			if name == names[0] {
				return false
			}
		}
	}
	switch name := strings.ToLower(tensors[0][0]); name {
	case "n", "b", "bs", "bsz":
		return true
	default:
		return strings.HasPrefix(name, "batch")
	}
}
