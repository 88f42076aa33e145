// Package profiles holds the firmware profiles: what the agent takes for
// granted of each class of devices.
package profiles

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
)

// Profile describes one class of devices.
type Profile struct {
	Name        string `yaml:"name"` // the same as the file's
	Description string `yaml:"description"`
	Match       Rule   `yaml:"match"`
	// Providers are ONNX Runtime's execution providers, the preferred first,
	// by the names that the runtime has for them.
	Providers []string `yaml:"providers"`
	// Threads bounds the threads of a model's run; 0 means one for each core.
	Threads int     `yaml:"threads"`
	Memory  Memory  `yaml:"memory"`
	Storage Storage `yaml:"storage"`
}

// Rule says which devices a profile is for.
type Rule struct {
	Arch string `yaml:"arch"` // Go's name of the architecture
}

// Memory bounds what models may take.
type Memory struct {
	HostFraction float64 `yaml:"host_fraction"` // of the host's memory, above 0 to 1
}

// Storage bounds what the agent keeps.
type Storage struct {
	ReserveBytes int64 `yaml:"reserve_bytes"` // left free on the disk
	OutboxEvents int   `yaml:"outbox_events"` // kept until the controller has them
}

//go:embed *.yaml
var files embed.FS

var load = sync.OnceValues(func() ([]Profile, error) { return parseAll(files) })

// Match gives the profile for an architecture, by Go's name of it.
func Match(arch string) (Profile, error) {
	all, err := load()
	if err != nil {
		return Profile{}, err
	}
	var known []string
	for _, p := range all {
		if p.Match.Arch == arch {
			return p, nil
		}
		known = append(known, p.Match.Arch)
	}
	return Profile{}, fmt.Errorf("no firmware profile for architecture %q, there are some for %s", arch, strings.Join(known, ", "))
}

// parseAll reads every profile, by name.
func parseAll(files fs.FS) ([]Profile, error) {
	names, err := fs.Glob(files, "*.yaml")
	if err != nil {
		return nil, err
	}
	var all []Profile
	for _, name := range names {
		b, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		p, err := parse(b)
		if err == nil && p.Name != strings.TrimSuffix(name, ".yaml") {
			err = fmt.Errorf("name: %q is not the file's", p.Name)
		}
		if err == nil && slices.ContainsFunc(all, func(q Profile) bool { return q.Match == p.Match }) {
			err = errors.New("match: another profile has the same")
		}
		if err != nil {
			return nil, fmt.Errorf("firmware profile %s: %w", name, err)
		}
		all = append(all, p)
	}
	return all, nil
}

func parse(b []byte) (Profile, error) {
	var p Profile
	d := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict())
	if err := d.Decode(&p); err != nil {
		return Profile{}, err
	}
	if err := d.Decode(new(Profile)); !errors.Is(err, io.EOF) {
		return Profile{}, errors.New("more than one document")
	}
	switch {
	case p.Description == "":
		return Profile{}, errors.New("description: missing")
	case p.Match.Arch == "":
		return Profile{}, errors.New("match.arch: missing")
	case len(p.Providers) == 0 || slices.Contains(p.Providers, ""):
		return Profile{}, errors.New("providers: missing")
	case p.Threads < 0:
		return Profile{}, fmt.Errorf("threads: %d is below 0", p.Threads)
	case !(p.Memory.HostFraction > 0 && p.Memory.HostFraction <= 1):
		return Profile{}, fmt.Errorf("memory.host_fraction: %v, allowed is above 0 to 1", p.Memory.HostFraction)
	case p.Storage.ReserveBytes < 0:
		return Profile{}, fmt.Errorf("storage.reserve_bytes: %d is below 0", p.Storage.ReserveBytes)
	case p.Storage.OutboxEvents < 1:
		return Profile{}, fmt.Errorf("storage.outbox_events: %d is below 1", p.Storage.OutboxEvents)
	}
	return p, nil
}
