package alarm

import (
	"fmt"
	"math"
	"slices"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// Corrected memory errors are many where an hour, or a day, has so many,
	// in so many parts of it: one cell that is read often gives many at once.
	correctedHour, correctedHourParts = 20, 4
	correctedDay, correctedDayParts   = 48, 8
	hourPart                          = 5 * time.Minute
	dayPart                           = time.Hour
)

var (
	eccUncorrected = rule{name: "uncorrected", severity: dunlinv1.Severity_SEVERITY_ERROR, before: 24 * time.Hour}
	eccCorrected   = rule{name: "corrected", severity: dunlinv1.Severity_SEVERITY_WARNING, before: time.Hour}

	remapFailed  = rule{name: "failed", severity: dunlinv1.Severity_SEVERITY_ERROR, before: time.Minute}
	remapPending = rule{name: "pending", severity: dunlinv1.Severity_SEVERITY_WARNING, before: time.Minute}
	remapGrowth  = rule{name: "growth", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 24 * time.Hour}

	xidHardware = rule{name: "hardware", severity: dunlinv1.Severity_SEVERITY_ERROR, before: 24 * time.Hour}
	xidOther    = rule{name: "other", severity: dunlinv1.Severity_SEVERITY_WARNING, before: time.Hour}
)

// xidsOfHardware are the XID errors that mean the GPU itself, its memory or
// its bus, by NVIDIA's table of XID errors (docs.nvidia.com, "XID Errors");
// others are mostly a program's.
var xidsOfHardware = []uint64{46, 48, 54, 56, 57, 58, 60, 61, 62, 63, 64, 74, 79, 92, 94, 95, 110, 119, 120, 121, 136, 140, 143}

// counter watches a count that only grows, but for when it begins anew.
type counter struct {
	known bool
	last  uint64
	grown []point // growth by part of time, with its moment
}

// absurd is more than any counter of errors grows by in one step; a sensor
// that says so is broken.
const absurd = 1 << 40

// grows takes in a value, and gives by how much the count has grown.
func (c *counter) grows(now time.Duration, value uint64, part time.Duration) uint64 {
	before, known := c.last, c.known
	c.last, c.known = value, true
	if !known || value <= before || value-before > absurd {
		return 0
	}
	n := value - before
	if i := len(c.grown) - 1; i >= 0 && c.grown[i].at/part == now/part {
		c.grown[i].value += float64(n)
	} else {
		c.grown = push(c.grown, point{now, float64(n)}, maxSamples)
	}
	return n
}

// within sums the growth since a moment, and counts its parts.
func (c *counter) within(since time.Duration) (sum float64, parts int) {
	for _, p := range c.grown {
		if p.at > since {
			sum += p.value
			parts++
		}
	}
	return sum, parts
}

// gpu is one GPU's counters.
type gpu struct {
	seen                                  time.Duration
	uncorrected, hour, day, retired, xids counter
	remappedCorrected, remapped           counter
}

// hardware judges the errors that GPUs count.
func (d *Detector) hardware(t *dunlinv1.Telemetry) {
	for _, g := range t.Gpus {
		if g == nil {
			continue
		}
		s := d.gpus[g.Index]
		if s == nil {
			if len(d.gpus) >= maxSubjects {
				return
			}
			s = &gpu{}
			d.gpus[g.Index] = s
		} else if s.seen == d.now {
			continue
		}
		s.seen = d.now
		d.ecc(s, g)
		d.remaps(s, g)
		d.xid(s, g)
	}
}

func (d *Detector) ecc(s *gpu, g *dunlinv1.GpuTelemetry) {
	name, none := gpuName(g.Index), math.NaN()
	if g.EccUncorrected != nil {
		n := s.uncorrected.grows(d.now, *g.EccUncorrected, hourPart)
		d.judge(d.cause(ECC, name), &eccUncorrected, n > 0, n == 0, func() finding {
			return finding{byCounter, "errors", fmt.Sprintf("%d uncorrected memory errors more, %d in all: what was computed may be wrong", n, *g.EccUncorrected), 1, none, none, s.uncorrected.grown}
		})
	}
	if g.EccCorrected != nil {
		s.hour.grows(d.now, *g.EccCorrected, hourPart)
		s.day.grows(d.now, *g.EccCorrected, dayPart)
		hour, hourParts := s.hour.within(d.now - time.Hour)
		day, dayParts := s.day.within(d.now - 24*time.Hour)
		fast := hour >= correctedHour && hourParts >= correctedHourParts
		many := fast || day >= correctedDay && dayParts >= correctedDayParts
		few := hour < correctedHour/2 && day < correctedDay/2
		d.judge(d.cause(ECC, name), &eccCorrected, many, few, func() finding {
			if fast {
				return finding{byCounter, "errors", fmt.Sprintf("%s corrected memory errors in an hour: the memory wears out", number(hour)), correctedHour, hour, none, s.hour.grown}
			}
			return finding{byCounter, "errors", fmt.Sprintf("%s corrected memory errors in a day: the memory wears out", number(day)), correctedDay, day / 24, none, s.day.grown}
		})
	}
}

func (d *Detector) remaps(s *gpu, g *dunlinv1.GpuTelemetry) {
	name, none := gpuName(g.Index), math.NaN()
	if g.RemapFailed != nil {
		d.judge(d.cause(RemappedRows, name), &remapFailed, *g.RemapFailed, !*g.RemapFailed, func() finding {
			return finding{byThreshold, "", "a row of memory could not be remapped: there are no spare ones left", none, none, none, nil}
		})
	}
	if g.RemapPending != nil {
		d.judge(d.cause(RemappedRows, name), &remapPending, *g.RemapPending, !*g.RemapPending, func() finding {
			return finding{byThreshold, "", "a row of memory is remapped with the next reset of the GPU", none, none, none, nil}
		})
	}
	var known bool
	var n uint64
	for _, f := range []struct {
		c *counter
		v *uint32
	}{{&s.remappedCorrected, g.RemappedRowsCorrected}, {&s.remapped, g.RemappedRowsUncorrected}, {&s.retired, g.RetiredPages}} {
		if f.v != nil {
			known = true
			n += f.c.grows(d.now, uint64(*f.v), hourPart)
		}
	}
	if known {
		d.judge(d.cause(RemappedRows, name), &remapGrowth, n > 0, n == 0, func() finding {
			all := slices.Concat(s.remappedCorrected.grown, s.remapped.grown, s.retired.grown)
			slices.SortStableFunc(all, func(a, b point) int { return int(a.at - b.at) })
			return finding{byCounter, "rows", fmt.Sprintf("%d rows or pages of memory more are out of use", n), 1, none, none, all}
		})
	}
}

func (d *Detector) xid(s *gpu, g *dunlinv1.GpuTelemetry) {
	if g.XidCount == nil {
		return
	}
	first := !s.xids.known
	n := s.xids.grows(d.now, *g.XidCount, hourPart)
	if first && *g.XidCount < absurd { // counted since the agent's start
		n = *g.XidCount
	}
	hardware := g.LastXid != nil && slices.Contains(xidsOfHardware, *g.LastXid)
	find := func() finding {
		message := fmt.Sprintf("%d errors of the driver more", n)
		if g.LastXid != nil {
			message = fmt.Sprintf("XID %d, %d errors of the driver more", *g.LastXid, n)
		}
		return finding{byCounter, "errors", message, 1, math.NaN(), math.NaN(), s.xids.grown}
	}
	c := d.cause(XID, gpuName(g.Index))
	d.judge(c, &xidHardware, n > 0 && hardware, n == 0 || !hardware, find)
	d.judge(c, &xidOther, n > 0 && !hardware, n == 0 || hardware, find)
}
