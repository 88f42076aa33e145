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

// streams is how many connections to a registry share one download: one alone
// is bound by its window on a long way, and by one processor for TLS.
const streams = 4

// remote is the registry, or another server that speaks as it does.
type remote struct {
	Registry
	stall time.Duration
}

func newRemote(r Registry, stall time.Duration) *remote {
	r.URL = strings.TrimSuffix(r.URL, "/")
	return &remote{Registry: r, stall: stall}
}

func (r *remote) String() string { return r.URL }
func (r *remote) Streams() int   { return streams }

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

// Answered says whether an error of a registry is an answer of it: otherwise it
// was not reached, or the way to it broke.
func Answered(err error) bool {
	_, status := errors.AsType[*statusError](err)
	return status || errors.Is(err, ErrAbsent)
}

func (e *statusError) Is(target error) bool {
	return target == ErrAbsent && e.status == http.StatusNotFound
}

func (r *remote) url(of Ref) string {
	kind := "/blobs/"
	if of.Manifest {
		kind = "/manifests/"
	}
	return r.URL + "/v2/" + of.Model + kind + of.Digest.String()
}

// stalling is a body that is given up when no byte comes.
type stalling struct {
	io.ReadCloser
	url    string
	ctx    context.Context // of this one request
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
}

func (b *stalling) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.timer.Reset(b.stall)
	}
	if err != nil && err != io.EOF {
		if cause := context.Cause(b.ctx); cause != nil {
			err = cause
		}
		err = fmt.Errorf("GET %s: %w", b.url, err)
	}
	return n, err
}

func (b *stalling) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.ReadCloser.Close()
}

// Get asks by HTTP. The registry must be known.
func (r *remote) Get(ctx context.Context, of Ref, offset, length int64) (*Body, error) {
	url := r.url(of)
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
	b := &stalling{url: url, ctx: ctx, cancel: cancel, stall: r.stall}
	b.timer = time.AfterFunc(r.stall, func() {
		cancel(fmt.Errorf("%w for %s", errStalled, r.stall))
	})
	resp, err := r.Client.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("GET %s: %w", url, cause)
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
		return &Body{ReadCloser: b, Offset: offset}, nil
	case resp.StatusCode == http.StatusOK:
		return &Body{ReadCloser: b, Whole: true}, nil
	}
	_ = b.Close()
	return nil, &statusError{url, resp.StatusCode}
}

// rangeStart reads the first byte's position out of "bytes 5-9/100".
func rangeStart(contentRange string) (int64, bool) {
	rest, ok := strings.CutPrefix(contentRange, "bytes ")
	first, _, found := strings.Cut(rest, "-")
	start, err := strconv.ParseInt(first, 10, 64)
	return start, ok && found && err == nil && start >= 0
}
