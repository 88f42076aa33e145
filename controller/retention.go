package controller

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/dunlin/dunlin/controller/dispatch"
	"github.com/dunlin/dunlin/controller/store"
)

// historyInterval is how often samples of telemetry are kept, and what is old
// is forgotten.
const historyInterval = time.Minute

// history keeps samples of the devices' figures, and forgets what is older
// than it is to be kept.
type history struct {
	store    *store.Store
	dispatch *dispatch.Dispatcher
	log      *slog.Logger
	now      func() time.Time

	telemetry     store.TelemetryKeep
	events, audit time.Duration // 0: as long as there is room
}

func (h *history) run(ctx context.Context) error {
	t := time.NewTicker(historyInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := h.pass(ctx); err != nil && ctx.Err() == nil {
			h.log.Error("cannot keep the history of telemetry and events", "error", err)
		}
	}
}

// pass does what is due, in bounded steps: what is left over is done in the
// next one.
func (h *history) pass(ctx context.Context) error {
	// Samples that cannot be kept are lost, as those are that devices drop. What
	// is too old goes all the same: a disk may be full of it.
	errs := []error{h.store.AddTelemetry(ctx, h.dispatch.Samples())}
	_, err := h.store.RollTelemetry(ctx)
	errs = append(errs, err)
	_, err = h.store.PruneTelemetry(ctx, h.telemetry)
	errs = append(errs, err)
	if h.events > 0 {
		_, err = h.store.PruneEvents(ctx, h.now().Add(-h.events))
		errs = append(errs, err)
	}
	if h.audit > 0 {
		_, err = h.store.PruneAudit(ctx, h.now().Add(-h.audit))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// historyOf gives the history that the settings ask for.
func historyOf(c Config, st *store.Store, d *dispatch.Dispatcher, log *slog.Logger) *history {
	return &history{
		store: st, dispatch: d, log: log, now: time.Now,
		telemetry: store.TelemetryKeep{time.Duration(c.TelemetryHours) * time.Hour, time.Duration(c.TelemetryDays) * day, time.Duration(c.TelemetryLongDays) * day},
		events:    time.Duration(c.EventDays) * day, audit: time.Duration(c.AuditDays) * day,
	}
}
