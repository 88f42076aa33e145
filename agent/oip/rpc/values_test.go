package rpc

import (
	"context"
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/metadata"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/proto/inference"
)

func TestValues(t *testing.T) {
	var call oip.Call
	var parameters, headers, got map[string]string
	b := &echo{infer: func(_ context.Context, c oip.Call) (oip.Answer, error) {
		call, parameters, headers, got = c, nil, maps.Collect(c.Headers.All()), map[string]string{}
		if c.Parameters != nil {
			parameters = maps.Collect(c.Parameters.All())
			for _, name := range []string{"b", "i", "u", "d", "s", "none", "gone"} {
				if v, ok := c.Parameters.Get(name); ok {
					got[name] = v
				}
			}
		}
		for _, name := range []string{"x-user", "X-User", "x-gone"} {
			if v, ok := c.Headers.Get(name); ok {
				got[name] = v
			}
		}
		return oip.Answer{Model: "echo", Version: 2, Outputs: c.Inputs}, nil
	}}
	client := inference.NewGRPCInferenceServiceClient(serve(t, oip.Config{Backend: b}, nil))
	ctx := metadata.AppendToOutgoingContext(t.Context(), "X-User", "u", "x-user", "v")
	q := &inference.ModelInferRequest{ModelName: "echo", Inputs: []*inference.ModelInferRequest_InferInputTensor{{
		Name: "x", Datatype: "FP32", Shape: []int64{1, 2}, Contents: &inference.InferTensorContents{Fp32Contents: []float32{1, 2}},
	}}}
	if _, err := client.ModelInfer(ctx, q); err != nil {
		t.Fatal(err)
	}
	if call.Parameters != nil {
		t.Errorf("there are no parameters: %v", call.Parameters)
	}
	q.Parameters = map[string]*inference.InferParameter{
		"b": {ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}},
		"i": {ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: -3}},
		"u": {ParameterChoice: &inference.InferParameter_Uint64Param{Uint64Param: 1 << 63}},
		"d": {ParameterChoice: &inference.InferParameter_DoubleParam{DoubleParam: 0.25}},
		"s": {ParameterChoice: &inference.InferParameter_StringParam{StringParam: "ä"}}, "none": {},
	}
	if _, err := client.ModelInfer(ctx, q); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"b": "true", "i": "-3", "u": "9223372036854775808", "d": "0.25", "s": "ä"}
	if diff := cmp.Diff(want, parameters); diff != "" {
		t.Error(diff)
	}
	if headers["x-user"] != "u, v" || headers["content-type"] != "application/grpc" || headers[":authority"] != "" {
		t.Errorf("headers %v", headers)
	}
	want["x-user"], want["X-User"] = "u, v", "u, v"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
