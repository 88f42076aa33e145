package rpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

var errWrong = errors.New("wrong request")

// reference makes of a decoded request what decodeRequest makes of its bytes.
func reference(q *inference.ModelInferRequest) (*oip.Request, error) {
	r := &oip.Request{Model: q.ModelName, ID: q.Id}
	if len(q.ModelName) > oip.MaxName || len(q.Inputs) > oip.MaxTensors || len(q.Outputs) > oip.MaxTensors || len(q.RawInputContents) > oip.MaxTensors {
		return nil, errWrong
	}
	if q.ModelVersion != "" {
		v, err := strconv.ParseInt(q.ModelVersion, 10, 64)
		if err != nil || v < 1 {
			return nil, errWrong
		}
		r.Version = v
	}
	priority, err := referenceInt(q.Parameters, "priority", math.MaxInt32)
	if err != nil {
		return nil, err
	}
	timeout, err := referenceInt(q.Parameters, "timeout", math.MaxInt64/1000)
	if err != nil {
		return nil, err
	}
	r.Priority, r.Timeout = int(priority), time.Duration(timeout)*time.Microsecond
	for _, key := range []string{"sequence_start", "sequence_end", "triton_enable_empty_final_response"} {
		if p, ok := q.Parameters[key]; ok {
			v, ok := p.GetParameterChoice().(*inference.InferParameter_BoolParam)
			if !ok || v.BoolParam && strings.HasPrefix(key, "sequence") {
				return nil, errWrong
			}
		}
	}
	if p, ok := q.Parameters["sequence_id"]; ok {
		switch v := p.GetParameterChoice().(type) {
		case *inference.InferParameter_Int64Param:
			ok = v.Int64Param == 0
		case *inference.InferParameter_Uint64Param:
			ok = v.Uint64Param == 0
		case *inference.InferParameter_StringParam:
			ok = v.StringParam == ""
		default:
			ok = false
		}
		if !ok {
			return nil, errWrong
		}
	}
	raw := q.RawInputContents
	for _, in := range q.Inputs {
		typ, err := tensor.ParseType(in.GetDatatype())
		if err != nil || len(in.GetShape()) > oip.MaxDims {
			return nil, errWrong
		}
		i := oip.Input{Tensor: tensor.Tensor{Name: in.GetName(), Type: typ, Shape: in.GetShape()}}
		if i.Memory, err = referenceMemory(in.GetParameters()); err != nil {
			return nil, err
		}
		switch {
		case in.GetContents() != nil && (i.Memory != nil || len(q.RawInputContents) > 0):
			return nil, errWrong
		case i.Memory != nil:
		case in.GetContents() != nil:
			if i.Data, err = referenceData(typ, in.GetShape(), in.Contents); err != nil {
				return nil, err
			}
		case len(raw) == 0:
			return nil, errWrong
		default:
			i.Data, raw = raw[0], raw[1:]
		}
		r.Inputs = append(r.Inputs, i)
	}
	if len(raw) > 0 {
		return nil, errWrong
	}
	for _, out := range q.Outputs {
		classes, err := referenceInt(out.GetParameters(), "classification", math.MaxInt32)
		if err != nil {
			return nil, err
		}
		memory, err := referenceMemory(out.GetParameters())
		if err != nil {
			return nil, err
		}
		r.Outputs = append(r.Outputs, oip.Output{Name: out.GetName(), Classes: int(classes), Memory: memory})
	}
	return r, nil
}

func referenceInt(parameters map[string]*parameter, key string, most uint64) (uint64, error) {
	p, ok := parameters[key]
	if !ok {
		return 0, nil
	}
	switch v := p.GetParameterChoice().(type) {
	case *inference.InferParameter_Int64Param:
		if v.Int64Param >= 0 && uint64(v.Int64Param) <= most {
			return uint64(v.Int64Param), nil
		}
	case *inference.InferParameter_Uint64Param:
		if v.Uint64Param <= most {
			return v.Uint64Param, nil
		}
	}
	return 0, errWrong
}

func referenceMemory(parameters map[string]*parameter) (*oip.Slice, error) {
	size, err := referenceInt(parameters, "shared_memory_byte_size", math.MaxInt64)
	if err != nil {
		return nil, err
	}
	offset, err := referenceInt(parameters, "shared_memory_offset", math.MaxInt64)
	if err != nil {
		return nil, err
	}
	_, hasSize := parameters["shared_memory_byte_size"]
	_, hasOffset := parameters["shared_memory_offset"]
	region, ok := parameters["shared_memory_region"]
	if !ok {
		if hasSize || hasOffset {
			return nil, errWrong
		}
		return nil, nil
	}
	name, ok := region.GetParameterChoice().(*inference.InferParameter_StringParam)
	if !ok || !hasSize {
		return nil, errWrong
	}
	return &oip.Slice{Region: name.StringParam, Offset: int64(offset), Size: int64(size)}, nil
}

// referenceData converts contents with the generated types.
func referenceData(typ tensor.Type, shape []int64, c *contents) ([]byte, error) {
	n, err := tensor.Elements(shape)
	if err != nil {
		return nil, err
	}
	var data []byte
	count := 0
	le := binary.LittleEndian
	switch typ {
	case tensor.Bool:
		for _, v := range c.BoolContents {
			b := byte(0)
			if v {
				b = 1
			}
			data = append(data, b)
		}
		count = len(c.BoolContents)
	case tensor.Int8, tensor.Int16, tensor.Int32:
		for _, v := range c.IntContents {
			switch typ {
			case tensor.Int8:
				if v != int32(int8(v)) {
					return nil, errWrong
				}
				data = append(data, byte(v))
			case tensor.Int16:
				if v != int32(int16(v)) {
					return nil, errWrong
				}
				data = le.AppendUint16(data, uint16(v))
			default:
				data = le.AppendUint32(data, uint32(v))
			}
		}
		count = len(c.IntContents)
	case tensor.Uint8, tensor.Uint16, tensor.Uint32:
		for _, v := range c.UintContents {
			switch typ {
			case tensor.Uint8:
				if v != uint32(uint8(v)) {
					return nil, errWrong
				}
				data = append(data, byte(v))
			case tensor.Uint16:
				if v != uint32(uint16(v)) {
					return nil, errWrong
				}
				data = le.AppendUint16(data, uint16(v))
			default:
				data = le.AppendUint32(data, v)
			}
		}
		count = len(c.UintContents)
	case tensor.Int64:
		for _, v := range c.Int64Contents {
			data = le.AppendUint64(data, uint64(v))
		}
		count = len(c.Int64Contents)
	case tensor.Uint64:
		for _, v := range c.Uint64Contents {
			data = le.AppendUint64(data, v)
		}
		count = len(c.Uint64Contents)
	case tensor.Float32:
		for _, v := range c.Fp32Contents {
			data = le.AppendUint32(data, math.Float32bits(v))
		}
		count = len(c.Fp32Contents)
	case tensor.Float64:
		for _, v := range c.Fp64Contents {
			data = le.AppendUint64(data, math.Float64bits(v))
		}
		count = len(c.Fp64Contents)
	case tensor.String:
		for _, v := range c.BytesContents {
			data = tensor.AppendString(data, v)
		}
		count = len(c.BytesContents)
	}
	all := len(c.BoolContents) + len(c.IntContents) + len(c.UintContents) + len(c.Int64Contents) + len(c.Uint64Contents) +
		len(c.Fp32Contents) + len(c.Fp64Contents) + len(c.BytesContents)
	if all != count || int64(count) != n {
		return nil, errWrong
	}
	return data, nil
}

// agree decodes bytes in both ways.
func agree(t *testing.T, data []byte) {
	t.Helper()
	q := new(inference.ModelInferRequest)
	malformed := proto.Unmarshal(data, q)
	s := share{server: oip.New(oip.Config{})}
	got, err := decodeRequest(t.Context(), data, &s)
	s.release()
	if malformed != nil {
		if err == nil {
			t.Fatalf("decoded what is malformed (%v): %+v", malformed, got)
		}
		return
	}
	want, wrong := reference(q)
	switch {
	case errors.Is(err, errMalformed):
		t.Fatalf("%v, and proto.Unmarshal decodes it", err)
	case (err != nil) != (wrong != nil):
		t.Fatalf("error %v, want %v", err, wrong)
	case err != nil:
		if oip.CodeOf(err) != oip.InvalidArgument && oip.CodeOf(err) != oip.Unsupported {
			t.Fatalf("error %v has code %d", err, oip.CodeOf(err))
		}
		return
	}
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.IgnoreFields(oip.Request{}, "Parameters", "Headers")); d != "" {
		t.Fatalf("-want +got:\n%s", d)
	}
	texts := map[string]string{}
	if got.Parameters != nil {
		texts = maps.Collect(got.Parameters.All())
	}
	for name, p := range q.Parameters {
		if p.GetParameterChoice() == nil {
			delete(texts, name) // it may have been there before, with a value
		}
	}
	if d := cmp.Diff(textsOf(q.Parameters), texts); d != "" {
		t.Fatalf("parameters: -want +got:\n%s", d)
	}
}

// textsOf are the values of parameters as oip.Values has them.
func textsOf(parameters map[string]*inference.InferParameter) map[string]string {
	texts := map[string]string{}
	for name, p := range parameters {
		switch v := p.GetParameterChoice().(type) {
		case *inference.InferParameter_BoolParam:
			texts[name] = fmt.Sprint(v.BoolParam)
		case *inference.InferParameter_Int64Param:
			texts[name] = fmt.Sprint(v.Int64Param)
		case *inference.InferParameter_Uint64Param:
			texts[name] = fmt.Sprint(v.Uint64Param)
		case *inference.InferParameter_DoubleParam:
			texts[name] = fmt.Sprint(v.DoubleParam)
		case *inference.InferParameter_StringParam:
			texts[name] = v.StringParam
		}
	}
	return texts
}

func seeds(t testing.TB) [][]byte {
	requests := []*inference.ModelInferRequest{
		{},
		rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{3}, Data: []byte{1, 2, 3}}, tensor.Tensor{Name: "y", Type: tensor.Float32}),
		{ModelName: "m", ModelVersion: "3", Parameters: map[string]*parameter{"priority": intParam(2), "timeout": uintParam(9), "sequence_id": textParam(""), "sequence_end": boolParam(false), "other": doubleParam(1), "none": {}},
			Outputs: []*outputTensor{{Name: "o", Parameters: map[string]*parameter{"classification": intParam(3)}}, {}}},
		{Inputs: []*inputTensor{{Name: "x", Datatype: "FP32", Shape: []int64{2, 2}, Parameters: map[string]*parameter{
			"shared_memory_region": textParam("r"), "shared_memory_byte_size": intParam(16), "shared_memory_offset": intParam(4)}}}},
		{ModelVersion: "-1", Id: "id"},
	}
	var all [][]byte
	for _, q := range requests {
		b, err := proto.Marshal(q)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	for _, e := range everyType {
		b, err := proto.Marshal(&inference.ModelInferRequest{Inputs: []*inputTensor{{Name: e.Name, Datatype: e.Type.String(), Shape: []int64{3}, Contents: e.contents}}})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	// Unpacked, in parts, with unknown fields, groups and wrong types between.
	var in, c []byte
	c = protowire.AppendVarint(protowire.AppendTag(c, 2, protowire.VarintType), 1)
	in = protowire.AppendString(protowire.AppendTag(in, 2, protowire.BytesType), "INT8")
	in = protowire.AppendVarint(protowire.AppendTag(in, 3, protowire.VarintType), 2)
	in = protowire.AppendBytes(protowire.AppendTag(in, 5, protowire.BytesType), c)
	in = protowire.AppendTag(protowire.AppendTag(in, 9, protowire.StartGroupType), 9, protowire.EndGroupType)
	in = protowire.AppendFixed32(protowire.AppendTag(in, 1, protowire.Fixed32Type), 7)
	in = protowire.AppendBytes(protowire.AppendTag(in, 5, protowire.BytesType), c)
	return append(all, protowire.AppendBytes(protowire.AppendTag(nil, 5, protowire.BytesType), in))
}

func FuzzDecodeRequest(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) { agree(t, data) })
}

// FuzzContents decodes any contents as those of an input of any type.
func FuzzContents(f *testing.F) {
	for i, e := range everyType {
		b, err := proto.Marshal(e.contents)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), int64(3), b)
	}
	f.Fuzz(func(t *testing.T, typ uint8, n int64, data []byte) {
		var in []byte
		in = protowire.AppendString(protowire.AppendTag(in, 2, protowire.BytesType), everyType[int(typ)%len(everyType)].Type.String())
		in = protowire.AppendVarint(protowire.AppendTag(in, 3, protowire.VarintType), uint64(n))
		in = protowire.AppendBytes(protowire.AppendTag(in, 5, protowire.BytesType), data)
		agree(t, protowire.AppendBytes(protowire.AppendTag(nil, 5, protowire.BytesType), in))
	})
}

// Bytes of the seeds, changed, cut and joined at random.
func TestDecodersAgree(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	all := seeds(t)
	for range 20000 {
		b := append([]byte{}, all[r.IntN(len(all))]...)
		if r.IntN(2) == 0 {
			b = append(b, all[r.IntN(len(all))]...)
		}
		for range r.IntN(4) {
			if len(b) > 0 {
				b[r.IntN(len(b))] = byte(r.Uint32())
			}
		}
		if r.IntN(4) == 0 {
			b = b[:r.IntN(len(b)+1)]
		}
		agree(t, b)
	}
}

func TestRawContentsAreNotCopied(t *testing.T) {
	data, err := proto.Marshal(rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{5000}, Data: bytesOf(5000)}))
	if err != nil {
		t.Fatal(err)
	}
	q, err := decodeRequest(t.Context(), data, &share{server: oip.New(oip.Config{})})
	if err != nil {
		t.Fatal(err)
	}
	first, last := uintptr(unsafe.Pointer(&data[0])), uintptr(unsafe.Pointer(&data[len(data)-1]))
	if at := uintptr(unsafe.Pointer(&q.Inputs[0].Data[0])); at < first || at > last {
		t.Error("the data are a copy")
	}
}
