package alarm

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// A mean of times is of timesLeast requests at least, and the median of
	// meansLeast means of a minute at least is a value. A share is of
	// shareLeast requests at least. What takes longer than poolMost to come
	// together is dropped.
	timesLeast = 5
	meansLeast = 3
	shareLeast = 20
	poolMost   = 15 * time.Minute
	// What one request costs is the median of the first costValues means.
	costValues = 30

	latencyEffect = 0.25 // part by which times are longer
	latencyFloor  = 0.06
	// Under a demand under which a request took more than waitMost times its
	// run time, it is not compared how long it takes: that differs widely then.
	waitMost = 1.5
	// doneEffect is by how much the share of the requests that are taken in
	// must be lower than under like demand, doneLeast what it must be whatever
	// it was.
	doneEffect = 0.1
	doneFloor  = 0.02
	doneLeast  = 0.5
	// failedEffect and failedMost are as much for the share of those that fail.
	failedEffect = 0.02
	failedFloor  = 0.004
	failedMost   = 0.5
)

var (
	runLevel     = rule{name: "run", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: poolMost}
	latencyLevel = rule{name: "level", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: poolMost}
	doneLevel    = rule{name: "level", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: poolMost}
	doneLow      = rule{name: "low", severity: dunlinv1.Severity_SEVERITY_ERROR, after: 10 * time.Minute, before: 5 * time.Minute, every: time.Minute}
	failedLevel  = rule{name: "level", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: poolMost}
	failedHigh   = rule{name: "high", severity: dunlinv1.Severity_SEVERITY_ERROR, after: 2 * time.Minute, before: 5 * time.Minute, every: time.Minute}
)

type versionKey struct {
	model   string
	version int64
}

// serving is what all versions share: the demand, which is the time that their
// requests would take at what they cost at first, for each second. It does not
// depend on how the device is doing now.
type serving struct {
	work    float64 // sum of that, in seconds
	unknown int     // samples with requests whose cost is not known
	changes int     // of the set of versions
}

// moment remembers where the demand was.
type moment struct {
	at      time.Duration
	work    float64
	unknown int
}

// served is one version.
type served struct {
	name  string
	seen  time.Duration
	last  Version
	cost  float64 // seconds of one request; NaN: not known
	costs []float64

	times                    pool
	shares                   pool
	means, runs              []float64
	latency, run, done, fail level
	recent, recentFail       []point
	data                     drifting
}

// pool adds up requests until there are enough.
type pool struct {
	from                       moment
	any                        bool
	succeeded, failed, refused float64
	time, run                  float64 // seconds
}

func (p *pool) add(from moment, succeeded, failed, refused, time, run float64) {
	if !p.any {
		*p = pool{from: from, any: true}
	}
	p.succeeded += succeeded
	p.failed += failed
	p.refused += refused
	p.time += time
	p.run += run
}

// serve judges the versions by how their counts have changed since the last
// sample.
func (d *Detector) serve(versions []Version, gap time.Duration, limited bool) {
	before := moment{d.now - gap, d.serving.work, d.serving.unknown}
	type change struct {
		s                          *served
		succeeded, failed, refused float64
		time, run                  float64
	}
	var changes []change
	set := false
	for _, v := range versions {
		k := versionKey{v.Model, v.Version}
		s := d.versions[k]
		if s != nil && v.Form.Threads == 0 {
			v.Form.Threads = s.last.Form.Threads
		}
		if s != nil && s.seen != d.now && s.last.Form != v.Form {
			d.forget(s, false)
			delete(d.versions, k)
			s = nil
		}
		if s == nil {
			set = true
			if len(d.versions) >= maxSubjects {
				continue
			}
			s = &served{
				name: named(v.Model) + ":" + strconv.FormatInt(v.Version, 10), last: v, cost: math.NaN(), data: drifting{times: v.Data.Times},
				latency: level{floor: latencyFloor, effect: math.Log1p(latencyEffect), up: true, apart: learnApart},
				run:     level{floor: latencyFloor, effect: math.Log1p(latencyEffect), up: true, apart: learnApart},
				done:    level{floor: doneFloor, effect: doneEffect, down: true, apart: learnApart},
				fail:    level{floor: failedFloor, effect: failedEffect, up: true, apart: learnApart},
			}
			d.versions[k] = s
		}
		l := s.last
		s.last = v
		if s.seen == d.now {
			continue
		}
		s.seen = d.now
		d.judgeData(s, &v.Data)
		if v.Succeeded < l.Succeeded || v.Failed < l.Failed || v.Refused < l.Refused || v.Time < l.Time || v.Run < l.Run {
			continue // loaded again
		}
		c := change{s, float64(v.Succeeded - l.Succeeded), float64(v.Failed - l.Failed), float64(v.Refused - l.Refused), (v.Time - l.Time).Seconds(), (v.Run - l.Run).Seconds()}
		if offered := c.succeeded + c.failed + c.refused; offered > 0 {
			if math.IsNaN(s.cost) {
				d.serving.unknown++
			} else {
				d.serving.work += offered * s.cost
			}
		}
		changes = append(changes, c)
	}
	for k, s := range d.versions {
		if s.seen != d.now {
			set = true
			d.forget(s, true)
			delete(d.versions, k)
		}
	}
	if set {
		d.serving.changes++
		for _, s := range d.versions {
			s.latency.served()
			s.run.served()
			s.done.served()
		}
	}
	if gap <= 0 || gap > maxGap || limited {
		for _, s := range d.versions {
			s.times, s.shares, s.means, s.runs = pool{}, pool{}, nil, nil
		}
		return
	}
	for _, c := range changes {
		if c.succeeded+c.failed+c.refused == 0 && !c.s.times.any && !c.s.shares.any {
			continue
		}
		c.s.times.add(before, c.succeeded, c.failed, c.refused, c.time, c.run)
		c.s.shares.add(before, c.succeeded, c.failed, c.refused, c.time, c.run)
		d.judgeTimes(c.s)
		d.judgeShares(c.s)
	}
}

// forget drops what is known of the causes of a version; gone: there will be no
// figures of it.
func (d *Detector) forget(s *served, gone bool) {
	for _, kind := range []string{Latency, Throughput, ErrorRate, DataDrift} {
		if c := d.causes[Key{kind, s.name}]; c != nil {
			c.conditions, c.gone = nil, gone
		}
	}
}

// demand gives the demand since a moment, the seconds of work for each second,
// in quarters of an octave.
func (d *Detector) demand(from moment) (quarters float64, ok bool) {
	if d.serving.unknown != from.unknown || d.now <= from.at {
		return 0, false
	}
	share := (d.serving.work - from.work) / (d.now - from.at).Seconds()
	if !(share > 0) {
		return 0, false
	}
	return min(max(4*math.Log2(share), -32), 16), true
}

// judgeTimes compares the times of requests with those under like demand.
func (d *Detector) judgeTimes(s *served) {
	p := &s.times
	if p.succeeded >= timesLeast && p.time > 0 {
		s.means = append(s.means, math.Log(p.time/p.succeeded))
		if cost := p.run / (p.succeeded + p.failed); cost > 0 {
			s.runs = append(s.runs, math.Log(cost))
			if len(s.costs) < costValues {
				s.costs = append(s.costs, cost)
				s.cost = median(slices.Clone(s.costs))
			}
		}
		from := p.from
		*p = pool{from: from, any: true}
	}
	age := d.now - p.from.at
	switch {
	case age >= time.Minute && len(s.means) >= meansLeast:
		value, run := median(s.means), median(s.runs) // NaN where there is none
		demand, ok := d.demand(p.from)
		s.means, s.runs, *p = s.means[:0], s.runs[:0], pool{}
		c := d.cause(Latency, s.name)
		if !ok || len(s.costs) < costValues {
			return
		}
		if math.IsNaN(run) {
			return
		}
		d.judgeTime(c, &runLevel, &s.run, demand, run, "a request runs for %s s, and for %s under the same demand before")
		whole, known := s.latency.expect(demand)
		if least, ok := s.run.expect(demand); known && (!ok || whole-least > math.Log(waitMost)) {
			return
		}
		d.judgeTime(c, &latencyLevel, &s.latency, demand, value, "a request takes %s s, and %s under the same demand before")
	case age >= poolMost:
		s.means, s.runs, *p = s.means[:0], s.runs[:0], pool{}
	}
}

func (d *Detector) judgeTime(c *cause, r *rule, l *level, demand, value float64, message string) {
	if !l.observe(d.now, demand, value) {
		return
	}
	changed := l.changed()
	d.judge(c, r, changed, !changed && l.back(), func() finding {
		before := math.Exp(l.expected)
		return finding{byChange, "s", fmt.Sprintf(message, number(math.Exp(value)), number(before)), before * (1 + latencyEffect), math.NaN(), math.NaN(), exponentials(l.values)}
	})
}

// judgeShares compares the shares of the requests that are taken in, and of
// those that fail.
func (d *Detector) judgeShares(s *served) {
	p := &s.shares
	age := d.now - p.from.at
	offered := p.succeeded + p.failed + p.refused
	if age >= poolMost && offered < shareLeast {
		*p = pool{}
	}
	if age < time.Minute || offered < shareLeast {
		return
	}
	q := *p
	demand, ok := d.demand(q.from)
	*p = pool{}
	none := math.NaN()

	ran := q.succeeded + q.failed
	done := ran / offered
	s.recent = push(s.recent, point{d.now, done}, maxSamples)
	c := d.cause(Throughput, s.name)
	d.judge(c, &doneLow, done < doneLeast, done > (1+doneLeast)/2, func() finding {
		return finding{byThreshold, "", fmt.Sprintf("of the requests only %s are done: %s a second of %s", percent(done), number(ran/age.Seconds()), number(offered/age.Seconds())), doneLeast, none, none, s.recent}
	})
	if ok && s.done.observe(d.now, demand, done) {
		changed := s.done.changed()
		d.judge(c, &doneLevel, changed, !changed && s.done.back(), func() finding {
			return finding{byChange, "", fmt.Sprintf("of the requests %s are done, and %s under the same demand before", percent(done), percent(s.done.expected)),
				s.done.expected - doneEffect, none, none, s.done.values}
		})
	}

	if ran < shareLeast {
		return
	}
	failed := q.failed / ran
	s.recentFail = push(s.recentFail, point{d.now, failed}, maxSamples)
	c = d.cause(ErrorRate, s.name)
	d.judge(c, &failedHigh, failed > failedMost, failed < failedMost/2, func() finding {
		return finding{byThreshold, "", fmt.Sprintf("%s of the requests fail", percent(failed)), failedMost, none, none, s.recentFail}
	})
	if s.fail.observe(d.now, 0, failed) {
		changed := s.fail.changed()
		d.judge(c, &failedLevel, changed, !changed && s.fail.back(), func() finding {
			return finding{byChange, "", fmt.Sprintf("%s of the requests fail, and %s did before", percent(failed), percent(s.fail.expected)),
				s.fail.expected + failedEffect, none, none, s.fail.values}
		})
	}
}
