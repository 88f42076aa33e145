package profiles

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

const (
	maxTokens  = 1 << 14
	maxNesting = 16 // collections within each other; the parser recurses
	maxText    = 1024
	maxList    = 64
	maxOptions = 64
)

type position struct{ line, column int }

// bound is what a number may be.
type bound struct {
	least, most float64
	orZero      bool // 0 too
	unit        string
}

func (b bound) String() string {
	s := fmt.Sprintf("allowed are %s to %s", plain(b.least), plain(b.most))
	if b.orZero {
		s = fmt.Sprintf("allowed are 0 and %s to %s", plain(b.least), plain(b.most))
	}
	return strings.TrimSpace(s + " " + b.unit)
}

func plain(f float64) string {
	if f == math.Trunc(f) && math.Abs(f) < 1<<53 {
		return fmt.Sprintf("%.0f", f)
	}
	return fmt.Sprint(f)
}

// Amounts of memory are whole bytes, and at least a MiB: a profile that says 8
// means something else.
var (
	memoryBytes = bound{1 << 20, 1 << 44, true, "bytes"}
	fraction    = bound{0, 1, false, ""}
	celsius     = bound{20, 150, true, "degrees Celsius"}
	watts       = bound{0, 20000, false, "watts"}
)

// bounds of numbers, by field.
var bounds = map[string]bound{
	"threads":                        {0, 1024, false, "threads"},
	"memory.host_fraction":           {0.01, 1, false, ""},
	"memory.host_bytes":              memoryBytes,
	"memory.device_fraction":         fraction,
	"memory.device_bytes":            memoryBytes,
	"memory.pinned_bytes":            memoryBytes,
	"storage.reserve_bytes":          memoryBytes,
	"storage.outbox_events":          {1, 1e6, false, "events"},
	"power.idle_watts":               watts,
	"power.limit_watts":              watts,
	"thermal.warn_celsius":           celsius,
	"thermal.slowdown_celsius":       celsius,
	"thermal.shutdown_celsius":       celsius,
	"link.bytes_per_day":             memoryBytes,
	"link.bytes_per_month":           memoryBytes,
	"link.bytes_per_second":          {1 << 10, 1 << 40, true, "bytes a second"},
	"limits.max_opset":               {7, 1000, true, ""},
	"hardware.cores":                 {0, 4096, false, "cores"},
	"hardware.host_bytes":            memoryBytes,
	"hardware.device_bytes":          memoryBytes,
	"hardware.fp32_gflops":           {0.1, 1e7, true, "GFLOPS"},
	"hardware.memory_gb_per_second":  {0.1, 1e5, true, "GB/s"},
	"hardware.link_gb_per_second":    {0.01, 1e4, true, "GB/s"},
	"hardware.storage_mb_per_second": {1, 1e6, true, "MB/s"},
	"hardware.overhead_micros":       {0, 1e6, false, "microseconds"},
}

// form is what a text has to look like.
type form struct {
	pattern *regexp.Regexp
	is      string
}

// forms of texts, by field; those of a list are "LIST[]".
var forms = map[string]form{
	"name":                     {regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`), "a name of a-z and 0-9 with single - between them"},
	"affinity":                 {regexp.MustCompile(`^(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?$`), "numbers of processors, as 0-3,6"},
	"providers[].name":         {regexp.MustCompile(`^[A-Za-z0-9]+ExecutionProvider$`), "the name of an execution provider, as CPUExecutionProvider"},
	"match.compute_capability": {versionForm, "a version pattern, as 8.9 or >=8.0"},
	"match.driver":             {versionForm, "a version pattern, as 550 or >=525.60"},
	"match.runtime":            {versionForm, "a version pattern, as >=1.24"},
	"link.windows[]":           {regexp.MustCompile(`^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$`), "times of day, as 01:00-05:30"},
}

var versionForm = regexp.MustCompile(`^ *(>=|>|<=|<|=)? *\d{1,9}(\.\d{1,9}){0,7} *(, *(>=|>|<=|<|=)? *\d{1,9}(\.\d{1,9}){0,7} *)*$`)

// Precisions are the element types that Limits.Precisions may name.
var Precisions = []string{"FP64", "FP32", "FP16", "BF16", "INT8", "UINT8"}

// choices of texts, by field.
var choices = map[string][]string{
	"match.arch":          {"386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x"},
	"telemetry[]":         {"nvml", "jetson", "hwmon", "thermal", "rapl"},
	"limits.precisions[]": Precisions,
}

// required are the fields that a profile cannot do without.
var required = []string{"name", "description", "match", "providers", "memory", "memory.host_fraction", "storage", "storage.outbox_events", "providers[].name"}

// parse reads the profile, and gives what is wrong with it.
func (f *file) parse(text string) Faults {
	r := &reader{file: f.name, at: map[string]position{}}
	if value, ok := r.parse(text); ok {
		r.value(value, reflect.ValueOf(&f.profile).Elem(), "", "")
	}
	f.at = r.at
	if len(r.faults) == 0 { // what does not say its part has been reported
		r.check(&f.profile)
	}
	return r.faults
}

func (f *file) fault(field, format string, args ...any) Fault {
	at := f.at[field]
	return Fault{File: f.name, Line: at.line, Column: at.column, Field: field, Problem: fmt.Sprintf(format, args...)}
}

// reader walks the syntax tree of a file and collects its faults.
type reader struct {
	file   string
	faults Faults
	at     map[string]position // of fields, by path
}

func (r *reader) add(at position, field, format string, args ...any) {
	if len(r.faults) <= maxFaults {
		r.faults = append(r.faults, Fault{r.file, at.line, at.column, field, fmt.Sprintf(format, args...)})
	}
}

func (r *reader) fault(field, format string, args ...any) {
	r.add(r.at[field], field, format, args...)
}

func positionOf(t *token.Token) position {
	if t == nil || t.Position == nil {
		return position{1, 1}
	}
	return position{t.Position.Line, t.Position.Column}
}

// parse gives the one value of the file.
func (r *reader) parse(text string) (ast.Node, bool) {
	start := position{1, 1}
	if !utf8.ValidString(text) {
		r.add(start, "", "is not UTF-8")
		return nil, false
	}
	tokens := lexer.Tokenize(text)
	if len(tokens) > maxTokens {
		r.add(start, "", "has %d tokens, allowed are %d", len(tokens), maxTokens)
		return nil, false
	}
	if t, problem := refused(tokens); problem != "" {
		r.add(positionOf(t), "", "%s", problem)
		return nil, false
	}
	tree, err := parser.ParseBytes([]byte(text), 0, parser.AllowDuplicateMapKey())
	if err != nil {
		at, problem := start, err.Error()
		if e, ok := errors.AsType[yaml.Error](err); ok {
			at, problem = positionOf(e.GetToken()), e.GetMessage()
		}
		r.add(at, "", "%s", problem)
		return nil, false
	}
	docs := slices.DeleteFunc(slices.Clone(tree.Docs), func(d *ast.DocumentNode) bool { return d == nil || d.Body == nil })
	switch len(docs) {
	case 0:
		r.add(start, "", "holds nothing, it must hold one mapping")
		return nil, false
	case 1:
		return docs[0].Body, true
	}
	r.add(positionOf(docs[1].Body.GetToken()), "", "more than one document")
	return nil, false
}

// refused looks for what profiles do not need, and what would have the parser
// recurse without bound.
func refused(tokens token.Tokens) (*token.Token, string) {
	depth, line, begun := 0, 0, 0
	for _, t := range tokens {
		if t.Position != nil && t.Position.Line != line {
			line, begun = t.Position.Line, 0
		}
		switch t.Type {
		case token.AnchorType, token.AliasType, token.TagType, token.MergeKeyType, token.DirectiveType, token.MappingKeyType:
			return t, fmt.Sprintf("%q: anchors, aliases, tags, merge keys, directives and complex keys are not allowed", shorten(t.Value))
		case token.InvalidType:
			if t.Error != "" {
				return t, t.Error
			}
			return t, fmt.Sprintf("%q is not YAML", shorten(t.Value))
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

func shorten(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}

// describe names a node's type and value.
func describe(n ast.Node) string {
	switch n := n.(type) {
	case nil, *ast.NullNode:
		return "nothing"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "the number " + shorten(n.GetToken().Value)
	case *ast.BoolNode:
		return "the boolean " + shorten(n.GetToken().Value)
	case *ast.StringNode:
		return fmt.Sprintf("the text %q", shorten(n.Value))
	}
	return "a " + strings.ToLower(n.Type().String())
}

// value reads a node into a variable of the profile: field is its path, kind
// the same with [] in the place of each number.
func (r *reader) value(n ast.Node, into reflect.Value, field, kind string) {
	if _, ok := r.at[field]; !ok && n != nil {
		r.at[field] = positionOf(first(n))
	}
	switch into.Kind() {
	case reflect.Struct:
		r.mapping(n, into, field, kind)
	case reflect.Map:
		r.options(n, into, field)
	case reflect.Slice:
		list, ok := n.(*ast.SequenceNode)
		if !ok {
			r.fault(field, "is %s, it must be a list", describe(n))
			return
		}
		if len(list.Values) > maxList {
			r.fault(field, "has %d entries, allowed are %d", len(list.Values), maxList)
			return
		}
		into.Set(reflect.MakeSlice(into.Type(), len(list.Values), len(list.Values)))
		for i, v := range list.Values {
			r.value(v, into.Index(i), fmt.Sprintf("%s[%d]", field, i), kind+"[]")
		}
	case reflect.String:
		if text, ok := r.text(n, field); ok {
			into.SetString(text)
			r.checkText(text, field, kind)
		}
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			r.fault(field, "is %s, it must be true or false", describe(n))
			return
		}
		into.SetBool(b.Value)
	case reflect.Int, reflect.Int64:
		whole, ok := n.(*ast.IntegerNode)
		if !ok {
			r.fault(field, "is %s, it must be a whole number%s", describe(n), of(bounds[kind].unit))
			return
		}
		switch v := whole.Value.(type) {
		case int64:
			into.SetInt(v)
			r.checkNumber(float64(v), n, field, kind)
		case uint64:
			into.SetInt(int64(min(v, math.MaxInt64)))
			r.checkNumber(float64(v), n, field, kind)
		default:
			r.fault(field, "is %s, %s", describe(n), bounds[kind])
		}
	case reflect.Float64:
		var v float64
		switch number := n.(type) {
		case *ast.FloatNode:
			v = number.Value
		case *ast.IntegerNode:
			switch i := number.Value.(type) {
			case int64:
				v = float64(i)
			case uint64:
				v = float64(i)
			default:
				v = math.NaN()
			}
		case *ast.NanNode, *ast.InfinityNode:
			v = math.NaN()
		default:
			r.fault(field, "is %s, it must be a number%s", describe(n), of(bounds[kind].unit))
			return
		}
		into.SetFloat(v)
		r.checkNumber(v, n, field, kind)
	default:
		panic("no profile has a " + into.Kind().String())
	}
}

func of(unit string) string {
	if unit == "" {
		return ""
	}
	return " of " + unit
}

// first gives the token at which a node begins.
func first(n ast.Node) *token.Token {
	switch m := n.(type) {
	case *ast.MappingNode:
		if len(m.Values) > 0 {
			return m.Values[0].Key.GetToken()
		}
	case *ast.MappingValueNode:
		return m.Key.GetToken()
	}
	return n.GetToken()
}

func join(field, key string) string {
	if field == "" {
		return key
	}
	return field + "." + key
}

// pairs gives the entries of a mapping, and a fault for each key that is there
// twice or is no text.
func (r *reader) pairs(n ast.Node, field string) (all []*ast.MappingValueNode, ok bool) {
	switch m := n.(type) {
	case *ast.MappingNode:
		all = m.Values
	case *ast.MappingValueNode:
		all = []*ast.MappingValueNode{m}
	default:
		r.fault(field, "is %s, it must be a mapping", describe(n))
		return nil, false
	}
	seen := map[string]bool{}
	var kept []*ast.MappingValueNode
	for _, p := range all {
		at := positionOf(p.Key.GetToken())
		key, ok := p.Key.(*ast.StringNode)
		if !ok {
			r.add(at, field, "key %q must be a text; write it in quotes", shorten(p.Key.GetToken().Value))
			continue
		}
		path := join(field, shorten(key.Value))
		if seen[key.Value] {
			r.add(at, path, "is there twice")
			continue
		}
		seen[key.Value] = true
		r.at[path] = at
		kept = append(kept, p)
	}
	return kept, true
}

func (r *reader) mapping(n ast.Node, into reflect.Value, field, kind string) {
	pairs, ok := r.pairs(n, field)
	if !ok {
		return
	}
	var known []string
	there := map[string]bool{}
	for i := range into.NumField() {
		known = append(known, into.Type().Field(i).Tag.Get("yaml"))
	}
	for _, p := range pairs {
		key := p.Key.(*ast.StringNode).Value
		i := slices.Index(known, key)
		if i < 0 {
			r.fault(join(field, shorten(key)), "is not known, known are %s", strings.Join(known, ", "))
			continue
		}
		there[key] = true
		if _, null := p.Value.(*ast.NullNode); null || p.Value == nil {
			r.fault(join(field, key), "has no value")
			continue
		}
		r.value(p.Value, into.Field(i), join(field, key), join(kind, key))
	}
	for _, key := range known {
		if !there[key] && slices.Contains(required, join(kind, key)) {
			r.add(r.at[field], join(field, key), "is missing")
		}
	}
}

// options reads a mapping of texts. Numbers and booleans count as they are
// written.
func (r *reader) options(n ast.Node, into reflect.Value, field string) {
	pairs, ok := r.pairs(n, field)
	if !ok {
		return
	}
	if len(pairs) > maxOptions {
		r.fault(field, "has %d entries, allowed are %d", len(pairs), maxOptions)
		return
	}
	all := map[string]string{}
	for _, p := range pairs {
		key := p.Key.(*ast.StringNode).Value
		switch v := p.Value.(type) {
		case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
			all[key] = v.GetToken().Value
		default:
			if text, ok := r.text(v, join(field, shorten(key))); ok {
				all[key] = text
			}
		}
	}
	into.Set(reflect.ValueOf(all))
}

func (r *reader) text(n ast.Node, field string) (string, bool) {
	var text string
	switch s := n.(type) {
	case *ast.StringNode:
		text = s.Value
	case *ast.LiteralNode:
		text = s.Value.Value
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		r.fault(field, "is %s, it must be a text; write it in quotes", describe(n))
		return "", false
	default:
		r.fault(field, "is %s, it must be a text", describe(n))
		return "", false
	}
	if len(text) > maxText {
		r.fault(field, "has %d bytes, allowed are %d", len(text), maxText)
		return "", false
	}
	return text, true
}

func (r *reader) checkText(text, field, kind string) {
	if f, ok := forms[kind]; ok && !f.pattern.MatchString(text) {
		r.fault(field, "%q is not %s", shorten(text), f.is)
		return
	}
	if c, ok := choices[kind]; ok && !slices.Contains(c, text) {
		r.fault(field, "%q is not one of %s", shorten(text), strings.Join(c, ", "))
		return
	}
	var err error
	switch kind {
	case "match.compute_capability", "match.driver", "match.runtime":
		_, err = parseVersions(text)
	case "match.device_tree[]", "match.dmi[]", "match.gpu[]":
		err = checkPattern(text)
	case "affinity":
		_, err = Processors(text)
	case "description", "sources[]":
		if strings.TrimSpace(text) == "" {
			err = errors.New("is empty")
		}
	}
	if err != nil {
		r.fault(field, "%v", err)
	}
}

func (r *reader) checkNumber(v float64, n ast.Node, field, kind string) {
	b := bounds[kind]
	if v >= b.least && v <= b.most || b.orZero && v == 0 {
		return
	}
	r.fault(field, "is %s, %s", shorten(n.GetToken().Value), b)
}

// check looks at what fields say of each other.
func (r *reader) check(p *Profile) {
	m := p.Match
	if m.Arch == "" && len(m.DeviceTree)+len(m.DMI)+len(m.GPU) == 0 && m.ComputeCapability+m.Driver+m.Runtime == "" {
		r.fault("match", "names nothing: it would match every device")
	}
	if len(p.Providers) == 0 {
		r.fault("providers", "has no entries, there must be one at least")
	}
	seen := map[string]bool{}
	for i, q := range p.Providers {
		if seen[q.Name] {
			r.fault(fmt.Sprintf("providers[%d].name", i), "%s is there twice", q.Name)
		}
		seen[q.Name] = true
	}
	r.order("power.idle_watts", p.Power.IdleWatts, "power.limit_watts", p.Power.LimitWatts)
	r.order("thermal.warn_celsius", p.Thermal.WarnCelsius, "thermal.slowdown_celsius", p.Thermal.SlowdownCelsius)
	r.order("thermal.slowdown_celsius", p.Thermal.SlowdownCelsius, "thermal.shutdown_celsius", p.Thermal.ShutdownCelsius)
	r.order("thermal.warn_celsius", p.Thermal.WarnCelsius, "thermal.shutdown_celsius", p.Thermal.ShutdownCelsius)
	r.order("memory.host_bytes", float64(p.Memory.HostBytes), "hardware.host_bytes", float64(p.Hardware.HostBytes))
	r.order("memory.device_bytes", float64(p.Memory.DeviceBytes), "hardware.device_bytes", float64(p.Hardware.DeviceBytes))
	for i, w := range p.Link.Windows {
		if from, to, _ := strings.Cut(w, "-"); from == to {
			r.fault(fmt.Sprintf("link.windows[%d]", i), "%q has no time in it", w)
		}
	}
}

// order reports a field that is above another; of those that say nothing, none
// is.
func (r *reader) order(field string, v float64, other string, most float64) {
	if v > most && most > 0 {
		r.fault(field, "is %s, %s is %s", plain(v), other, plain(most))
	}
}

// maxProcessor bounds the numbers of processors.
const maxProcessor = 1023

// Processors reads the numbers of an affinity, ascending; none where it is
// empty.
func Processors(affinity string) ([]int, error) {
	if affinity == "" {
		return nil, nil
	}
	var all []int
	for part := range strings.SplitSeq(affinity, ",") {
		from, to, ranged := strings.Cut(part, "-")
		if !ranged {
			to = from
		}
		low, err := strconv.Atoi(from)
		high, err2 := strconv.Atoi(to)
		if errors.Join(err, err2) != nil {
			return nil, fmt.Errorf("%q is no number of a processor, nor two with - between them", shorten(part))
		}
		if low < 0 || high < low || high > maxProcessor {
			return nil, fmt.Errorf("%q: allowed are 0 to %d, the lower one first", shorten(part), maxProcessor)
		}
		for n := low; n <= high; n++ {
			all = append(all, n)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}
