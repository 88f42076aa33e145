package agent

import (
	"net/http"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/internal/telemetry"
)

// handler answers inference, and /healthz and /metrics beside it.
func (a *agent) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", oip.New(oip.Config{Backend: backend{a.front, a}, Version: program.Version()}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("ok\n"))
	})
	metrics := sync.OnceValue(func() http.Handler {
		r := telemetry.NewMetrics()
		r.MustRegister(engineMetrics{a.engine},
			a.linkCounter("dunlin_agent_malformed_total", "Messages of the controller that were dropped because they are malformed.", (*link.Link).Malformed),
			a.linkCounter("dunlin_agent_dropped_total", "Messages of the controller that were dropped because too many waited.", (*link.Link).Dropped))
		return telemetry.Handler(r)
	})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) { metrics().ServeHTTP(w, r) })
	return mux
}

// linkCounter exports a count of the link, 0 until the device has joined.
func (a *agent) linkCounter(name, help string, count func(*link.Link) uint64) prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 {
		a.mu.Lock()
		l := a.link
		a.mu.Unlock()
		if l == nil {
			return 0
		}
		return float64(count(l))
	})
}

var (
	requestsTotal = prometheus.NewDesc("dunlin_requests_total", "Requests that a version has run.", []string{"model", "version", "outcome"}, nil)
	runSeconds    = prometheus.NewDesc("dunlin_run_seconds_total", "Time that a version has run for.", []string{"model", "version"}, nil)
	queued        = prometheus.NewDesc("dunlin_queue_length", "Requests that wait for a version.", []string{"model", "version"}, nil)
)

// engineMetrics collects the figures of the loaded versions.
type engineMetrics struct{ engine *engine.Engine }

// Describe implements prometheus.Collector.
func (m engineMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- requestsTotal
	ch <- runSeconds
	ch <- queued
}

// Collect implements prometheus.Collector.
func (m engineMetrics) Collect(ch chan<- prometheus.Metric) {
	for _, v := range m.engine.Versions() {
		labels := []string{v.ID.Model, strconv.FormatInt(v.ID.Version, 10)}
		ch <- prometheus.MustNewConstMetric(requestsTotal, prometheus.CounterValue, float64(v.Succeeded), append(labels, "success")...)
		ch <- prometheus.MustNewConstMetric(requestsTotal, prometheus.CounterValue, float64(v.Failed), append(labels, "failure")...)
		ch <- prometheus.MustNewConstMetric(runSeconds, prometheus.CounterValue, v.RunTime.Seconds(), labels...)
		ch <- prometheus.MustNewConstMetric(queued, prometheus.GaugeValue, float64(v.Queued), labels...)
	}
}
