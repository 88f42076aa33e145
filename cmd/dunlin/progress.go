package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	liveInterval = 200 * time.Millisecond // of the live line on a terminal
	lineInterval = 5 * time.Second        // of the lines elsewhere
)

// progress tells how far a transfer is: one line that is redrawn on a
// terminal, a line every five seconds elsewhere, and one at the end.
type progress struct {
	w     io.Writer
	live  bool
	verb  string
	total int64
	start time.Time

	mu           sync.Mutex // guards the rest, and writes to w
	sent, reused int64
	stopped      bool
}

func newProgress(w io.Writer, live bool, verb string) *progress {
	return &progress{w: w, live: live, verb: verb, start: time.Now()}
}

// run starts telling. stop ends it, waits until it has, and leaves a live
// line behind.
func (p *progress) run() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		interval := lineInterval
		if p.live {
			interval = liveInterval
		}
		t := time.NewTicker(interval)
		defer t.Stop()
		for {
			select {
			case <-done:
				return
			case <-t.C:
				p.print()
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.live && !p.stopped {
			fmt.Fprintln(p.w)
		}
		p.stopped = true
	}
}

func (p *progress) add(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent += n
}

func (p *progress) reuse(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reused += n
}

func (p *progress) print() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return
	}
	if p.live {
		fmt.Fprintf(p.w, "\r%s\x1b[K", p.line())
	} else {
		fmt.Fprintln(p.w, p.line())
	}
}

// line is how far it is. p.mu is held.
func (p *progress) line() string {
	rate := p.rate()
	s := fmt.Sprintf("%s: %s of %s, %s/s", p.verb, bytesText(p.sent+p.reused), bytesText(p.total), bytesText(int64(rate)))
	if left := p.total - p.sent - p.reused; rate > 0 && left > 0 {
		eta := time.Duration(float64(left) / rate * float64(time.Second))
		s += ", " + durationText(eta) + " left"
	}
	if p.reused > 0 {
		s += ", " + bytesText(p.reused) + " reused"
	}
	return s
}

func (p *progress) rate() float64 {
	if d := time.Since(p.start).Seconds(); d > 0 {
		return float64(p.sent) / d
	}
	return 0
}

// finish writes the last line: all is there.
func (p *progress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	lead, end := "", ""
	if p.live {
		lead, end = "\r", "\x1b[K"
	}
	fmt.Fprintf(p.w, "%s%s: %s sent in %s (%s/s), %s reused%s\n", lead, p.verb, bytesText(p.sent), durationText(time.Since(p.start)), bytesText(int64(p.rate())), bytesText(p.reused), end)
}

// bytesText writes a number of bytes with a binary unit.
func bytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1023.95 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

// durationText writes a duration to a person: "0.4s", "12s", "3m05s", "2h10m".
func durationText(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	}
}
