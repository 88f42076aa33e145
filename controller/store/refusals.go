package store

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/dunlin/dunlin/controller/identity"
)

// Refusals are bounded, so that whoever is refused all the time fills the
// audit log slowly: at this rate changes stay for a month and a half.
const (
	refusalInterval = time.Minute
	// maxRefusals of each interval, and maxRefusalsADay, are recorded, like
	// ones as one; the rest are counted in one record of an interval, or of
	// overflowInterval once the day's are used up.
	maxRefusals      = 50
	maxRefusalsADay  = 2000
	overflowInterval = time.Hour
)

// refusals collects what is refused until it is written.
type refusals struct {
	mu      sync.Mutex // guards all below
	waiting []AuditRecord
	like    map[refusalKey]int // index in waiting
	// Those that are only counted.
	over      uint64
	overSince time.Time
	overTold  time.Time
	// How many were written since the day began.
	day   time.Time
	today int
}

// refusalKey is what like refusals have in common.
type refusalKey struct{ who, action, object, host string }

func (q *refusals) add(r AuditRecord) {
	host, _, err := net.SplitHostPort(r.From)
	if err != nil {
		host = r.From
	}
	key := refusalKey{r.Who, r.Action, r.Object, host}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i, ok := q.like[key]; ok {
		q.waiting[i].Count++
		return
	}
	if len(q.waiting) >= maxRefusals || q.today+len(q.waiting) >= maxRefusalsADay {
		if q.over == 0 {
			q.overSince = r.At
		}
		q.over++
		return
	}
	if q.like == nil {
		q.like = map[refusalKey]int{}
	}
	q.like[key] = len(q.waiting)
	q.waiting = append(q.waiting, r)
}

// take gives what is to be written now. The last take gives all.
func (q *refusals) take(now time.Time, last bool) []AuditRecord {
	q.mu.Lock()
	defer q.mu.Unlock()
	take := q.waiting
	q.waiting, q.like = nil, nil
	if now.Sub(q.day) >= 24*time.Hour || now.Before(q.day) {
		q.day, q.today = now, 0
	}
	q.today += len(take)
	if q.over > 0 && (last || q.today < maxRefusalsADay || now.Sub(q.overTold) >= overflowInterval || now.Before(q.overTold)) {
		take = append(take, AuditRecord{
			At: q.overSince, Who: "controller", Action: "audit.overflow", Object: "audit", Refused: true, Count: q.over,
			Reason: fmt.Sprintf("more refusals than the %d a minute, %d a day that are recorded one by one", maxRefusals, maxRefusalsADay),
		})
		q.over, q.overTold = 0, now
	}
	return take
}

// lost counts records that could not be written.
func (q *refusals) lost(records []AuditRecord) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range records {
		if q.over == 0 {
			q.overSince = r.At
		}
		q.over += r.Count
	}
}

// Refused implements identity.Refusals: what was refused is written within a
// minute, like refusals as one record.
func (s *Store) Refused(ctx context.Context, r identity.Refusal) {
	p := identity.FromContext(ctx)
	if r.Who == "" {
		r.Who = p.String()
	}
	if r.From == "" {
		r.From = p.From
	}
	s.refusals.add(AuditRecord{
		At: s.now(), Who: cut(r.Who, maxAuditName), Action: r.Action, Object: cut(r.Object, maxAuditName),
		Refused: true, Reason: cut(r.Reason, maxAuditName), From: r.From, Count: 1,
	})
}

// RunRefusals writes what is refused each minute until ctx is done, and then
// what is left.
func (s *Store) RunRefusals(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(refusalInterval)
	defer tick.Stop()
	for last := false; ; {
		select {
		case <-ctx.Done():
			last = true
		case <-tick.C:
		}
		err := s.writeRefusals(context.WithoutCancel(ctx), last)
		if last {
			return err
		}
		if err != nil {
			log.Error("cannot record what was refused", "error", err)
		}
	}
}

func (s *Store) writeRefusals(ctx context.Context, last bool) error {
	records := s.refusals.take(s.now(), last)
	if len(records) == 0 {
		return nil
	}
	err := s.write(ctx, "refusals", func(tx *sql.Tx) error {
		for _, r := range records {
			if err := s.audit(ctx, tx, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.refusals.lost(records)
	}
	return err
}
