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

// world is what the core's actions act upon.
type world struct {
	core     *core
	now      time.Time
	onDisk   map[digest.Digest]bool
	loaded   map[engine.VersionID]digest.Digest
	serving  map[string]key
	busy     map[key]action
	counts   map[engine.VersionID]Counts
	complain func(format string, args ...any)
	log      []string
}

func newWorld(complain func(string, ...any)) *world {
	return &world{
		core: newCore(), now: time.Unix(1e9, 0), onDisk: map[digest.Digest]bool{}, loaded: map[engine.VersionID]digest.Digest{},
		serving: map[string]key{}, busy: map[key]action{}, counts: map[engine.VersionID]Counts{}, complain: complain,
	}
}

func digestOf(s string) digest.Digest { return digest.FromString(s) }

func wantVersion(model string, version int64, bytes string) *dunlinv1.DesiredVersion {
	return &dunlinv1.DesiredVersion{Deployment: model, Model: model, Version: version, Digest: digestOf(bytes).String(), SizeBytes: 100}
}

func route(name string, targets ...*dunlinv1.RouteTarget) *dunlinv1.DesiredRoute {
	return &dunlinv1.DesiredRoute{Name: name, Targets: targets}
}

func target(model string, version int64) *dunlinv1.RouteTarget {
	return &dunlinv1.RouteTarget{Model: model, Version: version, Weight: 1}
}

// begin takes what the core wants done and checks that it may be.
func (w *world) begin() {
	w.core.judge(func(id engine.VersionID) (Counts, bool) { n, ok := w.counts[id]; return n, ok }, w.now)
	for again := true; again; {
		acts := w.core.next(w.now)
		again = len(acts) > 0
		for _, a := range acts {
			w.check(a)
		}
	}
}

func (w *world) check(a action) {
	w.log = append(w.log, a.op.String()+" "+a.key.id.String())
	model := a.key.id.Model
	switch a.op {
	case serving:
		if w.loaded[a.key.id] != a.key.digest || w.core.versions[a.key].quarantine != "" {
			w.complain("serve %v, which cannot run", a.key)
		}
		w.serving[model] = a.key
	case withdrawing:
		want := w.core.desired[model]
		if v := w.core.versions[a.key]; want != nil && want.id != v.id && !v.broken && !want.swaps && !v.swapped {
			w.complain("withdraw %v, which is wanted", a.key)
		}
		delete(w.serving, model)
	case routing:
	case cancelling:
		if _, busy := w.busy[a.key]; !busy {
			w.complain("cancel %v, which is not busy", a.key)
		}
	default:
		if _, busy := w.busy[a.key]; busy {
			w.complain("%v %v, which is busy", a.op, a.key)
		}
		switch a.op {
		case checking, loading:
			if !w.onDisk[a.key.digest] {
				w.complain("%v %v, which is not on disk", a.op, a.key)
			}
		case unloading, removing:
			if w.serving[model] == a.key {
				w.complain("%v %v, which serves", a.op, a.key)
			}
			if v := w.core.versions[a.key]; w.core.desired[model] == v && !v.broken && v.quarantine == "" {
				w.complain("%v %v, which is wanted", a.op, a.key)
			}
			if a.op == removing && w.core.versions[a.key].good && w.core.desired[model] != nil {
				w.complain("%v %v, the last good one", a.op, a.key)
			}
		}
		w.busy[a.key] = a
	}
}

// end ends what a version is busy with.
func (w *world) end(k key, o outcome) {
	a := w.busy[k]
	delete(w.busy, k)
	if o.err == nil {
		switch a.op {
		case fetching:
			w.onDisk[k.digest] = true
		case checking, loading:
			if !w.onDisk[k.digest] {
				o = outcome{err: errLost, lost: true}
				break
			}
			if a.op == loading {
				if other, ok := w.loaded[k.id]; ok {
					w.complain("load %v beside %v", k, other)
				}
				w.loaded[k.id] = k.digest
			}
		case unloading:
			delete(w.loaded, k.id)
			delete(w.counts, k.id)
		case removing:
			if !a.keepFiles {
				delete(w.onDisk, k.digest)
			}
		}
	}
	w.core.done(k, o, w.now)
}

// settle lets everything succeed until nothing is left to do.
func (w *world) settle() {
	for step := 0; ; step++ {
		w.begin()
		if len(w.busy) == 0 {
			at := w.core.wake(w.now)
			if at.IsZero() {
				return
			}
			w.now = at
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

func (w *world) desire(doc *dunlinv1.DesiredDocument) { w.core.setDesired(doc, w.now) }

func TestCoreSteps(t *testing.T) {
	v1, v2, bad := wantVersion("m", 1, "one"), wantVersion("m", 2, "two"), wantVersion("m", 3, "bad")
	doc := func(v ...*dunlinv1.DesiredVersion) *dunlinv1.DesiredDocument {
		return &dunlinv1.DesiredDocument{Versions: v}
	}
	permanent := outcome{err: errors.New("not a model"), permanent: true}
	tests := []struct {
		name string
		run  func(w *world)
		want string
	}{
		{"first version", func(w *world) {
			w.desire(doc(v1))
			w.settle()
		}, "fetch m:1, check m:1, load m:1, serve m:1"},
		{"next version", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			w.desire(doc(v2))
			w.settle()
		}, "fetch m:2, check m:2, load m:2, serve m:2, unload m:1, remove m:1"},
		{"nothing wanted any more", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			w.desire(doc())
			w.settle()
		}, "withdraw m:1, unload m:1, remove m:1"},
		{"bad version", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			w.desire(doc(bad))
			w.begin()
			w.end(keyOf(bad), outcome{})
			w.begin()
			w.end(keyOf(bad), permanent)
			w.settle()
			w.desire(doc(bad)) // a new generation with the same digest
			w.settle()
		}, "fetch m:3, check m:3"},
		{"bad version, then another", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.desire(doc(bad))
			w.begin()
			w.end(keyOf(bad), permanent)
			w.settle()
			w.log = nil
			w.desire(doc(v1))
			w.settle()
		}, "remove m:3"},
		{"newer preempts a fetch", func(w *world) {
			w.desire(doc(v1))
			w.begin()
			w.desire(doc(v2))
			w.begin()
			w.end(keyOf(v1), outcome{err: errors.New("cancelled")})
			w.settle()
		}, "fetch m:1, cancel m:1, fetch m:2, check m:2, load m:2, serve m:2, remove m:1"},
		{"start with what served last, then the wanted one", func(w *world) {
			w.desire(doc(v2))
			old := w.core.add(keyOf(v1), w.now)
			old.stage, old.good = stored, true
			w.onDisk[old.digest] = true
			w.settle()
		}, "load m:1, serve m:1, fetch m:2, check m:2, load m:2, serve m:2, unload m:1, remove m:1"},
		{"start with the wanted one that served last", func(w *world) {
			w.desire(doc(v2))
			v := w.core.versions[keyOf(v2)]
			v.stage, v.good = stored, true
			w.onDisk[v.digest] = true
			w.settle()
		}, "load m:2, serve m:2"},
		{"the one that served last does not load any more", func(w *world) {
			w.desire(doc(v2))
			old := w.core.add(keyOf(v1), w.now)
			old.stage, old.good = stored, true
			w.onDisk[old.digest] = true
			w.begin()
			w.end(keyOf(v1), permanent)
			w.settle()
		}, "load m:1, fetch m:2, check m:2, load m:2, serve m:2, remove m:1"},
		{"same name, other bytes", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			w.desire(doc(wantVersion("m", 1, "other")))
			w.settle()
		}, "fetch m:1, check m:1, withdraw m:1, unload m:1, load m:1, serve m:1, remove m:1"},
		{"same name, other bytes that do not load", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			other := wantVersion("m", 1, "other")
			w.desire(doc(other))
			for range 3 {
				w.begin()
				for k := range w.busy {
					w.end(k, outcome{})
				}
			}
			w.begin()
			w.end(keyOf(other), permanent)
			w.settle()
		}, "fetch m:1, check m:1, withdraw m:1, unload m:1, load m:1, load m:1, serve m:1"},
		{"lost bundle", func(w *world) {
			w.desire(doc(v1))
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin()
			delete(w.onDisk, keyOf(v1).digest)
			w.settle()
		}, "fetch m:1, check m:1, fetch m:1, check m:1, load m:1, serve m:1"},
		{"one bundle under two names", func(w *world) {
			w.desire(doc(wantVersion("a", 1, "same"), wantVersion("b", 1, "same")))
			w.settle()
			w.desire(doc(wantVersion("b", 1, "same")))
			w.settle()
			if !w.onDisk[digestOf("same")] {
				w.complain("the bundle is gone that b:1 serves from")
			}
		}, "fetch a:1, check a:1, fetch b:1, load a:1, check b:1, serve a:1, load b:1, serve b:1, withdraw a:1, unload a:1, remove a:1"},
		{"no room until others are removed", func(w *world) {
			w.desire(doc(v1))
			w.begin()
			w.desire(doc(v2))
			w.begin()
			w.end(keyOf(v1), outcome{err: errors.New("cancelled")})
			w.begin()
			w.end(keyOf(v2), outcome{err: errNoRoom, noRoom: true, wait: time.Minute})
			w.settle()
			if w.now.Unix() != 1e9 {
				w.complain("waited before the next try")
			}
		}, "fetch m:1, cancel m:1, fetch m:2, remove m:1, fetch m:2, check m:2, load m:2, serve m:2"},
		{"cannot run any more", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			w.core.lost(keyOf(v1).id, "the child could not open it", false, w.now)
			w.settle()
		}, "withdraw m:1, unload m:1, check m:1, load m:1, serve m:1"},
		{"has harmed the process that ran it", func(w *world) {
			w.desire(doc(v1))
			w.settle()
			w.log = nil
			w.core.lost(keyOf(v1).id, "it crashed twice", true, w.now)
			w.settle()
			if v := w.core.versions[keyOf(v1)]; v.wire() != dunlinv1.VersionState_VERSION_STATE_QUARANTINED || v.reason() != "it crashed twice" {
				w.complain("%s: %s", v.wire(), v.reason())
			}
		}, "withdraw m:1, unload m:1"},
		{"lost before its load has been taken note of", func(w *world) {
			w.desire(doc(v1))
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin()
			w.core.lost(keyOf(v1).id, "the child could not open it", false, w.now)
			w.settle()
		}, "fetch m:1, check m:1, load m:1, unload m:1, check m:1, load m:1, serve m:1"},
		{"lost, and then its load fails", func(w *world) {
			w.desire(doc(v1))
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin()
			w.end(keyOf(v1), outcome{})
			w.begin()
			w.core.lost(keyOf(v1).id, "the child could not open it", false, w.now)
			w.end(keyOf(v1), outcome{err: errors.New("passing")})
			w.settle()
		}, "fetch m:1, check m:1, load m:1, load m:1, serve m:1"},
		{"back to one that failed as the stand-in", func(w *world) {
			v := w.core.add(keyOf(v1), w.now) // as a start finds it
			v.stage, v.good, w.onDisk[v.digest] = stored, true, true
			w.desire(doc(v2))
			w.begin()
			w.end(keyOf(v1), permanent)
			w.desire(doc(v1))
			w.settle()
		}, "load m:1, load m:1, serve m:1, remove m:2"},
		{"a route keeps its target until the new one runs", func(w *world) {
			a, b := wantVersion("a", 1, "a"), wantVersion("b", 1, "b")
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{a}, Routes: []*dunlinv1.DesiredRoute{route("r", target("a", 0))}})
			w.settle()
			w.log = nil
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{b}, Routes: []*dunlinv1.DesiredRoute{route("r", target("b", 0))}})
			w.settle()
		}, "fetch b:1, check b:1, load b:1, serve b:1, route :0, withdraw a:1, unload a:1, remove a:1"},
		{"a route keeps the target of its rule until the new one runs", func(w *world) {
			ruled := func(model string) []*dunlinv1.DesiredRoute {
				r := route("r", target("c", 0))
				r.Rules = []*dunlinv1.RouteRule{{Name: "a", Targets: []*dunlinv1.RouteTarget{target(model, 1)}}}
				return []*dunlinv1.DesiredRoute{r}
			}
			a, b, c := wantVersion("a", 1, "a"), wantVersion("b", 1, "b"), wantVersion("c", 1, "c")
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{a, c}, Routes: ruled("a")})
			if why := w.core.missing(w.core.routes["r"]); why != "no version of c serves" {
				t.Errorf("missing: %q", why)
			}
			w.settle()
			w.log = nil
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{b, c}, Routes: ruled("b")})
			if why := w.core.missing(w.core.routes["r"]); why != "b:1 is not loaded" {
				t.Errorf("missing: %q", why)
			}
			w.settle()
		}, "fetch b:1, check b:1, load b:1, serve b:1, route :0, withdraw a:1, unload a:1, remove a:1"},
		{"a version that a rule names stays", func(w *world) {
			one, two := wantVersion("m", 1, "1"), wantVersion("m", 2, "2")
			r := route("r", target("m", 0))
			r.Rules = []*dunlinv1.RouteRule{{Name: "a", Targets: []*dunlinv1.RouteTarget{target("m", 1)}}}
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{one}, Routes: []*dunlinv1.DesiredRoute{r}})
			w.settle()
			w.log = nil
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{two}, Routes: []*dunlinv1.DesiredRoute{r}})
			w.settle()
		}, "fetch m:2, check m:2, load m:2, serve m:2"},
		{"a version that a fallback or a shadow names stays, and its route is ready without", func(w *world) {
			one, two, n1, n2 := wantVersion("m", 1, "1"), wantVersion("m", 2, "2"), wantVersion("n", 1, "3"), wantVersion("n", 2, "4")
			r := route("r", target("m", 0))
			r.Fallback = []*dunlinv1.RouteFallback{{Model: "m", Version: 1}, {Model: "gone"}}
			r.Shadow = &dunlinv1.RouteShadow{Model: "n", Version: 1, Rate: 1}
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{one, n1}, Routes: []*dunlinv1.DesiredRoute{r}})
			w.settle()
			if why := w.core.missing(w.core.routes["r"]); why != "" {
				t.Errorf("missing: %q", why)
			}
			w.log = nil
			w.desire(&dunlinv1.DesiredDocument{Versions: []*dunlinv1.DesiredVersion{two, n2}, Routes: []*dunlinv1.DesiredRoute{r}})
			w.settle()
		}, "fetch m:2, fetch n:2, check m:2, load m:2, check n:2, serve m:2, load n:2, serve n:2"},
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

func keyOf(v *dunlinv1.DesiredVersion) key {
	return key{engine.VersionID{Model: v.Model, Version: v.Version}, digest.Digest(v.Digest)}
}

// Whatever is wanted, in whatever order things end and fail: what serves is
// never taken away before its replacement runs, what is in quarantine never
// serves, at most so many things are under way; and when things stop failing,
// what is wanted serves, and nothing else is left.
func TestCoreConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t.Fatalf)
		models := []string{"a", "b", "c"}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 6).Draw(t, "step") {
			case 2:
				m := rapid.SampledFrom(models).Draw(t, "breaks")
				if k, ok := w.serving[m]; ok {
					w.core.lost(k.id, "its process could not open it", false, w.now)
				}
			case 0:
				doc := &dunlinv1.DesiredDocument{}
				for _, m := range models {
					n := rapid.Int64Range(0, 3).Draw(t, "version")
					if n == 0 {
						continue
					}
					bytes := fmt.Sprint(m, n)
					if rapid.IntRange(0, 9).Draw(t, "other") == 0 {
						bytes = "shared"
					}
					v := wantVersion(m, n, bytes)
					v.SizeBytes = rapid.SampledFrom([]uint64{0, 100, 1 << 30}).Draw(t, "size")
					v.Delivery = &dunlinv1.Delivery{Priority: rapid.Uint32Range(0, 2).Draw(t, "priority")}
					doc.Versions = append(doc.Versions, v)
					if rapid.Bool().Draw(t, "route") {
						doc.Routes = append(doc.Routes, route("r-"+m, target(m, n*rapid.Int64Range(0, 1).Draw(t, "pin"))))
					}
				}
				w.desire(doc)
			case 1:
				w.now = w.now.Add(time.Duration(rapid.IntRange(0, 100).Draw(t, "seconds")) * time.Second)
			default:
				var busy []key
				for _, v := range w.core.sorted() {
					if _, ok := w.busy[v.key]; ok {
						busy = append(busy, v.key)
					}
				}
				if len(busy) == 0 {
					continue
				}
				k := rapid.SampledFrom(busy).Draw(t, "ends")
				o := outcome{wait: time.Duration(rapid.IntRange(1, 60).Draw(t, "wait")) * time.Second}
				switch rapid.IntRange(0, 4).Draw(t, "how") {
				case 0:
					o.err, o.noRoom = errors.New("passing"), rapid.Bool().Draw(t, "no room")
				case 1:
					if w.busy[k].op == fetching && rapid.Bool().Draw(t, "waits") {
						o.waits = &WaitError{"a window", w.now.Add(o.wait)}
						o.err = o.waits
						break
					}
					o.err, o.permanent = errors.New("permanent"), w.busy[k].op == fetching || w.busy[k].op == checking || w.busy[k].op == loading
				}
				w.end(k, o)
			}
			before, broken := map[string]key{}, map[string]bool{}
			for m, k := range w.serving {
				before[m], broken[m] = k, w.core.versions[k].broken
			}
			w.begin()
			for m, k := range before {
				now, ok := w.serving[m]
				want := w.core.desired[m]
				if !ok && want != nil && want.id != k.id && !broken[m] {
					t.Fatalf("%s is wanted and is not served any more: %v", m, w.log)
				}
				if ok && w.loaded[now.id] != now.digest {
					t.Fatalf("%v serves and is not loaded", now)
				}
			}
			count := map[op]int{}
			for k, a := range w.busy {
				count[a.op]++
				if w.serving[k.id.Model] == k && a.op == unloading {
					t.Fatalf("%v serves and is being unloaded", k)
				}
			}
			for o, limit := range busyLimit {
				if count[o] > limit {
					t.Fatalf("%d are busy with %v", count[o], o)
				}
			}
		}
		w.settle()
		for m, want := range w.core.desired {
			if got := w.serving[m]; want.quarantine == "" && got != want.key {
				t.Fatalf("%s: serves %v, want %v (%+v): %v", m, got, want.key, want, w.log)
			}
		}
		for _, v := range w.core.sorted() {
			if !w.core.needed(v) {
				t.Fatalf("left over: %+v", v)
			}
			if w.core.desired[v.id.Model] == nil {
				t.Fatalf("not wanted: %+v", v)
			}
		}
		for m := range w.serving {
			if w.core.desired[m] == nil {
				t.Fatalf("%s serves and is not wanted", m)
			}
		}
		for id := range w.loaded {
			if k, ok := w.serving[id.Model]; (!ok || k.id != id) && !w.core.pinned(id) {
				t.Fatalf("%v is loaded and does not serve", id)
			}
		}
	})
}
