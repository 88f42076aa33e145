package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/agent/device"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/worker"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// classify finds the firmware profile of the device that info describes, and
// says in info which it is, and why.
func (s *Serving) classify(ctx context.Context, info *dunlinv1.DeviceInfo) (profiles.Match, error) {
	if s.sim != nil {
		info.FirmwareProfileReason = "--sim-device"
		return profiles.Match{Profile: s.sim.Profile(), Reason: info.FirmwareProfileReason}, nil
	}
	set, err := profiles.Load(s.profileFolders()...)
	if err != nil {
		return profiles.Match{}, fmt.Errorf("firmware profiles:\n%w", err)
	}
	facts := device.Facts(info)
	if set.NeedsRuntime() && facts.Runtime == "" && s.RuntimeLib != "" {
		probe, cancel := context.WithTimeout(ctx, doctorTimeout)
		defer cancel()
		found, err := worker.Probe(probe, worker.Config{Command: s.Worker, RuntimeLib: s.RuntimeLib, Log: s.Log})
		if err != nil {
			s.Log.Warn("firmware profiles that name a version of ONNX Runtime do not count: it does not start", "error", err)
		}
		facts.Runtime = found.Version
	}
	m, err := set.Match(facts)
	if name := s.FirmwareProfile; name != "" {
		chosen, missing := set.Named(name)
		if missing != nil {
			return m, fmt.Errorf("firmware-profile: %w", missing)
		}
		if err == nil && m.Profile.Name != name {
			m.Also = append([]string{m.Profile.Name}, m.Also...)
			m.Also = slices.DeleteFunc(m.Also, func(also string) bool { return also == name })
		}
		m.Profile, m.Reason, err = chosen, "--firmware-profile", nil
	}
	if err != nil {
		return m, fmt.Errorf("%w; --firmware-profile chooses one", err)
	}
	info.FirmwareProfile, info.FirmwareProfileReason = m.Profile.Name, m.Reason
	return m, nil
}

// profileFolders are those of the site's own firmware profiles.
func (s *Serving) profileFolders() []string {
	if s.FirmwareProfiles == "" {
		return nil
	}
	return []string{s.FirmwareProfiles}
}

// limits are what bounds the models that the device takes, with the runtime
// that was found; before one was, found is zero, and nothing runs on a GPU.
// The class's figures are those of its GPU, where it has one: they are left out
// where models run on the CPU all the same.
func (h *host) limits(found worker.Runtime) *dunlinv1.DeviceLimits {
	p := &h.profile
	l := &dunlinv1.DeviceLimits{
		HostMemoryBytes: uint64(h.budget), DiskReserveBytes: uint64(p.Storage.ReserveBytes), MaxOpset: p.Limits.MaxOpset,
		Precisions: p.Limits.Precisions, Oversize: h.serving.Oversize == "map",
	}
	if found.Pooling.Works {
		l.DeviceMemoryBytes = uint64(h.serving.deviceBudget(p.Memory, found.PoolBytes))
	}
	if onGPU(p) == found.Pooling.Works {
		l.Fp32Gflops, l.MemoryGbPerSecond = p.Hardware.FP32GFLOPS, p.Hardware.MemoryGBPerSecond
		l.RunOverheadSeconds, l.ActiveWatts = p.Hardware.OverheadMicros/1e6, p.Power.LimitWatts
	}
	return l
}

// onGPU says whether models of the class run on a GPU first.
func onGPU(p *profiles.Profile) bool {
	return len(p.Providers) > 0 && p.Providers[0].Name == cudaProvider
}

// processors sets which processors the worker may use, and with it how many
// threads, where neither settings nor profile say.
func processors(cfg *worker.Config, p *profiles.Profile) error {
	all, err := profiles.Processors(p.Affinity)
	if err != nil {
		return err
	}
	if cfg.Affinity = all; cfg.Threads == 0 {
		cfg.Threads = len(all)
	}
	return nil
}

// compileFunc is host.compile.
type compileFunc func(context.Context, worker.Runtime, engine.Spec) (worker.Image, error)

// permitted refuses a model that the class's limits exclude before it is
// compiled, or opened as it was.
func permitted(limits profiles.Limits, compile compileFunc) compileFunc {
	if limits.MaxOpset == 0 && len(limits.Precisions) == 0 {
		return compile
	}
	return func(ctx context.Context, found worker.Runtime, spec engine.Spec) (worker.Image, error) {
		// What cannot be read is left to those who compile it.
		if graph, err := models.Inspect(filepath.Join(spec.Dir, spec.Entry)); err == nil {
			if err := permits(limits, graph); err != nil {
				return worker.Image{}, fmt.Errorf("%s: %w", spec.ID, err)
			}
		}
		return compile(ctx, found, spec)
	}
}

// permits says which of the class's limits excludes a model. Of element types
// those count that the profiles know: the floating-point ones of inputs,
// outputs and weights, and the 8-bit integers of weights. Others are indices,
// shapes, images and text.
func permits(limits profiles.Limits, graph *models.Graph) error {
	if limits.MaxOpset > 0 && graph.Opset > limits.MaxOpset {
		return fmt.Errorf("%w: opset is %d, the firmware profile's limits.max_opset is %d", errNotPermitted, graph.Opset, limits.MaxOpset)
	}
	if len(limits.Precisions) == 0 {
		return nil
	}
	check := func(what string, t tensor.Type) error {
		name := t.String()
		if slices.Contains(profiles.Precisions, name) && !slices.Contains(limits.Precisions, name) {
			return fmt.Errorf("%w: %s of %s, the firmware profile's limits.precisions are %s", errNotPermitted, what, name, strings.Join(limits.Precisions, ", "))
		}
		return nil
	}
	for _, t := range graph.WeightTypes {
		if err := check("it has weights", t); err != nil {
			return err
		}
	}
	for _, info := range slices.Concat(graph.Inputs, graph.Outputs) {
		if info.Type == tensor.Uint8 || info.Type == tensor.Int8 {
			continue
		}
		if err := check(fmt.Sprintf("%q is", info.Name), info.Type); err != nil {
			return err
		}
	}
	return nil
}

// errNotPermitted is the error of a model that the limits of the device's
// class exclude.
var errNotPermitted = errors.New("the device's class does not permit it")

// checkClass says which firmware profile the device goes by, and why.
func checkClass(info *dunlinv1.DeviceInfo, m profiles.Match, err error) Finding {
	if err != nil {
		return Finding{"class", Fail, err.Error(), "correct the files of --firmware-profiles, or choose a profile by --firmware-profile"}
	}
	f := Finding{Check: "class", Verdict: Pass, Detail: fmt.Sprintf("%s, by %s", m.Profile.Name, m.Reason)}
	if len(m.Also) > 0 {
		f.Detail += "; " + strings.Join(m.Also, ", ") + " would match too"
	}
	if info.Board != "" {
		f.Detail += "; the board is " + info.Board
	}
	return f
}
