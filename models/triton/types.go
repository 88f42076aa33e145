package triton

import (
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

var dataTypes = map[tensor.Type]inference.DataType{
	tensor.Bool:     inference.DataType_TYPE_BOOL,
	tensor.Uint8:    inference.DataType_TYPE_UINT8,
	tensor.Uint16:   inference.DataType_TYPE_UINT16,
	tensor.Uint32:   inference.DataType_TYPE_UINT32,
	tensor.Uint64:   inference.DataType_TYPE_UINT64,
	tensor.Int8:     inference.DataType_TYPE_INT8,
	tensor.Int16:    inference.DataType_TYPE_INT16,
	tensor.Int32:    inference.DataType_TYPE_INT32,
	tensor.Int64:    inference.DataType_TYPE_INT64,
	tensor.Float16:  inference.DataType_TYPE_FP16,
	tensor.Float32:  inference.DataType_TYPE_FP32,
	tensor.Float64:  inference.DataType_TYPE_FP64,
	tensor.String:   inference.DataType_TYPE_STRING,
	tensor.BFloat16: inference.DataType_TYPE_BF16,
}

// DataType gives the configuration's name of an element type, TYPE_INVALID
// for one that has none.
func DataType(t tensor.Type) inference.DataType { return dataTypes[t] }

// Type gives the element type that the configuration calls d, and false where
// there is none.
func Type(d inference.DataType) (tensor.Type, bool) {
	for t, name := range dataTypes {
		if name == d {
			return t, true
		}
	}
	return 0, false
}
