package reconcile

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Link bounds what may travel to the device over its link, whatever it is for.
// What comes from devices of its site does not count.
type Link struct {
	Metered        bool                   // bytes cost money
	DayBytes       int64                  // most bytes of a day, in local time; 0: no bound
	MonthBytes     int64                  // most bytes of a month; 0: no bound
	BytesPerSecond int64                  // 0: no bound
	Windows        []*dunlinv1.TimeWindow // when bytes may travel; none: always
}

// ParseWindow reads a time of each day, as "22:00-05:00".
func ParseWindow(s string) (*dunlinv1.TimeWindow, error) {
	var minutes [2]uint32
	from, to, _ := strings.Cut(s, "-")
	for i, text := range []string{from, to} {
		t, err := time.Parse("15:04", text)
		if err != nil || len(text) != len("15:04") {
			return nil, fmt.Errorf("%q is not times of day, as 22:00-05:00", s)
		}
		minutes[i] = uint32(t.Hour()*60 + t.Minute())
	}
	if minutes[0] == minutes[1] {
		return nil, fmt.Errorf("%q has no time in it", s)
	}
	return &dunlinv1.TimeWindow{FromMinute: minutes[0], ToMinute: minutes[1]}, nil
}

// maxWindows bounds the windows of a delivery.
const maxWindows = 64

// checkDelivery says what is wrong with how a version may travel.
func checkDelivery(d *dunlinv1.Delivery) error {
	if n := len(d.GetWindows()); n > maxWindows {
		return fmt.Errorf("delivery.windows: there are %d, the limit is %d", n, maxWindows)
	}
	for i, w := range d.GetWindows() {
		if w.FromMinute > 1439 || w.ToMinute > 1440 || w.Days > 127 {
			return fmt.Errorf("delivery.windows[%d] is from %d to %d on %d, allowed are 0 to 1439, 0 to 1440 and 0 to 127", i, w.FromMinute, w.ToMinute, w.Days)
		}
	}
	return nil
}

// WaitError says that nothing is wrong, and what a download waits for.
type WaitError struct {
	Cause string
	Until time.Time // when it is to be asked again
}

func (e *WaitError) Error() string { return "waits: " + e.Cause }

// askAgain is when a download is looked at again that waits for no time.
const askAgain = time.Hour

// usage is what has travelled.
type usage struct{ day, month int64 }

// allowance is what may travel now.
type allowance struct {
	bytes int64     // 0: no bound
	until time.Time // zero: no end
}

// allow says how much of the needed bytes may travel now. It is pure. With no
// need it says only whether any may.
func (l Link) allow(d *dunlinv1.Delivery, need int64, used usage, now time.Time) (allowance, *WaitError) {
	var a allowance
	if n := int64(min(d.GetMaxBytes(), 1<<62)); n > 0 && need > n {
		return a, &WaitError{fmt.Sprintf("%d bytes would travel, the deployment allows %d", need, n), now.Add(askAgain)}
	}
	if l.Metered && !d.GetMetered() && need > 0 {
		return a, &WaitError{fmt.Sprintf("metered link: %d bytes would travel, and the deployment does not allow that", need), now.Add(askAgain)}
	}
	var opens time.Time
	for _, windows := range [][]*dunlinv1.TimeWindow{l.Windows, d.GetWindows()} {
		closes, next := window(windows, now)
		switch {
		case len(windows) == 0:
		case closes.IsZero():
			opens = later(opens, next)
		case a.until.IsZero() || closes.Before(a.until):
			a.until = closes
		}
	}
	if !opens.IsZero() {
		return a, &WaitError{"window opens at " + clock(opens, now), opens}
	}
	y, m, day := now.Date()
	if n := l.MonthBytes; n > 0 {
		next := time.Date(y, m+1, 1, 0, 0, 0, 0, now.Location())
		left := max(n-used.month, 0)
		switch {
		case need > n:
			return a, &WaitError{fmt.Sprintf("%d bytes would travel, the link has %d a month", need, n), now.Add(askAgain)}
		case need > left || left == 0:
			return a, &WaitError{fmt.Sprintf("%d bytes would travel, %d are left of this month's %d; the next begins at %s", need, left, n, clock(next, now)), next}
		}
		a.bytes = left
	}
	if n := l.DayBytes; n > 0 { // a long download goes on day after day
		next := time.Date(y, m, day+1, 0, 0, 0, 0, now.Location())
		left := max(n-used.day, 0)
		if left == 0 {
			return a, &WaitError{fmt.Sprintf("%d bytes would travel, today's %d are used up; there are more at %s", need, n, clock(next, now)), next}
		}
		if a.bytes == 0 || left < a.bytes {
			a.bytes = left
		}
	}
	return a, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// clock says a time to come as people do.
func clock(t, now time.Time) string {
	if t.Sub(now) < 24*time.Hour {
		return t.Format("15:04")
	}
	return t.Format("2006-01-02 15:04")
}

// window says until when one of the windows is open, or, where none is, when
// the next one opens.
func window(windows []*dunlinv1.TimeWindow, now time.Time) (closes, opens time.Time) {
	y, m, day := now.Date()
	for _, w := range windows {
		for back := -1; back <= 7; back++ {
			begin := time.Date(y, m, day+back, 0, int(w.FromMinute), 0, 0, now.Location())
			if w.Days != 0 && w.Days>>begin.Weekday()&1 == 0 {
				continue
			}
			until := back
			if w.ToMinute <= w.FromMinute {
				until++
			}
			end := time.Date(y, m, day+until, 0, int(w.ToMinute), 0, 0, now.Location())
			switch {
			case begin.After(now):
				if opens.IsZero() || begin.Before(opens) {
					opens = begin
				}
			case now.Before(end):
				closes = later(closes, end)
			}
		}
	}
	return closes, opens
}

// rateBurst bounds what a link with a rate takes at once; a read takes what
// comes in a second, or less.
const (
	rateBurst = 64 << 10
	mostRead  = 16 << 10
)

// meterStep is how many bytes may travel before that is stored: after a crash
// no more are forgotten.
const meterStep = 4 << 20

// Traffic keeps what has travelled, by day.
type Traffic interface {
	// Traffic gives the bytes of a day, "2006-01-02", or of all that begin so.
	Traffic(ctx context.Context, day string) (int64, error)
	AddTraffic(ctx context.Context, day string, bytes int64) error
}

// meter counts the bytes that travel to the device.
type meter struct {
	kept Traffic
	log  *slog.Logger

	mu      sync.Mutex // guards what follows
	pending map[string]int64
	storing bool
	total   int64 // since the agent's start
}

const dayFormat = "2006-01-02"

// add counts bytes of now, and gives all since the agent's start. It seldom
// writes.
func (m *meter) add(ctx context.Context, n int64, now time.Time) (total int64) {
	day := now.Format(dayFormat)
	m.mu.Lock()
	m.pending[day] += n
	m.total += n
	total = m.total
	due := m.pending[day] >= meterStep
	m.mu.Unlock()
	if due {
		m.store(ctx)
	}
	return total
}

// travelled gives all bytes since the agent's start.
func (m *meter) travelled() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total
}

// store writes what has been counted.
func (m *meter) store(ctx context.Context) {
	m.mu.Lock()
	if m.storing {
		m.mu.Unlock()
		return
	}
	m.storing = true
	pending := m.pending
	m.pending = map[string]int64{}
	m.mu.Unlock()
	for day, n := range pending {
		if err := m.kept.AddTraffic(context.WithoutCancel(ctx), day, n); err != nil {
			m.log.Error("travelled bytes not stored", "bytes", n, "error", err)
			m.mu.Lock()
			m.pending[day] += n
			m.mu.Unlock()
		}
	}
	m.mu.Lock()
	m.storing = false
	m.mu.Unlock()
}

// used gives what has travelled in the day and the month of now.
func (m *meter) used(ctx context.Context, now time.Time) (u usage, err error) {
	m.store(ctx)
	if u.day, err = m.kept.Traffic(ctx, now.Format(dayFormat)); err != nil {
		return u, err
	}
	u.month, err = m.kept.Traffic(ctx, now.Format("2006-01"))
	return u, err
}

// gates makes the gates of the downloads of one device.
type gates struct {
	link  func() Link // nil: nothing is bound
	meter *meter
	now   func() time.Time // in the device's zone

	mu      sync.Mutex // guards what follows
	limiter *rate.Limiter
}

// of gives the gate of a download with this delivery; an open one where there
// are no gates.
func (g *gates) of(delivery *dunlinv1.Delivery) *gate {
	if g == nil {
		return nil
	}
	one := &gate{delivery: delivery, meter: g.meter, now: g.now}
	if g.link != nil {
		one.link = g.link()
	}
	if n := one.link.BytesPerSecond; n > 0 {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.limiter == nil || g.limiter.Limit() != rate.Limit(n) {
			g.limiter = rate.NewLimiter(rate.Limit(n), rateBurst)
		}
		one.limit = g.limiter
	}
	return one
}

// gate is what one download asks its last source through. A nil one is open.
type gate struct {
	link     Link
	delivery *dunlinv1.Delivery
	meter    *meter
	limit    *rate.Limiter    // of all downloads together; nil: none
	now      func() time.Time // in the device's zone

	mu      sync.Mutex // guards what follows
	allowed allowance
	since   int64 // what had travelled, for whatever download, when it was allowed
}

// pass says whether so many bytes may travel now, else with a *WaitError what
// is to be waited for.
func (g *gate) pass(ctx context.Context, need int64) error {
	if g == nil {
		return nil
	}
	return g.allow(ctx, need, g.now())
}

func (g *gate) allow(ctx context.Context, need int64, now time.Time) error {
	since := g.meter.travelled()
	used, err := g.meter.used(ctx, now)
	if err != nil {
		return err
	}
	a, wait := g.link.allow(g.delivery, need, used, now)
	if wait != nil {
		return wait
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.allowed, g.since = a, since
	return nil
}

// count takes in that bytes have travelled.
func (g *gate) count(n int) {
	if g != nil {
		g.meter.add(context.Background(), int64(n), g.now())
	}
}

// take counts bytes that have travelled and says whether more may, after a
// pause where the link has a rate.
func (g *gate) take(ctx context.Context, n int) error {
	if g == nil || n == 0 {
		return nil
	}
	now := g.now()
	total := g.meter.add(ctx, int64(n), now)
	g.mu.Lock()
	a, since := g.allowed, g.since
	g.mu.Unlock()
	if !a.until.IsZero() && !now.Before(a.until) || a.bytes > 0 && total-since >= a.bytes {
		return g.allow(ctx, 0, now) // the need was judged before: what is left of it is not
	}
	if g.limit != nil {
		return g.limit.WaitN(ctx, min(n, rateBurst))
	}
	return nil
}

// thrifty says whether bytes cost more than time.
func (g *gate) thrifty() bool {
	return g != nil && (g.link.Metered || g.link.DayBytes > 0 || g.link.MonthBytes > 0 || g.delivery.GetMaxBytes() > 0)
}

// metered counts what is read, and has a gate take it.
type metered struct {
	io.Reader
	ctx   context.Context
	count *atomic.Int64
	gate  *gate
	n     int64
}

func (m *metered) Read(p []byte) (int, error) {
	if m.gate != nil && m.gate.limit != nil { // no long pause at once: the source would seem to stall
		p = p[:min(len(p), int(m.gate.limit.Limit()), mostRead)]
	}
	n, err := m.Reader.Read(p)
	m.n += int64(n)
	m.count.Add(int64(n))
	if e := m.gate.take(m.ctx, n); e != nil {
		err = e
	}
	return n, err
}
