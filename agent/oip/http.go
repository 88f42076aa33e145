package oip

import (
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/dunlin/dunlin/models/tensor"
)

// headerLength says how many bytes of a body are JSON.
const headerLength = "Inference-Header-Content-Length"

// Config configures a Handler.
type Config struct {
	Backend   Backend
	Version   string // of the server
	MaxBody   int64  // 0: DefaultMaxBody
	MaxBodies int64  // 0: DefaultMaxBodies
}

// Handler serves the protocol under /v2. At most MaxBody bytes of a request
// are held in memory, and MaxBodies of all requests.
type Handler struct {
	cfg  Config
	held atomic.Int64 // bytes of bodies
}

// New gives the handler for a backend.
func New(cfg Config) *Handler {
	if cfg.MaxBody == 0 {
		cfg.MaxBody = DefaultMaxBody
	}
	if cfg.MaxBodies == 0 {
		cfg.MaxBodies = DefaultMaxBodies
	}
	return &Handler{cfg: cfg}
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := h.serve(w, r); err != nil {
		writeError(w, err)
	}
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) error {
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if len(path) >= 3 && path[0] == "v2" && path[1] == "models" {
		name, rest := path[2], path[3:]
		var version int64
		if len(rest) >= 2 && rest[0] == "versions" {
			v, err := strconv.ParseInt(rest[1], 10, 64)
			if err != nil || v < 1 {
				return Errorf(InvalidArgument, "version %q of model %q is not a number from 1 on", clip(rest[1]), clip(name))
			}
			version, rest = v, rest[2:]
		}
		switch strings.Join(rest, "/") {
		case "":
			return get(w, r, func() error { return h.metadata(w, r, name, version) })
		case "ready":
			return get(w, r, func() error { return h.modelReady(r, name, version) })
		case "infer":
			if r.Method != http.MethodPost {
				return notAllowed(w, r, http.MethodPost)
			}
			return h.infer(w, r, name, version)
		}
	}
	switch strings.Join(path, "/") {
	case "v2":
		return get(w, r, func() error { return h.server(w) })
	case "v2/health/live":
		return get(w, r, func() error { return nil })
	case "v2/health/ready":
		return get(w, r, func() error {
			if !h.cfg.Backend.Ready(r.Context()) {
				return Errorf(NotReady, "not ready")
			}
			return nil
		})
	}
	return Errorf(NotFound, "there is nothing at %q", clip(r.URL.Path))
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
	return Errorf(NotAllowed, "method %s is not allowed here, allowed is %s", clip(r.Method), allowed)
}

func (h *Handler) server(w http.ResponseWriter) error {
	return writeJSON(w, http.StatusOK, struct {
		Name       string   `json:"name"`
		Version    string   `json:"version"`
		Extensions []string `json:"extensions"`
	}{"dunlin", h.cfg.Version, []string{"binary_tensor_data"}})
}

type tensorMetadata struct {
	Name     string  `json:"name"`
	Datatype string  `json:"datatype"`
	Shape    []int64 `json:"shape"`
}

func metadataOf(infos []tensor.Info) []tensorMetadata {
	list := make([]tensorMetadata, len(infos))
	for i, t := range infos {
		list[i] = tensorMetadata{t.Name, t.Type.String(), append([]int64{}, t.Shape...)}
	}
	return list
}

func (h *Handler) metadata(w http.ResponseWriter, r *http.Request, name string, version int64) error {
	m, err := h.cfg.Backend.Model(r.Context(), name, version)
	if err != nil {
		return err
	}
	if m.NotReady != "" {
		return Errorf(Unavailable, "model %q is not ready: %s", clip(name), m.NotReady)
	}
	versions := make([]string, len(m.Versions))
	for i, v := range m.Versions {
		versions[i] = strconv.FormatInt(v, 10)
	}
	return writeJSON(w, http.StatusOK, struct {
		Name     string           `json:"name"`
		Versions []string         `json:"versions"`
		Platform string           `json:"platform"`
		Inputs   []tensorMetadata `json:"inputs"`
		Outputs  []tensorMetadata `json:"outputs"`
	}{m.Name, versions, "onnxruntime_onnx", metadataOf(m.Inputs), metadataOf(m.Outputs)})
}

func (h *Handler) modelReady(r *http.Request, name string, version int64) error {
	m, err := h.cfg.Backend.Model(r.Context(), name, version)
	if err == nil && m.NotReady != "" {
		err = Errorf(NotReady, "model %q is not ready: %s", clip(name), m.NotReady)
	}
	return err
}

func (h *Handler) infer(w http.ResponseWriter, r *http.Request, name string, version int64) error {
	share := share{handler: h}
	defer share.release()
	body, err := h.readBody(r, &share)
	if err != nil {
		return err
	}
	jsonLength := len(body)
	if s := r.Header.Get(headerLength); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > len(body) {
			return Errorf(InvalidArgument, "header %s is %q, allowed are 0 to %d, the length of the body", headerLength, clip(s), len(body))
		}
		jsonLength = n
	}
	var in *inferRequest
	if jsonLength == 0 && r.Header.Get(headerLength) != "" {
		m, err := h.cfg.Backend.Model(r.Context(), name, version)
		if err != nil {
			return err
		}
		if m.NotReady != "" {
			return Errorf(Unavailable, "model %q is not ready: %s", clip(name), m.NotReady)
		}
		in, err = rawRequest(body, m.Inputs)
		if err != nil {
			return err
		}
	} else if in, err = decodeRequest(body[:jsonLength], body[jsonLength:]); err != nil {
		return err
	}
	out, err := h.cfg.Backend.Infer(r.Context(), Request{Model: name, Version: version, Inputs: in.inputs, Outputs: in.outputNames()})
	if err != nil {
		return err
	}
	head, binary, err := encodeResponse(in, out)
	if err != nil {
		return err
	}
	size := len(head)
	for _, b := range binary {
		size += len(b)
	}
	header := w.Header()
	for k, v := range out.Header {
		header.Set(k, v)
	}
	header.Set("Content-Type", "application/json")
	if binary != nil {
		header.Set("Content-Type", "application/octet-stream")
		header.Set(headerLength, strconv.Itoa(len(head)))
	}
	header.Set("Content-Length", strconv.Itoa(size))
	for _, b := range append([][]byte{head}, binary...) {
		if _, err := w.Write(b); err != nil {
			break // the caller is gone; there is nobody to tell
		}
	}
	return nil
}

// share is what a request has of MaxBodies.
type share struct {
	handler *Handler
	body    io.Reader // what Read reads, and takes for
	taken   int64
}

func (s *share) take(n int64) error {
	s.taken += n
	if most := s.handler.cfg.MaxBodies; s.handler.held.Add(n) > most {
		return Errorf(Unavailable, "the requests at work have %d bytes, the most that they may", most)
	}
	return nil
}

func (s *share) release() { s.handler.held.Add(-s.taken) }

func (s *share) Read(p []byte) (int, error) {
	n, err := s.body.Read(p)
	if full := s.take(int64(n)); full != nil {
		return n, full
	}
	return n, err
}

// readBody reads the whole body, decompressed.
func (h *Handler) readBody(r *http.Request, share *share) ([]byte, error) {
	limit := h.cfg.MaxBody
	if r.ContentLength > limit {
		return nil, Errorf(TooLarge, "request body has %d bytes, allowed are %d", r.ContentLength, limit)
	}
	var body io.Reader = r.Body
	switch encoding := r.Header.Get("Content-Encoding"); encoding {
	case "", "identity":
		if n := r.ContentLength; n >= 0 {
			if err := share.take(n); err != nil {
				return nil, err
			}
			b := make([]byte, n)
			if _, err := io.ReadFull(body, b); err != nil {
				return nil, readError(err)
			}
			return b, nil
		}
	case "gzip":
		z, err := gzip.NewReader(body)
		if err != nil {
			return nil, readError(err)
		}
		body = z
	case "deflate": // which in HTTP means zlib
		z, err := zlib.NewReader(body)
		if err != nil {
			return nil, readError(err)
		}
		body = z
	default:
		return nil, Errorf(InvalidArgument, "header Content-Encoding is %q, allowed are gzip and deflate", clip(encoding))
	}
	share.body = io.LimitReader(body, limit+1)
	b, err := io.ReadAll(share)
	if err != nil {
		return nil, readError(err)
	}
	if int64(len(b)) > limit {
		return nil, Errorf(TooLarge, "request body has more than %d bytes", limit)
	}
	return b, nil
}

func readError(err error) error {
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return Errorf(TooLarge, "read request body: %w", err)
	}
	return Errorf(InvalidArgument, "read request body: %w", err)
}

func writeError(w http.ResponseWriter, err error) {
	code := codeOf(err)
	if code == Unavailable {
		w.Header().Set("Retry-After", "1")
	}
	// A write that fails has nobody left to tell.
	_ = writeJSON(w, code.status(), struct {
		Error string `json:"error"`
	}{err.Error()})
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b) // as above
	return nil
}

// clip shortens what a caller sent for an error message.
func clip(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}
