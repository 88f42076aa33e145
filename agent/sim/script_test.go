package sim

import (
	"strings"
	"testing"
	"time"
)

func TestParseScript(t *testing.T) {
	got, err := ParseScript("faults.yaml", []byte("# two faults at once\n- at: 1h30m\n  ambient_celsius: -5.5\n  nvml: lost\n- {at: 90s, xid: 79}\n"))
	if err != nil || len(got) != 3 || got[0] != (Event{At: 90 * time.Minute, Fault: "ambient_celsius", Value: -5.5}) || got[1] != (Event{At: 90 * time.Minute, Fault: "nvml", Value: 1}) || got[2] != (Event{At: 90 * time.Second, Fault: "xid", Value: 79}) {
		t.Errorf("%v, %v", got, err)
	}
	_, err = ParseScript("f", []byte(`- at: 1x
  xid: 0
- xid: 1.5
  teapot: 1
- at: 1s
- 7
- at: 1s
  nvml: away
  ambient_celsius: [1]
  failing_fraction: .nan
  failing_fraction: 1
- at: 1s
  at: 2s
  slow_factor: 0.5
`))
	want := []string{
		`f:1:7: at: is "1x", it must be a duration like 90s or 1h30m, from 0s to`,
		"f:2:8: xid: is 0, allowed are 1 to 1000",
		"f:3:8: xid: is 1.5, it must be whole",
		"f:4:3: teapot: is not known, known are at, version, ",
		"f:3:3: at: is missing",
		"f:5:3: no fault is named",
		"f:6:3: each entry must be a mapping",
		`f:8:9: nvml: is "away", it must be back or lost`,
		`f:9:20: ambient_celsius: is "", it must be a number of -60 to 150`,
		`f:10:21: failing_fraction: is`,
		"f:11:3: failing_fraction: is there twice",
		"f:13:3: at: is there twice",
		"f:14:16: slow_factor: is 0.5, allowed are 1 to 1e+06",
	}
	if err == nil {
		t.Fatal("nothing is wrong with it")
	}
	lines := strings.Split(err.Error(), "\n")
	for i, w := range want {
		if i >= len(lines) || !strings.HasPrefix(lines[i], w) {
			t.Errorf("fault %d: want %s of\n%v", i, w, err)
			break
		}
	}
	if len(lines) != len(want) {
		t.Errorf("%d faults, want %d:\n%v", len(lines), len(want), err)
	}
	for text, want := range map[string]string{
		"":                                 "f:1:1: it holds 0 values",
		"at: 1s":                           "f:1:1: it must be a sequence",
		"- a\n---\n- b":                    "f:1:1: it holds 2 values",
		"- &a {at: 1s}":                    "anchors",
		strings.Repeat("[", 100):           "nest deeper",
		strings.Repeat("#", MaxScript+1):   "the limit is 65536",
		strings.Repeat("- {x: 1}\n", 100):  "only the first 20 are shown",
		strings.Repeat("- {x: 1}\n", 5000): "tokens, the limit is",
		"- {at: 1s, xid: 1":                "f:1:",
	} {
		if _, err := ParseScript("f", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %s", text, err, want)
		}
	}
}

// Whatever is read, it is refused, or a device takes it.
func FuzzParseScript(f *testing.F) {
	for _, s := range []string{"- at: 1h\n  nvml: lost\n", "- {at: 90s, xid: 79, worker: crash}\n", "- at: 1s\n  slow_factor: 1e3\n", "- - a", "{", "- ? a", "- at: !!str 1s", "- \"at\": 1s\n  'xid': 0x10", "- at: 1s\n  xid: 1_0"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		events, err := ParseScript("f", b)
		if err != nil && events != nil {
			t.Fatalf("%v, %v", events, err)
		}
		d, err := New(Config{Profile: board, Script: events})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.core.advance(maxAt)
		if d.core.now != maxAt || d.core.used != 0 {
			t.Fatalf("%+v", d.core)
		}
	})
}
