package rest

import (
	"encoding/base64"
	"maps"
	"math"
	"slices"
	"strconv"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// fields says which fields of a message are written.
type fields int

const (
	// presentFields are all but messages and members of a oneof that are not
	// set.
	presentFields fields = iota
	// allFields are all but members of a oneof that are not set.
	allFields
)

// protoJSON writes a message as JSON as Triton does: fields have the names of
// the .proto file and are there also where they have their default, and
// integers of 64 bits are numbers.
func protoJSON(m proto.Message, which fields) []byte {
	return which.appendMessage(nil, m.ProtoReflect())
}

func (f fields) appendMessage(dst []byte, m protoreflect.Message) []byte {
	dst = append(dst, '{')
	first := true
	list := m.Descriptor().Fields()
	for i := range list.Len() {
		d := list.Get(i)
		if !m.Has(d) && (d.ContainingOneof() != nil || d.Message() != nil && !d.IsList() && !d.IsMap() && f != allFields) {
			continue
		}
		if !first {
			dst = append(dst, ',')
		}
		first = false
		dst = append(dst, '"')
		dst = append(dst, d.Name()...)
		dst = append(dst, `":`...)
		dst = f.appendField(dst, d, m.Get(d))
	}
	return append(dst, '}')
}

func (f fields) appendField(dst []byte, d protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
	switch {
	case d.IsList():
		dst = append(dst, '[')
		for i := range v.List().Len() {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = f.appendValue(dst, d, v.List().Get(i))
		}
		return append(dst, ']')
	case d.IsMap():
		members := map[string]protoreflect.Value{}
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			members[k.String()] = v
			return true
		})
		dst = append(dst, '{')
		for i, k := range slices.Sorted(maps.Keys(members)) {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(appendString(dst, k), ':')
			dst = f.appendValue(dst, d.MapValue(), members[k])
		}
		return append(dst, '}')
	}
	return f.appendValue(dst, d, v)
}

func (f fields) appendValue(dst []byte, d protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
	switch v := v.Interface().(type) {
	case protoreflect.Message:
		return f.appendMessage(dst, v)
	case protoreflect.EnumNumber:
		if e := d.Enum().Values().ByNumber(v); e != nil {
			return appendString(dst, string(e.Name()))
		}
		return strconv.AppendInt(dst, int64(v), 10)
	case string:
		return appendString(dst, v)
	case []byte:
		return appendString(dst, base64.StdEncoding.EncodeToString(v))
	case bool:
		return strconv.AppendBool(dst, v)
	case int32:
		return strconv.AppendInt(dst, int64(v), 10)
	case int64:
		return strconv.AppendInt(dst, v, 10)
	case uint32:
		return strconv.AppendUint(dst, uint64(v), 10)
	case uint64:
		return strconv.AppendUint(dst, v, 10)
	case float32:
		return appendProtoFloat(dst, float64(v), 32)
	default:
		return appendProtoFloat(dst, v.(float64), 64)
	}
}

// appendProtoFloat writes what is not a number as a string, as JSON asks.
func appendProtoFloat(dst []byte, v float64, bits int) []byte {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return append(appendFloat(append(dst, '"'), v, bits), '"')
	}
	return appendFloat(dst, v, bits)
}
