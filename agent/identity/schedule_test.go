package identity

import (
	"math/rand/v2"
	"testing"
	"time"
)

const (
	day  = 24 * time.Hour
	year = 365 * day
)

// A device lives for years in simulated time, beside a controller that comes
// and goes, and is off for months itself. Its certificate never ends while it
// could have been renewed, and it asks seldom.
func TestScheduleOverYears(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	part := func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }
	for range 200 {
		life := []time.Duration{time.Hour, 30 * day, year, 2 * year}[rng.IntN(4)]
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		s := schedule{issued: now, end: now.Add(life), spread: rng.Float64()}
		renewals, attempts := 0, 0
		for range 40 {
			now = later(now, s.due(now))
			if rng.IntN(5) == 0 {
				now = now.Add(part(3 * life)) // the device is off
			}
			// The controller is away for at most a third of the life.
			back := now.Add(part(life / 3))
			if rng.IntN(2) == 0 {
				back = now
			}
			for now.Before(back) {
				attempts++
				s = s.fail(now, rng.Float64())
				next := s.due(now)
				if wait := next.Sub(now); wait < firstRenewWait/2 || wait > max(lastRenewWait, firstRenewWait) {
					t.Fatalf("after %d failures it waits %s", s.failed, wait)
				}
				now = next
			}
			if now.After(s.end) && back.Add(max(life/64, firstRenewWait)).Before(s.end) {
				t.Fatalf("life %s: it ended %s ago, the controller was away until %s", life, now.Sub(s.end), back)
			}
			if now.Sub(back) > lastRenewWait || now.Sub(back) > max(life/64, firstRenewWait) {
				t.Fatalf("it came %s after the controller was back", now.Sub(back))
			}
			renewals++
			s = schedule{issued: now, end: now.Add(life), spread: rng.Float64()}
			if early := s.due(now).Sub(now); early < life/2 || early > 6*life/10 {
				t.Fatalf("life %s: the next is due after %s", life, early)
			}
		}
		// An outage of 4 months is about 500 attempts.
		if attempts > renewals*1500 {
			t.Errorf("%d attempts for %d renewals", attempts, renewals)
		}
	}
}

func TestScheduleAsked(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	s := schedule{issued: now, end: now.Add(year)}
	asked := s.ask(now, time.Hour, 0.5)
	if got := asked.due(now); !got.Equal(now.Add(time.Hour / 2)) {
		t.Errorf("due at %s", got)
	}
	// The more urgent wish stays, and the regular time does not move.
	if got := asked.ask(now, 10*time.Hour, 0.9).ask(now, time.Minute, 0.5).due(now); !got.Equal(now.Add(time.Minute / 2)) {
		t.Errorf("due at %s", got)
	}
	if got := s.ask(now, 10*year, 1).due(now); !got.Equal(now.Add(year / 2)) {
		t.Errorf("due at %s", got)
	}
	// A wish waits after the last renewal, unless the clock was set back since.
	held := s.hold(now, askedEvery).ask(now, 0, 0)
	if got := held.due(now); !got.Equal(now.Add(askedEvery)) {
		t.Errorf("held: due at %s", got)
	}
	if got := s.hold(now.Add(day), refusedEvery).ask(now, 0, 0).due(now); !got.Equal(now) {
		t.Errorf("held by a clock that was ahead: due at %s", got)
	}
	// What fails is tried again with growing waits, also after the end.
	failed := asked
	at := asked.due(now)
	var waits []time.Duration
	for range 12 {
		failed = failed.fail(at, 1)
		waits = append(waits, failed.due(at).Sub(at))
		at = failed.due(at)
	}
	if waits[0] != time.Minute || waits[1] != 2*time.Minute || waits[11] != lastRenewWait {
		t.Errorf("waits %v", waits)
	}
	over := s.fail(now.Add(2*year), 0)
	if got := over.due(now.Add(2 * year)); !got.Equal(now.Add(2*year + firstRenewWait/2)) {
		t.Errorf("after the end: due at %s", got)
	}
	// When the controller can be reached again, the wait is over, but not for
	// what has been tried just now.
	if got := failed.again(failed.tried.Add(time.Hour)).due(at); !got.Equal(asked.due(now)) {
		t.Errorf("reached: due at %s", got)
	}
	if got := failed.again(failed.tried.Add(time.Second)).due(at); !got.Equal(failed.due(at)) {
		t.Errorf("reached at once: due at %s", got)
	}
	// A clock that was ahead when an attempt failed does not stop the next.
	if got := over.due(now.Add(year)); got.After(now.Add(year)) {
		t.Errorf("after the clock was set back: due at %s", got)
	}
}
