package rest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// impatient gives a server that allows d for each transfer, whatever its size.
func impatient(t *testing.T, core *oip.Server, d time.Duration) *httptest.Server {
	server := httptest.NewServer(&handler{server: core, slowTime: d, slowRate: math.MaxInt64})
	t.Cleanup(server.Close)
	return server
}

func dial(t *testing.T, server *httptest.Server) net.Conn {
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// A caller that does not take its answer has the memory of the answer for a
// bounded time only, and others are answered meanwhile.
func TestSlowReader(t *testing.T) {
	const size = 64 << 20 // more than the system buffers
	released := make(chan struct{}, 2)
	b := &echo{answer: func(_ context.Context, c oip.Call) (oip.Answer, error) {
		a := oip.Answer{Model: "echo", Version: 1, Release: func() { released <- struct{}{} }}
		if len(c.Inputs) > 0 {
			a.Outputs = []tensor.Tensor{{Name: "y", Type: tensor.Uint8, Shape: []int64{size}, Data: make([]byte, size)}}
		}
		return a, nil
	}}
	for _, encoding := range []string{"identity", "gzip;q=0, deflate"} {
		server := impatient(t, oip.New(oip.Config{Backend: b}), 500*time.Millisecond)
		slow := dial(t, server)
		body := `{"parameters":{"binary_data_output":true},"inputs":[{"name":"x","shape":[1],"datatype":"INT32","data":[7]}]}`
		if encoding != "identity" { // zeros compress too well to be slow
			b.answer = incompressible(released)
		}
		fmt.Fprintf(slow, "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nAccept-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s", encoding, len(body), body)
		in := bufio.NewReader(slow)
		if status, err := in.ReadString('\n'); err != nil || !strings.Contains(status, "200") {
			t.Fatalf("%s: %q, %v", encoding, status, err)
		}
		if w := do(t, server, "GET", "/v2/health/live", ""); w.Code != 200 {
			t.Errorf("%s: another caller gets status %d", encoding, w.Code)
		}
		<-released
		if n, err := io.Copy(io.Discard, in); n >= size {
			t.Errorf("%s: the answer has %d bytes, %v", encoding, n, err)
		}
	}
}

// What is sent to slow callers counts among what all requests have in memory,
// and their requests do not any more.
func TestSlowReadersAreCounted(t *testing.T) {
	const size, calls = 64 << 20, 3 // more than the system buffers
	data := make([]byte, size)
	b := &echo{answer: func(context.Context, oip.Call) (oip.Answer, error) {
		return oip.Answer{Model: "echo", Version: 1, Outputs: []tensor.Tensor{{Name: "y", Type: tensor.Uint8, Shape: []int64{size}, Data: data}}}, nil
	}}
	core := oip.New(oip.Config{Backend: b})
	server := impatient(t, core, slowTime)
	const asked = 1 << 20
	body := `{"parameters":{"binary_data_output":true},"inputs":[{"name":"x","shape":[1],"datatype":"INT32","data":[7` + strings.Repeat(" ", asked) + `]}]}`
	ask := func() string {
		c := dial(t, server)
		fmt.Fprintf(c, "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		status, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	for range calls {
		if status := ask(); !strings.Contains(status, "200") {
			t.Fatal(status)
		}
	}
	if core.Hold(oip.DefaultMaxBodies-calls*size+1) == nil {
		t.Error("the answers that wait are not counted")
	}
	if err := core.Hold(oip.DefaultMaxBodies - calls*size); err != nil {
		t.Errorf("more than the answers is counted: %v", err)
	}
	if status := ask(); !strings.Contains(status, "503") {
		t.Errorf("an answer too many: %s", status)
	}
}

func incompressible(released chan struct{}) func(context.Context, oip.Call) (oip.Answer, error) {
	data := make([]byte, 32<<20)
	x := uint32(1)
	for i := range data {
		x = x*1664525 + 1013904223
		data[i] = byte(x >> 24)
	}
	return func(context.Context, oip.Call) (oip.Answer, error) {
		return oip.Answer{
			Model: "echo", Version: 1, Release: func() { released <- struct{}{} },
			Outputs: []tensor.Tensor{{Name: "y", Type: tensor.Uint8, Shape: []int64{int64(len(data))}, Data: data}},
		}, nil
	}
}

// A body that does not come is given up, and what was held for it with it.
func TestSlowBody(t *testing.T) {
	core := oip.New(oip.Config{Backend: &echo{}, MaxBody: 1000, MaxBodies: 1000})
	server := impatient(t, core, 50*time.Millisecond)
	for _, length := range []string{"Content-Length: 1000", "Transfer-Encoding: chunked"} {
		slow := dial(t, server)
		fmt.Fprintf(slow, "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n5\r\n{\"id\"", length)
		resp, err := http.ReadResponse(bufio.NewReader(slow), nil)
		if err != nil {
			t.Fatal(err)
		}
		message, err := io.ReadAll(resp.Body)
		if resp.StatusCode != 400 || err != nil || !strings.Contains(string(message), "did not arrive within 50ms") {
			t.Errorf("%s: status %d, %s, %v", length, resp.StatusCode, message, err)
		}
		if err := core.Hold(1000); err != nil {
			t.Errorf("%s: %v", length, err)
		}
		_ = core.Hold(-1000)
	}
}

// Callers that announce bodies and do not send them leave others room.
func TestAnnouncedBodies(t *testing.T) {
	core := oip.New(oip.Config{Backend: &echo{}})
	server := impatient(t, core, slowTime)
	free := func(n int64) bool { return core.Hold(n) == nil && core.Hold(-n) == nil }
	const callers = 8
	for range callers {
		fmt.Fprintf(dial(t, server), "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{", oip.DefaultMaxBody)
	}
	for deadline := time.Now().Add(20 * time.Second); free(oip.DefaultMaxBodies - callers<<10 + 1); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the announced bodies have no room")
		}
	}
	if !free(oip.DefaultMaxBodies - callers<<20) {
		t.Error("the announced bodies have much room")
	}
	data := strings.Repeat("\x01\x02\x03\x04", 1<<20)
	head, tail := binaryInput("INT32", "[1048576]", len(data), data)
	if w := do(t, server, "POST", "/v2/models/echo/infer", head+tail, headerLength, fmt.Sprint(len(head))); w.Code != 200 {
		t.Errorf("another caller: %d %.200s", w.Code, w.Body)
	}
}

// A caller that reads nothing before all is sent still learns why its body is
// refused, though the body is larger than what the system buffers.
func TestRefusedBodyIsDrained(t *testing.T) {
	const limit = 8 << 20
	core := oip.New(oip.Config{Backend: &echo{}, MaxBody: limit, MaxBodies: limit})
	server := impatient(t, core, slowTime)
	ask := func(n int) int {
		c := dial(t, server)
		fmt.Fprintf(c, "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", n)
		if _, err := c.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	if code := ask(2 * limit); code != 413 {
		t.Errorf("a body that is too large: status %d", code)
	}
	if err := core.Hold(1); err != nil {
		t.Fatal(err)
	}
	if code := ask(limit); code != 503 {
		t.Errorf("a body too many: status %d", code)
	}
}

// conn remembers its deadlines.
type conn struct {
	net.Conn
	mu     sync.Mutex
	read   time.Time
	writes []bool // whether a deadline for writing was set, or lifted
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	c.read = t
	c.mu.Unlock()
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.writes = append(c.writes, !t.IsZero())
	c.mu.Unlock()
	return c.Conn.SetWriteDeadline(t)
}

type listener struct {
	net.Listener
	last chan *conn
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	wrapped := &conn{Conn: c}
	l.last <- wrapped
	return wrapped, nil
}

// Deadlines are lifted: that for the body while the model runs, and that for
// the answer before the next request.
func TestDeadlinesAreLifted(t *testing.T) {
	l := &listener{last: make(chan *conn, 1)}
	var got *conn
	b := &echo{answer: func(context.Context, oip.Call) (oip.Answer, error) {
		got = <-l.last
		l.last <- got
		got.mu.Lock()
		defer got.mu.Unlock()
		if !got.read.IsZero() {
			t.Errorf("the deadline for reading is %s while the model runs", got.read)
		}
		return oip.Answer{}, nil
	}}
	server := httptest.NewUnstartedServer(New(oip.New(oip.Config{Backend: b})))
	l.Listener = server.Listener
	server.Listener = l
	server.Start()
	defer server.Close()
	do(t, server, "POST", "/v2/models/echo/infer", small)
	do(t, server, "GET", "/v2/models/other", "") // on the same connection, which is done with the first then
	got.mu.Lock()
	defer got.mu.Unlock()
	if w := got.writes; len(w) < 3 || !w[0] || w[1] {
		t.Errorf("the deadline for writing was set and lifted as %v", w)
	}
}

// A caller that goes away ends its request.
func TestCallerGoesAway(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan error)
	b := &echo{answer: func(ctx context.Context, _ oip.Call) (oip.Answer, error) {
		close(begun)
		<-ctx.Done()
		ended <- ctx.Err()
		return oip.Answer{}, ctx.Err()
	}}
	server := serve(t, oip.Config{Backend: b})
	c := dial(t, server)
	fmt.Fprintf(c, "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(small), small)
	<-begun
	c.Close()
	if err := <-ended; err != context.Canceled {
		t.Error(err)
	}
}
