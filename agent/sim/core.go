package sim

import (
	"math"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
)

// This file is the physics of a device. Between two events everything in it
// changes by a formula with a closed form, so that a day without an event costs
// as little as a second.
//
// Work is shared: of n runs that go on at a time each has an nth of the
// processor, and so it is with what moves weights.
//
// Power is that of CMOS: idle + (limit - idle) x utilisation x clock^3, as the
// dynamic power is in proportion to f V^2, and the voltage is lowered with the
// frequency. Temperature follows Newton's law of cooling for one lump of heat
// capacity C behind a thermal resistance R:
//
//	C dT/dt = P - (T - ambient) / R
//
// whose solution for constant power approaches ambient + P R with the time
// constant R C.

// Figures that profiles do not have.
const (
	// ambientCelsius is what is around a device until its script says otherwise.
	ambientCelsius = 25
	// A device that works at its limit in that settles at settledPart of the way
	// from there to the temperature that its class warns of.
	settledPart = 0.8
	// timeConstant is R C.
	timeConstant = 2 * time.Minute
	// slowClock is the part of the full clock at which a device runs that is as
	// hot as its class slows down at, until it is cooler by so many degrees.
	slowClock  = 0.5
	hysteresis = 5
	// leastClock is the part of the full clock that no power cap goes below.
	leastClock = 0.1
)

// moment is a time since the device's start.
type moment = time.Duration

const never = moment(math.MaxInt64)

// after gives the moment so many seconds later; never where that is beyond all
// use.
func after(m moment, seconds float64) moment {
	if !(seconds < 1e9) {
		return never
	}
	return m + moment(math.Ceil(seconds*1e9))
}

// core is the state of a device. It has one owner, who takes it to the present
// before he reads or changes anything.
type core struct {
	now  moment
	idle float64 // watts
	most float64 // watts at full work and clock
	// Degrees for each watt; 0 where the class has no figures of power or
	// temperature, and the temperature is then not known.
	resistance         float64
	slowdown, shutdown float64 // degrees; 0: none

	processor, bus lane
	celsius        float64
	joules, busy   float64 // and seconds in which something ran
	moved          float64 // bytes on the bus
	busBytes       float64 // a second
	slowed, down   bool

	script    []Event // what is still to come
	faults    faults
	all       quality             // of the runs of all versions
	qualities map[string]*quality // by version, on top of that

	versions map[engine.VersionID]*version
	used     int64 // bytes of the memory that models run in
	deaths   [][]engine.VersionID
	lost     []engine.VersionID // in quarantine, which nobody has been told
}

// faults is what the script has done so far. Rates are in a second.
type faults struct {
	ambient                          float64
	lost                             bool // NVML does not answer
	cap                              float64
	corrected, uncorrected           float64 // ECC errors
	correctedRate, uncorrectedRate   float64
	remapped, remappedUncorrected    float64
	pending, failed                  bool // of rows that are to be remapped
	badRelease                       bool // of the agent
	xids, lastXID                    float64
	filled, fillRate, leak, leakRate float64 // bytes
}

// quality is what a script says of the runs of one version, or of all.
type quality struct {
	slow, energy      float64 // factors of a run's time, and of its power above idle
	failing, crashing float64 // part of runs, of those that crash the worker
	confidence        float64 // mean of the largest class's; 0: outputs are zeros
	unloadable        bool
}

func newQuality() quality { return quality{slow: 1, energy: 1} }

// quality gives that of a version, which a script may change.
func (c *core) quality(version string) *quality {
	q := c.qualities[version]
	if q == nil {
		q = new(newQuality())
		c.qualities[version] = q
	}
	return q
}

// runsAs gives what all that the script says makes of the runs of a version.
func (c *core) runsAs(id engine.VersionID) quality {
	q := c.all
	if own := c.qualities[id.String()]; own != nil {
		q.slow *= own.slow
		q.energy *= own.energy
		q.failing = 1 - (1-q.failing)*(1-own.failing)
		q.crashing = 1 - (1-q.crashing)*(1-own.crashing)
		q.unloadable = q.unloadable || own.unloadable
		if own.confidence > 0 {
			q.confidence = own.confidence
		}
	}
	return q
}

// lane is what its jobs share.
type lane struct{ jobs []*job }

// job is one run, or one move of weights.
type job struct {
	id      engine.VersionID
	left    float64 // seconds, had it the lane for itself at full speed
	whole   float64
	energy  float64       // factor of the power above idle
	done    chan struct{} // closed at the end
	failure error
}

// advance takes the device to a later moment.
func (c *core) advance(to moment) {
	for c.now < to && !c.down {
		next := min(to, c.next())
		c.pass((next - c.now).Seconds())
		c.now = next
		c.settle()
	}
	c.now = max(c.now, to)
}

// next is when something happens if nobody does anything.
func (c *core) next() moment {
	if c.down {
		return never
	}
	next := min(c.processor.next(c.now, c.speed()), c.bus.next(c.now, 1))
	if len(c.script) > 0 {
		next = min(next, c.script[0].At)
	}
	switch {
	case c.slowed:
		next = min(next, c.reach(c.slowdown-hysteresis))
	case c.slowdown > 0:
		next = min(next, c.reach(c.slowdown))
	}
	if c.shutdown > 0 {
		next = min(next, c.reach(c.shutdown))
	}
	return max(next, c.now+1)
}

// reach is when the temperature comes to be so high, or so low.
func (c *core) reach(celsius float64) moment {
	end := c.balance()
	if (celsius-c.celsius)*(end-celsius) <= 0 {
		return never
	}
	return after(c.now, timeConstant.Seconds()*math.Log((end-c.celsius)/(end-celsius)))
}

// balance is the temperature at which as much heat leaves as there comes.
func (c *core) balance() float64 { return c.faults.ambient + c.power()*c.resistance }

func (c *core) power() float64 {
	if len(c.processor.jobs) == 0 {
		return c.idle
	}
	clock, energy := c.clock(), 0.
	for _, j := range c.processor.jobs {
		energy += j.energy / float64(len(c.processor.jobs))
	}
	return c.idle + (c.most-c.idle)*energy*clock*clock*clock
}

// capClock is the part of the full clock that the power cap leaves.
func (c *core) capClock() float64 {
	if c.faults.cap == 0 || c.faults.cap >= c.most {
		return 1
	}
	return math.Cbrt(max((c.faults.cap-c.idle)/(c.most-c.idle), leastClock*leastClock*leastClock))
}

func (c *core) clock() float64 {
	if c.slowed {
		return min(c.capClock(), slowClock)
	}
	return c.capClock()
}

// speed is the part of its full speed at which the processor works.
func (c *core) speed() float64 { return c.clock() / c.all.slow }

// pass lets so many seconds pass in which nothing happens.
func (c *core) pass(seconds float64) {
	c.joules += c.power() * seconds
	if c.resistance > 0 {
		end := c.balance()
		c.celsius = end + (c.celsius-end)*math.Exp(-seconds/timeConstant.Seconds())
	}
	if c.processor.pass(seconds * c.speed()) {
		c.busy += seconds
	}
	if c.bus.pass(seconds) {
		c.moved += seconds * c.busBytes
	}
	f := &c.faults
	f.corrected += f.correctedRate * seconds
	f.uncorrected += f.uncorrectedRate * seconds
	f.filled = max(f.filled+f.fillRate*seconds, 0)
	f.leak = max(f.leak+f.leakRate*seconds, 0)
}

// settle does what is due now.
func (c *core) settle() {
	const close = 1e-6 // degrees, against rounding
	c.processor.settle()
	c.bus.settle()
	for len(c.script) > 0 && c.script[0].At <= c.now {
		e := c.script[0]
		c.script = c.script[1:]
		switch f := known[e.Fault]; {
		case f.of == nil:
			f.apply(c, e.Value)
		case e.Version == "":
			f.of(&c.all, e.Value)
		default:
			f.of(c.quality(e.Version), e.Value)
		}
	}
	if c.slowdown > 0 {
		if c.slowed {
			c.slowed = c.celsius > c.slowdown-hysteresis+close
		} else {
			c.slowed = c.celsius >= c.slowdown-close
		}
	}
	if c.shutdown > 0 && c.celsius >= c.shutdown-close {
		c.end(errDown)
	}
}

// end switches the device off for good.
func (c *core) end(err error) {
	c.down = true
	c.processor.fail(err)
	c.bus.fail(err)
}

// crash loses all weights, as the death of a worker process does. What was on
// its way in begins again.
func (c *core) crash() {
	var running []engine.VersionID
	for _, j := range c.processor.jobs {
		running = append(running, j.id)
	}
	c.deaths = append(c.deaths, running)
	c.processor.fail(errCrashed)
	for _, j := range c.bus.jobs {
		j.left = j.whole
	}
	for _, v := range c.versions {
		if v.in {
			v.in = false
			c.used -= v.bytes()
		}
	}
}

func (l *lane) add(id engine.VersionID, seconds float64) *job {
	j := &job{id: id, left: seconds, whole: seconds, energy: 1, done: make(chan struct{})}
	l.jobs = append(l.jobs, j)
	return j
}

// next is when the first of the jobs ends.
func (l *lane) next(now moment, speed float64) moment {
	least := math.Inf(1)
	for _, j := range l.jobs {
		least = min(least, j.left)
	}
	return after(now, least*float64(len(l.jobs))/speed)
}

// pass does so many seconds of work, and says whether there was any to do.
func (l *lane) pass(seconds float64) bool {
	n := float64(len(l.jobs))
	for _, j := range l.jobs {
		j.left -= seconds / n
	}
	return n > 0
}

// settle ends the jobs that are done.
func (l *lane) settle() {
	l.remove(func(j *job) bool { return j.left <= 1e-9 }, nil)
}

func (l *lane) fail(err error) { l.remove(func(*job) bool { return true }, err) }

func (l *lane) remove(which func(*job) bool, err error) {
	rest := l.jobs[:0]
	for _, j := range l.jobs {
		if !which(j) {
			rest = append(rest, j)
			continue
		}
		j.failure = err
		close(j.done)
	}
	clear(l.jobs[len(rest):])
	l.jobs = rest
}
