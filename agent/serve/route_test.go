package serve

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/oip/rest"
	"github.com/dunlin/dunlin/internal/policy"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// words are Values in a map.
type words map[string]string

func (w words) Get(name string) (string, bool) { v, ok := w[name]; return v, ok }
func (w words) All() iter.Seq2[string, string] { return maps.All(w) }

// rule makes one whose targets are given as those of r.
func rule(name string, m *dunlinv1.RouteMatch, targets ...string) *dunlinv1.RouteRule {
	return &dunlinv1.RouteRule{Name: name, Match: m, Targets: r("", targets...).Targets}
}

func whenParameter(name string, values ...string) *dunlinv1.RouteMatch {
	return &dunlinv1.RouteMatch{Parameters: []*dunlinv1.RouteCondition{{Name: name, Values: values}}}
}

func when(expression string) *dunlinv1.RouteMatch { return &dunlinv1.RouteMatch{Cel: expression} }

// figuresOf writes the figures of all rules: "live/a digits:1=3 faults=1".
func figuresOf(s *Server) (all []string) {
	for _, f := range s.Rules() {
		var text strings.Builder
		text.WriteString(f.Route + "/" + f.Rule)
		for _, t := range f.Targets {
			fmt.Fprintf(&text, " %s:%d=%d", t.Model, t.Version, t.Requests)
		}
		if f.Faults > 0 {
			fmt.Fprintf(&text, " faults=%d", f.Faults)
		}
		all = append(all, text.String())
	}
	slices.Sort(all)
	return all
}

func TestRules(t *testing.T) {
	e := startEngine(t, adder{})
	celsius := 50.
	s := New(e, func() (float64, bool) { return celsius, celsius > 0 })
	for v := int64(1); v <= 6; v++ {
		load(t, e, "m", v)
	}
	s.SetServing(map[string]int64{"m": 1})
	live := r("live", "m")
	live.Rules = []*dunlinv1.RouteRule{
		rule("faulty", when(`request.parameters["gone"] == "x"`), "m:6"),
		rule("parameter", whenParameter("tier", "gold"), "m:2"),
		rule("header", &dunlinv1.RouteMatch{Headers: []*dunlinv1.RouteCondition{{Name: "x-env", Values: []string{"test"}}}}, "m:3"),
		rule("hot", when(`has(device.live.temperature_celsius) && device.live.temperature_celsius > 80.0 && device.live.queue_depth == 0 && device.live.predicted_wait_ms == 0.0 && !has(device.live.on_battery)`), "m:4"),
		rule("label", when(`device.labels["site"] == "demo" && size(request.inputs["x"]) == 1`), "m:5"),
	}
	steady := r("steady", "m:1=50", "m:2=50", "m:3=50")
	steady.Sticky = &dunlinv1.RouteSticky{Header: "x-user"}
	s.SetRoutes("inc/1", []*dunlinv1.DesiredRoute{live, steady}, map[string]string{"site": "demo"})
	ask := func(name string, parameters, headers words) oip.Answer {
		t.Helper()
		q := request(name, 0)
		if parameters != nil {
			q.Parameters = parameters
		}
		if headers != nil {
			q.Headers = headers
		}
		a, err := s.Infer(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for _, tt := range []struct {
		parameters, headers words
		celsius             float64
		rule                string
		version             int64
	}{
		{words{"tier": "gold"}, nil, 50, "parameter", 2},
		{words{"tier": "tin", "gone": "y"}, words{"x-env": "test"}, 50, "header", 3},
		{nil, nil, 90, "hot", 4},
		{nil, nil, 0, "label", 5},
		{words{"gone": "x"}, nil, 0, "faulty", 6},
	} {
		celsius = tt.celsius
		a := ask("live", tt.parameters, tt.headers)
		if a.Header[HeaderRule] != tt.rule || a.Version != tt.version || a.Header[HeaderGeneration] != "inc/1" {
			t.Errorf("%+v: answered by %s:%d, headers %v", tt, a.Model, a.Version, a.Header)
		}
	}
	first := ask("steady", nil, words{"x-user": "u"})
	for range 50 {
		if a := ask("steady", nil, words{"x-user": "u"}); a.Version != first.Version || a.Header[HeaderRule] != policy.DefaultRule {
			t.Fatalf("a key moved from version %d to %d, headers %v", first.Version, a.Version, a.Header)
		}
	}
	if a := ask("m", nil, nil); a.Header[HeaderRule] != "" {
		t.Errorf("no route was asked for: %v", a.Header)
	}
	want := []string{"live/default m:0=0", "live/faulty m:6=1 faults=3", "live/header m:3=1", "live/hot m:4=1", "live/label m:5=1", "live/parameter m:2=1"}
	if diff := cmp.Diff(want, figuresOf(s)[:6]); diff != "" {
		t.Error(diff)
	}
	// Where a rule and its target stay, so do their figures.
	live.Rules = live.Rules[:2]
	live.Rules[1].Targets = r("", "m:1=0", "m:2", "m:3=2").Targets
	s.SetRoutes("inc/2", []*dunlinv1.DesiredRoute{live}, nil)
	if a := ask("live", words{"gone": "x"}, nil); a.Header[HeaderGeneration] != "inc/2" {
		t.Errorf("headers %v", a.Header)
	}
	want = []string{"live/default m:0=0", "live/faulty m:6=2 faults=3", "live/parameter m:2=1 m:3=0"}
	if diff := cmp.Diff(want, figuresOf(s)); diff != "" {
		t.Error(diff)
	}
}

// The targets of rules are a route's as well: it is ready when they are there,
// and shows their versions and figures.
func TestTargetsOfRules(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	load(t, e, "m", 1)
	s.SetServing(map[string]int64{"m": 1})
	live := r("live", "m")
	live.Rules = []*dunlinv1.RouteRule{rule("a", whenParameter("p", "x"), "m:2", "n:7=0", "m")}
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
	if m, err := s.Model(t.Context(), "live", 0); err != nil || !strings.Contains(m.NotReady, "m:2: version is not loaded") {
		t.Errorf("%+v, %v", m, err)
	}
	if err := s.Ready(t.Context()); err == nil {
		t.Error("it is ready")
	}
	load(t, e, "m", 2)
	load(t, e, "m", 3)
	if m, err := s.Model(t.Context(), "live", 0); err != nil || !slices.Equal(m.Versions, []int64{1, 2}) {
		t.Errorf("%+v, %v", m, err)
	}
	if err := s.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	all, err := s.Statistics(t.Context(), "live", 0)
	if err != nil || len(all) != 2 || all[0].Version != "1" || all[1].Version != "2" {
		t.Errorf("%v, %v", all, err)
	}
}

// A route that this device cannot compile refuses its requests, and no other's.
func TestBrokenRule(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	load(t, e, "m", 1)
	s.SetServing(map[string]int64{"m": 1})
	broken := r("broken", "m")
	broken.Rules = []*dunlinv1.RouteRule{rule("a", when(`nobody`), "m:2")}
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("live", "m"), broken}, nil)
	if _, err := s.Infer(t.Context(), request("broken", 0)); codeOf(err) != oip.Unavailable || !strings.Contains(err.Error(), "rules[0].match.cel: column 1") {
		t.Error(err)
	}
	if _, err := s.Infer(t.Context(), request("live", 0)); err != nil {
		t.Error(err)
	}
	if got := figuresOf(s); !slices.Equal(got, []string{"live/default m:0=1"}) {
		t.Errorf("%q", got)
	}
}

func TestRulesOverHTTP(t *testing.T) {
	e := startEngine(t, adder{})
	s := New(e, nil)
	load(t, e, "m", 1)
	load(t, e, "m", 2)
	s.SetServing(map[string]int64{"m": 1})
	live := r("live", "m")
	live.Rules = []*dunlinv1.RouteRule{rule("gold", &dunlinv1.RouteMatch{
		Parameters: []*dunlinv1.RouteCondition{{Name: "tier", Values: []string{"1", "gold"}}}, Cel: `request.headers["x-user"].startsWith("u") && !("authorization" in request.headers)`,
	}, "m:2")}
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{live}, nil)
	h := rest.New(oip.New(oip.Config{Backend: s}))
	for body, want := range map[string]string{
		`{"parameters":{"tier":1},"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1]}]}`:      "gold",
		`{"parameters":{"tier":"gold"},"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1]}]}`: "gold",
		`{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1]}]}`:                              "default",
	} {
		w, q := httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/v2/models/live/infer", strings.NewReader(body))
		q.Header.Set("X-User", "u1")
		q.Header.Set("Authorization", "secret")
		if h.ServeHTTP(w, q); w.Code != http.StatusOK || w.Header().Get(HeaderRule) != want {
			t.Errorf("%s: status %d, headers %v, %s; want rule %s", body, w.Code, w.Header(), w.Body, want)
		}
	}
}

// Policies change 100 times under full load: no request fails, and each is
// decided by one generation, which its answer names and which was in force
// while it was on its way.
func TestPolicyChangesUnderLoad(t *testing.T) {
	const changes, callers = 100, 8
	e := startEngine(t, adder{})
	s := New(e, nil)
	for v := int64(1); v <= 3; v++ {
		load(t, e, "m", v)
	}
	s.SetServing(map[string]int64{"m": 1})
	// Of generation n, "even" and "odd" go to versions that follow from n, and
	// the rule names n as well.
	versions := func(n int64) (even, odd int64) { return 1 + n%3, 1 + (n+1)%3 }
	routes := func(n int64) []*dunlinv1.DesiredRoute {
		even, odd := versions(n)
		live := r("live", "m:3=0", "m:1")
		live.Rules = []*dunlinv1.RouteRule{
			rule(fmt.Sprintf("even-%d", n), whenParameter("p", "even"), fmt.Sprintf("m:%d", even)),
			rule(fmt.Sprintf("odd-%d", n), when(`request.parameters["p"] == "odd" && device.labels["n"] == "`+fmt.Sprint(n)+`"`), fmt.Sprintf("m:%d", odd)),
		}
		return []*dunlinv1.DesiredRoute{live}
	}
	var begun, done atomic.Int64 // generations
	change := func(n int64) {
		begun.Store(n)
		s.SetRoutes(fmt.Sprint(n), routes(n), map[string]string{"n": fmt.Sprint(n)})
		done.Store(n)
	}
	change(0)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	var answers, between atomic.Int64
	for caller := range callers {
		wg.Go(func() {
			for i := caller; ctx.Err() == nil; i++ {
				q := request("live", 0)
				key := []string{"even", "odd"}[i%2]
				q.Parameters = words{"p": key}
				from := done.Load()
				a, err := s.Infer(context.Background(), q)
				to := begun.Load()
				if err != nil {
					t.Error(err)
					return
				}
				var n int64
				fmt.Sscan(a.Header[HeaderGeneration], &n)
				even, odd := versions(n)
				want := map[string]int64{"even": even, "odd": odd}[key]
				if a.Header[HeaderRule] != fmt.Sprintf("%s-%d", key, n) || a.Version != want || a.Outputs[0].Data[0] != 10+byte(want) || n < from || n > to {
					t.Errorf("%s is answered by version %d, headers %v; generations %d to %d were in force", key, a.Version, a.Header, from, to)
					return
				}
				if answers.Add(1); from != to {
					between.Add(1)
				}
			}
		})
	}
	for n := int64(1); n <= changes; n++ {
		for before := answers.Load(); answers.Load() < before+callers && !t.Failed(); {
			runtime.Gosched()
		}
		change(n)
	}
	stop()
	wg.Wait()
	t.Logf("%d answers, %d of them during a change", answers.Load(), between.Load())
}

// Rules without an expression cost a request no allocation.
func TestResolveDoesNotAllocate(t *testing.T) {
	s := New(&leaving{then: func() {}}, nil)
	s.SetServing(map[string]int64{"digits": 1})
	live := r("live", "digits")
	for i := range 20 {
		live.Rules = append(live.Rules, rule(fmt.Sprintf("r%d", i), whenParameter("p", fmt.Sprint(i)), "digits"))
	}
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{live, r("weights", "digits=1", "digits:1=9")}, nil)
	table := s.table.Load()
	for _, name := range []string{"live", "weights"} {
		q := request(name, 0)
		q.Parameters = words{"p": "19"}
		if n := testing.AllocsPerRun(100, func() {
			var by choice
			if _, err := table.resolve(q, 1, &by); err != nil {
				t.Error(err)
			}
			by.count()
		}); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestLiveFigures(t *testing.T) {
	s := New(&leaving{then: func() {}}, func() (float64, bool) { return 41.5, true })
	want := policy.Figures{QueueDepth: policy.Figure{Value: 3, Known: true}, Temperature: policy.Figure{Value: 41.5, Known: true}}
	if got := s.figures(); got != want {
		t.Errorf("%+v", got)
	}
	if got := New(&leaving{}, nil).figures(); got.Temperature.Known {
		t.Errorf("%+v", got)
	}
}
