package engine

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
)

// resolve fills in what the options of a version leave open.
func resolve(o *serving.Options, batch bool) serving.Options {
	r := serving.Automatic(batch)
	if o != nil {
		r = *o
	}
	r.Instances = max(r.Instances, 1)
	r.Ageing = cmp.Or(r.Ageing, serving.DefaultAgeing)
	return r
}

// request checks q and makes a request of it. It runs alone where its inputs
// do not have one and the same number of rows, from 1 to the most of a run;
// strict options refuse inputs whose rows differ, and too many rows.
func (i *Info) request(id VersionID, q Request) (*request, error) {
	if err := i.check(q.Inputs, q.Outputs); err != nil {
		return nil, err
	}
	o := &i.Options
	r := &request{id: id, inputs: q.Inputs, outputs: q.Outputs, timeout: q.Timeout, resident: q.Resident, rows: 1, size: 1, answer: make(chan struct{}, 1)}
	switch levels := max(o.PriorityLevels, 1); {
	case q.Priority < 0 || q.Priority > levels && o.PriorityLevels > 0:
		return nil, fmt.Errorf("%w: priority is %d, allowed are 1 to %d, and 0 for the default", ErrInvalidInput, q.Priority, levels)
	case o.PriorityLevels > 0:
		r.level = max(cmp.Or(q.Priority, o.DefaultPriority), 1) - 1
	}
	if q.Timeout < 0 {
		return nil, fmt.Errorf("%w: timeout is %v, allowed are 0 and more", ErrInvalidInput, q.Timeout)
	}
	if !slices.EqualFunc(r.inputs, i.Inputs, func(t tensor.Tensor, w tensor.Info) bool { return t.Name == w.Name }) {
		r.inputs = slices.Clone(r.inputs)
		place := func(t tensor.Tensor) int {
			return slices.IndexFunc(i.Inputs, func(w tensor.Info) bool { return w.Name == t.Name })
		}
		slices.SortFunc(r.inputs, func(a, b tensor.Tensor) int { return cmp.Compare(place(a), place(b)) })
	}
	for n := range r.inputs {
		t := &r.inputs[n]
		r.size += int64(len(t.Data))
		rows := o.Rows(t.Shape)
		if n == 0 {
			r.rows = rows
		}
		if rows != r.rows && o.Strict && o.MaxBatchSize > 0 {
			return nil, fmt.Errorf("%w %q: has %d rows, input %q has %d", ErrInvalidInput, t.Name, rows, r.inputs[0].Name, r.rows)
		}
		r.alone = r.alone || len(t.Shape) == 0 || rows != r.rows
	}
	r.alone = r.alone || len(r.inputs) == 0 || r.rows == 0 || r.rows > o.MaxBatchSize
	if o.Strict && o.MaxBatchSize > 0 && r.rows > o.MaxBatchSize {
		return nil, fmt.Errorf("%w %q: has %d rows, allowed are %d", ErrInvalidInput, r.inputs[0].Name, r.rows, o.MaxBatchSize)
	}
	return r, nil
}

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
