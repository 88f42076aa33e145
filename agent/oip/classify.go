package oip

import (
	"cmp"
	"encoding/binary"
	"math"
	"slices"
	"strconv"

	"github.com/dunlin/dunlin/models/tensor"
)

// maxClasses bounds the elements of a row that is classified.
const maxClasses = 1_000_000

// classify gives the k highest elements of each row of a tensor as strings
// "value:index" or "value:index:label", the highest first and equal ones by
// index. A batched tensor has a row for each index of its first dimension and
// gives the shape [rows, k]; another is one row and gives [k]. A row with
// fewer than k elements gives all of them. NaN comes last.
func classify(t *tensor.Tensor, k int, batched bool, labels []string) (tensor.Tensor, error) {
	out := tensor.Tensor{Name: t.Name, Type: tensor.String}
	read, format := classReader(t.Type)
	if read == nil {
		return out, Errorf(InvalidArgument, "%s outputs cannot be classified", t.Type)
	}
	rows, row := int64(1), t.Shape
	if batched && len(row) > 0 {
		rows, row = row[0], row[1:]
		out.Shape = append(out.Shape, rows)
	}
	n, err := tensor.Elements(row)
	if err != nil {
		return out, err // of a tensor whose data fit its shape
	}
	if n > maxClasses {
		return out, Errorf(InvalidArgument, "has %d classes, at most %d can be classified", n, maxClasses)
	}
	k = min(k, int(n))
	out.Shape = append(out.Shape, int64(k))
	if k == 0 {
		return out, nil
	}
	size := t.Type.Size()
	index := make([]int, n)
	var element []byte
	for r := range rows {
		data := t.Data[int(r)*int(n)*size:][:int(n)*size]
		for i := range index {
			index[i] = i
		}
		slices.SortFunc(index, func(a, b int) int {
			if c := read(data[b*size:], data[a*size:]); c != 0 {
				return c
			}
			return a - b
		})
		for _, i := range index[:k] {
			element = append(format(element[:0], data[i*size:]), ':')
			element = strconv.AppendInt(element, int64(i), 10)
			if i < len(labels) && labels[i] != "" {
				element = append(append(element, ':'), labels[i]...)
			}
			out.Data = tensor.AppendString(out.Data, element)
		}
	}
	return out, nil
}

// classReader gives how to compare the first elements of two slices of a
// type, and how to write one as Triton does, which for floats is "%f". Both
// are nil for a type that cannot be classified.
func classReader(t tensor.Type) (compare func(a, b []byte) int, format func(dst, a []byte) []byte) {
	le := binary.LittleEndian
	switch t {
	case tensor.Uint8:
		return ordered(func(b []byte) uint64 { return uint64(b[0]) }, appendUint)
	case tensor.Uint16:
		return ordered(func(b []byte) uint64 { return uint64(le.Uint16(b)) }, appendUint)
	case tensor.Uint32:
		return ordered(func(b []byte) uint64 { return uint64(le.Uint32(b)) }, appendUint)
	case tensor.Uint64:
		return ordered(le.Uint64, appendUint)
	case tensor.Int8:
		return ordered(func(b []byte) int64 { return int64(int8(b[0])) }, appendInt)
	case tensor.Int16:
		return ordered(func(b []byte) int64 { return int64(int16(le.Uint16(b))) }, appendInt)
	case tensor.Int32:
		return ordered(func(b []byte) int64 { return int64(int32(le.Uint32(b))) }, appendInt)
	case tensor.Int64:
		return ordered(func(b []byte) int64 { return int64(le.Uint64(b)) }, appendInt)
	case tensor.Float32:
		return ordered(func(b []byte) float64 { return float64(math.Float32frombits(le.Uint32(b))) }, appendFixed)
	case tensor.Float64:
		return ordered(func(b []byte) float64 { return math.Float64frombits(le.Uint64(b)) }, appendFixed)
	}
	return nil, nil
}

func ordered[T cmp.Ordered](read func([]byte) T, write func([]byte, T) []byte) (func(a, b []byte) int, func(dst, a []byte) []byte) {
	return func(a, b []byte) int { return cmp.Compare(read(a), read(b)) },
		func(dst, a []byte) []byte { return write(dst, read(a)) }
}

func appendUint(dst []byte, v uint64) []byte { return strconv.AppendUint(dst, v, 10) }
func appendInt(dst []byte, v int64) []byte   { return strconv.AppendInt(dst, v, 10) }

func appendFixed(dst []byte, v float64) []byte {
	switch {
	case math.IsNaN(v):
		return append(dst, "nan"...)
	case math.IsInf(v, 1):
		return append(dst, "inf"...)
	case math.IsInf(v, -1):
		return append(dst, "-inf"...)
	}
	return strconv.AppendFloat(dst, v, 'f', 6, 64)
}
