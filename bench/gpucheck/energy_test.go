package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxh200"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/server"

	"github.com/dunlin/dunlin/agent/device"
)

// metered is a GPU whose power swings between 300 and 500 W, and whose energy
// counter counts factor times that.
func metered(factor float64) *server.Server {
	s := dgxh200.New()
	s.Devices = s.Devices[:1]
	s.LookupSymbolFunc = func(name string) error {
		switch name { // the simulation has these, and those below
		case "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption":
			return nil
		}
		return errors.New("undefined symbol")
	}
	g := s.Devices[0].(*server.Device)
	start := time.Now()
	// 300 W in even seconds and 500 W in odd ones, on straight lines between.
	watts := func(t float64) float64 {
		second, part := int(t), t-float64(int(t))
		if second%2 == 0 {
			return 300 + 200*part
		}
		return 500 - 200*part
	}
	g.GetPowerUsageFunc = func() (uint32, nvml.Return) {
		return uint32(1000 * watts(time.Since(start).Seconds())), nvml.SUCCESS
	}
	g.GetTotalEnergyConsumptionFunc = func() (uint64, nvml.Return) {
		t := time.Since(start).Seconds()
		joules := 400 * float64(int(t)) // the mean of each whole second
		whole := float64(int(t))
		joules += (watts(whole) + watts(t)) / 2 * (t - whole)
		return uint64(1000 * factor * joules), nvml.SUCCESS
	}
	return s
}

func TestEnergy(t *testing.T) {
	for _, tt := range []struct {
		factor float64
		passes bool
	}{{1, true}, {1.04, true}, {0.96, true}, {1.06, false}, {0.94, false}, {0, false}} {
		synctest.Test(t, func(t *testing.T) {
			m := device.Open(device.Config{Dir: t.TempDir(), Root: t.TempDir(), NVML: metered(tt.factor)})
			defer m.Close()
			var loads atomic.Bool
			var out strings.Builder
			start := time.Now()
			err := energy(t.Context(), m, m.Info().Gpus[0].Uuid, func(ctx context.Context) error {
				loads.Store(true)
				<-ctx.Done()
				return ctx.Err()
			}, &out)
			if (err == nil) != tt.passes || !loads.Load() || !strings.Contains(out.String(), "energy: 51 samples in 10s") {
				t.Errorf("factor %v: %v\n%s", tt.factor, err, &out)
			}
			if took := time.Since(start); took < energyTime {
				t.Errorf("took %v", took)
			}
		})
	}
}

// TestEnergyWithout: a GPU that does not count its energy is no success, nor is
// one that is not there, nor a load that fails.
func TestEnergyWithout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := metered(1)
		idle := func(ctx context.Context) error { <-ctx.Done(); return nil }
		m := device.Open(device.Config{Dir: t.TempDir(), Root: t.TempDir(), NVML: s})
		defer m.Close()
		if err := energy(t.Context(), m, "GPU-other", idle, io.Discard); err == nil || !strings.Contains(err.Error(), "GPU-other") {
			t.Errorf("another GPU: %v", err)
		}
		broken := errors.New("broken")
		if err := energy(t.Context(), m, "", func(context.Context) error { return broken }, io.Discard); !errors.Is(err, broken) {
			t.Errorf("load: %v", err)
		}
		s.Devices[0].(*server.Device).GetTotalEnergyConsumptionFunc = func() (uint64, nvml.Return) { return 77, nvml.ERROR_NOT_SUPPORTED }
		time.Sleep(time.Second)
		if err := energy(t.Context(), m, "", idle, io.Discard); !errors.Is(err, errNoCounter) {
			t.Errorf("without a counter: %v", err)
		}
	})
}

func TestCompare(t *testing.T) {
	at := func(s float64) time.Time { return time.Unix(0, int64(s*1e9)) }
	integrated, counted, err := compare([]reading{{at(0), 100, 7}, {at(1), 200, 157}, {at(1.5), 200, 257}})
	if err != nil || integrated != 250 || counted != 250 {
		t.Errorf("%v, %v, %v", integrated, counted, err)
	}
	for name, all := range map[string][]reading{
		"one":     {{at(0), 100, 0}},
		"none":    nil,
		"falls":   {{at(0), 100, 500}, {at(1), 100, 400}},
		"gap":     {{at(0), 100, 0}, {at(60), 100, 6000}},
		"stands":  {{at(0), 100, 0}, {at(0), 100, 1}},
		"no heat": {{at(0), 0, 5}, {at(1), 0, 5}},
	} {
		if _, _, err := compare(all); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
