package triton

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dunlin/dunlin/proto/inference"
)

// used are the fields with a meaning here, by their path without indices.
// Those of a message that is not among them have none.
var used = set(
	"name", "platform", "backend", "max_batch_size", "default_model_filename",
	"version_policy", "version_policy.latest", "version_policy.latest.num_versions", "version_policy.all",
	"version_policy.specific", "version_policy.specific.versions",
	"input", "input.name", "input.data_type", "input.dims",
	"output", "output.name", "output.data_type", "output.dims", "output.label_filename",
	"instance_group", "instance_group.name", "instance_group.count",
	"dynamic_batching", "dynamic_batching.preferred_batch_size", "dynamic_batching.max_queue_delay_microseconds",
	"dynamic_batching.preserve_ordering", "dynamic_batching.priority_levels", "dynamic_batching.default_priority_level",
	"dynamic_batching.default_queue_policy", "dynamic_batching.default_queue_policy.timeout_action",
	"dynamic_batching.default_queue_policy.default_timeout_microseconds",
	"dynamic_batching.default_queue_policy.allow_timeout_override", "dynamic_batching.default_queue_policy.max_queue_size",
	"dynamic_batching.priority_queue_policy", "dynamic_batching.priority_queue_policy.timeout_action",
	"dynamic_batching.priority_queue_policy.default_timeout_microseconds",
	"dynamic_batching.priority_queue_policy.allow_timeout_override", "dynamic_batching.priority_queue_policy.max_queue_size",
	"parameters."+ageingParameter, "parameters."+ageingParameter+".string_value",
	"parameters."+pinnedParameter, "parameters."+pinnedParameter+".string_value",
	"model_transaction_policy", "model_transaction_policy.decoupled",
)

// never are fields that are not looked at, as a configuration with them is
// refused.
var never = set("sequence_batching", "ensemble_scheduling", "batch_input", "batch_output", "model_repository_agents")

// reasons say more about fields without a meaning here, by path.
var reasons = map[string]string{
	"runtime":                                     "there is one runtime",
	"input.format":                                "it changes nothing about the data",
	"input.reshape":                               "requests give the shape that the model has",
	"output.reshape":                              "answers have the shape that the model gives",
	"input.is_shape_tensor":                       "it is about TensorRT",
	"output.is_shape_tensor":                      "it is about TensorRT",
	"input.is_non_linear_format_io":               "it is about TensorRT",
	"output.is_non_linear_format_io":              "it is about TensorRT",
	"input.allow_ragged_batch":                    "only requests of the same shape are run together",
	"input.optional":                              "requests give every input",
	"instance_group.kind":                         "the agent chooses where models run",
	"instance_group.gpus":                         "the agent chooses where models run",
	"instance_group.rate_limiter":                 "there is no rate limiter; instance_group.count bounds the runs at a time",
	"instance_group.passive":                      "the group is left out",
	"instance_group.host_policy":                  "the agent chooses where models run",
	"optimization.graph":                          "ONNX Runtime optimizes the graph as far as it can",
	"optimization.cuda":                           "the agent chooses where models run",
	"optimization.execution_accelerators":         "the agent chooses where models run",
	"optimization.priority":                       "models share the runtime's threads equally",
	"optimization.input_pinned_memory":            "the agent chooses how tensors travel",
	"optimization.output_pinned_memory":           "the agent chooses how tensors travel",
	"optimization.gather_kernel_buffer_threshold": "the agent chooses how tensors travel",
	"optimization.eager_batching":                 "the agent chooses how tensors travel",
	"cc_model_filenames":                          "the agent chooses where models run; default_model_filename names the file",
	"metric_tags":                                 "metrics have the labels model and version",
	"model_metrics":                               "the histograms have fixed bounds",
	"model_warmup":                                "a model is ready when it has been loaded",
	"model_operations":                            "no libraries are loaded for models",
	"response_cache":                              "answers are not cached; each request runs",
	"parameters":                                  "no such parameter is known",
}

// harmless are values that ask for what is there anyway, by path.
var harmless = map[string]int{
	"instance_group.kind": int(inference.ModelInstanceGroup_KIND_CPU),
}

func set(names ...string) map[string]bool {
	s := map[string]bool{}
	for _, n := range names {
		s[n] = true
	}
	return s
}

// ignored names the fields that are set and have no meaning here, in the
// order of their numbers.
func ignored(c *inference.ModelConfig) []string {
	var w walk
	w.message("", "", c.ProtoReflect())
	return w.warnings
}

type walk struct{ warnings []string }

// message looks at the fields of m, whose path is shown with indices, and
// looked up without.
func (w *walk) message(shown, path string, m protoreflect.Message) {
	fields := []protoreflect.FieldDescriptor{}
	m.Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		fields = append(fields, f)
		return true
	})
	slices.SortFunc(fields, func(a, b protoreflect.FieldDescriptor) int { return cmp.Compare(a.Number(), b.Number()) })
	for _, f := range fields {
		shown, path, v := below(shown, string(f.Name())), below(path, string(f.Name())), m.Get(f)
		reason := reasons[path]
		switch {
		case never[path]:
		case f.IsMap():
			w.entries(shown, path, reason, f, v.Map())
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				w.value(fmt.Sprintf("%s[%d]", shown, i), path, reason, f, v.List().Get(i))
			}
		case f.IsList():
			w.value(shown, path, reason, f, v.List().Get(0))
		default:
			w.value(shown, path, reason, f, v)
		}
	}
}

// entries looks at the entries of a map. Those of parameters have paths of
// their own.
func (w *walk) entries(shown, path, reason string, f protoreflect.FieldDescriptor, m protoreflect.Map) {
	entries := map[string]protoreflect.Value{}
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		entries[k.String()] = v
		return true
	})
	for _, k := range slices.Sorted(maps.Keys(entries)) {
		at, path := fmt.Sprintf("%s[%s]", shown, k), path
		if f.MapKey().Kind() == protoreflect.StringKind {
			at = fmt.Sprintf("%s[%q]", shown, k)
		}
		if path == "parameters" {
			path = below(path, k)
		}
		w.value(at, path, reason, f.MapValue(), entries[k])
	}
}

// value looks at one field, one element or one entry; reason, where not empty,
// is why it is ignored unless it is used.
func (w *walk) value(shown, path, reason string, f protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch {
	case f.Message() != nil && (used[path] || reason == ""):
		w.message(shown, path, v.Message())
		return
	case used[path], f.Enum() != nil && harmless[path] != 0 && int(v.Enum()) == harmless[path]:
		return
	case f.Message() != nil && !f.IsList() && !f.IsMap() && proto.Size(v.Message().Interface()) == 0:
		return // it says nothing
	}
	w.warnings = append(w.warnings, fmt.Sprintf("%s is ignored: %s", shown, cmp.Or(reason, "it has no meaning here")))
}

func below(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
