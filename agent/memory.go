package agent

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"path/filepath"
	"time"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/models"
)

const (
	// memoryEvery is how often the budget follows what the device shows free.
	memoryEvery = time.Second
	// spareFraction of the device's memory stays free beside the models.
	spareFraction = 0.05
	// A budget that differs by less than this part is left as it is.
	budgetStep = 0.02
	// maxPinned bounds the host memory that is taken at each start of the
	// process that runs models, for weights that a GPU reads, where the
	// firmware profile does not.
	maxPinned = 1 << 30
)

// cudaProvider is ONNX Runtime's name of what runs models on NVIDIA's GPUs.
const cudaProvider = "CUDAExecutionProvider"

// memoryBudget gives how many bytes models may take: what the settings say, or
// the firmware profile's part of the memory, at most its bytes.
func (s *Serving) memoryBudget(profile profiles.Profile) (int64, error) {
	if s.MemoryMiB > 0 {
		return int64(s.MemoryMiB) << 20, nil
	}
	_, total, err := s.memory()
	if err != nil {
		return 0, err
	}
	budget := int64(float64(total) * profile.Memory.HostFraction)
	if most := profile.Memory.HostBytes; most > 0 {
		budget = min(budget, most)
	}
	return budget, nil
}

// observedBudget is what of a budget the device can give now: what models hold
// of anonymous memory, and what is available but for a spare part. Weights that
// are mapped from files count as available, as the kernel sees them.
func observedBudget(configured, held, available, total int64) int64 {
	spare := int64(float64(total) * spareFraction)
	return max(min(configured, held+available-spare), 1)
}

// deviceBudget gives how many bytes models may take of a GPU's memory of which
// so many were free: the firmware profile's part, at most its bytes, or what
// the settings say.
func (s *Serving) deviceBudget(m profiles.Memory, free int64) int64 {
	part := cmp.Or(m.DeviceFraction, 1-spareFraction)
	budget := max(int64(math.Round(float64(free)*part)), 1)
	if m.DeviceBytes > 0 {
		budget = min(budget, m.DeviceBytes)
	}
	if s.MemoryMiB > 0 {
		budget = min(budget, int64(s.MemoryMiB)<<20)
	}
	return budget
}

// pinnedBytes is what of the host's memory a GPU reads weights from at full
// speed: the firmware profile's bytes, at most a quarter of the host's budget.
// Where CPU and GPU share their memory, nothing is gained by it.
func pinnedBytes(m profiles.Memory, budget int64) int64 {
	if m.Unified {
		return 0
	}
	return min(budget/4, cmp.Or(m.PinnedBytes, maxPinned))
}

// pooling waits for a ready child where weights are to be in pools, and says
// whether they are, and how much of the device's memory was free for them.
func (h *host) pooling(ctx context.Context) (found worker.Runtime) {
	if h.pools != "" {
		found, _ = h.worker.Runtime(ctx)
	}
	return found
}

// weightPools says in words where weights leave and come back in place.
func (h *host) weightPools(found worker.Runtime) string {
	switch {
	case h.pools == "":
		return "none: models run on the CPU"
	case !found.Pooling.Works:
		return "none: " + found.Pooling.Reason
	}
	return h.pools + " " + found.Pooling.Device
}

// followMemory keeps the engine's budget within what the device has.
func (h *host) followMemory(ctx context.Context) error {
	last := h.budget
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		available, total, err := h.serving.memory()
		if err != nil {
			continue // then only the budget counts that was asked for
		}
		pooled := h.pooling(ctx)
		held := int64(0)
		if pid := h.worker.PID(); pid != 0 {
			if n, err := device.Anonymous(pid); err == nil {
				held = int64(n)
			}
		}
		now := observedBudget(h.budget, held, int64(available), int64(total))
		if pooled.Pooling.Works {
			now = h.serving.deviceBudget(h.profile.Memory, pooled.PoolBytes)
		}
		if diff := float64(now-last) / float64(last); diff < -budgetStep || diff > budgetStep || now == h.budget && now != last {
			h.serving.Log.Info("memory for models changes", "bytes", now, "before", last, "available", available)
			if err := h.engine.SetMemory(ctx, now); err != nil {
				return nil // ctx is done
			}
			last = now
		}
	}
}

// compileMemory is what a process that looks at a new model may allocate: what is
// available now, less a spare part. It has the model several times over.
func (s *Serving) compileMemory() int64 {
	available, total, err := s.memory()
	if err != nil {
		return 0
	}
	return max(int64(available)-int64(spareFraction*float64(total)), 1)
}

// fits says why a version could not run in any case, before anything is done
// with it: its weights alone are more than the budget. What cannot be read is
// left to those who load it.
func (h *host) fits(found worker.Runtime, spec engine.Spec) error {
	if found.Pooling.Works { // which have another budget
		return nil
	}
	graph, err := models.Inspect(filepath.Join(spec.Dir, spec.Entry))
	if err != nil || graph.WeightBytes <= uint64(h.budget) {
		return nil
	}
	if h.serving.Oversize == "map" {
		h.serving.Log.Warn("a model's weights are more than the budget of memory: they stay in their file and are read as they are needed",
			"model", spec.ID.Model, "version", spec.ID.Version, "weights", graph.WeightBytes, "budget", h.budget)
		return nil
	}
	return fmt.Errorf("%s: %w: its weights have %d bytes, the budget is %d; --oversize map lets it run from its file", spec.ID, engine.ErrTooLarge, graph.WeightBytes, h.budget)
}
