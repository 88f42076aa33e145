package main

import (
	"math"
	"time"

	"github.com/dunlin/dunlin/agent/alarm"
)

// trouble is something that goes wrong on a device from onset on.
type trouble struct {
	onset time.Duration
	// act brings about what has gone wrong so many hours after onset; it is
	// called before each sample.
	act func(d *device, hours float64)
	// by is when it must be noticed at the latest: hours after onset.
	by float64
}

// fault makes troubles of one name.
type fault struct {
	name string
	// kind is that of the alarm that says so.
	kind string
	// gpu says that the device must have one, power that its power is known.
	gpu, power bool
	begin      func(d *device) *trouble
	describe   string
}

// faults are all troubles: what happens, how strong, and until when it must be
// noticed.
var faults = []fault{
	{name: "fan fails", kind: alarm.Temperature, describe: "cooling half to a third as good at once; within a day",
		begin: func(d *device) *trouble {
			by := d.uniform(2, 3)
			return &trouble{by: 24, act: func(d *device, _ float64) { d.heating = by }}
		}},
	{name: "dust", kind: alarm.Temperature, describe: "cooling 4 to 10 % worse each day; before it slows down, which ends it",
		begin: func(d *device) *trouble {
			rate := d.uniform(0.04, 0.1)
			t := &trouble{by: 20 * 24}
			t.act = func(d *device, hours float64) {
				d.heating = 1 + rate*hours/24
				if d.celsius >= d.slowdown+d.quantum && hours < t.by {
					t.by = hours
				}
			}
			return t
		}},
	{name: "room heats up", kind: alarm.Temperature, describe: "15 to 40 K in 1 to 6 h; within a day",
		begin: func(d *device) *trouble {
			most, in := d.uniform(15, 40), d.uniform(1, 6)
			return &trouble{by: 24, act: func(d *device, hours float64) { d.warming = most * min(1, hours/in) }}
		}},
	{name: "uncorrected errors", kind: alarm.ECC, gpu: true, describe: "one; within 10 min",
		begin: func(*device) *trouble {
			done := false
			return &trouble{by: 1. / 6, act: func(d *device, _ float64) {
				if !done {
					d.uncorrected++
					done = true
				}
			}}
		}},
	{name: "corrected errors", kind: alarm.ECC, gpu: true, describe: "4 to 100 an hour, by 1 to 3; within a day",
		begin: func(d *device) *trouble {
			rate := math.Exp(d.uniform(math.Log(4), math.Log(100)))
			return &trouble{by: 24, act: func(d *device, _ float64) {
				for range poisson(d.r, rate/2*tick) {
					d.corrected += 1 + uint64(d.r.IntN(3))
				}
			}}
		}},
	{name: "rows remapped", kind: alarm.RemappedRows, gpu: true, describe: "one more, one pending, or one that fails; within 10 min",
		begin: func(d *device) *trouble {
			how, before := d.r.IntN(3), d.remapped
			return &trouble{by: 1. / 6, act: func(d *device, _ float64) {
				switch how {
				case 0:
					d.remapped = before + 1
				case 1:
					d.pending = true
				case 2:
					d.failed = true
				}
			}}
		}},
	{name: "GPU faults", kind: alarm.XID, gpu: true, describe: "one XID; within 10 min",
		begin: func(d *device) *trouble {
			xid, done := []uint64{31, 48, 79, 119}[d.r.IntN(4)], false
			return &trouble{by: 1. / 6, act: func(d *device, _ float64) {
				if !done {
					d.xids, d.lastXID = d.xids+1, xid
					done = true
				}
			}}
		}},
	{name: "disk fills in hours", kind: alarm.DiskSpace, describe: "4 to 24 h from full; before three quarters of that time",
		begin: func(d *device) *trouble {
			in, free := d.uniform(4, 24), d.diskFree
			return &trouble{by: 0.75 * in, act: func(d *device, hours float64) {
				d.filling = free * min(1, hours/in) * (1 + 0.01*d.r.NormFloat64())
			}}
		}},
	{name: "disk fills in days", kind: alarm.DiskSpace, describe: "6 to 10 days from full; a day before",
		begin: func(d *device) *trouble {
			in, free := d.uniform(6, 10)*24, d.diskFree
			return &trouble{by: in - 24, act: func(d *device, hours float64) {
				d.filling = free * min(1, hours/in)
			}}
		}},
	{name: "disk wears out", kind: alarm.DiskWear, describe: "1 to 3 % a day; a week before it is worn out",
		begin: func(d *device) *trouble {
			rate := d.uniform(0.01, 0.03)
			d.wear = max(d.wear, 1-d.uniform(20, 30)*rate)
			return &trouble{by: (1-d.wear)/rate*24 - 7*24, act: func(d *device, _ float64) { d.wearing = rate }}
		}},
	{name: "agent leaks in hours", kind: alarm.Memory, describe: "3 to 24 h from none left; before nine tenths of that time",
		begin: func(d *device) *trouble { return leak(d, d.uniform(3, 24), &d.leaking) }},
	{name: "agent leaks in days", kind: alarm.Memory, describe: "5 to 10 days from none left; before nine tenths of that time",
		begin: func(d *device) *trouble { return leak(d, 24*d.uniform(5, 10), &d.leaking) }},
	{name: "another program leaks", kind: alarm.Memory, describe: "6 h to 8 days from none left; before nine tenths of that time",
		begin: func(d *device) *trouble {
			return leak(d, math.Exp(d.uniform(math.Log(6), math.Log(8*24))), &d.hoarding)
		}},
	{name: "slower", kind: alarm.Latency, describe: "a version by a factor of 1.4 to 3; within 12 h",
		begin: func(d *device) *trouble {
			m, by := d.models[d.r.IntN(len(d.models))], d.uniform(1.4, 3)
			return &trouble{by: 12, act: func(*device, float64) { m.delay = by }}
		}},
	{name: "requests wait", kind: alarm.Latency, describe: "those of a version take 1.5 to 4 times as long, but do not run for longer; within a day",
		begin: func(d *device) *trouble {
			m, by := d.models[d.r.IntN(len(d.models))], d.uniform(1.5, 4)
			return &trouble{by: 24, act: func(*device, float64) { m.wait = by }}
		}},
	{name: "slower and slower", kind: alarm.Latency, describe: "a version, twice the time in 6 to 48 h; until then",
		begin: func(d *device) *trouble {
			m, in := d.models[d.r.IntN(len(d.models))], d.uniform(6, 48)
			return &trouble{by: in, act: func(_ *device, hours float64) { m.delay = 1 + min(1, hours/in) }}
		}},
	{name: "requests refused", kind: alarm.Throughput, describe: "15 to 80 % of those of a version; within 12 h",
		begin: func(d *device) *trouble {
			m, share := d.models[d.r.IntN(len(d.models))], d.uniform(0.15, 0.8)
			return &trouble{by: 12, act: func(*device, float64) { m.refuse = share }}
		}},
	{name: "requests fail", kind: alarm.ErrorRate, describe: "4 to 80 % of those of a version; within 6 h",
		begin: func(d *device) *trouble {
			m, share := d.models[d.r.IntN(len(d.models))], math.Exp(d.uniform(math.Log(0.04), math.Log(0.8)))
			return &trouble{by: 6, act: func(*device, float64) { m.fail = share }}
		}},
	{name: "more power", kind: alarm.Power, power: true, describe: "by 25 to 80 %; within 12 h",
		begin: func(d *device) *trouble {
			by := d.uniform(1.25, 1.8)
			return &trouble{by: 12, act: func(d *device, _ float64) { d.powering = by }}
		}},
	{name: "less power", kind: alarm.Power, power: true, describe: "by 20 to 50 %; within 12 h",
		begin: func(d *device) *trouble {
			by := d.uniform(0.5, 0.8)
			return &trouble{by: 12, act: func(d *device, _ float64) { d.powering = by }}
		}},
}

// leak takes what memory is left in so many hours.
func leak(d *device, in float64, of *float64) *trouble {
	left := 0.0
	return &trouble{by: 0.9 * in, act: func(d *device, hours float64) {
		if left == 0 {
			left = d.memory - float64(*d.t.MemoryUsedBytes)
		}
		*of = left * min(1, hours/in)
	}}
}
