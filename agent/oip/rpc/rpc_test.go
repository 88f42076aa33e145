package rpc

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo is a backend with a model "echo" whose outputs are its inputs, and
// which infer, where not nil, answers instead.
type echo struct {
	notReady string
	err      error // of Ready
	header   map[string]string
	infer    func(context.Context, oip.Call) (oip.Answer, error)

	made, released atomic.Int64 // answers
}

func (b *echo) Ready(context.Context) error { return b.err }

func (b *echo) Model(_ context.Context, name string, version int64) (oip.Model, error) {
	if name != "echo" || version > 2 {
		return oip.Model{}, oip.Errorf(oip.NotFound, "no model %q, version %d", name, version)
	}
	return oip.Model{
		Name: "echo", Versions: []int64{1, 2}, NotReady: b.notReady,
		Inputs:  []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 2}}},
		Outputs: []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 2}}},
		Config:  &inference.ModelConfig{Name: "echo", MaxBatchSize: 8},
		Labels:  map[string][]string{"x": {"cat", "dog"}},
	}, nil
}

func (b *echo) Infer(ctx context.Context, c oip.Call) (oip.Answer, error) {
	if _, err := b.Model(ctx, c.Model, c.Version); err != nil {
		return oip.Answer{}, err
	}
	if b.infer != nil {
		return b.infer(ctx, c)
	}
	return b.answer(c), nil
}

// answer echoes the inputs.
func (b *echo) answer(c oip.Call) oip.Answer {
	b.made.Add(1)
	a := oip.Answer{Model: "echo", Version: 2, Header: b.header, Labels: map[string][]string{"x": {"cat", "dog"}},
		Release: func() { b.released.Add(1) }}
	if c.Outputs == nil {
		a.Outputs = c.Inputs
	}
	for _, name := range c.Outputs {
		for _, t := range c.Inputs {
			if t.Name == name {
				a.Outputs = append(a.Outputs, t)
			}
		}
	}
	return a
}

func (b *echo) Statistics(_ context.Context, name string, _ int64) ([]*inference.ModelStatistics, error) {
	return []*inference.ModelStatistics{{Name: "echo", Version: "2", InferenceCount: 7}}, nil
}

// serve serves a backend until the test ends, and gives a connection to it.
func serve(t testing.TB, cfg oip.Config, options []grpc.ServerOption, dial ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	return connect(t, listen(t, New(oip.New(cfg), Config{Options: options}).Run), dial...)
}

// listen runs a server on the loopback interface.
func listen(t testing.TB, run func(context.Context, net.Listener) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func connect(t testing.TB, addr string, dial ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	dial = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1 << 30)),
	}, dial...)
	c, err := grpc.NewClient("passthrough:///"+addr, dial...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func client(t testing.TB, b *echo) inference.GRPCInferenceServiceClient {
	t.Helper()
	return inference.NewGRPCInferenceServiceClient(serve(t, oip.Config{Backend: b}, nil))
}

// rawRequest asks to echo raw tensors.
func rawRequest(tensors ...tensor.Tensor) *inference.ModelInferRequest {
	q := &inference.ModelInferRequest{ModelName: "echo", Id: "7"}
	for _, t := range tensors {
		q.Inputs = append(q.Inputs, &inference.ModelInferRequest_InferInputTensor{Name: t.Name, Datatype: t.Type.String(), Shape: t.Shape})
		q.RawInputContents = append(q.RawInputContents, t.Data)
	}
	return q
}

func bytesOf(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

// until polls, for what grpc gives no event for.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not after 20 s: %s", what)
		}
	}
}

func wantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("error %v has code %s, want %s", err, got, want)
	}
}

func diff(t testing.TB, got, want proto.Message) {
	t.Helper()
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestRunEndsWithIdleStreams(t *testing.T) {
	s := New(oip.New(oip.Config{Backend: &echo{}}), Config{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, l) }()
	stream, err := inference.NewGRPCInferenceServiceClient(connect(t, l.Addr().String())).ModelStreamInfer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	q := rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{1}, Data: []byte{1}})
	if err := stream.Send(q); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	stop()
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > stopGrace/2 {
		t.Errorf("took %s to stop", took)
	}
}

func TestRunFailsWithItsListener(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	err = New(oip.New(oip.Config{Backend: &echo{}}), Config{}).Run(t.Context(), l)
	if !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

// switched is an echo whose readiness changes.
type switched struct {
	*echo
	ready atomic.Bool
}

func (s *switched) Ready(context.Context) error {
	if s.ready.Load() {
		return nil
	}
	return errors.New("starting")
}
