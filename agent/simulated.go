package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/ort"
	"github.com/dunlin/dunlin/agent/sim"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/program"
)

// Simulation says which device an agent is to simulate instead of using the
// one that it is on.
type Simulation struct {
	SimDevice string `yaml:"sim-device"` // name of a firmware profile; "": none
	SimScript string `yaml:"sim-script"` // file of the faults to come; "": none
	SimSeed   int    `yaml:"sim-seed"`

	script []sim.Event
	sim    *sim.Device // nil until classify, and where none is simulated
}

func (s *Simulation) settings() []program.Setting {
	return []program.Setting{
		{Name: "sim-device", Usage: "`profile` of a class: simulate a device of it, which runs no model and answers zeros", Value: &s.SimDevice},
		{Name: "sim-script", Usage: "YAML `file` of what befalls the simulated device, and when", Value: &s.SimScript},
		{Name: "sim-seed", Usage: "`number` from which the simulated device's chances come", Value: &s.SimSeed},
	}
}

func (s *Simulation) check(add func(name string, err error)) {
	if s.SimDevice == "" {
		if s.SimScript != "" || s.SimSeed != 0 {
			add("sim-script, sim-seed", errors.New("have a meaning with --sim-device only"))
		}
		return
	}
	if s.SimSeed < 0 {
		add("sim-seed", fmt.Errorf("is %d, allowed are 0 to %d", s.SimSeed, math.MaxInt))
	}
	if s.SimScript != "" {
		var err error
		s.script, err = sim.ReadScript(s.SimScript)
		add("sim-script", err)
	}
	_, err := named(s.SimDevice)
	add("sim-device", err)
}

// named gives the firmware profile of a name.
func named(name string) (profiles.Profile, error) {
	var known []string
	for _, arch := range []string{"amd64", "arm64"} {
		p, err := profiles.Match(arch)
		if err != nil {
			return profiles.Profile{}, err
		}
		if p.Name == name {
			return p, nil
		}
		known = append(known, p.Name)
	}
	return profiles.Profile{}, fmt.Errorf("no firmware profile is called %q, there are %s", name, strings.Join(known, ", "))
}

// classify gives the firmware profile that the device goes by. From then on a
// device that is to be simulated is.
func (s *Simulation) classify() (profiles.Profile, error) {
	if s.SimDevice == "" {
		return profiles.Match(runtime.GOARCH)
	}
	p, err := named(s.SimDevice)
	if err != nil {
		return p, err
	}
	s.sim, err = sim.New(sim.Config{Profile: p, Script: s.script, Seed: uint64(s.SimSeed), Jitter: sim.DefaultJitter})
	return p, err
}

// simulated has a simulated device do what a worker process does.
type simulated struct {
	*sim.Device
	profile profiles.Profile
}

func newSimulated(d *sim.Device, p profiles.Profile, cfg worker.Config) *simulated {
	if cfg.OnDeath != nil {
		d.OnCrash(func(running []engine.VersionID) {
			cfg.OnDeath(worker.Death{Err: &worker.DeathError{Status: "simulated"}, InFlight: running})
		})
	}
	return &simulated{d, p}
}

// Supervise waits until ctx is done; a device that shuts down takes its agent
// with it.
func (s *simulated) Supervise(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-s.Down():
		return errors.New("the simulated device has shut down: it is too hot")
	}
}

// Runtime says that models run on the class's providers, with their weights in
// its GPU's memory where it has one.
func (s *simulated) Runtime(context.Context) (worker.Runtime, error) {
	r := worker.Runtime{Version: "simulated"}
	for _, p := range s.profile.Providers {
		r.Providers = append(r.Providers, p.Name)
	}
	if gpu := s.GPU(); gpu != "" {
		r.Pooling, r.PoolBytes = ort.Pooling{Device: gpu, Works: true}, s.Capacity()
	}
	return r, nil
}

// PID gives 0: no process holds the models.
func (*simulated) PID() int { return 0 }
