package alarm

import (
	"fmt"
	"math"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// wearHigh and wearOut are the shares of a disk's rated writes at which it
	// had better be replaced, and at which it is worn out.
	wearHigh, wearOut = 0.9, 1
	wearMost          = 100
	// memoryLow and memoryOut are the shares of the memory that must be
	// available; so much more must be so before it counts as enough again.
	memoryLow, memoryOut, memoryMore = 0.05, 0.02, 0.03
	bytesMost                        = 1 << 60
)

var (
	spaceOut   = rule{name: "out", severity: dunlinv1.Severity_SEVERITY_ERROR, after: 30 * time.Second, before: 2 * time.Minute}
	spaceLow   = rule{name: "low", severity: dunlinv1.Severity_SEVERITY_WARNING, after: 30 * time.Second, before: 2 * time.Minute}
	spaceSoon  = rule{name: "soon", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 30 * time.Minute, every: 2 * time.Minute}
	spaceLater = rule{name: "later", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 24 * time.Hour, every: 2 * time.Hour}

	spaceFast = outlook{width: 2 * time.Minute, points: 60, need: 50, hours: 12}
	spaceSlow = outlook{width: 2 * time.Hour, points: 48, need: 44, season: 24 * time.Hour, hours: 7 * 24}

	wearNow   = rule{name: "out", severity: dunlinv1.Severity_SEVERITY_ERROR, after: time.Minute, before: time.Hour}
	wearWarn  = rule{name: "high", severity: dunlinv1.Severity_SEVERITY_WARNING, after: time.Minute, before: time.Hour}
	wearLater = rule{name: "later", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 24 * time.Hour, every: 6 * time.Hour}

	wearSlow = outlook{width: 6 * time.Hour, points: 32, need: 28, hours: 30 * 24, rise: 0.03}

	memoryNow   = rule{name: "out", severity: dunlinv1.Severity_SEVERITY_ERROR, after: time.Minute, before: 5 * time.Minute}
	memoryWarn  = rule{name: "low", severity: dunlinv1.Severity_SEVERITY_WARNING, after: 2 * time.Minute, before: 5 * time.Minute}
	memorySoon  = rule{name: "soon", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 30 * time.Minute, every: time.Minute}
	memoryLater = rule{name: "later", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 3 * time.Hour, every: 6 * time.Minute}
	memoryDays  = rule{name: "days", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 24 * time.Hour, every: 2 * time.Hour}

	deviceFast = outlook{width: time.Minute, points: 60, need: 50, hours: 2}
	deviceMid  = outlook{width: 6 * time.Minute, points: 60, need: 54, hours: 12}
	deviceSlow = outlook{width: 2 * time.Hour, points: 48, need: 44, season: 24 * time.Hour, hours: 3 * 24}

	leakFast = outlook{width: time.Minute, points: 60, need: 50, hours: 3}
	leakMid  = outlook{width: 6 * time.Minute, points: 60, need: 54, hours: 24}
	leakSlow = outlook{width: 2 * time.Hour, points: 48, need: 44, season: 24 * time.Hour, hours: 7 * 24}
)

// disk is the file system of the agent's data and the disk below it.
type disk struct {
	minutes, hours, wear window
	recent, recentWear   []point
}

// storage judges the disk's space and wear.
func (d *Detector) storage(t *dunlinv1.Telemetry) {
	if d.disk == nil {
		d.disk = &disk{
			minutes: newWindow(spaceFast.width, spaceFast.points, median), hours: newWindow(spaceSlow.width, spaceSlow.points, median),
			wear: newWindow(wearSlow.width, wearSlow.points, median),
		}
	}
	s, none := d.disk, math.NaN()
	reserve := float64(d.cfg.ReserveBytes)
	if v, ok := bytes(t.DiskFreeBytes); ok && reserve > 0 {
		s.recent = push(s.recent, point{d.now, v}, 32)
		c := d.cause(DiskSpace, "data")
		low := func(threshold float64, what string) func() finding {
			return func() finding {
				return finding{byThreshold, "bytes", fmt.Sprintf("%s are free, less than %s: %s", size(v), size(threshold), what), threshold, none, none, s.recent}
			}
		}
		d.judge(c, &spaceOut, v < reserve/4, v > reserve/3, low(reserve/4, "soon nothing more can be written"))
		d.judge(c, &spaceLow, v < reserve, v > reserve*1.1, low(reserve, "no model is fetched any more"))
		soon := func(p prospect, w *window, o outlook) func() finding {
			return func() finding {
				return finding{byTrend, "bytes", fmt.Sprintf("%s are free, %s an hour fewer: the reserve of %s is reached in %s", size(p.end), size(-p.slope), size(reserve), span(p.hours)),
					reserve, p.slope, p.hours, w.tail(o.points)}
			}
		}
		if s.minutes.add(d.now, v) {
			p := spaceFast.see(&s.minutes, reserve, none, false)
			d.judge(c, &spaceSoon, p.soon, p.far, soon(p, &s.minutes, spaceFast))
		}
		if s.hours.add(d.now, v) {
			p := spaceSlow.see(&s.hours, reserve, none, false)
			d.judge(c, &spaceLater, p.soon, p.far, soon(p, &s.hours, spaceSlow))
		}
	}
	if v, ok := figure(t.DiskWear, 0, wearMost); ok {
		s.recentWear = push(s.recentWear, point{d.now, v}, 32)
		c := d.cause(DiskWear, "data")
		d.judge(c, &wearNow, v >= wearOut, v < wearOut, func() finding {
			return finding{byThreshold, "", fmt.Sprintf("%s of the rated writes are used up: the disk may fail or refuse writes", percent(v)), wearOut, none, none, s.recentWear}
		})
		d.judge(c, &wearWarn, v >= wearHigh, v < wearHigh, func() finding {
			return finding{byThreshold, "", fmt.Sprintf("%s of the rated writes are used up", percent(v)), wearHigh, none, none, s.recentWear}
		})
		if s.wear.add(d.now, v) {
			p := wearSlow.see(&s.wear, wearOut, none, true)
			d.judge(c, &wearLater, p.soon, p.far, func() finding {
				return finding{byTrend, "", fmt.Sprintf("%s of the rated writes are used up, %s more a day: all of them in %s", percent(p.end), percent(24*p.slope), span(p.hours)),
					wearOut, p.slope, p.hours, s.wear.points}
			})
		}
	}
}

// memory is that of the device, and of the agent.
type memory struct {
	deviceMinutes, deviceMid, deviceDay window
	agentMinutes, agentMid, agentDay    window
	agentAll                            [3]window // with what models take
	recent                              []point
}

// memories judges the memory that is available, and what the agent takes
// beside what models are meant to take.
func (d *Detector) memories(t *dunlinv1.Telemetry) {
	if d.memory == nil {
		d.memory = &memory{
			deviceMinutes: newWindow(deviceFast.width, deviceFast.points, median), deviceMid: newWindow(deviceMid.width, deviceMid.points, median), deviceDay: newWindow(deviceSlow.width, deviceSlow.points, median),
			agentMinutes: newWindow(leakFast.width, leakFast.points, lowest), agentMid: newWindow(leakMid.width, leakMid.points, lowest), agentDay: newWindow(leakSlow.width, leakSlow.points, lowest),
		}
		for i, o := range []outlook{leakFast, leakMid, leakSlow} {
			d.memory.agentAll[i] = newWindow(o.width, o.points, lowest)
		}
	}
	s, none := d.memory, math.NaN()
	total, ok := bytes(t.MemoryTotalBytes)
	used, ok2 := bytes(t.MemoryUsedBytes)
	if !ok || !ok2 || total == 0 || used > total {
		return
	}
	left := total - used
	s.recent = push(s.recent, point{d.now, left}, 32)
	c := d.cause(Memory, "device")
	low := func(share float64) func() finding {
		return func() finding {
			return finding{byThreshold, "bytes", fmt.Sprintf("%s of %s are available", size(left), size(total)), share * total, none, none, s.recent}
		}
	}
	d.judge(c, &memoryNow, left < memoryOut*total, left > (memoryOut+memoryMore)*total, low(memoryOut))
	d.judge(c, &memoryWarn, left < memoryLow*total, left > (memoryLow+memoryMore)*total, low(memoryLow))
	type look struct {
		w *window
		o outlook
		r *rule
	}
	for _, x := range []look{{&s.deviceMinutes, deviceFast, &memorySoon}, {&s.deviceMid, deviceMid, &memoryLater}, {&s.deviceDay, deviceSlow, &memoryDays}} {
		if x.w.add(d.now, used) {
			p := x.o.see(x.w, total, none, true)
			d.judge(c, x.r, p.soon, p.far, func() finding {
				return finding{byTrend, "bytes", fmt.Sprintf("%s are in use, %s an hour more: all of the memory in %s", size(p.end), size(p.slope), span(p.hours)),
					total, p.slope, p.hours, x.w.tail(x.o.points)}
			})
		}
	}

	agent, ok := bytes(t.AgentAnonymousBytes)
	if !ok {
		return
	}
	all := agent
	if models, ok := bytes(t.ModelMemoryUsedBytes); ok {
		agent -= models // below 0 where models are in other memory, or in files
	}
	c = d.cause(Memory, "agent")
	for i, x := range []look{{&s.agentMinutes, leakFast, &memorySoon}, {&s.agentMid, leakMid, &memoryLater}, {&s.agentDay, leakSlow, &memoryDays}} {
		s.agentAll[i].add(d.now, all)
		if x.w.add(d.now, agent) {
			p := x.o.see(x.w, agent+left, none, true)
			// Where models leave whose weights were not in this memory, only
			// the difference grows.
			grows := false
			if p.soon {
				rise, _ := steady(x.w.tail(x.o.points))
				whole, _ := steady(s.agentAll[i].tail(x.o.points))
				grows = whole >= rise/2
			}
			d.judge(c, x.r, p.soon && grows, p.far, func() finding {
				return finding{byTrend, "bytes", fmt.Sprintf("the agent takes %s an hour more, and has what is available, %s, in %s", size(p.slope), size(left), span(p.hours)),
					agent + left, p.slope, p.hours, x.w.tail(x.o.points)}
			})
		}
	}
}

func bytes(v *uint64) (float64, bool) {
	if v == nil || *v > bytesMost {
		return 0, false
	}
	return float64(*v), true
}

func percent(share float64) string { return number(100*share) + " %" }
