package fleet

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// gateLimits are what the limit of a gate may be, in the order in which gates
// are written.
var gateLimits = []struct {
	kind        GateKind
	least, most float64
}{
	{ErrorRate, 0.0001, 1}, {P99, 1, 100}, {Energy, 1, 100}, {Confidence, 0.01, 10},
}

// strategy reads spec.rollout; nil: it is not there.
func (r *reader) strategy(n node, path string) Strategy {
	s := Strategy{OnFailure: RollBack, Deadline: DefaultDeadline}
	if n == nil {
		return s
	}
	fields := r.mapping(n, path, "waves", "soak", "minSample", "gates", "onFailure", "maxFailed", "deadline", "awayAfter")
	if n, ok := fields[path+".waves"]; ok {
		s.Waves = r.waves(n, path+".waves")
	}
	if n, ok := fields[path+".soak"]; ok {
		s.Soak = r.duration(n, path+".soak", 0, MaxDuration)
	}
	if n, ok := fields[path+".gates"]; ok {
		s.Gates = r.gates(n, path+".gates")
	}
	s.MinSample, s.AwayAfter = s.defaults()
	if n, ok := fields[path+".minSample"]; ok {
		s.MinSample = uint64(r.integer(n, path+".minSample", 0, MaxSample))
	}
	if n, ok := fields[path+".onFailure"]; ok {
		switch v, ok := r.scalar(n, path+".onFailure"); {
		case ok && v != string(RollBack) && v != string(Halt):
			r.fault(path+".onFailure", "is %q, it must be %s or %s", clip(v), RollBack, Halt)
		case ok:
			s.OnFailure = OnFailure(v)
		}
	}
	if n, ok := fields[path+".maxFailed"]; ok {
		s.MaxFailed = int(r.integer(n, path+".maxFailed", 0, MaxFailedLimit))
	}
	if n, ok := fields[path+".deadline"]; ok {
		s.Deadline = r.duration(n, path+".deadline", MinDeadline, MaxDeadline)
	}
	if n, ok := fields[path+".awayAfter"]; ok {
		s.AwayAfter = r.duration(n, path+".awayAfter", 0, MaxDuration)
	}
	return s
}

// defaults gives what the sample and the time are where the document says
// nothing: without gates there is no sample, and without waves a device that is
// away holds nothing up.
func (s Strategy) defaults() (minSample uint64, awayAfter time.Duration) {
	if len(s.Gates) > 0 {
		minSample = DefaultMinSample
	}
	if len(s.Waves) > 0 {
		awayAfter = DefaultAwayAfter
	}
	return minSample, awayAfter
}

func (r *reader) waves(n node, path string) []Wave {
	items, ok := r.sequence(n, path)
	if !ok {
		return nil
	}
	if len(items) == 0 || len(items) > MaxWaves {
		r.fault(path, "has %d entries, allowed are 1 to %d", len(items), MaxWaves)
		return nil
	}
	var waves []Wave
	last := map[string]float64{}
	for i, item := range items {
		at := fmt.Sprintf("%s[%d]", path, i)
		fields := r.mapping(item, at, "canary", "count", "percent")
		if fields == nil {
			continue
		}
		if len(fields) != 1 {
			r.note(item, at)
			r.fault(at, "has %d of canary, count and percent, it must have one", len(fields))
			continue
		}
		var w Wave
		var kind string
		var size float64
		if n, ok := fields[at+".canary"]; ok {
			w.Canary = int(r.integer(n, at+".canary", 1, MaxDevices))
			kind, size = "canary", float64(w.Canary)
			if i > 0 && waves != nil && waves[len(waves)-1].Canary == 0 {
				r.fault(at+".canary", "comes after a wave of another kind, canaries are the first waves")
			}
		}
		if n, ok := fields[at+".count"]; ok {
			w.Count = int(r.integer(n, at+".count", 1, MaxDevices))
			kind, size = "count", float64(w.Count)
		}
		if n, ok := fields[at+".percent"]; ok {
			w.Percent = r.number(n, at+".percent", 0.01, 100)
			kind, size = "percent", w.Percent
		}
		if size > 0 && size <= last[kind] {
			r.fault(at+"."+kind, "is %v, the wave before has %v: each wave includes those before and must be larger", size, last[kind])
		}
		if last["percent"] == 100 {
			r.fault(at, "comes after a wave of all devices")
		}
		last[kind] = size
		waves = append(waves, w)
	}
	return waves
}

func (r *reader) gates(n node, path string) []Gate {
	var known []string
	for _, g := range gateLimits {
		known = append(known, string(g.kind))
	}
	fields := r.mapping(n, path, known...)
	var gates []Gate
	for _, g := range gateLimits {
		at := path + "." + string(g.kind)
		if n, ok := fields[at]; ok {
			gates = append(gates, Gate{g.kind, r.number(n, at, g.least, g.most)})
		}
	}
	return gates
}

func (r *reader) delivery(n node, path string) *dunlinv1.Delivery {
	fields := r.mapping(n, path, "priority", "maxBytes", "windows", "metered")
	d := &dunlinv1.Delivery{}
	if n, ok := fields[path+".priority"]; ok {
		d.Priority = uint32(r.integer(n, path+".priority", 0, MaxPriority))
	}
	if n, ok := fields[path+".maxBytes"]; ok {
		d.MaxBytes = uint64(r.integer(n, path+".maxBytes", 0, MaxDeliveryBytes))
	}
	if n, ok := fields[path+".windows"]; ok {
		d.Windows = r.windows(n, path+".windows")
	}
	if n, ok := fields[path+".metered"]; ok {
		d.Metered = r.boolean(n, path+".metered")
	}
	if d.Priority == 0 && d.MaxBytes == 0 && len(d.Windows) == 0 && !d.Metered {
		return nil // as the profile has it
	}
	return d
}

func (r *reader) windows(n node, path string) []*dunlinv1.TimeWindow {
	items, ok := r.sequence(n, path)
	if !ok {
		return nil
	}
	if len(items) == 0 || len(items) > MaxWindows {
		r.fault(path, "has %d entries, allowed are 1 to %d", len(items), MaxWindows)
		return nil
	}
	var windows []*dunlinv1.TimeWindow
	for i, item := range items {
		at := fmt.Sprintf("%s[%d]", path, i)
		text, ok := r.scalar(item, at)
		if !ok {
			continue
		}
		w, err := ParseWindow(text)
		if err != nil {
			r.fault(at, "%v", err)
			continue
		}
		windows = append(windows, w)
	}
	return windows
}

func (r *reader) freeze(spec node) *Freeze {
	f := &Freeze{}
	fields := r.mapping(spec, "spec", "selector", "reason", "until")
	f.Selector = r.selector(fields)
	if v, ok := r.text(fields, "spec.reason"); ok {
		switch n := utf8.RuneCountInString(v); {
		case n == 0 || n > MaxFreezeReason:
			r.fault("spec.reason", "has %d characters, allowed are 1 to %d", n, MaxFreezeReason)
		case !printable(v):
			r.fault("spec.reason", "%q has characters that are not printable", clip(v))
		}
		f.Reason = v
	}
	if n, ok := fields["spec.until"]; ok {
		if v, ok := r.scalar(n, "spec.until"); ok {
			t, err := time.Parse(time.RFC3339, v)
			if err != nil || t.IsZero() || t.Year() < 1970 || t.Year() > 9999 || t.UTC().Year() > 9999 {
				r.fault("spec.until", "is %q, it must be a time like 2026-12-24T18:00:00Z", clip(v))
			}
			f.Until = t.UTC().Truncate(time.Second)
		}
	}
	return f
}

// printable says whether a text has only graphic characters and spaces.
func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(c rune) bool {
		return c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 || c == utf8.RuneError || c == 0xfeff || c == 0x2028 || c == 0x2029
	}) < 0
}

func (r *reader) maintenance(spec node) *Maintenance {
	m := &Maintenance{}
	fields := r.mapping(spec, "spec", "selector", "windows", "timezone")
	m.Selector = r.selector(fields)
	if n, ok := r.required(fields, "spec.windows"); ok {
		m.Windows = r.windows(n, "spec.windows")
	}
	if v, ok := r.text(fields, "spec.timezone"); ok {
		if _, err := time.LoadLocation(v); err != nil || v == "" || v == "Local" {
			r.fault("spec.timezone", "%q is not known, it must be an IANA name like Europe/Berlin or UTC", clip(v))
		}
		m.TimeZone = v
	}
	return m
}

func (r *reader) number(n node, path string, least, most float64) float64 {
	var v float64
	switch x := n.(type) {
	case *ast.FloatNode:
		v = x.Value
	case *ast.IntegerNode:
		switch i := x.Value.(type) {
		case int64:
			v = float64(i)
		case uint64:
			v = float64(i)
		}
	default:
		r.fault(path, "is %s, it must be a number of %v to %v", describe(n), least, most)
		return 0
	}
	if !(v >= least && v <= most) {
		r.fault(path, "is %v, allowed are %v to %v", v, least, most)
		return 0
	}
	return v
}

func (r *reader) boolean(n node, path string) bool {
	b, ok := n.(*ast.BoolNode)
	if !ok {
		r.fault(path, "is %s, it must be true or false", describe(n))
		return false
	}
	return b.Value
}

// strategyYAML leaves out what is as it would be by default.
func strategyYAML(s Strategy) yamlRollout {
	y := yamlRollout{MaxFailed: s.MaxFailed, Deadline: shortDuration(s.Deadline)}
	for _, w := range s.Waves {
		item := yaml.MapItem{Key: "canary", Value: w.Canary}
		if w.Count > 0 {
			item = yaml.MapItem{Key: "count", Value: w.Count}
		}
		if w.Percent > 0 {
			item = yaml.MapItem{Key: "percent", Value: yamlNumber(w.Percent)}
		}
		y.Waves = append(y.Waves, yaml.MapSlice{item})
	}
	for _, g := range gateLimits {
		if i := slices.IndexFunc(s.Gates, func(have Gate) bool { return have.Kind == g.kind }); i >= 0 {
			y.Gates = append(y.Gates, yaml.MapItem{Key: string(g.kind), Value: yamlNumber(s.Gates[i].Limit)})
		}
	}
	if s.Soak > 0 {
		y.Soak = shortDuration(s.Soak)
	}
	sample, away := s.defaults()
	if s.MinSample != sample {
		y.MinSample = &s.MinSample
	}
	if s.AwayAfter != away {
		y.AwayAfter = shortDuration(s.AwayAfter)
	}
	if s.OnFailure == Halt {
		y.OnFailure = Halt
	}
	return y
}

// yamlNumber writes 10 for 10.0.
func yamlNumber(f float64) any {
	if f == math.Trunc(f) {
		return int64(f)
	}
	return f
}

func deliveryYAML(d *dunlinv1.Delivery) *yamlDelivery {
	if d == nil {
		return nil
	}
	return &yamlDelivery{d.Priority, d.MaxBytes, windowsYAML(d.Windows), d.Metered}
}

func windowsYAML(windows []*dunlinv1.TimeWindow) []string {
	var all []string
	for _, w := range windows {
		all = append(all, FormatWindow(w))
	}
	return all
}
