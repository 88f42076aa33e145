package broker

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

const (
	// logBurst records with one message pass in one logWindow. Further ones
	// are counted, and the count is told with the next one that passes.
	logBurst  = 10
	logWindow = time.Minute
)

// loggedKeys are the attributes that pass. The server also logs whole packets,
// with passwords in them.
var loggedKeys = []string{"client", "device", "error", "hook", "listener", "reason", "remote", "suppressed"}

// limiter is a slog.Handler that gives warnings and errors to the next one, a
// bounded number of each: anybody who can open a connection causes one.
type limiter struct {
	next  slog.Handler
	state *limiterState // shared by all that come from one newLimiter
}

type limiterState struct {
	mu      sync.Mutex // guards windows
	windows map[string]*logCount
}

// logCount counts one message. The messages are constants in code, so there
// are few.
type logCount struct {
	start              time.Time
	passed, suppressed int
}

func newLimiter(next slog.Handler) *limiter {
	return &limiter{next: next, state: &limiterState{windows: map[string]*logCount{}}}
}

func (l *limiter) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && l.next.Enabled(ctx, level)
}

func (l *limiter) Handle(ctx context.Context, r slog.Record) error {
	suppressed, pass := l.state.count(r.Message, r.Time)
	if !pass {
		return nil
	}
	out := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	r.Attrs(func(a slog.Attr) bool {
		if slices.Contains(loggedKeys, a.Key) {
			out.AddAttrs(a)
		}
		return true
	})
	if suppressed > 0 {
		out.AddAttrs(slog.Int("suppressed", suppressed))
	}
	return l.next.Handle(ctx, out)
}

func (s *limiterState) count(message string, now time.Time) (suppressed int, pass bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.windows[message]
	if c == nil {
		c = &logCount{start: now}
		s.windows[message] = c
	}
	if now.Sub(c.start) >= logWindow {
		suppressed = c.suppressed
		*c = logCount{start: now}
	}
	if c.passed == logBurst {
		c.suppressed++
		return 0, false
	}
	c.passed++
	return suppressed, true
}

func (l *limiter) WithAttrs(attrs []slog.Attr) slog.Handler {
	attrs = slices.DeleteFunc(slices.Clone(attrs), func(a slog.Attr) bool { return !slices.Contains(loggedKeys, a.Key) })
	return &limiter{next: l.next.WithAttrs(attrs), state: l.state}
}

func (l *limiter) WithGroup(name string) slog.Handler {
	return &limiter{next: l.next.WithGroup(name), state: l.state}
}
