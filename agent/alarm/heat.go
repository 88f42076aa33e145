package alarm

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// coldest and hottest bound the temperatures that a sensor can mean.
	coldest, hottest = -60, 200
	// A temperature must fall this much below the one at which it is too high.
	coolDown = 5
	coolWarn = 3
	// loadStep is the change of the load after which a temperature goes where
	// that leads it: no trend is seen in that.
	loadStep = 0.1
	// heatEffect is by how much a sensor must be hotter than it was at like
	// load; heatFloor the standard deviation that such a difference has.
	heatEffect = 12
	heatFloor  = 1.5
)

var (
	heatNow   = rule{name: "slowdown", severity: dunlinv1.Severity_SEVERITY_ERROR, after: 30 * time.Second, before: 5 * time.Minute, presses: true}
	heatSoon  = rule{name: "soon", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: time.Minute, presses: true}
	heatWarn  = rule{name: "warn", severity: dunlinv1.Severity_SEVERITY_WARNING, after: 5 * time.Minute, before: 5 * time.Minute}
	heatLater = rule{name: "later", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 24 * time.Hour, every: 2 * time.Hour}
	heatLevel = rule{name: "level", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: time.Minute}

	heatFast = outlook{width: time.Minute, points: 20, need: 16, hours: 1. / 3, rise: 3}
	heatSlow = outlook{width: 2 * time.Hour, points: 48, need: 44, season: 24 * time.Hour, hours: 7 * 24, rise: 3}
)

// thermal is one sensor.
type thermal struct {
	seen    time.Duration
	minutes window
	hours   window // of how much hotter it is than at like load
	peaks   window // of the hours
	level   level
	recent  []point
}

// dies are words in the names of sensors of the chip that computes, which are
// those that the limits of a class are about: "cpu-thermal", "CPU-therm",
// "soc0-thermal", "gpuss-0-thermal" and "bigcore0-thermal" of systems on a
// chip, "tj-thermal", a Jetson's hottest spot, "x86_pkg_temp", "coretemp
// Package id 0", "k10temp Tctl". Drives, converters, network adapters and
// boards have limits of their own; "PMIC-Die" of a Jetson is 100 °C all the
// time, "nct6775 CPUTIN" often is an input without a sensor, and "acpitz" can be
// anything.
var dies = []string{"cpu", "cpuss", "soc", "gpu", "gpuss", "package", "pkg", "tj", "bigcore", "littlecore", "coretemp", "k10temp", "zenpower"}

// die says whether a sensor is one of the chip that computes, by its name.
func die(sensor string) bool {
	words := strings.FieldsFunc(strings.ToLower(sensor), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
	return slices.ContainsFunc(words, func(w string) bool { return slices.Contains(dies, strings.TrimRight(w, "0123456789")) })
}

// temperatures judges every sensor: by the limits of the class those of the
// chip that computes, and others only by what they were at like load.
func (d *Detector) temperatures(t *dunlinv1.Telemetry) {
	for _, s := range t.Temperatures {
		switch {
		case s == nil:
		case die(s.Sensor):
			d.heat(named(s.Sensor), &s.Celsius, d.cfg.SlowdownCelsius, d.cfg.WarnCelsius)
		default:
			d.heat(named(s.Sensor), &s.Celsius, 0, 0)
		}
	}
	for _, g := range t.Gpus {
		if g == nil {
			continue
		}
		slowdown, ok := figure(g.SlowdownCelsius, 1, hottest)
		if !ok {
			slowdown = d.cfg.SlowdownCelsius
		}
		warn := d.cfg.WarnCelsius
		if warn >= slowdown {
			warn = 0
		}
		d.heat(gpuName(g.Index), g.Celsius, slowdown, warn)
	}
}

func (d *Detector) heat(subject string, celsius *float64, slowdown, warn float64) {
	v, ok := figure(celsius, coldest, hottest)
	if !ok {
		return
	}
	s := d.sensors[subject]
	if s == nil {
		if len(d.sensors) >= maxSubjects {
			return
		}
		s = &thermal{
			minutes: newWindow(time.Minute, maxSamples, median), hours: newWindow(2*time.Hour, 48, median), peaks: newWindow(2*time.Hour, 48, highest),
			level: level{floor: heatFloor, effect: heatEffect, up: true, apart: time.Hour},
		}
		d.sensors[subject] = s
	} else if s.seen == d.now {
		return // a name that occurs twice
	}
	s.seen = d.now
	s.recent = push(s.recent, point{d.now, v}, 32)
	c := d.cause(Temperature, subject)
	none := math.NaN()
	if slowdown > 0 {
		d.judge(c, &heatNow, v >= slowdown, v < slowdown-coolDown, func() finding {
			return finding{byThreshold, "°C", fmt.Sprintf("%s °C: at %s the device slows down", number(v), number(slowdown)), slowdown, none, none, s.recent}
		})
	}
	if warn > 0 {
		d.judge(c, &heatWarn, v >= warn, v < warn-coolWarn, func() finding {
			return finding{byThreshold, "°C", fmt.Sprintf("%s °C, above %s for %v", number(v), number(warn), heatWarn.after), warn, none, none, s.recent}
		})
	}
	if !s.minutes.add(d.now, v) {
		return
	}
	minute := s.minutes.points[len(s.minutes.points)-1].value
	if slowdown > 0 {
		p := heatFast.see(&s.minutes, slowdown, none, true)
		d.judge(c, &heatSoon, p.soon && d.loadStays(), p.far, func() finding {
			return finding{byTrend, "°C", fmt.Sprintf("rises by %s °C an hour, and reaches %s °C in %s: the device slows down then", number(p.slope), number(slowdown), span(p.hours)),
				slowdown, p.slope, p.hours, s.minutes.tail(heatFast.points)}
		})
	}
	load := d.load.tail(10)
	if len(load) < 5 {
		return
	}
	if s.level.observe(d.now, 10*mean(load), minute) {
		changed := s.level.changed()
		d.judge(c, &heatLevel, changed, !changed && s.level.back(), func() finding {
			return finding{byChange, "°C", fmt.Sprintf("%s °C, and %s at the same load before", number(minute), number(s.level.expected)), s.level.expected + heatEffect, none, none, s.level.values}
		})
		s.peaks.add(d.now, minute)
		if s.hours.add(d.now, minute-s.level.expected) && slowdown > 0 {
			peak := math.Inf(-1)
			for _, p := range s.peaks.tail(12) {
				peak = max(peak, p.value)
			}
			now := s.hours.points[len(s.hours.points)-1].value
			p := heatSlow.see(&s.hours, now+slowdown-peak, now, true)
			d.judge(c, &heatLater, p.soon && p.hours > 0, p.far, func() finding {
				return finding{byTrend, "°C", fmt.Sprintf("at the same load it rises by %s °C a day, and reaches %s °C in %s", number(24*p.slope), number(slowdown), span(p.hours)),
					slowdown, p.slope, p.hours, s.peaks.points}
			})
		}
	}
}

// loadStays says whether the load of the last ten minutes is that of the hour
// before, as far as that is known.
func (d *Detector) loadStays() bool {
	all := d.load.tail(60)
	if len(all) < 25 {
		return false
	}
	last := mean(all[len(all)-10:])
	for i := len(all) - 20; i >= 0; i -= 10 {
		if last-mean(all[i:i+10]) > loadStep {
			return false
		}
	}
	return true
}

func highest(values []float64) float64 {
	most := math.Inf(-1)
	for _, v := range values {
		most = max(most, v)
	}
	return most
}

func lowest(values []float64) float64 {
	least := math.Inf(1)
	for _, v := range values {
		least = min(least, v)
	}
	return least
}
