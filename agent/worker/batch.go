package worker

import (
	"fmt"
	"slices"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/models/tensor"
)

// plan is how requests become one run: each input's rows are those of the
// first request, then those of the second, and so on.
type plan struct {
	requests [][]tensor.Tensor
	asked    []int   // indices of the outputs
	rows     []int64 // of each request, where there are several
	total    int64   // of them; for one request the rows of its first input, or -1
	sources  []source
	inputs   uint64 // bytes, each input aligned
	dims     []int64
}

// source is the data of one input of one request.
type source struct {
	data []byte
	to   uint64 // where it is to lie, from where the inputs begin
}

func align(n uint64) uint64 { return (n + ort.Alignment - 1) &^ (ort.Alignment - 1) }

// make plans a run of a model, and describes its inputs and outputs in q, as
// if the inputs' data began at 0.
func (p *plan) make(q *ort.Question, info *engine.Info, requests [][]tensor.Tensor, outputs []string) error {
	p.requests = requests
	if err := p.ask(q, info, outputs); err != nil {
		return err
	}
	first := requests[0]
	for _, in := range requests {
		if len(in) != len(info.Inputs) {
			return missing(info, in)
		}
	}
	p.countRows()
	p.sources, p.dims, p.inputs = p.sources[:0], p.dims[:0], 0
	q.Inputs = q.Inputs[:0]
	for n := range first {
		t := &first[n]
		index := slices.IndexFunc(info.Inputs, func(i tensor.Info) bool { return i.Name == t.Name })
		if index < 0 {
			return fmt.Errorf("%w: the model has no input %q", engine.ErrInvalidInput, t.Name)
		}
		if slices.ContainsFunc(q.Inputs, func(o ort.Place) bool { return o.Index == index }) {
			return fmt.Errorf("%w: input %q is given twice", engine.ErrInvalidInput, t.Name)
		}
		place := ort.Place{Index: index, Type: t.Type, At: p.inputs, Shape: t.Shape}
		for r := range requests {
			size, err := p.add(r, n, t, p.inputs+place.Size)
			if err != nil {
				return err
			}
			place.Size += size
		}
		if len(requests) > 1 {
			start := len(p.dims)
			p.dims = append(p.dims, t.Shape...)
			place.Shape = p.dims[start:]
			place.Shape[0] = p.total
		}
		p.inputs = align(p.inputs + place.Size)
		q.Inputs = append(q.Inputs, place)
	}
	return nil
}

// ask puts the outputs that are asked for into q; nil asks for all.
func (p *plan) ask(q *ort.Question, info *engine.Info, outputs []string) error {
	p.asked, q.Outputs = p.asked[:0], q.Outputs[:0]
	for i := range info.Outputs {
		if outputs == nil {
			p.asked = append(p.asked, i)
		}
	}
	for _, name := range outputs {
		i := slices.IndexFunc(info.Outputs, func(o tensor.Info) bool { return o.Name == name })
		if i < 0 {
			return fmt.Errorf("%w: the model has no output %q", engine.ErrInvalidInput, name)
		}
		if slices.Contains(p.asked, i) {
			return fmt.Errorf("%w: output %q is asked for twice", engine.ErrInvalidInput, name)
		}
		p.asked = append(p.asked, i)
	}
	if len(p.asked) == 0 {
		return fmt.Errorf("%w: no output is asked for", engine.ErrInvalidInput)
	}
	for _, i := range p.asked {
		q.Outputs = append(q.Outputs, ort.Place{Index: i})
	}
	return nil
}

// missing says which input is, or which is too many.
func missing(info *engine.Info, in []tensor.Tensor) error {
	for _, i := range info.Inputs {
		if !slices.ContainsFunc(in, func(t tensor.Tensor) bool { return t.Name == i.Name }) {
			return fmt.Errorf("%w: input %q is missing", engine.ErrInvalidInput, i.Name)
		}
	}
	return fmt.Errorf("%w: %d inputs, the model has %d", engine.ErrInvalidInput, len(in), len(info.Inputs))
}

// countRows counts those of each request's first input.
func (p *plan) countRows() {
	p.rows, p.total = p.rows[:0], 0
	for _, in := range p.requests {
		if len(in) == 0 || len(in[0].Shape) == 0 {
			p.rows = append(p.rows, -1)
			p.total = -1
			continue
		}
		p.rows = append(p.rows, in[0].Shape[0])
		if p.total >= 0 {
			p.total += in[0].Shape[0]
		}
	}
}

// add takes in the data of request r for the input of which the first request
// has t, its nth, and gives its size.
func (p *plan) add(r, n int, t *tensor.Tensor, to uint64) (uint64, error) {
	of := t
	if r > 0 {
		if of = &p.requests[r][n]; of.Name != t.Name {
			n = slices.IndexFunc(p.requests[r], func(o tensor.Tensor) bool { return o.Name == t.Name })
			if n < 0 {
				return 0, fmt.Errorf("%w: input %q is missing", engine.ErrInvalidInput, t.Name)
			}
			of = &p.requests[r][n]
		}
	}
	if err := of.Check(); err != nil {
		return 0, fmt.Errorf("%w: %w", engine.ErrInvalidInput, err)
	}
	if len(p.requests) > 1 {
		if len(of.Shape) == 0 || of.Shape[0] != p.rows[r] {
			return 0, fmt.Errorf("%w: input %q of shape %v does not have as many rows as the request's others", engine.ErrInvalidInput, of.Name, of.Shape)
		}
		if of.Type != t.Type || !slices.Equal(of.Shape[1:], t.Shape[1:]) {
			return 0, fmt.Errorf("%w: input %q of %s %v cannot run together with one of %s %v", engine.ErrInvalidInput, of.Name, of.Type, of.Shape, t.Type, t.Shape)
		}
	}
	p.sources = append(p.sources, source{of.Data, to})
	return uint64(len(of.Data)), nil
}

// lay copies the inputs to where the run reads them.
func (p *plan) lay(to []byte) {
	for _, s := range p.sources {
		copy(to[s.to:], s.data)
	}
}

// expect gives the outputs in q places from the byte from on where the model
// says enough about their shapes, and gives the byte behind them and whether
// that is all of them.
func (p *plan) expect(q *ort.Question, info *engine.Info, from uint64) (end uint64, all bool) {
	all = true
	for i := range q.Outputs {
		o, known := &q.Outputs[i], &info.Outputs[p.asked[i]]
		// An output that is an input would not be written: the runtime gives the
		// input itself.
		given := slices.ContainsFunc(info.Inputs, func(i tensor.Info) bool { return i.Name == known.Name })
		if known.Type == tensor.String || known.Shape == nil || given {
			all = false
			continue
		}
		start := len(p.dims)
		p.dims = append(p.dims, known.Shape...)
		shape := p.dims[start:]
		if info.Batch && len(shape) > 0 && shape[0] < 0 {
			shape[0] = p.total
		}
		size, err := tensor.Bytes(known.Type, shape)
		if err != nil {
			all = false
		}
		if err != nil || size == 0 {
			continue
		}
		o.Type, o.Shape, o.At, o.Size = known.Type, shape, from, uint64(size)
		from = align(from + o.Size)
	}
	return from, all
}

// expectNothing takes that back.
func (p *plan) expectNothing(q *ort.Question) {
	for i := range q.Outputs {
		q.Outputs[i] = ort.Place{Index: q.Outputs[i].Index}
	}
}

// split shares outputs, and their data, out among the requests.
func (p *plan) split(info *engine.Info, places []ort.Place, data [][]byte) ([][]tensor.Tensor, error) {
	n := len(places)
	dims := 0
	for i := range places {
		dims += len(places[i].Shape)
	}
	requests := len(p.requests)
	outputs := make([][]tensor.Tensor, requests)
	tensors := make([]tensor.Tensor, requests*n)
	shapes := make([]int64, 0, requests*dims)
	for r := range outputs {
		outputs[r] = tensors[r*n : (r+1)*n : (r+1)*n]
	}
	for i := range places {
		place := &places[i]
		known := &info.Outputs[place.Index]
		left := data[i]
		if requests > 1 && (len(place.Shape) == 0 || place.Shape[0] != p.total) {
			return nil, fmt.Errorf("%w: output %q has shape %v after a run of %d rows", engine.ErrRows, known.Name, place.Shape, p.total)
		}
		for r := range outputs {
			start := len(shapes)
			shapes = append(shapes, place.Shape...)
			t := &outputs[r][i]
			*t = tensor.Tensor{Name: known.Name, Type: known.Type, Shape: shapes[start:len(shapes):len(shapes)], Data: left}
			if requests == 1 {
				break
			}
			t.Shape[0] = p.rows[r]
			size := rowBytes(t, left)
			t.Data, left = left[:size:size], left[size:]
		}
	}
	return outputs, nil
}

// rowBytes gives how much of data is that of t, which begins there. The whole
// has been checked.
func rowBytes(t *tensor.Tensor, data []byte) int {
	if t.Type != tensor.String {
		size, _ := tensor.Bytes(t.Type, t.Shape)
		return int(size)
	}
	elements, _ := tensor.Elements(t.Shape)
	size := 0
	for e := range tensor.Strings(data) {
		if elements == 0 {
			break
		}
		elements--
		size += 4 + len(e)
	}
	return size
}
