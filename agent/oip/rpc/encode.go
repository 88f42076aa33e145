package rpc

import (
	"net"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dunlin/dunlin/agent/oip"
)

const (
	// lendAbove is the size in bytes above which the data of an output are
	// sent from where they are. Smaller ones are copied into the message, which
	// costs less than one more buffer and gives their memory back at once.
	lendAbove = transferAbove
	// maxLent is how many bytes of outputs may wait to be sent from where they
	// are. Above it they are copied, so that slow readers cannot keep all of
	// the memory that results are made in.
	maxLent = 32 << 20
)

// codec marshals a *response by itself, and other messages as grpc does.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(protocodec.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*response); ok {
		return r.marshal(), nil
	}
	return c.CodecV2.Marshal(v)
}

// response is an answer on its way: a ModelInferResponse, or a
// ModelStreamInferResponse that holds one. It owns an oip.Response until it is
// marshalled or released.
type response struct {
	*oip.Response
	service *service
	stream  bool
	share   share    // that of outputs above lendAbove
	conn    net.Conn // of the call, where there are such outputs
	freed   atomic.Bool
}

// release gives all memory back.
func (r *response) release() {
	r.free()
	r.share.release()
}

// free gives the outputs back. The first call counts.
func (r *response) free() {
	if !r.freed.Swap(true) {
		r.Response.Release()
	}
}

// marshal writes the message and gives up the response: outputs that are
// copied are given back here, the rest when grpc has freed the buffers, also
// where it forgets them.
func (r *response) marshal() mem.BufferSlice {
	var scratch [512]byte
	head := r.appendHead(scratch[:0])
	size := len(head)
	for i := range r.Outputs {
		size += 1 + protowire.SizeBytes(len(r.Outputs[i].Data))
	}
	var l *loan
	copied := size
	if large := r.share.bytes; large > 0 {
		l = r.newLoan()
		if l.lent > 0 {
			copied -= int(large)
		}
	}
	if r.stream {
		copied += 1 + protowire.SizeVarint(uint64(size))
	}

	pool := mem.DefaultBufferPool()
	buf := new([]byte)
	pooled := l == nil && !mem.IsBelowBufferPoolingThreshold(copied)
	if pooled {
		buf = pool.Get(copied)
	} else {
		*buf = make([]byte, copied)
	}
	b := (*buf)[:0]
	if r.stream {
		b = protowire.AppendTag(b, 2, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(size))
	}
	b = append(b, head...)
	if l != nil && l.lent > 0 {
		return l.lend(b)
	}
	for i := range r.Outputs {
		b = protowire.AppendTag(b, 6, protowire.BytesType)
		b = protowire.AppendBytes(b, r.Outputs[i].Data)
	}
	r.free()
	switch {
	case l != nil:
		l.buffers.Store(1)
		return mem.BufferSlice{mem.NewBuffer(buf, l)}
	case pooled:
		return mem.BufferSlice{mem.NewBuffer(buf, pool)}
	default:
		return mem.BufferSlice{mem.SliceBuffer(b)}
	}
}

// loan is the pool to which grpc gives the buffers of a response back.
type loan struct {
	terms
	buffers   atomic.Int32 // not freed yet
	forgotten runtime.Cleanup
}

// terms are what ends with a loan.
type terms struct {
	response *response
	lent     int64       // bytes of outputs that are sent from where they are
	late     *time.Timer // ends the connection
}

func (t terms) end() {
	t.late.Stop()
	t.response.service.lent.Add(-t.lent)
	t.response.release()
}

// newLoan makes the loan of a response with large outputs.
func (r *response) newLoan() *loan {
	large := r.share.bytes
	t := terms{response: r, lent: large}
	if r.service.lent.Add(large) > maxLent {
		r.service.lent.Add(-large)
		t.lent = 0
	}
	conn := r.conn
	t.late = time.AfterFunc(r.service.transferTime(large), func() {
		if conn != nil {
			_ = conn.Close() // its reader gets an error
		}
	})
	l := &loan{terms: t}
	// grpc does not free what waits to be sent when a connection breaks.
	l.forgotten = runtime.AddCleanup(l, terms.end, t)
	return l
}

// lend writes the raw contents, the large ones by reference, after b, which
// has room for the others.
func (l *loan) lend(b []byte) mem.BufferSlice {
	r := l.response
	slice := make(mem.BufferSlice, 0, 4)
	start := 0
	for i := range r.Outputs {
		data := &r.Outputs[i].Data
		b = protowire.AppendTag(b, 6, protowire.BytesType)
		if len(*data) <= lendAbove {
			b = protowire.AppendBytes(b, *data)
			continue
		}
		b = protowire.AppendVarint(b, uint64(len(*data)))
		l.buffers.Add(1)
		slice = append(slice, mem.SliceBuffer(b[start:]), mem.NewBuffer(data, l))
		start = len(b)
	}
	if start < len(b) {
		slice = append(slice, mem.SliceBuffer(b[start:]))
	}
	return slice
}

// Get is never called by a buffer; it is there because a pool has it.
func (l *loan) Get(n int) *[]byte { return new(make([]byte, n)) }

func (l *loan) Put(*[]byte) {
	if l.buffers.Add(-1) == 0 {
		l.forgotten.Stop()
		l.end()
	}
}

// appendHead appends a ModelInferResponse without its raw contents. Each
// output has an entry of them, which is empty where it is in shared memory.
func (r *response) appendHead(b []byte) []byte {
	var scratch [256]byte
	b = appendText(b, 1, r.Model)
	if r.Version != 0 {
		b = appendText(b, 2, string(strconv.AppendInt(scratch[:0], r.Version, 10)))
	}
	b = appendText(b, 3, r.ID)
	if r.stream {
		b = appendBoolParam(b, 4, "triton_final_response", true)
		for k, v := range r.Header {
			b = appendTextParam(b, 4, k, v)
		}
	}
	for i := range r.Outputs {
		o := &r.Outputs[i]
		m := appendText(scratch[:0], 1, o.Name)
		m = appendText(m, 2, o.Type.String())
		if len(o.Shape) > 0 {
			n := 0
			for _, d := range o.Shape {
				n += protowire.SizeVarint(uint64(d))
			}
			m = protowire.AppendTag(m, 3, protowire.BytesType)
			m = protowire.AppendVarint(m, uint64(n))
			for _, d := range o.Shape {
				m = protowire.AppendVarint(m, uint64(d))
			}
		}
		if s := o.Memory; s != nil {
			m = appendTextParam(m, 4, "shared_memory_region", s.Region)
			m = appendIntParam(m, 4, "shared_memory_byte_size", s.Size)
			if s.Offset != 0 {
				m = appendIntParam(m, 4, "shared_memory_offset", s.Offset)
			}
		}
		b = protowire.AppendTag(b, 5, protowire.BytesType)
		b = protowire.AppendBytes(b, m)
	}
	return b
}

func appendText(b []byte, num protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	b = protowire.AppendTag(b, num, protowire.BytesType)
	return protowire.AppendString(b, s)
}

func appendTextParam(b []byte, num protowire.Number, key, v string) []byte {
	var scratch [64]byte
	p := protowire.AppendTag(scratch[:0], 3, protowire.BytesType)
	return appendParam(b, num, key, protowire.AppendString(p, v))
}

func appendIntParam(b []byte, num protowire.Number, key string, v int64) []byte {
	var scratch [16]byte
	p := protowire.AppendTag(scratch[:0], 2, protowire.VarintType)
	return appendParam(b, num, key, protowire.AppendVarint(p, uint64(v)))
}

func appendBoolParam(b []byte, num protowire.Number, key string, v bool) []byte {
	var scratch [16]byte
	p := protowire.AppendTag(scratch[:0], 1, protowire.VarintType)
	return appendParam(b, num, key, protowire.AppendVarint(p, protowire.EncodeBool(v)))
}

// appendParam appends an entry of a map of parameters.
func appendParam(b []byte, num protowire.Number, key string, value []byte) []byte {
	b = protowire.AppendTag(b, num, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(2+protowire.SizeBytes(len(key))+protowire.SizeBytes(len(value))))
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendString(b, key)
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	return protowire.AppendBytes(b, value)
}
