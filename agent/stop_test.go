package agent

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/proto/inference"
)

// An agent stops without waiting for connections on which nothing has come.
func TestStopWithSilentConnections(t *testing.T) {
	var stopped time.Time
	var silent []net.Conn
	t.Run("agent", func(t *testing.T) {
		url, grpcAddress := startAlone(t, Alone{File: digitsFile(t)})
		httpAddress := strings.TrimPrefix(url, "http://")
		for _, address := range []string{httpAddress, grpcAddress} {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			silent = append(silent, conn)
		}
		// Whoever comes after them is served, so they were accepted.
		until(t, "ready", func() error { return status200(http.DefaultClient, url+"/v2/health/ready", "") })
		conn, err := grpc.NewClient(grpcAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := inference.NewGRPCInferenceServiceClient(conn).ServerLive(t.Context(), &inference.ServerLiveRequest{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stopped = time.Now() }) // runs before the agent stops
	})
	for _, conn := range silent {
		conn.Close()
	}
	if took := time.Since(stopped); took > drainTime/2 {
		t.Errorf("it took %v", took)
	}
}

// endless is a backend whose requests end with their context.
type endless struct{ began chan struct{} }

func (endless) Ready(context.Context) error { return nil }
func (endless) Model(context.Context, string, int64) (oip.Model, error) {
	return oip.Model{Name: "m"}, nil
}
func (endless) Statistics(context.Context, string, int64) ([]*inference.ModelStatistics, error) {
	return nil, nil
}
func (e endless) Infer(ctx context.Context, _ oip.Call) (oip.Answer, error) {
	close(e.began)
	<-ctx.Done()
	return oip.Answer{}, context.Cause(ctx)
}

// A request that does not end while the agent stops is refused.
func TestStopRefuses(t *testing.T) {
	opened, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := endless{make(chan struct{})}
	h := &host{serving: Serving{Log: slog.New(slog.DiscardHandler)}, oip: oip.New(oip.Config{Backend: b})}
	l := &ports{http: newListener(opened, "", make(chan struct{}, maxConnections))}
	stop := h.serveHTTP(l, http.NotFoundHandler(), make(chan error, 1))
	answered := make(chan string, 1)
	go func() {
		body := `{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}`
		resp, err := http.Post(l.url()+"/v2/models/m/infer", "application/json", strings.NewReader(body))
		if err != nil {
			answered <- err.Error()
			return
		}
		defer resp.Body.Close()
		var text bytes.Buffer
		_, _ = io.Copy(&text, resp.Body)
		answered <- resp.Status + " Retry-After " + resp.Header.Get("Retry-After") + " " + text.String()
	}()
	<-b.began
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	stop(ctx)
	if got := <-answered; !strings.HasPrefix(got, "503") || !strings.Contains(got, "Retry-After 1") || !strings.Contains(got, "the agent stops") {
		t.Error(got)
	}
}
