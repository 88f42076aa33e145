package estimate

import (
	"math"
	"time"

	"github.com/dunlin/dunlin/models"
)

// What a session of ONNX Runtime takes besides weights and workspace, by least
// squares over the nets of bench/zoo on linux/amd64, runtime 1.30.
const (
	sessionBytes = 256 << 10
	nodeBytes    = 8 << 10
)

// Need is what a version takes of a device's memory, in bytes.
type Need struct {
	Weights   int64
	Session   int64 // what else it takes once it is activated
	Workspace int64 // what a run takes besides
}

// Peak gives what there has to be for a run.
func (n Need) Peak() int64 { return add(n.Weights, add(n.Session, n.Workspace)) }

// Memory predicts what a version takes while it runs so many rows, 1 at least,
// from the bytes of its weights and from its graph. More rows never take less.
// Where c has operators that are not known, it may take more.
func Memory(weightBytes uint64, c models.Costs, rows int) Need {
	return Need{
		Weights:   whole(float64(weightBytes)),
		Session:   whole(sessionBytes + nodeBytes*float64(c.Nodes)),
		Workspace: whole(c.Workspace.At(max(rows, 1))),
	}
}

// Hardware is what a device can do; 0 where that is not known.
type Hardware struct {
	FP32GFLOPS        float64 // additions and multiplications, 1e9 a second
	MemoryGBPerSecond float64 // of the memory that models run in, 1e9 bytes a second
	Overhead          time.Duration
	ActiveWatts       float64 // while a model runs
}

// RunTime predicts how long a run of so many rows takes, 1 at least: as long
// as its arithmetic or its traffic with memory, whichever takes longer, and the
// overhead of a run. That is the roofline model of Williams, Waterman and
// Patterson (2009) for the graph as a whole. It gives 0 where the hardware or
// the costs are not known.
func RunTime(c models.Costs, rows int, h Hardware) time.Duration {
	rows = max(rows, 1)
	flops, traffic := c.FLOPs.At(rows), c.Traffic.At(rows)
	if !(h.FP32GFLOPS > 0) || !(h.MemoryGBPerSecond > 0) || !(flops+traffic > 0) {
		return 0
	}
	s := max(flops/(h.FP32GFLOPS*1e9), traffic/(h.MemoryGBPerSecond*1e9)) + max(h.Overhead, 0).Seconds()
	return time.Duration(min(s*float64(time.Second), math.MaxInt64/2))
}

// Energy predicts the joules of a run that takes t; 0 where that is not known.
func Energy(t time.Duration, h Hardware) float64 {
	return max(t, 0).Seconds() * max(h.ActiveWatts, 0)
}

// whole gives a number of bytes that an int64 holds.
func whole(bytes float64) int64 {
	if !(bytes > 0) {
		return 0
	}
	return int64(min(math.Ceil(bytes), math.MaxInt64/2))
}

// add gives the sum of two numbers that are not negative, or the largest.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
