package engine

import (
	"errors"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/datadrift"
	"github.com/dunlin/dunlin/internal/sketch"
)

// Status is one loaded version at a moment, and its figures since it was
// loaded, or put in the place of another.
type Status struct {
	ID              VersionID
	Info            Info
	Draining        bool
	Queued, Running int // requests
	Figures         Figures
	Data            datadrift.Finding // of its requests and answers

	// Where its weights are: out, entering, resident or leaving, and since
	// when; what the ledger has for them, and what it would be; how long they
	// take to come in.
	Residency  string
	Since      time.Time
	Bytes      int64
	Need       Need
	Setting    Setting
	Activation time.Duration
	Reason     string // why it could not come in; "": it could
	Swaps      Swaps
}

// Memory is the ledger at a moment, in bytes.
type Memory struct {
	Budget  int64 // 0: no bound
	Used    int64 // by weights, sessions, and the workspace of runs
	Pinned  int64 // of Used
	Waiting int   // versions that have requests and no room
}

// Backlog is how much there is to do at a moment.
type Backlog struct {
	Waiting int // requests, of all versions
	// Wait is how long a request of one row, of the version where that is the
	// longest, would wait if it came now; Known says that it can be told.
	Wait  time.Duration
	Known bool
}

// Total adds up durations.
type Total struct {
	Count uint64
	Time  time.Duration
}

// Figures count the requests of a version that have been answered. A request
// that its caller gave up counts as cancelled only, also if it ran.
type Figures struct {
	Success Total // from arrival to answer
	Failure Total // ran, and failed

	// Of each request that ran, so that a batch counts as often as it has
	// requests.
	Queue, Input, Infer, Output Total

	Overloaded, Expired, Cancelled uint64 // requests that were refused, or given up
	Refused                        uint64 // for want of memory, or because the version cannot be brought in

	Inferences uint64 // rows that ran
	Executions uint64 // runs
	Run        Total  // of each run
	Stalled    uint64 // runs that were ended for want of progress
	Last       time.Time
	Batches    []BatchFigures // by size, the first 256 that occurred

	// Request is the time from arrival to answer of each success, Wait that in
	// the queue, Size the rows of each run.
	Request, Wait, Size Histogram
	// Took is Request in finer classes, and Failed that of failures.
	Took, Failed Durations
	// Latency is Request in the buckets of sketch.Latency, and Confidence how
	// sure the version was of some rows, in those of sketch.Confidence; nil where
	// its outputs do not say.
	Latency, Confidence sketch.Counts
}

// BatchFigures count the runs of one size.
type BatchFigures struct {
	Size                 int // rows
	Input, Infer, Output Total
}

// Histogram counts observations by upper bound; Counts has one entry more
// than Bounds, for what lies above all of them. Counts are not cumulative.
// Times are in seconds.
type Histogram struct {
	Bounds []float64
	Counts []uint64
	Sum    float64
}

// maxBatches bounds Figures.Batches; runs of further sizes are not in it.
const maxBatches = 256

var (
	timeBounds = []float64{
		0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
	}
	sizeBounds = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024}
)

func newFigures() Figures {
	histogram := func(bounds []float64) Histogram {
		return Histogram{Bounds: bounds, Counts: make([]uint64, len(bounds)+1)}
	}
	return Figures{
		Request: histogram(timeBounds), Wait: histogram(timeBounds), Size: histogram(sizeBounds),
		Latency: make(sketch.Counts, sketch.Latency.Buckets()),
	}
}

// clone gives a copy that the core does not change any more.
func (f *Figures) clone() Figures {
	c := *f
	c.Batches, c.Latency = slices.Clone(f.Batches), slices.Clone(f.Latency)
	for _, h := range []*Histogram{&c.Request, &c.Wait, &c.Size} {
		h.Counts = slices.Clone(h.Counts)
	}
	return c
}

func (t *Total) add(d time.Duration) {
	t.Count++
	t.Time += d
}

func (h *Histogram) observe(value float64) {
	i, _ := slices.BinarySearch(h.Bounds, value)
	h.Counts[i]++
	h.Sum += value
}

// refused counts a request that was refused on arrival or later.
func (f *Figures) refused(err error) {
	switch {
	case errors.Is(err, ErrOverloaded):
		f.Overloaded++
	case errors.Is(err, ErrExpired):
		f.Expired++
	default:
		f.Refused++
	}
}

// ran counts a run that has ended.
func (f *Figures) ran(r *run, now time.Time) {
	f.Inferences += uint64(r.rows)
	f.Executions++
	f.Run.add(r.outcome.Infer)
	if r.stalled && r.err != nil {
		f.Stalled++
	}
	f.Last = now
	f.Size.observe(float64(r.rows))
	i, found := slices.BinarySearchFunc(f.Batches, r.rows, func(b BatchFigures, rows int) int { return b.Size - rows })
	if !found {
		if len(f.Batches) == maxBatches {
			return
		}
		f.Batches = slices.Insert(f.Batches, i, BatchFigures{Size: r.rows})
	}
	b := &f.Batches[i]
	b.Input.add(r.outcome.Input)
	b.Infer.add(r.outcome.Infer)
	b.Output.add(r.outcome.Output)
}

// answered counts a request that has run and is answered now.
func (f *Figures) answered(r *request, now moment) {
	queue := r.run.started - r.arrived
	f.Queue.add(queue)
	f.Wait.observe(queue.Seconds())
	f.Input.add(r.run.outcome.Input)
	f.Infer.add(r.run.outcome.Infer)
	f.Output.add(r.run.outcome.Output)
	took := now - r.arrived
	if r.err != nil {
		f.Failure.add(took)
		f.Failed.observe(took)
		return
	}
	f.Success.add(took)
	f.Took.observe(took)
	f.Request.observe(took.Seconds())
	f.Latency[sketch.LatencyBucket(took)]++
}
