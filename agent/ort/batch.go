package ort

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"unsafe"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// Batch says that the rows of the inputs are independent requests, as
// serving.Batch judges the names in the graph.
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
	return len(s.inputs) > 0 && len(s.outputs) > 0 && serving.Batch(all), nil
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
