package serve

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/internal/policy"
)

// fallbackCounts count the requests that were sent on to a fallback.
type fallbackCounts [policy.Reasons]atomic.Uint64

// FallbackFigures count the requests that were sent on to a fallback, by the
// reason for which the one before did not answer, also those that failed there.
type FallbackFigures struct {
	policy.Fallback
	Requests [policy.Reasons]uint64
}

// fallbacks are those of the rule that decided.
func (c *choice) fallbacks() []policy.Fallback {
	if c.route == nil {
		return nil
	}
	return c.route.policy.Fallbacks(c.decision.Rule)
}

// reason says why a version has not answered, where the fault is not the
// request's, the caller waits, and another version might.
func reason(ctx context.Context, err error) (why policy.Reason, another bool) {
	switch {
	case ctx.Err() != nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, engine.ErrInvalidInput), errors.Is(err, engine.ErrStopped), errors.Is(err, engine.ErrCordoned):
		return 0, false
	case errors.Is(err, engine.ErrNotResident):
		return policy.NotResident, true
	case errors.Is(err, engine.ErrExpired):
		return policy.Deadline, true
	case errors.Is(err, engine.ErrOverloaded):
		return policy.Overload, true
	default:
		return policy.Failed, true
	}
}

// takesCold says whether one of the fallbacks, from one on, answers for a
// version whose weights are out.
func takesCold(fallbacks []policy.Fallback, from int) bool {
	return policy.NextFallback(fallbacks, from, policy.NotResident) < len(fallbacks)
}

// fallBack sends a request on that version id has not answered, and gives the
// last word: an answer, or the error of id with those of its fallbacks.
//
// Each fallback is tried once, in its order, and no version twice; only where
// none answers does the request wait for the weights of the first that was
// passed over because they were out. So there are MaxFallbacks+1 runs at most,
// each begun after the one before has failed.
func (s *Server) fallBack(ctx context.Context, t *table, c oip.Call, began time.Time, by *choice, id engine.VersionID, err error) (oip.Answer, error) {
	fallbacks := by.fallbacks()
	first, refusal := id, err
	if len(fallbacks) == 0 {
		return oip.Answer{}, classify(t, c, first, refusal)
	}
	timeout := c.Timeout
	run := func(id engine.VersionID, resident bool) (oip.Answer, error) {
		if timeout > 0 {
			c.Timeout = max(timeout-time.Since(began), 1) // what is left of it
		}
		return s.run(ctx, t, c, id, resident, by)
	}
	var cold engine.VersionID
	var header string // of an answer by cold
	var room [policy.MaxFallbacks + 1]engine.VersionID
	tried, notes := append(room[:0], id), ""
	for next := 0; ; next++ {
		why, another := reason(ctx, err)
		if !another && len(tried) > 1 && errors.Is(err, engine.ErrInvalidInput) {
			why, another = policy.Failed, true // it takes other inputs than the target
		}
		if !another {
			break
		}
		if why == policy.NotResident && cold.Model == "" {
			cold, header = id, by.fallback
		}
		if next = policy.NextFallback(fallbacks, next, why); next == len(fallbacks) {
			break
		}
		to, absent := t.version(fallbacks[next].Target)
		switch {
		case absent == nil && slices.Contains(tried, to):
			continue // for the same reason
		case by.fallback == "":
			by.fallback = why.String()
		}
		by.route.counts[by.decision.Rule+1].fallbacks[next][why].Add(1)
		id, err = to, absent
		if absent == nil {
			tried = append(tried, to)
			var a oip.Answer
			if a, err = run(to, takesCold(fallbacks, next+1)); err == nil {
				return a, nil
			}
		}
		notes += fmt.Sprintf("; fallback %s: %v", fallbacks[next].Target, err)
	}
	if cold.Model != "" && ctx.Err() == nil {
		by.fallback = header
		a, err := run(cold, false)
		if err == nil {
			return a, nil
		}
		if cold == first {
			refusal = err
		}
	}
	by.fallback = ""
	if ctx.Err() != nil {
		refusal = context.Cause(ctx)
	}
	refusal = classify(t, c, first, refusal)
	if notes == "" {
		return oip.Answer{}, refusal
	}
	named := &oip.Error{Code: oip.CodeOf(refusal), Err: fmt.Errorf("%w%s", refusal, notes)}
	if e, ok := errors.AsType[*oip.Error](refusal); ok {
		named.RetryAfter = e.RetryAfter
	}
	return oip.Answer{}, named
}
