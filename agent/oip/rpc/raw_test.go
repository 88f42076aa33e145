package rpc

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

// rawClient speaks HTTP/2 frames, to do what no client library does. It grants
// no more than the initial windows.
type rawClient struct {
	net.Conn
	t      *testing.T
	frames chan rawFrame
	sent   map[uint32]int // bytes of data, by stream; 0 is the connection
	window map[uint32]int // that were granted
}

type rawFrame struct {
	typ, flags byte
	stream     uint32
	payload    []byte // of a window update
}

func dialRaw(t *testing.T, addr string) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	r := &rawClient{Conn: conn, t: t, frames: make(chan rawFrame, 256), sent: map[uint32]int{}, window: map[uint32]int{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(r.frames)
		r.read()
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	r.write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	r.frame(4, 0, 0, nil)
	return r
}

func (r *rawClient) write(b []byte) {
	r.t.Helper()
	if err := r.SetWriteDeadline(time.Now().Add(20 * time.Second)); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.Write(b); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rawClient) frame(typ, flags byte, stream uint32, payload []byte) {
	r.t.Helper()
	n := len(payload)
	b := []byte{byte(n >> 16), byte(n >> 8), byte(n), typ, flags}
	b = binary.BigEndian.AppendUint32(b, stream)
	r.write(append(b, payload...))
}

// headers begins a call of a method of the inference service.
func (r *rawClient) headers(stream uint32, method string, more ...string) {
	r.t.Helper()
	var b []byte
	literal := func(s string) { b = append(append(b, byte(len(s))), s...) }
	list := append([]string{":method", "POST", ":scheme", "http", ":path", "/inference.GRPCInferenceService/" + method,
		":authority", "test", "content-type", "application/grpc", "te", "trailers"}, more...)
	for i := 0; i < len(list); i += 2 {
		b = append(b, 0) // a literal that is not indexed
		literal(list[i])
		literal(list[i+1])
	}
	r.frame(1, 4, stream, b)
}

// data sends bytes of a call as the server has windows for them.
func (r *rawClient) data(stream uint32, b []byte) {
	r.t.Helper()
	const initial = 65535
	for len(b) > 0 {
		n := min(len(b), 16384, initial+r.window[stream]-r.sent[stream], initial+r.window[0]-r.sent[0])
		if n <= 0 {
			r.next()
			continue
		}
		r.frame(0, 0, stream, b[:n])
		r.sent[stream] += n
		r.sent[0] += n
		b = b[n:]
	}
}

// next takes the next frame of the server.
func (r *rawClient) next() rawFrame {
	r.t.Helper()
	select {
	case f, ok := <-r.frames:
		if !ok {
			r.t.Fatal("the connection was closed")
		}
		if f.typ == 8 {
			r.window[f.stream] += int(binary.BigEndian.Uint32(f.payload))
		}
		return f
	case <-time.After(20 * time.Second):
		r.t.Fatal("no frame within 20 s")
	}
	return rawFrame{}
}

// untilEnd waits until the server has ended a call.
func (r *rawClient) untilEnd(stream uint32) {
	r.t.Helper()
	for f := r.next(); f.stream != stream || f.typ != 1 || f.flags&1 == 0; f = r.next() {
	}
}

// messageHeader is that of a message of n bytes.
func messageHeader(n int) []byte {
	return binary.BigEndian.AppendUint32([]byte{0}, uint32(n))
}

func (r *rawClient) read() {
	var head [9]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(r, payload); err != nil {
			return
		}
		f := rawFrame{typ: head[3], flags: head[4], stream: binary.BigEndian.Uint32(head[5:])}
		if f.typ == 8 {
			f.payload = payload
		}
		r.frames <- f // there are few enough, as it grants little
	}
}
