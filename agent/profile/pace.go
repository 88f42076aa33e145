package profile

import "time"

// When a slice may be measured.
const (
	// Settle is how long the device must have been idle.
	Settle = 20 * time.Millisecond
	// burst is how much may be measured at once after a long rest.
	burst = 200 * time.Millisecond
	// maxWait is how long a version waits for idle time altogether before it
	// is given up, and maxDisturbed how many slices in a row may be disturbed.
	maxWait      = 15 * time.Minute
	maxDisturbed = 200
)

// Pace decides when a slice may be measured, so that measuring takes no more
// than a part of the time and meets nobody's requests. Times are since any one
// moment. The zero value of all but Duty begins at 0.
type Pace struct {
	Duty float64 // part of the time, above 0 to 1

	credit    float64 // seconds that may be measured; below 0: are owed
	last      time.Duration
	begun     bool
	waited    time.Duration // for idle time
	disturbed int           // slices in a row
}

// Wait gives how long to wait before the next slice, or before asking again; 0:
// it may begin. idle is for how long nobody has asked for anything.
// ErrGivenUp says that it is no use.
func (p *Pace) Wait(now, idle time.Duration) (time.Duration, error) {
	since := now - p.last
	if !p.begun {
		p.begun, since = true, 0
	}
	p.last = now
	p.credit = min(p.credit+since.Seconds()*p.Duty, burst.Seconds()*p.Duty)
	if p.credit < 0 {
		return max(time.Duration(-p.credit/p.Duty*float64(time.Second)), time.Millisecond), nil
	}
	if p.waited > maxWait || p.disturbed >= maxDisturbed {
		return 0, ErrGivenUp
	}
	if idle < Settle {
		wait := max(Settle-idle, time.Millisecond)
		p.waited += wait
		return wait, nil
	}
	return 0, nil
}

// Ran tells that a slice took so long, pauses not counted, and whether somebody
// asked for something meanwhile.
func (p *Pace) Ran(took time.Duration, disturbed bool) {
	p.credit -= took.Seconds()
	p.disturbed++
	if !disturbed {
		p.disturbed = 0
	}
}

// Paused tells that a slice stands still for so long, until nobody asks for
// anything; false says that it has waited enough, and should end.
func (p *Pace) Paused(took time.Duration) bool {
	p.waited += took
	return p.waited <= maxWait
}
