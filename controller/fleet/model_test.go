package fleet

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/internal/sketch"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// How a version behaves on devices.
const (
	fine    = iota
	refuses // is quarantined
	stalls  // never becomes ready
	errs    // answers every other request with an error
	behaves // number of behaviours
)

// device is a simulated device: what it has synced outlives a crash, what it
// has received does not.
type device struct {
	Device
	connected bool
	heard     time.Time
	received  *generation // of the controller, not synced
	synced    *generation
	fetched   map[versionKey]bool // ready to serve, or refused
}

type generation struct {
	number int
	doc    *dunlinv1.DesiredDocument
}

// world is a controller that keeps only what its store keeps, and devices.
type world struct {
	*rapid.T
	now         time.Time
	devices     map[string]*device
	documents   map[string]*generation
	deployments map[string]Deployment
	freezes     []Freeze
	store       map[string]Rollout // the newest rollout of each deployment, as JSON had it
	behaviour   map[versionKey]int
	stubborn    map[string]versionKey // a version that a device refuses, whatever others do
	figures     map[string]*Figures   // by rollout, device, and whether of the new version
	operator    map[string]bool       // rollouts that an operator took on
	numbers     int64
	wakes       time.Time
	joined      int
}

func (w *world) rollouts() []Rollout {
	return slices.SortedFunc(maps.Values(w.store), func(a, b Rollout) int { return int(a.Number - b.Number) })
}

func (w *world) keep(r Rollout) {
	var kept Rollout
	data, err := json.Marshal(r)
	if err == nil {
		err = json.Unmarshal(data, &kept)
	}
	if err != nil || !kept.Equal(r) {
		w.Fatalf("rollout %+v is not kept, but %+v: %v", r, kept, err)
	}
	w.store[r.Deployment] = kept
}

func (w *world) objects() Objects {
	o := Objects{Rollouts: w.rollouts(), Freezes: w.freezes}
	for _, d := range w.deployments {
		o.Deployments = append(o.Deployments, d)
		o.Routes = append(o.Routes, Route{Name: d.Name, Targets: []Target{{d.Model, 0, 1}}})
	}
	for key := range w.behaviour {
		o.Versions = append(o.Versions, Version{Model: key.model, Version: key.version, Digest: fmt.Sprintf("sha256:%s:%d", key.model, key.version)})
	}
	return o
}

func (w *world) names() []string { return slices.Sorted(maps.Keys(w.devices)) }

// pass does what the dispatcher does: documents first, then rollouts.
func (w *world) pass() {
	w.Helper()
	w.wakes = time.Time{}
	compiler := NewCompiler(w.objects())
	closed, opens := map[string]string{}, map[string]time.Time{}
	for _, name := range w.names() {
		d := w.devices[name]
		if d.connected {
			d.heard = w.now
		}
		d.Closed, opens[name] = compiler.Closed(d.Device, w.now)
		closed[name] = d.Closed
		w.wake(opens[name])
		var had *dunlinv1.DesiredDocument
		g := w.documents[name]
		if g != nil {
			had = g.doc
		}
		doc, _ := compiler.Compile(d.Device, had)
		w.checkDocument(d, had, doc)
		_, sum, _ := Encode(doc)
		if _, before, _ := Encode(had); g == nil || sum != before {
			n := 1
			if g != nil {
				n = g.number + 1
			}
			w.documents[name] = &generation{n, doc}
		}
	}
	assigned := map[string][]*device{}
	for _, name := range w.names() {
		for _, dep := range compiler.Assigned(w.devices[name].Device) {
			assigned[dep.Name] = append(assigned[dep.Name], w.devices[name])
		}
	}
	before := w.rollouts()
	for i, r := range before {
		if r.State.Ended() {
			continue
		}
		var observations []Observation
		for _, d := range assigned[r.Deployment] {
			o := w.observe(d, r)
			o.Closed, o.Opens = closed[d.Name], opens[d.Name]
			for _, older := range w.rollouts()[:i] {
				if older.Changes(d.Name, w.now) {
					o.Busy = older.ID()
				}
			}
			observations = append(observations, o)
		}
		after, actions := r.Step(w.now, observations)
		w.checkStep(r, after, observations, actions)
		for _, a := range actions {
			if a.Kind == Wake {
				w.wake(a.At)
			}
		}
	}
}

func (w *world) wake(at time.Time) {
	if !at.IsZero() && (w.wakes.IsZero() || at.Before(w.wakes)) {
		w.wakes = at
	}
}

func (w *world) observe(d *device, r Rollout) Observation {
	o := Observation{Device: d.Name, Class: d.Class, Connected: d.connected, HeardAt: d.heard, New: *w.counts(r, d, true), Old: *w.counts(r, d, false)}
	if d.synced == nil || w.documents[d.Name] == nil || d.synced.number != w.documents[d.Name].number {
		return o
	}
	o.Observed = true
	to, from := versionKey{r.Model, r.To}, versionKey{r.Back(), r.From}
	o.Serving, o.Quarantined = d.serves(to, w), d.fetched[to] && w.how(d, to) == refuses
	if o.RolledBack = d.serves(from, w); r.From == 0 {
		o.RolledBack = !d.serves(to, w)
	}
	return o
}

func (w *world) how(d *device, v versionKey) int {
	if w.stubborn[d.Name] == v {
		return refuses
	}
	return w.behaviour[v]
}

func (d *device) wants(v versionKey) bool {
	return d.synced != nil && slices.ContainsFunc(d.synced.doc.Versions, func(h *dunlinv1.DesiredVersion) bool { return h.Model == v.model && h.Version == v.version })
}

func (d *device) serves(v versionKey, w *world) bool {
	how := w.how(d, v)
	return d.wants(v) && d.fetched[v] && (how == fine || how == errs)
}

func (w *world) counts(r Rollout, d *device, isNew bool) *Figures {
	key := fmt.Sprint(r.Number, d.Name, isNew)
	if w.figures[key] == nil {
		w.figures[key] = &Figures{Latency: make(sketch.Counts, sketch.Latency.Buckets())}
	}
	return w.figures[key]
}

// traffic sends n requests to each model of each device.
func (w *world) traffic(n uint64) {
	for _, r := range w.rollouts() {
		if r.State.Ended() {
			continue
		}
		for _, d := range w.devices {
			admitted := false
			if row, ok := r.Device(d.Name); ok {
				admitted = !row.AdmittedAt.IsZero()
			}
			for _, key := range []versionKey{{r.Model, r.To}, {r.Back(), r.From}} {
				isNew := key.version == r.To && key.model == r.Model
				if !d.serves(key, w) || isNew != admitted {
					continue
				}
				f := w.counts(r, d, isNew)
				f.Requests += n
				if w.behaviour[key] == errs {
					f.Failures += n / 2
				}
				f.Latency[40] += n
			}
		}
	}
}

// work takes a device one step on: it receives, syncs, fetches.
func (w *world) work(d *device) bool {
	newest := w.documents[d.Name]
	switch {
	case d.connected && newest != nil && (d.received == nil || d.received.number != newest.number):
		d.received = newest
	case d.received != nil && (d.synced == nil || d.synced.number != d.received.number):
		d.synced = d.received
		for key := range d.fetched { // what is not wanted is not kept
			if !d.wants(key) {
				delete(d.fetched, key)
			}
		}
	default:
		if d.synced == nil {
			return false
		}
		for _, v := range d.synced.doc.Versions {
			key := versionKey{v.Model, v.Version}
			if !d.fetched[key] && d.connected && w.how(d, key) != stalls {
				d.fetched[key] = true
				return true
			}
		}
		return false
	}
	return true
}

func (w *world) checkDocument(d *device, had, doc *dunlinv1.DesiredDocument) {
	w.Helper()
	models := map[string]bool{}
	for _, v := range doc.Versions {
		if models[v.Model] {
			w.Fatalf("%s is to have two versions of %s: %v", d.Name, v.Model, doc)
		}
		models[v.Model] = true
	}
	for _, r := range w.rollouts() {
		row, known := r.Device(d.Name)
		dep, ok := w.deployments[r.Deployment]
		if !ok || !Matches(dep.Selector, d.Device) {
			continue
		}
		model, version := r.Gives(d.Name)
		has := func(model string, version int64) bool {
			return slices.ContainsFunc(doc.Versions, func(v *dunlinv1.DesiredVersion) bool { return v.Model == model && v.Version == version })
		}
		begun := known && !row.AdmittedAt.IsZero() || r.State == RollingBack || r.State == RolledBack
		if version > 0 && !has(model, version) && (d.Closed == "" || had == nil || begun) {
			w.Fatalf("%s is not given %s:%d by %s, which is %s: %v", d.Name, model, version, r.ID(), r.State, doc)
		}
		if (model != r.Model || version != r.To) && has(r.Model, r.To) && (d.Closed == "" || begun) {
			w.Fatalf("%s is given %s:%d by %s, which is %s", d.Name, r.Model, r.To, r.ID(), r.State)
		}
	}
}

func (w *world) checkStep(before, after Rollout, observations []Observation, actions []Action) {
	w.Helper()
	at := func(format string, args ...any) {
		w.Helper()
		w.Fatalf("rollout %s, %s (%s) to %s (%s), wave %d to %d: %s", before.ID(), before.State, before.Reason, after.State, after.Reason, before.Wave, after.Wave, fmt.Sprintf(format, args...))
	}
	if after.Reason == "" {
		at("no cause")
	}
	if after.State.Ended() == after.EndedAt.IsZero() {
		at("ended at %s", after.EndedAt)
	}
	took := map[DecisionKind]int{}
	for _, a := range actions {
		if a.Kind == Decide {
			took[a.Decision.Kind]++
			if a.Decision.Reason == "" || a.Decision.By == "" {
				at("decision without its reason: %+v", a.Decision)
			}
		}
	}
	if after.Wave > before.Wave && took[DecidePass] != after.Wave-max(before.Wave, 1) {
		at("%d waves have passed without a decision: %v", after.Wave-before.Wave, took)
	}
	for state, kind := range map[State]DecisionKind{Halted: DecideHalt, RollingBack: DecideRollBack, Succeeded: DecideSucceed, Failed: DecideFail} {
		if (took[kind] > 0) != (after.State == state && before.State != state) {
			at("decisions %v", took)
		}
	}
	failed := slices.ContainsFunc(after.Gates, func(g GateResult) bool { return g.Verdict == FailedGate })
	if failed && after.State == Running && !before.Promoted {
		at("goes on past a failed gate: %+v", after.Gates)
	}
	bad := w.behaviour[versionKey{after.Model, after.To}] == errs && w.behaviour[versionKey{after.Back(), after.From}] != errs && slices.ContainsFunc(after.Strategy.Gates, func(g Gate) bool { return g.Kind == ErrorRate })
	if bad && !after.same() && !w.operator[after.ID()] && (after.State == Succeeded || after.Wave > 1) {
		at("a version whose requests fail has passed its first wave")
	}
	byName := map[string]Observation{}
	for _, o := range observations {
		byName[o.Device] = o
	}
	refusedBefore := false // by the document that a device had when it was admitted
	for _, d := range after.Devices {
		was, _ := before.Device(d.Device)
		o := byName[d.Device]
		refusedBefore = refusedBefore || was.AdmittedAt.IsZero() && !d.AdmittedAt.IsZero() && o.Quarantined
		if was.AdmittedAt.IsZero() && !d.AdmittedAt.IsZero() && after.State != RollingBack && before.State != RollingBack && (o.Closed != "" || o.Busy != "" || before.State != Running) {
			at("%s was admitted though %q, %q", d.Device, o.Closed, o.Busy)
		}
		if !was.AdmittedAt.IsZero() && d.AdmittedAt.IsZero() {
			at("%s is admitted no more", d.Device)
		}
	}
	for _, d := range after.Devices {
		if o := byName[d.Device]; after.State == RolledBack && !d.AdmittedAt.IsZero() && o.Connected && !o.RolledBack {
			at("%s is there and does not have the version before", d.Device)
		}
	}
	// What is kept is all that counts, and once is enough.
	w.keep(after)
	one, did := after.Step(w.now, observations)
	two, same := w.store[after.Deployment].Step(w.now, observations)
	if !one.Equal(two) || !sameActions(did, same) {
		at("once it is kept, another step is\n%+v %v\nand not\n%+v %v", two, same, one, did)
	}
	if after.State == before.State && !refusedBefore && slices.ContainsFunc(did, func(a Action) bool { return a.Kind == Decide }) {
		at("the same step again decides anew: %+v", did)
	}
}

func sameActions(a, b []Action) bool {
	return slices.EqualFunc(a, b, func(a, b Action) bool {
		return a.Kind == b.Kind && a.At.Equal(b.At) && a.Device == b.Device && a.Decision.Kind == b.Decision.Kind && a.Decision.Reason == b.Decision.Reason && slices.Equal(a.Decision.Devices, b.Decision.Devices)
	})
}

// settle lets all devices work and answer, and goes on in time only when
// a rollout asks for it, until nothing more happens.
func (w *world) settle() {
	w.Helper()
	w.freezes = nil
	for _, d := range w.devices {
		d.connected = true
	}
	for range 300 {
		moved := true
		for moved {
			before := w.rollouts()
			w.pass()
			moved = !slices.EqualFunc(before, w.rollouts(), Rollout.Equal)
			for _, name := range w.names() {
				moved = w.work(w.devices[name]) || moved
			}
		}
		before := w.rollouts()
		w.traffic(50)
		w.pass()
		if !slices.EqualFunc(before, w.rollouts(), Rollout.Equal) {
			continue
		}
		if w.wakes.IsZero() {
			break
		}
		if w.wakes.After(w.now) {
			w.now = w.wakes
		}
	}
	for _, r := range w.rollouts() {
		dep, ok := w.deployments[r.Deployment]
		if !ok {
			continue
		}
		matches := 0
		for _, d := range w.devices {
			if Matches(dep.Selector, d.Device) {
				matches++
			}
		}
		switch r.State {
		case Running:
			if matches > 0 {
				w.Fatalf("rollout %s is stuck at %s: %s, %+v", r.ID(), w.now, r.Reason, r.Devices)
			}
		case RollingBack:
			stuck := false
			for name, d := range w.devices {
				stuck = stuck || w.how(d, versionKey{r.Back(), r.From}) != fine && strings.Contains(r.Reason, name)
			}
			if !stuck {
				w.Fatalf("rollout %s does not come back: %s, %+v", r.ID(), r.Reason, r.Devices)
			}
		case Succeeded, RolledBack:
			for name, d := range w.devices {
				model, version := r.Gives(name)
				key := versionKey{model, version}
				if how := w.how(d, key); Matches(dep.Selector, d.Device) && version > 0 && (how == fine || how == errs) && !d.serves(key, w) {
					w.Fatalf("rollout %s is %s, and %s does not serve %v", r.ID(), r.State, name, key)
				}
			}
		}
	}
	for _, name := range w.names() {
		d := w.devices[name]
		if d.synced == nil || d.synced.number != w.documents[name].number {
			w.Fatalf("%s never took its document in", name)
		}
	}
}

func (w *world) drawDevice() *device {
	names := w.names()
	if len(names) == 0 {
		w.join()
		names = w.names()
	}
	return w.devices[rapid.SampledFrom(names).Draw(w.T, "device")]
}

func (w *world) join() {
	w.joined++
	name := fmt.Sprintf("d%02d", w.joined)
	w.devices[name] = &device{
		Device:    Device{Name: name, Class: rapid.SampledFrom([]string{"small", "large"}).Draw(w.T, "class"), Labels: map[string]string{"site": rapid.SampledFrom([]string{"a", "b"}).Draw(w.T, "site")}},
		connected: rapid.Bool().Draw(w.T, "connected"), fetched: map[versionKey]bool{},
	}
}

func (w *world) drawStrategy() Strategy {
	s := Strategy{
		Deadline: 5 * time.Minute, OnFailure: rapid.SampledFrom([]OnFailure{"", RollBack, RollBack, Halt}).Draw(w.T, "on failure"),
		MaxFailed: rapid.IntRange(0, 1).Draw(w.T, "max failed"),
		Soak:      rapid.SampledFrom([]time.Duration{0, time.Minute}).Draw(w.T, "soak"),
		AwayAfter: rapid.SampledFrom([]time.Duration{0, 2 * time.Minute}).Draw(w.T, "away after"),
		Waves: rapid.SampledFrom([][]Wave{
			nil, {{Canary: 1}}, {{Canary: 1}, {Count: 3}}, {{Percent: 20}, {Percent: 50}, {Percent: 100}},
		}).Draw(w.T, "waves"),
	}
	if rapid.Bool().Draw(w.T, "gates") {
		s.Gates, s.MinSample = []Gate{{ErrorRate, .1}, {P99, 1.5}}, uint64(rapid.SampledFrom([]int{0, 200}).Draw(w.T, "sample"))
	}
	return s
}

// apply does what the store does with a deployment that changed.
func (w *world) apply() {
	name := rapid.SampledFrom([]string{"one", "two"}).Draw(w.T, "deployment")
	old, exists := w.deployments[name]
	d := Deployment{Name: name, Model: "model-" + name, Selector: map[string]string{}, Rollout: w.drawStrategy()}
	if rapid.IntRange(0, 7).Draw(w.T, "other model") == 0 {
		d.Model += "-b"
	}
	if rapid.IntRange(0, 5).Draw(w.T, "site only") == 0 {
		d.Selector["site"] = "a"
	}
	if exists && old.Model == d.Model && rapid.IntRange(0, 7).Draw(w.T, "same version") == 0 {
		d.Version = old.Version
		if maps.Equal(d.Selector, old.Selector) {
			return
		}
	} else {
		for key := range w.behaviour {
			if key.model == d.Model {
				d.Version = max(d.Version, key.version)
			}
		}
		d.Version++
		key := versionKey{d.Model, d.Version}
		w.behaviour[key] = max(rapid.IntRange(fine-3, behaves-1).Draw(w.T, "behaviour"), fine)
		for device := range w.devices {
			delete(w.stubborn, device)
		}
		if len(w.devices) > 0 && rapid.IntRange(0, 3).Draw(w.T, "stubborn") == 0 {
			w.stubborn[w.drawDevice().Name] = key
		}
	}
	w.numbers++
	r := Rollout{Number: w.numbers, Deployment: name, Model: d.Model, To: d.Version, Strategy: d.Rollout, State: Running, StartedAt: w.now}
	for _, was := range w.rollouts() {
		if was.Deployment != name {
			continue
		}
		model, version := LastGood([]Rollout{was})
		if model != r.Model {
			r.FromModel = model
		}
		r.From = version
		if ended := was.Supersede(w.now, "a newer one"); !ended.State.Ended() {
			w.Fatalf("%s is open beside a newer one", was.ID())
		}
	}
	w.deployments[name] = d
	w.keep(r)
}

func (w *world) command() {
	all := w.rollouts()
	if len(all) == 0 {
		return
	}
	r := rapid.SampledFrom(all).Draw(w.T, "rollout")
	cmd := rapid.SampledFrom([]Command{CommandPause, CommandResume, CommandPromote, CommandAbort, CommandRollBack}).Draw(w.T, "command")
	after, d, err := r.Command(w.now, cmd, "user:ann", "because")
	if err != nil {
		if !after.Equal(r) || !strings.Contains(err.Error(), r.ID()) {
			w.Fatalf("%s changed it though %v", cmd, err)
		}
		return
	}
	if d.Kind == "" || d.By != "user:ann" || after.Reason == "" || after.Equal(r) {
		w.Fatalf("%s: %+v, %+v", cmd, d, after)
	}
	w.operator[r.ID()] = true
	w.keep(after)
}

// Two deployments over devices that come, go, crash and refuse, versions that
// are bad in every way, operators, freezes and time: whatever happens, no two
// versions of a model are wanted on one device, no failed gate is passed
// without an operator, only what is kept counts, everything has its cause, and
// when all devices are there again, everything comes to its end.
func TestRolloutModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{
			T: t, now: begin, devices: map[string]*device{}, documents: map[string]*generation{}, deployments: map[string]Deployment{}, store: map[string]Rollout{},
			behaviour: map[versionKey]int{}, stubborn: map[string]versionKey{}, figures: map[string]*Figures{}, operator: map[string]bool{},
		}
		for range rapid.IntRange(0, 6).Draw(t, "devices") {
			w.join()
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) { w.T = t; w.pass() },
			"time": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 400).Draw(t, "seconds")) * time.Second)
			},
			"work": func(t *rapid.T) {
				for range rapid.IntRange(1, 4).Draw(t, "steps") {
					w.work(w.drawDevice())
				}
			},
			"all work": func(t *rapid.T) {
				for range 4 {
					for _, name := range w.names() {
						w.work(w.devices[name])
					}
					w.pass()
				}
			},
			"traffic": func(t *rapid.T) { w.traffic(uint64(rapid.SampledFrom([]int{2, 50, 400}).Draw(t, "requests"))) },
			"leave":   func(t *rapid.T) { w.drawDevice().connected = false },
			"return":  func(t *rapid.T) { w.drawDevice().connected = true },
			"crash": func(t *rapid.T) {
				d := w.drawDevice()
				d.received = d.synced
			},
			"join": func(t *rapid.T) { w.join() },
			"remove": func(t *rapid.T) {
				if rapid.IntRange(0, 3).Draw(t, "really") == 0 {
					d := w.drawDevice()
					delete(w.devices, d.Name)
					delete(w.documents, d.Name)
				}
			},
			"move": func(t *rapid.T) {
				d := w.drawDevice()
				d.Labels = map[string]string{"site": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "site")}
			},
			"apply":   func(t *rapid.T) { w.apply() },
			"apply 2": func(t *rapid.T) { w.apply() },
			"command": func(t *rapid.T) { w.command() },
			"freeze": func(t *rapid.T) {
				f := Freeze{Name: "f", Reason: "stock", Selector: map[string]string{"site": "a"}}
				if rapid.Bool().Draw(t, "until") {
					f.Until = w.now.Add(10 * time.Minute)
				}
				w.freezes = []Freeze{f}
			},
			"thaw": func(t *rapid.T) { w.freezes = nil },
		})
		w.T = t
		w.settle()
	})
}
