package main

import (
	"math"
	"runtime"
	"testing"

	"github.com/dunlin/dunlin/agent/alarm"
)

// The goals hold on a few devices: so many are detected, and so few alarms
// false, that it would be less likely than one in a thousand were the goals
// only just missed by the detector.
func TestGoals(t *testing.T) {
	const seed, months, each = 2_000_000, 3, 1
	all := measure(seed, months, each, runtime.GOMAXPROCS(0))
	detected, troubles := all.detected(nil)
	t.Logf("seeds from %d: %d of %d detected, %d false alarms in %.1f months", seed, detected, troubles, all.wrong(), all.months())
	if least := leastDetected(troubles); detected < least {
		t.Errorf("%d of %d detected, want %d", detected, troubles, least)
		for _, o := range all {
			if o.fault != nil && !o.detected {
				t.Logf("missed, seed %d: %s", o.seed, o.fault.name)
			}
		}
	}
	if most := mostFalse(all.months()); all.wrong() > most {
		t.Errorf("%d false alarms in %.1f months, want %d", all.wrong(), all.months(), most)
	}
}

// A detector that sees nothing, or a device without its trouble, does not
// reach them.
func TestNothingIsNotDetected(t *testing.T) {
	none := fault{name: "none", kind: alarm.ECC, gpu: true, begin: func(*device) *trouble {
		return &trouble{by: 24, act: func(*device, float64) {}}
	}}
	for seed := range uint64(3) {
		if o := follow(seed, &none); o.detected {
			t.Errorf("seed %d: detected", seed)
		}
	}
	if leastDetected(40) < 30 || mostFalse(10) > 25 {
		t.Errorf("of 40 at least %d, in 10 months at most %d", leastDetected(40), mostFalse(10))
	}
}

// leastDetected is how many of n are detected with a probability of 0.999
// where each is with goalRate.
func leastDetected(n int) int {
	sum := 0.0
	for k := range n + 1 {
		a, _ := math.Lgamma(float64(n + 1))
		b, _ := math.Lgamma(float64(k + 1))
		c, _ := math.Lgamma(float64(n - k + 1))
		if sum += math.Exp(a - b - c + float64(k)*math.Log(goalRate) + float64(n-k)*math.Log(1-goalRate)); sum > 0.001 {
			return k
		}
	}
	return n
}

// mostFalse is how many false alarms there are at most, with a probability of
// 0.999, where there are goalFalse each month.
func mostFalse(months float64) int {
	mean, sum := months*goalFalse, 0.0
	for k := 0; ; k++ {
		a, _ := math.Lgamma(float64(k + 1))
		if sum += math.Exp(-mean + float64(k)*math.Log(mean) - a); sum > 0.999 {
			return k
		}
	}
}

// The same seed gives the same telemetry.
func TestTraceIsTheSame(t *testing.T) {
	a, b := follow(7, &faults[0]), follow(7, &faults[0])
	if a.detected != b.detected || a.delay != b.delay || a.well != b.well {
		t.Errorf("%+v and %+v", a, b)
	}
}
