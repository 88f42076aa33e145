package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// format is how data is written: the value of -o.
type format string

var formats = []string{"table", "wide", "name", "json", "jsonl", "yaml"}

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return strings.Join(formats, "|") }

func (f *format) Set(s string) error {
	if !slices.Contains(formats, s) {
		return fmt.Errorf("%q is none of %s", s, strings.Join(formats, ", "))
	}
	*f = format(s)
	return nil
}

// tabular says whether it is one for people.
func (f format) tabular() bool { return f == "table" || f == "wide" || f == "" }

// table is rows of text under a header.
type table struct {
	header []string
	// wide are headers of columns that only -o wide shows, after the others. A row
	// has their cells in any case.
	wide []string
	rows [][]string
}

func (t *table) add(cells ...string) {
	for i, c := range cells {
		cells[i] = plain(c)
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// widened is the table with the columns of -o wide.
func (t *table) widened() *table {
	return &table{header: slices.Concat(t.header, t.wide), rows: t.rows}
}

// plain is s without control characters, those that turn the direction of text
// included: what devices and pushers name must not move the cursor.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

func (t *table) write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(t.header, "\t"))
	for _, r := range t.rows {
		fmt.Fprintln(tw, strings.Join(r[:min(len(r), len(t.header))], "\t"))
	}
	return tw.Flush()
}

// view is what a verb shows, in any format.
type view struct {
	// whole is what json and yaml write: a message, or a value with JSON tags.
	whole any
	// items are what jsonl writes, a line each, and name, where they have names.
	items []any
	table func() *table
	// keys tell the rows of the table apart; nil: the items' names do.
	keys []string
	// documents, where not nil, are what yaml writes instead.
	documents []string
}

// viewOf shows a message; the items of an answer that is a list are those listed.
func viewOf(m proto.Message, t func() *table) view {
	v := view{whole: m, items: []any{m}, table: t}
	r := m.ProtoReflect()
	var list protoreflect.FieldDescriptor
	fields := r.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.IsList() && f.Message() != nil {
			if list != nil {
				return v
			}
			list = f
		}
	}
	if list == nil || !strings.HasSuffix(string(r.Descriptor().Name()), "Response") {
		return v
	}
	v.items = []any{}
	for i, l := 0, r.Get(list).List(); i < l.Len(); i++ {
		v.items = append(v.items, l.Get(i).Message().Interface())
	}
	return v
}

// nameOf gives the name by which other verbs know an item, or "".
func nameOf(item any) string {
	switch i := item.(type) {
	case *dunlinv1.ModelVersion:
		return fmt.Sprintf("%s:%d", i.GetModel(), i.GetVersion())
	case *dunlinv1.AuditRecord:
		return fmt.Sprint(i.GetNumber())
	case interface{ GetName() string }:
		return i.GetName()
	case interface{ GetId() string }:
		return i.GetId()
	}
	return ""
}

// print writes a message in a format; t makes its table.
func (c *cli) print(f format, m proto.Message, t func() *table) error {
	return c.show(f, viewOf(m, t))
}

// show writes a view in a format.
func (c *cli) show(f format, v view) error {
	switch f {
	case "table", "":
		return v.table().write(c.out)
	case "wide":
		return v.table().widened().write(c.out)
	case "name", "jsonl":
		return c.showItems(f, v.items)
	}
	if f == "yaml" && v.documents != nil {
		return c.printDocuments(v.documents)
	}
	b, err := valueJSON(v.whole, "  ")
	if err != nil {
		return err
	}
	if f == "yaml" {
		if b, err = yaml.JSONToYAML(b); err != nil {
			return fmt.Errorf("encode YAML: %w", err)
		}
	}
	_, err = c.out.Write(b)
	return err
}

// showItems writes a line for each item: its name, or itself as JSON.
func (c *cli) showItems(f format, items []any) error {
	var b bytes.Buffer
	for _, item := range items {
		if f == "name" {
			name := nameOf(item)
			if name == "" {
				return usagef("these have no names: use another -o than name")
			}
			fmt.Fprintln(&b, plain(name))
			continue
		}
		line, err := valueJSON(item, "")
		if err != nil {
			return err
		}
		b.Write(line)
	}
	_, err := c.out.Write(b.Bytes())
	return err
}

// messageJSON writes a message as JSON with all its fields.
func messageJSON(m proto.Message) ([]byte, error) { return valueJSON(m, "  ") }

// valueJSON writes a value as JSON, always the same way (protojson on purpose
// varies its spaces): on one line, or indented.
func valueJSON(v any, indent string) (b []byte, err error) {
	if m, ok := v.(proto.Message); ok {
		b, err = protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	} else {
		b, err = json.Marshal(v)
	}
	if err != nil {
		return nil, fmt.Errorf("encode JSON: %w", err)
	}
	var out bytes.Buffer
	if indent == "" {
		err = json.Compact(&out, b)
	} else {
		err = json.Indent(&out, b, "", indent)
	}
	if err != nil {
		return nil, fmt.Errorf("encode JSON: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// ago writes how long ago t was.
func ago(now time.Time, t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	d := now.Sub(t.AsTime())
	if d < time.Second {
		return "now"
	}
	if d < time.Minute {
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	}
	return durationText(d) + " ago"
}

func labelsText(labels map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, k+"="+labels[k])
	}
	return strings.Join(parts, ",")
}

// enumText makes "failed" of "ROLLOUT_STATE_FAILED".
func enumText(e fmt.Stringer, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(e.String(), prefix))
}

// parseLabels reads k=v flags.
func parseLabels(flags []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, f := range flags {
		k, v, ok := strings.Cut(f, "=")
		if !ok || k == "" {
			return nil, usagef("label %q is not of the form KEY=VALUE", f)
		}
		if _, twice := labels[k]; twice {
			return nil, usagef("label %q is given twice", k)
		}
		labels[k] = v
	}
	return labels, nil
}
