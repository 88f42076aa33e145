// Package rest is the Open Inference Protocol over HTTP.
package rest

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/dunlin/dunlin/agent/oip"
)

// A body must arrive, and an answer be taken, in slowTime and a second for
// each slowRate bytes.
const (
	slowTime = 30 * time.Second
	slowRate = 256 << 10
)

// New gives the handler of all that is under /v2.
func New(server *oip.Server) http.Handler {
	return &handler{server: server, slowTime: slowTime, slowRate: slowRate}
}

type handler struct {
	server   *oip.Server
	slowTime time.Duration
	slowRate int64
}

// allowed is how long a transfer of n bytes may take.
func (h *handler) allowed(n int64) time.Duration {
	return h.slowTime + time.Duration(n/h.slowRate)*time.Second
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := h.serve(w, r); err != nil {
		h.writeError(w, err)
	}
}

func (h *handler) serve(w http.ResponseWriter, r *http.Request) error {
	path, ok := strings.CutPrefix(strings.TrimSuffix(r.URL.Path, "/"), "/v2")
	area, rest, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	switch {
	case !ok || path != "" && path[0] != '/':
	case path == "":
		return get(w, r, func() error { return h.write(w, protoJSON(h.server.Metadata(), presentFields)) })
	case path == "/health/live":
		return get(w, r, func() error { return h.write(w, nil) })
	case path == "/health/ready":
		return get(w, r, func() error { return h.done(w, h.server.Ready(r.Context())) })
	case path == "/models/stats":
		return get(w, r, func() error { return h.statistics(w, r, "", 0) })
	case path == "/trace/setting":
		return h.trace(w, r, "")
	case path == "/logging":
		return h.logging(w, r)
	case area == "models":
		return h.model(w, r, rest)
	case area == "repository":
		return h.repository(w, r, rest)
	case area == "systemsharedmemory":
		return h.memory(w, r, rest)
	case area == "cudasharedmemory":
		return h.cudaMemory(w, r, rest)
	}
	return notFound(r)
}

func notFound(r *http.Request) error {
	return oip.Errorf(oip.NotFound, "there is nothing at %q", clip(r.URL.Path))
}

// model answers what is under /v2/models: NAME[/versions/N][/what].
func (h *handler) model(w http.ResponseWriter, r *http.Request, path string) error {
	name, what, _ := strings.Cut(path, "/")
	if len(name) > oip.MaxName {
		return oip.Errorf(oip.InvalidArgument, "the model's name has %d bytes, allowed are %d", len(name), oip.MaxName)
	}
	var version int64
	if s, ok := strings.CutPrefix(what, "versions/"); ok {
		s, what, _ = strings.Cut(s, "/")
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil || v < 1 {
			return oip.Errorf(oip.InvalidArgument, "version %q of model %q is not a number from 1 on", clip(s), clip(name))
		}
		version = v
	}
	switch {
	case name == "":
		return notFound(r)
	case what == "infer":
		if r.Method != http.MethodPost {
			return notAllowed(w, r, http.MethodPost)
		}
		return h.infer(w, r, name, version)
	case what == "":
		return get(w, r, func() error { return h.metadata(w, r, name, version) })
	case what == "ready":
		return get(w, r, func() error { return h.done(w, h.server.ModelReady(r.Context(), name, version)) })
	case what == "config":
		return get(w, r, func() error { return h.config(w, r, name, version) })
	case what == "stats":
		return get(w, r, func() error { return h.statistics(w, r, name, version) })
	case what == "trace/setting" && version == 0:
		return h.trace(w, r, name)
	}
	return notFound(r)
}

// get answers with f, or refuses other methods.
func get(w http.ResponseWriter, r *http.Request, f func() error) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return notAllowed(w, r, "GET, HEAD")
	}
	return f()
}

func notAllowed(w http.ResponseWriter, r *http.Request, allowed string) error {
	w.Header().Set("Allow", allowed)
	return oip.Errorf(oip.NotAllowed, "method %s is not allowed here, allowed is %s", clip(r.Method), allowed)
}

// status gives the HTTP status of a code.
func status(c oip.Code) int {
	switch c {
	case oip.InvalidArgument, oip.Cancelled, oip.NotReady:
		return http.StatusBadRequest
	case oip.Unauthenticated:
		return http.StatusUnauthorized
	case oip.Forbidden:
		return http.StatusForbidden
	case oip.NotFound:
		return http.StatusNotFound
	case oip.NotAllowed:
		return http.StatusMethodNotAllowed
	case oip.TooLarge:
		return http.StatusRequestEntityTooLarge
	case oip.TooOften:
		return http.StatusTooManyRequests
	case oip.Unsupported:
		return http.StatusNotImplemented
	case oip.Unavailable, oip.Expired:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

// WriteError answers a request that did not come to the handler as the handler
// would.
func WriteError(w http.ResponseWriter, err error) {
	(&handler{slowTime: slowTime, slowRate: slowRate}).writeError(w, err)
}

func (h *handler) writeError(w http.ResponseWriter, err error) {
	code := status(oip.CodeOf(err))
	if code == http.StatusServiceUnavailable || code == http.StatusTooManyRequests {
		after := time.Second
		if e, ok := errors.AsType[*oip.Error](err); ok {
			after = max(after, e.RetryAfter)
		}
		seconds := (after + time.Second - 1) / time.Second
		w.Header().Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	b, _ := json.Marshal(struct { // a string can be marshalled
		Error string `json:"error"`
	}{err.Error()})
	h.send(w, code, jsonType, b)
}

// done answers with nothing, or fails.
func (h *handler) done(w http.ResponseWriter, err error) error {
	if err != nil {
		return err
	}
	return h.write(w, nil)
}

// writeJSON answers with v as JSON, or fails.
func (h *handler) writeJSON(w http.ResponseWriter, v any, err error) error {
	if err != nil {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return h.write(w, b)
}

// write answers with JSON; nil is an answer without content.
func (h *handler) write(w http.ResponseWriter, b []byte) error {
	h.send(w, http.StatusOK, jsonType, b)
	return nil
}

var (
	jsonType   = []string{"application/json"}
	binaryType = []string{"application/octet-stream"}
)

// send answers with a body of JSON and what follows it. A caller that is gone
// or too slow has nobody left to tell, so the connection ends then.
func (h *handler) send(w http.ResponseWriter, code int, contentType []string, head []byte, data ...[]byte) {
	size := len(head)
	for _, b := range data {
		size += len(b)
	}
	header := w.Header()
	header["Content-Type"] = contentType
	header["Content-Length"] = []string{strconv.Itoa(size)}
	h.hurry(w, size)
	w.WriteHeader(code)
	_ = writeAll(w, head, data)
}

// hurry bounds how long the caller may take for an answer of so many bytes.
// The server lifts the deadline when the answer is through.
func (h *handler) hurry(w http.ResponseWriter, size int) {
	// A writer without deadlines has nobody slow at its end.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(h.allowed(int64(size))))
}

// writeAll writes head and data, which are not copied where they are large:
// w joins what is small.
func writeAll(w io.Writer, head []byte, data [][]byte) error {
	if _, err := w.Write(head); err != nil {
		return err
	}
	for _, b := range data {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// clip shortens what a caller sent for an error message.
func clip(s string) string {
	const most = 64
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
