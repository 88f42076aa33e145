package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// numbered is a request with an id and one byte of data.
func numbered(n int) *inference.ModelInferRequest {
	q := rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{1}, Data: []byte{byte(n)}})
	q.Id = strconv.Itoa(n)
	return q
}

func openStream(t testing.TB, ctx context.Context, b *echo) inference.GRPCInferenceService_ModelStreamInferClient {
	t.Helper()
	stream, err := client(t, b).ModelStreamInfer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func TestStreamKeepsTheOrder(t *testing.T) {
	const n = 10
	var gates [n]chan struct{}
	for i := range gates {
		gates[i] = make(chan struct{})
	}
	b := &echo{header: map[string]string{"dunlin-generation": "a/7"}}
	began := make(chan int, n)
	b.infer = func(_ context.Context, c oip.Call) (oip.Answer, error) {
		i := int(c.Inputs[0].Data[0])
		began <- i
		<-gates[i]
		return b.answer(c), nil
	}
	stream := openStream(t, t.Context(), b)
	for i := range n {
		if err := stream.Send(numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for range n { // they are worked on at the same time
		<-began
	}
	for i := n - 1; i >= 0; i-- { // and end in the opposite order
		close(gates[i])
	}
	for i := range n {
		p, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		r := p.InferResponse
		if p.ErrorMessage != "" || r.Id != strconv.Itoa(i) || r.RawOutputContents[0][0] != byte(i) {
			t.Errorf("answer %d is %v", i, p)
		}
		if v, ok := r.Parameters["triton_final_response"].GetParameterChoice().(*inference.InferParameter_BoolParam); !ok || !v.BoolParam {
			t.Errorf("parameters are %v, want triton_final_response", r.Parameters)
		}
		if v := r.Parameters["dunlin-generation"].GetStringParam(); v != "a/7" {
			t.Errorf("parameters are %v, want the header of the answer", r.Parameters)
		}
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v", err)
	}
	until(t, "all is released", func() bool { return b.released.Load() == n })
}

func TestStreamStaysOpenAfterErrors(t *testing.T) {
	b := &echo{}
	stream := openStream(t, t.Context(), b)
	unknown := numbered(1)
	unknown.ModelName = "other"
	wrong := numbered(2)
	wrong.Inputs[0].Shape = []int64{2}
	for _, q := range []*inference.ModelInferRequest{numbered(0), unknown, wrong, numbered(3)} {
		if err := stream.Send(q); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{"", `no model "other"`, "inputs[0]", ""} {
		p, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if p.InferResponse.GetId() != strconv.Itoa(i) || !strings.Contains(p.ErrorMessage, want) || (want == "") != (p.ErrorMessage == "") {
			t.Errorf("answer %d is %v, want error %q", i, p, want)
		}
		if !p.InferResponse.Parameters["triton_final_response"].GetBoolParam() {
			t.Errorf("answer %d is not final", i)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v", err)
	}
}

func TestStreamEndsWithTheFirstErrorWhereAskedTo(t *testing.T) {
	ctx := metadata.AppendToOutgoingContext(t.Context(), "triton_grpc_error", "true")
	stream := openStream(t, ctx, &echo{})
	unknown := numbered(1)
	unknown.ModelName = "other"
	for _, q := range []*inference.ModelInferRequest{numbered(0), unknown, numbered(2)} {
		if err := stream.Send(q); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	if p, err := stream.Recv(); err != nil || p.InferResponse.Id != "0" {
		t.Fatalf("got %v, %v", p, err)
	}
	_, err := stream.Recv()
	wantCode(t, err, codes.NotFound)
}

func TestStreamBoundsWhatItWorksOn(t *testing.T) {
	b := &echo{}
	gate := make(chan struct{})
	var at, most atomic.Int64
	began := make(chan struct{}, 1000)
	b.infer = func(_ context.Context, c oip.Call) (oip.Answer, error) {
		n := at.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		began <- struct{}{}
		<-gate
		at.Add(-1)
		return b.answer(c), nil
	}
	stream := openStream(t, t.Context(), b)
	const n = 3 * maxPipelined
	for i := range n {
		if err := stream.Send(numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	for range maxPipelined {
		<-began
	}
	close(gate)
	for i := range n {
		if p, err := stream.Recv(); err != nil || p.InferResponse.Id != strconv.Itoa(i) {
			t.Fatalf("answer %d is %v, %v", i, p, err)
		}
	}
	if most.Load() != maxPipelined {
		t.Errorf("%d requests at a time, want %d", most.Load(), maxPipelined)
	}
}

func TestStreamOfAClientThatGoesAway(t *testing.T) {
	b := &echo{}
	began := make(chan struct{}, maxPipelined)
	cancelled := make(chan struct{}, maxPipelined)
	b.infer = func(ctx context.Context, c oip.Call) (oip.Answer, error) {
		if c.Inputs[0].Data[0] == 0 {
			began <- struct{}{}
			<-ctx.Done()
			cancelled <- struct{}{}
			return oip.Answer{}, ctx.Err()
		}
		defer func() { began <- struct{}{} }()
		return b.answer(c), nil // after one that never ends
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream := openStream(t, ctx, b)
	for i := range 5 {
		if err := stream.Send(numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		<-began
	}
	cancel()
	<-cancelled
	until(t, "what was answered and not sent is released", func() bool { return b.released.Load() == 4 })
}

// A request that finds no room for its bytes is an error of its own.
func TestStreamRefusesWhatIsTooMuch(t *testing.T) {
	b := &echo{}
	conn := serve(t, oip.Config{Backend: b, MaxBody: 1 << 20, MaxBodies: 100 << 10}, nil)
	stream, err := inference.NewGRPCInferenceServiceClient(conn).ModelStreamInfer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	large := rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{500 << 10}, Data: bytesOf(500 << 10)})
	for i, q := range []*inference.ModelInferRequest{large, numbered(1)} {
		if err := stream.Send(q); err != nil {
			t.Fatal(err)
		}
		p, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if (i == 0) != strings.Contains(p.ErrorMessage, fmt.Sprint(100<<10)) {
			t.Errorf("answer %d is %v", i, p)
		}
	}
	huge := rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{2 << 20}, Data: bytesOf(2 << 20)})
	if err := stream.Send(huge); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.ResourceExhausted)
}
