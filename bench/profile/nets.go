package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/profile"
	"github.com/dunlin/dunlin/agent/worker"
	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/internal/estimate"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// options say what is measured.
type options struct {
	nets          []zoo.Net
	batch, rounds int
	blocks        int
	block         time.Duration
	out           io.Writer
}

// memoryPart of the machine's may be taken by what is measured.
const memoryPart = 0.4

// figures are those of one net, or the worst of all.
type figures struct {
	memory  float64 // error of the predicted peak, the worst over batches
	latency float64 // error of the model at batches that were not measured
	best    float64 // of the recommended setting to the grid's best
	time    float64 // of the search to the grid
}

// subject is a net that was compiled.
type subject struct {
	profile.Subject
	net  zoo.Net
	spec engine.Spec
	file string
}

// compile writes a net and compiles it.
func compile(ctx context.Context, cfg worker.Config, n zoo.Net, dir string, batch int) (*subject, error) {
	s := &subject{net: n, file: filepath.Join(dir, n.Name+".ort")}
	s.spec = engine.Spec{ID: engine.VersionID{Model: n.Name, Version: 1}, Dir: filepath.Join(dir, n.Name), Entry: "model.onnx"}
	if err := os.Mkdir(s.spec.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := n.WriteFile(filepath.Join(s.spec.Dir, s.spec.Entry)); err != nil {
		return nil, err
	}
	c, err := worker.Compile(ctx, cfg, s.spec, s.file)
	if err != nil {
		return nil, err
	}
	if c.Unmeasured != "" {
		return nil, fmt.Errorf("%s: %s", n.Name, c.Unmeasured)
	}
	room, err := available()
	if err != nil {
		return nil, err
	}
	s.Subject = profile.Subject{
		Weights: c.Need.Weights, Session: c.Need.Session, Prepacked: c.Need.Prepacked,
		Space: profile.Space{Providers: []string{profile.CPU}, Cores: runtime.NumCPU(), Batch: batch, Prepack: c.Prepack,
			Fits: func(set profile.Setting) bool {
				return float64(c.Need.Weights+c.Need.Prepacked+c.Need.Workspace*int64(set.Batch)*int64(set.Instances)) <= memoryPart*room
			}},
	}
	return s, nil
}

// measureAll measures all nets.
func measureAll(ctx context.Context, cfg worker.Config, o options) (figures, error) {
	dir, err := os.MkdirTemp("", "dunlin-profile-")
	if err != nil {
		return figures{}, err
	}
	defer os.RemoveAll(dir)
	cfg.Eager = true // there is nobody to give way to
	worst := figures{best: math.Inf(1)}
	var latencies []float64
	var searching, all time.Duration
	fmt.Fprintf(o.out, "%-10s %9s %9s %7s %7s %-28s %-28s %8s %8s %8s\n", "net", "search_s", "grid_s", "looks", "grid", "recommended", "best of the grid", "ratio", "lat_err", "mem_err")
	for _, n := range o.nets {
		s, err := compile(ctx, cfg, n, dir, o.batch)
		if err != nil {
			return worst, err
		}
		f, search, grid, err := s.measure(ctx, cfg, o)
		if err != nil {
			return worst, fmt.Errorf("%s: %w", n.Name, err)
		}
		searching, all = searching+search, all+grid
		worst.best, worst.memory = min(worst.best, f.best), max(worst.memory, f.memory)
		latencies = append(latencies, f.latency)
		os.Remove(s.file)
		os.RemoveAll(s.spec.Dir)
	}
	slices.Sort(latencies)
	worst.latency = latencies[len(latencies)/2]
	worst.time = searching.Seconds() / all.Seconds()
	return worst, nil
}

func name(s profile.Setting) string {
	packed := ""
	if s.Prepacked {
		packed = " packed"
	}
	return fmt.Sprintf("batch %d x%d, %d thr%s", s.Batch, s.Instances, s.Threads, packed)
}

// setting reads one from a profile.
func setting(m *dunlinv1.ModelSetting) profile.Setting {
	s := profile.Setting{Provider: m.Provider, Batch: int(m.Batch), Instances: int(m.Instances), Threads: int(m.Threads), Prepacked: m.Prepacked}
	if s.Threads == 0 {
		s.Threads = runtime.NumCPU()
	}
	return s
}

// measure has the net searched as an idle device does it, then measures the
// grid.
func (s *subject) measure(ctx context.Context, cfg worker.Config, o options) (f figures, search, grid time.Duration, err error) {
	var p *dunlinv1.ModelProfile
	began := time.Now()
	err = worker.Measure(ctx, cfg, s.spec, s.file, func(ctx context.Context, m *worker.Measuring) (err error) {
		p, err = profile.Run(ctx, m, profile.Open{}, s.Subject)
		return err
	})
	if err == nil && p.Unmeasured != "" {
		err = fmt.Errorf("unmeasured: %s", p.Unmeasured)
	}
	if err != nil {
		return f, 0, 0, err
	}
	search = time.Since(began)
	recommended := setting(p.Recommended)
	known := map[profile.Setting]profile.Result{}
	began = time.Now()
	err = worker.Measure(ctx, cfg, s.spec, s.file, func(ctx context.Context, m *worker.Measuring) error {
		for _, set := range s.Space.Grid() {
			r, err := profile.Measure(ctx, m, profile.Open{}, s.Subject, set)
			if ctx.Err() != nil {
				return err
			}
			if err != nil {
				r = profile.Result{Err: err}
			}
			known[set] = r
		}
		grid = time.Since(began)
		top, ok := profile.Best(known)
		if !ok {
			return fmt.Errorf("nothing in the grid runs")
		}
		if f.best, err = s.compare(ctx, m, recommended, top, o.rounds); err != nil {
			return err
		}
		if f.latency, err = s.latencyError(ctx, m, p); err != nil {
			return err
		}
		if f.memory, err = s.memoryError(known, o.out); err != nil {
			return err
		}
		fmt.Fprintf(o.out, "%-10s %9.1f %9.1f %7d %7d %-28s %-28s %8.3f %7.1f%% %7.1f%%\n", s.net.Name, search.Seconds(), grid.Seconds(), len(p.Points), len(known),
			name(recommended), name(top), f.best, 100*f.latency, 100*f.memory)
		return nil
	})
	return f, search, grid, err
}

// compare measures two settings in turn, and gives the ratio of the medians of
// their rows per second.
func (s *subject) compare(ctx context.Context, m *worker.Measuring, a, b profile.Setting, rounds int) (float64, error) {
	if a == b {
		return 1, nil
	}
	var rates [2][]float64
	for range rounds {
		for i, set := range []profile.Setting{a, b} {
			r, err := profile.Measure(ctx, m, profile.Open{}, s.Subject, set)
			if err != nil {
				return 0, err
			}
			rates[i] = append(rates[i], r.RowsPerSecond)
		}
	}
	return median(rates[0]) / median(rates[1]), nil
}

// latencyError gives the mean error of the model of latency, with the
// recommended setting, at batches between those that it goes through.
func (s *subject) latencyError(ctx context.Context, m *worker.Measuring, p *dunlinv1.ModelProfile) (float64, error) {
	var points []estimate.Point
	for _, l := range p.Latency {
		points = append(points, estimate.Point{Rows: int(l.Rows), Seconds: l.Seconds})
	}
	model := estimate.FitLatency(points)
	var sum, n float64
	// Requests may have more rows than the recommended batch: they run alone.
	most := max(8, int(p.Recommended.Batch))
	for _, rows := range []int{2, 3, 5, 6, 7, 10, 12, 20, 24, 40, 48} {
		if rows > most || slices.ContainsFunc(points, func(l estimate.Point) bool { return l.Rows == rows }) {
			continue
		}
		set := setting(p.Recommended)
		set.Batch = rows
		r, err := profile.Measure(ctx, m, profile.Open{}, s.Subject, set)
		if err != nil {
			return 0, err
		}
		sum += math.Abs(model.At(rows).Seconds()/r.P50.Seconds() - 1)
		n++
	}
	if n == 0 {
		return 0, nil // one or two rows, both measured
	}
	return sum / n, nil
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}
