package policy

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// words are Values in a map.
type words map[string]string

func (w words) Get(name string) (string, bool) { v, ok := w[name]; return v, ok }

func (w words) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for k, v := range w {
			if !yield(k, v) {
				return
			}
		}
	}
}

func one(model string) []*dunlinv1.RouteTarget {
	return []*dunlinv1.RouteTarget{target(model, 0, 1)}
}

func celRule(name, text, model string) *dunlinv1.RouteRule {
	return &dunlinv1.RouteRule{Name: name, Match: &dunlinv1.RouteMatch{Cel: text}, Targets: one(model)}
}

func where(name string, values ...string) []*dunlinv1.RouteCondition {
	return []*dunlinv1.RouteCondition{{Name: name, Values: values}}
}

func mustCompile(t testing.TB, route *dunlinv1.DesiredRoute) *Policy {
	t.Helper()
	p, err := Compile(route)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCompileRefusesRules(t *testing.T) {
	header := func(name string, values ...string) *dunlinv1.RouteRule {
		return &dunlinv1.RouteRule{Name: "a", Match: &dunlinv1.RouteMatch{Headers: where(name, values...)}, Targets: one("m")}
	}
	many := func(n int, of func(i int) *dunlinv1.RouteRule) (rules []*dunlinv1.RouteRule) {
		for i := range n {
			rules = append(rules, of(i))
		}
		return rules
	}
	numbered := func(i int) *dunlinv1.RouteRule { r := header("h", "v"); r.Name = fmt.Sprintf("r%d", i); return r }
	named := func(i int) *dunlinv1.RouteRule { r := numbered(i); r.Match.Headers[0].Name = r.Name; return r }
	values := func(n int) (v []string) {
		for i := range n {
			v = append(v, fmt.Sprint(i))
		}
		return v
	}
	with := func(change func(r *dunlinv1.RouteRule)) []*dunlinv1.RouteRule {
		r := header("h", "v")
		change(r)
		return []*dunlinv1.RouteRule{r}
	}
	cel := func(text string) []*dunlinv1.RouteRule { return []*dunlinv1.RouteRule{celRule("a", text, "m")} }
	for _, tt := range []struct {
		name  string
		rules []*dunlinv1.RouteRule
		want  string // the place, and part of the problem; "" where it is valid
	}{
		{"most rules", many(MaxRules, numbered), ""},
		{"too many rules", many(MaxRules+1, numbered), "rules: has 65 entries, allowed are 0 to 64"},
		{"most names", many(MaxNames, named), ""},
		{"name", with(func(r *dunlinv1.RouteRule) { r.Name = "A b" }), "rules[0].name: name \"A b\""},
		{"no name", with(func(r *dunlinv1.RouteRule) { r.Name = "" }), "rules[0].name: "},
		{"the default", with(func(r *dunlinv1.RouteRule) { r.Name = "default" }), "rules[0].name: \"default\" is the name"},
		{"same name", append(many(1, numbered), many(1, numbered)...), "rules[1].name: is that of rules[0] too"},
		{"no condition", with(func(r *dunlinv1.RouteRule) { r.Match = nil }), "rules[0].match: has no condition"},
		{"no targets", with(func(r *dunlinv1.RouteRule) { r.Targets = nil }), "rules[0].targets: there are 0, allowed are 1 to 64"},
		{"target", with(func(r *dunlinv1.RouteRule) { r.Targets[0].Model = "-" }), "rules[0].targets[0].model: name \"-\""},
		{"header", []*dunlinv1.RouteRule{header("X-Tenant", "a")}, `rules[0].match.headers.X-Tenant: header "X-Tenant" must be written in lower case`},
		{"secret", []*dunlinv1.RouteRule{header("authorization", "a")}, "rules[0].match.headers.authorization: header \"authorization\" carries credentials"},
		{"header name", []*dunlinv1.RouteRule{header(strings.Repeat("h", 129), "a")}, "has 129 bytes, allowed are 1 to 128"},
		{"no value", []*dunlinv1.RouteRule{header("h")}, "rules[0].match.headers.h: has 0 values, allowed are 1 to 64"},
		{"values", []*dunlinv1.RouteRule{header("h", values(65)...)}, "rules[0].match.headers.h: has 65 values, allowed are 1 to 64"},
		{"value", []*dunlinv1.RouteRule{header("h", "v", strings.Repeat("v", 257))}, "rules[0].match.headers.h[1]: value \"vvv"},
		{"twice", with(func(r *dunlinv1.RouteRule) { r.Match.Headers = append(r.Match.Headers, r.Match.Headers[0]) }), "rules[0].match.headers.h: is there twice"},
		{"sticky", with(func(r *dunlinv1.RouteRule) { r.Sticky = &dunlinv1.RouteSticky{} }), "rules[0].sticky: must have one of header and parameter"},
		{"sticky header", with(func(r *dunlinv1.RouteRule) { r.Sticky = &dunlinv1.RouteSticky{Header: "H"} }), "rules[0].sticky.header: header \"H\" must be"},
		{"rows", with(func(r *dunlinv1.RouteRule) {
			r.Match.Inputs = []*dunlinv1.RouteInput{{Name: "x", MinRows: 3, MaxRows: 2}}
		}), "rules[0].match.inputs.x.maxRows: is 2, which is below minRows, 3"},
		{"expression", cel(`request.parameters.size == "large"`), ""},
		{"unknown variable", cel(`requests.parameters.size == "large"`), "rules[0].match.cel: column 20 of the expression: undeclared reference to 'requests.parameters.size'"},
		{"unknown figure", cel(`device.live.queue_dept > 1`), "rules[0].match.cel: column 12 of the expression: undefined field 'queue_dept'"},
		{"syntax", cel("true &&\n ||"), "rules[0].match.cel: line 2, column 2 of the expression: Syntax error"},
		{"no bool", cel(`1 + 1`), "rules[0].match.cel: the expression is of type int, it must be a bool"},
		{"wrong type", cel(`device.live.on_battery > 3`), "rules[0].match.cel: column 24 of the expression: found no matching overload"},
		{"long", cel("true" + strings.Repeat(" ", MaxExpression)), "rules[0].match.cel: has 1028 bytes, the limit is 1024"},
		{"dear", cel(`request.headers.exists(a, request.headers.exists(b, request.headers.exists(c, a + b == c)))`), "rules[0].match.cel: the expression may cost"},
		{"pattern", cel(`request.headers["a"].matches("` + strings.Repeat("a", MaxPattern+1) + `")`), "rules[0].match.cel: the pattern of matches() has 129 bytes, the limit is 128"},
		{"open pattern", cel(`request.headers["a"].matches(request.headers["b"])`), "the pattern of matches() must be a literal string"},
		{"bad pattern", cel(`request.headers["a"].matches("(")`), "rules[0].match.cel: the pattern of matches(): "},
		{"chance", cel(`random() < 0.5`), "undeclared reference to 'random'"},
		{"time", cel(`now() > timestamp("2026-01-01T00:00:00Z")`), "undeclared reference to 'now'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Compile(&dunlinv1.DesiredRoute{Name: "r", Targets: one("m"), Rules: tt.rules})
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			if faults, ok := errors.AsType[Faults](err); err != nil && (!ok || len(faults) != 1) {
				t.Errorf("faults %q, want one", faults)
			}
		})
	}
	crowd := many(MaxNames, named)
	crowd[3].Sticky = &dunlinv1.RouteSticky{Parameter: "one-more"}
	if _, err := Compile(&dunlinv1.DesiredRoute{Name: "r", Targets: one("m"), Rules: crowd}); err == nil || !strings.Contains(err.Error(), "is one too many: rules and keys of a route may name 64") {
		t.Errorf("65 names: %v", err)
	}
}

func TestExpressions(t *testing.T) {
	figures := Figures{QueueDepth: Figure{12, true}, Temperature: Figure{71.5, true}, OnBattery: Figure{1, true}}
	full := words{}
	for i := range MaxEntries + 1 {
		full[fmt.Sprint("h", i)] = "v"
	}
	request := Request{
		Parameters: words{"size": "large", "long": strings.Repeat("x", MaxEntryText+1)},
		Headers:    words{"x-tenant": "acme-7", "authorization": "Bearer secret"},
		Inputs:     []tensor.Tensor{{Name: "image", Shape: []int64{8, 3, 224, 224}}, {Name: "scalar"}},
		Labels:     map[string]string{"site": "berlin"},
		Live:       func() Figures { return figures },
	}
	for _, tt := range []struct {
		text    string
		matches bool
		faults  bool
	}{
		{`request.parameters.size == "large"`, true, false},
		{`request.parameters["size"] in ["small", "large"]`, true, false},
		{`request.headers["x-tenant"].startsWith("acme-")`, true, false},
		{`request.headers["x-tenant"].matches("^acme-[0-9]+$")`, true, false},
		{`request.headers["X-Tenant"] == "acme-7"`, false, true},
		{`request.parameters.missing == "x"`, false, true},
		{`has(request.parameters.missing) && request.parameters.missing == "x"`, false, false},
		{`"missing" in request.parameters || device.labels.site == "berlin"`, true, false},
		{`request.inputs["image"][0] > 4`, true, false},
		{`request.inputs["image"].size() == 4 && request.inputs["scalar"].size() == 0`, true, false},
		{`request.inputs["image"][9] > 4`, false, true},
		{`device.live.queue_depth > 10 && device.live.temperature_celsius > 70.0`, true, false},
		{`device.live.on_battery`, true, false},
		{`device.live.predicted_wait_ms < 5.0`, false, true},
		{`has(device.live.predicted_wait_ms)`, false, false},
		{`!has(device.live.predicted_wait_ms) || device.live.predicted_wait_ms < 5.0`, true, false},
		{`has(request.headers.authorization)`, false, false},
		{`has(request.parameters.long)`, false, false},
		{`request.parameters.exists(k, k == "size")`, true, false},
		{`1 / (request.inputs["image"][0] - 8) == 1`, false, true},
		{`false`, false, false},
	} {
		p := mustCompile(t, &dunlinv1.DesiredRoute{Name: "r", Targets: one("small"), Rules: []*dunlinv1.RouteRule{celRule("a", tt.text, "large")}})
		want := Decision{Rule: -1, Target: Target{Model: "small"}}
		if tt.matches {
			want = Decision{Rule: 0, Target: Target{Model: "large"}}
		}
		if tt.faults {
			want.Faulted = 1
		}
		if got := p.Decide(&request, 1); got != want {
			t.Errorf("%s: %+v, want %+v", tt.text, got, want)
		}
	}
	// What nothing is known of is absent, and too much is a fault.
	p := mustCompile(t, &dunlinv1.DesiredRoute{Name: "r", Targets: one("m"), Rules: []*dunlinv1.RouteRule{
		celRule("a", `has(request.headers.h1)`, "n"), celRule("b", `has(device.live.queue_depth)`, "n"), celRule("c", `"a" in device.labels`, "n"),
	}})
	if d := p.Decide(&Request{}, 0); d != (Decision{Rule: -1, Target: Target{Model: "m"}}) {
		t.Errorf("an empty request: %+v", d)
	}
	if d := p.Decide(&Request{Headers: full}, 0); d != (Decision{Rule: -1, Target: Target{Model: "m"}, Faulted: 1}) {
		t.Errorf("%d headers: %+v", len(full), d)
	}
}

// naive is what Decide does, as plainly as can be, for rules without
// expressions and keys.
func naive(route *dunlinv1.DesiredRoute, q *Request, random uint64) (int, Target) {
	pick := func(targets []*dunlinv1.RouteTarget) Target {
		var line []Target
		for _, t := range targets {
			line = append(line, slices.Repeat([]Target{{t.Model, t.Version}}, int(t.Weight))...)
		}
		return line[random%uint64(len(line))]
	}
	holds := func(conditions []*dunlinv1.RouteCondition, in map[string]string) bool {
		for _, c := range conditions {
			if v, ok := in[c.Name]; !ok || !slices.Contains(c.Values, v) {
				return false
			}
		}
		return true
	}
	for i, r := range route.Rules {
		rows := true
		for _, want := range r.Match.Inputs {
			have := int64(-1)
			for _, in := range q.Inputs {
				if in.Name == want.Name {
					have = in.Shape[0]
				}
			}
			rows = rows && have >= 0 && have >= want.MinRows && (want.MaxRows == 0 || have <= want.MaxRows)
		}
		if rows && holds(r.Match.Parameters, q.Parameters.(words)) && holds(r.Match.Headers, q.Headers.(words)) && holds(r.Match.Labels, q.Labels) {
			return i, pick(r.Targets)
		}
	}
	return -1, pick(route.Targets)
}

func TestDecideIsTheNaiveModel(t *testing.T) {
	name, value := rapid.SampledFrom([]string{"a", "b", "c"}), rapid.SampledFrom([]string{"1", "2", "3", ""})
	some := func(t *rapid.T, what string) map[string]string {
		return rapid.MapOfN(name, value, 0, 3).Draw(t, what)
	}
	conditions := func(t *rapid.T) (list []*dunlinv1.RouteCondition) {
		for k, v := range some(t, "conditions") {
			list = append(list, &dunlinv1.RouteCondition{Name: k, Values: []string{v, value.Draw(t, "value")}})
		}
		return list
	}
	targets := func(t *rapid.T) (list []*dunlinv1.RouteTarget) {
		for i, w := range rapid.SliceOfN(rapid.Uint32Range(0, 5), 1, 4).Draw(t, "weights") {
			list = append(list, target("m", int64(i), w))
		}
		list[0].Weight++
		return list
	}
	rapid.Check(t, func(t *rapid.T) {
		route := &dunlinv1.DesiredRoute{Name: "r", Targets: targets(t)}
		for i := range rapid.IntRange(0, 6).Draw(t, "rules") {
			m := &dunlinv1.RouteMatch{Parameters: conditions(t), Headers: conditions(t), Labels: conditions(t)}
			if len(m.Parameters)+len(m.Headers)+len(m.Labels) == 0 || rapid.Bool().Draw(t, "rows") {
				m.Inputs = []*dunlinv1.RouteInput{{Name: name.Draw(t, "input"), MinRows: rapid.Int64Range(0, 2).Draw(t, "least"), MaxRows: rapid.SampledFrom([]int64{0, 2, 3}).Draw(t, "most")}}
			}
			route.Rules = append(route.Rules, &dunlinv1.RouteRule{Name: fmt.Sprint("r", i), Match: m, Targets: targets(t)})
		}
		p, err := Compile(route)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			q := &Request{Parameters: words(some(t, "parameters")), Headers: words(some(t, "headers")), Labels: some(t, "labels")}
			for k := range some(t, "inputs") {
				q.Inputs = append(q.Inputs, tensor.Tensor{Name: k, Shape: []int64{rapid.Int64Range(0, 4).Draw(t, "rows")}})
			}
			random := rapid.Uint64().Draw(t, "random")
			rule, to := naive(route, q, random)
			if d := p.Decide(q, random); d != (Decision{Rule: rule, Target: to}) {
				t.Fatalf("decided %+v, want rule %d and %v", d, rule, to)
			}
		}
	})
}

// requests is how many of them shares are counted over.
func requests() int {
	if os.Getenv("DUNLIN_LONG") != "" {
		return 1000000
	}
	return 100000
}

func TestShares(t *testing.T) {
	const n = 1000000
	random := rand.New(rand.NewPCG(1, 2))
	p := mustCompile(t, &dunlinv1.DesiredRoute{Name: "r", Targets: []*dunlinv1.RouteTarget{target("a", 1, 50), target("a", 2, 300), target("b", 0, 650)}})
	got := map[Target]float64{}
	for range n {
		got[p.Decide(&Request{}, random.Uint64()).Target] += 100. / n
	}
	for to, share := range map[Target]float64{{"a", 1}: 5, {"a", 2}: 30, {"b", 0}: 65} {
		if math.Abs(got[to]-share) > 0.2 {
			t.Errorf("%v got %.3f %% of the requests, want %.0f", to, got[to], share)
		}
	}
}

// stuck gives the target of each key under weights.
func stuck(t *testing.T, weights ...uint32) []Target {
	route := &dunlinv1.DesiredRoute{Name: "r", Sticky: &dunlinv1.RouteSticky{Header: "key"}}
	for i, w := range weights {
		route.Targets = append(route.Targets, target("m", int64(i), w))
	}
	p := mustCompile(t, route)
	got := make([]Target, requests())
	for i := range got {
		got[i] = p.Decide(&Request{Headers: words{"key": fmt.Sprintf("user-%d", i)}}, rand.Uint64()).Target
	}
	return got
}

func TestStickyKeysMoveLittle(t *testing.T) {
	share := func(weights []uint32, i int) float64 {
		var sum uint32
		for _, w := range weights {
			sum += w
		}
		return 100 * float64(weights[i]) / float64(sum)
	}
	for _, tt := range []struct {
		before, after []uint32
		shifted       bool // from one of several targets to another
	}{
		{[]uint32{90, 10}, []uint32{90, 10}, false},
		{[]uint32{100, 0}, []uint32{95, 5}, false},
		{[]uint32{90, 10}, []uint32{80, 20}, false},
		{[]uint32{50, 50}, []uint32{10, 90}, false},
		{[]uint32{1, 1, 1}, []uint32{1, 1, 2}, false},
		{[]uint32{30, 30, 30, 0}, []uint32{30, 30, 30, 10}, false},
		{[]uint32{50, 10, 40}, []uint32{40, 20, 40}, true},
		{[]uint32{50, 0, 50}, []uint32{40, 10, 50}, true},
	} {
		before, after := stuck(t, tt.before...), stuck(t, tt.after...)
		moved, counts := 0, make([]float64, len(tt.after))
		for i := range before {
			if before[i] != after[i] {
				moved++
			}
			counts[after[i].Version] += 100 / float64(len(after))
		}
		x := 0.
		for i := range tt.before {
			x = max(x, math.Abs(share(tt.before, i)-share(tt.after, i)))
			if d := math.Abs(counts[i] - share(tt.after, i)); d > 0.5 {
				t.Errorf("%v: target %d has %.2f %% of the keys, want %.2f", tt.after, i, counts[i], share(tt.after, i))
			}
		}
		most := x
		if tt.shifted {
			most = 2 * x / (1 + x/100)
		}
		if got := 100 * float64(moved) / float64(len(before)); got > most+0.5 {
			t.Errorf("%v to %v: %.2f %% of the keys moved, allowed are %.2f and 0.5", tt.before, tt.after, got, most)
		}
	}
}

// TestKeysKeepTheirTargets holds what devices remember by nothing but the hash.
func TestKeysKeepTheirTargets(t *testing.T) {
	route := &dunlinv1.DesiredRoute{Name: "vision", Targets: []*dunlinv1.RouteTarget{target("a", 1, 1), target("a", 2, 1), target("b", 0, 2)}, Sticky: &dunlinv1.RouteSticky{Parameter: "user"}}
	p := mustCompile(t, route)
	var got []string
	for _, key := range []string{"", "1", "2", "3", "ada", "grace", "alan", "barbara"} {
		to := p.Decide(&Request{Parameters: words{"user": key}}, rand.Uint64()).Target
		got = append(got, fmt.Sprintf("%s:%d", to.Model, to.Version))
	}
	if want := "a:2 b:0 a:1 b:0 a:2 b:0 a:1 b:0"; strings.Join(got, " ") != want {
		t.Errorf("targets %q, want %q", strings.Join(got, " "), want)
	}
	// Without the key it is chance.
	if d := p.Decide(&Request{}, 1); d.Target != (Target{"a", 2}) {
		t.Errorf("without a key: %+v", d)
	}
}

// TestStickyHeaderOfARule has names on both sides, so that slots of headers
// come after those of parameters that are found later.
func TestStickyHeaderOfARule(t *testing.T) {
	p := mustCompile(t, &dunlinv1.DesiredRoute{Name: "r", Targets: one("d"), Rules: []*dunlinv1.RouteRule{
		{Name: "a", Match: &dunlinv1.RouteMatch{Headers: where("h", "1")}, Targets: []*dunlinv1.RouteTarget{target("a", 1, 1), target("a", 2, 1)}, Sticky: &dunlinv1.RouteSticky{Header: "k"}},
		{Name: "b", Match: &dunlinv1.RouteMatch{Parameters: where("h", "2")}, Targets: one("b")},
	}})
	if d := p.Decide(&Request{Parameters: words{"h": "2"}, Headers: words{"h": "2"}}, 0); d.Rule != 1 {
		t.Errorf("a parameter was taken for a header: %+v", d)
	}
	seen := map[Target]bool{}
	for i := range 20 {
		q := &Request{Parameters: words{"h": "2"}, Headers: words{"h": "1", "k": fmt.Sprint(i)}}
		d := p.Decide(q, rand.Uint64())
		for range 5 {
			if again := p.Decide(q, rand.Uint64()); again != d || d.Rule != 0 {
				t.Fatalf("key %d went to %+v and %+v", i, d, again)
			}
		}
		seen[d.Target] = true
	}
	if len(seen) != 2 {
		t.Errorf("all keys went to %v", seen)
	}
}

// nativeRoute has n rules of which the last matches.
func nativeRoute(n int) (*dunlinv1.DesiredRoute, *Request) {
	route := &dunlinv1.DesiredRoute{Name: "r", Targets: one("m")}
	for i := range n {
		route.Rules = append(route.Rules, &dunlinv1.RouteRule{
			Name: fmt.Sprintf("r%d", i), Targets: one("n"),
			Match: &dunlinv1.RouteMatch{Headers: where("x-tenant", fmt.Sprint("tenant-", i)), Labels: where("site", "berlin")},
		})
	}
	return route, &Request{Headers: words{"x-tenant": fmt.Sprint("tenant-", n-1)}, Labels: map[string]string{"site": "berlin"}}
}

func celRoute(n int) (*dunlinv1.DesiredRoute, *Request) {
	route := &dunlinv1.DesiredRoute{Name: "r", Targets: one("m")}
	for i := range n {
		route.Rules = append(route.Rules, celRule(fmt.Sprintf("r%d", i), fmt.Sprintf(`request.headers["x-tenant"] == "tenant-%d" && device.labels["site"] == "berlin"`, i), "n"))
	}
	return route, &Request{Headers: words{"x-tenant": fmt.Sprint("tenant-", n-1)}, Labels: map[string]string{"site": "berlin"}}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	native, q := nativeRoute(20)
	all := everything()
	all.Rules[2].Match.Cel = ""
	for name, p := range map[string]*Policy{
		"weights": mustCompile(t, &dunlinv1.DesiredRoute{Name: "r", Targets: []*dunlinv1.RouteTarget{target("a", 1, 3), target("a", 2, 7)}}),
		"native":  mustCompile(t, native),
		"all":     mustCompile(t, all),
		"sticky":  mustCompile(t, &dunlinv1.DesiredRoute{Name: "r", Sticky: &dunlinv1.RouteSticky{Header: "x-tenant"}, Targets: []*dunlinv1.RouteTarget{target("a", 1, 3), target("a", 2, 7)}}),
	} {
		if n := testing.AllocsPerRun(100, func() { p.Decide(q, 12345) }); n != 0 {
			t.Errorf("%s: Decide allocates %v times", name, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	native, nq := nativeRoute(20)
	expressions, cq := celRoute(20)
	for _, bb := range []struct {
		name  string
		route *dunlinv1.DesiredRoute
		q     *Request
	}{
		{"weights", &dunlinv1.DesiredRoute{Name: "r", Targets: []*dunlinv1.RouteTarget{target("a", 1, 3), target("a", 2, 7)}}, nq},
		{"native", native, nq},
		{"cel", expressions, cq},
		{"sticky", &dunlinv1.DesiredRoute{Name: "r", Sticky: &dunlinv1.RouteSticky{Header: "x-tenant"}, Targets: []*dunlinv1.RouteTarget{target("a", 1, 3), target("a", 2, 7)}}, nq},
	} {
		p := mustCompile(b, bb.route)
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := uint64(0); b.Loop(); i++ {
				p.Decide(bb.q, i)
			}
		})
	}
}

// FuzzCompile: a text is refused with its place, or it is an expression that
// decides within its cost, whatever the request.
func FuzzCompile(f *testing.F) {
	for _, s := range []string{
		`request.parameters.size == "large"`, `request.headers["a"].matches("^a+$")`, `device.live.queue_depth > 3`, `has(device.live.on_battery)`,
		`request.inputs["x"].exists(d, d > 3)`, `[1, 2].map(x, x * 2).size() > 1`, `((((((1))))))`, `"a" in`, "\x00", `{"a": 1}.a == 1`, `dunlin.Live{queue_depth: 1}.queue_depth == 1`,
	} {
		f.Add(s, "v")
	}
	f.Fuzz(func(t *testing.T, text, value string) {
		p, err := Compile(&dunlinv1.DesiredRoute{Name: "r", Targets: one("m"), Rules: []*dunlinv1.RouteRule{celRule("a", text, "n")}})
		if err != nil {
			if !strings.HasPrefix(err.Error(), "route r: rules[0].match") {
				t.Fatalf("an error without its place: %v", err)
			}
			return
		}
		q := &Request{Parameters: words{"size": value}, Headers: words{"a": value}, Inputs: []tensor.Tensor{{Name: "x", Shape: []int64{1, 2}}}}
		if d := p.Decide(q, 1); (d.Rule == 0) != (d.Target.Model == "n") || d.Rule == 0 && d.Faulted != 0 {
			t.Fatalf("%q: %+v", text, d)
		}
	})
}
