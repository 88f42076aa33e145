package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/alarm"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// period is the time between two samples.
const period = 10 * time.Second

// Benign changes of every device, and their rates. Each device has a random
// share of the rest: diurnal load with weekends, bursts, weather.
const (
	missing     = 0.005            // share of single samples that are lost
	gapEvery    = 5 * 24.          // hours between gaps of 3 minutes to an hour
	glitchEvery = 3 * 24.          // hours between single values of a sensor that are nonsense
	reloadEvery = 10 * 24.         // hours between reloads of driver and models, which reset counters
	deployEvery = 5 * 24.          // hours between new versions of a model
	clientEvery = 8 * 24.          // hours between minutes in which a client sends what fails
	stepEvery   = 10 * 24.         // hours between steps of the clock
	swapEvery   = 1.               // hours between weights that leave or come back
	strike      = 3.               // days between corrected memory errors of background radiation
	day         = 24 * time.Hour   //
	week        = 7 * day          //
	warmUp      = 15 * time.Minute // until memory has its size after a start
	tick        = float64(period) / float64(time.Hour)
)

// model is one model of a device.
type model struct {
	name     string
	version  int64
	rate     float64 // requests per second at the day's peak
	now      float64 // now
	cost     float64 // seconds of one
	bytes    float64
	resident bool
	drift    noise // of the rate
	counts   alarm.Version
	delay    float64 // factor of the run times, by a trouble
	wait     float64 // factor of the times, by a trouble
	refuse   float64 // share of the requests that is refused, by a trouble
	fail     float64 // share that fails, by a trouble
	retry    float64 // requests at a time fail until then, by a client: hours
}

// noise is a first-order autoregressive process with standard deviation 1.
type noise struct{ value float64 }

func (n *noise) next(r *rand.Rand, hours float64) float64 {
	keep := math.Exp(-tick / hours)
	n.value = keep*n.value + math.Sqrt(1-keep*keep)*r.NormFloat64()
	return n.value
}

// device generates the telemetry of one device. It is the same for the same
// seed.
type device struct {
	r      *rand.Rand
	now    time.Duration
	wall   time.Time
	models []*model

	phase, night float64 // of the load: hours, part of it at night
	weekend      float64
	crowd        noise
	burstUntil   float64
	burst        float64

	hasGPU, hasPower           bool
	quantum                    float64 // of the temperature's sensor
	slowdown                   float64
	ambient, swing             float64
	weather                    noise
	resistance, inertia        float64 // kelvins per watt, hours
	celsius                    float64
	idle, dynamic              float64 // watts
	mix                        noise
	diskFree, logs, logged     float64
	wear, wearing              float64 // share, share per day
	memory, others, anonymous  float64
	garbage                    float64
	started                    float64 // hours, of the agent
	corrected, uncorrected     uint64
	remapped                   uint32
	pending, failed            bool
	xids, lastXID              uint64
	gpuAway                    float64 // until then, hours
	gap                        float64 // until then, hours
	heating, powering          float64 // factors by a trouble
	warming, leaking, hoarding float64 // kelvins, bytes, bytes, by a trouble
	filling                    float64 // bytes, by a trouble
	trouble                    *trouble
	t                          dunlinv1.Telemetry
	gpu                        dunlinv1.GpuTelemetry
	sensor                     dunlinv1.Temperature
	versions                   []alarm.Version
}

func (d *device) uniform(least, most float64) float64 { return least + (most-least)*d.r.Float64() }

// chance says whether something happens now that does each so many hours.
func (d *device) chance(hours float64) bool { return d.r.Float64() < tick/hours }

func newDevice(seed uint64) *device {
	d := &device{r: rand.New(rand.NewPCG(seed, 0xa1a2)), heating: 1, powering: 1}
	d.wall = time.Date(2026, 3, 1+d.r.IntN(28), d.r.IntN(24), d.r.IntN(60), 0, 0, time.UTC)
	if d.r.IntN(4) == 0 {
		d.wall = time.Unix(int64(d.r.IntN(1000)), 0)
	}
	d.phase, d.night, d.weekend = d.uniform(0, 24), d.uniform(0.1, 0.8), d.uniform(0.3, 1)
	d.hasGPU = d.r.IntN(2) == 0
	d.hasPower = d.hasGPU || d.r.IntN(3) > 0
	d.quantum = []float64{1, 1, 0.5, 0.001}[d.r.IntN(4)]
	d.slowdown = []float64{80, 85, 90, 97}[d.r.IntN(4)]
	d.ambient, d.swing = d.uniform(15, 30), d.uniform(1, 5)
	d.idle = math.Exp(d.uniform(math.Log(3), math.Log(60)))
	d.dynamic = d.idle * d.uniform(1, 5)
	// At full load it is 12 to 30 kelvins below the slowdown.
	d.resistance = (d.slowdown - d.uniform(12, 30) - d.ambient - d.swing) / (d.idle + d.dynamic)
	d.inertia = d.uniform(0.03, 0.4)
	d.celsius = d.ambient + d.resistance*d.idle
	d.memory = []float64{4, 8, 16, 64}[d.r.IntN(4)] * (1 << 30)
	d.others = d.memory * d.uniform(0.1, 0.3)
	d.diskFree = d.uniform(8, 200) * 1e9
	d.logs = d.uniform(0.01, 0.5) * 1e9
	d.wear, d.wearing = d.uniform(0.02, 0.6), d.uniform(0.0001, 0.001)
	if d.hasGPU {
		d.corrected, d.remapped = uint64(d.r.IntN(50)), uint32(d.r.IntN(3))
	}
	n := 1 + d.r.IntN(4)
	share := d.uniform(0.25, 0.7) // of the time, at the peak
	for i := range n {
		cost := math.Exp(d.uniform(math.Log(0.003), math.Log(0.15)))
		d.models = append(d.models, &model{
			name: fmt.Sprintf("m%d", i), version: 1, cost: cost, rate: share / float64(n) / cost, delay: 1, wait: 1,
			bytes: d.memory * d.uniform(0.01, 0.08), resident: true,
		})
	}
	return d
}

// daily is the share of the peak's load at a time.
func (d *device) daily(hours float64) float64 {
	s := math.Sin(2 * math.Pi * (hours - d.phase) / 24)
	share := d.night + (1-d.night)*(0.5+0.5*math.Tanh(2*s)/math.Tanh(2))
	if int(hours/24)%7 >= 5 {
		share *= d.weekend
	}
	return share
}

// next gives the next sample; ok is false where it is lost. What it gives is
// good until the next call.
func (d *device) next() (s alarm.Sample, ok bool) {
	d.now += period
	d.wall = d.wall.Add(period)
	hours := d.now.Hours()
	r := d.r
	if d.trouble != nil && d.now >= d.trouble.onset {
		d.trouble.act(d, (d.now - d.trouble.onset).Hours())
	}

	// What happens to devices that are well.
	if d.chance(stepEvery) {
		if d.wall.Year() < 2000 {
			d.wall = time.Date(2026, 3, 1+r.IntN(28), r.IntN(24), 0, 0, 0, time.UTC)
		} else {
			d.wall = d.wall.Add(time.Duration(d.uniform(-3600, 3600) * float64(time.Second)))
		}
	}
	if d.chance(reloadEvery) {
		d.gpuAway = hours + d.uniform(0, 0.05)
		d.xids = 0
		d.corrected = 0
		d.started = hours
		for _, m := range d.models {
			m.counts = alarm.Version{}
		}
	}
	if d.chance(deployEvery) {
		m := d.models[r.IntN(len(d.models))]
		m.version++
		m.cost *= d.uniform(0.7, 1.3)
		d.diskFree -= min(m.bytes, d.diskFree/50)
		m.bytes *= d.uniform(0.8, 1.25)
		m.counts = alarm.Version{}
		d.mix.value += d.uniform(-1, 1)
	}
	if d.chance(clientEvery) {
		d.models[r.IntN(len(d.models))].retry = hours + d.uniform(0.01, 0.05)
	}
	if d.chance(swapEvery) {
		m := d.models[r.IntN(len(d.models))]
		m.resident = !m.resident
	}
	if d.chance(12) {
		d.burst, d.burstUntil = d.uniform(1.2, 2.5), hours+d.uniform(0.02, 0.2)
	}

	// Demand, and what becomes of it.
	load := d.daily(hours) * math.Exp(0.12*d.crowd.next(r, 0.5))
	if hours < d.burstUntil {
		load *= d.burst
	}
	var use float64
	for _, m := range d.models {
		m.now = m.rate * load * math.Exp(0.1*m.drift.next(r, 0.2))
		use += m.now * m.cost
	}
	taken := 1.0
	if use > 0.97 {
		taken = 0.97 / use
		use = 0.97
	}
	waiting := 1 + 0.5*use*use/(1-use)
	d.versions = d.versions[:0]
	for _, m := range d.models {
		n := poisson(r, m.now*period.Seconds())
		refused := binomial(r, n, max(1-taken, m.refuse))
		n -= refused
		fail := max(0.0002, m.fail)
		if hours < m.retry {
			fail = 0.4
		}
		failed := binomial(r, n, fail)
		n -= failed
		c := &m.counts
		c.Model, c.Version = m.name, m.version
		c.Succeeded += n
		c.Failed += failed
		c.Refused += refused
		if n > 0 {
			run := m.cost * m.delay * math.Exp(0.05*r.NormFloat64())
			each := run * waiting * m.wait * math.Exp(0.5*r.NormFloat64()/math.Sqrt(float64(n)))
			total := each * float64(n)
			if !m.resident { // the first requests wait for the weights
				m.resident = true
				total += d.uniform(0.1, 2)
			}
			for range poisson(r, 0.002*float64(n)) { // heavy tail
				total += m.cost * 5 * math.Pow(1-r.Float64(), -1/1.5)
			}
			c.Time += time.Duration(total * float64(time.Second))
			c.Run += time.Duration(run * float64(n+failed) * float64(time.Second))
		}
		d.versions = append(d.versions, *c)
	}

	// Power and heat.
	use = min(max(use+0.01*r.NormFloat64(), 0), 1)
	watts := (d.idle + d.dynamic*math.Pow(use, 0.9)*(1+0.03*d.mix.next(r, 48))) * d.powering
	watts *= 1 + 0.001*(d.celsius-50)
	ambient := d.ambient + d.swing*math.Sin(2*math.Pi*(hours-15)/24) + 1.5*d.weather.next(r, 60) + d.warming
	d.celsius += (ambient + d.resistance*d.heating*watts - d.celsius) * (1 - math.Exp(-tick/d.inertia))

	// Memory, disk.
	models := 0.0
	for _, m := range d.models {
		if m.resident {
			models += m.bytes
		}
	}
	d.garbage += 1 << 20
	if d.garbage > 64<<20 {
		d.garbage = 0
	}
	arena := 0.02 * d.memory * (1 - math.Exp(-(hours-d.started)/warmUp.Hours()))
	d.anonymous = models + 80e6 + arena + d.garbage + d.leaking
	used := d.others*(1+0.1*d.daily(hours)+0.01*r.NormFloat64()) + d.anonymous + d.hoarding
	d.logged += d.logs * tick / 24 * d.daily(hours)
	if int((hours-tick)/24) != int(hours/24) {
		d.logged = 0.1 * d.logged
	}
	d.wear += d.wearing * tick / 24
	if d.hasGPU && d.chance(strike*24) {
		d.corrected += 1 + uint64(r.IntN(10))
	}

	d.fill(hours, use, watts, used, models)
	switch {
	case hours < d.gap:
		return alarm.Sample{}, false
	case d.chance(gapEvery):
		d.gap = hours + d.uniform(0.05, 1)
	case r.Float64() < missing:
		return alarm.Sample{}, false
	}
	return alarm.Sample{Telemetry: &d.t, Versions: d.versions}, true
}

// fill makes the message.
func (d *device) fill(hours, use, watts, used, models float64) {
	r, t := d.r, &d.t
	t.At = &timestamppb.Timestamp{Seconds: d.wall.Unix(), Nanos: int32(d.wall.Nanosecond())}
	celsius := math.Round((d.celsius+0.2*r.NormFloat64())/d.quantum) * d.quantum
	if d.chance(glitchEvery) {
		celsius = []float64{127, -128, 0, 255, math.NaN()}[r.IntN(5)]
	}
	shown := math.Round(watts*(1+0.03*r.NormFloat64())*10) / 10
	t.CpuUtilisation = set(t.CpuUtilisation, math.Round(100*use)/100)
	if d.hasGPU {
		t.CpuUtilisation = set(t.CpuUtilisation, math.Round(100*(0.05+0.2*use))/100)
	}
	t.MemoryTotalBytes = set(t.MemoryTotalBytes, uint64(d.memory))
	t.MemoryUsedBytes = set(t.MemoryUsedBytes, uint64(min(max(used, 0), d.memory)))
	t.AgentAnonymousBytes = set(t.AgentAnonymousBytes, uint64(d.anonymous))
	t.ModelMemoryUsedBytes = set(t.ModelMemoryUsedBytes, uint64(models))
	t.DiskFreeBytes = set(t.DiskFreeBytes, uint64(max(0, d.diskFree-d.logged-d.filling)))
	t.DiskWear = set(t.DiskWear, math.Floor(100*d.wear)/100)
	t.Temperatures, t.Gpus, t.PowerWatts = t.Temperatures[:0], t.Gpus[:0], nil
	if !d.hasGPU {
		d.sensor.Sensor, d.sensor.Celsius = "cpu-thermal", celsius
		t.Temperatures = append(t.Temperatures, &d.sensor)
		if d.hasPower {
			t.PowerWatts = new(shown)
		}
		return
	}
	if hours < d.gpuAway {
		return
	}
	g := &d.gpu
	g.Utilisation, g.PowerWatts, g.Celsius = set(g.Utilisation, math.Round(100*use)/100), set(g.PowerWatts, shown), set(g.Celsius, celsius)
	g.SlowdownCelsius = set(g.SlowdownCelsius, d.slowdown)
	g.EccCorrected, g.EccUncorrected = set(g.EccCorrected, d.corrected), set(g.EccUncorrected, d.uncorrected)
	g.RemappedRowsCorrected = set(g.RemappedRowsCorrected, d.remapped)
	g.RemapPending, g.RemapFailed = set(g.RemapPending, d.pending), set(g.RemapFailed, d.failed)
	g.XidCount, g.LastXid = set(g.XidCount, d.xids), set(g.LastXid, d.lastXID)
	t.Gpus = append(t.Gpus, g)
}

// set puts a value where there is room for one already.
func set[T any](p *T, v T) *T {
	if p == nil {
		return new(v)
	}
	*p = v
	return p
}

// poisson draws from the distribution, from the normal one where it is like it.
func poisson(r *rand.Rand, mean float64) uint64 {
	if mean > 50 {
		return uint64(max(0, math.Round(mean+math.Sqrt(mean)*r.NormFloat64())))
	}
	limit, product := math.Exp(-mean), r.Float64()
	var n uint64
	for product > limit {
		n++
		product *= r.Float64()
	}
	return n
}

// binomial draws from the distribution.
func binomial(r *rand.Rand, n uint64, p float64) uint64 {
	switch {
	case p <= 0 || n == 0:
		return 0
	case p >= 1:
		return n
	case float64(n)*p < 5:
		return min(n, poisson(r, float64(n)*p))
	}
	mean := float64(n) * p
	return uint64(min(max(0, math.Round(mean+math.Sqrt(mean*(1-p))*r.NormFloat64())), float64(n)))
}
