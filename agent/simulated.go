package agent

import (
	"context"
	"errors"
	"fmt"
	"math"

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
	sim    *sim.Device // nil until simulate, and where none is simulated
}

func (s *Simulation) settings() []program.Setting {
	return []program.Setting{
		{Name: "sim-device", Usage: "`profile` of a class: simulate a device of it, which runs no model and answers zeros", Value: &s.SimDevice},
		{Name: "sim-script", Usage: "YAML `file` of what befalls the simulated device, and when", Value: &s.SimScript},
		{Name: "sim-seed", Usage: "`number` from which the simulated device's chances come", Value: &s.SimSeed},
	}
}

func (s *Serving) checkSimulation(add func(name string, err error)) {
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
	_, err := s.class()
	add("sim-device", err)
	if s.FirmwareProfile != "" {
		add("firmware-profile", errors.New("has no meaning with --sim-device, which names one"))
	}
}

// class gives the firmware profile of the device that is to be simulated.
func (s *Serving) class() (profiles.Profile, error) {
	set, err := profiles.Load(s.profileFolders()...)
	if err != nil {
		return profiles.Profile{}, err
	}
	return set.Named(s.SimDevice)
}

// simulate gives the settings their machine, where it is to be simulated.
func (s *Serving) simulate() error {
	if s.SimDevice == "" {
		return nil
	}
	p, err := s.class()
	if err == nil {
		s.sim, err = sim.New(sim.Config{Profile: p, Script: s.script, Seed: uint64(s.SimSeed), Jitter: sim.DefaultJitter})
	}
	if err != nil {
		return fmt.Errorf("sim-device: %w", err)
	}
	s.machine = s.sim
	return nil
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
	if cfg.OnLost != nil {
		d.OnLost(cfg.OnLost)
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

// compile describes a version: nothing is compiled.
func (s *simulated) compile(_ context.Context, _ worker.Runtime, spec engine.Spec) (worker.Image, error) {
	info, err := s.Inspect(spec)
	return worker.Image{Info: info, Release: func() {}}, err
}

// PID gives 0: no process holds the models.
func (*simulated) PID() int { return 0 }
