package sim

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/dunlin/dunlin/models"
)

// Event is something that befalls a device, or one version on it.
type Event struct {
	At      time.Duration // since its start
	Fault   string        // a key of a script's entries
	Value   float64       // for a fault that has words, the index of one
	Version string        // "digits:3", for a fault that versions can have; "": the whole device
}

// Limits of a script.
const (
	// MaxScript bounds its bytes.
	MaxScript  = 64 << 10
	maxTokens  = 16 << 10
	maxNesting = 4
	maxFaults  = 20 // that are reported
	maxAt      = 10 * 365 * 24 * time.Hour
)

// fault is something that a script can do.
type fault struct {
	least, most float64
	whole       bool     // no fractions
	words       []string // instead of numbers
	apply       func(*core, float64)
	of          func(*quality, float64) // in place of apply: one that a version can have
}

const hour = 3600

// known are the faults by the keys that they have in a script.
var known = map[string]fault{
	"ambient_celsius":           {least: -60, most: 150, apply: func(c *core, v float64) { c.faults.ambient = v }},
	"nvml":                      {words: []string{"back", "lost"}, apply: func(c *core, v float64) { c.faults.lost = v == 1 }},
	"power_cap_watts":           {most: 1e5, apply: func(c *core, v float64) { c.faults.cap = v }},
	"slow_factor":               {least: 1, most: 1e6, of: func(q *quality, v float64) { q.slow = v }},
	"failing_fraction":          {most: 1, of: func(q *quality, v float64) { q.failing = v }},
	"crashing_fraction":         {most: 1, of: func(q *quality, v float64) { q.crashing = v }},
	"energy_factor":             {least: 0.01, most: 100, of: func(q *quality, v float64) { q.energy = v }},
	"confidence":                {most: 1, of: func(q *quality, v float64) { q.confidence = v }},
	"load":                      {words: []string{"works", "fails"}, of: func(q *quality, v float64) { q.unloadable = v == 1 }},
	"ecc_corrected_per_hour":    {most: 1e12, apply: func(c *core, v float64) { c.faults.correctedRate = v / hour }},
	"ecc_uncorrected_per_hour":  {most: 1e12, apply: func(c *core, v float64) { c.faults.uncorrectedRate = v / hour }},
	"remapped_rows":             {most: 1e6, whole: true, apply: func(c *core, v float64) { c.faults.remapped += v }},
	"remapped_rows_uncorrected": {most: 1e6, whole: true, apply: func(c *core, v float64) { c.faults.remappedUncorrected += v }},
	"remap":                     {words: []string{"done", "pending", "failed"}, apply: func(c *core, v float64) { c.faults.pending, c.faults.failed = v == 1, v == 2 }},
	"xid":                       {least: 1, most: 1e3, whole: true, apply: func(c *core, v float64) { c.faults.xids++; c.faults.lastXID = v }},
	"disk_bytes_per_hour":       {least: -1e15, most: 1e15, apply: func(c *core, v float64) { c.faults.fillRate = v / hour }},
	"leak_bytes_per_hour":       {least: -1e15, most: 1e15, apply: func(c *core, v float64) { c.faults.leakRate = v / hour }},
	"agent_release":             {words: []string{"good", "bad"}, apply: func(c *core, v float64) { c.faults.badRelease = v == 1 }},
	"worker":                    {words: []string{"crash"}, apply: func(c *core, _ float64) { c.crash() }},
}

func (e Event) check() error {
	f, ok := known[e.Fault]
	if !ok {
		return fmt.Errorf("fault %q: known are %s", clip(e.Fault), strings.Join(slices.Sorted(maps.Keys(known)), ", "))
	}
	if e.At < 0 || e.At > maxAt {
		return fmt.Errorf("at: is %v, allowed are 0s to %v", e.At, maxAt)
	}
	if e.Version != "" {
		if f.of == nil {
			return fmt.Errorf("%s: befalls the whole device, not version %s", e.Fault, clip(e.Version))
		}
		if err := checkVersion(e.Version); err != nil {
			return err
		}
	}
	return f.check(e.Fault, e.Value)
}

// checkVersion says what is wrong with the name of a version.
func checkVersion(s string) error {
	model, number, _ := strings.Cut(s, ":")
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 1 || models.CheckName(model) != nil || number != strconv.FormatInt(n, 10) {
		return fmt.Errorf("version: is %q, it must be like digits:3", clip(s))
	}
	return nil
}

func (f fault) check(name string, v float64) error {
	least, most := f.least, f.most
	if f.words != nil {
		least, most = 0, float64(len(f.words)-1)
	}
	if !(v >= least && v <= most) {
		return fmt.Errorf("%s: is %v, allowed are %v to %v", name, v, least, most)
	}
	if (f.whole || f.words != nil) && v != math.Trunc(v) {
		return fmt.Errorf("%s: is %v, it must be whole", name, v)
	}
	return nil
}

// ParseScript reads a script: a sequence of mappings, each with the time "at"
// and one fault or more, and "version" where they are a version's only. All errors are reported, up to a limit, each as
// "name:line:column: ..."; name is that of the file.
func ParseScript(name string, b []byte) ([]Event, error) {
	r := &reader{name: name}
	root, ok := r.parse(b)
	if !ok {
		return nil, errors.Join(r.errs...)
	}
	var events []Event
	entries, ok := root.(*ast.SequenceNode)
	if !ok {
		r.fault(root, "it must be a sequence of faults")
	} else {
		for _, n := range entries.Values {
			events = append(events, r.entry(n)...)
		}
	}
	if r.errs != nil {
		return nil, errors.Join(r.errs...)
	}
	return events, nil
}

// reader collects what is wrong with a script.
type reader struct {
	name string
	errs []error
}

func (r *reader) fault(n ast.Node, format string, args ...any) {
	var t *token.Token
	if n != nil {
		t = n.GetToken()
		if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
			t = m.Values[0].Key.GetToken()
		} else if m, ok := n.(*ast.MappingValueNode); ok {
			t = m.Key.GetToken()
		}
	}
	r.add(t, fmt.Sprintf(format, args...))
}

func (r *reader) add(t *token.Token, problem string) {
	line, column := 1, 1
	if t != nil && t.Position != nil {
		line, column = t.Position.Line, t.Position.Column
	}
	switch {
	case len(r.errs) < maxFaults:
		r.errs = append(r.errs, fmt.Errorf("%s:%d:%d: %s", r.name, line, column, problem))
	case len(r.errs) == maxFaults:
		r.errs = append(r.errs, fmt.Errorf("%s: and more: only the first %d are shown", r.name, maxFaults))
	}
}

// parse gives the script's one value.
func (r *reader) parse(b []byte) (ast.Node, bool) {
	if len(b) > MaxScript {
		r.add(nil, fmt.Sprintf("it has %d bytes, the limit is %d", len(b), MaxScript))
		return nil, false
	}
	tokens := lexer.Tokenize(string(b))
	if len(tokens) > maxTokens {
		r.add(nil, fmt.Sprintf("it has %d tokens, the limit is %d", len(tokens), maxTokens))
		return nil, false
	}
	if t, problem := checkTokens(tokens); problem != "" {
		r.add(t, problem)
		return nil, false
	}
	file, err := parser.ParseBytes(b, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		if e, ok := errors.AsType[yaml.Error](err); ok {
			r.add(e.GetToken(), e.GetMessage())
		} else {
			r.add(nil, err.Error())
		}
		return nil, false
	}
	docs := slices.DeleteFunc(slices.Clone(file.Docs), func(d *ast.DocumentNode) bool { return d == nil || d.Body == nil })
	if len(docs) != 1 {
		r.add(nil, fmt.Sprintf("it holds %d values, it must hold one sequence", len(docs)))
		return nil, false
	}
	return docs[0].Body, true
}

// checkTokens refuses what scripts do not need, and what would have the parser
// recurse without bound.
func checkTokens(tokens token.Tokens) (*token.Token, string) {
	depth, line, begun := 0, 0, 0
	for _, t := range tokens {
		if t.Position != nil && t.Position.Line != line {
			line, begun = t.Position.Line, 0
		}
		switch t.Type {
		case token.AnchorType, token.AliasType, token.TagType, token.MergeKeyType, token.DirectiveType, token.MappingKeyType:
			return t, fmt.Sprintf("%q: anchors, aliases, tags, merge keys, directives and complex keys are not allowed", clip(t.Value))
		case token.InvalidType:
			return t, cmp.Or(t.Error, fmt.Sprintf("%q is not YAML", clip(t.Value)))
		case token.MappingStartType, token.SequenceStartType:
			depth++
		case token.MappingEndType, token.SequenceEndType:
			depth--
		case token.SequenceEntryType, token.MappingValueType:
			if depth <= 0 {
				begun++
			}
		}
		if depth > maxNesting || begun > maxNesting {
			return t, fmt.Sprintf("collections nest deeper than %d", maxNesting)
		}
	}
	return nil, ""
}

// entry reads one mapping of the sequence.
func (r *reader) entry(n ast.Node) (events []Event) {
	var pairs []*ast.MappingValueNode
	switch m := n.(type) {
	case *ast.MappingNode:
		pairs = m.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{m}
	default:
		r.fault(n, "each entry must be a mapping of at and one fault or more")
		return nil
	}
	at, timed, version := time.Duration(0), false, ""
	seen := map[string]bool{}
	for _, p := range pairs {
		key := p.Key.GetToken().Value
		f, ok := known[key]
		switch {
		case seen[key]:
			r.fault(p.Key, "%s: is there twice", clip(key))
		case key == "at":
			at, timed = r.duration(p.Value), true
		case key == "version":
			if version = text(p.Value); checkVersion(version) != nil {
				r.fault(p.Value, "%v", checkVersion(version))
			}
		case !ok:
			r.fault(p.Key, "%s: is not known, known are at, version, %s", clip(key), strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		default:
			if v, ok := r.value(p.Value, key, f); ok {
				events = append(events, Event{Fault: key, Value: v})
			}
		}
		seen[key] = true
	}
	if !timed {
		r.fault(n, "at: is missing, it is the time since the start, like 10m")
	}
	for key := range seen {
		if f, ok := known[key]; ok && version != "" && f.of == nil {
			r.fault(n, "%s: befalls the whole device, not version %s", key, clip(version))
		}
	}
	if len(events) == 0 && timed && !slices.ContainsFunc(pairs, func(p *ast.MappingValueNode) bool { k := p.Key.GetToken().Value; return k != "at" && k != "version" }) {
		r.fault(n, "no fault is named, known are %s", strings.Join(slices.Sorted(maps.Keys(known)), ", "))
	}
	for i := range events {
		events[i].At, events[i].Version = at, version
	}
	return events
}

func (r *reader) duration(n ast.Node) time.Duration {
	d, err := time.ParseDuration(text(n))
	if err != nil || d < 0 || d > maxAt {
		r.fault(n, "at: is %q, it must be a duration like 90s or 1h30m, from 0s to %v", clip(text(n)), maxAt)
		return 0
	}
	return d
}

func (r *reader) value(n ast.Node, name string, f fault) (float64, bool) {
	if f.words != nil {
		i := slices.Index(f.words, text(n))
		if i < 0 {
			r.fault(n, "%s: is %q, it must be %s", name, clip(text(n)), strings.Join(f.words, " or "))
		}
		return float64(i), i >= 0
	}
	v, err := strconv.ParseFloat(text(n), 64)
	if err != nil {
		r.fault(n, "%s: is %q, it must be a number of %v to %v", name, clip(text(n)), f.least, f.most)
		return 0, false
	}
	if err := f.check(name, v); err != nil {
		r.fault(n, "%v", err)
		return 0, false
	}
	return v, true
}

// text is what a scalar says; "" for anything else.
func text(n ast.Node) string {
	switch n.(type) {
	case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode:
		return n.GetToken().Value
	}
	return ""
}

func clip(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// ReadScript is ParseScript for a file.
func ReadScript(path string) ([]Event, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxScript+1))
	if err != nil {
		return nil, err
	}
	return ParseScript(path, b)
}
