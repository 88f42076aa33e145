package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"slices"
	"strings"
	"time"

	profiles "github.com/dunlin/dunlin/firmware-profiles"
	"github.com/dunlin/dunlin/internal/estimate"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/tensor"
)

// This file is how it is decided whether a version fits on a device. In short:
//
// What the version needs is taken from the best that is known: measured on the
// device; measured on others of its class, of which the one in the middle by
// memory counts, so that one that is broken decides nothing; estimated from the
// costs of the graph. The largest run counts: as many rows as the bundle allows, or else
// as the profile recommends, or else one.
//
// A version fits where it and its largest run are within the device's budget
// together with all other versions that the device should have; it fits with
// swapping where that is so for itself alone; and else it does not fit. Neither
// does one whose operator set or precision the device refuses, or for whose
// files the disk has no room. What a device does not say does not count
// against a version, and one that is resident there fits: a measurement that
// comes out a little above the budget takes nothing away.

// Verdict is whether a version fits on a device.
type Verdict int

// The verdicts. Unknown is that of a device without limits, or of a version of
// which nothing is known; it refuses nothing.
const (
	Unknown Verdict = iota
	Fits
	FitsWithSwapping
	DoesNotFit
)

// Source is where a prediction comes from; a greater one is better.
type Source int

// The sources.
const (
	SourceUnknown Source = iota
	Estimated
	MeasuredOnClass
	MeasuredHere
)

// Bundle is what the bundle of a version tells of what it needs. The store
// keeps it as JSON.
type Bundle struct {
	WeightBytes uint64        `json:"weightBytes"`
	Costs       *models.Costs `json:"costs,omitempty"` // nil: not known
	Opset       int64         `json:"opset"`
	// Precisions are the element types that its weights are of, and the
	// floating-point ones that come in or go out: sorted, as Triton names them.
	Precisions []string `json:"precisions,omitempty"`
	MaxBatch   int      `json:"maxBatch,omitempty"` // rows of a run; 0: the bundle does not say
	// Release is set where the version is a release of the agent program.
	Release *models.Release `json:"release,omitempty"`
}

// BundleOf gives what a bundle's config tells, and the element types of its
// weights.
func BundleOf(c *models.Config, weights []tensor.Type) *Bundle {
	b := &Bundle{WeightBytes: c.WeightBytes, Costs: c.Costs, Opset: c.Opset, Release: c.Release}
	if c.Serving != nil {
		b.MaxBatch = c.Serving.MaxBatchSize
	}
	// As devices judge it: 8-bit integers that come in or go out are images.
	found := map[string]bool{}
	for _, t := range weights {
		found[t.String()] = slices.Contains(profiles.Precisions, t.String())
	}
	for _, info := range slices.Concat(c.Inputs, c.Outputs) {
		if t := info.Type; t != tensor.Uint8 && t != tensor.Int8 && slices.Contains(profiles.Precisions, t.String()) {
			found[t.String()] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if found[name] {
			b.Precisions = append(b.Precisions, name)
		}
	}
	return b
}

// Measurement is what a device measured of a version, as far as fit needs it.
type Measurement struct {
	Device, Class string
	Model, Digest string
	ReceivedAt    time.Time
	// Bytes, of the largest run Fixed + Row for each of its rows.
	Weights, Session, Fixed, Row uint64
	Batch                        int           // rows of a run that the profile recommends; 0: none
	Latency                      time.Duration // of a run of one row; 0: not known
	Joules                       float64       // of one row; 0: not known
}

// Need is what a version takes, as far as that is known.
type Need struct {
	Weights, Session uint64
	Workspace        uint64 // of its largest run
	Rows             int    // of that run
	Memory           Source
	Latency          time.Duration // of a run of one row; 0: not known
	LatencyFrom      Source
	Joules           float64 // of one row; 0: not known
	JoulesFrom       Source
	MeasuredOn       string // the device that measured; empty: none did
	Partly           bool   // the estimate lacks the workspace, or a part of it
}

// Held gives what the version takes while nothing runs.
func (n Need) Held() uint64 { return sum(n.Weights, n.Session) }

// Peak gives what it takes with its largest run.
func (n Need) Peak() uint64 { return sum(n.Held(), n.Workspace) }

// Fit is whether one version fits on one device, and why.
type Fit struct {
	Version Version
	Verdict Verdict
	Reason  string // names figure, need and limit; empty where there is nothing to say
	Need    Need
	Total   uint64 // what all versions that the device should have take, with the largest of their runs
	Budget  uint64 // 0: not known
	Disk    bool   // it does not fit for want of room on the disk
	InPlace bool   // it and the version before do not fit in memory together: that one is unloaded first
}

// Fitter says what fits. It is not changed once made, and safe for concurrent
// use. The zero value has no measurements.
type Fitter struct {
	here  map[[3]string]Measurement // by device, model, digest
	class map[[3]string]Measurement // by class, model, digest
}

// NewFitter takes measurements in any order; of several of a device the newest
// counts, of several of a class the one in the middle by what they take, or of
// two in the middle the smaller.
func NewFitter(measured []Measurement) *Fitter {
	f := &Fitter{here: make(map[[3]string]Measurement, len(measured)), class: map[[3]string]Measurement{}}
	for _, m := range measured {
		here := [3]string{m.Device, m.Model, m.Digest}
		if have, ok := f.here[here]; !ok || m.ReceivedAt.After(have.ReceivedAt) {
			f.here[here] = m
		}
	}
	classes := map[[3]string][]Measurement{}
	for _, m := range f.here {
		if m.Class != "" {
			class := [3]string{m.Class, m.Model, m.Digest}
			classes[class] = append(classes[class], m)
		}
	}
	for class, all := range classes {
		slices.SortFunc(all, func(a, b Measurement) int {
			return cmp.Or(cmp.Compare(a.takes(), b.takes()), cmp.Compare(a.Device, b.Device))
		})
		f.class[class] = all[(len(all)-1)/2]
	}
	return f
}

// takes is what is taken by a run of one row and by what it runs on.
func (m *Measurement) takes() uint64 {
	return sum(sum(m.Weights, m.Session), sum(m.Fixed, m.Row))
}

// Need gives the best that is known of what v takes on d.
func (f *Fitter) Need(d Device, v Version) Need {
	var n Need
	b := v.Bundle
	if b == nil {
		b = &Bundle{}
	}
	from := MeasuredHere
	m, ok := f.here[[3]string{d.Name, v.Model, v.Digest}]
	if !ok || m.Class != d.Class { // or it was another device then
		from = MeasuredOnClass
		m, ok = f.class[[3]string{d.Class, v.Model, v.Digest}]
		ok = ok && d.Class != ""
	}
	n.Rows = max(cmp.Or(b.MaxBatch, m.Batch), 1)
	costs := models.Costs{}
	if b.Costs != nil {
		costs = *b.Costs
	}
	guess := estimate.Memory(b.WeightBytes, costs, n.Rows)
	if ok {
		n.MeasuredOn = m.Device
		if m.Latency > 0 {
			n.Latency, n.LatencyFrom = m.Latency, from
		}
		if m.Joules > 0 {
			n.Joules, n.JoulesFrom = m.Joules, from
		}
	}
	if n.Weights, n.Session = m.Weights, m.Session; n.Held() > 0 {
		n.Memory = from
		// Of a version that could not be run, only what it holds was measured.
		if n.Workspace = sum(m.Fixed, times(m.Row, uint64(n.Rows))); n.Workspace == 0 {
			n.Workspace = uint64(guess.Workspace)
		}
	}
	if v.Bundle == nil {
		return n
	}
	if n.Memory == SourceUnknown {
		n.Weights, n.Session, n.Workspace = uint64(guess.Weights), uint64(guess.Session), uint64(guess.Workspace)
		n.Memory, n.Partly = Estimated, b.Costs == nil || len(costs.Unknown) > 0
	}
	l := d.Limits
	h := estimate.Hardware{FP32GFLOPS: l.GetFp32Gflops(), MemoryGBPerSecond: l.GetMemoryGbPerSecond(), ActiveWatts: l.GetActiveWatts(),
		Overhead: time.Duration(l.GetRunOverheadSeconds() * float64(time.Second))}
	if n.Latency == 0 {
		if n.Latency = estimate.RunTime(costs, 1, h); n.Latency > 0 {
			n.LatencyFrom = Estimated
		}
	}
	if n.Joules == 0 {
		if n.Joules = estimate.Energy(n.Latency, h); n.Joules > 0 {
			n.JoulesFrom = Estimated
		}
	}
	return n
}

// Fit says of each of the versions that a device should have, one of a model
// at most, whether it fits there. The answer has their order, and does not
// depend on it.
func (f *Fitter) Fit(d Device, versions []Version) []Fit {
	fits := make([]Fit, len(versions))
	l := d.Limits
	budget := cmp.Or(l.GetDeviceMemoryBytes(), l.GetHostMemoryBytes())
	for i, v := range versions {
		fits[i] = Fit{Version: v, Need: f.Need(d, v), Budget: budget}
		f.alone(d, &fits[i])
	}
	f.disk(d, fits)
	for i := range fits {
		together(fits, i, l.GetOversize())
	}
	return fits
}

// alone judges a version by itself; where that refuses nothing, its verdict
// stays Fits or Unknown.
func (f *Fitter) alone(d Device, fit *Fit) {
	l, n := d.Limits, fit.Need
	here := d.Has[fit.Version.Digest]
	if l == nil {
		fit.Reason = "the device does not say what it takes"
		return
	}
	if b := fit.Version.Bundle; b != nil && !here.Resident {
		if most := l.GetMaxOpset(); most > 0 && b.Opset > most {
			fit.Verdict, fit.Reason = DoesNotFit, fmt.Sprintf("its opset is %d, the device takes %d at most", b.Opset, most)
			return
		}
		if allowed := l.GetPrecisions(); len(allowed) > 0 {
			for _, p := range b.Precisions {
				if !slices.Contains(allowed, p) {
					fit.Verdict, fit.Reason = DoesNotFit, fmt.Sprintf("it computes in %s, the device takes %s", p, strings.Join(allowed, ", "))
					return
				}
			}
		}
	}
	switch need := charged(n, fit.Budget, l.GetOversize()); {
	case n.Memory == SourceUnknown:
		fit.Reason = "its bundle does not say what it needs"
	case fit.Budget == 0:
		fit.Reason = "the device has no budget of memory"
	case sum(need, n.Workspace) <= fit.Budget:
		if fit.Verdict = Fits; n.Partly {
			fit.Reason = "it may need more: the graph does not tell all shapes"
		}
		if need < n.Held() {
			fit.Verdict, fit.Reason = FitsWithSwapping, fmt.Sprintf("its weights of %s stay in their file", size(n.Weights))
		}
	case here.Resident:
		fit.Verdict, fit.Reason = Fits, fmt.Sprintf("it is resident there, though it should need %s of a budget of %s", size(n.Peak()), size(fit.Budget))
	default:
		fit.Verdict, fit.Reason = DoesNotFit, fmt.Sprintf("it needs %s of memory (weights %s, session %s, a run of %s %s), the budget is %s",
			size(n.Peak()), size(n.Weights), size(n.Session), rows(n.Rows), size(n.Workspace), size(fit.Budget))
	}
}

// disk refuses versions, by model, for whose files there is no room. One of
// which the device has a part already was let in before: the device itself
// says where its disk turns out to be full.
func (f *Fitter) disk(d Device, fits []Fit) {
	if d.Limits == nil {
		return
	}
	order := make([]*Fit, len(fits))
	for i := range fits {
		order[i] = &fits[i]
	}
	slices.SortFunc(order, func(a, b *Fit) int { return cmp.Compare(a.Version.Model, b.Version.Model) })
	missing := uint64(0)
	for _, fit := range order {
		if has := d.Has[fit.Version.Digest]; has.Bytes > 0 && fit.Verdict != DoesNotFit {
			missing = sum(missing, fit.Version.SizeBytes-min(has.Bytes, fit.Version.SizeBytes))
		}
	}
	reserve := d.Limits.GetDiskReserveBytes()
	for _, fit := range order {
		bytes := fit.Version.SizeBytes
		if fit.Verdict == DoesNotFit || d.Has[fit.Version.Digest].Bytes > 0 || bytes == 0 {
			continue
		}
		switch {
		case d.DiskBytes > 0 && sum(bytes, reserve) > d.DiskBytes:
			fit.Verdict, fit.Disk = DoesNotFit, true
			fit.Reason = fmt.Sprintf("its files have %s, the disk has %s, of which %s stay free", size(bytes), size(d.DiskBytes), size(reserve))
		case d.DiskFree != nil && sum(sum(bytes, missing), reserve) > *d.DiskFree:
			fit.Verdict, fit.Disk = DoesNotFit, true
			fit.Reason = fmt.Sprintf("its files have %s, the disk has %s free, of which %s stay free", size(bytes), size(*d.DiskFree), size(reserve))
			if missing > 0 {
				fit.Reason += fmt.Sprintf(" and other versions take %s", size(missing))
			}
		default:
			missing = sum(missing, bytes)
		}
	}
}

// together gives the total of fits[i], and makes one that fits by itself, but
// not with the others, swap. Others that do not fit are not there.
func together(fits []Fit, i int, oversize bool) {
	fit := &fits[i]
	var work uint64
	others := make([]*Fit, 0, len(fits))
	for j := range fits {
		o := &fits[j]
		if j != i && o.Verdict == DoesNotFit || o.Need.Memory == SourceUnknown {
			continue
		}
		fit.Total = sum(fit.Total, charged(o.Need, fit.Budget, oversize))
		work = max(work, o.Need.Workspace)
		if j != i {
			others = append(others, &fits[j])
		}
	}
	fit.Total = sum(fit.Total, work)
	if (fit.Verdict == Fits || fit.Verdict == FitsWithSwapping) && fit.Total > fit.Budget && len(others) > 0 {
		var names []string
		for _, o := range others {
			names = append(names, fmt.Sprintf("%s:%d", o.Version.Model, o.Version.Version))
		}
		slices.Sort(names)
		fit.Verdict = FitsWithSwapping
		reason := fmt.Sprintf("together with %s it needs %s, %s more than the budget", list(names), size(fit.Total), size(fit.Total-fit.Budget))
		if fit.Reason != "" {
			reason = fit.Reason + "; " + reason
		}
		fit.Reason = reason
	}
}

// mustReplace says whether the version before has to leave the memory before a
// version that fits there comes in, and why. What the device has beside them
// does not count: it can leave by turns.
func (f *Fitter) mustReplace(d Device, before Version, fit *Fit) (reason string, must bool) {
	old := f.Need(d, before)
	if old.Memory == SourceUnknown || fit.Need.Memory == SourceUnknown || fit.Budget == 0 {
		return "", false
	}
	oversize := d.Limits.GetOversize()
	both := sum(sum(charged(old, fit.Budget, oversize), charged(fit.Need, fit.Budget, oversize)), max(old.Workspace, fit.Need.Workspace))
	if both <= fit.Budget {
		return "", false
	}
	return fmt.Sprintf("it takes the place of %s:%d, which is unloaded first: together they need %s, the budget is %s",
		before.Model, before.Version, size(both), size(fit.Budget)), true
}

// charged is what a version takes of the budget while nothing runs: as on the
// device, its session only where it may and must leave its weights in their
// file.
func charged(n Need, budget uint64, oversize bool) uint64 {
	if oversize && budget > 0 && n.Held() > budget {
		return n.Session
	}
	return n.Held()
}

// sum and times end at the greatest number instead of beginning anew.
func sum(a, b uint64) uint64 {
	if s, carry := bits.Add64(a, b, 0); carry == 0 {
		return s
	}
	return math.MaxUint64
}

func times(a, b uint64) uint64 {
	if high, low := bits.Mul64(a, b); high == 0 {
		return low
	}
	return math.MaxUint64
}

func rows(n int) string {
	if n == 1 {
		return "1 row"
	}
	return fmt.Sprintf("%d rows", n)
}

// size writes bytes for a person.
func size(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}
