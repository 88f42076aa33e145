// Package tensor names the element types of ONNX tensors and holds their raw data.
package tensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Type is an element type. Its values are those of ONNX's
// TensorProto.DataType and of ONNX Runtime's ONNXTensorElementDataType.
type Type int32

// The element types that a model's inputs and outputs may have.
const (
	Float32  Type = 1
	Uint8    Type = 2
	Int8     Type = 3
	Uint16   Type = 4
	Int16    Type = 5
	Int32    Type = 6
	Int64    Type = 7
	String   Type = 8
	Bool     Type = 9
	Float16  Type = 10
	Float64  Type = 11
	Uint32   Type = 12
	Uint64   Type = 13
	BFloat16 Type = 16
)

type typeInfo struct {
	typ  Type
	name string // as the Open Inference Protocol writes it
	size int    // bytes of an element; 0 where elements have no fixed size
}

var types = []typeInfo{
	{Float32, "FP32", 4}, {Uint8, "UINT8", 1}, {Int8, "INT8", 1}, {Uint16, "UINT16", 2},
	{Int16, "INT16", 2}, {Int32, "INT32", 4}, {Int64, "INT64", 8}, {String, "BYTES", 0},
	{Bool, "BOOL", 1}, {Float16, "FP16", 2}, {Float64, "FP64", 8}, {Uint32, "UINT32", 4},
	{Uint64, "UINT64", 8}, {BFloat16, "BF16", 2},
}

// String gives the type's name in the Open Inference Protocol ("FP32", "BYTES"),
// or "type(N)" for one that has none.
func (t Type) String() string {
	for _, i := range types {
		if i.typ == t {
			return i.name
		}
	}
	return fmt.Sprintf("type(%d)", int32(t))
}

// Size gives the bytes of an element, and 0 for String, whose elements have
// no fixed size, and for types that are not in this package.
func (t Type) Size() int {
	for _, i := range types {
		if i.typ == t {
			return i.size
		}
	}
	return 0
}

// Known says whether t is one of the types of this package.
func (t Type) Known() bool { return t == String || t.Size() > 0 }

// ParseType gives the type that the Open Inference Protocol calls name.
func ParseType(name string) (Type, error) {
	for _, i := range types {
		if i.name == name {
			return i.typ, nil
		}
	}
	return 0, fmt.Errorf("unknown data type %q", name)
}

// MarshalText writes the type's protocol name.
func (t Type) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads a protocol name.
func (t *Type) UnmarshalText(b []byte) error {
	p, err := ParseType(string(b))
	if err != nil {
		return err
	}
	*t = p
	return nil
}

// Info describes an input or output of a model. A dimension of -1 may have
// any size; a scalar has no dimensions.
type Info struct {
	Name  string  `json:"name"`
	Type  Type    `json:"type"`
	Shape []int64 `json:"shape"`
}

// String writes "name:TYPE[d0,d1]".
func (i Info) String() string {
	dims := make([]string, len(i.Shape))
	for n, d := range i.Shape {
		dims[n] = strconv.FormatInt(d, 10)
	}
	return fmt.Sprintf("%s:%s[%s]", i.Name, i.Type, strings.Join(dims, ","))
}

// Tensor is a named array of raw little-endian elements in row-major order.
// An element of Bool is one byte, 0 or 1; an element of String is its length
// as four bytes, then that many bytes. A scalar has an empty shape.
type Tensor struct {
	Name  string
	Type  Type
	Shape []int64
	Data  []byte
}

// ErrShape is the error of a shape that has a negative dimension or more
// elements than an int64 counts.
var ErrShape = errors.New("invalid shape")

// Elements gives the product of the dimensions, 1 for a scalar.
func Elements(shape []int64) (int64, error) {
	n := uint64(1)
	zero := false
	for _, d := range shape {
		if d < 0 {
			return 0, fmt.Errorf("%w %v: dimension %d is negative", ErrShape, shape, d)
		}
		if d == 0 {
			zero = true
			continue
		}
		hi, lo := bits.Mul64(n, uint64(d))
		if hi != 0 || lo > math.MaxInt64 {
			return 0, fmt.Errorf("%w %v: more than %d elements", ErrShape, shape, int64(math.MaxInt64))
		}
		n = lo
	}
	if zero {
		return 0, nil
	}
	return int64(n), nil
}

// Bytes gives the size of the data of a tensor of a type with a fixed element size.
func Bytes(t Type, shape []int64) (int64, error) {
	if t.Size() == 0 {
		return 0, fmt.Errorf("data type %s has no fixed element size", t)
	}
	n, err := Elements(shape)
	if err != nil {
		return 0, err
	}
	if n > math.MaxInt64/int64(t.Size()) {
		return 0, fmt.Errorf("%w %v: more than %d bytes", ErrShape, shape, int64(math.MaxInt64))
	}
	return n * int64(t.Size()), nil
}

// Check says whether the data has the size that type and shape ask for, and,
// for String, whether it holds exactly as many elements.
func (t *Tensor) Check() error {
	n, err := Elements(t.Shape)
	if err != nil {
		return fmt.Errorf("tensor %q: %w", t.Name, err)
	}
	if t.Type == String {
		return t.checkStrings(n)
	}
	want, err := Bytes(t.Type, t.Shape)
	if err != nil {
		return fmt.Errorf("tensor %q: %w", t.Name, err)
	}
	if int64(len(t.Data)) != want {
		return fmt.Errorf("tensor %q: has %d bytes of data, its type %s and shape %v need %d", t.Name, len(t.Data), t.Type, t.Shape, want)
	}
	return nil
}

func (t *Tensor) checkStrings(n int64) error {
	var count int64
	for range Strings(t.Data) {
		count++
	}
	if got := stringsEnd(t.Data); got != len(t.Data) {
		return fmt.Errorf("tensor %q: element %d is cut short at byte %d of %d", t.Name, count, got, len(t.Data))
	}
	if count != n {
		return fmt.Errorf("tensor %q: has %d elements, its shape %v needs %d", t.Name, count, t.Shape, n)
	}
	return nil
}

// nextString gives the first element of data and what follows it, and false
// where data does not start with a whole element.
func nextString(data []byte) (element, rest []byte, ok bool) {
	if len(data) < 4 {
		return nil, nil, false
	}
	n := uint64(data[0]) | uint64(data[1])<<8 | uint64(data[2])<<16 | uint64(data[3])<<24
	if n > uint64(len(data)-4) {
		return nil, nil, false
	}
	return data[4 : 4+n], data[4+n:], true
}

// Strings yields the whole elements of the data of a String tensor. They
// share data's memory.
func Strings(data []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(data) > 0 {
			e, rest, ok := nextString(data)
			if !ok || !yield(e) {
				return
			}
			data = rest
		}
	}
}

func stringsEnd(data []byte) int {
	left := data
	for len(left) > 0 {
		_, rest, ok := nextString(left)
		if !ok {
			break
		}
		left = rest
	}
	return len(data) - len(left)
}

// AppendString appends one element of a String tensor.
func AppendString(data, element []byte) []byte {
	n := len(element)
	data = append(data, byte(n), byte(n>>8), byte(n>>16), byte(n>>24))
	return append(data, element...)
}

// Number gives the value of the element that data begins with, of a type that
// has a Size, as near as a float64 comes; a Bool is 0 or 1.
func (t Type) Number(data []byte) float64 {
	switch t {
	case Float32:
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(data)))
	case Float64:
		return math.Float64frombits(binary.LittleEndian.Uint64(data))
	case Float16:
		return half(binary.LittleEndian.Uint16(data))
	case BFloat16:
		return float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(data)) << 16))
	case Uint8, Bool:
		return float64(data[0])
	case Int8:
		return float64(int8(data[0]))
	case Uint16:
		return float64(binary.LittleEndian.Uint16(data))
	case Int16:
		return float64(int16(binary.LittleEndian.Uint16(data)))
	case Uint32:
		return float64(binary.LittleEndian.Uint32(data))
	case Int32:
		return float64(int32(binary.LittleEndian.Uint32(data)))
	case Uint64:
		return float64(binary.LittleEndian.Uint64(data))
	case Int64:
		return float64(int64(binary.LittleEndian.Uint64(data)))
	}
	return math.NaN()
}

// half gives the value of an FP16 number.
func half(bits uint16) float64 {
	exponent, fraction := int(bits>>10&31), float64(bits&1023)
	var v float64
	switch exponent {
	case 0:
		v = math.Ldexp(fraction, -24)
	case 31:
		if v = math.Inf(1); fraction != 0 {
			v = math.NaN()
		}
	default:
		v = math.Ldexp(fraction+1024, exponent-25)
	}
	if bits>>15 != 0 {
		v = -v
	}
	return v
}
