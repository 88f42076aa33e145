package engine

import (
	"fmt"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// check says whether a request fits the version: each input there once, of
// its type and shape, with data of the right size, and only outputs that the
// version has.
func (i *Info) check(in []tensor.Tensor, outputs []string) error {
	for n := range in {
		t := &in[n]
		want := slices.IndexFunc(i.Inputs, func(w tensor.Info) bool { return w.Name == t.Name })
		if want < 0 {
			return fmt.Errorf("%w %q: the model has no input of this name", ErrInvalidInput, t.Name)
		}
		if slices.ContainsFunc(in[:n], func(o tensor.Tensor) bool { return o.Name == t.Name }) {
			return fmt.Errorf("%w %q: given twice", ErrInvalidInput, t.Name)
		}
		if err := checkTensor(t, i.Inputs[want]); err != nil {
			return err
		}
	}
	if len(in) < len(i.Inputs) {
		for _, w := range i.Inputs {
			if !slices.ContainsFunc(in, func(t tensor.Tensor) bool { return t.Name == w.Name }) {
				return fmt.Errorf("%w %q: missing", ErrInvalidInput, w.Name)
			}
		}
	}
	for n, name := range outputs {
		if !slices.ContainsFunc(i.Outputs, func(o tensor.Info) bool { return o.Name == name }) {
			return fmt.Errorf("%w: the model has no output %q", ErrInvalidInput, name)
		}
		if slices.Contains(outputs[:n], name) {
			return fmt.Errorf("%w: output %q is asked for twice", ErrInvalidInput, name)
		}
	}
	return nil
}

func checkTensor(t *tensor.Tensor, want tensor.Info) error {
	if t.Type != want.Type {
		return fmt.Errorf("%w %q: has type %s, the model takes %s", ErrInvalidInput, t.Name, t.Type, want.Type)
	}
	fits := want.Shape == nil || len(t.Shape) == len(want.Shape)
	for n := 0; fits && n < len(want.Shape); n++ {
		fits = want.Shape[n] < 0 || want.Shape[n] == t.Shape[n]
	}
	if !fits {
		return fmt.Errorf("%w %q: has shape %v, the model takes %v", ErrInvalidInput, t.Name, t.Shape, want.Shape)
	}
	if err := t.Check(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidInput, err)
	}
	return nil
}
