package profile

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Bench measures one version. Its calls come one after the other.
type Bench interface {
	// Check compares the outputs of a provider with the reference.
	Check(ctx context.Context, provider string) (Check, error)
	// Activate gives the time from nothing to the end of the first run; cold,
	// with the version's file out of the memory; 0 where that cannot be had.
	Activate(ctx context.Context, set Setting, cold bool) (time.Duration, error)
	// Prepare makes a setting ready to be run.
	Prepare(ctx context.Context, set Setting) (Ready, error)
	// Slice has each instance of the setting that is ready run so often.
	Slice(ctx context.Context, set Setting, runs int) (Slice, error)
}

// Gate lets slices through when they are nobody's harm.
type Gate interface {
	// Do calls f, and says whether anybody else asked the device for something
	// meanwhile. Its errors are those of f, of ctx, and ErrGivenUp.
	Do(ctx context.Context, f func(context.Context) error) (disturbed bool, err error)
}

// Open is a Gate for a device that serves nobody.
type Open struct{}

// Do calls f.
func (Open) Do(ctx context.Context, f func(context.Context) error) (bool, error) {
	return false, f(ctx)
}

// Subject is what is measured, and how.
type Subject struct {
	Space Space
	// Compared are providers whose outputs are compared too, after all else, and
	// that nothing is measured with.
	Compared []string
	// Weights are the bytes of the version's weights; Session and Prepacked
	// what a session takes, and its prepacked copy, as compiling found them.
	Weights, Session, Prepacked int64
	// Meter, where not nil, begins to count energy and gives what ends that. The
	// joules are 0 where the device cannot tell, or where others than a process
	// that computed for cpu seconds took part.
	Meter func() (end func(cpu time.Duration) (joules float64))
	Now   func() time.Time // nil: time.Now
}

const (
	// starved is the part of a slice in which a processor at least computes for
	// it, unless others have them: such a slice does not count. After
	// maxStarved of them the device is taken as it is.
	starved    = 0.85
	maxStarved = 10
)

// Measure measures one setting by slices until its median is known.
func Measure(ctx context.Context, b Bench, g Gate, s Subject, set Setting) (Result, error) {
	var ready Ready
	if _, err := g.Do(ctx, func(ctx context.Context) (err error) {
		ready, err = b.Prepare(ctx, set)
		return err
	}); err != nil {
		return Result{}, err
	}
	sample, starving := NewSample(set, ready), 0
	for runs := sample.Runs(); runs > 0; runs = sample.Runs() {
		var x Slice
		joules := 0.0
		disturbed, err := g.Do(ctx, func(ctx context.Context) (err error) {
			end := func(time.Duration) float64 { return 0 }
			if s.Meter != nil {
				end = s.Meter()
			}
			x, err = b.Slice(ctx, set, runs)
			joules = end(x.CPU)
			return err
		})
		if err != nil {
			return Result{}, err
		}
		if set.Provider == CPU && x.CPU > 0 && x.CPU.Seconds() < starved*x.Wall.Seconds() && starving < maxStarved {
			starving++
			sample.Starved(x)
			continue
		}
		if !disturbed {
			if len(x.Times) == 0 || x.Wall <= 0 {
				return Result{}, fmt.Errorf("a slice of %d runs has %d, and took %v", runs, len(x.Times), x.Wall)
			}
			sample.Add(x, joules)
		}
	}
	fixed := s.Weights + s.Session
	if set.Prepacked {
		fixed += s.Prepacked
	}
	return sample.Result(max(fixed, s.Weights+ready.Session)), nil
}

// Run measures a version and gives what it found, without what names the
// version and the device. What could not be measured is said in its
// Unmeasured: where something is recommended all the same, the device was not
// idle for long enough to measure more. The error is that of ctx, or ErrDead.
func Run(ctx context.Context, b Bench, g Gate, s Subject) (*dunlinv1.ModelProfile, error) {
	now := s.Now
	if now == nil {
		now = time.Now
	}
	p := s.profile()
	timed := &timedGate{gate: g, now: now}
	err := measure(ctx, b, timed, s, p)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if errors.Is(err, ErrDead) {
		return nil, err
	}
	if err != nil {
		p.Unmeasured = short(err.Error())
	}
	p.MeasuredAt, p.MeasuredSeconds = timestamppb.New(now()), timed.took.Seconds()
	return p, nil
}

// profile gives one of which only memory is known.
func (s *Subject) profile() *dunlinv1.ModelProfile {
	return &dunlinv1.ModelProfile{
		WeightBytes: bytesOf(s.Weights), SessionBytes: bytesOf(s.Session), PrepackedBytes: bytesOf(s.Prepacked),
	}
}

// Unmeasured gives the profile of a version that could not be measured.
func Unmeasured(s Subject, reason error, now time.Time) *dunlinv1.ModelProfile {
	p := s.profile()
	p.Unmeasured, p.MeasuredAt = short(reason.Error()), timestamppb.New(now)
	return p
}

// timedGate adds up how long what it lets through takes.
type timedGate struct {
	gate Gate
	now  func() time.Time
	took time.Duration
}

func (t *timedGate) Do(ctx context.Context, f func(context.Context) error) (bool, error) {
	return t.gate.Do(ctx, func(ctx context.Context) error {
		began := t.now()
		defer func() { t.took += t.now().Sub(began) }()
		return f(ctx)
	})
}

// fatal says that an error is not that of one setting.
func fatal(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, ErrGivenUp) || errors.Is(err, ErrDead)
}

func measure(ctx context.Context, b Bench, g Gate, s Subject, p *dunlinv1.ModelProfile) error {
	space := s.Space
	space.Providers = nil
	check := func(provider string) (Check, error) {
		c := Check{Provider: provider}
		_, err := g.Do(ctx, func(ctx context.Context) (err error) {
			c, err = b.Check(ctx, provider)
			return err
		})
		if err != nil {
			c = Check{Provider: provider, Reason: err.Error()}
		}
		p.Providers = append(p.Providers, &dunlinv1.ProviderCheck{
			Provider: provider, Accepted: c.Accepted, Reason: short(c.Reason), MaxAbsoluteError: c.Absolute, MaxRelativeError: c.Relative,
		})
		return c, err
	}
	for _, provider := range s.Space.Providers {
		c, err := check(provider)
		if err != nil && fatal(ctx, err) {
			return err
		}
		if c.Accepted {
			space.Providers = append(space.Providers, provider)
		}
	}
	if len(space.Providers) == 0 {
		var reasons []string
		for _, c := range p.Providers {
			reasons = append(reasons, c.Provider+": "+c.Reason)
		}
		return fmt.Errorf("no execution provider computes what it should: %s", strings.Join(reasons, "; "))
	}
	first := Setting{Provider: space.Providers[0], Batch: 1, Instances: 1, Threads: max(space.Cores, 1)}
	for _, cold := range []bool{false, true} {
		var took time.Duration
		for range 3 {
			disturbed, err := g.Do(ctx, func(ctx context.Context) (err error) {
				took, err = b.Activate(ctx, first, cold)
				return err
			})
			if err != nil && fatal(ctx, err) {
				return err
			}
			if err != nil || disturbed {
				took = 0
				continue
			}
			break
		}
		if cold {
			p.ActivationColdSeconds = took.Seconds()
		} else {
			p.ActivationWarmSeconds = took.Seconds()
		}
	}
	search := NewSearch(space)
	for set, more := search.Next(); more; set, more = search.Next() {
		r, err := Measure(ctx, b, g, s, set)
		if err != nil {
			if errors.Is(err, ErrGivenUp) {
				_ = search.fill(p) // with what there is
			}
			if fatal(ctx, err) {
				return err
			}
			r = Result{Err: err}
		}
		search.Add(set, r)
	}
	if err := search.fill(p); err != nil {
		return err
	}
	for _, provider := range s.Compared {
		if _, err := check(provider); err != nil && fatal(ctx, err) {
			break // all else is known
		}
	}
	return nil
}

// maxPoints bounds what a profile lists; an event has to hold it.
const maxPoints = 64

// fill writes what was found into a profile.
func (s *Search) fill(p *dunlinv1.ModelProfile) error {
	best, ok := s.Best()
	last := errors.New("there is no memory for any")
	for _, set := range s.order {
		r := s.known[set]
		if r.Err != nil {
			last = r.Err
			continue
		}
		if len(p.Points) == maxPoints {
			continue
		}
		point := &dunlinv1.ProfilePoint{
			Setting: set.Proto(s.space.Cores), Runs: uint32(min(r.Runs, math.MaxUint32)),
			P50Seconds: r.P50.Seconds(), P95Seconds: r.P95.Seconds(), P99Seconds: r.P99.Seconds(), RowsPerSecond: r.RowsPerSecond,
		}
		if r.Peak > 0 {
			point.PeakBytes = new(uint64(r.Peak))
		}
		if r.JoulesPerRow > 0 {
			point.JoulesPerRow = new(r.JoulesPerRow)
		}
		p.Points = append(p.Points, point)
		if ok && set.Provider == best.Provider && set.Instances == best.Instances && set.Threads == best.Threads && set.Prepacked == best.Prepacked {
			p.Latency = append(p.Latency, &dunlinv1.LatencyPoint{Rows: uint32(set.Batch), Seconds: r.P50.Seconds()})
		}
	}
	if !ok {
		return fmt.Errorf("it runs with no setting: %w", last)
	}
	p.Recommended = best.Proto(s.space.Cores)
	slices.SortFunc(p.Latency, func(a, b *dunlinv1.LatencyPoint) int { return int(a.Rows) - int(b.Rows) })
	fixed, row := s.workspace()
	p.WorkspaceFixedBytes, p.WorkspaceRowBytes = bytesOf(int64(fixed)), bytesOf(int64(row))
	return nil
}

// workspace gives the line by which the workspace of a run grows with its rows:
// that of least squares through what was measured, without one below zero.
func (s *Search) workspace() (fixed, row float64) {
	var n, x, y, xx, xy float64
	for set, r := range s.known {
		if r.Err != nil || r.Workspace <= 0 {
			continue
		}
		rows, bytes := float64(set.Batch), float64(r.Workspace)/float64(set.Instances)
		// A small one counts as much, in parts of it, as a large one.
		w := 1 / (bytes * bytes)
		n, x, y, xx, xy = n+w, x+w*rows, y+w*bytes, xx+w*rows*rows, xy+w*rows*bytes
	}
	if n == 0 {
		return 0, 0
	}
	if d := n*xx - x*x; d > 1e-9*n*xx {
		row = (n*xy - x*y) / d
		fixed = (y - row*x) / n
	} else {
		fixed = y / n
	}
	if row < 0 {
		return y / n, 0
	}
	if fixed < 0 {
		return 0, xy / xx
	}
	return fixed, row
}

func bytesOf(n int64) uint64 { return uint64(max(n, 0)) }

// maxReason bounds a text of a profile.
const maxReason = 512

func short(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxReason)], "")
}

// Proto gives the setting as it is on the wire. Where a run has as many threads
// as all models share, it has those.
func (s Setting) Proto(shared int) *dunlinv1.ModelSetting {
	m := &dunlinv1.ModelSetting{
		Provider: s.Provider, Batch: uint32(s.Batch), Instances: uint32(s.Instances), Threads: uint32(s.Threads), Prepacked: s.Prepacked,
	}
	if s.Threads == shared {
		m.Threads = 0
	}
	return m
}
