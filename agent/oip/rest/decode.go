package rest

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// inferRequest is a request, and how its answer is to be sent.
type inferRequest struct {
	oip.Request
	hold         func(n int64) error // holds n bytes that are decoded
	binaryOutput bool                // for outputs that do not say it
	form         []form              // of each of Outputs
}

// form is how an output is sent.
type form uint8

const (
	formDefault form = iota
	formJSON
	formBinary
)

// asBinary says whether the output at an index of the response is to be sent
// as binary data.
func (r *inferRequest) asBinary(i int) bool {
	if i < len(r.form) && r.form[i] != formDefault {
		return r.form[i] == formBinary
	}
	return r.binaryOutput
}

// decode reads a request: its JSON, and the binary data that follow it. The
// inputs share memory with the binary data. A member that is null is as one
// that is not there.
func (r *inferRequest) decode(head, data []byte) error {
	p := &parser{b: head}
	err := p.object(func(key []byte) (err error) {
		if p.null() {
			return nil
		}
		switch string(key) {
		case "id":
			r.ID, err = p.name()
			err = field(err, key)
		case "parameters":
			p.next()
			start := p.i
			err = p.object(func(key []byte) error { return r.decodeParameter(p, key) })
			r.Parameters = parameters(p.b[start:p.i])
		case "inputs":
			data, err = r.decodeInputs(p, data)
		case "outputs":
			err = r.decodeOutputs(p)
		default:
			err = p.skip()
		}
		return err
	})
	if err == nil {
		err = p.end()
	}
	if err != nil {
		return err
	}
	if r.Inputs == nil {
		return oip.Errorf(oip.InvalidArgument, "request has no inputs")
	}
	if len(data) > 0 {
		return oip.Errorf(oip.InvalidArgument, "%d bytes of binary data are left after the last input", len(data))
	}
	return nil
}

// decodeParameter reads a parameter of the request. Parameters that mean
// nothing here are the caller's own.
func (r *inferRequest) decodeParameter(p *parser, key []byte) (err error) {
	var n uint64
	switch string(key) {
	case "binary_data_output":
		r.binaryOutput, err = p.bool()
	case "priority":
		n, err = p.unsigned(math.MaxInt32)
		r.Priority = int(n)
	case "timeout":
		n, err = p.unsigned(math.MaxInt64 / uint64(time.Microsecond))
		r.Timeout = time.Duration(n) * time.Microsecond
	case "sequence_id", "sequence_start", "sequence_end":
		p.next()
		start := p.i
		err = p.skip()
		switch value := string(p.b[start:p.i]); {
		case err != nil:
		case value != "0" && value != "false" && value != `""` && value != "null":
			return oip.Errorf(oip.Unsupported, "parameters.%s: sequences are not supported", key)
		}
	default:
		return p.skip()
	}
	if err != nil {
		return field(err, "parameters."+string(key))
	}
	return nil
}

// name reads a string that is bounded by MaxName.
func (p *parser) name() (string, error) {
	s, err := p.str()
	if err == nil && len(s) > oip.MaxName {
		err = oip.Errorf(oip.InvalidArgument, "has %d bytes, allowed are %d", len(s), oip.MaxName)
	}
	return string(s), err
}

// field says in which field an error is.
func field[S string | []byte](err error, name S) error {
	if err == nil {
		return nil
	}
	return oip.Errorf(oip.CodeOf(err), "%s: %w", string(name), err)
}

// decodeInputs gives what is left of the binary data.
func (r *inferRequest) decodeInputs(p *parser, data []byte) ([]byte, error) {
	if r.Inputs != nil {
		return nil, oip.Errorf(oip.InvalidArgument, "request has inputs twice")
	}
	r.Inputs = make([]oip.Input, 0, 2)
	var in input
	err := p.array(func(i int) error {
		if i >= oip.MaxTensors {
			return oip.Errorf(oip.InvalidArgument, "request has more than %d inputs", oip.MaxTensors)
		}
		in = input{at: i, binarySize: -1}
		err := in.decode(p)
		if err != nil {
			return err
		}
		var t oip.Input
		if t, data, err = in.tensor(r, data); err != nil {
			return err
		}
		r.Inputs = append(r.Inputs, t)
		return nil
	})
	return data, err
}

// input is an input as it stands in the request. Its members may come in any
// order, so its JSON data are read when the others are known.
type input struct {
	at         int // index in the request
	name       string
	datatype   string
	shape      []int64 // nil where there is none
	data       []byte  // JSON, known to be valid; nil where there is none
	binarySize int64   // -1 where there is none
	memory     slice
}

func (in *input) errorf(format string, args ...any) error {
	return oip.Errorf(oip.InvalidArgument, "inputs[%d] %q: %w", in.at, in.name, fmt.Errorf(format, args...))
}

func (in *input) decode(p *parser) error {
	return p.object(func(key []byte) (err error) {
		if p.null() {
			return nil
		}
		switch string(key) {
		case "name":
			in.name, err = p.name()
		case "datatype":
			in.datatype, err = p.name()
		case "shape":
			err = in.decodeShape(p)
		case "data":
			p.next()
			start := p.i
			err = p.skip()
			in.data = p.b[start:p.i]
		case "parameters":
			err = p.object(func(key []byte) error { return in.decodeParameter(p, key) })
		default:
			return p.skip()
		}
		if err != nil {
			return field(err, fmt.Sprintf("inputs[%d].%s", in.at, key))
		}
		return nil
	})
}

func (in *input) decodeParameter(p *parser, key []byte) error {
	if string(key) != "binary_data_size" {
		return in.memory.decode(p, key)
	}
	n, err := p.unsigned(math.MaxInt64)
	in.binarySize = int64(n)
	return field(err, key)
}

// slice is where a tensor is in shared memory.
type slice struct {
	oip.Slice
	region, any bool // the region is there; any of the parameters is
}

// decode reads a parameter of a tensor, if it is of shared memory.
func (s *slice) decode(p *parser, key []byte) (err error) {
	var n uint64
	switch string(key) {
	case "shared_memory_region":
		s.region = true
		s.Region, err = p.name()
	case "shared_memory_offset":
		n, err = p.unsigned(math.MaxInt64)
		s.Offset = int64(n)
	case "shared_memory_byte_size":
		n, err = p.unsigned(math.MaxInt64)
		s.Size = int64(n)
	default:
		return p.skip()
	}
	s.any = true
	return field(err, key)
}

// memory gives the slice, nil where there is none.
func (s *slice) memory() (*oip.Slice, error) {
	if s.any && !s.region {
		return nil, errors.New("shared_memory_region is missing")
	}
	if !s.region {
		return nil, nil
	}
	return new(s.Slice), nil
}

func (in *input) decodeShape(p *parser) error {
	in.shape = make([]int64, 0, 4)
	return p.array(func(i int) error {
		if i >= oip.MaxDims {
			return oip.Errorf(oip.InvalidArgument, "has more than %d dimensions", oip.MaxDims)
		}
		d, err := p.unsigned(math.MaxInt64)
		in.shape = append(in.shape, int64(d))
		return err
	})
}

// unsigned reads an integer from 0 to most.
func (p *parser) unsigned(most uint64) (uint64, error) {
	n, err := p.number()
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseUint(string(n), 10, 64)
	if err != nil || v > most {
		return 0, oip.Errorf(oip.InvalidArgument, "%s is not an integer from 0 to %d", clip(string(n)), most)
	}
	return v, nil
}

// tensor makes the tensor of an input, and gives the binary data after it.
// Whether they fit its shape is not checked.
func (in *input) tensor(r *inferRequest, data []byte) (t oip.Input, rest []byte, err error) {
	if in.name == "" {
		return t, nil, in.errorf("name is missing")
	}
	if in.shape == nil {
		return t, nil, in.errorf("shape is missing")
	}
	if in.datatype == "" {
		return t, nil, in.errorf("datatype is missing")
	}
	typ, err := tensor.ParseType(in.datatype)
	if err != nil {
		return t, nil, in.errorf("datatype %q is unknown", clip(in.datatype))
	}
	t.Tensor = tensor.Tensor{Name: in.name, Type: typ, Shape: in.shape}
	if t.Memory, err = in.memory.memory(); err != nil {
		return t, nil, in.errorf("%w", err)
	}
	switch {
	case in.data != nil && in.binarySize >= 0:
		return t, nil, in.errorf("has both data and binary_data_size")
	case t.Memory != nil && (in.data != nil || in.binarySize >= 0):
		return t, nil, in.errorf("has both data and shared_memory_region")
	case t.Memory != nil:
	case in.data != nil:
		if t.Data, err = in.jsonData(r, typ); err != nil {
			return t, nil, err
		}
	case in.binarySize < 0:
		return t, nil, in.errorf("has neither data, binary_data_size nor shared_memory_region")
	case in.binarySize > int64(len(data)):
		return t, nil, in.errorf("binary_data_size is %d, but only %d bytes are left after the JSON", in.binarySize, len(data))
	default:
		t.Data, data = data[:in.binarySize:in.binarySize], data[in.binarySize:]
	}
	return t, data, nil
}

func (r *inferRequest) decodeOutputs(p *parser) error {
	if r.Outputs != nil {
		return oip.Errorf(oip.InvalidArgument, "request has outputs twice")
	}
	r.Outputs = make([]oip.Output, 0, 2)
	return p.array(func(i int) error {
		if i >= oip.MaxTensors {
			return oip.Errorf(oip.InvalidArgument, "request has more than %d outputs", oip.MaxTensors)
		}
		var o output
		if err := o.decode(p); err != nil {
			return field(err, fmt.Sprintf("outputs[%d]", i))
		}
		r.Outputs = append(r.Outputs, o.Output)
		r.form = append(r.form, o.form)
		return nil
	})
}

// output is a requested output as it stands in the request.
type output struct {
	oip.Output
	form   form
	memory slice
}

func (o *output) decode(p *parser) error {
	err := p.object(func(key []byte) (err error) {
		if p.null() {
			return nil
		}
		switch string(key) {
		case "name":
			o.Name, err = p.name()
		case "parameters":
			err = p.object(func(key []byte) error { return o.decodeParameter(p, key) })
		default:
			return p.skip()
		}
		return field(err, key)
	})
	if err != nil {
		return err
	}
	if o.Name == "" {
		return oip.Errorf(oip.InvalidArgument, "name is missing")
	}
	if o.Memory, err = o.memory.memory(); err != nil {
		return oip.Errorf(oip.InvalidArgument, "%q: %w", o.Name, err)
	}
	if o.Memory != nil && o.form == formBinary {
		return oip.Errorf(oip.InvalidArgument, "%q: has both binary_data and shared_memory_region", o.Name)
	}
	return nil
}

func (o *output) decodeParameter(p *parser, key []byte) error {
	switch string(key) {
	case "binary_data":
		b, err := p.bool()
		if o.form = formJSON; b {
			o.form = formBinary
		}
		return field(err, key)
	case "classification":
		n, err := p.unsigned(math.MaxInt32)
		o.Classes = int(n)
		return field(err, key)
	}
	return o.memory.decode(p, key)
}

// raw makes a request of a body that is nothing but the data of the model's
// only input, whose shape follows from their length. The outputs are sent as
// binary data.
func (r *inferRequest) raw(body []byte, inputs []tensor.Info) error {
	if len(inputs) != 1 {
		return oip.Errorf(oip.InvalidArgument, "a raw binary request needs a model with one input, this one has %d", len(inputs))
	}
	in := inputs[0]
	t := tensor.Tensor{Name: in.Name, Type: in.Type, Shape: slices.Clone(in.Shape), Data: body}
	open := -1
	fixed := int64(1)
	for i, d := range t.Shape {
		switch {
		case d >= 0:
			fixed *= d // of a model that was loaded
		case i == 0 && slices.ContainsFunc(t.Shape[1:], func(d int64) bool { return d < 0 }):
			t.Shape[0] = 1 // a batch of one
		case open >= 0:
			return oip.Errorf(oip.InvalidArgument, "input %q: the shape of a raw binary request does not follow from its length, as more than one dimension of %v is open", in.Name, in.Shape)
		default:
			open = i
		}
	}
	if in.Type == tensor.String {
		if open >= 0 {
			t.Shape[open] = 1
		}
		t.Data = tensor.AppendString(make([]byte, 0, 4+len(body)), body)
	} else if open >= 0 {
		row := fixed * int64(in.Type.Size())
		if row == 0 || int64(len(body))%row != 0 {
			return oip.Errorf(oip.InvalidArgument, "input %q: %d bytes do not fill a shape of %v with %s", in.Name, len(body), in.Shape, in.Type)
		}
		t.Shape[open] = int64(len(body)) / row
	}
	r.Inputs, r.binaryOutput = []oip.Input{{Tensor: t}}, true
	return nil
}
