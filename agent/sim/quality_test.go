package sim

import (
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models/tensor"
)

// two are versions 1 and 2 of a model that gives class probabilities.
func two(t *testing.T, d *Device) (good, bad engine.VersionID) {
	t.Helper()
	d.cfg.Describe = func(engine.Spec) (Model, error) {
		return Model{
			Inputs:      []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 4}}},
			Outputs:     []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{-1, 10}}},
			WeightBytes: 1e9, Batch: true,
		}, nil
	}
	good, bad = load(t, d, "m", ""), engine.VersionID{Model: "m", Version: 2}
	if _, err := d.Load(t.Context(), engine.Spec{ID: bad}); err != nil {
		t.Fatal(err)
	}
	if err := d.Deactivate(t.Context(), good); err != nil { // both do not fit
		t.Fatal(err)
	}
	return good, bad
}

// What a script says of one version befalls no other.
func TestQualityOfVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, jetson, `
- {at: 0s, confidence: 0.9, slow_factor: 2}
- {at: 0s, version: "m:2", slow_factor: 3, energy_factor: 2, confidence: 0.5, failing_fraction: 0.25}
`)
		good, bad := two(t, d)
		// The mean of the largest probabilities, the seconds and watts of a run, and
		// the part that fails.
		measure := func(id engine.VersionID) (confidence, seconds, watts, failed float64) {
			if _, err := d.Activate(t.Context(), id, engine.Setting{}); err != nil {
				t.Fatal(err)
			}
			const runs = 2000
			began, joules := time.Now(), *d.Sample().Gpus[0].EnergyJoules
			n := 0.
			for range runs {
				out, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(2)}, nil)
				if err != nil {
					failed += 1. / runs
					continue
				}
				y := out.Outputs[0][0].Data
				for row := range 2 {
					sum, most := 0., 0.
					for i := range 10 {
						p := float64(math.Float32frombits(binary.LittleEndian.Uint32(y[4*(10*row+i):])))
						sum, most = sum+p, max(most, p)
					}
					if !near(sum, 1, 1e-5) {
						t.Fatalf("the probabilities have the sum %v", sum)
					}
					confidence, n = confidence+most, n+1
				}
			}
			seconds = time.Since(began).Seconds()
			watts = (*d.Sample().Gpus[0].EnergyJoules - joules) / seconds
			if err := d.Deactivate(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			return confidence / n, seconds, watts, failed
		}
		c1, s1, w1, f1 := measure(good)
		c2, s2, w2, f2 := measure(bad)
		if !near(c1, 0.9, 0.03) || !near(c2, 0.5, 0.03) || f1 != 0 || !near(f2, 0.25, 0.05) || !near(s2/s1, 3, 0.01) {
			t.Errorf("confidence %v and %v, failed %v and %v, %v and %v s", c1, c2, f1, f2, s1, s2)
		}
		idle, most := jetson.Power.IdleWatts, jetson.Power.LimitWatts
		if !near(w1, most, 1e-6) || !near(w2, idle+2*(most-idle), 1e-6) {
			t.Errorf("%v and %v W, the limit is %v", w1, w2, most)
		}
	})
}

// A version whose runs crash the worker is put into quarantine at the second
// crash, and others go on; one that cannot be loaded says so.
func TestVersionThatCrashes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, jetson, `- {at: 0s, version: "m:2", crashing_fraction: 1}
- {at: 1h, version: "m:1", load: fails}`)
		good, bad := two(t, d)
		lost := make(chan engine.VersionID, 2)
		d.OnLost(func(id engine.VersionID, reason error) {
			if !errors.Is(reason, engine.ErrQuarantined) {
				t.Error(reason)
			}
			lost <- id
		})
		for i, want := range []error{engine.ErrNotLoaded, engine.ErrQuarantined, engine.ErrQuarantined} {
			if i < 2 {
				if _, err := d.Activate(t.Context(), bad, engine.Setting{}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := d.Run(t.Context(), bad, [][]tensor.Tensor{rows(1)}, nil); !errors.Is(err, want) {
				t.Errorf("run %d: %v, want %v", i, err, want)
			}
		}
		if len(lost) != 1 || <-lost != bad {
			t.Error("the quarantine was not told once")
		}
		if _, err := d.Activate(t.Context(), good, engine.Setting{}); err != nil {
			t.Fatal(err)
		}
		run(t, d, good, rows(1))
		time.Sleep(time.Hour)
		if _, err := d.Load(t.Context(), engine.Spec{ID: good}); err == nil || !strings.Contains(err.Error(), "cannot be loaded") {
			t.Error(err)
		}
	})
}

func TestScriptOfVersion(t *testing.T) {
	_, err := ParseScript("f", []byte(`- {at: 1s, version: "m:2", xid: 3}
- {at: 1s, version: m, slow_factor: 2}
- {at: 1s, version: "m:02", slow_factor: 2}
- {at: 1s, version: "m:1"}
`))
	for _, want := range []string{
		"f:1:4: xid: befalls the whole device, not version m:2", `f:2:21: version: is "m", it must be like digits:3`, `f:3:21: version: is "m:02"`, "f:4:4: no fault is named",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
	if _, err := New(Config{Profile: jetson, Script: []Event{{Fault: "xid", Value: 1, Version: "m:1"}}}); err == nil {
		t.Error("a device takes an XID of a version")
	}
}
