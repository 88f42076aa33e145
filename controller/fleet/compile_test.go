package fleet

import (
	"encoding/hex"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/internal/policy"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func objects() Objects {
	return Objects{
		Deployments: []Deployment{
			{Name: "b", Model: "other", Version: 7, Selector: map[string]string{"site": "demo", "tier": "1"}},
			{Name: "a", Model: "digits", Version: 2},
			{Name: "z", Model: "digits", Version: 1, Selector: map[string]string{"site": "demo"}},
			{Name: "lost", Model: "gone", Version: 1},
		},
		Routes: []Route{
			{Name: "r2", Targets: []Target{{"other", 0, 1}}},
			{Name: "r1", Targets: []Target{{"digits", 0, 90}, {"other", 7, 10}}},
		},
		Versions: []Version{
			{Model: "digits", Version: 1, Digest: "sha256:1", SizeBytes: 10}, {Model: "digits", Version: 2, Digest: "sha256:2", SizeBytes: 20},
			{Model: "other", Version: 7, Digest: "sha256:7", SizeBytes: 70},
		},
	}
}

func TestCompile(t *testing.T) {
	digits := &dunlinv1.DesiredVersion{Deployment: "a", Model: "digits", Version: 2, Digest: "sha256:2", SizeBytes: 20}
	other := &dunlinv1.DesiredVersion{Deployment: "b", Model: "other", Version: 7, Digest: "sha256:7", SizeBytes: 70}
	r1 := &dunlinv1.DesiredRoute{Name: "r1", Targets: []*dunlinv1.RouteTarget{{Model: "digits", Weight: 90}, {Model: "other", Version: 7, Weight: 10}}}
	r2 := &dunlinv1.DesiredRoute{Name: "r2", Targets: []*dunlinv1.RouteTarget{{Model: "other", Weight: 1}}}
	tests := []struct {
		name   string
		labels map[string]string
		want   *dunlinv1.DesiredDocument
	}{
		{"no labels", nil, &dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{digits}, Routes: []*dunlinv1.DesiredRoute{r1}}},
		{"some labels: the first of two deployments by name", map[string]string{"site": "demo"}, &dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{digits}, Routes: []*dunlinv1.DesiredRoute{r1}}},
		{"all labels", map[string]string{"site": "demo", "tier": "1", "x": "y"}, &dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{digits, other}, Routes: []*dunlinv1.DesiredRoute{r1, r2}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, refused := NewCompiler(objects()).Compile(Device{Name: "d", Labels: tt.labels}, nil)
			if len(refused) > 0 {
				t.Errorf("refused %v", refused)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A device has the rules only whose conditions on labels hold there, a route
// only with a model of its own, and its labels only where a rule looks at them.
func TestCompileRules(t *testing.T) {
	rule := func(name, model, label, expression string) Rule {
		m := &dunlinv1.RouteMatch{Cel: expression}
		if label != "" {
			m.Labels = []*dunlinv1.RouteCondition{{Name: "site", Values: []string{label, "none"}}}
		}
		return Rule{Name: name, Match: m, Targets: []Target{{model, 0, 1}}}
	}
	o := objects()
	o.Routes = []Route{
		{Name: "r1", Targets: []Target{{"gone", 0, 1}}, Rules: []Rule{rule("demo", "digits", "demo", ""), rule("x", "digits", "x", "")}},
		{Name: "r2", Targets: []Target{{"digits", 0, 1}}, Sticky: &dunlinv1.RouteSticky{Header: "h"}, Rules: []Rule{rule("all", "gone", "", "true")}},
		{Name: "r3", Targets: []Target{{"digits", 0, 1}}, Rules: []Rule{rule("seen", "gone", "", "size(device.labels) > 0")}},
	}
	tests := []struct {
		name   string
		routes []Route
		labels map[string]string
		want   string
	}{
		{"the label holds", o.Routes[:1], map[string]string{"site": "demo", "b": "c"}, "r1[demo] b=c site=demo"},
		{"another label holds", o.Routes[:1], map[string]string{"site": "x"}, "r1[x] site=x"},
		{"no label holds, and nothing is here", o.Routes[:1], map[string]string{"site": "y"}, ""},
		{"without the label", o.Routes[:1], nil, ""},
		{"a rule that does not look at labels", o.Routes[1:2], map[string]string{"site": "demo"}, "r2[all]"},
		{"an expression looks at labels", o.Routes[1:], map[string]string{"z": "1", "a": "2"}, "r2[all] r3[seen] a=2 z=1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o.Routes = tt.routes
			doc, _ := NewCompiler(o).Compile(Device{Name: "d", Labels: tt.labels}, nil)
			var got []string
			for _, r := range doc.Routes {
				var rules []string
				for _, rule := range r.Rules {
					rules = append(rules, rule.Name)
				}
				got = append(got, r.Name+"["+strings.Join(rules, " ")+"]")
			}
			for _, l := range doc.Labels {
				got = append(got, l.Name+"="+l.Value)
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("got %q, want %q", s, tt.want)
			}
		})
	}
	o.Routes = objects().Routes
	o.Routes[1].Sticky, o.Routes[1].Rules = &dunlinv1.RouteSticky{Header: "h"}, []Rule{rule("demo", "other", "demo", "true")}
	doc, _ := NewCompiler(o).Compile(Device{Name: "d", Labels: map[string]string{"site": "demo"}}, nil)
	if diff := cmp.Diff(o.Routes[1].Desired(), doc.Routes[0], protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// The bytes must stay the same over builds: another hash is another generation
// for the whole fleet.
func TestEncodeIsPinned(t *testing.T) {
	doc, _ := NewCompiler(objects()).Compile(Device{Name: "d", Labels: map[string]string{"site": "demo", "tier": "1"}}, nil)
	_, sum, err := Encode(doc)
	if err != nil {
		t.Fatal(err)
	}
	const want = "453d2bf91a3aa663e037c96b7f4b5e398fd79cd3d0c89ec591f891e39eb2be77"
	if got := hex.EncodeToString(sum[:]); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCompileIgnoresOrder(t *testing.T) {
	device := Device{Name: "d", Labels: map[string]string{"site": "demo", "tier": "1"}}
	doc, _ := NewCompiler(objects()).Compile(device, nil)
	want, _, err := Encode(doc)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		o := objects()
		rand.Shuffle(len(o.Deployments), func(i, j int) { o.Deployments[i], o.Deployments[j] = o.Deployments[j], o.Deployments[i] })
		rand.Shuffle(len(o.Routes), func(i, j int) { o.Routes[i], o.Routes[j] = o.Routes[j], o.Routes[i] })
		doc, _ := NewCompiler(o).Compile(device, nil)
		got, _, err := Encode(doc)
		if err != nil || string(got) != string(want) {
			t.Fatalf("the order %v gives other bytes", o)
		}
	}
}

// What the controller takes, a device can compile.
func TestRoutesSatisfyPolicy(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := drawObject(t)
		if o.Route == nil {
			t.Skip("a deployment")
		}
		model := o.Route.Targets[0].Model
		doc, _ := NewCompiler(Objects{
			Deployments: []Deployment{{Name: "d", Model: model, Version: 1}}, Versions: []Version{{Model: model, Version: 1}}, Routes: []Route{*o.Route},
		}).Compile(Device{Name: "d"}, nil)
		if _, err := policy.Compile(doc.Routes[0]); err != nil {
			t.Fatal(err)
		}
	})
}

func TestFindConflict(t *testing.T) {
	all := objects().Deployments
	devices := []Device{{Name: "y", Labels: map[string]string{"site": "demo"}}, {Name: "x", Labels: map[string]string{"site": "demo"}}, {Name: "n", Labels: nil}}
	if c, ok := FindConflict(all[1], all, devices); !ok || c != (Conflict{"x", "digits", "z", "a"}) {
		t.Errorf("got %v, %v", c, ok)
	}
	if c, ok := FindConflict(all[0], all, devices); ok {
		t.Errorf("got %v of different models", c)
	}
	if c, ok := FindConflict(all[1], all, devices[2:]); ok {
		t.Errorf("got %v of a device that only one matches", c)
	}
}

func TestCheckLabels(t *testing.T) {
	for _, good := range []map[string]string{nil, {"a": ""}, {"Site/a-b.c_d": "X1"}, {strings.Repeat("k", 63): strings.Repeat("v", 63)}} {
		if err := CheckLabels(good); err != nil {
			t.Errorf("%v: %v", good, err)
		}
	}
	for _, bad := range []map[string]string{{"": "a"}, {"-a": "b"}, {"a": "b "}, {"a\n": "b"}, {strings.Repeat("k", 64): ""}, {"k": strings.Repeat("v", 64)}} {
		if err := CheckLabels(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
