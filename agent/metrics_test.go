package agent

import (
	"context"
	"flag"
	"log/slog"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dunlin/dunlin/agent/access"
	"github.com/dunlin/dunlin/agent/alarm"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/follow"
	"github.com/dunlin/dunlin/agent/identity"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/agent/serve"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/telemetry"
	"github.com/dunlin/dunlin/internal/telemetry/telemetrytest"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Requests to a route are counted by rule and target, and faults of its matches.
func TestRuleMetrics(t *testing.T) {
	front := serve.New(engine.New(engine.Config{}), nil)
	front.SetServing(map[string]int64{"m": 1})
	front.SetRoutes("g", []*dunlinv1.DesiredRoute{{
		Name: "live", Targets: []*dunlinv1.RouteTarget{{Model: "m", Weight: 1}},
		Fallback: []*dunlinv1.RouteFallback{{Model: "n", Version: 3, On: []string{"overload", "error"}}},
		Shadow:   &dunlinv1.RouteShadow{Model: "n", Rate: 1},
		Cascade:  &dunlinv1.RouteCascade{Model: "n", Version: 4, When: "max(output) < 0.5"},
		Rules: []*dunlinv1.RouteRule{{
			Name: "gold", Match: &dunlinv1.RouteMatch{Cel: `device.labels["tier"] == "gold"`},
			Targets: []*dunlinv1.RouteTarget{{Model: "m", Version: 2, Weight: 1}, {Model: "m", Version: 3}},
		}},
	}}, nil)
	for range 2 {
		if _, err := front.Infer(t.Context(), oip.Call{Model: "live"}); err == nil {
			t.Error("a version answers that is not loaded")
		}
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(ruleMetrics{front})
	answer := httptest.NewRecorder()
	telemetry.Handler(r).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	const want = `# HELP dunlin_route_cascade_requests_total Answers of targets that a cascade has looked at, by what came of it: the small model's stands, the large one has answered, it has failed, or the expression could not be evaluated.
# TYPE dunlin_route_cascade_requests_total counter
dunlin_route_cascade_requests_total{outcome="failed",route="live",rule="default",target="n:4"} 0
dunlin_route_cascade_requests_total{outcome="fault",route="live",rule="default",target="n:4"} 0
dunlin_route_cascade_requests_total{outcome="large",route="live",rule="default",target="n:4"} 0
dunlin_route_cascade_requests_total{outcome="small",route="live",rule="default",target="n:4"} 0
# HELP dunlin_route_fallbacks_total Requests that were sent on to a fallback, also those that failed there, by the reason for which the one before did not answer.
# TYPE dunlin_route_fallbacks_total counter
dunlin_route_fallbacks_total{reason="error",route="live",rule="default",target="n:3"} 2
dunlin_route_fallbacks_total{reason="overload",route="live",rule="default",target="n:3"} 0
# HELP dunlin_route_match_faults_total Requests for which the match of a rule could not be evaluated, and so did not match.
# TYPE dunlin_route_match_faults_total counter
dunlin_route_match_faults_total{route="live",rule="gold"} 2
# HELP dunlin_route_requests_total Requests to a route by the rule that decided and the target that it chose, also those that failed there.
# TYPE dunlin_route_requests_total counter
dunlin_route_requests_total{route="live",rule="default",target="m"} 2
dunlin_route_requests_total{route="live",rule="gold",target="m:2"} 0
# HELP dunlin_route_shadow_agreed_total Of the requests that were compared, those in which the shadow agrees with the answer.
# TYPE dunlin_route_shadow_agreed_total counter
dunlin_route_shadow_agreed_total{route="live",rule="default",target="n"} 0
# HELP dunlin_route_shadow_distance_max Largest difference of two numbers in a shadow's outputs and an answer.
# TYPE dunlin_route_shadow_distance_max gauge
dunlin_route_shadow_distance_max{route="live",rule="default",target="n"} 0
# HELP dunlin_route_shadow_requests_total Requests that a shadow was to run, by what came of it.
# TYPE dunlin_route_shadow_requests_total counter
dunlin_route_shadow_requests_total{outcome="compared",route="live",rule="default",target="n"} 0
dunlin_route_shadow_requests_total{outcome="failed",route="live",rule="default",target="n"} 0
dunlin_route_shadow_requests_total{outcome="incomparable",route="live",rule="default",target="n"} 0
dunlin_route_shadow_requests_total{outcome="shed",route="live",rule="default",target="n"} 0
# HELP dunlin_route_shadow_run_seconds_total Time of the runs that were compared: of the answer's, and of the shadow's.
# TYPE dunlin_route_shadow_run_seconds_total counter
dunlin_route_shadow_run_seconds_total{of="answer",route="live",rule="default",target="n"} 0
dunlin_route_shadow_run_seconds_total{of="shadow",route="live",rule="default",target="n"} 0
`
	if diff := cmp.Diff(want, answer.Body.String()); diff != "" {
		t.Error(diff)
	}
}

var updatePage = flag.Bool("update", false, "write the agent's part of docs/metrics.md")

// filled gives a message all of whose scalar fields are there.
func filled[M proto.Message](m M) M {
	r := m.ProtoReflect()
	fields := r.Descriptor().Fields()
	for i := range fields.Len() {
		switch f := fields.Get(i); {
		case f.IsList() || f.Kind() == protoreflect.MessageKind:
		case f.Kind() == protoreflect.BoolKind:
			r.Set(f, protoreflect.ValueOfBool(true))
		case f.Kind() == protoreflect.DoubleKind:
			r.Set(f, protoreflect.ValueOfFloat64(1))
		case f.Kind() == protoreflect.Uint32Kind:
			r.Set(f, protoreflect.ValueOfUint32(1))
		case f.Kind() == protoreflect.Uint64Kind:
			r.Set(f, protoreflect.ValueOfUint64(1))
		}
	}
	return m
}

// TestMetricsPage holds docs/metrics.md to what an agent exports; -update
// writes it.
func TestMetricsPage(t *testing.T) {
	gpu := filled(&dunlinv1.GpuTelemetry{ThrottleReasons: []string{"sw_thermal"}, Processes: []*dunlinv1.GpuProcess{{Pid: 1}}})
	sample := filled(&dunlinv1.Telemetry{Gpus: []*dunlinv1.GpuTelemetry{gpu}, Temperatures: []*dunlinv1.Temperature{{Sensor: "cpu"}}})
	e := engine.New(engine.Config{Runtime: loader{}})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	defer func() { stop(); <-done }()
	if _, err := e.Load(t.Context(), engine.Spec{ID: engine.VersionID{Model: "m", Version: 1}}); err != nil {
		t.Fatal(err)
	}
	front := serve.New(e, nil)
	front.SetServing(map[string]int64{"m": 1})
	front.SetRoutes("g", []*dunlinv1.DesiredRoute{{
		Name: "live", Targets: []*dunlinv1.RouteTarget{{Model: "m", Weight: 1}},
		Fallback: []*dunlinv1.RouteFallback{{Model: "n"}}, Shadow: &dunlinv1.RouteShadow{Model: "n", Rate: 1},
		Cascade: &dunlinv1.RouteCascade{Model: "n", When: "max(output) < 0.5"},
		Rules:   []*dunlinv1.RouteRule{{Name: "gold", Match: &dunlinv1.RouteMatch{Cel: "true"}, Targets: []*dunlinv1.RouteTarget{{Model: "m", Weight: 1}}}},
	}}, nil)
	guard, err := access.New(access.Config{})
	if err != nil {
		t.Fatal(err)
	}
	h := &host{engine: e, front: front, serving: Serving{machine: still{sample: sample}}}
	a := &agent{host: h, follow: &follow.Follower{Identity: identity.New(identity.Config{})}, watch: &watch{alarms: []*dunlinv1.Alarm{{Kind: alarm.Power}}}}
	metrics, err := telemetrytest.Exported(h.registry(&ports{access: guard}, a.collectors()...), map[string]string{
		"dunlin_access_requests_total": "counter", // nobody has asked
		"dunlin_agent_link_state":      "gauge",   // it has not joined
		"dunlin_model_data_psi":        "gauge",   // nothing was looked at
		"dunlin_model_evictions_total": "counter", // nothing had to go
	})
	if err != nil {
		t.Error(err)
	}
	telemetrytest.Check(t, "../docs/metrics.md", "The agent", metrics, *updatePage)
}

// Rules know the temperature of the hottest sensor in the newest sample.
func TestHeat(t *testing.T) {
	h := &host{engine: engine.New(engine.Config{}), serving: Serving{Log: slog.New(slog.NewTextHandler(t.Output(), nil))}}
	if c, known := h.heat(); known {
		t.Errorf("%v degrees before anybody looked", c)
	}
	m := &still{sample: &dunlinv1.Telemetry{}}
	w := h.newWatch(m, profiles.Profile{}, nil)
	for _, tt := range []struct {
		sample  *dunlinv1.Telemetry
		celsius float64
		known   bool
	}{
		{&dunlinv1.Telemetry{}, 0, false},
		{&dunlinv1.Telemetry{Gpus: []*dunlinv1.GpuTelemetry{{}}}, 0, false},
		{&dunlinv1.Telemetry{Temperatures: []*dunlinv1.Temperature{{Celsius: -20}, {Celsius: -5}, {Celsius: -7}}}, -5, true},
		{&dunlinv1.Telemetry{Temperatures: []*dunlinv1.Temperature{{Celsius: 40}}, Gpus: []*dunlinv1.GpuTelemetry{{Celsius: new(50.0), MemoryCelsius: new(60.5)}}}, 60.5, true},
		{&dunlinv1.Telemetry{}, 0, false},
	} {
		m.sample = tt.sample
		w.look(t.Context(), 0)
		if c, known := h.heat(); c != tt.celsius || known != tt.known {
			t.Errorf("%v: %v, %v", tt.sample, c, known)
		}
	}
}
