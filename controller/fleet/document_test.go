package fleet

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
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
		{Deployment: &Deployment{Name: "digits", Model: "digits", Version: 1, Selector: map[string]string{"site": "demo"}, Rollout: Strategy{OnFailure: RollBack, MaxFailed: 2, Deadline: 90 * time.Minute}}},
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

const wholeRoute = `  sticky: {parameter: session}
  rules:
    - name: large
      match:
        parameters: {tier: [gold, silver]}
        headers: {x-env: test}
        labels: {site: demo}
        inputs: {image: {minRows: 2, maxRows: 8}, mask: {}}
        cel: device.live.queue_depth > 3
      targets: [{model: large, version: 2, weight: 1}]
      sticky: {header: x-user}
      fallback: [{model: m, on: [not-resident, overload]}, {model: large, version: 1}]
      shadow: {model: next, rate: 1}
      cascade: {model: huge, when: max(output) < 0.9}
  fallback: [{model: small}]
  shadow: {model: m, version: 9, rate: 0.05}
  cascade: {model: huge, version: 3, when: max(output) < 0.8}
`

func TestParseRules(t *testing.T) {
	got, err := Parse(rulesDoc(wholeRoute))
	if err != nil {
		t.Fatal(err)
	}
	want := &Route{
		Name: "r", Targets: []Target{{"m", 0, 1}}, Sticky: &dunlinv1.RouteSticky{Parameter: "session"}, Fallback: []Fallback{{Model: "small"}},
		Shadow: &dunlinv1.RouteShadow{Model: "m", Version: 9, Rate: 0.05}, Cascade: &dunlinv1.RouteCascade{Model: "huge", Version: 3, When: "max(output) < 0.8"},
		Rules: []Rule{{
			Name: "large", Targets: []Target{{"large", 2, 1}}, Sticky: &dunlinv1.RouteSticky{Header: "x-user"},
			Match: &dunlinv1.RouteMatch{
				Parameters: []*dunlinv1.RouteCondition{{Name: "tier", Values: []string{"gold", "silver"}}},
				Headers:    []*dunlinv1.RouteCondition{{Name: "x-env", Values: []string{"test"}}},
				Labels:     []*dunlinv1.RouteCondition{{Name: "site", Values: []string{"demo"}}},
				Inputs:     []*dunlinv1.RouteInput{{Name: "image", MinRows: 2, MaxRows: 8}, {Name: "mask"}},
				Cel:        "device.live.queue_depth > 3",
			},
			Fallback: []Fallback{{Model: "m", On: []string{"not-resident", "overload"}}, {Model: "large", Version: 1}},
			Shadow:   &dunlinv1.RouteShadow{Model: "next", Rate: 1},
			Cascade:  &dunlinv1.RouteCascade{Model: "huge", When: "max(output) < 0.9"},
		}},
	}
	if diff := cmp.Diff(want, got[0].Route, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if f := got[0].Fault("spec.rules[0].targets[0]", "is bad"); f.Error() != "document 1, line 15:18: spec.rules[0].targets[0]: is bad" {
		t.Error(f)
	}
	var fields []string
	for field, target := range got[0].Route.All() {
		fields = append(fields, field+" "+target.Model)
	}
	if all := strings.Join(fields, ", "); all != "spec.targets[0] m, spec.fallback[0] small, spec.shadow m, spec.cascade huge, spec.rules[0].targets[0] large, spec.rules[0].fallback[0] m, spec.rules[0].fallback[1] large, spec.rules[0].shadow next, spec.rules[0].cascade huge" {
		t.Error(all)
	}
	const canonical = `apiVersion: dunlin/v1
kind: Route
metadata:
  name: r
spec:
  targets:
    - model: m
      weight: 1
  sticky:
    parameter: session
  fallback:
    - model: small
  shadow:
    model: m
    version: 9
    rate: 0.05
  cascade:
    model: huge
    version: 3
    when: max(output) < 0.8
  rules:
    - name: large
      match:
        parameters:
          tier:
            - gold
            - silver
        headers:
          x-env: test
        labels:
          site: demo
        inputs:
          image:
            minRows: 2
            maxRows: 8
          mask: {}
        cel: device.live.queue_depth > 3
      targets:
        - model: large
          version: 2
          weight: 1
      sticky:
        header: x-user
      fallback:
        - model: m
          "on":
            - not-resident
            - overload
        - model: large
          version: 1
      shadow:
        model: next
        rate: 1.0
      cascade:
        model: huge
        when: max(output) < 0.9
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

func rulesDoc(rules string) string {
	return "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec:\n  targets: [{model: m, weight: 1}]\n" + rules
}

func freezeDoc(spec string) string {
	return "apiVersion: dunlin/v1\nkind: Freeze\nmetadata: {name: f}\nspec: " + spec
}

func maintenanceDoc(spec string) string {
	return "apiVersion: dunlin/v1\nkind: Maintenance\nmetadata: {name: m}\nspec: " + spec
}

const wholeRollout = `
  model: m
  version: 3
  selector: {}
  rollout:
    waves: [{canary: 1}, {count: 20}, {percent: 12.5}, {percent: 50}]
    soak: 15m
    minSample: 200
    gates: {confidence: 0.25, errorRate: 0.02, p99: 1.25, energy: 2}
    onFailure: halt
    maxFailed: 3
    deadline: 2h
    awayAfter: 30m
  delivery: {priority: 5, maxBytes: 50000000, windows: ["sat,sun,mon,tue 22:00-05:00", "sun-sat 00:00-24:00"], metered: true}
`

func TestParseRollout(t *testing.T) {
	got, err := Parse(deploymentDoc(wholeRollout))
	if err != nil {
		t.Fatal(err)
	}
	want := &Deployment{
		Name: "d", Model: "m", Version: 3, Selector: map[string]string{},
		Rollout: Strategy{
			Waves: []Wave{{Canary: 1}, {Count: 20}, {Percent: 12.5}, {Percent: 50}}, Soak: 15 * time.Minute, MinSample: 200,
			Gates: []Gate{{ErrorRate, 0.02}, {P99, 1.25}, {Energy, 2}, {Confidence, 0.25}}, OnFailure: Halt, MaxFailed: 3, Deadline: 2 * time.Hour, AwayAfter: 30 * time.Minute,
		},
		Delivery: &dunlinv1.Delivery{Priority: 5, MaxBytes: 50000000, Metered: true, Windows: []*dunlinv1.TimeWindow{{FromMinute: 22 * 60, ToMinute: 5 * 60, Days: 0b1000111}, {ToMinute: 24 * 60}}},
	}
	if diff := cmp.Diff(want, got[0].Deployment, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	const canonical = `apiVersion: dunlin/v1
kind: Deployment
metadata:
  name: d
spec:
  model: m
  version: 3
  selector: {}
  rollout:
    waves:
      - canary: 1
      - count: 20
      - percent: 12.5
      - percent: 50
    soak: 15m
    minSample: 200
    gates:
      errorRate: 0.02
      p99: 1.25
      energy: 2
      confidence: 0.25
    onFailure: halt
    maxFailed: 3
    deadline: 2h
    awayAfter: 30m
  delivery:
    priority: 5
    maxBytes: 50000000
    windows:
      - mon,tue,sat,sun 22:00-05:00
      - 00:00-24:00
    metered: true
`
	if diff := cmp.Diff(canonical, got[0].YAML()); diff != "" {
		t.Error(diff)
	}
	var waves []string
	for _, w := range got[0].Deployment.Rollout.AllWaves() {
		waves = append(waves, w.String())
	}
	if diff := cmp.Diff([]string{"1 canary per class", "20 devices", "12.5 %", "50 %", "all"}, waves); diff != "" {
		t.Error(diff)
	}
}

// What a document does not say depends on what it says.
func TestParseRolloutDefaults(t *testing.T) {
	tests := []struct {
		rollout string
		want    Strategy
	}{
		{"{}", Strategy{}},
		{"{waves: [{canary: 2}]}", Strategy{Waves: []Wave{{Canary: 2}}, AwayAfter: DefaultAwayAfter}},
		{"{gates: {p99: 2}}", Strategy{Gates: []Gate{{P99, 2}}, MinSample: DefaultMinSample}},
		{"{waves: [{percent: 100}], awayAfter: 0s, gates: {p99: 2}, minSample: 0}", Strategy{Waves: []Wave{{Percent: 100}}, Gates: []Gate{{P99, 2}}}},
	}
	for _, tt := range tests {
		tt.want.OnFailure, tt.want.Deadline = RollBack, DefaultDeadline
		got, err := Parse(deploymentDoc("{model: m, version: 1, selector: {}, rollout: " + tt.rollout + "}"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, got[0].Deployment.Rollout); diff != "" {
			t.Errorf("%s: %s", tt.rollout, diff)
		}
	}
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
		{"unknown kind", "apiVersion: dunlin/v1\nkind: Pod\nmetadata: {name: d}\nspec: {}", []string{`document 1, line 2:1: kind: "Pod" is not known, it must be Deployment, Route, Maintenance or Freeze`}},
		{"key twice", deploymentDoc("{model: a, model: b, version: 1, selector: {}}"), []string{"document 1, line 4:18: spec.model: is there twice"}},
		{"number too large", deploymentDoc("{model: m, version: 99999999999999999999, selector: {}}"), []string{"document 1, line 4:18: spec.version: is "}},
		{"float", deploymentDoc("{model: m, version: 1.5, selector: {}}"), []string{"document 1, line 4:18: spec.version: is the number 1.5, it must be a whole number"}},
		{"duration", deploymentDoc("{model: m, version: 1, selector: {}, rollout: {deadline: soon}}"), []string{`document 1, line 4:54: spec.rollout.deadline: is "soon", it must be a duration like 10m`}},
		{"label value", deploymentDoc("{model: m, version: 1, selector: {a: 'x y'}}"), []string{`document 1, line 4:41: spec.selector.a: label a: value "x y": allowed are`}},
		{"label key", deploymentDoc("{model: m, version: 1, selector: {-a: x}}"), []string{`document 1, line 4:41: spec.selector.-a: label key "-a": allowed are`}},
		{"too many labels", deploymentDoc("{model: m, version: 1, selector: {" + many(65, "k%d: v") + "}}"), []string{"document 1, line 4:30: spec.selector: has 65 entries, the limit is 64"}},
		{"selector no mapping", deploymentDoc("{model: m, version: 1, selector: [a]}"), []string{"document 1, line 4:30: spec.selector: is a sequence, it must be a mapping"}},
		{"all faults of a rollout", deploymentDoc(`
  model: m
  version: 1
  selector: {}
  rollout:
    waves:
      - {canary: 0}
      - {count: 10, percent: 1}
      - {}
      - {percent: 20}
      - {percent: 20.0}
      - {canary: 1}
      - {percent: 101}
    soak: -1s
    minSample: -1
    gates: {errorRate: 0, p99: fast, energy: 0.5, confidence: .inf, heat: 1}
    onFailure: retry
    awayAfter: 1000h
  delivery: {priority: 1001, maxBytes: -1, windows: ["22:00", "mon 24:00-01:00", "mon-fun 10:00-11:00", "10:00-10:00", 7], metered: maybe}
`), []string{
			`document 1, line 10:10: spec.rollout.waves[0].canary: is 0, allowed are 1 to 1000000`,
			`document 1, line 11:10: spec.rollout.waves[1]: has 2 of canary, count and percent, it must have one`,
			`document 1, line 12:9: spec.rollout.waves[2]: has 0 of canary, count and percent, it must have one`,
			`document 1, line 14:10: spec.rollout.waves[4].percent: is 20, the wave before has 20: each wave includes those before and must be larger`,
			`document 1, line 15:10: spec.rollout.waves[5].canary: comes after a wave of another kind, canaries are the first waves`,
			`document 1, line 16:10: spec.rollout.waves[6].percent: is 101, allowed are 0.01 to 100`,
			`document 1, line 17:5: spec.rollout.soak: is -1s, allowed are 0s to 720h0m0s`,
			`document 1, line 18:5: spec.rollout.minSample: is -1, allowed are 0 to 1000000000`,
			`document 1, line 19:13: spec.rollout.gates.errorRate: is 0, allowed are 0.0001 to 1`,
			`document 1, line 19:27: spec.rollout.gates.p99: is the string "fast", it must be a number of 1 to 100`,
			`document 1, line 19:38: spec.rollout.gates.energy: is 0.5, allowed are 1 to 100`,
			`document 1, line 19:51: spec.rollout.gates.confidence: is the number .inf, it must be a number of 0.01 to 10`,
			`document 1, line 19:69: spec.rollout.gates.heat: is not known, known are errorRate, p99, energy, confidence`,
			`document 1, line 20:5: spec.rollout.onFailure: is "retry", it must be rollback or halt`,
			`document 1, line 21:5: spec.rollout.awayAfter: is 1000h0m0s, allowed are 0s to 720h0m0s`,
			`document 1, line 22:14: spec.delivery.priority: is 1001, allowed are 0 to 1000`,
			`document 1, line 22:30: spec.delivery.maxBytes: is -1, allowed are 0 to `,
			`document 1, line 22:54: spec.delivery.windows[0]: times "22:00" are not two of 00:00 to 24:00, it must be like mon-fri 22:00-05:00`,
			`document 1, line 22:63: spec.delivery.windows[1]: "mon 24:00-01:00" begins at 24:00, the last beginning is 23:59`,
			`document 1, line 22:82: spec.delivery.windows[2]: days "mon-fun" are not of mon, tue, wed, thu, fri, sat and sun`,
			`document 1, line 22:105: spec.delivery.windows[3]: "10:00-10:00" is empty; the whole day is 00:00-24:00`,
			`document 1, line 22:120: spec.delivery.windows[4]: is the number 7, it must be a string`,
			`document 1, line 22:124: spec.delivery.metered: is the string "maybe", it must be true or false`,
		}},
		{"waves after all", deploymentDoc("{model: m, version: 1, selector: {}, rollout: {waves: [{percent: 100}, {count: 7}]}}"), []string{"document 1, line 4:79: spec.rollout.waves[1]: comes after a wave of all devices"}},
		{"no wave", deploymentDoc("{model: m, version: 1, selector: {}, rollout: {waves: []}}"), []string{"document 1, line 4:54: spec.rollout.waves: has 0 entries, allowed are 1 to 20"}},
		{"agents answer no requests", routeDoc("[{model: dunlin-agent, weight: 1}]"), []string{"document 1, line 4:19: spec.targets[0].model: dunlin-agent is the agent program"}},
		{"freeze", freezeDoc("{reason: '', until: tomorrow}"), []string{
			"document 1, line 4:8: spec.selector: is missing", "document 1, line 4:8: spec.reason: has 0 characters, allowed are 1 to 200",
			`document 1, line 4:20: spec.until: is "tomorrow", it must be a time like 2026-12-24T18:00:00Z`}},
		{"freeze with a control character", freezeDoc(`{selector: {}, reason: "a\ab"}`), []string{"document 1, line 4:22: spec.reason: "}},
		{"maintenance", maintenanceDoc("{selector: {}, windows: [], timezone: Mars/Olympus}"), []string{
			"document 1, line 4:22: spec.windows: has 0 entries, allowed are 1 to 32", `document 1, line 4:35: spec.timezone: "Mars/Olympus" is not known, it must be an IANA name`}},
		{"local time", maintenanceDoc("{selector: {}, windows: ['00:00-24:00'], timezone: Local}"), []string{`document 1, line 4:48: spec.timezone: "Local" is not known`}},
		{"no targets", routeDoc("[]"), []string{"document 1, line 4:8: spec.targets: has 0 entries, allowed are 1 to 64"}},
		{"too many targets", routeDoc("[" + many(65, "{model: m%d, weight: 1}") + "]"), []string{"document 1, line 4:8: spec.targets: has 65 entries, allowed are 1 to 64"}},
		{"target twice", routeDoc("[{model: m, weight: 1}, {model: m, weight: 2}]"), []string{"document 1, line 4:42: spec.targets[1]: is the same target as spec.targets[0]"}},
		{"weights", routeDoc("[{model: m, weight: 0}]"), []string{"document 1, line 4:8: spec.targets: all weights are 0"}},
		{"target no mapping", routeDoc("[m]"), []string{`document 1, line 4:18: spec.targets[0]: is the string "m", it must be a mapping`}},
		{"all faults of rules", rulesDoc(`  sticky: {header: X-User}
  rules:
    - name: default
      match: {headers: {authorization: x}, labels: {site: [a, 7, b]}, inputs: {image: {minRows: 9, maxRows: 8}}}
      targets: [{model: m, weight: 0}]
    - name: b
      match: {}
      targets: [{model: m, weight: 1}, {model: m, weight: 2}]
      sticky: {}
    - match: {cel: 'request.headers["a"] == 7', colour: red}
      targets: [{model: m, weight: 10001}, {model: m2, weight: 1}]
    - name: b
      match:
        cel: |
          device.labels["a"] == "b" &&
            nobody
      targets: []
      sticky: {header: a, parameter: b}
    - 7
`), []string{
			`document 1, line 6:12: spec.sticky.header: header "X-User" must be written in lower case`,
			`document 1, line 8:7: spec.rules[0].name: "default" is the name of what happens`,
			`document 1, line 9:25: spec.rules[0].match.headers.authorization: header "authorization" carries credentials`,
			`document 1, line 9:63: spec.rules[0].match.labels.site[1]: is the number 7, it must be a string; write it in quotes`,
			`document 1, line 9:100: spec.rules[0].match.inputs.image.maxRows: is 8, which is below minRows, 9`,
			`document 1, line 10:7: spec.rules[0].targets: all weights are 0`,
			`document 1, line 12:7: spec.rules[1].match: has no condition`,
			`document 1, line 13:41: spec.rules[1].targets[1]: is the same target as spec.rules[1].targets[0]`,
			`document 1, line 14:7: spec.rules[1].sticky: must have one of header and parameter`,
			`document 1, line 15:7: spec.rules[2].name: is missing`,
			`document 1, line 15:15: spec.rules[2].match.cel: column 22 of the expression: found no matching overload for '_==_'`,
			`document 1, line 15:49: spec.rules[2].match.colour: is not known, known are parameters, headers, labels, inputs, cel`,
			`document 1, line 16:28: spec.rules[2].targets[0].weight: is 10001, allowed are 0 to 10000`,
			`document 1, line 17:7: spec.rules[3].name: is that of rules[1] too`,
			`document 1, line 19:9: spec.rules[3].match.cel: line 2, column 3 of the expression: undeclared reference to 'nobody'`,
			`document 1, line 22:7: spec.rules[3].targets: has 0 entries, allowed are 1 to 64`,
			`document 1, line 23:7: spec.rules[3].sticky: must have one of header and parameter`,
			`document 1, line 24:7: spec.rules[4]: is the number 7, it must be a mapping`,
		}},
		{"values of a condition", rulesDoc("  rules:\n    - name: a\n      match: {labels: {site: [7, " + strings.Repeat("x", 257) + ", b], tier: [], zone: {a: b}}}\n      targets: [{model: m, weight: 1}]\n"), []string{
			`document 1, line 8:31: spec.rules[0].match.labels.site[0]: is the number 7`,
			`document 1, line 8:34: spec.rules[0].match.labels.site[1]: value "xxx`,
			`document 1, line 8:297: spec.rules[0].match.labels.tier: has 0 values, allowed are 1 to 64`,
			`document 1, line 8:307: spec.rules[0].match.labels.zone: is a mapping, it must be a string`,
		}},
		{"an expression that costs too much", rulesDoc(`  rules:
    - name: a
      match: {cel: "request.headers.all(a, request.headers.all(b, request.headers.all(c, a == b)))"}
      targets: [{model: m, weight: 1}]
`), []string{`document 1, line 8:15: spec.rules[0].match.cel: the expression may cost `}},
		{"fallbacks", rulesDoc(`  fallback: [{model: n}, {model: m}, {version: 2, on: [heat, error, error]}, {model: n, on: []}, {model: n}]
  rules:
    - name: a
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}, {model: n, weight: 0}, {model: o, version: 3, weight: 1}]
      fallback: [{model: m}, {model: o, version: 3}, {model: n}, {model: dunlin-agent}]
    - name: b
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}, {model: n, weight: 0}]
      fallback: [{model: m}]
    - name: c
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}]
      fallback: [` + many(9, "{model: n%d}") + `]
`), []string{
			`document 1, line 6:27: spec.fallback[1]: is circular: it is the only target that gets requests`,
			`document 1, line 6:39: spec.fallback[2].model: is missing`,
			`document 1, line 6:56: spec.fallback[2].on[0]: "heat" is not known, known are overload, error, deadline, not-resident`,
			`document 1, line 6:69: spec.fallback[2].on[2]: error is there twice`,
			`document 1, line 6:89: spec.fallback[3].on: has 0 entries, allowed are 1 to 4`,
			`document 1, line 6:99: spec.fallback[4]: the same model and version as fallback[0]`,
			`document 1, line 11:67: spec.rules[0].fallback[3].model: dunlin-agent is the agent program`,
			`document 1, line 15:19: spec.rules[1].fallback[0]: is circular`,
			`document 1, line 19:7: spec.rules[2].fallback: has 9 entries, allowed are 0 to 8`,
		}},
		{"shadows", rulesDoc(`  shadow: {model: m, rate: 0.5}
  rules:
    - name: a
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}]
      shadow: {model: dunlin-agent, version: 0, rate: 1.5}
    - name: b
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}]
      shadow: {rate: 0}
`), []string{
			`document 1, line 6:3: spec.shadow: is the only target that gets requests`,
			`document 1, line 11:16: spec.rules[0].shadow.model: dunlin-agent is the agent program`,
			`document 1, line 11:37: spec.rules[0].shadow.version: is 0, allowed are 1 to`,
			`document 1, line 11:49: spec.rules[0].shadow.rate: is 1.5, allowed are 0.0001 to 1`,
			`document 1, line 15:16: spec.rules[1].shadow.model: is missing`,
			`document 1, line 15:16: spec.rules[1].shadow.rate: is 0, allowed are 0.0001 to 1`,
		}},
		{"cascades", rulesDoc(`  cascade: {model: m, when: max(output) < 0.5}
  rules:
    - name: a
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}]
      cascade: {model: dunlin-agent, version: 0, when: max(output) < 0.5}
    - name: b
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}]
      cascade: {model: n, when: max(output)}
    - name: c
      match: {cel: 'true'}
      targets: [{model: m, weight: 1}]
      cascade: {version: 1}
`), []string{
			`document 1, line 6:3: spec.cascade: is circular: it is the only target that gets requests`,
			`document 1, line 11:17: spec.rules[0].cascade.model: dunlin-agent is the agent program`,
			`document 1, line 11:38: spec.rules[0].cascade.version: is 0, allowed are 1 to`,
			`document 1, line 15:27: spec.rules[1].cascade.when: the expression is of type double, it must be a bool`,
			`document 1, line 19:17: spec.rules[2].cascade.model: is missing`,
			`document 1, line 19:17: spec.rules[2].cascade.when: is missing`,
		}},
		{"too many rules", "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec:\n  targets: []\n  sticky: {}\n  rules: [" + many(65, "{name: r%d}") + "]\n", []string{
			"document 1, line 5:3: spec.targets: has 0 entries", "document 1, line 6:3: spec.sticky: must have one of header and parameter", "document 1, line 7:3: spec.rules: has 65 entries, allowed are 0 to 64"}},
		{"targets of no kind hide no fault of rules", "apiVersion: dunlin/v1\nkind: Route\nmetadata: {name: r}\nspec: {targets: 7, rules: [{name: a, match: {cel: '1'}, targets: [{model: m, weight: 1}]}]}", []string{
			"document 1, line 4:8: spec.targets: is the number 7, it must be a sequence", "document 1, line 4:46: spec.rules[0].match.cel: the expression is of type int, it must be a bool"}},
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

func drawWindows(t *rapid.T, least int) []*dunlinv1.TimeWindow {
	var all []*dunlinv1.TimeWindow
	for range rapid.IntRange(least, 3).Draw(t, "windows") {
		w := &dunlinv1.TimeWindow{FromMinute: rapid.Uint32Range(0, 1439).Draw(t, "from"), ToMinute: rapid.Uint32Range(0, 1440).Draw(t, "to"), Days: rapid.Uint32Range(0, 126).Draw(t, "days")}
		if w.FromMinute == w.ToMinute {
			w.ToMinute++
		}
		all = append(all, w)
	}
	return all
}

func drawDuration(t *rapid.T, least, most time.Duration, label string) time.Duration {
	return time.Duration(rapid.Int64Range(int64(least), int64(most)).Draw(t, label))
}

func drawStrategy(t *rapid.T) Strategy {
	s := Strategy{
		MinSample: rapid.Uint64Range(0, MaxSample).Draw(t, "sample"), OnFailure: rapid.SampledFrom([]OnFailure{RollBack, Halt}).Draw(t, "on failure"),
		MaxFailed: rapid.IntRange(0, MaxFailedLimit).Draw(t, "max failed"), Deadline: drawDuration(t, MinDeadline, MaxDeadline, "deadline"),
		Soak: drawDuration(t, 0, MaxDuration, "soak"), AwayAfter: drawDuration(t, 0, MaxDuration, "away"),
	}
	canary, devices, percent := 0, 0, 0.
	for range rapid.IntRange(0, 2).Draw(t, "canaries") {
		canary += rapid.IntRange(1, 5).Draw(t, "canary")
		s.Waves = append(s.Waves, Wave{Canary: canary})
	}
	for range rapid.IntRange(0, 4).Draw(t, "waves") {
		if rapid.Bool().Draw(t, "count") {
			devices += rapid.IntRange(1, 1000).Draw(t, "devices")
			s.Waves = append(s.Waves, Wave{Count: devices})
		} else {
			percent += rapid.Float64Range(0.01, 24).Draw(t, "percent")
			s.Waves = append(s.Waves, Wave{Percent: percent})
		}
	}
	for _, g := range gateLimits {
		if rapid.Bool().Draw(t, string(g.kind)) {
			s.Gates = append(s.Gates, Gate{g.kind, rapid.Float64Range(g.least, g.most).Draw(t, "limit")})
		}
	}
	if rapid.Bool().Draw(t, "defaults") {
		s.MinSample, s.AwayAfter = s.defaults()
	}
	return s
}

func drawObject(t *rapid.T) Object {
	switch rapid.SampledFrom(Kinds).Draw(t, "kind") {
	case KindDeployment:
		d := &Deployment{
			Name: drawName(t, "name"), Model: drawName(t, "model"), Version: rapid.Int64Range(1, models.MaxVersion).Draw(t, "version"), Selector: drawLabels(t),
			Rollout: drawStrategy(t),
		}
		if rapid.Bool().Draw(t, "delivery") {
			d.Delivery = &dunlinv1.Delivery{
				Priority: rapid.Uint32Range(0, MaxPriority).Draw(t, "priority"), MaxBytes: rapid.Uint64Range(1, MaxDeliveryBytes).Draw(t, "bytes"),
				Metered: rapid.Bool().Draw(t, "metered"), Windows: drawWindows(t, 0),
			}
		}
		return Object{Deployment: d}
	case KindFreeze:
		f := &Freeze{Name: drawName(t, "name"), Selector: drawLabels(t), Reason: rapid.StringMatching(`[ -~äöü:#'"|>]{1,40}`).Draw(t, "reason")}
		if rapid.Bool().Draw(t, "until") {
			f.Until = time.Unix(rapid.Int64Range(0, 1<<37).Draw(t, "seconds"), 0).UTC()
		}
		return Object{Freeze: f}
	case KindMaintenance:
		zone := rapid.SampledFrom([]string{"UTC", "Europe/Berlin", "America/St_Johns"}).Draw(t, "zone")
		return Object{Maintenance: &Maintenance{Name: drawName(t, "name"), Selector: drawLabels(t), Windows: drawWindows(t, 1), TimeZone: zone}}
	}
	r := &Route{Name: drawName(t, "name"), Targets: drawTargets(t), Sticky: drawSticky(t), Fallback: drawFallback(t)}
	for i := range rapid.IntRange(0, 4).Draw(t, "rules") {
		r.Rules = append(r.Rules, Rule{Name: fmt.Sprintf("r%d", i), Match: drawMatch(t), Targets: drawTargets(t), Sticky: drawSticky(t), Fallback: drawFallback(t)})
	}
	return Object{Route: r}
}

func drawTargets(t *rapid.T) (targets []Target) {
	for i := range rapid.IntRange(1, 5).Draw(t, "targets") {
		targets = append(targets, Target{drawName(t, "model"), int64(i), rapid.Uint32Range(1, 10000).Draw(t, "weight")})
	}
	return targets
}

func drawFallback(t *rapid.T) (fallback []Fallback) {
	for i := range rapid.IntRange(0, 3).Draw(t, "fallback") {
		on := rapid.SampledFrom([][]string{nil, {"overload"}, {"error", "not-resident", "deadline"}}).Draw(t, "on")
		fallback = append(fallback, Fallback{drawName(t, "model"), int64(i + 10), on}) // versions that are no targets
	}
	return fallback
}

func drawSticky(t *rapid.T) *dunlinv1.RouteSticky {
	switch rapid.IntRange(0, 2).Draw(t, "sticky") {
	case 1:
		return &dunlinv1.RouteSticky{Header: rapid.StringMatching(`x-[a-z0-9]{1,8}`).Draw(t, "header")}
	case 2:
		return &dunlinv1.RouteSticky{Parameter: rapid.StringMatching(`[A-Za-z0-9]{1,8}`).Draw(t, "parameter")}
	}
	return nil
}

func drawMatch(t *rapid.T) *dunlinv1.RouteMatch {
	conditions := func(kind, name string) (all []*dunlinv1.RouteCondition) {
		for i := range rapid.IntRange(0, 2).Draw(t, kind) {
			values := rapid.SliceOfN(rapid.StringMatching(`[ -~äöü]{0,9}|true|~|0x1|[0-9]{1,3}`), 1, 3).Draw(t, "values")
			all = append(all, &dunlinv1.RouteCondition{Name: fmt.Sprintf("%d%s", i, name), Values: values})
		}
		return all
	}
	m := &dunlinv1.RouteMatch{
		Parameters: conditions("parameters", rapid.SampledFrom([]string{"", "P.q", "/x"}).Draw(t, "parameter")),
		Headers:    conditions("headers", "-h"), Labels: conditions("labels", "l"),
		Cel: rapid.SampledFrom([]string{"", "true", "device.live.queue_depth > 3 ||\n  !('a' in device.labels)\n", `request.headers["x"] == "a: #b"`}).Draw(t, "cel"),
	}
	if rapid.Bool().Draw(t, "input") || len(m.Parameters)+len(m.Headers)+len(m.Labels)+len(m.Cel) == 0 {
		least := rapid.Int64Range(0, policy.MaxRows-1).Draw(t, "least")
		m.Inputs = []*dunlinv1.RouteInput{{Name: "image", MinRows: least, MaxRows: rapid.SampledFrom([]int64{0, least + 1}).Draw(t, "most")}}
	}
	return m
}

func TestCanonicalRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := drawObject(t)
		got, err := Parse(o.YAML())
		if err != nil {
			t.Fatalf("%v\n%s", err, o.YAML())
		}
		if diff := cmp.Diff([]Object{o}, got, cmpopts.IgnoreUnexported(Object{}), cmpopts.EquateEmpty(), protocmp.Transform()); diff != "" {
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
	f.Add(deploymentDoc(wholeRollout))
	f.Add(freezeDoc("{selector: {}, reason: 'stock: taking', until: 2026-12-24T18:00:00+01:00}"))
	f.Add(maintenanceDoc("{selector: {a: b}, windows: ['mon-fri 22:00-05:00', '00:00-24:00'], timezone: Europe/Berlin}"))
	f.Add(rulesDoc("  sticky: {header: x}\n  rules:\n    - {name: a, match: {parameters: {p: [a, b]}, inputs: {image: {minRows: 2}}, cel: 'true'}, targets: [{model: m, weight: 1}]}\n"))
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
