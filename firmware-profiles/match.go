package profiles

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Facts are what is known of a device. What is not known is empty, and no rule
// that names it holds.
type Facts struct {
	Arch       string   // Go's name of the architecture
	DeviceTree []string // the entries of "compatible", and the model
	DMI        string   // "vendor/product"
	GPUs       []GPU
	Driver     string // version of the GPUs' driver
	Runtime    string // version of ONNX Runtime
}

// GPU is one of a device's.
type GPU struct {
	Name, ComputeCapability string // "NVIDIA L4", "8.9"
}

// Match is the profile that a device goes by.
type Match struct {
	Profile Profile
	// Reason says which rules matched by which strings.
	Reason string
	// Also are the names of the other profiles that match, the more specific
	// ones first.
	Also []string
}

// specificity of a rule that matches a device, the larger field by field.
type specificity struct {
	named    int // fields that the rule names, without arch
	arch     int // 1: it names arch
	literals int // characters of the patterns that matched which stand for themselves
}

func (s specificity) compare(t specificity) int {
	return cmp.Or(cmp.Compare(s.named, t.named), cmp.Compare(s.arch, t.arch), cmp.Compare(s.literals, t.literals))
}

// Match gives the most specific of the profiles that match: the one whose rule
// names the most fields, where arch counts for less than any other; among those
// the one whose patterns that matched have the most characters that are no
// wildcards, of a list the pattern with the most. Two rules that name the same
// fields and cannot be told apart in this way are a fault when they are loaded.
// Between others, whose fields only come together by the device, the first
// name wins.
func (s *Set) Match(f Facts) (Match, error) {
	type candidate struct {
		profile Profile
		how     specificity
		reason  string
	}
	var all []candidate
	arches := map[string]bool{}
	for _, p := range s.all {
		if p.Match.Arch != "" {
			arches[p.Match.Arch] = true
		}
		if how, reason, ok := p.Match.matches(f); ok {
			all = append(all, candidate{p, how, reason})
		}
	}
	if len(all) == 0 {
		return Match{}, fmt.Errorf("no firmware profile matches a device of architecture %q; there are %s", f.Arch, strings.Join(s.Names(), ", "))
	}
	slices.SortStableFunc(all, func(a, b candidate) int { return b.how.compare(a.how) }) // by name before
	m := Match{Profile: all[0].profile, Reason: all[0].reason}
	for _, c := range all[1:] {
		m.Also = append(m.Also, c.profile.Name)
	}
	return m, nil
}

// NeedsRuntime says whether a rule names the version of ONNX Runtime, which
// takes a moment to find out.
func (s *Set) NeedsRuntime() bool {
	return slices.ContainsFunc(s.all, func(p Profile) bool { return p.Match.Runtime != "" })
}

// matches says whether all that the rule names holds, and why.
func (r Rule) matches(f Facts) (how specificity, reason string, ok bool) {
	var reasons []string
	if r.Arch != "" {
		if r.Arch != f.Arch {
			return how, "", false
		}
		how.arch = 1
		reasons = append(reasons, "arch "+r.Arch)
	}
	named := func(field, found string, literals int) {
		how.named++
		how.literals += literals
		reasons = append(reasons, field+" "+found)
	}
	for _, list := range []struct {
		field    string
		patterns []string
		strings  []string
	}{{"device_tree", r.DeviceTree, f.DeviceTree}, {"dmi", r.DMI, []string{f.DMI}}} {
		if len(list.patterns) == 0 {
			continue
		}
		pattern, found, ok := best(list.patterns, list.strings)
		if !ok {
			return how, "", false
		}
		named(list.field, quoted(found, pattern), literals(pattern))
	}
	if len(r.GPU) > 0 || r.ComputeCapability != "" {
		gpu, pattern, ok := r.gpu(f.GPUs)
		if !ok {
			return how, "", false
		}
		if len(r.GPU) > 0 {
			named("gpu", quoted(gpu.Name, pattern), literals(pattern))
		}
		if r.ComputeCapability != "" {
			named("compute_capability", quoted(gpu.ComputeCapability, r.ComputeCapability), 0)
		}
	}
	for _, v := range []struct{ field, pattern, version string }{{"driver", r.Driver, f.Driver}, {"runtime", r.Runtime, f.Runtime}} {
		if v.pattern == "" {
			continue
		}
		if !matchVersion(v.pattern, v.version) {
			return how, "", false
		}
		named(v.field, quoted(v.version, v.pattern), 0)
	}
	return how, strings.Join(reasons, ", "), true
}

// gpu gives the GPU for which name and compute capability hold, that with the
// most literal pattern.
func (r Rule) gpu(all []GPU) (found GPU, pattern string, ok bool) {
	for _, g := range all {
		if r.ComputeCapability != "" && !matchVersion(r.ComputeCapability, g.ComputeCapability) {
			continue
		}
		p, _, matched := best(r.GPU, []string{g.Name})
		if len(r.GPU) > 0 && !matched {
			continue
		}
		if !ok || literals(p) > literals(pattern) {
			found, pattern, ok = g, p, true
		}
	}
	return found, pattern, ok
}

// quoted writes a string and, where it is not the same, the pattern that it
// matched.
func quoted(found, pattern string) string {
	if strings.EqualFold(found, pattern) {
		return fmt.Sprintf("%q", found)
	}
	return fmt.Sprintf("%q (%s)", found, pattern)
}

// best gives the pattern with the most literal characters that matches one of
// the strings, and that string.
func best(patterns, all []string) (pattern, found string, ok bool) {
	for _, p := range patterns {
		for _, s := range all {
			if s == "" || ok && literals(p) <= literals(pattern) {
				continue
			}
			if matched, _ := path.Match(fold(p), fold(s)); matched {
				pattern, found, ok = p, s, true
			}
		}
	}
	return pattern, found, ok
}

// fold makes what differs only in case the same.
func fold(s string) string { return strings.ToLower(strings.ToUpper(s)) }
