package engine

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestPredictor(t *testing.T) {
	const row = 1000 // bytes
	ms := func(f float64) time.Duration { return time.Duration(f * 1e6) }
	line := func(fixed, each float64, rows ...int) (runs [][2]float64) {
		for _, n := range rows {
			runs = append(runs, [2]float64{float64(n), fixed + each*float64(n)})
		}
		return runs
	}
	repeat := func(n int, rows float64, took float64) (runs [][2]float64) {
		for range n {
			runs = append(runs, [2]float64{rows, took})
		}
		return runs
	}
	join := func(all ...[][2]float64) (runs [][2]float64) {
		for _, a := range all {
			runs = append(runs, a...)
		}
		return runs
	}
	for name, tt := range map[string]struct {
		runs [][2]float64    // rows and milliseconds
		want map[int]float64 // milliseconds by rows
	}{
		"nothing":                   {nil, map[int]float64{1: 0, 16: 0}},
		"one run":                   {line(10, 0, 1), map[int]float64{1: 10, 2: 20, 16: 160}},
		"one size":                  {line(30, 1, 8, 8, 8), map[int]float64{1: 38, 8: 38, 16: 76}},
		"a line":                    {line(30, 2, 1, 1, 4, 16, 16, 1), map[int]float64{1: 32, 8: 46, 16: 62}},
		"in proportion":             {line(0, 5, 1, 2, 3, 4, 8, 8), map[int]float64{1: 5, 16: 80}},
		"more than in proportion":   {join(repeat(4, 1, 10), repeat(4, 4, 100)), map[int]float64{4: 100, 8: 200}},
		"larger ones are no slower": {join(repeat(4, 1, 12), repeat(4, 4, 10)), map[int]float64{1: 10, 16: 10}},
		"a cold first run":          {join(repeat(1, 1, 600), repeat(3, 1, 10)), map[int]float64{1: 10}},
		"the odd slow run":          {join(line(30, 2, 1, 4, 16, 16, 1), repeat(1, 4, 500), line(30, 2, 16, 1, 1, 16)), map[int]float64{1: 32, 16: 62}},
		"it became slower":          {join(line(30, 2, 1, 16, 1, 16), line(60, 4, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16)), map[int]float64{1: 64, 16: 124}},
		"its shape is remembered":   {join(line(30, 2, 1, 16, 1, 16), repeat(64, 1, 64)), map[int]float64{1: 64, 16: 124}},
	} {
		var p predictor
		for i, r := range tt.runs {
			p.observe(int64(r[0]*row), ms(r[1]), moment(i))
		}
		for rows, want := range tt.want {
			if got := p.mean(int64(rows) * row); (got - ms(want)).Abs() > time.Microsecond {
				t.Errorf("%s: a run of %d rows is expected to take %v instead of %v", name, rows, got, ms(want))
			}
		}
	}
}

// The upper estimate is passed by few runs, the odd slow one among them, and
// is not far above the others.
func TestPredictorUpper(t *testing.T) {
	for seed := range uint64(5) {
		random := rand.New(rand.NewPCG(seed, 0))
		var p predictor
		above, slow, far := 0, 0, 0
		const n = 2000
		for i := range n {
			rows := 1 + random.IntN(16)
			expected := 20 + 2*float64(rows)
			took := expected * math.Exp(0.1*random.NormFloat64())
			if random.Float64() < 0.01 {
				took *= 4
				slow++
			}
			upper := p.upper(int64(rows)).Seconds() * 1000
			if i > 50 && took > upper {
				above++
			}
			if i > 50 && upper > 1.6*expected {
				far++
			}
			p.observe(int64(rows), time.Duration(took*1e6), moment(i))
		}
		if above > n/9 || above < n/50 || far > n/50 {
			t.Errorf("seed %d: %d of %d runs took longer than the upper estimate, %d of them slow ones; it was far off %d times", seed, above, n, slow, far)
		}
		if p.worst < 1.5 {
			t.Errorf("seed %d: the worst run took %.1f times its estimate", seed, p.worst)
		}
	}
}

func TestPredictorEfficient(t *testing.T) {
	const row = 1000
	observe := func(fixed, each float64) *predictor {
		p := new(predictor)
		for i := range 16 {
			rows := 1 + i%8
			p.observe(int64(rows*row), time.Duration((fixed+each*float64(rows))*1e6), 0)
		}
		return p
	}
	for name, tt := range map[string]struct {
		fixed, each float64
		limit       time.Duration
		low, high   int64 // rows
	}{
		"size saves nothing":       {0, 10, time.Hour, 0, 0},
		"size saves nearly all":    {30, 0.1, time.Hour, 15, 16},
		"as far as the limit lets": {30, 1, 40 * time.Millisecond, 9, 10},
		"no run is that short":     {30, 1, 20 * time.Millisecond, 0, 0},
	} {
		p := observe(tt.fixed, tt.each)
		if got := p.efficient(16*row, tt.limit); got < tt.low*row || got > tt.high*row {
			t.Errorf("%s: %d bytes, expected %d to %d rows of %d", name, got, tt.low, tt.high, row)
		}
	}
}

func BenchmarkPredictor(b *testing.B) {
	var p predictor
	i := 0
	for b.Loop() {
		i++
		p.observe(int64(1+i%16), time.Duration(20+i%7)*time.Millisecond, 0)
	}
}

// Runs of next to no input, among larger ones that grow more than in
// proportion, do not spoil the estimate of those.
func TestTinyRuns(t *testing.T) {
	var p predictor
	now := moment(0)
	observe := func(size int64, took time.Duration) {
		now += ms
		p.observe(size, took, now)
	}
	for i := range 40 {
		if i%4 == 0 {
			observe(2_000_000, 5*ms)
		} else {
			observe(1_000_000, 2*ms)
		}
	}
	for range 3 {
		observe(0, 300*time.Microsecond)
	}
	for range 32 {
		observe(1_000_000, 2*ms)
	}
	if upper := p.upper(1_000_000); p.worst > 10 || upper > 20*ms {
		t.Errorf("the worst run takes %g times the estimate, and 1 MB up to %v", p.worst, upper)
	}
}
