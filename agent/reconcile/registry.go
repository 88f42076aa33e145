package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry says where bundles come from.
type Registry struct {
	URL string // "https://host:port"
	// Client asks for them, as the device. It must have no limit to the time
	// that an answer may take in all, and leave compression to others.
	Client *http.Client
}

// defaultStall is how long a transfer may go without a byte before it is
// given up. There is no limit to how long it may take in all.
const defaultStall = 30 * time.Second

var errStalled = errors.New("no byte arrived")

// remote reads from the registry. It may be used by many goroutines.
type remote struct {
	Registry
	stall time.Duration
}

func newRemote(r Registry, stall time.Duration) *remote {
	r.URL = strings.TrimSuffix(r.URL, "/")
	return &remote{Registry: r, stall: stall}
}

// statusError is an answer that is not the one asked for.
type statusError struct {
	url    string
	status int
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("GET %s: %d %s", e.url, e.status, http.StatusText(e.status))
	switch e.status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return text + ": the registry refuses this device's certificate"
	case http.StatusNotFound:
		return text + ": the registry does not have it"
	}
	return text
}

func (r *remote) manifestURL(model string, d digest.Digest) string {
	return r.URL + "/v2/" + model + "/manifests/" + d.String()
}

func (r *remote) blobURL(model string, d digest.Digest) string {
	return r.URL + "/v2/" + model + "/blobs/" + d.String()
}

// body is an answer that is given up when it stalls.
type body struct {
	io.ReadCloser
	ctx    context.Context // of this one request
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
	offset int64 // of the body's first byte in the blob
	whole  bool  // the body goes on to the blob's end
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.timer.Reset(b.stall)
	}
	if err != nil && err != io.EOF {
		if cause := context.Cause(b.ctx); cause != nil {
			err = cause
		}
	}
	return n, err
}

func (b *body) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.ReadCloser.Close()
}

// get asks for length bytes of a blob from offset on, or for all of it where
// length is 0. A registry that does not know ranges answers with all of it:
// the body says where it begins.
func (r *remote) get(ctx context.Context, url string, offset, length int64) (*body, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	req.Header.Set("User-Agent", "dunlin-agent")
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest+", */*;q=0.1")
	if length > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	}
	b := &body{ctx: ctx, cancel: cancel, stall: r.stall}
	b.timer = time.AfterFunc(r.stall, func() {
		cancel(fmt.Errorf("GET %s: %w for %s", url, errStalled, r.stall))
	})
	resp, err := r.Client.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		b.timer.Stop()
		cancel(nil)
		return nil, err
	}
	b.ReadCloser = resp.Body
	switch {
	case resp.StatusCode == http.StatusPartialContent && length > 0:
		start, ok := rangeStart(resp.Header.Get("Content-Range"))
		if !ok || start != offset {
			_ = b.Close()
			return nil, fmt.Errorf("GET %s: asked for bytes from %d, the answer has Content-Range %q", url, offset, resp.Header.Get("Content-Range"))
		}
		b.offset = offset
	case resp.StatusCode == http.StatusOK:
		b.whole = true
	default:
		_ = b.Close()
		return nil, &statusError{url, resp.StatusCode}
	}
	return b, nil
}

// rangeStart reads the first byte's position out of "bytes 5-9/100".
func rangeStart(contentRange string) (int64, bool) {
	rest, ok := strings.CutPrefix(contentRange, "bytes ")
	first, _, found := strings.Cut(rest, "-")
	start, err := strconv.ParseInt(first, 10, 64)
	return start, ok && found && err == nil && start >= 0
}

// small reads a whole document of at most limit bytes and verifies it. One
// that is longer, or does not have its digest, is asked for again before that
// counts.
func (r *remote) small(ctx context.Context, url, what string, d digest.Digest, limit int64) ([]byte, error) {
	for try := 0; ; try++ {
		raw, err := r.readAll(ctx, url, limit+1)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		if int64(len(raw)) > limit {
			err = fmt.Errorf("has more than %d bytes", limit)
		} else if got := digest.FromBytes(raw); got != d {
			err = fmt.Errorf("has digest %s, want %s", got, d)
		} else {
			return raw, nil
		}
		if try == chunkRetries {
			return nil, &VerifyError{File: what, Err: err}
		}
	}
}

// readAll reads a blob, or its first most bytes.
func (r *remote) readAll(ctx context.Context, url string, most int64) ([]byte, error) {
	b, err := r.get(ctx, url, 0, 0)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	raw, err := io.ReadAll(io.LimitReader(b, most))
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", url, err)
	}
	return raw, nil
}
