package rpc

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// bare is the generated service with nothing behind it: it answers a canned
// response.
type bare struct {
	inference.UnimplementedGRPCInferenceServiceServer
	response *inference.ModelInferResponse
}

func (b *bare) ModelInfer(context.Context, *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	return b.response, nil
}

func (b *bare) Run(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(oip.DefaultMaxBody))
	inference.RegisterGRPCInferenceServiceServer(s, b)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	<-ctx.Done()
	s.Stop()
	return <-done
}

// sides gives a client of this package's server with an echo, and one of a
// bare server that answers the same bytes.
func sides(t testing.TB, n int) (ours, theirs inference.GRPCInferenceServiceClient, q *inference.ModelInferRequest) {
	t.Helper()
	q = rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{int64(n)}, Data: bytesOf(n)})
	ours = client(t, &echo{})
	p, err := ours.ModelInfer(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	theirs = inference.NewGRPCInferenceServiceClient(connect(t, listen(t, (&bare{response: p}).Run)))
	if p2, err := theirs.ModelInfer(t.Context(), q); err != nil || !bytes.Equal(p2.RawOutputContents[0], p.RawOutputContents[0]) {
		t.Fatal("the bare server answers otherwise: ", err)
	}
	return ours, theirs, q
}

// An inference allocates at most 30 objects more than what grpc-go does for a
// service without anything behind it. The client's are the same on both sides.
func TestAllocations(t *testing.T) {
	const most = 30
	for _, n := range []int{16, 4 << 10, 100 << 10, 600 << 10} {
		ours, theirs, q := sides(t, n)
		a, b := medianAllocs(t, ours, q), medianAllocs(t, theirs, q)
		t.Logf("%d bytes: %.0f objects, bare %.0f", n, a, b)
		if a > b+most {
			t.Errorf("%d bytes: %.0f objects, a bare server has %.0f", n, a, b)
		}
	}
}

func medianAllocs(t *testing.T, c inference.GRPCInferenceServiceClient, q *inference.ModelInferRequest) float64 {
	var all []float64
	for range 5 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		const calls = 40
		for range calls {
			if _, err := c.ModelInfer(t.Context(), q); err != nil {
				t.Fatal(err)
			}
		}
		runtime.ReadMemStats(&after)
		all = append(all, float64(after.Mallocs-before.Mallocs)/calls)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// BenchmarkInfer compares the two sides with 8 callers, in turns in one run.
func BenchmarkInfer(b *testing.B) {
	for _, n := range []int{16, 4 << 10, 600 << 10} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ours, theirs, q := sides(b, n)
			var a, z []float64
			for b.Loop() {
				a = append(a, rate(b, ours, q))
				z = append(z, rate(b, theirs, q))
			}
			slices.Sort(a)
			slices.Sort(z)
			b.ReportMetric(a[len(a)/2], "calls/s")
			b.ReportMetric(z[len(z)/2], "bare_calls/s")
			b.ReportMetric(a[len(a)/2]/z[len(z)/2], "ratio")
		})
	}
}

// rate gives how many calls 8 callers make in a second.
func rate(b *testing.B, c inference.GRPCInferenceServiceClient, q *inference.ModelInferRequest) float64 {
	const callers, calls = 8, 100
	began := time.Now()
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for range calls {
				if _, err := c.ModelInfer(b.Context(), q); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return callers * calls / time.Since(began).Seconds()
}
