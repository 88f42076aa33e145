package triton

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/proto/inference"
)

const (
	backendName  = "onnxruntime"
	platformName = "onnxruntime_onnx"

	// DefaultFilename is the name of the model's file where the configuration
	// does not say.
	DefaultFilename = "model.onnx"

	// ageingParameter is the parameter of our own that sets
	// serving.Options.Ageing: a duration with its unit, such as "500ms".
	ageingParameter = "ageing"
	// pinnedParameter is the one that sets serving.Options.Pinned: "true".
	pinnedParameter = "pinned"
)

// Options gives what a configuration says about scheduling, and nil where it
// leaves that to the model: it then names neither max_batch_size nor a
// scheduler, instances, inputs or outputs.
//
// The warnings name each field that is set and changes nothing here. An error
// names every field that cannot be served as it asks to be; with it, too, come
// the warnings.
//
// A request's own time-out counts unless default_queue_policy says otherwise.
// max_batch_size is strict: a request of more rows is refused.
func Options(c *inference.ModelConfig) (*serving.Options, []string, error) {
	warnings := ignored(c)
	if err := refused(c); err != nil {
		return nil, warnings, err
	}
	b := c.GetDynamicBatching()
	if c.GetMaxBatchSize() == 0 && b == nil && len(c.GetInstanceGroup()) == 0 && len(c.GetInput()) == 0 && len(c.GetOutput()) == 0 {
		if c.GetParameters()[ageingParameter] != nil {
			warnings = append(warnings, fmt.Sprintf("parameters[%q] is ignored: the configuration has no dynamic_batching with priority_levels", ageingParameter))
		}
		if c.GetParameters()[pinnedParameter] != nil {
			warnings = append(warnings, fmt.Sprintf("parameters[%q] is ignored: the configuration names no max_batch_size, scheduler, instances, inputs or outputs beside it", pinnedParameter))
		}
		return nil, warnings, nil
	}
	var errs []error
	o := &serving.Options{
		MaxBatchSize: int(c.GetMaxBatchSize()), Strict: c.GetMaxBatchSize() > 0,
		DynamicBatching: b != nil,
		Queue:           serving.QueuePolicy{AllowTimeoutOverride: true},
	}
	for _, g := range c.GetInstanceGroup() {
		if !g.GetPassive() {
			o.Instances += max(int(g.GetCount()), 1)
		}
	}
	if b != nil {
		for _, size := range b.GetPreferredBatchSize() {
			o.PreferredBatchSizes = append(o.PreferredBatchSizes, int(size))
		}
		o.MaxQueueDelay = microseconds(b.GetMaxQueueDelayMicroseconds())
		o.PreserveOrdering = b.GetPreserveOrdering()
		o.PriorityLevels = number(b.GetPriorityLevels())
		o.DefaultPriority = number(b.GetDefaultPriorityLevel())
		if p := b.GetDefaultQueuePolicy(); p != nil {
			o.Queue = policy(p)
		}
		for _, level := range slices.Sorted(maps.Keys(b.GetPriorityQueuePolicy())) {
			if o.Queues == nil {
				o.Queues = map[int]serving.QueuePolicy{}
			}
			o.Queues[number(level)] = policy(b.GetPriorityQueuePolicy()[level])
		}
	}
	if p := c.GetParameters()[ageingParameter]; p != nil {
		var err error
		if o.Ageing, err = time.ParseDuration(p.GetStringValue()); err != nil {
			errs = append(errs, fmt.Errorf("parameters[%q] is %q, which is not a duration such as \"500ms\"", ageingParameter, p.GetStringValue()))
		}
	}
	if p := c.GetParameters()[pinnedParameter]; p != nil {
		var err error
		if o.Pinned, err = strconv.ParseBool(p.GetStringValue()); err != nil {
			errs = append(errs, fmt.Errorf("parameters[%q] is %q, which is not true or false", pinnedParameter, p.GetStringValue()))
		}
	}
	if err := o.Check(); err != nil {
		errs = append(errs, errors.New(strings.ReplaceAll(configNames.Replace(err.Error()), "\n", "; ")))
	}
	if len(errs) > 0 {
		return nil, warnings, join(errs)
	}
	return o, warnings, nil
}

// join gives one error of one line, nil for none.
func join(errs []error) error {
	var text []string
	for _, err := range errs {
		if err != nil {
			text = append(text, err.Error())
		}
	}
	if text == nil {
		return nil
	}
	return errors.New(strings.Join(text, "; "))
}

// configNames puts the names of the configuration's fields for those of
// serving.Options.
var configNames = strings.NewReplacer(
	"maxBatchSize", "max_batch_size",
	"instances", "the sum of instance_group.count",
	"preferredBatchSizes", "dynamic_batching.preferred_batch_size",
	"maxQueueDelay", "dynamic_batching.max_queue_delay_microseconds",
	"priorityLevels", "dynamic_batching.priority_levels",
	"defaultPriority", "dynamic_batching.default_priority_level",
	"ageing", fmt.Sprintf("parameters[%q]", ageingParameter),
	"queues", "dynamic_batching.priority_queue_policy",
	"queue.", "dynamic_batching.default_queue_policy.",
	"maxSize", "max_queue_size",
	"timeout", "default_timeout_microseconds",
)

// number gives n, or a number that is out of all limits.
func number(n uint64) int { return int(min(n, math.MaxInt32)) }

func microseconds(n uint64) time.Duration {
	return time.Duration(min(n, math.MaxInt64/uint64(time.Microsecond))) * time.Microsecond
}

func policy(p *inference.ModelQueuePolicy) serving.QueuePolicy {
	return serving.QueuePolicy{
		MaxSize:              number(uint64(p.GetMaxQueueSize())),
		Timeout:              microseconds(p.GetDefaultTimeoutMicroseconds()),
		AllowTimeoutOverride: p.GetAllowTimeoutOverride(),
		Delay:                p.GetTimeoutAction() == inference.ModelQueuePolicy_DELAY,
	}
}

// refused names what would not be served as the configuration asks.
func refused(c *inference.ModelConfig) error {
	var errs []error
	refuse := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	refuse(c.GetBackend() != "" && c.GetBackend() != backendName, "backend is %q, only %q is served", c.GetBackend(), backendName)
	refuse(c.GetPlatform() != "" && c.GetPlatform() != platformName && c.GetEnsembleScheduling() == nil, "platform is %q, only %q is served", c.GetPlatform(), platformName)
	refuse(c.GetSequenceBatching() != nil, "sequence_batching is not served: no state is kept between requests")
	refuse(c.GetEnsembleScheduling() != nil, "ensemble_scheduling is not served: join the models into one graph")
	refuse(c.GetModelTransactionPolicy().GetDecoupled(), "model_transaction_policy.decoupled is not served: each request has one answer")
	refuse(len(c.GetBatchInput()) > 0, "batch_input is not served: requests give all inputs of the model")
	refuse(len(c.GetBatchOutput()) > 0, "batch_output is not served")
	refuse(len(c.GetModelRepositoryAgents().GetAgents()) > 0, "model_repository_agents are not there: the model would be served without what they do to it")
	for i, g := range c.GetInstanceGroup() {
		refuse(g.GetCount() < 0, "instance_group[%d].count is %d, allowed are 0 to %d", i, g.GetCount(), serving.MaxInstances)
	}
	name := Filename(c)
	refuse(!filepath.IsLocal(name) || filepath.Base(name) != name || name == ".", "default_model_filename is %q, which is not the name of a file in the version's folder", name)
	for i, o := range c.GetOutput() {
		l := o.GetLabelFilename()
		refuse(l != "" && !filepath.IsLocal(l), "output[%d].label_filename is %q, which is not in the model's folder", i, l)
	}
	if s := c.GetVersionPolicy().GetSpecific(); s != nil {
		refuse(len(s.GetVersions()) == 0, "version_policy.specific names no versions")
		for i, v := range s.GetVersions() {
			refuse(v < 1, "version_policy.specific.versions[%d] is %d, allowed are numbers from 1 on", i, v)
		}
	}
	return join(errs)
}

// Filename gives the name of the model's file in the folder of a version.
func Filename(c *inference.ModelConfig) string {
	return cmp.Or(c.GetDefaultModelFilename(), DefaultFilename)
}

// Versions gives those of the versions that are there which the configuration
// asks for, in ascending order, and those that it names and that are not
// there. Without a policy it is the newest one.
func Versions(c *inference.ModelConfig, there []int64) (chosen, missing []int64) {
	there = slices.Compact(slices.Sorted(slices.Values(there)))
	switch p := c.GetVersionPolicy().GetPolicyChoice().(type) {
	case *inference.ModelVersionPolicy_All_:
		return there, nil
	case *inference.ModelVersionPolicy_Specific_:
		for _, v := range slices.Compact(slices.Sorted(slices.Values(p.Specific.GetVersions()))) {
			if slices.Contains(there, v) {
				chosen = append(chosen, v)
			} else {
				missing = append(missing, v)
			}
		}
		return chosen, missing
	}
	n := max(int64(c.GetVersionPolicy().GetLatest().GetNumVersions()), 1)
	return there[max(int64(len(there))-n, 0):], nil
}
