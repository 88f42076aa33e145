package agent

import (
	"github.com/dunlin/dunlin/agent/device"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// machine is the device that an agent runs on: this one, or a simulated one.
type machine interface {
	// Info describes it.
	Info() *dunlinv1.DeviceInfo
	// Sample gives its figures now; what it does not have is absent.
	Sample() *dunlinv1.Telemetry
	// Memory gives the bytes of its memory that programs can have, and those
	// that there are.
	Memory() (available, total uint64, err error)
	Close() error
}

// kernel is the machine that the kernel knows.
type kernel struct {
	*device.Sampler
	dir string
}

// openMachine gives the machine that has its data in a folder.
func (s *Serving) openMachine(dir string) machine {
	if s.sim != nil {
		return s.sim
	}
	return kernel{device.NewSampler(dir), dir}
}

func (k kernel) Info() *dunlinv1.DeviceInfo                 { return device.Info(k.dir) }
func (kernel) Memory() (available, total uint64, err error) { return device.Memory() }
func (kernel) Close() error                                 { return nil }
func (s *Serving) memory() (available, total uint64, err error) {
	if s.sim != nil {
		return s.sim.Memory()
	}
	return device.Memory()
}
