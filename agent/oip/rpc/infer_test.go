package rpc

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

type (
	inputTensor  = inference.ModelInferRequest_InferInputTensor
	outputTensor = inference.ModelInferRequest_InferRequestedOutputTensor
	contents     = inference.InferTensorContents
	parameter    = inference.InferParameter
)

func intParam(v int64) *parameter {
	return &parameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: v}}
}

func uintParam(v uint64) *parameter {
	return &parameter{ParameterChoice: &inference.InferParameter_Uint64Param{Uint64Param: v}}
}

func textParam(v string) *parameter {
	return &parameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: v}}
}

func boolParam(v bool) *parameter {
	return &parameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: v}}
}

func doubleParam(v float64) *parameter {
	return &parameter{ParameterChoice: &inference.InferParameter_DoubleParam{DoubleParam: v}}
}

// everyType are tensors with three elements, with the contents that hold the
// same; nil where none can.
var everyType = []struct {
	tensor.Tensor
	contents *contents
}{
	{tensor.Tensor{Name: "bool", Type: tensor.Bool, Data: []byte{1, 0, 1}}, &contents{BoolContents: []bool{true, false, true}}},
	{tensor.Tensor{Name: "int8", Type: tensor.Int8, Data: []byte{0x80, 0xff, 0x7f}}, &contents{IntContents: []int32{-128, -1, 127}}},
	{tensor.Tensor{Name: "int16", Type: tensor.Int16, Data: []byte{0, 0x80, 0xff, 0xff, 0xff, 0x7f}}, &contents{IntContents: []int32{math.MinInt16, -1, math.MaxInt16}}},
	{tensor.Tensor{Name: "int32", Type: tensor.Int32, Data: []byte{0, 0, 0, 0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}}, &contents{IntContents: []int32{math.MinInt32, -1, math.MaxInt32}}},
	{tensor.Tensor{Name: "int64", Type: tensor.Int64, Data: append(append(bytes.Repeat([]byte{0xff}, 8), 0, 0, 0, 0, 0, 0, 0, 0x80), 1, 0, 0, 0, 0, 0, 0, 0)}, &contents{Int64Contents: []int64{-1, math.MinInt64, 1}}},
	{tensor.Tensor{Name: "uint8", Type: tensor.Uint8, Data: []byte{0, 1, 255}}, &contents{UintContents: []uint32{0, 1, 255}}},
	{tensor.Tensor{Name: "uint16", Type: tensor.Uint16, Data: []byte{0, 0, 1, 0, 255, 255}}, &contents{UintContents: []uint32{0, 1, math.MaxUint16}}},
	{tensor.Tensor{Name: "uint32", Type: tensor.Uint32, Data: []byte{0, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255}}, &contents{UintContents: []uint32{0, 1, math.MaxUint32}}},
	{tensor.Tensor{Name: "uint64", Type: tensor.Uint64, Data: append(append(bytes.Repeat([]byte{0xff}, 8), make([]byte, 8)...), 2, 1, 0, 0, 0, 0, 0, 0)}, &contents{Uint64Contents: []uint64{math.MaxUint64, 0, 258}}},
	{tensor.Tensor{Name: "fp16", Type: tensor.Float16, Data: []byte{1, 2, 3, 4, 5, 6}}, nil},
	{tensor.Tensor{Name: "bf16", Type: tensor.BFloat16, Data: []byte{1, 2, 3, 4, 5, 6}}, nil},
	{tensor.Tensor{Name: "fp32", Type: tensor.Float32, Data: []byte{0, 0, 0x80, 0x3f, 0, 0, 0x80, 0xff, 1, 0, 0xc0, 0x7f}},
		&contents{Fp32Contents: []float32{1, float32(math.Inf(-1)), math.Float32frombits(0x7fc00001)}}},
	{tensor.Tensor{Name: "fp64", Type: tensor.Float64, Data: append(append(make([]byte, 8), 0, 0, 0, 0, 0, 0, 0xf0, 0x3f), 1, 0, 0, 0, 0, 0, 0xf8, 0x7f)},
		&contents{Fp64Contents: []float64{0, 1, math.Float64frombits(0x7ff8000000000001)}}},
	{tensor.Tensor{Name: "bytes", Type: tensor.String, Data: []byte{1, 0, 0, 0, 'a', 0, 0, 0, 0, 2, 0, 0, 0, 0xff, 0}}, &contents{BytesContents: [][]byte{{'a'}, {}, {0xff, 0}}}},
}

// wantEcho checks an answer of the echo model.
func wantEcho(t *testing.T, p *inference.ModelInferResponse, want []tensor.Tensor) {
	t.Helper()
	if p.ModelName != "echo" || p.ModelVersion != "2" || p.Id != "7" {
		t.Errorf("answer is of model %q, version %q, id %q", p.ModelName, p.ModelVersion, p.Id)
	}
	if len(p.Outputs) != len(want) || len(p.RawOutputContents) != len(want) {
		t.Fatalf("got %d outputs and %d raw contents, want %d", len(p.Outputs), len(p.RawOutputContents), len(want))
	}
	for i, w := range want {
		o := p.Outputs[i]
		if o.Name != w.Name || o.Datatype != w.Type.String() || !slices.Equal(o.Shape, w.Shape) || o.Contents != nil {
			t.Errorf("output %d is %v, want %s %s %v", i, o, w.Name, w.Type, w.Shape)
		}
		if !bytes.Equal(p.RawOutputContents[i], w.Data) {
			t.Errorf("output %q: got % x, want % x", w.Name, p.RawOutputContents[i], w.Data)
		}
	}
}

func TestEveryTypeRaw(t *testing.T) {
	c := client(t, &echo{})
	var all []tensor.Tensor
	for _, e := range everyType {
		three := e.Tensor
		three.Shape = []int64{3, 1}
		scalar := tensor.Tensor{Name: e.Name + "-scalar", Type: e.Type, Shape: []int64{}, Data: e.Data[:len(e.Data)/3]}
		none := tensor.Tensor{Name: e.Name + "-none", Type: e.Type, Shape: []int64{2, 0}}
		all = append(all, three, scalar, none)
	}
	p, err := c.ModelInfer(t.Context(), rawRequest(all...))
	if err != nil {
		t.Fatal(err)
	}
	wantEcho(t, p, all)
}

func TestEveryTypeInContents(t *testing.T) {
	c := client(t, &echo{})
	q := &inference.ModelInferRequest{ModelName: "echo", Id: "7"}
	var want []tensor.Tensor
	for _, e := range everyType {
		w := e.Tensor
		w.Shape = []int64{1, 3}
		if e.contents == nil {
			w.Shape, w.Data, e.contents = []int64{0}, nil, &contents{}
		}
		want = append(want, w)
		q.Inputs = append(q.Inputs, &inputTensor{Name: w.Name, Datatype: w.Type.String(), Shape: w.Shape, Contents: e.contents})
	}
	p, err := c.ModelInfer(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	wantEcho(t, p, want)
}

// floats is an input of two FP32 in contents, changed by f.
func floats(f func(*inputTensor, *inference.ModelInferRequest)) *inference.ModelInferRequest {
	in := &inputTensor{Name: "x", Datatype: "FP32", Shape: []int64{2}, Contents: &contents{Fp32Contents: []float32{1, 2}}}
	q := &inference.ModelInferRequest{ModelName: "echo", Inputs: []*inputTensor{in}}
	f(in, q)
	return q
}

func TestWrongInput(t *testing.T) {
	with := func(key string, p *parameter) *inference.ModelInferRequest {
		return floats(func(_ *inputTensor, q *inference.ModelInferRequest) { q.Parameters = map[string]*parameter{key: p} })
	}
	input := func(f func(*inputTensor)) *inference.ModelInferRequest {
		return floats(func(in *inputTensor, _ *inference.ModelInferRequest) { f(in) })
	}
	whole := func(f func(*inference.ModelInferRequest)) *inference.ModelInferRequest {
		return floats(func(_ *inputTensor, q *inference.ModelInferRequest) { f(q) })
	}
	output := func(p map[string]*parameter) *inference.ModelInferRequest {
		return whole(func(q *inference.ModelInferRequest) { q.Outputs = []*outputTensor{{Name: "x", Parameters: p}} })
	}
	typed := func(datatype string, c *contents) *inference.ModelInferRequest {
		return input(func(in *inputTensor) { in.Datatype, in.Contents = datatype, c })
	}
	tests := []struct {
		name    string
		request *inference.ModelInferRequest
		code    codes.Code
		message string // parts of it, separated by |
	}{
		{"unknown model", whole(func(q *inference.ModelInferRequest) { q.ModelName = "other" }), codes.NotFound, "other"},
		{"no model", whole(func(q *inference.ModelInferRequest) { q.ModelName = "" }), codes.InvalidArgument, "model"},
		{"long model", whole(func(q *inference.ModelInferRequest) { q.ModelName = strings.Repeat("m", 2000) }), codes.InvalidArgument, "model_name|2000|1024"},
		{"version", whole(func(q *inference.ModelInferRequest) { q.ModelVersion = "newest" }), codes.InvalidArgument, "version|newest"},
		{"version 0", whole(func(q *inference.ModelInferRequest) { q.ModelVersion = "0" }), codes.InvalidArgument, `version "0"`},
		{"unknown version", whole(func(q *inference.ModelInferRequest) { q.ModelVersion = "9" }), codes.NotFound, "9"},
		{"datatype", input(func(in *inputTensor) { in.Datatype = "FP33" }), codes.InvalidArgument, "inputs[0]|datatype|FP33"},
		{"no datatype", input(func(in *inputTensor) { in.Datatype = "" }), codes.InvalidArgument, "inputs[0]|datatype"},
		{"no name", input(func(in *inputTensor) { in.Name = "" }), codes.InvalidArgument, "inputs[0]|name"},
		{"negative dimension", input(func(in *inputTensor) { in.Shape = []int64{-1} }), codes.InvalidArgument, "inputs[0]|shape|-1"},
		{"overflow", input(func(in *inputTensor) { in.Shape = []int64{1 << 40, 1 << 40} }), codes.InvalidArgument, "inputs[0]|shape"},
		{"many dimensions", input(func(in *inputTensor) { in.Shape = make([]int64, 33) }), codes.InvalidArgument, "inputs[0]|shape|32"},
		{"too few elements", input(func(in *inputTensor) { in.Shape = []int64{3} }), codes.InvalidArgument, "inputs[0]|x|2 elements|needs 3"},
		{"too many elements", input(func(in *inputTensor) { in.Shape = []int64{1} }), codes.InvalidArgument, "2 elements|needs 1"},
		{"wrong contents", typed("INT64", &contents{IntContents: []int32{1, 2}}), codes.InvalidArgument, "int_contents|INT64|int64_contents"},
		{"two contents", typed("FP32", &contents{Fp32Contents: []float32{1, 2}, BoolContents: []bool{true}}), codes.InvalidArgument, "bool_contents|FP32|fp32_contents"},
		{"contents for FP16", typed("FP16", &contents{Fp32Contents: []float32{1, 2}}), codes.InvalidArgument, "FP16|raw_input_contents"},
		{"empty contents for BF16", typed("BF16", &contents{}), codes.InvalidArgument, "BF16|raw_input_contents"},
		{"INT8 too large", typed("INT8", &contents{IntContents: []int32{1, 128}}), codes.InvalidArgument, "int_contents[1]|128|127"},
		{"INT8 too small", typed("INT8", &contents{IntContents: []int32{-129, 0}}), codes.InvalidArgument, "int_contents[0]|-129|-128"},
		{"INT16 too large", typed("INT16", &contents{IntContents: []int32{0, 32768}}), codes.InvalidArgument, "int_contents[1]|32768"},
		{"UINT8 too large", typed("UINT8", &contents{UintContents: []uint32{0, 256}}), codes.InvalidArgument, "uint_contents[1]|256|255"},
		{"UINT16 too large", typed("UINT16", &contents{UintContents: []uint32{65536, 0}}), codes.InvalidArgument, "uint_contents[0]|65536"},
		{"no data", input(func(in *inputTensor) { in.Contents = nil }), codes.InvalidArgument, "inputs[0]|x|no data"},
		{"raw and contents", whole(func(q *inference.ModelInferRequest) { q.RawInputContents = [][]byte{make([]byte, 8)} }), codes.InvalidArgument, "inputs[0]|contents|raw_input_contents"},
		{"too much raw", floats(func(in *inputTensor, q *inference.ModelInferRequest) {
			in.Contents, q.RawInputContents = nil, [][]byte{make([]byte, 8), {1}}
		}), codes.InvalidArgument, "raw_input_contents|2 entries|need 1"},
		{"raw too short", floats(func(in *inputTensor, q *inference.ModelInferRequest) {
			in.Contents, q.RawInputContents = nil, [][]byte{make([]byte, 7)}
		}), codes.InvalidArgument, "x|7 bytes|8"},
		{"many inputs", whole(func(q *inference.ModelInferRequest) { q.Inputs = make([]*inputTensor, 1025) }), codes.InvalidArgument, "inputs"},
		{"many outputs", whole(func(q *inference.ModelInferRequest) {
			for range 1025 {
				q.Outputs = append(q.Outputs, &outputTensor{Name: "x"})
			}
		}), codes.InvalidArgument, "1024 outputs"},
		{"much raw", whole(func(q *inference.ModelInferRequest) { q.RawInputContents = make([][]byte, 1025) }), codes.InvalidArgument, "raw_input_contents|1024"},
		{"no output name", whole(func(q *inference.ModelInferRequest) { q.Outputs = []*outputTensor{{}} }), codes.InvalidArgument, "outputs[0]|name"},
		{"priority kind", with("priority", textParam("high")), codes.InvalidArgument, "priority|string_param|int64_param"},
		{"priority without kind", with("priority", &parameter{}), codes.InvalidArgument, "priority|nothing"},
		{"negative priority", with("priority", intParam(-1)), codes.InvalidArgument, "priority|-1"},
		{"large priority", with("priority", uintParam(math.MaxUint64)), codes.InvalidArgument, "priority|18446744073709551615"},
		{"timeout kind", with("timeout", doubleParam(1.5)), codes.InvalidArgument, "timeout|double_param"},
		{"negative timeout", with("timeout", intParam(-1)), codes.InvalidArgument, "timeout|-1"},
		{"large timeout", with("timeout", intParam(math.MaxInt64)), codes.InvalidArgument, "timeout"},
		{"sequence", with("sequence_id", intParam(4)), codes.Unimplemented, "sequence"},
		{"named sequence", with("sequence_id", textParam("s")), codes.Unimplemented, "sequence"},
		{"sequence start", with("sequence_start", boolParam(true)), codes.Unimplemented, "sequence"},
		{"sequence end", with("sequence_end", boolParam(true)), codes.Unimplemented, "sequence"},
		{"sequence kind", with("sequence_id", boolParam(true)), codes.InvalidArgument, "sequence_id|bool_param"},
		{"sequence start kind", with("sequence_start", intParam(1)), codes.InvalidArgument, "sequence_start|int64_param"},
		{"empty final kind", with("triton_enable_empty_final_response", intParam(1)), codes.InvalidArgument, "triton_enable_empty_final_response"},
		{"classification kind", output(map[string]*parameter{"classification": textParam("1")}), codes.InvalidArgument, "outputs[0]|classification|string_param"},
		{"negative classification", output(map[string]*parameter{"classification": intParam(-2)}), codes.InvalidArgument, "outputs[0]|classification|-2"},
		{"region kind", output(map[string]*parameter{"shared_memory_region": intParam(1)}), codes.InvalidArgument, "outputs[0]|shared_memory_region|int64_param"},
		{"region without size", output(map[string]*parameter{"shared_memory_region": textParam("r")}), codes.InvalidArgument, "outputs[0]|shared_memory_byte_size"},
		{"size without region", output(map[string]*parameter{"shared_memory_byte_size": intParam(1)}), codes.InvalidArgument, "outputs[0]|shared_memory_region"},
		{"offset without region", output(map[string]*parameter{"shared_memory_offset": intParam(1)}), codes.InvalidArgument, "outputs[0]|shared_memory_region"},
		{"negative offset", output(map[string]*parameter{"shared_memory_region": textParam("r"), "shared_memory_byte_size": intParam(1), "shared_memory_offset": intParam(-1)}), codes.InvalidArgument, "outputs[0]|shared_memory_offset|-1"},
		{"memory and contents", input(func(in *inputTensor) {
			in.Parameters = map[string]*parameter{"shared_memory_region": textParam("r"), "shared_memory_byte_size": intParam(8)}
		}), codes.InvalidArgument, "inputs[0]|contents|shared memory"},
		{"memory that is off", input(func(in *inputTensor) {
			in.Contents = nil
			in.Parameters = map[string]*parameter{"shared_memory_region": textParam("r"), "shared_memory_byte_size": intParam(8)}
		}), codes.Unimplemented, "inputs[0]|shared memory"},
	}
	b := &echo{}
	c := client(t, b)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := c.ModelInfer(t.Context(), test.request)
			wantCode(t, err, test.code)
			for part := range strings.SplitSeq(test.message, "|") {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
	if b.made.Load() != 0 {
		t.Errorf("%d wrong requests were answered", b.made.Load())
	}
}

func TestParameters(t *testing.T) {
	var got oip.Call
	b := &echo{}
	b.infer = func(_ context.Context, c oip.Call) (oip.Answer, error) {
		got = c
		return b.answer(c), nil
	}
	c := client(t, b)
	q := floats(func(in *inputTensor, q *inference.ModelInferRequest) {
		in.Shape = []int64{1, 2}
		q.ModelVersion = "2"
		q.Parameters = map[string]*parameter{
			"priority": uintParam(3), "timeout": intParam(1500), "sequence_id": intParam(0), "sequence_start": boolParam(false),
			"binary_data": boolParam(true), "other": doubleParam(1), "more": {}, "triton_enable_empty_final_response": boolParam(true),
		}
		q.Outputs = []*outputTensor{{Name: "x", Parameters: map[string]*parameter{"classification": intParam(1), "binary_data": boolParam(true)}}}
	})
	p, err := c.ModelInfer(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	if got.Priority != 3 || got.Timeout != 1500*time.Microsecond || got.Version != 2 || len(got.Outputs) != 1 {
		t.Errorf("the backend got %+v", got)
	}
	if o := p.Outputs[0]; o.Datatype != "BYTES" || !bytes.Contains(p.RawOutputContents[0], []byte(":1:dog")) {
		t.Errorf("got %v, % x; want the class dog", o, p.RawOutputContents[0])
	}
}

func TestHeader(t *testing.T) {
	c := client(t, &echo{header: map[string]string{"Dunlin-Generation": "a/7"}})
	var md metadata.MD
	if _, err := c.ModelInfer(t.Context(), floats(func(*inputTensor, *inference.ModelInferRequest) {}), grpc.Header(&md)); err != nil {
		t.Fatal(err)
	}
	if v := md.Get("dunlin-generation"); len(v) != 1 || v[0] != "a/7" {
		t.Errorf("metadata is %v", md)
	}
}

func TestErrors(t *testing.T) {
	tests := []struct {
		err  error
		want codes.Code
	}{
		{errors.New("broken"), codes.Internal},
		{oip.Errorf(oip.InvalidArgument, "bad"), codes.InvalidArgument},
		{oip.Errorf(oip.Cancelled, "gone"), codes.Canceled},
		{oip.Errorf(oip.NotReady, "not yet"), codes.Unavailable},
		{oip.Errorf(oip.Unauthenticated, "who"), codes.Unauthenticated},
		{oip.Errorf(oip.Forbidden, "no"), codes.PermissionDenied},
		{oip.Errorf(oip.NotFound, "nothing"), codes.NotFound},
		{oip.Errorf(oip.NotAllowed, "how"), codes.Unimplemented},
		{oip.Errorf(oip.TooLarge, "large"), codes.ResourceExhausted},
		{oip.Errorf(oip.Unsupported, "no such thing"), codes.Unimplemented},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{&oip.Error{Code: oip.Unavailable, Err: errors.New("full"), RetryAfter: 1200 * time.Millisecond}, codes.Unavailable},
		{&oip.Error{Code: oip.Expired, Err: errors.New("late"), RetryAfter: time.Microsecond}, codes.DeadlineExceeded},
		{errors.New(strings.Repeat("x", 1<<20) + "\xff"), codes.Internal},
	}
	b := &echo{}
	c := client(t, b)
	for _, test := range tests {
		b.infer = func(context.Context, oip.Call) (oip.Answer, error) { return oip.Answer{}, test.err }
		var trailer metadata.MD
		_, err := c.ModelInfer(t.Context(), floats(func(*inputTensor, *inference.ModelInferRequest) {}), grpc.Trailer(&trailer))
		wantCode(t, err, test.want)
		if e, ok := errors.AsType[*oip.Error](test.err); ok && e.RetryAfter > 0 {
			details := status.Convert(err).Details()
			info, ok := details[0].(*errdetails.RetryInfo)
			if !ok || info.RetryDelay.AsDuration() != e.RetryAfter {
				t.Errorf("%v: details are %v", test.err, details)
			}
			want := map[time.Duration]string{1200 * time.Millisecond: "1200", time.Microsecond: "1"}[e.RetryAfter]
			if v := trailer.Get("grpc-retry-pushback-ms"); len(v) != 1 || v[0] != want {
				t.Errorf("%v: trailer is %v", test.err, trailer)
			}
		}
	}
}

// A client with a retry policy does what the trailer asks for.
func TestClientsRetryWhenTold(t *testing.T) {
	b := &echo{}
	calls := 0
	b.infer = func(_ context.Context, c oip.Call) (oip.Answer, error) {
		if calls++; calls == 1 {
			return oip.Answer{}, &oip.Error{Code: oip.Unavailable, Err: errors.New("full"), RetryAfter: 5 * time.Millisecond}
		}
		return b.answer(c), nil
	}
	conn := serve(t, oip.Config{Backend: b}, nil, grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{}], "retryPolicy": {
		"maxAttempts": 2, "initialBackoff": "600s", "maxBackoff": "600s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := inference.NewGRPCInferenceServiceClient(conn).ModelInfer(ctx, floats(func(*inputTensor, *inference.ModelInferRequest) {}))
	if err != nil || calls != 2 {
		t.Errorf("after %d calls: %v", calls, err)
	}
}

func TestDeadlineAndCancellationReachTheBackend(t *testing.T) {
	b := &echo{}
	ended := make(chan error, 1)
	began := make(chan bool, 1)
	b.infer = func(ctx context.Context, _ oip.Call) (oip.Answer, error) {
		_, has := ctx.Deadline()
		began <- has
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return oip.Answer{}, ctx.Err()
	}
	c := client(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.ModelInfer(ctx, floats(func(*inputTensor, *inference.ModelInferRequest) {}))
	wantCode(t, err, codes.DeadlineExceeded)
	if !<-began {
		t.Error("the backend saw no deadline")
	}
	if err := <-ended; !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		<-began
		cancel()
	}()
	_, err = c.ModelInfer(ctx, floats(func(*inputTensor, *inference.ModelInferRequest) {}))
	wantCode(t, err, codes.Canceled)
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
