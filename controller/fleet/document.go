package fleet

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/dunlin/dunlin/models"
)

// The limits of documents.
const (
	APIVersion = "dunlin/v1"

	MaxDocumentsBytes = 1 << 20 // of all documents that are parsed together
	MaxDocuments      = 1000
	// MaxDocumentBytes and MaxTokens bound one document: the parser's time
	// grows with their square.
	MaxDocumentBytes = 64 << 10
	MaxTokens        = 5000
	MaxFailedLimit   = 1000000
	MinDeadline      = time.Second
	MaxDeadline      = 30 * 24 * time.Hour
	DefaultDeadline  = 10 * time.Minute
	MaxDuration      = 30 * 24 * time.Hour // of soak and awayAfter
	// DefaultAwayAfter and DefaultMinSample are those of a rollout with waves,
	// or with gates; without, both are 0.
	DefaultAwayAfter = 5 * time.Minute
	DefaultMinSample = 100
	MaxWaves         = 20
	MaxDevices       = 1000000 // of a wave
	MaxSample        = 1000000000
	MaxPriority      = 1000
	MaxDeliveryBytes = 1 << 50
	MaxFreezeReason  = 200 // characters
)

// The kinds of objects.
const (
	KindDeployment  = "Deployment"
	KindRoute       = "Route"
	KindFreeze      = "Freeze"
	KindMaintenance = "Maintenance"
)

// Kinds are all kinds of objects.
var Kinds = []string{KindDeployment, KindRoute, KindMaintenance, KindFreeze}

// Object is one document: exactly one of its pointers is set.
type Object struct {
	Deployment  *Deployment
	Route       *Route
	Freeze      *Freeze
	Maintenance *Maintenance

	document int
	at       map[string]position
}

// Kind gives which of its pointers is set.
func (o Object) Kind() string {
	switch {
	case o.Deployment != nil:
		return KindDeployment
	case o.Freeze != nil:
		return KindFreeze
	case o.Maintenance != nil:
		return KindMaintenance
	}
	return KindRoute
}

// Name gives the object's name, which is unique within its kind.
func (o Object) Name() string {
	switch {
	case o.Deployment != nil:
		return o.Deployment.Name
	case o.Freeze != nil:
		return o.Freeze.Name
	case o.Maintenance != nil:
		return o.Maintenance.Name
	}
	return o.Route.Name
}

// Selector gives which devices the object is about; false: it has none, which
// only a route may.
func (o Object) Selector() (map[string]string, bool) {
	switch {
	case o.Deployment != nil:
		return o.Deployment.Selector, true
	case o.Freeze != nil:
		return o.Freeze.Selector, true
	case o.Maintenance != nil:
		return o.Maintenance.Selector, true
	}
	return nil, false
}

// Fault makes a fault of a field of the document that o was parsed from.
func (o Object) Fault(field, format string, args ...any) Fault {
	at := o.at[field]
	return Fault{Document: o.document, Line: at.line, Column: at.column, Field: field, Problem: fmt.Sprintf(format, args...)}
}

// YAML gives the canonical document: parsed again it is the same object, and
// equal objects have equal text.
func (o Object) YAML() string {
	doc := yamlDocument{APIVersion: APIVersion, Kind: o.Kind(), Metadata: yamlMetadata{o.Name()}}
	switch {
	case o.Deployment != nil:
		d := o.Deployment
		doc.Spec = yamlDeployment{d.Model, d.Version, yamlLabels(d.Selector), strategyYAML(d.Rollout), deliveryYAML(d.Delivery)}
	case o.Freeze != nil:
		f := yamlFreeze{Selector: yamlLabels(o.Freeze.Selector), Reason: o.Freeze.Reason}
		if !o.Freeze.Until.IsZero() {
			f.Until = o.Freeze.Until.UTC().Format(time.RFC3339)
		}
		doc.Spec = f
	case o.Maintenance != nil:
		doc.Spec = yamlMaintenance{yamlLabels(o.Maintenance.Selector), windowsYAML(o.Maintenance.Windows), o.Maintenance.TimeZone}
	default:
		doc.Spec = routeYAML(o.Route)
	}
	var b bytes.Buffer
	if err := yaml.NewEncoder(&b, yaml.IndentSequence(true)).Encode(doc); err != nil {
		panic(fmt.Sprintf("encode %s %s: %v", o.Kind(), o.Name(), err)) // plain structs of strings and numbers
	}
	return b.String()
}

func yamlLabels(labels map[string]string) yaml.MapSlice {
	all := yaml.MapSlice{}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		all = append(all, yaml.MapItem{Key: k, Value: labels[k]})
	}
	return all
}

// shortDuration writes 10m for what String writes 10m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if t, ok := strings.CutSuffix(s, "m0s"); ok {
		s = t + "m"
	}
	if t, ok := strings.CutSuffix(s, "h0m"); ok {
		s = t + "h"
	}
	return s
}

type yamlDocument struct {
	APIVersion string       `yaml:"apiVersion"`
	Kind       string       `yaml:"kind"`
	Metadata   yamlMetadata `yaml:"metadata"`
	Spec       any          `yaml:"spec"`
}

type yamlMetadata struct {
	Name string `yaml:"name"`
}

type yamlDeployment struct {
	Model    string        `yaml:"model"`
	Version  int64         `yaml:"version"`
	Selector yaml.MapSlice `yaml:"selector"`
	Rollout  yamlRollout   `yaml:"rollout"`
	Delivery *yamlDelivery `yaml:"delivery,omitempty"`
}

type yamlRollout struct {
	Waves     []yaml.MapSlice `yaml:"waves,omitempty"`
	Soak      string          `yaml:"soak,omitempty"`
	MinSample *uint64         `yaml:"minSample,omitempty"`
	Gates     yaml.MapSlice   `yaml:"gates,omitempty"`
	OnFailure OnFailure       `yaml:"onFailure,omitempty"`
	MaxFailed int             `yaml:"maxFailed"`
	Deadline  string          `yaml:"deadline"`
	AwayAfter string          `yaml:"awayAfter,omitempty"`
}

type yamlDelivery struct {
	Priority uint32   `yaml:"priority,omitempty"`
	MaxBytes uint64   `yaml:"maxBytes,omitempty"`
	Windows  []string `yaml:"windows,omitempty"`
	Metered  bool     `yaml:"metered,omitempty"`
}

type yamlFreeze struct {
	Selector yaml.MapSlice `yaml:"selector"`
	Reason   string        `yaml:"reason"`
	Until    string        `yaml:"until,omitempty"`
}

type yamlMaintenance struct {
	Selector yaml.MapSlice `yaml:"selector"`
	Windows  []string      `yaml:"windows"`
	TimeZone string        `yaml:"timezone"`
}

// Parse reads YAML documents. Its error is Faults: everything that is wrong
// with any of them.
func Parse(text string) ([]Object, error) {
	if len(text) > MaxDocumentsBytes {
		return nil, Faults{{Problem: fmt.Sprintf("the documents have %d bytes, the limit is %d", len(text), MaxDocumentsBytes)}}
	}
	chunks := split(text)
	if len(chunks) > MaxDocuments {
		return nil, Faults{{Problem: fmt.Sprintf("there are %d documents, the limit is %d", len(chunks), MaxDocuments)}}
	}
	if len(chunks) == 0 {
		return nil, Faults{{Problem: "there is no document"}}
	}
	var faults Faults
	var objects []Object
	first := map[[2]string]int{}
	for i, c := range chunks {
		r := &reader{document: i + 1, line: c.line, at: map[string]position{}}
		o := Object{document: i + 1, at: r.at}
		r.object(c.text, &o)
		slices.SortStableFunc(r.faults, func(a, b Fault) int { // those of no line last
			return cmp.Or(cmp.Compare(uint(a.Line-1), uint(b.Line-1)), cmp.Compare(a.Column, b.Column))
		})
		faults = append(faults, r.faults...)
		if len(r.faults) > 0 {
			continue
		}
		key := [2]string{o.Kind(), o.Name()}
		if n, ok := first[key]; ok {
			faults = append(faults, o.Fault("metadata.name", "document %d is %s %q too", n, o.Kind(), o.Name()))
			continue
		}
		first[key] = i + 1
		objects = append(objects, o)
	}
	if len(faults) > 0 {
		return nil, faults
	}
	return objects, nil
}

func (r *reader) object(text string, o *Object) {
	top, ok := r.parse(text)
	if !ok {
		return
	}
	fields := r.mapping(top, "", "apiVersion", "kind", "metadata", "spec")
	if v, ok := r.text(fields, "apiVersion"); ok && v != APIVersion {
		r.fault("apiVersion", "%q is not known, it must be %q", clip(v), APIVersion)
	}
	var name string
	if meta, ok := r.required(fields, "metadata"); ok {
		name, _ = r.name(r.mapping(meta, "metadata", "name"), "metadata.name")
	}
	kind, ok := r.text(fields, "kind")
	spec, hasSpec := r.required(fields, "spec")
	switch {
	case !ok:
	case kind == KindDeployment && hasSpec:
		o.Deployment = r.deployment(spec)
		o.Deployment.Name = name
	case kind == KindRoute && hasSpec:
		o.Route = r.route(spec)
		o.Route.Name = name
	case kind == KindFreeze && hasSpec:
		o.Freeze = r.freeze(spec)
		o.Freeze.Name = name
	case kind == KindMaintenance && hasSpec:
		o.Maintenance = r.maintenance(spec)
		o.Maintenance.Name = name
	case !slices.Contains(Kinds, kind):
		last := len(Kinds) - 1
		r.fault("kind", "%q is not known, it must be %s or %s", clip(kind), strings.Join(Kinds[:last], ", "), Kinds[last])
	}
}

func (r *reader) deployment(spec node) *Deployment {
	d := &Deployment{}
	fields := r.mapping(spec, "spec", "model", "version", "selector", "rollout", "delivery")
	d.Model, _ = r.name(fields, "spec.model")
	if n, ok := r.required(fields, "spec.version"); ok {
		d.Version = r.integer(n, "spec.version", 1, models.MaxVersion)
	}
	d.Selector = r.selector(fields)
	d.Rollout = r.strategy(fields["spec.rollout"], "spec.rollout")
	if n, ok := fields["spec.delivery"]; ok {
		d.Delivery = r.delivery(n, "spec.delivery")
	}
	return d
}

// selector reads a selector, which is required, so that nobody means the whole
// fleet by leaving it out.
func (r *reader) selector(fields map[string]node) map[string]string {
	if n, ok := r.required(fields, "spec.selector"); ok {
		return r.labels(n, "spec.selector")
	}
	return nil
}

// name reads a required name of a model, deployment or route.
func (r *reader) name(fields map[string]node, path string) (string, bool) {
	s, ok := r.text(fields, path)
	if !ok {
		return "", false
	}
	if err := models.CheckName(s); err != nil {
		r.fault(path, "%v", err)
		return "", false
	}
	return s, true
}

func (r *reader) labels(n node, path string) map[string]string {
	labels := map[string]string{}
	entries := r.entries(n, path)
	if len(entries) > MaxLabels {
		r.fault(path, "has %d entries, the limit is %d", len(entries), MaxLabels)
		return labels
	}
	for _, key := range slices.SortedFunc(maps.Keys(entries), func(a, b string) int {
		return cmp.Compare(r.at[path+"."+a].line, r.at[path+"."+b].line)
	}) {
		field := path + "." + key
		s, ok := r.scalar(entries[key], field)
		if !ok {
			continue
		}
		if err := checkLabel(key, s); err != nil {
			r.fault(field, "%v", err)
		}
		labels[key] = s
	}
	return labels
}

// Fault is one thing that is wrong with a document.
type Fault struct {
	Document     int // from 1; 0: not of one document
	Line, Column int // from 1 in the whole text; 0: not known
	Field        string
	Problem      string // names the value and the limit
}

func (f Fault) Error() string {
	var b strings.Builder
	if f.Document > 0 {
		fmt.Fprintf(&b, "document %d", f.Document)
		if f.Line > 0 {
			fmt.Fprintf(&b, ", line %d:%d", f.Line, f.Column)
		}
		b.WriteString(": ")
	}
	if f.Field != "" {
		b.WriteString(f.Field + ": ")
	}
	b.WriteString(f.Problem)
	return b.String()
}

// Faults is everything that is wrong with documents, one line each.
type Faults []Fault

func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i, fault := range f {
		lines[i] = fault.Error()
	}
	return strings.Join(lines, "\n")
}
