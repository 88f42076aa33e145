package rpc

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

func uint8s(n int) *inference.ModelInferRequest {
	return rawRequest(tensor.Tensor{Name: "x", Type: tensor.Uint8, Shape: []int64{int64(n)}, Data: bytesOf(n)})
}

// compressions notes how the answers came.
type compressions struct {
	mu   sync.Mutex
	seen []string
}

func (c *compressions) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (c *compressions) HandleRPC(_ context.Context, s stats.RPCStats) {
	if h, ok := s.(*stats.InHeader); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.seen = append(c.seen, h.Compression)
	}
}
func (c *compressions) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (c *compressions) HandleConn(context.Context, stats.ConnStats)                       {}

func TestCompression(t *testing.T) {
	seen := &compressions{}
	b := &echo{}
	conn := serve(t, oip.Config{Backend: b}, nil, grpc.WithStatsHandler(seen))
	c := inference.NewGRPCInferenceServiceClient(conn)
	sizes := []int{0, 1, 3000, 300_000}
	for _, name := range []string{"gzip", "deflate"} {
		seen.seen = nil
		for range 2 { // the second time with a compressor that was used
			for _, n := range sizes {
				p, err := c.ModelInfer(t.Context(), uint8s(n), grpc.UseCompressor(name))
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(p.RawOutputContents[0], bytesOf(n)) {
					t.Errorf("%s: %d bytes came back wrong", name, n)
				}
			}
		}
		stream, err := c.ModelStreamInfer(t.Context(), grpc.UseCompressor(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(stream.Send(uint8s(5000)), stream.CloseSend()); err != nil {
			t.Fatal(err)
		}
		if p, err := stream.Recv(); err != nil || !bytes.Equal(p.InferResponse.RawOutputContents[0], bytesOf(5000)) {
			t.Errorf("%s: stream gives %v", name, err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		seen.mu.Lock()
		for _, got := range seen.seen {
			if got != name {
				t.Errorf("answers came with compression %q, want %q", got, name)
			}
		}
		if len(seen.seen) != 2*len(sizes)+1 {
			t.Errorf("%d answers, want %d", len(seen.seen), 2*len(sizes)+1)
		}
		seen.mu.Unlock()
	}
	until(t, "all is released", func() bool { return b.released.Load() == b.made.Load() })
}

func TestDeflateIsZlib(t *testing.T) {
	var compressed bytes.Buffer
	w, err := encoding.GetCompressor("deflate").Compress(&compressed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("tensor")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z, err := zlib.NewReader(&compressed)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(z); err != nil || string(b) != "tensor" {
		t.Errorf("got %q, %v", b, err)
	}
}

// rawCodec sends bytes as they are.
type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (c rawCodec) Unmarshal(b mem.BufferSlice, v any) error {
	*v.(*[]byte) = b.Materialize()
	return nil
}

func (c rawCodec) Name() string { return "proto" }

// sendBytes makes a call with a message of any bytes.
func sendBytes(t *testing.T, conn *grpc.ClientConn, method string, b []byte, options ...grpc.CallOption) error {
	t.Helper()
	var answer []byte
	options = append(options, grpc.ForceCodecV2(rawCodec{}))
	return conn.Invoke(t.Context(), "/inference.GRPCInferenceService/"+method, &b, &answer, options...)
}

func TestWrongMessages(t *testing.T) {
	conn := serve(t, oip.Config{Backend: &echo{}}, nil)
	for _, method := range []string{"ModelInfer", "ModelReady", "RepositoryModelLoad"} {
		wantCode(t, sendBytes(t, conn, method, []byte{0x0a, 0xff}), codes.InvalidArgument)
		wantCode(t, sendBytes(t, conn, method, []byte("\x0a\x01\xff")), codes.InvalidArgument) // not UTF-8
	}
	// More than a control message needs.
	wantCode(t, sendBytes(t, conn, "ModelReady", make([]byte, maxControl+1)), codes.ResourceExhausted)
}

// fixedCompressor sends what it is told to, whatever it is given, and reads
// gzip.
type fixedCompressor struct {
	encoding.Compressor
	compressed []byte
}

var fixed = &fixedCompressor{}

func init() { encoding.RegisterCompressor(fixed) }

func (f *fixedCompressor) Name() string { return "fixed-gzip" }

func (f *fixedCompressor) Compress(w io.Writer) (io.WriteCloser, error) {
	return fixedWriter{w, f.compressed}, nil
}

func (f *fixedCompressor) Decompress(r io.Reader) (io.Reader, error) {
	return encoding.GetCompressor("gzip").Decompress(r)
}

type fixedWriter struct {
	io.Writer
	compressed []byte
}

func (w fixedWriter) Write(p []byte) (int, error) { return len(p), nil }

func (w fixedWriter) Close() error {
	_, err := w.Writer.Write(w.compressed)
	return err
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestDecompression(t *testing.T) {
	zeros := func(n int) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		if _, err := io.CopyN(w, zeroReader{}, int64(n)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	whole := zeros(1000)
	tests := []struct {
		name       string
		compressed []byte
		bodies     int64
		want       codes.Code
	}{
		{"bomb", zeros(16 << 20), 4 << 20, codes.ResourceExhausted},
		{"more than there is room for", zeros(900 << 10), 500 << 10, codes.Unavailable},
		{"cut short", whole[:len(whole)-9], 4 << 20, codes.InvalidArgument},
		{"wrong checksum", append(bytes.Clone(whole[:len(whole)-8]), make([]byte, 8)...), 4 << 20, codes.InvalidArgument},
		{"not gzip", []byte("tensor"), 4 << 20, codes.InvalidArgument},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := oip.New(oip.Config{Backend: &echo{}, MaxBody: 1 << 20, MaxBodies: test.bodies})
			conn := connect(t, listen(t, New(s, Config{}).Run))
			fixed.compressed = test.compressed
			wantCode(t, sendBytes(t, conn, "ModelInfer", []byte{1}, grpc.UseCompressor("fixed-gzip")), test.want)
			until(t, "the bytes are given back", func() bool { return room(s, test.bodies) })
		})
	}
}

// room says whether there is room for so many bytes.
func room(s *oip.Server, n int64) bool {
	if err := s.Hold(n); err != nil {
		return false
	}
	return s.Hold(-n) == nil
}

// A message is refused before its bytes are there, and has its room before.
func TestMessagesAreJudgedByTheirLength(t *testing.T) {
	s := oip.New(oip.Config{Backend: &echo{}, MaxBody: 8 << 20, MaxBodies: 1 << 20})
	addr := listen(t, New(s, Config{}).Run)
	c := inference.NewGRPCInferenceServiceClient(connect(t, addr))
	_, err := c.ModelInfer(t.Context(), uint8s(9<<20))
	wantCode(t, err, codes.ResourceExhausted)
	_, err = c.ModelInfer(t.Context(), uint8s(2<<20))
	wantCode(t, err, codes.Unavailable)

	raw := dialRaw(t, addr)
	raw.headers(1, "ModelInfer")
	raw.data(1, messageHeader(2<<20))
	raw.untilEnd(1)
	raw.headers(3, "ModelInfer")
	raw.data(3, append(messageHeader(900<<10), make([]byte, 17<<10)...))
	until(t, "the slow sender has its room", func() bool { return !room(s, 200<<10) })
	raw.Close()
	until(t, "the room is given back", func() bool { return room(s, 1<<20) })
}

// Callers that announce messages and do not send them leave others room.
func TestAnnouncedMessages(t *testing.T) {
	s := oip.New(oip.Config{Backend: &echo{}})
	addr := listen(t, New(s, Config{}).Run)
	raw := dialRaw(t, addr)
	const calls = 8
	for i := range uint32(calls) {
		raw.headers(2*i+1, []string{"ModelInfer", "ModelStreamInfer"}[i%2])
		raw.data(2*i+1, append(messageHeader(oip.DefaultMaxBody), 1))
	}
	until(t, "the announced messages have room", func() bool { return !room(s, oip.DefaultMaxBodies-calls<<10+1) })
	if !room(s, oip.DefaultMaxBodies-calls<<20) {
		t.Error("they have much of it")
	}
	c := inference.NewGRPCInferenceServiceClient(connect(t, addr))
	if _, err := c.ModelInfer(t.Context(), uint8s(2<<20)); err != nil {
		t.Errorf("another client: %v", err)
	}
	raw.Close()
	until(t, "the room is given back", func() bool { return room(s, oip.DefaultMaxBodies) })
}

// A message that an interceptor does not let through is not read.
func TestInterceptorsComeFirst(t *testing.T) {
	b := &echo{}
	denied := errors.New("denied")
	interceptor := func(ctx context.Context, q any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		switch md.Get("do")[0] {
		case "refuse":
			return nil, status.Error(codes.Unauthenticated, info.FullMethod)
		case "drop":
			if _, err := next(ctx, q); err != nil {
				return nil, err
			}
			return nil, denied
		case "replace":
			if _, err := next(ctx, q); err != nil {
				return nil, err
			}
			return &inference.ModelInferResponse{Id: "other"}, nil
		default:
			return next(ctx, q)
		}
	}
	s := oip.New(oip.Config{Backend: b})
	addr := listen(t, New(s, Config{Options: []grpc.ServerOption{grpc.UnaryInterceptor(interceptor)}}).Run)
	c := inference.NewGRPCInferenceServiceClient(connect(t, addr))
	do := func(what string) context.Context { return metadata.AppendToOutgoingContext(t.Context(), "do", what) }
	_, err := c.ModelInfer(do("refuse"), uint8s(1))
	wantCode(t, err, codes.Unauthenticated)
	_, err = c.ModelReady(do("refuse"), &inference.ModelReadyRequest{Name: "echo"})
	wantCode(t, err, codes.Unauthenticated)
	if b.made.Load() != 0 {
		t.Error("a refused request was answered")
	}
	_, err = c.ModelInfer(do("drop"), uint8s(lendAbove+1))
	wantCode(t, err, codes.Unknown)
	if p, err := c.ModelInfer(do("replace"), uint8s(lendAbove+1)); err != nil || p.Id != "other" {
		t.Errorf("got %v, %v", p, err)
	}
	if p, err := c.ModelInfer(do("pass"), uint8s(lendAbove+1)); err != nil || p.Id != "7" {
		t.Errorf("got %v, %v", p, err)
	}
	_, err = c.ModelInfer(do("pass"), &inference.ModelInferRequest{ModelName: "other"})
	wantCode(t, err, codes.NotFound)
	until(t, "all is released", func() bool { return b.made.Load() == 3 && b.released.Load() == 3 })

	raw := dialRaw(t, addr)
	raw.headers(1, "ModelInfer", "do", "refuse")
	raw.data(1, messageHeader(60<<20))
	raw.untilEnd(1)
}

// What is lent is given back once, whatever becomes of the client.
func TestLentMemoryComesBack(t *testing.T) {
	const size = 4 << 20
	b := &echo{}
	s := oip.New(oip.Config{Backend: b})
	server := New(s, Config{})
	addr := listen(t, server.Run)
	c := inference.NewGRPCInferenceServiceClient(connect(t, addr))
	back := func(t *testing.T, n int64) {
		t.Helper()
		until(t, "all is released", func() bool {
			runtime.GC() // grpc forgets what waits on a connection that breaks
			return b.released.Load() == n && server.service.lent.Load() == 0 && room(s, oip.DefaultMaxBodies)
		})
		if b.made.Load() != n {
			t.Errorf("%d answers made, want %d", b.made.Load(), n)
		}
	}
	t.Run("read", func(t *testing.T) {
		p, err := c.ModelInfer(t.Context(), uint8s(size))
		if err != nil || !bytes.Equal(p.RawOutputContents[0], bytesOf(size)) {
			t.Errorf("came back wrong: %v", err)
		}
		back(t, 1)
	})
	request, err := proto.Marshal(uint8s(1 << 20))
	if err != nil {
		t.Fatal(err)
	}
	// The answer waits for a client that reads nothing of the stream.
	stuck := func(t *testing.T, n int64) *rawClient {
		t.Helper()
		raw := dialRaw(t, addr)
		raw.headers(1, "ModelInfer")
		raw.data(1, append(messageHeader(len(request)), request...))
		until(t, "the answer waits", func() bool { return b.made.Load() == n && server.service.lent.Load() == 1<<20 })
		if b.released.Load() != n-1 {
			t.Fatal("what waits was released")
		}
		return raw
	}
	t.Run("connection breaks", func(t *testing.T) {
		stuck(t, 2).Close()
		back(t, 2)
	})
	t.Run("stream is reset", func(t *testing.T) {
		raw := stuck(t, 3)
		raw.frame(3, 0, 1, []byte{0, 0, 0, 8})
		back(t, 3)
	})
}

// An answer that is not taken ends the connection, not the other ones.
func TestAnswersMustBeTaken(t *testing.T) {
	b := &echo{}
	s := oip.New(oip.Config{Backend: b})
	server := New(s, Config{})
	server.service.grace = 50 * time.Millisecond
	addr := listen(t, server.Run)
	request, err := proto.Marshal(uint8s(60 << 10)) // more than the client's window, less than a second's worth
	if err != nil {
		t.Fatal(err)
	}
	raw := dialRaw(t, addr)
	for i := range uint32(2) {
		raw.headers(2*i+1, "ModelInfer")
		raw.data(2*i+1, append(messageHeader(len(request)), request...))
	}
	c := inference.NewGRPCInferenceServiceClient(connect(t, addr))
	if _, err := c.ModelInfer(t.Context(), uint8s(60<<10)); err != nil {
		t.Fatal(err)
	}
	until(t, "the connection is closed", func() bool {
		select {
		case _, ok := <-raw.frames:
			return !ok
		default:
			return false
		}
	})
	until(t, "all is released", func() bool {
		runtime.GC()
		return b.released.Load() == 3 && room(s, oip.DefaultMaxBodies)
	})
	if _, err := c.ModelInfer(t.Context(), uint8s(60<<10)); err != nil {
		t.Error(err)
	}
}

// A message that does not go on arriving gives its room back.
func TestMessagesMustArrive(t *testing.T) {
	s := oip.New(oip.Config{Backend: &echo{}})
	server := New(s, Config{})
	server.service.grace = 50 * time.Millisecond
	raw := dialRaw(t, listen(t, server.Run))
	for i, method := range []string{"ModelInfer", "ModelStreamInfer"} {
		id := uint32(2*i + 1)
		raw.headers(id, method)
		raw.data(id, append(messageHeader(60<<10), 1, 2, 3))
		raw.untilEnd(id)
		until(t, "the room is given back", func() bool { return room(s, oip.DefaultMaxBodies) })
	}
}

func TestTLS(t *testing.T) {
	certified := httptest.NewTLSServer(nil)
	certified.Close()
	var found net.Conn
	interceptor := func(ctx context.Context, q any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		found = connOf(ctx)
		return next(ctx, q)
	}
	addr := listen(t, New(oip.New(oip.Config{Backend: &echo{}}), Config{Options: []grpc.ServerOption{
		grpc.Creds(credentials.NewServerTLSFromCert(&certified.TLS.Certificates[0])), grpc.UnaryInterceptor(interceptor),
	}}).Run)
	roots := x509.NewCertPool()
	roots.AddCert(certified.Certificate())
	conn := connect(t, addr, grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "example.com")))
	p, err := inference.NewGRPCInferenceServiceClient(conn).ModelInfer(t.Context(), uint8s(300_000))
	if err != nil || !bytes.Equal(p.RawOutputContents[0], bytesOf(300_000)) {
		t.Errorf("came back wrong: %v", err)
	}
	if _, ok := found.(*net.TCPConn); !ok {
		t.Errorf("the connection of a call is %T", found)
	}
}

// Beyond a limit answers are copied, so that clients that do not read them do
// not keep the memory that results are made in.
func TestSlowReadersKeepLittleMemory(t *testing.T) {
	const size = 7 << 20
	b := &echo{}
	s := oip.New(oip.Config{Backend: b})
	server := New(s, Config{})
	addr := listen(t, server.Run)
	request, err := proto.Marshal(uint8s(size))
	if err != nil {
		t.Fatal(err)
	}
	raw := dialRaw(t, addr)
	const n = 8
	for i := range uint32(n) {
		raw.headers(2*i+1, "ModelInfer")
		raw.data(2*i+1, append(messageHeader(len(request)), request...))
		until(t, "the request is answered", func() bool { return b.made.Load() == int64(i)+1 })
	}
	until(t, "some are released", func() bool { return b.released.Load() == n-maxLent/size })
	if room(s, oip.DefaultMaxBodies-n*size+1) {
		t.Error("what was copied and waits has no share")
	}
	if lent := server.service.lent.Load(); lent > maxLent {
		t.Errorf("%d bytes are lent, the limit is %d", lent, maxLent)
	}
	c := inference.NewGRPCInferenceServiceClient(connect(t, addr))
	if _, err := c.ModelInfer(t.Context(), uint8s(1<<20)); err != nil {
		t.Errorf("another client: %v", err)
	}
	raw.Close()
	until(t, "all is released", func() bool {
		runtime.GC()
		return b.released.Load() == n+1 && room(s, oip.DefaultMaxBodies)
	})
}
