// Package telemetrytest holds docs/metrics.md to what the programs export.
package telemetrytest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Metric is one that a program exports.
type Metric struct {
	Name, Type, Help string
	Labels           []string
}

// described is how a Desc says what it is; it has no other way.
var described = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*"), (?:unit: [^,]*, )?constLabels: \{[^}]*\}, variableLabels: \{([^}]*)\}\}$`)

// read takes a Desc apart.
func read(d *prometheus.Desc) (m Metric, err error) {
	parts := described.FindStringSubmatch(d.String())
	if parts == nil {
		return m, fmt.Errorf("%s is not understood", d)
	}
	m.Name, err = strconv.Unquote(parts[1])
	if err != nil {
		return m, err
	}
	m.Help, err = strconv.Unquote(parts[2])
	for label := range strings.SplitSeq(parts[3], ",") {
		if label != "" {
			m.Labels = append(m.Labels, label)
		}
	}
	return m, err
}

// Exported gives the metrics of Dunlin's own that r describes, in order of
// their names. Types are those that r collects now; quiet names those of
// metrics of which it collects nothing now.
func Exported(r *prometheus.Registry, quiet map[string]string) ([]Metric, error) {
	descs := make(chan *prometheus.Desc)
	go func() {
		r.Describe(descs)
		close(descs)
	}()
	types := map[string]string{}
	families, err := r.Gather()
	for _, f := range families {
		types[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	faults := []error{err}
	var all []Metric
	for d := range descs {
		m, err := read(d)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		if !strings.HasPrefix(m.Name, "dunlin_") && !strings.HasPrefix(m.Name, "nv_") {
			continue
		}
		switch now, by := types[m.Name], quiet[m.Name]; {
		case now == "" && by == "":
			faults = append(faults, fmt.Errorf("%s is described and not collected: its type is not known", m.Name))
		case now != "" && by != "":
			faults = append(faults, fmt.Errorf("%s is collected: its type need not be said", m.Name))
		default:
			m.Type = cmp.Or(now, by)
		}
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b Metric) int { return cmp.Compare(a.Name, b.Name) })
	return all, errors.Join(faults...)
}

// units are those of figures, by what their names end in without _total.
var units = []struct{ ending, unit string }{
	{"_expiry_seconds", "s since 1970"}, {"_bytes_per_second", "bytes/s"}, {"_seconds", "s"}, {"_bytes", "bytes"}, {"_us", "µs"},
	{"_celsius", "°C"}, {"_hertz", "Hz"}, {"_watts", "W"}, {"_power_usage", "W"}, {"_power_limit", "W"}, {"_joules", "J"}, {"_energy_consumption", "J"},
	{"_utilisation", "share"}, {"_utilization", "share"}, {"_wear", "share"}, {"_rows", "rows"}, {"_pages", "pages"},
	{"_psi", "index"}, {"_last_xid", "number"},
}

// Unit says what a metric is measured in.
func (m Metric) Unit() string {
	name := strings.TrimSuffix(m.Name, "_total")
	for _, u := range units {
		if strings.HasSuffix(name, u.ending) {
			return u.unit
		}
	}
	if strings.HasPrefix(m.Help, "1 ") {
		return "0 or 1"
	}
	return "count"
}

// Check holds the table below a heading of a page to metrics; with update it
// writes it.
func Check(t *testing.T, path, heading string, metrics []Metric, update bool) {
	t.Helper()
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want, err := rewrite(string(have), heading, metrics)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	if want == string(have) {
		return
	}
	if !update {
		t.Errorf("%s is not what is exported below %q; run: go test -run %s -update, in this folder", path, heading, t.Name())
		return
	}
	if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// rewrite puts a table of metrics in the place of that below a heading.
func rewrite(page, heading string, metrics []Metric) (string, error) {
	before, rest, ok := strings.Cut(page, "\n## "+heading+"\n")
	start := strings.Index(rest, "\n| metric |")
	end := strings.Index(rest, "\n\n## ")
	if end < 0 {
		end = len(strings.TrimRight(rest, "\n"))
	}
	if !ok || start < 0 || start > end {
		return "", fmt.Errorf("there is no table of metrics below %q", heading)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n## %s\n%s\n| metric | type | labels | unit | is |\n| --- | --- | --- | --- | --- |", before, heading, rest[:start])
	for _, m := range metrics {
		labels := ""
		if len(m.Labels) > 0 {
			labels = "`" + strings.Join(m.Labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "\n| `%s` | %s | %s | %s | %s |", m.Name, m.Type, labels, m.Unit(), strings.ReplaceAll(m.Help, "|", `\|`))
	}
	b.WriteString(rest[end:])
	return b.String(), nil
}
