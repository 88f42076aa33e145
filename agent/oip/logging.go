package oip

import (
	"context"
	"log/slog"
	"math"
	"sync"
)

const (
	formatDefault = "default"
	formatISO8601 = "ISO8601"
	// levelNone is above every level that is logged.
	levelNone = slog.LevelError + 4
)

// logs are the logging settings. A message is logged where its level is at
// least that of level, so what is below a severity that is off is off too,
// and what is above one that is on is on.
type logs struct {
	mu     sync.Mutex // guards changes of level, and format
	level  *slog.LevelVar
	format string // as it was asked for; the lines have the times of ISO 8601 in both
}

// severities are the settings of a severity, the lowest first.
var severities = []struct {
	name string
	on   slog.Level // the highest level that logs it
	off  slog.Level // the lowest level that does not
}{
	{"log_info", slog.LevelInfo, slog.LevelWarn},
	{"log_warning", slog.LevelWarn, slog.LevelError},
	{"log_error", slog.LevelError, levelNone},
}

// LogSettings changes the logging settings and gives those that are in force.
// Values are bool, uint32 or string; nil changes nothing.
func (s *Server) LogSettings(ctx context.Context, change map[string]any) (map[string]any, error) {
	if len(change) > 0 {
		if err := s.permit(ctx, ""); err != nil {
			return nil, err
		}
	}
	l := &s.logs
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.set(change); err != nil {
		return nil, err
	}
	level := l.current()
	shown := map[string]any{"log_file": "", "log_verbose_level": verbosity(level), "log_format": l.format}
	for _, v := range severities {
		shown[v.name] = level <= v.on
	}
	return shown, nil
}

func (l *logs) current() slog.Level {
	if l.level == nil {
		return slog.LevelInfo
	}
	return l.level.Level()
}

// verbosity is how far a level is below that of information.
func verbosity(level slog.Level) uint32 {
	return uint32(max(0, slog.LevelDebug+1-level))
}

func (l *logs) set(change map[string]any) error {
	if len(change) == 0 {
		return nil
	}
	if l.level == nil {
		return Errorf(Unsupported, "the logging settings of this server cannot be changed")
	}
	format := l.format
	on := map[string]bool{}
	verbose := int64(-1)
	for name, value := range change {
		switch name {
		case "log_info", "log_warning", "log_error":
			v, ok := value.(bool)
			if !ok {
				return Errorf(InvalidArgument, "%s is not a boolean", name)
			}
			on[name] = v
		case "log_verbose_level":
			v, ok := value.(uint32)
			if !ok || v > math.MaxInt32 {
				return Errorf(InvalidArgument, "log_verbose_level is not an integer from 0 to %d", math.MaxInt32)
			}
			verbose = int64(v)
		case "log_format":
			v, ok := value.(string)
			if !ok || v != formatDefault && v != formatISO8601 {
				return Errorf(InvalidArgument, "log_format is %.64q, allowed are %s and %s", value, formatDefault, formatISO8601)
			}
			format = v
		case "log_file":
			return Errorf(Unsupported, "log_file cannot be changed over the network")
		default:
			return Errorf(InvalidArgument, "unknown logging setting %q", clip(name))
		}
	}
	level := l.current()
	switch {
	case verbose > 0:
		level = slog.LevelDebug + 1 - slog.Level(verbose)
	case verbose == 0:
		level = max(level, slog.LevelInfo)
	}
	for _, v := range severities {
		if enabled, ok := on[v.name]; ok && enabled {
			level = min(level, v.on)
		} else if ok {
			level = max(level, v.off)
		}
	}
	if verbose > 0 && verbosity(level) != uint32(verbose) {
		return Errorf(InvalidArgument, "log_verbose_level is %d, and a severity above it is off", verbose)
	}
	for _, v := range severities {
		if enabled, ok := on[v.name]; ok && enabled != (level <= v.on) {
			return Errorf(InvalidArgument, "%s is %t, and a severity above it is off", v.name, enabled)
		}
	}
	l.level.Set(level)
	l.format = format
	return nil
}
