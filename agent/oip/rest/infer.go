package rest

import (
	"compress/gzip"
	"compress/zlib"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/dunlin/dunlin/agent/oip"
)

// headerLength says how many bytes of a body are JSON.
const headerLength = "Inference-Header-Content-Length"

func (h *handler) infer(w http.ResponseWriter, r *http.Request, name string, version int64) error {
	b := body{server: h.server}
	defer b.release()
	content, err := h.readBody(w, r, &b)
	if err != nil {
		return err
	}
	in, err := h.decode(r, content, name, version, b.hold)
	if err != nil {
		return err
	}
	out, err := h.server.Infer(r.Context(), &in.Request)
	if err != nil {
		return err
	}
	defer out.Release()
	asked := b.held
	if err := b.hold(sizeOf(in, out)); err != nil {
		return err
	}
	head, data, err := encodeResponse(in, out)
	if err != nil {
		return err
	}
	// A caller may take its time for the answer; the request is not needed.
	_ = b.hold(-asked) // giving back is not refused
	header := w.Header()
	for k, v := range out.Header {
		header.Set(k, v)
	}
	contentType := jsonType
	if data != nil {
		contentType = binaryType
		header[headerLength] = []string{strconv.Itoa(len(head))}
	}
	if encoding := acceptedEncoding(r.Header["Accept-Encoding"]); encoding != "" {
		h.sendCompressed(w, encoding, contentType, head, data)
	} else {
		h.send(w, http.StatusOK, contentType, head, data...)
	}
	return nil
}

// decode reads an inference request.
func (h *handler) decode(r *http.Request, content []byte, name string, version int64, hold func(int64) error) (*inferRequest, error) {
	length := len(content)
	lengths := r.Header[headerLength]
	if len(lengths) > 0 {
		n, err := strconv.Atoi(lengths[0])
		if err != nil || n < 0 || n > len(content) {
			return nil, oip.Errorf(oip.InvalidArgument, "header %s is %q, allowed are 0 to %d, the length of the body", headerLength, clip(lengths[0]), len(content))
		}
		length = n
	}
	in := &inferRequest{Request: oip.Request{Model: name, Version: version, Headers: headers(r.Header)}, hold: hold}
	if length > 0 || len(lengths) == 0 {
		return in, in.decode(content[:length], content[length:])
	}
	m, err := h.server.Model(r.Context(), name, version)
	if err != nil {
		return nil, err
	}
	return in, in.raw(content, m.Inputs)
}

// compressors make writers that compress; those at rest are kept.
var compressors = map[string]*sync.Pool{
	"gzip":    {New: func() any { z, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed); return z }}, // a valid level
	"deflate": {New: func() any { z, _ := zlib.NewWriterLevel(nil, zlib.BestSpeed); return z }}, // which in HTTP means zlib
}

type compressor interface {
	io.WriteCloser
	Reset(io.Writer)
}

// sendCompressed answers with a body, compressed.
func (h *handler) sendCompressed(w http.ResponseWriter, encoding string, contentType []string, head []byte, data [][]byte) {
	size := len(head)
	for _, b := range data {
		size += len(b)
	}
	header := w.Header()
	header["Content-Type"] = contentType
	header.Set("Content-Encoding", encoding)
	h.hurry(w, size)
	z := compressors[encoding].Get().(compressor)
	z.Reset(w)
	if writeAll(z, head, data) == nil {
		_ = z.Close() // as for send
	}
	z.Reset(nil)
	compressors[encoding].Put(z)
}

// acceptedEncoding gives the encoding that a caller likes best, "gzip",
// "deflate" or "" for none; of those it likes as well, the first.
func acceptedEncoding(accept []string) string {
	best, bestWeight := "", 0.0
	for _, list := range accept {
		for item := range strings.SplitSeq(list, ",") {
			name, parameters, _ := strings.Cut(item, ";")
			weight := 1.0
			if q, ok := strings.CutPrefix(strings.TrimSpace(parameters), "q="); ok {
				var err error
				if weight, err = strconv.ParseFloat(strings.TrimSpace(q), 64); err != nil {
					continue
				}
			}
			name = strings.ToLower(strings.TrimSpace(name))
			if weight > bestWeight && (name == "identity" || compressors[name] != nil) {
				best, bestWeight = name, weight
			}
		}
	}
	if best == "identity" {
		return ""
	}
	return best
}
