package apidoc

import (
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// object is a mapping in the order in which it is written.
type object = yaml.MapSlice

func item(key string, v any) yaml.MapItem { return yaml.MapItem{Key: key, Value: v} }

// schemas collects the JSON schemas of messages, in the form of protobuf's JSON.
type schemas struct {
	comments map[string]string
	made     map[string]object
}

// name is that of a message's or enum's schema.
func name(d protoreflect.Descriptor) string {
	return strings.TrimPrefix(string(d.FullName()), "dunlin.v1.")
}

// ref gives a reference to the schema of a message or enum, which it makes if
// there is none.
func (s *schemas) ref(d protoreflect.Descriptor) object {
	key := name(d)
	if _, ok := s.made[key]; !ok {
		s.made[key] = nil // it may refer to itself
		switch d := d.(type) {
		case protoreflect.MessageDescriptor:
			s.made[key] = s.message(d)
		case protoreflect.EnumDescriptor:
			s.made[key] = s.enum(d)
		}
	}
	return object{item("$ref", "#/components/schemas/"+key)}
}

// said adds the comment of d to o.
func (s *schemas) said(o object, d protoreflect.Descriptor) object {
	if c := s.comments[string(d.FullName())]; c != "" {
		o = append(o, item("description", c))
	}
	return o
}

func (s *schemas) message(m protoreflect.MessageDescriptor) object {
	switch m.FullName() {
	case "google.protobuf.Timestamp":
		return object{item("type", "string"), item("format", "date-time"), item("description", "RFC 3339, in UTC.")}
	case "google.protobuf.Duration":
		return object{item("type", "string"), item("pattern", `^-?\d+(\.\d{1,9})?s$`), item("description", "Seconds with an s behind: 1.5s.")}
	}
	o := s.said(object{item("type", "object")}, m)
	var properties object
	fields := m.Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		p := s.said(s.field(f), f)
		if of := f.ContainingOneof(); of != nil && !of.IsSynthetic() {
			var others []string
			for j := range of.Fields().Len() {
				if g := of.Fields().Get(j); g != f {
					others = append(others, g.JSONName())
				}
			}
			if len(others) > 0 {
				p = append(p, item("x-not-with", others))
			}
		}
		properties = append(properties, item(f.JSONName(), p))
	}
	if properties != nil {
		o = append(o, item("properties", properties))
	}
	return append(o, item("additionalProperties", false))
}

func (s *schemas) enum(e protoreflect.EnumDescriptor) object {
	var values []string
	for i := range e.Values().Len() {
		values = append(values, string(e.Values().Get(i).Name()))
	}
	return append(s.said(object{item("type", "string")}, e), item("enum", values))
}

func (s *schemas) field(f protoreflect.FieldDescriptor) object {
	switch {
	case f.IsMap():
		return object{item("type", "object"), item("additionalProperties", s.single(f.MapValue()))}
	case f.IsList():
		return object{item("type", "array"), item("items", s.single(f))}
	}
	return s.single(f)
}

func (s *schemas) single(f protoreflect.FieldDescriptor) object {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return object{item("type", "boolean")}
	case protoreflect.StringKind:
		return object{item("type", "string")}
	case protoreflect.BytesKind:
		return object{item("type", "string"), item("contentEncoding", "base64")}
	case protoreflect.DoubleKind, protoreflect.FloatKind:
		return object{item("type", []string{"number", "string"}), item("format", f.Kind().String())} // "NaN", "Infinity"
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return object{item("type", "integer"), item("format", "int32")}
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return object{item("type", "integer"), item("format", "uint32"), item("minimum", 0)}
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return object{item("type", "string"), item("format", "int64"), item("pattern", `^-?\d+$`)}
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return object{item("type", "string"), item("format", "uint64"), item("pattern", `^\d+$`)}
	case protoreflect.EnumKind:
		return s.ref(f.Enum())
	case protoreflect.MessageKind:
		return s.ref(f.Message())
	}
	panic(fmt.Sprintf("%s has a kind that nobody thought of: %s", f.FullName(), f.Kind()))
}

// all gives the schemas in order of their names.
func (s *schemas) all() (o object) {
	names := make([]string, 0, len(s.made))
	for n := range s.made {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		o = append(o, item(n, s.made[n]))
	}
	return o
}
