package dispatch

import (
	"cmp"
	"slices"
	"time"
)

// A boot id is made at each start of an agent: one that is heard again after
// another one was shows that two agents with one identity are alive.

const (
	// maxTwins bounds the agents that are remembered of one device.
	maxTwins = 8
	// twinsStay is how long an agent that is heard no more counts as alive:
	// one that was told to stand down comes back after an hour.
	twinsStay = 3 * time.Hour
)

// twin is one agent that speaks as a device.
type twin struct {
	boot, hostname string
	first, last    time.Time // hello
	down           bool      // it was told to stand down
	beside         bool      // it was alive while another one was, and not before that one's start only
}

// twins are the agents that speak as one device, of which there should be one.
type twins struct {
	all     []twin // by first hello
	current string // boot id of the last hello
	proven  bool   // that there are several
}

// hello takes in that an agent said hello. It says whether the agent should
// stand down, for which other one, and whether what is known has changed.
func (t *twins) hello(boot, hostname string, now time.Time) (down bool, kept twin, changed bool) {
	was := t.proven
	t.all = slices.DeleteFunc(t.all, func(o twin) bool { return o.boot != boot && now.Sub(o.last) > twinsStay })
	i := slices.IndexFunc(t.all, func(o twin) bool { return o.boot == boot })
	returns := i >= 0 && t.current != boot
	if i < 0 {
		if len(t.all) == maxTwins { // the one that was silent for longest
			j := slices.IndexFunc(t.all, func(o twin) bool {
				return o.last.Equal(slices.MinFunc(t.all, func(a, b twin) int { return a.last.Compare(b.last) }).last)
			})
			t.all = slices.Delete(t.all, j, j+1)
		}
		t.all = append(t.all, twin{boot: boot, first: now})
		i = len(t.all) - 1
	}
	t.all[i].last, t.all[i].hostname = now, hostname
	if returns {
		// Both are alive. The one that was there first stays, but for one that
		// has stood down.
		j := slices.IndexFunc(t.all, func(o twin) bool { return o.boot == t.current })
		if j >= 0 {
			t.proven = true
			loser := i
			if cmp.Or(compareBool(t.all[i].down, t.all[j].down), t.all[i].first.Compare(t.all[j].first)) < 0 {
				loser = j
			}
			changed = !t.all[loser].down || !t.all[i].beside || !t.all[j].beside
			t.all[i].beside, t.all[j].beside = true, true
			t.all[loser].down, t.all[i+j-loser].down = true, false
		}
	}
	t.current = boot
	if len(t.all) == 1 {
		t.proven, t.all[0].down, t.all[0].beside = false, false, false
	}
	changed = changed || was != t.proven
	for _, o := range slices.Backward(t.all) {
		if !o.down && (kept.boot == "" || o.beside || !kept.beside) { // the first, of those that are named where one is
			kept = o
		}
	}
	return t.all[i].down, kept, changed
}

// seen gives the agents that were alive beside each other: one that ended
// before the others began is not among them.
func (t *twins) seen() (all []twin) {
	for _, o := range t.all {
		if o.beside {
			all = append(all, o)
		}
	}
	return all
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}
