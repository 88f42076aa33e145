package identity

import (
	"crypto/x509"
	"time"

	"github.com/dunlin/dunlin/internal/pki"
)

const (
	// A certificate is renewed when this share of its life is over, and up to
	// renewSpread later, so that devices that joined together do not renew
	// together.
	renewAt     = 0.5
	renewSpread = 0.1
	// The wait after a renewal that failed doubles from the one to the other,
	// which is no longer than a share of the certificate's life.
	firstRenewWait = time.Minute
	lastRenewWait  = 6 * time.Hour
	renewWaitShare = 1.0 / 64
	// What the controller asks for is not done more often than askedEvery, and
	// refusedEvery where the trust document that came with the last renewal was
	// refused: it would ask again at once, and for ever.
	askedEvery   = time.Minute
	refusedEvery = time.Hour
)

// schedule decides when a device renews. It reads no clock.
type schedule struct {
	issued, end time.Time
	spread      float64   // 0 to 1: the device's part of renewSpread
	asked       time.Time // by when the controller wants it; zero: it does not
	held        time.Time // before which that does not count
	failed      int       // attempts since the last success
	tried       time.Time // the last of them
	part        float64   // 0 to 1: of the wait after it
}

// scheduleOf begins a schedule for a certificate. Its spread is the
// certificate's, so that a start changes nothing.
func scheduleOf(c *x509.Certificate) schedule {
	serial := c.SerialNumber.Bytes()
	var last byte
	if len(serial) > 0 {
		last = serial[len(serial)-1]
	}
	return schedule{issued: pki.Issued(c), end: c.NotAfter, spread: float64(last) / 256}
}

func (s schedule) share(f float64) time.Duration {
	return time.Duration(f * float64(s.end.Sub(s.issued)))
}

// due gives the moment of the next attempt; one that is over means now.
func (s schedule) due(now time.Time) time.Time {
	at := s.issued.Add(s.share(renewAt + renewSpread*s.spread))
	wish := s.asked
	if s.held.Sub(now) <= refusedEvery { // else the clock was set back
		wish = later(wish, s.held)
	}
	if !s.asked.IsZero() && wish.Before(at) {
		at = wish
	}
	if s.failed == 0 || now.Before(s.tried) { // the clock was set back
		return at
	}
	last := max(min(lastRenewWait, s.share(renewWaitShare)), firstRenewWait)
	wait := min(firstRenewWait<<min(s.failed-1, 16), last)
	retry := s.tried.Add(wait/2 + time.Duration(s.part*float64(wait/2)))
	if retry.Before(at) {
		return at
	}
	return retry
}

// ask notes that the controller wants a new certificate within a time, of
// which part, 0 to 1, is the device's.
func (s schedule) ask(now time.Time, within time.Duration, part float64) schedule {
	at := now.Add(time.Duration(part * float64(within)))
	if s.asked.IsZero() || at.Before(s.asked) {
		s.asked = at
	}
	return s
}

// hold has what the controller asks for wait.
func (s schedule) hold(now time.Time, d time.Duration) schedule {
	s.held = now.Add(d)
	return s
}

// fail notes an attempt that failed.
func (s schedule) fail(now time.Time, part float64) schedule {
	s.failed, s.tried, s.part = s.failed+1, now, part
	return s
}

// again has what failed a while ago tried at once: the controller can be
// reached again.
func (s schedule) again(now time.Time) schedule {
	if now.Sub(s.tried) >= firstRenewWait {
		s.failed = 0
	}
	return s
}
