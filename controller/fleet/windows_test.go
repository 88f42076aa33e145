package fleet

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func window(t testing.TB, text string) *dunlinv1.TimeWindow {
	w, err := ParseWindow(text)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWindowText(t *testing.T) {
	for text, want := range map[string]string{
		"22:00-05:00": "22:00-05:00", "mon-fri 22:00-05:00": "mon-fri 22:00-05:00", "sat,sun 00:00-24:00": "sat,sun 00:00-24:00", "fri-mon 10:00-10:01": "mon,fri-sun 10:00-10:01",
		"sun-sat 01:00-02:00": "01:00-02:00", "wed,mon,tue 01:00-02:00": "mon-wed 01:00-02:00", "thu 23:59-00:00": "thu 23:59-00:00",
	} {
		if got := FormatWindow(window(t, text)); got != want {
			t.Errorf("%s is written %s, want %s", text, got, want)
		}
	}
	for _, bad := range []string{"", "22:00", "22:00-", "24:00-01:00", "10:00-10:00", "1:00-2:00", "10:60-11:00", "24:01-10:00", "10:00-24:01", "mon  10:00-11:00", " 10:00-11:00", "mon, 10:00-11:00", "Mon 10:00-11:00", "mon-tue-wed 10:00-11:00", "10:00-11:00 mon", "-1:00-02:00", "10:0a-11:00"} {
		if w, err := ParseWindow(bad); err == nil {
			t.Errorf("%q was taken as %v", bad, w)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		for _, w := range drawWindows(t, 1) {
			got, err := ParseWindow(FormatWindow(w))
			if err != nil || !proto.Equal(got, w) {
				t.Fatalf("%v is written %s and read %v, %v", w, FormatWindow(w), got, err)
			}
		}
	})
}

func FuzzParseWindow(f *testing.F) {
	f.Add("mon-fri 22:00-05:00")
	f.Fuzz(func(t *testing.T, text string) {
		w, err := ParseWindow(text)
		if err != nil {
			return
		}
		if again, err := ParseWindow(FormatWindow(w)); err != nil || !proto.Equal(again, w) {
			t.Fatalf("%q is read %v, then %v, %v", text, w, again, err)
		}
	})
}

func zone(t testing.TB, name string) *time.Location {
	l, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestOpen(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	at := func(text string) time.Time {
		got, err := time.ParseInLocation("2006-01-02 15:04:05", text, berlin)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	tests := []struct {
		windows []string
		now     time.Time
		is      bool
		next    time.Time
	}{
		{[]string{"22:00-05:00"}, at("2026-03-02 22:00:00"), true, time.Time{}},
		{[]string{"22:00-05:00"}, at("2026-03-03 04:59:59"), true, time.Time{}},
		{[]string{"22:00-05:00"}, at("2026-03-03 05:00:00"), false, at("2026-03-03 22:00:00")},
		{[]string{"fri 22:00-05:00"}, at("2026-03-07 04:00:00"), true, time.Time{}}, // Saturday: it began on Friday
		{[]string{"fri 22:00-05:00"}, at("2026-03-06 04:00:00"), false, at("2026-03-06 22:00:00")},
		{[]string{"sun 00:00-24:00"}, at("2026-03-07 23:59:59"), false, at("2026-03-08 00:00:00")},
		{[]string{"sun 00:00-24:00"}, at("2026-03-08 23:59:59"), true, time.Time{}},
		{[]string{"sun 00:00-24:00"}, at("2026-03-09 00:00:00"), false, at("2026-03-15 00:00:00")},
		{[]string{"mon 10:00-11:00", "tue 09:00-10:00"}, at("2026-03-02 12:00:00"), false, at("2026-03-03 09:00:00")},
		// Clocks are put forward from 2:00 to 3:00, and back from 3:00 to 2:00.
		{[]string{"02:00-02:30"}, at("2026-03-29 03:10:00"), true, time.Time{}},
		{[]string{"01:00-04:00"}, at("2026-03-29 03:59:59"), true, time.Time{}},
		{[]string{"01:00-04:00"}, at("2026-03-29 04:00:00"), false, at("2026-03-30 01:00:00")},
		{[]string{"01:00-04:00"}, at("2026-10-25 03:59:59"), true, time.Time{}},
	}
	for _, tt := range tests {
		var windows []*dunlinv1.TimeWindow
		for _, text := range tt.windows {
			windows = append(windows, window(t, text))
		}
		if is, next := open(windows, berlin, tt.now); is != tt.is || !next.Equal(tt.next) {
			t.Errorf("%v at %s: %v, next %s", tt.windows, tt.now, is, next.In(berlin))
		}
	}
}

// At no time of two years is what Opens said wrong.
func TestOpensIsWhenItOpens(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{"UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe"}).Draw(t, "zone")
		l, err := time.LoadLocation(name)
		if err != nil {
			t.Fatal(err)
		}
		now := begin.Add(time.Duration(rapid.Int64Range(0, int64(2*365*24*time.Hour)).Draw(t, "at")))
		windows := drawWindows(t, 1)
		is, next := open(windows, l, now)
		switch {
		case is:
		case !next.After(now) || next.Sub(now) > 8*24*time.Hour:
			t.Fatalf("at %s it opens at %s", now, next)
		default:
			if is, _ := open(windows, l, next); !is {
				t.Fatalf("it is not open at %s", next)
			}
			between := now.Add(time.Duration(rapid.Int64Range(0, int64(next.Sub(now))-1).Draw(t, "between")))
			if is, _ := open(windows, l, between); is {
				t.Fatalf("at %s it opens at %s, and is open at %s", now, next, between)
			}
		}
	})
}

func TestClosed(t *testing.T) {
	at := time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC) // a Monday
	night := Maintenance{Name: "night", Selector: map[string]string{"site": "a"}, Windows: []*dunlinv1.TimeWindow{window(t, "22:00-05:00")}, TimeZone: "Europe/Berlin"}
	sunday := Maintenance{Name: "sunday", Selector: map[string]string{"tier": "1"}, Windows: []*dunlinv1.TimeWindow{window(t, "sun 00:00-24:00")}, TimeZone: "UTC"}
	noon := Maintenance{Name: "noon", Windows: []*dunlinv1.TimeWindow{window(t, "12:00-13:00")}, TimeZone: "UTC"}
	frozen := Freeze{Name: "sale", Selector: map[string]string{"site": "a"}, Reason: "black friday"}
	until := frozen
	until.Name, until.Until = "until", at.Add(3*time.Hour)
	over := until
	over.Name, over.Until = "over", at
	siteA, both := map[string]string{"site": "a"}, map[string]string{"site": "a", "tier": "1"}
	tests := []struct {
		name    string
		objects Objects
		labels  map[string]string
		why     string
		opens   time.Time
	}{
		{"nothing", Objects{}, siteA, "", time.Time{}},
		{"of others", Objects{Freezes: []Freeze{frozen}, Maintenances: []Maintenance{night}}, map[string]string{"site": "b"}, "", time.Time{}},
		{"frozen", Objects{Freezes: []Freeze{frozen}}, siteA, "freeze sale: black friday", time.Time{}},
		{"the whole fleet", Objects{Freezes: []Freeze{{Name: "all", Reason: "x"}}}, nil, "freeze all: x", time.Time{}},
		{"frozen until", Objects{Freezes: []Freeze{until, over}}, siteA, "freeze until: black friday", at.Add(3 * time.Hour)},
		{"a freeze that is over", Objects{Freezes: []Freeze{over}}, siteA, "", time.Time{}},
		{"not open", Objects{Maintenances: []Maintenance{night}}, siteA, "maintenance night opens at Mon 22:00 CET", time.Date(2026, 3, 2, 21, 0, 0, 0, time.UTC)},
		{"open", Objects{Maintenances: []Maintenance{noon}}, siteA, "", time.Time{}},
		{"both must be open", Objects{Maintenances: []Maintenance{night, sunday}}, both, "maintenance night opens at Mon 22:00 CET", time.Date(2026, 3, 8, 0, 0, 0, 0, time.UTC)},
		{"never both", Objects{Maintenances: []Maintenance{night, noon}}, siteA, "maintenance night opens at Mon 22:00 CET", time.Time{}},
		{"frozen for longer than the window is closed", Objects{Freezes: []Freeze{{Name: "f", Reason: "x", Until: at.Add(12 * time.Hour)}}, Maintenances: []Maintenance{night}}, siteA, "freeze f: x", at.Add(12 * time.Hour)},
		{"open, but frozen until it is not", Objects{Freezes: []Freeze{until}, Maintenances: []Maintenance{noon}}, siteA, "freeze until: black friday", at.Add(24 * time.Hour)},
	}
	for _, tt := range tests {
		c := NewCompiler(tt.objects)
		if why, opens := c.Closed(Device{Labels: tt.labels}, at); why != tt.why || !opens.Equal(tt.opens) {
			t.Errorf("%s: %q, opens %s", tt.name, why, opens)
		}
	}
}
