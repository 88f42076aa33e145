package follow

import (
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestTraffic(t *testing.T) {
	// So many requests of each of some classes of durations.
	status := func(succeeded, failed uint64, classes map[int]uint64) []engine.Status {
		v := engine.Status{ID: engine.VersionID{Model: "m", Version: 1}, Figures: engine.Figures{Success: engine.Total{Count: succeeded}, Failure: engine.Total{Count: failed}}}
		for class, n := range classes {
			v.Figures.Took[class] = n
		}
		return []engine.Status{v}
	}
	var r traffic
	at := time.Unix(1000, 0)
	see := func(seconds int, versions []engine.Status) *dunlinv1.Telemetry {
		at = at.Add(time.Duration(seconds) * time.Second)
		t := &dunlinv1.Telemetry{}
		r.fill(t, at, versions)
		return t
	}
	if got := see(0, status(5, 0, map[int]uint64{10: 5})); got.RequestsPerSecond != nil || got.RequestP99Seconds != nil {
		t.Errorf("the first: %v", got)
	}
	var slow engine.Durations
	slow[40] = 100
	got := see(10, status(105, 10, map[int]uint64{10: 5, 40: 100}))
	if got.GetRequestsPerSecond() != 11 || got.GetFailuresPerSecond() != 1 || got.GetRequestP99Seconds() != slow.Quantile(0.99).Seconds() {
		t.Errorf("requests: %v", got)
	}
	if got := see(10, status(105, 10, map[int]uint64{10: 5, 40: 100})); got.RequestsPerSecond == nil || *got.RequestsPerSecond != 0 || got.RequestP99Seconds != nil {
		t.Errorf("without any: %v", got)
	}
	if got := see(10, status(20, 0, map[int]uint64{40: 20})); got.GetRequestsPerSecond() != 2 || got.GetRequestP99Seconds() == 0 {
		t.Errorf("loaded again: %v", got)
	}
	if got := see(0, status(20, 0, map[int]uint64{40: 20})); got.RequestsPerSecond != nil {
		t.Errorf("without time: %v", got)
	}
}
