package fleet

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models"
)

const routeSchema = "../../docs/schema/route.schema.json"

// validateRoute checks one YAML document as an editor would.
func validateRoute(s *jsonschema.Schema, text string) error {
	raw, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		return err
	}
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(raw)))
	if err != nil {
		return err
	}
	return s.Validate(value)
}

func compileRouteSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	s, err := jsonschema.NewCompiler().Compile(routeSchema)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// everyField has every field that a route can have.
const everyField = `apiVersion: dunlin/v1
kind: Route
metadata: {name: vision}
spec:
  targets:
    - {model: detector, weight: 90}
    - {model: detector, version: 8, weight: 10}
  sticky: {header: x-session}
  fallback: [{model: detector, version: 7, on: [overload, not-resident]}]
  shadow: {model: detector, version: 9, rate: 0.05}
  cascade: {model: detector-huge, version: 3, when: softmax_max(output) < 0.8}
  rules:
    - name: gold
      match:
        parameters: {tier: [gold, platinum]}
        headers: {x-site: berlin}
        labels: {site: berlin}
        inputs: {image: {minRows: 2, maxRows: 8}}
        cel: device.live.queue_depth > 50
      targets: [{model: detector-large, weight: 1}]
      sticky: {parameter: user}
      fallback: [{model: detector-small}]
      shadow: {model: detector, rate: 1}
      cascade: {model: detector-huge, when: 'max(outputs["p"]) < 0.8'}
`

func TestRouteSchemaHasTheFieldsOfTheDocument(t *testing.T) {
	type object struct {
		Properties map[string]json.RawMessage
	}
	var s struct {
		object
		Defs map[string]json.RawMessage `json:"$defs"`
	}
	raw, err := os.ReadFile(routeSchema)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatal(err)
	}
	read := func(raw json.RawMessage) (o object) {
		if err := json.Unmarshal(raw, &o); err != nil {
			t.Fatal(err)
		}
		return o
	}
	var inputs struct {
		AdditionalProperties object
	}
	if err := json.Unmarshal(read(s.Defs["match"]).Properties["inputs"], &inputs); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what string
		of   reflect.Type
		in   object
	}{
		{"document", reflect.TypeFor[yamlDocument](), s.object},
		{"metadata", reflect.TypeFor[yamlMetadata](), read(s.Properties["metadata"])},
		{"spec", reflect.TypeFor[yamlRoute](), read(s.Properties["spec"])},
		{"target", reflect.TypeFor[yamlTarget](), read(s.Defs["target"])},
		{"rule", reflect.TypeFor[yamlRule](), read(s.Defs["rule"])},
		{"match", reflect.TypeFor[yamlMatch](), read(s.Defs["match"])},
		{"input", reflect.TypeFor[yamlInput](), inputs.AdditionalProperties},
	} {
		var want []string
		for f := range tt.of.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			want = append(want, name)
		}
		slices.Sort(want)
		if got := slices.Sorted(maps.Keys(tt.in.Properties)); !slices.Equal(got, want) {
			t.Errorf("%s has %v in the schema, %v in the reader", tt.what, got, want)
		}
	}
}

func TestRouteSchemaTakesTheExamples(t *testing.T) {
	s := compileRouteSchema(t)
	checked := 0
	for _, path := range []string{"../../README.md", "../../docs/documents.md", "../../docs/routes.md"} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(b), -1) {
			for _, c := range split(m[1]) {
				if !strings.Contains(c.text, "kind: Route") {
					continue
				}
				checked++
				objects, err := Parse(c.text)
				if err != nil {
					t.Errorf("%s: %v", path, err)
					continue
				}
				for _, text := range []string{c.text, objects[0].YAML()} {
					if err := validateRoute(s, text); err != nil {
						t.Errorf("%s: %v\n%s", path, err, text)
					}
				}
			}
		}
	}
	if checked < 2 {
		t.Errorf("found %d examples", checked)
	}
}

// items gives n items of a flow collection.
func items(n int, format string) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf(format, i)
	}
	return strings.Join(all, ", ")
}

// What the schema can say, it says as the reader does: of a value at each of
// its limits and beyond it, of fields that are missing, of another type, or
// not known.
func TestRouteSchemaRefusesWhatTheReaderDoes(t *testing.T) {
	s := compileRouteSchema(t)
	const weighty = "{model: detector, version: 8, weight: 10}"
	const gold = "tier: [gold, platinum]"
	const cel = "cel: device.live.queue_depth > 50"
	const site = "{site: berlin}"
	const image = "{image: {minRows: 2, maxRows: 8}}"
	const small = "[{model: detector-small}]"
	rule := func(i int) string {
		return fmt.Sprintf("    - {name: r%d, match: {labels: {a: b}}, targets: [{model: m, weight: 1}]}\n", i)
	}
	rules := func(n int) string {
		var b strings.Builder
		for i := range n {
			b.WriteString(rule(i))
		}
		return b.String() + "    - name: gold"
	}
	for _, tt := range []struct {
		old, new string
		refused  bool
	}{
		{"dunlin/v1", "dunlin/v2", true}, {"dunlin/v1", "1", true}, {"kind: Route", "kind: Routes", true}, {"apiVersion: dunlin/v1\n", "", true},
		{"name: vision", "name: Vision", true}, {"name: vision", "name: 7", true}, {"name: vision", "nam: vision", true},
		{"name: vision", "name: " + strings.Repeat("a", 63), false}, {"name: vision", "name: " + strings.Repeat("a", 64), true},
		{"{name: vision}", "vision", true}, {"spec:", "status: ok\nspec:", true},

		{weighty, "{model: detector, version: 9, weight: 0}", false}, {weighty, "{model: Detector, weight: 1}", true}, {weighty, "{model: dunlin-agent, weight: 1}", true},
		{weighty, "{model: detector}", true}, {weighty, "{weight: 1}", true}, {weighty, "{model: detector, weight: 90}", true}, {weighty, "detector", true},
		{weighty, fmt.Sprintf("{model: m, weight: %d}", policy.MaxWeight), false}, {weighty, fmt.Sprintf("{model: m, weight: %d}", policy.MaxWeight+1), true},
		{weighty, "{model: m, weight: -1}", true}, {weighty, "{model: m, weight: 0.5}", true}, {weighty, `{model: m, weight: "1"}`, true}, {weighty, "{model: m, weight: null}", true},
		{"version: 8", "version: 0", true}, {"version: 8", fmt.Sprintf("version: %d", int64(models.MaxVersion)), false}, {"version: 8", fmt.Sprintf("version: %d", int64(models.MaxVersion)+1), true},
		{"version: 8", "versions: 8", true}, {"version: 8", "version: latest", true},
		{"[{model: detector-large, weight: 1}]", "[]", true}, {"[{model: detector-large, weight: 1}]", "[{model: m, weight: 0}]", true}, {"[{model: detector-large, weight: 1}]", "{model: m, weight: 1}", true},
		{"[{model: detector-large, weight: 1}]", "[" + items(policy.MaxTargets, "{model: m%d, weight: 1}") + "]", false},
		{"[{model: detector-large, weight: 1}]", "[" + items(policy.MaxTargets+1, "{model: m%d, weight: 1}") + "]", true},
		{"      targets: [{model: detector-large, weight: 1}]\n", "", true},

		{"{header: x-session}", "{parameter: x-session}", false}, {"{header: x-session}", "{}", true}, {"{header: x-session}", "{header: a, parameter: b}", true},
		{"{header: x-session}", "{header: X-Session}", true}, {"{header: x-session}", "{header: cookie}", true}, {"{header: x-session}", "{cookie: a}", true},
		{"{header: x-session}", "x-session", true}, {"{header: x-session}", `{header: ""}`, true}, {"{header: x-session}", "null", true}, {"{parameter: user}", "{parameter: User}", false},
		{"{header: x-session}", "{header: " + strings.Repeat("a", policy.MaxNameBytes) + "}", false}, {"{header: x-session}", "{header: " + strings.Repeat("a", policy.MaxNameBytes+1) + "}", true},

		{small, "[" + items(policy.MaxFallbacks, "{model: m%d}") + "]", false}, {small, "[" + items(policy.MaxFallbacks+1, "{model: m%d}") + "]", true}, {small, "[]", false}, {small, "{model: m}", true},
		{small, "[{model: m, on: [error, deadline]}]", false}, {small, "[{model: m, on: []}]", true}, {small, "[{model: m, on: [error, error]}]", true}, {small, "[{model: m, on: [luck]}]", true}, {small, "[{model: m, on: error}]", true},
		{small, "[{model: dunlin-agent}]", true}, {small, "[{model: m, weight: 1}]", true}, {small, "[{on: [error]}]", true},
		{"rate: 0.05", "rate: 0.0001", false}, {"rate: 0.05", "rate: 0.00009", true}, {"rate: 0.05", "rate: 1", false}, {"rate: 0.05", "rate: 1.01", true}, {"rate: 0.05", `rate: "1"`, true}, {", rate: 0.05", "", true}, {"version: 9, ", "version: 0, ", true},
		{"when: softmax_max(output) < 0.8", "when: ''", true}, {"when: softmax_max(output) < 0.8", "when: 1", true}, {", when: softmax_max(output) < 0.8", "", true}, {"version: 3", "version: 0", true},
		{"{model: detector-huge, version: 3", "{model: dunlin-agent", true}, {"{model: detector-huge, version: 3", "{version: 3", true}, {"{model: detector-huge, version: 3", "{weight: 1, model: m", true},

		{"    - name: gold", rules(policy.MaxRules - 1), false}, {"    - name: gold", rules(policy.MaxRules), true},
		{"- name: gold", "- name: default", true}, {"- name: gold", "- name: Gold", true}, {"- name: gold", "- nam: gold", true},
		{"        " + cel + "\n", "", false}, {cel, `cel: ""`, false}, {cel, "cel: true", true}, {cel, "cel: null", true}, {cel, "cel: [a]", true},
		{cel, "cel: 1 < 2" + strings.Repeat(" || 1 < 2", (policy.MaxExpression-5)/9), false}, {cel, "cel: '" + strings.Repeat("a", policy.MaxExpression+1) + "'", true},
		{"parameters: {" + gold + "}", "parameters: {}", false}, {gold, "tier: gold", false}, {gold, "tier: 1", true}, {gold, "tier: []", true}, {gold, "tier: [1]", true}, {gold, "tier: {a: b}", true},
		{gold, "tier: null", true}, {gold, `tier: ""`, false}, {gold, `"": a`, true}, {gold, `" tier": a`, true}, {"{" + gold + "}", "[tier]", true}, {"{" + gold + "}", "null", true},
		{gold, "tier: [" + items(policy.MaxValues, "v%d") + "]", false}, {gold, "tier: [" + items(policy.MaxValues+1, "v%d") + "]", true},
		{gold, "tier: " + strings.Repeat("v", policy.MaxValueBytes), false}, {gold, "tier: " + strings.Repeat("v", policy.MaxValueBytes+1), true},
		{gold, items(policy.MaxConditions, "p%d: a"), false}, {gold, items(policy.MaxConditions+1, "p%d: a"), true},
		{"x-site", "X-Site", true}, {"x-site", "authorization", true}, {"x-site", "x site", true},
		{"labels: " + site, "labels: {}", false}, {"labels: " + site, "label: " + site, true},
		{image, "{image: {}}", false}, {image, "{image: {minRows: 0}}", false}, {image, "{image: {minRows: -1}}", true}, {image, "{image: {maxRows: 0}}", true}, {image, "{image: {rows: 1}}", true},
		{image, "{image: 3}", true}, {image, "{image: null}", true}, {image, "{}", false}, {image, `{"": {}}`, true}, {image, "{" + items(policy.MaxConditions+1, "i%d: {}") + "}", true},
		{image, fmt.Sprintf("{image: {maxRows: %d}}", int64(policy.MaxRows)), false}, {image, fmt.Sprintf("{image: {maxRows: %d}}", int64(policy.MaxRows)+1), true},
		{"match:", "matches:", true}, {"  rules:", "  rule:", true},
	} {
		text := strings.Replace(everyField, tt.old, tt.new, 1)
		if text == everyField {
			t.Fatalf("%q is not in the document", tt.old)
		}
		if faulty := disagree(s, text); faulty != "" || (validateRoute(s, text) != nil) != tt.refused {
			t.Errorf("%.80q for %q: want refused %v: %s", tt.new, tt.old, tt.refused, faulty)
		}
	}
	// The conditions of a match, one by one and none.
	for _, tt := range []struct {
		match   string
		refused bool
	}{
		{"{}", true}, {"{labels: {}}", true}, {"{labels: {a: b}}", false}, {"{headers: {a: b}}", false}, {"{parameters: {a: b}}", false}, {"{inputs: {a: {}}}", false},
		{`{cel: "true"}`, false}, {`{cel: ""}`, true}, {"null", true}, {"[]", true}, {"{inputs: {}, cel: '', headers: {}}", true},
	} {
		text := "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: [{model: m, weight: 1}], rules: [{name: a, match: " + tt.match + ", targets: [{model: m, weight: 1}]}]}\n"
		if faulty := disagree(s, text); faulty != "" || (validateRoute(s, text) != nil) != tt.refused {
			t.Errorf("match %s: want refused %v: %s", tt.match, tt.refused, faulty)
		}
	}
}

// disagree says where schema and reader judge a document differently.
func disagree(s *jsonschema.Schema, text string) string {
	bySchema := validateRoute(s, text)
	_, byReader := Parse(text)
	if (bySchema == nil) == (byReader == nil) {
		return ""
	}
	return fmt.Sprintf("schema %v, reader %v", bySchema, byReader)
}

// What needs more than one field, or a compiler, only the reader sees. The
// schema may be milder, and is never stricter: a document that can be applied
// is not marked as faulty.
func TestRouteSchemaIsNotStricter(t *testing.T) {
	s := compileRouteSchema(t)
	for _, tt := range [][2]string{
		{"maxRows: 8", "maxRows: 1"}, {"device.live.queue_depth > 50", "nobody"}, {"device.live.queue_depth > 50", "1 + 1"}, {"softmax_max(output) < 0.8", "softmax_max(output)"},
		{"{model: detector, version: 8, weight: 10}", "{model: detector, weight: 10}"},
	} {
		text := strings.Replace(everyField, tt[0], tt[1], 1)
		if err := validateRoute(s, text); err != nil {
			t.Errorf("%q: %v", tt[1], err)
		}
	}
	// Documents at random: a piece of the whole one is left out, or another
	// takes its place.
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	words := regexp.MustCompile(`[A-Za-z0-9_.-]+|\[.*?\]|\{[^{}]*\}`)
	refused, taken := 0, 0
	for range 1000 {
		text := everyField
		places := words.FindAllStringIndex(text, -1)
		from, to := places[rng.IntN(len(places))], places[rng.IntN(len(places))]
		piece := text[from[0]:from[1]]
		switch rng.IntN(4) {
		case 0:
			piece = ""
		case 1:
			piece = []string{"1", "0", "-1", "true", "null", "{}", "[]", `""`, "a", "1.5", "99999999999999999999", "default"}[rng.IntN(12)]
		}
		text = text[:to[0]] + piece + text[to[1]:]
		_, err := Parse(text)
		if err != nil {
			refused++
			continue
		}
		taken++
		if err := validateRoute(s, text); err != nil {
			t.Fatalf("the reader takes what the schema refuses: %v\n%s", err, text)
		}
	}
	t.Logf("%d refused, %d taken", refused, taken)
	if refused < 10 || taken < 10 {
		t.Errorf("%d refused, %d taken: the documents are too much alike", refused, taken)
	}
}
