package policy

import (
	"iter"
	"slices"

	"github.com/dunlin/dunlin/models/tensor"
)

// Values are what a request carries under names, each of which has one value.
type Values interface {
	// Get gives the value of a name. It tells headers by any case of letters.
	Get(name string) (string, bool)
	// All gives every name and value; names of headers in lower case.
	All() iter.Seq2[string, string]
}

// Figures are what is known of a device at a moment.
type Figures struct {
	QueueDepth    Figure // requests that wait
	PredictedWait Figure // milliseconds until a request that comes now would start
	Temperature   Figure // degrees Celsius, of the hottest sensor
	OnBattery     Figure // 1 where it is, 0 where not
}

// Figure is a number that may not be known.
type Figure struct {
	Value float64
	Known bool
}

// Request is what rules look at. Nobody changes it while it is decided.
type Request struct {
	Parameters, Headers Values // nil: there are none
	Inputs              []tensor.Tensor
	Labels              map[string]string // of the device
	// Live is asked once at most for one decision; nil: nothing is known.
	Live func() Figures
}

// match holds where all of it does.
type match struct {
	values []condition
	labels []labelled
	inputs []input
	cel    *expression // nil: there is none
}

// condition holds where what is at a slot is one of the values.
type condition struct {
	slot   int
	values []string
}

type labelled struct {
	name   string
	values []string
}

type input struct {
	name        string
	least, most int64
}

// sight is what was seen so far of one request: values are fetched when a rule
// needs them, and once.
type sight struct {
	policy  *Policy
	request Request
	state   [MaxNames]uint8
	values  [MaxNames]string
	cel     *activation
	seen    *Explanation // nil: nobody asks why
}

const (
	unseen = iota
	absent
	present
)

// value gives what is at a slot.
func (s *sight) value(slot int) (string, bool) {
	if s.state[slot] == unseen {
		s.state[slot] = absent
		from, name := s.request.Parameters, ""
		if n := len(s.policy.parameters); slot < n {
			name = s.policy.parameters[slot]
		} else {
			from, name = s.request.Headers, s.policy.headers[slot-n]
		}
		if from != nil {
			if v, ok := from.Get(name); ok {
				s.state[slot], s.values[slot] = present, v
			}
		}
	}
	return s.values[slot], s.state[slot] == present
}

// matches looks first at what costs least.
func (s *sight) matches(m *match) (matches, faulted bool) {
	for i := range m.values {
		c := &m.values[i]
		v, ok := s.value(c.slot)
		holds := ok && slices.Contains(c.values, v)
		s.compared(c, v, ok, holds)
		if !holds {
			return false, false
		}
	}
	for i := range m.labels {
		l := &m.labels[i]
		v, ok := s.request.Labels[l.name]
		holds := ok && slices.Contains(l.values, v)
		s.labelled(l, v, ok, holds)
		if !holds {
			return false, false
		}
	}
	for i := range m.inputs {
		in := &m.inputs[i]
		rows, ok := in.rows(s.request.Inputs)
		holds := ok && rows >= in.least && (in.most == 0 || rows <= in.most)
		s.counted(in, rows, ok, holds)
		if !holds {
			return false, false
		}
	}
	if m.cel == nil {
		return true, false
	}
	if s.cel == nil {
		s.cel = &activation{request: s.request}
	}
	matches, err := m.cel.matches(s.cel)
	s.evaluated(m.cel, matches, err)
	return matches, err != nil
}

// rows gives how many rows the input has where it is there; one without
// dimensions has one row.
func (in *input) rows(inputs []tensor.Tensor) (rows int64, there bool) {
	for i := range inputs {
		if inputs[i].Name != in.name {
			continue
		}
		if len(inputs[i].Shape) > 0 {
			return inputs[i].Shape[0], true
		}
		return 1, true
	}
	return 0, false
}
