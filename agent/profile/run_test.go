package profile

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// made is a Bench of a made-up model on a made-up machine. Time is what it
// says.
type made struct {
	surface
	now      time.Time
	wrong    map[string]bool // providers that compute something else
	broken   map[string]bool // that do not open
	fast     map[string]float64
	noMemory int // batch from which on there is none
	ready    Setting
	starving int // slices in which others compute
	opened   map[string]bool
}

func (m *made) Check(_ context.Context, provider string) (Check, error) {
	m.now = m.now.Add(time.Millisecond)
	if m.broken[provider] {
		return Check{}, errors.New("no such device")
	}
	y := float32(1)
	if m.wrong[provider] {
		y = 1.5
	}
	return Compare(provider, all(floats("y", 1)), all(floats("y", y)), ForFP32), nil
}

func (m *made) Activate(_ context.Context, _ Setting, cold bool) (time.Duration, error) {
	if cold {
		return 500 * time.Millisecond, nil
	}
	return 20 * time.Millisecond, nil
}

func (m *made) time(set Setting) time.Duration {
	seconds, _ := m.run(set)
	return time.Duration(seconds / max(m.fast[set.Provider], 1) * 1e9)
}

func (m *made) Prepare(_ context.Context, set Setting) (Ready, error) {
	m.opened[set.Provider] = true
	if m.noMemory > 0 && set.Batch >= m.noMemory {
		return Ready{}, errors.New("out of memory")
	}
	m.ready = set
	m.now = m.now.Add(2 * m.time(set))
	return Ready{Run: m.time(set), Session: 100, Workspace: int64(set.Instances) * (1000 + 500*int64(set.Batch))}, nil
}

func (m *made) Slice(_ context.Context, set Setting, runs int) (Slice, error) {
	if m.ready != set {
		return Slice{}, fmt.Errorf("%+v is ready instead of %+v", m.ready, set)
	}
	var x Slice
	for range runs * set.Instances {
		x.Times = append(x.Times, m.time(set))
	}
	x.Wall = time.Duration(runs) * m.time(set)
	x.CPU = x.Wall * 2
	if m.starving > 0 {
		m.starving--
		x.CPU, x.Wall = x.Wall/2, 3*x.Wall
		for i := range x.Times {
			x.Times[i] *= 3
		}
	}
	m.now = m.now.Add(x.Wall)
	return x, nil
}

func all[T any](x ...T) []T { return x }

func newMade() *made {
	return &made{
		surface: surface{cores: 4, overhead: 20e-6, row: 1e-3, weights: 4e-3, serial: 0.05, hand: 5e-6, packed: 0.8, cache: 64, spill: 1.2, fixed: 1000, rowBytes: 500},
		now:     noon, wrong: map[string]bool{}, broken: map[string]bool{}, fast: map[string]float64{}, opened: map[string]bool{},
	}
}

func (m *made) subject(providers ...string) Subject {
	return Subject{
		Space:   Space{Providers: providers, Cores: m.cores, Batch: MaxBatch, Prepack: true},
		Weights: 10_000, Session: 200, Prepacked: 5000, Now: func() time.Time { return m.now },
	}
}

func TestRun(t *testing.T) {
	m := newMade()
	p, err := Run(t.Context(), m, Open{}, m.subject(CPU))
	if err != nil {
		t.Fatal(err)
	}
	r := p.Recommended
	if p.Unmeasured != "" || r == nil || r.Provider != CPU || r.Batch < 8 || !r.Prepacked {
		t.Fatalf("%v", p)
	}
	if p.ActivationWarmSeconds != 0.02 || p.ActivationColdSeconds != 0.5 || p.WeightBytes != 10_000 || p.SessionBytes != 200 || p.PrepackedBytes != 5000 {
		t.Errorf("%v", p)
	}
	if p.WorkspaceFixedBytes < 990 || p.WorkspaceFixedBytes > 1010 || p.WorkspaceRowBytes < 498 || p.WorkspaceRowBytes > 502 {
		t.Errorf("workspace of %d and %d for each row", p.WorkspaceFixedBytes, p.WorkspaceRowBytes)
	}
	if len(p.Latency) < 3 || p.Latency[0].Rows != 1 || p.Latency[len(p.Latency)-1].Rows < r.Batch {
		t.Errorf("latency %v with a batch of %d", p.Latency, r.Batch)
	}
	if took := m.now.Sub(noon).Seconds(); p.MeasuredSeconds <= 0 || math.Abs(p.MeasuredSeconds-took) > 1e-6 || !p.MeasuredAt.AsTime().Equal(m.now) {
		t.Errorf("measured for %v s of %v, at %v", p.MeasuredSeconds, took, p.MeasuredAt.AsTime())
	}
	for _, point := range p.Points {
		if point.PeakBytes == nil || point.JoulesPerRow != nil || point.P50Seconds <= 0 || point.RowsPerSecond <= 0 {
			t.Errorf("%v", point)
		}
	}
	if n := proto.Size(p); n > 6<<10 {
		t.Errorf("%d bytes are too much for an event", n)
	}
}

// TestRunRefusesWhatComputesSomethingElse has several providers, the fastest of
// which is wrong.
func TestRunRefusesWhatComputesSomethingElse(t *testing.T) {
	const wrong, broken, right = "FastExecutionProvider", "CUDAExecutionProvider", "GoodExecutionProvider"
	m := newMade()
	m.wrong[wrong], m.broken[broken] = true, true
	m.fast = map[string]float64{wrong: 20, right: 3}
	p, err := Run(t.Context(), m, Open{}, m.subject(wrong, broken, right, CPU))
	if err != nil {
		t.Fatal(err)
	}
	if r := p.Recommended; r == nil || r.Provider != right {
		t.Fatalf("%v", p)
	}
	if m.opened[wrong] || m.opened[broken] || !m.opened[CPU] {
		t.Errorf("opened: %v", m.opened)
	}
	want := []struct {
		provider string
		accepted bool
		reason   string
	}{{wrong, false, "1 of 1 values differ"}, {broken, false, "no such device"}, {right, true, ""}, {CPU, true, ""}}
	if len(p.Providers) != len(want) {
		t.Fatalf("%v", p.Providers)
	}
	for i, w := range want {
		if c := p.Providers[i]; c.Provider != w.provider || c.Accepted != w.accepted || !strings.Contains(c.Reason, w.reason) {
			t.Errorf("%v, want %+v", c, w)
		}
	}
	if c := p.Providers[0]; c.MaxAbsoluteError != 0.5 || c.MaxRelativeError != 0.5 {
		t.Errorf("%v", c)
	}
	for _, l := range p.Points {
		if l.Setting.Provider == wrong || l.Setting.Provider == broken {
			t.Errorf("%v was measured", l)
		}
	}
	m.wrong[right], m.wrong[CPU] = true, true
	p, err = Run(t.Context(), m, Open{}, m.subject(wrong, CPU))
	if err != nil || p.Recommended != nil || !strings.Contains(p.Unmeasured, "no execution provider computes what it should") {
		t.Errorf("%v, %v", p, err)
	}
}

func TestRunWithoutMemory(t *testing.T) {
	m := newMade()
	m.noMemory = 8
	p, err := Run(t.Context(), m, Open{}, m.subject(CPU))
	if err != nil || p.Unmeasured != "" || p.Recommended.Batch >= 8 {
		t.Errorf("%v, %v", p, err)
	}
	m.noMemory = 1
	p, err = Run(t.Context(), m, Open{}, m.subject(CPU))
	if err != nil || p.Recommended != nil || !strings.Contains(p.Unmeasured, "out of memory") || p.WeightBytes != 10_000 {
		t.Errorf("%v, %v", p, err)
	}
}

// gates is a Gate that somebody disturbs.
type gates func(n int) (disturbed bool, err error)

func (g gates) Do(ctx context.Context, f func(context.Context) error) (bool, error) {
	disturbed, err := g(0)
	if err != nil {
		return false, err
	}
	return disturbed, f(ctx)
}

// TestRunMeasuresAgain: slices that were disturbed count for nothing; where the
// gate stays shut, the profile says so, and what has been found out by then.
func TestRunMeasuresAgain(t *testing.T) {
	m := newMade()
	quiet, err := Run(t.Context(), m, Open{}, m.subject(CPU))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	m = newMade()
	p, err := Run(t.Context(), m, gates(func(int) (bool, error) { n++; return n%3 == 0, nil }), m.subject(CPU))
	if err != nil || !proto.Equal(p.Recommended, quiet.Recommended) || len(p.Points) != len(quiet.Points) {
		t.Errorf("%v, %v; undisturbed %v", p, err, quiet)
	}
	for i := range p.Points {
		if p.Points[i].Runs != quiet.Points[i].Runs {
			t.Errorf("%v, undisturbed %v", p.Points[i], quiet.Points[i])
		}
	}
	if p.MeasuredSeconds <= quiet.MeasuredSeconds {
		t.Errorf("measured for %v s, undisturbed for %v s", p.MeasuredSeconds, quiet.MeasuredSeconds)
	}
	n, m = 0, newMade()
	p, err = Run(t.Context(), m, gates(func(int) (bool, error) {
		if n++; n > 20 {
			return false, ErrGivenUp
		}
		return false, nil
	}), m.subject(CPU))
	if err != nil || !strings.Contains(p.Unmeasured, ErrGivenUp.Error()) || p.Recommended == nil || len(p.Points) < 2 || len(p.Points) >= len(quiet.Points) || len(p.Providers) != 1 {
		t.Errorf("%v, %v", p, err)
	}
	n, m = 0, newMade()
	p, err = Run(t.Context(), m, gates(func(int) (bool, error) {
		if n++; n > 4 {
			return false, ErrGivenUp
		}
		return false, nil
	}), m.subject(CPU))
	if err != nil || !strings.Contains(p.Unmeasured, ErrGivenUp.Error()) || p.Recommended != nil || len(p.Points) > 0 || len(p.Providers) != 1 {
		t.Errorf("%v, %v", p, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	n, m = 0, newMade()
	if _, err = Run(ctx, m, gates(func(int) (bool, error) {
		if n++; n > 20 {
			cancel(enough)
			return false, context.Cause(ctx)
		}
		return false, nil
	}), m.subject(CPU)); !errors.Is(err, enough) {
		t.Errorf("%v", err)
	}
}

// mortal is a Bench that ends after so many questions.
type mortal struct {
	*made
	left int
}

func (m *mortal) ends() error {
	if m.left--; m.left < 0 {
		return fmt.Errorf("%w: killed", ErrDead)
	}
	return nil
}

func (m *mortal) Check(ctx context.Context, provider string) (Check, error) {
	if err := m.ends(); err != nil {
		return Check{}, err
	}
	return m.made.Check(ctx, provider)
}

func (m *mortal) Prepare(ctx context.Context, set Setting) (Ready, error) {
	if err := m.ends(); err != nil {
		return Ready{}, err
	}
	return m.made.Prepare(ctx, set)
}

// TestRunCompares: providers that are only compared are measured with nothing,
// and one that ends the bench takes nothing away.
func TestRunCompares(t *testing.T) {
	const other = "CUDAExecutionProvider"
	m := newMade()
	m.fast = map[string]float64{other: 20}
	s := m.subject(CPU)
	s.Compared = []string{other}
	p, err := Run(t.Context(), m, Open{}, s)
	if err != nil || p.Recommended.GetProvider() != CPU || m.opened[other] || len(p.Providers) != 2 || !p.Providers[1].Accepted {
		t.Errorf("%v, %v", p, err)
	}
	m = newMade()
	p, err = Run(t.Context(), &deadly{m, other}, Open{}, s)
	if err != nil || p.Unmeasured != "" || p.Recommended.GetProvider() != CPU || len(p.Providers) != 2 || p.Providers[1].Accepted || !strings.Contains(p.Providers[1].Reason, ErrDead.Error()) {
		t.Errorf("%v, %v", p, err)
	}
}

// deadly is a Bench that a provider ends.
type deadly struct {
	*made
	provider string
}

func (d *deadly) Check(ctx context.Context, provider string) (Check, error) {
	if provider == d.provider {
		return Check{}, fmt.Errorf("%w: killed", ErrDead)
	}
	return d.made.Check(ctx, provider)
}

// TestRunEndsWithItsBench: of a bench that ends there is no profile.
func TestRunEndsWithItsBench(t *testing.T) {
	for _, left := range []int{0, 1, 3} {
		m := newMade()
		if p, err := Run(t.Context(), &mortal{m, left}, Open{}, m.subject(CPU)); !errors.Is(err, ErrDead) || p != nil {
			t.Errorf("after %d questions: %v, %v", left, p, err)
		}
	}
}

// TestMeasureStarving: slices in which others compute do not count, unless
// there are no others.
func TestMeasureStarving(t *testing.T) {
	m := newMade()
	set := Setting{CPU, 1, 1, 4, false}
	for starving, factor := range map[int]float64{0: 1, 5: 1, maxStarved: 1, 1000: 3} {
		m.starving = starving
		r, err := Measure(t.Context(), m, Open{}, m.subject(CPU), set)
		if want := factor * m.time(set).Seconds(); err != nil || math.Abs(r.P50.Seconds()/want-1) > 0.01 {
			t.Errorf("%d slices: %v instead of %g s, %v", starving, r.P50, want, err)
		}
	}
}

func TestRunCountsEnergy(t *testing.T) {
	m := newMade()
	s := m.subject(CPU)
	s.Meter = func() func(time.Duration) float64 {
		began := m.now
		return func(time.Duration) float64 { return 5 * m.now.Sub(began).Seconds() } // watts
	}
	p, err := Run(t.Context(), m, Open{}, s)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range p.Points {
		if want := 5 / l.RowsPerSecond; l.JoulesPerRow == nil || math.Abs(*l.JoulesPerRow/want-1) > 0.05 {
			t.Errorf("%v, want %g J", l, want)
		}
	}
}

var _ Bench = (*made)(nil)

// slow is a Bench whose runs take longer by a factor than those that made it
// ready, and get no more of a processor.
type slow struct {
	*made
	factor int
}

func (s *slow) Slice(_ context.Context, set Setting, runs int) (x Slice, _ error) {
	for range runs * set.Instances {
		x.Times = append(x.Times, time.Duration(s.factor)*s.time(set))
	}
	x.Wall = time.Duration(runs*s.factor) * s.time(set)
	x.CPU = x.Wall / time.Duration(s.factor)
	s.now = s.now.Add(x.Wall)
	return x, nil
}

// TestMeasureStarvedEnds: on a device that others compute on all the time a
// setting takes seconds, not minutes.
func TestMeasureStarvedEnds(t *testing.T) {
	m := newMade()
	if _, err := Measure(t.Context(), &slow{m, 100}, Open{}, m.subject(CPU), Setting{CPU, 1, 1, 4, false}); err != nil {
		t.Fatal(err)
	}
	if took := m.now.Sub(noon); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestProto(t *testing.T) {
	s := Setting{CPU, 4, 2, 4, true}
	if got := s.Proto(4); !proto.Equal(got, &dunlinv1.ModelSetting{Provider: CPU, Batch: 4, Instances: 2, Prepacked: true}) {
		t.Errorf("%v", got)
	}
	if got := s.Proto(8); got.Threads != 4 {
		t.Errorf("%v", got)
	}
}
