package rest

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// shelf is a repository that remembers what it was asked for.
type shelf struct {
	model    string
	override oip.Override
	unloaded string
}

func (r *shelf) Index(context.Context) ([]*inference.RepositoryIndexResponse_ModelIndex, error) {
	return []*inference.RepositoryIndexResponse_ModelIndex{{Name: "a", Version: "1", State: "READY"}, {Name: "b", State: "UNAVAILABLE", Reason: "unloaded"}, {Name: "c"}}, nil
}

func (r *shelf) Load(_ context.Context, model string, o oip.Override) error {
	r.model, r.override = model, oip.Override{Config: bytes.Clone(o.Config), Files: o.Files}
	return nil
}

func (r *shelf) Unload(_ context.Context, model string) error {
	r.unloaded = model
	return nil
}

func TestRepository(t *testing.T) {
	r := &shelf{}
	server := serve(t, oip.Config{Backend: &echo{}, Repository: r})
	const all = `[{"name":"a","version":"1","state":"READY"},{"name":"b","state":"UNAVAILABLE","reason":"unloaded"},{"name":"c"}]`
	for body, want := range map[string]string{"": all, "{}": all, `{"ready":false,"other":[1]}`: all, ` {"ready":true}`: `[{"name":"a","version":"1","state":"READY"}]`} {
		if w := do(t, server, "POST", "/v2/repository/index", body); w.Code != 200 || w.Body.String() != want {
			t.Errorf("index %q: status %d, %s", body, w.Code, w.Body)
		}
	}
	load := func(body string) reply { return do(t, server, "POST", "/v2/repository/models/a/load", body) }
	if w := load(""); w.Code != 200 || w.Body.Len() != 0 || r.model != "a" || r.override.Config != nil {
		t.Errorf("load: status %d, %s: %+v", w.Code, w.Body, r)
	}
	if w := load(`{"parameters":{"config":"{\"backend\": \"onnxruntime\"}","file:1/model.onnx":"TU9ERUw="}}`); w.Code != 200 {
		t.Errorf("load: status %d, %s", w.Code, w.Body)
	}
	if diff := cmp.Diff(oip.Override{Config: []byte(`{"backend": "onnxruntime"}`), Files: map[string][]byte{"1/model.onnx": []byte("MODEL")}}, r.override); diff != "" {
		t.Error(diff)
	}
	for body, want := range map[string]string{
		"[]":                                                       "an object",
		`{"parameters":1}`:                                         "an object",
		`{"parameters":{"config":{}}}`:                             "parameter config is not a string",
		`{"parameters":{"config":null}}`:                           "parameter config is not a string",
		`{"parameters":{"config":"{"}}`:                            "parameter config is not a string of JSON",
		`{"parameters":{"config":"{}`:                              "parameters.config: JSON",
		`{"parameters":{"other":true}}`:                            `unrecognized parameter "other"`,
		`{"parameters":{"file:1/m":"TU9ERUw="}}`:                   "parameter config must come with files",
		`{"parameters":{"file:1/m":"T?"}}`:                         "parameters.file:1/m: is not base64",
		`{"parameters":{"file:1/m":7}}`:                            `parameter "file:1/m" is not bytes`,
		`{"parameters":{"config":"{}","file:../../m":"TU9ERUw="}}`: "does not name a file",
		`{"parameters":{}}x`:                                       "the end",
	} {
		if w := load(body); w.Code != 400 || !strings.Contains(errorOf(t, w), want) {
			t.Errorf("load %s: status %d, %s, want %q", body, w.Code, w.Body, want)
		}
	}
	if w := do(t, server, "POST", "/v2/repository/models/b/unload", `{"parameters":{"unload_dependents":false}}`); w.Code != 200 || r.unloaded != "b" {
		t.Errorf("unload: status %d, %s: %+v", w.Code, w.Body, r)
	}
	if w := do(t, server, "POST", "/v2/repository/models/b/unload", `{"parameters":{"unload_dependents":1}}`); w.Code != 400 || !strings.Contains(errorOf(t, w), "unload_dependents") {
		t.Errorf("unload: status %d, %s", w.Code, w.Body)
	}
	if w := do(t, server, "POST", "/v2/repository/index", `{"ready":1}`); w.Code != 400 || !strings.Contains(errorOf(t, w), "ready") {
		t.Errorf("index: status %d, %s", w.Code, w.Body)
	}
}

func TestMemory(t *testing.T) {
	server := serve(t, oip.Config{Backend: &echo{}, SharedMemory: true})
	key := "dunlin-test-" + rand.Text()
	path := filepath.Join("/dev/shm", key)
	if err := os.WriteFile(path, []byte("abcdefgh"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	const region = "/v2/systemsharedmemory/region/r 1"
	post := func(path, body string) reply {
		return do(t, server, "POST", strings.ReplaceAll(path, " ", "%20"), body)
	}
	for body, want := range map[string]string{
		"":                         `shared memory region "r 1": key is missing`,
		"[]":                       "an object",
		`{"key":7}`:                "key: JSON",
		`{"byte_size":8}`:          "key is missing",
		`{"key":"/` + key + `"}`:   "byte_size is missing",
		`{"key":"/k","offset":-1}`: "offset: -1 is not an integer from 0 to 18446744073709551615",
		`{"key":"/k","byte_size":18446744073709551616}`:                                         "byte_size: 18446744073709551616 is not",
		`{"key":"/k","byte_size":"8"}`:                                                          "byte_size: JSON",
		`{"key":"../etc/passwd","byte_size":8}`:                                                 `shared memory region "r 1": key is "../etc/passwd"`,
		`{"key":"/` + key + `","byte_size":9}`:                                                  "do not fit",
		`{"key":"/` + key + `","offset":18446744073709551615,"byte_size":18446744073709551615}`: "do not fit",
		`{"key":"/` + key + `","byte_size":0}`:                                                  "byte_size is 0",
	} {
		if w := post(region+"/register", body); w.Code != 400 || !strings.Contains(errorOf(t, w), want) {
			t.Errorf("register %s: status %d, %s, want %q", body, w.Code, w.Body, want)
		}
	}
	if w := post(region+"/register", `{"key":"/`+key+`","offset":0,"byte_size":8}`); w.Code != 200 || w.Body.Len() != 0 {
		t.Fatalf("register: status %d, %s", w.Code, w.Body)
	}
	if w := post(region+"/register", `{"key":"/`+key+`","byte_size":8}`); w.Code != 400 || !strings.Contains(errorOf(t, w), "registered already") {
		t.Errorf("register again: status %d, %s", w.Code, w.Body)
	}
	want := `[{"name":"r 1","key":"/` + key + `","offset":0,"byte_size":8}]`
	for _, path := range []string{"/v2/systemsharedmemory/status", region + "/status"} {
		if w := do(t, server, "GET", strings.ReplaceAll(path, " ", "%20"), ""); w.Code != 200 || w.Body.String() != want {
			t.Errorf("%s: status %d, %s", path, w.Code, w.Body)
		}
	}
	w := post("/v2/models/echo/infer", `{"inputs":[{"name":"x","datatype":"UINT8","shape":[2],"parameters":{"shared_memory_region":"r 1","shared_memory_byte_size":2,"shared_memory_offset":1}}],`+
		`"outputs":[{"name":"x","parameters":{"shared_memory_region":"r 1","shared_memory_byte_size":3,"shared_memory_offset":5,"binary_data":false}}]}`)
	head := `{"model_name":"digits","model_version":"2","outputs":[{"name":"x","datatype":"UINT8","shape":[2]}]}`
	if w.Code != 200 || w.Body.String() != head {
		t.Errorf("infer: status %d, %s", w.Code, w.Body)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "abcdebch" {
		t.Errorf("memory %q, %v", b, err)
	}
	if w := post(region+"/unregister", ""); w.Code != 200 {
		t.Errorf("unregister: status %d, %s", w.Code, w.Body)
	}
	if w := post("/v2/systemsharedmemory/unregister", "{}"); w.Code != 200 {
		t.Errorf("unregister all: status %d, %s", w.Code, w.Body)
	}
	if w := do(t, server, "GET", "/v2/systemsharedmemory/status", ""); w.Body.String() != "[]" {
		t.Errorf("status %s", w.Body)
	}
}

func TestSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "trace")
	server := serve(t, oip.Config{Backend: &echo{}, TraceFile: file, LogLevel: new(slog.LevelVar)})
	off := fmt.Sprintf(`{"log_frequency":"0","trace_count":"-1","trace_file":%q,"trace_level":["OFF"],"trace_mode":"triton","trace_rate":"1000"}`, file)
	on := strings.NewReplacer("OFF", "TIMESTAMPS", "1000", "1").Replace(off)
	const logs = `{"log_error":true,"log_file":"","log_format":"default","log_info":true,"log_verbose_level":0,"log_warning":true}`
	for i, tt := range []struct {
		method, path, body string
		status             int
		want               string // of an error: a part of it
	}{
		{"GET", "/v2/trace/setting", "", 200, off},
		{"GET", "/v2/models/echo/trace/setting", "", 200, off},
		{"GET", "/v2/models/other/trace/setting", "", 400, `\"other\"`},
		{"POST", "/v2/models/echo/trace/setting", `{"trace_level":["TIMESTAMPS"],"trace_rate":"1"}`, 200, on},
		{"POST", "/v2/trace/setting", "", 200, off},
		{"POST", "/v2/trace/setting", `{"trace_level":"OFF"}`, 200, off},
		{"POST", "/v2/trace/setting", `{"trace_rate":1}`, 400, "trace_rate: JSON"},
		{"POST", "/v2/trace/setting", `{"trace_rate":[[]]}`, 400, "trace_rate: JSON"},
		{"POST", "/v2/trace/setting", `{"trace_level":["OFF","TIMESTAMPS"]}`, 400, "OFF cannot be given"},
		{"POST", "/v2/trace/setting", `{"trace_file":"x"}`, 501, "trace_file cannot be changed"},
		{"POST", "/v2/trace/setting", `{"else":"x"}`, 400, `unknown trace setting \"else\"`},
		{"POST", "/v2/models/echo/trace/setting", `{"trace_level":null,"trace_rate":null}`, 200, off},
		{"GET", "/v2/logging", "", 200, logs},
		{"POST", "/v2/logging", "{}", 200, logs},
		{"POST", "/v2/logging", `{"log_verbose_level":2,"log_info":null,"log_file":null}`, 200, strings.Replace(logs, ":0", ":2", 1)},
		{"POST", "/v2/logging", `{"log_verbose_level":0,"log_format":"ISO8601"}`, 200, strings.Replace(logs, "default", "ISO8601", 1)},
		{"POST", "/v2/logging", `{"log_verbose_level":-1}`, 400, "log_verbose_level: -1 is not"},
		{"POST", "/v2/logging", `{"log_verbose_level":4294967296}`, 400, "log_verbose_level: 4294967296 is not"},
		{"POST", "/v2/logging", `{"log_verbose_level":"1"}`, 400, "log_verbose_level is not an integer"},
		{"POST", "/v2/logging", `{"log_info":1}`, 400, "log_info is not a boolean"},
		{"POST", "/v2/logging", `{"log_info":[]}`, 400, "log_info: JSON"},
		{"POST", "/v2/logging", `{"log_format":"x"}`, 400, "log_format is"},
		{"POST", "/v2/logging", `{"log_file":"x"}`, 501, "log_file cannot be changed"},
		{"POST", "/v2/logging", `{"log_else":true}`, 400, "unknown logging setting"},
	} {
		w := do(t, server, tt.method, tt.path, tt.body)
		if w.Code != tt.status || tt.status == 200 && w.Body.String() != tt.want || !strings.Contains(w.Body.String(), tt.want) {
			t.Errorf("%d: %s %s %s: status %d, %s, want %s", i, tt.method, tt.path, tt.body, w.Code, w.Body, tt.want)
		}
	}
}

// The configuration has numbers as numbers, and members that are not set
// where clients expect them.
func TestConfig(t *testing.T) {
	config := &inference.ModelConfig{
		Name: "echo", Platform: platform, MaxBatchSize: 8,
		Input: []*inference.ModelInput{{Name: "x", DataType: inference.DataType_TYPE_FP32, Dims: []int64{-1, 1 << 40}}},
		SchedulingChoice: &inference.ModelConfig_DynamicBatching{DynamicBatching: &inference.ModelDynamicBatching{
			MaxQueueDelayMicroseconds: 100, PriorityQueuePolicy: map[uint64]*inference.ModelQueuePolicy{2: {DefaultTimeoutMicroseconds: 1 << 60}},
		}},
		Parameters:             map[string]*inference.ModelParameter{"b\"": {StringValue: "é"}, "a": {}},
		ModelTransactionPolicy: &inference.ModelTransactionPolicy{},
		ModelMetrics: &inference.ModelMetrics{MetricControl: []*inference.ModelMetrics_MetricControl{{
			MetricOptions: &inference.ModelMetrics_MetricControl_HistogramOptions_{HistogramOptions: &inference.ModelMetrics_MetricControl_HistogramOptions{Buckets: []float64{0.1, 1e30}}},
		}}},
	}
	w := do(t, serve(t, oip.Config{Backend: &echo{config: config}}), "GET", "/v2/models/echo/config", "")
	back := new(inference.ModelConfig)
	if err := protojson.Unmarshal(w.Body.Bytes(), back); err != nil || !proto.Equal(config, back) || w.Code != 200 {
		t.Fatalf("status %d, %v: %s", w.Code, err, w.Body)
	}
	for _, want := range []string{
		`"max_batch_size":8`, `"dims":[-1,1099511627776]`, `"data_type":"TYPE_FP32"`, `"max_queue_delay_microseconds":100`, `"default_timeout_microseconds":1152921504606846976`,
		`"model_transaction_policy":{"decoupled":false}`, `"output":[]`, `"optional":false`, `"is_shape_tensor":false`, `"preserve_ordering":false`, `"metric_tags":{}`,
		`"parameters":{"a":{"string_value":""},"b\"":{"string_value":"é"}}`, `"buckets":[0.1,1e+30]`,
	} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("no %s in %s", want, w.Body)
		}
	}
	for _, not := range []string{"response_cache", "sequence_batching", "ensemble_scheduling", "optimization"} {
		if strings.Contains(w.Body.String(), not) {
			t.Errorf("%s in %s", not, w.Body)
		}
	}
}

// All members of statistics are there, and numbers are numbers.
func TestStatistics(t *testing.T) {
	server := serve(t, oip.Config{Backend: &echo{}})
	const zero = `{"count":0,"ns":0}`
	const want = `{"model_stats":[{"name":"echo","version":"2","last_inference":0,"inference_count":1152921504606846976,"execution_count":0,"inference_stats":{` +
		`"success":{"count":3,"ns":4},"fail":` + zero + `,"queue":` + zero + `,"compute_input":` + zero + `,"compute_infer":` + zero + `,"compute_output":` + zero + `,"cache_hit":` + zero + `,"cache_miss":` + zero + `},` +
		`"batch_stats":[{"batch_size":2,"compute_input":` + zero + `,"compute_infer":` + zero + `,"compute_output":` + zero + `}],"memory_usage":[],"response_stats":{}}]}`
	for _, path := range []string{"/v2/models/stats", "/v2/models/echo/stats", "/v2/models/echo/versions/2/stats"} {
		if w := do(t, server, "GET", path, ""); w.Code != 200 || w.Body.String() != want {
			t.Errorf("%s: status %d, %s", path, w.Code, w.Body)
		}
	}
	if w := do(t, server, "GET", "/v2/models/other/stats", ""); w.Code != 404 {
		t.Errorf("status %d, %s", w.Code, w.Body)
	}
}

func TestAcceptedEncoding(t *testing.T) {
	for accept, want := range map[string]string{
		"": "", "gzip": "gzip", "deflate": "deflate", "gzip, deflate": "gzip", "deflate,gzip": "deflate", "br": "", "identity": "", "*": "",
		"identity, gzip": "", "gzip;q=0.5, deflate;q=0.8": "deflate", "gzip;q=0": "", "GZIP ; q=0.1": "gzip", "gzip;q=x": "", "gzip;q=NaN": "", "br, gzip;q=0.2, identity;q=0.1": "gzip", ",;,": "",
	} {
		if got := acceptedEncoding([]string{accept}); got != want {
			t.Errorf("%q: %q, want %q", accept, got, want)
		}
	}
}

// Bodies are compressed in both directions, and lengths are those of what was
// compressed.
func TestCompression(t *testing.T) {
	b := &echo{}
	server := serve(t, oip.Config{Backend: b})
	data := strings.Repeat("abcd", 5000)
	head := fmt.Sprintf(`{"parameters":{"binary_data_output":true},"inputs":[{"name":"x","shape":[5000],"datatype":"INT32","parameters":{"binary_data_size":%d}}]}`, len(data))
	wantHead := fmt.Sprintf(`{"model_name":"digits","model_version":"2","outputs":[{"name":"x","datatype":"INT32","shape":[5000],"parameters":{"binary_data_size":%d}}]}`, len(data))
	for range 3 { // compressors are used again
		for _, encoding := range []string{"gzip", "deflate"} {
			var body bytes.Buffer
			var z io.WriteCloser = gzip.NewWriter(&body)
			if encoding == "deflate" {
				z = zlib.NewWriter(&body)
			}
			io.WriteString(z, head+data)
			z.Close()
			w := send(t, server, "POST", "/v2/models/echo/infer", &body, headerLength, fmt.Sprint(len(head)), "Content-Encoding", encoding, "Accept-Encoding", encoding)
			if w.Code != 200 || w.Header.Get("Content-Encoding") != encoding || w.Header.Get(headerLength) != fmt.Sprint(len(wantHead)) || w.Body.Len() > 1000 {
				t.Fatalf("%s: status %d, %v, %d bytes", encoding, w.Code, w.Header, w.Body.Len())
			}
			var inflated io.Reader
			var err error
			if encoding == "gzip" {
				inflated, err = gzip.NewReader(w.Body)
			} else {
				inflated, err = zlib.NewReader(w.Body)
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(inflated); err != nil || string(got) != wantHead+data {
				t.Errorf("%s: %.200q, %v", encoding, got, err)
			}
		}
	}
	if lent := b.lent.Load(); lent != 0 {
		t.Errorf("%d answers are still lent", lent)
	}
	// An error is not compressed, and does not say that it is.
	w := do(t, server, "POST", "/v2/models/echo/infer", "{", "Accept-Encoding", "gzip")
	if w.Header.Get("Content-Encoding") != "" || errorOf(t, w) == "" {
		t.Errorf("headers %v", w.Header)
	}
}

func TestClassification(t *testing.T) {
	b := &echo{config: &inference.ModelConfig{MaxBatchSize: 4}}
	b.answer = func(_ context.Context, c oip.Call) (oip.Answer, error) {
		return oip.Answer{Model: "digits", Version: 1, Outputs: []tensor.Tensor{c.Inputs[0]}, Labels: map[string][]string{"x": {"a", "b"}}}, nil
	}
	w := do(t, serve(t, oip.Config{Backend: b}), "POST", "/v2/models/echo/infer",
		`{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"data":[0.5,1.25,2,3,2,1]}],"outputs":[{"name":"x","parameters":{"classification":2}}]}`)
	want := `{"model_name":"digits","model_version":"1","outputs":[{"name":"x","datatype":"BYTES","shape":[2,2],"data":["2.000000:2","1.250000:1:b","3.000000:0:a","2.000000:1:b"]}]}`
	if w.Code != 200 || w.Body.String() != want {
		t.Errorf("status %d, %s", w.Code, w.Body)
	}
}

func TestRetryAfter(t *testing.T) {
	for after, want := range map[time.Duration]string{0: "1", time.Millisecond: "1", time.Second: "1", 1001 * time.Millisecond: "2", time.Minute: "60"} {
		b := &echo{answer: func(context.Context, oip.Call) (oip.Answer, error) {
			return oip.Answer{}, fmt.Errorf("run: %w", &oip.Error{Code: oip.Unavailable, Err: io.EOF, RetryAfter: after})
		}}
		w := do(t, serve(t, oip.Config{Backend: b}), "POST", "/v2/models/echo/infer", `{"inputs":[]}`)
		if w.Code != 503 || w.Header.Get("Retry-After") != want || !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s: status %d, Retry-After %q", after, w.Code, w.Header.Get("Retry-After"))
		}
	}
}
