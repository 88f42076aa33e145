package telemetrytest

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestPage(t *testing.T) {
	const page = "# Metrics\n\n## One\n\nText.\n\n| metric | old |\n| --- |\n| `dunlin_gone` |\n\n## Two\n\n| metric |\n"
	r := prometheus.NewRegistry()
	asked := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "dunlin_asked_bytes_total", Help: `What is "asked" | for.`}, []string{"by", "of"})
	r.MustRegister(asked, prometheus.NewGauge(prometheus.GaugeOpts{Name: "dunlin_on", Help: "1 while it is on."}), prometheus.NewGauge(prometheus.GaugeOpts{Name: "go_not_ours"}))
	if _, err := Exported(r, nil); err == nil || !strings.Contains(err.Error(), "dunlin_asked_bytes_total is described and not collected") {
		t.Errorf("a type that is not known: %v", err)
	}
	metrics, err := Exported(r, map[string]string{"dunlin_asked_bytes_total": "counter"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := rewrite(page, "One", metrics)
	const want = "# Metrics\n\n## One\n\nText.\n\n| metric | type | labels | unit | is |\n| --- | --- | --- | --- | --- |\n" +
		"| `dunlin_asked_bytes_total` | counter | `by`, `of` | bytes | What is \"asked\" \\| for. |\n| `dunlin_on` | gauge |  | 0 or 1 | 1 while it is on. |\n\n## Two\n\n| metric |\n"
	if got != want || err != nil {
		t.Errorf("%v\n%s", err, got)
	}
	if again, err := rewrite(got, "One", metrics); again != want || err != nil {
		t.Errorf("written again: %v\n%s", err, again)
	}
	if _, err := rewrite(page, "Three", metrics); err == nil {
		t.Error("a heading that is not there")
	}
	if last, err := rewrite(got, "Two", metrics[:1]); err != nil || !strings.HasSuffix(last, "for. |\n") {
		t.Errorf("the last table: %v\n%s", err, last)
	}
	asked.WithLabelValues("a", "b")
	if _, err := Exported(r, map[string]string{"dunlin_asked_bytes_total": "counter"}); err == nil {
		t.Error("a type is said that is collected")
	}
}
