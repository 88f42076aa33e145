package engine

import (
	"math"
	"slices"
	"time"
)

const (
	// demandFast and demandSlow are the time constants of the two rates at
	// which requests are counted: what a version is used for now, and what it
	// is used for in the long run.
	demandFast = 30 * time.Second
	demandSlow = 10 * time.Minute
	// A request begins a burst when none came for lull before it.
	lull = 2 * time.Second
	// burstWindow is how many intervals between bursts are remembered, and
	// burstLeast how many are needed to expect the next one.
	burstWindow = 16
	burstLeast  = 4
	// Bursts are regular where nine tenths of the middle of the intervals lie
	// within this part of the median.
	regular = 0.25
	// The day is remembered in parts; a part in which requests came on at
	// least half of the last days, newer ones counting more, is a busy one.
	dayParts  = 96
	dayPart   = 24 * time.Hour / dayParts
	dayFade   = 0.5
	dayLikely = 0.5
	// soonest bounds what is taken for the time until the next request.
	soonest = time.Millisecond
)

// demand estimates how soon a version will be used again, from when it was.
//
// The rate is a mean of two exponentially fading ones. Bursts that come at
// regular intervals are expected from the intervals' quantiles, as the hybrid
// histogram policy does it (Shahrad et al., Serverless in the Wild, 2020); and
// so are busy parts of the day.
type demand struct {
	fast, slow float64 // requests per second, at last
	last       moment  // latest request
	any        bool    // there was one

	began     moment                     // of the latest burst
	intervals [burstWindow]time.Duration // a ring
	bursts    int                        // intervals in all

	day     [dayParts]float32 // by part: how likely requests are in it
	known   [dayParts]bool    // was seen whole at least once
	busy    bool              // requests came in the current part
	part    int               // of the latest request or look
	partSet bool
}

// observe counts a request.
func (d *demand) observe(now moment, at time.Time) {
	d.fast = d.fast*fade(now-d.last, demandFast) + 1/demandFast.Seconds()
	d.slow = d.slow*fade(now-d.last, demandSlow) + 1/demandSlow.Seconds()
	if !d.any || now-d.last > lull {
		if d.any {
			d.intervals[d.bursts%burstWindow] = now - d.began
			d.bursts++
		}
		d.began = now
		d.turn(at)
		d.busy = true
	}
	d.last, d.any = now, true
}

func fade(age, constant time.Duration) float64 {
	return math.Exp(-age.Seconds() / constant.Seconds())
}

// turn takes the day on to the part of a time.
func (d *demand) turn(at time.Time) {
	part := int(time.Duration(at.Unix()%86400) * time.Second / dayPart)
	if !d.partSet {
		d.part, d.partSet = part, true
		return
	}
	for d.part != part {
		seen := float32(0)
		if d.busy {
			seen = 1
		}
		if d.known[d.part] {
			d.day[d.part] += dayFade * (seen - d.day[d.part])
		} else {
			d.day[d.part], d.known[d.part] = seen, true
		}
		d.busy = false
		d.part = (d.part + 1) % dayParts
	}
}

// rate is how many requests per second may be expected.
func (d *demand) rate(now moment) float64 {
	if !d.any {
		return 0
	}
	age := now - d.last
	return (d.fast*fade(age, demandFast) + d.slow*fade(age, demandSlow)) / 2
}

// next is how long it is likely to be until the next request: until the middle
// of the span in which a burst is expected, and else as the rate says.
func (d *demand) next(now moment, at time.Time) time.Duration {
	if from, to := d.expects(now, at); to != never {
		return max(from+(to-from)/2-now, soonest)
	}
	rate := d.rate(now)
	if rate < 1/never.Seconds() {
		return never
	}
	return max(duration(1/rate), soonest)
}

// expects gives the span in which the next burst is likely to begin; never
// where there is no sign of one.
func (d *demand) expects(now moment, at time.Time) (from, to moment) {
	from, to = d.nextBurst(now)
	if busy := d.nextBusy(now, at); busy < from {
		return busy, busy + dayPart
	}
	return from, to
}

func (d *demand) nextBurst(now moment) (from, to moment) {
	n := min(d.bursts, burstWindow)
	if n < burstLeast || now-d.last <= lull {
		return never, never
	}
	var room [burstWindow]time.Duration
	sorted := append(room[:0], d.intervals[:n]...)
	slices.Sort(sorted)
	low, median, high := sorted[n/10], sorted[n/2], sorted[(n*9-1)/10]
	if float64(high-low) > regular*float64(median) {
		return never, never
	}
	spread := max(high-low, median/100)
	from, to = d.began+low-spread/2, d.began+high+spread
	if to < now { // it has not come
		return never, never
	}
	return from, to
}

// nextBusy is when the next busy part of the day begins after an idle one.
func (d *demand) nextBusy(now moment, at time.Time) moment {
	if !d.partSet || now-d.last <= dayPart {
		return never
	}
	sinceMidnight := time.Duration(at.Unix()%86400)*time.Second + time.Duration(at.Nanosecond())
	part := int(sinceMidnight / dayPart)
	for ahead := 1; ahead < dayParts; ahead++ {
		p := (part + ahead) % dayParts
		before := (p + dayParts - 1) % dayParts
		if d.known[p] && d.day[p] >= dayLikely && d.day[before] < dayLikely {
			return now + time.Duration(part+ahead)*dayPart - sinceMidnight
		}
	}
	return never
}
