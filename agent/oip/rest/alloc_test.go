package rest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
)

// caller asks the same of a server again and again over one connection, and
// allocates nothing itself.
type caller struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
	answer  []byte // the body, when there was one
}

func call(t testing.TB, server *httptest.Server, header string, body []byte) *caller {
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	request := fmt.Appendf(nil, "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", header, len(body), body)
	return &caller{conn: conn, in: bufio.NewReaderSize(conn, 1<<16), request: request}
}

// ask makes the request and reads the answer.
func (c *caller) ask(t testing.TB) {
	if _, err := c.conn.Write(c.request); err != nil {
		t.Fatal(err)
	}
	status, err := c.in.ReadSlice('\n')
	if err != nil || !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
		t.Fatalf("answer %q, %v", status, err)
	}
	length := 0
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			break
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(value)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if length > cap(c.answer) {
		c.answer = make([]byte, length)
	}
	if _, err := io.ReadFull(c.in, c.answer[:length]); err != nil {
		t.Fatal(err)
	}
}

// objects gives how many objects the process allocates for one request, and
// how many bytes: the medians of many.
func objects(t testing.TB, callers ...*caller) (objects, size []uint64) {
	const rounds = 101
	counts, sizes := make([][]uint64, len(callers)), make([][]uint64, len(callers))
	for i := range callers {
		counts[i], sizes[i] = make([]uint64, 0, rounds), make([]uint64, 0, rounds)
		callers[i].ask(t)
	}
	for range rounds { // interleaved
		for i, c := range callers {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			c.ask(t)
			runtime.ReadMemStats(&after)
			counts[i] = append(counts[i], after.Mallocs-before.Mallocs)
			sizes[i] = append(sizes[i], after.TotalAlloc-before.TotalAlloc)
		}
	}
	for i := range callers {
		slices.Sort(counts[i])
		slices.Sort(sizes[i])
		objects, size = append(objects, counts[i][rounds/2]), append(size, sizes[i][rounds/2])
	}
	return objects, size
}

// A binary inference allocates little beside what a server allocates that
// takes and gives the same bytes, and does not copy tensors.
func TestAllocations(t *testing.T) {
	for _, elements := range []int{16, 3 * 224 * 224} {
		data := bytes.Repeat([]byte{1, 2, 3, 4}, elements)
		lent := bytes.Repeat([]byte{5, 6, 7, 8}, elements)
		b := &echo{}
		released := func() {}
		header := map[string]string{"Dunlin-Model-Version": "echo:1"}
		outputs := []tensor.Tensor{{Name: "probabilities", Type: tensor.Float32, Shape: []int64{1, int64(elements)}, Data: lent}}
		var got *byte
		b.answer = func(_ context.Context, c oip.Call) (oip.Answer, error) {
			got = &c.Inputs[0].Data[0]
			return oip.Answer{Model: "echo", Version: 1, Outputs: outputs, Header: header, Release: released}, nil
		}
		head := fmt.Sprintf(`{"id":"1","inputs":[{"name":"image","shape":[1,%d],"datatype":"FP32","parameters":{"binary_data_size":%d}}],`+
			`"outputs":[{"name":"probabilities","parameters":{"binary_data":true}}]}`, elements, len(data))
		length := fmt.Sprintf("%s: %d\r\n", headerLength, len(head))
		infer := call(t, serve(t, oip.Config{Backend: b}), length, append([]byte(head), data...))
		infer.ask(t)
		answer := slices.Clone(infer.answer)
		if !bytes.HasSuffix(answer, lent) {
			t.Fatal("the answer does not have the data")
		}
		answerHead := strconv.Itoa(len(answer) - len(lent))

		bare := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body := make([]byte, r.ContentLength)
			if _, err := io.ReadFull(r.Body, body); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
			w.Header().Set(headerLength, answerHead)
			w.Header().Set("Dunlin-Model-Version", "echo:1")
			w.Write(answer)
		}))
		t.Cleanup(bare.Close)
		other := call(t, bare, length, append([]byte(head), data...))

		count, size := objects(t, infer, other)
		t.Logf("%d elements: %d objects and %d bytes, bare %d and %d", elements, count[0], size[0], count[1], size[1])
		if count[0] > count[1]+30 {
			t.Errorf("%d elements: %d objects, the bare server allocates %d", elements, count[0], count[1])
		}
		if size[0] > size[1]+4096 {
			t.Errorf("%d elements: %d bytes, the bare server allocates %d", elements, size[0], size[1])
		}
		if got == nil {
			t.Error("the backend was not asked")
		}
	}
}

func BenchmarkInfer(b *testing.B) {
	backend := &echo{}
	data := bytes.Repeat([]byte{1, 2, 3, 4}, 64)
	outputs := []tensor.Tensor{{Name: "y", Type: tensor.Float32, Shape: []int64{1, 64}, Data: data}}
	backend.answer = func(context.Context, oip.Call) (oip.Answer, error) {
		return oip.Answer{Model: "echo", Version: 1, Outputs: outputs}, nil
	}
	head := fmt.Sprintf(`{"inputs":[{"name":"x","shape":[1,64],"datatype":"FP32","parameters":{"binary_data_size":%d}}],"parameters":{"binary_data_output":true}}`, len(data))
	c := call(b, serve(b, oip.Config{Backend: backend}), fmt.Sprintf("%s: %d\r\n", headerLength, len(head)), append([]byte(head), data...))
	b.ReportAllocs()
	for b.Loop() {
		c.ask(b)
	}
}
