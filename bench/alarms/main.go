// Command alarms measures how well trouble is predicted: it generates the
// telemetry of many devices of which the truth is known, as the detector of
// package alarm would see it, and compares.
//
// The generator, newDevice, gives a device a random set of models, sensors
// and sizes, and a sample each 10 s: demand with day, week, slow drift and
// bursts, requests as Poisson counts with heavy-tailed times, power by
// utilisation, a temperature with inertia in a room with a day and weather,
// shown in steps of up to 1 °C, memory with models that come and go, logs that
// are rotated, background radiation. Devices that are well have new versions,
// lost samples, gaps, nonsense from a sensor, reloads that reset counters, and
// steps of the clock. A trouble begins after one to two weeks, of a strength
// that is drawn from a range; see faults for these.
//
// A trouble counts as detected where an alarm of its kind is raised after its
// onset and before the time at which it must be noticed. Every alarm on a
// device that is well, or before the onset, is false. The bounds in package
// alarm were chosen on seeds below 1,000,000; what is reported is of others.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
)

func main() {
	months := flag.Int("months", 60, "`number` of device-months without trouble")
	each := flag.Int("each", 30, "`number` of devices for each trouble")
	seed := flag.Uint64("seed", reported, "first `seed`")
	verbose := flag.Bool("v", false, "print every false alarm and every trouble that was missed")
	flag.Parse()
	if *months < 1 || *each < 1 {
		fmt.Fprintln(os.Stderr, "alarms: months and each must be above 0")
		os.Exit(2)
	}
	all := measure(*seed, *months, *each, runtime.GOMAXPROCS(0))
	all.print(os.Stdout, *verbose)
	if all.rate() < goalRate || all.perMonth() > goalFalse {
		fmt.Fprintf(os.Stderr, "alarms: the goals are %g and %g\n", goalRate, goalFalse)
		os.Exit(1)
	}
}
