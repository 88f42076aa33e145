package oip

import (
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// Config configures a Server.
type Config struct {
	Backend    Backend
	Repository Repository // nil: there is none
	Access     Access     // nil: everybody may ask for everything
	Version    string     // of the program
	MaxBody    int64      // bytes of a request; 0: DefaultMaxBody
	MaxBodies  int64      // bytes of all requests at a time; 0: DefaultMaxBodies
	// SharedMemory lets callers name POSIX shared memory of this host.
	SharedMemory bool
	// TraceFile is where traces are written; empty: requests cannot be traced.
	TraceFile string
	LogLevel  *slog.LevelVar // that the logging settings change; nil: they change nothing
	Log       *slog.Logger
}

// Server answers the protocol's requests for any transport. It is safe for
// concurrent use.
type Server struct {
	cfg    Config
	held   atomic.Int64 // bytes of requests
	memory memory
	tracer tracer
	logs   logs
}

// New gives the server for a backend.
func New(cfg Config) *Server {
	if cfg.MaxBody == 0 {
		cfg.MaxBody = DefaultMaxBody
	}
	if cfg.MaxBodies == 0 {
		cfg.MaxBodies = DefaultMaxBodies
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, logs: logs{level: cfg.LogLevel, format: formatDefault}}
	s.tracer.init(cfg.TraceFile, cfg.Log)
	return s
}

// permit says why the caller of a request may not ask for a model, or, with
// "", for what concerns all models.
func (s *Server) permit(ctx context.Context, model string) error {
	if s.cfg.Access == nil {
		return nil
	}
	return s.cfg.Access.Model(ctx, model)
}

// MaxBody is how many bytes a request may have.
func (s *Server) MaxBody() int64 { return s.cfg.MaxBody }

// Hold counts n more bytes of requests that are in memory, until they are
// held no more (-n). It refuses them as Unavailable where they are too many,
// and has not counted them then.
func (s *Server) Hold(n int64) error {
	if s.held.Add(n) > s.cfg.MaxBodies && n > 0 {
		s.held.Add(-n)
		return Errorf(Unavailable, "the requests at work have %d bytes, the most that they may", s.cfg.MaxBodies)
	}
	return nil
}

// Part says for how many of the n bytes of a message to have memory when have
// of them have come, which is how many there was memory for so far. Callers
// that announce much and send nothing hold little, and memory does not grow
// often.
func Part(have, n int64) int64 {
	const small, first, second, growth = 16 << 10, 1 << 10, 1 << 20, 8
	switch {
	case n <= small:
		return n
	case have == 0:
		return first
	default:
		return min(n, max(second, growth*have))
	}
}

// Request is an inference as it came over a transport.
type Request struct {
	Model   string
	Version int64 // 0: the backend's choice
	ID      string
	Inputs  []Input
	Outputs []Output // nil: all
	// Priority and Timeout are those of Call.
	Priority int
	Timeout  time.Duration
	// Parameters and Headers too.
	Parameters, Headers Values
}

// Input is a tensor of a request: with data, or a slice of shared memory that
// holds them.
type Input struct {
	tensor.Tensor
	Memory *Slice
}

// Output is one that a request asks for.
type Output struct {
	Name string
	// Classes is how many classes to answer with instead of the tensor, the
	// most likely first; 0: the tensor.
	Classes int
	Memory  *Slice // where the data are to be written; nil: they are answered
}

// Slice is a part of a registered region of shared memory.
type Slice struct {
	Region       string
	Offset, Size int64
}

// Response is the answer to a Request.
type Response struct {
	Model   string
	Version int64
	ID      string
	Outputs []OutputTensor
	Header  map[string]string
	release func()
}

// OutputTensor is a tensor of a response; its data are nil where Memory says
// in which shared memory they are.
type OutputTensor struct {
	tensor.Tensor
	Memory *Slice
}

// Release gives the memory of the outputs back. It is called once, when they
// are not used any more.
func (r *Response) Release() {
	if r.release != nil {
		r.release()
	}
}

// Ready says why not all that should be served can be; without a reason, which
// names models, to a caller who may not ask for all of them.
func (s *Server) Ready(ctx context.Context) error {
	if err := s.cfg.Backend.Ready(ctx); err != nil {
		if s.permit(ctx, "") != nil {
			return Errorf(NotReady, "not ready")
		}
		return Errorf(NotReady, "not ready: %w", err)
	}
	return nil
}

// Metadata describes the server: its name, version, and the extensions of the
// protocol that work.
func (s *Server) Metadata() *inference.ServerMetadataResponse {
	extensions := []string{"binary_tensor_data", "classification", "parameters", "schedule_policy", "model_configuration", "statistics"}
	if s.cfg.Repository != nil {
		extensions = append(extensions, "model_repository", "model_repository(unload_dependents)")
	}
	if s.cfg.SharedMemory {
		extensions = append(extensions, "system_shared_memory")
	}
	if s.cfg.TraceFile != "" {
		extensions = append(extensions, "trace")
	}
	if s.cfg.LogLevel != nil {
		extensions = append(extensions, "logging")
	}
	return &inference.ServerMetadataResponse{Name: "dunlin", Version: s.cfg.Version, Extensions: extensions}
}

// Model describes what answers to a name; it is Unavailable where it is not
// ready.
func (s *Server) Model(ctx context.Context, name string, version int64) (Model, error) {
	if err := s.permit(ctx, name); err != nil {
		return Model{}, err
	}
	m, err := s.cfg.Backend.Model(ctx, name, version)
	if err == nil && m.NotReady != "" {
		err = Errorf(Unavailable, "model %q is not ready: %s", name, m.NotReady)
	}
	return m, err
}

// ModelReady says why a model cannot answer.
func (s *Server) ModelReady(ctx context.Context, name string, version int64) error {
	if err := s.permit(ctx, name); err != nil {
		return err
	}
	m, err := s.cfg.Backend.Model(ctx, name, version)
	if err == nil && m.NotReady != "" {
		err = Errorf(NotReady, "model %q is not ready: %s", name, m.NotReady)
	}
	return err
}

// Statistics is that of Backend; of all models, it gives those that the caller
// may know of.
func (s *Server) Statistics(ctx context.Context, name string, version int64) ([]*inference.ModelStatistics, error) {
	if name != "" {
		if err := s.permit(ctx, name); err != nil {
			return nil, err
		}
	}
	list, err := s.cfg.Backend.Statistics(ctx, name, version)
	if name == "" && s.cfg.Access != nil {
		list = slices.DeleteFunc(list, func(m *inference.ModelStatistics) bool { return !s.cfg.Access.Sees(ctx, m.GetName()) })
	}
	return list, err
}
