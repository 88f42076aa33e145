package sketch

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestBuckets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.SampledFrom([]Scale{Latency, Confidence}).Draw(t, "scale")
		i := rapid.IntRange(0, s.Buckets()-1).Draw(t, "bucket")
		if got := s.Bucket(s.Bound(i)); got != i {
			t.Errorf("the bound %v of bucket %d is in bucket %d", s.Bound(i), i, got)
		}
		if i < s.Buckets()-1 {
			if got := s.Bucket(s.Bound(i) * 1.001); got != i+1 {
				t.Errorf("a value above the bound of bucket %d is in bucket %d", i, got)
			}
		}
	})
	for _, x := range []float64{math.NaN(), -1, 0} {
		if got := Latency.Bucket(x); got != 0 {
			t.Errorf("Bucket(%v) = %d, want 0", x, got)
		}
	}
	if got := Latency.Bucket(math.Inf(1)); got != Latency.Buckets()-1 {
		t.Errorf("Bucket(Inf) = %d, want the last", got)
	}
}

func TestLatencyBucket(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64Range(-1, 10e9).Draw(t, "nanoseconds"))
		if got, want := LatencyBucket(d), Latency.Bucket(d.Seconds()); got != want {
			t.Errorf("%v is in bucket %d, want %d", d, got, want)
		}
	})
	for i := range Latency.Buckets() - 1 {
		bound := time.Duration(math.Round(Latency.Bound(i) * 1e9))
		for _, d := range []time.Duration{bound - 1, bound + 1} {
			if got, want := LatencyBucket(d), Latency.Bucket(d.Seconds()); got != want {
				t.Errorf("%v is in bucket %d, want %d", d, got, want)
			}
		}
	}
}

func BenchmarkLatencyBucket(b *testing.B) {
	b.ReportAllocs()
	d := time.Duration(0)
	for b.Loop() {
		d = (d + 12345) & (1<<26 - 1)
		LatencyBucket(d)
	}
}

func TestQuantile(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	c := make(Counts, Latency.Buckets())
	for range 100000 {
		c[Latency.Bucket(0.010*(1+r.Float64()))]++ // 10 to 20 ms
	}
	for _, q := range []float64{.5, .99} {
		want := 0.010 * (1 + q)
		if got := Latency.Quantile(c, q); math.Abs(got/want-1) > .05 {
			t.Errorf("Quantile(%v) = %v, want about %v", q, got, want)
		}
	}
	if got := Latency.Quantile(nil, .5); !math.IsNaN(got) {
		t.Errorf("Quantile of nothing = %v, want NaN", got)
	}
}

func TestPSI(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	draw := func(n int, mean float64) Counts {
		c := make(Counts, Confidence.Buckets())
		for range n {
			c[Confidence.Bucket(min(max(mean+r.NormFloat64()/10, 0), 1))]++
		}
		return c
	}
	if got := PSI(draw(2000, .8), draw(2000, .8)); got > .05 {
		t.Errorf("PSI of one distribution with itself = %v", got)
	}
	if got := PSI(draw(2000, .8), draw(2000, .6)); got < .5 {
		t.Errorf("PSI of different distributions = %v", got)
	}
	// What is nearly always sure, and what guesses: each falls into few buckets.
	sure, guesses := make(Counts, Confidence.Buckets()), make(Counts, Confidence.Buckets())
	sure[19], sure[18], sure[12] = 970, 20, 10
	guesses[2], guesses[3] = 900, 100
	if got := PSI(sure, guesses); got < 5 {
		t.Errorf("PSI of one that is sure and one that guesses = %v", got)
	}
	if got := PSI(guesses, sure); got < 5 {
		t.Errorf("PSI of one that guesses and one that is sure = %v", got)
	}
	if got := PSI(sure, sure); got != 0 {
		t.Errorf("PSI of one distribution with itself = %v", got)
	}
	if got := PSI(draw(10, .8), nil); !math.IsNaN(got) {
		t.Errorf("PSI with nothing = %v, want NaN", got)
	}
}

func TestSince(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		counts := rapid.SliceOfN(rapid.Uint64Range(0, 1e6), 20, 20)
		a, b := Counts(counts.Draw(t, "a")), Counts(counts.Draw(t, "b"))
		if got := a.Add(b).Since(a); got.Sum() != b.Sum() {
			t.Errorf("what came after %v is %v, want %v", a, got, b)
		}
		if got := Confidence.FromProto(a.Proto()); got.Sum() != a.Sum() {
			t.Errorf("%v has travelled as %v", a, got)
		}
	})
	if got := (Counts{1, 2}).Since(Counts{5, 5}); got.Sum() != 3 {
		t.Errorf("after a new start: %v, want what there is", got)
	}
}
