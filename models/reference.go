package models

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/dunlin/dunlin/models/tensor"
)

// ReferenceFile is the path in a bundle of its reference.
const ReferenceFile = "reference.json"

// Limits of a reference.
const (
	MaxReferenceBytes = 16 << 20
	maxStringElement  = 1 << 20 // bytes of an element of text
)

// What a reference that gives no tolerance has.
const (
	defaultRelative = 1e-3
	defaultAbsolute = 1e-5
)

// Reference is what a model answers to some inputs. An element of an output is
// right that differs from the reference's by at most Absolute + Relative times
// that one's magnitude; integers, booleans and texts have to be the same.
type Reference struct {
	Inputs, Outputs    []tensor.Tensor // as the file orders them
	Relative, Absolute float64         // 0 or more
}

// ReadReference reads the reference of a bundle from its folder. The error is
// fs.ErrNotExist where it has none, and ErrInvalid where its content is wrong.
// Whether it fits the model is for Fits to say.
func ReadReference(dir string) (*Reference, error) {
	return readReference(filepath.Join(dir, ReferenceFile))
}

func readReference(path string) (*Reference, error) {
	f, _, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxReferenceBytes+1))
	if err != nil {
		return nil, err
	}
	return ParseReference(b)
}

// ParseReference reads a reference: tensors in the Open Inference Protocol's
// JSON form, {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2],
// "data": [0.5, 1]}], "outputs": [...], "tolerance": {"relative": 0.001,
// "absolute": 0.00001}}. Data is nested by the shape, or flat; other than in
// the protocol, it may be FP16 and BF16, to which numbers are rounded.
func ParseReference(b []byte) (*Reference, error) {
	if len(b) > MaxReferenceBytes {
		return nil, invalid("reference has more than %d bytes", MaxReferenceBytes)
	}
	var file struct {
		Inputs    []referenceTensor `json:"inputs"`
		Outputs   []referenceTensor `json:"outputs"`
		Tolerance struct {
			Relative *float64 `json:"relative"`
			Absolute *float64 `json:"absolute"`
		} `json:"tolerance"`
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields() // a tolerance by another name would be none
	if err := d.Decode(&file); err != nil {
		return nil, invalid("reference is not valid: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, invalid("reference has something after its end")
	}
	r := &Reference{Relative: defaultRelative, Absolute: defaultAbsolute}
	for _, t := range []struct {
		name     string
		from, to *float64
	}{{"relative", file.Tolerance.Relative, &r.Relative}, {"absolute", file.Tolerance.Absolute, &r.Absolute}} {
		if t.from == nil {
			continue
		}
		if *t.to = *t.from; *t.to < 0 || math.IsInf(*t.to, 0) {
			return nil, invalid("reference: tolerance.%s is %v, it must be 0 or more", t.name, *t.to)
		}
	}
	var err error
	if r.Inputs, err = decodeTensors("input", file.Inputs); err != nil {
		return nil, err
	}
	if r.Outputs, err = decodeTensors("output", file.Outputs); err != nil {
		return nil, err
	}
	if len(r.Outputs) == 0 {
		return nil, invalid("reference has no outputs")
	}
	return r, nil
}

// Fits says whether a reference is one of a model of these inputs and outputs:
// it gives all inputs, and one output or more.
func (r *Reference) Fits(inputs, outputs []tensor.Info) error {
	if err := fitAll("input", r.Inputs, inputs); err != nil {
		return err
	}
	for _, i := range inputs {
		if !slices.ContainsFunc(r.Inputs, func(t tensor.Tensor) bool { return t.Name == i.Name }) {
			return invalid("reference lacks input %q", shorten(i.Name))
		}
	}
	return fitAll("output", r.Outputs, outputs)
}

func fitAll(kind string, tensors []tensor.Tensor, infos []tensor.Info) error {
	for _, t := range tensors {
		i := slices.IndexFunc(infos, func(i tensor.Info) bool { return i.Name == t.Name })
		if i < 0 {
			return invalid("reference: the model has no %s %q", kind, shorten(t.Name))
		}
		info := infos[i]
		if t.Type != info.Type {
			return invalid("reference: %s %q is %s, the model's is %s", kind, shorten(t.Name), t.Type, info.Type)
		}
		same := len(t.Shape) == len(info.Shape)
		for d := 0; same && d < len(t.Shape); d++ {
			same = info.Shape[d] < 0 || t.Shape[d] == info.Shape[d]
		}
		if info.Shape != nil && !same {
			return invalid("reference: %s %q has shape %v, the model's is %v", kind, shorten(t.Name), t.Shape, info.Shape)
		}
	}
	return nil
}

// referenceTensor is one as the file writes it.
type referenceTensor struct {
	Name       string          `json:"name"`
	Datatype   string          `json:"datatype"`
	Shape      []int64         `json:"shape"`
	Data       json.RawMessage `json:"data"`
	Parameters json.RawMessage `json:"parameters"` // of a request that was kept; they mean nothing here
}

func decodeTensors(kind string, from []referenceTensor) ([]tensor.Tensor, error) {
	if len(from) > maxValues {
		return nil, invalid("reference has %d %ss, allowed are %d", len(from), kind, maxValues)
	}
	all := make([]tensor.Tensor, 0, len(from))
	for _, f := range from {
		fail := func(format string, args ...any) error {
			return invalid("reference: %s %q %s", kind, shorten(f.Name), fmt.Sprintf(format, args...))
		}
		if err := checkString(kind, f.Name); err != nil {
			return nil, fmt.Errorf("reference: %w", err)
		}
		if slices.ContainsFunc(all, func(t tensor.Tensor) bool { return t.Name == f.Name }) {
			return nil, fail("is there twice")
		}
		typ, err := tensor.ParseType(f.Datatype)
		if err != nil {
			return nil, fail("has datatype %q, which is none", shorten(f.Datatype))
		}
		if len(f.Shape) > maxRank {
			return nil, fail("has %d dimensions, allowed are %d", len(f.Shape), maxRank)
		}
		n, err := tensor.Elements(f.Shape)
		if err != nil {
			return nil, fail("has shape %v, which is none", f.Shape)
		}
		// Each element takes two bytes of the file: one, and what parts it from
		// the next.
		if n > int64(len(f.Data)+1)/2 {
			return nil, fail("has shape %v of %d elements, its data has fewer", f.Shape, n)
		}
		t := tensor.Tensor{Name: f.Name, Type: typ, Shape: f.Shape, Data: make([]byte, 0, n*int64(typ.Size()))}
		if t.Shape == nil {
			t.Shape = []int64{}
		}
		count, err := decodeData(&t, f.Data)
		if err != nil {
			return nil, fail("%v", err)
		}
		if count != n {
			return nil, fail("has %d elements, its shape %v needs %d", count, f.Shape, n)
		}
		all = append(all, t)
	}
	return all, nil
}

// decodeData appends the elements of a JSON array, nested or flat, or of a
// single value, and counts them.
func decodeData(t *tensor.Tensor, data json.RawMessage) (n int64, err error) {
	if len(data) == 0 {
		return 0, errors.New("has no data")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	for depth := 0; ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return n, nil
		} else if err != nil {
			return n, err
		}
		if delim, ok := token.(json.Delim); ok {
			switch delim {
			case '[':
				if depth++; depth > max(len(t.Shape), 1) {
					return n, fmt.Errorf("nests its data deeper than its %d dimensions", len(t.Shape))
				}
			case ']':
				depth--
			default:
				return n, errors.New("has an object in its data")
			}
			continue
		}
		if t.Data, err = appendElement(t.Data, t.Type, token); err != nil {
			return n, fmt.Errorf("element %d: %w", n, err)
		}
		n++
	}
}

// appendElement appends a JSON value as an element of a type.
func appendElement(data []byte, typ tensor.Type, value json.Token) ([]byte, error) {
	wrong := func() ([]byte, error) {
		return data, fmt.Errorf("%s is no %s", shorten(fmt.Sprintf("%v", value)), typ)
	}
	switch typ {
	case tensor.Bool:
		b, ok := value.(bool)
		if !ok {
			return wrong()
		}
		if b {
			return append(data, 1), nil
		}
		return append(data, 0), nil
	case tensor.String:
		s, ok := value.(string)
		if !ok {
			return wrong()
		}
		if len(s) > maxStringElement {
			return data, fmt.Errorf("has %d bytes, allowed are %d", len(s), maxStringElement)
		}
		return tensor.AppendString(data, []byte(s)), nil
	}
	number, ok := value.(json.Number)
	if !ok {
		return wrong()
	}
	bits := 8 * typ.Size()
	var raw uint64
	switch typ {
	case tensor.Float32, tensor.Float64, tensor.Float16, tensor.BFloat16:
		width := 64 // rounded once
		if typ == tensor.Float32 {
			width = 32
		}
		v, err := strconv.ParseFloat(number.String(), width)
		if err != nil {
			return wrong()
		}
		switch typ {
		case tensor.Float32:
			raw = uint64(math.Float32bits(float32(v)))
		case tensor.Float64:
			raw = math.Float64bits(v)
		case tensor.Float16:
			raw, ok = half(v)
		case tensor.BFloat16:
			raw, ok = brain(v)
		}
		if !ok {
			return wrong()
		}
	case tensor.Int8, tensor.Int16, tensor.Int32, tensor.Int64:
		v, err := strconv.ParseInt(number.String(), 10, bits)
		if err != nil {
			return wrong()
		}
		raw = uint64(v)
	default:
		v, err := strconv.ParseUint(number.String(), 10, bits)
		if err != nil {
			return wrong()
		}
		raw = v
	}
	var element [8]byte
	binary.LittleEndian.PutUint64(element[:], raw)
	return append(data, element[:typ.Size()]...), nil
}

// half rounds to the next FP16 number, to the even one of two; false where
// that would be infinite.
func half(v float64) (bits uint64, ok bool) {
	if math.Signbit(v) {
		bits, v = 1<<15, -v
	}
	_, exponent := math.Frexp(v)
	exponent = max(exponent-1, -14) // below, numbers are as far apart as there
	// A number is so many steps; the step below 1 of an exponent is its 11th bit.
	steps := math.RoundToEven(math.Ldexp(v, 10-exponent))
	if steps >= 2048 {
		steps, exponent = steps/2, exponent+1
	}
	if exponent > 15 {
		return 0, false
	}
	if steps < 1024 {
		return bits | uint64(steps), true
	}
	return bits | uint64(exponent+15)<<10 | uint64(steps-1024), true
}

// brain does what half does for BF16.
func brain(v float64) (bits uint64, ok bool) {
	single := uint64(math.Float32bits(float32(v)))
	single += 0x7fff + single>>16&1
	return single >> 16, single>>23&0xff != 0xff
}
