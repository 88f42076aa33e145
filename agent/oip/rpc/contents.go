package rpc

import (
	"encoding/binary"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// contentsField is a field of InferTensorContents, by its number.
type contentsField struct {
	name string
	typ  protowire.Type // of an element
}

var contentsFields = [...]contentsField{
	1: {"bool_contents", protowire.VarintType},
	2: {"int_contents", protowire.VarintType},
	3: {"int64_contents", protowire.VarintType},
	4: {"uint_contents", protowire.VarintType},
	5: {"uint64_contents", protowire.VarintType},
	6: {"fp32_contents", protowire.Fixed32Type},
	7: {"fp64_contents", protowire.Fixed64Type},
	8: {"bytes_contents", protowire.BytesType},
}

// contentsOf gives the field that holds the elements of a type; FP16 and BF16
// have none.
var contentsOf = map[tensor.Type]protowire.Number{
	tensor.Bool: 1,
	tensor.Int8: 2, tensor.Int16: 2, tensor.Int32: 2,
	tensor.Int64: 3,
	tensor.Uint8: 4, tensor.Uint16: 4, tensor.Uint32: 4,
	tensor.Uint64:  5,
	tensor.Float32: 6,
	tensor.Float64: 7,
	tensor.String:  8,
}

// eachElement calls f with each element of an InferTensorContents, with the
// number of its field; element is that of bytes_contents.
func eachElement(contents []byte, f func(num protowire.Number, v uint64, element []byte) error) error {
	return eachField(contents, func(v field) error {
		if int(v.num) >= len(contentsFields) {
			return nil
		}
		typ := contentsFields[v.num].typ
		switch {
		case v.typ == typ:
			return f(v.num, v.number, v.bytes)
		case v.typ != protowire.BytesType:
			return nil
		}
		for b := v.bytes; len(b) > 0; { // packed
			var x uint64
			var n int
			switch typ {
			case protowire.VarintType:
				x, n = protowire.ConsumeVarint(b)
			case protowire.Fixed32Type:
				var small uint32
				small, n = protowire.ConsumeFixed32(b)
				x = uint64(small)
			case protowire.Fixed64Type:
				x, n = protowire.ConsumeFixed64(b)
			}
			if n < 0 {
				return errMalformed
			}
			if err := f(v.num, x, nil); err != nil {
				return err
			}
			b = b[n:]
		}
		return nil
	})
}

// convert gives an input the data that its contents hold. More than one of
// them are one message in parts.
func convert(in *oip.Input, contents [][]byte, s *share) error {
	want, err := tensor.Elements(in.Shape)
	if err != nil {
		return oip.Errorf(oip.InvalidArgument, "%w", err)
	}
	num, ok := contentsOf[in.Type]
	var count, size int64
	for _, c := range contents {
		err := eachElement(c, func(n protowire.Number, _ uint64, element []byte) error {
			switch {
			case !ok:
				return oip.Errorf(oip.InvalidArgument, "contents cannot hold %s data; send them in raw_input_contents", in.Type)
			case n != num:
				return oip.Errorf(oip.InvalidArgument, "contents has %s, its datatype %s needs %s", contentsFields[n].name, in.Type, contentsFields[num].name)
			}
			count++
			size += 4 + int64(len(element))
			return nil
		})
		if err != nil {
			return err
		}
	}
	switch {
	case !ok && want > 0:
		return oip.Errorf(oip.InvalidArgument, "contents cannot hold %s data; send them in raw_input_contents", in.Type)
	case count != want:
		return oip.Errorf(oip.InvalidArgument, "contents has %d elements, shape %v needs %d", count, in.Shape, want)
	}
	if in.Type != tensor.String {
		size = count * int64(in.Type.Size())
	}
	if err := s.take(size); err != nil {
		return err
	}
	data := make([]byte, 0, size)
	for _, c := range contents {
		err := eachElement(c, func(_ protowire.Number, v uint64, element []byte) (err error) {
			data, err = appendElement(data, in.Type, v, element)
			if err != nil {
				return oip.Errorf(oip.InvalidArgument, "%s[%d]: %w", contentsFields[num].name, len(data)/in.Type.Size(), err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	in.Data = data
	return nil
}

// appendElement appends the element that a contents field holds as v, or as
// element for a string.
func appendElement(data []byte, typ tensor.Type, v uint64, element []byte) ([]byte, error) {
	switch typ {
	case tensor.String:
		return tensor.AppendString(data, element), nil
	case tensor.Bool:
		if v != 0 {
			v = 1
		}
		return append(data, byte(v)), nil
	case tensor.Int8, tensor.Int16:
		bits := 8 * typ.Size()
		if i, most := int32(v), int32(1)<<(bits-1)-1; i > most || i < -most-1 {
			return data, fmt.Errorf("%d is not from %d to %d, as %s needs", i, -most-1, most, typ)
		}
	case tensor.Uint8, tensor.Uint16:
		if u, most := uint32(v), uint32(1)<<(8*typ.Size())-1; u > most {
			return data, fmt.Errorf("%d is not from 0 to %d, as %s needs", u, most, typ)
		}
	}
	switch typ.Size() {
	case 1:
		return append(data, byte(v)), nil
	case 2:
		return binary.LittleEndian.AppendUint16(data, uint16(v)), nil
	case 4:
		return binary.LittleEndian.AppendUint32(data, uint32(v)), nil
	default:
		return binary.LittleEndian.AppendUint64(data, v), nil
	}
}
