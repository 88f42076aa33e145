package main

import (
	"context"
	"errors"
	"math"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/dunlin/dunlin/bench/zoo"
	"github.com/dunlin/dunlin/internal/e2e"
)

func TestPercentile(t *testing.T) {
	ten := []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	for _, c := range []struct {
		sorted []int
		p      float64
		want   int
	}{
		{nil, 50, 0}, {[]int{7}, 1, 7}, {[]int{7}, 99, 7},
		{ten, 0, 1}, {ten, 10, 1}, {ten, 11, 2}, {ten, 50, 5}, {ten, 90, 9}, {ten, 99, 10}, {ten, 100, 10},
	} {
		if got := percentile(c.sorted, c.p); got != c.want {
			t.Errorf("percentile %v of %v is %d, want %d", c.p, c.sorted, got, c.want)
		}
	}
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{9, 1, 4}, spread{1, 4, 9}},
		{[]float64{8, 2, 4, 1}, spread{1, 3, 8}},
	} {
		before := slices.Clone(c.values)
		if got := spreadOf(c.values); got != c.want {
			t.Errorf("spread of %v is %v, want %v", c.values, got, c.want)
		}
		if !slices.Equal(c.values, before) {
			t.Errorf("spreadOf changed its argument to %v", c.values)
		}
	}
	if s := spreadOf(nil); !math.IsNaN(s.Median) || figure("%.2f", s.Median) != "na" {
		t.Errorf("the spread of nothing is %v", s)
	}
	if got := figure("%.2f", 1.234); got != "1.23" {
		t.Errorf("figure %q", got)
	}
	ratios := each([]float64{2, 9}, []float64{4, 3, 1}, func(a, b float64) float64 { return a / b })
	if !slices.Equal(ratios, []float64{0.5, 3}) {
		t.Errorf("ratios %v", ratios)
	}
}

func TestSum(t *testing.T) {
	refused := refusedError{"Unavailable"}
	all := []outcome{
		{took: 10 * time.Millisecond, soon: true},
		{took: 20 * time.Millisecond},
		{took: 100 * time.Millisecond, soon: true},               // answered, but too late
		{took: 100 * time.Millisecond, err: refused, soon: true}, // who gave up, the client cannot tell
		{took: 2 * time.Millisecond, err: refused, soon: true},
		{took: 3 * time.Millisecond, err: errors.New("broken")},
	}
	l := Load{Deadline: 100 * time.Millisecond}
	got := l.sum(all, time.Second)
	want := Result{Elapsed: time.Second, OK: 2, OKSoon: 1, Late: 2, Refused: 1, Failed: 1, Error: "broken",
		P50: 10 * time.Millisecond, P90: 20 * time.Millisecond, P99: 20 * time.Millisecond, Most: 20 * time.Millisecond,
		RefusedP50: 2 * time.Millisecond, RefusedP90: 2 * time.Millisecond, RefusedP99: 2 * time.Millisecond, RefusedMost: 2 * time.Millisecond,
		RefusedWhy: map[string]int{"Unavailable": 1}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if l.Deadline = 0; l.sum(all, time.Second).Late != 0 {
		t.Error("late without a deadline")
	}
}

func TestExpand(t *testing.T) {
	for list, want := range map[string][]string{"0": {"0"}, "0-2": {"0", "1", "2"}, "1,4-5,9": {"1", "4", "5", "9"}} {
		if got, err := expand(list); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q is %v, %v, want %v", list, got, err, want)
		}
	}
	for _, list := range []string{"", "a", "1-", "1,,2"} {
		if got, err := expand(list); err == nil {
			t.Errorf("%q is %v", list, got)
		}
	}
}

// TestLoad has the load generator call the bare server.
func TestLoad(t *testing.T) {
	address, err := e2e.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	const size = 40
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	served := make(chan error)
	go func() { served <- echoProcess(ctx, []string{address, "40"}) }()
	b := &bench{plan: plan{slice: 100 * time.Millisecond}, nets: map[string]zoo.Net{"mlp": zoo.MLP(1)}}
	l := b.load(address, "mlp")
	if l.Bytes != size {
		t.Errorf("the load awaits %d bytes, want %d", l.Bytes, size)
	}
	for answers(ctx, address, "mlp") != nil {
		if ctx.Err() != nil {
			t.Fatal("the server does not answer")
		}
	}

	l.Concurrency = 3
	r, err := l.run(ctx)
	if err != nil || r.OK < 3 || r.Failed+r.Refused+r.Late > 0 || r.Elapsed < l.For || r.P50 <= 0 || r.P50 > r.Most {
		t.Errorf("closed loop: %+v, %v", r, err)
	}

	l.Rate, l.Connections, l.Deadline = 200, 2, time.Minute
	r, err = l.run(ctx)
	// About 20 calls; the seed decides how many.
	if err != nil || r.OK < 5 || r.OK > 60 || r.Failed+r.Refused+r.Late > 0 || r.Elapsed != l.For {
		t.Errorf("open loop: %+v, %v", r, err)
	}

	l.Rate, l.Bytes = 0, size+1
	if r, err := l.run(ctx); err == nil {
		t.Errorf("answers of a wrong size count: %+v", r)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
