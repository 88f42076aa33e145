package serving

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestCheck(t *testing.T) {
	tests := []struct {
		name string
		give Options
		want string // part of the error; empty: none
	}{
		{"nothing", Options{}, ""},
		{"automatic", Automatic(true), ""},
		{"automatic, alone", Automatic(false), ""},
		{"batch size", Options{MaxBatchSize: MaxBatchSize}, ""},
		{"batch size above", Options{MaxBatchSize: MaxBatchSize + 1}, "maxBatchSize is 65537, allowed are 0 to 65536"},
		{"batch size below", Options{MaxBatchSize: -1}, "maxBatchSize is -1, allowed are 0 to 65536"},
		{"instances", Options{Instances: MaxInstances}, ""},
		{"instances above", Options{Instances: MaxInstances + 1}, "instances is 65, allowed are 0 to 64"},
		{"instances below", Options{Instances: -1}, "instances is -1, allowed are 0 to 64"},
		{"preferred", Options{MaxBatchSize: 8, PreferredBatchSizes: []int{1, 8}}, ""},
		{"preferred above", Options{MaxBatchSize: 8, PreferredBatchSizes: []int{4, 9}}, "preferredBatchSizes[1] is 9, allowed are 1 to 8"},
		{"preferred below", Options{MaxBatchSize: 8, PreferredBatchSizes: []int{0}}, "preferredBatchSizes[0] is 0, allowed are 1 to 8"},
		{"preferred without batches", Options{PreferredBatchSizes: []int{2}}, "preferredBatchSizes[0] is 2, allowed are 1 to 1"},
		{"many preferred", Options{MaxBatchSize: 1, PreferredBatchSizes: ones(MaxPreferred)}, ""},
		{"too many preferred", Options{MaxBatchSize: 1, PreferredBatchSizes: ones(MaxPreferred + 1)}, "the number of preferredBatchSizes is 65, allowed are 0 to 64"},
		{"delay", Options{MaxQueueDelay: MaxDuration}, ""},
		{"delay above", Options{MaxQueueDelay: MaxDuration + 1}, "maxQueueDelay is 24h0m0.000000001s, allowed are 0 to 24h0m0s"},
		{"delay below", Options{MaxQueueDelay: -1}, "maxQueueDelay is -1ns, allowed are 0 to 24h0m0s"},
		{"priorities", Options{PriorityLevels: MaxPriorityLevels, DefaultPriority: MaxPriorityLevels}, ""},
		{"priorities above", Options{PriorityLevels: MaxPriorityLevels + 1, DefaultPriority: 1}, "priorityLevels is 257, allowed are 0 to 256"},
		{"priorities below", Options{PriorityLevels: -1}, "priorityLevels is -1, allowed are 0 to 256"},
		{"no default priority", Options{PriorityLevels: 2}, "defaultPriority is 0, allowed are 1 to 2"},
		{"default priority above", Options{PriorityLevels: 2, DefaultPriority: 3}, "defaultPriority is 3, allowed are 1 to 2"},
		{"default priority without priorities", Options{DefaultPriority: 1}, "defaultPriority is 1, allowed are 0 to 0"},
		{"ageing", Options{Ageing: MaxDuration}, ""},
		{"ageing above", Options{Ageing: MaxDuration + 1}, "ageing is 24h0m0.000000001s"},
		{"ageing below", Options{Ageing: -time.Second}, "ageing is -1s, allowed are 0 to 24h0m0s"},
		{"queue", Options{Queue: QueuePolicy{MaxSize: MaxQueueSize, Timeout: MaxDuration}}, ""},
		{"queue above", Options{Queue: QueuePolicy{MaxSize: MaxQueueSize + 1}}, "queue.maxSize is 65537, allowed are 0 to 65536"},
		{"queue below", Options{Queue: QueuePolicy{MaxSize: -1}}, "queue.maxSize is -1, allowed are 0 to 65536"},
		{"time-out above", Options{Queue: QueuePolicy{Timeout: MaxDuration + 1}}, "queue.timeout is 24h0m0.000000001s"},
		{"time-out below", Options{Queue: QueuePolicy{Timeout: -1}}, "queue.timeout is -1ns"},
		{"queues", Options{PriorityLevels: 2, DefaultPriority: 1, Queues: map[int]QueuePolicy{1: {}, 2: {}}}, ""},
		{"queues above", Options{PriorityLevels: 2, DefaultPriority: 1, Queues: map[int]QueuePolicy{3: {}}}, "a priority in queues is 3, allowed are 1 to 2"},
		{"queues below", Options{PriorityLevels: 2, DefaultPriority: 1, Queues: map[int]QueuePolicy{0: {}}}, "a priority in queues is 0, allowed are 1 to 2"},
		{"queues without priorities", Options{Queues: map[int]QueuePolicy{1: {}}}, "a priority in queues is 1, allowed are 1 to 0"},
		{"a queue of many", Options{PriorityLevels: 2, DefaultPriority: 1, Queues: map[int]QueuePolicy{2: {MaxSize: -1}}}, "queues[2].maxSize is -1"},
		{"a time-out of many", Options{PriorityLevels: 2, DefaultPriority: 1, Queues: map[int]QueuePolicy{2: {Timeout: -1}}}, "queues[2].timeout is -1ns"},
		{"two faults", Options{Instances: -1, Ageing: -1}, "instances is -1, allowed are 0 to 64\nageing is -1ns, allowed are 0 to 24h0m0s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.give.Check()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func ones(n int) []int {
	s := make([]int, n)
	for i := range s {
		s[i] = 1
	}
	return s
}

func TestPolicy(t *testing.T) {
	o := Options{
		PriorityLevels: 2, DefaultPriority: 1, Queue: QueuePolicy{Timeout: time.Second},
		Queues: map[int]QueuePolicy{2: {MaxSize: 5, Delay: true}},
	}
	for priority, want := range map[int]QueuePolicy{
		0: {MaxSize: DefaultQueueSize, Timeout: time.Second},
		1: {MaxSize: DefaultQueueSize, Timeout: time.Second},
		2: {MaxSize: 5, Delay: true},
	} {
		if got := o.Policy(priority); got != want {
			t.Errorf("priority %d: got %+v, want %+v", priority, got, want)
		}
	}
}

func TestRows(t *testing.T) {
	tests := []struct {
		batch int
		shape []int64
		want  int
	}{
		{8, []int64{3, 4}, 3},
		{8, []int64{0, 4}, 0},
		{8, []int64{}, 1},
		{8, nil, 1},
		{0, []int64{3, 4}, 1},
		{8, []int64{math.MaxInt32}, math.MaxInt32},
		{8, []int64{math.MaxInt64, 0}, math.MaxInt32},
	}
	for _, tt := range tests {
		if got := (&Options{MaxBatchSize: tt.batch}).Rows(tt.shape); got != tt.want {
			t.Errorf("batch size %d, shape %v: got %d rows, want %d", tt.batch, tt.shape, got, tt.want)
		}
	}
}

func TestJSON(t *testing.T) {
	tests := []struct {
		give Options
		want string
	}{
		{Options{}, `{}`},
		{
			Options{
				MaxBatchSize: 8, Strict: true, Instances: 2, DynamicBatching: true, PreferredBatchSizes: []int{4, 8},
				MaxQueueDelay: 1500 * time.Microsecond, PreserveOrdering: true, PriorityLevels: 2, DefaultPriority: 1, Ageing: 90 * time.Second,
				Queue:  QueuePolicy{MaxSize: 7, Timeout: 250 * time.Microsecond, AllowTimeoutOverride: true},
				Queues: map[int]QueuePolicy{2: {Delay: true, Timeout: time.Second}},
			},
			`{"maxBatchSize":8,"strict":true,"instances":2,"dynamicBatching":true,"preferredBatchSizes":[4,8],` +
				`"preserveOrdering":true,"priorityLevels":2,"defaultPriority":1,` +
				`"queue":{"maxSize":7,"allowTimeoutOverride":true,"timeout":"250us"},"queues":{"2":{"delay":true,"timeout":"1s"}},` +
				`"maxQueueDelay":"1.5ms","ageing":"1m30s"}`,
		},
	}
	for _, tt := range tests {
		got, err := json.Marshal(tt.give)
		if err != nil || string(got) != tt.want {
			t.Errorf("got %s, %v\nwant %s", got, err, tt.want)
		}
	}
}

func TestJSONRefused(t *testing.T) {
	tests := []struct{ give, want string }{
		{`{"maxQueueDelay": 5}`, "maxQueueDelay"},
		{`{"maxQueueDelay": "5"}`, `"5" is not a duration such as "5ms"`},
		{`{"ageing": "soon"}`, `"soon" is not a duration`},
		{`{"queue": {"timeout": "1 s"}}`, `"1 s" is not a duration`},
		{`{"queues": {"x": {}}}`, "x"},
		{`{"instances": "2"}`, "instances"},
	}
	for _, tt := range tests {
		var o Options
		if err := json.Unmarshal([]byte(tt.give), &o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want an error with %q", tt.give, err, tt.want)
		}
	}
}

func TestUnmarshalReplaces(t *testing.T) {
	o := Automatic(true)
	o.Ageing = time.Minute
	if err := json.Unmarshal([]byte(`{"instances": 3}`), &o); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Options{Instances: 3}, o); diff != "" {
		t.Error(diff)
	}
}

func TestJSONRoundTrip(t *testing.T) {
	duration := rapid.Custom(func(t *rapid.T) time.Duration {
		return time.Duration(rapid.Int64Range(0, int64(MaxDuration)).Draw(t, "duration"))
	})
	policy := rapid.Custom(func(t *rapid.T) QueuePolicy {
		return QueuePolicy{
			MaxSize: rapid.IntRange(0, MaxQueueSize).Draw(t, "size"), Timeout: duration.Draw(t, "timeout"),
			AllowTimeoutOverride: rapid.Bool().Draw(t, "override"), Delay: rapid.Bool().Draw(t, "delay"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		levels := rapid.IntRange(0, MaxPriorityLevels).Draw(t, "levels")
		o := Options{
			MaxBatchSize: rapid.IntRange(1, MaxBatchSize).Draw(t, "batch"), Strict: rapid.Bool().Draw(t, "strict"),
			Instances: rapid.IntRange(0, MaxInstances).Draw(t, "instances"), DynamicBatching: rapid.Bool().Draw(t, "dynamic"),
			MaxQueueDelay: duration.Draw(t, "delay"), PreserveOrdering: rapid.Bool().Draw(t, "order"), PriorityLevels: levels,
			DefaultPriority: rapid.IntRange(min(1, levels), levels).Draw(t, "default"), Ageing: duration.Draw(t, "ageing"), Queue: policy.Draw(t, "queue"),
		}
		for range rapid.IntRange(0, 3).Draw(t, "preferred") {
			o.PreferredBatchSizes = append(o.PreferredBatchSizes, rapid.IntRange(1, o.MaxBatchSize).Draw(t, "size"))
		}
		if levels > 0 && rapid.Bool().Draw(t, "queues") {
			o.Queues = rapid.MapOfN(rapid.IntRange(1, levels), policy, 1, min(levels, 4)).Draw(t, "queues")
		}
		if err := o.Check(); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var got Options
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(o, got); diff != "" {
			t.Fatalf("%s\n%s", b, diff)
		}
	})
}

func TestBatch(t *testing.T) {
	for _, tt := range []struct {
		tensors [][]string
		want    bool
	}{
		{[][]string{{"batch", ""}, {"batch"}}, true},
		{[][]string{{"N", "h", "w"}, {"N", "classes"}}, true},
		{[][]string{{"Batch_size"}, {"Batch_size"}}, true},
		{[][]string{{"bs", ""}}, true},
		{[][]string{{"b"}}, true},
		{[][]string{{"BSZ"}}, true},
		{[][]string{{"batch"}, {"Batch"}}, false},
		{[][]string{{"batch"}, {"n"}}, false},
		{[][]string{{"batch"}, {""}}, false},
		{[][]string{{"batch"}, {}}, false},
		{[][]string{{}, {}}, false},
		{[][]string{{""}, {""}}, false},
		{[][]string{{"seq"}, {"seq"}}, false},
		{[][]string{{"nodes"}, {"nodes"}}, false},
		{[][]string{{"unk__0"}, {"unk__0"}}, false},
		{[][]string{{"n", "n"}, {"n"}}, false},
		{[][]string{{"n"}, {"n", "c", "n"}}, false},
	} {
		if got := Batch(tt.tensors); got != tt.want {
			t.Errorf("%q: %t", tt.tensors, got)
		}
	}
}
