package main

import (
	"fmt"
	"io"
	"maps"
	"math"
	"path/filepath"
	"slices"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models"
)

// small is an error of a predicted peak that does not count, in bytes.
const small = 4 << 20

// available gives the bytes of memory that the machine has to give.
func available() (float64, error) {
	n, _, err := device.Memory()
	return float64(n), err
}

// memoryError predicts the peak of memory from the graph, and gives the worst
// relative error over the batches of one run at a time; one of no more than
// small counts as none.
func (s *subject) memoryError(known map[profile.Setting]profile.Result, out io.Writer) (float64, error) {
	path := filepath.Join(s.spec.Dir, s.spec.Entry)
	graph, err := models.Inspect(path)
	if err != nil {
		return 0, err
	}
	costs, err := models.EstimateCosts(path)
	if err != nil {
		return 0, err
	}
	if costs == nil {
		return 0, fmt.Errorf("the graph of %s is too large to be read", s.net.Name)
	}
	peaks := map[int]int64{}
	for set, r := range known {
		// Threads make no difference; what is left over from before does.
		if set.Instances == 1 && !set.Prepacked && r.Peak > 0 && (peaks[set.Batch] == 0 || r.Peak < peaks[set.Batch]) {
			peaks[set.Batch] = r.Peak
		}
	}
	worst := 0.0
	for _, rows := range slices.Sorted(maps.Keys(peaks)) {
		peak := float64(peaks[rows])
		predicted := float64(estimate.Memory(graph.WeightBytes, *costs, rows).Peak())
		off := math.Abs(predicted - peak)
		fmt.Fprintf(out, "  %-9s %3d rows: peak %8.1f MiB, predicted %8.1f MiB, %+.1f%%\n", s.net.Name, rows, peak/(1<<20), predicted/(1<<20), 100*(predicted/peak-1))
		if off > small {
			worst = max(worst, off/peak)
		}
	}
	return worst, nil
}
