package rest

import (
	"compress/gzip"
	"compress/zlib"
	"errors"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/dunlin/dunlin/agent/oip"
)

// drained says how many times the allowed length of a body is read of one that
// is refused.
const drained = 2

// body is a request's body. What it has in memory is held in the server.
type body struct {
	server *oip.Server
	from   io.Reader
	held   int64
}

// hold holds n more bytes.
func (b *body) hold(n int64) error {
	err := b.server.Hold(n)
	if err == nil {
		b.held += n
	}
	return err
}

// release gives back what is held.
func (b *body) release() { _ = b.server.Hold(-b.held) } // giving back is not refused

// Read implements io.Reader; it holds what it reads.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.from.Read(p)
	if full := b.hold(int64(n)); full != nil {
		return n, full
	}
	return n, err
}

// readBody reads the whole body, decompressed. What it gives is held by b.
func (h *handler) readBody(w http.ResponseWriter, r *http.Request, b *body) ([]byte, error) {
	limit := h.server.MaxBody()
	if r.ContentLength == 0 {
		return nil, nil
	}
	length := r.ContentLength
	if length < 0 || length > limit {
		length = limit
	}
	c := http.NewResponseController(w)
	allowed := h.allowed(length)
	_ = c.SetReadDeadline(time.Now().Add(allowed)) // a reader without deadlines has nobody slow at its end
	content, err := readAll(r, b, limit)
	if err == nil {
		// From here on reading only notices that the caller goes away.
		_ = c.SetReadDeadline(time.Time{})
		return content, nil
	}
	if _, ok := errors.AsType[*oip.Error](err); ok {
		// A caller that still sends would see its connection fail and not
		// this error, so the rest is read, within reason.
		_, _ = io.CopyN(io.Discard, r.Body, drained*limit)
		return nil, err
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, oip.Errorf(oip.TooLarge, "read request body: %w", err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, oip.Errorf(oip.InvalidArgument, "request body did not arrive within %s", allowed)
	}
	return nil, oip.Errorf(oip.InvalidArgument, "read request body: %w", err)
}

func readAll(r *http.Request, b *body, limit int64) (content []byte, err error) {
	if r.ContentLength > limit {
		return nil, oip.Errorf(oip.TooLarge, "request body has %d bytes, allowed are %d", r.ContentLength, limit)
	}
	b.from = r.Body
	switch encoding := r.Header.Get("Content-Encoding"); encoding {
	case "", "identity":
		if n := r.ContentLength; n >= 0 {
			if err := b.hold(n); err != nil { // there is no room for it now
				return nil, err
			}
			_ = b.hold(-n) // giving back is not refused
			for have := int64(0); have < n; have = int64(len(content)) {
				size := oip.Part(have, n)
				if err := b.hold(size - have); err != nil {
					return nil, err
				}
				more := make([]byte, size)
				copy(more, content)
				if _, err := io.ReadFull(r.Body, more[have:]); err != nil {
					return nil, err
				}
				content = more
			}
			return content, nil
		}
	case "gzip":
		b.from, err = gzip.NewReader(r.Body)
	case "deflate": // which in HTTP means zlib
		b.from, err = zlib.NewReader(r.Body)
	default:
		err = oip.Errorf(oip.InvalidArgument, "header Content-Encoding is %q, allowed are gzip and deflate", clip(encoding))
	}
	if err != nil {
		return nil, err
	}
	content, err = io.ReadAll(io.LimitReader(b, limit+1))
	if err == nil && int64(len(content)) > limit {
		err = oip.Errorf(oip.TooLarge, "request body has more than %d bytes", limit)
	}
	return content, err
}
