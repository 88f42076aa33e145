package triton

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// labelSuffix ends the name that the file with the classes of an output is
// given in a configuration.
const labelSuffix = "_labels.txt"

// Config writes the configuration of a model with these inputs, outputs,
// options and classes by output. Where options have a batch, it comes before
// dims, as Triton has it.
func Config(name string, inputs, outputs []tensor.Info, o serving.Options, labels map[string][]string) *inference.ModelConfig {
	c := &inference.ModelConfig{
		Name: name, Platform: platformName, Backend: backendName, DefaultModelFilename: DefaultFilename,
		VersionPolicy: &inference.ModelVersionPolicy{PolicyChoice: &inference.ModelVersionPolicy_Latest_{
			Latest: &inference.ModelVersionPolicy_Latest{NumVersions: 1},
		}},
		MaxBatchSize:  int32(o.MaxBatchSize),
		InstanceGroup: []*inference.ModelInstanceGroup{{Name: name, Kind: inference.ModelInstanceGroup_KIND_CPU, Count: int32(max(o.Instances, 1))}},
	}
	for _, in := range inputs {
		c.Input = append(c.Input, &inference.ModelInput{Name: in.Name, DataType: DataType(in.Type), Dims: dims(in, o)})
	}
	for _, out := range outputs {
		to := &inference.ModelOutput{Name: out.Name, DataType: DataType(out.Type), Dims: dims(out, o)}
		if labels[out.Name] != nil {
			to.LabelFilename = strings.ReplaceAll(out.Name, "/", "_") + labelSuffix
		}
		c.Output = append(c.Output, to)
	}
	if o.DynamicBatching {
		c.SchedulingChoice = &inference.ModelConfig_DynamicBatching{DynamicBatching: dynamicBatching(o)}
	}
	own := map[string]*inference.ModelParameter{}
	if o.Ageing != 0 && o.Ageing != serving.DefaultAgeing {
		own[ageingParameter] = &inference.ModelParameter{StringValue: o.Ageing.String()}
	}
	if o.Pinned {
		own[pinnedParameter] = &inference.ModelParameter{StringValue: "true"}
	}
	if len(own) > 0 {
		c.Parameters = own
	}
	return c
}

// dims gives the dimensions of an input or output without those of the batch.
func dims(i tensor.Info, o serving.Options) []int64 {
	if o.MaxBatchSize > 0 && len(i.Shape) > 0 {
		return i.Shape[1:]
	}
	return i.Shape
}

func dynamicBatching(o serving.Options) *inference.ModelDynamicBatching {
	b := &inference.ModelDynamicBatching{
		MaxQueueDelayMicroseconds: uint64(o.MaxQueueDelay / time.Microsecond),
		PreserveOrdering:          o.PreserveOrdering,
		PriorityLevels:            uint64(o.PriorityLevels),
		DefaultPriorityLevel:      uint64(o.DefaultPriority),
		DefaultQueuePolicy:        queuePolicy(o.Policy(0)),
	}
	for _, size := range o.PreferredBatchSizes {
		b.PreferredBatchSize = append(b.PreferredBatchSize, int32(size))
	}
	for _, level := range slices.Sorted(maps.Keys(o.Queues)) {
		if b.PriorityQueuePolicy == nil {
			b.PriorityQueuePolicy = map[uint64]*inference.ModelQueuePolicy{}
		}
		b.PriorityQueuePolicy[uint64(level)] = queuePolicy(o.Policy(level))
	}
	return b
}

func queuePolicy(p serving.QueuePolicy) *inference.ModelQueuePolicy {
	q := &inference.ModelQueuePolicy{
		DefaultTimeoutMicroseconds: uint64(p.Timeout / time.Microsecond),
		AllowTimeoutOverride:       p.AllowTimeoutOverride,
		MaxQueueSize:               uint32(p.MaxSize),
	}
	if p.Delay {
		q.TimeoutAction = inference.ModelQueuePolicy_DELAY
	}
	return q
}
