package serve

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// counting is an engine with two versions that have figures.
type counting struct{ leaving }

func (*counting) Versions() []engine.Status {
	figures := engine.Figures{
		Success: engine.Total{Count: 3, Time: 30 * time.Millisecond}, Failure: engine.Total{Count: 1, Time: time.Millisecond},
		Queue: engine.Total{Count: 4, Time: 4 * time.Microsecond}, Infer: engine.Total{Count: 4, Time: 8 * time.Microsecond},
		Inferences: 6, Executions: 2, Last: time.UnixMilli(1234),
		Batches: []engine.BatchFigures{{Size: 3, Infer: engine.Total{Count: 2, Time: 8 * time.Microsecond}}},
	}
	return []engine.Status{
		{ID: engine.VersionID{Model: "digits", Version: 1}, Figures: figures},
		{ID: engine.VersionID{Model: "digits", Version: 2}},
		{ID: engine.VersionID{Model: "letters", Version: 1}},
	}
}

func (*counting) Infer(context.Context, engine.VersionID, engine.Request) (engine.Result, error) {
	return engine.Result{}, engine.ErrNotLoaded
}

func TestStatistics(t *testing.T) {
	s := New(&counting{}, nil)
	s.SetServing(map[string]int64{"digits": 2, "letters": 1})
	s.SetRoutes("g", []*dunlinv1.DesiredRoute{r("live", "digits", "digits:1")}, nil)
	for _, tt := range []struct {
		name    string
		version int64
		want    string // of the names and versions; else the error
		code    oip.Code
	}{
		{"", 0, "digits:1 digits:2 letters:1", 0},
		{"digits", 0, "digits:1 digits:2", 0},
		{"digits", 1, "digits:1", 0},
		{"live", 0, "live:1 live:2", 0},
		{"digits", 7, "no version 7", oip.NotFound},
		{"other", 0, "unknown model", oip.NotFound},
	} {
		all, err := s.Statistics(t.Context(), tt.name, tt.version)
		var got []string
		for _, m := range all {
			got = append(got, m.Name+":"+m.Version)
		}
		if tt.code != 0 && (err == nil || oip.CodeOf(err) != tt.code || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s:%d: %v, want %q", tt.name, tt.version, err, tt.want)
		} else if tt.code == 0 && (err != nil || strings.Join(got, " ") != tt.want) {
			t.Errorf("%s:%d: %v %v, want %s", tt.name, tt.version, got, err, tt.want)
		}
	}
	all, err := s.Statistics(t.Context(), "digits", 1)
	if err != nil {
		t.Fatal(err)
	}
	m := all[0]
	stats := m.InferenceStats
	if m.InferenceCount != 6 || m.ExecutionCount != 2 || m.LastInference != 1234 ||
		stats.Success.Count != 3 || stats.Success.Ns != 30e6 || stats.Fail.Count != 1 || stats.Queue.Count != 4 || stats.Queue.Ns != 4000 ||
		stats.ComputeInput == nil || stats.ComputeInfer.Ns != 8000 || stats.ComputeOutput == nil || stats.CacheHit == nil || stats.CacheMiss == nil ||
		len(m.BatchStats) != 1 || m.BatchStats[0].BatchSize != 3 || m.BatchStats[0].ComputeInfer.Count != 2 {
		t.Errorf("%v", m)
	}
}
