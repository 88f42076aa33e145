package rest

import (
	"encoding/binary"
	"fmt"
	"math"
	"strconv"

	"github.com/dunlin/dunlin/models/tensor"
)

// jsonData reads the data of an input. Nested arrays count as if they were
// flat, whatever the shape; the number of elements must be that of the shape.
func (in *input) jsonData(r *inferRequest, typ tensor.Type) ([]byte, error) {
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
	size := int(want) * typ.Size()
	if typ == tensor.String {
		size = len(in.data) + 4*int(want)
	}
	if err := r.hold(int64(size)); err != nil {
		return nil, err
	}
	out := make([]byte, 0, size)
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
