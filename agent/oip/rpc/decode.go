package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// errMalformed is that of bytes which are not the message that they should be.
var errMalformed = errors.New("malformed protobuf message")

// field is one field of a message: bytes of a length-delimited one, number of
// one that is a varint or fixed.
type field struct {
	num    protowire.Number
	typ    protowire.Type
	bytes  []byte
	number uint64
}

// eachField calls f with each field of a message but groups, which are
// skipped, in their order.
func eachField(b []byte, f func(field) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || num > protowire.MaxValidNumber {
			return errMalformed
		}
		b = b[n:]
		v := field{num: num, typ: typ}
		switch typ {
		case protowire.VarintType:
			v.number, n = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			v.number, n = protowire.ConsumeFixed64(b)
		case protowire.Fixed32Type:
			var x uint32
			x, n = protowire.ConsumeFixed32(b)
			v.number = uint64(x)
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		if err := f(v); err != nil {
			return err
		}
	}
	return nil
}

// text gives the value of a string field.
func (f field) text() (string, error) {
	if !utf8.Valid(f.bytes) {
		return "", errMalformed
	}
	return string(f.bytes), nil
}

// is says whether a field has a number and a type; with another type it is
// unknown.
func (f field) is(num protowire.Number, typ protowire.Type) bool { return f.num == num && f.typ == typ }

// param is the value of an InferParameter.
type param struct {
	given  bool
	kind   string // the name of its field, empty where it has none
	number uint64 // of bool_param, int64_param, uint64_param; bits of double_param
	text   string
}

// decodeParam reads an entry of a map of parameters, and puts its value where
// slot says; nil drops it.
func decodeParam(entry []byte, slot func(key string) *param) error {
	var key string
	p := param{given: true}
	err := eachField(entry, func(f field) (err error) {
		switch {
		case f.is(1, protowire.BytesType):
			key, err = f.text()
		case f.is(2, protowire.BytesType):
			err = eachField(f.bytes, func(f field) (err error) {
				switch {
				case f.is(1, protowire.VarintType):
					p = param{given: true, kind: "bool_param", number: f.number}
				case f.is(2, protowire.VarintType):
					p = param{given: true, kind: "int64_param", number: f.number}
				case f.is(3, protowire.BytesType):
					p = param{given: true, kind: "string_param"}
					p.text, err = f.text()
				case f.is(4, protowire.Fixed64Type):
					p = param{given: true, kind: "double_param", number: f.number}
				case f.is(5, protowire.VarintType):
					p = param{given: true, kind: "uint64_param", number: f.number}
				}
				return err
			})
		}
		return err
	})
	if err != nil {
		return err
	}
	if at := slot(key); at != nil {
		*at = p
	}
	return nil
}

// integer gives the value of a parameter that is an integer from 0 to most;
// 0 where it is not given.
func (p param) integer(name string, most uint64) (uint64, error) {
	switch {
	case !p.given:
		return 0, nil
	case p.kind == "int64_param" && int64(p.number) < 0:
		return 0, oip.Errorf(oip.InvalidArgument, "parameter %s is %d, allowed are 0 to %d", name, int64(p.number), most)
	case p.kind != "int64_param" && p.kind != "uint64_param":
		return 0, p.wrongKind(name, "int64_param or uint64_param")
	case p.number > most:
		return 0, oip.Errorf(oip.InvalidArgument, "parameter %s is %d, allowed are 0 to %d", name, p.number, most)
	}
	return p.number, nil
}

func (p param) boolean(name string) (bool, error) {
	if p.given && p.kind != "bool_param" {
		return false, p.wrongKind(name, "bool_param")
	}
	return p.given && p.number != 0, nil
}

func (p param) wrongKind(name, want string) error {
	got := p.kind
	if got == "" {
		got = "nothing"
	}
	return oip.Errorf(oip.InvalidArgument, "parameter %s is given as %s, it must be %s", name, got, want)
}

// memoryParams are the parameters that put a tensor into shared memory.
type memoryParams struct{ region, size, offset param }

func (m *memoryParams) slot(key string) *param {
	switch key {
	case "shared_memory_region":
		return &m.region
	case "shared_memory_byte_size":
		return &m.size
	case "shared_memory_offset":
		return &m.offset
	}
	return nil
}

// slice gives the part of shared memory that the parameters name; nil where
// they name none.
func (m *memoryParams) slice() (*oip.Slice, error) {
	switch {
	case m.region.given && m.region.kind != "string_param":
		return nil, m.region.wrongKind("shared_memory_region", "string_param")
	case !m.region.given && m.size.given:
		return nil, oip.Errorf(oip.InvalidArgument, "parameter shared_memory_byte_size is given without shared_memory_region")
	case !m.region.given && m.offset.given:
		return nil, oip.Errorf(oip.InvalidArgument, "parameter shared_memory_offset is given without shared_memory_region")
	case !m.region.given:
		return nil, nil
	case !m.size.given:
		return nil, oip.Errorf(oip.InvalidArgument, "parameter shared_memory_region is given without shared_memory_byte_size")
	}
	size, err := m.size.integer("shared_memory_byte_size", math.MaxInt64)
	if err != nil {
		return nil, err
	}
	offset, err := m.offset.integer("shared_memory_offset", math.MaxInt64)
	if err != nil {
		return nil, err
	}
	return &oip.Slice{Region: m.region.text, Offset: int64(offset), Size: int64(size)}, nil
}

// decoder holds what of a ModelInferRequest cannot be judged before all of it
// is read.
type decoder struct {
	request  oip.Request
	version  string
	contents [][][]byte // of each input, the InferTensorContents that it has
	raw      [][]byte

	// What the request refers to.
	headers    headers
	parameters parameters // nil: there are none

	priority, timeout, sequenceID, sequenceStart, sequenceEnd, emptyFinal param
}

// decodeRequest reads a ModelInferRequest. What it gives shares memory with
// data; converted contents are taken from the share. Its headers are those of
// the context.
func decodeRequest(ctx context.Context, data []byte, s *share) (*oip.Request, error) {
	d := &decoder{headers: headers{ctx}}
	d.request.Headers = &d.headers
	if err := eachField(data, d.field); err != nil {
		return nil, decodeError(err)
	}
	if err := d.judge(); err != nil {
		return nil, err
	}
	if err := d.data(s); err != nil {
		return nil, decodeError(err)
	}
	if d.parameters != nil {
		d.parameters = data
		d.request.Parameters = &d.parameters
	}
	return &d.request, nil
}

func decodeError(err error) error {
	if errors.Is(err, errMalformed) {
		return oip.Errorf(oip.InvalidArgument, "decode ModelInferRequest: %w", err)
	}
	return err
}

func (d *decoder) field(f field) (err error) {
	if f.typ != protowire.BytesType {
		return nil
	}
	r := &d.request
	switch f.num {
	case 1:
		if len(f.bytes) > oip.MaxName {
			return oip.Errorf(oip.InvalidArgument, "model_name has %d bytes, allowed are %d", len(f.bytes), oip.MaxName)
		}
		r.Model, err = f.text()
	case 2:
		d.version, err = f.text()
	case 3:
		r.ID, err = f.text()
	case 4:
		d.parameters = f.bytes
		err = decodeParam(f.bytes, d.slot)
	case 5:
		if len(r.Inputs) >= oip.MaxTensors {
			return oip.Errorf(oip.InvalidArgument, "request has more than %d inputs", oip.MaxTensors)
		}
		if err := d.input(f.bytes); err != nil {
			return fmt.Errorf("inputs[%d]: %w", len(r.Inputs), err)
		}
	case 6:
		if len(r.Outputs) >= oip.MaxTensors {
			return oip.Errorf(oip.InvalidArgument, "request has more than %d outputs", oip.MaxTensors)
		}
		if err := d.output(f.bytes); err != nil {
			return fmt.Errorf("outputs[%d]: %w", len(r.Outputs), err)
		}
	case 7:
		if len(d.raw) >= oip.MaxTensors {
			return oip.Errorf(oip.InvalidArgument, "raw_input_contents has more than %d entries", oip.MaxTensors)
		}
		d.raw = append(d.raw, f.bytes)
	}
	return err
}

func (d *decoder) slot(key string) *param {
	switch key {
	case "priority":
		return &d.priority
	case "timeout":
		return &d.timeout
	case "sequence_id":
		return &d.sequenceID
	case "sequence_start":
		return &d.sequenceStart
	case "sequence_end":
		return &d.sequenceEnd
	case "triton_enable_empty_final_response":
		return &d.emptyFinal
	}
	return nil
}

// judge judges the version and the parameters of the request.
func (d *decoder) judge() error {
	version, err := parseVersion(d.version)
	if err != nil {
		return err
	}
	priority, err := d.priority.integer("priority", math.MaxInt32)
	if err != nil {
		return err
	}
	timeout, err := d.timeout.integer("timeout", uint64(math.MaxInt64/time.Microsecond))
	if err != nil {
		return err
	}
	start, err := d.sequenceStart.boolean("sequence_start")
	if err != nil {
		return err
	}
	end, err := d.sequenceEnd.boolean("sequence_end")
	if err != nil {
		return err
	}
	// An answer always carries triton_final_response, so there is no empty one.
	if _, err := d.emptyFinal.boolean("triton_enable_empty_final_response"); err != nil {
		return err
	}
	id := d.sequenceID
	switch {
	case id.given && id.kind != "int64_param" && id.kind != "uint64_param" && id.kind != "string_param":
		return id.wrongKind("sequence_id", "int64_param, uint64_param or string_param")
	case id.number != 0 || id.text != "" || start || end:
		return oip.Errorf(oip.Unsupported, "parameter sequence_id, sequence_start or sequence_end is set: sequences are not supported")
	}
	d.request.Version = version
	d.request.Priority = int(priority)
	d.request.Timeout = time.Duration(timeout) * time.Microsecond
	return nil
}

// parseVersion gives the number of a version as the protocol writes it; 0 for
// the empty string.
func parseVersion(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || v < 1 {
		return 0, oip.Errorf(oip.InvalidArgument, "model version %q is not a number from 1 on", clip(s))
	}
	return v, nil
}

// clip bounds what an error repeats of a request.
func clip(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}

func (d *decoder) input(b []byte) error {
	var in oip.Input
	var memory memoryParams
	var contents [][]byte
	datatype := ""
	err := eachField(b, func(f field) (err error) {
		switch {
		case f.is(1, protowire.BytesType):
			in.Name, err = f.text()
		case f.is(2, protowire.BytesType):
			datatype, err = f.text()
		case f.num == 3:
			in.Shape, err = appendDims(in.Shape, f)
		case f.is(4, protowire.BytesType):
			err = decodeParam(f.bytes, memory.slot)
		case f.is(5, protowire.BytesType):
			contents = append(contents, f.bytes)
		}
		return err
	})
	if err != nil {
		return err
	}
	if in.Type, err = tensor.ParseType(clip(datatype)); err != nil {
		return oip.Errorf(oip.InvalidArgument, "datatype: %w", err)
	}
	if in.Shape == nil {
		in.Shape = []int64{} // a scalar
	}
	if in.Memory, err = memory.slice(); err != nil {
		return err
	}
	d.request.Inputs = append(d.request.Inputs, in)
	d.contents = append(d.contents, contents)
	return nil
}

// appendDims appends the dimensions in a field, packed or one.
func appendDims(shape []int64, f field) ([]int64, error) {
	switch f.typ {
	case protowire.VarintType:
		shape = append(shape, int64(f.number))
	case protowire.BytesType:
		for b := f.bytes; len(b) > 0 && len(shape) <= oip.MaxDims; {
			v, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return nil, errMalformed
			}
			shape = append(shape, int64(v))
			b = b[n:]
		}
	}
	if len(shape) > oip.MaxDims {
		return nil, oip.Errorf(oip.InvalidArgument, "shape has more than %d dimensions", oip.MaxDims)
	}
	return shape, nil
}

func (d *decoder) output(b []byte) error {
	var out oip.Output
	var memory memoryParams
	var classes param
	err := eachField(b, func(f field) (err error) {
		switch {
		case f.is(1, protowire.BytesType):
			out.Name, err = f.text()
		case f.is(2, protowire.BytesType):
			err = decodeParam(f.bytes, func(key string) *param {
				if key == "classification" {
					return &classes
				}
				return memory.slot(key)
			})
		}
		return err
	})
	if err != nil {
		return err
	}
	n, err := classes.integer("classification", math.MaxInt32)
	if err != nil {
		return err
	}
	out.Classes = int(n)
	if out.Memory, err = memory.slice(); err != nil {
		return err
	}
	d.request.Outputs = append(d.request.Outputs, out)
	return nil
}

// data gives each input its data: the next raw_input_contents, or the contents
// of its own.
func (d *decoder) data(s *share) error {
	raw := d.raw
	for i := range d.request.Inputs {
		in := &d.request.Inputs[i]
		contents := d.contents[i]
		switch {
		case in.Memory != nil && contents != nil:
			return oip.Errorf(oip.InvalidArgument, "inputs[%d] %q has contents and is in shared memory", i, in.Name)
		case in.Memory != nil:
		case contents != nil && d.raw != nil:
			return oip.Errorf(oip.InvalidArgument, "inputs[%d] %q has contents, which must not be there when raw_input_contents is used", i, in.Name)
		case contents != nil:
			if err := convert(in, contents, s); err != nil {
				return fmt.Errorf("inputs[%d] %q: %w", i, in.Name, err)
			}
		case len(raw) > 0:
			in.Data, raw = raw[0], raw[1:]
		default:
			return oip.Errorf(oip.InvalidArgument, "inputs[%d] %q has no data: neither contents, nor an entry of raw_input_contents, nor shared memory", i, in.Name)
		}
	}
	if len(raw) > 0 {
		return oip.Errorf(oip.InvalidArgument, "raw_input_contents has %d entries, the inputs need %d", len(d.raw), len(d.raw)-len(raw))
	}
	return nil
}
