package controller

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/dunlin/dunlin/internal/telemetry"
	"github.com/dunlin/dunlin/internal/telemetry/telemetrytest"
)

var update = flag.Bool("update", false, "write the controller's part of docs/metrics.md")

// TestMetricsPage holds docs/metrics.md to what a controller exports; -update
// writes it.
func TestMetricsPage(t *testing.T) {
	hooks := filepath.Join(t.TempDir(), "webhooks.yaml")
	must(t, os.WriteFile(hooks, []byte("webhooks: [{name: pager, url: 'http://127.0.0.1:1/', secret: a secret of some length}]\n"), 0o600))
	registry := telemetry.NewMetrics()
	start(t, t.TempDir(), func(c *Config) { c.Webhooks, c.Metrics = hooks, registry })
	metrics, err := telemetrytest.Exported(registry, map[string]string{
		"dunlin_controller_malformed_total": "counter", // no device has sent anything
		"dunlin_controller_ignored_total":   "counter",
	})
	if err != nil {
		t.Error(err)
	}
	telemetrytest.Check(t, "../docs/metrics.md", "The controller", metrics, *update)
}
