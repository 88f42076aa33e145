package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers its codec
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/proto/inference"
)

// grpcCaller sends one request again and again over one connection.
type grpcCaller struct {
	connection *grpc.ClientConn
	request    []byte // encoded, once for all calls
	bytes      int
}

// encoded is a codec for requests that are bytes already: what a client needs
// to encode its tensors is not what is measured.
type encoded struct{}

func (encoded) Name() string { return "proto" }

func (encoded) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("a request is %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (encoded) Unmarshal(data mem.BufferSlice, v any) error {
	return encoding.GetCodecV2("proto").Unmarshal(data, v)
}

func newGRPC(l *Load, data []byte) (*grpcCaller, error) {
	connection, err := grpc.NewClient(l.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(encoded{})))
	if err != nil {
		return nil, err
	}
	request, err := proto.Marshal(&inference.ModelInferRequest{ModelName: l.Model,
		Inputs: []*inference.ModelInferRequest_InferInputTensor{
			{Name: l.Input.Name, Datatype: l.Input.Type.String(), Shape: l.Input.Shape}},
		RawInputContents: [][]byte{data}})
	if err != nil {
		return nil, err
	}
	return &grpcCaller{connection, request, l.Bytes}, nil
}

func (c *grpcCaller) call(ctx context.Context) error {
	var response inference.ModelInferResponse
	err := c.connection.Invoke(ctx, inference.GRPCInferenceService_ModelInfer_FullMethodName, c.request, &response)
	switch code := status.Code(err); code {
	case codes.OK:
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded:
		return fmt.Errorf("%w: %w", refusedError{code.String()}, err)
	default:
		return err
	}
	got := 0
	for _, b := range response.RawOutputContents {
		got += len(b)
	}
	return checkSize(got, c.bytes)
}

func (c *grpcCaller) close() { c.connection.Close() }

func checkSize(got, want int) error {
	if got != want {
		return fmt.Errorf("an answer with %d bytes of tensors, want %d", got, want)
	}
	return nil
}

const headerLength = "Inference-Header-Content-Length"

// restCaller sends one request again and again.
type restCaller struct {
	client *http.Client
	url    string
	header string // its length
	body   []byte
	bytes  int
}

func newREST(l *Load, data []byte) (*restCaller, error) {
	type object map[string]any
	header := object{
		"parameters": object{"binary_data_output": true},
		"inputs": []object{{"name": l.Input.Name, "datatype": l.Input.Type, "shape": l.Input.Shape,
			"parameters": object{"binary_data_size": len(data)}}},
	}
	head, err := json.Marshal(header)
	if err != nil {
		return nil, err
	}
	return &restCaller{
		client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: maxInFlight, DisableCompression: true}},
		url:    "http://" + l.Address + "/v2/models/" + l.Model + "/infer",
		header: strconv.Itoa(len(head)),
		body:   append(head, data...),
		bytes:  l.Bytes,
	}, nil
}

func (c *restCaller) call(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(c.body))
	if err != nil {
		return err
	}
	req.Header.Set(headerLength, c.header)
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusGatewayTimeout:
		return fmt.Errorf("%w: %s", refusedError{resp.Status}, body)
	default:
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	head, err := strconv.Atoi(resp.Header.Get(headerLength))
	if err != nil {
		return fmt.Errorf("an answer without binary tensors: %w", err)
	}
	return checkSize(len(body)-head, c.bytes)
}

func (c *restCaller) close() { c.client.CloseIdleConnections() }
