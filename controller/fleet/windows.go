package fleet

import (
	"fmt"
	"slices"
	"strings"
	"time"
	_ "time/tzdata" // time zones are known wherever the program runs

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Freeze keeps changes from beginning on devices.
type Freeze struct {
	Name     string
	Selector map[string]string // empty: the whole fleet
	Reason   string
	Until    time.Time // zero: until it is deleted
}

// Maintenance lets changes begin on devices in windows only.
type Maintenance struct {
	Name     string
	Selector map[string]string
	Windows  []*dunlinv1.TimeWindow
	TimeZone string // as IANA names it: "Europe/Berlin"
}

// The limits of windows.
const (
	MaxWindows = 32
	dayMinutes = 24 * 60
)

var dayNames = [...]string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// ParseWindow reads a window as "22:00-05:00", "mon-fri 22:00-05:00" or
// "sat,sun 00:00-24:00": days, then from when to when. Its days are those on
// which it begins.
func ParseWindow(text string) (*dunlinv1.TimeWindow, error) {
	const form = "it must be like mon-fri 22:00-05:00"
	w := &dunlinv1.TimeWindow{}
	days, times, some := strings.Cut(text, " ")
	if !some {
		days, times = "", text
	}
	for part := range strings.SplitSeq(days, ",") {
		if !some {
			break
		}
		first, last, isRange := strings.Cut(part, "-")
		from := slices.Index(dayNames[:], first)
		to := from
		if isRange {
			to = slices.Index(dayNames[:], last)
		}
		if from < 0 || to < 0 {
			return nil, fmt.Errorf("days %q are not of mon, tue, wed, thu, fri, sat and sun, %s", clip(days), form)
		}
		for ; ; from = (from + 1) % 7 {
			w.Days |= 1 << from
			if from == to {
				break
			}
		}
	}
	if w.Days == 1<<7-1 {
		w.Days = 0
	}
	from, to, ok := strings.Cut(times, "-")
	begin, good := minutes(from)
	end, fine := minutes(to)
	switch {
	case !ok || !good || !fine:
		return nil, fmt.Errorf("times %q are not two of 00:00 to 24:00, %s", clip(times), form)
	case begin == dayMinutes:
		return nil, fmt.Errorf("%q begins at 24:00, the last beginning is 23:59", clip(text))
	case begin == end:
		return nil, fmt.Errorf("%q is empty; the whole day is 00:00-24:00", clip(text))
	}
	w.FromMinute, w.ToMinute = begin, end
	return w, nil
}

func minutes(s string) (uint32, bool) {
	if len(s) != 5 || s[2] != ':' {
		return 0, false
	}
	for _, i := range []int{0, 1, 3, 4} {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
	}
	h, m := uint32(s[0]-'0')*10+uint32(s[1]-'0'), uint32(s[3]-'0')*10+uint32(s[4]-'0')
	return h*60 + m, m < 60 && h*60+m <= dayMinutes
}

// FormatWindow writes a window as ParseWindow reads it; equal windows have equal
// texts.
func FormatWindow(w *dunlinv1.TimeWindow) string {
	var parts []string
	for i := 0; i < 7 && w.GetDays() != 0; i++ { // from Monday on
		day := func(i int) int { return (i + 1) % 7 }
		has := func(i int) bool { return i < 7 && w.GetDays()&(1<<day(i)) != 0 }
		if !has(i) {
			continue
		}
		last := i
		for has(last + 1) {
			last++
		}
		switch {
		case last-i >= 2:
			parts = append(parts, dayNames[day(i)]+"-"+dayNames[day(last)])
		default:
			for j := i; j <= last; j++ {
				parts = append(parts, dayNames[day(j)])
			}
		}
		i = last
	}
	times := fmt.Sprintf("%02d:%02d-%02d:%02d", w.GetFromMinute()/60, w.GetFromMinute()%60, w.GetToMinute()/60, w.GetToMinute()%60)
	if len(parts) == 0 {
		return times
	}
	return strings.Join(parts, ",") + " " + times
}

// open says whether one of the windows is open at a time, and, if none is, when
// the next one opens. Days and times are those of clocks in the zone: where
// they are put forward, what they leave out is moved by as much.
func open(windows []*dunlinv1.TimeWindow, zone *time.Location, now time.Time) (is bool, next time.Time) {
	local := now.In(zone)
	for _, w := range windows {
		length := int(w.GetToMinute()) - int(w.GetFromMinute())
		if length <= 0 {
			length += dayMinutes
		}
		for day := -1; day <= 7; day++ {
			begins := time.Date(local.Year(), local.Month(), local.Day()+day, 0, int(w.GetFromMinute()), 0, 0, zone)
			ends := time.Date(local.Year(), local.Month(), local.Day()+day, 0, int(w.GetFromMinute())+length, 0, 0, zone)
			weekday := time.Date(local.Year(), local.Month(), local.Day()+day, 12, 0, 0, 0, zone).Weekday()
			switch {
			case w.GetDays() != 0 && w.GetDays()&(1<<weekday) == 0:
			case !begins.After(now) && now.Before(ends):
				return true, time.Time{}
			case begins.After(now) && (next.IsZero() || begins.Before(next)):
				next = begins
			}
		}
	}
	return false, next.UTC()
}

// zoned is a maintenance with its time zone.
type zoned struct {
	Maintenance
	zone *time.Location
}

// Closed says why no change may begin on a device at a time: a freeze, or that
// a maintenance window is not open; empty: it may. opens is when it may, zero:
// not known. Where several match the device, all of them must let it.
func (c *Compiler) Closed(d Device, now time.Time) (why string, opens time.Time) {
	at, known := now, true
	for _, f := range c.freezes {
		if !Matches(f.Selector, d) || !f.Until.IsZero() && !now.Before(f.Until) {
			continue
		}
		if why == "" {
			why = fmt.Sprintf("freeze %s: %s", f.Name, f.Reason)
		}
		if f.Until.IsZero() {
			known = false
		} else if f.Until.After(at) {
			at = f.Until
		}
	}
	var matching []zoned
	for _, m := range c.maintenances {
		if Matches(m.Selector, d) {
			matching = append(matching, m)
		}
	}
	if why == "" && len(matching) == 0 {
		return "", time.Time{}
	}
	// Each round goes on to when one of them opens; windows of several that
	// never overlap are given up.
	for range 100 {
		moved := false
		for _, m := range matching {
			is, next := open(m.Windows, m.zone, at)
			if is {
				continue
			}
			if why == "" {
				why = fmt.Sprintf("maintenance %s opens at %s", m.Name, next.In(m.zone).Format("Mon 15:04 MST"))
			}
			if next.IsZero() {
				return why, time.Time{}
			}
			at, moved = next, true
		}
		if !moved {
			if why == "" || !known {
				return why, time.Time{}
			}
			return why, at.UTC()
		}
	}
	return why, time.Time{}
}
