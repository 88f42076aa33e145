package agent

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/serve"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/internal/telemetry"
)

// metrics shows the figures of the host, and more, for Prometheus. They are
// put together when they are asked for first: most devices are never asked.
func (h *host) metrics(l *ports, more ...prometheus.Collector) http.Handler {
	handler := sync.OnceValue(func() http.Handler { return telemetry.Handler(h.registry(l, more...)) })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler().ServeHTTP(w, r) })
}

// registry gives everything that the host exports, and more.
func (h *host) registry(l *ports, more ...prometheus.Collector) *prometheus.Registry {
	r := telemetry.NewMetrics()
	r.MustRegister(more...)
	if l.access != nil {
		r.MustRegister(l.access)
	}
	r.MustRegister(versionMetrics{h.engine}, ruleMetrics{h.front}, machineMetrics{h.serving.machine}, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dunlin_weight_pools", Help: "1 while weights leave and come back in place, in pools of device memory.",
	}, h.pooled))
	return r
}

// pooled is 1 while weights are in pools.
func (h *host) pooled() float64 {
	now, cancel := context.WithCancel(context.Background())
	cancel() // a child that is not ready is not waited for
	if h.pooling(now).Pooling.Works {
		return 1
	}
	return 0
}

// metrics adds those of the link to a host's.
func (a *agent) metrics(l *ports) http.Handler { return a.host.metrics(l, a.collectors()...) }

// collectors gives what an agent exports that follows a controller, and one
// that serves alone does not.
func (a *agent) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		a.watch,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "dunlin_agent_certificate_expiry_seconds", Help: "End of the device's certificate, in seconds since 1970; 0 until it has one.",
		}, func() float64 {
			if c := a.follow.Identity.Certificate(); c != nil {
				return float64(c.NotAfter.Unix())
			}
			return 0
		}),
		linkStates{a},
		a.linkCounter("dunlin_agent_malformed_total", "Messages of the controller that were dropped because they are malformed.", (*link.Link).Malformed),
		a.linkCounter("dunlin_agent_dropped_total", "Messages of the controller that were dropped because too many waited.", (*link.Link).Dropped),
	}
}

// linkStates exports how the link is.
type linkStates struct{ *agent }

var linkStateNow = prometheus.NewDesc("dunlin_agent_link_state", "1 for the state that the connection to the broker is in.", []string{"state"}, nil)

// Describe implements prometheus.Collector.
func (s linkStates) Describe(ch chan<- *prometheus.Desc) { ch <- linkStateNow }

// Collect implements prometheus.Collector.
func (s linkStates) Collect(ch chan<- prometheus.Metric) {
	l := s.follow.Link()
	if l == nil {
		return
	}
	now, _ := l.State()
	for _, state := range link.States {
		v := 0.0
		if state == now {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(linkStateNow, prometheus.GaugeValue, v, state.String())
	}
}

// linkCounter exports a count of the link, 0 until the device has joined.
func (a *agent) linkCounter(name, help string, count func(*link.Link) uint64) prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 {
		l := a.follow.Link()
		if l == nil {
			return 0
		}
		return float64(count(l))
	})
}

// metric describes a figure of a version.
func metric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, append([]string{"model", "version"}, labels...), nil)
}

// What is exported of each loaded version, since it was loaded: in base
// units, and under the names, and in the units, that dashboards for Triton
// read.
var (
	requestsTotal  = metric("dunlin_requests_total", "Requests that were answered, by outcome.", "outcome")
	requestSeconds = metric("dunlin_request_seconds", "Time from arrival to answer of each successful request.")
	queueSeconds   = metric("dunlin_queue_seconds", "Time in the queue of each request that ran.")
	runRows        = metric("dunlin_run_rows", "Rows of each run.")
	computeSeconds = metric("dunlin_compute_seconds_total", "Time of the requests that ran: until the run began (input), of it (infer), and after it (output).", "stage")
	queueLength    = metric("dunlin_queue_length", "Requests that wait.")
	runningNow     = metric("dunlin_requests_running", "Requests that run.")

	residentNow       = metric("dunlin_model_resident", "1 while the version's weights are in memory.")
	memoryBytes       = metric("dunlin_model_memory_bytes", "What the version takes of the memory for models, by kind: held now; and what it needs of weights, session, prepacked, workspace_per_row.", "kind")
	activationsTotal  = metric("dunlin_model_activations_total", "How often the version's weights came into memory, by reason.", "reason")
	activationSeconds = metric("dunlin_model_activation_seconds", "How long that took.")
	evictionsTotal    = metric("dunlin_model_evictions_total", "How often the version's weights left the memory, by reason.", "reason")
	swappedBytes      = metric("dunlin_model_swapped_bytes_total", "Bytes that came into memory (in) and left it (out).", "direction")
	activationsFailed = metric("dunlin_model_activations_failed_total", "How often the weights could not be brought in.")
	dataPSI           = metric("dunlin_model_data_psi", "Population stability index of the last requests and answers to their reference, of the figure that differs most; 0 where none differs by a tenth.")
	memoryBudget      = prometheus.NewDesc("dunlin_memory_budget_bytes", "What models may take of the memory.", nil, nil)
	memoryUsed        = prometheus.NewDesc("dunlin_memory_used_bytes", "What models take of it, with the workspace of what runs.", nil, nil)

	nvSuccess  = metric("nv_inference_request_success", "Successful requests.")
	nvFailure  = metric("nv_inference_request_failure", "Failed requests, by reason.", "reason")
	nvCount    = metric("nv_inference_count", "Rows that ran.")
	nvExec     = metric("nv_inference_exec_count", "Runs.")
	nvPending  = metric("nv_inference_pending_request_count", "Requests that wait.")
	nvRequest  = metric("nv_inference_request_duration_us", "Time from arrival to answer of all successful requests together, in microseconds.")
	nvQueue    = metric("nv_inference_queue_duration_us", "Time in the queue, in microseconds.")
	nvInput    = metric("nv_inference_compute_input_duration_us", "Time until the runs began, in microseconds.")
	nvInfer    = metric("nv_inference_compute_infer_duration_us", "Time of the runs, in microseconds.")
	nvOutput   = metric("nv_inference_compute_output_duration_us", "Time after the runs, in microseconds.")
	allMetrics = []*prometheus.Desc{
		requestsTotal, requestSeconds, queueSeconds, runRows, computeSeconds, queueLength, runningNow,
		residentNow, memoryBytes, activationsTotal, activationSeconds, evictionsTotal, swappedBytes, activationsFailed, dataPSI, memoryBudget, memoryUsed,
		nvSuccess, nvFailure, nvCount, nvExec, nvPending, nvRequest, nvQueue, nvInput, nvInfer, nvOutput,
	}
)

// What is exported of each rule of a route; "default" is the rule of requests
// that no other matches.
var (
	routeRequests  = prometheus.NewDesc("dunlin_route_requests_total", "Requests to a route by the rule that decided and the target that it chose, also those that failed there.", []string{"route", "rule", "target"}, nil)
	routeFallbacks = prometheus.NewDesc("dunlin_route_fallbacks_total", "Requests that were sent on to a fallback, also those that failed there, by the reason for which the one before did not answer.", []string{"route", "rule", "target", "reason"}, nil)
	routeFaults    = prometheus.NewDesc("dunlin_route_match_faults_total", "Requests for which the match of a rule could not be evaluated, and so did not match.", []string{"route", "rule"}, nil)
)

var routeCascades = prometheus.NewDesc("dunlin_route_cascade_requests_total", "Answers of targets that a cascade has looked at, by what came of it: the small model's stands, the large one has answered, it has failed, or the expression could not be evaluated.", []string{"route", "rule", "target", "outcome"}, nil)

func collectCascade(ch chan<- prometheus.Metric, route, rule string, f *serve.CascadeFigures) {
	for outcome, n := range f.Requests {
		ch <- prometheus.MustNewConstMetric(routeCascades, prometheus.CounterValue, float64(n), route, rule, f.Target.String(), serve.CascadeOutcome(outcome).String())
	}
}

// What is exported of each shadow.
var (
	shadowLabels   = []string{"route", "rule", "target"}
	shadowRequests = prometheus.NewDesc("dunlin_route_shadow_requests_total", "Requests that a shadow was to run, by what came of it.", append(shadowLabels, "outcome"), nil)
	shadowAgreed   = prometheus.NewDesc("dunlin_route_shadow_agreed_total", "Of the requests that were compared, those in which the shadow agrees with the answer.", shadowLabels, nil)
	shadowDistance = prometheus.NewDesc("dunlin_route_shadow_distance_max", "Largest difference of two numbers in a shadow's outputs and an answer.", shadowLabels, nil)
	shadowSeconds  = prometheus.NewDesc("dunlin_route_shadow_run_seconds_total", "Time of the runs that were compared: of the answer's, and of the shadow's.", append(shadowLabels, "of"), nil)
)

func collectShadow(ch chan<- prometheus.Metric, route, rule string, f *serve.ShadowFigures) {
	labels := []string{route, rule, f.Target.String()}
	counter := func(d *prometheus.Desc, value float64, more ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, value, append(slices.Clip(labels), more...)...)
	}
	counter(shadowRequests, float64(f.Compared), "compared")
	counter(shadowRequests, float64(f.Incomparable), "incomparable")
	counter(shadowRequests, float64(f.Failed), "failed")
	counter(shadowRequests, float64(f.Shed), "shed")
	counter(shadowAgreed, float64(f.Agreed))
	ch <- prometheus.MustNewConstMetric(shadowDistance, prometheus.GaugeValue, f.Distance, labels...)
	counter(shadowSeconds, f.AnswerRun.Seconds(), "answer")
	counter(shadowSeconds, f.ShadowRun.Seconds(), "shadow")
}

// ruleMetrics collects the figures of the rules of routes.
type ruleMetrics struct{ front *serve.Server }

// Describe implements prometheus.Collector.
func (ruleMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- routeRequests
	ch <- routeFaults
	ch <- routeFallbacks
	ch <- routeCascades
	ch <- shadowRequests
	ch <- shadowAgreed
	ch <- shadowDistance
	ch <- shadowSeconds
}

// Collect implements prometheus.Collector.
func (m ruleMetrics) Collect(ch chan<- prometheus.Metric) {
	for _, r := range m.front.Rules() {
		for _, t := range r.Targets {
			ch <- prometheus.MustNewConstMetric(routeRequests, prometheus.CounterValue, float64(t.Requests), r.Route, r.Rule, t.Target.String())
		}
		for _, f := range r.Fallbacks {
			for why := range policy.Reasons {
				if f.Takes(why) {
					ch <- prometheus.MustNewConstMetric(routeFallbacks, prometheus.CounterValue, float64(f.Requests[why]), r.Route, r.Rule, f.Target.String(), why.String())
				}
			}
		}
		if r.Cascade != nil {
			collectCascade(ch, r.Route, r.Rule, r.Cascade)
		}
		if r.Shadow != nil {
			collectShadow(ch, r.Route, r.Rule, r.Shadow)
		}
		if r.Rule != policy.DefaultRule {
			ch <- prometheus.MustNewConstMetric(routeFaults, prometheus.CounterValue, float64(r.Faults), r.Route, r.Rule)
		}
	}
}

// versionMetrics collects the figures of the loaded versions.
type versionMetrics struct{ engine *engine.Engine }

// Describe implements prometheus.Collector.
func (versionMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range allMetrics {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m versionMetrics) Collect(ch chan<- prometheus.Metric) {
	memory := m.engine.Memory()
	ch <- prometheus.MustNewConstMetric(memoryBudget, prometheus.GaugeValue, float64(memory.Budget))
	ch <- prometheus.MustNewConstMetric(memoryUsed, prometheus.GaugeValue, float64(memory.Used))
	for _, v := range m.engine.Versions() {
		f := &v.Figures
		version := []string{v.ID.Model, strconv.FormatInt(v.ID.Version, 10)}
		send := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, kind, value, append(version[:2:2], labels...)...)
		}
		count := func(d *prometheus.Desc, value uint64, labels ...string) {
			send(d, prometheus.CounterValue, float64(value), labels...)
		}
		for outcome, n := range map[string]uint64{
			"success": f.Success.Count, "failure": f.Failure.Count, "overloaded": f.Overloaded, "expired": f.Expired, "refused": f.Refused, "cancelled": f.Cancelled,
		} {
			count(requestsTotal, n, outcome)
		}
		for stage, t := range map[string]engine.Total{"input": f.Input, "infer": f.Infer, "output": f.Output} {
			send(computeSeconds, prometheus.CounterValue, t.Time.Seconds(), stage)
		}
		ch <- histogram(requestSeconds, f.Request, version)
		ch <- histogram(queueSeconds, f.Wait, version)
		ch <- histogram(runRows, f.Size, version)
		swaps := &v.Swaps
		resident := 0.0
		if v.Residency == "resident" {
			resident = 1
		}
		send(residentNow, prometheus.GaugeValue, resident)
		for kind, n := range map[string]int64{
			"held": v.Bytes, "weights": v.Need.Weights, "session": v.Need.Session, "prepacked": v.Need.Prepacked, "workspace_per_row": v.Need.Workspace,
		} {
			send(memoryBytes, prometheus.GaugeValue, float64(n), kind)
		}
		for reason, t := range swaps.In {
			count(activationsTotal, t.Count, string(reason))
		}
		for reason, n := range swaps.Out {
			count(evictionsTotal, n, string(reason))
		}
		ch <- histogram(activationSeconds, swaps.Times, version)
		count(swappedBytes, swaps.BytesIn, "in")
		count(swappedBytes, swaps.BytesOut, "out")
		count(activationsFailed, swaps.Failed)
		if v.Data.Looks > 0 {
			send(dataPSI, prometheus.GaugeValue, v.Data.Now.PSI)
		}
		send(queueLength, prometheus.GaugeValue, float64(v.Queued))
		send(runningNow, prometheus.GaugeValue, float64(v.Running))

		count(nvSuccess, f.Success.Count)
		for reason, n := range map[string]uint64{
			"BACKEND": f.Failure.Count, "REJECTED": f.Overloaded + f.Expired + f.Refused, "CANCELED": f.Cancelled, "OTHER": 0,
		} {
			count(nvFailure, n, reason)
		}
		count(nvCount, f.Inferences)
		count(nvExec, f.Executions)
		send(nvPending, prometheus.GaugeValue, float64(v.Queued))
		for d, t := range map[*prometheus.Desc]engine.Total{nvRequest: f.Success, nvQueue: f.Queue, nvInput: f.Input, nvInfer: f.Infer, nvOutput: f.Output} {
			count(d, uint64(t.Time.Microseconds()))
		}
	}
}

// histogram gives counts their cumulative form.
func histogram(d *prometheus.Desc, h engine.Histogram, labels []string) prometheus.Metric {
	var n uint64
	buckets := make(map[float64]uint64, len(h.Bounds))
	for i, bound := range h.Bounds {
		n += h.Counts[i]
		buckets[bound] = n
	}
	if len(h.Counts) > len(h.Bounds) {
		n += h.Counts[len(h.Bounds)]
	}
	return prometheus.MustNewConstHistogram(d, n, h.Sum, buckets, labels...)
}
