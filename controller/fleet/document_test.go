package fleet

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models"
)

const good = `# Both objects of the first example.
apiVersion: dunlin/v1
kind: Deployment
metadata: {name: digits}
spec:
  model: digits
  version: 1
  selector: {site: demo}
  rollout: {maxFailed: 2, deadline: 90m}
---
apiVersion: dunlin/v1
kind: Route
metadata: {name: answer}
spec:
  targets:
    - {model: digits, weight: 90}
    - {model: digits, version: 2, weight: 0}
`

func TestParse(t *testing.T) {
	got, err := Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	want := []Object{
		{Deployment: &Deployment{Name: "digits", Model: "digits", Version: 1, Selector: map[string]string{"site": "demo"}, Rollout: Strategy{MaxFailed: 2, Deadline: 90 * time.Minute}}},
		{Route: &Route{Name: "answer", Targets: []Target{{"digits", 0, 90}, {"digits", 2, 0}}}},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Object{})); diff != "" {
		t.Error(diff)
	}
	if f := got[1].Fault("spec.targets[1].version", "is bad"); f.Error() != "document 2, line 17:23: spec.targets[1].version: is bad" {
		t.Error(f)
	}
	const canonical = `apiVersion: dunlin/v1
kind: Deployment
metadata:
  name: digits
spec:
  model: digits
  version: 1
  selector:
    site: demo
  rollout:
    maxFailed: 2
    deadline: 1h30m
`
	if diff := cmp.Diff(canonical, got[0].YAML()); diff != "" {
		t.Error(diff)
	}
}

// deployment and route put a spec into an otherwise good document.
func deploymentDoc(spec string) string {
	return "apiVersion: dunlin/v1\nkind: Deployment\nmetadata: {name: d}\nspec: " + spec
}

func routeDoc(targets string) string {
	return "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: " + targets + "}"
}

func TestParseFaults(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string // the lines of the error, each by its start
	}{
		{"nothing", "", []string{"there is no document"}},
		{"comments only", "# a\n---\n# b\n", []string{"there is no document"}},
		{"all faults of all documents",
			"apiVersion: dunlin/v2\nkind: Deployment\nmetadata: {name: Big, colour: red}\nspec:\n  model: 7\n  version: 0\n  selector: {site: 1}\n  rollout: {maxFailed: -1, deadline: 1ms}\n---\nkind: Route\nspec:\n  targets:\n    - {model: m, weight: 10001}\n",
			[]string{
				`document 1, line 1:1: apiVersion: "dunlin/v2" is not known, it must be "dunlin/v1"`,
				`document 1, line 3:12: metadata.name: `,
				`document 1, line 3:23: metadata.colour: is not known, known are name`,
				`document 1, line 5:3: spec.model: is the number 7, it must be a string; write it in quotes`,
				`document 1, line 6:3: spec.version: is 0, allowed are 1 to `,
				`document 1, line 7:14: spec.selector.site: is the number 1, it must be a string`,
				`document 1, line 8:13: spec.rollout.maxFailed: is -1, allowed are 0 to 1000000`,
				`document 1, line 8:28: spec.rollout.deadline: is 1ms, allowed are 1s to 720h`,
				`document 2, line 10:1: apiVersion: is missing`,
				`document 2, line 10:1: metadata: is missing`,
				`document 2, line 13:18: spec.targets[0].weight: is 10001, allowed are 0 to 10000`,
			}},
		{"missing fields", deploymentDoc("{model: m}"), []string{
			"document 1, line 4:8: spec.version: is missing", "document 1, line 4:8: spec.selector: is missing"}},
		{"no value", deploymentDoc("{model: , version: 1, selector: {}}"), []string{"document 1, line 4:8: spec.model: has no value"}},
		{"unknown kind", "apiVersion: dunlin/v1\nkind: Pod\nmetadata: {name: d}\nspec: {}", []string{`document 1, line 2:1: kind: "Pod" is not known, it must be Deployment or Route`}},
		{"key twice", deploymentDoc("{model: a, model: b, version: 1, selector: {}}"), []string{"document 1, line 4:18: spec.model: is there twice"}},
		{"number too large", deploymentDoc("{model: m, version: 99999999999999999999, selector: {}}"), []string{"document 1, line 4:18: spec.version: is "}},
		{"float", deploymentDoc("{model: m, version: 1.5, selector: {}}"), []string{"document 1, line 4:18: spec.version: is the number 1.5, it must be a whole number"}},
		{"duration", deploymentDoc("{model: m, version: 1, selector: {}, rollout: {deadline: soon}}"), []string{`document 1, line 4:54: spec.rollout.deadline: is "soon", it must be a duration like 10m`}},
		{"label value", deploymentDoc("{model: m, version: 1, selector: {a: 'x y'}}"), []string{`document 1, line 4:41: spec.selector.a: label a: value "x y": allowed are`}},
		{"label key", deploymentDoc("{model: m, version: 1, selector: {-a: x}}"), []string{`document 1, line 4:41: spec.selector.-a: label key "-a": allowed are`}},
		{"too many labels", deploymentDoc("{model: m, version: 1, selector: {" + many(65, "k%d: v") + "}}"), []string{"document 1, line 4:30: spec.selector: has 65 entries, the limit is 64"}},
		{"selector no mapping", deploymentDoc("{model: m, version: 1, selector: [a]}"), []string{"document 1, line 4:30: spec.selector: is a sequence, it must be a mapping"}},
		{"no targets", routeDoc("[]"), []string{"document 1, line 4:8: spec.targets: has 0 entries, allowed are 1 to 64"}},
		{"too many targets", routeDoc("[" + many(65, "{model: m%d, weight: 1}") + "]"), []string{"document 1, line 4:8: spec.targets: has 65 entries, allowed are 1 to 64"}},
		{"target twice", routeDoc("[{model: m, weight: 1}, {model: m, weight: 2}]"), []string{"document 1, line 4:42: spec.targets[1]: is the same target as spec.targets[0]"}},
		{"weights", routeDoc("[{model: m, weight: 0}]"), []string{"document 1, line 4:8: spec.targets: all weights are 0"}},
		{"target no mapping", routeDoc("[m]"), []string{`document 1, line 4:18: spec.targets[0]: is the string "m", it must be a mapping`}},
		{"object twice", routeDoc("[{model: m, weight: 1}]") + "\n---\n" + routeDoc("[{model: m, weight: 2}]"), []string{`document 2, line 8:12: metadata.name: document 1 is Route "r" too`}},
		{"syntax in one document only", "a: b: c\n---\n'x", []string{"document 1, line 1:", "document 2, line 3:1: "}},
		{"alias", "a: &x 1\nb: *x", []string{`document 1, line 1:4: "&": anchors, aliases`}},
		{"no mapping", "- a", []string{"document 1, line 1:1: is a sequence, it must be a mapping"}},
		{"nesting", strings.Repeat("[", 17), []string{"document 1, line 1:17: collections nest deeper than 16"}},
		{"nesting of blocks", strings.Repeat("- ", 17), []string{"document 1, line 1:33: collections nest deeper than 16"}},
		{"size of one", "a: " + strings.Repeat("x", MaxDocumentBytes), []string{"document 1, line 1:1: the document has 65539 bytes, the limit is 65536"}},
		{"tokens", strings.Repeat("a: b\n", MaxTokens), []string{"document 1, line 1:1: the document has 15000 tokens, the limit is 5000"}},
		{"size", strings.Repeat("#", MaxDocumentsBytes+1), []string{"the documents have 1048577 bytes, the limit is 1048576"}},
		{"number of documents", strings.Repeat("a\n---\n", MaxDocuments+1), []string{"there are 1001 documents, the limit is 1000"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse(tt.text)
			if _, ok := errors.AsType[Faults](err); !ok {
				t.Fatalf("got %v, want faults", err)
			}
			got := strings.Split(err.Error(), "\n")
			if len(got) != len(tt.want) {
				t.Fatalf("got %d faults, want %d:\n%s", len(got), len(tt.want), err)
			}
			for i, want := range tt.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("got  %s\nwant %s...", got[i], want)
				}
			}
		})
	}
}

func many(n int, format string) string {
	parts := make([]string, n)
	for i := range parts {
		parts[i] = fmt.Sprintf(format, i)
	}
	return strings.Join(parts, ", ")
}

// Documents of the greatest size that make a parser slow or recurse are
// refused, and soon.
func TestParseHostile(t *testing.T) {
	for _, unit := range []string{"[", "{", "- ", "a: ", "? ", "!!a ", "&a ", "-\n", "'", "\"", "a\n", "a: [\n", "\t", "|\n", "a: b\n", "x: {y: [", "#\n", "[]", "-a\n-b\n", "%a\n", "- -\n", "\\", "a: 'b\n", "{a: b}, "} {
		begin := time.Now()
		text := strings.Repeat(unit, MaxDocumentBytes/len(unit))
		if _, err := Parse(text); err == nil {
			t.Errorf("%q repeated was taken", unit)
		}
		text = strings.Repeat(unit, MaxTokens/4)
		if _, err := Parse(text); err == nil {
			t.Errorf("%q repeated was taken", unit)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("%q repeated took %s", unit, took)
		}
	}
}

func drawName(t *rapid.T, label string) string {
	return rapid.StringMatching(`[a-z0-9]{1,5}([._-][a-z0-9]{1,5}){0,3}`).Draw(t, label)
}

func drawLabels(t *rapid.T) map[string]string {
	text := `[A-Za-z0-9]([A-Za-z0-9._/-]{0,6}[A-Za-z0-9])?`
	return rapid.MapOfN(rapid.StringMatching(text), rapid.StringMatching(`|true|null|1|1e3|0x1F|`+text), 0, 5).Draw(t, "labels")
}

func drawObject(t *rapid.T) Object {
	if rapid.Bool().Draw(t, "deployment") {
		return Object{Deployment: &Deployment{
			Name: drawName(t, "name"), Model: drawName(t, "model"), Version: rapid.Int64Range(1, models.MaxVersion).Draw(t, "version"), Selector: drawLabels(t),
			Rollout: Strategy{MaxFailed: rapid.IntRange(0, MaxFailedLimit).Draw(t, "max failed"), Deadline: time.Duration(rapid.Int64Range(int64(MinDeadline), int64(MaxDeadline)).Draw(t, "deadline"))},
		}}
	}
	r := &Route{Name: drawName(t, "name")}
	for i := range rapid.IntRange(1, 5).Draw(t, "targets") {
		r.Targets = append(r.Targets, Target{drawName(t, "model"), int64(i), rapid.Uint32Range(1, 10000).Draw(t, "weight")})
	}
	return Object{Route: r}
}

func TestCanonicalRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := drawObject(t)
		got, err := Parse(o.YAML())
		if err != nil {
			t.Fatalf("%v\n%s", err, o.YAML())
		}
		if diff := cmp.Diff([]Object{o}, got, cmpopts.IgnoreUnexported(Object{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
		if again := got[0].YAML(); again != o.YAML() {
			t.Fatalf("not canonical:\n%s\n%s", o.YAML(), again)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add(good)
	f.Add(deploymentDoc("{model: m, version: 1, selector: {a: b}}"))
	f.Add("a: [b, {c: d}]\n...\n--- |\n x\n")
	f.Add("? a\n: b\n!!str c: *d")
	f.Fuzz(func(t *testing.T, text string) {
		objects, err := Parse(text)
		if err != nil {
			if _, ok := errors.AsType[Faults](err); !ok {
				t.Fatalf("%T is not faults: %v", err, err)
			}
			return
		}
		for _, o := range objects {
			again, err := Parse(o.YAML())
			if err != nil || again[0].YAML() != o.YAML() {
				t.Fatalf("canonical form of %q is not: %v\n%s", text, err, o.YAML())
			}
		}
	})
}
