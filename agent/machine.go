package agent

import (
	"github.com/dunlin/dunlin/agent/device"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// machine is the device that the agent runs on, or what stands for one. Its
// methods may be called concurrently.
type machine interface {
	// Info describes it, without what the agent adds.
	Info() *dunlinv1.DeviceInfo
	// Sample gives its figures now; the caller may change what it gets.
	Sample() *dunlinv1.Telemetry
	// Memory gives the bytes of memory that programs can still have, and those
	// that there are.
	Memory() (available, total uint64, err error)
	Close() error
}

// openMachine finds out what the device is, unless the settings already have
// one, and gives what closes it.
func (s *Serving) openMachine(data string) (closeIt func()) {
	if s.machine == nil {
		s.machine = kernel{device.NewSampler(data), data}
	}
	return func() {
		if err := s.machine.Close(); err != nil {
			s.Log.Warn("device not closed", "error", err)
		}
	}
}

// memory is that of the machine.
func (s *Serving) memory() (available, total uint64, err error) {
	if s.machine == nil {
		return device.Memory()
	}
	return s.machine.Memory()
}

// kernel is the machine that the kernel knows.
type kernel struct {
	*device.Sampler
	dir string
}

func (k kernel) Info() *dunlinv1.DeviceInfo                 { return device.Info(k.dir) }
func (kernel) Memory() (available, total uint64, err error) { return device.Memory() }
func (kernel) Close() error                                 { return nil }
