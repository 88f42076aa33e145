package dispatch

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// What the agents of one device are told, hello by hello.
func TestTwins(t *testing.T) {
	for name, test := range map[string]struct {
		hellos string // boot ids, in order, a minute apart; a digit waits for as many hours
		down   string // those that are told to stand down, in order
		proven bool   // in the end
	}{
		"one":                            {"aaa", "", false},
		"restarts":                       {"abcd", "", false},
		"a clone":                        {"aba", "", true},
		"a clone comes again":            {"abab", "b", true},
		"the clone was first":            {"bab", "", true},
		"three":                          {"abcabc", "bc", true},
		"the kept one restarts":          {"abacb", "b", true},
		"the kept one restarts, and so":  {"abacbcb", "bb", true},
		"the clone is gone":              {"aba4a", "", false},
		"the clone comes every hour":     {"aba1ba1ba", "bb", true},
		"both are silent, then only one": {"aba4b", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			var tw twins
			now := time.Unix(0, 0)
			var down strings.Builder
			for _, c := range test.hellos {
				if c >= '0' && c <= '9' {
					now = now.Add(time.Duration(c-'0') * time.Hour)
					continue
				}
				now = now.Add(time.Minute)
				if is, _, _ := tw.hello(string(c), "host-"+string(c), now); is {
					down.WriteString(string(c))
				}
			}
			if down.String() != test.down || tw.proven != test.proven {
				t.Errorf("%q are told to stand down, want %q; proven: %t", down.String(), test.down, tw.proven)
			}
		})
	}
}

// An agent that ended before the clone was there is not named as one more.
func TestTwinsSeen(t *testing.T) {
	var tw twins
	now := time.Unix(0, 0)
	var kept twin
	for _, boot := range []string{"old", "a", "b", "a", "b"} {
		now = now.Add(time.Minute)
		_, kept, _ = tw.hello(boot, "host-"+boot, now)
	}
	var seen []string
	for _, o := range tw.seen() {
		seen = append(seen, o.boot)
	}
	if fmt.Sprint(seen) != "[a b]" || kept.boot != "a" {
		t.Errorf("seen are %q, kept is %q", seen, kept.boot)
	}
}

// However agents come and go, one of those that are alive stays, and an agent
// that restarts alone is never taken for two.
func TestTwinsAlways(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tw twins
		now := time.Unix(0, 0)
		agents := rapid.IntRange(1, 4).Draw(t, "agents")
		boots := make([]int, agents)
		for range rapid.IntRange(1, 60).Draw(t, "hellos") {
			i := rapid.IntRange(0, agents-1).Draw(t, "agent")
			if rapid.Bool().Draw(t, "restarts") {
				boots[i]++
			}
			now = now.Add(time.Duration(rapid.IntRange(1, 100).Draw(t, "minutes")) * time.Minute)
			down, kept, _ := tw.hello(fmt.Sprintf("%d-%d", i, boots[i]), "h", now)
			if agents == 1 && (down || tw.proven) {
				t.Fatal("one agent is taken for two")
			}
			if kept.boot == "" || len(tw.all) > maxTwins {
				t.Fatalf("kept %q of %d", kept.boot, len(tw.all))
			}
		}
	})
}
