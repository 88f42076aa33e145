package reconcile

import (
	"cmp"
	"slices"
	"time"
)

// smallBundle is the size up to which a bundle is small: it does not wait
// until a large one has come.
const smallBundle = 16 << 20

// The order of downloads: the larger priority first, then the smaller bundle.
// One of a larger priority takes the place of one that is under way, which
// goes on later from where it was; one that is under way with a larger
// priority has the link for itself, but for small ones of the same. Of equal
// priority, one large one runs at a time, so that a place is left for small
// ones.
func compareFetches(a, b *version) int {
	return cmp.Or(cmp.Compare(b.delivery.GetPriority(), a.delivery.GetPriority()), cmp.Compare(a.size, b.size), compareKeys(a.key, b.key))
}

func (v *version) small() bool { return v.size > 0 && v.size <= smallBundle }

// admitFetches begins the downloads that are due, of the versions that wait
// for one, and gives up those whose place they take.
func (c *core) admitFetches(acts []action, waiting []*version) []action {
	slices.SortFunc(waiting, compareFetches)
	var under []*version
	for _, v := range c.sorted() {
		if v.busy == fetching {
			under = append(under, v)
		}
	}
	for _, v := range waiting {
		if c.bundleBusy(v) {
			continue // by one that was begun just now
		}
		priority := v.delivery.GetPriority()
		blocked := 0 // places taken that it may not take over
		large := false
		for _, u := range under {
			switch p := u.delivery.GetPriority(); {
			case p > priority:
				blocked = busyLimit[fetching]
			case p == priority:
				blocked++
				large = large || !u.small()
			}
		}
		if blocked >= busyLimit[fetching] || large && !v.small() {
			continue
		}
		leaving := false
		for _, u := range under {
			if u.delivery.GetPriority() < priority {
				leaving = true
				if !u.cancelled {
					u.cancelled = true
					acts = append(acts, action{op: cancelling, key: u.key})
				}
			}
		}
		under = append(under, v)
		if leaving {
			continue // it begins when they have left, and nothing in its place
		}
		v.waitsFor = ""
		acts = c.begin(acts, fetching, v)
	}
	return acts
}

// hold takes in that a download waits for something that is no fault.
func (v *version) hold(w *WaitError, now time.Time) {
	v.waitsFor, v.failure, v.failures = w.Cause, "", 0
	v.notBefore = later(w.Until, now.Add(time.Second))
}
