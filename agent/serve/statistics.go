package serve

import (
	"context"
	"strconv"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/proto/inference"
)

// Statistics gives the figures of loaded versions: of one, of those that
// answer to a route or model, or of all models where name is empty. Those of
// a route are its versions' own, under the route's name.
func (s *Server) Statistics(_ context.Context, name string, version int64) ([]*inference.ModelStatistics, error) {
	t := s.table.Load()
	var targets []policy.Target
	if r, ok := t.routes[name]; ok && version == 0 {
		targets = r.targets
	} else if name != "" && version == 0 && !t.knows(name) {
		return nil, unknown(name)
	}
	wanted := func(id engine.VersionID) bool {
		if targets == nil {
			return (name == "" || id.Model == name) && (version == 0 || id.Version == version)
		}
		for _, target := range targets {
			if want, err := t.version(target); err == nil && want == id {
				return true
			}
		}
		return false
	}
	var all []*inference.ModelStatistics
	for _, v := range s.engine.Versions() {
		if wanted(v.ID) {
			f := statistics(v)
			if name != "" {
				f.Name = name
			}
			all = append(all, f)
		}
	}
	if all == nil && version != 0 {
		return nil, missing(t, engine.VersionID{Model: name, Version: version})
	}
	if all == nil && name != "" {
		return nil, oip.Errorf(oip.Unavailable, "%s: %w", name, engine.ErrNotLoaded)
	}
	return all, nil
}

// statistics writes the figures of a version as the protocol has them.
func statistics(v engine.Status) *inference.ModelStatistics {
	f := &v.Figures
	s := &inference.ModelStatistics{
		Name: v.ID.Model, Version: strconv.FormatInt(v.ID.Version, 10),
		InferenceCount: f.Inferences, ExecutionCount: f.Executions,
		InferenceStats: &inference.InferStatistics{
			Success: duration(f.Success), Fail: duration(f.Failure), Queue: duration(f.Queue),
			ComputeInput: duration(f.Input), ComputeInfer: duration(f.Infer), ComputeOutput: duration(f.Output),
			CacheHit: &inference.StatisticDuration{}, CacheMiss: &inference.StatisticDuration{},
		},
	}
	if !f.Last.IsZero() {
		s.LastInference = uint64(f.Last.UnixMilli())
	}
	for _, b := range f.Batches {
		s.BatchStats = append(s.BatchStats, &inference.InferBatchStatistics{
			BatchSize: uint64(b.Size), ComputeInput: duration(b.Input), ComputeInfer: duration(b.Infer), ComputeOutput: duration(b.Output),
		})
	}
	return s
}

func duration(t engine.Total) *inference.StatisticDuration {
	return &inference.StatisticDuration{Count: t.Count, Ns: uint64(t.Time)}
}
