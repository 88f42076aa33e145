package alarm

import (
	"fmt"
	"math"
	"time"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// powerEffect is by what part power must differ from what it was at like
	// utilisation, powerFloor the part that such a difference has as its
	// standard deviation. powerLeast watts and less say nothing.
	powerEffect = 0.15
	powerFloor  = 0.03
	powerLeast  = 0.5
	powerMost   = 1e5
)

var powerLevel = rule{name: "level", severity: dunlinv1.Severity_SEVERITY_WARNING, before: 10 * time.Minute, every: time.Minute}

// powered is one thing whose power is known.
type powered struct {
	seen     time.Duration
	watts    window
	use      window
	level    level
	versions int // Detector.serving.changes, at last
}

// power judges the power of GPUs against their utilisation, and that of the
// device against that of the busiest processor.
func (d *Detector) power(t *dunlinv1.Telemetry) {
	use, ok := busiest(t)
	d.drawn("device", t.PowerWatts, use, ok)
	for _, g := range t.Gpus {
		if g != nil {
			use, ok := figure(g.Utilisation, 0, 1)
			d.drawn(gpuName(g.Index), g.PowerWatts, use, ok)
		}
	}
}

func (d *Detector) drawn(subject string, watts *float64, use float64, known bool) {
	v, ok := figure(watts, powerLeast, powerMost)
	if !ok || !known {
		return
	}
	s := d.powers[subject]
	if s == nil {
		if len(d.powers) >= maxSubjects {
			return
		}
		s = &powered{
			watts: newWindow(time.Minute, 5, mid), use: newWindow(time.Minute, 5, mid),
			level: level{floor: powerFloor, effect: math.Log1p(powerEffect), up: true, down: true, apart: learnApart}, versions: d.serving.changes,
		}
		d.powers[subject] = s
	} else if s.seen == d.now {
		return
	}
	s.seen = d.now
	if s.versions != d.serving.changes {
		s.versions = d.serving.changes
		s.level.served()
	}
	c := d.cause(Power, subject)
	s.use.add(d.now, use)
	if !s.watts.add(d.now, v) {
		return
	}
	minute := s.watts.points[len(s.watts.points)-1].value
	if s.level.observe(d.now, 20*s.use.points[len(s.use.points)-1].value, math.Log(minute)) {
		changed := s.level.changed()
		d.judge(c, &powerLevel, changed, !changed && s.level.back(), func() finding {
			before, turn := math.Exp(s.level.expected), 1+powerEffect
			if math.Log(minute) < s.level.expected {
				turn = 1 / turn
			}
			return finding{byChange, "W", fmt.Sprintf("%s W, and %s at the same utilisation before", number(minute), number(before)), before * turn, math.NaN(), math.NaN(), exponentials(s.level.values)}
		})
	}
}

// mid gives the mean: what varies fast within a minute, as power does with
// the runs that come and go, has no typical value but that.
func mid(values []float64) float64 {
	var sum float64
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

func exponentials(points []point) []point {
	all := make([]point, len(points))
	for i, p := range points {
		all[i] = point{p.at, math.Exp(p.value)}
	}
	return all
}
