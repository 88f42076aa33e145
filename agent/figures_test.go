package agent

import (
	"net"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Of a simulated device whose script makes version 2 worse, the figures under a
// lease say so, and they end with the lease.
func TestTelemetryLease(t *testing.T) {
	c := startControl(t)
	cfg := simulatedConfig(t, c, `- {at: 0s, confidence: 0.9}
- {at: 0s, version: "digits:2", failing_fraction: 0.1, confidence: 0.4, slow_factor: 4}`)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = l.Addr().String()
	l.Close()
	startAgent(t, cfg)
	c.until("says hello", func(m proto.Message) bool { _, ok := m.(*dunlinv1.Hello); return ok })
	ask := func(times int) (failed int) {
		for range times {
			if _, err := classify("http://"+cfg.Listen, "digits"); err != nil {
				failed++
			}
		}
		return failed
	}
	c.send("edge-1", link.Desired, desired(t, 1, nil, c.push(digits+"v1.onnx", "digits", 1)))
	c.until("serves version 1", serves("digits", 1))
	if ask(20) != 0 {
		t.Error("version 1 fails")
	}
	boot := ""
	for range len(c.samples) {
		s := <-c.samples
		if boot = s.BootId; boot == "" || len(s.Models) > 0 && s.Models[0].Figures != nil {
			t.Errorf("without a lease: %v", s)
		}
	}
	c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_TelemetryLease{TelemetryLease: &dunlinv1.TelemetryLease{EveryMs: 1000, ForMs: 600_000}}})
	deadline := time.After(patience)
	// figures waits for those of a version with so many requests.
	figures := func(version int64, requests uint64) *dunlinv1.ModelTelemetry {
		for {
			select {
			case s := <-c.samples:
				for _, m := range s.Models {
					if m.Version == version && m.Succeeded+m.Failed >= requests && m.Figures != nil && s.BootId == boot {
						return m
					}
				}
			case <-deadline:
				t.Fatalf("no figures of version %d", version)
			}
		}
	}
	one := figures(1, 20)
	c.send("edge-1", link.Desired, desired(t, 2, nil, c.push(digits+"v2.onnx", "digits", 2)))
	c.until("serves version 2", serves("digits", 2))
	const asked = 30
	failed := ask(asked)
	two := figures(2, asked)
	mean := func(m *dunlinv1.ModelTelemetry) float64 {
		counts := sketch.Confidence.FromProto(m.Figures.Confidence)
		sum := 0.
		for i, n := range counts {
			sum += (float64(i) + .5) / 20 * float64(n)
		}
		return sum / float64(counts.Sum())
	}
	latency := sketch.Latency.FromProto(two.Figures.Latency)
	if one.Succeeded != 20 || one.Figures.Rows != 20 || mean(one) < .8 || mean(two) > .55 || failed != 0 || two.Failed == 0 || latency.Sum() != two.Succeeded {
		t.Errorf("%d of %d failed; confidence %v and %v\n%v\n%v", failed, asked, mean(one), mean(two), one, two)
	}
	if again := figures(1, 20); again.Succeeded != 20+two.Failed { // it stood by
		t.Errorf("version 1: %v", again)
	}
	c.send("edge-1", link.Command, &dunlinv1.Command{Command: &dunlinv1.Command_TelemetryLease{TelemetryLease: &dunlinv1.TelemetryLease{EveryMs: 1000}}})
}
