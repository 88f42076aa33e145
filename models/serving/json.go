package serving

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// duration is a time.Duration that is text in JSON.
type duration time.Duration

func (d duration) MarshalText() ([]byte, error) {
	return []byte(strings.Replace(time.Duration(d).String(), "µs", "us", 1)), nil
}

func (d *duration) UnmarshalText(b []byte) error {
	parsed, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as \"5ms\" or \"1m30s\"", b)
	}
	*d = duration(parsed)
	return nil
}

type (
	plainOptions Options
	plainPolicy  QueuePolicy

	// The durations hide those of the plain type.
	jsonOptions struct {
		plainOptions
		MaxQueueDelay duration `json:"maxQueueDelay,omitempty"`
		Ageing        duration `json:"ageing,omitempty"`
	}
	jsonPolicy struct {
		plainPolicy
		Timeout duration `json:"timeout,omitempty"`
	}
)

// MarshalJSON gives equal options the same bytes.
func (o Options) MarshalJSON() ([]byte, error) {
	return json.Marshal(jsonOptions{plainOptions(o), duration(o.MaxQueueDelay), duration(o.Ageing)})
}

// UnmarshalJSON replaces all of the options. It does not check them.
func (o *Options) UnmarshalJSON(b []byte) error {
	var j jsonOptions
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	*o = Options(j.plainOptions)
	o.MaxQueueDelay, o.Ageing = time.Duration(j.MaxQueueDelay), time.Duration(j.Ageing)
	return nil
}

// MarshalJSON gives equal policies the same bytes.
func (p QueuePolicy) MarshalJSON() ([]byte, error) {
	return json.Marshal(jsonPolicy{plainPolicy(p), duration(p.Timeout)})
}

// UnmarshalJSON replaces all of the policy. It does not check it.
func (p *QueuePolicy) UnmarshalJSON(b []byte) error {
	var j jsonPolicy
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	*p = QueuePolicy(j.plainPolicy)
	p.Timeout = time.Duration(j.Timeout)
	return nil
}
