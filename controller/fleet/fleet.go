// Package fleet is the controller's domain: devices, deployments, routes and
// rollouts, the documents they are written in, and what follows from them for
// each device. It is pure.
package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of labels and selectors.
const (
	MaxLabels     = 64
	MaxLabelKey   = 63
	MaxLabelValue = 63
)

// Device is what selectors look at, and what is known of its limits.
type Device struct {
	Name   string
	Labels map[string]string

	Class     string                 // its firmware profile
	Limits    *dunlinv1.DeviceLimits // nil: it does not say
	DiskBytes uint64                 // of the file system with its files; 0: not known
	DiskFree  *uint64                // of that; nil: not known
	Has       map[string]Holding     // by the digest of a version's manifest
	Closed    string                 // why no change may begin on it now, as Compiler.Closed says; empty: it may
}

// Holding is what a device has of a version.
type Holding struct {
	Resident bool
	Bytes    uint64 // of its files
}

// Version is an immutable version of a model.
type Version struct {
	Model     string
	Version   int64
	Digest    string // of its bundle's manifest
	SizeBytes uint64
	Bundle    *Bundle // nil: it was pushed before this was kept
	// Of a release of the agent: what its program says of itself, "0.9.0".
	AgentVersion string
	// Digests of the manifests that hold its bundle's signatures.
	Signatures []string
}

// Deployment gives a model version to every device that its selector matches.
type Deployment struct {
	Name     string
	Model    string
	Version  int64
	Selector map[string]string // labels that a device must all have; empty: every device
	Rollout  Strategy
	Delivery *dunlinv1.Delivery // nil: as the device's firmware profile has it
}

// Matches says whether the device has all labels of the selector.
func Matches(selector map[string]string, d Device) bool {
	for k, v := range selector {
		if have, ok := d.Labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// Assign gives the deployment of each model that counts for a device. Where
// the labels of a device changed so that two deployments of one model match
// it, the one whose name sorts first counts.
func Assign(d Device, deployments []Deployment) map[string]Deployment {
	byModel := map[string]Deployment{}
	for _, dep := range deployments {
		if !Matches(dep.Selector, d) {
			continue
		}
		if have, ok := byModel[dep.Model]; !ok || dep.Name < have.Name {
			byModel[dep.Model] = dep
		}
	}
	return byModel
}

// Conflict is a device that two deployments of one model match.
type Conflict struct {
	Device, Model, First, Second string
}

// FindConflict gives the first device, by name, that a deployment would share
// with another deployment of the same model.
func FindConflict(dep Deployment, deployments []Deployment, devices []Device) (Conflict, bool) {
	var others []Deployment
	for _, other := range deployments {
		if other.Name != dep.Name && other.Model == dep.Model {
			others = append(others, other)
		}
	}
	var first Conflict
	for _, d := range devices {
		if len(others) == 0 || !Matches(dep.Selector, d) {
			continue
		}
		for _, other := range others {
			earlier := first.Device == "" || cmp.Or(cmp.Compare(d.Name, first.Device), cmp.Compare(other.Name, first.First)) < 0
			if earlier && Matches(other.Selector, d) {
				first = Conflict{Device: d.Name, Model: dep.Model, First: other.Name, Second: dep.Name}
			}
		}
	}
	return first, first.Device != ""
}

var labelText = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// CheckLabels says what is wrong with labels or a selector.
func CheckLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return fmt.Errorf("labels has %d entries, the limit is %d", len(labels), MaxLabels)
	}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if err := checkLabel(k, labels[k]); err != nil {
			return err
		}
	}
	return nil
}

func checkLabel(key, value string) error {
	switch {
	case key == "" || len(key) > MaxLabelKey:
		return fmt.Errorf("label key %q has %d characters, allowed are 1 to %d", clip(key), len(key), MaxLabelKey)
	case !labelText.MatchString(key):
		return fmt.Errorf("label key %q: allowed are A-Z a-z 0-9 . _ / -, first and last a letter or digit", key)
	case len(value) > MaxLabelValue:
		return fmt.Errorf("label %s: value %q has %d characters, the limit is %d", key, clip(value), len(value), MaxLabelValue)
	case value != "" && !labelText.MatchString(value):
		return fmt.Errorf("label %s: value %q: allowed are A-Z a-z 0-9 . _ / -, first and last a letter or digit", key, value)
	}
	return nil
}

// clip shortens a value from outside for a message.
func clip(s string) string { return clipTo(s, 100) }

func clipTo(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
