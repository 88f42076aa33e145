package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// echo is a backend whose outputs are its inputs, or what answer gives.
type echo struct {
	unready  error
	notReady string
	inputs   []tensor.Info
	config   *inference.ModelConfig
	answer   func(context.Context, oip.Call) (oip.Answer, error)
	got      oip.Call // the last one
	lent     atomic.Int64
}

func (b *echo) Ready(context.Context) error { return b.unready }

func (b *echo) Model(_ context.Context, name string, version int64) (oip.Model, error) {
	if name != "echo" && name != "digits" || version > 2 {
		return oip.Model{}, oip.Errorf(oip.NotFound, "no model %q", name)
	}
	return oip.Model{Name: name, Versions: []int64{1, 2}, Inputs: b.inputs, Outputs: b.inputs, Config: b.config, NotReady: b.notReady}, nil
}

func (b *echo) Infer(ctx context.Context, c oip.Call) (oip.Answer, error) {
	if b.answer != nil {
		return b.answer(ctx, c)
	}
	b.got = c
	b.lent.Add(1)
	out := oip.Answer{Model: "digits", Version: 2, Header: map[string]string{"Dunlin-Generation": "i/7"}, Release: func() { b.lent.Add(-1) }}
	if c.Outputs == nil {
		out.Outputs = c.Inputs
	}
	for _, name := range c.Outputs {
		for _, t := range c.Inputs {
			if t.Name == name {
				out.Outputs = append(out.Outputs, t)
			}
		}
	}
	return out, nil
}

func (b *echo) Statistics(_ context.Context, name string, version int64) ([]*inference.ModelStatistics, error) {
	if name == "other" {
		return nil, oip.Errorf(oip.NotFound, "no model %q", name)
	}
	return []*inference.ModelStatistics{{
		Name: "echo", Version: "2", InferenceCount: 1 << 60,
		InferenceStats: &inference.InferStatistics{Success: &inference.StatisticDuration{Count: 3, Ns: 4}},
		BatchStats:     []*inference.InferBatchStatistics{{BatchSize: 2}},
	}}, nil
}

// serve gives a server of a real listener.
func serve(t testing.TB, cfg oip.Config) *httptest.Server {
	server := httptest.NewServer(New(oip.New(cfg)))
	t.Cleanup(server.Close)
	return server
}

// reply is an answer that was read to its end.
type reply struct {
	Code   int
	Header http.Header
	Body   *bytes.Buffer
}

// send makes a request; path begins after the server's address.
func send(t testing.TB, server *httptest.Server, method, path string, body io.Reader, header ...string) reply {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, server.URL+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	if r.Header.Get("Accept-Encoding") == "" {
		r.Header.Set("Accept-Encoding", "identity")
	}
	resp, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return reply{resp.StatusCode, resp.Header, bytes.NewBuffer(b)}
}

func do(t testing.TB, server *httptest.Server, method, path, body string, header ...string) reply {
	t.Helper()
	return send(t, server, method, path, strings.NewReader(body), header...)
}

func errorOf(t testing.TB, w reply) string {
	t.Helper()
	var e struct{ Error *string }
	if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Error == nil {
		t.Fatalf("status %d with body %q, which is no error object", w.Code, w.Body)
	}
	return *e.Error
}
