package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// exported gives the labels of each metric in docs/metrics.md, which the tests
// of the programs hold to what they export. Of a histogram there are the
// series that it has.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(line, " | ")
		name, ok := strings.CutPrefix(cells[0], "| `")
		if !ok || len(cells) < 5 {
			continue
		}
		name = strings.TrimSuffix(name, "`")
		labels := []string{"instance", "job"} // of each target
		for label := range strings.SplitSeq(cells[2], ", ") {
			if label = strings.Trim(label, "` "); label != "" {
				labels = append(labels, label)
			}
		}
		if cells[1] != "histogram" {
			all[name] = labels
			continue
		}
		all[name+"_bucket"], all[name+"_sum"], all[name+"_count"] = append(slices.Clone(labels), "le"), labels, labels
	}
	if len(all) < 70 {
		t.Fatalf("docs/metrics.md has only %d metrics", len(all))
	}
	return all
}

// tokens are those of the part of PromQL that dashboard and alerts are written
// in: names, strings, ranges, numbers, operators.
var tokens = regexp.MustCompile(`^(?:(\s+)|([a-zA-Z_:][a-zA-Z0-9_:]*)|("(?:[^"\\]|\\.)*")|(\[(?:\d+[smhd]|\$__rate_interval)\])|(\d+(?:\.\d+)?)|(=~|!~|!=|==|<=|>=|[-+*/<>=(){},]))`)

// functions are those that are used, and whether labels in brackets follow.
var functions = map[string]bool{
	"sum": true, "min": true, "max": true, "count": true, "avg": true,
	"rate": false, "increase": false, "histogram_quantile": false, "time": false, "vector": false,
}

// checkExpression says what is wrong with an expression: a metric that nobody
// exports, a label that it does not have, brackets that do not match, what is
// no token of PromQL. "metrics" are the labels by metric.
func checkExpression(expr string, metrics map[string][]string) error {
	var all []string
	for rest := expr; rest != ""; {
		m := tokens.FindStringSubmatch(rest)
		if m == nil {
			return fmt.Errorf("at %q: no token", rest)
		}
		if m[1] == "" {
			all = append(all, m[0])
		}
		rest = rest[len(m[0]):]
	}
	at := func(i int) string {
		if i < len(all) {
			return all[i]
		}
		return ""
	}
	isName := func(s string) bool {
		m := tokens.FindStringSubmatch(s)
		return m != nil && m[2] == s && s != ""
	}
	var open, used, grouped []string
	counters := false // a range must follow a counter
	for i := 0; i < len(all); i++ {
		switch word := all[i]; {
		case word == "(" || word == "{":
			open = append(open, word)
		case word == ")":
			if len(open) == 0 || open[len(open)-1] != "(" {
				return errors.New("brackets do not match")
			}
			open = open[:len(open)-1]
		case word == "by" || word == "without" || word == "on" || word == "ignoring":
			if at(i+1) != "(" {
				return fmt.Errorf("%s without labels", word)
			}
			for i += 2; at(i) != ")"; i++ {
				if isName(at(i)) {
					grouped = append(grouped, at(i))
				} else if at(i) != "," {
					return fmt.Errorf("%q among labels", at(i))
				}
			}
		case word == "and" || word == "or" || word == "unless":
		case isName(word):
			if _, is := functions[word]; is {
				next := at(i + 1)
				if next != "(" && !(functions[word] && (next == "by" || next == "without")) {
					return fmt.Errorf("%s is followed by %q", word, next)
				}
				counters = word == "rate" || word == "increase"
				continue
			}
			labels, ok := metrics[word]
			if !ok {
				return fmt.Errorf("no program exports %s", word)
			}
			used = append(used, word)
			if at(i+1) == "{" {
				for i += 2; ; i += 4 {
					if !slices.Contains(labels, at(i)) {
						return fmt.Errorf("%s has no label %q", word, at(i))
					}
					if !slices.Contains([]string{"=", "!=", "=~", "!~"}, at(i+1)) || !strings.HasPrefix(at(i+2), `"`) {
						return fmt.Errorf("%s%s is no matcher", at(i+1), at(i+2))
					}
					if at(i+3) != "," {
						break
					}
				}
				if i += 3; at(i) != "}" {
					return fmt.Errorf("%q ends no matchers", at(i))
				}
			}
			ranged := strings.HasPrefix(at(i+1), "[")
			if ranged != counters {
				return fmt.Errorf("%s: a range belongs into rate or increase, and only there", word)
			}
			series := strings.HasSuffix(word, "_total") || strings.HasSuffix(word, "_bucket") || strings.HasSuffix(word, "_sum") || strings.HasSuffix(word, "_count")
			if counters && !series {
				return fmt.Errorf("%s is no counter", word)
			}
			counters = false
		case word == "{" || word == "}":
			return fmt.Errorf("%q without a metric", word)
		}
	}
	if len(open) > 0 {
		return errors.New("brackets do not match")
	}
	if len(used) == 0 {
		return errors.New("it has no metric")
	}
	for _, label := range grouped {
		for _, metric := range used {
			if !slices.Contains(metrics[metric], label) {
				return fmt.Errorf("%s has no label %q", metric, label)
			}
		}
	}
	return nil
}

func TestCheckExpression(t *testing.T) {
	metrics := map[string][]string{"dunlin_a_total": {"instance", "model"}, "dunlin_b": {"instance"}, "dunlin_s_bucket": {"le", "model"}}
	for _, good := range []string{
		`dunlin_b == 1`, `sum by (model) (rate(dunlin_a_total{model=~"$model",instance!="x"}[5m])) > 0.5`, `dunlin_b > 0 and dunlin_b - time() < 3 * 86400`,
		`histogram_quantile(0.99, sum by (le, model) (rate(dunlin_s_bucket[$__rate_interval])))`, `sum(dunlin_b) or vector(0)`,
	} {
		if err := checkExpression(good, metrics); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		``, `1 + 1`, `dunlin_c`, `nv_c`, `up`, `sum by (host) (dunlin_b)`, `dunlin_b{model="x"}`, `dunlin_b{instance="x"`, `(dunlin_b`, `dunlin_b)`, `rate(dunlin_b[5m])`, `rate(dunlin_a_total)`,
		`dunlin_a_total[5m]`, `foo(dunlin_b)`, `sum by instance (dunlin_b)`, `dunlin_b{instance x}`, `dunlin_b ; 1`, `{instance="x"}`, `rate dunlin_b`,
	} {
		if err := checkExpression(bad, metrics); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// TestDashboard: each panel of the dashboard asks for what is exported, and its
// legend has labels that it gets.
func TestDashboard(t *testing.T) {
	metrics := exported(t)
	b, err := os.ReadFile("../../docs/grafana/dunlin.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Templating struct {
			List []struct{ Name, Type, Query string }
		}
		Panels []struct {
			ID          int
			Type, Title string
			GridPos     struct{ X, Y, W, H int }
			Targets     []struct{ RefID, Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	variables := []string{"datasource", "__rate_interval"}
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
		if v.Type != "query" {
			continue
		}
		m := regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`).FindStringSubmatch(v.Query)
		if m == nil || !slices.Contains(metrics[m[1]], m[2]) {
			t.Errorf("variable %s: %q: no such metric or label", v.Name, v.Query)
		}
	}
	var rows []string
	ids := map[int]bool{}
	shown := map[string]bool{}
	for i, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("%s: a second panel %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H || a.X+a.W > 24 {
				t.Errorf("%s lies over %s", p.Title, q.Title)
			}
		}
		if p.Type == "row" {
			rows = append(rows, p.Title)
			continue
		}
		if len(p.Targets) == 0 {
			t.Errorf("%s asks for nothing", p.Title)
		}
		for _, q := range p.Targets {
			if err := checkExpression(q.Expr, metrics); err != nil {
				t.Errorf("%s: %s: %v", p.Title, q.Expr, err)
			}
			for _, m := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(q.Expr, -1) {
				if !slices.Contains(variables, m[1]) {
					t.Errorf("%s: %s: no variable %s", p.Title, q.Expr, m[1])
				}
			}
			for name := range metrics {
				shown[name] = shown[name] || strings.Contains(q.Expr, name)
			}
			for _, m := range regexp.MustCompile(`\{\{(\w+)\}\}`).FindAllStringSubmatch(q.LegendFormat, -1) {
				by := regexp.MustCompile(`by \(([^)]*)\)`).FindStringSubmatch(q.Expr)
				has := by != nil && slices.Contains(strings.Split(by[1], ", "), m[1])
				for name, labels := range metrics {
					has = has || by == nil && strings.Contains(q.Expr, name) && slices.Contains(labels, m[1])
				}
				if !has {
					t.Errorf("%s: the legend of %s has %s, and its series do not", p.Title, q.Expr, m[0])
				}
			}
		}
	}
	if want := []string{"Fleet", "Device", "Models", "Residency and swaps", "Routes"}; !slices.Equal(rows, want) {
		t.Errorf("rows %q, want %q", rows, want)
	}
	for _, name := range []string{"dunlin_requests_total", "dunlin_request_seconds_bucket", "dunlin_queue_length", "dunlin_model_resident", "dunlin_model_swapped_bytes_total",
		"dunlin_memory_used_bytes", "dunlin_device_power_watts", "dunlin_gpu_celsius", "dunlin_route_requests_total", "dunlin_alarms"} {
		if !shown[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// TestAlerts: each alert asks for what is exported, and its runbook exists.
func TestAlerts(t *testing.T) {
	metrics := exported(t)
	b, err := os.ReadFile("../../docs/grafana/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalWithOptions(b, &d, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	headings := anchors(string(page))
	seen := map[string]bool{}
	for _, g := range d.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || seen[r.Alert] {
				t.Errorf("%s: alert %q: no name, or one twice", g.Name, r.Alert)
			}
			seen[r.Alert] = true
			if err := checkExpression(r.Expr, metrics); err != nil {
				t.Errorf("%s: %v", r.Alert, err)
			}
			if s := r.Labels["severity"]; s != "warning" && s != "critical" {
				t.Errorf("%s: severity %q", r.Alert, s)
			}
			if r.Annotations["summary"] == "" || r.Annotations["runbook"] == "" {
				t.Errorf("%s lacks summary or runbook", r.Alert)
			}
			at, ok := strings.CutPrefix(r.Annotations["runbook_url"], "docs/troubleshooting.md#")
			if !ok || !slices.Contains(headings, at) {
				t.Errorf("%s: runbook %q: no such heading", r.Alert, r.Annotations["runbook_url"])
			}
			by := regexp.MustCompile(`by \(([^)]*)\)`).FindStringSubmatch(r.Expr)
			for _, m := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(r.Annotations["summary"], -1) {
				has := by != nil && slices.Contains(strings.Split(by[1], ", "), m[1])
				for name, labels := range metrics {
					has = has || by == nil && strings.Contains(r.Expr, name) && slices.Contains(labels, m[1])
				}
				if !has {
					t.Errorf("%s: the summary has %s, and its series do not", r.Alert, m[0])
				}
			}
		}
	}
	if len(seen) < 10 {
		t.Errorf("only %d alerts", len(seen))
	}
}
