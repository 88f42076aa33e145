package oip

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/dunlin/dunlin/models/tensor"
)

// inferRequest is a decoded request.
type inferRequest struct {
	id           string
	inputs       []tensor.Tensor
	outputs      []outputRequest // none: all
	binaryOutput bool            // for outputs that do not say it
}

type outputRequest struct {
	name   string
	binary *bool
}

func (r *inferRequest) outputNames() []string {
	if len(r.outputs) == 0 {
		return nil
	}
	names := make([]string, len(r.outputs))
	for i, o := range r.outputs {
		names[i] = o.name
	}
	return names
}

// asBinary says whether the output at an index of the response is to be sent
// as binary data.
func (r *inferRequest) asBinary(i int) bool {
	if i < len(r.outputs) && r.outputs[i].binary != nil {
		return *r.outputs[i].binary
	}
	return r.binaryOutput
}

// decodeRequest reads a request: its JSON, and the binary data that follow
// it. The inputs share memory with the binary data.
func decodeRequest(head, data []byte) (*inferRequest, error) {
	r := new(inferRequest)
	p := &parser{b: head}
	hasInputs := false
	err := p.object(func(key string) (err error) {
		switch key {
		case "id":
			r.id, err = p.name("id")
		case "parameters":
			err = p.object(func(key string) (err error) {
				if key == "binary_data_output" {
					r.binaryOutput, err = p.bool()
					return err
				}
				return p.skip()
			})
		case "inputs":
			hasInputs = true
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
		return nil, err
	}
	if !hasInputs {
		return nil, Errorf(InvalidArgument, "request has no inputs")
	}
	if len(data) > 0 {
		return nil, Errorf(InvalidArgument, "%d bytes of binary data are left after the last input", len(data))
	}
	return r, nil
}

// name reads a string that is bounded by MaxName.
func (p *parser) name(field string) (string, error) {
	s, err := p.str()
	if err == nil && len(s) > MaxName {
		err = Errorf(InvalidArgument, "%s has %d bytes, allowed are %d", field, len(s), MaxName)
	}
	return string(s), err
}

// decodeInputs gives what is left of the binary data.
func (r *inferRequest) decodeInputs(p *parser, data []byte) ([]byte, error) {
	if r.inputs != nil {
		return nil, Errorf(InvalidArgument, "request has inputs twice")
	}
	r.inputs = []tensor.Tensor{}
	err := p.array(func(i int) error {
		if i >= MaxTensors {
			return Errorf(InvalidArgument, "request has more than %d inputs", MaxTensors)
		}
		var in input
		err := in.decode(p, i)
		if err != nil {
			return err
		}
		var t tensor.Tensor
		if t, data, err = in.tensor(data); err != nil {
			return err
		}
		r.inputs = append(r.inputs, t)
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
}

func (in *input) field() string { return fmt.Sprintf("inputs[%d] %q", in.at, in.name) }

func (in *input) errorf(format string, args ...any) error {
	return Errorf(InvalidArgument, "%s: %w", in.field(), fmt.Errorf(format, args...))
}

func (in *input) decode(p *parser, at int) error {
	in.at, in.binarySize = at, -1
	return p.object(func(key string) (err error) {
		switch key {
		case "name":
			in.name, err = p.name(fmt.Sprintf("inputs[%d].name", at))
		case "datatype":
			in.datatype, err = p.name(fmt.Sprintf("inputs[%d].datatype", at))
		case "shape":
			err = in.decodeShape(p)
		case "data":
			p.next()
			start := p.i
			err = p.skip()
			in.data = p.b[start:p.i]
		case "parameters":
			err = p.object(func(key string) (err error) {
				switch key {
				case "binary_data_size":
					in.binarySize, err = p.size(fmt.Sprintf("inputs[%d].parameters.binary_data_size", at))
				case "shared_memory_region":
					err = Errorf(Unsupported, "inputs[%d]: shared memory is not supported", at)
				default:
					err = p.skip()
				}
				return err
			})
		default:
			err = p.skip()
		}
		return err
	})
}

func (in *input) decodeShape(p *parser) error {
	in.shape = []int64{}
	return p.array(func(i int) error {
		if i >= MaxDims {
			return Errorf(InvalidArgument, "inputs[%d].shape has more than %d dimensions", in.at, MaxDims)
		}
		d, err := p.size(fmt.Sprintf("inputs[%d].shape[%d]", in.at, i))
		in.shape = append(in.shape, d)
		return err
	})
}

// size reads an integer from 0 on.
func (p *parser) size(field string) (int64, error) {
	n, err := p.number()
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(string(n), 10, 64)
	if err != nil || v < 0 {
		return 0, Errorf(InvalidArgument, "%s: %s is not an integer from 0 to %d", field, clip(string(n)), int64(math.MaxInt64))
	}
	return v, nil
}

// tensor makes the tensor of an input, and gives the binary data after it.
func (in *input) tensor(data []byte) (t tensor.Tensor, rest []byte, err error) {
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
		return t, nil, in.errorf("%w", err)
	}
	t = tensor.Tensor{Name: in.name, Type: typ, Shape: in.shape}
	switch {
	case in.data != nil && in.binarySize >= 0:
		return t, nil, in.errorf("has both data and binary_data_size")
	case in.data != nil:
		if t.Data, err = in.jsonData(typ); err != nil {
			return t, nil, err
		}
	case in.binarySize < 0:
		return t, nil, in.errorf("has neither data nor binary_data_size")
	case in.binarySize > int64(len(data)):
		return t, nil, in.errorf("binary_data_size is %d, but only %d bytes are left after the JSON", in.binarySize, len(data))
	default:
		t.Data, data = data[:in.binarySize:in.binarySize], data[in.binarySize:]
	}
	if err := t.Check(); err != nil {
		return t, nil, Errorf(InvalidArgument, "inputs[%d]: %w", in.at, err)
	}
	return t, data, nil
}

// jsonData reads the data of an input. Nested arrays count as if they were
// flat, whatever the shape; the number of elements must be that of the shape.
func (in *input) jsonData(typ tensor.Type) ([]byte, error) {
	read := elementReaders[typ]
	if read == nil {
		return nil, in.errorf("%s data cannot be given in JSON; send them as binary data", typ)
	}
	if in.data[0] != '[' {
		return nil, in.errorf("data is not an array")
	}
	want, err := tensor.Elements(in.shape)
	if err != nil {
		return nil, in.errorf("%w", err)
	}
	if want > int64(len(in.data)-1)/2 { // an element takes a character and a separator
		return nil, in.errorf("data has fewer elements than the %d of shape %v", want, in.shape)
	}
	out := make([]byte, 0, int(want)*typ.Size())
	p := &parser{b: in.data}
	var n int64
	var element func(int) error
	element = func(int) error {
		if p.next() == '[' {
			return p.array(element)
		}
		if n == want {
			return in.errorf("data has more elements than the %d of shape %v", want, in.shape)
		}
		if out, err = read(p, out); err != nil {
			return in.errorf("data[%d]: %w", n, err)
		}
		n++
		return nil
	}
	if err := p.array(element); err != nil {
		return nil, err
	}
	if n < want {
		return nil, in.errorf("data has %d elements, shape %v needs %d", n, in.shape, want)
	}
	return out, nil
}

// elementReaders read one JSON value and append it as an element of a type.
// FP16 and BF16 have none.
var elementReaders = map[tensor.Type]func(p *parser, out []byte) ([]byte, error){
	tensor.Bool: func(p *parser, out []byte) ([]byte, error) {
		v, err := p.bool()
		if v {
			return append(out, 1), err
		}
		return append(out, 0), err
	},
	tensor.String: func(p *parser, out []byte) ([]byte, error) {
		s, err := p.str()
		return tensor.AppendString(out, s), err
	},
	tensor.Float32: func(p *parser, out []byte) ([]byte, error) {
		v, err := p.float(tensor.Float32, 32)
		return binary.LittleEndian.AppendUint32(out, math.Float32bits(float32(v))), err
	},
	tensor.Float64: func(p *parser, out []byte) ([]byte, error) {
		v, err := p.float(tensor.Float64, 64)
		return binary.LittleEndian.AppendUint64(out, math.Float64bits(v)), err
	},
	tensor.Int8: signed(tensor.Int8), tensor.Int16: signed(tensor.Int16),
	tensor.Int32: signed(tensor.Int32), tensor.Int64: signed(tensor.Int64),
	tensor.Uint8: unsigned(tensor.Uint8), tensor.Uint16: unsigned(tensor.Uint16),
	tensor.Uint32: unsigned(tensor.Uint32), tensor.Uint64: unsigned(tensor.Uint64),
}

func (p *parser) float(typ tensor.Type, bits int) (float64, error) {
	n, err := p.number()
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseFloat(string(n), bits)
	if err != nil {
		return 0, fmt.Errorf("%s is out of range for %s", clip(string(n)), typ)
	}
	return v, nil
}

func signed(typ tensor.Type) func(*parser, []byte) ([]byte, error) {
	bits := 8 * typ.Size()
	return func(p *parser, out []byte) ([]byte, error) {
		n, err := p.number()
		if err != nil {
			return out, err
		}
		v, err := strconv.ParseInt(string(n), 10, bits)
		if err != nil {
			return out, fmt.Errorf("%s is not an integer from %d to %d, as %s needs", clip(string(n)), int64(-1)<<(bits-1), uint64(1)<<(bits-1)-1, typ)
		}
		return appendBits(out, uint64(v), bits), nil
	}
}

func unsigned(typ tensor.Type) func(*parser, []byte) ([]byte, error) {
	bits := 8 * typ.Size()
	return func(p *parser, out []byte) ([]byte, error) {
		n, err := p.number()
		if err != nil {
			return out, err
		}
		v, err := strconv.ParseUint(string(n), 10, bits)
		if err != nil {
			return out, fmt.Errorf("%s is not an integer from 0 to %d, as %s needs", clip(string(n)), uint64(math.MaxUint64)>>(64-bits), typ)
		}
		return appendBits(out, v, bits), nil
	}
}

func appendBits(out []byte, v uint64, bits int) []byte {
	for ; bits > 0; bits -= 8 {
		out = append(out, byte(v))
		v >>= 8
	}
	return out
}

func (r *inferRequest) decodeOutputs(p *parser) error {
	if r.outputs != nil {
		return Errorf(InvalidArgument, "request has outputs twice")
	}
	r.outputs = []outputRequest{}
	return p.array(func(i int) error {
		if i >= MaxTensors {
			return Errorf(InvalidArgument, "request has more than %d outputs", MaxTensors)
		}
		var o outputRequest
		err := p.object(func(key string) (err error) {
			switch key {
			case "name":
				o.name, err = p.name(fmt.Sprintf("outputs[%d].name", i))
			case "parameters":
				err = o.decodeParameters(p, i)
			default:
				err = p.skip()
			}
			return err
		})
		if err != nil {
			return err
		}
		if o.name == "" {
			return Errorf(InvalidArgument, "outputs[%d]: name is missing", i)
		}
		r.outputs = append(r.outputs, o)
		return nil
	})
}

func (o *outputRequest) decodeParameters(p *parser, at int) error {
	return p.object(func(key string) error {
		switch key {
		case "binary_data":
			b, err := p.bool()
			o.binary = &b
			return err
		case "classification":
			n, err := p.size(fmt.Sprintf("outputs[%d].parameters.classification", at))
			if err == nil && n > 0 {
				err = Errorf(Unsupported, "outputs[%d]: classification is not supported", at)
			}
			return err
		case "shared_memory_region":
			return Errorf(Unsupported, "outputs[%d]: shared memory is not supported", at)
		default:
			return p.skip()
		}
	})
}

// rawRequest makes a request of a body that is nothing but the data of the
// model's only input, whose shape follows from their length. The outputs are
// sent as binary data.
func rawRequest(body []byte, inputs []tensor.Info) (*inferRequest, error) {
	if len(inputs) != 1 {
		return nil, Errorf(InvalidArgument, "a raw binary request needs a model with one input, this one has %d", len(inputs))
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
			return nil, Errorf(InvalidArgument, "input %q: the shape of a raw binary request does not follow from its length, as more than one dimension of %v is open", in.Name, in.Shape)
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
			return nil, Errorf(InvalidArgument, "input %q: %d bytes do not fill a shape of %v with %s", in.Name, len(body), in.Shape, in.Type)
		}
		t.Shape[open] = int64(len(body)) / row
	}
	if err := t.Check(); err != nil {
		return nil, Errorf(InvalidArgument, "raw binary request: %w", err)
	}
	return &inferRequest{inputs: []tensor.Tensor{t}, binaryOutput: true}, nil
}
