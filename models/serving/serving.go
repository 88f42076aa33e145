// Package serving says how the requests for a version are scheduled. The
// names and meanings are those of Triton's dynamic batcher and queue policies
// (https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md).
package serving

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// Limits of Options, and what counts where they leave something open.
const (
	MaxBatchSize      = 1 << 16
	MaxInstances      = 64
	MaxPriorityLevels = 256
	MaxQueueSize      = 1 << 16
	MaxPreferred      = 64 // preferred batch sizes
	MaxDuration       = 24 * time.Hour

	// DefaultBatchSize is the most rows of a run where nothing says how many
	// and the model's own graph says that its first dimension is a batch.
	DefaultBatchSize = 16
	// DefaultQueueSize is how many requests wait for a version.
	DefaultQueueSize = 1024
	// DefaultAgeing is how long a request waits until it counts as one of the
	// next higher priority.
	DefaultAgeing = time.Second
)

// Options are the scheduling options of a version. Its zero value runs one
// request at a time, each alone, in the order of arrival. In JSON a duration
// is a string with a unit, such as "5ms" or "1m30s".
type Options struct {
	// MaxBatchSize is the most rows of a run, where a row is an index of the
	// first dimension of every input and output. 0: the first dimension has
	// no such meaning, and requests run alone.
	MaxBatchSize int `json:"maxBatchSize,omitempty"`
	// Strict refuses a request of more than MaxBatchSize rows; without it such
	// a request runs alone.
	Strict bool `json:"strict,omitempty"`
	// Instances is how many runs of the version go on at a time; 0 is 1. They
	// share one copy of the weights.
	Instances int `json:"instances,omitempty"`
	// Pinned keeps the weights in memory once they are in.
	Pinned bool `json:"pinned,omitempty"`
	// DynamicBatching joins requests into runs of up to MaxBatchSize rows.
	DynamicBatching bool `json:"dynamicBatching,omitempty"`
	// PreferredBatchSizes are sizes at which a run is not held back any more.
	PreferredBatchSizes []int `json:"preferredBatchSizes,omitempty"`
	// MaxQueueDelay is how long a request may be held back so that others
	// join it.
	MaxQueueDelay time.Duration `json:"maxQueueDelay,omitempty"`
	// PreserveOrdering gives the answers of one priority in the order in which
	// their requests came.
	PreserveOrdering bool `json:"preserveOrdering,omitempty"`
	// PriorityLevels is how many priorities there are: 1, the highest, to
	// PriorityLevels. 0: all requests are equal.
	PriorityLevels int `json:"priorityLevels,omitempty"`
	// DefaultPriority is that of a request which names none, or 0.
	DefaultPriority int `json:"defaultPriority,omitempty"`
	// Ageing is how long a request waits until it counts as one of the next
	// higher priority; 0 is DefaultAgeing.
	Ageing time.Duration `json:"ageing,omitempty"`
	// Queue is the policy of all priorities that Queues does not name.
	Queue  QueuePolicy         `json:"queue,omitzero"`
	Queues map[int]QueuePolicy `json:"queues,omitempty"`
}

// QueuePolicy bounds the queue of one priority.
type QueuePolicy struct {
	// MaxSize is how many requests wait; a further one is refused. 0 is
	// DefaultQueueSize.
	MaxSize int `json:"maxSize,omitempty"`
	// Timeout is how long a request may wait; 0 sets no bound.
	Timeout time.Duration `json:"timeout,omitempty"`
	// AllowTimeoutOverride lets a request name a shorter time-out of its own.
	AllowTimeoutOverride bool `json:"allowTimeoutOverride,omitempty"`
	// Delay keeps a request whose time is out, behind all others, instead of
	// refusing it.
	Delay bool `json:"delay,omitempty"`
}

// Policy gives the queue policy of a priority.
func (o *Options) Policy(priority int) QueuePolicy {
	p, ok := o.Queues[priority]
	if !ok {
		p = o.Queue
	}
	if p.MaxSize == 0 {
		p.MaxSize = DefaultQueueSize
	}
	return p
}

// Check names every option that is out of its limits.
func (o *Options) Check() error {
	number := func(name string, value, least, most int) error {
		if value < least || value > most {
			return fmt.Errorf("%s is %d, allowed are %d to %d", name, value, least, most)
		}
		return nil
	}
	duration := func(name string, value time.Duration) error {
		if value < 0 || value > MaxDuration {
			return fmt.Errorf("%s is %v, allowed are 0 to %v", name, value, MaxDuration)
		}
		return nil
	}
	policy := func(name string, p QueuePolicy) error {
		if err := number(name+".maxSize", p.MaxSize, 0, MaxQueueSize); err != nil {
			return err
		}
		return duration(name+".timeout", p.Timeout)
	}
	errs := []error{
		number("maxBatchSize", o.MaxBatchSize, 0, MaxBatchSize),
		number("instances", o.Instances, 0, MaxInstances),
		number("the number of preferredBatchSizes", len(o.PreferredBatchSizes), 0, MaxPreferred),
		duration("maxQueueDelay", o.MaxQueueDelay),
		number("priorityLevels", o.PriorityLevels, 0, MaxPriorityLevels),
		number("defaultPriority", o.DefaultPriority, min(1, o.PriorityLevels), o.PriorityLevels),
		duration("ageing", o.Ageing),
		policy("queue", o.Queue),
	}
	for i, size := range o.PreferredBatchSizes {
		errs = append(errs, number(fmt.Sprintf("preferredBatchSizes[%d]", i), size, 1, max(1, o.MaxBatchSize)))
	}
	for _, level := range slices.Sorted(maps.Keys(o.Queues)) {
		errs = append(errs, number("a priority in queues", level, 1, o.PriorityLevels), policy(fmt.Sprintf("queues[%d]", level), o.Queues[level]))
	}
	return errors.Join(errs...)
}

// Automatic gives the options of a version for which nobody chose any:
// batching, where the graph says that the first dimension is a batch.
func Automatic(batch bool) Options {
	if !batch {
		return Options{Queue: QueuePolicy{AllowTimeoutOverride: true}}
	}
	return Options{MaxBatchSize: DefaultBatchSize, DynamicBatching: true, Queue: QueuePolicy{AllowTimeoutOverride: true}}
}

// Batch says whether the rows of a model's inputs are independent requests, by
// the names of the dimensions of all its inputs and outputs, "" for one that is
// not open: the first of each has one and the same name, that name says batch,
// and no other dimension has it. "n", "b", "bs", "bsz" and what begins with
// "batch" say so, in capitals or not.
func Batch(tensors [][]string) bool {
	for _, names := range tensors {
		if len(names) == 0 || names[0] != tensors[0][0] {
			return false
		}
		if slices.Contains(names[1:], names[0]) {
			return false
		}
	}
	switch name := strings.ToLower(tensors[0][0]); name {
	case "n", "b", "bs", "bsz":
		return true
	default:
		return strings.HasPrefix(name, "batch")
	}
}

// Rows gives the number of rows of an input of this shape, 1 where options
// give the first dimension no meaning or there is none. It does not go beyond
// math.MaxInt32.
func (o *Options) Rows(shape []int64) int {
	if o.MaxBatchSize == 0 || len(shape) == 0 {
		return 1
	}
	return int(min(shape[0], math.MaxInt32))
}
