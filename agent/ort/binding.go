package ort

// #include "shim.h"
import "C"

import (
	"fmt"
	"reflect"

	binding "github.com/yalue/onnxruntime_go"
)

// The shim works on what the binding has made. The binding keeps the runtime's
// pointers in fields that it does not export; the functions below read them,
// and checkBinding says beforehand whether the fields are there.

const bindingVersion = "onnxruntime_go v1.27.0"

func sessionPointer(s *binding.DynamicAdvancedSession) *C.OrtSession {
	return (*C.OrtSession)(reflect.ValueOf(s).Elem().FieldByName("s").Elem().FieldByName("ortSession").UnsafePointer())
}

func sessionOptionsPointer(o *binding.SessionOptions) *C.OrtSessionOptions {
	return (*C.OrtSessionOptions)(reflect.ValueOf(o).Elem().FieldByName("o").UnsafePointer())
}

func runOptionsPointer(o *binding.RunOptions) *C.OrtRunOptions {
	return (*C.OrtRunOptions)(reflect.ValueOf(o).Elem().FieldByName("o").UnsafePointer())
}

// checkBinding refuses a version of the binding that keeps its pointers
// elsewhere.
func checkBinding() error {
	for _, f := range []struct {
		in          reflect.Type
		name, wants string
	}{
		{reflect.TypeFor[binding.DynamicAdvancedSession](), "s", "AdvancedSession"},
		{reflect.TypeFor[binding.AdvancedSession](), "ortSession", "_Ctype_struct_OrtSession"},
		{reflect.TypeFor[binding.SessionOptions](), "o", "_Ctype_struct_OrtSessionOptions"},
		{reflect.TypeFor[binding.RunOptions](), "o", "_Ctype_struct_OrtRunOptions"},
	} {
		if err := checkField(f.in, f.name, f.wants); err != nil {
			return err
		}
	}
	return nil
}

// checkField says whether a struct has a field that points to a type of this
// name.
func checkField(in reflect.Type, name, wants string) error {
	f, ok := in.FieldByName(name)
	if !ok {
		return fmt.Errorf("%s expected: its %s has no field %s", bindingVersion, in.Name(), name)
	}
	if f.Type.Kind() != reflect.Pointer || f.Type.Elem().Name() != wants {
		return fmt.Errorf("%s expected: in its %s, field %s has type %s, not a pointer to %s", bindingVersion, in.Name(), name, f.Type, wants)
	}
	return nil
}
