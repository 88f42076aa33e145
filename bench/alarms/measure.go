package main

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/alarm"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// reported is the first seed of what is reported; those below served to choose
// the bounds.
const reported = 1_000_000

// What must hold.
const (
	goalRate  = 0.95
	goalFalse = 1.0
)

const month = 30 * day

// outcome is what was found on one device.
type outcome struct {
	fault    *fault // nil: none
	seed     uint64
	detected bool
	delay    time.Duration
	well     time.Duration // time without trouble
	wrong    []string      // alarms in that time
}

// follow lets a detector watch a device for a month, or until its trouble must
// have been noticed.
func follow(seed uint64, f *fault) outcome {
	d := newDevice(seed)
	for more := seed; f != nil && (f.gpu && !d.hasGPU || f.power && !d.hasPower); {
		more += 1 << 32
		d = newDevice(more)
	}
	o := outcome{fault: f, seed: seed, well: month}
	if f != nil {
		o.well = time.Duration(d.uniform(7, 14) * float64(day)).Truncate(period)
	}
	detector := alarm.New(alarm.Config{SlowdownCelsius: d.slowdown, ReserveBytes: 256 << 20})
	for {
		if f != nil && d.trouble == nil && d.now+period >= o.well {
			d.trouble = f.begin(d)
			d.trouble.onset = o.well
		}
		s, ok := d.next()
		if d.trouble == nil && d.now > o.well || d.trouble != nil && (d.now-o.well).Hours() > d.trouble.by {
			return o
		}
		if !ok {
			continue
		}
		for _, c := range detector.Observe(d.now, s) {
			switch {
			case c.Kind == alarm.Cleared:
			case d.now < o.well || f == nil:
				o.wrong = append(o.wrong, tell(d.now, c.Alarm))
			case c.Alarm.Kind == f.kind:
				o.detected, o.delay = true, d.now-o.well
				return o
			}
		}
	}
}

func tell(at time.Duration, a *dunlinv1.Alarm) string {
	return fmt.Sprintf("day %.2f: %s of %s by %s: %s", at.Hours()/24, a.Kind, a.Subject, a.Method, a.Message)
}

// result is what was found on all devices.
type result []outcome

// measure follows devices of consecutive seeds: so many without trouble for a
// month each, and so many with each trouble.
func measure(seed uint64, months, each, workers int) result {
	type task struct {
		i    int
		seed uint64
		f    *fault
	}
	all := make(result, months+each*len(faults))
	tasks := make(chan task)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for t := range tasks {
				all[t.i] = follow(t.seed, t.f)
			}
		})
	}
	for i := range all {
		t := task{i: i, seed: seed + uint64(i)}
		if i >= months {
			t.f = &faults[(i-months)/each]
		}
		tasks <- t
	}
	close(tasks)
	wg.Wait()
	return all
}

// rate is the share of troubles that were detected.
func (all result) rate() float64 {
	detected, troubles := all.detected(nil)
	return float64(detected) / float64(troubles)
}

// detected counts the troubles of one name, or all.
func (all result) detected(f *fault) (detected, troubles int) {
	for _, o := range all {
		if o.fault == nil || f != nil && o.fault != f {
			continue
		}
		troubles++
		if o.detected {
			detected++
		}
	}
	return detected, troubles
}

// months is the time without trouble.
func (all result) months() float64 {
	var sum time.Duration
	for _, o := range all {
		sum += o.well
	}
	return float64(sum) / float64(month)
}

func (all result) wrong() int {
	n := 0
	for _, o := range all {
		n += len(o.wrong)
	}
	return n
}

func (all result) perMonth() float64 { return float64(all.wrong()) / all.months() }

// delays gives those of the detected troubles of one name, or all, in order.
func (all result) delays(f *fault) []time.Duration {
	var ds []time.Duration
	for _, o := range all {
		if o.detected && (f == nil || o.fault == f) {
			ds = append(ds, o.delay)
		}
	}
	slices.Sort(ds)
	return ds
}

func middle(ds []time.Duration) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	return ds[len(ds)/2]
}

func (all result) print(w io.Writer, verbose bool) {
	fmt.Fprintln(w, "| trouble | alarm | detected | median delay | longest | what happens; by when it must be noticed |")
	fmt.Fprintln(w, "| --- | --- | --- | --- | --- | --- |")
	for i := range faults {
		f := &faults[i]
		n, of := all.detected(f)
		ds := all.delays(f)
		longest := time.Duration(0)
		if len(ds) > 0 {
			longest = ds[len(ds)-1]
		}
		fmt.Fprintf(w, "| %s | %s | %d of %d | %v | %v | %s |\n", f.name, f.kind, n, of, middle(ds), longest, f.describe)
	}
	fmt.Fprintf(w, "\n%d false alarms in %.1f device-months without trouble\n", all.wrong(), all.months())
	if verbose {
		for _, o := range all {
			for _, s := range o.wrong {
				fmt.Fprintf(w, "false, seed %d: %s\n", o.seed, s)
			}
			if o.fault != nil && !o.detected {
				fmt.Fprintf(w, "missed, seed %d: %s\n", o.seed, o.fault.name)
			}
		}
	}
	fmt.Fprintf(w, "alarms: detect_rate=%.3f false_per_month=%.3f median_delay_s=%.0f\n", all.rate(), all.perMonth(), middle(all.delays(nil)).Seconds())
}
