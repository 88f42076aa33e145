package models

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/models/tensor"
)

// value is an input or output, and why it cannot be one of a served model.
type value struct {
	tensor.Info
	fault string
}

// served checks the inputs or outputs that requests will name.
func served(kind string, values []value) ([]tensor.Info, error) {
	if len(values) > maxValues {
		return nil, invalid("graph has %d %ss, allowed are %d", len(values), kind, maxValues)
	}
	infos := make([]tensor.Info, 0, len(values))
	for _, v := range values {
		if v.fault != "" {
			return nil, invalid("%s %q %s", kind, shorten(v.Name), v.fault)
		}
		infos = append(infos, v.Info)
	}
	return infos, checkInfos(kind, infos)
}

// value reads a ValueInfoProto and appends it.
func (in *inspector) value(f field, kind string, to *[]value) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	v := value{fault: "has no type"}
	err = in.file.each(s, func(f field) (err error) {
		switch f.num {
		case 1:
			v.Name, err = in.name(f, "name of an "+kind)
		case 2:
			err = in.typ(f, &v)
		}
		return err
	})
	if err != nil {
		return err
	}
	if v.Name == "" {
		return invalid("%s %d has no name", kind, len(*to))
	}
	*to = append(*to, v)
	if len(*to) > maxInputs {
		return invalid("more than %d %ss", maxInputs, kind)
	}
	return nil
}

// The members of TypeProto's union, by field number.
var typeKinds = map[protowire.Number]string{4: "sequence", 5: "map", 7: "opaque value", 8: "sparse tensor", 9: "optional value"}

// typ reads a TypeProto.
func (in *inspector) typ(f field, v *value) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	return in.file.each(s, func(f field) error {
		if kind := typeKinds[f.num]; kind != "" {
			v.fault = "is a " + kind + ", only tensors can be served"
		}
		if f.num != 1 {
			return nil
		}
		s, err := f.message()
		if err != nil {
			return err
		}
		v.fault = "has no element type"
		return in.file.each(s, func(f field) error {
			switch f.num {
			case 1:
				n, err := f.integer()
				if err != nil {
					return err
				}
				v.Type, v.fault = tensor.Type(int32(n)), ""
				if int64(v.Type) != n || !v.Type.Known() {
					v.fault = fmt.Sprintf("has element type %d, which cannot be served", n)
				}
			case 2:
				return in.shape(f, v)
			}
			return nil
		})
	})
}

// shape reads a TensorShapeProto.
func (in *inspector) shape(f field, v *value) error {
	s, err := f.message()
	if err != nil {
		return err
	}
	v.Shape = []int64{}
	return in.file.each(s, func(f field) error {
		if f.num != 1 {
			return nil
		}
		s, err := f.message()
		if err != nil {
			return err
		}
		if len(v.Shape) == maxRank {
			return invalid("value %q has more than %d dimensions", shorten(v.Name), maxRank)
		}
		size := int64(-1) // where the dimension has a name or nothing
		err = in.file.each(s, func(f field) (err error) {
			if f.num == 1 {
				size, err = f.integer()
				size = max(size, -1)
			}
			return err
		})
		v.Shape = append(v.Shape, size)
		return err
	})
}
