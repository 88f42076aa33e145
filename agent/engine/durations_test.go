package engine

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDurationClasses(t *testing.T) {
	for i := range len(Durations{}) {
		if got := class(least(i)); got != i {
			t.Errorf("the least of class %d, %v, is in class %d", i, least(i), got)
		}
		if i > 0 && class(least(i)-1) != i-1 {
			t.Errorf("what is below class %d is in class %d", i, class(least(i)-1))
		}
		if i > 1 && float64(least(i)) > 1.25*float64(least(i-1)) {
			t.Errorf("class %d reaches from %v to %v", i-1, least(i-1), least(i))
		}
	}
	for d, want := range map[time.Duration]int{-1: 0, 0: 0, math.MaxInt64: len(Durations{}) - 1} {
		if got := class(d); got != want {
			t.Errorf("%v is in class %d instead of %d", d, got, want)
		}
	}
	if low, high := least(1), least(len(Durations{})-1); low != 8192 || high != 1<<37 {
		t.Errorf("the classes reach from %v to %v", low, high)
	}
}

// A quantile of what came between two samples is within a class of the true one.
func TestDurationQuantiles(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 6))
		draw := func() time.Duration { return time.Duration(10e6 * math.Exp(random.NormFloat64())) }
		var d Durations
		for range rapid.IntRange(0, 50).Draw(t, "before") {
			d.observe(draw())
		}
		before := d
		var all []time.Duration
		for range rapid.IntRange(1, 500).Draw(t, "since") {
			took := draw()
			all = append(all, took)
			d.observe(took)
		}
		slices.Sort(all)
		since := d.Since(&before)
		if since.Count() != uint64(len(all)) {
			t.Fatalf("%d instead of %d", since.Count(), len(all))
		}
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		want := all[max(int(math.Ceil(q*float64(len(all)))), 1)-1]
		if got := since.Quantile(q); float64(got) < float64(want)/1.25 || float64(got) > 1.25*float64(want) {
			t.Fatalf("the quantile %v is %v instead of %v", q, got, want)
		}
		if again := before.Since(&d); again != before {
			t.Fatal("a version that was loaded anew has not all of its figures")
		}
	})
	var none Durations
	if got := none.Quantile(0.99); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
}
