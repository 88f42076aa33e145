package oip

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/proto/inference"
)

// concurrent gives back the inputs.
type concurrent struct{ fake }

func (*concurrent) Infer(_ context.Context, c Call) (Answer, error) {
	return Answer{Model: "m", Version: 1, Outputs: c.Inputs}, nil
}

func traces(t *testing.T, file string) (list []traceRecord) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var r traceRecord
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		list = append(list, r)
	}
	return list
}

type settings = map[string][]string

func TestTraceSettings(t *testing.T) {
	s := New(Config{Backend: &fake{}, TraceFile: filepath.Join(t.TempDir(), "trace")})
	shown := func(level, rate, count, frequency string) settings {
		return settings{"trace_level": {level}, "trace_rate": {rate}, "trace_count": {count}, "log_frequency": {frequency}, "trace_file": {s.cfg.TraceFile}, "trace_mode": {"triton"}}
	}
	for i, step := range []struct {
		model  string
		change settings
		want   settings // of that model
	}{
		{"", nil, shown("OFF", "1000", "-1", "0")},
		{"m", nil, shown("OFF", "1000", "-1", "0")},
		{"", settings{"trace_level": {"TIMESTAMPS"}, "trace_rate": {"5"}}, shown("TIMESTAMPS", "5", "-1", "0")},
		{"m", nil, shown("TIMESTAMPS", "5", "-1", "0")},
		{"m", settings{"trace_rate": {"7"}, "trace_count": {"9"}}, shown("TIMESTAMPS", "7", "9", "0")},
		{"", nil, shown("TIMESTAMPS", "5", "-1", "0")},
		{"", settings{"trace_level": {"OFF"}, "trace_rate": {"6"}, "log_frequency": {"3"}}, shown("OFF", "6", "-1", "3")},
		{"m", nil, shown("OFF", "7", "9", "3")},
		{"m", settings{"trace_level": {"TIMESTAMPS"}}, shown("TIMESTAMPS", "7", "9", "3")},
		{"m", settings{"trace_rate": {}}, shown("TIMESTAMPS", "6", "9", "3")},
		{"m", settings{"trace_level": nil, "trace_count": nil}, shown("OFF", "6", "-1", "3")},
		{"", settings{"trace_rate": nil, "log_frequency": nil, "trace_level": nil}, shown("OFF", "1000", "-1", "0")},
		{"m", nil, shown("OFF", "1000", "-1", "0")},
	} {
		got, err := s.TraceSettings(t.Context(), step.model, step.change)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("step %d: %s", i, diff)
		}
	}
	if s.tracer.active.Load() != nil || len(s.tracer.all.models) != 0 {
		t.Error("settings are left that do nothing")
	}
	before, _ := s.TraceSettings(t.Context(), "", nil)
	for want, change := range map[string]settings{
		"trace_file cannot be changed":                          {"trace_file": {"/tmp/x"}},
		"trace_mode cannot be changed":                          {"trace_mode": {"opentelemetry"}},
		`unknown trace setting "rate"`:                          {"rate": {"1"}},
		`trace_level is "ON"`:                                   {"trace_level": {"ON"}},
		"TENSORS is not supported":                              {"trace_level": {"TIMESTAMPS", "TENSORS"}},
		"OFF cannot be given with others":                       {"trace_level": {"OFF", "TIMESTAMPS"}},
		`trace_rate is ["x"]`:                                   {"trace_rate": {"x"}},
		`trace_rate is ["-1"], allowed is one integer from 0`:   {"trace_rate": {"-1"}},
		`trace_rate is ["1" "2"]`:                               {"trace_rate": {"1", "2"}},
		`trace_rate is ["2147483648"]`:                          {"trace_rate": {"2147483648"}},
		`trace_count is ["-2"], allowed is one integer from -1`: {"trace_count": {"-2"}},
		`log_frequency is [""]`:                                 {"log_frequency": {""}},
		"trace_rate is 0":                                       {"trace_rate": {"0"}, "trace_level": {"TIMESTAMPS"}},
	} {
		if _, err := s.TraceSettings(t.Context(), "", change); err == nil || !strings.Contains(err.Error(), want) || CodeOf(err) != InvalidArgument && CodeOf(err) != Unsupported {
			t.Errorf("%v: %v, want %q", change, err, want)
		}
	}
	if after, _ := s.TraceSettings(t.Context(), "", nil); !cmp.Equal(before, after) {
		t.Errorf("a refused change left %v", after)
	}
	if _, err := s.TraceSettings(t.Context(), "other", nil); CodeOf(err) != InvalidArgument || !strings.Contains(err.Error(), `"other"`) {
		t.Errorf("an unknown model: %v", err)
	}
	without := New(Config{Backend: &fake{}})
	if _, err := without.TraceSettings(t.Context(), "", settings{"trace_level": {"TIMESTAMPS"}}); CodeOf(err) != InvalidArgument || !strings.Contains(err.Error(), "no trace_file") {
		t.Errorf("without a file: %v", err)
	}
}

func TestTrace(t *testing.T) {
	f := &fake{times: Times{Queue: 1, Input: 20, Infer: 300, Output: 4000}}
	file := filepath.Join(t.TempDir(), "trace")
	s := New(Config{Backend: f, TraceFile: file})
	infer := func(n int) {
		t.Helper()
		for range n {
			if _, err := s.Infer(t.Context(), &Request{Model: "m", ID: "a\"b"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	set := func(model string, change settings) {
		t.Helper()
		if _, err := s.TraceSettings(t.Context(), model, change); err != nil {
			t.Fatal(err)
		}
	}
	infer(5)
	if got := traces(t, file); got != nil {
		t.Fatalf("%v is traced while tracing is off", got)
	}
	begin := time.Now().UnixNano()
	set("", settings{"trace_level": {"TIMESTAMPS"}, "trace_rate": {"3"}, "trace_count": {"2"}})
	infer(5)
	got := traces(t, file)
	if len(got) != 1 || got[0].ModelName != "m" || got[0].ModelVersion != 3 || got[0].RequestID != "a\"b" || got[0].ID != 1 {
		t.Fatalf("traces %+v", got)
	}
	var names []string
	at := begin
	for _, stamp := range got[0].Timestamps {
		names = append(names, stamp.Name)
		if stamp.NS < at {
			t.Errorf("%s is at %d, after %d", stamp.Name, stamp.NS, at)
		}
		at = stamp.NS
	}
	if diff := cmp.Diff([]string{"REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END"}, names); diff != "" {
		t.Error(diff)
	}
	stamps := got[0].Timestamps
	for i, want := range []int64{1, 20, 300, 4000} {
		if d := stamps[i+2].NS - stamps[i+1].NS; d != want {
			t.Errorf("%s is %d ns after %s, want %d", stamps[i+2].Name, d, stamps[i+1].Name, want)
		}
	}
	infer(20) // of which only one is left to trace
	if got := traces(t, file); len(got) != 2 {
		t.Errorf("%d traces", len(got))
	}
	if now, _ := s.TraceSettings(t.Context(), "", nil); now["trace_count"][0] != "0" {
		t.Errorf("settings %v", now)
	}
	set("m", settings{"trace_rate": {"1"}, "trace_count": {"1"}})
	f.answer = func(Call, *Answer) error { return Errorf(Unavailable, "busy") }
	if _, err := s.Infer(t.Context(), &Request{Model: "m"}); CodeOf(err) != Unavailable {
		t.Fatal(err)
	}
	if got := traces(t, file); len(got) != 3 || len(got[2].Timestamps) != 2 || got[2].Timestamps[1].Name != "REQUEST_END" {
		t.Errorf("a request that fails: %+v", got)
	}
	f.answer = nil
	set("m", settings{"trace_rate": {"1"}, "trace_count": {"-1"}, "log_frequency": {"2"}})
	infer(2*MaxTraceFiles + 1) // the first file has 3 lines already and is full with the next
	for i := range MaxTraceFiles {
		if got := traces(t, fmt.Sprint(file, ".", i)); i > 0 && len(got) != 2 {
			t.Errorf("file %d has %d traces", i, len(got))
		}
	}
	if names, err := filepath.Glob(file + "*"); err != nil || len(names) != MaxTraceFiles && len(names) != MaxTraceFiles+1 {
		t.Errorf("files %q, %v", names, err)
	}
}

// Traces of requests at the same time are whole lines, none is lost, and
// files are bounded.
func TestTraceConcurrently(t *testing.T) {
	file := filepath.Join(t.TempDir(), "trace")
	s := New(Config{Backend: &concurrent{}, TraceFile: file})
	if _, err := s.TraceSettings(t.Context(), "", settings{"trace_level": {"TIMESTAMPS"}, "trace_rate": {"1"}}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	const callers, each = 8, 50
	for range callers {
		wg.Go(func() {
			for range each {
				if _, err := s.Infer(t.Context(), &Request{Model: "m"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	ids := map[int64]bool{}
	for _, r := range traces(t, file) {
		ids[r.ID] = true
	}
	if len(ids) != callers*each {
		t.Errorf("%d traces of %d", len(ids), callers*each)
	}
	if err := os.Truncate(file, MaxTraceFile); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Infer(t.Context(), &Request{Model: "m"}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file + ".0"); err != nil {
		t.Errorf("a full file is not renamed: %v", err)
	}
	if _, err := s.TraceSettings(t.Context(), "", settings{"log_frequency": {"3"}}); err != nil {
		t.Fatal(err)
	}
	for range callers {
		wg.Go(func() {
			for range each {
				if _, err := s.Infer(t.Context(), &Request{Model: "m"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	names, err := filepath.Glob(file + "*")
	if err != nil || len(names) < MaxTraceFiles || len(names) > MaxTraceFiles+1 {
		t.Errorf("files %q, %v", names, err)
	}
	for _, name := range names {
		traces(t, name) // whole lines only
	}
}

// A request is answered though its trace cannot be written.
func TestTraceFileFails(t *testing.T) {
	var log bytes.Buffer
	s := New(Config{Backend: &fake{}, TraceFile: filepath.Join(t.TempDir(), "none", "trace"), Log: slog.New(slog.NewTextHandler(&log, nil))})
	if _, err := s.TraceSettings(t.Context(), "m", settings{"trace_level": {"TIMESTAMPS"}, "trace_rate": {"1"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Infer(t.Context(), &Request{Model: "m"}); err != nil || !strings.Contains(log.String(), "a trace is lost") {
		t.Errorf("%v, log %s", err, &log)
	}
}

// Tracing that is off costs nothing.
func TestTraceOffAllocatesNothing(t *testing.T) {
	s := New(Config{Backend: &fake{}, TraceFile: "trace"})
	if n := testing.AllocsPerRun(100, func() { s.tracer.sample("m") }); n != 0 {
		t.Errorf("%v objects", n)
	}
}

func TestLogSettings(t *testing.T) {
	level := new(slog.LevelVar)
	s := New(Config{Backend: &fake{}, LogLevel: level})
	shown := func(info, warning, failure bool, verbose uint32, format string) map[string]any {
		return map[string]any{"log_file": "", "log_info": info, "log_warning": warning, "log_error": failure, "log_verbose_level": verbose, "log_format": format}
	}
	for i, step := range []struct {
		change map[string]any
		want   map[string]any
		level  slog.Level
	}{
		{nil, shown(true, true, true, 0, "default"), slog.LevelInfo},
		{map[string]any{"log_verbose_level": uint32(1)}, shown(true, true, true, 1, "default"), slog.LevelDebug},
		{map[string]any{"log_verbose_level": uint32(3)}, shown(true, true, true, 3, "default"), slog.LevelDebug - 2},
		{map[string]any{"log_verbose_level": uint32(0), "log_format": "ISO8601"}, shown(true, true, true, 0, "ISO8601"), slog.LevelInfo},
		{map[string]any{"log_info": false}, shown(false, true, true, 0, "ISO8601"), slog.LevelWarn},
		{map[string]any{"log_warning": false, "log_format": "default"}, shown(false, false, true, 0, "default"), slog.LevelError},
		{map[string]any{"log_error": false}, shown(false, false, false, 0, "default"), levelNone},
		{map[string]any{"log_warning": true}, shown(false, true, true, 0, "default"), slog.LevelWarn},
		{map[string]any{"log_info": true, "log_warning": true, "log_error": true}, shown(true, true, true, 0, "default"), slog.LevelInfo},
		{map[string]any{"log_error": false, "log_info": false, "log_warning": false}, shown(false, false, false, 0, "default"), levelNone},
		{map[string]any{"log_info": true}, shown(true, true, true, 0, "default"), slog.LevelInfo},
	} {
		got, err := s.LogSettings(t.Context(), step.change)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if diff := cmp.Diff(step.want, got); diff != "" || level.Level() != step.level {
			t.Errorf("step %d: level %s: %s", i, level.Level(), diff)
		}
	}
	for want, change := range map[string]map[string]any{
		"log_file cannot be changed over the network":         {"log_file": "x"},
		"log_info is not a boolean":                           {"log_info": "true"},
		"log_verbose_level is not an integer from 0":          {"log_verbose_level": true},
		"log_verbose_level is not an integer from 0 to 21474": {"log_verbose_level": uint32(1 << 31)},
		`log_format is "short", allowed are default and ISO`:  {"log_format": "short"},
		`unknown logging setting "log_debug"`:                 {"log_debug": true},
		"log_info is true, and a severity above it is off":    {"log_info": true, "log_warning": false},
		"log_verbose_level is 1, and a severity above":        {"log_verbose_level": uint32(1), "log_info": false},
	} {
		if _, err := s.LogSettings(t.Context(), change); err == nil || !strings.Contains(err.Error(), want) || CodeOf(err) != InvalidArgument && CodeOf(err) != Unsupported {
			t.Errorf("%v: %v, want %q", change, err, want)
		}
	}
	if level.Level() != slog.LevelInfo {
		t.Errorf("a refused change left %s", level.Level())
	}
	if _, err := New(Config{Backend: &fake{}}).LogSettings(t.Context(), map[string]any{"log_info": false}); CodeOf(err) != Unsupported {
		t.Errorf("without a level: %v", err)
	}
}

// shelf is a repository that remembers what it was asked for.
type shelf struct {
	loaded   map[string]Override
	unloaded []string
}

func (r *shelf) Index(context.Context) ([]*inference.RepositoryIndexResponse_ModelIndex, error) {
	return []*inference.RepositoryIndexResponse_ModelIndex{{Name: "a", Version: "1", State: "READY"}, {Name: "b", State: "UNAVAILABLE", Reason: "unloaded"}, {Name: "c"}}, nil
}

func (r *shelf) Load(_ context.Context, model string, o Override) error {
	r.loaded[model] = o
	return nil
}

func (r *shelf) Unload(_ context.Context, model string) error {
	r.unloaded = append(r.unloaded, model)
	return nil
}

type parameters = map[string]*inference.ModelRepositoryParameter

func text(s string) *inference.ModelRepositoryParameter {
	return &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_StringParam{StringParam: s}}
}

func raw(s string) *inference.ModelRepositoryParameter {
	return &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_BytesParam{BytesParam: []byte(s)}}
}

func TestRepository(t *testing.T) {
	r := &shelf{loaded: map[string]Override{}}
	s := New(Config{Backend: &fake{}, Repository: r})
	for ready, want := range map[bool]int{false: 3, true: 1} {
		if list, err := s.Index(t.Context(), ready); err != nil || len(list) != want {
			t.Errorf("index, ready %t: %v, %v", ready, list, err)
		}
	}
	if err := s.Load(t.Context(), "a", nil); err != nil {
		t.Error(err)
	}
	if err := s.Load(t.Context(), "b", parameters{"config": text(`{"backend": "onnxruntime"}`), "file:1/model.onnx": raw("M"), "file:labels.txt": raw("")}); err != nil {
		t.Error(err)
	}
	want := map[string]Override{"a": {}, "b": {Config: []byte(`{"backend": "onnxruntime"}`), Files: map[string][]byte{"1/model.onnx": []byte("M"), "labels.txt": {}}}}
	if diff := cmp.Diff(want, r.loaded); diff != "" {
		t.Error(diff)
	}
	for want, tt := range map[string]struct {
		model string
		p     parameters
	}{
		`"" is not the name of a model`:                   {"", nil},
		`".." is not the name`:                            {"..", nil},
		`"a/b" is not the name`:                           {"a/b", nil},
		"parameter config must come with files":           {"a", parameters{"file:1/model.onnx": raw("M")}},
		"parameter config is not a string of JSON":        {"a", parameters{"config": raw("{}")}},
		`load model "a": parameter config is not a str`:   {"a", parameters{"config": text("{")}},
		"config is not a string":                          {"a", parameters{"config": {}}},
		`unrecognized parameter "timeout"`:                {"a", parameters{"timeout": text("1")}},
		`parameter "file:1/m" is not bytes`:               {"a", parameters{"file:1/m": text("M")}},
		`parameter "file:../m" does not name a file`:      {"a", parameters{"file:../m": raw("M")}},
		`parameter "file:/etc/m" does not name a file`:    {"a", parameters{"file:/etc/m": raw("M")}},
		`parameter "file:" does not name a file`:          {"a", parameters{"file:": raw("M")}},
		`parameter "file:1/.." does not name a file`:      {"a", parameters{"file:1/..": raw("M")}},
		"names a file that another one names":             {"a", parameters{"file:1/m": raw("M"), "file:1//m": raw("M")}},
		`parameter "file:1/../../m" does not name a file`: {"a", parameters{"file:1/../../m": raw("M")}},
	} {
		if err := s.Load(t.Context(), tt.model, tt.p); CodeOf(err) != InvalidArgument || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%q %v: %v, want %q", tt.model, tt.p, err, want)
		}
	}
	many := parameters{"config": text("{}")}
	for i := range maxFiles + 1 {
		many[fmt.Sprint("file:", i)] = raw("")
	}
	if err := s.Load(t.Context(), "a", many); CodeOf(err) != InvalidArgument {
		t.Errorf("too many files: %v", err)
	}
	yes := &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_BoolParam{BoolParam: true}}
	if err := s.Unload(t.Context(), "a", parameters{"unload_dependents": yes}); err != nil || !slices.Equal(r.unloaded, []string{"a"}) {
		t.Errorf("%v, unloaded %q", err, r.unloaded)
	}
	if err := s.Unload(t.Context(), "a", parameters{"unload_dependents": text("yes")}); CodeOf(err) != InvalidArgument {
		t.Error(err)
	}
	if err := s.Unload(t.Context(), "..", nil); CodeOf(err) != InvalidArgument {
		t.Error(err)
	}
	none := New(Config{Backend: &fake{}})
	_, err := none.Index(t.Context(), false)
	for _, err := range []error{err, none.Load(t.Context(), "a", nil), none.Unload(t.Context(), "a", nil)} {
		if CodeOf(err) != Unsupported {
			t.Errorf("without a repository: %v", err)
		}
	}
}

func TestMetadata(t *testing.T) {
	always := []string{"binary_tensor_data", "classification", "parameters", "schedule_policy", "model_configuration", "statistics"}
	for want, cfg := range map[string]Config{
		"": {}, "model_repository model_repository(unload_dependents)": {Repository: &shelf{}},
		"system_shared_memory": {SharedMemory: true}, "trace": {TraceFile: "f"}, "logging": {LogLevel: new(slog.LevelVar)},
	} {
		cfg.Version = "1.2"
		m := New(cfg).Metadata()
		if diff := cmp.Diff(append(slices.Clone(always), strings.Fields(want)...), m.GetExtensions()); diff != "" || m.GetName() != "dunlin" || m.GetVersion() != "1.2" {
			t.Errorf("%q: %s", want, diff)
		}
	}
}
