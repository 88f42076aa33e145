package oip

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// The bounds of tracing on disk. A trace file that has MaxTraceFile bytes, or
// as many traces as log_frequency says, is renamed to TraceFile.N; N counts
// from 0 and begins again there after MaxTraceFiles.
const (
	MaxTraceFile    = 16 << 20
	MaxTraceFiles   = 8
	maxTracedModels = 1024 // with settings of their own
)

// The settings that a sampler holds as numbers.
const (
	traceLevel = iota // 0: OFF, 1: TIMESTAMPS
	traceRate
	traceCount // as it was set; sampler.left counts down
	traceFrequency
	traceNumbers
)

var (
	traceNames    = [traceNumbers]string{"trace_level", "trace_rate", "trace_count", "log_frequency"}
	traceDefaults = [traceNumbers]int64{traceRate: 1000, traceCount: -1}
	traceLeast    = [traceNumbers]int64{traceCount: -1}
)

// sampler picks the requests to trace by a set of settings that does not
// change; what it counts does.
type sampler struct {
	value [traceNumbers]int64
	own   [traceNumbers]bool // set for this model, or for all of them; not inherited
	seen  atomic.Int64       // requests
	left  atomic.Int64       // traces; -1: no limit
}

// sample says whether to trace a request that begins now.
func (s *sampler) sample() bool {
	if s.value[traceLevel] == 0 || s.left.Load() == 0 || s.seen.Add(1)%s.value[traceRate] != 0 {
		return false
	}
	for {
		left := s.left.Load()
		if left <= 0 {
			return left < 0
		}
		if s.left.CompareAndSwap(left, left-1) {
			return true
		}
	}
}

// sampling says which sampler a request goes to. It never changes.
type sampling struct {
	global *sampler
	models map[string]*sampler
}

func (t *sampling) of(model string) *sampler {
	if s := t.models[model]; s != nil {
		return s
	}
	return t.global
}

// tracer writes what happened when to requests.
type tracer struct {
	file string
	log  *slog.Logger

	active atomic.Pointer[sampling] // nil while nothing is traced

	mu  sync.Mutex // guards all, which active is where anything is on
	all sampling

	ids      atomic.Int64 // traces
	lines    atomic.Int64 // in file
	rotating atomic.Bool  // one at a time, which owns index
	index    int
}

func (t *tracer) init(file string, log *slog.Logger) {
	t.file, t.log = file, log
	t.all.global = newSampler(traceDefaults)
}

func newSampler(value [traceNumbers]int64) *sampler {
	s := &sampler{value: value}
	s.left.Store(value[traceCount])
	return s
}

// now gives the settings, with how many traces are left.
func (s *sampler) now() [traceNumbers]int64 {
	v := s.value
	v[traceCount] = s.left.Load()
	return v
}

// sample gives the sampler that picked a request, nil where it is not traced.
func (t *tracer) sample(model string) *sampler {
	active := t.active.Load()
	if active == nil {
		return nil
	}
	if s := active.of(model); s.sample() {
		return s
	}
	return nil
}

// TraceSettings changes the settings of a model, or of all models where model
// is empty, and gives those that are in force. A setting without values goes
// back to that of all models; nil changes nothing.
func (s *Server) TraceSettings(ctx context.Context, model string, change map[string][]string) (map[string][]string, error) {
	if model != "" || len(change) > 0 { // those of all models may be seen
		if err := s.permit(ctx, model); err != nil {
			return nil, err
		}
	}
	if model != "" {
		if _, err := s.cfg.Backend.Model(ctx, model, 0); CodeOf(err) == NotFound {
			return nil, Errorf(InvalidArgument, "trace settings of an unknown model: %w", err)
		} else if err != nil {
			return nil, err
		}
	}
	t := &s.tracer
	c, err := parseTraceChange(change)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(change) > 0 {
		if err := t.set(model, c); err != nil {
			return nil, err
		}
	}
	now := t.all.of(model).now()
	shown := map[string][]string{"trace_level": {"OFF"}, "trace_file": {t.file}, "trace_mode": {"triton"}}
	for i := traceRate; i < traceNumbers; i++ {
		shown[traceNames[i]] = []string{strconv.FormatInt(now[i], 10)}
	}
	if now[traceLevel] > 0 {
		shown["trace_level"] = []string{"TIMESTAMPS"}
	}
	return shown, nil
}

// traceChange is a change of settings.
type traceChange struct {
	value          [traceNumbers]int64
	given, cleared [traceNumbers]bool
}

func parseTraceChange(change map[string][]string) (traceChange, error) {
	var c traceChange
	for name, values := range change {
		i := slices.Index(traceNames[:], name)
		switch {
		case name == "trace_file" || name == "trace_mode":
			return c, Errorf(Unsupported, "%s cannot be changed over the network", name)
		case i < 0:
			return c, Errorf(InvalidArgument, "unknown trace setting %q", clip(name))
		case len(values) == 0:
			c.cleared[i] = true
			continue
		}
		c.given[i] = true
		var err error
		if i == traceLevel {
			c.value[i], err = parseTraceLevel(values)
		} else {
			c.value[i], err = parseTraceNumber(name, values, traceLeast[i])
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

func parseTraceLevel(values []string) (int64, error) {
	for _, v := range values {
		switch {
		case v == "OFF" && len(values) > 1:
			return 0, Errorf(InvalidArgument, "trace_level OFF cannot be given with others")
		case v == "TENSORS":
			return 0, Errorf(Unsupported, "trace_level TENSORS is not supported, allowed are OFF and TIMESTAMPS")
		case v != "OFF" && v != "TIMESTAMPS":
			return 0, Errorf(InvalidArgument, "trace_level is %q, allowed are OFF and TIMESTAMPS", clip(v))
		}
	}
	if values[0] == "OFF" {
		return 0, nil
	}
	return 1, nil
}

func parseTraceNumber(name string, values []string, least int64) (int64, error) {
	v, err := strconv.ParseInt(values[0], 10, 64)
	if len(values) > 1 || err != nil || v < least || v > math.MaxInt32 {
		return 0, Errorf(InvalidArgument, "%s is %.64q, allowed is one integer from %d to %d", name, values, least, math.MaxInt32)
	}
	return v, nil
}

// set changes the settings of a model, or of all models, or nothing.
func (t *tracer) set(model string, c traceChange) error {
	next := sampling{global: t.all.global, models: map[string]*sampler{}}
	if model == "" {
		next.global = c.apply(t.all.global, traceDefaults)
		c = traceChange{}
	}
	// What a model has not set for itself is that of all models.
	inherited := next.global.now()
	for name, s := range t.all.models {
		switch {
		case name == model:
		case model == "":
			next.models[name] = c.apply(s, inherited)
		default:
			next.models[name] = s
		}
	}
	if model != "" {
		if s := c.apply(t.all.models[model], inherited); s.own != [traceNumbers]bool{} {
			next.models[model] = s
		}
	}
	if len(next.models) > maxTracedModels {
		return Errorf(Unavailable, "%d models have trace settings of their own, the most that may", maxTracedModels)
	}
	on := false
	for _, s := range append(slices.Collect(maps.Values(next.models)), next.global) {
		if s.value[traceLevel] == 0 {
			continue
		}
		on = true
		if s.value[traceRate] == 0 {
			return Errorf(InvalidArgument, "trace_rate is 0, allowed with a trace_level other than OFF are integers from 1 to %d", math.MaxInt32)
		}
		if t.file == "" {
			return Errorf(InvalidArgument, "trace_level cannot be other than OFF, as this server has no trace_file")
		}
	}
	t.all = next
	if on {
		t.active.Store(&next)
	} else {
		t.active.Store(nil)
	}
	return nil
}

// apply gives the sampler of settings that replace those of current, which is
// nil where there are none, and otherwise are those of fallback.
func (c *traceChange) apply(current *sampler, fallback [traceNumbers]int64) *sampler {
	var own [traceNumbers]bool
	value := fallback
	for i := range traceNumbers {
		switch {
		case c.cleared[i]:
		case c.given[i]:
			own[i], value[i] = true, c.value[i]
		case current != nil && current.own[i]:
			own[i], value[i] = true, current.now()[i]
		}
	}
	s := newSampler(value)
	s.own = own
	return s
}

// traceRecord is a line of a trace file.
type traceRecord struct {
	ID           int64        `json:"id"`
	ModelName    string       `json:"model_name"`
	ModelVersion int64        `json:"model_version,omitempty"`
	RequestID    string       `json:"request_id,omitempty"`
	Timestamps   []traceStamp `json:"timestamps"`
}

type traceStamp struct {
	Name string `json:"name"`
	NS   int64  `json:"ns"` // since 1970
}

// write writes the trace of a request that has ended; response is nil where
// it failed.
func (t *tracer) write(s *sampler, r *Request, response *Response, start time.Time, times spent, end time.Time) {
	record := traceRecord{ID: t.ids.Add(1), ModelName: r.Model, ModelVersion: r.Version, RequestID: r.ID}
	at := start.UnixNano()
	stamp := func(name string, after time.Duration) {
		at += int64(after)
		record.Timestamps = append(record.Timestamps, traceStamp{name, at})
	}
	stamp("REQUEST_START", 0)
	if response != nil {
		record.ModelName, record.ModelVersion = response.Model, response.Version
		stamp("QUEUE_START", times.begun.Sub(start))
		stamp("COMPUTE_START", times.Queue)
		stamp("COMPUTE_INPUT_END", times.Input)
		stamp("COMPUTE_OUTPUT_START", times.Infer)
		stamp("COMPUTE_END", times.Output)
	}
	at = max(at, start.Add(end.Sub(start)).UnixNano())
	stamp("REQUEST_END", 0)
	line, err := json.Marshal(record)
	if err == nil {
		err = t.append(append(line, '\n'), s.value[traceFrequency])
	}
	if err != nil {
		t.log.Error("a trace is lost", "error", err)
	}
}

// append writes a line at the end of the file, in one go, and renames the file
// where it is full then.
func (t *tracer) append(line []byte, frequency int64) error {
	f, err := os.OpenFile(t.file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open trace file: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(line); err != nil {
		return fmt.Errorf("write trace file: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("trace file: %w", err)
	}
	lines := t.lines.Add(1)
	if full := info.Size() >= MaxTraceFile || frequency > 0 && lines >= frequency; !full || !t.rotating.CompareAndSwap(false, true) {
		return nil
	}
	defer t.rotating.Store(false)
	// Another request may have renamed the file meanwhile.
	if now, err := os.Stat(t.file); err != nil || !os.SameFile(now, info) {
		return nil
	}
	t.lines.Store(0)
	to := fmt.Sprintf("%s.%d", t.file, t.index)
	t.index = (t.index + 1) % MaxTraceFiles
	if err := os.Rename(t.file, to); err != nil {
		return fmt.Errorf("rename trace file: %w", err)
	}
	return nil
}
