package triton

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

func parsed(t testing.TB, pbtxt string) *inference.ModelConfig {
	t.Helper()
	c, err := Parse([]byte(pbtxt))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestParseErrors(t *testing.T) {
	tests := []struct{ give, want string }{
		{"name: \"a\"\nfoo: 1", "2:1: unknown field: foo"},
		{"max_batch_size: \"x\"", `1:17: invalid value for int32 type: "x"`},
		{"input [ {name: \"a\" data_type: TYPE_X} ]", "1:31: invalid value for enum type: TYPE_X"},
		{"input {\n  name: \"a\"", "2:12: unexpected EOF"},
		{"max_batch_size: 1\nmax_batch_size: 2", `2:1: non-repeated field "max_batch_size" is repeated`},
		{"dynamic_batching {}\nsequence_batching {}", `2:1: error parsing "sequence_batching", oneof inference.ModelConfig.scheduling_choice is already set`},
		{"name: \"\xff\"", "1:7: invalid UTF-8 detected"},
		{strings.Repeat("#", MaxConfigBytes+1), "has 1048577 bytes, allowed are 1048576"},
	}
	for _, tt := range tests {
		if _, err := Parse([]byte(tt.give)); err == nil || err.Error() != tt.want {
			t.Errorf("%.40q: got %v, want %s", tt.give, err, tt.want)
		}
	}
	if _, err := Parse([]byte(strings.Repeat("a", MaxConfigBytes))); err == nil || len(err.Error()) > 2*maxMessage {
		t.Error("the error of a long configuration is long, or there is none")
	}
}

func TestParseJSON(t *testing.T) {
	want := &inference.ModelConfig{
		Backend: "onnxruntime", MaxBatchSize: 4, DefaultModelFilename: "m.onnx",
		Input: []*inference.ModelInput{{Name: "x", DataType: inference.DataType_TYPE_FP32, Dims: []int64{-1, 3}}},
		VersionPolicy: &inference.ModelVersionPolicy{PolicyChoice: &inference.ModelVersionPolicy_Specific_{
			Specific: &inference.ModelVersionPolicy_Specific{Versions: []int64{2}},
		}},
	}
	for _, give := range []string{
		`{"backend":"onnxruntime","max_batch_size":4,"default_model_filename":"m.onnx","input":[{"name":"x","data_type":"TYPE_FP32","dims":[-1,3]}],"version_policy":{"specific":{"versions":[2]}}}`,
		`{"backend":"onnxruntime","maxBatchSize":"4","defaultModelFilename":"m.onnx","input":[{"name":"x","dataType":11,"dims":["-1","3"]}],"versionPolicy":{"specific":{"versions":["2"]}}}`,
	} {
		got, err := ParseJSON([]byte(give))
		if err != nil {
			t.Errorf("%s: %v", give, err)
		} else if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s: %s", give, diff)
		}
	}
	for _, tt := range []struct{ give, want string }{
		{`{"foo": 1}`, `1:2: unknown field "foo"`},
		{"{\n  \"max_batch_size\": \"x\"}", `2:21: invalid value for int32 field maxBatchSize: "x"`},
		{`{`, "1:2: unexpected EOF"},
		{`[]`, "1:1: unexpected token ["},
		{`{"input":[{"data_type":"TYPE_X"}]}`, `1:24: invalid value for enum field dataType: "TYPE_X"`},
	} {
		if _, err := ParseJSON([]byte(tt.give)); err == nil || err.Error() != tt.want {
			t.Errorf("%q: got %v, want %s", tt.give, err, tt.want)
		}
	}
}

func TestOptions(t *testing.T) {
	override := serving.QueuePolicy{AllowTimeoutOverride: true}
	tests := []struct {
		name, give string
		want       *serving.Options
		warnings   []string
	}{
		{name: "nothing", give: ``},
		{name: "what leaves scheduling to the model", give: `name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" default_model_filename: "m.onnx" version_policy { all {} }`},
		{name: "an empty message", give: `optimization { cuda {} } response_cache {} model_transaction_policy {}`},
		{
			name: "no batch", give: `input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } ]`,
			want: &serving.Options{Queue: override},
		},
		{
			name: "a batch without batching", give: `max_batch_size: 8`,
			want: &serving.Options{MaxBatchSize: 8, Strict: true, Queue: override},
		},
		{
			name: "default batching", give: `max_batch_size: 8 dynamic_batching {}`,
			want: &serving.Options{MaxBatchSize: 8, Strict: true, DynamicBatching: true, Queue: override},
		},
		{
			name: "all of batching", give: `
				max_batch_size: 8
				dynamic_batching {
				  preferred_batch_size: [ 4, 8 ]
				  max_queue_delay_microseconds: 1500
				  preserve_ordering: true
				  priority_levels: 3
				  default_priority_level: 2
				  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 7 allow_timeout_override: true max_queue_size: 5 }
				  priority_queue_policy { key: 3 value { max_queue_size: 6 } }
				}
				parameters { key: "ageing" value { string_value: "250ms" } }`,
			want: &serving.Options{
				MaxBatchSize: 8, Strict: true, DynamicBatching: true, PreferredBatchSizes: []int{4, 8}, MaxQueueDelay: 1500 * time.Microsecond,
				PreserveOrdering: true, PriorityLevels: 3, DefaultPriority: 2, Ageing: 250 * time.Millisecond,
				Queue:  serving.QueuePolicy{Delay: true, Timeout: 7 * time.Microsecond, AllowTimeoutOverride: true, MaxSize: 5},
				Queues: map[int]serving.QueuePolicy{3: {MaxSize: 6}},
			},
		},
		{
			name: "a queue policy without a time-out of the request's", give: `dynamic_batching { default_queue_policy {} }`,
			want: &serving.Options{DynamicBatching: true},
		},
		{
			name: "instances", give: `instance_group [ { count: 2 kind: KIND_CPU }, { name: "b" }, { count: 3 kind: KIND_GPU gpus: [ 0, 1 ] } ]`,
			want: &serving.Options{Instances: 6, Queue: override},
			warnings: []string{
				"instance_group[2].gpus is ignored: the agent chooses where models run",
				"instance_group[2].kind is ignored: the agent chooses where models run",
			},
		},
		{
			name: "a passive instance", give: `instance_group [ { count: 1 }, { count: 1 passive: true } ]`,
			want:     &serving.Options{Instances: 1, Queue: override},
			warnings: []string{"instance_group[1].passive is ignored: the group is left out"},
		},
		{
			name: "much that is ignored", give: `
				optimization { cuda { graphs: true } execution_accelerators { gpu_execution_accelerator: [ { name: "tensorrt" } ] } }
				parameters { key: "intra_op_thread_count" value { string_value: "2" } }
				parameters { key: "ageing" value { string_value: "1s" } }
				model_warmup [ { name: "w" batch_size: 1 } ]
				cc_model_filenames { key: "8.0" value: "m8.onnx" }
				response_cache { enable: true }`,
			warnings: []string{
				"cc_model_filenames[\"8.0\"] is ignored: the agent chooses where models run; default_model_filename names the file",
				"optimization.cuda is ignored: the agent chooses where models run",
				"optimization.execution_accelerators is ignored: the agent chooses where models run",
				"parameters[\"intra_op_thread_count\"] is ignored: no such parameter is known",
				"model_warmup[0] is ignored: a model is ready when it has been loaded",
				"response_cache is ignored: answers are not cached; each request runs",
				"parameters[\"ageing\"] is ignored: the configuration has no dynamic_batching with priority_levels",
			},
		},
		{
			name: "inputs and outputs", give: `
				input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] format: FORMAT_NCHW reshape { shape: [ 1, 3, 224, 224 ] } allow_ragged_batch: true } ]
				output [ { name: "y" data_type: TYPE_FP32 dims: [ 1000 ] reshape { shape: [ 1, 1000, 1, 1 ] } label_filename: "labels.txt" } ]`,
			want: &serving.Options{Queue: override},
			warnings: []string{
				"input[0].format is ignored: it changes nothing about the data",
				"input[0].reshape is ignored: requests give the shape that the model has",
				"input[0].allow_ragged_batch is ignored: only requests of the same shape are run together",
				"output[0].reshape is ignored: answers have the shape that the model gives",
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, warnings, err := Options(parsed(t, tt.give))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tt.warnings, warnings); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestOptionsRefused(t *testing.T) {
	tests := []struct{ give, want string }{
		{`backend: "tensorrt"`, `backend is "tensorrt", only "onnxruntime" is served`},
		{`platform: "tensorflow_savedmodel"`, `platform is "tensorflow_savedmodel", only "onnxruntime_onnx" is served`},
		{`sequence_batching {}`, `sequence_batching is not served: no state is kept between requests`},
		{`platform: "ensemble" ensemble_scheduling { step [ { model_name: "a" } ] }`, `ensemble_scheduling is not served: join the models into one graph`},
		{`model_transaction_policy { decoupled: true }`, `model_transaction_policy.decoupled is not served: each request has one answer`},
		{`batch_input [ { kind: BATCH_ELEMENT_COUNT } ]`, `batch_input is not served: requests give all inputs of the model`},
		{`batch_output [ { target_name: "y" } ]`, `batch_output is not served`},
		{`model_repository_agents { agents [ { name: "checksum" } ] }`, `model_repository_agents are not there: the model would be served without what they do to it`},
		{`max_batch_size: -1`, `max_batch_size is -1, allowed are 0 to 65536`},
		{`max_batch_size: 65537`, `max_batch_size is 65537, allowed are 0 to 65536`},
		{`instance_group [ { count: -1 } ]`, `instance_group[0].count is -1, allowed are 0 to 64`},
		{`instance_group [ { count: 60 }, { count: 5 } ]`, `the sum of instance_group.count is 65, allowed are 0 to 64`},
		{`max_batch_size: 4 dynamic_batching { preferred_batch_size: [ 2, 8 ] }`, `dynamic_batching.preferred_batch_size[1] is 8, allowed are 1 to 4`},
		{`dynamic_batching { max_queue_delay_microseconds: 18446744073709551615 }`, `dynamic_batching.max_queue_delay_microseconds is 2562047h47m16.854775s, allowed are 0 to 24h0m0s`},
		{`dynamic_batching { priority_levels: 18446744073709551615 default_priority_level: 1 }`, `dynamic_batching.priority_levels is 2147483647, allowed are 0 to 256`},
		{`dynamic_batching { priority_levels: 2 }`, `dynamic_batching.default_priority_level is 0, allowed are 1 to 2`},
		{`dynamic_batching { priority_queue_policy { key: 1 value {} } }`, `a priority in dynamic_batching.priority_queue_policy is 1, allowed are 1 to 0`},
		{`dynamic_batching { default_queue_policy { max_queue_size: 4294967295 } }`, `dynamic_batching.default_queue_policy.max_queue_size is 2147483647, allowed are 0 to 65536`},
		{`dynamic_batching { default_queue_policy { default_timeout_microseconds: 86400000001 } }`, `dynamic_batching.default_queue_policy.default_timeout_microseconds is 24h0m0.000001s, allowed are 0 to 24h0m0s`},
		{
			`dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 2 value { max_queue_size: 70000 } } }`,
			`dynamic_batching.priority_queue_policy[2].max_queue_size is 70000, allowed are 0 to 65536`,
		},
		{`max_batch_size: 1 parameters { key: "ageing" value { string_value: "5" } }`, `parameters["ageing"] is "5", which is not a duration such as "500ms"`},
		{`max_batch_size: 1 parameters { key: "pinned" value { string_value: "yes" } }`, `parameters["pinned"] is "yes", which is not true or false`},
		{`max_batch_size: 1 parameters { key: "ageing" value { string_value: "25h" } }`, `parameters["ageing"] is 25h0m0s, allowed are 0 to 24h0m0s`},
		{`default_model_filename: "../m.onnx"`, `default_model_filename is "../m.onnx", which is not the name of a file in the version's folder`},
		{`default_model_filename: "a/m.onnx"`, `default_model_filename is "a/m.onnx", which is not the name of a file in the version's folder`},
		{`default_model_filename: "."`, `default_model_filename is ".", which is not the name of a file in the version's folder`},
		{`output [ { name: "y" label_filename: "/etc/passwd" } ]`, `output[0].label_filename is "/etc/passwd", which is not in the model's folder`},
		{`version_policy { specific {} }`, `version_policy.specific names no versions`},
		{`version_policy { specific { versions: [ 1, 0 ] } }`, `version_policy.specific.versions[1] is 0, allowed are numbers from 1 on`},
		{`backend: "a" sequence_batching {}`, "backend is \"a\", only \"onnxruntime\" is served; sequence_batching is not served: no state is kept between requests"},
	}
	for _, tt := range tests {
		o, _, err := Options(parsed(t, tt.give))
		if err == nil || err.Error() != tt.want || o != nil {
			t.Errorf("%s:\n got %v\nwant %s", tt.give, err, tt.want)
		}
	}
}

// TestNoFieldIsForgotten sets each field of the configuration, one at a time:
// it is used, named in a warning, or refused.
func TestNoFieldIsForgotten(t *testing.T) {
	seen := map[string]bool{}
	var visit func(build func(func(protoreflect.Message)) *inference.ModelConfig, d protoreflect.MessageDescriptor, path string)
	look := func(c *inference.ModelConfig, path string) {
		_, warnings, err := Options(c)
		seen[path] = true
		if err == nil && len(warnings) == 0 && !used[path] {
			t.Errorf("%s is neither used nor named nor refused", path)
		}
		if used[path] && len(warnings) > 0 && !strings.HasPrefix(path, "parameters") {
			t.Errorf("%s is used, and named: %v", path, warnings)
		}
	}
	visit = func(build func(func(protoreflect.Message)) *inference.ModelConfig, d protoreflect.MessageDescriptor, path string) {
		for i := range d.Fields().Len() {
			f := d.Fields().Get(i)
			at := below(path, string(f.Name()))
			// set puts a value of the field into m; inner, where not nil, fills a message.
			set := func(m protoreflect.Message, inner func(protoreflect.Message)) {
				fill := func(v protoreflect.Value) protoreflect.Value {
					if inner != nil {
						inner(v.Message())
					}
					return v
				}
				switch {
				case f.IsMap():
					entries := m.Mutable(f).Map()
					key := protoreflect.ValueOfString("key").MapKey()
					if f.MapKey().Kind() == protoreflect.Uint64Kind {
						key = protoreflect.ValueOfUint64(1).MapKey()
					}
					if f.MapValue().Message() != nil {
						entries.Set(key, fill(entries.NewValue()))
					} else {
						entries.Set(key, protoreflect.ValueOfString("x"))
					}
				case f.IsList() && f.Message() != nil:
					list := m.Mutable(f).List()
					list.Append(fill(list.NewElement()))
				case f.IsList():
					m.Mutable(f).List().Append(sample(f))
				case f.Message() != nil:
					fill(m.Mutable(f))
				default:
					m.Set(f, sample(f))
				}
			}
			inner := f.Message()
			if f.IsMap() {
				inner = f.MapValue().Message()
			}
			if inner == nil {
				look(build(func(m protoreflect.Message) { set(m, nil) }), at)
				continue
			}
			if inner.Fields().Len() == 0 {
				look(build(func(m protoreflect.Message) { set(m, nil) }), at)
			}
			visit(func(leaf func(protoreflect.Message)) *inference.ModelConfig {
				return build(func(m protoreflect.Message) { set(m, leaf) })
			}, inner, at)
		}
	}
	visit(func(leaf func(protoreflect.Message)) *inference.ModelConfig {
		c := &inference.ModelConfig{}
		leaf(c.ProtoReflect())
		return c
	}, (&inference.ModelConfig{}).ProtoReflect().Descriptor(), "")
	if len(seen) < 120 {
		t.Errorf("only %d fields were looked at", len(seen))
	}
	for _, names := range []map[string]bool{used, never} {
		for path := range names {
			found := strings.HasPrefix(path, "parameters.")
			for at := range seen {
				found = found || at == path || strings.HasPrefix(at, path+".")
			}
			if !found {
				t.Errorf("%s is not a field", path)
			}
		}
	}
	for path := range reasons {
		found := false
		for at := range seen {
			found = found || at == path || strings.HasPrefix(at, path+".")
		}
		if !found {
			t.Errorf("%s has a reason and is not a field", path)
		}
	}
}

func sample(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("x")
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(1)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(1)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(1)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(1)
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(1)
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(1)
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(1)
	}
	panic(fmt.Sprintf("no sample of %v", f.Kind()))
}

func TestCheckModel(t *testing.T) {
	inputs := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 3, -1}}, {Name: "ids", Type: tensor.Int64, Shape: []int64{-1}}}
	outputs := []tensor.Info{{Name: "y", Type: tensor.Float16, Shape: []int64{-1, 10}}, {Name: "any", Type: tensor.String}}
	both := `input [ { name: "x" data_type: TYPE_FP32 dims: [ %s ] }, { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] } ]`
	tests := []struct{ name, give, want string }{
		{"nothing", ``, ""},
		{"whole dims", fmt.Sprintf(both, "-1, 3, -1"), ""},
		{"dims that are narrower", fmt.Sprintf(both, "2, 3, 4"), ""},
		{"dims that are wider", fmt.Sprintf(both, "-1, -1, -1"), ""},
		{"no dims", `output [ { name: "y" data_type: TYPE_FP16 } ]`, ""},
		{"no type", `output [ { name: "y" dims: [ -1, 10 ] } ]`, ""},
		{"unknown rank", `output [ { name: "any" data_type: TYPE_STRING dims: [ 1, 2, 3 ] } ]`, ""},
		{"a batch", `max_batch_size: 4 input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] }, { name: "ids" data_type: TYPE_INT64 } ] output [ { name: "y" data_type: TYPE_FP16 dims: [ 10 ] } ]`, ""},
		{"reshape", `max_batch_size: 4 output [ { name: "y" data_type: TYPE_FP16 dims: [ 2, 5 ] reshape { shape: [ 10 ] } } ]`, ""},
		{"another dimension", fmt.Sprintf(both, "-1, 4, -1"), `input "x" has dims [-1 4 -1], the model has [-1 3 -1]`},
		{"another rank", fmt.Sprintf(both, "3, 4"), `input "x" has dims [3 4], the model has [-1 3 -1]`},
		{"the batch twice", `max_batch_size: 4 output [ { name: "y" dims: [ -1, 10 ] } ]`, `output "y" has dims [-1 -1 10], with the batch that max_batch_size puts first, the model has [-1 10]`},
		{"another reshape", `output [ { name: "y" dims: [ 10 ] reshape { shape: [ 1, 11 ] } } ]`, `output "y" has dims [1 11], the model has [-1 10]`},
		{"another type", `output [ { name: "y" data_type: TYPE_FP32 } ]`, `output "y" has data_type TYPE_FP32, the model has TYPE_FP16`},
		{"another output", `output [ { name: "z" } ]`, `output "z" is not one of the model, which has ["y" "any"]`},
		{"an input too few", `input [ { name: "x" } ]`, `input "ids" of the model is not in the configuration, which has ["x"]`},
		{"another input", `input [ { name: "x" }, { name: "id" }, { name: "ids" } ]`, `input "id" is not one of the model, which has ["x" "ids"]`},
		{"an input twice", `input [ { name: "x" }, { name: "x" }, { name: "ids" } ]`, `input "x" is there twice`},
		{"no name", `output [ {} ]`, `output without a name`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := CheckModel(parsed(t, tt.give), inputs, outputs)
			if got := fmt.Sprint(err); got != tt.want && (tt.want != "" || err != nil) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	t.Run("no batch in the model", func(t *testing.T) {
		fixed := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{1, 3}}}
		scalar := []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{}}}
		want := `max_batch_size is 4, but input "x" of the model has the shape [1 3], whose first dimension is not open; ` +
			`max_batch_size is 4, but output "y" of the model has the shape [], whose first dimension is not open`
		if err := CheckModel(parsed(t, `max_batch_size: 4`), fixed, scalar); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	})
	t.Run("many names", func(t *testing.T) {
		var many []tensor.Info
		for i := range 100 {
			many = append(many, tensor.Info{Name: fmt.Sprint(i), Type: tensor.Float32})
		}
		err := CheckModel(parsed(t, `output [ { name: "z" } ]`), nil, many)
		if err == nil || !strings.HasSuffix(err.Error(), `"6" "7"] and 92 more`) {
			t.Errorf("got %v", err)
		}
	})
}

func TestVersions(t *testing.T) {
	there := []int64{3, 1, 7}
	tests := []struct {
		give            string
		chosen, missing []int64
	}{
		{``, []int64{7}, nil},
		{`version_policy { latest {} }`, []int64{7}, nil},
		{`version_policy { latest { num_versions: 2 } }`, []int64{3, 7}, nil},
		{`version_policy { latest { num_versions: 4294967295 } }`, []int64{1, 3, 7}, nil},
		{`version_policy { all {} }`, []int64{1, 3, 7}, nil},
		{`version_policy { specific { versions: [ 7, 1, 2, 7 ] } }`, []int64{1, 7}, []int64{2}},
	}
	for _, tt := range tests {
		chosen, missing := Versions(parsed(t, tt.give), there)
		if !cmp.Equal(chosen, tt.chosen) || !cmp.Equal(missing, tt.missing) {
			t.Errorf("%s: got %v, missing %v", tt.give, chosen, missing)
		}
	}
	if chosen, _ := Versions(parsed(t, ``), nil); len(chosen) != 0 {
		t.Errorf("got %v of nothing", chosen)
	}
}

func TestConfig(t *testing.T) {
	inputs := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 3}}, {Name: "any", Type: tensor.String}}
	outputs := []tensor.Info{{Name: "y", Type: tensor.BFloat16, Shape: []int64{-1, 10}}, {Name: "s", Type: tensor.Bool, Shape: []int64{}}}
	batched := serving.Automatic(true)
	batched.Instances, batched.MaxQueueDelay = 3, time.Millisecond
	tests := []struct {
		name    string
		options serving.Options
		want    string
	}{
		{
			"alone", serving.Options{},
			`name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" version_policy { latest { num_versions: 1 } } default_model_filename: "model.onnx"
			input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }, { name: "any" data_type: TYPE_STRING } ]
			output [ { name: "y" data_type: TYPE_BF16 dims: [ -1, 10 ] label_filename: "y_labels.txt" }, { name: "s" data_type: TYPE_BOOL } ]
			instance_group [ { name: "m" kind: KIND_CPU count: 1 } ]`,
		},
		{
			"batched", batched,
			`name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" version_policy { latest { num_versions: 1 } } default_model_filename: "model.onnx"
			max_batch_size: 16
			input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }, { name: "any" data_type: TYPE_STRING } ]
			output [ { name: "y" data_type: TYPE_BF16 dims: [ 10 ] label_filename: "y_labels.txt" }, { name: "s" data_type: TYPE_BOOL } ]
			instance_group [ { name: "m" kind: KIND_CPU count: 3 } ]
			dynamic_batching { max_queue_delay_microseconds: 1000 default_queue_policy { allow_timeout_override: true max_queue_size: 1024 } }`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Config("m", inputs, outputs, tt.options, map[string][]string{"y": {"a"}})
			if diff := cmp.Diff(parsed(t, tt.want), got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestConfigReadsBack(t *testing.T) {
	duration := rapid.Custom(func(t *rapid.T) time.Duration {
		return time.Duration(rapid.Int64Range(0, int64(serving.MaxDuration/time.Microsecond)).Draw(t, "us")) * time.Microsecond
	})
	policy := rapid.Custom(func(t *rapid.T) serving.QueuePolicy {
		return serving.QueuePolicy{
			MaxSize: rapid.IntRange(1, serving.MaxQueueSize).Draw(t, "size"), Timeout: duration.Draw(t, "timeout"),
			AllowTimeoutOverride: rapid.Bool().Draw(t, "override"), Delay: rapid.Bool().Draw(t, "delay"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		levels := rapid.IntRange(0, serving.MaxPriorityLevels).Draw(t, "levels")
		o := serving.Options{
			MaxBatchSize: rapid.IntRange(1, serving.MaxBatchSize).Draw(t, "batch"), Strict: true, DynamicBatching: true,
			Instances: rapid.IntRange(1, serving.MaxInstances).Draw(t, "instances"), MaxQueueDelay: duration.Draw(t, "delay"),
			PreserveOrdering: rapid.Bool().Draw(t, "order"), PriorityLevels: levels, Pinned: rapid.Bool().Draw(t, "pinned"),
			DefaultPriority: rapid.IntRange(min(1, levels), levels).Draw(t, "default"), Ageing: duration.Draw(t, "ageing"), Queue: policy.Draw(t, "queue"),
		}
		for range rapid.IntRange(0, 3).Draw(t, "preferred") {
			o.PreferredBatchSizes = append(o.PreferredBatchSizes, rapid.IntRange(1, o.MaxBatchSize).Draw(t, "size"))
		}
		if levels > 0 && rapid.Bool().Draw(t, "queues") {
			o.Queues = rapid.MapOfN(rapid.IntRange(1, levels), policy, 1, min(levels, 4)).Draw(t, "queues")
		}
		inputs := []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 3}}}
		text, err := prototext.Marshal(Config("m", inputs, inputs, o, nil))
		if err != nil {
			t.Fatal(err)
		}
		c, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckModel(c, inputs, inputs); err != nil {
			t.Fatal(err)
		}
		got, warnings, err := Options(c)
		if err != nil || len(warnings) > 0 {
			t.Fatalf("%v, %v\n%s", err, warnings, text)
		}
		if diff := cmp.Diff(&o, got); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestTypes(t *testing.T) {
	found := 0
	for v := range inference.DataType_name {
		d := inference.DataType(v)
		typ, ok := Type(d)
		if !ok {
			if d != inference.DataType_TYPE_INVALID {
				t.Errorf("%v has no type", d)
			}
			continue
		}
		found++
		if DataType(typ) != d || !typ.Known() {
			t.Errorf("%v is %v, which is %v", d, typ, DataType(typ))
		}
	}
	for v := range tensor.Type(32) {
		if v.Known() != (DataType(v) != inference.DataType_TYPE_INVALID) {
			t.Errorf("%v is %v", v, DataType(v))
		}
	}
	if found != len(dataTypes) {
		t.Errorf("%d of %d types found", found, len(dataTypes))
	}
}

// use takes a configuration through all that reads it.
func use(c *inference.ModelConfig) {
	Options(c)
	CheckModel(c, []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 3}}}, nil)
	Versions(c, []int64{1, 2})
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`name: "m" platform: "onnxruntime_onnx" max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 4 ] }`))
	f.Add([]byte(`input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] reshape { shape: [] } } ] # c`))
	f.Add([]byte(`dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 2 value { max_queue_size: 7 } } }`))
	f.Add([]byte(`parameters { key: "ageing" value { string_value: "1s" } } version_policy { specific { versions: 1 versions: 2 } }`))
	f.Add([]byte("input {\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err != nil {
			if message := err.Error(); len(message) > 2*maxMessage || message[0] < '0' || message[0] > '9' && len(text) <= MaxConfigBytes {
				t.Errorf("message %q", message)
			}
			return
		}
		use(c)
		again, err := prototext.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := Parse(again); err != nil && len(again) <= MaxConfigBytes || err == nil && !proto.Equal(c, back) && !strings.Contains(string(again), "nan") {
			t.Errorf("%s reads back as %v, %v", again, back, err)
		}
	})
}

func FuzzParseJSON(f *testing.F) {
	f.Add([]byte(`{"max_batch_size": "4", "instanceGroup": [{"count": 1}], "dynamic_batching": {}}`))
	f.Add([]byte(`{"input": [{"name": "x", "dataType": 11, "dims": ["-1"]}], "parameters": {"ageing": {"string_value": "1s"}}}`))
	f.Add([]byte(`{"version_policy": {"latest": {"num_versions": 2}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := ParseJSON(text)
		if err != nil {
			if message := err.Error(); len(message) > 2*maxMessage {
				t.Errorf("message of %d bytes", len(message))
			}
			return
		}
		use(c)
	})
}
