package simfleet

import (
	"flag"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dunlin/dunlin/internal/telemetry/telemetrytest"
)

var updatePage = flag.Bool("update", false, "write the simulated devices' part of docs/metrics.md")

// TestMetricsPage holds docs/metrics.md to what a simulated fleet exports;
// -update writes it.
func TestMetricsPage(t *testing.T) {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{&Fleet{}})
	metrics, err := telemetrytest.Exported(r, nil)
	if err != nil {
		t.Error(err)
	}
	telemetrytest.Check(t, "../../docs/metrics.md", "Simulated devices", metrics, *updatePage)
}
