package reconcile

import (
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func TestLinkAllows(t *testing.T) {
	zone := time.FixedZone("site", 2*3600)
	sunday := time.Date(2026, 11, 29, 17, 30, 0, 0, zone)
	at := func(clock string, days uint32) *dunlinv1.TimeWindow {
		w, err := ParseWindow(clock)
		if err != nil {
			t.Fatal(err)
		}
		w.Days = days
		return w
	}
	night, noon := at("22:00-05:00", 0), at("12:00-13:00", 0)
	const M = 1 << 20
	tests := []struct {
		name     string
		link     Link
		delivery *dunlinv1.Delivery
		need     int64
		used     usage
		waits    string // "": it may travel
		until    time.Duration
		allowed  allowance
	}{
		{name: "no bound", need: 100 * M},
		{name: "more than the deployment allows", delivery: &dunlinv1.Delivery{MaxBytes: 10}, need: 11, waits: "11 bytes would travel, the deployment allows 10", until: time.Hour},
		{name: "as much as it allows", delivery: &dunlinv1.Delivery{MaxBytes: 11}, need: 11},
		{name: "metered", link: Link{Metered: true}, need: 5, waits: "metered link: 5 bytes would travel, and the deployment does not allow that", until: time.Hour},
		{name: "metered, documents only", link: Link{Metered: true}},
		{name: "metered and allowed", link: Link{Metered: true}, delivery: &dunlinv1.Delivery{Metered: true}, need: 5},
		{name: "before the window", link: Link{Windows: []*dunlinv1.TimeWindow{night}}, waits: "window opens at 22:00", until: 4*time.Hour + 30*time.Minute},
		{name: "both windows", link: Link{Windows: []*dunlinv1.TimeWindow{night}}, delivery: &dunlinv1.Delivery{Windows: []*dunlinv1.TimeWindow{noon}}, waits: "window opens at 12:00", until: 18*time.Hour + 30*time.Minute},
		{name: "in a window", link: Link{Windows: []*dunlinv1.TimeWindow{noon, at("17:00-18:00", 0)}}, allowed: allowance{until: sunday.Add(30 * time.Minute)}},
		{name: "Saturday's window goes on", link: Link{Windows: []*dunlinv1.TimeWindow{at("22:00-18:00", 1<<6)}}, allowed: allowance{until: sunday.Add(30 * time.Minute)}},
		{name: "not Sunday's", link: Link{Windows: []*dunlinv1.TimeWindow{at("17:00-18:00", 1<<1)}}, waits: "window opens at 17:00", until: 23*time.Hour + 30*time.Minute},
		{name: "next Saturday's", link: Link{Windows: []*dunlinv1.TimeWindow{at("17:00-18:00", 1<<6)}}, waits: "window opens at 2026-12-05 17:00", until: 6*24*time.Hour - 30*time.Minute},
		{name: "within the day", link: Link{DayBytes: 10 * M}, need: 50 * M, used: usage{day: 4 * M}, allowed: allowance{bytes: 6 * M}},
		{name: "the day is over", link: Link{DayBytes: 10 * M}, need: 5, used: usage{day: 10 * M}, waits: "5 bytes would travel, today's 10485760 are used up; there are more at 00:00", until: 6*time.Hour + 30*time.Minute},
		{name: "more than a month has", link: Link{MonthBytes: 10}, need: 11, waits: "11 bytes would travel, the link has 10 a month", until: time.Hour},
		{name: "more than is left of the month", link: Link{MonthBytes: 10}, need: 6, used: usage{month: 5}, waits: "6 bytes would travel, 5 are left of this month's 10; the next begins at 2026-12-01 00:00", until: 30*time.Hour + 30*time.Minute},
		{name: "what is left of the month", link: Link{MonthBytes: 10, DayBytes: 8}, need: 5, used: usage{month: 5, day: 1}, allowed: allowance{bytes: 5}},
	}
	for _, tt := range tests {
		got, wait := tt.link.allow(tt.delivery, tt.need, tt.used, sunday)
		switch {
		case tt.waits == "" && (wait != nil || got.bytes != tt.allowed.bytes || !got.until.Equal(tt.allowed.until)):
			t.Errorf("%s: %+v, %v; want %+v", tt.name, got, wait, tt.allowed)
		case tt.waits != "" && (wait == nil || wait.Cause != tt.waits || wait.Until.Sub(sunday) != tt.until):
			t.Errorf("%s: %+v; want %q in %s", tt.name, wait, tt.waits, tt.until)
		}
	}
}

// Whatever the windows are: it is open just until it closes, and when it is
// closed it opens when it says.
func TestWindows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var windows []*dunlinv1.TimeWindow
		for range rapid.IntRange(1, 3).Draw(t, "windows") {
			windows = append(windows, &dunlinv1.TimeWindow{
				FromMinute: rapid.Uint32Range(0, 1439).Draw(t, "from"), ToMinute: rapid.Uint32Range(0, 1440).Draw(t, "to"), Days: rapid.Uint32Range(0, 127).Draw(t, "days"),
			})
		}
		now := time.Date(2026, 1, 1, 0, rapid.IntRange(0, 60*24*30).Draw(t, "minute"), 0, 0, time.UTC)
		closes, opens := window(windows, now)
		if closes.IsZero() {
			if opens.IsZero() || !opens.After(now) {
				t.Fatalf("closed, and opens at %s", opens)
			}
			if c, _ := window(windows, opens); c.IsZero() {
				t.Errorf("not open at %s", opens)
			}
			if c, _ := window(windows, opens.Add(-time.Minute)); !c.IsZero() {
				t.Errorf("open before %s", opens)
			}
			return
		}
		if c, _ := window(windows, closes.Add(-time.Second)); c.IsZero() {
			t.Errorf("closed before %s", closes)
		}
	})
}

// Nothing of a bundle travels over a metered link without leave; what would
// is said, and counts what the device has already.
func TestMeteredLinkIsNotUsed(t *testing.T) {
	rng := seeded(t)
	old := blocks(rng, 20)
	fresh := block(rng)
	a := pack(t, map[string][][]byte{"model.onnx": old})
	b := pack(t, map[string][][]byte{"model.onnx": append(old[:10:10], fresh)})
	reg := serveBundles(t, a, b)
	s := testStore(t)
	if err := newDownload(t, s, reg, a).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	d := newDownload(t, s, reg, b)
	d.gate = &gate{link: Link{Metered: true}, meter: testMeter(t), now: time.Now}
	err := d.run(t.Context())
	wait, ok := errors.AsType[*WaitError](err)
	if !ok || !strings.Contains(wait.Cause, "metered link: "+strconv.Itoa(len(fresh))+" bytes would travel") {
		t.Fatalf("got %v, want that %d bytes would travel", err, len(fresh))
	}
	if asked := reg.take(b.blobOf("model.onnx")); len(asked) > 0 {
		t.Errorf("asked for %v", asked)
	}
	d.gate.delivery = &dunlinv1.Delivery{Metered: true}
	if err := d.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, s, b)
}

// A day's bytes end a download, which goes on the next day; they are counted
// whoever asks, and over a start of the agent.
func TestDailyBytesEndADownload(t *testing.T) {
	rng := seeded(t)
	b := pack(t, map[string][][]byte{"model.onnx": blocks(rng, 60)}) // 4 MB and more
	reg := serveBundles(t, b)
	s := testStore(t)
	kept := &keptTraffic{}
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	const daily = 2 << 20
	for day := 1; ; day++ {
		d := newDownload(t, s, reg, b)
		m := &meter{kept: kept, log: testLog(t), pending: map[string]int64{}}
		d.gate = &gate{link: Link{DayBytes: daily}, meter: m, now: func() time.Time { return now }}
		err := d.run(t.Context())
		m.store(t.Context())
		used, e := kept.Traffic(t.Context(), now.Format(dayFormat))
		if e != nil {
			t.Fatal(e)
		}
		if used > daily+daily/2 { // what was under way in the other streams
			t.Errorf("%d bytes travelled on day %d, allowed are %d", used, day, daily)
		}
		if err == nil {
			if day < 2 {
				t.Errorf("%d bytes in %d days", b.size, day)
			}
			break
		}
		wait, ok := errors.AsType[*WaitError](err)
		if !ok || day > 10 {
			t.Fatalf("day %d: %v", day, err)
		}
		now = wait.Until
	}
	checkInstalled(t, s, b)
}

// Downloads beside each other share what is left of the day.
func TestDownloadsShareTheDay(t *testing.T) {
	g := &gates{link: func() Link { return Link{DayBytes: 100} }, meter: testMeter(t), now: time.Now}
	one, other := g.of(nil), g.of(nil)
	for _, d := range []*gate{one, other} {
		if err := d.pass(t.Context(), 1000); err != nil {
			t.Fatal(err)
		}
	}
	if err := one.take(t.Context(), 60); err != nil {
		t.Errorf("60 of 100 bytes: %v", err)
	}
	if w, ok := errors.AsType[*WaitError](other.take(t.Context(), 60)); !ok || !strings.Contains(w.Cause, "today's 100 are used up") {
		t.Errorf("120 of 100 bytes: %v", w)
	}
}

// However slow a link is, no pause between two reads is so long that its source
// would count as stalled, also when several streams share it.
func TestSlowLinkDoesNotStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const perSecond = 1 << 10
		g := &gates{link: func() Link { return Link{BytesPerSecond: perSecond} }, meter: testMeter(t), now: time.Now}
		var running sync.WaitGroup
		var travelled atomic.Int64
		for range streams {
			m := &metered{Reader: rand.NewChaCha8([32]byte{}), ctx: t.Context(), count: &travelled, gate: g.of(nil)}
			running.Go(func() {
				for began := time.Now(); time.Since(began) < 10*time.Minute; {
					before := time.Now()
					if _, err := m.Read(make([]byte, 64<<10)); err != nil {
						t.Error(err)
					}
					if pause := time.Since(before); pause > defaultStall/2 {
						t.Errorf("a pause of %s", pause)
					}
				}
			})
		}
		running.Wait()
		if n := travelled.Load(); n < 600*perSecond || n > 610*perSecond+rateBurst {
			t.Errorf("%d bytes in 10 minutes", n)
		}
	})
}

func TestParseWindow(t *testing.T) {
	for _, s := range []string{"", "1:00-2:00", "24:00-01:00", "01:00", "01:00-02:60", "01:00-01:00"} {
		if w, err := ParseWindow(s); err == nil {
			t.Errorf("%q is %v", s, w)
		}
	}
}

func FuzzParseWindow(f *testing.F) {
	for _, s := range []string{"22:00-05:00", "00:00-23:59", "", "24:00-01:00", "01:00-", "-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		w, err := ParseWindow(s)
		if err == nil {
			err = checkDelivery(&dunlinv1.Delivery{Windows: []*dunlinv1.TimeWindow{w}})
			if err != nil || len(s) != len("22:00-05:00") {
				t.Errorf("%q is %v: %v", s, w, err)
			}
		}
	})
}
