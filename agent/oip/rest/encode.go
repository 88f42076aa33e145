package rest

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"strconv"
	"unicode/utf8"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// encodeResponse gives the JSON of a response and the binary data to send
// after it, nil where no output is sent so. They share memory with the
// outputs.
func encodeResponse(r *inferRequest, out *oip.Response) (head []byte, data [][]byte, err error) {
	head = make([]byte, 0, 256)
	head = append(head, `{"model_name":`...)
	head = appendString(head, out.Model)
	head = append(head, `,"model_version":"`...)
	head = strconv.AppendInt(head, out.Version, 10)
	head = append(head, '"')
	if r.ID != "" {
		head = append(head, `,"id":`...)
		head = appendString(head, r.ID)
	}
	head = append(head, `,"outputs":[`...)
	for i := range out.Outputs {
		t := &out.Outputs[i]
		if i > 0 {
			head = append(head, ',')
		}
		head = append(head, `{"name":`...)
		head = appendString(head, t.Name)
		head = append(head, `,"datatype":"`...)
		head = append(head, t.Type.String()...)
		head = append(head, `","shape":[`...)
		for n, d := range t.Shape {
			if n > 0 {
				head = append(head, ',')
			}
			head = strconv.AppendInt(head, d, 10)
		}
		head = append(head, ']')
		if t.Memory != nil {
			// Clients take any parameters to say that binary data follow.
			head = append(head, '}')
			continue
		}
		if r.asBinary(i) {
			head = append(head, `,"parameters":{"binary_data_size":`...)
			head = strconv.AppendInt(head, int64(len(t.Data)), 10)
			head = append(head, `}}`...)
			data = append(data, t.Data)
			continue
		}
		head = append(head, `,"data":[`...)
		if head, err = appendData(head, &t.Tensor); err != nil {
			return nil, nil, err
		}
		head = append(head, `]}`...)
	}
	return append(head, `]}`...), data, nil
}

// sizeOf estimates how many bytes the outputs take until they are sent: as
// binary data from where they are, and as JSON.
func sizeOf(r *inferRequest, out *oip.Response) (size int64) {
	for i := range out.Outputs {
		t := &out.Outputs[i]
		if r.asBinary(i) {
			size += int64(len(t.Data))
		} else if n := t.Type.Size(); n > 0 {
			size += int64(len(t.Data) / n * (2*n + 4)) // as a float has digits, with its comma
		} else {
			size += 2 * int64(len(t.Data))
		}
	}
	return size
}

func appendString(dst []byte, s string) []byte {
	if plain(s) {
		dst = append(append(dst, '"'), s...)
		return append(dst, '"')
	}
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // every string can be marshalled
	}
	return append(dst, b...)
}

// plain says whether a string is written in JSON as it is.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}

// appendData writes the elements of a tensor, flat.
func appendData(dst []byte, t *tensor.Tensor) ([]byte, error) {
	if t.Type == tensor.String {
		first := true
		for e := range tensor.Strings(t.Data) {
			if !utf8.Valid(e) {
				return nil, oip.Errorf(oip.InvalidArgument, "output %q: has an element that is not UTF-8; ask for it as binary data", t.Name)
			}
			if !first {
				dst = append(dst, ',')
			}
			first = false
			dst = appendString(dst, string(e))
		}
		return dst, nil
	}
	write := elementWriters[t.Type]
	if write == nil {
		return nil, oip.Errorf(oip.InvalidArgument, "output %q: %s data cannot be given in JSON; ask for them as binary data", t.Name, t.Type)
	}
	size := t.Type.Size()
	for i := 0; i < len(t.Data); i += size {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = write(dst, t.Data[i:])
	}
	return dst, nil
}

// elementWriters append the first element of data as JSON.
var elementWriters = map[tensor.Type]func(dst, data []byte) []byte{
	tensor.Bool:  func(dst, data []byte) []byte { return strconv.AppendBool(dst, data[0] != 0) },
	tensor.Int8:  func(dst, data []byte) []byte { return strconv.AppendInt(dst, int64(int8(data[0])), 10) },
	tensor.Uint8: func(dst, data []byte) []byte { return strconv.AppendUint(dst, uint64(data[0]), 10) },
	tensor.Int16: func(dst, data []byte) []byte {
		return strconv.AppendInt(dst, int64(int16(binary.LittleEndian.Uint16(data))), 10)
	},
	tensor.Uint16: func(dst, data []byte) []byte {
		return strconv.AppendUint(dst, uint64(binary.LittleEndian.Uint16(data)), 10)
	},
	tensor.Int32: func(dst, data []byte) []byte {
		return strconv.AppendInt(dst, int64(int32(binary.LittleEndian.Uint32(data))), 10)
	},
	tensor.Uint32: func(dst, data []byte) []byte {
		return strconv.AppendUint(dst, uint64(binary.LittleEndian.Uint32(data)), 10)
	},
	tensor.Int64: func(dst, data []byte) []byte {
		return strconv.AppendInt(dst, int64(binary.LittleEndian.Uint64(data)), 10)
	},
	tensor.Uint64: func(dst, data []byte) []byte {
		return strconv.AppendUint(dst, binary.LittleEndian.Uint64(data), 10)
	},
	tensor.Float32: func(dst, data []byte) []byte {
		return appendFloat(dst, float64(math.Float32frombits(binary.LittleEndian.Uint32(data))), 32)
	},
	tensor.Float64: func(dst, data []byte) []byte {
		return appendFloat(dst, math.Float64frombits(binary.LittleEndian.Uint64(data)), 64)
	},
}

// appendFloat writes the shortest number that reads back as the same float of
// so many bits.
func appendFloat(dst []byte, v float64, bits int) []byte {
	switch {
	case math.IsNaN(v):
		return append(dst, "NaN"...)
	case math.IsInf(v, 1):
		return append(dst, "Infinity"...)
	case math.IsInf(v, -1):
		return append(dst, "-Infinity"...)
	case v == 0 && math.Signbit(v):
		return append(dst, "-0.0"...) // many readers take -0 for an integer
	}
	return strconv.AppendFloat(dst, v, 'g', -1, bits)
}
