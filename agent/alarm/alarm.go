// Package alarm predicts trouble of a device from its telemetry: it finds
// trends that end at a threshold, figures that are not what they were under
// like conditions, and what is certain trouble, and keeps the alarms about it.
//
// A cause is a kind and a subject, such as the temperature of "gpu:0"; it has
// one alarm at most. An alarm is raised when one of the conditions that its
// cause is judged by begins to hold, and cleared when none holds any more.
// What makes a condition hold and what ends it differ, each must last, and an
// alarm stays for ten minutes at least: a cause has no more than two changes
// in that time, besides getting worse.
//
// The package is pure: time comes from its caller, and only goes forward. A
// detector begins knowing nothing, and nothing is concluded from few values.
// A figure that is absent, not finite or beyond what it can be is no value;
// neither is a counter that has gone back, which is counted from anew.
package alarm

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/datadrift"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// maxSamples bounds the evidence of an alarm.
	maxSamples = 64
	// maxRaised bounds the alarms that are raised at a time; a further one
	// waits until another is cleared.
	maxRaised = 64
	// maxSubjects bounds what is watched; what comes after that is not.
	maxSubjects = 1024
	// maxName bounds the bytes of a subject's name.
	maxName = 128
	// minRaised is how long an alarm stays.
	minRaised = 10 * time.Minute
	// maxGap is the longest time between two samples over which a condition
	// lasts, and over which counts of requests are compared.
	maxGap = 2 * time.Minute
	// forgetAfter is how long a subject may have no figures before its alarm
	// is cleared and what is known of it forgotten.
	forgetAfter = 24 * time.Hour
	// heatStays is how long a temperature asks for less load while its sensor
	// has no figures.
	heatStays = 15 * time.Minute
	// stepLeast is the least step of the clock that alarms follow.
	stepLeast = time.Minute
)

// Kinds of alarms.
const (
	Temperature  = "temperature"
	ECC          = "ecc"
	RemappedRows = "remapped_rows"
	XID          = "xid"
	DiskSpace    = "disk_space"
	DiskWear     = "disk_wear"
	Memory       = "memory"
	Latency      = "latency"
	Throughput   = "throughput"
	ErrorRate    = "error_rate"
	DataDrift    = "data_drift"
	Power        = "power"
)

// Methods by which alarms are found.
const (
	byThreshold = "threshold"
	byTrend     = "theil-sen"
	byChange    = "cusum"
	byCounter   = "counter"
	bySamples   = "two-sample"
)

// Config has what is known of the device beforehand.
type Config struct {
	// WarnCelsius and SlowdownCelsius are those of the device's class, for
	// sensors of its processor, system on a chip and GPU; of a GPU that names
	// its own, that one counts. 0: not known.
	WarnCelsius, SlowdownCelsius float64
	// ReserveBytes of the disk are not given to models; 0: no alarm is about
	// disk space.
	ReserveBytes uint64
}

// Sample is what there is of a device at a moment. Nobody changes it while it
// is observed, and nothing of it is kept.
type Sample struct {
	Telemetry *dunlinv1.Telemetry
	// Versions are those that are loaded, each once.
	Versions []Version
	// Limited says that the device takes less load than it could, because of
	// an alarm: how requests fare then says nothing of it.
	Limited bool
}

// Form is what a version is and how it runs. One of another form is another
// version: what is known of its times and shares tells nothing of the new one.
type Form struct {
	Generation              uint64 // of its files
	MaxBatchSize, Instances int
	Threads                 int // 0: those of all versions, or not known now
}

// Version counts the requests of a version since it was loaded.
type Version struct {
	Model   string
	Version int64
	Form    Form
	// Succeeded and Failed ran; Refused were not taken, or given up by the
	// device, for want of time, memory or room.
	Succeeded, Failed, Refused uint64
	Time                       time.Duration // of those that succeeded, from arrival to answer
	Run                        time.Duration // of those that ran, in the runtime
	// Data says how its requests and answers differ from their reference.
	Data datadrift.Finding
}

// What has become of an alarm.
const (
	Raised Kind = iota + 1
	Worse       // its severity has risen, and its evidence is another
	Cleared
)

// Kind is a kind of Change.
type Kind int

// Change is what has become of an alarm. The alarm is a copy.
type Change struct {
	Kind  Kind
	Alarm *dunlinv1.Alarm
}

// Key names a cause.
type Key struct{ Kind, Subject string }

// Detector watches one device. It is for one goroutine.
type Detector struct {
	cfg     Config
	now     time.Duration // of the last sample
	started bool
	wall    time.Time // of the last sample
	swept   time.Duration

	causes  map[Key]*cause
	raised  int
	changes []Change

	load     window // share of the busiest processor in use
	sensors  map[string]*thermal
	gpus     map[uint32]*gpu
	powers   map[string]*powered
	disk     *disk
	memory   *memory
	versions map[versionKey]*served
	serving  serving
}

// New gives a detector.
func New(cfg Config) *Detector {
	return &Detector{
		cfg: cfg, causes: map[Key]*cause{}, load: newWindow(time.Minute, 60, median),
		sensors: map[string]*thermal{}, gpus: map[uint32]*gpu{}, powers: map[string]*powered{}, versions: map[versionKey]*served{},
	}
}

// Observe takes in a sample and gives what it changes, in the order of kind
// and subject. now is the time since any fixed moment, by a clock that does
// not step; a sample that is not after the one before is ignored. The time
// stamps of alarms come from the telemetry's, and follow when that clock is
// set.
func (d *Detector) Observe(now time.Duration, s Sample) []Change {
	t := s.Telemetry
	if t == nil || d.started && now <= d.now || now < 0 {
		return nil
	}
	d.changes = nil
	d.setClock(now, t.At.AsTime())
	gap := now - d.now
	if !d.started {
		gap = 0
	}
	d.now, d.started = now, true

	if load, ok := busiest(t); ok {
		d.load.add(now, load)
	}
	d.temperatures(t)
	d.hardware(t)
	d.power(t)
	d.storage(t)
	d.memories(t)
	d.serve(s.Versions, gap, s.Limited)
	if now-d.swept >= time.Minute {
		d.swept = now
		d.sweep()
	}
	for _, c := range d.causes {
		d.settle(c)
	}
	slices.SortFunc(d.changes, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Alarm.Kind, b.Alarm.Kind), cmp.Compare(a.Alarm.Subject, b.Alarm.Subject))
	})
	return d.changes
}

// Alarms gives copies of those that are raised, by kind and subject.
func (d *Detector) Alarms() []*dunlinv1.Alarm {
	var all []*dunlinv1.Alarm
	for _, k := range slices.SortedFunc(maps.Keys(d.causes), compareKeys) {
		if a := d.causes[k].alarm; a != nil {
			all = append(all, proto.CloneOf(a))
		}
	}
	return all
}

// Pressing gives the causes that ask for less load: those with a temperature
// at which the device slows down, or will within the hour, or with memory
// errors. Hot says whether a temperature is that high at this moment. What was
// last seen of a sensor that has no figures any more says so for heatStays, and
// is not hot after maxGap.
func (d *Detector) Pressing() (causes []Key, hot bool) {
	for k, c := range d.causes {
		if c.alarm == nil {
			continue
		}
		pressing := k.Kind == ECC
		for i := range c.conditions {
			if on := &c.conditions[i]; k.Kind == Temperature && on.on && on.rule.presses && d.now-c.seen <= heatStays {
				pressing = true
				hot = hot || on.raising && d.now-c.seen <= maxGap
			}
		}
		if pressing {
			causes = append(causes, k)
		}
	}
	slices.SortFunc(causes, compareKeys)
	return causes, hot
}

// Did notes what the device does about a cause; empty: nothing.
func (d *Detector) Did(k Key, action string) {
	if c := d.causes[k]; c != nil && c.alarm != nil {
		c.alarm.Action = action
	}
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Subject, b.Subject))
}

// setClock follows the wall clock. The time stamps of raised alarms go with
// it where it is set: a device without a battery begins in 1970.
func (d *Detector) setClock(now time.Duration, wall time.Time) {
	before := d.wall.Add(now - d.now)
	d.wall = wall
	if step := wall.Sub(before); d.started && (step >= stepLeast || step <= -stepLeast) {
		for _, c := range d.causes {
			if c.alarm != nil {
				c.alarm.RaisedAt = timestamppb.New(wall.Add(c.raisedAt - now))
				for i, p := range c.evidence {
					c.alarm.Samples[i].At = timestamppb.New(wall.Add(p.at - now))
				}
			}
		}
	}
}

func (d *Detector) stamp(at time.Duration) *timestamppb.Timestamp {
	return timestamppb.New(d.wall.Add(at - d.now))
}

// rule is a way in which a cause shows.
type rule struct {
	name     string
	severity dunlinv1.Severity
	// after and before are how long it must be so, and not be so.
	after, before time.Duration
	every         time.Duration // between two judgements; 0: with each sample
	presses       bool          // the load had better be lowered
}

// condition is how a rule stands for a cause.
type condition struct {
	rule    rule
	on      bool
	raising bool          // it was so at the last judgement
	lasting bool          // since says since when it is about to change
	since   time.Duration //
	last    time.Duration // judged
	found   finding       // of the moment when it became so
}

// finding is what an alarm rests on.
type finding struct {
	method, unit, message string
	threshold             float64 // NaN: none
	slope, hours          float64 // NaN: none
	samples               []point
}

type cause struct {
	key        Key
	conditions []condition
	seen       time.Duration // figures were there
	gone       bool          // there will be none
	alarm      *dunlinv1.Alarm
	raisedAt   time.Duration
	evidence   []point
}

// cause gives the record of a cause, which figures are there for now; nil
// where there are too many.
func (d *Detector) cause(kind, subject string) *cause {
	k := Key{kind, subject}
	c := d.causes[k]
	if c == nil {
		if len(d.causes) >= maxSubjects {
			return nil
		}
		c = &cause{key: k}
		d.causes[k] = c
	}
	c.seen, c.gone = d.now, false
	return c
}

// judge says how a rule stands for a cause: whether it is so, and whether it
// certainly is not. Neither may hold. find is called when it becomes so.
func (d *Detector) judge(c *cause, r *rule, raise, clear bool, find func() finding) {
	if c == nil {
		return
	}
	i := slices.IndexFunc(c.conditions, func(x condition) bool { return x.rule.name == r.name })
	if i < 0 {
		if !raise {
			return
		}
		i = len(c.conditions)
		c.conditions = append(c.conditions, condition{rule: *r, last: d.now})
	}
	x := &c.conditions[i]
	if d.now-x.last > maxGap+3*r.every {
		x.lasting = false
	}
	x.last, x.raising = d.now, raise
	change, wait := raise, r.after
	if x.on {
		change, wait = clear, r.before
	}
	if !change {
		x.lasting = false
		return
	}
	if !x.lasting {
		x.lasting, x.since = true, d.now
	}
	if d.now-x.since < wait {
		return
	}
	x.on, x.lasting = !x.on, false
	if x.on {
		x.found = find()
	}
}

// settle makes a cause's alarm what its conditions say.
func (d *Detector) settle(c *cause) {
	var worst *condition
	for i := range c.conditions {
		if x := &c.conditions[i]; x.on && (worst == nil || x.rule.severity > worst.rule.severity) {
			worst = x
		}
	}
	if c.gone {
		worst = nil
	}
	switch {
	case c.alarm == nil && worst != nil && d.raised < maxRaised:
		d.raised++
		c.raisedAt = d.now
		c.alarm = &dunlinv1.Alarm{Kind: c.key.Kind, Subject: c.key.Subject, RaisedAt: d.stamp(d.now)}
		d.fill(c, worst)
		d.changes = append(d.changes, Change{Raised, proto.CloneOf(c.alarm)})
	case c.alarm != nil && worst != nil && worst.rule.severity > c.alarm.Severity:
		d.fill(c, worst)
		d.changes = append(d.changes, Change{Worse, proto.CloneOf(c.alarm)})
	case c.alarm != nil && worst == nil && d.now-c.raisedAt >= minRaised:
		d.raised--
		c.alarm.ClearedAt = d.stamp(d.now)
		d.changes = append(d.changes, Change{Cleared, c.alarm})
		c.alarm, c.evidence = nil, nil
	}
}

// fill gives an alarm its severity and what it rests on.
func (d *Detector) fill(c *cause, x *condition) {
	a, f := c.alarm, x.found
	a.Severity, a.Message, a.Method, a.Unit = x.rule.severity, f.message, f.method, f.unit
	a.Threshold, a.SlopePerHour, a.HoursToThreshold = present(f.threshold), present(f.slope), present(f.hours)
	c.evidence = slices.Clone(f.samples[max(0, len(f.samples)-maxSamples):])
	a.Samples = nil
	for _, p := range c.evidence {
		a.Samples = append(a.Samples, &dunlinv1.AlarmSample{At: d.stamp(p.at), Value: p.value})
	}
}

// sweep forgets what has had no figures for long.
func (d *Detector) sweep() {
	for k, c := range d.causes {
		if d.now-c.seen > forgetAfter {
			c.gone = true
		}
		if c.gone && c.alarm == nil {
			delete(d.causes, k)
		}
	}
	stale := func(seen time.Duration) bool { return d.now-seen > forgetAfter }
	maps.DeleteFunc(d.sensors, func(_ string, x *thermal) bool { return stale(x.seen) })
	maps.DeleteFunc(d.gpus, func(_ uint32, x *gpu) bool { return stale(x.seen) })
	maps.DeleteFunc(d.powers, func(_ string, x *powered) bool { return stale(x.seen) })
}

func present(v float64) *float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return nil
	}
	return new(v)
}

// figure gives a value that lies between least and most.
func figure(v *float64, least, most float64) (float64, bool) {
	if v == nil || !(*v >= least && *v <= most) {
		return 0, false
	}
	return *v, true
}

// busiest gives the share of time in which the busiest of the processors was
// in use.
func busiest(t *dunlinv1.Telemetry) (float64, bool) {
	most, ok := figure(t.CpuUtilisation, 0, 1)
	for _, g := range t.Gpus {
		if g == nil {
			continue
		}
		if v, known := figure(g.Utilisation, 0, 1); known {
			most, ok = max(most, v), true
		}
	}
	return most, ok
}

// named bounds a name that comes from outside.
func named(name string) string {
	if len(name) <= maxName {
		return name
	}
	n := maxName
	for n > 0 && !utf8.RuneStart(name[n]) {
		n--
	}
	return name[:n]
}

func gpuName(index uint32) string { return "gpu:" + strconv.FormatUint(uint64(index), 10) }

// number writes a figure for people: three digits.
func number(v float64) string {
	if a := math.Abs(v); a >= 100 && a < 1e15 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// size writes bytes for people.
func size(v float64) string {
	for _, unit := range []string{"B", "KiB", "MiB", "GiB"} {
		if math.Abs(v) < 1024 {
			return number(v) + " " + unit
		}
		v /= 1024
	}
	return number(v) + " TiB"
}

// span writes hours for people.
func span(hours float64) string {
	switch {
	case hours < 2:
		return number(60*hours) + " minutes"
	case hours < 72:
		return number(hours) + " hours"
	}
	return number(hours/24) + " days"
}
