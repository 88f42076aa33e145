package reconcile

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/agent/engine"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// work lets what is under way succeed until nothing is, without that time
// passes.
func (w *world) work() {
	for step := 0; ; step++ {
		w.begin()
		if len(w.busy) == 0 {
			return
		}
		for k := range w.busy {
			w.end(k, outcome{})
		}
		if step > 1000 {
			w.complain("does not come to rest: %v", w.log[len(w.log)-20:])
			return
		}
	}
}

func (w *world) wait(d time.Duration) { w.now = w.now.Add(d) }

func doc(versions ...*dunlinv1.DesiredVersion) *dunlinv1.DesiredDocument {
	return &dunlinv1.DesiredDocument{Versions: versions}
}

func TestProbation(t *testing.T) {
	v1, v2, v3 := wantVersion("m", 1, "one"), wantVersion("m", 2, "two"), wantVersion("m", 3, "three")
	inPlace := wantVersion("m", 2, "two")
	inPlace.InPlace = true
	noMemory := outcome{err: engine.ErrOutOfMemory, noMemory: true, wait: time.Minute}
	// proven has version 1 serve and prove itself, and version 2 wanted.
	proven := func(w *world, then *dunlinv1.DesiredVersion) {
		w.desire(doc(v1))
		w.settle()
		w.log = nil
		w.desire(doc(then))
	}
	reverted := func(w *world, reason string) {
		v := w.core.desired["m"]
		if !v.reverted || !strings.Contains(v.quarantine, reason) || v.wire() != dunlinv1.VersionState_VERSION_STATE_QUARANTINED {
			w.complain("reverted: %v, %q, want %q", v.reverted, v.quarantine, reason)
		}
	}
	tests := []struct {
		name string
		run  func(w *world)
		want string
	}{
		{"the old one stands by until the new one has proven itself by its runs", func(w *world) {
			proven(w, v2)
			w.work()
			w.counts[keyOf(v2).id] = Counts{Succeeded: 99}
			w.wait(time.Minute)
			w.work()
			if w.loaded[keyOf(v1).id] == "" || !w.core.versions[keyOf(v1)].good {
				w.complain("version 1 is gone")
			}
			w.counts[keyOf(v2).id] = Counts{Succeeded: 100}
			w.work()
		}, "fetch m:2, check m:2, load m:2, serve m:2, unload m:1, remove m:1"},
		{"not before the least time", func(w *world) {
			proven(w, v2)
			w.work()
			w.counts[keyOf(v2).id] = Counts{Succeeded: 1e6}
			w.wait(29 * time.Second)
			w.work()
		}, "fetch m:2, check m:2, load m:2, serve m:2"},
		{"requests fail", func(w *world) {
			proven(w, v2)
			w.work()
			w.counts[keyOf(v2).id] = Counts{Succeeded: 40, Failed: 4}
			w.work()
			w.counts[keyOf(v2).id] = Counts{Succeeded: 40, Failed: 5}
			w.work()
			reverted(w, "5 of 45 requests failed, which is more than the 0 % of the version before it by over 10 %")
			w.settle()
			w.desire(doc(v2)) // a new generation
			w.settle()
		}, "fetch m:2, check m:2, load m:2, serve m:2, serve m:1, unload m:2"},
		{"requests fail as they did before", func(w *world) {
			proven(w, v2)
			w.counts[keyOf(v1).id] = Counts{Succeeded: 80, Failed: 20}
			w.work()
			w.counts[keyOf(v2).id] = Counts{Succeeded: 71, Failed: 29}
			w.settle()
		}, "fetch m:2, check m:2, load m:2, serve m:2, unload m:1, remove m:1"},
		{"a run stalls", func(w *world) {
			proven(w, v2)
			w.work()
			w.counts[keyOf(v2).id] = Counts{Succeeded: 40, Stalled: 1}
			w.work()
			reverted(w, "1 of its runs made no progress")
		}, "fetch m:2, check m:2, load m:2, serve m:2, serve m:1, unload m:2"},
		{"the worker crashes", func(w *world) {
			proven(w, v2)
			w.work()
			w.core.lost(keyOf(v2).id, "it crashed twice", true, w.now)
			w.work()
			reverted(w, "it crashed twice")
		}, "fetch m:2, check m:2, load m:2, serve m:2, withdraw m:2, serve m:1, unload m:2"},
		{"it is lost", func(w *world) {
			proven(w, v2)
			w.work()
			w.core.lost(keyOf(v2).id, "the new child could not open it", false, w.now)
			w.work()
			reverted(w, "could not open")
		}, "fetch m:2, check m:2, load m:2, serve m:2, withdraw m:2, serve m:1, unload m:2"},
		{"both are lost: the good one is brought back, after a check", func(w *world) {
			proven(w, v2)
			w.work()
			w.core.lost(keyOf(v1).id, "not opened", false, w.now)
			w.core.lost(keyOf(v2).id, "not opened", true, w.now)
			w.work()
			reverted(w, "not opened")
		}, "fetch m:2, check m:2, load m:2, serve m:2, withdraw m:2, unload m:2, unload m:1, check m:1, load m:1, serve m:1"},
		{"the good one is lost while the new one is fetched: it does not wait for that", func(w *world) {
			proven(w, v2)
			w.begin()
			w.core.lost(keyOf(v1).id, "not opened", false, w.now)
			for range 3 { // unloaded, checked, loaded
				w.begin()
				w.end(keyOf(v1), outcome{})
			}
			w.begin()
			w.end(keyOf(v2), outcome{})
			w.begin()
		}, "fetch m:2, withdraw m:1, unload m:1, check m:1, load m:1, serve m:1, check m:2"},
		{"another is wanted meanwhile: the good one stays the good one", func(w *world) {
			proven(w, v2)
			w.work()
			w.desire(doc(v3))
			w.work()
			w.counts[keyOf(v3).id] = Counts{Failed: 5}
			w.work()
			reverted(w, "5 of 5 requests failed")
		}, "fetch m:2, check m:2, load m:2, serve m:2, fetch m:3, check m:3, load m:3, serve m:3, unload m:2, remove m:2, serve m:1, unload m:3"},
		{"the first has not proven itself: it is the best there is", func(w *world) {
			w.desire(doc(v1))
			w.work()
			w.log = nil
			w.desire(doc(v2))
			w.work()
			w.counts[keyOf(v2).id] = Counts{Failed: 5}
			w.work()
		}, "fetch m:2, check m:2, load m:2, serve m:2, serve m:1, unload m:2"},
		{"there is none to go back to", func(w *world) {
			w.desire(doc(v1))
			w.work()
			w.counts[keyOf(v1).id] = Counts{Failed: 500}
			w.settle()
		}, "fetch m:1, check m:1, load m:1, serve m:1"},
		{"back to the old one by the controller, and to the new one again", func(w *world) {
			proven(w, v2)
			w.work()
			w.counts[keyOf(v2).id] = Counts{Failed: 5}
			w.work()
			w.log = nil
			w.desire(doc(v1))
			w.work()
			delete(w.counts, keyOf(v2).id)
			w.desire(doc(v2))
			w.work()
		}, "remove m:2, fetch m:2, check m:2, load m:2, serve m:2"},
		{"same name, other bytes", func(w *world) {
			other := wantVersion("m", 1, "other")
			proven(w, other)
			w.work()
			w.counts[keyOf(other).id] = Counts{Failed: 5}
			w.work()
			reverted(w, "5 of 5")
		}, "fetch m:1, check m:1, withdraw m:1, unload m:1, load m:1, serve m:1, withdraw m:1, unload m:1, load m:1, serve m:1"},
		{"in place has no meaning where both fit", func(w *world) {
			proven(w, inPlace)
			w.work()
		}, "fetch m:2, check m:2, load m:2, serve m:2"},
		{"in place, and back", func(w *world) {
			proven(w, inPlace)
			w.begin()
			w.end(keyOf(inPlace), outcome{})
			w.begin()
			w.end(keyOf(inPlace), noMemory)
			w.begin()
			if !w.core.changing["m"] {
				w.complain("requests do not wait")
			}
			w.work()
			if w.core.changing["m"] {
				w.complain("requests wait for ever")
			}
			w.wait(time.Minute)
			w.work()
			w.counts[keyOf(inPlace).id] = Counts{Failed: 5}
			w.work()
			reverted(w, "5 of 5")
		}, "fetch m:2, check m:2, withdraw m:1, unload m:1, check m:2, load m:2, serve m:2, withdraw m:2, unload m:2, load m:1, serve m:1"},
		{"in place, and too large even so", func(w *world) {
			proven(w, inPlace)
			w.begin()
			w.end(keyOf(inPlace), outcome{})
			w.begin()
			w.end(keyOf(inPlace), outcome{})
			w.begin()
			w.end(keyOf(inPlace), noMemory) // the load
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin()
			w.end(keyOf(inPlace), noMemory)
			w.settle()
			reverted(w, "also in the place of the version before it: ")
		}, "fetch m:2, check m:2, load m:2, withdraw m:1, unload m:1, load m:2, load m:1, serve m:1"},
		{"too little memory, and not in place", func(w *world) {
			proven(w, v2)
			w.begin()
			w.end(keyOf(v2), outcome{})
			w.begin()
			w.end(keyOf(v2), noMemory)
			w.begin()
		}, "fetch m:2, check m:2"},
		{"another is wanted while the old one is out", func(w *world) {
			proven(w, inPlace)
			w.begin()
			w.end(keyOf(inPlace), outcome{})
			w.begin()
			w.end(keyOf(inPlace), noMemory)
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin() // checks version 2
			w.desire(doc(v3))
			w.begin()
			w.end(keyOf(inPlace), outcome{err: errors.New("cancelled")})
			w.work()
		}, "fetch m:2, check m:2, withdraw m:1, unload m:1, check m:2, cancel m:2, load m:1, serve m:1, fetch m:3, check m:3, load m:3, serve m:3, remove m:2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t.Errorf)
			tt.run(w)
			if got := strings.Join(w.log, ", "); got != tt.want {
				t.Errorf("got:  %s\nwant: %s", got, tt.want)
			}
		})
	}
}

// disk is what a crash leaves: the document, and the rows that were stored.
type disk struct {
	doc  *dunlinv1.DesiredDocument
	rows map[key]version
}

// save stores what Reconciler.save does.
func (w *world) save(d *disk) {
	d.rows = map[key]version{}
	for k, v := range w.core.versions {
		d.rows[k] = version{key: k, good: v.good, admitted: v.admitted, trials: v.trials, resumes: v.resumes, reverted: v.reverted, quarantine: v.quarantine}
	}
}

// restart begins anew with what is on disk, as Reconciler.restore does.
func (w *world) restart(d *disk) {
	w.core = newCore()
	w.loaded, w.serving, w.busy = map[engine.VersionID]digest.Digest{}, map[string]key{}, map[key]action{}
	clear(w.counts)
	w.core.setDesired(d.doc, w.now)
	for k, row := range d.rows {
		v := w.core.add(k, w.now)
		v.good, v.admitted, v.trials, v.resumes = row.good, row.admitted, row.trials, row.resumes && row.admitted
		if row.reverted {
			v.quarantine, v.reverted = row.quarantine, true
		}
	}
	for k, v := range w.core.versions {
		if w.onDisk[k.digest] && v.admitted {
			v.stage = stored
		} else {
			v.gone()
		}
	}
	w.core.interrupted(w.now)
}

// Where the bundle of the good version is gone at a start, what served on
// probation stands in, and the good one is fetched again, as what there is to go
// back to.
func TestStandsIn(t *testing.T) {
	v1, v2, v3 := wantVersion("m", 1, "one"), wantVersion("m", 2, "two"), wantVersion("m", 3, "three")
	// begun has version 1 prove itself and version 2 serve on probation; then
	// another document comes, and a power cut, after which version 1 is gone.
	begun := func(w *world, meanwhile func(), then *dunlinv1.DesiredVersion) {
		kept := &disk{doc: doc(then)}
		w.desire(doc(v1))
		w.settle()
		w.desire(doc(v2))
		w.work()
		meanwhile()
		w.desire(doc(then))
		w.save(kept)
		delete(w.onDisk, keyOf(v1).digest)
		w.restart(kept)
		w.log = nil
	}
	nothing := func(*world) func() { return func() {} }
	tests := []struct {
		name      string
		meanwhile func(w *world) func()
		then      *dunlinv1.DesiredVersion
		run       func(w *world)
		want      string
	}{
		{"another is wanted, and is not there", nothing, v3, func(w *world) {
			w.begin()
			for range 2 { // checked, loaded
				w.end(keyOf(v2), outcome{})
				w.begin()
			}
			if v := w.core.serving["m"]; v == nil || v.key != keyOf(v2) || v.good || !w.core.versions[keyOf(v1)].good {
				w.complain("version 2 does not stand in for version 1: %+v", v)
			}
			w.work()
		}, "check m:2, load m:2, serve m:2, fetch m:3, check m:3, fetch m:1, load m:3, serve m:3, unload m:2, remove m:2"},
		{"it is what is wanted", nothing, v2, func(w *world) {
			w.work()
			w.counts[keyOf(v2).id] = Counts{Failed: 5}
			w.work()
			if v := w.core.versions[keyOf(v2)]; !v.reverted {
				w.complain("there is no way back: %+v", v)
			}
		}, "check m:2, fetch m:1, load m:2, serve m:2, check m:1, load m:1, serve m:1, unload m:2"},
		{"it proves itself first: the old one is given up", nothing, v2, func(w *world) {
			w.begin()
			for range 2 {
				w.end(keyOf(v2), outcome{})
				w.begin()
			}
			w.counts[keyOf(v2).id] = Counts{Succeeded: 100}
			w.wait(time.Minute)
			w.begin()
			w.end(keyOf(v1), outcome{err: errors.New("cancelled")})
			w.work()
		}, "check m:2, fetch m:1, load m:2, serve m:2, cancel m:1, remove m:1"},
		{"the device has gone back from it", func(w *world) func() {
			return func() {
				w.counts[keyOf(v2).id] = Counts{Failed: 5}
				w.work()
			}
		}, v2, func(w *world) { w.work() }, "fetch m:1, check m:1, load m:1, serve m:1"},
		{"the device has gone back from it, and another is wanted", func(w *world) func() {
			return func() {
				w.counts[keyOf(v2).id] = Counts{Failed: 5}
				w.work()
			}
		}, v3, func(w *world) {
			w.begin()
			w.end(keyOf(v3), outcome{err: errors.New("no network"), wait: time.Minute})
			w.work()
		}, "fetch m:3, fetch m:1, check m:1, load m:1, serve m:1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t.Errorf)
			begun(w, tt.meanwhile(w), tt.then)
			tt.run(w)
			if got := strings.Join(w.log, ", "); got != tt.want {
				t.Errorf("got:  %s\nwant: %s", got, tt.want)
			}
		})
	}
}

// Versions of which some are bad come and go, the device crashes at any moment
// and loses what was not stored: a version that has proven itself stays on the
// disk, and where nothing has broken it loaded, until another one has; and in
// the end the wanted version serves, or it is bad and the last good one does.
func TestGoesBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t.Fatalf)
		kept := &disk{doc: doc(), rows: map[key]version{}}
		bad := map[engine.VersionID]int{}
		for n := range int64(4) {
			bad[engine.VersionID{Model: "m", Version: n + 1}] = rapid.IntRange(0, 5).Draw(t, "bad") // 3 and more: good
		}
		var good key // that has proven itself last
		act := func() {
			was := good
			if v := w.core.serving["m"]; v != nil && v.quarantine == "" {
				id := v.id
				switch bad[id] {
				case 0: // fails
					w.counts[id] = Counts{Succeeded: w.counts[id].Succeeded, Failed: w.counts[id].Failed + 3}
				case 1: // crashes
					if rapid.Bool().Draw(t, "crashes") {
						w.core.lost(id, "crashed twice", true, w.now)
					}
				default:
					w.counts[id] = Counts{Succeeded: w.counts[id].Succeeded + 30}
				}
			}
			// Moments before the next save.
			switch rapid.IntRange(0, 29).Draw(t, "ends") {
			case 0: // a power cut, after which a bundle may be gone
				if v := w.core.versions[good]; v != nil && rapid.IntRange(0, 3).Draw(t, "gone") == 0 {
					delete(w.onDisk, good.digest)
				}
				w.restart(kept)
			case 1:
				w.core.stopped()
				w.save(kept)
				w.restart(kept)
			}
			w.begin()
			for k, v := range w.core.versions {
				if v.good && w.core.serving["m"] == v {
					good = k
				}
			}
			w.save(kept)
			if was != (key{}) && was == good && w.core.desired["m"] != nil {
				if v := w.core.versions[good]; v == nil || !v.good || !w.onDisk[good.digest] && v.stage != absent {
					t.Fatalf("%v was good, and is gone: %v", good, w.log)
				}
			}
			serves := w.core.serving["m"]
			if serves != nil && w.loaded[serves.id] != serves.digest {
				t.Fatalf("%v serves, and is not loaded", serves.key)
			}
			if v := w.core.versions[good]; v != nil && v.good && v.stage == stored && v.due(w.now) && w.core.desired["m"] != nil && (serves == nil || serves.quarantine != "" && !serves.good) {
				under := false
				for k, a := range w.busy { // what is cancelled is over at once
					under = under || a.op != fetching || w.core.versions[k].cancelled
				}
				if !under {
					t.Fatalf("%v could serve, and nothing is done for it: %v", good, w.log)
				}
			}
			if a, busy := w.busy[good]; busy && a.op == unloading && serves != nil && !serves.good && serves.quarantine == "" && !w.core.versions[good].broken {
				t.Fatalf("%v is unloaded, and %v has not proven itself: %v", good, serves.key, w.log)
			}
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			switch rapid.IntRange(0, 7).Draw(t, "step") {
			case 0:
				n := rapid.Int64Range(1, 4).Draw(t, "version")
				v := wantVersion("m", n, fmt.Sprint(n))
				v.InPlace = rapid.Bool().Draw(t, "in place")
				kept.doc = doc(v)
				w.desire(kept.doc)
			case 1:
				w.wait(time.Duration(rapid.IntRange(1, 700).Draw(t, "seconds")) * time.Second)
			default:
				for _, v := range w.core.sorted() {
					a, busy := w.busy[v.key]
					if !busy || rapid.Bool().Draw(t, "goes on") {
						continue
					}
					o := outcome{wait: time.Second}
					switch rapid.IntRange(0, 5).Draw(t, "how") {
					case 0:
						o.err = errors.New("passing")
					case 1:
						if a.op == checking || a.op == loading {
							o.err, o.noMemory = engine.ErrOutOfMemory, true
						}
					}
					w.end(v.key, o)
					break
				}
			}
			act()
		}
		for range 300 { // more than enough for everything to end
			for k := range w.busy {
				w.end(k, outcome{})
			}
			if v := w.core.serving["m"]; v != nil {
				if bad[v.id] < 2 && v.quarantine == "" {
					w.counts[v.id] = Counts{Failed: 100}
				} else {
					w.counts[v.id] = Counts{Succeeded: 100}
				}
			}
			w.wait(5 * time.Second)
			w.begin()
			if len(w.busy) == 0 && w.core.wake(w.now).IsZero() {
				break // nothing would change any more
			}
		}
		want, serves := w.core.desired["m"], w.core.serving["m"]
		switch {
		case want == nil:
		case serves == nil && (want.quarantine == "" || w.core.proven(want) != nil):
			t.Fatalf("nothing serves: %+v: %v", want, w.log)
		case serves != nil && serves != want && (want.quarantine == "" || !serves.good):
			t.Fatalf("%+v serves, wanted is %+v: %v", serves, want, w.log)
		case serves == want && bad[want.id] < 2 && w.core.fallback(want) != nil:
			t.Fatalf("a bad version serves: %+v: %v", want, w.log)
		}
		if len(w.core.changing) > 0 {
			t.Fatalf("requests wait for ever: %v", w.core.changing)
		}
	})
}
