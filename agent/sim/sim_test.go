package sim

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
)

var (
	cpu  = []profiles.Provider{{Name: "CPUExecutionProvider"}}
	cuda = []profiles.Provider{{Name: "CUDAExecutionProvider"}, {Name: "CPUExecutionProvider"}}

	// board computes on its processor, jetson on a GPU that shares the memory,
	// card on one that does not.
	board = profiles.Profile{
		Name: "board", Description: "A board", Match: profiles.Rule{Arch: "arm64", DeviceTree: []string{"vendor,board-*", "vendor,board"}}, Providers: cpu,
		Power: profiles.Power{IdleWatts: 3, LimitWatts: 12}, Thermal: profiles.Thermal{WarnCelsius: 75, SlowdownCelsius: 80, ShutdownCelsius: 100},
		Hardware: profiles.Hardware{Cores: 4, HostBytes: 1 << 30, FP32GFLOPS: 50, MemoryGBPerSecond: 10, StorageMBPerSecond: 100, OverheadMicros: 100},
	}
	jetson = profiles.Profile{
		Name: "jetson", Description: "A Jetson", Match: profiles.Rule{Arch: "arm64", GPU: []string{"Orin"}}, Providers: cuda, Memory: profiles.Memory{Unified: true},
		Power: profiles.Power{IdleWatts: 5, LimitWatts: 15}, Thermal: profiles.Thermal{WarnCelsius: 80, SlowdownCelsius: 90, ShutdownCelsius: 105},
		Hardware: profiles.Hardware{Cores: 6, HostBytes: 8 << 30, FP32GFLOPS: 1000, MemoryGBPerSecond: 68, StorageMBPerSecond: 500, OverheadMicros: 100},
	}
	card = profiles.Profile{
		Name: "card", Description: "A server", Match: profiles.Rule{Arch: "amd64", GPU: []string{"NVIDIA C1"}}, Providers: cuda,
		Power: profiles.Power{IdleWatts: 20, LimitWatts: 100}, Thermal: profiles.Thermal{WarnCelsius: 80, SlowdownCelsius: 90, ShutdownCelsius: 100},
		Hardware: profiles.Hardware{Cores: 16, HostBytes: 64 << 30, DeviceBytes: 10 << 30, FP32GFLOPS: 10_000, MemoryGBPerSecond: 300, LinkGBPerSecond: 10, StorageMBPerSecond: 1000, OverheadMicros: 50},
	}
)

// describe gives models whose entry says the bytes of their weights and the
// GFLOP of a row: "1000,2.5".
func describe(s engine.Spec) (Model, error) {
	m := Model{Batch: true}
	var gflop float64
	if _, err := fmt.Sscanf(s.Entry, "%d,%f", &m.WeightBytes, &gflop); err != nil {
		return m, err
	}
	m.Inputs = []tensor.Info{{Name: "x", Type: tensor.Float32, Shape: []int64{-1, 4}}}
	m.Outputs = []tensor.Info{{Name: "y", Type: tensor.Float32, Shape: []int64{-1, 3}}, {Name: "s", Type: tensor.String, Shape: []int64{-1, 2}}}
	m.Costs = &models.Costs{FLOPs: models.Linear{PerRow: gflop * 1e9}, Workspace: models.Linear{Fixed: 100, PerRow: 1000}}
	return m, nil
}

// start makes a device that ends with the test; call it in a bubble.
func start(t testing.TB, p profiles.Profile, script string) *Device {
	t.Helper()
	events, err := ParseScript("script", []byte(script))
	if script != "" && err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Profile: p, Script: events, Seed: 1, Describe: describe})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func load(t testing.TB, d *Device, name, entry string) engine.VersionID {
	t.Helper()
	id := engine.VersionID{Model: name, Version: 1}
	if _, err := d.Load(t.Context(), engine.Spec{ID: id, Entry: entry}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Activate(t.Context(), id, engine.Setting{}); err != nil {
		t.Fatal(err)
	}
	return id
}

func rows(n int64) []tensor.Tensor {
	return []tensor.Tensor{{Name: "x", Type: tensor.Float32, Shape: []int64{n, 4}, Data: make([]byte, 16*n)}}
}

func run(t testing.TB, d *Device, id engine.VersionID, requests ...[]tensor.Tensor) engine.Outcome {
	t.Helper()
	out, err := d.Run(t.Context(), id, requests, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func near(a, b, within float64) bool { return math.Abs(a-b) <= within }

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, board, "")
		began := time.Now()
		id := load(t, d, "m", "100000000,5")
		// A second to read it for the first time, and one to bring it in.
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("loading and activating took %v", took)
		}
		out := run(t, d, id, rows(2), rows(1))
		if want := 300*time.Millisecond + 100*time.Microsecond; !near(out.Infer.Seconds(), want.Seconds(), 1e-8) {
			t.Errorf("a run of 3 rows took %v, want %v", out.Infer, want)
		}
		for i, want := range []struct {
			shapes string
			bytes  []int
		}{{"[2 3] [2 2]", []int{24, 16}}, {"[1 3] [1 2]", []int{12, 8}}} {
			o := out.Outputs[i]
			if got := fmt.Sprint(o[0].Shape, " ", o[1].Shape); got != want.shapes || len(o[0].Data) != want.bytes[0] || len(o[1].Data) != want.bytes[1] {
				t.Errorf("request %d: %v", i, o)
			}
			for _, x := range o {
				if err := x.Check(); err != nil {
					t.Error(err)
				}
			}
		}
		// Four at a time take four times as long, and no longer all together.
		began = time.Now()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if got := run(t, d, id, rows(1)).Infer.Seconds(); !near(got, 4*0.1001, 1e-8) {
					t.Errorf("one of four runs took %v s", got)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began).Seconds(); !near(took, 4*0.1001, 1e-8) {
			t.Errorf("four runs took %v s together", took)
		}
		// A run that comes into the middle of another takes half of what is left of it.
		wg.Go(func() {
			if got := run(t, d, id, rows(1)).Infer.Seconds(); !near(got, 0.05+0.1002, 1e-8) {
				t.Errorf("the first of two took %v s", got)
			}
		})
		time.Sleep(50 * time.Millisecond)
		if got := run(t, d, id, rows(1)).Infer.Seconds(); !near(got, 0.1002+0.05, 1e-8) {
			t.Errorf("the second of two took %v s", got)
		}
		wg.Wait()
		// One that is given up does not hold the others.
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, err := d.Run(ctx, id, [][]tensor.Tensor{rows(1000)}, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if got := run(t, d, id, rows(1)).Infer.Seconds(); !near(got, 0.1001, 1e-8) {
			t.Errorf("after one that was given up: %v s", got)
		}
		only, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, []string{"s"})
		if err != nil || len(only.Outputs[0]) != 1 || only.Outputs[0][0].Name != "s" {
			t.Errorf("%v, %v", only, err)
		}
		if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, []string{"z"}); !errors.Is(err, engine.ErrInvalidInput) {
			t.Error(err)
		}
		if err := d.Deactivate(t.Context(), id); err != nil {
			t.Error(err)
		}
		if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, nil); !errors.Is(err, engine.ErrNotLoaded) {
			t.Error(err)
		}
		if err := errors.Join(d.Unload(t.Context(), id)); err != nil {
			t.Error(err)
		}
		if err := d.Unload(t.Context(), id); !errors.Is(err, engine.ErrNotLoaded) {
			t.Error(err)
		}
		if d.core.used != 0 {
			t.Errorf("%d bytes are still used", d.core.used)
		}
	})
}

// A version is described by its file.
func TestDescribe(t *testing.T) {
	d, err := New(Config{Profile: board})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	info, err := d.Inspect(engine.Spec{ID: engine.VersionID{Model: "digits", Version: 1}, Dir: "../../models/examples/digits", Entry: "v2.onnx"})
	if err != nil || !info.Batch || len(info.Inputs) != 1 || len(info.Outputs) != 2 || info.Need.Weights < 10_000 || info.Need.Workspace == 0 {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := d.Inspect(engine.Spec{Dir: ".", Entry: "sim.go"}); !errors.Is(err, models.ErrInvalid) {
		t.Error(err)
	}
}

// Weights come over the link of a card, and share it.
func TestActivate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, card, "")
		var ids []engine.VersionID
		var all int64
		for _, name := range []string{"a", "b"} {
			id := engine.VersionID{Model: name, Version: 1}
			info, err := d.Load(t.Context(), engine.Spec{ID: id, Entry: "2000000000,1"})
			if err != nil {
				t.Fatal(err)
			}
			ids, all = append(ids, id), all+info.Need.Weights+info.Need.Session
		}
		d.Sample()
		began := time.Now()
		var wg sync.WaitGroup
		for _, id := range ids {
			wg.Go(func() {
				if _, err := d.Activate(t.Context(), id, engine.Setting{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took != 400*time.Millisecond {
			t.Errorf("4 GB over 10 GB/s took %v", took)
		}
		g := d.Sample().Gpus[0]
		if !near(*g.PcieRxBytesPerSecond, 10e9, 10) || *g.MemoryUsedBytes != uint64(10<<30-d.capacity+all) {
			t.Errorf("%v", g)
		}
	})
}

func TestOutOfMemory(t *testing.T) {
	for _, tt := range []struct {
		p    profiles.Profile
		full string // most of its memory
	}{{board, "900000000,1"}, {jetson, "7000000000,1"}, {card, "9000000000,1"}} {
		synctest.Test(t, func(t *testing.T) {
			d := start(t, tt.p, "")
			id := load(t, d, "full", tt.full)
			other := engine.VersionID{Model: "other", Version: 1}
			if _, err := d.Load(t.Context(), engine.Spec{ID: other, Entry: "900000000,1"}); err != nil {
				t.Fatal(err)
			}
			if _, err := d.Activate(t.Context(), other, engine.Setting{}); !errors.Is(err, engine.ErrOutOfMemory) {
				t.Errorf("%s: beyond its memory: %v", tt.p.Name, err)
			}
			if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(10_000_000)}, nil); !errors.Is(err, engine.ErrOutOfMemory) {
				t.Errorf("%s: a run without room: %v", tt.p.Name, err)
			}
			run(t, d, id, rows(1))
			if err := d.Deactivate(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if _, err := d.Activate(t.Context(), other, engine.Setting{}); err != nil {
				t.Errorf("%s: when there is room: %v", tt.p.Name, err)
			}
		})
	}
}

// euler integrates a device's equations in small steps, as written in the
// comment of core.go and apart from its code: one run of so many seconds of
// work, and then nothing, until end. It gives temperature and energy at each
// whole second, and when the run ended.
func euler(p profiles.Profile, ambient, work, end float64) (celsius, joules []float64, ended float64) {
	const dt = 1e-4
	r := 0.8 * (p.Thermal.WarnCelsius - 25) / p.Power.LimitWatts
	capacity := 120 / r
	x, e, slowed := 25+p.Power.IdleWatts*r, 0.0, false
	for n := range int(end / dt) {
		if n%10_000 == 0 {
			celsius, joules = append(celsius, x), append(joules, e)
		}
		power, clock := p.Power.IdleWatts, 1.0
		if slowed {
			clock = 0.5
		}
		if work > 0 {
			power += (p.Power.LimitWatts - p.Power.IdleWatts) * clock * clock * clock
			if work -= clock * dt; work <= 0 {
				ended = float64(n) * dt
			}
		}
		e += power * dt
		x += (power - (x-ambient)/r) / capacity * dt
		if x >= p.Thermal.SlowdownCelsius {
			slowed = true
		} else if x <= p.Thermal.SlowdownCelsius-5 {
			slowed = false
		}
	}
	return celsius, joules, ended
}

// Temperature and energy are those of an integration in small steps, cool and
// where the device has to slow down.
func TestTemperature(t *testing.T) {
	for _, tt := range []struct {
		name          string
		ambient, work float64
		slows         bool
	}{{"cool", 25, 300, false}, {"hot", 55, 300, true}} {
		t.Run(tt.name, func(t *testing.T) {
			celsius, joules, ended := euler(jetson, tt.ambient, tt.work, 700)
			synctest.Test(t, func(t *testing.T) {
				d := start(t, jetson, fmt.Sprintf("- {at: 0s, ambient_celsius: %v}", tt.ambient))
				id := load(t, d, "m", fmt.Sprintf("0,%f", tt.work*1000))
				var wg sync.WaitGroup
				wg.Go(func() {
					if took := run(t, d, id, rows(1)).Infer.Seconds(); !near(took, ended, 0.01) {
						t.Errorf("it ran for %v s, want %v", took, ended)
					}
				})
				synctest.Wait()
				slowed, sum := false, 0.0
				for n := range celsius {
					s := d.Sample()
					g := s.Gpus[0]
					if n > 0 {
						sum += *s.PowerWatts
					}
					if !near(*g.Celsius, celsius[n], 0.02) || !near(*s.EnergyJoules, joules[n], 0.5) || !near(*s.EnergyJoules, sum, 1e-6) {
						t.Fatalf("after %d s %v degrees and %v J (%v by power), want %v and %v", n, *g.Celsius, *s.EnergyJoules, sum, celsius[n], joules[n])
					}
					if *g.Celsius > jetson.Thermal.SlowdownCelsius+0.001 {
						t.Fatalf("%v degrees", *g.Celsius)
					}
					slowed = slowed || slices.Contains(g.ThrottleReasons, "sw_thermal")
					if u := *cmpOr(g.Utilisation, new(0.0)); n > 0 && !near(u, 1, 1e-6) && float64(n) < ended || u != 0 && float64(n) > ended+1 {
						t.Fatalf("utilisation of %v after %d s", u, n)
					}
					time.Sleep(time.Second)
				}
				wg.Wait()
				if slowed != tt.slows || tt.slows && ended < 1.05*tt.work {
					t.Errorf("slowed: %v; ended after %v s", slowed, ended)
				}
			})
		})
	}
}

func cmpOr(a, b *float64) *float64 {
	if a != nil {
		return a
	}
	return b
}

// A device that gets too hot is gone: what runs fails, and it does not answer.
func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, board, "- {at: 1m, ambient_celsius: 110}")
		id := load(t, d, "m", "0,1000000")
		if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, nil); !errors.Is(err, engine.ErrUnavailable) || !strings.Contains(err.Error(), "too hot") {
			t.Error(err)
		}
		select {
		case <-d.Down():
		default:
			t.Error("it is not down")
		}
		if _, _, err := d.Memory(); err == nil {
			t.Error("it answers")
		}
		if s := d.Sample(); len(s.Temperatures) > 0 || s.MemoryTotalBytes != nil || len(s.Faults) != 1 {
			t.Errorf("%v", s)
		}
	})
	// Also where nothing runs and nobody asks.
	synctest.Test(t, func(t *testing.T) {
		d := start(t, board, "- {at: 1h, ambient_celsius: 110}")
		began := time.Now()
		<-d.Down()
		if took := time.Since(began); took < time.Hour || took > time.Hour+10*time.Minute {
			t.Errorf("after %v", took)
		}
	})
}

// Each fault of a script shows where it should, when it should, and nowhere
// else before.
func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, card, `
- {at: 1m, nvml: lost}
- {at: 2m, nvml: back}
- {at: 3m, ecc_corrected_per_hour: 60, ecc_uncorrected_per_hour: 6}
- {at: 13m, ecc_corrected_per_hour: 0, ecc_uncorrected_per_hour: 0, remapped_rows: 2, remapped_rows_uncorrected: 1, remap: pending}
- {at: 14m, remap: failed, remapped_rows: 1, xid: 79}
- {at: 15m, xid: 63, remap: done}
- {at: 20m, disk_bytes_per_hour: 6000, leak_bytes_per_hour: 600}
- {at: 30m, disk_bytes_per_hour: 0, leak_bytes_per_hour: -60}
- {at: 40m, slow_factor: 3}
- {at: 50m, slow_factor: 1, power_cap_watts: 30}
- {at: 60m, power_cap_watts: 0, failing_fraction: 0.25}
- {at: 70m, failing_fraction: 0, worker: crash}
`)
		began := time.Now()
		id := load(t, d, "m", "1000000000,10000")
		at := func(m time.Duration) { time.Sleep(time.Until(began.Add(m))) }
		sample := func() string {
			s := d.Sample()
			if len(s.Gpus) == 0 {
				return fmt.Sprint(s.Faults)
			}
			g := s.Gpus[0]
			return fmt.Sprintf("ecc %d %d rows %d %d %v %v xid %d %d", *g.EccCorrected, *g.EccUncorrected, *g.RemappedRowsCorrected, *g.RemappedRowsUncorrected, *g.RemapPending, *g.RemapFailed, *g.XidCount, g.GetLastXid())
		}
		for _, tt := range []struct {
			at   time.Duration
			want string
		}{
			{59 * time.Second, "ecc 0 0 rows 0 0 false false xid 0 0"},
			{time.Minute, "[nvml: GPU is lost]"},
			{2 * time.Minute, "ecc 0 0 rows 0 0 false false xid 0 0"},
			{8*time.Minute + 30*time.Second, "ecc 5 0 rows 0 0 false false xid 0 0"},
			{13 * time.Minute, "ecc 10 1 rows 2 1 true false xid 0 0"},
			{14 * time.Minute, "ecc 10 1 rows 3 1 false true xid 1 79"},
			{19 * time.Minute, "ecc 10 1 rows 3 1 false false xid 2 63"},
		} {
			at(tt.at)
			if got := sample(); got != tt.want {
				t.Errorf("after %v %s, want %s", tt.at, got, tt.want)
			}
		}
		before := d.Sample()
		at(40 * time.Minute)
		after := d.Sample()
		if a, b := *before.DiskFreeBytes-*after.DiskFreeBytes, *after.AgentAnonymousBytes-*before.AgentAnonymousBytes; a != 1000 || b != 90 {
			t.Errorf("the disk is fuller by %d bytes, the agent larger by %d", a, b)
		}
		if used := *after.MemoryUsedBytes - *before.MemoryUsedBytes; used != 90 {
			t.Errorf("%d bytes of memory leaked", used)
		}
		if got := run(t, d, id, rows(1)).Infer.Seconds(); !near(got, 3.00015, 1e-6) {
			t.Errorf("slow by 3: %v s", got)
		}
		at(50 * time.Minute)
		// An eighth of the dynamic power leaves half of the clock.
		d.Sample()
		var wg sync.WaitGroup
		wg.Go(func() {
			if got := run(t, d, id, rows(1)).Infer.Seconds(); !near(got, 2.0001, 1e-6) {
				t.Errorf("capped: %v s", got)
			}
		})
		time.Sleep(time.Second)
		if g := d.Sample().Gpus[0]; !near(*g.PowerWatts, 30, 1e-9) || *g.PowerLimitWatts != 30 || fmt.Sprint(g.ThrottleReasons) != "[sw_power_cap]" {
			t.Errorf("capped: %v", g)
		}
		wg.Wait()
		at(60 * time.Minute)
		failed := 0
		for range 100 {
			if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, nil); err != nil {
				failed++
			}
		}
		if failed < 15 || failed > 35 {
			t.Errorf("%d of 100 runs failed", failed)
		}
		at(70*time.Minute - time.Second/2)
		if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, nil); !errors.Is(err, engine.ErrNotLoaded) {
			t.Errorf("during a crash: %v", err)
		}
		if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, nil); !errors.Is(err, engine.ErrNotLoaded) {
			t.Errorf("after a crash: %v", err)
		}
		if _, err := d.Activate(t.Context(), id, engine.Setting{}); err != nil {
			t.Fatal(err)
		}
		run(t, d, id, rows(1))
	})
}

// A crash is told with what ran.
func TestOnCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := make(chan string, 2)
		d, err := New(Config{Profile: board, Describe: describe, Script: []Event{{At: time.Minute, Fault: "worker"}, {At: time.Hour, Fault: "worker"}}})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.OnCrash(func(running []engine.VersionID) { told <- fmt.Sprint(running) })
		id := load(t, d, "m", "1000,100000")
		if _, err := d.Run(t.Context(), id, [][]tensor.Tensor{rows(1)}, nil); !errors.Is(err, engine.ErrNotLoaded) {
			t.Error(err)
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if got := <-told + " " + <-told; got != "[m:1] []" {
			t.Error(got)
		}
	})
}

// Under an engine, a crash costs no request, and too little memory for all
// versions only time.
func TestUnderEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, board, "- {at: 20s, worker: crash}\n- {at: 20500ms, worker: crash}\n- {at: 40s, slow_factor: 2}")
		e := engine.New(engine.Config{Runtime: d, Memory: 500_000_000})
		ctx, cancel := context.WithCancel(t.Context())
		var done, work sync.WaitGroup
		done.Go(func() { e.Run(ctx) })
		began := time.Now()
		for i := range 4 {
			id := engine.VersionID{Model: fmt.Sprint("m", i), Version: 1}
			if _, err := e.Load(ctx, engine.Spec{ID: id, Entry: "200000000,5"}); err != nil {
				t.Fatal(err)
			}
			work.Go(func() {
				for time.Since(began) < time.Minute {
					r, err := e.Infer(ctx, id, engine.Request{Inputs: rows(2)})
					if err != nil {
						t.Errorf("after %v: %v", time.Since(began), err)
						return
					}
					r.Release()
					time.Sleep(time.Second)
				}
			})
		}
		work.Wait()
		swapped := uint64(0)
		for _, v := range e.Versions() {
			swapped += v.Swaps.BytesIn
			if v.Figures.Success.Count < 5 || v.Figures.Failure.Count > 0 {
				t.Errorf("%s: %+v", v.ID, v.Figures)
			}
		}
		if swapped < 1e9 {
			t.Errorf("%d bytes came in", swapped)
		}
		cancel()
		done.Wait()
	})
}

// The same seed gives the same times, another seed others; their tail is heavy.
func TestJitter(t *testing.T) {
	times := func(seed uint64, jitter float64) (all []float64) {
		synctest.Test(t, func(t *testing.T) {
			d, err := New(Config{Profile: board, Describe: describe, Seed: seed, Jitter: jitter})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			id := load(t, d, "m", "1000,5")
			for range 2000 {
				all = append(all, run(t, d, id, rows(1)).Infer.Seconds()/0.1001-1)
			}
		})
		return all
	}
	a := times(1, 0.02)
	if !slices.Equal(a, times(1, 0.02)) || slices.Equal(a, times(2, 0.02)) {
		t.Error("it is not the seed that decides")
	}
	slices.Sort(a)
	// The quantiles of a Lomax distribution: scale ((1-p)^(-1/shape) - 1).
	for _, p := range []float64{0.1, 0.5, 0.9, 0.99} {
		if got, want := a[int(p*2000)], 0.02*(math.Pow(1-p, -1/2.5)-1); !near(got, want, 0.2*want) {
			t.Errorf("quantile %v is %v, want %v", p, got, want)
		}
	}
	if none := times(1, 0); slices.Max(none) > 1e-6 || slices.Min(none) < -1e-6 {
		t.Error("there is jitter without jitter")
	}
}

func TestInfo(t *testing.T) {
	for _, tt := range []struct {
		p    profiles.Profile
		want string
	}{
		{board, "arm64 4 1073741824 vendor,board []"},
		{jetson, "arm64 6 8589934592 A Jetson [Orin true 8589934592]"},
		{card, "amd64 16 68719476736 A server [NVIDIA C1 false 10737418240]"},
	} {
		d := start(t, tt.p, "")
		i := d.Info()
		var gpus []string
		for _, g := range i.Gpus {
			gpus = append(gpus, fmt.Sprint(g.Name, " ", g.UnifiedMemory, " ", g.MemoryBytes))
			if !strings.HasPrefix(g.Uuid, "GPU-") || g.Name != d.GPU() {
				t.Error(g)
			}
		}
		if got := fmt.Sprint(i.Arch, " ", i.CpuCount, " ", i.MemoryBytes, " ", i.Board, " ", gpus); got != tt.want || !i.Simulated || i.FirmwareProfile != tt.p.Name {
			t.Errorf("%s: %s, want %s", tt.p.Name, got, tt.want)
		}
		s := d.Sample()
		if (len(s.Gpus) > 0) != (tt.p.Name != "board") || (s.PowerWatts != nil) != (tt.p.Name != "card") {
			t.Errorf("%s: %v", tt.p.Name, s)
		}
		if available, total, err := d.Memory(); err != nil || total != uint64(tt.p.Hardware.HostBytes) || available >= total || available < total/2 {
			t.Error(available, total, err)
		}
	}
	// What the class does not have is absent.
	bare := board
	bare.Power, bare.Thermal = profiles.Power{}, profiles.Thermal{}
	if s := start(t, bare, "").Sample(); s.PowerWatts != nil || s.EnergyJoules != nil || len(s.Temperatures) > 0 || len(s.Gpus) > 0 {
		t.Errorf("%v", s)
	}
}

func TestNewRefuses(t *testing.T) {
	p := card
	p.Hardware.Cores, p.Hardware.LinkGBPerSecond, p.Power.LimitWatts = -1, math.NaN(), -2
	_, err := New(Config{Profile: p, Jitter: -1, Script: []Event{{Fault: "teapot"}, {Fault: "xid", Value: 1.5}, {At: -1, Fault: "nvml"}, {Fault: "nvml", Value: 7}}})
	for _, want := range []string{
		"profile card: hardware.cores: is -1, allowed are 0 and more", "hardware.link_gb_per_second: is NaN", "power.limit_watts: is -2",
		"jitter: is -1", `script event 0: fault "teapot": known are`, "script event 1: xid: is 1.5, it must be whole", "script event 2: at: is -1ns", "script event 3: nvml: is 7, allowed are 0 to 1",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}

// A profile that says nothing of the hardware gives a device all the same,
// without sensors.
func TestAssumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := start(t, profiles.Profile{Name: "any"}, "")
		run(t, d, load(t, d, "m", "1000,5"), rows(1))
		if s := d.Sample(); s.PowerWatts != nil || len(s.Temperatures) > 0 || *s.MemoryTotalBytes != 8<<30 || d.Info().CpuCount != 8 {
			t.Errorf("%v", s)
		}
	})
}

// Two hundred devices with an engine each, in one process: each loads three
// models that do not fit together and answers requests for a minute.
func TestFleet(t *testing.T) {
	const devices, requests = 200, 30
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse)
	}
	before := heap()
	goroutines := runtime.NumGoroutine()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var engines, work sync.WaitGroup
		all := make([]*Device, devices)
		answered := make([]int, devices)
		for i := range all {
			d, err := New(Config{Profile: jetson, Seed: uint64(i), Jitter: DefaultJitter, Describe: describe})
			if err != nil {
				t.Fatal(err)
			}
			all[i] = d
			e := engine.New(engine.Config{Runtime: d, Memory: 5 << 30})
			engines.Go(func() { e.Run(ctx) })
			work.Go(func() {
				var ids []engine.VersionID
				for m := range 3 {
					id := engine.VersionID{Model: fmt.Sprint("m", m), Version: 1}
					if _, err := e.Load(ctx, engine.Spec{ID: id, Entry: "2000000000,10"}); err != nil {
						t.Error(err)
						return
					}
					ids = append(ids, id)
				}
				for n := range requests {
					r, err := e.Infer(ctx, ids[n%3], engine.Request{Inputs: rows(1)})
					if err != nil {
						t.Error(err)
						return
					}
					r.Release()
					answered[i]++
					time.Sleep(2 * time.Second)
				}
			})
		}
		work.Wait()
		each := (heap() - before) / devices
		t.Logf("%d devices with an engine and three models each: %d KiB a device, %.1f goroutines", devices, each>>10, float64(runtime.NumGoroutine()-goroutines)/devices)
		if each > 64<<10 {
			t.Errorf("a device takes %d bytes", each)
		}
		for i, n := range answered {
			if n != requests {
				t.Errorf("device %d answered %d requests", i, n)
			}
			all[i].Close()
		}
		cancel()
		engines.Wait()
	})
}

// Each built-in class makes a device that runs a model.
func TestClasses(t *testing.T) {
	set, err := profiles.Load()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range set.Names() {
		p, err := set.Named(name)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			d := start(t, p, "")
			id := load(t, d, "m", "100000000,10")
			time.Sleep(time.Second)
			d.Sample()
			took := run(t, d, id, rows(1600)).Infer
			s := d.Sample()
			watts := s.PowerWatts
			if len(s.Gpus) > 0 {
				watts = s.Gpus[0].PowerWatts
			}
			if p.Power.LimitWatts > 0 && (watts == nil || !near(*watts, p.Power.LimitWatts, 1e-6)) || p.Power.LimitWatts == 0 && watts != nil {
				t.Errorf("%s at work: %v W, its limit is %v", name, watts, p.Power.LimitWatts)
			}
			t.Logf("%s: 16 TFLOP in %v, %d MiB for models", name, took, d.Capacity()>>20)
		})
	}
}
